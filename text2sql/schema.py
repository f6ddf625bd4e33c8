"""What is inside a database: its tables, keys and sample values, and the cells a question mentions.

Everything is read from the SQLite file itself, opened as the executor opens it, so the same code
serves the demo world, Spider, BIRD and a user's own file. What virtual tables (full text, R-trees) keep
for themselves in "shadow" tables is left out. `ValueIndex` finds *value hints*: cells of
text columns that occur word for word in the question ("singers from France" -> country = 'France').
Nothing here ever sees a gold query.
"""

import re
import sqlite3
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from running.errors import UserError
from sql_exec import database_stamp, open_database

SAMPLES_KEPT = 5           # sample values read per column; a prompt shows at most this many
SAMPLE_ROWS = 10_000       # samples come from the first rows only, so a huge table costs nothing
INDEX_ROWS = 200_000       # rows of a table the value index looks at
INDEX_VALUES = 20_000      # distinct cells of a column it keeps
INDEX_BYTES = 4_000_000    # text it keeps per database, which takes some 20 times that in memory
INDEX_CELL_CHARS = 80      # longer cells are prose, not values
VM_STEPS_PER_QUERY = 50    # millions of SQLite instructions a query may take (views can be endless)

# The SQLite keywords that cannot stand for a name without quotes (found by trying all 147).
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
# Letters of languages that put no spaces between words, or endings right behind them: Thai, Lao, Burmese, Khmer,
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
    description: str = ""  # in people's words, see descriptions.py


@dataclass(frozen=True)
class Table:
    """One table or view."""
    name: str
    columns: tuple[Column, ...]


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
    """True when the file starts as every SQLite database does (an empty file does not)."""
    with open(path, "rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def open_readonly(path) -> sqlite3.Connection:
    """A connection that reads a database; what hinders it is a UserError."""
    try:
        return open_database(path)
    except OSError as error:
        raise UserError(f"cannot read the database {path}: {error.strerror}") from error
    except sqlite3.Error as error:
        raise UserError(f"cannot read the database {path}: {error}") from error


def bounded_query(connection, sql, parameters=()):
    """All rows, or none when the query fails or takes too many steps (a broken or endless view).

    The bound counts SQLite instructions, not seconds, so the answer is the same on every machine.
    """
    steps = iter(range(VM_STEPS_PER_QUERY))
    connection.set_progress_handler(lambda: next(steps, None) is None, 1_000_000)
    try:
        return connection.execute(sql, parameters).fetchall()
    except sqlite3.OperationalError:
        return []
    finally:
        connection.set_progress_handler(None, 0)


def quote_identifier(name: str) -> str:
    """A table or column name as it must be written in SQL: bare when it can be, else in double quotes."""
    if re.fullmatch(r"[A-Za-z_]\w*", name) and name.lower() not in RESERVED:
        return name
    return '"' + name.replace('"', '""') + '"'


def quote_value(value) -> str:
    """A value as a SQL literal."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


# ---------------------------------------------------------------------------------------------- schema

def read_schema(path) -> Schema:
    """Tables with typed columns, keys and sample values of a database; read once while it is unchanged."""
    return _read_schema(str(path), _version(path))


def _version(path) -> str:
    """Changes when the database does."""
    return str(database_stamp(path))


@lru_cache(maxsize=1024)
def _read_schema(path: str, version: str) -> Schema:
    connection = open_readonly(path)
    try:
        shadows = bounded_query(connection, "SELECT name FROM pragma_table_list WHERE schema = 'main' "
                                            "AND type = 'shadow'")  # none is told before SQLite 3.37
        names = [name for (name,) in connection.execute(
            "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') "
            "AND substr(name, 1, 7) != 'sqlite_'") if (name,) not in shadows]
        columns = {name: _read_columns(connection, name) for name in names}
        references = {name: _read_references(connection, name, columns) for name in names}
        return Schema(tuple(
            Table(name, tuple(
                Column(column, kind, bool(key), tuple(references[name][column.lower()]),
                       _read_samples(connection, name, column))
                for column, kind, key in columns[name]))
            for name in names if columns[name]))
    except sqlite3.DatabaseError as error:
        raise UserError(f"cannot read the database {path}: {error}") from error
    finally:
        connection.close()


def schema_columns(schema: Schema) -> dict[str, list[str]]:
    """The plain form that rewards take: {table: [column, ...]}."""
    return {table.name: [column.name for column in table.columns] for table in schema.tables}


def columns_of(databases: Mapping[str, Path]) -> dict[str, dict[str, list[str]]]:
    """`schema_columns` of every database, {db_id: {table: [column, ...]}}."""
    return {db_id: schema_columns(read_schema(path)) for db_id, path in databases.items()}


def _read_columns(connection, table):
    """[(name, declared type, position in the primary key or 0)]; a broken view has none."""
    return bounded_query(connection, "SELECT name, type, pk FROM pragma_table_xinfo(?) WHERE hidden != 1",
                         (table,))


def _read_references(connection, table, columns):
    """{column (lower case): [(table, column) it references]}, names spelt as the database spells them."""
    spelling = {name.lower(): name for name in columns}
    references = defaultdict(list)
    keys = bounded_query(connection, 'SELECT "from", "table", "to", seq FROM pragma_foreign_key_list(?) '
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


def _read_samples(connection, table, column):
    """A few distinct values of a column, in row order; blobs and long texts are left out."""
    name = quote_always(column)
    rows = bounded_query(connection, f"""
        SELECT DISTINCT {name} FROM (SELECT {name} FROM {quote_always(table)} LIMIT {SAMPLE_ROWS})
        WHERE typeof({name}) IN ('text', 'integer', 'real') AND {name} != ''
        AND length({name}) <= {INDEX_CELL_CHARS} LIMIT {SAMPLES_KEPT}""")
    return tuple(value for (value,) in rows)


def quote_always(name: str) -> str:
    """A name in double quotes, for our own queries."""
    return '"' + name.replace('"', '""') + '"'


# ----------------------------------------------------------------------------------------- value hints

def words(text: str) -> list[str]:
    """The words of a text as they are compared: no possessive, no accents, lower case."""
    return WORD.findall(fold(text.replace("'s ", " ")))


def fold(text: str) -> str:
    """The text as it is compared: lower case, no accents, no full-width letters."""
    return without_accents(text).casefold()


def without_accents(text: str) -> str:
    """The text without accents and full-width letters, its case kept."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", ACCENT.sub("", unicodedata.normalize("NFKD", text)))


