"""A run killed with SIGKILL at random instants and resumed each time ends as if nothing had happened, bit for bit.

Two kills, each up to three steps after going on: in a rollout, an update or the writing of a checkpoint. With two
threads, as on most machines: sums of gradients must not depend on which thread is first.
KILLS=20 pytest tests/test_resume.py takes some minutes.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from conftest import tiny_database
from little_policy import little_policy_folder
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "2"))
STEPS = 12 * KILLS
RECORDS = [{"db_id": "music", "question": f"How many singers are older than {n}?", "trace": f"count ages above {n}",
            "sql": f"SELECT COUNT(*) FROM singer WHERE age > {n}", "split": "train" if n < 24 else "dev"} for n in range(30)]
FLAGS = ["--cold-start-steps", "12", "--cold-start-batch", "8", "--prompts-per-step", "2", "--group-size", "4",
         "--max-completion-tokens", "24", "--lr", "3e-4", "--eval-every", "3", "--eval-questions", "4", "--test-questions", "4",
         "--threads", "2", "--sql-workers", "1", "--kl-coef", "0.02", "--steps", str(STEPS), "--save-every", "1"]
PASSING = ("seconds", "tokens_per_second", "peak_memory", "sql_worker_restarts")


def start(folder: Path, *more: str) -> subprocess.Popen:
    model = little_policy_folder(folder.parent / "music.sqlite")
    return subprocess.Popen([sys.executable, "train.py", *FLAGS, "--model", str(model), "--data",
                             str(folder.parent / "mine.json"), "--output", str(folder), *more], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"})  # no spinning


def records(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(PASSING)} for row in rows]


def newest_step(folder: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*"))


def test_a_run_killed_at_random_instants_ends_bit_identical(tmp_path):
    tiny_database(tmp_path / "music.sqlite")
    (tmp_path / "mine.json").write_text(json.dumps(RECORDS))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    rng, begun = random.Random(0), killed / "checkpoints" / "step-0"
    for _ in range(KILLS):
        process = start(killed, *(["--resume"] if begun.exists() else []))
        if begun.exists():
            assert any(line.startswith("resuming from") for line in process.stdout)
        while not begun.exists() and process.poll() is None:
            time.sleep(0.01)  # before that there is nothing to resume; a user would start afresh
        wanted = newest_step(killed) + rng.randrange(3)
        while newest_step(killed) < wanted and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.3))
        assert process.poll() is None, "it ended before it could be killed: give it more steps"
        process.kill()
        process.communicate()
    assert newest_step(killed) > 0
    process = start(killed, "--resume")
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    for part in ("metrics", "rollouts"):
        assert records(killed / f"{part}.jsonl") == records(whole / f"{part}.jsonl")
    ends = [folder / "checkpoints" / f"step-{STEPS}" for folder in (whole, killed)]
    one, two = (load_file(end / "model.safetensors") for end in ends)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    one, two = (dict(np.load(end / "memory.npz")) for end in ends)
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert json.loads((whole / "result.json").read_text()) == json.loads((killed / "result.json").read_text())
