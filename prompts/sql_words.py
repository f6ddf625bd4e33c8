"""The words of SQLite's queries that are not names of a database, as sets and as regular expressions."""

import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from functools import cache


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# Of a query, from sqlite.org/lang_keywords.html; and words that are keywords to SQLite in some places only
KEYWORDS = words("""
    all and as asc between by case cast collate cross current desc distinct else end escape except exclude exists
    false filter first following from full glob group groups having in indexed inner intersect is isnull join last
    left like limit match materialized natural not notnull null nulls offset on or order others outer over partition
    preceding range recursive regexp right row rowid rows select then ties true unbounded union using values when
    where window with
""")
AGGREGATES = frozenset(("count", "sum", "avg", "total", "group_concat", "string_agg"))
NAME = "[A-Za-z_][A-Za-z0-9_]*"
QUOTES = r"""'([^']|'')*'|"[^"]*"|`[^`]*`|\[[^\]]*\]"""
# Aliases that may come before their declaration: of one or two characters, and t1, derived1, …
PREFIXES = ("t", "derived", "field", "sub", "subquery", "temp", "cte")
NUMBERED = f"(?i:{'|'.join(PREFIXES)})[0-9][0-9]?"
SHORT = f"[A-Za-z_][A-Za-z0-9_]?|{NUMBERED}"
LETTERS = "abcdefghijklmnopqrstuvwxyz_"
ALIASES = frozenset(LETTERS) | {one + two for one in LETTERS for two in LETTERS + "0123456789"} | {
    f"{prefix}{number}" for prefix in PREFIXES for number in range(100)}  # those that SHORT describes, in lower case


@cache
def functions() -> frozenset[str]:
    """The functions of this SQLite."""
    with closing(sqlite3.connect(":memory:")) as connection:
        found = {name.lower() for name, in connection.execute("SELECT name FROM pragma_function_list")}
    return frozenset(name for name in found if re.fullmatch(r"\w+", name))


def one_of(words: Iterable[str]) -> str:
    """The regular expression of one of these words, in upper or lower case; of nothing if there are none."""
    known = sorted(word.lower() for word in words if re.fullmatch(r"[^\W\d]\w*", word))
    return f"(?i:{'|'.join(known)})" if known else r"[^\s\S]"
