"""One question with its gold SQL, as all modules pass it on, and the ids of questions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from sql_exec import Gold, GoldAnswer


@dataclass(frozen=True)
class Example:
    """One question. `gold_sqls[0]` is the official gold, the others are known to be equivalent. There are none
    if the answer is known instead."""
    id: str
    db_id: str
    question: str
    gold_sqls: tuple[str, ...]
    evidence: str = ""
    difficulty: str = ""
    trace: str = ""
    trace_sql: str = ""  # the SQL that the trace leads to, if an unverified teacher missed the gold query
    messages: tuple[tuple[str, str], ...] = ()  # a ready-made prompt as a chat: (role, content) of each message
    prompt: str = ""  # a ready-made prompt as a text
    answer: GoldAnswer | None = None  # in place of gold SQL
    first_try: str = ""  # of a trace: an answer that fails, after whose error the trace is the second try

    @property
    def gold_sql(self) -> str:
        """The official gold SQL; empty if the answer is known instead."""
        return self.gold_sqls[0] if self.gold_sqls else ""

    @property
    def golds(self) -> tuple[Gold, ...]:
        """What a right result may equal: that of any gold SQL, or the answer."""
        return self.gold_sqls or (self.answer,)

    def as_tuple(self) -> tuple:
        """All fields, for a hash; the last two only if they are there, so that hashes of older runs stay valid."""
        *values, answer, first_try = astuple(self)
        return (*values, *([answer] if self.answer else []), *([first_try] if first_try else []))


def answers_among(examples: Sequence[Example]) -> str:
    """`3 of 10 questions have an answer and no gold SQL`; empty if none has."""
    count = sum(not example.gold_sqls for example in examples)
    have = "has" if count == 1 else "have"
    return f"{count} of {len(examples)} questions {have} an answer and no gold SQL" if count else ""


def id_text(value) -> str:
    """An id as text: 7, 7.0 and "7" are the same."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def unique_ids(names: Sequence[str | None], positions: Sequence[int] | None = None) -> list[str]:
    """Unique ids of records: the first 12 keeps its name, the next ones become 12-2 and 12-3.

    A record without a name (None) gets its position as its id, unless that is another record's name.
    """
    unclaimed = {name for name in names if name is not None}  # names whose first record has not come yet
    taken, repeats, ids = set(unclaimed), Counter(), []
    for position, name in zip(positions or range(len(names)), names, strict=True):
        wanted = own = str(position) if name is None else name
        if name in unclaimed:
            unclaimed.discard(name)
        else:
            while own in taken:
                repeats[wanted] += 1
                own = f"{wanted}-{repeats[wanted] + 1}"
        taken.add(own)
        ids.append(own)
    return ids
