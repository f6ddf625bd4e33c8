"""A schema as text, in the ways that prompts write it."""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

from questions.schema import Column, Hint, Schema, Table, quote_identifier, quote_value


class SchemaText:
    """What templates call `schema`: in print the CREATE TABLE statements, and other ways of writing the same tables."""

    def __init__(self, schema: Schema, sample_values: int):
        self.tables, self._schema, self._sample_values = schema.tables, schema, sample_values

    @cached_property
    def _full(self) -> str:
        return full_schema(self._schema, self._sample_values)

    def __str__(self) -> str:
        return self._full

    @cached_property
    def compact(self) -> str:
        """All tables on one line."""
        return compact_schema(self._schema)

    def with_hints(self, hints: Iterable[Hint]) -> str:
        """CREATE TABLE statements in which the cells that the question mentions come before the sample values."""
        return full_schema(self._schema, self._sample_values, hints)

    def omnisql(self, hints: Iterable[Hint]) -> str:
        """CREATE TABLE statements as OmniSQL writes them."""
        return omnisql_schema(self._schema, min(2, self._sample_values), hints)


# ------------------------------------------------------------------------------------------------ full

def full_schema(schema: Schema, sample_values: int, hints: Iterable[Hint] = ()) -> str:
    """CREATE TABLE statements; as comments the description and sample values, after the cells of `hints`."""
    hints = list(hints)
    return "\n".join(_create_table(table, sample_values, hints) for table in schema.tables)


def _create_table(table: Table, sample_values: int, hints: Sequence[Hint]) -> str:
    """One CREATE TABLE statement."""
    keys = [column for column in table.columns if column.primary_key]
    lines = []
    for column in table.columns:
        definition = " ".join(filter(None, (quote_identifier(column.name), column.type)))
        if [column] == keys:
            definition += " PRIMARY KEY"
        values = [quote_value(value) for value in _values(table, column, sample_values, hints)]
        values = [value for value in values if "".join(value.splitlines()) == value]  # another line is no comment
        comment = ": ".join(filter(None, (column.description, ", ".join(values))))
        lines.append((definition, f"  -- {comment}" if comment else ""))
    if len(keys) > 1:
        lines.append((f"PRIMARY KEY ({', '.join(quote_identifier(column.name) for column in keys)})", ""))
    for column in table.columns:
        for target, target_column in column.references:
            lines.append((f"FOREIGN KEY ({quote_identifier(column.name)}) REFERENCES "
                          f"{quote_identifier(target)} ({quote_identifier(target_column)})", ""))
    body = "\n".join(f"  {definition}{',' if number < len(lines) else ''}{comment}"
                     for number, (definition, comment) in enumerate(lines, 1))
    return f"CREATE TABLE {quote_identifier(table.name)} (\n{body}\n);"


def _values(table: Table, column: Column, sample_values: int, hints: Sequence[Hint]) -> list:
    """The cells of a column that the question mentions, then sample values, each once."""
    mentioned = [hint.value for hint in hints if (hint.table, hint.column) == (table.name, column.name)]
    return list(dict.fromkeys([*mentioned, *column.samples[:sample_values]]))


def full_hint(hint: Hint) -> str:
    """`table.column = 'value'`."""
    return f"{quote_identifier(hint.table)}.{quote_identifier(hint.column)} = {quote_value(hint.value)}"


# --------------------------------------------------------------------------------------------- compact

def compact_schema(schema: Schema) -> str:
    """All tables on one line, lower case: `name ( column , column , key > table . column )`."""
    return " ".join(f"{compact_name(table.name)} ( {' , '.join(map(_compact_column, table.columns))} )"
                    for table in schema.tables)


def _compact_column(column: Column) -> str:
    """The column's name and where its first foreign key points."""
    name = compact_name(column.name)
    if not column.references:
        return name
    table, target = column.references[0]
    return f"{name} > {compact_name(table)} . {compact_name(target)}"


def compact_name(name: str) -> str:
    """A name in lower case; SQLite folds the case of ASCII letters only."""
    return quote_identifier(name.lower() if name.isascii() else name)


def compact_hint(hint: Hint) -> str:
    """`table . column = 'value'`."""
    return f"{compact_name(hint.table)} . {compact_name(hint.column)} = {quote_value(hint.value)}"


def space_out(text: str) -> str:
    """The text on one line, spaces around quotes and before the final punctuation, otherwise as it is."""
    text = re.sub(r'["“”‘]|(?<!\w)[\'’]|[\'’](?!\w)', r" \g<0> ", text)
    text = re.sub(r"\s*([?.!]+)\s*$", r" \1", text)
    return " ".join(text.split())


# --------------------------------------------------------------------------------------------- OmniSQL

def omnisql_schema(schema: Schema, sample_values: int, hints: Iterable[Hint]) -> str:
    """CREATE TABLE statements in OmniSQL's layout (arXiv 2503.02240): a column a line, its description and a list of
    examples as a comment, then the keys; names in backticks where they need quotes."""
    hints = list(hints)
    return "\n\n".join(_omnisql_table(table, sample_values, hints) for table in schema.tables)


def _omnisql_table(table: Table, sample_values: int, hints: Sequence[Hint]) -> str:
    """One CREATE TABLE statement; the comma stands before a comment, and behind the last column where one follows."""
    lines, keys = [], [quote_identifier(column.name, '`') for column in table.columns if column.primary_key]
    for column in table.columns:
        values = _values(table, column, sample_values, hints)[:6]
        comment = ", ".join(filter(None, (column.description, f"example: {values}" if values else "")))
        definition = " ".join(filter(None, (quote_identifier(column.name, '`'), column.type)))
        lines.append(f"    {definition}," + (f" -- {comment}" if comment else ""))
    if keys:
        lines.append(f"    PRIMARY KEY ({', '.join(keys)}),")
    for column in table.columns:
        for target, target_column in column.references:
            constraint = "_".join(f"fk {table.name} {column.name}".lower().split())
            lines.append(f"    CONSTRAINT {constraint} FOREIGN KEY ({quote_identifier(column.name, '`')}) REFERENCES "
                         f"{quote_identifier(target, '`')} ({quote_identifier(target_column, '`')}),")
    body = "\n".join(lines).removesuffix(",")
    return f"CREATE TABLE {quote_identifier(table.name, '`')} (\n{body}\n);"
