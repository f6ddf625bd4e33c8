"""Run untrusted SQL on SQLite databases, safely and fast, and compare results as the official evaluators do.

    with SQLExecutor({"world": Path("world.sqlite")}, workers=2, timeout=5.0) as executor:
        predicted, gold = executor.run_many([("world", "SELECT 1"), ("world", "SELECT 1.0")])
        print(predicted.status, bird_match(predicted.rows, gold.rows))  # ok True

What keeps a statement from doing harm, from the outside in:
  (1) it must start like a query: SELECT, WITH or VALUES, possibly after comments and parentheses;
  (2) a child process runs it, never the caller: the child has an address-space limit, cannot write to any
      file, and is killed and replaced by the parent when the deadline passes;
  (3) the connection is read-only three times over: `mode=ro`, `query_only`, and an authorizer that lets
      SQLite read and nothing else (no ATTACH, no PRAGMA, no extension, no pointer-passing function);
      `open_database` opens it, for schemas and prompts too, and leaves no files behind;
  (4) SQLite's own limits, a row cap and a byte cap while fetching keep a result small;
  (5) results come back as JSON, which cannot make the parent run anything.

Left out: Windows (the limits are those of Unix), and databases other than SQLite.
Only the standard library is imported, so that a worker starts in about 30 ms and this file can be copied
into another project unchanged.
"""

import hashlib
import json
import os
import re
import select
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

MAX_SQL_CHARS = 100_000  # a longer statement is refused unread
IN_FLIGHT = 16  # statements a worker holds at once: fewer pipe round trips
GRACE = 0.4  # seconds: the worker interrupts itself at the deadline, the parent kills this much later
START_SECONDS = 60.0  # a worker that is silent for this long at its start is broken
OPEN_CONNECTIONS = 32  # a worker keeps this many databases open (each caches up to 2 MB of pages)
SEARCH_CELLS = 20_000_000  # bound on the column search of `spider_match`: a few seconds
STATUSES = ("ok", "error", "timeout", "refused", "too_large", "unavailable")
WAITS_IN_VAIN = 3  # an unreadable database is waited for this many limits in a row, then tried once per statement
KILLINGS = 3  # a statement is given up after the system has killed its worker this often
ROUNDS = 3  # how often a prediction runs again because a writer changed its rows while its gold ran
CACHE_FORM = "2"  # the version of the cache entries: other versions are ignored
WORKER_DIED = "the worker died on this query"
CANNOT_READ, FILE_MISSING = "cannot read", "the file of database"  # errors about a bad file begin so


@dataclass(frozen=True)
class Execution:
    """The result of one statement; `rows` are tuples by position and empty unless the status is ok.

    Values are None, int, float, str (invalid UTF-8 replaced by U+FFFD) or bytes. Statuses beside ok, error and timeout:
    `refused`: not one read-only query. `too_large`: the rows, their bytes, or the memory needed exceed their limits.
    `unavailable`: no verdict on the statement, which may run another time. The database was unreadable for the whole
    timeout (a writer's lock, an I/O error), the system killed the workers, or (from `Results`) a writer kept changing
    the rows.
    `volatile`: the statement uses time or chance, so another run may give another result.
    """

    status: str  # one of STATUSES
    columns: list[str] = field(default_factory=list)
    rows: list[tuple] = field(default_factory=list)
    error: str | None = None  # one sentence, None when ok
    seconds: float = 0.0  # wall-clock time in the worker: executing and fetching, without opening the file
    volatile: bool = False

    @property
    def unread(self) -> bool:
        """Whether there is no verdict on the statement, because its database cannot be read, for now or for good."""
        return self.status == "unavailable" or (self.error or "").startswith((CANNOT_READ, FILE_MISSING))


class GoldAnswer(NamedTuple):
    """A gold result that is known without a query; it takes the place of a gold SQL and is the same on any database."""

    rows: tuple[tuple, ...]
    ordered: bool = False  # whether the order of the rows counts


Gold = str | GoldAnswer


# ---------------------------------------------------------------------------------------------------------
# (1) What counts as a query
# ---------------------------------------------------------------------------------------------------------

_BLANK = r"(?:[ \t\n\f\r\ufeff]|--[^\n]*|/\*(?:.*?\*/|.*))*"  # whitespace and comments, as SQLite sees them
_OPENING = re.compile(rf"{_BLANK}(?:\({_BLANK})*(\w*)", re.DOTALL)
_NOT_TEXT = re.compile(r"[\0\ud800-\udfff]")  # NUL and halves of surrogate pairs: SQLite accepts neither
_TOKEN = re.compile(
    r"""(?P<skip>\s+ | --[^\n]* | /\*(?:.*?\*/|.*))
      | '[^']*(?:''[^']*)*' | "[^"]*(?:""[^"]*)*" | `[^`]*(?:``[^`]*)*` | \[[^\]]*\]  # strings, quoted names
      | \w+ | .""",
    re.DOTALL | re.VERBOSE,
)


def refusal_reason(sql: object) -> str | None:
    """Say in one sentence why `sql` cannot be one read-only query; None if it may run."""
    if not isinstance(sql, str):
        return "there is no SQL text"
    if len(sql) > MAX_SQL_CHARS:
        return f"the statement has {len(sql)} characters, more than {MAX_SQL_CHARS}"
    if found := _NOT_TEXT.search(sql):
        return f"the statement contains the character {found[0]!a}, which is no text"
    opening = _OPENING.match(sql)
    if opening[1].upper() not in ("SELECT", "WITH", "VALUES"):
        return f"only SELECT, WITH ... SELECT and VALUES may run, not {opening[1][:30] or sql[:30]!r}"
    if "(" in opening[0] and any(token[0] == ";" for token in _tokens(sql)):
        return "more than one statement"  # the parenthesis keeps SQLite from reporting it
    return None


