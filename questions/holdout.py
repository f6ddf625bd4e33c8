"""Which questions are held back from training, so that none of them shares its text or its gold SQL with training.

Spider asks most of its questions twice, in other words and with one gold query. A question whose twin was trained on
says little of what the policy learned. So questions that share their text or a gold query on one database form a
group, and a group is held back as a whole. Where the data are a benchmark of many databases, whole databases are.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from questions.example import Example

QUOTES = str.maketrans({'"': "'", "`": "'"})
FEWEST = 3  # questions, below which nothing can be held back


@dataclass(frozen=True)
class HeldBack:
    """Questions held back, those that stay in training, and how it was done."""
    held: list[Example]
    rest: list[Example]
    followed: int = 0  # questions that were moved because they share text or gold SQL with another held-back one
    databases: tuple[str, ...] = ()  # held back as a whole; empty when questions were chosen one group at a time


def question_key(example: Example) -> tuple[str, str, str]:
    """The question's text, without case and spacing, and its database."""
    return "question", example.db_id, " ".join(example.question.lower().split())


def gold_keys(example: Example) -> set[tuple[str, str, str]]:
    """The gold queries, each without case, spacing and kind of quotes, and their database."""
    return {("gold", example.db_id, normalised_sql(gold)) for gold in example.gold_sqls}


def normalised_sql(sql: str) -> str:
    """The query's words and signs in lower case, one space apart; literals too: rather hold back too much."""
    return " ".join(re.findall(r"\w+|[^\w\s]", sql.lower().translate(QUOTES))).rstrip("; ")


def twins_key(example: Example) -> str:
    """The same for questions of one database with the same official gold query, in a few characters."""
    return hashlib.sha256(normalised_sql(example.gold_sqls[0]).encode("utf-8", "replace")).hexdigest()[:12]


def groups_of(examples: Iterable[Example]) -> list[list[Example]]:
    """The questions in groups: whoever shares text or a gold query with another is in the group of that one."""
    examples = list(examples)
    leader = list(range(len(examples)))  # of each question, the position of another one in its group, or its own

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
    """The questions that share neither their text nor, if `by_gold`, a gold query with one that is trained on."""
    questions, golds = set(), set()
    for example in trained:
        questions.add(question_key(example))
        golds |= gold_keys(example) if by_gold else set()
    return [example for example in examples
            if question_key(example) not in questions and golds.isdisjoint(gold_keys(example))]


def part_size(limit: int, count: int, share: int) -> int:
    """How many of `count` questions to hold back: one in `share`, at least one, at most `limit`, of which 0 is none."""
    return min(limit, max(1, count // share))


def hold_out(examples: list[Example], size: int, seed: int, by_database: bool = False) -> HeldBack:
    """Holds back about `size` of the questions: by database where asked for and possible, else by group."""
    if size <= 0 or len(examples) < FEWEST:
        return HeldBack([], examples)
    if by_database:
        databases = defaultdict(list)
        for example in examples:
            databases[example.db_id].append(example)
        chosen = _choose(databases.values(), size, lambda group: f"{seed} {group[0].db_id}")
        if sum(map(len, chosen)) >= size / 2:  # else one of few databases would be most of the data
            return _parted(examples, chosen, databases=tuple(sorted(group[0].db_id for group in chosen)))
    groups = groups_of(examples)
    chosen = _choose(groups, size, lambda group: f"{seed} {question_key(group[0])}")
    if not chosen:
        smallest = min(groups, key=len)
        chosen = [smallest] if len(smallest) <= len(examples) // 3 else []
    return _parted(examples, chosen, followed=sum(len(group) - 1 for group in chosen))


def _choose(groups: Iterable[list[Example]], size: int, label) -> list[list[Example]]:
    """Groups in an order of chance, up to `size` questions; one that would be too much is passed over.

    The order comes from a hash of the labels, so that records added later move few of the others.
    """
    chosen, count = [], 0
    for group in sorted(groups, key=lambda group: hashlib.sha256(label(group).encode("utf-8", "replace")).digest()):
        if count + len(group) <= size:
            chosen.append(group)
            count += len(group)
    return chosen


def _parted(examples: list[Example], chosen: list[list[Example]], **how) -> HeldBack:
    """The questions in their own order, on either side."""
    ids = {id(example) for group in chosen for example in group}
    return HeldBack([example for example in examples if id(example) in ids],
                    [example for example in examples if id(example) not in ids], **how)
