"""Questions whose answer is known in place of gold SQL: from the record to a trained policy."""

import itertools
import json
import sqlite3
from dataclasses import astuple
from hashlib import sha256

import pytest
from conftest import ROOT, run_in_process, tiny_database
from little_policy import little_policy_folder

import evaluate
import sft
import train
from common.errors import UserError
from data import Example, load_dataset, load_splits
from history import hashes_of
from questions.holdout import gold_keys, groups_of, not_shared, twins_key
from questions.question_files import has_golds
from report import RunDatabases, step_view
from rewards import RewardConfig, RewardItem, RewardScorer, build_rarity, rewards_apart
from running.drawing import Drawing
from running.show import group_text
from scoring.answers import questions_hash
from scoring.verdicts import comparisons_named, difficulty_levels, judge, score_predictions
from sql_exec import MATCHES, GoldAnswer, SQLExecutor

RIGHT, WRONG, BROKEN = "SELECT COUNT(*) FROM singer", "SELECT COUNT(*) + 1 FROM singer", "SELECT nothing"


def records_file(folder, *records):
    file = folder / "mine.jsonl"
    file.write_text("".join(json.dumps({"db_id": "music", "question": "How many singers are there?"} | record) + "\n"
                            for record in records))
    return file


def example(answer, question="How many singers are there?", ordered=False, **fields):
    return Example(**({"id": "0", "db_id": "music", "question": question, "gold_sqls": (),
                       "answer": GoldAnswer(answer, ordered)} | fields))


@pytest.fixture
def executor(tiny_db, tmp_path):
    with SQLExecutor({"music": tiny_db}, workers=1, cache=tmp_path / "gold_cache") as pool:
        yield pool


# ------------------------------------------------------------------------------------------------------ records

@pytest.mark.parametrize("value, rows", [
    (42, ((42,),)), ("Bo", (("Bo",),)), (1.5, ((1.5,),)), (True, ((1,),)), (["Bo", 41], (("Bo", 41),)), ([None], ((None,),)),
    ([["Bo"], ["Cy"]], (("Bo",), ("Cy",))), ([], ()), ([[1, None]], ((1, None),)),
])
def test_an_answer_is_a_value_a_row_or_rows(tiny_db, value, rows):
    file = records_file(tiny_db.parent, {"answer": value}, {"answer": value, "ordered": True, "sql": None})
    plain, ordered = load_dataset(str(file), split="train").examples
    assert plain.golds == (GoldAnswer(rows),) and ordered.golds == (GoldAnswer(rows, True),)
    assert plain.gold_sqls == () and plain.gold_sql == ""
    assert all(type(cell) is not bool for row in plain.answer.rows for cell in row)


@pytest.mark.parametrize("record, words", [
    ({"answer": 3, "sql": RIGHT}, "fields 'sql' and 'answer' are both given"),
    ({"answer": 3, "query": RIGHT}, "fields 'query' and 'answer' are both given"),
    ({}, "field 'sql' (or 'SQL' or 'query') is missing, and so is 'answer'"),
    ({"answer": None}, "and so is 'answer'"),
    ({"answer": {"count": 3}}, "field 'answer' must hold a value, a row"),
    ({"answer": [[1, {"a": 2}]]}, "field 'answer' must hold a value, a row"),
    ({"answer": [[1, [2]]]}, "field 'answer' must hold a value, a row"),
    ({"answer": [[1, 2], [3]]}, "the same number of values"),
    ({"answer": [[1], 2]}, "the same number of values"),
    ({"answer": [[]]}, "the same number of values, at least one"),
    ({"answer": [["Ana", float("nan")]]}, "field 'answer' holds NaN, which SQL does not have: write null"),
    ({"answer": 3, "ordered": "yes"}, "field 'ordered' must be true or false"),
    ({"sql": "SELECT 1", "ordered": True}, "field 'ordered' belongs to an 'answer'"),
])
def test_what_is_no_answer_is_named_with_file_record_and_field(tiny_db, record, words):
    file = records_file(tiny_db.parent, {"answer": 3}, record)
    with pytest.raises(UserError) as error:
        load_dataset(str(file), split="train")
    assert str(error.value).startswith(f"{file}, record 2: ") and words in str(error.value)


