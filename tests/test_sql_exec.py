"""The executor: statuses, values, caching, life and death of its workers; one test for each row of
PITFALLS part B that concerns running SQL (B2, B3, B5, B10 and the comparators are in test_sql_match.py)."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from conftest import tiny_database

import sql_exec
from common.errors import UserError
from questions.schema import read_schema, schema_columns, value_index
from sql_exec import Execution, SQLExecutor, bird_match

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c"
# One call of a C function that runs for ages: SQLite's own interrupt cannot stop it, only a kill can.
STUCK = "SELECT instr(printf('%.*c', 9000000, 'a'), printf('%.*c', 4000000, 'a') || 'b')"


@pytest.fixture
def executor(tiny_db):
    with SQLExecutor({"music": tiny_db}, workers=2, timeout=5.0) as executor:
        yield executor


@pytest.fixture
def hasty(tiny_db):
    with SQLExecutor({"music": tiny_db}, workers=2, timeout=0.3) as executor:
        yield executor


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return done


# Queries that may run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        " \n\tselect 1 ; ",
        "-- a comment\nSELECT 1 -- another",
        "/* one */ /* two */ SELECT /* three */ 1",
        "SELECT 1 /* never closed",
        "(SELECT 1)",
        "-- a comment\n( /* two */ (SELECT 1) ) ; -- end",
        "WITH one(x) AS (SELECT 1) SELECT x FROM one",
        "VALUES (1)",
        "(VALUES (1));",
        "\ufeffSELECT 1",
        "SELECT length(')')",
        "(SELECT length(')'));",
    ],
)
def test_queries_run(executor, sql):
    execution = executor.run("music", sql)
    assert (execution.status, execution.rows, execution.error) == ("ok", [(1,)], None)


@pytest.mark.parametrize("sql", ["(SELECT 1) UNION (SELECT 2)", "((SELECT 1)", "SELECT 1)", "SELECT '"])
def test_queries_that_sqlite_cannot_parse_are_errors(executor, sql):
    assert executor.run("music", sql).status == "error"


def test_values_survive_the_way_back(executor):
    inf, odd = float("inf"), "é😀\x01\"\\'"
    values = [None, 0, -(2**63), 2**63 - 1, 0.1, -0.0, 1e308, inf, -inf, "", odd, "a\nb"]
    literals = "NULL, 0, -9223372036854775808, 9223372036854775807, 0.1, -0.0, 1e308, 9e999, -9e999, '', "
    sql = f"SELECT {literals} 'é😀' || char(1) || '\"\\''', 'a' || char(10) || 'b', x'00ff', x''"
    execution = executor.run("music", sql)
    assert execution.rows == [(*values, b"\x00\xff", b"")]
    assert [type(value) for value in execution.rows[0]] == [*map(type, values), bytes, bytes]
    assert executor.run("music", "SELECT 9223372036854775808, 9e999 - 9e999").rows == [(2.0**63, None)]


def test_columns_and_seconds_are_reported(executor):
    execution = executor.run("music", "SELECT name, age AS years FROM singer ORDER BY name")
    assert execution.columns == ["name", "years"]
    assert execution.rows == [("Ana", 30), ("Bo", 41), ("Cy", 25)]
    assert 0 < execution.seconds < 5


def test_run_many_keeps_order_and_runs_identical_pairs_once(executor, tiny_db):
    executor.databases["again"] = tiny_db
    pairs = [(["music", "again"][i % 2], f"SELECT {i % 7}, '{i % 2}'") for i in range(200)]
    results = executor.run_many(pairs)
    assert [result.rows for result in results] == [[(i % 7, str(i % 2))] for i in range(200)]
    assert len({id(result) for result in results}) == 14
    assert executor.run_many([]) == []
    once = executor.run_many([("music", "SELECT random()")] * 20)
    assert len({result.rows[0] for result in once}) == 1


def test_calls_from_several_threads_take_turns(executor):
    seen = {}

    def ask(number):
        seen[number] = executor.run_many([("music", f"SELECT {number} + {i}") for i in range(50)])

    threads = [threading.Thread(target=ask, args=(1000 * number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for number, results in seen.items():
        assert [result.rows[0][0] - number for result in results] == list(range(50))


def test_large_statements_and_results_do_not_block_the_pipes(executor):
    text = "x" * 90_000  # more than a pipe holds, both ways, many times over
    pairs = [("music", f"SELECT {i}, '{text}', printf('%.*c', 200000, 'y')") for i in range(60)]
    for i, result in enumerate(executor.run_many(pairs)):
        assert result.rows == [(i, text, "y" * 200_000)]


# Bad databases ----------------------------------------------------------------------------------------------


def test_unknown_and_broken_databases_are_errors_that_name_them(tmp_path, tiny_db):
    files = {"garbage": b"no database" * 500, "empty": b"", "cut": tiny_db.read_bytes()[:5000]}
    paths = {name: tmp_path / f"{name}.sqlite" for name in files}
    for name, content in files.items():
        paths[name].write_bytes(content)
    paths |= {"missing": tmp_path / "missing.sqlite", "folder": tmp_path, "good": tiny_db}
    with SQLExecutor(paths, workers=1) as executor:
        for name in (*paths, "unknown"):
            execution = executor.run(name, "SELECT count(*) FROM singer")
            if name == "good":
                assert execution.rows == [(3,)]
            else:
                assert execution.status == "error" and execution.rows == []
                assert name in execution.error or str(paths[name]) in execution.error
        assert executor.worker_restarts == 0
    assert not paths["missing"].exists()


def test_a_replaced_database_is_read_anew(executor, tiny_db):
    assert executor.run("music", "SELECT count(*) FROM singer").rows == [(3,)]
    tiny_db.unlink()
    assert executor.run("music", "SELECT count(*) FROM singer").status == "error"
    connection = sqlite3.connect(tiny_db)
    connection.executescript("CREATE TABLE singer (x); INSERT INTO singer VALUES (1);")
    connection.close()
    assert executor.run("music", "SELECT count(*) FROM singer").rows == [(1,)]


@pytest.fixture
def locked(tiny_db):
    """A function that lets go of the lock which a writer holds on the database, after so many seconds."""
    writer = sqlite3.connect(tiny_db, isolation_level=None, check_same_thread=False)
    writer.execute("BEGIN EXCLUSIVE")
    writer.execute("INSERT INTO singer (name) VALUES ('Di')")
    yield lambda after=0.0: threading.Timer(after, writer.execute, ["COMMIT"]).start()
    writer.close()


COUNT = ("music", "SELECT count(*) FROM singer")


def test_a_query_waits_for_a_writer_as_long_as_it_may_take_itself(tiny_db, locked):
    with SQLExecutor({"music": tiny_db}, workers=1, timeout=1.8) as executor:
        locked(after=1.0)
        execution = executor.run(*COUNT)
    assert execution.rows == [(4,)] and execution.seconds < 0.9  # the time of the wait is not the query's


def test_a_wait_takes_nothing_from_the_query_that_waits(tiny_db, locked):
    with SQLExecutor({"music": tiny_db}, workers=1, timeout=0.4) as executor:
        locked(after=0.3)
        execution = executor.run("music", f"{ENDLESS}, singer")
        assert execution.status == "timeout" and execution.seconds >= 0.4 and executor.worker_restarts == 0


def test_a_database_that_stays_locked_is_no_verdict_on_the_query(tiny_db, locked):
    with SQLExecutor({"music": tiny_db}, workers=1, timeout=0.1) as executor:
        start = time.monotonic()
        first, *others = executor.run_many([("music", f"SELECT {i} FROM singer") for i in range(100)])
        assert {execution.status for execution in (first, *others)} == {"unavailable"}
        assert first.error == "database is locked" and first.unread and first.rows == []
        assert executor.worker_restarts == 0 and executor.run("music", "DROP TABLE singer").status == "refused"
        assert time.monotonic() - start < 100 * 0.1  # only the first few are waited for in vain
        locked()
        assert wait_until(lambda: executor.run(*COUNT).rows == [(4,)])


@pytest.mark.parametrize("code", ["SQLITE_BUSY", "SQLITE_BUSY_SNAPSHOT", "SQLITE_LOCKED", "SQLITE_PROTOCOL",
                                  "SQLITE_IOERR", "SQLITE_IOERR_READ"])
@pytest.mark.parametrize("moment", ["open", "execute"])
def test_troubles_that_pass_are_tried_again(tiny_db, monkeypatch, code, moment):
    """A worker's runner, in this process: the first two attempts fail as on a bad disk."""
    troubles = [sqlite3.OperationalError("trouble"), sqlite3.OperationalError("trouble")]
    for trouble in troubles:
        trouble.sqlite_errorcode = getattr(sqlite3, code)
    open_database, fetch = sql_exec.open_database, sql_exec._Runner._fetch

    def failing(action):
        def act(*arguments):
            if troubles:
                raise troubles.pop()
            return action(*arguments)
        return act

    if moment == "open":
        monkeypatch.setattr(sql_exec, "open_database", failing(open_database))
    else:
        monkeypatch.setattr(sql_exec._Runner, "_fetch", failing(fetch))
    signs = []
    monkeypatch.setattr(os, "write", lambda file, data: signs.append(data))
    runner = sql_exec._Runner(timeout=5.0, max_rows=10, memory_limit_mb=64)
    status, error, _, rows = runner.answer(str(tiny_db), sql_exec.database_stamp(tiny_db), COUNT[1])
    assert (status, error, rows) == ("ok", None, b"[[3]]") and signs == [b"\0\0\0\2[]"] * 2


