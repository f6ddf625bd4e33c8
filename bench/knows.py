"""What does each reward know of an answer, before it trains anything? Measured on the rollouts of a run:

    python train.py --model M --traces template --start COLD_STARTED --steps 8 --lr 1e-12 --prompts-per-step 64 \\
        --group-size 16 --output runs/knows
    python bench/knows.py runs/knows
    python bench/knows.py runs/knows --rewards atomic,memory:policy/other,memory:ENCODER/same

Each reward is asked blindly, of right answers as of wrong ones, which a run does not do. Of answers in the format:

    right     how often it ranks a right answer above a wrong one of the same group
    nearer    how often, of two wrong answers of a group, it ranks the one first whose rows are nearer (soft-F1)
    runs      how often it ranks a wrong answer that runs above one of its group that does not
    spread    its standard deviation within groups that are all wrong

50 % is chance; ties count half. Intervals (95 %) are bootstrapped over groups. Rewards:

    atomic, schema, result       as in rewards.py; `result` is the soft-F1 itself
    rare                         atomic with --atomic-weights rare
    memory:EMBEDDER/SCOPE        the cosine to the verified traces of the run's cold start, by an embedder of --embedder
    roles:EMBEDDER/SCOPE         likewise, with --memory-names roles
    names        the overlap of the names that the queries use, where made-up ones count as well
    scope        the share of its names that the tables it reads from have; needs no gold
    by question  roles:hash/other, but compared with the traces of those questions that resemble this one, of all
                 traces, for it has no gate

The last three are ideas, not rewards that can be trained with.

A second table is about joins: how often answers with one / without one are right and run, by whether the gold query has
one. What a whole set of rewards pushes, there and elsewhere, bench/first_step.py says.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dense  # noqa: E402

from ablate import joins_in  # noqa: E402
from common import options  # noqa: E402
from common.errors import UserError, run_main  # noqa: E402
from common.run_layout import checkpoint_of  # noqa: E402
from data import columns_of  # noqa: E402
from partial_credit.atomic import atomic_reward, is_name, jaccard, names_in  # noqa: E402
from partial_credit.memory import HashEmbedder, Roles  # noqa: E402
from rewards import (  # noqa: E402
    MemoryGate,
    RewardConfig,
    build_memory,
    build_rarity,
    schema_overlap,
    shape_atomic,
    soft_f1,
)
from sql_exec import MATCHES, Results, SQLExecutor  # noqa: E402


@dataclass(frozen=True)
class Answer:
    """A completion that has the format, with what became of its SQL."""

    db_id: str
    question: str
    golds: Sequence[str]
    thought: str
    sql: str
    right: bool
    runs: bool
    nearness: float  # soft-F1 of its rows


Blind = Callable[[Sequence[Answer]], Sequence[float]]  # what a reward says of answers


def read_groups(records: Sequence[dict], databases, match) -> list[list[Answer]]:
    """The answers of each group, run once more, because a log has the first rows only."""
    asked = [(record["db_id"], c["sql"], record["gold_sqls"]) for record in records for c in record["completions"]
             if c["status"] != "format"]
    with SQLExecutor(databases) as executor:
        results = Results(executor, asked, [match])
    groups = []
    for record in records:
        db_id, golds = record["db_id"], record["gold_sqls"]
        groups.append([])
        for c in record["completions"]:
            if c["status"] == "format":
                continue
            if unread := results.unread(db_id, c["sql"], golds, match):
                raise UserError(f"an answer has no verdict, since its database could not be read ({unread.error}): "
                                "measure again when it can")
            found, wanted = results.predicted(db_id, c["sql"]), [results.gold(db_id, gold) for gold in golds]
            runs = found.status == "ok"
            tables = [gold.rows for gold in wanted if runs and gold.status == "ok"]
            nearness = max((soft_f1(found.rows, rows) for rows in tables), default=0.0)
            right = results.is_right(db_id, c["sql"], golds, match)
            groups[-1].append(Answer(db_id, record["question"], golds, c["thought"], c["sql"], right, runs, nearness))
    return groups


# ---- rewards and ideas


class Once:
    """An embedder that embeds each text once, for the rewards that share it."""

    def __init__(self, embed: Callable):
        self.embed, self.known = embed, {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """-> [n, dim]"""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        self.known |= dict(zip(new, self.embed(new), strict=True)) if new else {}
        return np.stack([self.known[text] for text in texts])


class Rewards:
    """By name what each says of answers; `data` are the splits of the run."""

    def __init__(self, config: dict, data, checkpoint: Path):
        self.config, self.data, self.checkpoint = config, data, checkpoint
        self.schemas = columns_of(data.databases)
        self.traced = [example for example in data.traced if not example.trace_sql]
        self.named = {"atomic": self.atomic, "schema": self.schema, "result": self.result, "rare": self.rare,
                      "names": self.names, "scope": self.scope, "by question": self.by_question}
        self.in_roles = Roles(self.schemas)
        self.embedders: dict[str, Once] = {}

    def of(self, name: str) -> Blind:
        """The reward of this name. Raises UserError: there is none."""
        if not self.traced and (":" in name or name == "by question"):
            raise UserError(f"--rewards {name} compares with the traces of the run's cold start, and it had none")
        if name in self.named:
            return self.named[name]
        kind, _, spec = name.partition(":")
        embedder, _, scope = spec.rpartition("/")
        if kind not in ("memory", "roles") or not embedder:
            raise UserError(f"--rewards: there is no {name!r}; choose among {', '.join(self.named)}, "
                            "memory:EMBEDDER/SCOPE, roles:EMBEDDER/SCOPE")
        names = "written" if kind == "memory" else "roles"
        try:
            settings = RewardConfig(rewards="format,execution,memory", embedder=embedder, memory_scope=scope,
                                    memory_names=names)
        except ValueError as error:
            raise UserError(f"--rewards {name}: {error}") from error
        return lambda answers: self.memory(settings, answers)

    def atomic(self, answers, weight=None):
        return [shape_atomic(atomic_reward(a.sql, a.golds, self.schemas[a.db_id], weight)) for a in answers]

    def schema(self, answers):
        return [max(schema_overlap(a.sql, gold, self.schemas[a.db_id]) for gold in a.golds) for a in answers]

    def result(self, answers):
        return [a.nearness for a in answers]

    def memory(self, settings: RewardConfig, answers):
        """With the traces that the run began with."""
        policy = self.policy if settings.embedder == "policy" else None
        memory = build_memory(settings, options.build(MemoryGate, self.config), self.schemas,
                              policy and policy.model.get_decoder(), policy and policy.tokenizer)
        memory.embed = self.embedders.setdefault(settings.embedder, Once(memory.embed))
        return dense.fill(memory, self.traced).similarities([(a.db_id, a.thought) for a in answers])

    @cached_property
    def policy(self):
        """The policy before training, on the GPU where there is one."""
        import torch

        from policy import load_policy
        return load_policy(str(self.checkpoint), device="cuda" if torch.cuda.is_available() else "cpu")

    def rare(self, answers):
        return self.atomic(answers, build_rarity(RewardConfig(atomic_weights="rare"), self.data.train, self.schemas))

    def names(self, answers):
        return [max(jaccard(used_names(a.sql), used_names(gold)) for gold in a.golds) for a in answers]

    def scope(self, answers):
        """Of names that are neither tables read from nor their columns it is not asked where else they exist."""
        shares = []
        for a in answers:
            used = used_names(a.sql)
            schema = {table.lower(): {c.lower() for c in columns} for table, columns in self.schemas[a.db_id].items()}
            read = used & schema.keys()
            known = read.union(*(schema[table] for table in read))
            shares.append(len(used & known) / max(1, len(used)))
        return shares

    def by_question(self, answers):
        """Cosines of the reasoning to the centroid of the traces whose questions are nearest, of other databases."""
        embed, count = HashEmbedder(), RewardConfig.memory_top_k
        questions, traces = (embed([self.in_roles(e.db_id, text) for e, text in rows]) for rows in (
            [(e, e.question) for e in self.traced], [(e, e.trace) for e in self.traced]))
        databases, centroids, found = np.array([e.db_id for e in self.traced]), {}, []
        reasoning = embed([self.in_roles(a.db_id, a.thought) for a in answers])
        for a, mine in zip(answers, reasoning, strict=True):
            key = a.db_id, self.in_roles(a.db_id, a.question)
            if key not in centroids:
                cosines = np.where(databases == a.db_id, -2.0, questions @ embed([key[1]])[0])
                centroids[key] = traces[np.argsort(-cosines, kind="stable")[:count]].mean(0)
            centroid = centroids[key]
            found.append(float(mine @ centroid / max(np.linalg.norm(centroid), 1e-9)))
        return found


def used_names(sql: str) -> set[str]:
    """Names in a query, without those that it gives itself with AS."""
    given = {alias.lower() for alias in re.findall(r"\bas\s+(\w+)", sql, re.IGNORECASE)}
    functions = {name.lower() for name in re.findall(r"(\w+)\s*\(", sql)}
    return {name for name in names_in(sql) if is_name(name)} - given - functions - {"asc", "desc"}


# ---- figures


def by_joins(groups: Sequence[Sequence[Answer]]) -> list[str]:
    """Markdown, a row for questions whose gold has no join, and one for those whose gold has."""
    lines = ["| gold | groups | right, % | run, % |", "|---|---|---|---|"]
    for kind, wanted in (("no join", False), ("joins", True)):
        chosen = [group for group in groups if group and (joins_in(group[0].golds[0]) > 0) is wanted]
        sides = [[a for group in chosen for a in group if (joins_in(a.sql) > 0) is joins] for joins in (True, False)]
        shares = [" / ".join(f"{100 * fmean(getattr(a, name) for a in side):.1f}" if side else "–" for side in sides)
                  for name in ("right", "runs")]
        lines.append(f"| {kind} | {len(chosen)} | {' | '.join(shares)} |")
    return lines


def ranked(pairs) -> list[float]:
    """Of (higher, lower) pairs whether they are in this order; ties are a half."""
    return [dense.in_order(a, b) for a, b in pairs]


def figures(groups: Sequence[Sequence[tuple[Answer, float]]]) -> dict[str, list[list[float]]]:
    """{figure: of each group its values}"""
    found = {"right": [], "nearer": [], "runs": [], "spread": []}
    for group in groups:
        right, wrong = ([pair for pair in group if pair[0].right is kind] for kind in (True, False))
        found["right"].append(ranked((a, b) for (_, a), (_, b) in product(right, wrong)))
        by_nearness = sorted(wrong, key=lambda pair: -pair[0].nearness)
        found["nearer"].append(ranked((a, b) for (x, a), (y, b) in combinations(by_nearness, 2)
                                      if x.nearness > y.nearness))
        found["runs"].append(ranked((a, b) for (x, a), (y, b) in product(wrong, wrong) if x.runs and not y.runs))
        found["spread"].append([pstdev(value for _, value in wrong)] if len(wrong) > 1 and not right else [])
    return found


def estimate(values: Sequence[Sequence[float]], percent: bool) -> str:
    """The mean over all values with a 95 % interval over groups."""
    filled = [group for group in values if group]
    if not filled:
        return ""
    sums, counts = np.array([sum(group) for group in filled]), np.array([len(group) for group in filled])
    drawn = np.random.default_rng(0).integers(0, len(filled), (1000, len(filled)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    mean, (low, high) = sums.sum() / counts.sum(), np.percentile(means, [2.5, 97.5])
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]" if percent else f"{mean:.3f}"


def table(groups: Sequence[Sequence[Answer]], blind: dict[str, Blind]) -> list[str]:
    """Markdown, a row a reward."""
    flat = [answer for group in groups for answer in group]
    lines = ["| reward | right, % | nearer, % | runs, % | spread |", "|---|---|---|---|---|"]
    for name, ask in blind.items():
        values = iter(ask(flat))
        found = figures([[(answer, next(values)) for answer in group] for group in groups])
        cells = [estimate(found[column], column != "spread") for column in ("right", "nearer", "runs", "spread")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Read a run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--rewards", default="atomic,rare,schema,result,memory:hash/other,memory:hash/same,"
                        "roles:hash/other,names,scope,by question",
                        help="what to ask, separated by commas (default: all that need no model)")
    options_given = parser.parse_args()
    folder = options_given.run
    config, records = dense.read_run(folder)
    data = dense.splits_of(config)
    rewards = Rewards(config, data, checkpoint_of(folder, 0))
    blind = {name: rewards.of(name) for name in options_given.rewards.split(",")}
    groups = read_groups(records, data.databases, MATCHES[config["match"]])
    shaped = [answer for group in groups for answer in group]
    print(f"{len(groups)} groups; of {sum(len(record['completions']) for record in records)} completions {len(shaped)} "
          f"have the format, {sum(a.runs for a in shaped)} run and {sum(a.right for a in shaped)} are right\n")
    print(*table(groups, blind), "", *by_joins(groups), sep="\n")


if __name__ == "__main__":
    run_main(main)
