"""Which questions are held out of training, so that none of them shares its text or its gold SQL with training.

Spider asks most of its questions twice, in different words and with the same gold query. A question whose twin was
trained on shows little of what the policy learned. So questions that share their text or a gold query on one database
form a group, and a group is held out as a whole. In benchmarks with many databases, whole databases are held out.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from questions.example import Example

QUOTES = str.maketrans({'"': "'", "`": "'"})
FEWEST = 3  # with fewer questions nothing is held out


@dataclass(frozen=True)
class HeldBack:
    """Questions held out, those that stay in training, and how they were chosen."""
    held: list[Example]
    rest: list[Example]
    followed: int = 0  # held out because they share text or gold SQL with another held-out question
    databases: tuple[str, ...] = ()  # held out as a whole; empty if groups of questions were chosen


def question_key(example: Example) -> tuple[str, str, str]:
    """The question's text, without case and spacing, and its database."""
    return "question", example.db_id, " ".join(example.question.lower().split())


def gold_keys(example: Example) -> set[tuple[str, str, str]]:
    """The gold queries, each without case, spacing and kind of quotes, and their database."""
    return {("gold", example.db_id, normalised_sql(gold)) for gold in example.gold_sqls}


def normalised_sql(sql: str) -> str:
    """The query's words and signs in lower case, one space apart; literals too, because it is safer to hold out more.
    """
    return " ".join(re.findall(r"\w+|[^\w\s]", sql.lower().translate(QUOTES))).rstrip("; ")


def twins_key(example: Example) -> str:
    """A short hash that is equal for questions with the same official gold query (on one database); without gold SQL,
    for those with the same text, because equal answers do not mean equal queries."""
    shared = normalised_sql(example.gold_sql) if example.gold_sqls else str(question_key(example))
    return hashlib.sha256(shared.encode("utf-8", "replace")).hexdigest()[:12]


def groups_of(examples: Iterable[Example]) -> list[list[Example]]:
    """The questions in groups: two that share text or a gold query are in the same group."""
    examples = list(examples)
    leader = list(range(len(examples)))  # per question, the position of another one in its group, or its own

    def find(position: int) -> int:
        while leader[position] != position:
            leader[position] = leader[leader[position]]  # halves the way for the next search
            position = leader[position]
        return position

    first = {}  # key -> position of the first question that has it
    for position, example in enumerate(examples):
        for key in sorted(gold_keys(example) | {question_key(example)}):
            leader[find(position)] = find(first.setdefault(key, position))
    groups = defaultdict(list)
    for position, example in enumerate(examples):
        groups[find(position)].append(example)
    return list(groups.values())


def not_shared(examples: Iterable[Example], trained: Iterable[Example], by_gold: bool = True) -> list[Example]:
    """The questions that share neither their text nor, if `by_gold`, a gold query with any in `trained`."""
    questions, golds = set(), set()
    for example in trained:
        questions.add(question_key(example))
        golds |= gold_keys(example) if by_gold else set()
    return [example for example in examples
            if question_key(example) not in questions and golds.isdisjoint(gold_keys(example))]


def part_size(limit: int, count: int, share: int) -> int:
    """How many of `count` questions to hold out: one in `share`, at least one, but at most `limit` (0: none)."""
    return min(limit, max(1, count // share))


def hold_out(examples: list[Example], size: int, seed: int, by_database: bool = False) -> HeldBack:
    """Holds out about `size` of the questions: by database if asked for and possible, else by group."""
    if size <= 0 or len(examples) < FEWEST:
        return HeldBack([], examples)
    if by_database:
        databases = defaultdict(list)
        for example in examples:
            databases[example.db_id].append(example)
        chosen = _choose(databases.values(), size, lambda group: f"{seed} {group[0].db_id}")
        if sum(map(len, chosen)) >= size / 2:  # else the few databases are too large to hold one out
            return _parted(examples, chosen, databases=tuple(sorted(group[0].db_id for group in chosen)))
    groups = groups_of(examples)
    chosen = _choose(groups, size, lambda group: f"{seed} {question_key(group[0])}")
    if not chosen:
        smallest = min(groups, key=len)
        chosen = [smallest] if len(smallest) <= len(examples) // 3 else []
    return _parted(examples, chosen, followed=sum(len(group) - 1 for group in chosen))


def _choose(groups: Iterable[list[Example]], size: int, label) -> list[list[Example]]:
    """Groups in random order, up to `size` questions; a group that exceeds it is skipped.

    The order comes from a hash of the labels, so that records added later move few of the others.
    """
    chosen, count = [], 0
    for group in sorted(groups, key=lambda group: hashlib.sha256(label(group).encode("utf-8", "replace")).digest()):
        if count + len(group) <= size:
            chosen.append(group)
            count += len(group)
    return chosen


def _parted(examples: list[Example], chosen: list[list[Example]], **how) -> HeldBack:
    """The questions split into held-out ones and the rest, each in their original order."""
    ids = {id(example) for group in chosen for example in group}
    return HeldBack([example for example in examples if id(example) in ids],
                    [example for example in examples if id(example) not in ids], **how)
