"""What is inside a database: its tables, keys and sample values, and the cells a question mentions.

Everything is read from the SQLite file itself, opened as the executor opens it, so the same code
serves the demo world, Spider, BIRD and a user's own file. The internal "shadow" tables of virtual tables (full text,
R-trees) are left out. A view may take for ever, so it is read by one query, and all views of a database share one
bound; beyond it they are left out with a note. `ValueIndex` finds *value hints*: cells of text columns that occur word
for word in the question ("singers from France" -> country = 'France').
Gold queries are never read here.
"""

import math
import re
import sqlite3
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from common.errors import UserError
from sql_exec import database_stamp, is_passing, open_database

SAMPLES_KEPT = 5           # sample values read per column; a prompt shows at most this many
SAMPLE_ROWS = 10_000       # samples come from the first rows only, so a huge table costs no more
INDEX_ROWS = 200_000       # rows that the value index reads per table
INDEX_VALUES = 20_000      # distinct cells that it stores per column
INDEX_BYTES = 4_000_000    # text that it stores per database; in memory it takes some 20 times as much
INDEX_CELL_CHARS = 80      # longer cells are prose, not values
NO_SAMPLES = "", math.inf, -math.inf
MANY_COLUMNS = 200         # samples of a table with more columns are read by one query, as those of a view
SAMPLE_CELLS = 2_000_000   # cells that such a query reads: fewer rows of very wide tables
INDEX_CELLS = 10_000_000   # cells that the value index reads per table
VIEW_STEPS = 50            # millions of SQLite instructions for all views of a database together
CHUNK = 20_000             # cells read at once

# The SQLite keywords that cannot be names without quotes (found by trying all 147).
_RESERVED = """add all alter and as autoincrement between case cast check collate commit constraint
    create cross current_date current_time current_timestamp default deferrable delete distinct drop else
    escape except exists foreign from full group having in index indexed inner insert intersect into is
    isnull join left limit natural not nothing notnull null on or order outer primary raise references
    returning right select set table then to transaction union unique update using values when where"""
_STOP_WORDS = """a about after all also an and any are as at be been before between both but by can
    did do does each ever every find first for from give had has have having her his how i in is it its
    last least less list many me more most much name names no not number of on only or other out over please
    same show some than that the their them there these they this those to total under up was we were what
    when where which who whom whose why will with yes you your"""
RESERVED = frozenset(_RESERVED.split())
STOP_WORDS = frozenset(_STOP_WORDS.split())
WORD = re.compile(r"\w+")
ACCENT = re.compile("[\u0300-\u036f]")  # not the marks of Japanese kana, which make other letters
# Letters of languages without spaces between words, or between a word and its particles: Thai, Lao, Burmese, Khmer,
# Japanese, Chinese, Korean.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
                      "\U00020000-\U0003ffff]")


@dataclass(frozen=True)
class Column:
    """One column; `references` holds the (table, column) pairs its foreign keys point to."""
    name: str
    type: str
    primary_key: bool
    references: tuple[tuple[str, str], ...] = ()
    samples: tuple = ()
    description: str = ""  # in natural language, see descriptions.py


@dataclass(frozen=True)
class Table:
    """One table or view."""
    name: str
    columns: tuple[Column, ...]
    is_view: bool = False


@dataclass(frozen=True)
class Schema:
    """All tables of a database, in the order they were created."""
    tables: tuple[Table, ...]


@dataclass(frozen=True, slots=True)
class Hint:
    """A cell the question mentions."""
    table: str
    column: str
    value: str


