"""Reasoning for a gold SQL that has none: a plan in short sentences, or a terse list.

    SELECT T1.name FROM singer AS T1 JOIN concert AS T2 ON T1.id = T2.sid WHERE T2.year > 2014 ORDER BY T1.age LIMIT 1

    plan   From singer: name, age. From concert: year. Join singer with concert on singer.id = concert.sid. Keep rows
           where concert.year > 2014. Sort by age ascending. Take the first 1. Show name.
    terse  tables singer concert ; columns id name age sid year ; clauses join where order by limit

The plan first says which table gives what, because the commonest fault of a small model is a column of another table.
It ends with what is shown, which is how the SQL begins. Conditions name the table of every column, where there are
several; elsewhere a column that only one of them has stands alone, for length costs time. Inner queries come first and
have letters: `For A: …`. Both templates depend on the SQL and the schema only: the same query, the same reasoning.

Words, aliases and columns are read as atomic.py reads them. SQL that it cannot read gets the terse list.
"""

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from text2sql.atomic import (
    COMPARISONS,
    SET_OPERATIONS,
    Join,
    Parser,
    Scope,
    Source,
    Unparsable,
    freeze_schema,
    is_name,
    known_columns,
    plain_name,
    split_tokens,
)

LISTED = ("join", "where", "group by", "having", "order by", "limit", "intersect", "union", "except")
COMBINED = {"union": "the rows of {} and of {}, each once", "union all": "all rows of {} and of {}",
            "intersect": "the rows that {} and {} share", "except": "the rows of {} that are not in {}"}
# Words in expressions that atomic.py would take for a name where the columns of a table are unknown.
NEVER_COLUMNS = frozenset(("asc", "desc", "end", "nulls", "first", "last", "over", "partition", "rows", "range",
                           "groups", "filter", "offset", "integer", "int", "real", "text", "float", "null", "true",
                           "false"))
EQUAL_NAMES = re.compile(r"\w+\.(\w+) = \w+\.\1")  # `singer.id = concert.id` is said as `id`
NUMBERED = re.compile(r"t\d+")
PLAIN_NAME = re.compile(r"[^\W\d]\w*")


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


def plan_trace(sql: str, schema: Mapping[str, Sequence[str]]) -> str:
    """A query's plan in sentences: which table gives what, joins, filters, groups, order, limit, output.

    Args:
        schema: {table: [column, ...]} of the database.
    """
    try:
        return Planner(sql, schema).plan()
    except (Unparsable, RecursionError):
        return template_trace(sql, schema)


