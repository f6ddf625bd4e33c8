"""rewards.py: the format, the sum, and the property that correct outranks wrong, on a real executor."""

import math
import random
import subprocess
import sys

import pytest

import rewards
from memory import HashEmbedder, MemoryGate, TraceMemory
from rewards import RewardConfig, RewardItem, RewardScorer, parse_completion, parse_rewards
from sql_exec import SQLExecutor, bird_match

SCHEMA = {"city": ["id", "name", "people"]}
GOLD = "SELECT name FROM city WHERE people > 100"
OPEN = MemoryGate(memory_min_words=1, memory_min_columns=0, memory_min_density=0.0, memory_max_cosine=2.0)


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    import sqlite3

    path = tmp_path_factory.mktemp("db") / "towns.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE city (id INTEGER PRIMARY KEY, name TEXT, people INTEGER)")
        connection.executemany("INSERT INTO city VALUES (?, ?, ?)", [(1, "Oslo", 700), (2, "Bergen", 280), (3, "Moss", 50)])
    connection.close()
    with SQLExecutor({"towns": path}, workers=1, timeout=2.0) as pool:
        yield pool


def scorer(executor, spec="format,execution,atomic,memory", memory=None, **settings):
    return RewardScorer(RewardConfig(rewards=spec, **settings), executor, {"towns": SCHEMA}, memory,
                        match=lambda predicted, gold, sql: bird_match(predicted, gold))


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
    "<think>a</think> SELECT 1 </think>", "<think>a</think> -- only a comment", "<think>a</think> ;"])
def test_texts_without_the_format(text):
    assert parse_completion(text) is None


def test_a_fence_is_unwrapped_only_when_lenient():
    text = "<think>a</think> ```sql\nSELECT 1\n```"
    assert parse_completion(text) is None and parse_completion(text, lenient=True) == ("a", "SELECT 1")
    assert parse_completion("<think>a</think> Here: ```sql\nSELECT 1\n```", lenient=True) is None


def test_hostile_texts_end_quickly_and_raise_nothing():
    for text in ("<think>" * 50_000, "<think>a</think>" + "'" * 200_001, "<think>a</think> SELECT " + "/*" * 100_000,
                 "<think>a</think> SELECT " + "[" * 100_000, "<think>a</think>" + "(" * 100_000, "\0" * 1000):
        parse_completion(text)


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
    score = scorer(executor, "format,execution,atomic", atomic_when=when).score
    wrong, error = score([item("SELECT name FROM city WHERE people > 500"), item("SELECT nme FROM city")])
    assert {name for name, b in (("wrong", wrong), ("error", error)) if b.atomic > 0} == earns


def test_any_of_several_golds_counts_and_a_failing_gold_never_does(executor):
    score = scorer(executor, "format,execution").score
    both = ("SELECT id FROM city WHERE people > 100", GOLD)
    assert score([item(GOLD, golds=both)])[0].correct
    empty = item("SELECT name FROM city WHERE 0", golds=("SELECT nothing FROM nowhere",))
    assert score([empty])[0].correct is False and score([empty])[0].execution == 1.0


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
        try:
            weights = parse_rewards(",".join(f"{name}={value}" for name, value in w.items()))
        except ValueError:
            refused += 1
            worst, best = 2 * w["execution"], w["execution"] + w.get("atomic", 0) * rewards.MAX_ATOMIC + w.get("user", 0)
            assert worst <= best + 1e-9  # only weights that could rank wrong first are refused
            continue
        allowed += 1
        extras = {name: rng.random() for name in ("memory", "result", "schema")}
        correct = {"format": 1, "execution": 2, "memory": 1, "result": 1, "schema": 1}
        wrong = {"format": 1, "execution": 1, "atomic": rewards.MAX_ATOMIC, "user": 1, **extras}
        total = lambda parts, weights=weights: sum(weights[n] * v for n, v in parts.items())  # noqa: E731
        assert total(correct) > total(wrong)
    assert allowed > 300 and refused > 300


@pytest.mark.parametrize("spec, reason", [
    ("format,exec", "no reward 'exec'"), ("format=x", "not a number"), ("format=-1", "positive"), ("", "no reward"),
    ("execution,atomic=2", "could outrank"), ("execution=1,user=1", "could outrank"), ("format=nan", "positive")])
def test_bad_weights_are_refused_with_the_reason(spec, reason):
    with pytest.raises(ValueError, match=reason):
        RewardConfig(rewards=spec)


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


README_EXAMPLE = '''
def reward(question, db_id, gold_sqls, thought, sql, execution):
    """Prefers short queries: 1 for one line of up to 80 characters, falling to 0 at 400."""
    if execution.status != "ok":
        return 0.0
    return max(0.0, min(1.0, (400 - len(sql)) / 320))
'''


def test_a_reward_of_ones_own(executor, tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(README_EXAMPLE)
    config = RewardConfig(rewards="format,execution=2,user=0.5", reward_module=str(path))
    subject = RewardScorer(config, executor, {"towns": SCHEMA}, match=lambda p, g, s: bird_match(p, g),
                           user_reward=rewards.load_reward_module(path))
    right, error = subject.score([item(GOLD), item("SELECT nme FROM city")])
    assert (right.user, right.total) == (1.0, pytest.approx(1 + 4 + 0.5)) and error.user == 0.0
    path.write_text("def reward(**everything): return 7")
    subject.user_reward = rewards.load_reward_module(path)
    with pytest.raises(ValueError, match="not between 0 and 1"):
        subject.score([item(GOLD)])
    for content, reason in (("1/0", "ZeroDivisionError"), ("x = 1", "no function named reward")):
        path.write_text(content)
        with pytest.raises(ValueError, match=reason):
            rewards.load_reward_module(path)
    with pytest.raises(ValueError, match="does not exist"):
        rewards.load_reward_module(tmp_path / "none.py")
    with pytest.raises(ValueError, match="needs both"):
        RewardConfig(rewards="format,execution=2,user")


def test_importing_rewards_imports_no_model_library():
    code = "import sys, rewards; print([m for m in ('torch', 'transformers', 'sql_exec', 'grpo') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_totals_are_finite(executor):
    memory = TraceMemory(HashEmbedder(), 512, gate=OPEN)
    texts = ["", "\0", "<think>\ud800</think> SELECT 1", "<think>a</think> SELECT 1e999", "<think>b</think> SELECT x'00'"]
    for b in scorer(executor, memory=memory).score([RewardItem("towns", (GOLD,), text) for text in texts]):
        assert math.isfinite(b.total)