def test_io_errors_that_stay_are_no_verdict_and_hunger_for_memory_is(tiny_db, monkeypatch):
    monkeypatch.setattr(os, "write", lambda file, data: None)
    runner = sql_exec._Runner(timeout=0.05, max_rows=10, memory_limit_mb=64)
    for error, status in ((OSError(errno.EIO, "Input/output error"), "unavailable"),
                          (OSError(errno.ESTALE, "Stale file handle"), "unavailable"),
                          (PermissionError(errno.EACCES, "Permission denied"), "error")):
        monkeypatch.setattr(sql_exec, "open_database", lambda path, patience, error=error: (_ for _ in ()).throw(error))
        found = runner.answer(str(tiny_db), [[], []], COUNT[1])
        assert found[0] == status and error.strerror in found[1]
    hungry = sqlite3.OperationalError("disk I/O error")
    hungry.sqlite_errorcode = sqlite3.SQLITE_IOERR_NOMEM
    assert runner._classify(hungry, "file")[0] == "too_large"


def test_a_wal_database_is_read_with_its_writer_and_without_leaving_files(hasty, tiny_db):
    writer = sqlite3.connect(tiny_db, isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("INSERT INTO singer (name) VALUES ('Di')")
    assert hasty.run("music", "SELECT count(*) FROM singer").rows == [(4,)]
    writer.execute("INSERT INTO singer (name) VALUES ('Ed')")
    assert hasty.run("music", "SELECT count(*) FROM singer").rows == [(5,)]
    hasty.close()
    writer.close()
    with SQLExecutor({"music": tiny_db}) as executor:
        assert executor.run("music", "SELECT count(*) FROM singer").rows == [(5,)]
    assert [path.name for path in tiny_db.parent.iterdir()] == [tiny_db.name]


def test_a_wal_database_copied_with_its_log_is_an_error_that_leaves_no_files(tiny_db, tmp_path):
    """Reading the log takes an index file beside it, which a read-only worker must not create."""
    writer = sqlite3.connect(tiny_db, isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("INSERT INTO singer (name) VALUES ('Di')")
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "music.sqlite"
    copy.write_bytes(tiny_db.read_bytes())
    log = Path(f"{copy}-wal")
    log.write_bytes(Path(f"{tiny_db}-wal").read_bytes())
    writer.close()
    with SQLExecutor({"copy": copy}, workers=1) as executor:
        execution = executor.run("copy", "SELECT count(*) FROM singer")
        assert execution.status == "error" and f"{copy}: it has a write-ahead log" in execution.error
        with pytest.raises(UserError, match="music.sqlite: it has a write-ahead log .* open and close it once"):
            read_schema(copy)
        assert sorted(path.name for path in copy.parent.iterdir()) == [copy.name, log.name]
        sqlite3.connect(copy).execute("SELECT count(*) FROM singer").connection.close()  # as the sentence advises
        assert executor.run("copy", "SELECT count(*) FROM singer").rows == [(4,)]
        copy.write_bytes(copy.read_bytes())
        log.write_bytes(b"")  # an empty log says nothing
        assert executor.run("copy", "SELECT count(*) FROM singer").rows == [(4,)]


# One way of opening a database, for schemas, hints and queries ---------------------------------------------


@pytest.fixture
def wal_db(tmp_path) -> Path:
    """The music database in WAL mode, closed as it should be, in a folder of its own."""
    (tmp_path / "wal").mkdir()
    path = tiny_database(tmp_path / "wal" / "music.sqlite")
    sqlite3.connect(path).execute("PRAGMA journal_mode = WAL").connection.close()
    return path


def names_read(path) -> tuple[list[str], list[str], list[tuple]]:
    """The tables that the schema has, the cells that hints find, and what the executor counts."""
    with SQLExecutor({"music": path}, workers=1) as executor:
        execution = executor.run("music", "SELECT count(*) FROM singer")
        assert execution.status == "ok", execution.error
    hints = value_index(path).hints("are Ana and Di singers?", 9)
    return [table.name for table in read_schema(path).tables], [hint.value for hint in hints], execution.rows


def files_beside(path: Path) -> dict[str, str]:
    return {file.name: digest(file) for file in path.parent.iterdir()}


def killed_while_writing(path: Path, statements: str) -> None:
    """Run statements in a process that ends without closing the database."""
    code = "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); " \
           "[c.execute(statement) for statement in sys.argv[2].split(';')]; os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(path), statements], check=True)


@contextlib.contextmanager
def as_a_stranger(path: Path):
    """A copy of the database, with what lies beside it, in a folder in which this process may only read."""
    folder = Path(tempfile.mkdtemp())
    for file in path.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / file.name).chmod(0o444)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        if os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            pytest.skip("this account may write everywhere")
        yield folder / path.name
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_cleanly_closed_wal_database_is_read_by_all_in_turn_and_nothing_is_left(wal_db):
    for _ in range(2):  # the executor after the schema, too
        assert names_read(wal_db) == (["singer", "concert"], ["Ana"], [(3,)])
        assert [file.name for file in wal_db.parent.iterdir()] == [wal_db.name]


def test_empty_files_that_another_reader_left_do_no_harm(wal_db):
    other = sqlite3.connect(f"file:{wal_db}?mode=ro", uri=True)
    other.execute("SELECT * FROM singer").fetchall()
    other.close()
    before = files_beside(wal_db)
    assert len(before) == 3 and names_read(wal_db)[2] == [(3,)] and files_beside(wal_db) == before


def test_a_live_log_is_read_by_all_and_its_writer_can_tidy_up(wal_db):
    writer = sqlite3.connect(wal_db, isolation_level=None)
    with SQLExecutor({"music": wal_db}, workers=1) as executor:
        for number, statement in enumerate(["INSERT INTO singer (name) VALUES ('Di')", "CREATE TABLE song (title)"]):
            writer.execute(statement)
            assert names_read(wal_db) == (["singer", "concert", "song"][: 2 + number], ["Ana", "Di"], [(4,)])
            assert executor.run("music", "SELECT count(*) FROM singer").rows == [(4,)]
        writer.close()  # while the executor is open
        assert [file.name for file in wal_db.parent.iterdir()] == [wal_db.name]
        assert executor.run("music", "SELECT count(*) FROM song").rows == [(0,)]


def test_the_log_of_a_writer_that_was_killed_is_read_and_kept(wal_db):
    killed_while_writing(wal_db, "INSERT INTO singer (name) VALUES ('Di');BEGIN;DELETE FROM singer")
    before = files_beside(wal_db)
    assert len(before) == 3
    assert names_read(wal_db) == (["singer", "concert"], ["Ana", "Di"], [(4,)])
    assert files_beside(wal_db) == before


def test_a_log_is_found_behind_a_link(wal_db, tmp_path):
    link = tmp_path / "link.sqlite"
    link.symlink_to(wal_db)
    writer = sqlite3.connect(wal_db, isolation_level=None)
    writer.execute("INSERT INTO singer (name) VALUES ('Di')")
    assert names_read(link) == (["singer", "concert"], ["Ana", "Di"], [(4,)])
    writer.close()


@pytest.mark.parametrize("state", ["closed", "killed", "journal"])
def test_a_folder_without_write_permission_is_enough(wal_db, state):
    if state == "killed":
        killed_while_writing(wal_db, "INSERT INTO singer (name) VALUES ('Di')")
    elif state == "journal":
        sqlite3.connect(wal_db).execute("PRAGMA journal_mode = DELETE").connection.close()
    with as_a_stranger(wal_db) as path:
        before = files_beside(path)
        assert len(before) == (3 if state == "killed" else 1)
        assert schema_columns(read_schema(path))["singer"][0] == "singer_id"
        assert [hint.value for hint in value_index(path).hints("Ana", 1)] == ["Ana"]
        with contextlib.closing(sql_exec.open_database(path)) as connection:
            assert connection.execute("SELECT count(*) FROM singer").fetchall() == [(3 + (state == "killed"),)]
        assert files_beside(path) == before


def test_an_unfinished_transaction_is_told_and_not_kept(tiny_db, tmp_path):
    killed_while_writing(tiny_db, "PRAGMA cache_size = 1;BEGIN;"
                                  "CREATE TABLE t AS SELECT randomblob(9000) FROM singer, concert, singer a, concert b")
    gold = ("music", "SELECT count(*) FROM singer")
    with SQLExecutor({"music": tiny_db}, cache=tmp_path / "cache") as executor:
        assert "unfinished transaction" in executor.run_gold([gold])[0].error
        with pytest.raises(UserError, match="music.sqlite: it has an unfinished transaction: open and close it once"):
            read_schema(tiny_db)
        sqlite3.connect(tiny_db).execute("SELECT count(*) FROM singer").connection.close()
        assert executor.run_gold([gold])[0].rows == [(3,)]


VIRTUAL = """
    CREATE VIRTUAL TABLE area USING rtree(id, x0, x1, +label);
    INSERT INTO area VALUES (1, 0, 2, 'park'), (2, 5, 9, 'lake');
    CREATE VIRTUAL TABLE grid USING rtree_i32(id, x0, x1);
    CREATE VIRTUAL TABLE page USING fts5(title, body); INSERT INTO page VALUES ('One', 'a b'), ('Two', 'c d');
    CREATE VIRTUAL TABLE terms USING fts5vocab(page, 'row');
    CREATE VIRTUAL TABLE old USING fts4(title); INSERT INTO old VALUES ('a b');
    CREATE VIEW far AS SELECT label FROM area WHERE x0 > 3;
    CREATE TABLE park_node (a); CREATE TABLE page_views (n);
"""


def test_virtual_tables_can_be_read(executor, tiny_db):
    connection = sqlite3.connect(tiny_db)
    connection.executescript(VIRTUAL)
    connection.close()
    for sql, rows in [
        ("SELECT label, x1 FROM area WHERE x0 <= 1 AND x1 >= 1", [("park", 2.0)]),
        ("SELECT a.label FROM area a JOIN area b ON a.id = b.id + 1", [("lake",)]),
        ("SELECT * FROM far", [("lake",)]),
        ("SELECT count(*) FROM grid", [(0,)]),
        ("SELECT title FROM page WHERE page MATCH 'd' ORDER BY rank", [("Two",)]),
        ("SELECT highlight(page, 1, '<', '>') FROM page('b')", [("a <b>",)]),
        ("SELECT term FROM terms ORDER BY term LIMIT 2", [("a",), ("b",)]),
        ("SELECT title FROM old WHERE old MATCH 'b'", [("a b",)]),
        ("SELECT sum(value) FROM json_each('[1, 2]')", [(3,)]),
    ]:
        for _ in range(2):
            execution = executor.run("music", sql)
            assert execution.rows == rows, (sql, execution.error)
    before = digest(tiny_db)
    for shadow in ("area_node", "page_data", "old_content"):
        for sql in (f"DELETE FROM {shadow}", f"WITH x AS (SELECT 1) DELETE FROM {shadow}"):
            assert executor.run("music", sql).status == "refused"
    assert digest(tiny_db) == before


def test_a_virtual_table_that_a_writer_locks_while_it_is_opened_is_read_later(tiny_db, monkeypatch):
    connection = sqlite3.connect(tiny_db)
    connection.executescript(VIRTUAL)
    connection.close()
    troubles = [sqlite3.OperationalError("database is locked")]
    troubles[0].sqlite_errorcode = sqlite3.SQLITE_BUSY

    class Locked(sqlite3.Connection):
        def execute(self, sql, *rest):
            if sql.startswith('SELECT 1 FROM "area"') and troubles:
                raise troubles.pop()
            return super().execute(sql, *rest)

    monkeypatch.setattr(os, "write", lambda file, data: None)
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Locked))
    runner = sql_exec._Runner(timeout=5.0, max_rows=10, memory_limit_mb=64)
    found = runner.answer(str(tiny_db), sql_exec.database_stamp(tiny_db), "SELECT label FROM area WHERE x0 > 3")
    assert found[0] == "ok" and found[3] == b'[["lake"]]' and not troubles


