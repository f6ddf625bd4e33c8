"""How often a right answer is right by chance, from a run's rollouts.jsonl:

    python bench/by_chance.py runs/demo

A query can return the right answer for a wrong reason: a condition that happens to hold for all rows, or a count that
is the same for two tables. A reward that compares results pays for these, too. So each right sample and its gold SQL
run again on changed copies of the database. Right by chance is a sample that differs from the gold SQL on one of them.
A sample that never differs may still be wrong, so the share is a lower bound.

A copy lacks about half of the rows that no other row refers to, so declared foreign keys still hold.
"""

import argparse
import random
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dense  # noqa: E402

from common.errors import UserError, run_main  # noqa: E402
from history import training_questions  # noqa: E402
from questions.schema import quote_always  # noqa: E402
from sql_exec import MATCHES, Results, SQLExecutor  # noqa: E402

COPIES = 3


def thinned(source: Path, target: Path, seed: int) -> Path:
    """A copy of a database without about half of the rows that no other row refers to."""
    rng = random.Random(seed)
    shutil.copyfile(source, target)
    with closing(sqlite3.connect(target)) as copy:
        copy.execute("PRAGMA foreign_keys = ON")
        names = [name for name, in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in map(quote_always, reversed(names)):  # mostly a table refers to earlier ones
            with suppress(sqlite3.OperationalError):  # a table without rowid stays as it is
                for row in copy.execute(f"SELECT rowid FROM {table}").fetchall():
                    if rng.random() < 0.5:
                        with suppress(sqlite3.IntegrityError):  # another row refers to it
                            copy.execute(f"DELETE FROM {table} WHERE rowid = ?", row)
        copy.commit()
    return target


def by_chance(records: list[dict], databases: dict[str, Path], match: str, folder: Path) -> tuple[int, int]:
    """(right samples, those of them that differ from every gold SQL on a changed copy). Raises UserError: a copy cannot
    be read."""
    right = [(record["db_id"], c["sql"], record["gold_sqls"]) for record in records for c in record["completions"]
             if c["correct"] and not c.get("from_trace")]
    copies = {f"{db_id}/{seed}": thinned(databases[db_id], folder / f"{number}-{seed}.sqlite", seed)
              for number, db_id in enumerate(sorted({db_id for db_id, _, _ in right})) for seed in range(COPIES)}
    asked = [(f"{db_id}/{seed}", sql, golds) for db_id, sql, golds in right for seed in range(COPIES)]
    with SQLExecutor(copies) as executor:
        results = Results(executor, asked, [MATCHES[match]])
    if unread := next(filter(None, (results.unread(*one, MATCHES[match]) for one in asked)), None):
        raise UserError(f"a changed copy could not be read: {unread.error}")
    same = [results.is_right(*one, MATCHES[match]) for one in asked]
    return len(right), sum(not all(same[i:i + COPIES]) for i in range(0, len(same), COPIES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    config, records = dense.read_run(parser.parse_args().run)
    with tempfile.TemporaryDirectory() as folder:
        right, chance = by_chance(records, training_questions(config).databases, config["match"], Path(folder))
    if not right:
        raise UserError("no sample of this run is right on a question with gold SQL")
    print(f"{right} samples are right; {chance} of them ({100 * chance / right:.1f} %) return another result than the "
          f"gold SQL on one of {COPIES} changed copies of the database")


if __name__ == "__main__":
    run_main(main)