def _tokens(sql: str) -> list[re.Match]:
    """The tokens of a statement without blanks, comments and closing semicolons."""
    tokens = [token for token in _TOKEN.finditer(sql) if not token["skip"]]
    while tokens and tokens[-1][0] == ";":
        tokens.pop()
    return tokens


def unwrap_parentheses(sql: str) -> str:
    """Drop parentheses around a whole statement, `((SELECT 1));` -> `SELECT 1`; SQLite itself accepts none."""
    if "(" not in _OPENING.match(sql)[0]:
        return sql
    tokens = _tokens(sql)
    first = next((i for i, token in enumerate(tokens) if token[0] != "("), 0)
    last = next((i for i in range(len(tokens), 0, -1) if tokens[i - 1][0] != ")"), 0)
    depth = lowest = first
    for token in tokens[first:last]:
        depth += (token[0] == "(") - (token[0] == ")")
        lowest = min(lowest, depth)
    if depth != len(tokens) - last or lowest < 1:  # unbalanced, or not around the whole: SQLite will report it
        return sql
    return sql[tokens[lowest - 1].end() : tokens[len(tokens) - lowest].start()]


# ---------------------------------------------------------------------------------------------------------
# (5) What travels between parent and worker: frames of a length and JSON
# ---------------------------------------------------------------------------------------------------------

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=lambda b: {"hex": b.hex()})
_BAD_JSON = (ValueError, KeyError, TypeError, RecursionError)  # what decoding garbage may raise


def _to_json(value) -> bytes:
    """Encode None, int, float, str, bytes and lists of them; JSON keeps 64-bit integers and infinities."""
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def _from_json(data: bytes):
    """Decode what `_to_json` wrote; one of _BAD_JSON on anything else."""
    return json.loads(data.decode("utf-8", "surrogatepass"), object_hook=lambda d: bytes.fromhex(d["hex"]))


def _frame(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def _take_frames(inbox: bytearray, largest: int) -> Iterator[bytes]:
    """Cut the complete frames off the front of `inbox`; ValueError when one claims to be too long."""
    while len(inbox) >= 4:
        end = 4 + struct.unpack_from(">I", inbox)[0]
        if end > largest:
            raise ValueError(f"a frame of {end} bytes")
        if len(inbox) < end:
            return
        frame = bytes(inbox[4:end])
        del inbox[:end]
        yield frame


def _result_bytes(memory_limit_mb: int) -> int:
    """The largest result in bytes of JSON; its rows in memory then stay well below the worker's limit."""
    return memory_limit_mb * 2**20 // 32


# ---------------------------------------------------------------------------------------------------------
# (3) Opening a database: for queries here, for schemas and sample values elsewhere
# ---------------------------------------------------------------------------------------------------------


_MEND_IT = "open and close it once with sqlite3"


def open_database(path: Path | str, patience: float = 5.0) -> sqlite3.Connection:
    """Open a database for reading; its folder need not be writable, and no file is left in it.

    A write-ahead log is read too, whether its writer is active or has died, and whoever owns it.
    patience: seconds to wait for a writer's lock. Invalid UTF-8 is replaced.

    Raises OSError or sqlite3.Error; neither names the file.
    """
    path = Path(path).resolve()  # the log lies beside the file itself, not beside a link to it
    with open(path, "rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise sqlite3.DatabaseError("it is not a SQLite database")
    way = "mode=ro"
    if header[18] == 2:  # has a write-ahead log; by default SQLite would create or renew its files
        log, index = _file_stamp(f"{path}-wal"), _file_stamp(f"{path}-shm")
        if log and log[1] and not index:  # the database was copied, or a file deleted
            raise sqlite3.DatabaseError(f"it has a write-ahead log without an index: {_MEND_IT}")
        way += "&readonly_shm=1" if log and index else "&immutable=1"  # without a log, nobody is writing
    uri = f"{path.as_uri()}?{way}"
    connection = sqlite3.connect(uri, patience, uri=True, isolation_level=None, cached_statements=0)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    try:
        connection.execute("SELECT * FROM sqlite_master LIMIT 0")  # reads the schema now, not in the first query's time
    except sqlite3.Error as error:
        connection.close()
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY:
            raise sqlite3.DatabaseError(f"it has an unfinished transaction: {_MEND_IT}") from error
        raise
    return connection


def database_stamp(path: Path | str) -> list[list[int]]:
    """Numbers that change whenever the database or its write-ahead log changes."""
    path = Path(path).resolve()
    return [_file_stamp(path), _file_stamp(f"{path}-wal")]


def _file_stamp(path: Path | str) -> list[int]:
    """Numbers that change whenever the file changes; empty without a file."""
    try:
        stat = os.stat(path)
    except OSError:
        return []
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


# ---------------------------------------------------------------------------------------------------------
# (2)-(4) The worker: a child process that runs statements one after the other
# ---------------------------------------------------------------------------------------------------------

_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
# What virtual tables (json_each, full text) do internally when they are read. As a statement of its own, the
# first fails because SQLite protects its schema table; the others only return a number.
_INTERNAL = {(sqlite3.SQLITE_UPDATE, "sqlite_master"), (sqlite3.SQLITE_PRAGMA, "page_size"),
             (sqlite3.SQLITE_PRAGMA, "data_version")}  # fmt: skip
_FORBIDDEN = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "fts5", "zipfile"}
# Functions of time and chance. Date functions are included because a date may be 'now', even in a view or a cell.
_VOLATILE = {"random", "randomblob", "current_date", "current_time", "current_timestamp",
             "date", "time", "datetime", "julianday", "unixepoch", "strftime", "timediff"}  # fmt: skip
_LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 4 * MAX_SQL_CHARS,  # in bytes: at most four per character
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 1000,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 500,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 25_000_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 5000,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 10,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 10,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
_UNREADABLE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOTADB,
               sqlite3.SQLITE_READONLY}  # fmt: skip
_SQL_ERRORS = (sqlite3.Error, sqlite3.Warning, OSError, ValueError)  # ValueError: a column name not in UTF-8
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # OSErrors that will not pass


