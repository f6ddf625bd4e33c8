"""The report: what it says, how it holds against hostile text, and that it works in a real Chromium."""

import base64
import hashlib
import json
import math
import random
import re
import sqlite3
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chromium import CHROMIUM, Browser

import report
from common import wording
from common.errors import UserError, run_main
from questions.example import Example
from rewards import RewardBreakdown
from rollout import Rollout
from running.plot import nice_ticks
from running.run_folder import RunFolder, rollout_records
from sql_exec import SQLExecutor

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = {
    "script": "</script><script>window.hacked = 1</script>",
    "image": "<img src=x onerror='window.hacked = 2'>",
    "quotes": "\"'`&lt; --> ]]> {{blocks}} ${window.hacked = 3}",
    "nul": "before\0after",
    "bidi": "SELECT \u202e1 ;eteled\u202c \u2066x\u2069 \ufeff\u200b",
    "surrogate": "half \ud800 pair",
}


# ------------------------------------------------------------------------------------------ a generated run

def completion(text="", correct=False, total=0.0, advantage=0.0, thought="think", sql="SELECT 1", **more):
    rewards = {"total": total, "format": 1.0, "execution": 2.0 * correct, "atomic": 0.0, "memory": 0.5,
               "result": 0.0, "schema": 0.0, "user": 0.0}
    return {"text": text, "thought": thought, "sql": sql, "status": "ok", "error": None, "correct": correct,
            "rewards": rewards, "advantage": advantage, "tokens": 12, "truncated": False, **more}


def group(step, completions, **more):
    return {"step": step, "id": f"q{step}", "db_id": "music", "question": f"question of step {step}?",
            "evidence": "", "difficulty": "easy", "gold_sqls": ["SELECT name FROM singer"],
            "completions": completions} | more


def metrics_of(step, **more):
    share = min(0.9, 0.3 + step / 1000)
    return {"step": step, "reward": 1 + share, "reward_std": 0.4, "reward/format": 1.0, "reward/atomic": 0.2,
            "reward/result": 0.0, "execution_accuracy": share, "flat_groups": 0.25, "all_wrong_groups": 0.2,
            "all_right_groups": 0.05, "kl": 0.01 * step, "entropy": 0.7, "clip_fraction_low": 0.0,
            "clip_fraction_high": 0.0, "completion_length": 50.5, "completion_length_max": 96.0,
            "truncated": 0.01, "status/ok": 0.9, "status/error": 0.1, "seconds/rollout": 0.6,
            "seconds/update": 0.7, "lr": 1e-4, "tokens_per_second": 4000.0, **more}


def write_run(folder, metrics, groups, config=None, result=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("metrics", metrics), ("rollouts", groups)):
        lines = "".join(json.dumps(record, ensure_ascii=True) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "config.json").write_text(json.dumps(config or {"model": "tiny", "steps": 3, "match": "bird"}))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def run(tmp_path):
    """Three steps of three groups: mixed, all wrong and flat, all right."""
    def of(step):
        mixed = [completion(correct=True, total=4.0, advantage=1.5), completion(total=1.0, advantage=-0.5),
                 completion(total=1.5, advantage=-0.4, sql="", thought="", text="no tags", status="format")]
        wrong = [completion(total=1.0, status="error", error="no such column: x") for _ in range(3)]
        wrong[0]["rewards"]["total"] += 1e-7  # rounding, or rewards that --dynamic-sampling does not look at
        right = [completion(correct=True, total=4.0 + i, advantage=i - 1.0) for i in range(3)]
        return [group(step, mixed), group(step, wrong, difficulty="hard"), group(step, right)]

    return write_run(tmp_path / "a run", [metrics_of(step) for step in (1, 2, 3)],
                     [one for step in (1, 2, 3) for one in of(step)])


def block(page: Path, name: str):
    """The value of one of the page's compressed blocks."""
    opening = f'<script type="application/octet-stream" id="{name}">'
    found = re.search(f"{opening}([^<]*)</script>", page.read_text())
    return json.loads(zlib.decompress(base64.b64decode(found[1])))


# --------------------------------------------------------------------------------------------- what it says

