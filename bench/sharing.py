"""A demo step on a machine that does something else as well: how long it takes, by how its threads wait.

    python bench/sharing.py      # about 15 minutes on two cores that are idle at the start

A row is a way of waiting, a column what runs beside: nothing, one process that computes all the time, another training
run that waits in the same way. A cell has the median seconds of rollout and of update, and their sum over that of an
idle machine with threads that spin, PyTorch's way. What runs beside is started and ended here.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN_POLICY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
WAYS = {  # environment; 300,000 is what libgomp does by itself, and setting it switches engine/cores.py off
    "spins": {"GOMP_SPINCOUNT": "300000"}, "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"}, "one thread": {"OMP_NUM_THREADS": "1"},
    "as it is": {}}
PHASES = ("rollout", "update")
WARM_UP = 2  # steps of a cell that are not counted


def train(way: str, folder: Path, *flags: str) -> subprocess.Popen:
    """Starts a run of the demo."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN_POLICY} | WAYS[way]
    return subprocess.Popen([sys.executable, "train.py", "--eval-every", "0", "--test-questions", "0", "--save-every",
                             "0", "--output", folder, *flags], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


@contextmanager
def beside(what: str, way: str, start: Path, scratch: Path):
    """Something else that runs inside."""
    if what == "idle":
        yield
        return
    if what == "busy process":
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    else:
        other = train(way, scratch / f"other {way} {time.time()}", "--start", start, "--steps", "1000")
        time.sleep(20)  # until it trains
    try:
        yield
    finally:
        other.kill()
        other.wait()


def seconds(way: str, what: str, start: Path, scratch: Path, steps: int) -> list[float]:
    """Median seconds of each phase."""
    folder = scratch / f"{way} {what} {time.time()}"
    with beside(what, way, start, scratch):
        if train(way, folder, "--start", start, "--steps", str(WARM_UP + steps)).wait():
            raise SystemExit("the run failed; see above")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    return [statistics.median(line[f"seconds/{phase}"] for line in lines) for phase in PHASES]


def main() -> None:
    """Measure every cell and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="counted steps of a cell (default: 6)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="rows (default: all)")
    options = parser.parse_args()
    columns = ("idle", "busy process", "another run")
    print("| | " + " | ".join(f"{what}: {' / '.join(PHASES)} (× idle)" for what in columns) + " |\n|" + "---|" * 4)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        train("spins", scratch / "start", "--cold-start-steps", "40", "--steps", "0").wait()
        start = scratch / "start" / "checkpoints" / "step-0"
        normal = None
        for way in options.ways:
            row = [seconds(way, what, start, scratch, options.steps) for what in columns]
            normal = normal or sum(row[0])
            print(f"| {way} | " + " | ".join(f"{' / '.join(f'{s:.2f}' for s in cell)} ({sum(cell) / normal:.2f})"
                                           for cell in row) + " |", flush=True)


if __name__ == "__main__":
    main()
