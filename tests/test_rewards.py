"""rewards.py: the format, the sum, and the property that correct outranks wrong, on a real executor."""

import math
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo
import rewards
import sql_exec
from partial_credit.memory import HashEmbedder, MemoryGate, TraceMemory
from prompts.answer_format import ANSWER_STYLES, AnswerFormat, unwrap_fence
from questions.example import Example
from rewards import (
    RewardBreakdown,
    RewardConfig,
    RewardError,
    RewardItem,
    RewardScorer,
    parse_completion,
    parse_rewards,
)
from scoring.verdicts import score_predictions
from sql_exec import MATCHES, SQLExecutor

SCHEMA = {"city": ["id", "name", "people"]}
GOLD = "SELECT name FROM city WHERE people > 100"
OPEN = MemoryGate(memory_min_words=1, memory_min_columns=0, memory_min_density=0.0, memory_max_cosine=2.0)


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    path = tmp_path_factory.mktemp("db") / "towns.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE city (id INTEGER PRIMARY KEY, name TEXT, people INTEGER)")
        connection.executemany("INSERT INTO city VALUES (?, ?, ?)", [(1, "Oslo", 700), (2, "Bergen", 280), (3, "Moss", 50)])
    connection.close()
    with SQLExecutor({"towns": path}, workers=1, timeout=2.0) as pool:
        yield pool


def scorer(executor, spec="format,execution,atomic,memory", memory=None, match="bird", **settings):
    return RewardScorer(RewardConfig(rewards=spec, **settings), executor, {"towns": SCHEMA}, memory,
                        match=MATCHES[match])


def item(sql, thought="look at the cities", golds=(GOLD,)):
    return RewardItem("towns", golds, f"<think> {thought} </think> {sql}", "Which cities are large?")


@pytest.mark.parametrize("text", [
    "<think> a </think> SELECT 1", "  <think>a</think>\nSELECT 1 ;\n", "<think>a</think> SELECT ';' -- two; parts\n",
    "<think> a < b </think>(SELECT 1)", "<think>a</think> WITH x AS (SELECT 1) SELECT * FROM x",
    "<think>a</think> VALUES (1)", "<think>a</think> DROP TABLE city", "<think>a</think> -- note\nSELECT 1"])
def test_texts_with_the_format(text):
    thought, sql = parse_completion(text)
    assert thought and "think" not in sql


@pytest.mark.parametrize("text", [
    "", "SELECT 1", "<think> a </think>", "<think> </think> SELECT 1", "<think> a SELECT 1", "a </think> SELECT 1",
    "x <think> a </think> SELECT 1", "<think>a</think><think>b</think> SELECT 1", "<think>a</think> SELECT 1; SELECT 2",
    "<think>a</think> ```sql\nSELECT 1\n```", "<think>a</think> The answer is 3", "<think>a<think>b</think> SELECT 1",
    "<think>a</think> SELECT 1 </think>", "<think>a</think> -- only a comment", "<think>a</think> ;",
    "<think>a</think> SELECT 1; -- one\nDELETE FROM city", "<think>a</think> SELECT ';'; SELECT \";\"; ",
    "<think>a</think> SELECT '; -- it''s open' ; SELECT 2", "<think>a</think> SELECT 1 /* ; */; x"])
def test_texts_without_the_format(text):
    assert parse_completion(text) is None


def test_a_fence_is_unwrapped_only_when_lenient():
    text = "<think>a</think> ```sql\nSELECT 1\n```"
    assert parse_completion(text) is None and parse_completion(text, lenient=True) == ("a", "SELECT 1")
    assert parse_completion("<think>a</think> Here: ```sql\nSELECT 1\n```", lenient=True) is None


THINKS = [("<think>a</think><answer>SELECT 1</answer>", "a"), (" <think> a\nb </think>\n<answer>\nSELECT 1;\n</answer>\n", "a\nb"),
          ("<think>a</think> <answer>```sql\nSELECT 1\n```</answer>", "a")]
FENCED = [("a\n```sql\nSELECT 1\n```", "a"), ("```sql\nSELECT 2\n```\nNo:\n```\nSELECT 1;\n``` Done.", "sql\nSELECT 2\n\nNo:"),
          ("<think>a</think>\n```sql SELECT 1```", "a"), ("```sql\nSELECT 1\n```", "")]


@pytest.mark.parametrize("style, text, thought", [("think-answer", *case) for case in THINKS]
                         + [("fence", *case) for case in FENCED])