def test_a_virtual_table_of_an_unknown_kind_spoils_no_other(executor, tiny_db):
    connection = sqlite3.connect(tiny_db)
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("INSERT INTO sqlite_master VALUES ('table', 'geo', 'geo', 0, 'CREATE VIRTUAL TABLE geo USING far()')")
    connection.commit()
    connection.close()
    assert executor.run("music", "SELECT count(*) FROM singer").rows == [(3,)]
    assert executor.run("music", "SELECT * FROM geo").error == "no such module: far"
    assert [table.name for table in read_schema(tiny_db).tables] == ["singer", "concert"]


def test_shadow_tables_are_no_part_of_a_schema(tiny_db):
    connection = sqlite3.connect(tiny_db)
    connection.executescript(VIRTUAL)
    connection.close()
    columns = schema_columns(read_schema(tiny_db))
    assert columns == {"singer": columns["singer"], "concert": columns["concert"], "area": ["id", "x0", "x1", "label"],
                       "grid": ["id", "x0", "x1"], "page": ["title", "body"], "terms": ["term", "doc", "cnt"],
                       "old": ["title"], "far": ["label"], "park_node": ["a"], "page_views": ["n"]}


def test_shadow_tables_of_a_missing_module_are_known_by_their_names(tiny_db):
    connection = sqlite3.connect(tiny_db)
    connection.executescript(VIRTUAL + "CREATE TABLE page_info (a); CREATE TABLE pages_data (a);")
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("UPDATE sqlite_master SET sql = replace(replace(replace(replace(sql, 'fts5(', 'vec0('), 'fts4', 'vec1'),"
                       " 'rtree_i32', 'rtree_x'), 'rtree(', 'gone(') WHERE sql LIKE 'create virtual table%'")
    connection.commit()
    connection.close()
    assert list(schema_columns(read_schema(tiny_db))) == ["singer", "concert", "terms", "park_node", "page_views",
                                                            "pages_data"]


