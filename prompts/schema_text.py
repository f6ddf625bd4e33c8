"""A schema as text, in the layouts that prompts use."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from questions.schema import Column, Hint, Schema, Table, quote_identifier, quote_value


class SchemaText:
    """The variable `schema` of templates: printed, it is CREATE TABLE statements; methods give other layouts."""

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
        """CREATE TABLE statements with the cells that the question mentions before the sample values."""
        return full_schema(self._schema, self._sample_values, hints)

    def omnisql(self, hints: Iterable[Hint]) -> str:
        """CREATE TABLE statements as OmniSQL writes them."""
        return full_schema(self._schema, min(2, self._sample_values), hints, OMNISQL)


# ------------------------------------------------------------------------------------ CREATE TABLE statements

@dataclass(frozen=True)
class Layout:
    """How CREATE TABLE statements are written."""
    comment: Callable[[str, list], str]  # from a column's description and cells; empty for none
    quote: str            # around names that need it
    indent: str
    key_in_line: bool     # a primary key of one column is in the column's line
    comma_stays: bool     # the last line has a comma too if it has a comment, as in OmniSQL's layout
    names_keys: bool      # a foreign key has a name
    between_tables: str


def _full_comment(description: str, cells: list) -> str:
    """`  -- description: 'a', 'b'`; a cell of several lines would end the comment."""
    values = [value for value in map(quote_value, cells) if "".join(value.splitlines()) == value]
    text = ": ".join(filter(None, (description, ", ".join(values))))
    return text and f"  -- {text}"


def _omnisql_comment(description: str, cells: list) -> str:
    """` -- description, example: ['a', 'b']`."""
    text = ", ".join(filter(None, (description, f"example: {cells[:6]}" if cells else "")))
    return text and f" -- {text}"


FULL = Layout(_full_comment, '"', "  ", key_in_line=True, comma_stays=False, names_keys=False, between_tables="\n")
# OmniSQL's layout (arXiv 2503.02240): one column per line, its description and examples as a comment, then the keys
OMNISQL = Layout(_omnisql_comment, "`", "    ", key_in_line=False, comma_stays=True, names_keys=True,
                 between_tables="\n\n")


def full_schema(schema: Schema, sample_values: int, hints: Iterable[Hint] = (), layout: Layout = FULL) -> str:
    """CREATE TABLE statements; comments give the description, the cells of `hints` and the sample values."""
    hints = list(hints)
    return layout.between_tables.join(_create_table(table, sample_values, hints, layout) for table in schema.tables)


def _create_table(table: Table, sample_values: int, hints: Sequence[Hint], layout: Layout) -> str:
    """One CREATE TABLE statement."""
    def quoted(name: str) -> str:
        return quote_identifier(name, layout.quote)

    keys, lines = [column for column in table.columns if column.primary_key], []  # lines: (definition, comment)
    key_in_line = layout.key_in_line and len(keys) == 1
    for column in table.columns:
        key = "PRIMARY KEY" if key_in_line and column.primary_key else ""
        lines.append((" ".join(filter(None, (quoted(column.name), column.type, key))),
                      layout.comment(column.description, _values(table, column, sample_values, hints))))
    if keys and not key_in_line:
        lines.append((f"PRIMARY KEY ({', '.join(quoted(column.name) for column in keys)})", ""))
    for column in table.columns:
        foreign = f"CONSTRAINT {_constraint(table, column)} " if layout.names_keys else ""
        foreign += f"FOREIGN KEY ({quoted(column.name)}) REFERENCES"
        lines += [(f"{foreign} {quoted(target)} ({quoted(known)})", "") for target, known in column.references]
    body = "\n".join(layout.indent + definition
                     + ("," if number < len(lines) or comment and layout.comma_stays else "") + comment
                     for number, (definition, comment) in enumerate(lines, 1))
    return f"CREATE TABLE {quoted(table.name)} (\n{body}\n);"


def _constraint(table: Table, column: Column) -> str:
    """The name of a foreign key."""
    return "_".join(f"fk {table.name} {column.name}".lower().split())


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
    """The text on one line, with spaces around quotes and before the final punctuation, otherwise unchanged."""
    text = re.sub(r'["“”‘]|(?<!\w)[\'’]|[\'’](?!\w)', r" \g<0> ", text)
    text = re.sub(r"\s*([?.!]+)\s*$", r" \1", text)
    return " ".join(text.split())
