"""Why answers do not run, by the error of SQLite and the names of the database:

    unknown name   a table, column or function that is nowhere in the database
    other table    a real column, but not of the tables that the query reads, or not of the one it is qualified by
    unknown alias  a qualifier that is neither a table of the database nor defined
    syntax         SQLite cannot parse it
    cut            the answer reached the length limit
    format         no single query in the required format
    other          anything else: an ambiguous column, a misused aggregate, a timeout
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from partial_credit.atomic import Unparsable, is_name, plain_name, split_tokens
from questions.schema import columns_of

KINDS = ("unknown name", "other table", "unknown alias", "syntax", "cut", "format", "other")
NO_SUCH = re.compile(r"no such (column|table|function): (?:main\.)?([^\n]*?)(?: - should this be .*)?$")
UNREADABLE = ("syntax error", "incomplete input", "unrecognized token")


def kind_of(status: str, error: str, sql: str, schema: Mapping[str, Iterable[str]]) -> str:
    """One of KINDS for an answer that does not run. status, error: of its score. schema: {table: [column, …]}"""
    if status in ("truncated", "format"):
        return "cut" if status == "truncated" else "format"
    missing = NO_SUCH.search(error)
    if missing is None:
        return "syntax" if any(text in error for text in UNREADABLE) else "other"
    if missing[1] != "column":
        return "unknown name"
    *qualifier, column = (part.strip('"`[]').lower() for part in missing[2].split("."))
    tables = {table.lower(): {name.lower() for name in columns} for table, columns in schema.items()}
    if qualifier and qualifier[-1] not in tables and qualifier[-1] not in defined(sql):
        return "unknown alias"
    return "other table" if any(column in columns for columns in tables.values()) else "unknown name"


def defined(sql: str) -> set[str]:
    """The aliases of a query, of tables and of results."""
    try:
        words = split_tokens(sql)
    except Unparsable:
        return set()
    found = set()
    for before, word in pairwise(["", *words]):
        if is_name(word) and (before in ("as", ")") or is_name(before)):
            found.add(plain_name(word))
    return found


def failures_of(scores: Iterable, databases: Mapping[str, Path], skip_bad_gold: bool = False) -> dict[str, float]:
    """{kind: share of all answers}, of those that do not run. scores: ExampleScores"""
    counted = [score for score in scores if not score.left_out(skip_bad_gold)]
    failed = [score for score in counted if score.status != "ok"]
    schemas = columns_of({db_id: databases[db_id] for db_id in {score.db_id for score in failed} & databases.keys()})
    return shares(Counter(kind_of(score.status, score.error, score.sql, schemas.get(score.db_id, {}))
                          for score in failed), len(counted))


def shares(counts: Mapping[str, int], total: int) -> dict[str, float]:
    """The kinds that occur, in the order of KINDS, as shares."""
    return {kind: counts[kind] / total for kind in KINDS if counts.get(kind)}