# PITFALLS part B --------------------------------------------------------------------------------------------

NOT_QUERIES = [
    "I am sorry, I cannot answer.", "", "   ", ";", "-- SELECT 1", "/* SELECT 1 */", "```sql\nSELECT 1\n```",
    "DROP TABLE singer", "SELECT 1; SELECT 2", "SELECT 1; DROP TABLE singer", "EXPLAIN SELECT 1",
    "PRAGMA table_info(singer)", "WITH x AS (SELECT 1) DELETE FROM singer", "SELECTED", "sql SELECT 1", "()",
    "(", "(SELECT 1); DELETE FROM singer", None,
]  # fmt: skip


@pytest.mark.parametrize("sql", NOT_QUERIES)
def test_b1_text_that_is_no_query_is_refused(executor, sql):
    execution = executor.run("music", sql)
    assert execution.status == "refused" and execution.error and not execution.rows


def test_b2_rows_are_tuples_and_keep_columns_of_equal_names(executor):
    join = "FROM singer a JOIN singer b USING (country)"
    two = executor.run("music", f"SELECT a.name, b.name {join}")
    one = executor.run("music", f"SELECT b.name {join}")
    assert two.columns == ["name", "name"]
    assert all(isinstance(row, tuple) and len(row) == 2 for row in two.rows)
    assert not bird_match(two.rows, one.rows)


