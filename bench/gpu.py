"""A GRPO step of real shapes on one GPU, here and in TRL with transformers' `generate`:

    python bench/gpu.py --trl-python .venv-trl/bin/python
    python bench/gpu.py --tiny        # a check on the CPU that the bench itself works; none of its figures count

Qwen2.5-0.5B and -3B with random weights, prompts of 1,500 tokens, completions up to 300, G = 16 and 32, bf16
arithmetic on float32 weights, full fine-tuning and LoRA of rank 16, gradient checkpointing where `--checkpointing`
names the model. Lengths as in steps.py, each side in a fresh process, the first step not counted. TRL's rows need its
python, LoRA's need peft.

Utilisation (MFU) is that of the update: the arithmetic that a group needs when its prompt is computed once, forward
and backward, without what checkpointing repeats, over the seconds that the update took and the card's peak in bf16. It
counts the same work on both sides. Prints a table in Markdown.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile

import steps
from steps import Plan

MODELS = {
    "Qwen2.5-0.5B": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                     "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen2.5-3B": {"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
                   "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True}}
TINY = {"tiny": {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}}
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165}  # dense bf16 TFLOP/s
HEADER = ("| model | trained | G | side | samples/s | rollout tokens/s | update, s | MFU | peak memory, GB |\n"
          "|---|---|---|---|---|---|---|---|---|")


def update_flops(model: dict, plan: Plan) -> float:
    """Of a forward and a backward over a group, its prompt computed once."""
    D, L, V = model["hidden_size"], model["num_hidden_layers"], model["vocab_size"]
    shared = model["num_key_value_heads"] / model["num_attention_heads"]
    weights = L * D * (2 * D + 2 * D * shared + 3 * model["intermediate_size"])
    P, completions = plan.prompt, plan.lengths()
    pairs = P * P / 2 + sum(C * P + C * C / 2 for C in completions)  # of a query and a key that it sees
    forward = 2 * weights * (P + sum(completions)) + 4 * L * D * pairs + 2 * V * D * sum(completions)
    return forward * (3 if not plan.lora_rank else 2)  # with LoRA no gradient of the weights


def row(name: str, model: dict, plan: Plan, side: str, python: str, folder: str, peak: float | None) -> str:
    """A line of the table."""
    start = f"| {name} | {f'LoRA {plan.lora_rank}' if plan.lora_rank else 'all'} | {plan.group} | {side} |"
    try:
        result = steps.measure("ours" if side == "here" else "trl", folder, plan, python)
    except steps.Failed as failure:
        last = str(failure).strip().splitlines()[-1]
        return f"{start} {'out of memory' if 'OutOfMemory' in str(failure) else last} | | | | |"
    counted = result["steps"][1:]
    step, rollout, update = (statistics.median(s[phase] for s in counted) for phase in ("step", "rollout", "update"))
    peak = peak or next((value for card, value in PEAKS.items() if card in result.get("gpu", "")), None)
    used = f"{update_flops(model, plan) / update / peak / 1e12:.1%}" if peak else ""
    memory = result.get("gpu_mb", result["peak_mb"]) / 1024
    return (f"{start} {plan.group / step:.2f} | {sum(plan.lengths()) / rollout:.0f} | {update:.2f} | {used} "
            f"| {memory:.1f} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to check the bench")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--groups", nargs="+", type=int, default=[16, 32], help="values of G (default: 16 32)")
    parser.add_argument("--lora", nargs="+", type=int, default=[0, 16], help="ranks; 0: all weights (default: 0 16)")
    parser.add_argument("--steps", type=int, default=4, help="steps, the first not counted (default: 4)")
    parser.add_argument("--kl-coef", type=float, default=0.04, help="0: no reference (default: 0.04)")
    parser.add_argument("--checkpointing", nargs="*", choices=MODELS, default=["Qwen2.5-3B"],
                        help="models with gradient checkpointing (default: Qwen2.5-3B)")
    parser.add_argument("--peak-tflops", type=float, help="of the card in bf16 (default: by its name)")
    parser.add_argument("--trl-python", default=sys.executable, help="python that has TRL (default: this one)")
    options = parser.parse_args()
    if options.tiny:
        options.groups, options.steps, options.checkpointing = [2, 4], 2, []
    return options


def main() -> None:
    """Measure every combination; prints a row as soon as it is known."""
    options = parse()
    import torch

    if not options.tiny and not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a CUDA GPU (--tiny checks the bench itself without one)")
    shape = Plan(24, 8, 2, threads=1) if options.tiny else Plan(1500, 300, 16, device="cuda", threads=0)
    with_trl = steps.can_import(options.trl_python, "trl")
    if not with_trl:
        print(steps.MISSING.format(python=options.trl_python, script="gpu.py"), file=sys.stderr)
    print(HEADER)
    for name, model in TINY.items() if options.tiny else [(name, MODELS[name]) for name in options.models]:
        with tempfile.TemporaryDirectory() as folder:
            steps.make_model(folder, model)
            for rank, G, side in itertools.product(options.lora, options.groups, ["here"] + ["TRL"] * with_trl):
                python = sys.executable if side == "here" else options.trl_python
                if rank and not steps.can_import(python, "peft"):
                    print(f"no row of LoRA, G = {G}, {side}: {python} cannot import peft", file=sys.stderr)
                    continue
                plan = dataclasses.replace(shape, group=G, steps=options.steps, kl_coef=options.kl_coef, lora_rank=rank,
                                           checkpointing=name in options.checkpointing)
                print(row(name, model, plan, side, python, folder, options.peak_tflops), flush=True)


if __name__ == "__main__":
    main()
