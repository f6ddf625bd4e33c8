"""Measure the atomic reward on one core:

    python bench/rewards.py [--data-dir ../shared/data] [--rounds 3]
    python bench/rewards.py --fuzz 100000

(1) pairs a second over real predictions and their golds (Spider dev), or over pairs of demo golds where there are
    none; golds are cached, as in training, every prediction is new;
(2) with --fuzz N: N broken queries, random words and over-long texts: nothing may raise, and the slowest is shown.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from test_atomic import FRAGMENTS, GROWING, HOSTILE, mutate  # noqa: E402

import atomic  # noqa: E402
from data import load_dataset  # noqa: E402

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
    """Pairs a second, round by round. A space in front makes a prediction new to the cache; golds stay in it."""
    for _, gold, schema in pairs:
        atomic.atomic_operations(gold, schema)
    rates = []
    for number in range(1, rounds + 1):
        start = time.perf_counter()
        for predicted, gold, schema in pairs:
            atomic.atomic_reward(" " * number + predicted, gold, schema)
        rates.append(len(pairs) / (time.perf_counter() - start))
    return rates


def fuzz(pairs: Pairs, count: int, seed: int = 0) -> None:
    """Nothing may raise; the slowest input is shown."""
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
        start = time.perf_counter()
        operations = atomic.atomic_operations(sql, pairs[number % len(pairs)][2])
        slowest = max(slowest, (time.perf_counter() - start, sql[:60]))
        parsed += bool(operations)
    print(f"fuzz: {count} inputs, {parsed} parsed, none raised; slowest {slowest[0] * 1000:.1f} ms: {slowest[1]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("TEXT2SQL_DATA", ROOT.parent / "shared/data"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fuzz", type=int, default=0, metavar="N")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        real = (Path(args.data_dir) / "predictions").is_dir()
        pairs = real_pairs(Path(args.data_dir)) if real else demo_pairs(folder)
    length = statistics.mean(len(predicted) for predicted, _, _ in pairs)
    rates = measure(pairs, args.rounds)
    print(f"atomic: {statistics.median(rates):.0f} pairs a second on one core (rounds: "
          f"{', '.join(f'{rate:.0f}' for rate in rates)}; {len(pairs)} {'real' if real else 'demo'} pairs, "
          f"{length:.0f} characters a prediction; at least 1500 wanted)")
    if args.fuzz:
        fuzz(pairs, args.fuzz)


if __name__ == "__main__":
    main()