def is_passing(error: Exception) -> bool:
    """Whether an error is temporary, not caused by the statement or the file: a writer's lock, or failing I/O."""
    code = getattr(error, "sqlite_errorcode", 0)
    if code == sqlite3.SQLITE_IOERR_NOMEM:
        return False  # the statement needs too much memory
    passing = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_IOERR}
    return code & 0xFF in passing or isinstance(error, OSError) and not isinstance(error, _LASTING)


class _Runner:
    """The worker's side: open connections, and the limits of its statements."""

    def __init__(self, timeout: float, max_rows: int, memory_limit_mb: int):
        self.timeout, self.max_rows, self.memory_limit_mb = timeout, max_rows, memory_limit_mb
        self.max_bytes = _result_bytes(memory_limit_mb)
        self.deadline = self.started = 0.0
        self.denied: list[str] = []  # what the authorizer denied the running statement
        self.volatile = False  # whether the running statement uses time or chance
        self.connections: OrderedDict[str, sqlite3.Connection] = OrderedDict()
        self.waited: dict[str, float] = {}  # seconds of waiting per database since it was last read

    def connection(self, path: str, stamp: list) -> sqlite3.Connection:
        """An open connection; `stamp` changes with the file, so that a replaced database is opened again."""
        key = f"{path} {stamp}"
        if key not in self.connections:
            if len(self.connections) >= OPEN_CONNECTIONS:
                self.connections.popitem(last=False)[1].close()
            self.connections[key] = self._open(path)
        self.connections.move_to_end(key)
        return self.connections[key]

    def _open(self, path: str) -> sqlite3.Connection:
        connection = open_database(path, 0.0)  # `answer` waits
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA temp_store = MEMORY")  # a large sort must not fill the disk instead
        connection.execute(f"PRAGMA hard_heap_limit = {self.memory_limit_mb * 2**20 * 3 // 4}")
        # On first use, some virtual tables (R-trees) prepare statements that write. Do it now, before the
        # authorizer is set, which would forbid preparing them; it still denies their execution.
        virtual = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage = 0")
        for (name,) in virtual.fetchall():
            try:  # quoted here, because this file imports nothing of the project
                connection.execute('SELECT 1 FROM "' + name.replace('"', '""') + '" LIMIT 0')
            except sqlite3.Error as error:  # a module that this SQLite lacks
                if is_passing(error):
                    raise
        for limit, value in _LIMITS.items():
            connection.setlimit(limit, value)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, self.max_bytes)
        connection.set_progress_handler(lambda: time.monotonic() > self.deadline, 5000)
        connection.set_authorizer(self._authorize)
        return connection

    def _authorize(self, action: int, first: str | None, second: str | None, *_where) -> int:
        if action == sqlite3.SQLITE_FUNCTION:
            allowed, what = second.lower() not in _FORBIDDEN, f"the function {second}"
            self.volatile |= second.lower() in _VOLATILE
        else:
            allowed = action in _READING or (action, first) in _INTERNAL
            what = f"more than reading ({first or second})"
        if not allowed:
            self.denied.append(what)
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    def answer(self, path: str, stamp: list, sql: str) -> tuple[str, str | None, bytes, bytes]:
        """Run one statement: status, error, columns as JSON, rows as JSON.

        A database that cannot be read is tried again for up to `timeout` seconds. Each attempt has the full timeout,
        so that waiting for a writer neither shortens the statement's time nor counts as its seconds.
        """
        began, before = time.monotonic(), self.waited.get(path, 0.0)
        while (found := self._attempt(path, stamp, sql))[0] == "unavailable":
            waited = time.monotonic() - began
            self.waited[path] = before + waited
            if waited >= self.timeout or self.waited[path] >= WAITS_IN_VAIN * self.timeout:
                return found
            os.write(1, _frame(b"[]"))  # shows the parent that we are alive
            time.sleep(min(0.05, 0.001 + waited / 4))
        self.waited.pop(path, None)
        return found

    def _attempt(self, path: str, stamp: list, sql: str) -> tuple[str, str | None, bytes, bytes]:
        """One attempt of `answer`; `unavailable` if the database cannot be read at the moment."""
        self.denied.clear()
        self.volatile = False
        self.deadline, self.started = time.monotonic() + self.timeout, time.perf_counter()
        try:
            cursor = self.connection(path, stamp).cursor()
        except _SQL_ERRORS as error:
            reason = getattr(error, "strerror", None) or str(error)
            if is_passing(error):
                return "unavailable", reason, b"[]", b"[]"
            return "error", f"{CANNOT_READ} {path}: {reason}", b"[]", b"[]"
        self.started, status = time.perf_counter(), None
        try:
            return self._fetch(cursor.execute(sql))
        except _SQL_ERRORS as error:
            status, reason = self._classify(error, path)
            return status, reason, b"[]", b"[]"
        finally:
            cursor.close()
            # stamp[1]: a log, which its writer cannot clean up while we have the file open
            if stamp[1] or status == "unavailable":
                self.connections.popitem()[1].close()

    def _fetch(self, cursor: sqlite3.Cursor) -> tuple[str, str | None, bytes, bytes]:
        columns = _to_json([item[0] for item in cursor.description or ()])
        chunks, count, size = [], 0, len(columns)
        while rows := cursor.fetchmany(64):
            chunks.append(_to_json(rows)[1:-1])
            count, size = count + len(rows), size + len(chunks[-1])
            if count > self.max_rows:
                return "too_large", f"the result has more than {self.max_rows} rows", columns, b"[]"
            if size > self.max_bytes:
                return "too_large", f"the result has more than {self.max_bytes} bytes", b"[]", b"[]"
        return "ok", None, columns, b"[" + b",".join(chunks) + b"]"

    def _classify(self, error: Exception, path: str) -> tuple[str, str]:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code of an extended one
        if self.denied:
            return "refused", f"not a read-only query: it asks for {self.denied[0]}"
        if "may not be modified" in str(error):
            return "refused", f"not a read-only query: {error}"
        if "one statement at a time" in str(error):
            return "refused", "more than one statement"
        if code == sqlite3.SQLITE_INTERRUPT:
            return "timeout", f"no result within {self.timeout:g} s"
        if code == sqlite3.SQLITE_TOOBIG or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_NOMEM:
            return "too_large", str(error)
        if is_passing(error):
            return "unavailable", str(error)
        if code in _UNREADABLE:
            return "error", f"{CANNOT_READ} {path}: {error}"
        return "error", str(error) or type(error).__name__


