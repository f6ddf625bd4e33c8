"""A step of the cold start in several ways, side by side in one process:

    python bench/cold_start_speed.py --data-dir SPIDER

    padded          prompts and completions as padded rows (`--engine plain`)
    packed          one row without padding
    shared          the same, with batches of which a few questions at a time are on one database
    shared, bf16    the same in bf16 arithmetic, where the processor has it

A batch is drawn from the template traces of the training questions, anew for each step and the same for `padded` and
`packed`. A step is everything from the batch to the optimizer's step. Prints a table in Markdown: medians of the steps
but the first, the tokens that went through the model, and how many times less time is needed than by padded rows.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
import cold_start  # noqa: E402
from common.errors import run_main  # noqa: E402
from data import PromptBuilder, PromptConfig, columns_of, load_dataset  # noqa: E402
from engine.fast import FAST  # noqa: E402
from engine.tree import Tree  # noqa: E402
from grpo import PLAIN  # noqa: E402
from policy import load_policy, prefers_bf16  # noqa: E402

FLAGS = {"model": ("smollm2-135m", "to be trained"), "data": ("spider", "whose training questions are taught"),
         "data_dir": (None, "its folder")}
NUMBERS = {"batch": (16, "traces a step"), "steps": (3, "steps a way, the first of them not counted"),
           "threads": (2, "of PyTorch")}


def template_pairs(options, policy) -> list:
    """(prompt, completion) of the training questions."""
    data = load_dataset(options.data, options.data_dir, "train")
    traced = cold_start.template_traces(data.examples, columns_of(data.databases))
    builder = PromptBuilder(data.databases, policy.tokenizer, PromptConfig(style="compact", max_prompt_tokens=512))
    return cold_start.supervised_pairs(traced, builder, policy.tokenizer, policy.end_id)[0]


def ways(options, pairs: Sequence, bf16: bool) -> dict[str, tuple]:
    """{name: (batches, engine, whether in bf16)}"""
    def batches(kin=None):
        numbers = cold_start._batches(len(pairs), options.batch, options.steps, 0, kin)
        return [[pairs[i] for i in batch] for batch in numbers]

    mixed, kin = batches(), batches(cold_start.families([prompt for prompt, _ in pairs]))
    found = {"padded": (mixed, PLAIN, False), "packed": (mixed, FAST, False), "shared": (kin, FAST, False)}
    return found | ({"shared, bf16": (kin, FAST, True)} if bf16 else {})


def seconds(model, batches, engine, bf16: bool) -> list[float]:
    """Of each step."""
    optimizer, taken = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), []
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16, cache_enabled=False)
    for batch in batches:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        cold_start._backward(model, batch, 0.0, autocast, cold_start.PASS_TOKENS, engine)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        taken.append(time.perf_counter() - began)
    return taken


def tokens(batch, engine) -> int:
    """That go through the model for a batch."""
    if engine is PLAIN:
        return len(batch) * max(len(prompt) + len(completion) for prompt, completion in batch)
    parts = cold_start.passes(batch, cold_start.PASS_TOKENS)
    return sum(Tree([torch.cat(pair) for pair in part]).size for part in parts)


def main() -> None:
    """Measure each way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in (FLAGS | NUMBERS).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int if name in NUMBERS else str, default=default,
                            help=f"{text} (default: {default})")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = load_policy(options.model)
    model = policy.model.train()
    pairs = template_pairs(options, policy)
    bf16 = prefers_bf16(sum(weight.numel() for weight in model.parameters()), gpu=False)
    print(f"{options.model}, {options.batch} traces a step, {options.threads} threads"
          + ("" if bf16 else "; this processor has no arithmetic in bf16") + "\n\n"
          "| | tokens | s a step | times less |\n|---|---|---|---|")
    first = None
    for name, (batches, engine, half) in ways(options, pairs, bf16).items():
        taken = statistics.median(seconds(model, batches, engine, half)[min(1, options.steps - 1):])
        first = first or taken
        through = statistics.median(tokens(batch, engine) for batch in batches)
        print(f"| {name} | {through:.0f} | {taken:.3g} | {first / taken:.1f} |", flush=True)


if __name__ == "__main__":
    run_main(main)
