"""The benches measure what they say: same lengths on every side, no logits beyond a chunk, what dense rewards say."""

import json
import re
import sqlite3
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_in_process, tiny_database

import ablate
from common.errors import UserError
from policy import build_tiny
from questions import demo_world
from rewards import RewardConfig
from settings import parse_settings
from sql_exec import MATCHES, SQLExecutor

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))
import by_chance  # noqa: E402
import dense  # noqa: E402
import first_step  # noqa: E402
import knows  # noqa: E402
import scaling  # noqa: E402
import shared_schema  # noqa: E402
import steps  # noqa: E402


def bench(script, *arguments):
    return subprocess.run([sys.executable, BENCH / script, *map(str, arguments)], capture_output=True, text=True)


def bench_here(module, *arguments):
    """The same in this process, which spares the seconds of its imports."""
    return SimpleNamespace(**dict(zip(("returncode", "stdout", "stderr"), run_in_process(module, *arguments), strict=True)))


@pytest.mark.parametrize("padded", [False, True])
def test_every_side_samples_the_lengths_of_the_plan(padded):
    plan = steps.Plan(prompt=9, completion=8, group=4, steps=2)
    assert sorted(plan.lengths()) == [4, 5, 7, 8]
    model, clock = steps.build_model(scaling.model_settings(64, 1)), steps.Clock("cpu")
    assert steps.our_steps(model, plan, clock, padded) == [24, 24]
    for step in clock.steps:
        assert step["rollout"] + step["reference"] + step["update"] <= step["step"]


def test_an_end_is_impossible_before_its_time_and_certain_then():
    logits = torch.randn(3, 5)
    shares = steps.force_end(logits, torch.tensor([2, 1, 0])).softmax(-1)
    torch.testing.assert_close(shares[0, 1:], logits[0, 1:].softmax(-1))
    assert shares[0, steps.END] == 0 and shares[1:, steps.END].tolist() == [1, 1]


def test_the_slope_is_that_of_the_line():
    assert scaling.slope([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx(2.0)


def test_a_schema_goes_through_the_model_once_for_the_questions_on_it():
    sizes = dict(schema=40, question=20, completion=4, questions=3, group=2, layers=1, threads=1, bf16=0) | {"pass": 4096}
    rows = {what: counts for what, *counts in shared_schema.measure(sizes)}
    tokens = 3 * (2 + 4)  # of completions
    assert rows["update"][::2] == [3 * 60 + tokens, 40 + 3 * 20 + tokens]
    assert rows["rollout"][0] - rows["rollout"][2] == 2 * 40


def test_the_loss_over_a_large_vocabulary_takes_a_fraction_of_the_naive_memory():
    sizes = ["--tokens", 1200, "--vocabulary", 60_000, "--width", 8, "--threads", 1]
    chunked, naive = (json.loads(bench("update_memory.py", "--worker", way, *sizes).stdout) for way in ("chunked", "naive"))
    logits = 1200 * 60_000 * 4 / 2**20  # megabytes
    assert chunked["added_mb"] < logits < 2 * logits < naive["added_mb"]
    assert chunked["norm"] == pytest.approx(naive["norm"], rel=1e-4)


def test_ways_of_the_cold_start_are_measured_on_the_same_traces(tmp_path):
    data = demo_world.load("cold", tmp_path / "demo")[0]
    build_tiny([record["question"] for record in data], seed=0, vocab_size=400, width=32, layers=1).save(tmp_path / "model")
    done = bench("cold_start_speed.py", "--model", tmp_path / "model", "--data", "demo", "--data-dir", tmp_path / "demo",
                 "--batch", 12, "--steps", 2, "--threads", 1)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows[2:5]] == ["padded", "packed", "shared"]
    padded, packed, shared = (int(row[1]) for row in rows[2:5])
    assert shared < packed < padded and rows[2][3] == "1.0"


@pytest.mark.skipif(find_spec("trl") is not None, reason="trl is there")
def test_without_trl_the_bench_says_what_to_install():
    done = bench("vs_trl.py")
    assert done.returncode == 1 and "pip install -r bench/requirements.txt" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_bench_says_so_in_one_sentence():
    done = bench("gpu.py")
    assert done.returncode == 1 and "needs a CUDA GPU" in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_the_dense_rewards_of_a_run_say(tmp_path):
    records = demo_world.load("cold", tmp_path)[0]
    first = next(record for record in records if record["difficulty"] == "group")
    other = next(record for record in records if record["db_id"] != first["db_id"])

    def completion(thought, correct, **rewards):
        rewards = {"format": 1.0, "execution": 1.0 + correct, "atomic": 0.0, "memory": 0.0, "result": 0.0} | rewards
        return {"thought": thought, "correct": correct, "status": "ok", "rewards": rewards}

    groups = [(1, first, [completion(first["trace"], True), completion("wrong", False)]),
              (2, other, [completion(first["trace"], True), completion("nothing like it", False)]),
              (3, other, [completion("a", False, atomic=0.5, memory=0.2, result=0.9),
                          completion("b", False, atomic=0.1, memory=0.2, result=0.3)])]
    config = parse_settings(["--rewards", "format,execution,atomic=0.5,memory=0.5,result=0.5", "--data-dir", str(tmp_path)])
    said = dense.report_lines(config.as_dict(), [{"step": step, "db_id": record["db_id"], "completions": completions}
                                           for step, record, completions in groups])
    assert said == ["3 groups: 1 all wrong, 2 mixed",
                    "(1) spread, all wrong  format 0.000  execution 0.000  atomic 0.141  memory 0.000  result 0.212",
                    "(1) spread, mixed      format 0.000  execution 0.707  atomic 0.000  memory 0.000  result 0.000",
                    "(2) memory ranks right above wrong in 100.0 % of pairs",
                    "(3) atomic agrees with soft-F1 in 100.0 % of pairs",
                    "(3) memory agrees with soft-F1 in 50.0 % of pairs"]
    done = bench_here(dense, tmp_path)
    assert done.returncode == 2 and "config.json" in done.stderr and "Traceback" not in done.stderr


def test_answers_that_are_right_by_chance_differ_on_a_changed_copy(tmp_path):
    tiny_database(tmp_path / "music.sqlite")
    gold = "SELECT COUNT(*) FROM singer"
    record = {"db_id": "music", "question": "How many singers?", "sql": gold}
    sqls = {gold: True, "SELECT COUNT(name) FROM singer": True, "SELECT COUNT(*) FROM concert": True, "SELECT 3": True,
            "SELECT 4": False}
    completions = [{"sql": sql, "correct": correct} for sql, correct in sqls.items()]
    (tmp_path / "mine.jsonl").write_text(json.dumps(record))
    (tmp_path / "config.json").write_text(json.dumps(parse_settings(["--data", str(tmp_path / "mine.jsonl")]).as_dict()))
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(record | golds | {"completions": completions}) + "\n" for golds
                                                     in ({"gold_sqls": [gold]}, {"gold_sqls": [], "answer": [[3]]})))
    done = bench_here(by_chance, tmp_path)
    assert done.stdout.startswith("4 samples are right; 2 of them (50.0 %) return another result"), done.stderr
    copy = by_chance.thinned(tmp_path / "music.sqlite", tmp_path / "copy.sqlite", 0)
    with sqlite3.connect(copy) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT COUNT(*) FROM concert").fetchone()[0] < 3
    connection.close()
    (tmp_path / "rollouts.jsonl").write_text("")
    assert "no sample of this run is right" in bench_here(by_chance, tmp_path).stderr


