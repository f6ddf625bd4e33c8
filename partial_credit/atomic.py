"""The atomic reward: how many of the gold query's operations a predicted query contains.

A query becomes a set of operations, one short line each:

    SELECT T1.name FROM singer AS T1 WHERE T1.age > 30      ->  from singer
                                                                select singer.name
                                                                where singer.age > 30

and two queries score the Jaccard index of their sets: shared operations over all operations. Forms of the
same query get the same set: tables instead of aliases, sorted sides and terms, `a < b` for `b > a`, two
comparisons for BETWEEN. Different queries get different sets. The rules:

1. A clause gives one operation per item or condition (WHERE a AND b: two), so that part of a query earns
   part of the score. Where order matters (SELECT, ORDER BY) each pair of neighbours adds one: `select
   a then b`.
2. Conditions of inner joins are conditions like those of WHERE, so their position makes no difference:
   those that equate columns of two tables are called `on`, all others `where`. Conditions of outer joins
   stay with their join.
3. A subquery appears in its condition as its own canonical text. Its operations count once more for partial
   credit, prefixed with its role (`where in > select singer.id`), never as operations of the outer query.
4. Two uses of one table are distinguished by how they are used (`usage`), not by their aliases or order.

The tokens are sqlparse's (only its lexer: the grouping is slow), the grammar is SQLite's SELECT
(https://sqlite.org/lang_select.html, https://sqlite.org/lang_expr.html). The parser writes the canonical
text of an expression as it reads it, so there is no tree. It reads FROM before SELECT, because names can be
resolved only when the tables are known. Left out: anything that needs algebra (IN against EXISTS, a
subquery against a join).
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

from sqlparse import lexer
from sqlparse import tokens as T

MAX_LENGTH = 5_000  # characters; longer SQL counts as unparsable, which bounds the time of every input
MAX_TOKENS = 3_000  # including white space; more count as unparsable, because even short tokens take time
MAX_DEPTH = 60  # nested parentheses, subqueries and operators; deeper SQL counts as unparsable
MAX_SOURCES = 64  # tables in one FROM, as in SQLite
MAX_TEXT = 160  # a longer subquery text in an expression is cut here and hashed, or nesting would blow it up

SET_OPERATIONS = ("union", "intersect", "except")
CLAUSES = ("from", "where", "group", "having", "window")
AFTER_CORE = (*SET_OPERATIONS, "order", "limit", ")", ";", "")
JOIN_WORDS = ("natural", "left", "right", "full", "inner", "cross", "join")
KEYWORDS = frozenset((  # words that cannot be a name or an alias, for SQLite or for us
    "and", "as", "between", "by", "case", "collate", "cross", "distinct", "else", "escape", "except",
    "exists", "from", "full", "group", "having", "in", "inner", "intersect", "is", "isnull", "join", "left",
    "like", "limit", "natural", "not", "notnull", "on", "or", "order", "right", "select", "set", "then",
    "union", "using", "values", "when", "where"))

# Operator precedence, https://sqlite.org/lang_expr.html#operators_and_parse_affecting_attributes
PRECEDENCE = {"or": 1, "and": 2, **dict.fromkeys(
    ("=", "==", "<>", "!=", "is", "in", "like", "glob", "match", "regexp", "between", "isnull", "notnull",
     "not"), 4),
    **dict.fromkeys(("<", "<=", ">", ">="), 5), **dict.fromkeys(("&", "|", "<<", ">>"), 6), "+": 7, "-": 7,
    "*": 8, "/": 8, "%": 8, "||": 9, "->": 9, "->>": 9, "collate": 10}
NOT, EQUALITY, COMPARISON, BITS, COLLATE = 3, 4, 5, 6, 10
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
OPPOSITE = {"=": "<>", "<>": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
COMPARISONS = {"=": "=", "==": "=", "<>": "<>", "!=": "<>", **{operator: operator for operator in MIRRORED}}
CONSTANT = tuple("'0123456789.-?:@$")  # how numbers, strings and parameters begin
COMMUTATIVE = ({"+"}, {"*"}, {"&"}, {"|"})

# sqlparse reads \' as an escaped quote, %s as a placeholder and \r as the end of a comment; SQLite does not, so all
# three are hidden.
HIDE = str.maketrans({"\\": "\ue000", "%": "\ue001", "\r": " "})
OPERATORS = re.compile(r"\|\||->>?|<<|>>|<=|>=|<>|==|!=|\s+|.", re.DOTALL)


class Unparsable(ValueError):
    """Not one SELECT statement that we understand."""


# ----------------------------------------------------------------------------------------
# The interface.

def atomic_reward(predicted: str, golds, schema: dict | None = None, weight: Callable | None = None) -> float:
    """The largest Jaccard index of the operations of `predicted` and those of a gold: symmetric, in [0, 1].

    `golds` is one query or several equivalent ones. The score is not shaped: equivalent queries score
    exactly 1, and an unparsable query scores 0, even against itself. `weight` maps an operation to its
    weight, as `rarity` does; without it all operations count equally. Raises nothing.
    """
    golds = [golds] if isinstance(golds, str) else golds
    schema = freeze_schema(schema)
    found = operations_of(predicted, schema)
    return max((jaccard(found, operations_of(gold, schema), weight) for gold in golds), default=0.0)


def shape_atomic(j: float, lam: float = 0.05, beta: float = 0.79, gamma: float = 0.20) -> float:
    """φ(j) = λ j + (1 − λ) β j^γ, the paper's shaping (arXiv 2605.03465), steep near φ(0) = 0.

    `atomic_reward` stays unshaped, so equivalent queries score exactly 1 there; rewards.py shapes the score
    and grants it to wrong answers only.
    """
    return lam * j + (1 - lam) * beta * j**gamma if j > 0 else 0.0


def atomic_operations(sql: str, schema: dict | None = None) -> frozenset[str]:
    """The operations of one SELECT statement, {} if it cannot be parsed. `schema`: {table: [column, ...]}."""
    return operations_of(sql, freeze_schema(schema))


def jaccard(a: frozenset, b: frozenset, weight: Callable | None = None) -> float:
    """Shared over all; 0 if either is empty, so that two unparsable queries do not match."""
    if weight is None:
        shared = len(a & b)
        return shared / (len(a) + len(b) - shared) if shared else 0.0
    # fsum: the sum does not depend on the order of a set
    return math.fsum(map(weight, a & b)) / math.fsum(map(weight, a | b)) if a & b else 0.0


def rarity(golds: Iterable[tuple[str, dict | None]]) -> Callable[[str], float]:
    """Weights operations by their rarity in N (gold SQL, schema) pairs: log((N + 2) / (n + 1)), if n golds contain it.

    `from singer` then counts less than the right condition on it, and an operation that no gold contains, such as an
    invented column, counts most. This is the inverse document frequency of text retrieval (Sparck Jones 1972).
    """
    golds = list(golds)
    counts, N = Counter(op for sql, schema in golds for op in atomic_operations(sql, schema)), len(golds)
    return lambda operation: math.log((N + 2) / (counts[operation] + 1))


def freeze_schema(schema: dict | None) -> tuple | None:
    """A schema as a cache key."""
    return None if not schema else tuple((table, tuple(columns)) for table, columns in schema.items())


@lru_cache(maxsize=256)
def known_columns(schema: tuple | None) -> dict[str, dict[str, str]]:
    """{table: {column: column}}, lower case."""
    return {table.lower(): {column.lower(): column.lower() for column in columns}
            for table, columns in schema or ()}


def operations_of(sql: str, schema: tuple | None) -> frozenset[str]:
    return cached_operations(sql, schema) if isinstance(sql, str) and len(sql) <= MAX_LENGTH else frozenset()


@lru_cache(maxsize=16_384)  # a gold is scored against many predictions but parsed once
def cached_operations(sql: str, schema: tuple | None) -> frozenset[str]:
    try:
        query = QueryParser(split_tokens(sql), known_columns(schema)).statement()
    except (Unparsable, RecursionError):
        return frozenset()
    return frozenset(query.own | query.parts)


# ----------------------------------------------------------------------------------------
# Words.

def lex(sql: str) -> Iterator[tuple]:
    """(kind, text) of every token, including white space and comments; the joined texts are the SQL."""
    start = 0
    for kind, hidden in lexer.tokenize(sql.translate(HIDE)):
        end = start + len(hidden)
        yield kind, sql[start:end]
        start = end


def is_comment(kind, text: str) -> bool:
    """Whether a token is a comment; SQLite has none that begin with #."""
    return kind in T.Comment and text[0] != "#"