def _exit_with_parent() -> None:
    """End this process as soon as the parent closes its end of our standard input, however busy SQLite is."""
    hangup = select.poll()
    hangup.register(0, 0)  # no event but the hang-up, which is always reported
    hangup.poll()
    os._exit(0)


def _limit_process(memory_limit_mb: int) -> None:
    """Cap the address space at its current size plus the limit, and forbid writing files."""
    import resource  # Unix only, and only the worker needs it

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # pipes are no files: answers still pass
    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux; elsewhere SQLite's own heap limit remains
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + memory_limit_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def worker_main(settings: str) -> None:
    """Serve the parent: requests on standard input, answers on standard output, until either closes."""
    options = json.loads(settings)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _limit_process(options["memory_limit_mb"])
    runner, inbox = _Runner(**options), bytearray()
    os.write(1, _frame(b"[]"))  # hello
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # start-up failures stay visible, a crash later does not
    while data := os.read(0, 1 << 16):
        inbox += data
        for request in _take_frames(inbox, 1 << 30):
            number, *question = _from_json(request)
            last = False
            try:
                status, error, columns, rows = runner.answer(*question)
            except MemoryError:  # the heap may be damaged: answer, and let a fresh process take over
                last, status, columns, rows = True, "too_large", b"[]", b"[]"
                error = f"the query needs more than {runner.memory_limit_mb} MB"
            seconds = time.perf_counter() - runner.started
            answer = _to_json([number, last, status, error, seconds, runner.volatile])
            answer = answer[:-1] + b",%b,%b]" % (columns, rows)
            answer = memoryview(_frame(answer))
            while answer:
                answer = answer[os.write(1, answer) :]
            if last:
                os._exit(0)


# ---------------------------------------------------------------------------------------------------------
# (2) The parent: hands out statements, collects answers, enforces deadlines
# ---------------------------------------------------------------------------------------------------------

_WORKER_CODE = "import sys; sys.path.append(sys.argv[1]); __import__(sys.argv[2]).worker_main(sys.argv[3])"


