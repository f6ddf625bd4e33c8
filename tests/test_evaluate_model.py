"""Evaluating a model: both votes, pass@k, resuming, traces, the test suite, efficiency, comparisons."""

import json
import math
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run_in_process
from little_policy import LESSONS, little_policy_folder

import ask
import evaluate
import sft
from common.errors import UserError
from data import Example, load_splits
from evaluate import (
    EvaluateConfig,
    PromptConfig,
    clean_mean,
    compare,
    load_predictions,
    print_comparison,
    r_ves,
)
from prompts.answer_format import ANSWER_STYLES, AnswerFormat
from scoring import answers, voting
from scoring.answers import NO_CANDIDATE, Examination, Progress, verified_traces
from scoring.compare import compare_seeds, print_seeds
from scoring.predictions import one_line, save_predictions
from scoring.verdicts import ExampleScore, bootstrap_interval, crossed_interval, score_predictions, suite_databases
from scoring.voting import Candidate
from sql_exec import Execution, SQLExecutor

QUESTIONS = 24


@pytest.fixture
def own_data(tmp_path, tiny_db):
    """24 questions about the tiny database, and the command that evaluates the little policy on them."""
    records = [{"id": f"q{i}", "question": LESSONS[i % 6][0], "db_id": "music", "sql": LESSONS[i % 6][1],
                "difficulty": ["low", "high"][i % 2]} for i in range(QUESTIONS)]
    (tmp_path / "own.json").write_text(json.dumps(records))
    folder = little_policy_folder(tiny_db)
    return ["--model", folder, "--data", tmp_path / "own.json", "--threads", 1, "--workers", 1,
            "--max-completion-tokens", 60, "--batch", 6, "--prompt-style", "compact"]