def test_answers_of_other_styles_are_read(style, text, thought):
    read_thought, sql = parse_completion(text, style=style)
    assert sql.rstrip(";") == "SELECT 1" and read_thought.replace("`", "") == thought
    assert parse_completion(text) is None and parse_completion(text, lenient=True, style=style) == (read_thought, sql)


@pytest.mark.parametrize("style, text", [("think-answer", text) for text in (
    "<think>a</think> SELECT 1", "<answer>SELECT 1</answer>", "<think> </think><answer>SELECT 1</answer>",
    "<think>a</think><answer>SELECT 1</answer> so", "<think>a</think><answer>SELECT 1", "<think>a</think><answer>1</answer>",
    "<think>a</think><answer>SELECT 1</answer><answer>SELECT 1</answer>", "<think>a</think><answer>SELECT 1; SELECT 2</answer>")]
    + [("fence", text) for text in ("SELECT 1", "a ```sql\nSELECT 1", "```SELECT 1``` and ```SELECT", "```sql```", "``` text ```",
                                    "```SELECT 1; SELECT 2```")])
def test_what_another_style_does_not_read(style, text):
    assert parse_completion(text, style=style) is None


@pytest.mark.parametrize("style", ANSWER_STYLES)
def test_what_is_taught_is_what_is_read_and_what_the_reward_takes(style, executor):
    assert AnswerFormat(style).read(AnswerFormat(style).write("a thought", GOLD)) == ("a thought", GOLD)
    score = RewardScorer(RewardConfig(rewards="format,execution"), executor, {"towns": SCHEMA}, match=MATCHES["bird"],
                         answer_format=AnswerFormat(style)).score
    texts = {other: AnswerFormat(other).write("a thought", GOLD) for other in ANSWER_STYLES}
    scored = dict(zip(texts, score([RewardItem("towns", [GOLD], text) for text in texts.values()]), strict=True))
    assert {other: found.correct for other, found in scored.items()} == {other: other == style for other in texts}
    assert all(ANSWER_STYLES[style].format in found.error for other, found in scored.items() if other != style)


def test_a_fence_is_scored_where_the_config_or_the_format_is_lenient(executor):
    fenced = item(f"```sql\n{GOLD}\n```")
    for lenient, answer_format, correct in ((False, None, False), (True, None, True), (False, AnswerFormat(lenient=True), True)):
        config = RewardConfig(rewards="format,execution", lenient_format=lenient)
        found, = RewardScorer(config, executor, {"towns": SCHEMA}, match=MATCHES["bird"], answer_format=answer_format).score([fenced])
        assert found.correct is correct


@pytest.mark.parametrize("fenced", [
    "```sql SELECT 1```", "```sql SELECT 1 ```", "```SELECT 1```", "```sql\r\nSELECT 1\r\n```\r\n", "```SQLite\nSELECT 1;\n```",
    "``` \nSELECT 1\n```", "```sqlite3\tSELECT 1\n\n```", "``` sql\nSELECT 1\n```", "```postgresql\r\nSELECT 1\n```",
    "```MySQL \nSELECT 1\n```"])
def test_fences_on_one_line_or_with_other_line_ends_are_unwrapped(fenced):
    thought, sql = parse_completion(f"<think>a</think>\r\n{fenced}", lenient=True)
    assert sql.rstrip(";") == "SELECT 1" and unwrap_fence(fenced) == sql
    assert parse_completion(f"<think>a</think> {fenced}") is None


@pytest.mark.parametrize("broken", ["```sql SELECT 1", "SELECT 1 ```", "```sql SELECT 1``` ```sql SELECT 2```", "``````",
                                    "```sql```", "```sql x```"])
def test_what_is_no_fence_around_one_query_stays_broken(broken):
    assert parse_completion(f"<think>a</think> {broken}", lenient=True) is None


@pytest.mark.parametrize("piece", ["<think>", "'", '"', "`", "[", "/*", "[/*", "*/", "--", "(", " ", ";", "```", "\0",
                                   "\n", "</think>", "select ", "'\"`["])
