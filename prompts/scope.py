"""What a query may go on with, by the tables that it reads: `--constrain scope`, after names.py.

`Reader.next` reads an unfinished query word by word. For each SELECT in it, it notes the tables of FROM and the columns
that are named before them:

    SELECT list   every column of the database; after a table's name and a point, only those of that table
    FROM          tables; and FROM does not end before it has a table for each column that the SELECT list names
    after FROM    columns of its tables and of the queries around it that are not ambiguous, and names of results (AS …)

Keywords come where they can: no value directly after a value, none that joins two values after an operator, WHERE once,
aggregates not in it. It is not a grammar, so SQL that does not run remains possible.

Two conventions go beyond SQL. A policy that has named columns often chooses a table without them next, and what it then
writes to end FROM is rarely right:

    the first table of FROM has one of the columns that are named without a table
    if the SELECT list names columns of t1, so has the table that will be called so; likewise t2, …

So `SELECT cost FROM doctor JOIN visit` is forbidden where only visit has a cost, because its columns need no qualifier;
so is a space before the point of `doctor .name`. What is not known is free: columns of a subquery with * in FROM, names
in quotes, and all of a query with WITH.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise

from prompts.sql_words import AGGREGATES, ALIASES, KEYWORDS, NAME, NUMBERED, QUOTES, functions, one_of, words

WORD = re.compile(r"([A-Za-z_]\w*)\s*\.\s*(\w+|\*|'')|[0-9][0-9.]*\w*|\w+|''|\S")
ALIAS_NUMBER = re.compile(r"t(\d+)")
AFTER_FROM = words("where group order limit having window union intersect except")
JOINS = words("as cross full indexed inner join left natural not on outer right using")
ONCE = words("where join inner outer cross natural using on left right full")  # not after WHERE has begun
FRAMES = words("groups range rows preceding following unbounded partition others ties current exclude")  # of windows
OPERATORS = words("""select distinct where and or by on having when then else between like glob limit offset
                     , = < > ! + - / % | & ~""")  # before an operand
OPERAND = words("not null case cast exists distinct all true false select values with when current row rowid")


@dataclass(frozen=True)
class Next:
    """What may come next. Names are in lower case."""

    names: frozenset[str] | None = frozenset()  # without a qualifier; None: all
    of: frozenset[tuple[str, frozenset[str] | None]] = frozenset()  # (qualifier, its columns; None: all)
    undeclared: bool = False  # whether an alias that FROM has yet to declare may qualify a column
    declares: str = ""  # "name" after AS, "alias" where AS may be left out
    taken: frozenset[str] = frozenset()  # aliases that cannot be declared here
    keywords: frozenset[str] = KEYWORDS
    calls: frozenset[str] | None = None  # functions; None: neither calls nor numbers
    marks: str = ""  # the only punctuation before it; "": any
    open: bool = False  # whether FROM lacks a table, so that it cannot end

    def expression(self) -> str:
        """The regular expression of the next word and whatever follows it, as llguidance reads it."""
        ends = "" if self.open else ");"
        marks = rf"[\s{self.marks}{ends}]" if self.marks else rf"[^A-Za-z0-9_'\"`\[{'' if ends else ');'}]"
        after = r"([^A-Za-z0-9_.][\s\S]*)?"
        word = rf"({marks}|{QUOTES})*(({'|'.join(self.alternatives())}){after})"
        return word if self.open else rf"{word}?|\s*(```|</answer>)[\s\S]*"  # the end in the other styles of answers

    def alternatives(self) -> Iterable[str]:
        """The regular expressions of the words that may come next."""
        yield one_of(self.keywords)
        yield NAME if self.names is None else one_of(self.names)
        for qualifier, columns in sorted(self.of, key=lambda pair: pair[0]):
            yield rf"{one_of([qualifier])}\.\s*({NAME if columns is None else one_of(columns)}|[*]|{QUOTES})"
        if self.undeclared:
            yield rf"{one_of(ALIASES - self.taken)}\.\s*({NAME}|[*]|{QUOTES})"
        if self.undeclared and not self.taken:
            yield NUMBERED  # the name of a result that is declared later
        if self.calls is not None:
            yield r"[0-9]+([.][0-9]*)?([eE][0-9]+)?"
            yield rf"{one_of(self.calls)}\s*\([\s\S]*"
        if self.declares:
            yield one_of(ALIASES - KEYWORDS - self.taken)
        if self.declares == "name":  # a longer one
            yield "[A-SU-Za-su-z_][A-Za-z0-9_]{2,}|[tT][A-Za-z_][A-Za-z0-9_]+"


@dataclass
class Select:
    """One SELECT, as far as it is written."""

    around: "Select | None"  # the query that it is a subquery of
    depth: int  # of parentheses
    part: str = "select"  # select, from, on, where, rest
    tables: dict[str, frozenset[str] | None] = field(default_factory=dict)  # columns, by what the table is called here
    named: dict[str, set[str]] = field(default_factory=dict)  # columns named before their table, by qualifier or ""
    results: set[str] = field(default_factory=set)  # names of results
    stars: bool = False  # whether the SELECT list names all columns of a table
    joined: bool = False  # whether USING or NATURAL makes one column of two
    ready: bool = False  # whether a table comes next
    table: str | None = None  # the table that may get an alias next

    def columns(self) -> frozenset[str] | None:
        """The columns that are known without a qualifier; None if some are not."""
        outer = frozenset() if self.around is None else None if self.around.part == "select" else self.around.columns()
        found = [*self.tables.values(), outer]
        return None if None in found else frozenset().union(*found)

    def unambiguous(self) -> frozenset[str] | None:
        """Those of `columns` that no two tables of this query have."""
        columns = self.columns()
        if columns is None or self.joined:
            return columns
        counts = Counter(chain.from_iterable(self.tables.values()))
        return frozenset(column for column in columns if counts[column] < 2)

    def shows(self) -> frozenset[str] | None:
        """The columns of the result, and perhaps more; None if they are not known."""
        return None if self.stars else frozenset(self.results.union(*self.named.values()))

    def qualifiers(self) -> dict[str, frozenset[str] | None]:
        """{what a table is called: its columns}, also of the queries around this one."""
        return (self.around.qualifiers() if self.around else {}) | self.tables

    @property
    def unknown(self) -> bool:
        """Whether tables may have names that are not known: in quotes, or of a query whose FROM comes later."""
        return "''" in self.tables or self.around is not None and (self.around.part == "select" or self.around.unknown)

    def lacks(self) -> bool:
        """Whether FROM has yet to read a table of a column that is named before it."""
        columns, known = self.columns(), self.qualifiers()
        if columns is None:
            return False
        return not self.named.get("", set()) <= columns or any(name and name not in known for name in self.named)


class Reader:
    """Reads unfinished queries of one database."""

    def __init__(self, schema: Mapping[str, Iterable[str]]):
        """schema: {table: [column, …]}"""
        self.tables = {table.lower(): frozenset(column.lower() for column in columns)
                       for table, columns in schema.items()}
        self.everything = frozenset().union(*self.tables.values())

    def next(self, text: str) -> Next | None:
        """What may follow a text whose quotes are empty, up to the word that is being written; None: anything."""
        select, outside, highest, before = None, [], 0, ""  # highest of the aliases t1, t2, … so far
        found = [(match[0].lower(), (match[1] or "").lower(), (match[2] or "").lower())
                 for match in WORD.finditer(text)]
        if found and found[0][0] == "with":
            return None
        for place, ((word, qualifier, column), (after, _, _)) in enumerate(pairwise([*found, ("", "", "")])):
            if word == "(":
                outside.append(select)
            elif word == ")":
                if not outside:
                    return None
                inner, select = select, outside.pop()
                if inner is not select and select is not None and select.ready:  # a subquery in FROM
                    select.tables[f"({place}"], select.table, select.ready = inner.shows(), f"({place}", False
            elif word == "select":
                select = self.begin(select, before, len(outside))
            elif select is not None:
                declared = self.in_from(select, word, before, len(outside))
                highest = max([highest, *(int(match[1]) for match in [ALIAS_NUMBER.fullmatch(declared)] if match)])
                if not declared and (select.part == "select" or qualifier):
                    self.note(select, word, qualifier, column, before, after)
            before = word
        return None if select is None else self.after(select, before, len(outside), f"t{highest + 1}")

    @staticmethod
    def begin(select: Select | None, before: str, depth: int) -> Select:
        """A new SELECT: a subquery, or the next of a compound query, which may be sorted by results of the first."""
        if select is None or before == "(":
            return Select(select, depth)
        return Select(select.around, depth, results=select.results | select.named.get("", set()))

    def in_from(self, select: Select, word: str, before: str, depth: int) -> str:
        """Notes a word that begins FROM, belongs to it or ends it. -> the alias that it declares, if any"""
        part, own = select.part, depth == select.depth
        name = word == "''" or is_name(word)
        if part == "from" and select.ready and (name or word in self.tables):
            select.tables[word] = self.tables.get(word)
            select.table, select.ready = word, False
        elif word == "from" and part == "select" and before != "distinct":
            select.part, select.ready = "from", True
        elif word == "join" or word == "," and part in ("from", "on") and own:
            select.part, select.ready, select.table = "from", True, None
        elif word in ("on", "using") and part == "from":
            select.part, select.table, select.joined = "on", None, select.joined or word == "using"
        elif word == "natural" and part in ("from", "on"):
            select.joined, select.table = True, None
        elif word in AFTER_FROM and part in ("from", "on", "where") and own:
            select.part = "where" if word == "where" else "rest"
        elif part == "from" and select.table is not None and name:
            select.tables[word] = select.tables.pop(select.table)
            select.table = None
            return word
        return ""

    def note(self, select: Select, word: str, qualifier: str, column: str, before: str, after: str) -> None:
        """Notes a word of a SELECT list, or a column of a table that FROM has yet to name."""
        if qualifier:
            if select.part == "select" or select.part == "on" and qualifier not in select.qualifiers():
                select.named.setdefault(qualifier, set()).update({column} & self.everything)
                select.stars |= column in ("*", "''")
        elif word == "''" or word == "*" and before in ("select", "distinct", "all", ","):
            select.stars = True
        elif is_name(word) and after != "(":
            if before == "as" or ends_value(before):
                select.results.add(word)
            elif word in self.everything:
                select.named.setdefault("", set()).add(word)

    def after(self, select: Select, before: str, depth: int, alias: str) -> Next:
        """What may come next in a SELECT. alias: the next of t1, t2, …"""
        own, part = depth == select.depth, select.part
        lacks = part in ("from", "on") and own and select.lacks()
        keywords = keywords_after(part, before, own) - (AFTER_FROM if lacks else set())
        if part == "from" and select.ready:
            return Next(self.tables_after(select, alias), marks="(", open=lacks,
                        keywords=frozenset(("select", "values", "with")) if before == "(" else frozenset())
        if part == "from":
            columns = None if select.table is None else select.tables[select.table]
            wrong = {name for name, named in select.named.items() if columns is not None and not named <= columns}
            return Next(declares="name" if before == "as" else "alias" if select.table is not None else "",
                        keywords=keywords, taken=frozenset(wrong | select.tables.keys()), marks=",", open=lacks)
        if before == "as" or ends_value(before):
            declares = "name" if before == "as" else "alias" if part == "select" else ""
            return Next(declares=declares, keywords=keywords, open=lacks)
        calls = functions() - (AGGREGATES if part == "where" else frozenset())
        if part == "select":
            return Next(self.everything, frozenset(self.tables.items()), True, keywords=keywords, calls=calls)
        columns, known = select.unambiguous(), select.qualifiers()
        return Next(None if columns is None else columns | select.results, frozenset(known.items()),
                    part == "on" or select.unknown, "", frozenset(known), keywords, calls, open=lacks)

    def tables_after(self, select: Select, alias: str) -> frozenset[str]:
        """The tables that FROM may read next, by the conventions above; all if none keeps to them."""
        loose, wanted = select.named.get("", set()), select.named.get(alias, set())
        found = {table for table, columns in self.tables.items()
                 if wanted <= columns and (select.tables or not loose or loose & columns)}
        return frozenset(found - select.tables.keys() or found or self.tables)


def keywords_after(part: str, before: str, own: bool) -> frozenset[str]:
    """The keywords that may come after a word. own: whether no parenthesis is open in this part of the SELECT"""
    if before in OPERATORS:
        return OPERAND | ({"from"} if before == "distinct" else set())
    if part == "from":
        return JOINS | AFTER_FROM
    if not own:
        return KEYWORDS
    return KEYWORDS - FRAMES - (ONCE if part in ("where", "rest") else set())


def is_name(word: str) -> bool:
    """Whether a word is a name and no keyword."""
    return word.isidentifier() and word not in KEYWORDS


def ends_value(word: str) -> bool:
    """Whether a value ends with this word."""
    return word in (")", "''", "end") or "." in word or word[:1].isalnum() and word not in KEYWORDS