def run_main(monkeypatch, *arguments):
    """evaluate.py in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def without_timing(file):
    content = json.loads(file.read_text())
    content.pop("timing")
    return content


# ------------------------------------------------------------------------------------------ the command

def test_greedy(own_data, tmp_path, monkeypatch, capsys):
    out, traces, sqls = tmp_path / "a.json", tmp_path / "traces.jsonl", tmp_path / "p.jsonl"
    run_main(monkeypatch, *own_data, "--json", out, "--save-traces", traces, "--predictions-out", sqls)
    content = json.loads(out.read_text())
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if str(tmp_path) not in line]
    assert max(map(len, table)) <= 80 and "tokens a second" in printed
    # how many and the oldest are learnt; `nation` is no column, so that gold fails
    assert content["execution_accuracy"]["bird"] >= 12 / 24 and content["answer"] == "greedy"
    assert len(content["bad_golds"]) == 4 and [item["id"] for item in content["examples"]][:2] == ["q0", "q1"]
    assert content["examples"][0]["samples"]["correct"] == {"bird": 1, "spider": 1}
    assert not (tmp_path / "a.json.progress").exists()
    assert set(content["timing"]["seconds"]) == {"prompt", "generation", "sql", "total"}
    # the traces are those that --traces of the trainer takes, the predictions those that --predictions takes
    traced = load_splits(str(tmp_path / "own.json"), traces=str(traces), dev_size=0, test_size=0).traced
    assert {one.trace for one in traced} >= {"count the rows of singer", "sort singer by age"}
    again = tmp_path / "b.json"
    run_main(monkeypatch, "--predictions", sqls, "--data", tmp_path / "own.json", "--json", again)
    assert json.loads(again.read_text())["execution_accuracy"] == content["execution_accuracy"]
    assert "paired by id" in capsys.readouterr().out


def test_what_cannot_be_written_at_the_end_costs_no_answers(own_data, tmp_path, monkeypatch, capsys):
    out, traces = tmp_path / "a.json", tmp_path / "traces.jsonl"
    real = evaluate.write_text

    def full(file, text):
        if file == str(traces):
            raise UserError(f"cannot write {file}: No space left on device")
        real(file, text)

    monkeypatch.setattr(evaluate, "write_text", full)
    command = [*own_data, "--limit", 6, "--json", out, "--save-traces", traces]
    with pytest.raises(UserError, match="No space left on device; the answers are kept, so the same command writes"):
        run_main(monkeypatch, *command)
    assert "tokens a second" in capsys.readouterr().out and json.loads(out.read_text())["n"] == 6
    monkeypatch.setattr(evaluate, "write_text", real)
    run_main(monkeypatch, *command)
    assert "continuing: 6 of 6 questions are done" in capsys.readouterr().out and traces.exists()


def test_killed_and_started_again_gives_the_same_json(own_data, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    sampling = ["-n", 3, "--temperature", 1.2]
    run_main(monkeypatch, *own_data, *sampling, "--json", whole)
    progress = tmp_path / "parts.json.progress"
    command = [sys.executable, "evaluate.py", *map(str, [*own_data, *sampling, "--json", parts])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not progress.exists() or progress.read_text().count("\n") < 2):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = progress.read_text().count("\n") - 1
    assert 1 <= done < QUESTIONS / 6 and not parts.exists()
    with open(progress, "a") as file:
        file.write('{"batch": 999, "rec')  # a line cut short
    with pytest.raises(UserError, match="another temperature"):
        run_main(monkeypatch, *own_data, "-n", 3, "--temperature", 0.7, "--json", parts)
    capsys.readouterr()
    run_main(monkeypatch, *own_data, *sampling, "--json", parts)
    assert f"continuing: {6 * done} of 24 questions are done" in capsys.readouterr().out
    assert without_timing(parts) == without_timing(whole) and not progress.exists()


FENCES = ["<think> a </think> ```sql\nSELECT COUNT(*) FROM singer\n```", "<think> a </think>\r\n```sql SELECT COUNT(*) FROM singer```"]


WHAT_ASKS_A_MODEL = pytest.mark.parametrize("parse", [
    lambda *flags: evaluate.parse_arguments(flags)[1],
    lambda *flags: ask.parse_arguments([*flags, "--database", "any.sqlite", "Who?"])[1],
    lambda *flags: sft.parse_arguments([*flags, "--mine", "mined.jsonl"])[0]], ids=["evaluate", "ask", "mine"])


@WHAT_ASKS_A_MODEL
def test_completions_may_be_as_long_as_in_the_run_that_made_the_model(parse, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"data": "spider", "max_completion_tokens": 33}))
    model = ("--model", str(tmp_path / "best"))
    assert parse(*model).max_completion_tokens == 33
    assert parse(*model, "--max-completion-tokens", "44").max_completion_tokens == 44
    assert parse("--model", "qwen2.5-3b").max_completion_tokens == 512


@WHAT_ASKS_A_MODEL
def test_answers_are_read_as_in_the_run_that_made_the_model(parse, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"data": "spider", "lenient_format": True}))
    model = ("--model", str(tmp_path / "best"))
    assert parse(*model).lenient_format is True and not parse(*model, "--no-lenient-format").lenient_format
    assert not parse("--model", "qwen2.5-3b").lenient_format


def test_a_model_is_read_as_its_run_read_it(own_data, tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "run", tmp_path / "a.json"
    shutil.copytree(own_data[1], run / "best")
    own_data[1] = run / "best"
    monkeypatch.setattr(voting, "read_group", lambda policy, group, answer_format: [
        voting.read_text(text, -1.0, 5, False, answer_format) for text in FENCES[:len(group.completions)]])
    for settings, flags, accuracy in (({}, [], 0), ({"lenient_format": True}, [], 4 / 24),
                                      ({"lenient_format": True}, ["--no-lenient-format"], 0),
                                      ({"lenient_format": False}, ["--lenient-format"], 4 / 24)):
        (run / "config.json").write_text(json.dumps({"data": "spider", "split": "train", **settings}))
        run_main(monkeypatch, *own_data, *flags, "--json", out)
        content, printed = json.loads(out.read_text()), capsys.readouterr().out
        assert content["execution_accuracy"]["bird"] == pytest.approx(accuracy)
        assert content["lenient_format"] == (accuracy > 0)
        assert ("as in the run that made the model" in printed) == (accuracy > 0 and not flags)
        assert ("0.0 % of the answers meet the format" in printed) == (accuracy == 0)


def test_a_model_answers_in_the_style_of_its_run(own_data, tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "run", tmp_path / "a.json"
    shutil.copytree(own_data[1], run / "best")
    own_data[1] = run / "best"
    text = "count them\n```sql\nSELECT COUNT(*) FROM singer\n```"
    monkeypatch.setattr(voting, "read_group", lambda policy, group, answer_format: [
        voting.read_text(text, -1.0, 5, False, answer_format) for _ in group.completions])
    for settings, flags, style in (({}, [], "think-sql"), ({"answer_style": "fence"}, [], "fence"),
                                   ({"answer_style": "fence"}, ["--answer", "think-answer"], "think-answer"),
                                   ({}, ["--answer", "fence"], "fence")):
        (run / "config.json").write_text(json.dumps({"data": "spider", "split": "train", **settings}))
        run_main(monkeypatch, *own_data, *flags, "--json", out)
        content, printed = json.loads(out.read_text()), capsys.readouterr().out
        assert content["protocol"]["answer_style"] == style and f"prompts: compact; answers: {style}\n" in printed
        assert content["execution_accuracy"]["bird"] == pytest.approx(4 / 24 if style == "fence" else 0)
        assert ("the answers meet the format, " + ANSWER_STYLES[style].format[:20] in " ".join(printed.split())) == (style != "fence")


@pytest.mark.parametrize("statuses, lenient, words, absent", [
    ({"format": 1.0}, False, ["0.0 %", "--lenient-format", "--traces", "sft.py --mine"], ["--max-completion-tokens"]),
    ({"format": 6, "ok": 1, "error": 3}, True, ["40.0 %", "--traces"], ["--lenient-format", "tokens"]),
    ({"truncated": 0.9, "format": 0.1}, False, ["0.0 %", "--max-completion-tokens"], []),
    ({"format": 3, "ok": 1, "too_long": 96}, False, ["25.0 %"], [])])
def test_a_model_that_misses_the_format_is_told_what_to_do(statuses, lenient, words, absent):
    advice = AnswerFormat(lenient=lenient).advice(statuses)
    assert all(word in advice for word in words) and not any(word in advice for word in absent)
    for fine in ({"ok": 0.5, "format": 0.5}, {"too_long": 1.0}):
        assert AnswerFormat(lenient=lenient).advice(fine) == ""


def test_of_data_without_splits_the_part_is_measured_that_the_run_held_back(own_data, tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "run", tmp_path / "a.json"
    records = [{"id": f"q{i}", "question": f"question {i}", "db_id": "music", "sql": f"SELECT {i}"} for i in range(20)]
    (tmp_path / "own.json").write_text(json.dumps(records))
    shutil.copytree(own_data[1], run / "best")
    settings = {"data": str(tmp_path / "own.json"), "data_dir": None, "split": "train", "seed": 0, "eval_questions": 200,
                "test_questions": 1000}
    (run / "config.json").write_text(json.dumps(settings))
    own_data[1] = run / "best"
    splits = load_splits(settings["data"], dev_size=200, test_size=1000)
    run_main(monkeypatch, *own_data, "--split", "dev", "--json", out)
    assert [item["id"] for item in json.loads(out.read_text())["examples"]] == [one.id for one in splits.dev]
    assert 0 < len(splits.dev) < 20 and "held back" in capsys.readouterr().out
    (run / "config.json").unlink()
    run_main(monkeypatch, *own_data, "--json", out)
    assert json.loads(out.read_text())["n"] == 20 and "has no field 'split'" in " ".join(capsys.readouterr().out.split())


def test_sampling_table(own_data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.json"
    run_main(monkeypatch, *own_data, "-n", 7, "--json", out, "--vote", "majority", "--limit", 10,
             "--r-ves", 2)
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 80
    for label in ("greedy", "majority", "value-aware", "pass@1", "pass@5", "pass@7", "R-VES"):
        assert f"\n{label} " in printed
    assert content["answer"] == "majority" and content["n"] == 10
    assert content["answers"]["majority"]["execution_accuracy"] == content["execution_accuracy"]
    passes = content["pass_at_k"]["bird"]
    assert len(passes) == 7 and passes == sorted(passes)
    right = [item["samples"]["correct"]["bird"] for item in content["examples"]]
    assert passes[0] == pytest.approx(sum(right) / 70) and passes[-1] == sum(map(bool, right)) / 10
    assert all(sum(item["samples"]["statuses"].values()) == 7 for item in content["examples"])
    assert 0 < content["timing"]["r_ves"] <= 100 * math.sqrt(1.25)


def test_prompts_that_do_not_fit_are_wrong_answers(own_data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.json"
    run_main(monkeypatch, *own_data, "-n", 2, "--json", out, "--max-prompt-tokens", 5)
    content = json.loads(out.read_text())
    assert content["statuses"] == {"too_long": 1.0} and content["execution_accuracy"]["bird"] == 0
    assert content["timing"]["tokens_per_second"] == 0 and "too_long 100.0 %" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    ([], "give --predictions FILE or --model NAME"),
    (["--model", "m", "--predictions", "p.sql"], "not both"),
    (["--predictions", "p.sql", "-n", "5"], "need a --model"),
    (["--model", "m", "-n", "0"], "--samples is 0; it must be at least 1"),
    (["--model", "m", "-n", "5", "--temperature", "0"], "cannot give 5 sample(s)"),
    (["--model", "m", "--temperature", "-1"], "--temperature is -1.0; it must be at least 0"),
    (["--model", "m", "--temperature", "inf"], "--temperature is inf; it must be a finite number"),
    (["--model", "m", "--max-completion-tokens", "0"], "--max-completion-tokens is 0; it must be at least 1"),
    (["--model", "m", "--save-traces", "/nowhere/t.jsonl"], "cannot write /nowhere/t.jsonl"),
    (["--compare", "a.json", "gone.json"], "cannot read a.json")])
def test_bad_command_lines(monkeypatch, arguments, words):
    with pytest.raises(UserError) as error:
        run_main(monkeypatch, *arguments)
    assert words in str(error.value)


@pytest.mark.parametrize("settings, ways, answer", [
    ({}, ("greedy",), "greedy"),
    ({"samples": 5}, ("greedy", "sample", "value-aware", "majority"), "value-aware"),
    ({"samples": 5, "vote": "none"}, ("greedy", "sample", "value-aware", "majority"), "greedy"),
    ({"samples": 5, "vote": "none", "greedy": False}, ("sample", "value-aware", "majority"), "sample"),
    ({"temperature": 0.7, "vote": "majority"}, ("greedy", "sample", "value-aware", "majority"), "majority"),
    ({"temperature": 0.0, "vote": "majority"}, ("greedy",), "greedy")])
def test_which_answer_counts(settings, ways, answer):
    config = EvaluateConfig(model="m", **settings)
    assert (config.ways, config.answer) == (ways, answer)


# ------------------------------------------------------------------------------------- records by hand

GOLD = Example("7", "music", "Who is from France?", ("SELECT name FROM singer WHERE country = 'France'",))


def candidate(sql, logprob=-1.0, thought="think", truncated=False):
    return Candidate("text", thought, sql, logprob, 10, truncated)


def examination_of(config, executor, traces=1):
    """The examination of evaluate.py, without a policy."""
    return Examination(None, None, executor, config.exam("think-sql"), config.ways, matches=config.matches,
                       keep_distinct=config.keep_distinct, traces=traces)


def test_a_record_by_hand(tiny_db):
    right, same = GOLD.gold_sqls[0], "SELECT name FROM singer WHERE age <= 30"  # Ana and Cy, both
    samples = [candidate("SELECT name FROM singer WHERE age > 99", -0.1)] * 3 + [
        candidate(right, -2.0), candidate(same, -1.0, ""), candidate("SELECT oops"),
        candidate("", truncated=True)]
    with SQLExecutor({"music": tiny_db}, workers=1) as executor:
        config = EvaluateConfig(model="m", samples=7)
        examination = examination_of(config, executor)
        greedy = [candidate("")]
        verdicts, = examination.verdicts([(GOLD, "easy", greedy, samples)])
        record = examination.record(GOLD, greedy, samples, verdicts, {"prompt": 1.0, "generation": 2.0})
    assert {way: score["correct"]["bird"] for way, score in record["answers"].items()} == {
        "greedy": False, "sample": False, "majority": False, "value-aware": True}
    assert record["answers"]["value-aware"]["sql"] == same  # the likelier of the winning group
    assert record["answers"]["greedy"]["status"] == "format"
    assert record["samples"] == {"correct": {"bird": 2, "spider": 2}, "groups": 2, "truncated": 1, "second_tries": 0,
                                 "tokens": 70, "statuses": {"error": 1, "ok": 5, "truncated": 1},
                                 "failures": {"unknown name": 1, "cut": 1}}
    assert [(one["sql"], one["trace"]) for one in record["traces"]] == [(right, "think")]  # `same` has no reasoning
    assert json.loads(json.dumps(record)) == record and record["seconds"]["sql"] > 0


def test_a_vote_on_a_locked_database_is_none(tiny_db):
    """Whatever is known of a question, one answer that could not run leaves it out of every figure."""
    class Locked:
        databases = {"music": tiny_db}

        def run_many(self, pairs):
            return [Execution("unavailable", error="database is locked") if "> 99" in sql else ran
                    for (_, sql), ran in zip(pairs, executor.run_many(pairs), strict=True)]

        run_gold = run_many

    right = [candidate(GOLD.gold_sqls[0]), candidate("SELECT name FROM singer WHERE age > 98")]
    config, records = EvaluateConfig(model="m", samples=2), []
    with SQLExecutor({"music": tiny_db}, workers=1) as executor:
        examination = examination_of(config, Locked())
        for samples in (right, [right[0], candidate("SELECT name FROM singer WHERE age > 99")]):
            verdicts, = examination.verdicts([(GOLD, "easy", right[:1], samples)])
            records.append(examination.record(GOLD, right[:1], samples, verdicts, {"prompt": 1.0, "generation": 2.0}))
    whole, part = records
    assert {score["status"] for score in part["answers"].values()} == {"unavailable"} and part["traces"] == []
    assert part["samples"]["statuses"] == {"unavailable": 2} and whole["samples"]["statuses"] == {"ok": 2}
    summary, alone = evaluate.summarise_records(records, config), evaluate.summarise_records([whole], config)
    for one in (summary, alone):
        one.pop("timing")
    assert summary == alone and summary["pass_at_k"]["bird"] == [0.5, 1.0]
    assert evaluate.records_as_json(records, config)[1]["answers"]["greedy"] == {"bird": None, "spider": None}
    assert "1 questions left out, since their database could not be read" in sft.summary_of(
        records, [], SimpleNamespace(rejections=Counter()))
    assert sft.why_none_verified([part], AnswerFormat()) == "no database could be read; try again when they can"


def test_verified_traces_need_a_gold_with_rows(tiny_db):
    def verdict(gold_status, **correct):
        score = ExampleScore("7", "music", "easy", "SELECT 1", "ok", gold_status, "", correct, 1.0, all(correct.values()))
        return score, Execution("ok")

    one = [candidate("SELECT 1")]
    right = {"SELECT 1": verdict("ok", bird=True, spider=True), "SELECT 1.0": verdict("ok", bird=True, spider=True)}
    assert [trace["sql"] for trace in verified_traces(GOLD, one, right)] == ["SELECT 1"]
    several = [*one, candidate("SELECT 1.0", -0.5), *one, candidate("SELECT 1", -2.0, "more")]
    assert [(trace["sql"], trace["trace"]) for trace in verified_traces(GOLD, several, right)] == [
        ("SELECT 1.0", "think"), ("SELECT 1", "think"), ("SELECT 1", "more")]  # the likeliest first, each once
    assert verified_traces(GOLD, one, {"SELECT 1": verdict("empty", bird=True, spider=True)}) == []
    assert verified_traces(GOLD, one, {"SELECT 1": verdict("ok", bird=True, spider=False)}) == []
    assert verified_traces(GOLD, [NO_CANDIDATE], {"": verdict("ok", bird=True)}) == []


def test_traces_keep_the_word_value(tiny_db):
    """Spider's script turns `value` in predictions into 1: its score says wrong, yet the SQL is verified."""
    gold = Example("7", "music", "q", ("SELECT name AS value FROM singer", "SELECT 'value of ' || name FROM singer"))
    sqls = ["SELECT 'value of ' || name FROM singer", "SELECT 'valu' || 'e of ' || name FROM singer", "SELECT 'value'"]
    for keep_distinct in (False, True):
        config = EvaluateConfig(model="m", samples=3, greedy=False, keep_distinct=keep_distinct)
        with SQLExecutor({"music": tiny_db}, workers=1) as executor:
            examination = examination_of(config, executor, traces=9)
            samples = [candidate(sql) for sql in sqls]
            verdicts, = examination.verdicts([(gold, "easy", [], samples)])
            record = examination.record(gold, [], samples, verdicts, {})
        assert [verdicts[sql][0].correct["spider"] for sql in sqls] == [False, True, False]
        assert sorted(trace["sql"] for trace in record["traces"]) == sorted(sqls[:2])