def test_the_page_has_settings_curves_and_groups(run):
    page = report.write_report(run)
    text = page.read_text()
    assert page == run / "report.html"
    assert "<h1>a run</h1>" in text and "tiny" in text and "finished" in text
    for title in ("Reward components", "Execution accuracy", "KL to the reference", "What became of the SQL"):
        assert f"<figcaption>{title}</figcaption>" in text
    assert "At zero in every step: clip fractions." in text  # said in words instead of drawn
    assert block(page, "index") == {
        "steps": [1, 2, 3], "tiers": ["easy", "hard"],
        "groups": [[[1, 3, False, 0, False], [0, 3, True, 1, False], [3, 3, False, 0, False]]] * 3,
        "scales": {"total": 6.0, "format": 1.0, "execution": 2.0, "memory": 0.5}}  # atomic was never above 0
    first = block(page, "step-2")[0]
    assert first["question"] == "question of step 2?" and len(first["completions"]) == 3
    assert first["completions"][2]["text"] == "no tags"  # kept: there is no SQL to show
    assert "text" not in first["completions"][0]
    assert set(block(page, "metrics")) >= {"step", "reward", "kl", "status/error", "seconds/update"}


def test_a_half_written_line_is_passed_over(run):
    for name in ("metrics", "rollouts"):
        with open(run / f"{name}.jsonl", "a") as file:
            file.write('{"step": 4, "id": "q')
    page = report.write_report(run)
    assert block(page, "index")["steps"] == [1, 2, 3]
    assert block(page, "metrics")["step"] == [1, 2, 3]


def test_a_broken_line_in_the_middle_costs_only_itself(run):
    lines = (run / "rollouts.jsonl").read_text().splitlines()
    lines[3] = '{"step": 2, "id": }'
    lines.insert(0, '["not an object"]')
    (run / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    page = report.write_report(run)
    assert block(page, "index")["steps"] == [1, 2, 3]
    assert len(block(page, "step-2")) == 2


def test_a_run_without_rollouts_config_or_finite_numbers(run):
    for name in ("rollouts.jsonl", "config.json"):
        (run / name).unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": NaN, "kl": Infinity, "entropy": 0.5}\n')
    page = report.write_report(run)
    assert block(page, "index")["steps"] == []
    assert block(page, "metrics") == {"step": [1], "entropy": [0.5]}
    assert "no readable config.json" in page.read_text()


@pytest.mark.parametrize("make", [False, True])
def test_nothing_to_report_is_one_sentence(tmp_path, make, monkeypatch, capsys):
    folder = tmp_path / "empty"
    if make:
        folder.mkdir()
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder)])
    with pytest.raises(SystemExit) as ended:
        run_main(report.main)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and str(folder) in printed.err


