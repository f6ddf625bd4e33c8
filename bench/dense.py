"""What the dense rewards of a finished run said, read from its rollouts.jsonl (ablate.py keeps it with --keep):

    python bench/dense.py runs/demo

(1) spread    the standard deviation of each weighted reward within a group: of groups that are all wrong, where only
              dense rewards can tell answers that run apart, and of groups with right and wrong completions;
(2) memory    does closeness to verified reasoning mean correctness? How often the cosine ranks a right completion above
              a wrong one of its group, right ones not being given their 1. The memory is built up again step by step;
(3) results   in groups that are all wrong: how often atomic and memory rank two completions as the soft-F1 of their
              results does (only of a run with the `result` reward).

Of (2) and (3) 50 % is chance; ties count half.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cold_start import template_traces  # noqa: E402
from common import options  # noqa: E402
from common.errors import UserError, parse_json, read_text, run_main  # noqa: E402
from data import Example, Splits, columns_of, load_splits  # noqa: E402
from partial_credit.memory import TraceMemory, gate_for  # noqa: E402
from rewards import MemoryGate, RewardConfig, build_memory  # noqa: E402

DENSE = ("atomic", "memory")


def spread(groups: list[list[dict]], weights: dict[str, float]) -> dict[str, float]:
    """Mean over groups of the standard deviation of each weighted reward."""
    return {name: fmean(stdev(weight * c["rewards"][name] for c in group) for group in groups)
            for name, weight in weights.items() if weight}


def agreement(pairs: Iterable[tuple[float, float]]) -> float:
    """Share of (higher, lower) pairs in which the first is the larger; ties count half."""
    return fmean(in_order(a, b) for a, b in pairs)


def in_order(a: float, b: float) -> float:
    """Whether the first is the larger; a tie is a half."""
    return (a > b) + (a == b) / 2


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """The config.json of a run and its logged groups that have gold SQL. Raises UserError: they cannot be read."""
    config, rollouts = folder / "config.json", folder / "rollouts.jsonl"
    settings = parse_json(read_text(config), config)
    records = [parse_json(line, rollouts) for line in read_text(rollouts).splitlines()]
    return settings, [record for record in records if record["gold_sqls"]]


def splits_of(config: dict) -> Splits:
    """The data of a run, by its config.json; with traces of the template, where it was trained on them."""
    template = config["traces"] == "template"
    data = load_splits(config["data"], config["data_dir"], config["split"],
                       traces=None if template else config["traces"], seed=config["seed"], world=config["world"],
                       dev_size=config["eval_questions"], test_size=config["test_questions"])
    return replace(data, traced=template_traces(data.train, columns_of(data.databases))) if template else data


def fill(memory: TraceMemory, traced: Iterable[Example]) -> TraceMemory:
    """The memory with the verified traces that a run begins with, and the gate that fits them."""
    verified = [(example.db_id, example.trace) for example in traced if not example.trace_sql]
    memory.gate = gate_for(verified, memory.columns, memory.gate)
    memory.add_many(verified)
    return memory


def memory_ranks(records: list[dict], config: dict) -> list[tuple[float, float]]:
    """(cosine of a right completion, of a wrong one of its group), with the memory of the step before."""
    data = splits_of(config)
    memory = fill(build_memory(options.build(RewardConfig, config), options.build(MemoryGate, config),
                               columns_of(data.databases)), data.traced)
    pairs = []
    for _, groups in groupby(records, key=lambda record: record["step"]):
        groups = list(groups)
        for group in groups if len(memory) else ():
            shaped = [c for c in group["completions"] if c["status"] != "format"]
            cosines = memory.similarities([(group["db_id"], c["thought"]) for c in shaped])
            right, wrong = ([value for value, c in zip(cosines, shaped, strict=True) if c["correct"] is kind]
                            for kind in (True, False))
            pairs += product(right, wrong)
        memory.add_many([(group["db_id"], c["thought"])
                         for group in groups for c in group["completions"] if c["correct"]])
    return pairs


def report_lines(config: dict, records: list[dict]) -> list[str]:
    """The lines that are printed; a figure of which there is nothing to compute is left out."""
    weights = options.build(RewardConfig, config).weights
    groups = [record["completions"] for record in records]
    wrong = [group for group in groups if not any(c["correct"] for c in group)]
    mixed = [group for group in groups if any(c["correct"] for c in group) and not all(c["correct"] for c in group)]
    lines = [f"{len(groups)} groups: {len(wrong)} all wrong, {len(mixed)} mixed"]
    for name, part in (("all wrong", wrong), ("mixed", mixed)):
        if part:
            values = "  ".join(f"{reward} {value:.3f}" for reward, value in spread(part, weights).items())
            lines.append(f"(1) spread, {name:<9}  {values}")
    if weights["memory"] and (pairs := memory_ranks(records, config)):
        lines.append(f"(2) memory ranks right above wrong in {100 * agreement(pairs):.1f} % of pairs")
    for name in DENSE if weights["result"] else ():
        pairs = [(a["rewards"][name], b["rewards"][name]) for group in wrong for a in group for b in group
                 if a["rewards"]["result"] > b["rewards"]["result"] and "format" not in (a["status"], b["status"])]
        if weights[name] and pairs:
            lines.append(f"(3) {name} agrees with soft-F1 in {100 * agreement(pairs):.1f} % of pairs")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    folder = parser.parse_args().run
    config, records = read_run(folder)
    if config["embedder"] == "policy":
        raise UserError(f"{folder / 'config.json'}: the embedder is the run's own policy, which is not loaded here")
    print(*report_lines(config, records), sep="\n")


if __name__ == "__main__":
    run_main(main)