class Planner:
    """Walks a query clause by clause and writes a sentence for each; `Parser` finds its clauses, tables and joins."""

    def __init__(self, sql: str, schema: Mapping[str, Sequence[str]]):
        words, known = split_tokens(sql), known_columns(freeze_schema(schema))
        Parser(words, known).statement()  # raises Unparsable; from here on the query is known to be whole
        self.parser = Parser(words, known)
        self.words = self.parser.words
        self.tables = {table.lower(): table for table in schema}
        self.columns = {table.lower(): {column.lower(): column for column in names} for table, names in schema.items()}
        self.inner: list[str] = []  # `For A: …` of the inner queries, in the order in which they are needed
        self.used: dict[str, dict[str, None]] = {}  # table -> its columns that the present SELECT has used
        self.in_condition = False  # where every column is named with its table

    def plan(self) -> str:
        """The whole trace."""
        sentences, _ = self.query(0)
        return " ".join([*self.inner, *(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)])

    # ---- queries

    def query(self, i: int) -> tuple[list[str], int]:
        """Sentences of the query that begins at word i, and where it ends.

        [WITH ...] core [UNION core ...] [ORDER BY ...] [LIMIT ...]
        """
        parser = self.parser
        parser.deeper()
        surroundings, used = parser.scope, self.used
        outer = parser.scope = Scope(outer=surroundings)
        if self.words[i] == "with":
            i = self.common_tables(i + 1)
        letters, operations = [], []
        while True:
            parser.scope, self.used = Scope(outer=outer), {}
            middle, shown, i = self.core(i)
            tail, i = self.order_and_limit(i)
            if self.words[i] not in SET_OPERATIONS:
                break
            letters.append(self.letter([*self.given(), *middle, *tail, *shown]))
            operations.append(self.words[i] + " all" * (self.words[i + 1] == "all"))
            i += len(operations[-1].split())
        if operations:  # order and limit are those of the whole
            letters.append(self.letter([*self.given(), *middle, *shown]))
            sentences = [*combined(letters, operations), *tail]
        else:
            sentences = [*self.given(), *middle, *tail, *shown]
        parser.scope, self.used = surroundings, used
        parser.depth -= 1
        return sentences, i

    def letter(self, sentences: list[str], name: str = "") -> str:
        """Puts an inner query before the others; returns the letter (or the given name) that it is known by."""
        number = len(self.inner)
        name = name or ascii_uppercase[number % 26] + str(number // 26 or "")
        self.inner.append(f"For {name}: {'; '.join(sentences)}.")
        return name

    def inner_query(self, opening: int) -> str:
        """The letter of the query in the parentheses that open there."""
        before, self.in_condition = self.in_condition, False
        letter = self.letter(self.query(opening + 1)[0])
        self.in_condition = before
        return letter

    def common_tables(self, i: int) -> int:
        """WITH name [(columns)] AS (query), ...; returns where the main query begins."""
        parser = self.parser
        parser.i = i
        parser.accept("recursive")
        while True:
            name = parser.name()
            names = parser.column_list() if self.words[parser.i] == "(" else None
            parser.scope.ctes[name] = Source(name, name, names and {column: column for column in names})
            parser.expect("as")
            parser.accept("not")
            parser.accept("materialized")
            opening = parser.i
            parser.expect("(")
            self.letter(self.query(opening + 1)[0], name)
            parser.i = parser.closing[opening] + 1
            if not parser.accept(","):
                return parser.i

    def core(self, i: int) -> tuple[list[str], list[str], int]:
        """One SELECT from word i: sentences from its joins to HAVING, that of its output, and where it ends."""
        if self.words[i] == "(":  # a query in parentheses, which is clear although SQLite refuses it
            return self.query(i + 1)[0], [], self.parser.closing[i] + 1
        if self.words[i] == "values":
            end = self.end_of_tail(i)
            return [], [f"show the rows {self.text(i + 1, end)}"], end
        begin = self.parser.i = i + 1
        clauses, end = self.parser.find_clauses()
        places = sorted([*clauses.values(), end])
        ends = dict(zip(places, places[1:], strict=False))
        sentences = self.sources(clauses["from"], ends[clauses["from"]], begin, end) if "from" in clauses else []
        shown = f"show {self.text(begin, places[0])}"
        for clause, opening, skipped in (("where", "keep rows where", 1), ("group", "group by", 2),
                                         ("having", "keep groups where", 1)):
            if clause in clauses:
                read = self.text if clause == "group" else self.condition
                sentences.append(f"{opening} {read(clauses[clause] + skipped, ends[clauses[clause]])}")
        return sentences, [shown], end

    def order_and_limit(self, i: int) -> tuple[list[str], int]:
        """Sentences of ORDER BY and LIMIT from word i, and where they end."""
        end, sentences = self.end_of_tail(i), []
        limit = self.find(("limit",), i, end)
        if self.words[i] == "order":
            sentences.append(f"sort by {self.order_terms(i + 2, limit)}")
        if limit < end:
            middle = self.find(("offset", ","), limit, end)
            count, skipped = (limit + 1, middle), (middle + 1, end)
            if self.words[middle] == ",":  # LIMIT skipped, count
                count, skipped = skipped, count
            sentences += [f"skip the first {self.text(*skipped)}"] if middle < end else []
            sentences.append(f"take the first {self.text(*count)}")
        return sentences, end

    def order_terms(self, i: int, end: int) -> str:
        """`age descending, name ascending`."""
        terms = []
        while i < end:
            stop = self.find((",",), i, end)
            direction = self.find(("asc", "desc", "nulls"), i, stop)
            falls = "desc" in self.words[direction:stop]
            terms.append(f"{self.text(i, direction)} {'descending' if falls else 'ascending'}")
            i = stop + 1
        return ", ".join(terms)

    def end_of_tail(self, i: int) -> int:
        """Where the query ends whose last words begin at i."""
        while (word := self.words[i]) not in ("", ")", ";", *SET_OPERATIONS):
            i = self.parser.closing[i] + 1 if word == "(" else i + 1
        return i

    def find(self, wanted: tuple[str, ...], i: int, end: int) -> int:
        """The first place of one of these words outside parentheses, or `end`."""
        while i < end and self.words[i] not in wanted:
            i = self.parser.closing[i] + 1 if self.words[i] == "(" else i + 1
        return min(i, end)

    # ---- tables

    def sources(self, i: int, end: int, begin: int, core_end: int) -> list[str]:
        """Reads the FROM at word i into the scope; returns its sentence on joins, whose columns are not `used`."""
        self.parser.read_from(i + 1, begin, core_end)
        scope = self.parser.scope
        self.parser.scope = scope.outer  # a subquery in FROM does not see the tables beside it
        derived = iter(self.derived_tables(i, end, scope.joins))
        self.parser.scope = scope
        for source in scope.sources:
            if source.base == "derived":
                source.label = next(derived)
                source.columns = source.columns and {name: name for name in source.columns}
            elif "#" in source.label:  # one of several uses of a table
                alias = source.alias.upper() if NUMBERED.fullmatch(source.alias) else source.alias  # T1
                source.label = f"{alias} ({self.spelled(source.base)})"
            else:
                source.label = self.spelled(source.base)
        steps = [self.join(join) for join in scope.joins]
        self.used = {source.label: {} for source in scope.sources}
        return [f"join {scope.sources[0].label} {', then '.join(steps)}"] if steps else []

    def derived_tables(self, i: int, end: int, joins: Sequence[Join]) -> list[str]:
        """The letters of the subqueries in FROM, in their order; conditions of joins have their own."""
        conditions = dict(join.condition for join in joins if join.condition)
        letters = []
        while i < end:
            opens = self.words[i] == "(" and self.parser.at_query(i + 1)
            if opens:
                letters.append(self.inner_query(i))
            i = self.parser.closing[i] + 1 if opens else max(i + 1, conditions.get(i, 0))
        return letters

    def join(self, join: Join) -> str:
        """`with concert on singer.id = concert.sid`."""
        side = next((f"{side} " for side in ("left", "right", "full") if side in join.kind), "")
        text = f"{side}with {' and '.join(source.label for source in join.right)}"
        if join.condition:
            condition = self.condition(*join.condition)
            equal = EQUAL_NAMES.fullmatch(condition)
            return f"{text} on {equal[1] if equal else condition}"
        if join.using:
            return f"{text} on {', '.join(join.using)}"
        return text + " on equal columns" * join.natural

    def given(self) -> list[str]:
        """Which table gives which columns to the present SELECT; tables that only link others stand in the join."""
        if list(map(bool, self.used.values())) == [False]:
            return [f"use {label}" for label in self.used]
        return [f"from {label}: {', '.join(columns)}" for label, columns in self.used.items() if columns]

    # ---- expressions

    def text(self, i: int, end: int) -> str:
        """The words from i to end as they stand, with tables for aliases and letters for inner queries."""
        text = ""
        while i < end:
            piece, after = self.piece(i)
            glued = not text or piece in (",", ")") or text.endswith("(") or (
                self.words[i - 1] in "+-" and self.is_sign(i - 1))
            text, i = text + ("" if glued else " ") + piece, after
        return text

    def condition(self, i: int, end: int) -> str:
        """`text` of a condition."""
        before, self.in_condition = self.in_condition, True
        text = self.text(i, end)
        self.in_condition = before
        return text

    def is_sign(self, i: int) -> bool:
        """Whether the + or - there belongs to the operand after it."""
        before = self.words[i - 1]
        return before in COMPARISONS or before in ("(", ",", "between", "and", "then", "else", "limit", "offset")

    def piece(self, i: int) -> tuple[str, int]:
        """The word at i, or the name or inner query that begins there, and what comes after."""
        word, following = self.words[i], self.words[i + 1]
        if word == "(" and self.parser.at_query(i + 1):
            return self.inner_query(i), self.parser.closing[i] + 1
        if not is_name(word):
            return word, i + 1
        if following == ".":
            if self.words[i + 3] == ".":  # database.table.column
                i += 2
            return self.of_table(plain_name(self.words[i]), self.words[i + 2]), i + 3
        if following == "(" and not self.parser.at_query(i + 2):
            return plain_name(word) + "(", i + 2
        if self.words[i - 1] == "as":  # an alias, or the type of a CAST
            return self.spelled(plain_name(word), {}), i + 1
        return self.bare(word), i + 1

    def of_table(self, table: str, column: str) -> str:
        """`alias.column` with its table."""
        for scope, marks in self.parser.scope.chain():
            if source := scope.find(table):
                return self.column(source, plain_name(column), bool(marks))
        return f"{table}.{plain_name(column)}"

    def bare(self, word: str) -> str:
        """A column without a table; where no table has it, the word as it stands."""
        name = plain_name(word)
        for scope, marks in self.parser.scope.chain():
            having = [source for source in scope.sources if name in (source.columns or ())]
            unknown = [source for source in scope.sources if source.columns is None]
            if not having and len(unknown) == 1 and word[0] != '"' and name not in NEVER_COLUMNS | scope.aliases.keys():
                having = unknown
            if having:
                return self.column(having[0], name, bool(marks))
        if word[0] in "\"`":
            return word[0] + word[1:].replace(word[0], 2 * word[0]) + word[0]
        return word

    def column(self, source: Source, name: str, of_outer_query: bool) -> str:
        """A column in the schema's spelling, with its table where there are several."""
        shown = self.spelled(name, self.columns.get(source.base, {}))
        if name != "*" and not of_outer_query and source.label in self.used:
            self.used[source.label][shown] = None
        sources = self.parser.scope.sources
        clear = len(sources) == 1 or not self.in_condition and [
            one for one in sources if one.columns is None or name in one.columns] == [source]
        if clear and not of_outer_query:
            return shown
        label = source.label
        return f"{label.partition(' (')[0] if label.endswith(')') else label}.{shown}"  # T1 of `T1 (singer)`

    def spelled(self, name: str, names: Mapping[str, str] | None = None) -> str:
        """A column among `names`, or a table, as the schema spells it; in backticks unless it is one plain word."""
        name = (self.tables if names is None else names).get(name, name)
        return name if name == "*" or PLAIN_NAME.fullmatch(name) else f"`{name.replace('`', '``')}`"


def combined(letters: Sequence[str], operations: Sequence[str]) -> list[str]:
    """UNION, INTERSECT and EXCEPT of inner queries, from left to right."""
    left, sentences = letters[0], []
    for operation, right in zip(operations, letters[1:], strict=True):
        sentences.append("show " + COMBINED.get(operation, COMBINED["union"]).format(left, right))
        left = "these"
    return sentences


TRACE_TEMPLATES = {"terse": template_trace, "plan": plan_trace}
TEMPLATE = "terse"  # which of them `--traces template` writes