def test_the_command_prints_where_the_page_is(run):
    done = subprocess.run([sys.executable, ROOT / "report.py", run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(run / "report.html"))


def test_a_failed_write_leaves_the_old_page(run, monkeypatch):
    page = report.write_report(run)
    before = page.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        report.write_report(run)
    assert page.read_bytes() == before


def test_before_and_after(run):
    def summary(accuracy, tiers=True):
        part = {"n": 40, "execution_accuracy": {"bird": accuracy, "spider": accuracy / 2},
                "interval": {"bird": [accuracy - 0.1, accuracy + 0.1], "spider": [0.0, 1.0]}}
        return part | ({"by_difficulty": {"easy": part, "hard": part}} if tiers else {})

    result = {"before": {"test": summary(0.25)}, "after": {"test": summary(0.755)}}
    (run / "result.json").write_text(json.dumps(result))
    text = report.write_report(run).read_text()
    assert "25.0 → 75.5 %" in text and "+50.5 points on 40 questions" in text
    line = re.search(r"<tr[^>]*><th[^>]*>test: all.*?</tr>", text)[0]
    assert "<b>25.0</b> <small>[15.0, 35.0]</small>" in line and "<td>+50.5</td>" in line
    assert text.index("by the bird comparison") < text.index("by the spider comparison")
    assert text.count("test: hard") == 2 and "databases" not in re.sub(r"<script.*", "", text, flags=re.DOTALL)
    for part in (result["before"]["test"], result["after"]["test"]):
        part |= {"databases": 10, "interval_over_databases": {"bird": [0.125, 0.875], "spider": [0.0, 1.0]}}
    (run / "result.json").write_text(json.dumps(result))
    line = re.search(r"<tr[^>]*><th[^>]*>over 10 databases.*?</tr>", report.write_report(run).read_text())[0]
    assert line.count("<small>[12.5, 87.5]</small>") == 2


def test_a_gain_is_of_the_same_questions(run):
    """Null where no question could be read, as result.json has it then."""
    def summary(accuracy, n, **more):
        return {"n": n, "execution_accuracy": {"bird": accuracy}, "interval": {"bird": [accuracy, accuracy]}, **more}

    for before, after in ((summary(0.25, 39), summary(0.75, 40)), (summary(None, 0), summary(0.75, 40)),
                          (summary(0.25, 40), summary(None, 0)),
                          (summary(0.25, 40, questions="a"), summary(0.75, 40, questions="b"))):
        (run / "result.json").write_text(json.dumps({"before": {"test": before}, "after": {"test": after}}))
        text = report.write_report(run).read_text()
        assert "points on" not in text and "test: all" in text and "+50.0" not in text


def test_schema_and_gold_result_are_shown_where_the_database_is(tmp_path, tiny_db):
    data = tmp_path / "own.jsonl"
    data.write_text('{"question": "Who?", "db_id": "music", "sql": "SELECT name FROM singer"}\n')
    config = {"data": str(data), "data_dir": None, "split": "train", "sql_timeout": 5.0}
    groups = [group(1, [completion()]), group(1, [completion()], db_id="gone")]
    page = report.write_report(write_run(tmp_path / "run", [metrics_of(1)], groups, config))
    known, gone = block(page, "step-1")
    assert known["gold"] == {"status": "ok", "error": None, "columns": ["name"], "count": 3,
                             "rows": [["Ana"], ["Bo"], ["Cy"]]}
    assert gone["gold"] is None
    schemas = block(page, "schemas")
    assert "CREATE TABLE singer" in schemas["music"] and schemas["gone"] == ""


def test_long_results_are_cut():
    assert report.preview([("x" * 200, None, 1)] * 9) == [["x" * 80 + "…", None, ["1"]]] * 5


def test_cells_that_differ_are_shown_differently_and_equal_ones_alike(tmp_path):
    """2^53 and its successor are one number in JavaScript, floats differ in their last digits, NULL is no infinity."""
    database = tmp_path / "cells.sqlite"
    golds = ["SELECT 9007199254740993, 9007199254740992.0", "SELECT 0.1 + 0.2, 123456.75", "SELECT 9e999, -9e999",
             "SELECT NULL, '9007199254740993'", "SELECT x'00ff', 'a  b'"]
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE t (a)")
    (tmp_path / "own.json").write_text(json.dumps([{"question": "q", "db_id": "cells", "sql": "SELECT 1"}]))
    config = {"data": str(tmp_path / "own.json"), "data_dir": None, "split": "train", "sql_timeout": 5.0, "match": "bird"}
    with SQLExecutor({"cells": database}, workers=1) as executor:
        found = executor.run_many([("cells", gold) for gold in golds])
    (run := tmp_path / "run").mkdir()
    (run / "config.json").write_text(json.dumps(config))
    folder = RunFolder(run, config, resume=True)
    scored = [RewardBreakdown(text="", thought="t", sql=gold, status="ok", columns=("a", "b"), rows=tuple(one.rows), row_count=1)
              for gold, one in zip(golds, found, strict=True)]
    for number, breakdown in enumerate(scored):
        example = Example(str(number), "cells", "q", (golds[number],))
        sampled = SimpleNamespace(completions=[[1]], truncated=[False], sampled=())
        folder.log("rollouts", rollout_records(1, [Rollout(example, sampled, [breakdown])], (), torch.zeros(1, 1), {}))
    folder.log("metrics", [metrics_of(1, kl=math.inf, grad_norm=math.nan)])
    for file in ("rollouts.jsonl", "metrics.jsonl"):
        for line in (run / file).read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)
    groups = block(report.write_report(run), "step-1")
    shown = [group["gold"]["rows"][0] for group in groups]
    assert shown == [[["9007199254740993"], ["9007199254740992.0"]], [["0.30000000000000004"], ["123456.75"]],
                     [["Inf"], ["-Inf"]], [None, "9007199254740993"], ["x'00ff'", "a  b"]]
    logged = [group["completions"][0]["rows"][0] for group in groups]
    assert logged == [*shown[:2], ["Inf", "-Inf"], *shown[3:]]  # JSON has no infinity but as a text