def test_b4_a_gold_keeps_its_status_in_the_cache(tiny_db, tmp_path):
    golds = [("music", sql) for sql in ("SELECT name FROM singer WHERE age > 99", "SELECT nowhere", ENDLESS)]
    for _ in range(2):  # the second time from disk
        with SQLExecutor({"music": tiny_db}, timeout=0.3, cache=tmp_path / "cache") as executor:
            empty, error, timeout = executor.run_gold(golds)
        assert [empty.status, error.status, timeout.status] == ["ok", "error", "timeout"]
        assert empty.rows == [] and error.error == "no such column: nowhere" and timeout.error


def test_b5_b11_a_failing_gold_fails_alone(executor):
    sqls = ["SELECT 1", "SELECT nowhere", "SELECT 2", "DROP TABLE singer", "SELECT 3"]
    statuses = [result.status for result in executor.run_many([("music", sql) for sql in sqls])]
    assert statuses == ["ok", "error", "ok", "refused", "ok"]


def test_b6_the_row_cap_holds_while_fetching(tiny_db):
    count = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c{}) SELECT x FROM c"
    with SQLExecutor({"music": tiny_db}, max_rows=100) as executor:
        exact = executor.run("music", count.format(" LIMIT 100"))
        over = executor.run("music", count.format(" LIMIT 101"))
        endless = executor.run("music", count.format(""))
    assert (exact.status, len(exact.rows)) == ("ok", 100)
    assert (over.status, over.rows) == (endless.status, endless.rows) == ("too_large", [])
    assert endless.seconds < 5


def test_b6_bytes_and_memory_are_capped(tiny_db):
    with SQLExecutor({"music": tiny_db}, workers=1, memory_limit_mb=64) as executor:
        few_rows = executor.run("music", "SELECT printf('%.*c', 1500000, 'x') FROM singer")
        numbers = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 90)"
        hoard = executor.run("music", f"{numbers} SELECT randomblob(1900000) AS b FROM c ORDER BY b")
        assert [few_rows.status, hoard.status] == ["too_large", "too_large"]
        assert executor.run("music", "SELECT count(*) FROM singer").rows == [(3,)]


@pytest.mark.parametrize(("sql", "restarts"), [(ENDLESS, 0), (STUCK, 1)])
def test_b7_the_deadline_is_kept_and_the_next_query_served(hasty, sql, restarts):
    hasty.run("music", "SELECT 1")
    start = time.monotonic()
    execution = hasty.run("music", sql)
    assert execution.status == "timeout" and execution.rows == []
    assert 0.3 <= time.monotonic() - start < 1.3
    assert hasty.worker_restarts == restarts
    assert hasty.run("music", "SELECT 1").rows == [(1,)]


def test_b8_nothing_changes_the_file(executor, tiny_db):
    before = digest(tiny_db)
    for sql in ("DELETE FROM singer", "WITH x AS (SELECT 1) UPDATE singer SET age = 0", "VACUUM", "REINDEX"):
        assert executor.run("music", sql).status == "refused"
    assert digest(tiny_db) == before


def test_b9_settings_are_sqlites_defaults(executor, tmp_path):
    sql = "SELECT 'A' LIKE 'a', \"no such column\", 7 / 2, 'a' = 'A', (SELECT group_concat(name) FROM singer)"
    assert executor.run("music", sql).rows == [(1, "no such column", 3, 0, "Ana,Bo,Cy")]


