"""A hostile corpus: whatever a model writes, files stay as they are, the verdict comes in time, the worker
keeps its memory limit, and the next query is served."""

import hashlib
import os
import random
import resource
import sqlite3
import time
from pathlib import Path

import pytest

from sql_exec import MAX_SQL_CHARS, STATUSES, SQLExecutor

TIMEOUT, MEMORY_MB = 0.3, 128
COUNT = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
LONG = "printf('%.*c', 3900000, 'a')"  # nearly the longest text there may be


def tower(step, height):
    """Common table expressions one on top of the other."""
    tables = ["t", *(f"c{i}" for i in range(height))]
    steps = (f"{above} AS ({step.format(below)})" for below, above in zip(tables, tables[1:], strict=False))
    return f"WITH {', '.join(steps)} SELECT count(*) FROM {tables[-1]}"


# Every list: statements that must all end in one of the statuses named.
WRITES = r"""
INSERT INTO t VALUES (1, 'x')
INSERT OR REPLACE INTO t SELECT * FROM t
REPLACE INTO t VALUES (1, 'x')
UPDATE t SET b = 'x'
DELETE FROM t
DROP TABLE t
DROP VIEW v
DROP INDEX IF EXISTS i
DROP TRIGGER trap
TRUNCATE TABLE t
ALTER TABLE t RENAME TO pwned
ALTER TABLE t ADD COLUMN pwned
CREATE TABLE pwned (x)
CREATE TABLE pwned AS SELECT * FROM t
CREATE TEMP TABLE pwned AS SELECT 1
CREATE INDEX pwned ON t (b)
CREATE VIEW pwned AS SELECT 1
CREATE TRIGGER pwned AFTER INSERT ON t BEGIN DELETE FROM t; END
CREATE VIRTUAL TABLE pwned USING fts5(x)
CREATE VIRTUAL TABLE temp.pwned USING rtree(id, a, b)
WITH x AS (SELECT 1) INSERT INTO t SELECT *, 'x' FROM x
WITH x AS (SELECT 1) UPDATE t SET b = 'x'
WITH x AS (SELECT 1) DELETE FROM t RETURNING *
WITH x AS (SELECT 1) REPLACE INTO t VALUES (1, 'x')
WITH x AS (SELECT 1) UPDATE sqlite_master SET sql = 'x'
WITH x AS (SELECT 1) DELETE FROM sqlite_schema
WITH x AS (SELECT 1) INSERT INTO v VALUES (1)
WITH x AS (SELECT 1) UPDATE sqlite_sequence SET seq = 0
-- SELECT\nDELETE FROM t
/* SELECT */ DELETE FROM t
((DELETE FROM t))
SELECT 1; DELETE FROM t
SELECT 1;; SELECT 2
(SELECT 1); DROP TABLE t
SELECT 1; -- two\nDROP TABLE t
;SELECT 1
VACUUM
VACUUM INTO 'pwned.sqlite'
REINDEX
ANALYZE
ATTACH 'pwned.sqlite' AS a
ATTACH DATABASE ':memory:' AS a
SELECT 1; ATTACH 'pwned.sqlite' AS a; CREATE TABLE a.pwned (x)
DETACH DATABASE main
BEGIN EXCLUSIVE
BEGIN IMMEDIATE
COMMIT
ROLLBACK
END
SAVEPOINT s
RELEASE s
PRAGMA writable_schema = ON
PRAGMA query_only = OFF
PRAGMA journal_mode = DELETE
PRAGMA user_version = 7
PRAGMA case_sensitive_like = ON
PRAGMA temp_store_directory = '/'
PRAGMA trusted_schema = ON
PRAGMA hard_heap_limit = 0
PRAGMA wal_checkpoint(TRUNCATE)
WITH x AS (SELECT 1) DELETE FROM area_node
WITH x AS (SELECT 1) INSERT INTO area VALUES (2, 0, 1)
WITH x AS (SELECT 1) UPDATE page_data SET block = x'00'
WITH x AS (SELECT 1) INSERT INTO page (page) VALUES ('optimize')
EXPLAIN DELETE FROM t
EXPLAIN QUERY PLAN SELECT 1
.shell touch pwned
.read /etc/passwd
SELECT load_extension('libm.so.6')
SELECT load_extension('pwned', 'init')
SELECT fts3_tokenizer('simple')
SELECT fts3_tokenizer('simple', x'4141414141414141')
SELECT hex(fts3_tokenizer('porter')) FROM t
SELECT * FROM pragma_table_info('t')
SELECT * FROM pragma_database_list
"""
FAILING = r"""
SELECT writefile('pwned', 'x')
SELECT readfile('/etc/passwd')
SELECT edit('x', 'touch pwned')
SELECT * FROM evil
SELECT * FROM pragma_journal_mode('wal')
SELECT * FROM t WHERE a IN (SELECT user_version FROM pragma_user_version(5))
SELECT * FROM zipfile('pwned.zip')
SELECT sqlite_attach('pwned', 'a')
SELECT sqlite_rename_column(1, 2, 3, 4, 5, 6, 7, 8, 9)
SELECT * INTO pwned FROM t
SELECT 'never closed
SELECT "never closed
SELECT [never closed
SELECT 1 FROM t WHERE
SELECT ?, :name, @name, $name
SELECT abs(-9223372036854775808)
SELECT sum(9223372036854775807) FROM t
SELECT a FROM t ORDER BY 99
SELECT fts5(x'00')
SELECT * FROM (SELECT * FROM (SELECT
SELECT x'0'
SELECT 1 UNION SELECT 1, 2
SELECT json_extract('{', '$')
"""
HARMLESS = r"""
SELECT '; DROP TABLE t'
SELECT 1 /* DROP TABLE t
SELECT * FROM v LIMIT 3
SELECT 9223372036854775808, -9223372036854775809, 1e999, -1e999, 1e999 - 1e999, 0x7fffffffffffffff
SELECT b FROM broken
SELECT quote(b), hex(b), length(b) FROM broken
SELECT CAST(x'ff00fe' AS TEXT), char(0), char(55296), x'00'
SELECT 1 AS "a\nb", 2 AS "a\nb", 3 AS "", 4 AS "'"
SELECT sqlite_version(), sqlite_source_id()
SELECT 'a' || char(0) || 'b'
SELECT name, sql FROM sqlite_master
SELECT * FROM json_each('[1, null, "x"]')
SELECT area.*, page.* FROM area, page WHERE page MATCH 'b' AND x0 < 1
SELECT * FROM area_node, page_data
SELECT CASE WHEN 1 THEN 2 END, 1 IS NOT DISTINCT FROM 1, NOT NULL
"""
ENDLESS = [
    f"{COUNT} SELECT max(x) FROM c",
    f"{COUNT} SELECT x FROM c WHERE x < 0",
    f"{COUNT} SELECT count(*) FROM c, c AS d",
    "WITH RECURSIVE c(x) AS (VALUES (1) UNION ALL SELECT 1 FROM c LIMIT 1 OFFSET 1000000000) SELECT * FROM c",
    "SELECT count(*) FROM big a, big b, big c, big d",
    "SELECT * FROM big a JOIN big b ON a.x <> b.x JOIN big c ON b.x < c.x WHERE a.x + b.x + c.x < 0",
    "SELECT count(*) FROM big a WHERE (SELECT count(*) FROM big b, big c WHERE b.x > a.x) < 0",
    f"SELECT instr({LONG}, substr({LONG}, 1, 2000000) || 'b')",
    f"SELECT replace({LONG}, substr({LONG}, 1, 1900000) || 'b', 'c')",
    "SELECT sum(a.x * b.x + c.x) FROM big a, big b, big c WHERE printf('%.*f', 1000, a.x) > 0",
]
LARGE = [
    f"{COUNT} SELECT * FROM c",
    "SELECT a.x FROM big a, big b",
    f"SELECT {LONG} FROM big LIMIT 9",
    "SELECT randomblob(1000000000)",
    "SELECT zeroblob(1000000000)",
    "SELECT zeroblob(3000000)",
    "SELECT hex(zeroblob(3000000))",
    "SELECT printf('%.*c', 1000000000, 'a')",
    f"SELECT replace({LONG}, 'a', {LONG})",
    f"SELECT {LONG} || {LONG}",
    f"SELECT group_concat({LONG}) FROM big",
    f"{COUNT} SELECT group_concat(x, {LONG}) FROM c",
    f"{COUNT} SELECT randomblob(1000000) FROM (SELECT x FROM c LIMIT 500) ORDER BY 1",
    f"{COUNT} SELECT x, randomblob(3000000) AS r FROM c ORDER BY r",
    f"{COUNT} SELECT json_group_array(zeroblob(2000000) || x) FROM c",
    f"{COUNT} SELECT DISTINCT randomblob(100000) FROM c LIMIT 1 OFFSET 100000",
    'WITH t AS (SELECT 1 AS "' + "n" * 50_000 + '") SELECT ' + ", ".join(["t.*"] * 1900) + " FROM t",
]
ANY = [
    f"SELECT {LONG} LIKE '{'%a' * 2000}%b'",
    f"SELECT {LONG} GLOB '{'*a' * 2000}*b'",
    f"SELECT {LONG} LIKE '%{'_' * 4000}b'",
    f"SELECT {LONG} GLOB '*{'[^b]' * 1000}b'",
    f"SELECT sum(x || {LONG} LIKE '%{'a_' * 2000}b') FROM big",
    "SELECT printf('%1000000000d', 1), printf('%.*f', 1000000000, 1.0)",
    "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "(" * 9000 + "SELECT 1" + ")" * 9000,
    "(" * 90_000,
    "SELECT " + "(SELECT " * 3000 + "1" + ")" * 3000,
    "SELECT " + "CASE WHEN 1 THEN " * 3000 + "1" + " END" * 3000,
    "SELECT " + "abs(" * 3000 + "1" + ")" * 3000,
    "SELECT " + "NOT " * 20_000 + "1",
    "SELECT " + "-" * 20_000 + "1",
    "SELECT 1" + " + 1" * 20_000,
    "SELECT 1" + " UNION ALL SELECT 1" * 4000,
    "SELECT 1" + " UNION SELECT 1" * 400,
    "VALUES (1)" + ", (1)" * 15_000,
    "SELECT " + ", ".join(["1"] * 30_000),
    "SELECT 1 IN (" + ", ".join(map(str, range(15_000))) + ")",
    "SELECT max(" + ", ".join(["1"] * 200) + ")",
    "SELECT * FROM " + ", ".join(f"t AS t{i}" for i in range(70)),
    "SELECT " + ", ".join(["*"] * 3000) + " FROM t",
    tower("SELECT * FROM {0}", 900),
    tower("SELECT a.* FROM {0} a, {0} b", 40),
    tower("SELECT * FROM {0} UNION ALL SELECT * FROM {0}", 40),
    "SELECT '" + "x" * (MAX_SQL_CHARS - 20) + "'",
    "/*" * 40_000 + " SELECT 1",
    "SELECT 1 " + "-" * 90_000,
    "SELECT '" + "''" * 40_000,
    f"SELECT {LONG} REGEXP 'a*b'",
    "SELECT json_extract('" + "[" * 40_000 + "', '$')",
    "SELECT strftime('%Y', '9999999-99-99', '+1e308 days'), date(1e308), julianday('now', '+9e99 years')",
]  # fmt: skip
REFUSED = [
    "SELECT 1\0", "\0SELECT 1", "SELECT '\0'", "SELECT '\ud800'", "\udfff", "SELECT 1 -- \ude00",
    "SELECT '" + "x" * 1_000_000 + "'", "x" * 1_000_000, "(" * 1_000_000, " " * 99_999, "-- " * 30_000,
]  # fmt: skip


