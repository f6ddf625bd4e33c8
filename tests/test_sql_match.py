"""The comparators: the table of PITFALLS part B, a brute-force twin, official verdicts on real systems."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sql_exec
from sql_exec import (
    SQLExecutor,
    bird_match,
    gold_is_ordered,
    r_ves_reward,
    result_key,
    soft_f1,
    spider_match,
    spider_prepare,
)

# case: (predicted, gold, BIRD, Spider unordered, Spider ordered, Soft-F1)
TABLE = {
    "equal": ([(1, "a"), (2, "b")], [(1, "a"), (2, "b")], 1, 1, 1, 1.0),
    "prediction repeats rows": ([(1,), (1,), (2,)], [(1,), (2,)], 1, 0, 0, 1.0),
    "same rows, other order": ([(2,), (1,)], [(1,), (2,)], 1, 1, 0, 0.0),
    "columns swapped": ([("a", 1), ("b", 2)], [(1, "a"), (2, "b")], 0, 1, 1, 1.0),
    "one column more": ([(1, "a")], [(1,)], 0, 0, 0, 2 / 3),
    "one column less": ([(1,)], [(1, "a")], 0, 0, 0, 2 / 3),
    "a float's last bit": ([(0.1 + 0.2,)], [(0.3,)], 0, 0, 0, 0.0),
    "NULL and ''": ([(None,)], [("",)], 0, 0, 0, 0.0),
    "NULL and NULL": ([(None,)], [(None,)], 1, 1, 1, 1.0),
    "1 and 1.0": ([(1,)], [(1.0,)], 1, 1, 1, 1.0),
    "1 and '1'": ([("1",)], [(1,)], 0, 0, 0, 0.0),
    "both empty": ([], [], 1, 1, 1, 1.0),
    "prediction empty": ([], [(1,)], 0, 0, 0, 0.0),
    "gold empty": ([(1,)], [], 0, 0, 0, 0.0),
    "bytes and text": ([(b"a",)], [("a",)], 0, 0, 0, 0.0),
    "the official quirk": ([(1, 10)], [(1.0, 10)], 1, 0, 0, 1.0),
}


@pytest.mark.parametrize("case", TABLE)
def test_b2_b3_the_table_of_verdicts(case):
    pred, gold, bird, unordered, ordered, f1 = TABLE[case]
    assert bird_match(pred, gold) == bird
    assert spider_match(pred, gold, False) == unordered
    assert spider_match(pred, gold, True) == ordered
    assert soft_f1(pred, gold) == pytest.approx(f1)


def test_soft_f1_by_hand():
    # row 1: one of two cells; row 2: none of it; one predicted row too many
    precision, recall = 0.5 / (0.5 + 0.5 + 1 + 1), 0.5 / (0.5 + 0.5 + 1)
    expected = 2 * precision * recall / (precision + recall)
    assert soft_f1([(1, 9), (3, 3), (7, 7)], [(1, 2), (5, 6)]) == pytest.approx(expected)
    assert soft_f1([(1,), (1,), (2,)], [(2,), (1,)]) == 0.0  # after repeated rows went, by position


@pytest.mark.parametrize(
    ("gold", "pred", "reward"),
    [(2, 1, 1.25), (9, 1, 1.25), (1.9, 1, 1), (1, 1, 1), (0.9, 1, 0.75), (0.5, 1, 0.75), (0.25, 1, 0.5),
     (0.2, 1, 0.25), (1, 0, 1.25), (0, 1, 0.25)],
)  # fmt: skip
def test_r_ves(gold, pred, reward):
    assert r_ves_reward(gold, pred) == reward


# Against brute force ----------------------------------------------------------------------------------------


def brute_force(pred, gold, ordered):
    """The definition: try every permutation of the columns, after the official quick rejection."""
    if not pred and not gold:
        return True
    if len(pred) != len(gold) or len(pred[0]) != len(gold[0]):
        return False

    def bags(rows):
        return [tuple(sorted(row, key=lambda value: str(value) + str(type(value)))) for row in rows]

    if (bags(pred) != bags(gold)) if ordered else (set(bags(pred)) != set(bags(gold))):
        return False
    for order in itertools.permutations(range(len(gold[0]))):
        permuted = [tuple(row[i] for i in order) for row in pred]
        if permuted == gold if ordered else all(permuted.count(row) == gold.count(row) for row in gold):
            return True
    return False


VALUES = st.sampled_from([None, 0, 1, 1.0, 10, "a", "1", b"a", -1, -2])


@st.composite
def two_results(draw):
    """A result, and the same one shuffled by rows and columns, perhaps with one cell or one row changed."""
    width, height = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    values = st.sampled_from(draw(st.lists(VALUES, min_size=1, max_size=3)))
    gold = [tuple(draw(values) for _ in range(width)) for _ in range(height)]
    rows = draw(st.permutations(gold)) if draw(st.booleans()) else gold
    order = draw(st.permutations(range(width)))
    pred = [tuple(row[i] for i in order) for row in rows]
    if draw(st.booleans()):
        row, column = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        pred[row] = (*pred[row][:column], draw(values), *pred[row][column + 1 :])
    if draw(st.booleans()):
        pred[0] = draw(st.sampled_from(pred))
    return pred, gold


@settings(max_examples=600, deadline=None)
@given(two_results(), st.booleans())
def test_spider_match_equals_brute_force(pair, ordered):
    assert spider_match(*pair, ordered) == brute_force(*pair, ordered)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), max_size=4), st.lists(st.tuples(VALUES, VALUES), max_size=4))
def test_bird_match_is_set_equality_and_result_key_its_key(first, second):
    assert bird_match(first, second) == (set(first) == set(second))
    assert (result_key(first) == result_key(second)) == bird_match(first, second)
    assert bird_match(first, second) == (len({result_key(first), result_key(second)}) == 1)


def shuffled(rows, seed=0):
    dice = random.Random(seed)
    order = dice.sample(range(len(rows[0])), len(rows[0]))
    return [tuple(row[i] for i in order) for row in dice.sample(rows, len(rows))]


def circulant(width, *steps):
    """A square of zeros and ones: row i has ones at i + step. All rows and all columns look alike."""
    return [tuple(int((j - i) % width in steps) for j in range(width)) for i in range(width)]


DICE = random.Random(1)
WIDE = {
    "thirty equal columns": [(i,) * 30 for i in range(300)],
    "equal but for one cell": [(0,) * 30] * 300 + [(0,) * 29 + (1,)],
    "told apart by one row each": circulant(30, 0),
    "bits": [tuple(DICE.randint(0, 1) for _ in range(30)) for _ in range(60)],
    "a cycle": circulant(30, 0, 1),
    "three ones": circulant(31, 0, 1, 3),
    "one row": [tuple(range(500))],
    "long": [(i % 7, i % 5, i % 3, "x", i) for i in range(5000)],
}  # thirty columns have 2.65e32 permutations: whatever tries them one by one never ends


@pytest.mark.parametrize("name", WIDE)
def test_wide_results_do_not_explode(name):
    gold = WIDE[name]
    pred = shuffled(gold)
    assert spider_match(pred, gold, False) and spider_match(pred, shuffled(gold, 7), False)
    assert not spider_match([*pred[:-1], (*pred[-1][:-1], "other")], gold, False)


def test_two_cycles_are_not_one():
    """Every row and column looks alike in both, locally: only singling columns out tells them apart."""
    one = circulant(30, 0, 1)
    two = [row + (0,) * 15 for row in circulant(15, 0, 1)] + [(0,) * 15 + row for row in circulant(15, 0, 1)]
    assert not spider_match(one, two, False) and not spider_match(two, one, False)
    assert spider_match(shuffled(one), one, False) and spider_match(shuffled(two), two, False)
    assert not spider_match(circulant(31, 0, 1, 3), circulant(31, 0, 1, 4), False)


def test_the_search_is_bounded(monkeypatch):
    gold = circulant(30, 0, 1)
    monkeypatch.setattr(sql_exec, "SEARCH_CELLS", 1000)
    assert not spider_match(shuffled(gold), gold, False)  # given up: counted as wrong, never as right


# Preparing queries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "prepared"),
    [
        ("SELECT DISTINCT a FROM t", "SELECT  a FROM t"),
        ("SELECT count(distinct a)", "SELECT count( a)"),
        ("SELECT 'a distinct b', \"DISTINCT\"", "SELECT 'a distinct b', \"DISTINCT\""),
        ("SELECT 'it''s' , DISTINCT a", "SELECT 'it''s' ,  a"),
        ("SELECT a WHERE b > = 1 AND c < = 2 AND d ! = 3", "SELECT a WHERE b >= 1 AND c <= 2 AND d != 3"),
        ("SELECT distinctly -- distinct", "SELECT distinctly -- distinct"),
        ("SELECT 1; SELECT 2", "SELECT 1;"),
        ("SELECT year ( CURDATE( ) ) - 1", "SELECT 2020- 1"),
    ],
)
def test_spider_prepare(sql, prepared):
    assert spider_prepare(sql) == prepared


def test_spider_prepare_options():
    assert spider_prepare("SELECT DISTINCT value", keep_distinct=True) == "SELECT DISTINCT value"
    assert spider_prepare("SELECT DISTINCT value, VALUE", is_prediction=True) == "SELECT  1, VALUE"
    assert gold_is_ordered("SELECT a ORDER BY b") and gold_is_ordered("(select a order by b)")
    assert not gold_is_ordered("SELECT a ORDER  BY b")  # the official test looks for one space


def read_predictions(folder, system):
    lines = (folder / "predictions" / f"{system}.sql").read_text().splitlines()
    verdicts = json.loads((folder / "predictions" / f"{system}.official.json").read_text())
    return [line.split("\t")[0] for line in lines], [bool(verdict) for verdict in verdicts]


def spider_databases(folder):
    return {path.stem: path for path in (folder / "spider" / "database").glob("*/*.sqlite")}


def test_stripping_distinct_equals_the_official_way(shared_data):
    sqlparse = pytest.importorskip("sqlparse")
    golds = [record["query"] for name in ("dev", "train_spider")
             for record in json.loads((shared_data / "spider" / f"{name}.json").read_text())]  # fmt: skip
    for sql in [*golds[::7], *(sql for sql in golds if "istinct" in sql.lower() or ";" in sql)]:
        tokens = [token.value for token in sqlparse.parse(sql)[0].flatten()]
        joined = "".join(token for token in tokens if token.lower() != "distinct")
        assert spider_prepare(sql) == joined.replace("> =", ">=").replace("< =", "<=").replace("! =", "!=")


# Real systems and real golds --------------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "correct"), [("dail_sql_gpt4", 863), ("graphix_3b_picard", 839)])
def test_verdicts_equal_the_official_ones_on_spider_dev(shared_data, system, correct):
    examples = json.loads((shared_data / "spider" / "dev.json").read_text())
    predictions, official = read_predictions(shared_data, system)
    databases = [example["db_id"] for example in examples]
    golds = [spider_prepare(example["query"]) for example in examples]
    predictions = [spider_prepare(sql, is_prediction=True) for sql in predictions]
    with SQLExecutor(spider_databases(shared_data), max_rows=1_000_000, timeout=60) as executor:
        gold_results = executor.run_many(zip(databases, golds, strict=True))
        pred_results = executor.run_many(zip(databases, predictions, strict=True))
    assert {gold.status for gold in gold_results} == {"ok"}
    verdicts = [
        pred.status == "ok" and spider_match(pred.rows, gold.rows, gold_is_ordered(example["query"]))
        for pred, gold, example in zip(pred_results, gold_results, examples, strict=True)
    ]
    assert len(verdicts) == 1034 and verdicts == official and sum(verdicts) == correct
    for pred, gold in zip(pred_results, gold_results, strict=True):
        assert bird_match(pred.rows, gold.rows) == (set(pred.rows) == set(gold.rows))


def test_every_real_gold_has_a_status(shared_data):
    golds = []
    for name in ("dev", "train_spider"):
        records = json.loads((shared_data / "spider" / f"{name}.json").read_text())
        golds.append([(record["db_id"], record["query"]) for record in records])
    bird = json.loads((shared_data / "bird_superhero" / "dev.json").read_text())
    golds.append([(record["db_id"], record["SQL"]) for record in bird])
    files = spider_databases(shared_data)
    files["superhero"] = shared_data / "bird_superhero" / "dev_databases" / "superhero" / "superhero.sqlite"
    with SQLExecutor(files, max_rows=1_000_000, timeout=60) as executor:
        dev, train, bird = (executor.run_many(pairs) for pairs in golds)
    ok = [sum(result.status == "ok" for result in results) for results in (dev, train, bird)]
    filled = [sum(bool(result.rows) for result in results) for results in (dev, train, bird)]
    assert (ok, filled) == ([1034, 6735, 129], [977, 6569, 129])
    failures = [result for result in train if result.status != "ok"]
    assert len(train) == 7000 and all(result.status == "error" and result.error for result in failures)
    assert sum(result.error.startswith("unknown database") for result in failures) == 262