def test_b12_invalid_utf8_is_replaced_not_raised(executor):
    bad = executor.run("music", "SELECT CAST(x'61ff62' AS TEXT), CAST(x'eda080' AS TEXT)")
    assert bad.rows == [("a\ufffdb", "\ufffd\ufffd\ufffd")]
    assert executor.run("music", 'SELECT 1 AS "\u00e9"').columns == ["é"]


# Gold cache -------------------------------------------------------------------------------------------------


def test_gold_results_come_from_the_cache_until_content_or_limits_change(tiny_db, tmp_path):
    cache = tmp_path / "cache"
    golds = [("music", "SELECT name, x'00', 1e999 FROM singer"), ("music", "SELECT 1")]

    def gold(timeout=5.0):
        with SQLExecutor({"music": tiny_db}, timeout=timeout, cache=cache) as executor:
            results = executor.run_gold(golds + golds)
            return results[:2], len(executor._workers)

    first, started = gold()
    assert started > 0 and first == gold()[0] and gold()[1] == 0
    assert isinstance(gold()[0][0].rows[0], tuple)
    assert gold(timeout=4.0)[1] > 0  # other limits
    sqlite3.connect(tiny_db).executescript("DELETE FROM singer WHERE name = 'Bo'")
    changed, started = gold()
    assert started > 0 and len(changed[0].rows) == 2 and changed[1].rows == [(1,)]
    assert not list(cache.rglob("*.tmp"))


VOLATILE = [
    "SELECT random()", "SELECT name FROM singer ORDER BY RANDOM() LIMIT 1", "SELECT hex(randomblob(4))",
    "SELECT CURRENT_TIMESTAMP", "SELECT current_date", "SELECT 1 WHERE current_time > ''", "SELECT date()",
    "SELECT date('now')", "SELECT DATETIME('NOW', '-1 day')", "SELECT time('n' || 'ow')", "SELECT julianday()",
    "SELECT strftime('%Y', 'now') - age FROM singer", "SELECT strftime('%s')",
    *["SELECT unixepoch()"] * (sqlite3.sqlite_version_info >= (3, 38)),
    "WITH x AS (SELECT * FROM recent) SELECT count(*) FROM x", "SELECT date(d) FROM diary",
    "SELECT 1 LIMIT abs(random()) % 3", "SELECT abs(-9223372036854775808 + 0 * random())",
    "SELECT datetime(0, 'unixepoch', 'localtime')",
    "SELECT count(*) FROM concert WHERE year < (SELECT max(y) FROM (SELECT strftime('%Y') AS y))",
]  # fmt: skip


@pytest.mark.parametrize("sql", VOLATILE)
def test_results_that_depend_on_time_or_chance_are_not_kept(tiny_db, tmp_path, sql):
    connection = sqlite3.connect(tiny_db)
    connection.executescript("CREATE VIEW recent AS SELECT * FROM concert WHERE year > strftime('%Y', 'now') - 9;"
                             "CREATE TABLE diary (d TEXT); INSERT INTO diary VALUES ('now');")
    connection.close()
    with SQLExecutor({"music": tiny_db}, workers=1, cache=tmp_path / "cache") as executor:
        constant, changing = executor.run_gold([("music", "SELECT 'random()', 'now', 7 AS random"), ("music", sql)])
    assert changing.volatile and not constant.volatile and changing.status in ("ok", "error")
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1


@pytest.mark.parametrize("match", sql_exec.MATCHES.values(), ids=sql_exec.MATCHES)
def test_a_gold_of_chance_agrees_with_itself_and_is_drawn_anew(tiny_db, tmp_path, match):
    sqls = ["SELECT random()", "SELECT DISTINCT name FROM singer ORDER BY random()", "SELECT CURRENT_TIMESTAMP", "SELECT 1"]
    drawn = []
    for _ in range(2):
        with SQLExecutor({"music": tiny_db}, cache=tmp_path / "cache") as executor:
            results = sql_exec.Results(executor, [("music", sql, (sql,)) for sql in sqls], [match])
        assert all(results.is_right("music", sql, (sql,), match) for sql in sqls)
        drawn.append(results.gold("music", sqls[0]).rows)
    assert drawn[0] != drawn[1]


class Busy(SQLExecutor):
    """An executor on whose database a writer commits as often as it is told to, each time before golds run."""
    commits = 0

    def run_gold(self, pairs):
        if self.commits:
            self.commits -= 1
            writer = sqlite3.connect(self.databases["music"], isolation_level=None)
            writer.execute("INSERT INTO singer (name) VALUES ('Di')")
            writer.close()
        return super().run_gold(pairs)


@pytest.mark.parametrize("commits, status, right", [(0, "ok", True), (1, "ok", True), (2, "ok", True),
                                                    (9, "unavailable", False)])
def test_a_writer_that_commits_before_the_gold_makes_no_right_answer_wrong(tiny_db, tmp_path, commits, status, right):
    match, gold = sql_exec.MATCHES["bird"], "SELECT count(*) FROM singer"
    asked = [("music", "SELECT count(name) FROM singer", (gold,)), ("music", "SELECT min(age) FROM singer", (gold,))]
    with Busy({"music": tiny_db}, workers=1, cache=tmp_path / "cache") as executor:
        executor.commits = commits
        results = sql_exec.Results(executor, asked, [match])
        assert results.predicted(*asked[0][:2]).status == status
        assert (results.unread(*asked[0], match) is None) == right == results.is_right(*asked[0], match)
        assert not results.unread(*asked[1], match) and not results.is_right(*asked[1], match)  # its rows stay the same


def test_results_that_an_older_form_of_the_cache_froze_are_not_believed(tiny_db, tmp_path, monkeypatch):
    with SQLExecutor({"music": tiny_db}, cache=tmp_path) as executor:
        new = executor._cache_file("music", "SELECT 1")
        monkeypatch.setattr(sql_exec, "CACHE_FORM", "1")
        assert new != executor._cache_file("music", "SELECT 1")


