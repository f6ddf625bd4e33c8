"""What --constrain costs: seconds per decoding step of a trained policy, with the rule and without, in turn.

    python bench/names.py --model runs/geoquery/best --data geoquery/questions.jsonl --data-dir geoquery
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.options import build
from data import PromptBuilder, PromptConfig, load_dataset
from engine.fast import FAST
from grpo import GRPOConfig, sample_groups
from history import run_config_of
from policy import load_for_sampling
from prompts.answer_format import AnswerFormat
from prompts.names import name_rules
from running.layers import handed_on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--split", default="test")
    parser.add_argument("--constrain", choices=("names", "scope"), default="names")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    made_by = handed_on(run_config_of(given.model))  # as evaluate.py asks it
    dataset = load_dataset(given.data, given.data_dir, given.split)
    policy = load_for_sampling(given.model)
    config = build(PromptConfig, made_by)
    builder = PromptBuilder(dataset.databases, policy.tokenizer, config)
    asked = builder.encode_all(dataset.examples)[0][:given.rows]
    prompts = [torch.tensor(ids) for _, ids in asked]
    names = name_rules(given.constrain, policy, dataset.databases, AnswerFormat(config.answer_style))
    rules = names.of_all(example for example, _ in asked)
    settings = GRPOConfig(max_completion_tokens=made_by.get("max_completion_tokens", 128))

    def seconds_per_step(rules, seed: int) -> float:
        began = time.perf_counter()
        groups = sample_groups(policy.model, prompts, settings, eos_ids=policy.eos_ids, group_size=1, temperature=1.0,
                               seeds=range(seed, seed + len(prompts)), engine=FAST, rules=rules)
        return (time.perf_counter() - began) / max(len(group.completions[0]) for group in groups)

    found = {"without": [], "with": []}
    for seed in range(given.repeats + 1):  # the first warms up
        for name, chosen in (("without", None), ("with", rules)):
            found[name].append(seconds_per_step(chosen, 1000 * seed))
    without, limited = (median(values[1:]) for values in found.values())
    print(f"{len(prompts)} rows: {1e3 * without:.1f} ms per token without the rule, {1e3 * limited:.1f} with it, ratio "
          f"{limited / without:.2f}")


if __name__ == "__main__":
    main()
