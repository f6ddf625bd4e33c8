"""More than one process: torchrun gives what a single process gives, and loses nothing when it is stopped or killed.

Runs are in float64 where results are compared between numbers of processes, as sums over processes round differently.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_database
from little_policy import LESSONS, little_policy_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
IN_FLOAT64 = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
torch.set_default_dtype(torch.float64)
train.Trainer.base_dtype = torch.float64
train.run_main(train.main)
"""
FLAGS = shlex.split(
    "--cold-start-steps 2 --cold-start-batch 5 --tokens-per-pass 1 "  # one trace a pass, whoever makes it
    "--prompts-per-step 3 --group-size 4 --micro-batch 3 --steps 8 --save-every 1 --keep 99 --lr 3e-4 --kl-coef 0.02 "
    "--advantage-scale batch --draw informative --seed 2 --dynamic-sampling 1 --max-completion-tokens 24 --eval-every 4 "
    "--memory-scope any --memory-min-words 2 --memory-min-columns 0 --memory-min-density 0 --lr-warmup 2 --threads 1 "
    "--sql-workers 1")
PASSING = ("seconds", "tokens_per_second", "peak_memory", "sampler_gap")  # the sampler's numbers are float32


class Work:
    """A folder with data, a policy that is often right, and a way to train it."""

    def __init__(self, folder):
        self.folder = folder
        records = [{"db_id": "music", "question": question, "query": sql, "trace": thought, "split": split}
                   for split in ("train", "train", "train", "train", "dev") for question, sql, thought in LESSONS]
        (folder / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        self.policy = little_policy_folder(tiny_database(folder / "music.sqlite"))
        (folder / "float64.py").write_text(IN_FLOAT64)

    def start(self, name, processes, *more):
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
        command = [sys.executable, *torchrun, str(self.folder / "float64.py"), "--model", str(self.policy), "--data",
                   str(self.folder / "mine.jsonl"), "--output", str(self.folder / name), *FLAGS, *more]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})

    def run(self, name, processes, *more):
        process = self.start(name, processes, *more)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output[-3000:]
        return output

    def checkpoint(self, name, step):
        return self.folder / name / "checkpoints" / f"step-{step}"

    def records(self, name, part):
        rows = [json.loads(line) for line in (self.folder / name / f"{part}.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if not key.startswith(PASSING)} for row in rows]

    def memory(self, name, step):
        with np.load(self.checkpoint(name, step) / "memory.npz") as stored:
            texts = json.loads(stored["texts"].tobytes())
            del texts["recent"]  # what was embedded lately, to be found again, is another in each process
            return texts, stored["vectors"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return Work(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def one(work):
    work.run("one", 1)
    return "one"


@pytest.fixture(scope="module")
def two(work):
    output = work.run("two", 2)
    assert output.count("report: ") == 1  # only the first process prints
    return "two"


def largest_difference(one, two):
    one, two = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


def same(one, two, **tolerance):
    """Compares nested records, numbers approximately."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            same(one[key], two[key], **tolerance)
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            same(a, b, **tolerance)
    else:
        assert one == (pytest.approx(two, **tolerance) if isinstance(two, float) else two)


def test_two_processes_give_what_one_gives(work, one, two):
    moved = largest_difference(work.checkpoint(one, 0), work.checkpoint(one, 5))
    assert moved > 1e-4 and largest_difference(work.checkpoint(one, 5), work.checkpoint(two, 5)) < 1e-9
    metrics = work.records(one, "metrics")
    assert {m["questions_drawn"] for m in metrics} != {3 * m["step"] for m in metrics}  # there were extra rollouts
    same(metrics[:5], work.records(two, "metrics")[:5], rel=1e-5, abs=1e-7)
    same(work.records(one, "rollouts")[:15], work.records(two, "rollouts")[:15], abs=2e-3)
    texts, vectors = work.memory(one, 5)
    others, other_vectors = work.memory(two, 5)
    assert texts == others and np.array_equal(vectors, other_vectors)
    assert len(texts["thoughts"]) > len(work.memory(one, 0)[0]["thoughts"]) and texts["rejections"]


def stop_after(work, name, step, action, *more):
    """Starts a run, does something to it once a checkpoint is there, and returns what it printed and its last step."""
    process = work.start(name, 2, *more)
    deadline = time.monotonic() + 150
    while not work.checkpoint(name, step).exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.01)
    action(process)
    output, _ = process.communicate(timeout=60)  # all processes end within a minute
    last = len(work.records(name, "metrics"))
    assert process.returncode != 0 and step <= last < 8, output[-3000:]
    return output, last


def test_sharded_processes_stop_at_a_signal_and_give_what_one_gives(work, one):
    terminate = lambda process: process.send_signal(signal.SIGTERM)  # noqa: E731 (to torchrun, which passes it on)
    output, last = stop_after(work, "sharded", 2, terminate, "--sharding", "on")
    assert f"stopped after step {last}" in output and work.checkpoint("sharded", last).exists()
    assert f"step-{last}" in work.run("sharded", 2, "--sharding", "on", "--resume")
    assert largest_difference(work.checkpoint(one, 8), work.checkpoint("sharded", 8)) < 1e-9
    states = [torch.load(work.checkpoint(name, 8) / "trainer.pt", weights_only=True)["optimizer"]["state"]
              for name in (one, "sharded")]
    for number, values in states[0].items():  # a checkpoint does not tell how many processes wrote it
        for name, value in values.items():
            torch.testing.assert_close(states[1][number][name], value, rtol=1e-6, atol=1e-12)
    for folder in (work.checkpoint("sharded", 8), work.folder / "sharded" / "best"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.architectures == ["Qwen2ForCausalLM"]
        assert model.generate(**tokenizer("SELECT", return_tensors="pt"), max_new_tokens=2).shape[1] > 1


def kill_second(process):
    """Kills the process of rank 1, which torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(next(int(child) for child in children if "\0RANK=1\0" in Path(f"/proc/{child}/environ").read_text()),
            signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes of torchrun in /proc")
def test_a_killed_process_takes_the_run_down_which_then_goes_on_as_if_nothing_had_happened(work, two):
    output, _ = stop_after(work, "half", 3, kill_second)
    assert "Signal 9 (SIGKILL)" in output
    assert "resuming from" in work.run("half", 2, "--resume")
    assert work.records("half", "metrics") == work.records(two, "metrics")
    assert work.records("half", "rollouts") == work.records(two, "rollouts")
    assert largest_difference(work.checkpoint("half", 8), work.checkpoint(two, 8)) == 0.0
    (texts, vectors), (others, other_vectors) = work.memory("half", 8), work.memory(two, 8)
    assert texts == others and np.array_equal(vectors, other_vectors)


UPDATES = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from test_grpo import make_model, sampled_groups
import grpo
from engine import distributed
from engine.fast import FAST
from common.errors import UserError, run_main

def update(several, prompts, broken=False, sharded=False, **settings):
    model, sampler = make_model(), make_model()
    shards = distributed.Sharded(model, FAST) if sharded else None
    engine = shards.engine if sharded else FAST
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = grpo.GRPOConfig(group_size=4, max_completion_tokens=5, **settings)
    for step in range(5):
        groups = sampled_groups(sampler, config, prompts=prompts, seed=step)
        advantages = torch.randn(prompts, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        advantages[1::3] = 0  # a flat group, which is left out without a KL term
        if step == 3:
            advantages[:] = 0  # without a KL term nothing moves, not even by the optimizer's momentum
        if broken:
            advantages[2, 1] = torch.inf  # which one process computes
        batches = grpo.micro_batches(groups, advantages, config)
        batches = distributed.divide(batches, config) if several else batches
        if config.kl_coef:
            grpo.reference_logprobs(sampler, batches, config, FAST)
        policy_update = distributed.policy_update if several else grpo.policy_update
        stats = policy_update(model, optimizer, batches, config, engine)
    model = shards.frozen_copy() if sharded else model
    return torch.cat([p.detach().flatten() for p in model.parameters()]), stats

def compare():
    for prompts, settings in [(1, dict(kl_coef=0.0)), (2, {{}}), (4, dict(micro_batch=3, loss="dapo", overlong="mask")),
                              (5, dict(kl_coef=0.0, updates_per_rollout=2, loss="gspo")), (7, dict(loss="dr_grpo"))]:
        alone = update(False, prompts, **settings)
        for sharded in (False, True):  # an odd number of passes leaves one process with fewer
            together = update(True, prompts, sharded=sharded, **settings)
            others = distributed.gather(together[0])
            assert all(torch.equal(other, together[0]) for other in others)
            gap = (alone[0] - together[0]).abs().max().item()
            assert gap < 1e-9, (settings, sharded, gap)
            assert alone[1].keys() == together[1].keys()
            for name, value in alone[1].items():
                assert abs(value - together[1][name]) < 1e-7, (settings, sharded, name, value, together[1][name])
    weights, stats = update(True, 3, broken=True)
    start = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    assert stats["skipped_updates"] == 1 and torch.equal(weights, start)  # all processes have left it out
    print("all equal over", distributed.size())

def wrong():
    raise UserError("said once")

def second_fails():
    if distributed.rank():
        wrong()
    return 1

def main():
    with distributed.process_group():
        compare()
        assert distributed.everywhere(lambda: distributed.rank(), UserError) == distributed.rank()
        try:
            raise AssertionError(distributed.everywhere(second_fails, UserError))
        except UserError as error:
            assert str(error) == "said once"  # by process 0, too
        distributed.on_main(wrong)

run_main(main)
"""


SHARDED = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import copy
import torch
from test_grpo import make_model
import grpo
import cold_start as teaching
from engine import bf16, distributed
from engine.fast import FAST
from policy import Reference
from common.errors import run_main
from cold_start import SFTConfig

CONFIG = grpo.GRPOConfig(group_size=3, max_completion_tokens=6)
PROMPTS = [torch.arange(1, 9), torch.arange(2, 6)]
PAIRS = [(torch.cat([torch.arange(1, 7), torch.tensor([n % 5])]), torch.arange(n % 7, n % 7 + 1 + n % 3)) for n in range(9)]

def sampled(model, several=None, autocast=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), distributed.unsharded(several):
        if several and autocast:  # nothing but the copy is whole
            assert all(map(distributed.is_sharded, several.model.parameters()))
        groups = grpo.sample_groups(model, PROMPTS[:1 + distributed.rank()], CONFIG, eos_ids=[0], seeds=[1, 2][:1 + distributed.rank()], engine=FAST)
    return [completion.tolist() for group in groups for completion in group.completions]

def teach(model, engine, steps=3, batch=5, pairs=PAIRS, **settings):
    config = SFTConfig(cold_start_steps=steps, cold_start_batch=batch, cold_start_lr=1e-2, **settings)
    return teaching.cold_start(model, pairs, config, seed=0, quiet=True, engine=engine, tokens_per_pass=20)

def bf16_copy():
    model = make_model().float()
    alone, several = copy.deepcopy(model), distributed.Sharded(model, FAST)
    reference = Reference(model, sharded=several)
    places = None
    for step in range(2):
        assert sampled(model, several) == sampled(alone) and sampled(model, several, False) == sampled(alone, autocast=False)
        copied = bf16._copies[model]
        rounded = bf16.rounded_copy(alone)
        for one, other in zip(bf16.all_weights(copied), bf16.all_weights(rounded), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
        assert {{weight.dtype for weight in copied.parameters()}} == {{torch.bfloat16, torch.float32}}
        places, before = [weight.data_ptr() for weight in copied.parameters()], places
        assert before in (None, places)  # where graphs look for them
        with torch.no_grad():
            for weight in (*model.parameters(), *alone.parameters()):
                weight.mul_(0.7)
    for one, other in zip(reference.model.parameters(), make_model().float().parameters(), strict=True):
        assert torch.equal(one, other) and not one.requires_grad  # of the time when it was made

def cold_start():
    for pairs, batch, settings in [(PAIRS, 5, {{}}), (PAIRS, 1, {{}}), (PAIRS, 5, dict(prompt_loss=0.3))]:
        alone, replicated, sharded = make_model(), make_model(), make_model()
        several = distributed.Sharded(sharded, FAST)
        known = distributed.size, distributed.rank
        distributed.size, distributed.rank = lambda: 1, lambda: 0  # one process does all of it
        losses = [teach(alone, FAST, pairs=pairs, batch=batch, **settings)]
        distributed.size, distributed.rank = known
        made = []

        def counting(model, prompts, *rest):
            made.append(len(prompts) if prompts is not distributed.SHORTEST[0] else 0)
            return FAST.logprobs(model, prompts, *rest)

        counted = grpo.Engine(FAST.decode, counting)
        losses += [teach(replicated, counted, pairs=pairs, batch=batch, **settings), teach(sharded, several.engine, pairs=pairs, batch=batch, **settings)]
        assert max(losses) - min(losses) < 1e-9, losses
        shares = list(map(sum, distributed.gather(made)))
        assert sorted(shares) == [3 * (batch // 2), 3 * (batch - batch // 2)], shares  # three steps, each pair once
        start, whole = make_model(), several.frozen_copy()
        for a, b, c, d in zip(alone.parameters(), replicated.parameters(), whole.parameters(), start.parameters(), strict=True):
            assert (a - b).abs().max() < 1e-9 and (a - c).abs().max() < 1e-9
        assert any((a - d).abs().max() > 1e-3 for a, d in zip(alone.parameters(), start.parameters(), strict=True))

def states():
    model = make_model()
    distributed.Sharded(model, FAST)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    empty = distributed.full_state(model, optimizer)
    assert not empty["state"] and not optimizer.state  # asking steps nothing
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    state = distributed.full_state(model, optimizer)
    weights = distributed.full_weights(model)
    assert bool(state) == bool(weights) == distributed.is_main()
    state = distributed.gather(state)[0]
    for values in state["state"].values() if distributed.rank() else ():
        values["exp_avg"].zero_()  # those of process 0 are taken
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-3)
    distributed.load_full_state(model, fresh, state)
    assert fresh.param_groups[0]["lr"] == 1e-2
    again = distributed.full_state(model, fresh)
    for number, values in state["state"].items() if distributed.is_main() else ():
        shape = list(model.parameters())[number].shape
        assert values["exp_avg"].shape == shape and values["exp_avg"].device.type == "cpu" and values["step"] == 1
        for name, value in values.items():
            assert torch.equal(again["state"][number][name], value), name
    for weight, values in fresh.state.items():
        assert distributed.is_sharded(values["exp_avg"]) and values["step"] == 1

def main():
    with distributed.process_group():
        bf16_copy()
        cold_start()
        states()
        distributed.gather(None)
        print("all well over", distributed.size())

run_main(main)
"""


def test_a_sharded_model_samples_from_a_bf16_copy_and_its_cold_start_and_state_are_those_of_one_process(tmp_path):
    """The copy is filled layer by layer, at the same addresses; passes of the cold start are shared out, in float64."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "sharded.py")],
                          capture_output=True, text=True, timeout=150, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout.strip() == "all well over 2", done.stderr[-5000:]


def test_updates_do_not_depend_on_the_number_of_processes(tmp_path):
    """Five steps each, in float64; with fewer micro-batches than processes, too."""
    (tmp_path / "updates.py").write_text(UPDATES)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "updates.py")],
                          capture_output=True, text=True, timeout=150, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout.strip() == "all equal over 2", done.stderr[-3000:]
    assert done.returncode != 0 and done.stderr.count("error: said once") == 1
