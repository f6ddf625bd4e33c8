"""running/show.py: a group in the terminal, colours, hostile text, and the token ratios that a run keeps for it."""

import io
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import train
from common.errors import UserError, run_main
from engine.fast import ENGINES
from grpo import GRPOConfig, micro_batches, policy_update, sample_groups
from policy import build_tiny
from running import show
from running.token_ratios import TokenWatch, widest_group

ROOT = Path(__file__).resolve().parents[1]


def completion(text="<think> a </think> SELECT 1", total=1.0, advantage=0.0, **more):
    rewards = {"total": total, "format": 1.0, "execution": 1.0, "atomic": 0.25, "memory": 0.0}
    return {"text": text, "thought": "a", "sql": text.split("> ")[-1], "status": "ok", "error": "", "correct": False,
            "rewards": rewards, "advantage": advantage} | more


def group(*completions, step=7):
    return {"step": step, "db_id": "shop", "difficulty": "join", "question": "Which one is it, of all of them? " * 4,
            "gold_sqls": ["SELECT name FROM product"], "completions": list(completions)}


MIXED = group(completion(total=1.25, advantage=-0.5), completion(total=1.25, advantage=-0.5),
              completion("<think> b </think> SELECT name FROM product", total=4.0, advantage=1.5, correct=True),
              completion("no tags", total=0.0, advantage=-0.5, status="format", sql="", error="broken " * 30))


def test_a_group_fits_80_columns_best_first_and_equal_ones_once():
    text = show.group_text(MIXED, colour=False)
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines) and "\033" not in text
    assert lines[0].startswith("step 7 · shop · join") and lines[0].endswith("1 of 4 right")
    assert "memory" not in text  # no completion earned any
    heads = [line for line in lines if line.endswith(("right", "result", "format"))][1:]
    assert [line.split()[0] for line in heads] == ["+1.50", "2×", "-0.50"]
    assert "    a" not in lines and "    a" in show.group_text(MIXED, colour=False, thoughts=True).splitlines()


def test_colours_follow_the_advantage():
    lines = show.group_text(MIXED, colour=True).splitlines()
    assert any(line.startswith("\033[32m") and "+1.50" in line for line in lines)
    assert any(line.startswith("\033[31m") and "-0.50" in line for line in lines)


def test_a_completion_cannot_steer_the_terminal():
    bad = completion("\033[2J\r\n\0 \u202e x", sql="\033]0;title\a", error="\x9b31m")
    text = show.group_text(group(bad, bad), colour=False)
    assert text.replace("\n", "").isprintable() and "‹U+001B›]0;title‹U+0007›" in text


@pytest.mark.parametrize("tty, environment, wanted", [
    (True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)])
def test_colours_go_to_terminals_only(monkeypatch, tty, environment, wanted):
    stream = io.StringIO()
    stream.isatty = lambda: tty
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert show.wants_colour(stream) is wanted


def test_the_command_shows_the_newest_mixed_group_or_the_one_asked_for(tmp_path):
    records = [group(completion(), completion(), step=1), MIXED, group(completion(), completion())]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shown = subprocess.run([sys.executable, "-m", "running.show", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "1 of 4 right" in shown.stdout and "\033" not in shown.stdout
    assert show.find_group(tmp_path, 1, None)["step"] == 1
    assert show.find_group(tmp_path, 7, 2) == records[2]
    for step, question in ((3, None), (7, 3)):
        with pytest.raises(UserError):
            show.find_group(tmp_path, step, question)
    with pytest.raises(UserError, match="no rollouts"):
        show.find_group(tmp_path / "none", None, None)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_any_text_can_be_shown_on_any_terminal(tmp_path, monkeypatch, encoding):
    odd = group(completion("half \ud800 pair, 日本, é, \udcff", sql="SELECT '\ud800 日本'", status="\ud800"))
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(odd | {"question": "\udfff ?", "db_id": "\ud83d"}) + "\n")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["show.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run_main(show.main)
    text = shown.getvalue().decode(encoding)
    assert ended.value.code == 0 and "0 of 1 right" in text and ("日本" in text) == (encoding == "utf-8")


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_token_ratios_are_those_of_the_update(micro_batch, engine):
    policy = build_tiny(["a b c d e f g"] * 3, seed=0, vocab_size=300, width=16, layers=1)
    config = GRPOConfig(group_size=4, max_completion_tokens=5, micro_batch=micro_batch, kl_coef=0.0)
    groups = sample_groups(policy.model, [torch.tensor([1, 2, 3])] * 2, config, eos_ids=policy.eos_ids, seeds=[0, 1])
    advantages = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, -1.0]])
    assert widest_group(advantages) == 1
    watch = TokenWatch(policy, groups[1], config, ENGINES[engine], nullcontext)
    policy_update(policy.model, torch.optim.SGD(policy.model.parameters(), lr=0.5),
                  micro_batches(groups, advantages, config), config)
    completions = watch.ratios()
    for tokens, one in zip(groups[1].completions, completions, strict=True):
        assert len(one["tokens_text"]) == len(one["ratios"]) == len(tokens)
        assert "".join(one["tokens_text"]) == policy.tokenizer.decode(tokens)
    mean = [sum(one["ratios"]) / len(one["ratios"]) for one in completions]
    assert mean[0] > 1 > mean[3]  # the rewarded one became likelier, the other less likely


def test_verbose_prints_a_group_every_so_many_steps_and_logs_what_the_report_shows(tmp_path, tiny_db, monkeypatch, capsys):
    assert train.parse_settings(["--verbose"]).run.verbose == 10 and train.parse_settings([]).run.verbose == 0
    folder = tmp_path / "run"
    records = [{"db_id": "music", "question": f"How many singers are older than {n}?", "trace": f"count ages above {n}",
                "sql": f"SELECT COUNT(*) FROM singer WHERE age > {n}", "split": "train"} for n in range(12)]
    (tmp_path / "mine.json").write_text(json.dumps(records))
    arguments = (f"--data {tmp_path / 'mine.json'} --cold-start-steps 4 --cold-start-batch 8 --prompts-per-step 2 --group-size 3 --max-completion-tokens 20 "
                 "--steps 3 --eval-every 0 --eval-questions 0 --test-questions 0 --sql-workers 1 --verbose 2 --threads 1 --token-ratios-every 2")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments.split(), "--output", str(folder)])
    assert train.main() == 0
    printed = capsys.readouterr().out
    assert "step 2 · " in printed and "step 1 · " not in printed and "step 3 · " not in printed and "\033" not in printed
    groups = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert len(groups) == 6
    for step, count in ((1, 0), (2, 1), (3, 1)):  # every second step, and the last
        shaded = [one for one in groups if one["step"] == step and "ratios" in one["completions"][0]]
        assert len(shaded) == count
        if not shaded:
            continue
        for one in shaded[0]["completions"]:
            assert len(one["ratios"]) == len(one["tokens_text"]) == one["tokens"]
    assert all({"neighbours", "row_count"} <= one.keys() for group in groups for one in group["completions"])