def split_tokens(sql: str) -> list[str]:
    """Flat tokens whose first character gives their kind.

    Keywords and bare names are lower case; a quoted name has a mark in front: `"x` (may be a string) or
    `` `x `` (cannot be one); a string keeps its quotes; all other tokens are unchanged.
    """
    words = []
    tokens = list(islice(lex(sql), MAX_TOKENS + 1))
    if len(tokens) > MAX_TOKENS:
        raise Unparsable("too many tokens")
    for kind, text in tokens:
        first = text[0]
        if first.isspace() or is_comment(kind, text):
            continue
        if first.isalpha() or first == "_":
            words.extend(text.lower().split())
        elif first == "'" and len(text) > 1:
            words.append(text)
        elif first in "\"`[" and len(text) > 1:
            quote = "`" if first == "[" else first
            words.append(quote + text[1:-1].replace(quote * 2, quote))
        elif kind in T.Number:
            words.extend(("-", text[1:].lower()) if first == "-" else (text.lower(),))
        elif kind in T.Name.Placeholder:
            words.append(text.lower())
        elif first in "'\"`[#´":
            raise Unparsable(f"stray {first}")
        else:
            words.extend(word for word in OPERATORS.findall(text) if not word.isspace())
    return words


def names_in(sql: str) -> set[str]:
    """The words of a query that may be names, lower case, without strings and comments."""
    try:
        return {plain_name(word) for word in split_tokens(sql)} if len(sql) <= MAX_LENGTH else set()
    except Unparsable:
        return set()


def match_parentheses(words: list[str]) -> dict[int, int]:
    """{position of each (: position of its )}."""
    opened, pairs = [], {}
    for i, word in enumerate(words):
        if word == "(":
            opened.append(i)
        elif word == ")":
            if not opened:
                raise Unparsable("stray )")
            pairs[opened.pop()] = i
    if opened:
        raise Unparsable("unclosed (")
    return pairs


def is_name(word: str) -> bool:
    return word[:1] in ('"', "`") or (word[:1].isalpha() or word[:1] == "_") and word not in KEYWORDS


def plain_name(word: str) -> str:
    return word[1:].lower() if word[0] in "\"`" else word


# ----------------------------------------------------------------------------------------
# What the parser writes: canonical text, with attributes that later steps need.

class Terms(str):
    """`a and b`, `a or b`, with its `word` and `terms`, to flatten nested ones and to split WHERE."""