def lines(text):
    return [line.replace("\\n", "\n") for line in text.strip().splitlines()]


CORPUS = [
    *((sql, {"refused"}) for sql in lines(WRITES) + REFUSED),
    *((sql, {"error", "refused"}) for sql in lines(FAILING)),
    *((sql, {"ok"}) for sql in lines(HARMLESS)),
    *((sql, {"timeout"}) for sql in ENDLESS),
    *((sql, {"too_large", "timeout"}) for sql in LARGE),  # a slow machine may not get as far as the limit
    *((sql, set(STATUSES)) for sql in ANY),
]


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    """A folder with a database that has all a hostile query could wish for; also the working directory."""
    folder = tmp_path_factory.mktemp("arena")
    connection = sqlite3.connect(folder / "arena.sqlite")
    connection.create_function("writefile", 2, lambda *_: 0)
    connection.executescript("""
        CREATE TABLE t (a INTEGER PRIMARY KEY AUTOINCREMENT, b TEXT);
        INSERT INTO t (b) VALUES ('one'), ('two'), ('three');
        CREATE VIEW v AS SELECT a, b FROM t;
        CREATE VIEW evil AS SELECT writefile('pwned', 'x') FROM t;
        CREATE TRIGGER trap INSTEAD OF INSERT ON v BEGIN DELETE FROM t; END;
        CREATE TRIGGER trap2 AFTER UPDATE ON t BEGIN SELECT writefile('pwned', 'x'); END;
        CREATE TABLE broken (b TEXT);
        INSERT INTO broken VALUES (CAST(x'61ff' AS TEXT)), (CAST(x'eda080' AS TEXT)), (x'00'), ('');
        INSERT INTO broken VALUES (1e999), (-1e999), (NULL), ('a' || char(0)), (4.9e-324);
        CREATE VIRTUAL TABLE area USING rtree(id, x0, x1);
        CREATE VIRTUAL TABLE page USING fts5(body);
        INSERT INTO area VALUES (1, 0, 1);
        INSERT INTO page VALUES ('a b');
        CREATE TABLE big (x INTEGER);
        WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 20000)
        INSERT INTO big SELECT x FROM c;
    """)
    connection.close()
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def executor(arena):
    path = arena / "arena.sqlite"
    with SQLExecutor({"arena": path}, workers=1, timeout=TIMEOUT, memory_limit_mb=MEMORY_MB) as executor:
        yield executor


