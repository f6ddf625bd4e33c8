"""Measure the SQL executor on Spider dev, everything side by side in one run:

    python bench/sql.py [--data-dir ../shared/data] [--restarts 1000]

(1) the 1034 golds: plain in-process sqlite3 against the isolated workers;
(2) 1034 predictions scored end to end: the executor against a fresh process and connection a query;
(3) what a worker stuck beyond its deadline costs the other queries;
(4) what many restarts leave behind.
"""

import argparse
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sql_exec import SQLExecutor, gold_is_ordered, spider_match, spider_prepare  # noqa: E402

STUCK = "SELECT instr(printf('%.*c', 9000000, 'a'), printf('%.*c', 4000000, 'a') || 'b')"
FRESH = """
import sqlite3, sys
connection = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
print(connection.execute(sys.argv[2]).fetchall())
"""


def seconds(action, repeats=1):
    """Median wall-clock seconds of `action()`, and its last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = action()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def run_plainly(files, pairs):
    """No isolation at all: one connection a database, in this process."""
    connections, results = {}, []
    for db_id, sql in pairs:
        if db_id not in connections:
            connections[db_id] = sqlite3.connect(f"file:{files[db_id]}?mode=ro", uri=True)
            connections[db_id].text_factory = lambda raw: raw.decode("utf-8", "replace")
        results.append(connections[db_id].execute(sql).fetchall())
    for connection in connections.values():
        connection.close()
    return results


def run_freshly(files, pairs):
    """The usual isolation: a new process and connection for each query."""
    for db_id, sql in pairs:
        command = [sys.executable, "-I", "-S", "-c", FRESH, str(files[db_id]), sql]
        subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)


def bench_overhead(files, golds, repeats=5):
    plain, rows = seconds(lambda: run_plainly(files, golds), repeats)
    print(f"(1) {len(golds)} golds, plain sqlite3 in this process    {plain:7.3f} s")
    distinct = list(dict.fromkeys(golds))  # the executor runs identical pairs once: give it no such advantage
    plain_distinct, _ = seconds(lambda: run_plainly(files, distinct), repeats)
    for workers in (1, 2):
        with SQLExecutor(files, workers=workers, timeout=60, max_rows=1_000_000) as executor:
            cold, results = seconds(lambda: executor.run_many(golds))  # noqa: B023
            warm, _ = seconds(lambda: executor.run_many(distinct), repeats)  # noqa: B023
        assert [result.rows for result in results] == rows
        each = 1e6 * warm / len(distinct)
        print(f"    {workers} worker(s), first call, with start-up      {cold:7.3f} s = {cold / plain:.2f} x")
        print(f"    {workers} worker(s), {len(distinct)} distinct golds, warm        {warm:7.3f} s = "
              f"{warm / plain_distinct:.2f} x, {each:.0f} us a query")  # fmt: skip


def bench_scoring(files, golds, predictions, sample=100):
    def score():
        with SQLExecutor(files, workers=2, timeout=60, max_rows=1_000_000) as executor:
            gold, pred = executor.run_many(golds), executor.run_many(predictions)
        ordered = [gold_is_ordered(sql) for _, sql in golds]
        triples = zip(pred, gold, ordered, strict=True)
        return sum(p.status == "ok" and spider_match(p.rows, g.rows, order) for p, g, order in triples)

    ours, correct = seconds(score, 3)
    print(f"(2) {len(golds)} predictions scored, with start-up      {ours:7.3f} s, {correct} correct")
    step = len(golds) // sample
    both = [*golds[::step], *predictions[::step]]
    fresh, _ = seconds(lambda: run_freshly(files, both))
    fresh *= 2 * len(golds) / len(both)
    print(f"    a fresh process and connection a query        {fresh:7.1f} s = {fresh / ours:.0f} x ours "
          f"(extrapolated from {len(both)} queries)")  # fmt: skip


def bench_hung(files, golds, timeout=1.0):
    good = list(dict.fromkeys(golds))[:200]
    stuck = (good[0][0], STUCK)
    with SQLExecutor(files, workers=1, timeout=timeout) as executor:
        executor.run_many(good)
        without, _ = seconds(lambda: executor.run_many(good), 3)
        with_one, results = seconds(lambda: executor.run_many([stuck, *good]))
    assert results[0].status == "timeout" and executor.worker_restarts == 1
    cost = with_one - without - timeout
    print(f"(3) a stuck query costs 200 others {cost:.3f} s beyond its deadline: detection, kill, new worker")


def bench_restarts(files, golds, count):
    with SQLExecutor(files, workers=1) as executor:
        executor.run(*golds[0])
        before, pids = len(os.listdir("/proc/self/fd")), []
        start = time.perf_counter()
        for _ in range(count):
            pids.append(executor._workers[0].process.pid)
            os.kill(pids[-1], signal.SIGKILL)
            executor._workers[0].process.wait()
            assert executor.run(*golds[0]).status == "ok"
        each = (time.perf_counter() - start) / max(1, count)
        leaked = len(os.listdir("/proc/self/fd")) - before
        restarts = executor.worker_restarts
    zombies = sum(Path(f"/proc/{pid}").exists() for pid in pids)
    print(f"(4) {restarts} restarts, {1000 * each:.0f} ms each; left over: {leaked} file descriptors, "
          f"{zombies} processes")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--restarts", type=int, default=1000)
    options = parser.parse_args()
    spider = options.data_dir / "spider"
    if not spider.is_dir():
        sys.exit(f"no Spider data at {spider}: name its parent folder with --data-dir")
    files = {path.stem: path for path in (spider / "database").glob("*/*.sqlite")}
    examples = json.loads((spider / "dev.json").read_text())
    golds = [(example["db_id"], example["query"]) for example in examples]
    lines = (options.data_dir / "predictions" / "dail_sql_gpt4.sql").read_text().splitlines()
    bench_overhead(files, golds)
    bench_scoring(
        files,
        [(db_id, spider_prepare(sql)) for db_id, sql in golds],
        [(db_id, spider_prepare(line.split("\t")[0], is_prediction=True))
         for (db_id, _), line in zip(golds, lines, strict=True)],
    )  # fmt: skip
    bench_hung(files, golds)
    bench_restarts(files, golds, options.restarts)


if __name__ == "__main__":
    main()