def value_index(path) -> "ValueIndex":
    """The index of a database file, built once while the file is unchanged."""
    return _value_index(str(path), _version(path))


@lru_cache(maxsize=1024)
def _value_index(path: str, version: str) -> "ValueIndex":
    return ValueIndex(path)


class ValueIndex:
    """Finds the cells of a database's text columns that a question mentions as whole words.

    A cell is stored under its words, so "3-D Man" is found in "superpowers of 3-D man?". Where a language writes no
    spaces, a cell of two letters or more is also found inside a word: 北京 in 北京有多少学生. Bounded in rows, values
    and bytes, so a database of gigabytes stays cheap; `value_index` builds each index only once.
    """

    def __init__(self, path):
        self.cells: dict[str, list[Hint]] = defaultdict(list)
        self.longest = 0  # words in the longest cell
        self.unspaced: dict[str, list[Hint]] = defaultdict(list)  # by the cell's folded text
        self.longest_unspaced = 0  # letters in the longest of them
        room = INDEX_BYTES
        connection = open_readonly(path)
        try:
            for table in read_schema(path).tables:
                for column in table.columns:
                    room -= self._add_column(connection, table.name, column.name, room // 4)  # later ones get theirs
        except sqlite3.DatabaseError as error:
            raise UserError(f"cannot read the database {path}: {error}") from error
        finally:
            connection.close()

    def _add_column(self, connection, table, column, room) -> int:
        """Index one column's distinct texts; returns the bytes taken."""
        name = quote_always(column)
        rows = bounded_query(connection, f"""
            SELECT DISTINCT {name} FROM (SELECT {name} FROM {quote_always(table)} LIMIT {INDEX_ROWS})
            WHERE typeof({name}) = 'text' AND length({name}) <= {INDEX_CELL_CHARS} LIMIT {INDEX_VALUES}""")
        taken = 0
        for (value,) in rows:
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

        tables: those whose cells count, all by default.
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
        """At most three cells a phrase: columns the question names first, then exact spelling."""
        def rank(cell):
            named = sum(word in spoken for word in words(cell.column.replace("_", " ")))
            return (-named, cell.value not in text)
        return sorted(cells, key=rank)[:3]


def _may_begin(text: str, place: int) -> bool:
    """Whether a word may begin or end at a place: not between two letters of a language that writes spaces."""
    around = text[max(0, place - 1):place + 1]
    return len(around) < 2 or not WORD.fullmatch(around) or bool(UNSPACED.search(around))