class _Worker:
    """The parent's side of one child process."""

    def __init__(self, settings: dict):
        here = Path(__file__).resolve()  # imported by name, not run as a script: its compiled form is cached
        arguments = [str(here.parent), here.stem, json.dumps(settings)]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WORKER_CODE, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip  # a session of its own: Ctrl-C reaches only the parent
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        self.largest = 2 * _result_bytes(settings["memory_limit_mb"]) + 2**20
        self.limit = START_SECONDS  # seconds it may be silent while it has work
        self.ready = False
        self.heard = time.monotonic()
        self.inbox, self.outbox = bytearray(), bytearray()
        self.sent: deque[int] = deque()  # numbers of the statements it holds, in order

    def send(self) -> None:
        """Write as much of the outbox as the pipe accepts."""
        try:
            while self.outbox:
                del self.outbox[: os.write(self.stdin, self.outbox)]
        except BlockingIOError:
            pass  # `_wait` wakes when there is room again
        except BrokenPipeError:
            self.outbox.clear()  # it has died; reading its answers will show that

    def receive(self) -> bool:
        """Read what has arrived into the inbox; False if the worker has died."""
        try:
            while len(self.inbox) <= self.largest:  # the rest waits until these answers are processed
                data = os.read(self.stdout, 1 << 18)
                if not data:
                    return False
                self.inbox += data
        except BlockingIOError:
            pass
        return True

    def was_killed(self) -> bool:
        """Whether a signal from outside ended it, which no query can cause; waits, because its pipe closes first."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(GRACE) in (-signal.SIGKILL, -signal.SIGTERM)
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class SQLExecutor:
    """Runs single read-only queries of untrusted origin on SQLite files, in `workers` child processes.

    databases: {db_id: path}; timeout: seconds per statement; max_rows: longer results are
    `too_large` (an evaluator needs more than the default: a gold query of Spider dev returns 20,662 rows);
    memory_limit_mb: address space that a worker may add to its start-up size; a result may take 1/32 of it;
    cache: folder in which `run_gold` stores results, or None.
    Thread-safe: calls from several threads run one after the other.
    """

    def __init__(
        self,
        databases: dict[str, Path | str],
        workers: int = 2,
        timeout: float = 5.0,
        max_rows: int = 10_000,
        memory_limit_mb: int = 512,
        cache: Path | str | None = None,
    ):
        self.databases = {db_id: Path(path).absolute() for db_id, path in databases.items()}
        self.settings = {"timeout": timeout, "max_rows": max_rows, "memory_limit_mb": memory_limit_mb}
        self.cache = None if cache is None else Path(cache)
        self.worker_count = max(1, workers)
        self.worker_restarts = 0  # workers killed, or found dead, and replaced
        self._failed_starts = 0  # in a row
        self._workers: list[_Worker] = []
        self._deaths: Counter[int] = Counter()  # of workers in this call, by the query they were running
        self._digests: dict[str, str | None] = {}  # content hash of a database file
        self._lock = threading.RLock()
        self._closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Kill the workers; the executor cannot be used afterwards."""
        with self._lock:
            self._closed = True
            while self._workers:
                self._workers.pop().kill()

    def run(self, db_id: str, sql: str) -> Execution:
        """Run one query; bad SQL, bad files and unknown databases are statuses, never exceptions."""
        return self.run_many([(db_id, sql)])[0]

    def run_many(self, pairs) -> list[Execution]:
        """Run (db_id, sql) pairs in parallel; results in their order. Identical pairs run once."""
        pairs = list(map(tuple, pairs))
        results: dict[tuple, Execution] = {}
        tasks: list[tuple[tuple, bytes]] = []  # (pair, request as JSON)
        with self._lock:
            if self._closed:
                raise RuntimeError("this SQLExecutor is closed")
            files: dict[str, tuple] = {}
            for pair in sorted(dict.fromkeys(pairs), key=lambda pair: str(pair[0])):  # by database: open once
                db_id, sql = pair
                if db_id not in files:
                    files[db_id] = self._locate(db_id)
                path, stamp, problem = files[db_id]
                if reason := refusal_reason(sql):
                    results[pair] = Execution("refused", error=reason)
                elif problem:
                    results[pair] = Execution("error", error=problem)
                else:
                    request = _to_json([len(tasks), path, stamp, unwrap_parentheses(sql)])
                    tasks.append((pair, _frame(request)))
            self._drive(tasks, results)
        return [results[pair] for pair in pairs]

    def _locate(self, db_id: str) -> tuple[str, list, str | None]:
        """The file, a stamp that changes with its content, and what is wrong (None if nothing)."""
        path = self.databases.get(db_id)
        if path is None:
            return "", [], f"unknown database {db_id!r}"
        if not path.is_file():
            return "", [], f"{FILE_MISSING} {db_id!r} is missing: {path}"
        return str(path), database_stamp(path), None

    def _drive(self, tasks: list, results: dict) -> None:
        """Keep the workers busy until every task has its result."""
        pending = deque(range(len(tasks)))
        self._deaths = Counter()
        for worker in list(self._workers):
            if worker.process.poll() is not None:  # died while idle: no query's fault
                self._retire(worker)
        try:
            while pending or any(worker.sent for worker in self._workers):
                self._hand_out(tasks, pending)
                self._wait()
                for worker in list(self._workers):
                    worker.send()
                    self._listen(worker, tasks, pending, results)
        finally:
            for worker in [worker for worker in self._workers if worker.sent]:
                self._retire(worker)  # only after an exception, such as Ctrl-C

    def _hand_out(self, tasks: list, pending: deque) -> None:
        busy = sum(bool(worker.sent) for worker in self._workers)
        while len(self._workers) < min(self.worker_count, busy + len(pending)):
            self._workers.append(_Worker(self.settings))
        share = len(pending) // (2 * self.worker_count)  # shrinks towards the end: all finish together
        share = min(IN_FLIGHT, max(1, share))
        for worker in self._workers:
            if len(worker.sent) > share // 2:
                continue
            if not worker.sent:
                worker.heard = time.monotonic()
            while pending and len(worker.sent) < share:
                worker.sent.append(pending.popleft())
                worker.outbox += tasks[worker.sent[-1]][1]
            worker.send()

    def _wait(self) -> None:
        """Sleep until a worker can be read or written, or the nearest deadline."""
        poll = select.poll()
        for worker in self._workers:
            poll.register(worker.stdout, select.POLLIN)
            if worker.outbox:
                poll.register(worker.stdin, select.POLLOUT)
        nearest = min(worker.heard + worker.limit for worker in self._workers if worker.sent)
        poll.poll(1 + max(0, int(1000 * (nearest - time.monotonic()))))

    def _listen(self, worker: _Worker, tasks: list, pending: deque, results: dict) -> None:
        """Take a worker's answers; replace it when it is dead, overdue, or out of memory."""
        ended = not worker.receive()
        alive, leaving = not ended, False
        try:
            for answer in _take_frames(worker.inbox, worker.largest):
                worker.heard = time.monotonic()
                if not worker.ready:  # its hello: from now on a statement's deadline applies
                    worker.ready, worker.limit = True, self.settings["timeout"] + GRACE
                    self._failed_starts = 0
                    continue
                if answer == b"[]":  # it is waiting for a database
                    continue
                number, leaving, status, error, seconds, volatile, columns, rows = _from_json(answer)
                if number != worker.sent[0] or status not in STATUSES:
                    raise ValueError(f"not an answer: {number}, {status}")
                execution = Execution(status, columns, [tuple(row) for row in rows], error, seconds, volatile)
                results[tasks[worker.sent.popleft()][0]] = execution
        except (*_BAD_JSON, IndexError):
            alive = False
        silent = time.monotonic() - worker.heard
        overdue = bool(worker.sent) and silent > worker.limit
        if alive and not overdue and not leaving:
            return
        if not worker.ready:  # it may be killed from outside once or twice
            self._failed_starts += 1
            if self._failed_starts >= KILLINGS:
                if not (ended and worker.was_killed()):
                    raise RuntimeError("SQL workers failed to start; their standard error says why")
                reason = f"the system killed {KILLINGS} SQL workers as they started: free some memory"
                for number in (*worker.sent, *pending):  # another call tries once more
                    results[tasks[number][0]] = Execution("unavailable", error=reason)
                worker.sent.clear()
                pending.clear()
        elif worker.sent and not leaving:
            verdict = self._verdict(worker, alive, ended, silent)
            if verdict:
                results[tasks[worker.sent.popleft()][0]] = verdict
        pending.extendleft(reversed(worker.sent))
        self._retire(worker)

    def _verdict(self, worker: _Worker, alive: bool, ended: bool, silent: float) -> Execution | None:
        """The verdict on the statement that a failed worker was running, the first in line; None: try it again."""
        if alive:
            late = f"no result within {self.settings['timeout']:g} s"
            return Execution("timeout", error=late, seconds=silent)
        self._deaths[worker.sent[0]] += 1
        if ended and worker.was_killed():  # usually by a system that is short of memory
            reason = f"the system killed its SQL worker {KILLINGS} times: free some memory, or have fewer workers"
            return Execution("unavailable", error=reason) if self._deaths[worker.sent[0]] >= KILLINGS else None
        if silent < GRACE and self._deaths[worker.sent[0]] == 1:
            return None  # it may have died before it read the query
        return Execution("error", error=WORKER_DIED, seconds=silent)

    def _retire(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()
        self.worker_restarts += 1

    # Gold results: computed once, stored on disk ------------------------------------------------------------

    def run_gold(self, pairs) -> list[Execution]:
        """Like `run_many`, but results are stored in the `cache` folder, failures too.

        The key is a hash of the database's content, the SQL and the limits. A timeout expires after a day,
        because a busy machine may have caused it. A result is not stored if it depends on time or chance, if its
        database changed meanwhile or could not be read, or if the worker died. A GoldAnswer in place of
        the SQL is its own result.
        """
        pairs = list(map(tuple, pairs))
        found = {pair: Execution("ok", rows=list(pair[1].rows)) for pair in pairs if isinstance(pair[1], GoldAnswer)}
        asked = [pair for pair in dict.fromkeys(pairs) if pair not in found]
        files = {pair: self._cache_file(*pair) if self.cache else None for pair in asked}
        found |= {pair: _read_execution(file) for pair, file in files.items() if file}
        missing = [pair for pair in files if found.get(pair) is None]
        for pair, execution in zip(missing, self.run_many(missing), strict=True):
            found[pair] = execution
            passing = execution.volatile or execution.unread or execution.error == WORKER_DIED
            if files[pair] and not passing and files[pair] == self._cache_file(*pair):
                _write_execution(files[pair], execution)
        return [found[pair] for pair in pairs]

    def _cache_file(self, db_id: str, sql: str) -> Path | None:
        """The cache file of a statement's result; None if there is nothing to store or no way to."""
        path, stamp, problem = self._locate(db_id)
        if problem or refusal_reason(sql):
            return None  # found again faster than looked up
        key = f"{path} {stamp}"
        if key not in self._digests:
            self._digests[key] = _content_digest(Path(path).resolve())
        if self._digests[key] is None:
            return None
        name = json.dumps([self._digests[key], sql, self.settings, sqlite3.sqlite_version, CACHE_FORM])
        name = hashlib.sha256(name.encode()).hexdigest()
        return self.cache / name[:2] / f"{name}.json"


def _content_digest(path: Path) -> str | None:
    """Hash of a database's content, including its write-ahead log; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        for part in (path, Path(f"{path}-wal")):
            if part.exists():
                with open(part, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError:
        return None
    return digest.hexdigest()


def _read_execution(file: Path) -> Execution | None:
    try:
        values = _from_json(file.read_bytes())
        execution = Execution(*values)
        expired = execution.status == "timeout" and time.time() - file.stat().st_mtime > 86_400
    except (OSError, *_BAD_JSON):  # absent, or damaged: run it again
        return None
    return None if expired else replace(execution, rows=[tuple(row) for row in execution.rows])


def _write_execution(file: Path, execution: Execution) -> None:
    """Store a result; on a full or unwritable disk nothing is stored, and the query will run again."""
    scratch = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")  # its mode follows the umask
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(_to_json([getattr(execution, item.name) for item in fields(execution)]))
        os.replace(scratch, file)  # readers see the old file, none, or the whole new one
    except OSError:
        with suppress(OSError):
            scratch.unlink()


# ---------------------------------------------------------------------------------------------------------
# Comparing results. Values compare as in Python: 1 == 1.0, '1' != 1, None == None only.
# ---------------------------------------------------------------------------------------------------------

Rows = list[tuple]


def result_key(rows: Rows) -> frozenset:
    """A hashable key of a result, for voting: two results have the same key iff `bird_match` holds."""
    return frozenset(map(tuple, rows))


def bird_match(pred_rows: Rows, gold_rows: Rows) -> bool:
    """BIRD's execution accuracy: the same set of rows; order and duplicates do not count.

    Source: `calculate_ex` in bird-bench/mini_dev.
    """
    return result_key(pred_rows) == result_key(gold_rows)


def soft_f1(pred_rows: Rows, gold_rows: Rows) -> float:
    """BIRD mini-dev's Soft-F1 in [0, 1]: row i against row i, without duplicate rows.

    A cell matches if its value is anywhere in the other row. Source: `calculate_f1_score` in
    bird-bench/mini_dev.
    """
    pred, gold = list(dict.fromkeys(map(tuple, pred_rows))), list(dict.fromkeys(map(tuple, gold_rows)))
    if not pred and not gold:
        return 1.0
    true_positive = false_positive = false_negative = 0.0
    for pred_row, gold_row in zip(pred, gold, strict=False):
        matches = sum(value in gold_row for value in pred_row)
        true_positive += matches / len(gold_row)
        false_positive += (len(pred_row) - matches) / len(gold_row)
        false_negative += sum(value not in pred_row for value in gold_row) / len(gold_row)
    false_positive += max(0, len(pred) - len(gold))
    false_negative += max(0, len(gold) - len(pred))
    if true_positive == 0:
        return 0.0
    precision = true_positive / (true_positive + false_positive)
    recall = true_positive / (true_positive + false_negative)
    return 2 * precision * recall / (precision + recall)


def r_ves_reward(gold_seconds: float, pred_seconds: float) -> float:
    """BIRD mini-dev's efficiency reward of a *correct* query, 0.25 to 1.25 by gold time / predicted time.

    A wrong query gets 0. A question's score is 100 * sqrt(reward). Source: `evaluation_ves.py` in
    bird-bench/mini_dev.
    """
    ratio = gold_seconds / pred_seconds if pred_seconds > 0 else float("inf")
    for threshold, reward in ((2.0, 1.25), (1.0, 1.0), (0.5, 0.75), (0.25, 0.5)):
        if ratio >= threshold:
            return reward
    return 0.25


def spider_prepare(sql: str, keep_distinct: bool = False, is_prediction: bool = False) -> str:
    """Rewrite a query as Spider's test-suite evaluator does before running it.

    In a prediction the letters `value` become 1; `> =`, `< =`, `! =` are joined; unless `keep_distinct`,
    all but the first statement and every DISTINCT are removed; YEAR(CURDATE()) becomes 2020.
    Source: `evaluation.py`, `exec_eval.py` and `parse.py` in taoyds/test-suite-sql-eval.
    """
    if is_prediction:
        sql = sql.replace("value", "1")
    sql = sql.replace("> =", ">=").replace("< =", "<=").replace("! =", "!=")
    if not keep_distinct:
        kept = []
        for token in _TOKEN.finditer(sql):
            if token[0].lower() != "distinct":
                kept.append(token[0])
            if token[0] == ";":
                break
        sql = "".join(kept)
    return re.sub(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", "2020", sql, flags=re.IGNORECASE)


def gold_is_ordered(gold: Gold) -> bool:
    """Whether Spider's evaluator compares the order of rows: in SQL it looks only for the letters `order by`."""
    return gold.ordered if isinstance(gold, GoldAnswer) else "order by" in gold.lower()


def spider_match(pred_rows: Rows, gold_rows: Rows, ordered: bool) -> bool:
    """Spider's test-suite match on one database: equal multisets of rows under some permutation of the columns.

    With `ordered`, the rows must also be in the same order. The search over permutations is exact; on
    tables built to defeat it, it gives up after SEARCH_CELLS steps and returns False.
    Source: `result_eq` in exec_eval.py of taoyds/test-suite-sql-eval.
    """
    pred, gold = list(map(tuple, pred_rows)), list(map(tuple, gold_rows))
    if not pred and not gold:
        return True
    if len(pred) != len(gold) or len(pred[0]) != len(gold[0]):
        return False
    pred_bags, gold_bags = list(map(_row_bag, pred)), list(map(_row_bag, gold))
    if (pred_bags != gold_bags) if ordered else (set(pred_bags) != set(gold_bags)):
        return False  # the official quick rejection, with its quirk: see _row_bag
    if pred == gold:
        return True
    pred_columns, gold_columns = list(zip(*pred, strict=True)), list(zip(*gold, strict=True))
    if ordered:  # rows are fixed: the columns must be the same multiset
        return Counter(pred_columns) == Counter(gold_columns)
    return Counter(pred) == Counter(gold) or _ColumnSearch(pred_columns, gold_columns).found()


def _row_bag(row: tuple) -> tuple:
    """The sorted cells of a row. Equal numbers of two types may sort differently, so that (1, 10) and (1.0, 10)
    give unequal bags although the rows are equal: the official behaviour."""
    return tuple(sorted(row, key=lambda value: str(value) + str(type(value))))


class _ColumnSearch:
    """Is one table another with rows and columns reordered? Exact, by refinement and trial.

    Rows and columns get colours that any valid reordering preserves: a column's colour encodes which values it
    has in rows of which colour, and vice versa, until no colour splits further (as in colour refinement for
    graph isomorphism). If columns still share a colour, one is singled out and each candidate for it is tried.
    Equal columns are merged first, and so are equal rows.
    """

    def __init__(self, pred_columns: list[tuple], gold_columns: list[tuple]):
        columns = [Counter(pred_columns), Counter(gold_columns)]
        rows = [Counter(zip(*distinct, strict=True)) for distinct in columns]
        self.rows = [list(distinct) for distinct in rows]
        self.columns = [list(zip(*distinct, strict=True)) for distinct in rows]
        # The first colour of a column or row is its number of occurrences.
        self.start = [[list(count.values()) for count in counts] for counts in (columns, rows)]
        self.cells_left = SEARCH_CELLS

    def found(self) -> bool:
        same_size = all(len(pred) == len(gold) for pred, gold in (self.columns, self.rows))
        return same_size and self._search(*self.start)

    def _search(self, column_colours: list[list], row_colours: list[list]) -> bool:
        refined = self._refine(column_colours, row_colours)
        if refined is None:
            return False
        (pred_colours, gold_colours), row_colours = refined
        sizes = Counter(gold_colours)
        shared = [colour for colour in sizes if sizes[colour] > 1]
        if not shared:  # every column has one partner left: check that the rows agree
            place = {colour: i for i, colour in enumerate(pred_colours)}
            permuted = zip(*(self.columns[0][place[colour]] for colour in gold_colours), strict=True)
            counts = zip((permuted, self.rows[1]), self.start[1], strict=True)
            pred, gold = (dict(zip(rows, count, strict=True)) for rows, count in counts)
            return pred == gold
        colour = min(shared, key=sizes.get)
        gold_trial = list(gold_colours)
        gold_trial[gold_colours.index(colour)] = -1
        for i, candidate in enumerate(pred_colours):
            if candidate == colour:
                pred_trial = [*pred_colours[:i], -1, *pred_colours[i + 1 :]]
                if self._search([pred_trial, gold_trial], row_colours):
                    return True
        return False

    def _refine(self, column_colours: list[list], row_colours: list[list]) -> tuple | None:
        """Split colours until nothing changes; None if the tables differ or the steps are used up."""
        classes = 0
        while self.cells_left > 0:
            self.cells_left -= 4 * len(self.rows[0]) * len(self.columns[0])
            column_colours = _recolour(column_colours, self.columns, row_colours)
            if column_colours is None or len({*column_colours[0]}) == len(self.columns[0]):
                return column_colours and (column_colours, row_colours)
            row_colours = _recolour(row_colours, self.rows, column_colours)
            if row_colours is None:
                return None
            before, classes = classes, len({*column_colours[0]}) + len({*row_colours[0]})
            if classes == before:
                return column_colours, row_colours
        return None


def _recolour(colours: list[list], lines: list[list], crossing: list[list]) -> list[list] | None:
    """New colours of both tables' lines (rows or columns) from the old ones and the multisets of (crossing line's
    colour, value); None if the tables differ. Multisets are compared by their sorted hashes; a collision only
    leaves a colour unsplit."""
    keys = []
    for own, side, cross in zip(colours, lines, crossing, strict=True):
        bags = [tuple(sorted(map(hash, zip(cross, line, strict=True)))) for line in side]
        keys.append(list(zip(own, bags, strict=True)))
    if Counter(keys[0]) != Counter(keys[1]):
        return None
    names = {key: number for number, key in enumerate(dict.fromkeys(keys[0]))}
    return [[names[key] for key in side] for side in keys]


# ---------------------------------------------------------------------------------------------------------
# When a prediction is right: one answer for the reward, for evaluation and for mining
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """How a prediction is compared with a gold query: which form of each runs, and when their rows match.

    The two settings of the rewriting matter only if `rewrites` is true, as in Spider's comparison.
    """

    name: str
    rows_match: Callable[[Rows, Rows, Gold], bool]  # predicted rows, gold rows, gold
    rewrites: bool = False  # both queries are rewritten by `spider_prepare` before they run
    keep_distinct: bool = False
    replace_value: bool = True  # the official script's rule for predictions; it makes some right queries wrong

    def prepare(self, sql: Gold, is_prediction: bool = False) -> Gold:
        """The SQL that runs; an answer stays as it is."""
        if not self.rewrites or isinstance(sql, GoldAnswer):
            return sql
        return spider_prepare(sql, self.keep_distinct, is_prediction and self.replace_value)

    def without_value_rule(self) -> "Comparison":
        """The same without the rule on `value` in predictions: to verify a query, not to report its score."""
        return replace(self, replace_value=False)


def _bird_rows_match(predicted: Rows, rows: Rows, gold: Gold) -> bool:
    """`bird_match`; of an ordered answer the rows must also come in its order, where repeated ones count once."""
    in_order = isinstance(gold, GoldAnswer) and gold.ordered
    return list(dict.fromkeys(predicted)) == list(dict.fromkeys(rows)) if in_order else bird_match(predicted, rows)


MATCHES = {
    "bird": Comparison("bird", _bird_rows_match),
    "spider": Comparison("spider", lambda predicted, rows, gold: spider_match(predicted, rows, gold_is_ordered(gold)),
                         rewrites=True),
}
AS_WRITTEN = MATCHES["bird"]  # rewrites nothing


class Results:
    """The results of predictions and of their gold queries, as written and as each comparison rewrites them.

    Args:
        executor: has `run_many` and `run_gold`; if it has `databases`, concurrent writes are detected.
        questions: (db_id, predicted SQL, golds). Identical queries run once.
    """

    def __init__(self, executor, questions: Sequence[tuple[str, str, Sequence[Gold]]],
                 comparisons: Sequence[Comparison]):
        ways = (AS_WRITTEN, *comparisons)
        predictions = dict.fromkeys((db_id, way.prepare(sql, True)) for way in ways for db_id, sql, _ in questions)
        golds = dict.fromkeys((db_id, way.prepare(gold))
                              for way in ways for db_id, _, of_question in questions for gold in of_question)
        known = getattr(executor, "databases", {})
        files = {db_id: known[db_id] for db_id, _ in predictions if db_id in known}
        before = {db_id: database_stamp(file) for db_id, file in files.items()}
        self._predicted = dict(zip(predictions, executor.run_many(list(predictions)), strict=True))
        self._golds = dict(zip(golds, executor.run_gold(list(golds)), strict=True))
        self._run_again(executor, {db_id for db_id, file in files.items() if database_stamp(file) != before[db_id]})
        # A query that depends on time or chance has one result if it is both prediction and gold.
        self._predicted |= {query: result for query, result in self._golds.items()
                            if query in predictions and result.volatile}

    def _run_again(self, executor, written: set[str]) -> None:
        """Run predictions again after their golds, on databases that a writer changed meanwhile. If the rows are the
        same before and after, prediction and gold saw the same data; otherwise there is no verdict in the end."""
        differing = [query for query, result in self._predicted.items()
                     if query[0] in written and result.status == "ok" and not result.volatile]
        for turn in range(ROUNDS if differing else 0):
            if turn:
                golds = [query for query in self._golds if query[0] in {db_id for db_id, _ in differing}]
                self._golds |= zip(golds, executor.run_gold(golds), strict=True)
            again = dict(zip(differing, executor.run_many(differing), strict=True))
            differing = [query for query, result in again.items()
                         if not result.unread and result.rows != self._predicted[query].rows]
            self._predicted |= again
        reason = "a writer changed its rows each time that it was compared with its gold"
        self._predicted |= {query: Execution("unavailable", error=reason) for query in differing}

    def predicted(self, db_id: str, sql: str, comparison: Comparison = AS_WRITTEN) -> Execution:
        return self._predicted[db_id, comparison.prepare(sql, True)]

    def gold(self, db_id: str, gold: Gold, comparison: Comparison = AS_WRITTEN) -> Execution:
        return self._golds[db_id, comparison.prepare(gold)]

    def unread(self, db_id: str, sql: str, golds: Sequence[Gold], *comparisons: Comparison) -> Execution | None:
        """An execution that failed because its database cannot be read, so that a prediction has no verdict, or None.
        """
        asked = [one for way in (AS_WRITTEN, *comparisons)
                 for one in (self.predicted(db_id, sql, way), *(self.gold(db_id, gold, way) for gold in golds))]
        return next((execution for execution in asked if execution.unread), None)

    def is_right(self, db_id: str, sql: str, golds: Sequence[Gold], comparison: Comparison) -> bool:
        """Whether a prediction ran and matches a gold that ran; a failed gold matches nothing.

        With an answer, the prediction is compared as written, because no gold query lost the same DISTINCT."""
        for gold in golds:
            predicted = self.predicted(db_id, sql, AS_WRITTEN if isinstance(gold, GoldAnswer) else comparison)
            result = self.gold(db_id, gold, comparison)
            if predicted.status == result.status == "ok" and comparison.rows_match(predicted.rows, result.rows, gold):
                return True
        return False