def test_what_rewards_know_of_answers(tmp_path):
    records = demo_world.load("cold", tmp_path)[0]
    record = next(record for record in records if record["sql"].startswith("SELECT COUNT(*) FROM "))
    gold = record["sql"]
    table = gold.split()[3]
    sqls = [gold, f"SELECT 1 FROM {table}", f"SELECT nothing FROM {table}"]
    completions = [{"thought": record["trace"], "sql": sql, "status": "ok"} for sql in sqls] + [{"status": "format"}]
    config = parse_settings(["--data-dir", str(tmp_path)]).as_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(record | {"gold_sqls": [gold], "completions": completions}) + "\n")
    done = bench_here(knows, tmp_path, "--rewards", "atomic,result,scope,memory:hash/other")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "1 groups; of 4 completions 3 have the format, 2 run and 1 are right"
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in lines[4:8])}
    assert lines[-2] == "| no join | 1 | – / 33.3 | – / 66.7 |"
    whole, chance = "100.0 [100.0, 100.0]", "50.0 [50.0, 50.0]"
    assert rows["atomic"][0] == rows["result"][0] == whole and rows["atomic"][3] == ""  # no group is all wrong
    assert rows["scope"][2] == whole  # the second names a column that is nowhere
    assert rows["memory:hash/other"][0] == chance  # they all reason alike
    wrong = bench_here(knows, tmp_path, "--rewards", "atomic,wit")
    assert wrong.returncode == 2 and "no 'wit'" in wrong.stderr and "Traceback" not in wrong.stderr


def test_how_answers_with_a_join_fare_by_hand():
    def answer(gold, sql, right, runs):
        return knows.Answer("db", "?", (gold,), "", sql, right, runs, 0.0)

    one, two = "SELECT a FROM t", "SELECT a FROM t JOIN u"
    groups = [[answer(one, one, True, True), answer(one, two, False, True)],
              [answer(two, one, False, True), answer(two, two, True, True), answer(two, two, False, False)],
              [answer(two, two, False, False)]]
    assert knows.by_joins(groups)[2:] == ["| no join | 1 | 0.0 / 100.0 | 100.0 / 100.0 |",
                                          "| joins | 2 | 33.3 / 0.0 | 33.3 / 100.0 |"]


