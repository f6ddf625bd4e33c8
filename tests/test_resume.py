"""A run killed with SIGKILL at random instants and resumed each time ends as if nothing had happened, bit for bit.

Three kills; KILLS=20 pytest tests/test_resume.py takes some minutes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "3"))
FLAGS = ["--cold-start-steps", "12", "--cold-start-batch", "8", "--prompts-per-step", "2", "--group-size", "4",
         "--max-completion-tokens", "24", "--eval-every", "3", "--eval-questions", "4", "--test-questions", "4",
         "--threads", "1", "--sql-workers", "1", "--kl-coef", "0.02", "--steps", "12", "--save-every", "1"]
PASSING = ("seconds", "tokens_per_second", "peak_memory", "sql_worker_restarts")


def start(folder: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "train.py", *FLAGS, "--output", str(folder), *more], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def records(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(PASSING)} for row in rows]


def test_a_run_killed_at_random_instants_ends_bit_identical(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    rng, kills = random.Random(0), 0
    while True:
        process = start(killed, *(["--resume"] if (killed / "checkpoints" / "step-0").exists() else []))
        if kills < KILLS:
            while not (killed / "checkpoints" / "step-0").exists() and process.poll() is None:
                time.sleep(0.01)  # before that there is nothing to resume; a user would start afresh
            time.sleep(rng.uniform(0.0, 6.0) if kills else rng.uniform(0.0, 1.0))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                continue
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        break
    assert kills >= 1
    for part in ("metrics", "rollouts"):
        assert records(killed / f"{part}.jsonl") == records(whole / f"{part}.jsonl")
    ends = [folder / "checkpoints" / "step-12" for folder in (whole, killed)]
    one, two = (load_file(end / "model.safetensors") for end in ends)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    one, two = (dict(np.load(end / "memory.npz")) for end in ends)
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert json.loads((whole / "result.json").read_text()) == json.loads((killed / "result.json").read_text())
