"""runs.py and options.py: whole checkpoints or none, logs cut back, flags from dataclasses."""

import argparse
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from conftest import run_in_process

import ablate
import ask
import evaluate
import report
import sft
import train
from common import options
from common.errors import UserError, write_whole
from common.run_layout import checkpoint_of, checkpoints_of, final_policy, runs_of
from running import run_folder as runs
from running import show
from running.run_folder import RunFolder, load_state, replace_folder
from settings import CONFIGS, MAY_CHANGE_ON_RESUME, parse_settings

ROOT = Path(__file__).parents[1]


def test_a_new_run_refuses_a_folder_with_anything_in_it(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder(tmp_path, {"data": "demo"}, resume=False)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_logs_of_nobody_knows_what_are_not_taken_for_ours(tmp_path):
    (tmp_path / "events.out.tfevents.1.host.2.0").touch()
    with pytest.raises(UserError, match="already holds a run or other files"):
        RunFolder(tmp_path, {"data": "demo"}, resume=False)


def test_a_resumed_run_keeps_the_folder_that_its_paths_are_relative_to(tmp_path, monkeypatch):
    RunFolder(tmp_path, {"data": "mine.json"}, resume=False)
    before = (tmp_path / "config.json").read_text()
    monkeypatch.chdir(tmp_path)
    RunFolder(tmp_path, {"data": "mine.json"}, resume=True)
    assert (tmp_path / "config.json").read_text() == before


def test_resume_wants_the_same_settings_but_for_some(tmp_path):
    RunFolder(tmp_path, {"data": "demo", "seed": 0, "threads": 1}, resume=False)
    RunFolder(tmp_path, {"data": "demo", "seed": 0, "threads": 2}, resume=True, may_change=("threads",))
    with pytest.raises(UserError, match="seed = 0, not 1"):
        RunFolder(tmp_path, {"seed": 1, "threads": 2}, resume=True)
    (tmp_path / "config.json").write_text("{half")
    for broken in (b"{half", b"\xff"):
        (tmp_path / "config.json").write_bytes(broken)
        with pytest.raises(UserError, match="not valid JSON"):
            RunFolder(tmp_path, {"seed": 0}, resume=True)


@pytest.mark.parametrize("config", ['{"model_type": "qwen2", "data": "x"}', "[]", "{}"])
def test_resume_leaves_the_folder_of_a_model_as_it_is(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match="is not that of a run.*not one of its checkpoints"):
        RunFolder(tmp_path, {"data": "demo", "seed": 0}, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == config


def test_logs_are_cut_back_to_a_step(tmp_path):
    folder = RunFolder(tmp_path, {"data": "demo"}, resume=False)
    folder.log("metrics", [{"step": n, "x": "é\ud800"} for n in (1, 2, 3)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "ha')
    folder.cut_logs(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "best"
    replace_folder(target, lambda folder: (folder / "a").write_text("one"))

    def full_disk(folder):
        (folder / "a").write_text("tw")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left.*older checkpoints are intact"):
        replace_folder(target, full_disk)
    assert (target / "a").read_text() == "one"
    replace_folder(target, lambda folder: (folder / "a").write_text("two"))
    assert (target / "a").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["best"]


def test_leftovers_of_a_kill_are_removed_and_old_checkpoints_go(tmp_path):
    folder = RunFolder(tmp_path, {"data": "demo"}, resume=False)

    class Nothing:
        def save(self, path):
            (path / "model").write_text("weights")

    for step in (0, 1, 2, 3, 10):
        folder.save_checkpoint(step, Nothing(), {"step": step}, keep=2)
    assert [step for step, _ in folder.checkpoints()] == [0, 3, 10]
    (tmp_path / "checkpoints" / ".new-step-11").mkdir()
    again = RunFolder(tmp_path, {"data": "demo"}, resume=True)
    assert [step for step, _ in again.checkpoints()] == [0, 3, 10] and not list(tmp_path.glob("checkpoints/.new*"))
    newest = again.checkpoints()[-1][1]
    assert load_state(newest) == {"step": 10}
    for content in (b"", b"foreign", (newest / "trainer.pt").read_bytes()[:100]):
        (newest / "trainer.pt").write_bytes(content)
        with pytest.raises(UserError, match="not a whole checkpoint"):
            load_state(newest)


def test_resuming_skips_damaged_checkpoints_and_says_why(tmp_path, capsys):
    folder = RunFolder(tmp_path, {"data": "demo"}, resume=False)

    class Nothing:
        def save(self, path):
            (path / "model").write_text("weights")
            (path / "adapter").mkdir()
            (path / "adapter" / "weights").write_text("more")

    assert folder.newest_whole() is None
    for step in range(7):
        folder.save_checkpoint(step, Nothing(), {"step": step}, keep=9)
    at = lambda step: tmp_path / "checkpoints" / f"step-{step}"  # noqa: E731
    (at(6) / "model").write_text("Weights")  # flipped
    (at(5) / "trainer.pt").write_bytes((at(5) / "trainer.pt").read_bytes()[:-1])  # truncated
    (at(4) / "adapter" / "weights").unlink()  # missing
    (at(3) / runs.CHECKSUMS).write_text("[1")  # damaged itself
    (at(2) / runs.CHECKSUMS).unlink()  # foreign
    assert folder.newest_whole() == (1, at(1))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 5 and all(line.startswith("skipped ") for line in told)
    for line, why in zip(told, ("model is not what was written", "trainer.pt is not what was written",
                                "weights is missing", "checksums.json cannot be read", "checksums.json is missing"),
                         strict=True):
        assert line.endswith(why) or why in line
    assert [step for step, _ in folder.checkpoints()] == [0, 1]
    assert (tmp_path / "checkpoints" / "damaged-step-6" / "model").read_text() == "Weights"  # nothing is lost
    for step in (0, 1):
        (at(step) / "model").unlink()
    with pytest.raises(UserError, match="no whole checkpoint left"):
        folder.newest_whole()


def test_peak_memory_is_in_mebibytes():
    assert 10 < runs.peak_memory_mb() < 100_000


@dataclass(frozen=True)
class Sample:
    """A sample."""

    size: int = field(default=3, metadata={"help": "how many, 100 % sure"})
    name: str | None = field(default=None, metadata={"help": "what", "flag": "called"})
    fast: bool = field(default=False, metadata={"help": "hurry"})
    kind: str = field(default="a", metadata={"help": "which", "choices": ("a", "b")})
    hidden: int = 7


def test_flags_come_from_the_fields_and_absent_ones_stay_absent(capsys):
    parser = argparse.ArgumentParser()
    options.add_arguments(parser, Sample)
    given = vars(parser.parse_args(["--size", "5", "--fast", "--called", "x"]))
    assert given == {"size": 5, "fast": True, "name": "x"}
    assert options.build(Sample, given | {"other": 1}) == Sample(5, "x", True, "a")
    assert vars(parser.parse_args([])) == {}
    with pytest.raises(SystemExit):
        parser.parse_args(["--kind", "c"])
    parser.print_help()
    text = capsys.readouterr().out
    assert "100 % sure" in text and "(default: 3)" in text and "hidden" not in text


class Empty:
    """Something to save."""

    def save(self, path):
        (path / "model").write_text("weights")


def test_a_run_that_never_saved_a_checkpoint_does_not_block_its_folder(tmp_path):
    first, other, third = ({"data": "demo", "seed": seed} for seed in range(3))
    RunFolder(tmp_path, first, resume=False)
    (tmp_path / "checkpoints" / ".new-step-0").mkdir()  # killed while its first checkpoint was written
    (tmp_path / "gold_cache").mkdir()
    (tmp_path / "events.out.tfevents.1.host.2.0").touch()
    (tmp_path / "wandb").mkdir()
    kept = tmp_path / "checkpoints" / "step-0-backup"
    kept.mkdir()
    with pytest.raises(UserError, match="other files"):  # it would be deleted if the new run could not start
        RunFolder(tmp_path, other, resume=False)
    kept.rmdir()
    folder = RunFolder(tmp_path, other, resume=False)
    assert json.loads((tmp_path / "config.json").read_text()) == other | {"cwd": str(Path.cwd())}
    assert not folder.resumes
    folder.save_checkpoint(0, Empty(), {})
    assert RunFolder(tmp_path, other, resume=False).resumes  # the same command goes on from its cold start
    RunFolder(tmp_path, other, resume=True, made_of={"questions": {"traces": "a"}})
    for resume, words in ((True, "other traces: put the files"), (False, "already holds a run")):
        with pytest.raises(UserError, match=words):
            RunFolder(tmp_path, other, resume=resume, made_of={"questions": {"traces": "b"}})
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        RunFolder(tmp_path, third, resume=False)
    folder.log("metrics", [{"step": 1}])
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        RunFolder(tmp_path, other, resume=False)


def test_a_second_process_in_a_folder_is_told_who_is_there(tmp_path):
    code = ("import sys, time; from running.run_folder import RunFolder; RunFolder(sys.argv[1], {'data': 'demo'}, resume=False)"
            ".save_checkpoint(0, type('Empty', (), {'save': lambda self, path: None})(), {}); print('up', flush=True); time.sleep(60)")
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "up\n"
    with pytest.raises(UserError, match=f"is being trained by process {first.pid} on .*--resume"):
        RunFolder(tmp_path, {"data": "demo"}, resume=True)
    first.kill()
    first.communicate()
    assert RunFolder(tmp_path, {"data": "demo"}, resume=True).checkpoints()  # the lock went with the process


def test_only_what_we_name_is_a_checkpoint(tmp_path):
    folder = RunFolder(tmp_path, {"data": "demo"}, resume=False)
    (tmp_path / "checkpoints" / "step-10-backup").mkdir()
    for step in (0, 1, 2, 3):
        folder.save_checkpoint(step, Empty(), {}, keep=1)
    assert [step for step, _ in folder.checkpoints()] == [0, 3] and (tmp_path / "checkpoints" / "step-10-backup").exists()


def test_the_policies_of_a_run(tmp_path):
    assert final_policy(tmp_path) is None and checkpoints_of(tmp_path) == []
    for name in ("step-10", "step-2", "step-2-backup", "step-x", "damaged-step-4"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for _, path in checkpoints_of(tmp_path)] == ["step-2", "step-10"]
    assert final_policy(tmp_path) == checkpoint_of(tmp_path, 10)
    (tmp_path / "best" / "adapters").mkdir(parents=True)
    assert final_policy(tmp_path) == tmp_path / "best"
    for policy in (tmp_path / "best", tmp_path / "best" / "adapters", checkpoint_of(tmp_path, 10)):
        assert runs_of(policy) == [policy, tmp_path]
    assert runs_of(tmp_path / "adapters") == [tmp_path / "adapters"]


def test_the_policy_of_step_0_is_verified(tmp_path):
    folder = RunFolder(tmp_path, {"data": "demo"}, resume=False)
    folder.save_checkpoint(0, Empty(), {})
    assert folder.first_checkpoint().name == "step-0"
    (tmp_path / "checkpoints" / "step-0" / "model").write_text("zeros")
    with pytest.raises(UserError, match="policy of step 0.* model is not what was written"):
        folder.first_checkpoint()
    shutil.rmtree(tmp_path / "checkpoints" / "step-0")
    with pytest.raises(UserError, match="policy of step 0.* it is gone"):
        folder.first_checkpoint()


def test_a_full_disk_while_logging_is_one_sentence(tmp_path):
    folder = RunFolder(tmp_path, {"data": "demo"}, resume=False)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: No space left.*--resume"):
        folder.log("metrics", [{"step": 1}])


@dataclass(frozen=True)
class Ranges:
    """Numbers with a range."""

    steps: int = options.option(3, "how many", at_least=1)
    rate: float = options.option(0.5, "how fast", above=0, at_most=1)

    def __post_init__(self):
        options.check(self)


@pytest.mark.parametrize("values, told", [({"steps": 0}, "--steps is 0; it must be at least 1"),
                                          ({"rate": 0.0}, "--rate is 0.0; it must be above 0"),
                                          ({"rate": 1.5}, "--rate is 1.5; it must be at most 1"),
                                          ({"rate": float("nan")}, "--rate is nan; it must be a finite number")])
def test_a_number_out_of_its_range_is_told_by_its_flag(values, told):
    Ranges()
    with pytest.raises(ValueError, match=told):
        Ranges(**values)


@pytest.mark.parametrize("config, needed", [
    *((config, {}) for config in CONFIGS), (evaluate.EvaluateConfig, {"model": "m"}), (ablate.AblateConfig, {}),
    (ask.AskConfig, {"database": "d.sqlite"}), (sft.MineConfig, {"mine": "x.jsonl", "model": "m"})])
def test_every_config_refuses_what_its_fields_rule_out(config, needed, tmp_path, monkeypatch):
    """Whichever of the three versions of `check` it has: see common/options.py."""
    monkeypatch.chdir(tmp_path)
    config(**needed)
    for one in (one for one in fields(config) if one.name not in needed):
        meta = one.metadata
        wrong = {"at_least": -1, "above": 0, "at_most": 1}  # added to the bound
        values = [meta[bound] + step for bound, step in wrong.items() if bound in meta]
        values += [math.nan, math.inf] if values else ["not this"] if "choices" in meta else []
        for value in values:
            with pytest.raises(ValueError, match=f"^({one.name}|{options.flag_of(one)}) is '?{value}'?; "):
                config(**needed, **{one.name: value})
            with pytest.raises(UserError, match=f"^{options.flag_of(one)} is '?{value}'?; "):
                options.build(config, needed | {one.name: value})


# ------------------------------------------------------------------------------- kills, full disks, odd places

@pytest.mark.parametrize("name", [".new-rollouts.jsonl", ".new-config.json", ".old-metrics.jsonl", "checkpoints/.new-step-9"])
def test_a_half_written_file_does_not_keep_a_run_from_going_on(tmp_path, name):
    RunFolder(tmp_path, {"data": "demo"}, resume=False).save_checkpoint(0, Empty(), {})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / name).write_text("ha")
    again = RunFolder(tmp_path, {"data": "demo"}, resume=True)
    assert not (tmp_path / name).exists() and (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert [step for step, _ in again.checkpoints()] == [0]


def test_a_kill_while_the_first_config_is_written_leaves_the_folder_free(tmp_path):
    (tmp_path / ".new-config.json").write_text("{ha")
    assert not RunFolder(tmp_path, {"data": "demo"}, resume=False).resumes


@pytest.mark.parametrize("moved", [1, 2])  # before and after the second of the two renames
def test_a_kill_while_best_is_replaced_leaves_one_of_the_two(tmp_path, monkeypatch, moved):
    class Weights:
        def __init__(self, text):
            self.text = text

        def save_merged(self, path):
            (path / "model").write_text(self.text)

    folder, rename, calls = RunFolder(tmp_path, {"data": "demo"}, resume=False), os.rename, []
    folder.save_checkpoint(0, Empty(), {})
    folder.save_best(Weights("first"), 5)

    def killed(*paths):
        if len(calls) < moved:
            rename(*paths)
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.save_best(Weights("second"), 10)
    monkeypatch.undo()
    again = RunFolder(tmp_path, {"data": "demo"}, resume=True)
    assert ((tmp_path / "best" / "model").read_text(), again.step_of_best()) == [("first", 5), ("second", 10)][moved - 1]
    again.save_best(Weights("third"), 15)
    assert (tmp_path / "best" / "model").read_text() == "third"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".new", ".old"))]


def test_a_full_disk_leaves_no_half_file_and_is_one_sentence(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*result.json: No space left on device"):
        write_whole(tmp_path / "result.json", "{}")
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_start_deletes_only_what_it_made(tmp_path):
    for name in ("mine", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("mine", "link", "new"):
        folder = RunFolder(tmp_path / name, {"data": "demo"}, resume=False)
        (tmp_path / name / "gold_cache").mkdir()
        folder.discard_new()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine", "target"]  # there before: empty again
    assert not list((tmp_path / "mine").iterdir()) and not list((tmp_path / "target").iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--output .*file is a file: give a folder"):
        RunFolder(tmp_path / "file", {"data": "demo"}, resume=False)
    kept = RunFolder(tmp_path / "link", {"data": "demo"}, resume=False)
    (tmp_path / "target" / "notes.txt").write_text("written meanwhile")
    kept.discard_new()
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("code, held", [(errno.EWOULDBLOCK, True), (errno.EAGAIN, True), (errno.ENOLCK, False),
                                        (errno.EOPNOTSUPP, False), (errno.ENOSYS, False)])
def test_only_a_lock_that_is_held_means_another_process(tmp_path, monkeypatch, capsys, code, held):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    if held:
        with pytest.raises(UserError, match="is being trained by another process"):
            RunFolder(tmp_path, {"data": "demo"}, resume=False)
        return
    RunFolder(tmp_path, {"data": "demo"}, resume=False).save_checkpoint(0, Empty(), {})
    assert f"cannot be locked ({os.strerror(code)})" in capsys.readouterr().out


def test_paths_of_a_resumed_run_lead_where_they_led_when_it_was_started(tmp_path, monkeypatch):
    home, away = tmp_path / "home", tmp_path / "away"
    for folder in (home / "my", home / "tiny", away):
        folder.mkdir(parents=True)
    (home / "mine.json").write_text("[]")
    monkeypatch.chdir(home)
    given = ["--data", "./mine.json", "--data-dir", "my", "--output", "run"]
    RunFolder("run", parse_settings(given).as_dict(), resume=False).save_checkpoint(0, Empty(), {})
    before = json.loads((home / "run" / "config.json").read_text())
    assert parse_settings(["--resume", "--output", "run"]).run.data == "./mine.json"
    monkeypatch.chdir(away)
    (away / "mine.json").write_text("[other]")
    s = parse_settings(["--resume", "--output", "../home/run"])
    assert (s.run.data, s.run.data_dir, s.run.model) == (str(home / "mine.json"), str(home / "my"), "tiny")
    for more in ([], ["--data", "../home/mine.json"]):  # the same file, as it is called from here
        s = parse_settings(["--resume", "--output", "../home/run", *more])
        RunFolder(s.run.output, s.as_dict(), resume=True, may_change=MAY_CHANGE_ON_RESUME)
        assert json.loads((home / "run" / "config.json").read_text()) == before | {"output": "../home/run", "resume": True}
    s = parse_settings(["--resume", "--output", "../home/run", "--data", "../mine.json"])
    with pytest.raises(UserError, match="was started with data = ./mine.json, not ../mine.json"):
        RunFolder(s.run.output, s.as_dict(), resume=True, may_change=MAY_CHANGE_ON_RESUME)


# ------------------------------------------------------------------------------------------- the command line

@pytest.mark.parametrize("command, arguments, told", [
    (train, ["--learning-rate", "1e-6"], "there is no flag --learning-rate; did you mean --lr?"),
    (train, ["--group_sise=4"], "there is no flag --group-sise; did you mean --group-size?"),
    (train, ["--num_generations", "4"], "there is no flag --num-generations; did you mean --group-size?"),
    (train, ["--qqq"], "there is no flag --qqq: see --help"),
    (train, ["--lr-decay", "yes"], "'yes' belongs to no flag: see --help"),
    (train, ["--steps", "many"], "argument --steps: invalid int value: 'many': see --help"),
    (train, ["--output"], "argument --output: expected one argument: see --help"),
    (evaluate, ["--predicted", "x", "--max-new-tokens", "9"], "there is no flag --predicted; did you mean --predictions?"),
    (evaluate, ["--max-new-tokens", "9"], "there is no flag --max-new-tokens; did you mean --max-completion-tokens?"),
    (evaluate, ["--checkpoint", "x"], "there is no flag --checkpoint; did you mean --model?"),
    (ask, ["--db", "x"], "there is no flag --db; did you mean --database?"),
    (ask, ["--vote", "none"], "argument --vote: invalid choice: 'none'"),
    (sft, ["--learning-rate", "1"], "there is no flag --learning-rate: see --help"),
    (ablate, ["--grid", "kl", "--job", "2"], "there is no flag --job; did you mean --jobs?"),
    (ablate, ["--grid", "kl", "--learning-rate", "2"], "there is no flag --learning-rate; did you mean --lr?"),
    (ablate, ["--vary", "learning-rate=1,2"], "there is no flag --learning-rate; did you mean --lr?"),
    (report, [], "the following arguments are required: run: see --help"),
    (show, ["x", "--steps", "3"], "there is no flag --steps; did you mean --step?")])
def test_a_wrong_command_line_is_one_sentence_with_the_flag_that_was_probably_meant(command, arguments, told):
    status, out, err = run_in_process(command, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {told}"), err


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {name: f"{tmp_path}/x" for name in ("output", "data_dir", "traces", "start", "reward_module")}
    given = parse_settings([f"--{name.replace('_', '-')}=~/x" for name in paths] + ["--data=~/x.json", "--rewards=execution,user=0.5"])
    assert given.as_dict().items() >= (paths | {"data": f"{tmp_path}/x.json"}).items()
    (tmp_path / "p.jinja").write_text("{{ question }}")
    assert parse_settings(["--prompt-template=~/p.jinja"]).prompts.template_text == "{{ question }}"
    _, config, _ = evaluate.parse_arguments(["--model=~/m", "--json=~/a.json", "--predictions-out=~/b.sql", "--save-traces=~/c.jsonl",
                                             "--gold-cache=~/d", "--exclude=~/e"])
    assert (config.model, config.json, config.predictions_out, config.save_traces, config.gold_cache, config.exclude) == tuple(
        f"{tmp_path}/{name}" for name in ("m", "a.json", "b.sql", "c.jsonl", "d", "e"))
    assert ask.parse_arguments(["--database=~/a.sqlite", "--evidence=5 ~ 6"])[1].database == f"{tmp_path}/a.sqlite"
    assert sft.parse_arguments(["--mine=~/a.jsonl", "--model=m"])[0].mine == f"{tmp_path}/a.jsonl"
    assert ablate.parse_arguments(["--grid=kl", "--output=~/x"])[0].output == tmp_path / "x"
