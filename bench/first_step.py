"""Which way does each cell of an ablation push the policy at its first step? Measured on the rollouts of a run:

    python bench/first_step.py runs/knows --grid dense
    python bench/first_step.py runs/knows --vary advantage_scale=group,none --vary execution_runs=1,0

Every cell scores the same completions, as its own first step would, and gives them its advantages A. Were the policy a
table with a probability π for each answer, the step of size η that A asks for (π becomes π · exp(η A), divided by its
sum) would change the mean of any property x of the answers to a question by

    η · Cov(A, x)  over its group, to first order in η,

because the derivative of Σ π exp(η A) x / Σ π exp(η A) at η = 0 is E[A x] − E[A] E[x]. How large the advantages of a
cell are says nothing: AdamW divides each gradient by its usual size, and clipping limits its norm. So what is printed
is Cov(A, x) / rms(A), with the root of the mean of A² over all completions of the cell: twice the advantages give the
same figure. It is the mean over groups; for the first cell with its interval, for the others with the paired difference
to the first and the interval of that (95 %, bootstrapped over groups). A network shares its weights among all answers,
so what it learns from one question moves the others too; a table knows nothing of that.

    flat               share of groups whose rewards are all equal, so that they teach nothing
    right, runs        x is 1 for an answer that is right; that runs
    a needed join      x is 1 for an answer with a join, in groups whose gold has one
    a needless join    likewise, in groups whose gold has none
    nearer             x is the soft-F1 of the rows, in groups that are all wrong
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dense  # noqa: E402

from ablate import as_flags, cells_of, joins_in  # noqa: E402
from common import options  # noqa: E402
from common.errors import UserError, run_main  # noqa: E402
from data import columns_of  # noqa: E402
from grpo import GRPOConfig  # noqa: E402
from prompts.answer_format import AnswerFormat  # noqa: E402
from rewards import (  # noqa: E402
    MemoryGate,
    RewardBreakdown,
    RewardConfig,
    RewardItem,
    RewardScorer,
    build_memory,
    build_rarity,
)
from rollout import advantages_of  # noqa: E402
from sql_exec import MATCHES, SQLExecutor  # noqa: E402

COLUMNS = ("right", "runs", "a needed join", "a needless join", "nearer")


class Scores:
    """What any set of rewards says of the completions of a run, at its beginning."""

    def __init__(self, config: dict, records: Sequence[dict], data, executor: SQLExecutor):
        self.config, self.data, self.executor = config, data, executor
        self.schemas = columns_of(data.databases)
        self.size = len(records[0]["completions"])  # G
        self.items = [RewardItem(record["db_id"], record["gold_sqls"], c["text"], record["question"])
                      for record in records for c in record["completions"]]

    def of(self, rewards: RewardConfig) -> list[list[RewardBreakdown]]:
        """[B][G]"""
        memory = build_memory(rewards, options.build(MemoryGate, self.config), self.schemas)
        answer_format = AnswerFormat(self.config["answer_style"], rewards.lenient_format)
        scorer = RewardScorer(rewards, self.executor, self.schemas, memory and dense.fill(memory, self.data.traced),
                              match=MATCHES[self.config["match"]], answer_format=answer_format,
                              rarity=build_rarity(rewards, self.data.train, self.schemas))
        found = scorer.score(self.items, remember=False)
        if unread := next((b for b in found if b.unavailable), None):
            raise UserError(f"an answer has no verdict, since its database could not be read ({unread.error}): measure "
                            "again when it can")
        return [found[i:i + self.size] for i in range(0, len(found), self.size)]


def properties(rows: Sequence[Sequence[RewardBreakdown]], golds: Sequence[str]) -> dict[str, tuple]:
    """{column: (x [B, G], in which groups it counts [B])}; rows are scored with the `result` reward."""
    def of(measure: Callable) -> np.ndarray:
        return np.array([[float(measure(b)) for b in row] for row in rows])

    right, runs, near = of(lambda b: b.correct), of(lambda b: b.status == "ok"), of(lambda b: b.result)
    has_join, needs_join = of(lambda b: joins_in(b.sql) > 0), np.array([joins_in(gold) > 0 for gold in golds])
    everywhere = np.ones(len(golds), dtype=bool)
    return {"right": (right, everywhere), "runs": (runs, everywhere),
            "a needed join": (has_join, needs_join), "a needless join": (has_join, ~needs_join),
            "nearer": (near, ~right.any(axis=1))}


def pushes(advantages: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Cov(A, x) within each group, divisor G. [B, G], [B, G] -> [B]"""
    return (advantages * (x - x.mean(axis=1, keepdims=True))).mean(axis=1)


