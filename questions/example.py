"""One question with its gold SQL, as every part of the project passes it on."""

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
    trace_sql: str = ""  # the SQL that the trace leads to, where an unverified teacher missed the gold one
    messages: tuple[tuple[str, str], ...] = ()  # a ready-made prompt as a chat: (role, content) of each message
    prompt: str = ""  # a ready-made prompt as a text
