"""Reasoning for a gold query without a trace: the tables, columns and clauses it needs, as a terse list.

    SELECT T1.name FROM singer AS T1 JOIN concert AS T2 ON T1.id = T2.sid WHERE T2.year > 2014 ORDER BY T1.age LIMIT 1

    tables singer concert ; columns id name age sid year ; clauses join where order by limit

It depends only on the SQL and the schema: the same query, the same reasoning. A plan in sentences (which table gives
what, joins, filters, order) taught less in as many steps, docs/results/pretrained.md.
"""

import random
import re
from collections.abc import Mapping, Sequence

from partial_credit.atomic import Unparsable, plain_name, split_tokens

LISTED = ("join", "where", "group by", "having", "order by", "limit", "intersect", "union", "except")


def template_trace(sql: str, schema: Mapping[str, Sequence[str]]) -> str:
    """The tables of a query, its columns, and the clauses that it needs.

    Args:
        schema: {table: [column, ...]} of the database.
    """
    try:
        words = split_tokens(sql)
    except Unparsable:
        words = []
    spoken = {plain_name(word) for word in words}
    tables = [table for table in schema if table.lower() in spoken]
    columns = list(dict.fromkeys(c for table in tables for c in schema[table] if c.lower() in spoken))
    text = " ".join(["", *words, ""])
    clauses = [clause for clause in LISTED if f" {clause} " in text]
    nested = ["subquery"] if words.count("select") > 1 else []
    return " ; ".join(f"{name} {' '.join(items)}" for name, items in
                      (("tables", tables), ("columns", columns), ("clauses", clauses + nested or ["select"])) if items)


def failing_query(sql: str, schema: Mapping[str, Sequence[str]]) -> str:
    """The query with one of its columns misnamed, as models do: by a column of a table that it does not read, or else
    by the column's name with `_name` or `_id` behind it. It may still run where the column is an alias. The same query,
    the same mistake; empty if it names no column.

    Args:
        schema: {table: [column, ...]} of the database.
    """
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", lambda quoted: " " * len(quoted[0]), sql)  # as long, without quoted words
    words = [(word.start(), word[0]) for word in re.finditer(r"\w+", bare)]
    spoken, rng = {word.lower() for _, word in words}, random.Random(sql)
    read = [table for table in schema if table.lower() in spoken]
    own = {column.lower() for table in read for column in schema[table]}
    places = [(at, word) for at, word in words if word.lower() in own]
    if not places:
        return ""
    others = sorted({column for table in schema if table not in read for column in schema[table]
                     if re.fullmatch(r"[A-Za-z]\w*", column) and column.lower() not in own})
    at, word = rng.choice(places)
    wrong = rng.choice(others or [f"{word}_name", f"{word}_id"])
    return sql[:at] + wrong + sql[at + len(word):]