def test_a_result_is_not_kept_for_a_database_that_changed_meanwhile(tiny_db, tmp_path, monkeypatch):
    run_many, gold = SQLExecutor.run_many, ("music", "SELECT count(*) FROM singer")

    def late(executor, pairs):  # a writer comes between the look at the file and the query
        sqlite3.connect(tiny_db).executescript("INSERT INTO singer (name) VALUES ('Di')")
        return run_many(executor, pairs)

    with SQLExecutor({"music": tiny_db}, cache=tmp_path / "cache") as executor:
        monkeypatch.setattr(SQLExecutor, "run_many", late)
        assert executor.run_gold([gold])[0].rows == [(4,)]
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_damaged_and_stale_cache_entries_are_run_again(tiny_db, tmp_path):
    with SQLExecutor({"music": tiny_db}, timeout=0.2, cache=tmp_path / "cache") as executor:
        good = executor.run_gold([("music", "SELECT 1")])
        (file,) = (tmp_path / "cache").rglob("*.json")
        for damage in (b"", b"{", b"[]", b'["ok"', b"\xff\xfe", b"[1,2,3,4,5,6,7,8]"):
            file.write_bytes(damage)
            assert executor.run_gold([("music", "SELECT 1")])[0].rows == good[0].rows
        executor.run_gold([("music", ENDLESS)])
        (timeout,) = (f for f in (tmp_path / "cache").rglob("*.json") if f != file)
        kept = timeout.read_bytes()
        os.utime(timeout, (0, 0))  # older than a day
        assert executor.run_gold([("music", ENDLESS)])[0].status == "timeout"
        assert timeout.stat().st_mtime > 0 and json.loads(kept)[0] == "timeout"


