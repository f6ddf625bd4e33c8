"""Measure the atomic reward and the memory on one core:

    python bench/reward_speed.py [--data-dir ../shared/data] [--rounds 3]
    python bench/reward_speed.py --fuzz 100000

(1) atomic: pairs a second over real predictions and their golds (Spider dev), or over pairs of demo golds
    where there are none; golds are cached, as in training, every prediction is new;
(2) memory: additions and queries a second beside 10,000 stored traces of 384 dimensions, saving, loading, and
    the hash embedder;
(3) with --fuzz N: N broken queries, random words and over-long texts: nothing may raise; shows the slowest.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # numpy reads this once: one core

import numpy as np  # noqa: E402

from data import load_dataset  # noqa: E402
from partial_credit import atomic  # noqa: E402
from partial_credit.memory import HashEmbedder, MemoryGate, TraceMemory  # noqa: E402

Pairs = list[tuple[str, str, dict]]  # prediction, gold, schema


def real_pairs(folder: Path) -> Pairs:
    """The predictions of two published systems on Spider dev."""
    schemas = {}
    for database in json.loads((folder / "spider/tables.json").read_text()):
        schemas[database["db_id"]] = {
            table: [column for owner, column in database["column_names_original"] if owner == number]
            for number, table in enumerate(database["table_names_original"])}
    dev = json.loads((folder / "spider/dev.json").read_text())
    pairs = []
    for path in sorted((folder / "predictions").glob("*.sql")):
        lines = path.read_text().splitlines()
        pairs += [(line.split("\t")[0], example["query"], schemas[example["db_id"]])
                  for line, example in zip(lines, dev, strict=True)]
    return pairs


def demo_pairs(folder: str) -> Pairs:
    """Each gold of the demo world against another one of its database."""
    by_database = {}
    for example in load_dataset("demo", folder, split="train").examples:
        by_database.setdefault(example.db_id, []).append(example.gold_sqls[0])
    return [(a, b, {}) for golds in by_database.values() for a, b in zip(golds, golds[1:], strict=False)]


def measure(pairs: Pairs, rounds: int) -> list[float]:
    """Pairs a second, round by round. A space in front makes a prediction new to the cache."""
    for _, gold, schema in pairs:
        atomic.atomic_operations(gold, schema)
    rates = []
    for number in range(1, rounds + 1):
        start = time.perf_counter()
        for predicted, gold, schema in pairs:
            atomic.atomic_reward(" " * number + predicted, gold, schema)
        rates.append(len(pairs) / (time.perf_counter() - start))
    return rates


def rate(function: Callable, inputs: Sequence) -> float:
    """Calls a second."""
    start = time.perf_counter()
    for arguments in inputs:
        function(*arguments)
    return len(inputs) / (time.perf_counter() - start)


def measure_memory(folder: str, stored: int = 10_000, dim: int = 384, asked: int = 500) -> None:
    """Random vectors of 50 databases, each call alone; then whole files and the hash embedder."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(stored + 2 * asked, dim)).astype(np.float32)
    memory = TraceMemory(lambda texts: vectors[[int(text) for text in texts]], dim,
                         gate=MemoryGate(memory_min_words=1))
    traces = [(f"db{i % 50}", str(i)) for i in range(len(vectors))]
    memory.add_many(traces[:stored])
    queries = rate(memory.similarity, traces[-asked:])
    additions = rate(memory.add, traces[stored:-asked])
    print(f"memory: {additions:.0f} additions and {queries:.0f} queries a second beside {stored} traces "
          f"of {dim} dimensions (at least 200 wanted)")
    path = Path(folder) / "memory.npz"
    saved = 1 / rate(memory.save, [(path,)])
    print(f"memory: saved in {saved:.2f} s, loaded in {1 / rate(memory.load, [(path,)]):.2f} s, "
          f"{path.stat().st_size / 1e6:.0f} MB")
    texts = [" ".join(f"word{n}" for n in rng.integers(0, 50, 60)) for _ in range(1000)]
    hashed = len(texts) * rate(HashEmbedder(), [(texts,)])
    print(f"memory: hash embedder, {hashed:.0f} thoughts of 60 words a second")


def fuzz(pairs: Pairs, count: int, seed: int = 0) -> None:
    """Nothing may raise; the slowest input is shown. The inputs are the tests', so pytest must be there."""
    from test_atomic import FRAGMENTS, GROWING, HOSTILE, mutate

    rng, slowest, parsed = random.Random(seed), (0.0, ""), 0
    special = HOSTILE + GROWING
    for number in range(count):
        kind = rng.random()
        if kind < 0.01:
            sql = rng.choice(special)
        elif kind < 0.25:
            sql = " ".join(rng.choices(FRAGMENTS, k=rng.randrange(60)))
        else:
            sql = mutate(rng.choice(pairs)[rng.randrange(2)] or "x", rng)
        atomic.cached_operations.cache_clear()
        start = time.process_time()  # of this process alone, however busy the machine is
        operations = atomic.atomic_operations(sql, pairs[number % len(pairs)][2])
        slowest = max(slowest, (time.process_time() - start, sql[:60]))
        parsed += bool(operations)
    print(f"fuzz: {count} inputs, {parsed} parsed, none raised; slowest {slowest[0] * 1000:.1f} ms "
          f"of CPU (at most 100 wanted): {slowest[1]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("TEXT2SQL_DATA", ROOT.parent / "shared/data")
    parser.add_argument("--data-dir", type=Path, default=data)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fuzz", type=int, default=0, metavar="N")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        real = (Path(args.data_dir) / "predictions").is_dir()
        pairs = real_pairs(Path(args.data_dir)) if real else demo_pairs(folder)
        measure_memory(folder)
    length = statistics.mean(len(predicted) for predicted, _, _ in pairs)
    rates = measure(pairs, args.rounds)
    print(f"atomic: {statistics.median(rates):.0f} pairs a second on one core (rounds: "
          f"{', '.join(f'{rate:.0f}' for rate in rates)}; {len(pairs)} {'real' if real else 'demo'} pairs, "
          f"{length:.0f} characters a prediction; at least 1500 wanted)")
    if args.fuzz:
        fuzz(pairs, args.fuzz)


if __name__ == "__main__":
    main()
