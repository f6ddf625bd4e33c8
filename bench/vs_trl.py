"""A GRPO step here beside one of TRL's GRPOTrainer, by phase, on the CPU:

    python bench/vs_trl.py --trl-python .venv-trl/bin/python
    python bench/vs_trl.py --prompt 300 --completion 100 --group 8

Both sides run in turn, each in a fresh process, on the same random Qwen2 (12.5 million parameters: vocabulary 8000,
width 384, 6 layers, 6 heads, 2 key-value heads), the same prompts, the same lengths of completions (how they are
forced on both: bench/steps.py), in float32, with a KL term, without gradient checkpointing and without vLLM. TRL does
its own work from its own `train()`; its methods are only timed:

    rollout     TRL: `_generate_single_turn`, which is transformers' `generate`;      here: `sample_groups`
    reference   TRL: `_get_per_token_logps_and_entropies` without gradient;           here: `reference_logprobs`
    update      TRL: all of a step that is not rollout, rewards or reference;         here: `policy_update`
    step        the whole, up to the optimizer's step and its end

The first step of each side warms up and is not counted. Prints a table in Markdown: medians of the other steps, how
many times less is needed here, and the peak memory of each process, also without what its imports took.
"""

import argparse
import statistics
import sys
import tempfile

import steps
from steps import Plan

PHASES = ("rollout", "reference", "update", "step")
FLAGS = {"prompt": (1200, "tokens of a prompt"), "completion": (150, "the most tokens of a completion"),
         "group": (16, "completions a prompt"), "steps": (4, "steps, the first of them not counted"),
         "threads": (2, "threads of each process"), "seed": (0, "of prompts and lengths")}


def medians(result: dict) -> dict[str, float]:
    """Of each phase, over all steps but the first."""
    counted = result["steps"][1:] or result["steps"]
    return {phase: statistics.median(step[phase] for step in counted) for phase in PHASES}


def table(plan: Plan, ours: dict, theirs: dict) -> str:
    """Markdown."""
    rows = [(f"{name}, s", here, there) for (name, here), there
            in zip(medians(ours).items(), medians(theirs).values(), strict=True)]
    rows += [("peak memory, GB", ours["peak_mb"] / 1024, theirs["peak_mb"] / 1024),
             ("without imports, GB", *((side["peak_mb"] - side["imported_mb"]) / 1024 for side in (ours, theirs)))]
    lines = [f"| {plan.prompt}/{plan.completion}/{plan.group} | here | TRL 1.16.0 | ratio |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {here:.2f} | {there:.2f} | {there / here:.1f} |"
                              for name, here, there in rows])


def main() -> None:
    """Measure both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--shortest", type=float, default=0.5,
                        help="length of a group's shortest completion, as a share of --completion (default: 0.5)")
    parser.add_argument("--trl-python", default=sys.executable, help="python that has TRL (default: this one)")
    options = vars(parser.parse_args())
    python = options.pop("trl_python")
    if not steps.can_import(python, "trl"):
        sys.exit(steps.MISSING.format(python=python, script="vs_trl.py"))
    plan = Plan(**options)
    with tempfile.TemporaryDirectory() as folder:
        steps.make_model(folder, steps.BENCH_MODEL)
        ours = steps.measure("ours", folder, plan)
        theirs = steps.measure("trl", folder, plan, python)
    if ours["tokens"] != theirs["tokens"]:
        sys.exit(f"the sides sampled different numbers of tokens: {ours['tokens']} and {theirs['tokens']}")
    print(f"Prompt {plan.prompt} tokens, completions of {min(plan.lengths())} to {plan.completion} "
          f"({ours['tokens'][0]} in all), G = {plan.group}; {plan.threads} threads, median of "
          f"{max(1, plan.steps - 1)} steps.\n\n{table(plan, ours, theirs)}")


if __name__ == "__main__":
    main()