def test_splits_keep_equal_texts_together_and_know_no_equal_golds(tiny_db):
    asked = [example(((3,),), f"How many are {word}?", id=word) for word in ("old", "OLD", "young", "new")]
    assert [len(group) for group in groups_of(asked)] == [2, 1, 1] and not any(map(gold_keys, asked))
    assert not_shared(asked[1:], asked[:1]) == asked[2:]
    assert len(set(map(twins_key, asked))) == 3  # the answer is not what they share
    file = records_file(tiny_db.parent, *({"question": f"Number {n // 2}?", "answer": n // 2} for n in range(40)))
    splits = load_splits(str(file))
    parts = [{one.question for one in part} for part in (splits.train, splits.dev, splits.tests["test"])]
    assert all(parts) and all(a.isdisjoint(b) for a, b in itertools.combinations(parts, 2))


def test_an_answer_makes_a_split(tiny_db):
    file = records_file(tiny_db.parent, {"answer": 3, "split": "dev"}, {"sql": RIGHT, "split": "train"})
    assert has_golds(file, "dev")


def test_hashes_know_answers_and_are_the_old_ones_without(tiny_db):
    file = records_file(tiny_db.parent, *({"question": f"Number {n}?", "sql": f"SELECT {n}"} for n in range(9)))
    splits = load_splits(str(file))
    before = [astuple(one)[:-2] for one in splits.train]  # as before examples had answers, and first tries
    assert hashes_of(splits)["training questions"] == sha256(json.dumps(before).encode()).hexdigest()[:16]
    assert len({questions_hash([example(rows, ordered=way)]) for rows in (((3,),), ((4,),)) for way in (False, True)}) == 4


# ------------------------------------------------------------------------------------------------------- verdicts

@pytest.mark.parametrize("answer, ordered, sql, bird, spider", [
    (((3,),), False, RIGHT, 1, 1),
    (((3.0,),), False, RIGHT, 1, 1),
    ((("3",),), False, RIGHT, 0, 0),                                                      # a text is no number
    (((3,),), False, BROKEN, 0, 0),
    ((), False, "SELECT name FROM singer WHERE age > 99", 1, 1),
    (((None,),), False, "SELECT HomeTown FROM singer WHERE name = 'Cy'", 1, 1),
    ((("Bo", 41),), False, "SELECT age, name FROM singer WHERE age > 40", 0, 1),          # only BIRD minds the columns
    ((("Cy",), ("Ana",), ("Bo",)), False, "SELECT name FROM singer", 1, 1),               # in any order
    ((("Cy",), ("Ana",), ("Bo",)), True, "SELECT name FROM singer ORDER BY age", 1, 1),
    ((("Cy",), ("Ana",), ("Bo",)), True, "SELECT name FROM singer ORDER BY age DESC", 0, 0),
    ((("France",), ("Peru",)), True, "SELECT country FROM singer ORDER BY country", 1, 0),  # BIRD counts no repeats
    ((("France",), ("Peru",)), False, "SELECT DISTINCT country FROM singer", 1, 1),       # which loses no DISTINCT
    ((("ORDER BY",), ("x",)), False, "SELECT 'x' UNION ALL SELECT 'ORDER BY'", 1, 1),     # letters of a cell say nothing
])
def test_verdicts_of_reward_and_evaluation_are_one(executor, answer, ordered, sql, bird, spider):
    score, = score_predictions([example(answer, ordered=ordered)], [sql], executor)
    assert score.correct == {"bird": bool(bird), "spider": bool(spider)}
    for name, right in score.correct.items():
        scorer = RewardScorer(RewardConfig(rewards="format,execution"), executor, {}, match=MATCHES[name])
        scored, = scorer.score([RewardItem("music", (GoldAnswer(answer, ordered),), f"<think> x </think> {sql}")])
        assert scored.correct == right
    assert not (executor.cache).exists()  # nothing to run, nothing to keep


def test_a_score_says_only_what_is_known(executor):
    asked = [example(((3,),), id="a"), example((), "Who is 99?", id="b"), Example("c", "music", "Again?", (RIGHT,))]
    scores = [score for score, _ in judge(asked, [RIGHT] * 3, difficulty_levels(asked), executor,
                                          comparisons_named(MATCHES))]
    assert [score.difficulty for score in scores] == ["unknown", "unknown", "easy"]
    assert [score.gold_status for score in scores] == ["ok", "empty", "ok"]  # an empty answer verifies no trace
    assert [(score.correct["bird"], score.verified, score.soft_f1) for score in scores] == [
        (True, True, 1.0), (False, False, 0.0), (True, True, 1.0)]
    drawing = Drawing(["music"] * 3, [one.gold_sql for one in asked], seed=0, informative=True)
    assert sorted(drawing.draw(3)) == [0, 1, 2]


# --------------------------------------------------------------------------------------------------------- rewards

SCHEMAS = {"music": {"singer": ["singer_id", "name", "country", "age"]}}
ANSWERED = [RewardItem("music", (GoldAnswer(((3,),)),), text) for text in (
    *(f"<think> count the singers </think> {sql}" for sql in (RIGHT, WRONG, BROKEN)), RIGHT)]


@pytest.mark.parametrize("rewards", ["format,execution", "execution=0.9,atomic", "format=5,execution,atomic,schema=9,result=9",
                                     "format,atomic,schema"])
@pytest.mark.parametrize("runs", [0, 1])
def test_right_outranks_wrong_and_what_needs_gold_sql_gives_nothing(executor, rewards, runs):
    config = RewardConfig(rewards=rewards, execution_runs=runs)
    scored = RewardScorer(config, executor, SCHEMAS, match=MATCHES["bird"]).score(ANSWERED)
    assert [one.correct for one in scored] == [True, False, False, False]
    assert all(one.atomic == one.schema == 0 for one in scored)
    assert min(one.total for one in scored if one.correct) >= max(one.total for one in scored if not one.correct) + config.margin
    apart, _ = rewards_apart([scored], config)
    for name, (values,) in zip(filter(config.weights.get, config.weights), apart, strict=True):
        assert values[0] == max(values) and (name not in ("atomic", "schema") or not any(values))


def test_a_reward_of_ones_own_sees_no_gold_sql(executor):
    seen = []
    scorer = RewardScorer(RewardConfig(rewards="format,execution=2,user", reward_module="mine.py"), executor, SCHEMAS,
                          match=MATCHES["bird"], user_reward=lambda gold_sqls, **rest: seen.append(gold_sqls) or 0.5)
    scorer.score(ANSWERED)
    assert set(seen) == {()}


def test_rare_operations_are_those_of_the_golds_that_are_there():
    config = RewardConfig(rewards="execution,atomic", atomic_weights="rare")
    both = [Example("a", "music", "?", ("SELECT name FROM singer WHERE age > 30",)), example(((3,),))]
    weights = [build_rarity(config, asked, SCHEMAS)("from singer") for asked in (both, both[:1])]
    assert weights[0] == weights[1] and build_rarity(config, both[1:], SCHEMAS)("from singer") > 0


# ------------------------------------------------------------------------------------------------------- commands

@pytest.fixture
def mixed(tmp_path):
    """Four records, three of them with answers; the folder holds two databases of one name's folder."""
    tiny_database(tmp_path / "music.sqlite")
    return records_file(tmp_path, {"id": "a", "answer": 3}, {"id": "b", "question": "Who is oldest?", "answer": "Bo"},
                        {"id": "c", "question": "Which years?", "answer": [[2014], [2015], [2015]]},
                        {"id": "d", "question": "How many concerts?", "sql": "SELECT COUNT(*) FROM concert"})


def test_predictions_are_evaluated_and_what_needs_gold_sql_is_refused(mixed, tmp_path):
    predictions, result = tmp_path / "p.sql", tmp_path / "out.json"
    predictions.write_text(f"{RIGHT}\n{WRONG}\nSELECT year FROM concert\nSELECT 3\n")
    asked = ["--predictions", predictions, "--data", mixed, "--split", "dev", "--json", result]
    status, out, err = run_in_process(evaluate, *asked)
    assert status in (0, None), err
    found = json.loads(result.read_text())
    assert [one["bird"] for one in found["examples"]] == [one["spider"] for one in found["examples"]] == [1, 0, 1, 1]
    assert found["n"] == 4 and found["twin_groups"] == 4 and found["by_difficulty"].keys() == {"unknown", "easy"}
    for flags, name in ((["--test-suite"], "--test-suite"), (["--r-ves", 2], "--r-ves")):
        status, out, err = run_in_process(evaluate, *asked, *flags)
        assert status == 2 and f"{name} cannot be measured, since 3 of 4 questions have an answer and no gold SQL" in err
    (tmp_path / "ids.json").write_text('["a", "b", "c"]')
    status, out, err = run_in_process(evaluate, *asked, "--r-ves", 2, "--exclude", tmp_path / "ids.json")
    assert status in (0, None) and "R-VES" in out


def test_a_model_is_evaluated_and_mined_by_answers(mixed, tmp_path):
    model, result, traces = little_policy_folder(tmp_path / "music.sqlite"), tmp_path / "out.json", tmp_path / "mined.jsonl"
    short = ["--data", mixed, "--max-completion-tokens", 40, "--workers", 1, "--threads", 1, "--prompt-style", "compact"]
    status, out, err = run_in_process(evaluate, "--model", model, *short, "--json", result)
    assert status in (0, None), err
    assert [one["bird"] for one in json.loads(result.read_text())["examples"]][0] == 1
    status, out, err = run_in_process(sft, "--mine", traces, "--model", model, *short, "-n", 4, "--memory-min-words", 1,
                                      "--memory-min-columns", 0, "--memory-min-density", 0)
    assert status in (0, None), err
    mined = [json.loads(line) for line in traces.read_text().splitlines()]
    assert mined and all(one["sql"] and "answer" not in one for one in mined)


def test_the_records_of_the_docs_are_right(tmp_path):
    page = (ROOT / "docs" / "own_database.md").read_text()
    file = records_file(tmp_path, *(json.loads(line) for line in page.splitlines() if line.startswith("{") and '"answer"' in line))
    with sqlite3.connect(tmp_path / "shop.sqlite") as shop:
        shop.executescript((ROOT / "docs" / "shop" / "shop.sql").read_text())
    shop.close()
    data = load_dataset(str(file), split="train")
    sqls = ["SELECT COUNT(*) FROM customer", "SELECT name, price FROM product ORDER BY price DESC LIMIT 1",
            "SELECT DISTINCT category FROM product ORDER BY category"]
    with SQLExecutor(data.databases, workers=1) as executor:
        assert all(all(score.correct.values()) for score in score_predictions(data.examples, sqls, executor))


SHORT = ["--prompts-per-step", 2, "--group-size", 2, "--max-completion-tokens", 40, "--eval-every", 2, "--eval-questions", 2,
         "--test-questions", 2, "--threads", 1, "--sql-workers", 1, "--prompt-style", "compact"]


def test_a_run_on_answers_alone(tmp_path):
    """Its cold start is taught from a file of traces; it is logged, shown, reported, resumed, and knows its questions."""
    database = tiny_database(tmp_path / "music.sqlite")
    records = [{"question": f"How many singers are older than {n}?", "answer": sum(age > n for age in (30, 41, 25))}
               for n in range(20, 40)]
    file, traces, folder = records_file(tmp_path, *records), tmp_path / "traces.jsonl", tmp_path / "run"
    traces.write_text("".join(json.dumps({"db_id": "music", "question": f"Are there singers of {n}?", "trace": f"count ages {n}",
                                          "sql": f"SELECT COUNT(*) FROM singer WHERE age = {n}"}) + "\n" for n in range(12)))
    flags = [*SHORT, "--data", file, "--traces", traces, "--model", little_policy_folder(database), "--cold-start-steps", 2,
             "--cold-start-batch", 4, "--draw", "informative", "--dynamic-sampling", 1, "--verbose", 1, "--output", folder]
    status, out, err = run_in_process(train, *flags, "--steps", 2, "--save-every", 1)
    assert status in (0, None), err
    assert out.count("training: 16 of 16 questions have an answer and no gold SQL, so no atomic reward") == 1
    assert "2 steps on 12 traces" in out and "gold: the answer [[" in out and "after GRPO" in out
    groups = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert all(group["gold_sqls"] == [] and len(group["answer"][0]) == 1 for group in groups)
    assert all(one["rewards"]["atomic"] == 0 for group in groups for one in group["completions"])
    assert (folder / "report.html").exists() and "gold: the answer" in group_text(groups[0], colour=False)
    with RunDatabases(json.loads((folder / "config.json").read_text()), folder) as databases:
        view, = step_view(groups[:1], databases)
    assert view["gold"]["status"] == "ok" and view["gold"]["rows"] == [[[str(groups[0]["answer"][0][0])]]]
    assert all("matched" not in one for one in view["completions"])
    assert run_in_process(train, "--resume", "--output", folder, "--steps", 3)[0] in (0, None)
    records_file(tmp_path, *(record | {"answer": record["answer"] + 1} for record in records))
    status, out, err = run_in_process(train, "--resume", "--output", folder, "--steps", 4)
    assert status == 2 and "was started with other training questions" in err


def test_the_cold_start_teaches_what_has_sql(tmp_path):
    """A template makes traces of gold SQL alone; a trace beside an answer needs its own SQL."""
    database, folder = tiny_database(tmp_path / "music.sqlite"), tmp_path / "run"
    records = [{"question": f"How many singers are older than {n}?", "answer": 3} for n in range(6)]
    records += [{"question": f"How many singers are younger than {n}?", "sql": f"SELECT COUNT(*) FROM singer WHERE age < {n}"}
                for n in range(4)]
    records += [{"question": "Any?", "answer": 3, "trace": "count the rows"},
                {"question": "All?", "answer": 3, "trace": "count the rows", "trace_sql": RIGHT}]
    file = records_file(tmp_path, *records)
    status, out, err = run_in_process(
        train, *SHORT, "--test-questions", 0, "--eval-questions", 0, "--data", file, "--traces", "template", "--model",
        little_policy_folder(database), "--cold-start-steps", 2, "--steps", 1, "--output", folder)
    assert status in (0, None), err
    assert "no template makes a trace for 6 of 12 training questions: they have no gold SQL" in out
    assert "left out 1 of 6 traces: they lead to an answer, and to no SQL (field 'trace_sql')" in out
    assert "2 steps on 5 traces" in out and "training: 8 of 12 questions have an answer" in out