def of_unit_size(advantages: np.ndarray) -> np.ndarray:
    """The advantages over their root mean square; zeros stay zeros. [B, G] -> [B, G]"""
    return advantages / (np.sqrt((advantages**2).mean()) or 1.0)


def interval(values: np.ndarray) -> str:
    """95 % of the mean, bootstrapped over groups."""
    drawn = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return f"[{low:.3f}, {high:.3f}]"


def in_words(values: np.ndarray, baseline: np.ndarray | None) -> str:
    """The mean over groups; with its interval, or with the paired difference to the first cell and its interval."""
    if not len(values):
        return ""
    if baseline is None:
        return f"{values.mean():+.3f} {interval(values)}"
    return f"{values.mean():+.3f} ({(values - baseline).mean():+.3f} {interval(values - baseline)})"


def settings_of(config: dict, cell: Mapping[str, str]) -> tuple[RewardConfig, str]:
    """The rewards of a cell, and how it scales advantages; what it does not set is as in the run.

    Raises UserError: the cell sets something else, or its memory needs the policy.
    """
    others = cell.keys() - {field.name for field in fields(RewardConfig)} - {"advantage_scale"}
    if others:
        raise UserError(f"{', '.join(sorted(others))}: from the same completions only the rewards and advantage_scale "
                        "make another first step; leave it out")
    parser = argparse.ArgumentParser()
    options.add_arguments(parser, RewardConfig)
    options.add_arguments(parser, GRPOConfig)
    given = config | vars(parser.parse_args(as_flags(cell)))
    rewards = options.build(RewardConfig, given)
    if rewards.weights["memory"] and rewards.embedder == "policy":
        raise UserError("--embedder policy: no policy is loaded here")
    return rewards, given["advantage_scale"]


def table(config: dict, scores: Scores, golds: Sequence[str], cells: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Markdown, a row a cell."""
    x = properties(scores.of(RewardConfig(rewards="format,execution,result")), golds)
    lines = [f"| | flat, % | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    first = {}
    for name, cell in cells.items():
        rewards, scale = settings_of(config, cell)
        advantages = advantages_of(scores.of(rewards), rewards, GRPOConfig(advantage_scale=scale))  # [B, G]
        advantages = of_unit_size(advantages.double().numpy())
        flat = 100 * (~advantages.any(axis=1)).mean()
        found = {column: pushes(advantages, values)[groups] for column, (values, groups) in x.items()}
        texts = [in_words(found[column], first.get(column)) for column in COLUMNS]
        lines.append(f"| {name} | {flat:.1f} | {' | '.join(texts)} |")
        first = first or found
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--grid", default="", help="cells, as ablate.py names them")
    parser.add_argument("--vary", action="append", default=[], metavar="FLAG=A,B,C",
                        help="cells, as ablate.py reads them")
    given = parser.parse_args()
    cells = cells_of(given.grid, given.vary)
    config, records = dense.read_run(given.run)
    data = dense.splits_of(config)
    with SQLExecutor(data.databases) as executor:
        scores = Scores(config, records, data, executor)
        golds = [record["gold_sqls"][0] for record in records]
        print(*table(config, scores, golds, cells), sep="\n")


if __name__ == "__main__":
    run_main(main)
