"""Which questions a step asks.

By default all questions in turn, in a new order each epoch. With --draw informative, those whose completions are likely
to be partly right: if all are right or all are wrong, the execution reward prefers none. For each question we estimate
the chance that two of its completions disagree (one right, one wrong), which is 2 p (1 - p) for a pass rate of p. Old
results count less, because the policy changes. The estimate is smoothed level by level:

    all questions → the same shape → the same shape and database → the question itself

The shape of a question is its gold SQL without names and values. The estimate of each level counts as one more group at
the next. So a question that was never asked gets the estimate of similar ones, and one that was too hard or too easy
returns after a while. Questions are drawn at random, weighted by the square of this chance. The chance is at least
`LEAST`, so that we notice what the policy has learned meanwhile.
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

PRIOR = 0.25  # chance that two completions disagree, before any result
LEAST = 0.1
HALF_LIFE = 50  # rollouts after which a result counts half
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^]]*\]")
WORDS = re.compile(r"\b(?:SELECT|DISTINCT|JOIN|WHERE|GROUP|HAVING|ORDER|DESC|LIMIT|COUNT|SUM|AVG|MIN|MAX|AND|OR|NOT|IN|"
                   r"EXISTS|LIKE|BETWEEN|NULL|CASE|CAST|WITH|OVER|UNION|INTERSECT|EXCEPT)\b|[<>=!]+|[-+/]")


class Drawing:
    """Draws the next questions, by the seed, the number drawn so far and, if `informative`, the results so far."""

    def __init__(self, databases: Sequence[str], golds: Sequence[str], *, seed: int, informative: bool = False,
                 per_database: int = 1):
        """databases, golds: one per question; per_database: how many on the same database come side by side."""
        self.databases, self.seed, self.informative, self.per_database = databases, seed, informative, per_database
        shapes = [shape_of(gold) for gold in golds]
        self.paths = [((), (shape,), (shape, database), (shape, database, number))
                      for number, (database, shape) in enumerate(zip(databases, shapes, strict=True))]
        self.drawn, self.rollouts, self.seen = 0, 0, {}  # seen: {path: (groups, sum of disagreements, when)}

    def draw(self, count: int) -> list[int]:
        """The indices of the next questions."""
        turns, size = range(self.drawn, self.drawn + count), len(self.databases)
        self.drawn += count
        if self.informative:
            orders = [self._by_chance(turn) for turn in turns[::size]]  # each contains every question once
            return list(chain(*orders))[:count]
        orders = {epoch: self._epoch(epoch) for epoch in {turn // size for turn in turns}}
        return [orders[turn // size][turn % size] for turn in turns]

    def learn(self, numbers: Sequence[int], correct: Sequence[Sequence[bool]]) -> None:
        """Records which completions of these questions are right. correct: [B][G]"""
        self.rollouts += 1
        for number, group in zip(numbers, correct, strict=True):
            right, size = sum(group), len(group)
            disagreement = 2 * right * (size - right) / (size * (size - 1))  # as a share of all pairs
            for path in self.paths[number]:
                groups, total = self._faded(path)
                self.seen[path] = (groups + 1, total + disagreement, self.rollouts)

    def chances(self) -> list[float]:
        """Per question, the chance that two of its completions disagree."""
        known = {}
        for paths in self.paths:
            chance = PRIOR
            for path in paths:
                if path not in known:
                    groups, total = self._faded(path)
                    known[path] = (total + chance) / (groups + 1)
                chance = known[path]
        return [known[paths[-1]] for paths in self.paths]

    def state(self) -> dict:
        """What a checkpoint stores."""
        return {"drawn": self.drawn, "rollouts": self.rollouts, "seen": self.seen}

    def load(self, state: dict) -> None:
        """Restores the state of a checkpoint; older ones contain only `drawn`."""
        self.drawn, self.rollouts, self.seen = state["drawn"], state.get("rollouts", 0), state.get("seen", {})

    def _faded(self, path: tuple) -> tuple[float, float]:
        """The number of groups recorded for a path and the sum of their disagreements, both decayed to now."""
        groups, total, when = self.seen.get(path, (0.0, 0.0, 0))
        fading = 0.5 ** ((self.rollouts - when) / HALF_LIFE)
        return groups * fading, total * fading

    def _epoch(self, epoch: int) -> list[int]:
        """All questions in a random order."""
        count = len(self.databases)
        return self._in_runs(random.Random(f"{self.seed}/{epoch}").sample(range(count), count))

    def _by_chance(self, turn: int) -> list[int]:
        """All questions, drawn by weight without replacement (Efraimidis and Spirakis, 2006)."""
        rng = random.Random(f"{self.seed}/informative/{turn}")
        keys = [-math.log(1 - rng.random()) / max(chance, LEAST) ** 2 for chance in self.chances()]
        return self._in_runs(sorted(range(len(keys)), key=keys.__getitem__))

    def _in_runs(self, order: list[int]) -> list[int]:
        """The same questions in runs of `per_database` on one database; incomplete runs come last."""
        of_database, place = defaultdict(list), {number: i for i, number in enumerate(order)}
        for number in order:
            of_database[self.databases[number]].append(number)
        size = self.per_database
        runs = [numbers[i:i + size] for numbers in of_database.values() for i in range(0, len(numbers), size)]
        return list(chain(*sorted(runs, key=lambda run: (len(run) < size, place[run[0]]))))


def shape_of(sql: str) -> str:
    """The words of a query that are neither names nor values."""
    return " ".join(WORDS.findall(QUOTED.sub("", sql.upper())))