def test_a_cache_that_cannot_be_written_is_done_without(tiny_db, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/sub"):
        with SQLExecutor({"music": tiny_db}, workers=1, cache=tmp_path / place) as executor:
            assert executor.run_gold([("music", "SELECT 1")])[0].rows == [(1,)]

    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with SQLExecutor({"music": tiny_db}, workers=1, cache=tmp_path / "cache") as executor:
        assert executor.run_gold([("music", "SELECT 1")])[0].rows == [(1,)]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_passing_troubles_are_not_cached(tiny_db, tmp_path):
    with SQLExecutor({"music": tiny_db}, timeout=0.3, cache=tmp_path / "cache") as executor:
        writer = sqlite3.connect(tiny_db, isolation_level=None)
        gold = ("music", "SELECT count(*) FROM singer")
        executor._cache_file(*gold)  # hash the file first: closing it would drop this process's own lock
        writer.execute("BEGIN EXCLUSIVE")
        assert executor.run_gold([gold, ("unknown", "SELECT 1")])[0].status == "unavailable"
        writer.close()
        assert executor.run_gold([gold])[0].rows == [(3,)]


# Life and death of the workers ------------------------------------------------------------------------------


def test_two_workers_under_twenty_hung_queries_answer_the_good_ones(tiny_db):
    hung = [("music", f"{STUCK} OR {i}") for i in range(10)]
    hung += [("music", f"{ENDLESS} LIMIT {i + 1}") for i in range(10)]
    good = [("music", f"SELECT {i}") for i in range(40)]
    with SQLExecutor({"music": tiny_db}, workers=2, timeout=0.2) as executor:
        pairs = [pair for i in range(40) for pair in (*hung[i : i + 1], good[i])]
        results = dict(zip(pairs, executor.run_many(pairs), strict=True))
        assert {results[pair].status for pair in hung} == {"timeout"}
        assert [results[pair].rows for pair in good] == [[(i,)] for i in range(40)]
        assert executor.worker_restarts == 10


def test_restarts_leak_neither_processes_nor_file_descriptors_nor_threads(tiny_db):
    with SQLExecutor({"music": tiny_db}, workers=1) as executor:
        executor.run("music", "SELECT 1")
        files, threads, pids = os.listdir("/proc/self/fd"), threading.active_count(), []
        for i in range(40):  # bench/sql.py does a thousand
            pids.append(executor._workers[0].process.pid)
            os.kill(pids[-1], signal.SIGKILL)
            wait_until(lambda: not is_alive(pids[-1]))
            assert executor.run("music", f"SELECT {i}").rows == [(i,)]
        assert executor.worker_restarts == 40
        assert len(os.listdir("/proc/self/fd")) == len(files) and threading.active_count() == threads
        pids.append(executor._workers[0].process.pid)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert len(os.listdir("/proc/self/fd")) == len(files) - 2
    with pytest.raises(RuntimeError, match="closed"):
        executor.run("music", "SELECT 1")


def test_a_worker_found_dying_costs_no_query_its_answer(tiny_db):
    """Killed a moment before, a worker still takes what is written to it: nothing has run, so it is no verdict."""
    with SQLExecutor({"music": tiny_db}, workers=1) as executor:
        executor.run("music", "SELECT 1")
        for i in range(20):
            os.kill(executor._workers[0].process.pid, signal.SIGKILL)  # not waited for
            assert executor.run("music", f"SELECT {i}").rows == [(i,)]


def test_a_worker_that_dies_costs_its_query_only(hasty):
    def murder():
        wait_until(lambda: any(worker.sent for worker in hasty._workers))
        time.sleep(2 * sql_exec.GRACE)
        os.kill(next(worker for worker in hasty._workers if worker.sent).process.pid, signal.SIGSEGV)

    hasty.settings["timeout"] = 3.0
    killer = threading.Thread(target=murder)
    killer.start()
    results = hasty.run_many([("music", STUCK)] + [("music", f"SELECT {i}") for i in range(9)])
    killer.join()
    assert (results[0].status, results[0].error) == ("error", sql_exec.WORKER_DIED)
    assert [result.rows for result in results[1:]] == [[(i,)] for i in range(9)]


@pytest.mark.parametrize("by, status", [(signal.SIGKILL, "unavailable"), (signal.SIGSEGV, "error")])
def test_a_query_whose_workers_the_system_kills_has_no_verdict(hasty, by, status):
    """One that crashes its workers has."""
    def murder():
        for pid in iter(lambda: next((w.process.pid for w in hasty._workers if w.ready and w.sent), None), "end"):
            if pid and pid not in killed:
                killed.append(pid)
                os.kill(pid, by)
            if stop.wait(0.02):
                return

    hasty.settings["timeout"], hasty.worker_count, killed, stop = 5.0, 1, [], threading.Event()
    killer = threading.Thread(target=murder)
    killer.start()
    execution = hasty.run("music", STUCK)
    stop.set()
    killer.join()
    assert execution.status == status and len(killed) == {"unavailable": sql_exec.KILLINGS, "error": 2}[status]
    assert hasty.run(*COUNT).rows == [(3,)]


BABBLE = [
    b"\xff" * 9, b"\0\0\0\2{}", b"\0\0\0\1[", b"\0\0\0\7[1,2,3]", b"\0\0\0\4null", b"\0\0\0\2[]" * 9,
    b"\0\0\0\x1c" + b'[0,0,"ok",null,0,0,[],[1,2]]', b"\0\0\0\x19" + b'[0,0,"fine",null,0,0,0,0]', b"", b"\0",
    b"\0\0\x27\x10" + b"[" * 10_000, b"\0\0\x27\x10" + b"9" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("babble", BABBLE)
def test_a_worker_that_talks_nonsense_is_replaced(tiny_db, monkeypatch, babble):
    talk = f"import os, time; os.write(1, b'\\0\\0\\0\\2[]' + {babble!r}); time.sleep(9)"
    with SQLExecutor({"music": tiny_db}, workers=1, timeout=0.2) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(sql_exec, "_WORKER_CODE", talk)
            assert executor.run("music", "SELECT 1").status in ("error", "timeout")
        assert executor.run("music", "SELECT 1").rows == [(1,)]


def test_a_worker_killed_while_it_starts_costs_no_query(tiny_db, monkeypatch):
    start, killed = sql_exec._Worker.__init__, []

    def dying(worker, settings):
        start(worker, settings)
        if len(killed) < 2:
            killed.append(worker.process.pid)
            worker.process.kill()

    monkeypatch.setattr(sql_exec._Worker, "__init__", dying)
    with SQLExecutor({"music": tiny_db}, workers=1) as executor:
        assert executor.run("music", "SELECT 1").rows == [(1,)]
        assert executor.worker_restarts == len(killed) == 2


def test_a_worker_that_cannot_start_is_a_clear_failure(tiny_db, monkeypatch):
    monkeypatch.setattr(sql_exec, "_WORKER_CODE", "raise SystemExit(3)")
    with SQLExecutor({"music": tiny_db}) as executor, pytest.raises(RuntimeError, match="failed to start"):
        executor.run("music", "SELECT 1")


def test_where_the_system_kills_all_workers_as_they_start_there_is_no_verdict(tiny_db, monkeypatch):
    start = sql_exec._Worker.__init__

    def dying(worker, settings):
        start(worker, settings)
        worker.process.kill()

    with SQLExecutor({"music": tiny_db}, workers=2) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(sql_exec._Worker, "__init__", dying)
            found = executor.run_many([("music", f"SELECT {i}") for i in range(40)])
        assert {(one.status, one.error) for one in found} == {
            ("unavailable", "the system killed 3 SQL workers as they started: free some memory")}
        assert executor.run("music", "SELECT 1").rows == [(1,)]


PARENT = """
import sys, threading, time
sys.path.insert(0, {root!r})
from sql_exec import SQLExecutor
executor = SQLExecutor({{"music": {db!r}}}, workers=2, timeout=60)
def tell():
    while not all(w.ready for w in executor._workers) or len(executor._workers) < 2:
        time.sleep(0.01)
    print(*[w.process.pid for w in executor._workers], flush=True)
threading.Thread(target=tell).start()
executor.run_many([("music", {stuck!r}), ("music", {stuck!r} + " OR 1")])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_die_with_their_parent_even_when_stuck(tiny_db, how):
    code = PARENT.format(root=str(Path(sql_exec.__file__).parent), db=str(tiny_db), stuck=STUCK)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, start_new_session=True)  # fmt: skip
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_alive, pids))
    os.killpg(parent.pid, how)  # as a terminal does on Ctrl-C: the whole foreground group
    _, errors = parent.communicate(timeout=60)
    assert wait_until(lambda: not any(map(is_alive, pids)))
    assert errors.count("KeyboardInterrupt") == (how == signal.SIGINT), errors  # of the parent only


def test_the_module_imports_the_standard_library_only():
    code = "import sys, sql_exec; print({'torch', 'numpy', 'sqlparse', 'tqdm'} & set(sys.modules))"
    root = Path(sql_exec.__file__).parent
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "set()"


def test_execution_is_frozen():
    with pytest.raises(AttributeError):
        Execution("ok").status = "error"


def test_what_is_cached_can_be_read_by_others(tiny_db, tmp_path):
    """It gets the mode of the umask, as any file does."""
    with SQLExecutor({"music": tiny_db}, workers=1, cache=tmp_path / "cache") as executor:
        executor.run_gold([("music", "SELECT name FROM singer")])
    plain = tmp_path / "plain"
    plain.write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert modes == {plain.stat().st_mode}