def test_operations_are_compared_with_the_nearest_gold(run, monkeypatch):
    taken_apart = []

    def words(sql, schema=None):
        taken_apart.append(sql)
        return frozenset(sql.split())

    monkeypatch.setattr(report, "atomic_operations", words)
    with report.RunDatabases({}, run) as databases:
        golds = {"db_id": "music", "gold_sqls": ["a b c d", "a x y"]}
        assert report.compare_operations("a x z", golds, databases) == {
            "matched": ["a", "x"], "missed": ["y"], "extra": ["z"]}
        report.compare_operations("a x z", golds, databases)
    assert sorted(taken_apart) == ["a b c d", "a x y", "a x z"]  # each query once


# ------------------------------------------------------------------------------------------- hostile text

def test_what_does_not_print_is_written_out():
    assert report.visible("plain, é, 日本, עברית\n\tnext") == "plain, é, 日本, עברית\n\tnext"
    assert report.visible("a\0b\r") == "a‹U+0000›b‹U+000D›"
    assert report.visible("\u202ex\u2066\u200b\ufeff\xa0\ud800") == (
        "‹U+202E›x‹U+2066›‹U+200B›‹U+FEFF›‹U+00A0›‹U+D800›")


def hostile_run(folder):
    every = "\n".join(HOSTILE.values())
    bad = completion(text=every, thought=every, sql=every, error=every, status="ok", rows=[[every, None]],
                     columns=[every], neighbours=[{"db_id": every, "thought": every, "similarity": 0.5}],
                     tokens_text=[every, "b"], ratios=[1.5, 0.5])
    unparsed = completion(text=every, thought="", sql="", total=1.0, status=every)
    groups = [group(1, [bad, unparsed], question=every, evidence=every, difficulty=every, id=every,
                    db_id=every, gold_sqls=[every])]
    result = {"before": {}, "after": {every: {"n": 1, "execution_accuracy": {"bird": 1.0, every: 1.0},
                                              "interval": {"bird": [1, 1], every: [1, 1]}}}}
    config = {"model": every, every: every, "data": every, "match": "bird"}
    name = every.replace("/", "")  # "a/b/c" is a part of "a/b" and not plotted with it
    return write_run(folder, [metrics_of(1, **{f"status/{name}": 0.5, f"reward/{name}": 0.5})], groups,
                     config, result)


def test_hostile_text_stays_text(tmp_path):
    page = report.write_report(hostile_run(tmp_path / "run"))
    text = page.read_text(encoding="utf-8")
    assert "window.hacked = 1</script>" not in text and "<img" not in text
    assert not set("\0\r\u202e\u202c\u2066\u2069\ufeff\u200b") & set(text)
    executable = [tag for tag in re.findall(r"<script[^>]*>", text) if "octet-stream" not in tag]
    assert executable == ["<script>"]
    assert "{{" not in re.sub(r"\{\{blocks\}\}(?= \$\{window)", "", text)  # no placeholder is filled twice
    (only,) = block(page, "step-1")
    shown = only["completions"][0]["sql"]
    assert HOSTILE["script"] in shown and HOSTILE["image"] in shown
    assert "before‹U+0000›after" in shown and "‹U+202E›1 ;eteled‹U+202C›" in shown


