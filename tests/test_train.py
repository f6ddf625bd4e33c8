"""train.py from the outside, as a user runs it: the demo, Spider's layout, a chat model, resume, Ctrl-C, bad input."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_in_process, tiny_database
from little_policy import little_policy_folder
from transformers import AutoModelForCausalLM

import evaluate
import held_out
import rollout
import settings
import train
import variants
from common.errors import UserError
from data import columns_of
from grpo import Group, GRPOConfig
from held_out import HeldOut
from models import memory_plan
from partial_credit.atomic import atomic_reward, rarity
from policy import build_tiny
from prompts.answer_format import AnswerFormat
from rewards import RewardBreakdown, RewardConfig
from rollout import Rollout
from running.drawing import HALF_LIFE
from scoring.verdicts import ExampleScore
from scoring.voting import Candidate
from settings import DEFAULTS_BEFORE

ROOT = Path(__file__).parents[1]
SHORT = ["--cold-start-steps", "12", "--cold-start-batch", "8", "--prompts-per-step", "2", "--group-size", "2",
         "--max-completion-tokens", "12", "--eval-every", "2", "--eval-questions", "4", "--test-questions", "6",
         "--threads", "1", "--sql-workers", "1", "--kl-coef", "0.02"]


def call(*arguments):
    """(exit status, stdout, stderr) of train.py, run in this process."""
    return run_in_process(train, *arguments)


def run(*arguments, check=0):
    status, out, err = call(*arguments)
    assert status == check, out[-2000:] + err[-2000:]
    return out + err


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(records):
    return [{k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per_second", "peak_memory"))}
            for r in records]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    done = subprocess.run([sys.executable, "train.py", *SHORT, "--steps", "4", "--save-every", "2", "--output", folder],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """Flags of a run on 24 questions with traces and six for the test: a second, where the demo takes ten."""
    folder = tmp_path_factory.mktemp("data")
    tiny_database(folder / "music.sqlite")
    records = [{"db_id": "music", "question": f"How many singers are older than {n}?", "trace": f"count ages above {n}",
                "sql": f"SELECT COUNT(*) FROM singer WHERE age > {n}", "split": "train" if n < 24 else "dev"} for n in range(30)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    return [*SHORT, "--data", str(folder / "mine.jsonl")]


@pytest.fixture(scope="module")
def small(small_data):
    """The same with a policy of two layers."""
    return [*small_data, "--lr", "3e-4", "--model", str(little_policy_folder(Path(small_data[-1]).with_name("music.sqlite")))]


@pytest.fixture(scope="module")
def small_run(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(*small, "--steps", 4, "--save-every", 2, "--output", folder)
    return folder


def test_the_demo_prints_before_and_after_and_writes_its_folder(demo_run):
    folder, output = demo_run
    assert "before GRPO" in output and "after GRPO" in output and "gain" in output
    assert all(len(line) <= 80 for line in output.splitlines() if line.startswith(("test", "unseen", "held-out")))
    for name in ("config.json", "metrics.jsonl", "rollouts.jsonl", "result.json", "report.html", "best/config.json",
                 "checkpoints/step-0/model.safetensors", "checkpoints/step-4/memory.npz"):
        assert (folder / name).is_file(), name
    metrics = lines(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    for name in ("reward", "reward/format", "reward/execution", "reward/atomic", "reward/memory", "reward_std", "kl",
                 "execution_accuracy", "flat_groups", "clip_fraction_low", "entropy", "completion_length", "truncated",
                 "seconds/rollout", "seconds/rewards", "seconds/reference", "seconds/update", "tokens_per_second",
                 "peak_memory_mb", "memory_size", "grad_norm", "lr"):
        assert name in metrics[0], name
    assert "dev_accuracy" in metrics[1] and "dev_accuracy" not in metrics[0]
    groups = lines(folder / "rollouts.jsonl")
    assert len(groups) == 4 * 2 and all(len(g["completions"]) == 2 for g in groups)
    fates = [part["statuses"] for parts in json.loads((folder / "result.json").read_text()).values() for part in parts.values()]
    assert all("refused" not in fate for fate in fates) and any("format" in fate for fate in fates)


def test_a_run_with_a_template_and_an_answer_style_of_its_own(small_data, tmp_path):
    """From the cold start over the reward to the record that an evaluation reads."""
    file, folder = tmp_path / "own.jinja", tmp_path / "run"
    file.write_text("{% set chat = false %}{{ schema.compact }}\nask : {{ question | space_out }}\n")
    run(*small_data, "--cold-start-steps", 60, "--max-completion-tokens", 80, "--steps", 2, "--output", folder,
        "--prompt-template", file, "--answer", "think-answer", "--test-questions", 0)
    config = json.loads((folder / "config.json").read_text())
    assert config["answer_style"] == "think-answer" and config["template_text"] == file.read_text()
    texts = [one["text"] for group in lines(folder / "rollouts.jsonl") for one in group["completions"]]
    assert any("<answer>" in text for text in texts)
    file.write_text("{{ question }} of another day")
    out = tmp_path / "a.json"
    status, _, err = run_in_process(evaluate, "--model", folder / "best", "--data", small_data[-1], "--threads", "1",
                                    "--workers", "1", "--limit", "2", "--json", out)
    protocol = json.loads(out.read_text())["protocol"]
    assert (status, protocol["answer_style"], protocol["prompt_style"]) == (0, "think-answer", "own.jinja"), err
    assert protocol["template"] == sha256(config["template_text"].encode()).hexdigest()[:16]
    assert run("--resume", "--output", folder, "--prompt-template", file, check=2).count("template") > 0


def test_resume_is_bit_exact(small, small_run, tmp_path):
    whole, half = small_run, tmp_path / "half"
    code = ("import sys, train; sys.argv[1:] = sys.argv[2:]; save = train.Trainer.save\n"
            "def stop(self):\n save(self)\n if self.step == 2: import os; os._exit(9)\n"
            "train.Trainer.save = stop; train.run_main(train.main)")
    arguments = [*small, "--steps", "4", "--save-every", "2", "--output", str(half)]
    killed = subprocess.run([sys.executable, "-c", code, "x", *arguments], cwd=ROOT, capture_output=True, timeout=300)
    assert killed.returncode == 9, killed.stderr[-2000:]
    with open(half / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "half a li')  # what a kill can leave
    assert "resuming from" in run(*arguments, "--resume")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert without_times(lines(half / name)) == without_times(lines(whole / name))
    for name in ("checkpoints/step-4/model.safetensors", "best/model.safetensors"):
        assert (half / name).read_bytes() == (whole / name).read_bytes()
    one, two = (torch.load(f / "checkpoints/step-4/trainer.pt", weights_only=True)["optimizer"] for f in (half, whole))
    for a, b in zip(one["state"].values(), two["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    with np.load(half / "checkpoints/step-4/memory.npz") as a, np.load(whole / "checkpoints/step-4/memory.npz") as b:
        assert all((a[key] == b[key]).all() for key in a)


def test_a_run_from_before_a_setting_was_there_keeps_what_it_had(small, small_run, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(small_run, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in DEFAULTS_BEFORE:
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    refused = run(*small, "--steps", 4, "--save-every", 2, "--output", folder, "--resume", "--memory-names", "roles", check=2)
    assert "was started with memory_names = written, not roles" in refused
    run(*small, "--steps", 4, "--save-every", 2, "--output", folder, "--resume")


def test_resuming_a_finished_run_changes_nothing(small, small_run):
    before = (small_run / "metrics.jsonl").read_bytes()
    assert "after GRPO" in run(*small, "--steps", 4, "--save-every", 2, "--output", small_run, "--resume")
    assert (small_run / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def asked(monkeypatch):
    """(step, questions) of every evaluation of a run, which falls by a tenth a step."""
    calls, measure = [], HeldOut.measure

    def measured(self, questions, step):
        calls.append((step, len(questions)))
        found = measure(self, questions, step)
        found["execution_accuracy"][self.s.run.match] = 0.5 - 0.1 * step
        return found

    monkeypatch.setattr(HeldOut, "measure", measured)
    return calls


def test_the_start_is_kept_where_no_later_policy_is_better_on_dev(small, tmp_path, asked):
    flags = [*small, "--steps", 2, "--eval-every", 1, "--lr", 0.01, "--lr-warmup", 0]
    told = run(*flags, "--output", tmp_path / "run")
    assert asked == [(0, 2), (0, 6), (1, 2), (2, 2)]  # the test once, for it is the same policy
    assert "step 0: 50.0 % of dev right" in told and "run/best (that of step 0, because no later one was better on dev)" in told
    assert (tmp_path / "run" / "best" / "step.txt").read_text() == "0\n"
    assert [one.get("start_dev_accuracy") for one in lines(tmp_path / "run/metrics.jsonl")] == [0.5, None]
    best, first, last = ((tmp_path / "run" / place / "model.safetensors").read_bytes()
                         for place in ("best", "checkpoints/step-0", "checkpoints/step-2"))
    assert best == first != last
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["before"] == result["after"]


def test_samples_on_dev_are_counted_one_by_one_and_together(small, tmp_path, monkeypatch):
    """Of four answers to each dev question, two are right to the first and none to the second."""
    calls = []

    def sampled(policy, prompts, exam, support, asked):
        calls.append((len(prompts), exam.samples, exam.temperature))
        counts = [re.search(r"older than ([0-9]+)", policy.decode(prompt))[1] for prompt in prompts]
        gold = [f"SELECT COUNT(*) FROM singer WHERE age > {n}" for n in counts]
        wrong = ["SELECT COUNT(*) + 1000 FROM singer", "SELECT nothing", ""]
        return [[Candidate("", "", sql, 0.0, 1, False) for sql in some]
                for some in ([gold[0], gold[0], *wrong[:2]], [wrong[0], *wrong])]

    monkeypatch.setattr(held_out, "sample_candidates", sampled)
    run(*small, "--steps", 2, "--eval-every", 2, "--eval-samples", 4, "--temperature", 0.9, "--test-questions", 0,
        "--output", tmp_path / "run")
    assert calls == [(2, 4, 0.9)] * 2  # of step 0 and of step 2
    first, last = lines(tmp_path / "run" / "metrics.jsonl")
    assert (first["start_dev_samples"], first["start_dev_pass_at_n"]) == (last["dev_samples"], last["dev_pass_at_n"]) == (0.25, 0.5)


def test_a_dev_that_could_not_be_read_wholly_chooses_no_policy(small, tmp_path, monkeypatch):
    """A step is asked fewer questions, all of them easy: it is no better for that, and no point of the curve."""
    measure = HeldOut.measure

    def measured(self, questions, step):
        found = measure(self, questions, step) | ({"unavailable": [{"id": "1"}]} if step == 1 else {})
        found["execution_accuracy"][self.s.run.match] = (0.2, 1.0, 0.3)[step]
        return found

    monkeypatch.setattr(HeldOut, "measure", measured)
    run(*small, "--steps", 2, "--eval-every", 1, "--test-questions", 0, "--output", tmp_path / "run")
    assert (tmp_path / "run" / "best" / "step.txt").read_text() == "2\n"
    assert [one.get("dev_accuracy") for one in lines(tmp_path / "run/metrics.jsonl")] == [None, 0.3]


@pytest.mark.parametrize("flags, expected", [
    (["--steps", 0], [(0, 6)]), (["--steps", 1, "--eval-every", 0], [(0, 6), (1, 6)]),
    (["--steps", 1, "--eval-questions", 0], [(0, 6), (1, 6)]), (["--steps", 1, "--test-questions", 0], [(0, 2), (1, 2)])])
def test_no_policy_answers_the_same_questions_twice(small, tmp_path, asked, flags, expected):
    told = run(*small, *flags, "--output", tmp_path / "run")
    assert asked == expected and ("before GRPO" in told) == (expected[0] == (0, 6))


def test_a_run_made_longer_is_the_run_that_began_so(small, small_run, tmp_path):
    folder = tmp_path / "longer"
    run(*small, "--steps", 2, "--save-every", 2, "--output", folder)
    assert "has done 2 steps, more than --steps 1" in run("--resume", "--steps", 1, "--output", folder, check=2)
    assert json.loads((folder / "config.json").read_text())["steps"] == 2
    told = run("--resume", "--steps", 4, "--output", folder)
    assert "the run goes on to step 4 instead of 2" in told and "lr-decay" not in told
    assert without_times(lines(folder / "metrics.jsonl")) == without_times(lines(small_run / "metrics.jsonl"))
    for name in ("checkpoints/step-4/model.safetensors", "best/model.safetensors", "result.json"):
        assert (folder / name).read_bytes() == (small_run / name).read_bytes()
    assert json.loads((folder / "config.json").read_text())["steps"] == 4


def test_a_decay_that_is_spread_over_more_steps_is_told(capsys):
    trainer = object.__new__(train.Trainer)
    trainer.s = train.parse_settings(["--lr", "0.001", "--lr-decay", "--steps", "300", "--output", "x"])
    trainer.step, trainer.folder = 200, SimpleNamespace(stored={"steps": 200})
    trainer.say_new_length()
    told = capsys.readouterr().out
    assert "from step 200 on the learning rate is 0.0004, where it was 0.0001" in told and "--steps 300" in told
    trainer.folder.stored["steps"] = 300
    trainer.say_new_length()
    assert not capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits_130(small, tmp_path, number):
    folder = tmp_path / "stopped"
    arguments = [*small, "--steps", "100000", "--test-questions", "0", "--output", str(folder)]
    process = subprocess.Popen([sys.executable, "train.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130 and "--resume" in output, output[-2000:]
    last = lines(folder / "metrics.jsonl")[-1]["step"]
    assert (folder / f"checkpoints/step-{last}" / "trainer.pt").is_file()


def test_an_interrupt_before_the_first_step_keeps_the_cold_start(small, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    folder = tmp_path / "early"
    arguments = [*small, "--steps", "1", "--output", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "evaluate_tests", interrupted)
        assert "go on from step 0 with --resume" in run(*arguments, check=130)
    output = run(*arguments)  # the same command goes on
    assert "resuming from" in output and "cold start:" not in output and "before GRPO" in output
    shutil.rmtree(folder / "checkpoints")
    again = run(*arguments, "--resume")  # with all checkpoints gone it starts anew, and so do the logs
    assert "cold start:" in again and [m["step"] for m in lines(folder / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("flags, told", [
    (["--reward-module", "missing.py", "--rewards", "format,execution=2,user=0.5"], "missing.py"),
    (["--embedder", "no/such/encoder/anywhere"], "no/such/encoder/anywhere"),
    (["--lora-rank", "8"], "tiny"), (["--lr", "nan"], "--lr is nan"), (["--threads", "-3"], "--threads is -3"),
    (["--cold-start-batch", "0"], "--cold-start-batch is 0"), (["--test-questions", "-1"], "--test-questions is -1"),
    (["--seed", "-1"], "--seed is -1"), (["--seed", "9" * 20], "--seed is 9.*at most"),
    (["--plan", "-5"], "--plan is -5"), (["--plan", "0"], "--plan is 0.0; it must be above 0"), (["--sql-timeout", "0"], "--sql-timeout is 0"),
    (["--lr-warmup", "-5"], "--lr-warmup is -5"),
    (["--questions-per-database", "3"], "--questions-per-database 3 does not divide --prompts-per-step 2"),
    (["--max-value-hints", "-1"], "max"), (["--warn-kl", "nan"], "kl is nan")])
def test_what_cannot_work_is_told_before_anything_is_trained_and_blocks_no_folder(small_data, tmp_path, monkeypatch, flags, told):
    folder = tmp_path / "run"
    monkeypatch.setattr(train, "cold_start", None)  # it would fail if it were called
    monkeypatch.setattr(sys, "argv", ["train.py", *small_data, "--steps", "1", "--output", str(folder), *flags])
    with pytest.raises(UserError, match=told):
        train.main()
    assert not folder.exists()


def test_the_length_penalty_has_dapos_values():
    config = GRPOConfig(max_completion_tokens=100, overlong="penalise", overlong_buffer=40)
    groups = [Group(torch.zeros(1), [torch.zeros(n) for n in lengths], [], []) for lengths in ((1, 60, 70), (80, 90, 100))]
    torch.testing.assert_close(variants.overlong_penalty(groups, config),
                               torch.tensor([[0.0, 0.0, -0.25], [-0.5, -0.75, -1.0]]))
    fifth = variants.overlong_penalty(groups, GRPOConfig(max_completion_tokens=100))
    torch.testing.assert_close(fifth, torch.tensor([[0.0, 0.0, 0.0], [0.0, -0.5, -1.0]]))


def test_token_ratios_are_kept_every_so_many_steps_and_in_the_last(small, tmp_path):
    folder = tmp_path / "run"
    run(*small, "--steps", "3", "--test-questions", "0", "--eval-every", "0", "--token-ratios-every", "2", "--output", folder,
        "--lr", "0.01", "--lr-warmup", "0")
    kept = {}
    for group in lines(folder / "rollouts.jsonl"):
        for one in group["completions"]:
            if "ratios" in one:
                kept.setdefault(group["step"], []).append(one)
                assert len(one["ratios"]) == len(one["tokens_text"]) == one["tokens"]
    assert set(kept) == {2, 3}
    assert any(ratio != 1.0 for one in kept[3] for ratio in one["ratios"])  # after the update


@pytest.mark.parametrize("rewards", ["format,execution", "execution", "format", "atomic", "memory", "format,atomic",
                                     "format,memory", "execution,memory", "format,execution,atomic=0.5"])
def test_other_sets_of_rewards_run(small, tmp_path, rewards):
    folder = tmp_path / "run"
    told = run(*small, "--steps", "1", "--test-questions", "0", "--eval-every", "0", "--rewards", rewards, "--output", folder,
               "--cold-start-steps", "2")
    first = lines(folder / "metrics.jsonl")[0]
    on = {part.split("=")[0] for part in rewards.split(",")}
    assert ("seconds/rewards/atomic" in first) == ("atomic" in on)
    assert ("all questions are on one database, and the memory compares with traces of others" in told) == ("memory" in on)
    assert ("seconds/rewards/memory" in first) == ("memory" in on) == (folder / "checkpoints/step-1/memory.npz").exists()


def test_sharpened_rewards_are_those_of_the_training_questions(small, tmp_path):
    """Operations are weighed by the golds that the run trains on, as one can tell from its log."""
    folder = tmp_path / "run"
    run(*small, "--steps", "2", "--test-questions", "0", "--eval-every", "0", "--eval-questions", "0", "--output", folder,
        "--rewards", "format,execution,atomic,memory", "--atomic-weights", "rare", "--memory-names", "roles",
        "--execution-runs", "0.5", "--cold-start-steps", "60", "--max-completion-tokens", "40", "--group-size", "8")
    schema = columns_of({"music": Path(small[small.index("--data") + 1]).with_name("music.sqlite")})["music"]
    weight = rarity([(f"SELECT COUNT(*) FROM singer WHERE age > {n}", schema) for n in range(24)])
    shape, seen = RewardConfig().shape, set()
    for group in lines(folder / "rollouts.jsonl"):
        for one in group["completions"]:
            if one["status"] == "format":
                continue
            rewards = one["rewards"]
            seen.add(rewards["execution"])
            if rewards["execution"] < 2:
                assert rewards["execution"] == 0.5 * (one["status"] == "ok")
                assert rewards["atomic"] == pytest.approx(
                    shape(atomic_reward(one["sql"], group["gold_sqls"], schema, weight)), abs=1e-4)
    assert len(seen) > 1


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory):
    """A local Hugging Face folder with a chat template, as --model qwen2.5-3b is once it is downloaded."""
    folder = tmp_path_factory.mktemp("model")
    policy = build_tiny(["system user assistant Database schema CREATE TABLE singer ( name TEXT )"] * 2, seed=0,
                        vocab_size=400, width=16, layers=1)
    policy.tokenizer.chat_template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
                                      "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    policy.save(folder)
    return folder


def test_a_local_chat_checkpoint_on_ones_own_data(chat_checkpoint, tmp_path):
    table = "shop"
    database = tmp_path / f"{table}.sqlite"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE item (name TEXT, price INTEGER)")
        connection.execute("INSERT INTO item VALUES ('lamp', 30)")
    records = [{"question": f"What costs more than {n}?", "db_id": table, "sql": f"SELECT name FROM item WHERE price > {n}",
                "split": "dev" if n > 24 else "train"} for n in range(28)]
    records.append({"question": "Broken gold?", "db_id": table, "sql": "SELECT nothing FROM nowhere", "split": "train"})
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    folder = tmp_path / "run"
    output = run("--model", chat_checkpoint, "--data", tmp_path / "mine.jsonl", "--steps", 2, *SHORT, "--embedder", "policy",
                 "--output", folder)
    assert "1 of" in output and "left out" in output and "error" in output
    assert len(lines(folder / "metrics.jsonl")) == 2


@pytest.mark.parametrize("empty_gold, kept", [("keep", 18), ("drop", 9)])
def test_b4_golds_that_fail_leave_training_and_are_counted(tmp_path, tiny_db, monkeypatch, capsys, empty_gold, kept):
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c"
    golds = ["SELECT name FROM singer", "SELECT name FROM singer WHERE age > 99", "SELECT nothing", endless]
    records = [{"question": f"q{i}?", "db_id": "music", "split": "train", "sql": golds[i // 9 if i < 27 else 3]}
               for i in range(28)]
    (tmp_path / "mine.json").write_text(json.dumps(records))
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, "--data", str(tmp_path / "mine.json"), "--steps", "0",
                                      "--sql-timeout", "0.5", "--eval-questions", "0", "--test-questions", "0", "--cold-start-steps", "0",
                                      "--empty-gold", empty_gold, "--output", str(tmp_path / "run")])
    assert train.main() == 0
    printed = capsys.readouterr().out
    counts, left_out = re.search(r"training golds: (\{.*\}); (\d+) of 28 questions left out", printed).groups()
    assert json.loads(counts.replace("'", '"')) == {"ok": 9, "empty": 9, "error": 9, "timeout": 1}
    assert '  question 18, error: near "nothing": syntax error (' in printed and "; and 8 more like it" in printed
    assert "  question 27, timeout: no result within 0.5 s (" in printed
    assert int(left_out) == 28 - kept and "left out 10 of 28 traces: their gold SQL fails" in printed


def test_groups_whose_database_is_locked_are_left_out_of_the_step(small, tmp_path, monkeypatch):
    database, steps = Path(small[small.index("--data") + 1]).with_name("music.sqlite"), train.Trainer.take_step

    def take_step(trainer):
        writer = sqlite3.connect(database, isolation_level=None)
        writer.execute("BEGIN EXCLUSIVE" if trainer.step == 2 else "BEGIN")
        step = steps(trainer)
        writer.close()
        return step

    learned, learn = [], train.Drawing.learn
    monkeypatch.setattr(train.Drawing, "learn", lambda self, *seen: (learned.append(len(seen[0])), learn(self, *seen)))
    monkeypatch.setattr(train.Trainer, "take_step", take_step)
    monkeypatch.setattr(AnswerFormat, "read", lambda *_: ("count ages", "SELECT COUNT(*) FROM singer"))
    printed = run(*small, "--steps", 3, "--sql-timeout", 0.1, "--eval-every", 0, "--test-questions", 0, "--cold-start-steps", 0,
                  "--output", tmp_path / "run")
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert re.search(r"warning, step 2: 2 of 2 groups are left out, since their database could not be read\n"
                     r"  question \S+, unavailable: database is locked \(\S+music.sqlite\); and 1 more like it", printed)
    assert ["reward" in one for one in metrics] == ["flat_groups" in one for one in metrics] == [True, False, True]
    assert [one.get("status/unavailable", 0) > 0 for one in metrics] == [False, True, False]
    assert learned == [2, 0, 2]  # no verdict is no wrong answer: nothing is learned of how hard these questions are
    assert [group["step"] for group in lines(tmp_path / "run/rollouts.jsonl")] == [1, 1, 3, 3]
    groups, _, _ = torch.load(tmp_path / "run/checkpoints/step-3/trainer.pt")["seen"][()]  # what is drawn next learns from these
    assert groups == pytest.approx(2 * 0.5 ** (2 / HALF_LIFE) + 2)
    assert (tmp_path / "run/report.html").is_file()


def test_a_group_that_is_left_out_moves_no_other():
    def row(*totals, status="ok"):
        return [RewardBreakdown(total=total, status=status) for total in totals]

    def advantages_of(rows, scale):
        return rollout.advantages_of(rows, RewardConfig(rewards="format,execution"), GRPOConfig(advantage_scale=scale))

    for scale in ("group", "batch", "none"):
        alone = advantages_of([row(1.0, 3.0), row(0.0, 1.0)], scale)
        rows = [row(1.0, 3.0), [*row(1.0), *row(0.0, status="unavailable")], row(0.0, 1.0)]
        assert torch.equal(advantages_of(rows, scale)[[0, 2]], alone) and alone.any()
        assert not advantages_of(rows, scale)[1].any()
        assert not advantages_of(rows[1:2], scale).any()
    group = SimpleNamespace(completions=[torch.ones(3), torch.ones(5)], truncated=[False, True], entropies=[torch.ones(3), torch.ones(5)], sampled=())
    rollouts = [Rollout(None, group, row(1.0, 3.0)), Rollout(None, group, [*row(1.0), *row(0.0, status="unavailable")])]
    found = train.step_metrics(1, rollouts, ["format"], {}, {"all": 1.0}, {})
    assert (found["reward"], found["reward_std"], found["execution_accuracy"]) == (2.0, pytest.approx(2 ** 0.5), 0.0)
    assert found["status/unavailable"] == 0.25 and found["truncated"] == 0.5
    assert Rollout(None, group, [RewardBreakdown(correct=True), RewardBreakdown()]).mixed
    assert not Rollout(None, group, [RewardBreakdown(correct=True), *row(0.0, status="unavailable")]).mixed


def test_held_back_questions_whose_golds_all_fail_are_no_test(tmp_path, tiny_db, monkeypatch, capsys):
    records = [{"question": f"q{i}?", "db_id": "music", "split": split, "sql": sql}
               for i, (split, sql) in enumerate([("train", "SELECT name FROM singer")] * 4 + [("test", "SELECT nothing")] * 2)]
    (tmp_path / "mine.json").write_text(json.dumps(records))
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, "--data", str(tmp_path / "mine.json"), "--steps", "0",
                                      "--cold-start-steps", "0", "--output", str(tmp_path / "run")])
    assert train.main() == 0 and "2 of 2 questions left out" in capsys.readouterr().out


def test_a_run_without_room_for_all_weights_trains_adapters(chat_checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="peft is optional")
    monkeypatch.setattr(settings, "AUTO_RANK", 2)  # of so small a model 16 would be more than all weights
    flags = ["--model", str(chat_checkpoint), "--steps", "2", *SHORT]
    whole, adapted = (settings.peak_of(train.parse_settings([*flags, "--lora-rank", rank])) for rank in ("0", "2"))
    monkeypatch.setattr(train, "memory_free", lambda *_: (whole + adapted) / 2 / memory_plan.SHARE)
    output = run(*flags, "--output", tmp_path / "run")
    assert "--lora-rank auto: adapters of rank 2 are trained" in output and "learning rate 2e-05" in output
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["lora_rank"] == 2 and config["lr"] == train.parse_settings([*flags, "--lora-rank", "2"]).run.lr
    assert (tmp_path / "run" / "checkpoints" / "step-0" / "adapter_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best") is not None
    monkeypatch.setattr(train, "memory_free", lambda *_: 0.0)  # which stops no resumed run
    assert "resuming from" in run("--resume", "--output", tmp_path / "run", "--eval-every", "0")


def test_what_does_not_fit_is_refused_before_anything_is_read_or_written(chat_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_splits", lambda *_, **__: pytest.fail("data was read"))
    monkeypatch.setattr(train, "memory_free", lambda *_: 1e8)
    for rank, trained in (("auto", "adapters of rank 16"), ("0", "all weights"), ("4", "adapters of rank 4")):
        error = run("--model", chat_checkpoint, "--lora-rank", rank, "--output", tmp_path / "run", check=2)
        assert re.search(rf"error: training {trained} of .* needs .* GB in update, and 0.1 GB are free, .* GB too few; ", error)
        assert "Traceback" not in error and not (tmp_path / "run").exists()


def test_spider(shared_data, tmp_path):
    folder, real = tmp_path / "spider", shared_data / "spider"
    folder.mkdir()
    for name in ("database", "tables.json", "dev.json"):
        (folder / name).symlink_to(real / name)
    records = json.loads((real / "train_spider.json").read_text())
    without = [record for record in records if record["db_id"] == "formula_1"][:20]  # its database is missing
    (folder / "train_spider.json").write_text(json.dumps(records[:100] + without))
    output = run("--data", "spider", "--data-dir", folder, "--steps", 1, *SHORT, "--max-prompt-tokens", 300,
                 "--output", tmp_path / "run")
    assert "left out 20 of 120 questions" in output and "formula_1" in output
    first = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert any(name.startswith("status/") for name in first)


def sentence(*arguments):
    """The one line on stderr of a run that is refused with exit status 2."""
    status, _, err = call(*arguments)
    text = err.strip().splitlines()
    assert status == 2 and len(text) == 1 and text[0].startswith("error: "), err[-2000:]
    return text[0]


def test_bad_input_is_one_sentence_and_status_2(tmp_path, small, small_run):
    new = ("--output", tmp_path / "new")
    done = subprocess.run([sys.executable, "train.py", "--group-size", "1", *new], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: --group-size is 1") and done.stderr.count("\n") == 1
    assert "hf download Qwen/Qwen2.5-3B-Instruct" in sentence("--model", "qwen2.5-3b", *new)
    assert str(tmp_path / "none") in sentence("--data", "spider", "--data-dir", tmp_path / "none", *new)
    assert "needs --data-dir" in sentence("--data", "bird", *new)
    assert "could outrank" in sentence("--rewards", "execution,atomic=3", *new)
    (tmp_path / "mine.json").write_text('[{"question": "?", "db_id": "x", "sql": "SELECT 1"},]')
    assert "mine.json, line 1: broken JSON" in sentence("--data", tmp_path / "mine.json", *new)
    (tmp_path / "mine.json").write_text('[{"question": "?", "db_id": "x", "sql": "SELECT 1"}]')
    assert "record 1: no database" in sentence("--data", tmp_path / "mine.json", *new)
    (tmp_path / "x.sqlite").write_text("not a database")
    assert "not a SQLite database" in sentence("--data", tmp_path / "mine.json", *new)
    before = sorted(p.name for p in small_run.iterdir())
    assert "already holds a run" in sentence(*small, "--output", small_run)
    assert sorted(p.name for p in small_run.iterdir()) == before
    assert "no run to resume" in sentence(*small, "--resume", *new)
    assert "was started with seed = 0" in sentence(*small, "--resume", "--steps", 4, "--save-every", 2, "--seed", 3,
                                                   "--output", small_run)
    assert not (tmp_path / "new").exists()


def test_a_start_brings_its_prompts_and_is_trained_as_its_model_is(tmp_path):
    start = tmp_path / "run" / "checkpoints" / "step-0"
    start.mkdir(parents=True)
    config = train.parse_settings(["--model", "smollm2-135m", "--recipe", "laptop", "--data", "spider"]).as_dict()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    given = ["--model", "smollm2-135m", "--start", str(start)]
    assert train.parse_settings(given).prompts == train.parse_settings(["--start", "none", "--model", "smollm2-135m", "--recipe", "laptop"]).prompts
    assert train.parse_settings(given).prompts.style == "compact"
    assert train.parse_settings([*given, "--prompt-style", "full"]).prompts.style == "full"  # flags that are given win
    with pytest.raises(UserError, match="was trained from --model smollm2-135m.*give --model smollm2-135m"):
        train.parse_settings(["--start", str(start)])
    best = start.parents[1] / "best"
    (best / "adapters").mkdir(parents=True)
    with pytest.raises(UserError, match="merged into bf16 weights, rounded: begin with .*best/adapters and --lora-rank"):
        train.parse_settings(["--model", "smollm2-135m", "--start", str(best)])
    assert train.parse_settings([*given[:2], "--start", str(best / "adapters")]).prompts.style == "compact"
    (start / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds LoRA adapters.*--lora-rank"):
        train.parse_settings(given)
    assert train.parse_settings([*given, "--lora-rank", "8"]).run.lora_rank == 8


def test_adapters_are_not_sharded_with_a_kl(monkeypatch):
    monkeypatch.setattr(train.distributed, "size", lambda: 2)
    flags = ["--model", "smollm2-135m", "--lora-rank", "4", "--sharding", "on", "--kl-coef", "0.1"]
    with pytest.raises(UserError, match="--sharding on cannot compute the KL to adapters"):
        train.run_all(train.parse_settings(flags))


def test_too_little_disk_is_refused_before_anything_is_written(small_data, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "free_space", lambda folder: 1000)
    monkeypatch.setattr(sys, "argv", ["train.py", *small_data, "--output", str(tmp_path / "run")])
    with pytest.raises(UserError, match="free, but checkpoints of this model need"):
        train.main()


def scored(correct, total):
    return RewardBreakdown(correct=correct, total=total, status="ok")


class Script:
    """Questions in a fixed order, in place of a Drawing."""

    def __init__(self, questions):
        self.questions, self.drawn, self.learned = questions, 0, []

    def draw(self, count):
        self.drawn += count
        return self.questions[self.drawn - count:self.drawn]

    def learn(self, numbers, correct):
        self.learned += zip(numbers, correct, strict=True)


def test_a19_dynamic_sampling_goes_by_execution_accuracy_not_by_the_shaped_reward(monkeypatch):
    right, wrong = scored(True, 4.0), [scored(False, 1.0 + i) for i in range(3)]
    rows = {0: [right, wrong[0]], 1: [wrong[0], wrong[1]], 2: [right, right], 3: [wrong[2], right], 4: [wrong[1], right]}
    policy = SimpleNamespace(model=None, eos_ids=())
    monkeypatch.setattr("second_try.sample_groups", lambda model, prompts, *_, **__: [f"group {int(p)}" for p in prompts])

    def rolled(extra, questions, B=2):
        s = train.parse_settings(["--prompts-per-step", str(B), "--dynamic-sampling", str(extra), "--output", "x"])
        maker = rollout.RolloutMaker(s, policy, None, [rollout.Question(q, q) for q in rows], Script(questions), None, nullcontext)
        maker.score = lambda examples, groups: [Rollout(e, group, rows[e]) for e, group in zip(examples, groups, strict=True)]
        chosen, sampled = maker.make(train.StepRecord().timed)
        asked = questions[:maker.drawing.drawn]
        assert maker.drawing.learned == [(q, [b.correct for b in rows[q]]) for q in asked]
        assert sampled == [Rollout(q, f"group {q}", rows[q]) for q in asked]  # what is logged tells the policy's accuracy
        assert chosen == [Rollout(one.example, f"group {one.example}", rows[one.example]) for one in chosen]
        return [one.example for one in chosen]

    assert rolled(0, [1, 2]) == [1, 2]  # off: whatever came
    assert rolled(5, [0, 1, 2, 3]) == [0, 3]  # all wrong but unequal in reward (1), all right (2): replaced
    assert rolled(5, [1, 2, 0, 3, 4, 4]) == [0, 3]  # no more rollouts than needed
    assert rolled(1, [1, 2, 0, 2]) == [0, 2]  # not enough: filled up, to be given advantage 0
    assert [Rollout(q, None, rows[q]).mixed for q in rows] == [True, False, False, True, True]


def test_a_run_in_bf16_resumes_bit_for_bit(small, tmp_path):
    flags = [*small, "--steps", 2, "--save-every", 1, "--precision", "bf16"]
    run(*flags, "--output", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-2")
    run(*flags, "--output", tmp_path / "half", "--resume")
    one, two = (without_times(lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "half"))
    assert one == two and all(1e-5 < step["sampler_gap"] < 0.05 for step in one)  # float32: about 1e-7
    weights = [(tmp_path / name / "checkpoints/step-2/model.safetensors").read_bytes() for name in ("whole", "half")]
    assert weights[0] == weights[1]


def test_a_run_with_dynamic_sampling_and_a_length_penalty_resumes_bit_for_bit(small, tmp_path):
    flags = [*small, "--steps", 2, "--save-every", 1, "--dynamic-sampling", 2, "--overlong", "penalise",
             "--draw", "informative", "--questions-per-database", 2, "--rewards", "format,execution"]
    run(*flags, "--output", tmp_path / "whole")
    run(*flags, "--output", tmp_path / "half")
    half = tmp_path / "half"
    shutil.rmtree(half / "checkpoints" / "step-2")
    run(*flags, "--output", half, "--resume")
    one, two = (without_times(lines(folder / "metrics.jsonl")) for folder in (tmp_path / "whole", half))
    assert one == two and one[0]["questions_drawn"] == 6  # nothing is right yet: all extra rollouts are used
    assert [step["flat_groups"] for step in one] == [1.0, 1.0]  # so no group has an advantage
    penalties = [c["rewards"]["overlong"] for group in lines(half / "rollouts.jsonl") for c in group["completions"]]
    assert min(penalties) < 0 and all(step["reward/overlong"] < 0 for step in one)
    for group in lines(half / "rollouts.jsonl"):
        for c in group["completions"]:
            assert c["rewards"]["total"] == pytest.approx(sum(c["rewards"][name] for name in ("format", "execution", "overlong")))
    text = run(*flags[:-1], "format,atomic", "--output", tmp_path / "other", check=2)
    assert "needs the execution reward" in text


def test_a_resumed_run_notices_other_questions_and_keeps_what_it_began_with(small, tmp_path):
    """And the best policy of a step that is done again does not stand beside an older best score."""
    data = Path(small[small.index("--data") + 1])
    shutil.copytree(data.parent, tmp_path / "data")
    flags = [str(tmp_path / "data" / data.name) if flag == str(data) else flag for flag in small]
    first, second = tmp_path / "first", tmp_path / "second"
    run(*flags, "--steps", 2, "--save-every", 1, "--output", first)
    run(*flags, "--steps", 2, "--save-every", 1, "--eval-every", 1, "--output", second, "--start", first / "best")
    stored = json.loads((second / "config.json").read_text())
    assert stored["began_with"] == json.loads((first / "config.json").read_text()) and stored["questions"]["dev questions"]
    shutil.rmtree(first)
    shutil.rmtree(second / "checkpoints" / "step-2")
    (second / "best" / "step.txt").write_text("3\n")  # as if a step that is done again had been the best
    again = ["--resume", "--output", second]
    run(*again)
    assert (second / "best" / "step.txt").read_text() == "2\n"
    assert json.loads((second / "config.json").read_text())["began_with"] == stored["began_with"]
    file = tmp_path / "data" / data.name
    file.write_text(file.read_text().replace("count ages above 3", "count ages over 3"))
    assert "was started with other training questions" in run(*again, check=2)


def test_a_start_that_could_not_be_measured_gives_no_gain(small, tmp_path, monkeypatch):
    database, measure = Path(small[small.index("--data") + 1]).with_name("music.sqlite"), HeldOut.measure

    def locked(self, questions, step):
        writer = sqlite3.connect(database, isolation_level=None)
        writer.execute("BEGIN" if step else "BEGIN EXCLUSIVE")
        found = measure(self, questions, step)
        writer.close()
        return found

    monkeypatch.setattr(HeldOut, "measure", locked)
    monkeypatch.setattr(held_out, "greedy_sqls", lambda policy, prompts, *_, **__: ["SELECT count(*) FROM singer"] * len(prompts))
    printed = run(*small, "--steps", 1, "--sql-timeout", 0.1, "--eval-every", 0, "--cold-start-steps", 0, "--output", tmp_path / "run")
    assert "the gain is unknown: the 0 questions measured before differ from these" in printed and (tmp_path / "run/report.html").is_file()
    result = json.loads((tmp_path / "run/result.json").read_text(), parse_constant=pytest.fail)
    (name, before), = result["before"].items()
    assert before["n"] == 0 and before["execution_accuracy"]["bird"] is None and result["after"][name]["n"] > 0


def test_the_table_has_intervals_over_databases():
    scores = [ExampleScore(str(i), f"db{i % 3}", "easy", "", "ok", "ok", "", {"bird": i % 2 == 0}, 0.0, twins=str(i)) for i in range(30)]
    part = evaluate.summarise(scores)
    table = held_out.before_after_table({"test": part}, {"test": part}, "bird")
    low, high = part["interval_over_databases"]["bird"]
    assert "  over 3 databases" in table and table.count(f"[{100 * low:.1f}, {100 * high:.1f}]") == 2
    assert max(map(len, table.splitlines())) <= 80
    old = {name: value for name, value in part.items() if name != "interval_over_databases"}  # a run begun by an older version
    assert "databases" not in held_out.before_after_table({"test": old}, {"test": part}, "bird")


def test_no_gain_is_told_between_different_questions():
    """A question whose database could not be read is in neither figure; a whole tier may be missing."""
    def summary(unread, asked):
        scores = [ExampleScore(str(i), "db", "easy" if i < 5 else "hard", "", "unavailable" if i in unread else "ok", "ok", "",
                               {"bird": i % 2 == 0}, 0.0, twins=str(i)) for i in range(10)]
        return {"test": evaluate.summarise(scores) | {"questions": asked}}

    def table(before, after):
        text = held_out.before_after_table(before, after, "bird")
        assert max(map(len, text.splitlines())) <= 80 and "nan" not in text
        return text

    whole = summary([], "all")
    assert "gain                +0.0" in table(whole, whole)
    for before, after in ((summary([0], "not 0"), whole), (summary([0], "not 0"), summary([1], "not 1")),
                          (summary(range(5), "hard"), whole), (summary(range(10), "none"), whole)):
        assert " gain  " not in table(before, after) and "the gain is unknown" in table(before, after)
    assert "test: easy                          5                    -    60.0" in table(summary(range(5), "hard"), whole)