def is_sqlite(path):
    """Whether the file starts like a SQLite database (an empty file does not)."""
    with open(path, "rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def open_readonly(path) -> sqlite3.Connection:
    """A read-only connection. Raises UserError: the database cannot be read."""
    try:
        return open_database(path)
    except OSError as error:
        raise UserError(f"cannot read the database {path}: {error.strerror}") from error
    except sqlite3.Error as error:
        raise UserError(f"cannot read the database {path}: {error}") from error


def query(connection, sql, parameters=()) -> sqlite3.Cursor:
    """The cursor of one of our own queries. A collation that this SQLite lacks compares like BINARY."""
    for _ in range(9):
        try:
            return connection.execute(sql, parameters)
        except sqlite3.OperationalError as error:
            missing = re.fullmatch("no such collation sequence: (.*)", str(error), re.DOTALL)
            if not missing:
                raise
            connection.create_collation(missing[1], lambda one, other: (one > other) - (one < other))
    return connection.execute(sql, parameters)


def query_or_none(connection, sql, parameters=()) -> list[tuple]:
    """All rows, or none if the query fails (a broken view, a pragma of a newer SQLite)."""
    try:
        return query(connection, sql, parameters).fetchall()
    except sqlite3.OperationalError as error:
        if is_passing(error):
            raise
        return []


class Steps:
    """A budget of millions of SQLite instructions; a query that exceeds it is interrupted.

    Instructions, not seconds, so that the result is the same on every machine.
    """

    def __init__(self, left: float):
        self.left = left

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def read_cells(connection, table: str, columns: Sequence[str], wanted: str, rows: int, steps: Steps) -> Iterator[list]:
    """The first rows of a table or view in chunks, each with one tuple of cells per column: [columns][rows].

    wanted: the condition on a cell `{0}`; cells that fail it become None. Chunks end when the query fails or exceeds
    `steps`.
    """
    if steps.left < 0:
        return
    cells = ", ".join(f"CASE WHEN {wanted.format(quote_always(column))} THEN {quote_always(column)} END"
                      for column in columns)
    connection.set_progress_handler(steps, 1_000_000)
    try:
        cursor = query(connection, f"SELECT {cells} FROM {quote_always(table)} LIMIT {rows}")
        while chunk := cursor.fetchmany(max(1, CHUNK // len(columns))):
            yield list(zip(*chunk, strict=True))
    except sqlite3.OperationalError as error:
        if is_passing(error):
            raise
    finally:
        connection.set_progress_handler(None, 0)


def quote_identifier(name: str, mark: str = '"') -> str:
    """A table or column name as SQL needs it: bare if possible, else between quote marks, `"` or `` ` ``."""
    if re.fullmatch(r"[A-Za-z_]\w*", name) and name.lower() not in RESERVED:
        return name
    return quote_always(name, mark)


def quote_always(name: str, mark: str = '"') -> str:
    """A name between quote marks, as our own queries write it."""
    return mark + name.replace(mark, 2 * mark) + mark


def quote_value(value) -> str:
    """A value as a SQL literal."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


# ---------------------------------------------------------------------------------------------- schema

_schemas: dict[str, tuple[str, Schema]] = {}  # by path: the version of the file and what was read from it
_indexes: dict[str, tuple[str, "ValueIndex"]] = {}


def read_schema(path) -> Schema:
    """The tables of a database with typed columns, keys and sample values; read again only if the file changes."""
    return _kept(_schemas, path, _read_schema)


def _kept(known: dict, path, read):
    """`read(path)`, cached for the newest version of the file only, because a live writer makes many versions."""
    version = str(database_stamp(path))
    if known.get(str(path), ("",))[0] != version:
        known[str(path)] = version, read(str(path))
    return known[str(path)][1]


def _read_schema(path: str) -> Schema:
    connection = open_readonly(path)
    try:
        kinds = dict(query(connection, "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view') "
                                       "AND substr(name, 1, 7) != 'sqlite_'"))
        hidden = _shadow_tables(connection)
        columns = {name: _read_columns(connection, name) for name in kinds if name not in hidden}
        references = {name: _read_references(connection, name, columns) for name in columns}
        tables, view_steps, skipped = [], Steps(VIEW_STEPS), []
        for name, known in columns.items():
            if not known:
                continue
            is_view = kinds[name] == "view"
            samples = _read_samples(connection, name, [column for column, _, _ in known], is_view,
                                    view_steps if is_view else Steps(math.inf))
            skipped += [name] if is_view and view_steps.left < 0 else []
            tables.append(Table(name, tuple(
                Column(column, kind, bool(key), tuple(references[name][column.lower()]), values)
                for (column, kind, key), values in zip(known, samples, strict=True)), is_view))
        note_skipped(path, skipped, "prompts show no or fewer sample values of them")
        return Schema(tuple(tables))
    except sqlite3.DatabaseError as error:
        raise UserError(f"cannot read the database {path}: {error}") from error
    finally:
        connection.close()


def note_skipped(path: str, views: Sequence[str], effect: str) -> None:
    """Prints which views took too long to read."""
    if views:
        shown = ", ".join(views[:5]) + (f" and {len(views) - 5} more" if len(views) > 5 else "")
        print(f"note: {path}: the views of this database take long to read; {effect}: {shown}", file=sys.stderr)


# Shadow tables of SQLite and of well-known extensions have the virtual table's name and one of these endings.
_SHADOW_ENDS = re.compile(r"content|segments|segdir|docsize|stat|data|idx|config|node|rowid|parent|vocab|index|chunks|"
                          r"rowids|info|auxiliary|(?:vector_|metadata)chunks\d+|metadatatext\d+")


def _shadow_tables(connection) -> set[str]:
    """The internal (shadow) tables of virtual tables. SQLite lists those of its modules from version 3.37 on; those of
    a missing module are recognised by their names."""
    known = query_or_none(connection, "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'shadow'")
    names = [name for (name,) in query(connection, "SELECT name FROM sqlite_master WHERE type = 'table'")]
    virtual = [name for (name,) in query(connection, "SELECT name FROM sqlite_master WHERE type = 'table' "
                                                     "AND sql LIKE 'create virtual table%'")]
    missing = [name.lower() + "_" for name in virtual if not _read_columns(connection, name)]
    return {name for (name,) in known} | {
        name for name in names for start in missing
        if name.lower().startswith(start) and _SHADOW_ENDS.fullmatch(name.lower().removeprefix(start))}


def schema_columns(schema: Schema) -> dict[str, list[str]]:
    """{table: [column, ...]}, the form that rewards take."""
    return {table.name: [column.name for column in table.columns] for table in schema.tables}


def columns_of(databases: Mapping[str, Path]) -> dict[str, dict[str, list[str]]]:
    """`schema_columns` of every database, {db_id: {table: [column, ...]}}."""
    return {db_id: schema_columns(read_schema(path)) for db_id, path in databases.items()}


def _read_columns(connection, table):
    """[(name, declared type, position in the primary key or 0)]; a broken view has none."""
    return query_or_none(connection, "SELECT name, type, pk FROM pragma_table_xinfo(?) WHERE hidden != 1",
                         (table,))


def _read_references(connection, table, columns):
    """{column (lower case): [(table, column) it references]}, names spelt as in the database."""
    spelling = {name.lower(): name for name in columns}
    references = defaultdict(list)
    keys = query_or_none(connection, 'SELECT "from", "table", "to", seq FROM pragma_foreign_key_list(?) '
                                     "ORDER BY id DESC, seq", (table,))
    for source, target, target_column, position in keys:
        target = spelling.get(target.lower(), target)
        known = columns.get(target, [])
        if target_column is None:  # "REFERENCES t" alone means the primary key of t
            primary = [name for name, _, key in sorted(known, key=lambda column: column[2]) if key]
            target_column = primary[position] if position < len(primary) else "rowid"
        column_spelling = {name.lower(): name for name, _, _ in known}
        pair = (target, column_spelling.get(target_column.lower(), target_column))
        if pair not in references[source.lower()]:
            references[source.lower()].append(pair)
    return references


def _read_samples(connection, table: str, columns: Sequence[str], is_view: bool, steps: Steps) -> list[tuple]:
    """The first few distinct values of each column; blobs, long texts and infinities are left out."""
    wanted = f"typeof({{0}}) IN ('text', 'integer', 'real') AND length({{0}}) <= {INDEX_CELL_CHARS}"
    if not is_view and len(columns) <= MANY_COLUMNS:
        return [_samples_of(connection, table, quote_always(column), wanted) for column in columns]
    found = [{} for _ in columns]  # per column an ordered set of values
    rows = min(SAMPLE_ROWS, SAMPLE_CELLS // len(columns))
    for chunk in read_cells(connection, table, columns, wanted, rows, steps):
        open_columns = [(kept, cells) for kept, cells in zip(found, chunk, strict=True) if len(kept) < SAMPLES_KEPT]
        for kept, cells in open_columns:
            kept |= dict.fromkeys(cell for cell in dict.fromkeys(cells) if cell not in (None, *NO_SAMPLES))
        if not open_columns:
            break
    return [tuple(kept)[:SAMPLES_KEPT] for kept in found]


def _samples_of(connection, table: str, column: str, wanted: str) -> tuple:
    """The samples of one column by its own query, which can end early and use an index."""
    try:
        rows = query(connection, f"""
            SELECT DISTINCT {column} COLLATE BINARY
            FROM (SELECT {column} FROM {quote_always(table)} LIMIT {SAMPLE_ROWS}) WHERE {wanted.format(column)}""")
        return tuple(islice((cell for (cell,) in rows if cell not in NO_SAMPLES), SAMPLES_KEPT))
    except sqlite3.OperationalError as error:
        if is_passing(error):
            raise
        return ()


# ----------------------------------------------------------------------------------------- value hints

def words(text: str) -> list[str]:
    """The words of a text for comparison: no possessive, no accents, lower case."""
    return WORD.findall(fold(text.replace("'s ", " ")))


def fold(text: str) -> str:
    """The text for comparison: lower case, no accents, no full-width letters."""
    return without_accents(text).casefold()


def without_accents(text: str) -> str:
    """The text without accents and full-width letters, in its own case."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", ACCENT.sub("", unicodedata.normalize("NFKD", text)))


def value_index(path) -> "ValueIndex":
    """The index of a database file, built again only if the file changes."""
    return _kept(_indexes, path, ValueIndex)


class ValueIndex:
    """Finds the cells of a database's text columns that a question mentions as whole words.

    A cell is stored under its words, so "3-D Man" is found in "superpowers of 3-D man?". In a language without spaces,
    a cell of two letters or more is also found inside a word: 北京 in 北京有多少学生. Bounded in rows, values
    and bytes, so a database of gigabytes stays cheap; `value_index` builds each index only once.
    """

    def __init__(self, path):
        self.cells: dict[str, list[Hint]] = defaultdict(list)
        self.longest = 0  # words in the longest cell
        self.unspaced: dict[str, list[Hint]] = defaultdict(list)  # by the cell's folded text
        self.longest_unspaced = 0  # letters in the longest of them
        room, view_steps, skipped = INDEX_BYTES, Steps(VIEW_STEPS), []
        connection = open_readonly(path)
        try:
            for table in read_schema(path).tables:
                steps = view_steps if table.is_view else Steps(math.inf)
                for column, texts in zip(table.columns, self._texts(connection, table, room, steps), strict=True):
                    room -= self._add_column(table.name, column.name, texts, room // 4)  # leaves room for later ones
                skipped += [table.name] if table.is_view and view_steps.left < 0 else []
        except sqlite3.DatabaseError as error:
            raise UserError(f"cannot read the database {path}: {error}") from error
        finally:
            connection.close()
        note_skipped(path, skipped, "not all their cells are looked for in questions")

    @staticmethod
    def _texts(connection, table: Table, room: int, steps: Steps) -> list[dict[str, None]]:
        """The distinct texts of each column, in row order, until `room` (bytes) is used up."""
        found, taken = [{} for _ in table.columns], [0] * len(table.columns)
        rows = min(INDEX_ROWS, INDEX_CELLS // len(table.columns))
        wanted = f"typeof({{0}}) = 'text' AND length({{0}}) <= {INDEX_CELL_CHARS}"
        names = [column.name for column in table.columns]
        for chunk in read_cells(connection, table.name, names, wanted, rows, steps):
            for number, (kept, cells) in enumerate(zip(found, chunk, strict=True)):
                if taken[number] <= room // 4 and len(kept) < INDEX_VALUES:
                    fresh = [cell for cell in dict.fromkeys(cells) if cell is not None and cell not in kept]
                    kept |= dict.fromkeys(fresh[:INDEX_VALUES - len(kept)])
                    taken[number] += sum(map(len, fresh))
            if sum(taken) > 2 * room:
                break
        return found

    def _add_column(self, table: str, column: str, texts, room: int) -> int:
        """Index one column's distinct texts; returns the bytes taken."""
        taken = 0
        for value in texts:
            key = words(value)
            if key and taken < room:
                self.cells[" ".join(key)].append(Hint(table, column, value))
                self.longest = max(self.longest, len(key))
                taken += len(value)
                if UNSPACED.search(value) and len(value.strip()) > 1:
                    folded = fold(value.strip())
                    self.unspaced[folded].append(Hint(table, column, value))
                    self.longest_unspaced = max(self.longest_unspaced, len(folded))
        return taken

    def hints(self, text: str, limit: int, tables: set[str] | None = None) -> list[Hint]:
        """At most `limit` cells the text mentions: longest matches first, none inside a longer match.

        tables: the only tables whose cells count, all by default.
        """
        spoken = words(text)
        as_written = set(WORD.findall(without_accents(text)))
        covered = [False] * len(spoken)
        found = self._inside_words(text, tables)
        for length in range(min(self.longest, len(spoken)), 0, -1):
            matches = []
            for start in range(len(spoken) - length + 1):
                cells = self._lookup(spoken[start:start + length], as_written)
                if tables is not None:
                    cells = [cell for cell in cells if cell.table in tables]
                if cells and not all(covered[start:start + length]):
                    matches.append((start, cells))
            for start, cells in matches:
                covered[start:start + length] = [True] * length
                found += self._best_columns(cells, set(spoken), text)
        return list(dict.fromkeys(found))[:limit]

    def _inside_words(self, text: str, tables: set[str] | None) -> list[Hint]:
        """The cells that a text without spaces contains, the longest first, none inside a longer one."""
        if not self.unspaced or not UNSPACED.search(text):
            return []
        folded, found = fold(text), []
        covered = [False] * len(folded)
        for length in range(min(self.longest_unspaced, len(folded)), 1, -1):
            for start in range(len(folded) - length + 1):
                end = start + length
                cells = [cell for cell in self.unspaced.get(folded[start:end], ())
                         if tables is None or cell.table in tables]
                if cells and not any(covered[start:end]) and _may_begin(folded, start) and _may_begin(folded, end):
                    covered[start:end] = [True] * length
                    found += self._best_columns(cells, set(words(text)), text)
        return found

    def _lookup(self, phrase, as_written) -> list[Hint]:
        """Cells made of exactly these words; a plural ("dogs") also finds the singular cell ("dog")."""
        if len(phrase) == 1:
            word = phrase[0]
            if word in STOP_WORDS:
                return []
            if len(word) == 1 and word.isalpha() and word.upper() not in as_written:
                return []  # "F" is a value only when written as a capital
        key = " ".join(phrase)
        cells = self.cells.get(key)
        if cells is None and len(phrase[-1]) > 3 and key.endswith("s"):
            cells = self.cells.get(key[:-1])
        return cells or []

    @staticmethod
    def _best_columns(cells, spoken, text):
        """At most three cells per phrase: columns the question names first, then exact spelling."""
        def rank(cell):
            named = sum(word in spoken for word in words(cell.column.replace("_", " ")))
            return (-named, cell.value not in text)
        return sorted(cells, key=rank)[:3]


def _may_begin(text: str, place: int) -> bool:
    """Whether a word may begin or end at `place`: not between two letters of a language with spaces."""
    around = text[max(0, place - 1):place + 1]
    return len(around) < 2 or not WORD.fullmatch(around) or bool(UNSPACED.search(around))
