"""Reasoning for a gold query without a trace: the tables, columns and clauses it needs, as a terse list.

    SELECT T1.name FROM singer AS T1 JOIN concert AS T2 ON T1.id = T2.sid WHERE T2.year > 2014 ORDER BY T1.age LIMIT 1

    tables singer concert ; columns id name age sid year ; clauses join where order by limit

It depends only on the SQL and the schema: the same query, the same reasoning. A plan in sentences (which table gives
what, joins, filters, order) taught less in as many steps, docs/results/pretrained.md.
"""

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