class Predicate(str):
    """`a < b`, with its `sides` and `operator`, so that NOT can invert it."""


class Quoted(str):
    """A "double quoted" word that may be a column (its text) or, as SQLite allows, a string (`literal`)."""


def terms_of(text: str, word: str) -> list[str]:
    return text.terms if isinstance(text, Terms) and text.word == word else [text]


def combine(word: str, terms: list[str]) -> str:
    """AND or OR of terms, in any order and without repeats."""
    flat = sorted({term for text in terms for term in terms_of(text, word)})
    if len(flat) == 1:
        return flat[0]
    result = Terms("(" + f" {word} ".join(flat) + ")")
    result.word, result.terms = word, flat
    return result


def negate(text: str) -> str:
    """NOT, moved inwards: NOT (a < 1 AND b = 2) is a >= 1 OR b <> 2, also with NULL."""
    if isinstance(text, Terms):
        return combine("or" if text.word == "and" else "and", [negate(term) for term in text.terms])
    if isinstance(text, Predicate) and text.operator in OPPOSITE:
        return compare(text.sides[0], OPPOSITE[text.operator], text.sides[1])
    return text[4:] if text.startswith("not ") else "not " + text


def is_constant(text: str) -> bool:
    return text.startswith(CONSTANT) or text in ("null", "true", "false")


def settle(left: str, right: str) -> tuple[str, str]:
    """Read a "quoted" side as a string if the other side is a column: name = "France"."""
    if isinstance(left, Quoted) == isinstance(right, Quoted):
        return left, right
    if isinstance(left, Quoted):
        return (left, right) if is_constant(right) else (left.literal, right)
    return (left, right) if is_constant(left) else (left, right.literal)


def literal(text: str) -> str:
    return text.literal if isinstance(text, Quoted) else text


def compare(left: str, operator: str, right: str) -> str:
    """A comparison with its sides in a fixed order, constants last: 3 < age becomes age > 3."""
    left, right = settle(left, right)
    if (is_constant(left), left) > (is_constant(right), right):
        left, right, operator = right, left, MIRRORED.get(operator, operator)
    result = Predicate(f"{left} {operator} {right}")
    result.sides, result.operator = (left, right), operator
    return result


def brief(text: str) -> str:
    """The text, or its beginning and a hash of it."""
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}...{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}"


def sequence(name: str, items: list[str]) -> set[str]:
    """One operation per item and one per pair of neighbours; a repeated item counts again."""
    if len(set(items)) < len(items):
        count = Counter()
        items = [f"{item} ({count[item]})" for item in items if not count.update((item,))]
    pairs = zip(items, items[1:], strict=False)
    return {f"{name} {item}" for item in items} | {f"{name} {brief(a)} then {brief(b)}" for a, b in pairs}


# ----------------------------------------------------------------------------------------
# What names mean.

@dataclass
class Query:
    """`own`: the operations that determine the query; `parts`: those of its subqueries, for partial credit."""

    own: set[str] = field(default_factory=set)
    parts: set[str] = field(default_factory=set)
    columns: dict[str, str] | None = None  # output name -> text; None when unknown (SELECT *)
    items: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "{" + "; ".join(sorted(self.own)) + "}"


@dataclass
class Source:
    """A table, subquery or function in FROM."""

    base: str  # table name; `derived` for a subquery
    alias: str
    columns: dict[str, str] | None
    start: int = 0  # where the arguments of a table-valued function begin, or 0
    text: str = ""  # of a subquery
    kind: str = "inner"
    label: str = ""

    def column(self, name: str) -> str:
        return f"{self.label}.{(self.columns or {}).get(name, name)}"


@dataclass
class Join:
    kind: str
    left: list[Source]
    right: list[Source]
    condition: tuple[int, int] | None = None  # where the condition of ON begins and ends
    using: list[str] | None = None
    natural: bool = False


@dataclass
class Scope:
    """The names that one SELECT sees, and the outer scope."""

    outer: "Scope | None" = None
    ctes: dict[str, Source] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    joins: list[Join] = field(default_factory=list)
    items: list[str] = field(default_factory=list)  # texts of SELECT
    aliases: dict[str, str] = field(default_factory=dict)  # of SELECT items
    windows: dict[str, str] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)
    clause: str = "select"

    def find(self, name: str) -> Source | None:
        """The source named `name`; a table with an alias has only that name, as in SQLite."""
        return next((source for source in self.sources if source.alias == name), None)

    def chain(self):
        """This scope and the outer ones, each with one ^ per query in between."""
        scope, marks = self, ""
        while scope:
            yield scope, marks
            scope, marks = scope.outer, marks + "^" * bool(scope.sources)

    def cte(self, name: str) -> Source | None:
        return next((scope.ctes[name] for scope, _ in self.chain() if name in scope.ctes), None)

    def qualified(self, table: str, column: str) -> str:
        """`alias.column` with its table."""
        for scope, marks in self.chain():
            if source := scope.find(table):
                return marks + source.column(column)
        return f"?{table}.{column}"  # an error

    def known(self, column: str) -> str | None:
        """A bare column of a table here whose columns are known; the bare name if several have it (an error)."""
        found = [s.column(column) for s in self.sources if s.columns and column in s.columns]
        if len(found) > 1 and not any(column in (join.using or ()) for join in self.joins):
            return column
        return min(found, default=None)

    def bare(self, column: str) -> str | None:
        """A bare column or an alias of a SELECT item; None if no table or item can have this name."""
        alias = self.aliases.get(column)
        if alias and self.clause == "order":
            return alias
        for scope, marks in self.chain():
            unknown = [source for source in scope.sources if source.columns is None]
            if found := scope.known(column):
                return marks + found
            if scope is self and alias and not (unknown and self.clause == "where"):
                return alias
            if unknown:
                return marks + unknown[0].column(column) if len(unknown) == 1 else column
        return None