def test_the_policy_allows_exactly_the_pages_own_style_and_script(run):
    text = report.write_report(run).read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("script", "style"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in text and " style=" not in text and not re.search(r'(src|href)="', text)


# ---------------------------------------------------------------------------------------------- long runs

def long_run(folder, steps=1000, groups=8, size=8):
    """A run of full length; texts are drawn from a vocabulary as small as a tiny policy's."""
    draw = random.Random(0)
    vocabulary = ["question", "asks", "rows", "of", "table", "where", "column", "is", "then", "group", "join"]
    texts = [" ".join(draw.choices(vocabulary, k=30)) for _ in range(5000)]
    sqls = [f"SELECT {a} FROM {b} WHERE {a} > {n}" for a in vocabulary for b in vocabulary for n in range(5)]
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps(metrics_of(step, **({"dev_accuracy": 0.5} if step % 50 == 0 else {}))) + "\n"
        for step in range(1, steps + 1)))
    with open(folder / "rollouts.jsonl", "w") as file:
        for step in range(1, steps + 1):
            for number in range(groups):
                answers = [completion(thought=draw.choice(texts), sql=draw.choice(sqls), total=draw.random(),
                                      advantage=draw.gauss(0, 1)) for _ in range(size)]
                record = group(step, answers, id=f"{step}-{number}", question=draw.choice(texts))
                file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def thousand_steps(tmp_path_factory):
    return report.write_report(long_run(tmp_path_factory.mktemp("long") / "run"))


def test_a_run_of_1000_steps_fits(thousand_steps):
    page = thousand_steps
    assert page.stat().st_size < 10_000_000
    assert block(page, "index")["steps"] == list(range(1, 1001))
    assert len(block(page, "step-777")) == 8


def test_a_run_too_large_for_a_page_is_thinned_evenly(tmp_path, monkeypatch):
    folder = long_run(tmp_path / "run", steps=60, groups=2)
    whole = report.write_report(folder).stat().st_size
    monkeypatch.setattr(report, "PAGE_BYTES", 30_000)
    page = report.write_report(folder)
    shown = block(page, "index")["steps"]
    assert f"{len(shown)} of the 60 logged steps" in page.read_text()
    assert page.stat().st_size < whole - 30_000
    assert shown[0] == 1 and shown[-1] == 60
    gaps = [b - a for a, b in zip(shown, shown[1:], strict=False)]
    assert len(shown) > 5 and max(gaps[:-1]) - min(gaps[:-1]) <= 1


def test_rollouts_are_read_a_step_at_a_time(run):
    log = report.RolloutLog(run / "rollouts.jsonl")
    assert log.steps == [1, 2, 3]
    assert [one["step"] for one in log.read(2)] == [2, 2, 2]


# ------------------------------------------------------------------------------------------------- curves

def test_ticks_are_round():
    assert nice_ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1]
    assert nice_ticks(1, 300, 4) == [100, 200, 300]
    assert nice_ticks(-3, 4, 4) == [-2, 0, 2, 4]
    assert nice_ticks(5, 5, 4) == [5]


@pytest.mark.parametrize("value, share, text", [
    (0.5, True, "50%"), (0.123, True, "12.3%"), (0, False, "0"), (1e-6, False, "1e-6"),
    (0.01234, False, "0.0123"), (4.5678, False, "4.57"), (4004.2, False, "4004"),
    (12_345, False, "12.3k"), (2.5e7, False, "2.5e7")])
def test_numbers_are_short(value, share, text):
    assert wording.short_number(value, share) == text


def test_running_mean_and_thinning_keep_gaps_and_ends():
    assert report.running_mean([1, None, 3, 5], 1) == [1, None, 4, 4]
    logged = [report.Curve("a", "a", 0, [1.0] * 1000), report.Curve("b", "b", 1, [None] * 999 + [2.0])]
    steps, (always, once) = report.downsample(list(range(1, 1001)), logged)
    assert len(steps) <= report.MAX_POINTS and (steps[0], steps[-1]) == (1, 1000)
    assert set(always.values) == {1.0}
    assert once.values[-1] == 2.0 and once.values.count(None) == len(steps) - 1


def test_points_lie_where_they_should():
    plot = report.plot_of([10, 15, 20], 0.0, 2.0)
    corners = [(report.LEFT, report.BOTTOM), (report.RIGHT, report.TOP)]
    assert plot.points([10, 15, 20], [0.0, None, 2.0]) == corners
    assert plot.points([10, 20], [-1.0, 3.0]) == corners  # not beyond the edge
    assert report.plot_of([10], 1.0, 1.0).points([10], [1.0]) == [(report.LEFT, report.BOTTOM)]