def test_benches_measure_nothing_where_a_database_cannot_be_read(tmp_path):
    database = tiny_database(tmp_path / "music.sqlite")
    record = {"db_id": "music", "gold_sqls": ["SELECT 1 FROM singer"], "question": "?", "completions": [
        {"text": "<think>a</think>SELECT 2 FROM singer", "thought": "a", "sql": "SELECT 2 FROM singer", "status": "ok"}]}
    config = parse_settings(["--data-dir", str(tmp_path)]).as_dict()
    data, writer = SimpleNamespace(databases={"music": database}, traced=[], train=[]), sqlite3.connect(database)
    with SQLExecutor(data.databases, workers=1, timeout=0.1) as executor, pytest.MonkeyPatch.context() as patch:
        scores = first_step.Scores(config, [record], data, executor)
        writer.execute("BEGIN EXCLUSIVE")
        patch.setattr(knows, "SQLExecutor", lambda _: nullcontext(executor))  # one that does not wait long
        with pytest.raises(UserError, match="database is locked"):
            knows.read_groups([record], data.databases, MATCHES["bird"])
        with pytest.raises(UserError, match="database is locked"):
            scores.of(RewardConfig(rewards="format,execution"))
    writer.close()


def test_figures_of_what_rewards_know_are_those_of_pairs_within_a_group():
    def answer(right, runs, nearness):
        return knows.Answer("db", "?", ("SELECT 1",), "", "SELECT 1", right, runs, nearness)

    mixed = [(answer(True, True, 1.0), 0.5), (answer(False, True, 0.6), 0.7), (answer(False, True, 0.2), 0.5),
             (answer(False, False, 0.0), 0.5)]
    wrong = [(answer(False, True, 0.5), 0.2), (answer(False, False, 0.0), 0.4)]
    assert knows.figures([mixed, wrong]) == {
        "right": [[0.0, 0.5, 0.5], []], "nearer": [[1.0, 1.0, 0.5], [0.0]], "runs": [[1.0, 0.5], [0.0]],
        "spread": [[], [pytest.approx(0.1)]]}
    assert knows.estimate([[1.0, 0.0], []], percent=True) == "50.0 [50.0, 50.0]" and knows.estimate([[]], True) == ""
    assert knows.used_names("SELECT T1.Name, COUNT(*) AS n FROM singer AS T1 WHERE x > 'a b' ORDER BY n DESC") == {
        "name", "singer", "x"}


def test_a_push_is_the_derivative_of_a_table_of_probabilities():
    rng = np.random.default_rng(0)
    advantages, x, small = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), 1e-5
    weights = np.exp([[[-small]], [[small]]] * advantages)  # [2, B, G]
    before, after = (weights * x).sum(-1) / weights.sum(-1)
    np.testing.assert_allclose(first_step.pushes(advantages, x), (after - before) / (2 * small), atol=1e-8)


def test_pushes_of_advantages_that_differ_in_scale_only_are_the_same():
    advantages, x = np.random.default_rng(0).normal(size=(2, 3, 5))
    one, seven = (first_step.pushes(first_step.of_unit_size(scale * advantages), x) for scale in (1, 7))
    np.testing.assert_allclose(seven, one, rtol=1e-12)
    assert not first_step.of_unit_size(np.zeros((2, 2))).any()


def test_what_the_first_step_of_each_cell_pushes(tmp_path):
    record = next(record for record in demo_world.load("cold", tmp_path)[0] if record["sql"].startswith("SELECT COUNT(*) FROM "))
    gold = record["sql"]
    table = gold.split()[3]
    sqls = [gold, f"SELECT 1 FROM {table}", f"SELECT nothing FROM {table} JOIN {table}"]
    texts = [f"<think> {record['trace']} </think> {sql}" for sql in sqls] + ["not in the format"]
    log = [record | {"gold_sqls": [gold], "completions": [{"text": text} for text in group]}
           for group in (texts, texts[3:] * 4)]
    config = parse_settings(["--data-dir", str(tmp_path), "--advantage-scale", "group"]).as_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(group) + "\n" for group in log))
    done = bench_here(first_step, tmp_path, "--grid", "dense")
    assert done.returncode == 0, done.stderr
    rows = {cells[1].strip(): [cell.split()[0] for cell in cells[2:-1] if cell.strip()]
            for cells in (line.split("|") for line in done.stdout.splitlines()[2:])}
    assert list(rows) == list(ablate.GRIDS["dense"])
    # rewards 3, 2, 1 and 0, mean 1.5; the other group is flat and has no right answer, so A² has the mean 5 / 8
    right, runs, fails = (value / (5 / 8) ** 0.5 for value in (1.5, 0.5, -0.5))
    assert rows["execution"] == ["50.0", f"{right / 8:+.3f}", f"{(right + runs) / 8:+.3f}", f"{fails / 8:+.3f}", "+0.000"]
    assert rows["+ atomic"][0] == "50.0" and float(rows["+ atomic"][1]) < right / 8  # wrong answers earn something, too
    said = next(line for line in done.stdout.splitlines() if line.startswith("| + atomic")).split("|")[3]
    value, difference = re.match(r" (\S+) \((\S+) \[", said).groups()
    assert float(difference) == pytest.approx(float(value) - right / 8, abs=1e-3)
    for arguments, words in ((["--grid", "kl"], "kl_coef"), (["--vary", "embedder=hash,policy"], "no policy is loaded")):
        refused = bench_here(first_step, tmp_path, *arguments)
        assert refused.returncode == 2 and words in refused.stderr and "Traceback" not in refused.stderr