# ----------------------------------------------------------------------------------------
# The parser.

class QueryParser:
    """Recursive descent over the words; each method reads its piece and returns its canonical text."""

    def __init__(self, words: list[str], schema: dict[str, dict[str, str]]):
        self.words = [*words, *[""] * 8]  # so that looking ahead needs no bounds check
        self.closing = match_parentheses(words)
        self.schema = schema
        self.i = 0
        self.depth = 0
        self.scope = Scope()

    def accept(self, *words: str) -> str:
        """Take the next word if it is one of these."""
        word = self.words[self.i]
        if word and word in words:
            self.i += 1
            return word
        return ""

    def expect(self, word: str) -> None:
        if not self.accept(word):
            raise Unparsable(f"{word} expected, {self.words[self.i]!r} found")

    def name(self) -> str:
        word = self.words[self.i]
        if not is_name(word):
            raise Unparsable(f"name expected, {word!r} found")
        self.i += 1
        return plain_name(word)

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unparsable("nested too deeply")

    def at_query(self, i: int) -> bool:
        return self.words[i] in ("select", "with", "values")

    def commas(self, read) -> list:
        """One or more of what `read` reads."""
        items = [read()]
        while self.accept(","):
            items.append(read())
        return items

    # Queries.

    def statement(self) -> Query:
        query = self.query()
        while self.accept(";"):
            pass
        if self.words[self.i]:
            raise Unparsable(f"{self.words[self.i]!r} after the statement")
        return query

    def query(self) -> Query:
        """[WITH ...] core [UNION core ...] [ORDER BY ...] [LIMIT ...]"""
        self.deeper()
        surroundings = self.scope
        outer = Scope(outer=surroundings)
        self.scope = outer
        own, parts = self.ctes() if self.accept("with") else (set(), set())
        cores, words = [self.core()], []
        scope = self.scope
        tail = self.order_and_limit()
        while word := self.accept(*SET_OPERATIONS):
            words.append(word + (" all" if self.accept("all") else ""))
            cores[-1].own |= tail  # SQLite forbids it, but the meaning is clear
            self.scope = outer
            cores.append(self.core())
            self.scope = scope  # ORDER BY of the whole sees the names of the first SELECT
            tail = self.order_and_limit()
        query = cores[0] if not words else self.set_operation(cores, words)
        query.own |= own | tail
        query.parts |= parts | scope.parts
        self.scope = surroundings
        self.depth -= 1
        return query

    def set_operation(self, cores: list[Query], words: list[str]) -> Query:
        """The whole branches determine the query; their operations give partial credit."""
        query = Query(columns=cores[0].columns, items=cores[0].items)
        symmetric = len(set(words)) == 1 and words[0] != "except"
        for place, (word, core) in enumerate(zip([words[0], *words], cores, strict=True)):
            operation = f"{word} {core.text}" if symmetric else f"{word} {place} {core.text}"
            while operation in query.own:  # a UNION ALL a
                operation += " again"
            query.own.add(operation)
            prefix = "except > " if word == "except" and place else ""
            query.parts |= {prefix + part for part in core.own | core.parts}
        return query

    def ctes(self) -> tuple[set[str], set[str]]:
        """WITH [RECURSIVE] name [(columns)] AS [[NOT] MATERIALIZED] (query), ...; names are replaced like aliases."""
        own, parts = set(), set()
        self.accept("recursive")
        while True:
            name = self.name()
            names = self.column_list() if self.words[self.i] == "(" else None
            self.expect("as")
            self.accept("not")
            self.accept("materialized")
            label = f"cte{1 + sum(len(scope.ctes) for scope, _ in self.scope.chain())}"
            columns = {column: f"column{k}" for k, column in enumerate(names, 1)} if names else None
            source = self.scope.ctes[name] = Source(label, name, columns)  # visible to itself: may be recursive
            self.expect("(")
            query = self.query()
            self.expect(")")
            source.columns = rename(query, names)
            own.add(f"with {label} {query.text}")
            parts |= {f"{label} > {operation}" for operation in query.own | query.parts}
            if not self.accept(","):
                return own, parts

    def column_list(self) -> list[str]:
        self.expect("(")
        names = self.commas(self.name)
        self.expect(")")
        return names

    def core(self) -> Query:
        """One SELECT without ORDER BY and LIMIT, or VALUES. Leaves its scope in self.scope."""
        self.scope = scope = Scope(outer=self.scope)
        if self.accept("values"):
            rows = self.commas(self.operand)
            return Query(sequence("values", rows), scope.parts, None, rows)
        if self.words[self.i] == "(" and self.at_query(self.i + 1):  # SQLite forbids it, but it is clear
            return self.parenthesised_query()
        self.expect("select")
        distinct = self.accept("distinct", "all") == "distinct"
        begin = self.i
        clauses, end = self.find_clauses()
        stops = {*clauses.values(), end}
        if "from" in clauses:
            self.read_from(clauses["from"] + 1, begin, end)
            self.expect_end(stops)
        own = self.from_operations()
        if "window" in clauses:
            self.i = clauses["window"] + 1
            self.commas(self.named_window)
            self.expect_end(stops)
        self.i, scope.clause = begin, "select"
        scope.items, columns = self.select_items()
        self.expect_end(stops)
        own |= sequence("select", scope.items) | ({"distinct"} if distinct else set())
        for clause in ("where", "group", "having"):
            if clause in clauses:
                self.i, scope.clause = clauses[clause] + 1, clause
                own |= self.clause_operations(clause)
                self.expect_end(stops)
        self.i = end
        return Query(own, scope.parts, columns, scope.items)

    def expect_end(self, stops: set[int]) -> None:
        """Raises Unparsable unless a clause was read up to the next one."""
        if self.i not in stops:
            raise Unparsable(f"{self.words[self.i]!r} in a clause")

    def parenthesised_query(self) -> Query:
        self.expect("(")
        query = self.query()
        self.expect(")")
        return query

    def clause_operations(self, clause: str) -> set[str]:
        """WHERE, GROUP BY or HAVING, after their first word."""
        if clause != "group":
            return self.condition_operations(self.expression(), clause)
        self.expect("by")
        return {f"group by {self.ordinal(text)}" for text in self.commas(self.expression)}

    def condition_operations(self, text: str, clause: str) -> set[str]:
        """One operation per term of AND, `on` if it links two tables; one more per term of an OR."""
        labels, operations = {source.label for source in self.scope.sources}, set()
        for term in terms_of(text, "and"):
            left, _, right = term.partition(" = ")
            left, right = left.partition(".")[0], right.partition(".")[0]
            link = clause == "where" and left != right and left in labels and right in labels
            operations.add(f"{'on' if link else clause} {term}")
            alternatives = terms_of(term, "or")
            if len(alternatives) > 1:
                self.scope.parts |= {f"{clause} or {alternative}" for alternative in alternatives}
        return operations

    def find_clauses(self) -> tuple[dict[str, int], int]:
        """The positions of this SELECT's clauses, and its end."""
        clauses, i, words = {}, self.i, self.words
        while (word := words[i]) not in AFTER_CORE or (words[i - 1] == "." and word not in ("", ")", ";")):
            if word == "(":
                i = self.closing[i]
            elif (word in CLAUSES and words[i - 1] not in ("distinct", ".", "as")  # IS DISTINCT FROM, t.group
                  and (word != "window" or (words[i + 2] == "as" and words[i + 3] == "("))):
                clauses.setdefault(word, i)
            i += 1
        if list(clauses) != [clause for clause in CLAUSES if clause in clauses]:
            raise Unparsable("clauses out of order")
        return clauses, i

    def select_items(self) -> tuple[list[str], dict[str, str] | None]:
        """Texts of the items, and {name: text}; None with a *."""
        pairs = self.commas(self.select_item)
        items = [text for text, _ in pairs]
        self.scope.aliases = {name: brief(text) for text, name in pairs if name}
        if any(text == "*" or text.endswith(".*") for text in items):
            return items, None
        return items, {alias or text.rpartition(".")[2]: brief(text) for text, alias in pairs}

    def select_item(self) -> tuple[str, str]:
        """(text, alias)"""
        if self.accept("*"):
            if len(self.scope.sources) == 1:
                return self.scope.sources[0].column("*"), ""
            merged = sorted(name for join in self.scope.joins for name in join.using or ())
            return "*" + (f" merging {', '.join(merged)}" if merged else ""), ""
        if is_name(self.words[self.i]) and self.words[self.i + 1] == "." and self.words[self.i + 2] == "*":
            table = self.name()
            self.i += 2
            return self.scope.qualified(table, "*"), ""
        text = self.expression()
        return text, self.alias()

    def alias(self) -> str:
        """[AS] name, or nothing."""
        explicit = self.accept("as")
        word = self.words[self.i]
        if word[:1] == "'" or (explicit and word[:1].isalpha()):
            self.i += 1
            return word.strip("'").lower()
        if explicit or (is_name(word) and word not in CLAUSES):
            return self.name()
        return ""

    def ordinal(self, text: str) -> str:
        """GROUP BY 1 and ORDER BY 1 mean the first item."""
        items = self.scope.items
        if text.isdecimal() and len(text) < 6 and 0 < int(text) <= len(items):
            return brief(items[int(text) - 1])
        return text

    def order_terms(self) -> list[str]:
        """BY expression [ASC|DESC] [NULLS FIRST|LAST], ..."""
        self.expect("by")
        return self.commas(self.order_term)

    def order_term(self) -> str:
        text = self.ordinal(self.expression()) + (" desc" if self.accept("asc", "desc") == "desc" else " asc")
        return f"{text} nulls {self.accept('first', 'last')}" if self.accept("nulls") else text

    def order_and_limit(self) -> set[str]:
        """ORDER BY and LIMIT of a whole query; ORDER BY sees the columns and aliases of its first SELECT."""
        own, self.scope.clause = set(), "order"
        if self.accept("order"):
            own |= sequence("order by", self.order_terms())
        if self.accept("limit"):
            limit, offset = self.expression(), ""
            if self.accept("offset"):
                offset = self.expression()
            elif self.accept(","):
                limit, offset = self.expression(), limit
            own |= {f"limit {limit}"} | ({f"offset {offset}"} if offset and offset != "0" else set())
        return own

    # FROM.

    def read_from(self, start: int, begin: int, end: int) -> None:
        """Collect sources and joins, then name the sources; conditions are read when all names are known."""
        self.i, self.scope.clause = start, "from"
        self.join_chain("inner")
        groups = {}
        for source in self.scope.sources:
            groups.setdefault(source.base, []).append(source)
        usage = self.usage(begin, end) if len(groups) < len(self.scope.sources) else {}
        for base, same in groups.items():
            same.sort(key=lambda source: (sorted(usage.get(source.alias, ())), source.text))
            for number, source in enumerate(same, 1):
                source.label = base if len(same) == 1 else f"{base}#{number}"

    def usage(self, i: int, end: int) -> dict[str, list[tuple]]:
        """How a SELECT uses its sources: {alias: [(clause, item, column, compared with), ...]}.

        Two uses of one table are numbered in this order, which no renaming or reordering changes.
        """
        found, clause, item, words = {}, "select", 0, self.words
        while i < end:
            word = words[i]
            if word == "(" and self.at_query(i + 1):
                i = self.closing[i]
            elif word in CLAUSES:
                clause, item = "where" if word == "from" else word, 0  # ON and WHERE are alike
            elif word == ",":
                item += clause == "select"
            elif words[i + 1] == "." and is_name(word):
                partner = ""
                if after := COMPARISONS.get(words[i + 3]):
                    partner = after + words[i + 6 if words[i + 5] == "." else i + 4]
                elif before := COMPARISONS.get(words[i - 1]):
                    partner = MIRRORED.get(before, before) + words[i - 2]
                found.setdefault(plain_name(word), []).append((clause, item, words[i + 2], partner))
            i += 1
        return found

    def join_chain(self, kind: str) -> None:
        """source [join source [ON ...|USING ...]] ...; `kind` is the join of the chain itself."""
        self.deeper()
        sources, joins = self.scope.sources, self.scope.joins
        first = len(sources)
        self.source(kind)
        while True:
            natural = bool(self.accept("natural"))
            side = self.accept("left", "right", "full")
            self.accept("outer")
            if not self.accept("inner", "cross", "join", ","):
                if natural or side:
                    raise Unparsable("JOIN expected")
                self.depth -= 1
                return
            if self.words[self.i - 1] in ("inner", "cross"):
                self.expect("join")
            own_kind = f"{side} join" if side else "inner"
            middle = len(sources)
            self.source(own_kind if kind == "inner" else f"{kind} {own_kind}")
            join = Join(sources[middle].kind, sources[first:middle], sources[middle:], natural=natural)
            if self.accept("on"):
                start = self.i
                self.skip_condition()
                join.condition = (start, self.i)
            elif self.accept("using"):
                join.using = self.column_list()
            joins.append(join)

    def skip_condition(self) -> None:
        """Skip the condition of ON, which cannot be read yet."""
        while (word := self.words[self.i]) not in AFTER_CORE and word not in CLAUSES and word != ",":
            if word == "distinct" and self.words[self.i + 1] == "from":
                self.i += 1
            elif word in JOIN_WORDS and self.words[self.i - 1] != "." and self.words[self.i + 1] != "(":
                return
            elif word == "(":
                self.i = self.closing[self.i]
            self.i += 1

    def source(self, kind: str) -> None:
        """table, function(...), (query) or (joins); [AS] alias."""
        scope = self.scope
        if len(scope.sources) == MAX_SOURCES:
            raise Unparsable("too many tables")
        if self.words[self.i] == "(":
            if self.at_query(self.i + 1):
                self.derived(kind)
            else:
                self.i += 1
                self.join_chain(kind)
                self.expect(")")
                self.table_alias("")
            return
        table, start = self.name(), 0
        if self.accept("."):  # database.table
            table = self.name()
        cte = scope.cte(table)
        columns = cte.columns if cte else self.schema.get(table)
        if self.words[self.i] == "(":
            start, self.i, columns = self.i, self.closing[self.i] + 1, None
        base = cte.base if cte else table
        scope.sources.append(Source(base, self.table_alias(table), columns, start, kind=kind))

    def derived(self, kind: str) -> None:
        """A subquery in FROM."""
        scope = self.scope
        query = self.parenthesised_query()
        scope.parts |= {f"derived > {operation}" for operation in query.own | query.parts}
        alias = self.table_alias("")
        scope.sources.append(Source("derived", alias, query.columns, text=query.text, kind=kind))

    def table_alias(self, default: str) -> str:
        """[AS] alias [INDEXED BY index | NOT INDEXED]"""
        alias = default
        explicit = self.accept("as")
        word = self.words[self.i]
        indexed = word == "indexed" and self.words[self.i + 1] == "by"
        if explicit or (is_name(word) and not indexed and word not in CLAUSES):
            alias = self.name()
        if self.accept("indexed"):
            self.expect("by")
            self.name()
        elif self.words[self.i] == "not" and self.words[self.i + 1] == "indexed":
            self.i += 2
        return alias

    def from_operations(self) -> set[str]:
        """Sources and joins. Conditions of inner joins go to WHERE, if no join is RIGHT or FULL."""
        scope, after = self.scope, self.i
        own = set()
        ordered = any("right" in source.kind or "full" in source.kind for source in scope.sources)
        for source in scope.sources:
            arguments = ""
            if source.start:
                self.i = source.start
                arguments = self.operand_list()
            kind = "from" if source.kind == "inner" else source.kind
            own.add(f"{kind} {source.label}{arguments}{source.text}")
        if ordered:
            own |= sequence("join order", [source.label for source in scope.sources])
        scope.clause = "where"
        for join in scope.joins:
            text = self.join_condition(join)
            if not text:
                continue
            if join.kind == "inner" and not ordered:
                own |= self.condition_operations(text, "where")
            else:
                target = " + ".join(sorted(source.label for source in join.right))
                own |= {f"{join.kind} {target} on {term}" for term in terms_of(text, "and")}
        self.i = after
        return own

    def join_condition(self, join: Join) -> str:
        """The condition of ON, or the equal columns that USING and NATURAL stand for."""
        if join.condition is not None:
            self.i, end = join.condition
            text = self.expression()
            self.expect_end({end})
            return text
        right = join.right[0]
        if join.natural:
            known = [source.columns or {} for source in join.left]
            join.using = [c for c in right.columns or () if any(c in columns for columns in known)]
            if not all(known) or not right.columns:
                return f"natural {' '.join(sorted([right.label, *(s.label for s in join.left)]))}"
        terms = []
        for column in join.using or ():
            having = [s for s in join.left if column in (s.columns or ())] or join.left
            clear = len(having) == 1 or having is not join.left
            left = min(source.column(column) for source in having) if clear else column
            terms.append(compare(left, "=", right.column(column)))
        return combine("and", terms) if terms else ""

    # Expressions.

    def expression(self, level: int = 0) -> str:
        """Operands and the operators that bind at least as tightly as `level`."""
        self.deeper()
        left = self.operand()
        while (strength := PRECEDENCE.get(self.words[self.i], -1)) >= level:
            word = self.words[self.i]
            if strength < NOT:
                terms = [left]
                while self.accept(word):
                    terms.append(self.expression(strength + 1))
                left = combine(word, terms)
            elif strength == EQUALITY:
                left = self.predicate(left)
            elif strength == COMPARISON:
                self.i += 1
                left = compare(left, word, self.expression(BITS))
            elif strength == COLLATE:
                self.i += 1
                left = f"{left} collate {self.name()}"
            else:
                left = self.arithmetic(left, strength)
        self.depth -= 1
        return left

    def arithmetic(self, left: str, strength: int) -> str:
        """A chain of operators of one precedence; operands of + and * are sorted."""
        items, operators = [left], []
        while PRECEDENCE.get(word := self.words[self.i]) == strength:
            self.i += 1
            operators.append(word)
            items.append(self.expression(strength + 1))
        if set(operators) in COMMUTATIVE:
            items.sort()
        rest = "".join(f" {operator} {item}" for operator, item in zip(operators, items[1:], strict=True))
        return f"({items[0]}{rest})"

    def predicate(self, left: str) -> str:
        """=, IS, IN, LIKE, BETWEEN and their like, with or without NOT."""
        denied = bool(self.accept("not"))
        word = self.words[self.i]
        self.i += 1
        if denied and word not in ("in", "like", "glob", "match", "regexp", "between", "null"):
            raise Unparsable(f"NOT {word}")
        if word in ("=", "==", "<>", "!="):
            return compare(left, "=" if word[0] == "=" else "<>", self.expression(COMPARISON))
        if word in ("isnull", "notnull", "null"):
            return compare(left, "is", "null") if word == "isnull" else negate(compare(left, "is", "null"))
        if word == "is":
            denied = bool(self.accept("not"))
            if self.accept("distinct"):
                self.expect("from")
                denied = not denied
            text = compare(left, "is", self.expression(COMPARISON))
        elif word == "in":
            text = self.membership(left)
        elif word == "between":
            left = brief(left) if isinstance(left, Terms) else left  # for a BETWEEN b AND c BETWEEN d AND ...
            low = self.expression(COMPARISON)
            self.expect("and")
            high = self.expression(COMPARISON)
            text = combine("and", [compare(left, ">=", literal(low)), compare(left, "<=", literal(high))])
        else:
            text = f"{left} {word} {literal(self.expression(COMPARISON))}"
            if self.accept("escape"):
                text += f" escape {literal(self.expression(COMPARISON))}"
        return negate(text) if denied else text

    def membership(self, left: str) -> str:
        """left IN (query), (list, sorted), table or function(...)"""
        if self.words[self.i] != "(":
            table = self.name()
            return f"{left} in table {table}" + (self.operand_list() if self.words[self.i] == "(" else "")
        if self.at_query(self.i + 1):
            return f"{left} in {self.subquery('in')}"
        self.i += 1
        items = [] if self.words[self.i] == ")" else self.commas(self.expression)
        self.expect(")")
        return f"{left} in ({', '.join(sorted({literal(item) for item in items}))})"

    def subquery(self, role: str) -> str:
        """( query ) in an expression: its text; its operations become parts of the outer query."""
        scope = self.scope
        query = self.parenthesised_query()
        scope.parts |= {f"{scope.clause} {role} > {operation}" for operation in query.own | query.parts}
        return brief(query.text)

    def operand_list(self) -> str:
        """( expression, ... )"""
        self.expect("(")
        items = [] if self.words[self.i] == ")" else self.commas(self.expression)
        self.expect(")")
        return f"({', '.join(items)})"

    def operand(self) -> str:
        """An operand: a literal, a column, a function call or a special operand."""
        word = self.words[self.i]
        first = word[:1]
        if word in ("not", "-", "+", "~", "(", "case", "exists", "@", ":", "$", "?"):
            return self.special_operand(word)
        if not word:
            raise Unparsable("unexpected end")
        if first == "'" or first.isdigit() or (first == "." and word != ".") or first in "?:$":
            self.i += 1
            return word
        following = self.words[self.i + 1]
        if word == "cast" and following == "(":
            return self.cast()
        if word == "x" and following[:1] == "'":
            self.i += 2
            return word + following.lower()
        if following == "(" and (is_name(word) or word in ("like", "glob", "match", "left", "right")):
            return self.function()
        if word == "null":
            self.i += 1
            return word
        return self.column()

    def special_operand(self, word: str) -> str:
        """Prefix operators, parentheses, CASE, EXISTS, parameters."""
        if word == "(":
            if self.at_query(self.i + 1):
                return self.subquery("value")
            self.i += 1
            items = self.commas(self.expression)
            self.expect(")")
            return items[0] if len(items) == 1 else f"({', '.join(items)})"
        self.i += 1
        if word == "case":
            return self.case()
        if word == "exists":
            return f"exists {self.subquery('exists')}"
        if word == "not":
            return negate(self.expression(NOT + 1))
        if word in "@:$?":
            named = is_name(self.words[self.i]) or self.words[self.i].isdigit()
            self.i += named
            return word + self.words[self.i - 1] if named else word
        text = self.expression(COLLATE)
        return text if word == "+" else word + text

    def case(self) -> str:
        """CASE [base] WHEN ... THEN ... [ELSE ...] END"""
        text = "case" if self.words[self.i] == "when" else f"case {self.expression()}"
        while self.accept("when"):
            text += f" when {self.expression()}"
            self.expect("then")
            text += f" then {self.expression()}"
        if self.accept("else"):
            text += f" else {self.expression()}"
        self.expect("end")
        return text + " end"

    def cast(self) -> str:
        """CAST(expression AS type)"""
        self.i += 2
        text = self.expression()
        self.expect("as")
        closing = self.i
        while self.words[closing] != ")":
            closing = self.closing[closing] + 1 if self.words[closing] == "(" else closing + 1
        kind = "".join(f" {word}" for word in self.words[self.i:closing])
        self.i = closing + 1
        return f"cast({text} as{kind})"

    def function(self) -> str:
        """name([DISTINCT] ... [ORDER BY ...]) [FILTER (WHERE ...)] [OVER ...]"""
        name = plain_name(self.words[self.i])
        self.i += 2
        text = f"{name}({'distinct ' if self.accept('distinct', 'all') == 'distinct' else ''}"
        if self.accept("*"):
            text += "*"
        elif self.at_query(self.i):  # x < ANY (SELECT ...), not in SQLite
            self.i -= 1
            return name + self.subquery(name)
        elif self.words[self.i] != ")":
            text += ", ".join(self.commas(self.expression))
        if self.accept("order"):
            text += f" order by {', '.join(self.order_terms())}"
        self.expect(")")
        text += ")"
        if self.words[self.i] == "filter" and self.words[self.i + 1] == "(":
            self.i += 2
            self.expect("where")
            text += f" filter ({self.expression()})"
            self.expect(")")
        if self.accept("over"):
            named = self.words[self.i] != "("
            window = self.scope.windows.get(name := self.name(), name) if named else self.window()
            text += f" over {brief(window)}"
        return text

    def window(self) -> str:
        """( [base] [PARTITION BY ...] [ORDER BY ...] [frame] )"""
        self.expect("(")
        pieces = []
        if self.words[self.i] not in ("partition", "order", "rows", "range", "groups", ")"):
            name = self.name()
            pieces.append(self.scope.windows.get(name, name)[1:-1])
        if self.accept("partition"):
            self.expect("by")
            pieces.append("partition by " + ", ".join(sorted(self.commas(self.expression))))
        if self.accept("order"):
            pieces.append("order by " + ", ".join(self.order_terms()))
        if frame := self.accept("rows", "range", "groups"):
            pieces.append(frame + self.frame())
        self.expect(")")
        return f"({' '.join(pieces)})"

    def frame(self) -> str:
        """[BETWEEN] bound [AND bound] [EXCLUDE ...]; a single bound means up to the current row."""
        text, words = "", ("between", "and", "unbounded", "preceding", "following", "current", "row",
                           "exclude", "no", "others", "ties", "group")
        while self.words[self.i] != ")":
            text += " " + (self.accept(*words) or self.expression(BITS))
        return text if text.startswith(" between") else f" between{text} and current row"

    def named_window(self) -> None:
        """name AS (...)"""
        name = self.name()
        self.expect("as")
        self.scope.windows[name] = self.window()

    def column(self) -> str:
        """column, table.column or database.table.column"""
        quoted = self.words[self.i]
        name = self.name()
        if self.words[self.i] == ".":
            table = name
            while self.accept("."):
                word = self.words[self.i]
                if not (is_name(word) or word[:1].isalpha()):
                    raise Unparsable("column expected")
                self.i += 1
                table, name = name, plain_name(word)
            return self.scope.qualified(table, name)
        found = self.scope.bare(name)
        if quoted[0] != '"':
            return found or self.missing(name)
        text = "'" + quoted[1:].replace("'", "''") + "'"
        if found and (name in self.scope.aliases or found == self.scope.known(name)):
            return found
        if found is None or "%" in name or not any(map(str.isalpha, name)):
            return text  # no table has such a column, so SQLite reads it as a string
        result = Quoted(found)
        result.literal = text
        return result

    def missing(self, name: str) -> str:
        """A column that no table has: it still counts for the only table."""
        sources = self.scope.sources
        return sources[0].column(name) if len(sources) == 1 else name


def rename(query: Query, names: list[str] | None) -> dict[str, str] | None:
    """The columns of a CTE; explicit names replace the items in order."""
    if not names:
        return query.columns
    if len(names) != len(query.items):
        return None
    return {name: brief(item) for name, item in zip(names, query.items, strict=True)}