def test_seconds_of_a_part_are_not_counted_twice():
    records = [metrics_of(1, **{"seconds/rewards": 3.0, "seconds/rewards/atomic": 2.0})]
    assert report.matching("seconds/*", records) == ["seconds/rollout", "seconds/update", "seconds/rewards"]
    assert report.matching("seconds/rewards/*", records) == ["seconds/rewards/atomic"]
    assert "<dd>4 s<small>4.30 s a step" in report.tiles({}, records, {})


def test_rare_values_are_dots(run):
    records = [metrics_of(step, **({"dev_accuracy": 0.4} if step in (10, 20) else {}))
               for step in range(1, 21)]
    chart = next(chart for chart in report.CHARTS if "dev_accuracy" in chart.keys)
    drawn = report.figure(chart, report.curves_of(chart, records), records)
    assert drawn.count("<circle") == 2 and "dev, greedy from 40% to 40%" in drawn


def chart_of(title):
    return next(chart for chart in report.CHARTS if chart.title == title)


def statuses(step, **shares):
    """The metrics of a step whose statuses are just these."""
    others = {key: value for key, value in metrics_of(step).items() if not key.startswith("status/")}
    return others | {f"status/{name}": share for name, share in shares.items()}


def test_what_a_step_does_not_name_is_zero_where_parts_make_a_whole(tmp_path):
    records = [statuses(1, ok=0.75, error=0.25), statuses(2, ok=1.0), statuses(3, error=0.031, format=0.969)]
    records[1] |= {"seconds/reference": 0.5, "seconds/rewards/atomic": 0.1}
    page = report.write_report(write_run(tmp_path / "run", records, []))
    values = block(page, "metrics")
    assert values["status/ok"] == [0.75, 1, 0] and values["status/error"] == [0.25, 0, 0.031]
    assert values["status/format"] == [0, 0, 0.969]
    assert values["seconds/reference"] == [0, 0.5, 0] and values["seconds/rewards/atomic"] == [0, 0.1, 0]
    assert "ok from 75% to 0%; error from 25% to 3.1%; format from 0% to 96.9%" in page.read_text()


def test_a_long_run_of_rare_statuses_stays_a_whole():
    records = [statuses(step, error=1.0) if step % 10 == 0 else statuses(step, ok=1.0) for step in range(1, 2001)]
    curves = report.curves_of(chart_of("What became of the SQL"), records)
    _, curves = report.downsample(list(range(1, 2001)), curves)
    sums = [sum(values) for values in zip(*(curve.values for curve in curves), strict=True)]
    assert len(sums) <= report.MAX_POINTS and sums == pytest.approx([1.0] * len(sums))


def test_a_name_has_one_colour_in_every_run():
    def colours(title, *records):
        return {curve.label: curve.style for curve in report.curves_of(chart_of(title), list(records))}

    every = {"ok": "s0", "error": "s1", "format": "s2", "timeout": "s3", "refused": "s4", "too_large": "s5"}
    assert colours("What became of the SQL", statuses(1, **dict.fromkeys(reversed(every), 0.1))) == every
    assert colours("What became of the SQL", statuses(1, timeout=1.0), statuses(2, new=0.5, error=0.5)) == {
        "error": "s1", "timeout": "s3", "new": "s7"}  # an unknown one comes after those we know
    some = metrics_of(1, **{"reward/atomic": 0.0, "reward/user": 0.1, "flat_groups": 0.0})
    assert colours("Reward components", some) == {"format": "s0", "user": "s6"}
    assert colours("Uniform groups", some) == {"all wrong": "s1", "all right": "s2"}
    assert colours("Seconds by phase", some) == {"rollout": "s0", "update": "s3"}
    assert colours("Seconds by reward", metrics_of(1, **{"seconds/rewards/memory": 1.0})) == {"memory": "s3"}