def test_hostile_texts_take_time_in_proportion_to_their_length(piece):
    for start in ("", "<think>", "<think>a</think>", "<think>a</think> SELECT "):
        text, best = start + piece * (1_000_000 // len(piece)), math.inf
        for _ in range(3):  # the least of three: other processes must not decide
            begin = time.process_time()
            for style in ANSWER_STYLES:
                parse_completion(text, lenient=True, style=style)
            best = min(best, time.process_time() - begin)
            if best < 0.1:
                break
        assert best < 1.0  # of quadratic time it would be minutes


def test_the_components_of_each_kind_of_completion(executor):
    memory = TraceMemory(HashEmbedder(), 512, gate=OPEN, scope="any")
    memory.add("towns", "look at the cities")
    score = scorer(executor, memory=memory).score
    right, wrong, error, refused, broken = score([
        item("SELECT name FROM city WHERE people >= 101"), item("SELECT name FROM city WHERE people > 500"),
        item("SELECT nme FROM city"), item("DELETE FROM city"),
        RewardItem("towns", (GOLD,), "SELECT name FROM city WHERE people > 100")])
    assert (right.execution, right.atomic, right.memory, right.status, right.correct) == (2.0, 0.0, 1.0, "ok", True)
    assert right.total == pytest.approx(1 + 2 + 1)
    assert (wrong.execution, wrong.status, wrong.correct) == (1.0, "ok", False)
    assert 0 < wrong.atomic < rewards.MAX_ATOMIC and wrong.memory == pytest.approx(1.0)  # the same thought
    assert wrong.total == pytest.approx(1 + 1 + wrong.atomic + wrong.memory) and wrong.total < right.total
    assert (error.execution, error.status) == (0.0, "error") and "nme" in error.error and error.atomic > 0
    assert (refused.execution, refused.status) == (0.0, "refused")
    assert (broken.total, broken.status, broken.format) == (0.0, "format", 0.0)


def test_shaping_is_the_papers():
    assert rewards.shape_atomic(0.0) == 0.0
    assert rewards.shape_atomic(1.0) == pytest.approx(0.05 + 0.95 * 0.79)
    assert rewards.shape_atomic(0.5) == pytest.approx(0.05 * 0.5 + 0.95 * 0.79 * 0.5 ** 0.2)


@pytest.mark.parametrize("when, earns", [("wrong", {"wrong", "error"}), ("runs", {"wrong"}), ("fails", {"error"})])
def test_when_the_atomic_reward_is_granted(executor, when, earns):
    score = scorer(executor, "format,execution,atomic", atomic_when=when, atomic_gamma=0.5).score
    wrong, error = score([item("SELECT name FROM city WHERE people > 500"), item("SELECT nme FROM city")])
    assert {name for name, b in (("wrong", wrong), ("error", error)) if b.atomic > 0} == earns


def test_the_shaping_is_a_setting_and_weights_are_checked_against_it(executor):
    low = scorer(executor, "format,execution,atomic=3", atomic_beta=0.1, atomic_gamma=1.0)
    overlap = rewards.atomic_reward("SELECT name FROM city", GOLD, SCHEMA)
    assert low.score([item("SELECT name FROM city")])[0].atomic == pytest.approx(0.05 * overlap + 0.95 * 0.1 * overlap)
    with pytest.raises(ValueError, match="could outrank"):
        RewardConfig(rewards="format,execution,atomic=3")
    for name in ("atomic_lambda", "atomic_beta", "atomic_gamma"):
        with pytest.raises(ValueError, match=f"{name} is 2"):
            RewardConfig(**{name: 2.0})


@pytest.mark.parametrize("seed", range(20))
def test_with_gdpo_a_correct_completion_outranks_every_wrong_one_of_its_group(seed):
    """Random groups and weights; also those with which a wrong one would win if its atomic reward counted as in the sum."""
    rng = random.Random(seed)
    weights = {name: rng.choice([0.1, 1, 10]) for name in ("execution", "atomic", "memory", "result", "schema")}
    weights["execution"] = max(weights["execution"], weights["atomic"])  # else the weights are refused
    config = RewardConfig(rewards="format," + ",".join(f"{name}={weight}" for name, weight in weights.items()))

    def completion():
        draw = {name: rng.random() for name in ("memory", "result", "schema")}
        if rng.random() < 0.3:
            return RewardBreakdown(format=1.0, execution=2.0, memory=1.0, result=1.0, schema=1.0, correct=True)
        if rng.random() < 0.1:
            return RewardBreakdown()
        return RewardBreakdown(format=1.0, execution=float(rng.random() < 0.5), atomic=config.shape(rng.random()), **draw)

    rows = [[completion() for _ in range(6)] for _ in range(8)]
    values, found = rewards.rewards_apart(rows, config)
    assert found == [1.0, *weights.values()] and np.shape(values) == (6, 8, 6)
    for group, advantages in zip(rows, grpo.group_advantages(torch.tensor(values).sum(0), "gdpo", (torch.tensor(values), found)).tolist(), strict=True):
        right, wrong = ([A for A, b in zip(advantages, group, strict=True) if b.correct == is_right] for is_right in (True, False))
        assert not right or not wrong or min(right) > max(wrong)


def test_any_of_several_golds_counts_and_a_failing_gold_never_does(executor):
    score = scorer(executor, "format,execution").score
    both = ("SELECT id FROM city WHERE people > 100", GOLD)
    assert score([item(GOLD, golds=both)])[0].correct
    empty = item("SELECT name FROM city WHERE 0", golds=("SELECT nothing FROM nowhere",))
    assert score([empty])[0].correct is False and score([empty])[0].execution == 1.0


SAME_TWICE = "SELECT name FROM city WHERE people > 100 UNION ALL SELECT name FROM city WHERE people > 100"


@pytest.mark.parametrize("gold, sql, correct, status", [
    (f"SELECT DISTINCT name FROM ({SAME_TWICE})", SAME_TWICE, True, "ok"),  # no DISTINCT counts
    (SAME_TWICE, f"SELECT DISTINCT name FROM ({SAME_TWICE})", True, "ok"),
    ("SELECT id, name FROM city", "SELECT name, id FROM city", True, "ok"),
    ("SELECT id FROM city ORDER BY id", "SELECT id FROM city ORDER BY id DESC", False, "ok"),
    ("SELECT name FROM city WHERE people > = 50", "SELECT name FROM city", True, "ok"),  # a gold of Spider's tokens
    ("SELECT name FROM city", "SELECT name FROM city WHERE people > = 50", True, "error"),  # and such a prediction
    ("SELECT 'value'", "SELECT 'value'", False, "ok")])  # the official script turns the prediction into '1'
def test_the_spider_reward_says_what_evaluation_says(executor, gold, sql, correct, status):
    scored, = scorer(executor, "format,execution,atomic", match="spider").score([item(sql, golds=(gold,))])
    assert (scored.correct, scored.status) == (correct, status)
    assert scored.execution == (2.0 if correct else float(status == "ok"))
    example = Example("0", "towns", "q", (gold,))
    judged, = score_predictions([example], [scored.sql], executor)
    assert judged.correct["spider"] == correct and judged.status == status
    assert scorer(executor, "format,execution").score([item(sql, golds=(gold,))])[0].correct == judged.correct["bird"]


def test_the_seconds_of_several_calls_add_up(executor):
    subject = scorer(executor, "format,execution,atomic")
    subject.score([item("SELECT 1")])
    first = dict(subject.seconds)
    subject.score([item("SELECT 2")])
    assert all(subject.seconds[name] > first[name] for name in ("execution", "atomic"))
    subject.take_seconds()
    assert subject.seconds == {}


def test_a_switched_off_component_is_not_computed(executor, monkeypatch):
    monkeypatch.setattr(rewards, "atomic_reward", None)
    monkeypatch.setattr(rewards, "schema_overlap", None)
    subject = scorer(executor, "format,execution")
    assert subject.score([item("SELECT 1")])[0].total == pytest.approx(2.0) and set(subject.seconds) == {"execution"}


@pytest.mark.parametrize("spec", [
    ",".join(name for bit, name in enumerate(("format", "execution", "atomic", "memory")) if mask >> bit & 1)
    for mask in range(1, 16)])
def test_every_subset_of_rewards_ranks_correct_first(executor, spec):
    memory = TraceMemory(HashEmbedder(), 512, gate=OPEN, scope="any")
    memory.add("towns", "look at the cities")
    right, wrong, broken = scorer(executor, spec, memory=memory if "memory" in spec else None).score(
        [item(GOLD), item("SELECT name FROM city WHERE people > 500"), RewardItem("towns", (GOLD,), "SELECT 1")])
    assert right.total >= wrong.total >= broken.total == 0.0
    if "execution" in spec:
        assert right.total > wrong.total


def test_correct_outranks_wrong_for_all_weights_that_are_allowed():
    rng, allowed, refused = random.Random(0), 0, 0
    for _ in range(3000):
        w = {name: round(10 ** rng.uniform(-2, 1), 3) for name in rewards.COMPONENTS if rng.random() < 0.8}
        w["execution"] = round(10 ** rng.uniform(-1, 1), 3)
        if rng.random() < 0.3:  # at the very edge
            w["execution"] = w.get("atomic", 0) * rewards.MAX_ATOMIC + w.get("user", 0) + rng.choice((1e-4, 1e-6, 1e-9))
        try:
            weights = parse_rewards(",".join(f"{name}={value}" for name, value in w.items()))
        except ValueError:
            refused += 1
            lead = w["execution"] - w.get("atomic", 0) * rewards.MAX_ATOMIC - w.get("user", 0)
            assert lead < 1e-6 * sum(w.values()) + 1e-12  # only weights that could rank wrong first are refused
            continue
        allowed += 1
        extras = {name: rng.choice((1.0, rng.random())) for name in ("memory", "result", "schema")}
        correct = {"format": 1, "execution": 2, "memory": 1, "result": 1, "schema": 1}
        wrong = {"format": 1, "execution": 1, "atomic": rewards.MAX_ATOMIC, "user": 1, **extras}
        total = lambda parts, weights=weights: sum(weights[n] * v for n, v in parts.items())  # noqa: E731
        assert total(correct) > total(wrong) and np.float32(total(correct)) > np.float32(total(wrong))
    assert allowed > 300 and refused > 300


@pytest.mark.parametrize("spec, reason", [
    ("format,exec", "no reward 'exec'"), ("format=x", "not a number"), ("format=-1", "positive"), ("", "no reward"),
    ("execution,atomic=2", "could outrank"), ("execution=1,user=1", "could outrank"), ("format=nan", "positive"),
    ("format,user", "could outrank"), ("format=1e9,execution", "could outrank"), ("format,format=2", "named twice"),
    ("format=inf", "positive"), ("format=0", "positive")])
def test_bad_weights_are_refused_with_the_reason(spec, reason):
    with pytest.raises(ValueError, match=reason):
        RewardConfig(rewards=spec)


def test_a_wrong_answer_with_a_copied_good_thought_stays_below_a_correct_one(executor):
    good = "name the cities whose people are more than one hundred"
    for spec in ("format,execution,atomic,memory", "format,execution,memory=100", "execution=0.1,memory"):
        memory = TraceMemory(HashEmbedder(), 512, gate=OPEN, scope="any")
        memory.add("towns", good)
        copied, right = scorer(executor, spec, memory=memory).score(
            [item("SELECT name FROM city WHERE people > 99 AND id < 2", good), item(GOLD, "because")])
        assert copied.memory == pytest.approx(1.0) and copied.execution == 1.0
        assert np.float32(right.total) > np.float32(copied.total)


def test_soft_f1_is_that_of_sql_exec():
    assert rewards.soft_f1 is sql_exec.soft_f1


def test_strings_and_comments_mention_nothing():
    overlap = rewards.schema_overlap
    assert overlap("SELECT name FROM city -- people", "SELECT name FROM city WHERE name = 'people'", SCHEMA) == 1.0
    assert overlap("SELECT [name], `people` FROM City", 'SELECT NAME, "people" FROM city', SCHEMA) == 1.0
    assert overlap("SELECT name FROM city", "SELECT people FROM city", SCHEMA) == pytest.approx(1 / 3)
    assert overlap("SELECT 'open", "SELECT 1", SCHEMA) == 0.0 == overlap("SELECT a", "SELECT a", {})
    spaced = {"city": ["Mean Income (%)"]}
    assert overlap("SELECT `Mean Income (%)` FROM city", "SELECT name FROM city", spaced) == pytest.approx(1 / 2)


def test_extra_rewards_are_partial_credit(executor):
    right, close, far = scorer(executor, "format,execution,result,schema").score(
        [item(GOLD), item("SELECT name FROM city WHERE people > 500"), item("SELECT 5")])
    assert right.result == right.schema == 1.0
    assert 0 < close.result < 1 and close.schema == 1.0 and far.result == far.schema == 0.0


def test_memory_learns_after_the_whole_step_is_scored(executor):
    memory = TraceMemory(HashEmbedder(), 512, gate=OPEN, scope="any")
    subject = scorer(executor, memory=memory)
    first, second = subject.score([item(GOLD, "sort the cities"), item("SELECT 1", "sort the cities")])
    assert first.correct and second.memory == 0.0 and memory.thoughts == ["sort the cities"]
    assert subject.score([item("SELECT 1", "sort the cities")])[0].memory == pytest.approx(1.0)


PAGE = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()


def test_each_thought_is_embedded_once_and_all_of_a_step_in_one_batch(executor):
    batches, embed = [], HashEmbedder()
    memory = TraceMemory(lambda texts: batches.append(list(texts)) or embed(texts), 512, gate=OPEN, scope="any")
    subject = scorer(executor, memory=memory)
    step = [item(GOLD, "one"), item("SELECT 1", "two"), item("SELECT 2", "one"), item("DELETE FROM city", "three"),
            RewardItem("towns", (GOLD,), "no format")]
    subject.score(step)
    subject.score(step + [item(GOLD, "four")])
    assert batches == [["one", "two", "three"], ["four"]]
    assert set(subject.seconds) == {"execution", "atomic", "memory"}


def test_the_order_of_a_step_changes_no_reward(executor):
    step = [item(GOLD, f"right {i}") for i in range(4)] + [item("SELECT 1", f"wrong {i}") for i in range(4)]
    totals = []
    for order in (range(8), reversed(range(8)), (3, 7, 1, 5, 0, 4, 2, 6)):
        memory = TraceMemory(HashEmbedder(), 512, gate=OPEN, scope="any")
        memory.add("towns", "right or wrong")
        order = list(order)
        scored = scorer(executor, memory=memory).score([step[i] for i in order])
        totals.append([b.total for _, b in sorted(zip(order, scored, strict=True), key=lambda pair: pair[0])])
    assert totals[0] == pytest.approx(totals[1]) and totals[0] == pytest.approx(totals[2])


def test_an_error_of_the_embedder_and_a_missing_part_are_not_swallowed(executor):
    def broken(texts):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        scorer(executor, memory=TraceMemory(broken, 4, gate=OPEN)).score([item(GOLD)])
    with pytest.raises(ValueError, match="memory reward has a weight"):
        scorer(executor)


OWN_REWARD = next(part for part in PAGE.split("```python\n")[1:] if part.startswith("def reward")).split("```")[0]


def test_a_reward_of_ones_own(executor, tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(OWN_REWARD)
    config = RewardConfig(rewards="format,execution=2,user=0.5", reward_module=str(path))
    subject = RewardScorer(config, executor, {"towns": SCHEMA}, match=MATCHES["bird"],
                           user_reward=rewards.load_reward_module(path))
    right, error = subject.score([item(GOLD), item("SELECT nme FROM city")])
    assert (right.user, right.total) == (1.0, pytest.approx(1 + 4 + 0.5)) and error.user == 0.0
    for content, reason in (("1/0", "ZeroDivisionError"), ("x = 1", "no function named reward"), ("def", "SyntaxError"),
                            ("def reward(question, sql): return 1.0", "must take question, db_id")):
        path.write_text(content)
        with pytest.raises(ValueError, match=reason):
            rewards.load_reward_module(path)
    for missing in (tmp_path / "none.py", tmp_path, tmp_path / "my_rewards.txt"):
        with pytest.raises(RewardError, match="there is no such Python file"):
            rewards.load_reward_module(missing)
    with pytest.raises(ValueError, match="needs both"):
        RewardConfig(rewards="format,execution=2,user")


@pytest.mark.parametrize("returned, shown", [
    ("1.5", "1.5"), ("None", "None"), ("float('nan')", "nan"), ("'0.5'", "'0.5'"), ("-0.1", "-0.1"), ("b'1'", "b'1'"),
    ("[0.5]", "[0.5]"), ("1j", "1j"), ("execution", "Execution("), ("10**400", "1000")])
def test_a_reward_of_ones_own_that_is_no_number_from_0_to_1_is_named(executor, tmp_path, returned, shown):
    subject = with_user_reward(executor, tmp_path, f"return {returned}")
    with pytest.raises(RewardError, match="must return a number between 0 and 1") as error:
        subject.score([item("SELECT nme FROM city")])
    for words in (f"returned {shown}", "SELECT nme FROM city", "Which cities are large?", "towns"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("returned, value", [
    ("True", 1.0), ("0", 0.0), ("numpy.float32(0.5)", 0.5), ("numpy.bool_(True)", 1.0), ("numpy.array(0.25)", 0.25)])
def test_numbers_of_other_kinds_are_taken(executor, tmp_path, returned, value):
    subject = with_user_reward(executor, tmp_path, f"import numpy; return {returned}")
    assert subject.score([item(GOLD)])[0].user == value


def test_a_reward_of_ones_own_that_fails_is_named(executor, tmp_path):
    subject = with_user_reward(executor, tmp_path, "return {}[sql]")
    with pytest.raises(RewardError, match="failed for the SQL 'SELECT 1' of the question .*KeyError"):
        subject.score([item("SELECT 1")])


def with_user_reward(executor, tmp_path, body):
    path = tmp_path / "own.py"
    path.write_text(f"def reward(question, db_id, gold_sqls, thought, sql, execution): {body}")
    return RewardScorer(RewardConfig(rewards="format,execution=2,user=0.5", reward_module=str(path)), executor,
                        {"towns": SCHEMA}, match=MATCHES["bird"], user_reward=rewards.load_reward_module(path))


def test_a_reward_module_may_hold_dataclasses(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n"
                    "    x: int = 1\ndef reward(**everything): return A().x\n")
    assert rewards.load_reward_module(path)() == 1
    path.write_text("raise SystemExit('no')")
    with pytest.raises(RewardError, match="SystemExit: no"):
        rewards.load_reward_module(path)


def test_importing_rewards_imports_no_model_library():
    code = "import sys, rewards; print([m for m in ('torch', 'transformers', 'grpo', 'running') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_five_files_can_be_lifted_into_another_project(tmp_path):
    root = Path(rewards.__file__).parent
    for folder in ("partial_credit", "prompts"):
        (tmp_path / folder).mkdir()
    for file in ("rewards.py", "sql_exec.py", "partial_credit/atomic.py", "partial_credit/memory.py",
                 "prompts/answer_format.py"):
        shutil.copy(root / file, tmp_path / file)
    (tmp_path / "use.py").write_text(f"""
import sqlite3
import rewards
from pathlib import Path
from sql_exec import MATCHES, SQLExecutor
assert all(hasattr(rewards, name) for name in rewards.__all__)
connection = sqlite3.connect("t.sqlite")
connection.execute("CREATE TABLE t (a)")
connection.close()
config = rewards.RewardConfig(memory_scope="any")
memory = rewards.build_memory(config, rewards.MemoryGate(memory_min_words=1), {{"d": {{"t": ["a"]}}}})
with SQLExecutor({{"d": Path("t.sqlite")}}, workers=1) as executor:
    scorer = rewards.RewardScorer(config, executor, {{"d": {{"t": ["a"]}}}}, memory, match=MATCHES["spider"])
    scored, = scorer.score([rewards.RewardItem("d", ["SELECT a FROM t"], "<think> a </think> SELECT a FROM t")])
    print(scored.correct, {str(root)!r} in rewards.__file__)
""")
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    assert done.stdout.strip() == "True False", done.stderr


def test_totals_are_finite(executor):
    memory = TraceMemory(HashEmbedder(), 512, gate=OPEN)
    texts = ["", "\0", "<think>\ud800</think> SELECT 1", "<think>a</think> SELECT 1e999", "<think>b</think> SELECT x'00'"]
    for b in scorer(executor, memory=memory).score([RewardItem("towns", (GOLD,), text) for text in texts]):
        assert math.isfinite(b.total)


@pytest.mark.parametrize("scope, expected", [("other", {"b", "c"}), ("same", {"a"}), ("any", {"a", "b", "c"})])
def test_the_memory_is_what_the_settings_say(scope, expected):
    config = RewardConfig(memory_scope=scope, memory_top_k=2)
    memory = rewards.build_memory(config, MemoryGate(memory_min_words=2, memory_min_columns=1, memory_min_density=0.0),
                                  {"a": SCHEMA, "b": SCHEMA, "c": SCHEMA})
    assert memory.add_many([("a", "name one"), ("b", "name two"), ("c", "name three"), ("c", "no column")]) == [
        True, True, True, False]
    assert memory.top_k == 2 and memory.rejections == {"columns": 1}
    near = memory.compare([("a", "name")], 3)[0][1]
    assert {one["db_id"] for one in near} <= expected and len(near) == min(2, len(expected))
    assert rewards.build_memory(RewardConfig(rewards="format,execution"), OPEN, {"a": SCHEMA}) is None


def test_thoughts_are_embedded_while_sql_runs(executor):
    """Each side waits for the other to begin: one after the other, neither would ever end."""
    embedding, executing = threading.Event(), threading.Event()

    class Watched:
        run_gold = executor.run_gold

        def run_many(self, pairs):
            executing.set()
            assert embedding.wait(10)
            return executor.run_many(pairs)

    def embed(texts):
        embedding.set()
        assert executing.wait(10)
        return HashEmbedder()(texts)

    subject = RewardScorer(RewardConfig(), Watched(), {"towns": SCHEMA}, TraceMemory(embed, 512, gate=OPEN),
                           match=MATCHES["bird"])
    assert subject.score([item(GOLD)])[0].correct and set(subject.seconds) == {"execution", "atomic", "memory"}


class Locked:
    """An executor that finds a database locked where a query has this text in it."""
    def __init__(self, executor, text):
        self.executor, self.text = executor, text

    def run_many(self, pairs):
        return [sql_exec.Execution("unavailable", error="database is locked") if self.text in sql else ran
                for (_, sql), ran in zip(pairs, self.executor.run_many(pairs), strict=True)]

    run_gold = run_many


@pytest.mark.parametrize("match", ["bird", "spider"])
@pytest.mark.parametrize("sql, gold", [("SELECT name, 1 FROM city", GOLD), (GOLD, "SELECT name, 1 FROM city")])
def test_a_completion_of_which_the_database_says_nothing_has_no_reward(executor, sql, gold, match):
    memory = TraceMemory(HashEmbedder(), 512, gate=OPEN)
    subject = scorer(Locked(executor, ", 1"), memory=memory, match=match)
    right, unread, wrong = subject.score([item(GOLD), item(sql, golds=(gold,)), item("SELECT 5")])
    assert (unread.status, unread.error, unread.correct, unread.sql) == ("unavailable", "database is locked", False, sql)
    assert [b.unavailable for b in (right, wrong, unread)] == [False, False, True]
    assert rewards.readable([right, wrong]) and not rewards.readable([right, unread])
    assert right.correct and len(memory) == 1


def test_a_database_that_is_gone_gives_no_reward_either(tmp_path):
    """Its golds are still in the cache."""
    path = tmp_path / "towns.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE city (id, name, people)")
    connection.close()
    with SQLExecutor({"towns": path}, workers=1, cache=tmp_path / "cache") as executor:
        assert scorer(executor, "format,execution").score([item(GOLD)])[0].correct
        path.unlink()
        assert scorer(executor, "format,execution").score([item(GOLD)])[0].status == "unavailable"


def test_what_sql_that_only_runs_earns(executor):
    sqls = (GOLD, "SELECT name FROM city", "SELECT title FROM city")  # right, runs, fails
    for runs in (1.0, 0.25, 0.0):
        subject = scorer(executor, "format,execution", execution_runs=runs)
        assert [b.execution for b in subject.score([item(sql) for sql in sqls])] == [2.0, runs, 0.0]
        assert subject.config.margin == 2.0 - runs
    with pytest.raises(ValueError, match="execution_runs is 1.5"):
        RewardConfig(execution_runs=1.5)


def test_rare_operations_are_weighed_where_it_is_asked_for(executor):
    def weight(operation):
        return 3.0 if operation.startswith("where") else 1.0

    sql = "SELECT name FROM city"
    plain, = scorer(executor, "format,execution,atomic").score([item(sql)])
    config = RewardConfig(rewards="format,execution,atomic", atomic_weights="rare")
    weighed, = RewardScorer(config, executor, {"towns": SCHEMA}, match=MATCHES["bird"], rarity=weight).score([item(sql)])
    assert plain.atomic == pytest.approx(config.shape(2 / 3)) and weighed.atomic == pytest.approx(config.shape(2 / 5))
    for settings, rarity in ((config, None), (RewardConfig(rewards="format,execution,atomic"), weight)):
        with pytest.raises(ValueError, match="rarity must be given for 'rare' only"):
            RewardScorer(settings, executor, {"towns": SCHEMA}, match=MATCHES["bird"], rarity=rarity)


def test_the_margin_is_how_far_correct_lies_above_wrong():
    config = RewardConfig(rewards="format,execution=2,atomic=0.5,memory")
    assert config.margin == pytest.approx(2 - 0.5 * config.shape(1.0))
    assert RewardConfig(rewards="format,atomic").margin == 0.0