def snapshot(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def peak_address_space(pid):
    """Bytes of address space a process has had at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmPeak:")[1].split()[0])


def test_the_corpus_is_large_enough():
    assert len({sql for sql, _ in CORPUS}) == len(CORPUS) >= 80


@pytest.mark.parametrize("number", range(len(CORPUS)), ids=lambda i: f"{i}-{ascii(CORPUS[i][0][:40])}")
def test_hostile_statement(arena, executor, number):
    sql, statuses = CORPUS[number]
    probe = ("arena", "SELECT count(*), max(b) FROM t")
    assert executor.run(*probe).rows == [(3, "two")]  # now a worker is up, and only the statement is timed
    pid, files = executor._workers[0].process.pid, snapshot(arena)
    start = time.monotonic()
    execution = executor.run("arena", sql)
    assert time.monotonic() - start < TIMEOUT + 5
    assert execution.status in statuses, execution.error
    assert (execution.error is None) == (execution.status == "ok")
    assert execution.status == "ok" or execution.rows == []
    if executor._workers and executor._workers[0].process.pid == pid:
        soft, hard = resource.prlimit(pid, resource.RLIMIT_AS)
        assert peak_address_space(pid) <= soft == hard
        assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)
    assert snapshot(arena) == files
    assert executor.run(*probe).rows == [(3, "two")]


def test_the_memory_limit_is_relative_to_the_worker_at_rest(executor):
    executor.run("arena", "SELECT 1")
    pid = executor._workers[0].process.pid
    limit = resource.prlimit(pid, resource.RLIMIT_AS)[0] - MEMORY_MB * 2**20
    assert 0 < limit < 2**29  # what the interpreter itself takes


ODD = [*"'\"();%,[`{?*-\0\ud800\ufeff\n\\é", "--", "/*", "*/", "0x", "1e9", "NULL", ":a", "t.", "9" * 30,
       " UNION ALL ", " FROM t ", " SELECT ", "DISTINCT "]  # fmt: skip
GOOD = [
    "SELECT a, count(*) FROM t GROUP BY a HAVING a > 1 ORDER BY b DESC LIMIT 2",
    "SELECT t.*, x FROM t, big WHERE x = a",
    "SELECT b FROM t WHERE a IN (SELECT x FROM big WHERE x BETWEEN 1 AND 3) OR b LIKE '%o%'",
    "WITH c(x) AS (VALUES (1), (2)) SELECT sum(x) OVER (PARTITION BY x % 2) FROM c",
    "SELECT CASE WHEN a > 1 THEN b ELSE 'none' END, round(a / 3.0, 2) FROM t EXCEPT SELECT 'x', 1",
]


def mutate(dice, seeds):
    """A statement made of others: spans cut, moved, replaced by spans of another one or by odd characters."""
    text = dice.choice(seeds)
    for _ in range(dice.randint(1, 3)):
        i = dice.randint(0, len(text))
        j = min(len(text), i + dice.randint(0, 12))
        other, odd = dice.choice(seeds), dice.choice(ODD)
        k = dice.randint(0, len(other))
        start, middle, end = text[:i], text[i:j], text[j:]
        text = dice.choice([
            start + end, middle + start + end, start + odd + end, start + odd + middle + end,
            start + other[k:], other[:k] + end, start + other[k : k + 12] + end,
        ])  # fmt: skip
    return text


def test_ten_thousand_mutated_statements(arena):
    dice = random.Random(0)
    seeds = lines(WRITES) + lines(FAILING) + 3 * lines(HARMLESS) + 20 * GOOD
    statements = [mutate(dice, seeds) for _ in range(10_000)]
    files = snapshot(arena)
    database = {"arena": arena / "arena.sqlite"}
    with SQLExecutor(database, timeout=TIMEOUT, memory_limit_mb=MEMORY_MB) as executor:
        executions = executor.run_many([("arena", sql) for sql in statements])
    assert len(executions) == 10_000 and {execution.status for execution in executions} <= set(STATUSES)
    counts = {status: sum(execution.status == status for execution in executions) for status in STATUSES}
    assert min(counts["ok"], counts["error"], counts["refused"]) > 100, counts  # the mutants reach every part
    assert snapshot(arena) == files