def test_progress_without_a_file_and_with_nonsense(tmp_path):
    progress = Progress(None, {})
    progress.add(0, [{"a": (1, 2)}])
    assert progress.done == {0: [{"a": [1, 2]}]}
    (tmp_path / "p").write_text("[]\n")
    with pytest.raises(UserError, match="another n"):
        Progress(tmp_path / "p", {"n": 1})
    (tmp_path / "p").write_text("")  # killed before its first line was written
    assert Progress(tmp_path / "p", {"n": 1}).done == {}


def test_a_full_disk_takes_no_answers_that_were_kept(tmp_path):
    file = tmp_path / "p"
    Progress(file, {"n": 1}).add(0, [{"id": "x"}])
    before, (_, hard) = file.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # no file grows beyond ten bytes
    try:
        with pytest.raises(UserError, match="cannot write .*p: File too large"):
            Progress(file, {"n": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert file.read_text() == before and Progress(file, {"n": 1}).done == {0: [{"id": "x"}]}


def test_batches_draw_their_own_samples(monkeypatch):
    exams = []
    monkeypatch.setattr(answers, "sample_candidates", lambda policy, prompts, exam, support, asked: exams.append(exam) or [])
    config = EvaluateConfig(model="m", samples=4, seed=2)
    examination = Examination(None, None, None, config.exam("fence"), config.ways)
    examination.complete([], 0)
    examination.complete([], 64)
    assert [(exam.samples, exam.temperature) for exam in exams] == [(1, 0.0), (4, 1.0)] * 2  # greedy, then samples
    assert [exam.seed for exam in exams] == [2_000_006, 2_000_006, 2_000_070, 2_000_070]
    assert {exam.answer_format for exam in exams} == {AnswerFormat("fence")}


def test_another_file_of_weights_is_another_model(tmp_path):
    config = EvaluateConfig(model=str(tmp_path / "model.gguf"))
    found = []
    for weights in (b"one", b"other"):
        (tmp_path / "model.gguf").write_bytes(weights)
        found.append(answers.fingerprint(config, PromptConfig(), [], ())["weights"])
    assert found[0] != found[1]


# ------------------------------------------------------------------------------------------- test suite

def test_suite(tmp_path):
    folder = tmp_path / "music"
    folder.mkdir()
    for name, age in (("music", 30), ("other", 10)):
        connection = sqlite3.connect(folder / f"{name}.sqlite")
        connection.executescript(f"CREATE TABLE singer (name, age); INSERT INTO singer VALUES ('Ana', {age})")
        connection.close()
    sqlite3.connect(tmp_path / "alone.sqlite").execute("CREATE TABLE t (a)")
    databases, suite = suite_databases({"music": folder / "music.sqlite", "alone": tmp_path / "alone.sqlite"})
    assert suite == {"music": ["music/other"], "alone": []} and len(databases) == 3
    golds = ["SELECT name FROM singer WHERE age > 20", "SELECT name FROM singer WHERE age > 20",
             "SELECT 1 / (age - 10) + abs(-9223372036854775808 + (age - 10)) FROM singer"]
    examples = [Example(str(i), "music", "q", (gold,)) for i, gold in enumerate(golds)]
    sqls = ["SELECT name FROM singer", "SELECT name FROM singer WHERE age >= 30", golds[2]]
    with SQLExecutor(databases, workers=1) as executor:
        single = score_predictions(examples, sqls, executor)
        scores = score_predictions(examples, sqls, executor, suite=suite)
    assert [score.correct["spider"] for score in single] == [True, True, True]
    assert [score.correct["spider"] for score in scores] == [False, True, False]
    assert [score.gold_status for score in scores] == ["ok", "ok", "error"]  # its gold fails on the second
    several = ("SELECT age FROM singer", "SELECT 40 - age FROM singer", golds[2])  # 30 and 10; 10 and 30; fails on one
    example = Example("4", "music", "q", several)
    with SQLExecutor(databases, workers=1) as executor:
        wrong = score_predictions(examples, ["SELECT 0"] * 3, executor, suite=suite)
        pair = score_predictions([example] * 2, ["SELECT age FROM singer WHERE age > 0", "SELECT 30"], executor, suite=suite)
    assert [score.gold_status for score in wrong] == ["ok", "ok", "error"]  # whatever is predicted
    assert [score.correct["spider"] for score in pair] == [True, False]  # one gold on both, not one on each
    assert pair[0].gold_status == "ok"
    config = EvaluateConfig(model="m", test_suite=True)
    assert "test suite of 1 to 2 databases" in evaluate.spider_metric(config, suite)
    assert "single database" in evaluate.spider_metric(config, {"alone": []})


# ------------------------------------------------------------------------------------------- efficiency

def test_a_broken_file_beside_a_database_is_named(tmp_path):
    """`._x.sqlite` is what macOS adds to archives."""
    folder = tmp_path / "music"
    folder.mkdir()
    sqlite3.connect(folder / "music.sqlite").execute("CREATE TABLE singer (name)").connection.close()
    (folder / "._music.sqlite").write_bytes(b"Mac OS X")
    databases, suite = suite_databases({"music": folder / "music.sqlite"})
    with SQLExecutor(databases, workers=1) as executor:
        score, = score_predictions([Example("1", "music", "q", ("SELECT name FROM singer",))], ["SELECT 1"], executor, suite=suite)
    assert score.gold_status == "error" and score.file == str(folder / "._music.sqlite")
    assert "it is not a SQLite database" in score.gold_error


def test_clean_mean_drops_outliers_beyond_three_deviations():
    assert clean_mean([2.0]) == 2.0
    values = [1.0] * 19 + [101.0]  # mean 6, deviation 21.8: 101 is 4.4 deviations away
    assert clean_mean(values) == 1.0
    assert clean_mean([1.0, 3.0]) == 2.0


def test_r_ves_by_hand():
    class Timed:
        """Gold takes 4 s, the predictions 1, 3, 6, 12 and 24 s."""
        def run(self, db_id, sql):
            return Execution("ok", seconds=float(sql))

    examples = [Example(str(i), "music", "q", ("4",)) for i in range(6)]
    scores = [ExampleScore(str(i), "music", "easy", sql, "ok", "ok", "", {"bird": i < 5}, 1.0)
              for i, sql in enumerate(["1", "3", "6", "12", "24", "1"])]
    expected = [125, 100, 75, 50, 25, 0]  # ratios 4, 1.33, 0.67, 0.33, 0.17, and a wrong answer
    assert r_ves(examples, scores, Timed(), 3) == pytest.approx([100 * math.sqrt(e / 100) for e in expected])


def test_an_answer_is_timed_against_a_gold_that_runs():
    class Timed:
        """A gold that fails at once, and one that takes 4 s; the prediction takes 1 s."""
        def run(self, db_id, sql):
            return Execution("error", seconds=0.0001) if sql == "fails" else Execution("ok", seconds=float(sql))

    score = ExampleScore("1", "music", "", "1", "ok", "ok", "", {"bird": True}, 1.0)
    example = Example("1", "music", "q", ("fails", "4"))
    assert r_ves([example], [score], Timed(), 3) == [pytest.approx(100 * math.sqrt(1.25))]


def test_runs_that_could_not_read_the_database_are_no_times():
    class Locked:
        """Every other pair of runs is locked, and of the last question all."""
        turns = iter(range(99))

        def run(self, db_id, sql):
            if sql == "locked" or next(self.turns) % 4 > 1:
                return Execution("unavailable", seconds=0.0001)
            return Execution("ok", seconds=float(sql))

    examples = [Example("1", "music", "q", ("4",)), Example("2", "music", "q", ("locked",))]
    scores = [ExampleScore(one.id, "music", "", sql, "ok", "ok", "", {"bird": True}, 1.0)
              for one, sql in zip(examples, ("1", "locked"), strict=True)]
    assert r_ves(examples, scores, Locked(), 4) == [pytest.approx(100 * math.sqrt(1.25))]


# ----------------------------------------------------------------------------------------- comparisons

def scores_file(path, verdicts, **more):
    examples = [{"id": str(i), "db_id": "music", "status": "ok", "gold_status": "ok", "bird": right,
                 "sql": f"SELECT {i}"} for i, right in enumerate(verdicts)]
    path.write_text(json.dumps({"examples": examples, **more}))
    return path


def test_compare_by_hand(tmp_path, capsys):
    a = scores_file(tmp_path / "a.json", [1, 1, 0, 0, 1])
    b = scores_file(tmp_path / "b.json", [1, 0, 1, 1])
    result = compare(a, b)
    part = result["matches"]["bird"]
    assert (part["a"], part["b"], part["difference"]) == (0.5, 0.75, 0.25)
    assert part["gained"] == ["2", "3"] and part["lost"] == ["1"] and result["only_in_one"] == 1
    assert part["interval"][0] < 0.25 < part["interval"][1]
    print_comparison(result)
    printed = capsys.readouterr().out
    assert "+25.0" in printed and "gained (bird): question 2\n  A: SELECT 2" in printed
    same = compare(a, a)["matches"]["bird"]
    assert same["difference"] == 0 and same["gained"] == same["lost"] == []
    assert same["interval"] == bootstrap_interval([0] * 5, span=(-1, 1))  # a few questions prove no equality


def test_compare_draws_twins_and_databases(tmp_path, capsys):
    def file(name, verdicts):
        examples = [{"id": str(i), "db_id": f"db{i % 2}", "twins": f"t{i // 4}", "status": "ok", "gold_status": "ok",
                     "bird": right} for i, right in enumerate(verdicts)]  # 0 and 2 are twins, 1 and 3, 4 and 6, ...
        (tmp_path / name).write_text(json.dumps({"examples": examples}))
        return tmp_path / name

    before, after = [0, 1, 0, 1] * 20, [1, 1, 1, 1, 0, 1, 0, 0] * 10
    result = compare(file("a.json", before), file("b.json", after))
    part, change = result["matches"]["bird"], [b - a for a, b in zip(before, after, strict=True)]
    assert (result["n"], result["twin_groups"], result["databases"]) == (80, 40, 2)
    assert part["interval"] == bootstrap_interval(change, [(i % 2, i // 4) for i in range(80)], span=(-1, 1))
    assert part["interval_over_databases"] == bootstrap_interval(change, [i % 2 for i in range(80)], span=(-1, 1))
    print_comparison(result)
    printed = capsys.readouterr().out
    assert "  over 2 databases" in printed and "gold query together: 40 groups" in printed
    print_comparison(compare(*[scores_file(tmp_path / name, [1, 0]) for name in "ab"]))  # of an older version
    printed = capsys.readouterr().out
    assert "over single questions" in printed and "databases" not in printed


def test_compare_takes_a_pair_per_seed(tmp_path, capsys):
    def file(name, verdicts):
        examples = [{"id": str(i), "db_id": "music", "twins": f"t{i // 2}", "status": "ok", "gold_status": "ok", "bird": right}
                    for i, right in enumerate(verdicts)]
        (tmp_path / name).write_text(json.dumps({"examples": examples}))
        return tmp_path / name

    sides = [[0, 1, 0, 0] * 10, [1, 1, 1, 0] * 10, [0, 0, 0, 0] * 10, [1, 0, 0, 0] * 5 + [0, 0, 0, 0] * 5]  # A0 B0 A1 B1
    files = [file(f"{number}.json", verdicts) for number, verdicts in enumerate(sides)]
    json_file = tmp_path / "out.json"
    assert run_in_process(evaluate, "--compare", *files, "--json", json_file)[0] == 0
    found = json.loads(json_file.read_text())["over_seeds"]["bird"]
    assert (found["a"], found["b"], found["difference"]) == pytest.approx((0.125, 0.4375, 0.3125))
    changes = np.array([[1, 1] * 10, [1, 0] * 5 + [0, 0] * 5])  # of each seed, per pair of twins
    assert found["interval"] == crossed_interval(changes, np.full(20, 2))
    assert [pair["matches"]["bird"]["difference"] for pair in json.loads(json_file.read_text())["pairs"]] == [0.5, 0.125]
    print_seeds(compare_seeds(files))
    printed = " ".join(capsys.readouterr().out.split())
    assert "mean of 2, over seeds and questions 12.5 43.8 +31.2 [" in printed and "+50.0" in printed
    for wrong in ([files[0]], files[:3]):
        status, _, errors = run_in_process(evaluate, "--compare", *wrong)
        assert status == 2 and f"pairs of files, A and B of each seed, but was given {len(wrong)}" in errors
    others = [file("others.json", [0, 1])] * 2
    status, _, errors = run_in_process(evaluate, "--compare", *files[:2], *others)
    assert status == 2 and "evaluations of different questions" in errors


@pytest.mark.parametrize("bad", ["a", "b"])
def test_a_gold_that_failed_on_either_side_is_left_out_with_the_others(tmp_path, bad, capsys):
    files = [scores_file(tmp_path / name, [1, 0], bad_golds_skipped=True) for name in "ab"]
    content = json.loads((tmp_path / bad).read_text())
    content["examples"][1]["gold_status"] = "timeout"
    (tmp_path / bad).write_text(json.dumps(content))
    assert compare(*files)["n"] == 1 and compare(*files)["matches"]["bird"]["a"] == 1
    print_comparison(compare(*files))
    assert "1 questions; 1 are left out, since\ntheir gold query fails" in capsys.readouterr().out


def test_what_could_not_be_read_is_not_compared(tmp_path, capsys):
    files = [scores_file(tmp_path / name, [1, 0, 1]) for name in "ab"]
    content = json.loads(files[1].read_text())
    content["examples"][0] |= {"status": "unavailable", "bird": None}
    files[1].write_text(json.dumps(content))
    result = compare(*files)
    assert result["n"] == 2 and result["matches"]["bird"]["a"] == result["matches"]["bird"]["b"] == 0.5
    print_comparison(result)
    assert "2 questions; 1 are left out, since their database could not be read" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [["--timeout", 9], ["--max-rows", 9], ["--test-suite"], ["--lenient-format"]])
def test_predictions_that_were_run_otherwise_are_not_compared(tmp_path, tiny_db, monkeypatch, flag):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    (tmp_path / "own.json").write_text(json.dumps([{"question": "q", "db_id": "music", "sql": "SELECT 1"}]))
    (tmp_path / "p.sql").write_text("SELECT 1\n")
    common = ["--predictions", tmp_path / "p.sql", "--data", tmp_path / "own.json", "--workers", 1, "--match", "bird", "--json"]
    run_main(monkeypatch, *common, a)
    run_main(monkeypatch, *common, b, *flag)
    with pytest.raises(UserError, match=rf"measured differently: {flag[0][2:].replace('-', ' ')} \([^)]*\); measure them"):
        compare(a, b)


def test_r_ves_leaves_out_the_bad_golds_that_are_left_out_elsewhere(tmp_path, tiny_db, monkeypatch):
    golds = ["SELECT 1", "SELECT oops"]
    (tmp_path / "own.json").write_text(json.dumps([{"question": "q", "db_id": "music", "sql": sql} for sql in golds]))
    (tmp_path / "p.sql").write_text("SELECT 1\nSELECT 1\n")
    monkeypatch.setattr(evaluate, "time_ratio", lambda *_: 1.0)  # a reward of 1
    for flags, score in (([], 50.0), (["--skip-bad-gold"], 100.0)):
        run_main(monkeypatch, "--predictions", tmp_path / "p.sql", "--data", tmp_path / "own.json", "--workers", 1, "--r-ves", 1,
                 "--json", tmp_path / "out.json", *flags)
        assert json.loads((tmp_path / "out.json").read_text())["timing"]["r_ves"] == score


def test_compare_counts_every_question_of_a_repeated_id(tmp_path, capsys):
    files = []
    for name, verdicts in (("a", [1, 0, 1, 0]), ("b", [1, 1, 0, 1])):
        items = [{"id": identity, "db_id": "music", "status": "ok", "gold_status": "ok", "bird": right, "sql": f"SELECT {i}{name}"}
                 for i, (identity, right) in enumerate(zip(["7", "7", "8", "7"], verdicts, strict=True))]
        (tmp_path / name).write_text(json.dumps({"examples": items}))
        files.append(tmp_path / name)
    result = compare(*files)
    assert result["n"] == 4 and result["only_in_one"] == 0
    part = result["matches"]["bird"]
    assert (part["a"], part["b"], part["gained"], part["lost"]) == (0.5, 0.75, ["7-2", "7-3"], ["8"])
    assert result["sql"]["7-2"] == ["SELECT 1a", "SELECT 1b"] and result["sql"]["7"] == ["SELECT 0a", "SELECT 0b"]
    print_comparison(result)
    assert "question 7-3\n  A: SELECT 3a" in capsys.readouterr().out


def test_repeated_ids_in_the_data_lose_no_question(tmp_path, tiny_db, monkeypatch, capsys):
    """From the data over every form of predictions to a comparison."""
    (tmp_path / "dev_databases" / "music").mkdir(parents=True)
    shutil.copy(tiny_db, tmp_path / "dev_databases" / "music" / "music.sqlite")
    records = [{"question_id": 7, "question": "q", "db_id": "music", "SQL": f"SELECT {i}"} for i in range(3)]
    (tmp_path / "dev.json").write_text(json.dumps(records))
    (tmp_path / "p.sql").write_text("SELECT 0\nSELECT 1\nSELECT 9\n")
    common, first = ["--data", "bird", "--data-dir", tmp_path, "--workers", 1], tmp_path / "p.sql"
    for ending in (".json", ".jsonl", ".sql"):
        run_main(monkeypatch, *common, "--predictions", first, "--predictions-out", tmp_path / f"out{ending}", "--json", tmp_path / "a.json")
        run_main(monkeypatch, *common, "--predictions", tmp_path / f"out{ending}", "--json", tmp_path / "b.json")
        one, other = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
        assert one["n"] == 3 and [item["bird"] for item in one["examples"]] == [1, 1, 0] and one == other
        assert compare(tmp_path / "a.json", tmp_path / "b.json")["n"] == 3
    assert "7" in capsys.readouterr().out


def test_compare_many_is_tighter_than_unpaired(tmp_path):
    verdicts = [i % 2 for i in range(400)]
    a = scores_file(tmp_path / "a.json", verdicts)
    b = scores_file(tmp_path / "b.json", [1 if i == 0 else right for i, right in enumerate(verdicts)])
    low, high = compare(a, b)["matches"]["bird"]["interval"]
    assert abs(low) < 1e-3 and high < 0.01  # unpaired it would be some 0.07 wide on either side


def test_evaluations_state_their_protocol_and_only_equal_ones_are_compared(own_data, tmp_path, monkeypatch, capsys):
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    run_main(monkeypatch, *own_data, "--json", a, "--limit", 6)
    protocol = json.loads(a.read_text())["protocol"]
    assert protocol.pop("questions") and len(protocol.pop("template")) == 16
    assert protocol == {
        "data": "own.json", "split": "dev", "spider_metric": "test-suite comparison on a single database, DISTINCT ignored",
        "test_suite": False, "timeout": 30.0, "max_rows": 1_000_000, "constrain": "none", "turns": 1,
        "prompt_style": "compact", "answer_style": "think-sql", "descriptions": "auto", "tables": "", "sample_values": 3,
        "max_value_hints": 6, "max_prompt_tokens": 2048, "precision": "float32", "lenient_format": False, "answer": "greedy",
        "samples": 1, "temperature": 0.0, "max_completion_tokens": 60}
    run_main(monkeypatch, *own_data, "--json", b, "--limit", 6, "-n", 2, "--max-value-hints", 0, "--keep-distinct")
    with pytest.raises(UserError, match=r"a.json and .*b.json were measured differently: spider metric \(.*ignored and .*kept\); "
                                        r"max value hints \(6 and 0\); answer \(greedy and value-aware\); samples \(1 and 2\); "
                                        r"temperature \(0.0 and 1.0\); .*--anyway"):
        run_main(monkeypatch, "--compare", a, b)
    capsys.readouterr()
    run_main(monkeypatch, "--compare", a, b, "--anyway")
    assert "6 questions" in capsys.readouterr().out
    (tmp_path / "p.sql").write_text("SELECT 1\n" * QUESTIONS)  # of predictions nobody knows how they were made
    run_main(monkeypatch, "--predictions", tmp_path / "p.sql", "--data", tmp_path / "own.json", "--limit", 6, "--json", c)
    assert compare(a, c)["n"] == 6
    run_main(monkeypatch, "--predictions", tmp_path / "p.sql", "--data", tmp_path / "own.json", "--json", c)
    with pytest.raises(UserError, match="measured differently: questions"):
        compare(a, c)


def test_files_that_cannot_be_compared(tmp_path):
    a = scores_file(tmp_path / "a.json", [1])
    (tmp_path / "b.json").write_text('{"examples": [{"id": 1}]}')
    with pytest.raises(UserError, match="is not a file that evaluate.py --json wrote"):
        compare(a, tmp_path / "b.json")
    with pytest.raises(UserError, match="no question in common"):
        compare(a, scores_file(tmp_path / "c.json", []))


# ------------------------------------------------------------------------------------ prediction files

@pytest.mark.parametrize("sql, expected", [
    ("SELECT 1", "SELECT 1"), ("SELECT a,\n\tb FROM t", "SELECT a,  b FROM t"),
    ("SELECT 1 -- one\n, 2", "SELECT 1  , 2"), ("SELECT '-- a'\r\nFROM t", "SELECT '-- a'  FROM t"),
    ("SELECT '--'", "SELECT '--'"), ("", "")])
def test_one_line(sql, expected):
    assert one_line(sql) == (expected, True)


@pytest.mark.parametrize("ending", [".sql", ".json", ".jsonl"])
def test_saved_predictions_come_back(tmp_path, ending):
    examples = [Example(identity, "music", "q", ("SELECT 1",)) for identity in ("717", "718", "3")]
    sqls = ["SELECT 'é', 1", "", "SELECT\n2"]
    save_predictions(tmp_path / f"p{ending}", examples, sqls)
    back, pairing = load_predictions(tmp_path / f"p{ending}", examples)
    assert back == (["SELECT 'é', 1", "SELECT", "SELECT 2"] if ending == ".sql" else sqls)
    assert ("by position" if ending == ".sql" else "by id") in pairing


def test_the_official_script_reads_bird_predictions(tmp_path):
    save_predictions(tmp_path / "predict_dev.json", [GOLD], ["SELECT 1"])
    for text in json.loads((tmp_path / "predict_dev.json").read_text()).values():  # as package_sqls does
        sql, db_id = text.split("\t----- bird -----\t")
        assert (sql, db_id) == ("SELECT 1", "music")


def test_prompt_flags_reach_the_evaluation():
    _, config, prompts = evaluate.parse_arguments(["--model", "m", "--prompt-style", "full", "-n", "3"])
    assert (config.samples, prompts) == (3, PromptConfig(style="full"))
