"""Does a long run leak or crash when things keep going wrong?

    python bench/soak.py                 # 2,000 small demo steps
    python bench/soak.py --steps 300

It is train.py's own Trainer on the demo world, with faults injected, each kind in a share of the steps:

(1) a column of the logits, one token wide, is NaN while sampling, while updating, or both;
(2) a completion's SQL hangs inside SQLite, where only killing the worker helps;
(3) an SQL worker is killed with SIGKILL, at any moment of its life.

Prints memory and open files after a twentieth of the steps and at the end, and what was injected; exit status 1 when
memory has grown by more than a tenth, files were left open, or an injected fault left no trace in the run's log.
"""

import argparse
import gc
import json
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402

FLAGS = ["--cold-start-steps", "40", "--cold-start-batch", "8", "--prompts-per-step", "2", "--group-size", "4",
         "--max-completion-tokens", "24", "--threads", "1", "--sql-workers", "2", "--sql-timeout", "0.3",
         "--eval-every", "200", "--eval-questions", "8", "--save-every", "200", "--test-questions", "0",
         "--kl-coef", "0.02", "--lr", "1e-4"]
HUNG = ("<think> stuck </think> SELECT instr(printf('%.*c', 9000000, 'a'), printf('%.*c', 4000000, 'a') || 'b')")
SHARES = {"sampling": 0.05, "update": 0.05, "hung": 0.03, "kill": 0.10}  # of the steps


class Faults:
    """Decides by seed what goes wrong in a step, and does it."""

    def __init__(self, trainer: train.Trainer):
        self.trainer, self.random, self.counts, self.now = trainer, random.Random(0), Counter(), set()
        trainer.policy.model.get_output_embeddings().register_forward_hook(self.spoil_logits)
        self.take_step, self.score = trainer.take_step, trainer.rollout_maker.score
        trainer.take_step, trainer.rollout_maker.score = self.faulty_step, self.faulty_score

    def faulty_step(self) -> train.StepRecord:
        last = self.now
        self.now = {kind for kind, share in SHARES.items() if self.random.random() < share}
        self.now -= {"update"} if "update" in last else set()  # the run stops, rightly, after three in a row
        self.counts.update(self.now)
        record = self.take_step()
        self.counts["skipped updates"] += record.stats["skipped_updates"]
        self.counts["timeouts"] += sum(b.status == "timeout" for rollout in record.sampled for b in rollout.rewards)
        return record

    def spoil_logits(self, module, inputs, logits: torch.Tensor) -> torch.Tensor:
        """Fault (1). In an update gradients are on."""
        if ("update" if torch.is_grad_enabled() else "sampling") not in self.now:
            return logits
        column = torch.zeros(logits.shape[-1])
        column[self.random.randrange(len(column))] = math.nan
        return logits + column

    def faulty_score(self, examples, groups) -> list:
        """Faults (2) and (3)."""
        policy = self.trainer.policy
        decode, victim = policy.decode, self.random.randrange(8)
        if "hung" in self.now:
            texts = iter(range(8))
            policy.decode = lambda ids: HUNG if next(texts) == victim else decode(ids)
        if "kill" in self.now:
            threading.Timer(self.random.uniform(0.0, 0.02), self.kill_worker).start()
        try:
            return self.score(examples, groups)
        finally:
            policy.__dict__.pop("decode", None)

    def kill_worker(self) -> None:
        workers = self.trainer.executor._workers
        if workers:
            os.kill(self.random.choice(workers).process.pid, signal.SIGKILL)
            self.counts["killed"] += 1


def figures() -> dict[str, int]:
    """Resident kilobytes, open files and threads of this process (Linux)."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"kilobytes": int(status["VmRSS"].split()[0]), "files": len(os.listdir("/proc/self/fd")),
            "threads": int(status["Threads"])}


def soak(steps: int, folder: str) -> tuple[dict, dict, Counter]:
    """(figures after a twentieth of the steps, figures at the end, what was injected)"""
    found = {}
    watch = train.Trainer.watch

    def watch_and_measure(trainer, metrics):
        watch(trainer, metrics)
        if trainer.step in (max(1, steps // 20), steps):
            found[trainer.step] = figures()
        if trainer.step % max(1, steps // 20) == 0:
            print(f"step {trainer.step}: {figures()}", flush=True)

    train.Trainer.watch = watch_and_measure
    prepare = train.Trainer.prepare

    def prepare_with_faults(trainer):
        prepare(trainer)
        trainer.faults = Faults(trainer)
        found["faults"] = trainer.faults.counts

    train.Trainer.prepare = prepare_with_faults
    sys.argv[1:] = [*FLAGS, "--steps", str(steps), "--output", folder]
    assert train.main() == 0
    return found[max(1, steps // 20)], found[steps], found["faults"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="GRPO steps (default: 2000)")
    steps = parser.parse_args().steps
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        early, late, injected = soak(steps, f"{scratch}/run")
        log = [json.loads(line) for line in Path(scratch, "run", "metrics.jsonl").read_text().splitlines()]
    growth = late["kilobytes"] / early["kilobytes"] - 1
    print(f"{steps} steps in {(time.monotonic() - began) / 60:.1f} minutes; injected and seen: {dict(injected)}\n"
          f"memory: {early['kilobytes'] / 1024:.0f} MiB after {max(1, steps // 20)} steps, "
          f"{late['kilobytes'] / 1024:.0f} MiB at the end ({growth:+.1%}; limit +10 %)\n"
          f"open files: {early['files']}, then {late['files']}; threads: {early['threads']}, then {late['threads']}\n"
          f"SQL workers replaced: {log[-1]['sql_worker_restarts']}")
    left = [kind for kind, seen in (("update", "skipped updates"), ("hung", "timeouts")) if not injected[seen]
            and injected[kind]]
    return int(growth > 0.1 or late["files"] > early["files"] or len(log) != steps or bool(left))


if __name__ == "__main__":
    sys.exit(main())
