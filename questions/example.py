"""One question with its gold SQL, as all modules pass it on, and the ids of questions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One question. `gold_sqls[0]` is the official gold, the others are known to be equivalent."""
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