def test_the_statuses_are_those_that_occur():
    source = (ROOT / "sql_exec.py").read_text()
    styles = re.findall(r"\.s\d(?= \{ --c)", report.TEMPLATE.read_text())
    assert len(styles) == report.COLOUR_CLASSES
    assert all(f'"{name}"' in source for name in report.SQL_FATES if name != "format")


@pytest.mark.parametrize("count", [1, 2])
def test_the_shortest_runs_can_be_drawn(tmp_path, count):
    page = report.write_report(write_run(tmp_path / "run", [metrics_of(s) for s in range(1, count + 1)], []))
    assert "nan" not in re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL).lower()


@pytest.mark.parametrize("seconds, text", [(45, "45 s"), (372, "6 min 12 s"), (11_100, "3 h 05 min")])
def test_durations(seconds, text):
    assert wording.duration(seconds) == text


# -------------------------------------------------------------------------------------- in a real browser

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def test_chromium_steps_by_keys_and_clicks(run, browser):
    browser.open(report.write_report(run))
    browser.wait_for_place(3, 1)  # opens at the newest step
    assert browser.evaluate("document.querySelectorAll('article').length") == 3
    browser.press("ArrowLeft")
    browser.wait_for_place(2, 1)
    browser.press("j")
    browser.wait_for_place(2, 2)
    assert "so every advantage is 0" in browser.evaluate("document.querySelector('.strip').textContent")
    browser.press("k")
    browser.press("k")
    browser.wait_for_place(1, 3)  # beyond the first question comes the step before
    browser.click("#step-on")
    browser.wait_for_place(2, 1)
    browser.click("#chips button:nth-child(3)")
    browser.wait_for_place(2, 3)
    browser.click("#group-on")
    browser.wait_for_place(3, 1)
    assert browser.evaluate("document.getElementById('step-on').disabled")
    assert browser.evaluate("location.hash") == "#step=3&question=1"
    assert browser.complaints() == []


def test_chromium_filters(run, browser):
    page = report.write_report(run)
    browser.open(page, "#step=1&question=1")
    browser.wait_for_place(1, 1)
    browser.choose("outcome", "wrong")
    browser.wait_for_place(1, 2)
    assert browser.evaluate("document.querySelectorAll('.chip.other').length") == 2
    browser.press("j")
    browser.wait_for_place(2, 2)  # the next all-wrong group is a step further
    browser.choose("tier", "0")
    browser.wait_for("document.getElementById('place').textContent === 'no such group'")
    browser.choose("outcome", "right")
    browser.wait_for_place(2, 3)
    browser.choose("order", "best")
    numbers = "[...document.querySelectorAll('.number')].map((number) => number.textContent).join()"
    assert browser.evaluate(numbers) == "#3,#2,#1"
    assert browser.complaints() == []


@pytest.mark.parametrize("fragment, position", [
    ("#100%", (3, 1)), ("#step=%&question=%", (1, 1)), ("#step=2&question=2.7", (2, 2)), ("#step=99&question=99", (3, 3)),
    ("#step=-1&question=-1", (1, 1)), ("#step=2&question=1e999", (2, 3))])
def test_chromium_shows_a_group_for_any_address(run, browser, fragment, position):
    browser.open(report.write_report(run), fragment)
    browser.wait_for_place(*position)
    assert browser.complaints() == []


def test_chromium_moves_along_the_curves(run, browser):
    browser.open(report.write_report(run))
    reward = "document.querySelector('output[data-key=reward]').textContent"
    assert browser.evaluate(reward) == "1.303"  # the last step's
    browser.evaluate("document.querySelector('figure').focus()")
    browser.press("Home")
    assert browser.evaluate("document.getElementById('shown-step').textContent") == "1"
    assert browser.evaluate(reward) == "1.301"
    browser.press("ArrowRight")
    browser.press("Enter")
    browser.wait_for_place(2, 1)
    assert browser.complaints() == []


def test_chromium_shows_statuses_that_sum_to_a_whole_at_every_step(tmp_path, browser):
    records = [statuses(1, ok=0.5, error=0.5), statuses(2, ok=0.969, error=0.031, timeout=0.0), statuses(3, ok=1.0)]
    records[0]["dev_accuracy"] = 0.4
    browser.open(report.write_report(write_run(tmp_path / "run", records, [])))
    read = "[...document.querySelectorAll('output[data-key^=\"status/\"]')].map((output) => output.textContent).join()"
    shown = []
    for key in ("End", "ArrowLeft", "ArrowLeft"):
        browser.evaluate("document.querySelector('figure').focus()")
        browser.press(key)
        shown.append(browser.evaluate(read))
    assert shown == ["100.0%,0.0%", "96.9%,3.1%", "50.0%,50.0%"]
    browser.press("End")  # what is measured now and then keeps its last value
    assert browser.evaluate("document.querySelector('output[data-key=dev_accuracy]').textContent") == "40.0%"
    assert browser.complaints() == []


def test_chromium_shows_hostile_text_as_text(tmp_path, browser):
    browser.open(report.write_report(hostile_run(tmp_path / "run")))
    browser.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    text = browser.evaluate("document.getElementById('group').textContent")
    written_out = ("before‹U+0000›after", "‹U+202E›1 ;eteled")
    for said in (HOSTILE["script"], HOSTILE["image"], HOSTILE["quotes"], *written_out):
        assert text.count(said) >= 10, said  # question, gold, thought, SQL, error, result, neighbour, ...
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate("document.querySelectorAll('img, #group script').length") == 0
    assert browser.complaints() == []


def test_chromium_dark_and_on_a_phone(run, browser):
    browser.open(report.write_report(run))
    seen = {}
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia",
                     features=[{"name": "prefers-color-scheme", "value": scheme}])
        seen[scheme] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert seen["light"] != seen["dark"]
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2,
                 mobile=True)
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    columns = browser.evaluate("getComputedStyle(document.querySelector('.group')).gridTemplateColumns")
    assert len(columns.split()) == 1
    browser.call("Emulation.clearDeviceMetricsOverride")
    assert browser.complaints() == []


def test_chromium_opens_1000_steps_in_under_3_seconds(thousand_steps, browser):
    start = time.monotonic()
    browser.open(thousand_steps)
    browser.wait_for_place(1000, 1)
    assert time.monotonic() - start < 3
    browser.choose("step", "499")  # its block is unpacked only now
    browser.wait_for_place(500, 1)
    assert browser.evaluate("document.querySelectorAll('article').length") == 8
    assert browser.complaints() == []


def test_chromium_shows_operations_neighbours_ratios_and_row_counts(tmp_path, browser):
    wrong = completion(sql="SELECT age FROM singer", total=1.5, advantage=-1.0, columns=["age"], rows=[[n] for n in range(5)],
                       row_count=12, neighbours=[{"db_id": "shop", "thought": "filter the rows", "similarity": 0.625}],
                       tokens_text=["SELECT", " age", " <b>"], ratios=[1.0, 0.9, 1.02])
    right = completion(correct=True, total=3.0, advantage=1.0, tokens_text=["SELECT", " name"], ratios=[1.05, 1.1])
    groups = [group(1, [completion(), completion(total=1.0)]), group(1, [wrong, right])]
    browser.open(report.write_report(write_run(tmp_path / "run", [metrics_of(1)], groups)))
    browser.wait_for_place(1, 2)  # opens at the group whose tokens are shaded
    card = "document.querySelector('article').textContent"
    text = browser.evaluate(card)
    for said in ("advantage −1.00", "= from singer", "− select singer.name", "+ select singer.age", "0.625 shop filter the rows",
                 "5 of 12 rows", "from 0.900 to 1.020"):
        assert said in text, said
    shades = ("[...document.querySelectorAll('article:nth-child(1) .token')].map((token) => [token.textContent, "
              "token.style.getPropertyValue('--tone'), token.style.getPropertyValue('--strength')].join())")
    assert browser.evaluate(shades) == ["SELECT,var(--s0),0%", " age,var(--s1),60%", " <b>,var(--s0),26%"]
    browser.press("k")
    browser.wait_for_place(1, 1)
    browser.choose("outcome", "ratios")
    browser.wait_for_place(1, 2)
    assert browser.complaints() == []
