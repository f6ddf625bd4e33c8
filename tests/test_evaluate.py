"""Scores of predictions, Spider's hardness, prediction files and the command line."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from conftest import ROOT, run_in_process

import evaluate
from common import errors
from common.errors import UserError, check_folder
from data import Example, load_dataset
from evaluate import (
    MATCHES,
    EvaluateConfig,
    bootstrap_interval,
    difficulty_levels,
    load_predictions,
    print_table,
    score_predictions,
    scores_as_json,
    summarise,
)
from questions.holdout import twins_key
from scoring.hardness import LEVELS, hardness, joins_in, level
from scoring.predictions import one_line, save_predictions
from scoring.verdicts import first_reasons
from sql_exec import Execution, SQLExecutor


def example(gold, identity="0", difficulty="easy", db_id="music"):
    golds = (gold,) if isinstance(gold, str) else tuple(gold)
    return Example(identity, db_id, "a question?", golds, difficulty=difficulty)


def score(path, pairs, **options):
    """Scores of (gold, prediction) pairs on the tiny database."""
    with SQLExecutor({"music": path}, workers=1) as executor:
        return score_predictions([example(gold, str(number)) for number, (gold, _) in enumerate(pairs)],
                                 [sql for _, sql in pairs], executor, **options)


# ---------------------------------------------------------------------------------------- comparisons

NAMES = "SELECT name FROM singer ORDER BY age"


@pytest.mark.parametrize("gold, prediction, bird, spider", [
    (NAMES, "SELECT name FROM singer ORDER BY age DESC", 1, 0),        # only Spider minds the order
    ("SELECT name FROM singer", NAMES, 1, 1),                          # and only when the gold asks for one
    ("SELECT country FROM singer", "SELECT DISTINCT country FROM singer", 1, 1),  # Spider ignores DISTINCT
    ("SELECT name, age FROM singer", "SELECT age, name FROM singer", 0, 1),       # BIRD minds the columns
    ("SELECT name FROM singer", "SELECT name, age FROM singer", 0, 0),
    ("SELECT name FROM singer WHERE age > = 30", "SELECT name FROM singer WHERE age >= 30", 0, 1),
    ("SELECT name FROM singer WHERE age > 99", "SELECT name FROM singer WHERE age > 98", 1, 1),  # both empty
    ("SELECT name FROM singer WHERE age > 99", "SELECT nothing", 0, 0),
    ("SELECT nothing", "SELECT nothing", 0, 0),                        # a failed gold is never matched
    ("SELECT count(*) FROM singer", "", 0, 0),
    ("SELECT 1", "DROP TABLE singer", 0, 0),
    (["SELECT 1", "SELECT 2"], "SELECT 2", 1, 1),                      # any of the equivalent golds
    (["SELECT nothing", "SELECT 2"], "SELECT 2", 1, 1),
])
def test_comparisons(tiny_db, gold, prediction, bird, spider):
    result, = score(tiny_db, [(gold, prediction)])
    assert result.correct == {"bird": bool(bird), "spider": bool(spider)}


def test_keep_distinct_and_single_comparison(tiny_db):
    pair = ("SELECT country FROM singer", "SELECT DISTINCT country FROM singer")
    result, = score(tiny_db, [pair], matches=("spider",), keep_distinct=True)
    assert result.correct == {"spider": False}
    result, = score(tiny_db, [pair], matches=("bird",))
    assert result.correct == {"bird": True}


def test_statuses_and_soft_f1(tiny_db):
    scores = score(tiny_db, [
        ("SELECT name FROM singer", "SELECT name, age FROM singer"),  # 3 cells right, 3 too many
        ("SELECT name FROM singer WHERE age > 99", "SELECT oops"),
        ("SELECT oops", "SELECT 1"),
        ("SELECT 1", "PRAGMA user_version = 5")])
    assert [(item.status, item.gold_status) for item in scores] == [
        ("ok", "ok"), ("error", "empty"), ("ok", "error"), ("refused", "ok")]
    assert scores[0].soft_f1 == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert [item.soft_f1 for item in scores[1:]] == [0, 0, 0]
    assert [item.bad_gold for item in scores] == [False, False, True, False]
    assert "oops" in scores[1].error and scores[0].error == ""


# ------------------------------------------------------------------------------------------- summaries

def summary_of(tiny_db, skip=False):
    with SQLExecutor({"music": tiny_db}, workers=1) as executor:
        examples = [example("SELECT 1", "a", "tier 1"), example("SELECT 2", "b", "tier 1"),
                    example("SELECT 3", "c", "tier 2"), example("SELECT bad", "d", "tier 2")]
        scores = score_predictions(examples, ["SELECT 1", "SELECT 1", "SELECT 3", "SELECT 3"], executor)
    return scores, summarise(scores, skip)


def test_summary(tiny_db):
    scores, summary = summary_of(tiny_db)
    assert summary["n"] == 4 and summary["execution_accuracy"] == {"bird": 0.5, "spider": 0.5}
    assert summary["mean_over_difficulties"]["bird"] == 0.5
    assert summary["statuses"] == {"ok": 1.0}
    assert summary["bad_golds"] == [{"id": "d", "db_id": "music", "gold_status": "error",
                                     "gold_error": "no such column: bad", "file": str(tiny_db)}]
    assert summary["unavailable"] == []
    _, skipping = summary_of(tiny_db, skip=True)
    assert skipping["n"] == 3 and skipping["execution_accuracy"]["bird"] == pytest.approx(2 / 3)
    assert skipping["mean_over_difficulties"]["bird"] == 0.75
    assert {name: part["n"] for name, part in skipping["by_difficulty"].items()} == {"tier 1": 2, "tier 2": 1}
    content = json.loads(json.dumps(scores_as_json(scores, summary)))
    assert content["examples"][1] == {"id": "b", "db_id": "music", "twins": scores[1].twins, "status": "ok",
                                      "gold_status": "ok", "bird": 0, "spider": 0}
    assert [item["id"] for item in content["examples"]] == ["a", "b", "c", "d"]


def test_table_fits_the_terminal(tiny_db, capsys):
    _, summary = summary_of(tiny_db)
    print_table(summary)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if str(tiny_db) not in line) <= 80
    assert lines[1].split()[:3] == ["all", "4", "50.0"]
    assert any("golds that fail: 1, counted as wrong" in line for line in lines)
    assert f"question d, error: no such column: bad ({tiny_db})" in " ".join(" ".join(lines).split())


def test_the_first_reason_of_each_kind_is_told_with_its_file():
    failures = [(str(i), *rest) for i, rest in enumerate([
        ("error", "no such function: REGEXP", "a.sqlite"), ("error", "no such column: x", "a.sqlite"),
        ("error", "no such column: y", "b.sqlite"), ("timeout", "no result within 5 s", "a.sqlite"),
        ("error", "cannot read s/._x.sqlite: it is not a SQLite database", "s/._x.sqlite"),
        ("error", "cannot read a.sqlite: it has an unfinished transaction: open it", "a.sqlite"),
        ("error", "cannot read s/y.sqlite: it is not a SQLite database", "s/y.sqlite"),
        ("error", "no such collation sequence: LOCALIZED", "a.sqlite"), ("error", "no such module: vec0", "a.sqlite")])]
    assert first_reasons(failures, most=6) == [
        "question 0, error: no such function: REGEXP (a.sqlite)",
        "question 1, error: no such column: x (a.sqlite); and 1 more like it",
        "question 3, timeout: no result within 5 s (a.sqlite)",
        "question 4, error: cannot read s/._x.sqlite: it is not a SQLite database; and 1 more like it",
        "question 5, error: cannot read a.sqlite: it has an unfinished transaction: open it",
        "question 7, error: no such collation sequence: LOCALIZED (a.sqlite)",
        "and 1 further kinds"]


class Locked:
    """An executor that finds a database locked where a query has this text in it."""
    def __init__(self, executor, text):
        self.databases, self.executor, self.text = executor.databases, executor, text

    def run_many(self, pairs):
        return [Execution("unavailable", error="database is locked") if self.text in sql else ran
                for (_, sql), ran in zip(pairs, self.executor.run_many(pairs), strict=True)]

    run_gold = run_many


@pytest.mark.parametrize("prediction, gold", [("SELECT age, 1 FROM singer", "SELECT age FROM singer"),  # the prediction
                                              ("SELECT age FROM singer", "SELECT age, 1 FROM singer"),  # the gold
                                              ("SELECT age, 1 FROM singer", "SELECT age, 1 FROM singer")])
def test_what_a_locked_database_says_nothing_about_is_left_out(tiny_db, capsys, prediction, gold):
    with SQLExecutor({"music": tiny_db}, workers=1) as executor:
        scores = score_predictions([example("SELECT 2", "right"), example(gold, "locked"), example("SELECT 3", "wrong")],
                                   ["SELECT 2", prediction, "SELECT 4"], Locked(executor, ", 1"))
    summary = summarise(scores)
    assert summary["n"] == 2 and summary["execution_accuracy"] == {"bird": 0.5, "spider": 0.5}
    assert summary["soft_f1"] == 0.5 and summary["statuses"] == {"ok": 1.0} and summary["bad_golds"] == []
    assert summary["unavailable"] == [{"id": "locked", "db_id": "music", "error": "database is locked", "file": str(tiny_db)}]
    assert scores_as_json(scores, summary)["examples"][1]["bird"] is None
    print_table(summary)
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: 1 questions are left out of every figure" in printed
    assert f"question locked, unavailable: database is locked ({tiny_db})" in printed
    nothing = summarise([score for score in scores if score.unavailable])
    assert nothing["n"] == 0 and set(nothing["execution_accuracy"]) == {"bird", "spider"}


def test_no_scores_at_all(capsys):
    summary = summarise([])
    assert summary["n"] == 0 and summary["statuses"] == {}


def test_bootstrap_interval():
    low, high = bootstrap_interval([0.0, 1.0] * 200)
    # the normal approximation of the mean of 400 coin flips: 0.5 -+ 1.96 * 0.5 / 20
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)
    assert bootstrap_interval([0.0, 1.0] * 200) == (low, high)


def test_what_never_differed_is_not_certain():
    """Clopper and Pearson's 95 % intervals of 50 of 50, 0 of 20 and 1 of 1, and of changes that none of 20 had."""
    assert bootstrap_interval([1.0] * 50) == pytest.approx((0.9289, 1.0), abs=1e-4)
    assert bootstrap_interval([0.0] * 20) == pytest.approx((0.0, 0.1684), abs=1e-4)
    assert bootstrap_interval([1.0]) == (0.0, 1.0)
    assert bootstrap_interval([1.0] * 50, [i // 25 for i in range(50)]) == pytest.approx((0.025**0.5, 1.0))
    assert bootstrap_interval([0.0] * 20, span=(-1.0, 1.0)) == pytest.approx((-0.1684, 0.1684), abs=1e-4)
    low, high = bootstrap_interval([1.0, 0.0, 0.0, 0.0, 0.0], span=(-1.0, 1.0))
    assert low < 0 < high  # one question gained of five says nothing against a loss


def test_values_of_one_group_are_drawn_together():
    alone = bootstrap_interval([0.0, 1.0] * 100)
    pairs = bootstrap_interval([0.0, 0.0, 1.0, 1.0] * 100, [i // 2 for i in range(400)])  # 200 coins, each seen twice
    assert pairs == alone
    # three databases of 100 questions, 47, 50 and 53 % right: Student's interval is 0.5 -+ 4.303 * 0.03 / sqrt(3)
    values = [float(i < right) for right in (47, 50, 53) for i in range(100)]
    low, high = bootstrap_interval(values, [i // 100 for i in range(300)])
    assert 0.95 < (high - low) / (2 * 0.0745) < 1.2 and low + high == pytest.approx(1.0, abs=0.01)
    values = [float(i < right) for right in (20, 50, 80) for i in range(100)]
    assert bootstrap_interval(values, [i // 100 for i in range(300)]) == (0.0, 1.0)  # no share lies beyond
    assert bootstrap_interval([0.0, 1.0, 1.0], ["one"] * 3) == (0.0, 1.0)  # of one group nothing is known
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):  # ten databases whose accuracy is about 50 %: 95 % of the intervals hold the 50 %
        low, high = bootstrap_interval(np.repeat(rng.normal(0.5, 0.1, 10), 5), np.repeat(range(10), 5), samples=400)
        covered += low <= 0.5 <= high
    assert 0.91 < covered / 300 < 0.98


def test_intervals_are_over_twins_and_over_databases(tmp_path, tiny_db, capsys):
    """The same verdicts; what is asked twice counts as asked once."""
    other = tmp_path / "other.sqlite"
    shutil.copy(tiny_db, other)
    golds = [(f"SELECT {i}", f"select  {i};") for i in range(30)]
    examples = [example(gold, f"{db_id} {i} {j}", db_id=db_id) for db_id in ("music", "other")
                for i, pair in enumerate(golds) for j, gold in enumerate(pair)]
    sqls = [f"SELECT {i if i % (2 if db_id == 'music' else 5) else -1}" for db_id in ("music", "other")
            for i in range(30) for _ in range(2)]
    with SQLExecutor({"music": tiny_db, "other": other}, workers=1) as executor:
        scores = score_predictions(examples, sqls, executor)
    assert len({score.twins for score in scores}) == 30 and scores[0].twins == scores[1].twins != scores[2].twins
    summary = summarise(scores)
    assert (summary["n"], summary["twin_groups"], summary["databases"]) == (120, 60, 2)
    values = [float(score.correct["bird"]) for score in scores]
    assert summary["interval"]["bird"] == bootstrap_interval(values, [i // 2 for i in range(120)])
    low, high = bootstrap_interval(values)
    assert 1.2 < (summary["interval"]["bird"][1] - summary["interval"]["bird"][0]) / (high - low) < 1.6
    assert summary["interval_over_databases"]["bird"] == bootstrap_interval(values, [i // 60 for i in range(120)])
    assert summarise(scores[:60])["interval_over_databases"] == {}  # one database says nothing of others
    print_table(summary)
    printed = capsys.readouterr().out
    assert "  over 2 databases" in printed and "gold query together: 60 groups" in printed
    item = scores_as_json(scores, summary)["examples"][3]
    assert (item["db_id"], item["twins"]) == ("music", scores[3].twins)


def test_spider_dev_has_551_groups_of_twins(shared_data):
    dev = load_dataset("spider", shared_data / "spider", "dev").examples
    assert (len(dev), len({(one.db_id, twins_key(one)) for one in dev})) == (1034, 551)


# -------------------------------------------------------------------------------------------- hardness

@pytest.mark.parametrize("components, nestings, others, expected", [
    (0, 0, 0, "easy"), (1, 0, 0, "easy"), (1, 0, 1, "medium"), (1, 0, 2, "medium"), (2, 0, 1, "medium"),
    (2, 0, 2, "extra"), (2, 0, 3, "hard"), (1, 0, 3, "hard"), (3, 0, 2, "hard"), (3, 0, 3, "extra"),
    (4, 0, 0, "extra"), (0, 1, 0, "hard"), (1, 1, 0, "hard"), (1, 1, 1, "extra"), (2, 1, 0, "extra"),
    (0, 2, 0, "extra")])
def test_hardness_table(components, nestings, others, expected):
    assert level(components, nestings, others) == expected


@pytest.mark.parametrize("sql, expected", [
    ("SELECT count(*) FROM t", "easy"),
    ("SELECT a, b FROM t", "medium"),                              # 0 components, 1 other
    ("SELECT a FROM t WHERE b BETWEEN 1 AND 2", "easy"),           # the AND of BETWEEN joins nothing
    ("SELECT a FROM t WHERE b = 1 AND c = 2", "medium"),           # two conditions: 1 other
    ("SELECT a FROM t WHERE b = 'x OR y LIKE z'", "easy"),         # words inside strings do not count
    ('SELECT "order" FROM t WHERE t.limit = 1', "easy"),           # nor inside names
    ("SELECT a FROM t -- GROUP BY a LIMIT 3", "easy"),
    ("SELECT a FROM t AS x JOIN u AS y ON x.i = y.i", "easy"),     # one join: 1 component
    ("SELECT a FROM t ORDER BY b DESC LIMIT 1", "medium"),         # 2 components
    ("SELECT a FROM t WHERE b LIKE '%c%' OR b = 1", "hard"),       # where, like, or: 3, and 1 other
    ("SELECT a FROM t WHERE b > (SELECT avg(b) FROM t)", "hard"),  # 1 component, 1 nesting
    ("SELECT a FROM t EXCEPT SELECT a FROM u WHERE b = 1 AND c = 2", "hard"),  # counts of the left side
    ("SELECT a FROM t WHERE x IN (SELECT y FROM u) GROUP BY a", "extra"),
    ("SELECT count(*) FROM (SELECT a FROM t UNION SELECT a FROM u)", "easy"),  # a table, no nesting
    ("SELECT a FROM t GROUP BY a HAVING count(*) > 1 AND sum(b) > 2 AND max(b) > 3", "medium"),  # 2 ANDs
    ("(SELECT a FROM t)", "easy"), ("", "easy"), ("SELECT (", "easy")])
def test_hardness(sql, expected):
    assert hardness(sql) == expected


@pytest.mark.parametrize("sql, count", [
    ("SELECT a FROM t LEFT OUTER JOIN u USING (x) join v NATURAL JOIN w", 3), ("SELECT a FROM t, u", 1),
    ("SELECT a, b FROM t, u JOIN v USING (x, y) WHERE z IN (SELECT c, d FROM t, (SELECT e, f FROM w)) ORDER BY a, b", 3),
    ("SELECT a FROM t UNION SELECT b, c FROM u", 0), (") , (", 0), ("SELECT " + "a, " * 10**5, 0),
    ("SELECT [join] FROM t WHERE kind = 'inner join' -- join", 0), ("", 0)])
def test_joins_are_counted_where_they_join(sql, count):
    assert joins_in(sql) == count


def test_hardness_of_spider_dev_in_the_official_counts(shared_data):
    levels = difficulty_levels(load_dataset("spider", shared_data / "spider", "dev").examples)
    assert [levels.count(name) for name in LEVELS] == [248, 446, 174, 166]


def test_difficulty_of_the_data_comes_first():
    examples = [example("SELECT 1", difficulty="challenging"), example("SELECT 1", difficulty="")]
    assert difficulty_levels(examples) == ["challenging", "unlabelled"]
    assert difficulty_levels(examples[1:]) == ["easy"]


# ------------------------------------------------------------------------------------ prediction files

TWO = [example("SELECT 1", "717"), example("SELECT 2", "718", db_id="film")]


@pytest.mark.parametrize("name, content, pairing", [
    ("p.sql", "SELECT 1\nSELECT 2\n", "by position"),
    ("p.sql", "SELECT 1\tmusic\r\nSELECT 2\tfilm", "by position"),
    ("p.json", '{"0": "SELECT 1\\t----- bird -----\\tmusic", "1": "SELECT 2"}', "by position"),
    ("p.json", '{"718": "SELECT 2", "717": "SELECT 1\\t----- bird -----\\tmusic"}', "by id"),
    ("p.jsonl", '{"id": 718, "sql": "SELECT 2"}\n\n{"id": "717", "sql": "SELECT 1"}\n', "by id"),
    ("p.jsonl", '{"sql": "SELECT 1"}\n{"sql": "SELECT 2"}\n', "by position"),
])
def test_prediction_files(tmp_path, name, content, pairing):
    (tmp_path / name).write_text(content, newline="")
    sqls, sentence = load_predictions(tmp_path / name, TWO)
    assert sqls == ["SELECT 1", "SELECT 2"] and pairing in sentence


def test_prediction_file_oddities(tmp_path):
    (tmp_path / "p.sql").write_text("SELECT 1\n\n")
    assert load_predictions(tmp_path / "p.sql", TWO) == (
        ["SELECT 1", ""], "paired by position: the file does not use the questions' ids")
    (tmp_path / "p.json").write_text('{"717": null, "718": "SELECT 2", "719": "SELECT 3"}')
    sqls, sentence = load_predictions(tmp_path / "p.json", TWO)
    assert sqls == ["", "SELECT 2"] and "1 predictions are for other questions" in sentence


@pytest.mark.parametrize("line, sql", [
    ("SELECT 1\tmusic ", "SELECT 1"), ("SELECT 1\tMusic", "SELECT 1"), ("SELECT 1\t music\t", "SELECT 1"),
    ("SELECT 1\tmusic\t0.93", "SELECT 1"), ("SELECT 1\t-3.5e-2", "SELECT 1"), ("SELECT a FROM t\t12", "SELECT a FROM t"),
    ("SELECT count(*)\t0.5\tmusic", "SELECT count(*)"), ("SELECT a;\tnan\tMUSIC ", "SELECT a;"), ("\tmusic", ""),
    ("SELECT a FROM t LIMIT\t5", "SELECT a FROM t LIMIT\t5"), ("SELECT a -\t0.5", "SELECT a -\t0.5"),
    ("SELECT a,\t5", "SELECT a,\t5"), ("SELECT\t1\t0.5", "SELECT\t1"), ("SELECT a FROM\tmusic", "SELECT a FROM\tmusic"),
    ("SELECT a FROM\tmusic\tmusic", "SELECT a FROM\tmusic"), ("SELECT 1\tof 2", "SELECT 1\tof 2"),
    ("SELECT 1\t----- bird -----\tMUSIC \t0.5", "SELECT 1")])
def test_what_follows_the_sql_after_a_tab_is_taken_off(tmp_path, line, sql):
    two = [TWO[0], example("SELECT 2", "718", db_id="Film")]
    (tmp_path / "p.sql").write_text(f"SELECT 1\n{line}\n")
    first, sentence = load_predictions(tmp_path / "p.sql", two[::-1])
    # Spider's official evaluator: line.strip().split("\t")[0]
    assert first[0] == "SELECT 1" and first[1] == (line.strip().split("\t")[0] if sql else "")
    said = "1 line cut at a tab inside the query, as Spider's official evaluator does, the first is line 2"
    assert (said in sentence) == ("\t" in sql)
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": 718, "sql": "SELECT 2"}) + "\n"
                                      + json.dumps({"id": 717, "sql": line}))
    assert load_predictions(tmp_path / "p.jsonl", two)[0] == [sql, "SELECT 2"]


def test_where_all_lines_end_with_a_db_id_a_broken_query_does_too(tmp_path):
    (tmp_path / "p.sql").write_text("SELECT a FROM\tmusic\nSELECT 2\tfilm\n")
    assert load_predictions(tmp_path / "p.sql", TWO)[0] == ["SELECT a FROM", "SELECT 2"]


@pytest.mark.parametrize("field", ["question_id", "qid", "Question_ID", "idx", "index", "instance_id", "questionId", "query-id",
                                   "_id", "number"])
def test_records_are_paired_by_id_whatever_its_name(tmp_path, field):
    lines = [{field: 718, "sql": "SELECT 2"}, {field: 717.0, "sql": "SELECT 1", "id": None}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_predictions(tmp_path / "p.jsonl", TWO) == (["SELECT 1", "SELECT 2"], "paired by id")


def test_the_field_that_has_the_ids_of_the_data_pairs(tmp_path):
    lines = [{"id": 0, "question_id": 718, "sql": "SELECT 2"}, {"id": 1, "question_id": 717, "sql": "SELECT 1"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_predictions(tmp_path / "p.jsonl", TWO) == (["SELECT 1", "SELECT 2"], "paired by id")
    lines = [{"index": 1, "sql": "SELECT 2"}, {"index": 0, "sql": "SELECT 1"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sqls, sentence = load_predictions(tmp_path / "p.jsonl", TWO)
    assert sqls == ["SELECT 1", "SELECT 2"] and "by position" in sentence


REPEATED = [example("SELECT 1", "7"), example("SELECT 2", "7"), example("SELECT 3", "7-2"), example("SELECT 4", "7")]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".sql"])
def test_predictions_of_repeated_ids_come_back(tmp_path, ending):
    sqls = [f"SELECT {number}" for number in range(4)]
    save_predictions(tmp_path / f"p{ending}", REPEATED, sqls)
    assert load_predictions(tmp_path / f"p{ending}", REPEATED)[0] == sqls
    unique = [example("SELECT 1", name) for name in ("7", "7-3", "7-2", "7-4")]  # as data.py numbers them
    assert load_predictions(tmp_path / f"p{ending}", unique)[0] == sqls


@pytest.mark.parametrize("name, content", [
    ("p.json", '{"7": "SELECT 0", "7": "SELECT 1", "7-2": "SELECT 2", "7": "SELECT 3"}'),
    ("p.jsonl", "".join(f'{{"question_id": "{name}", "sql": "SELECT {i}"}}\n' for i, name in enumerate(["7", "7", "7-2", "7"])))])
def test_repeated_ids_of_others_files_are_read_in_turn(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert load_predictions(tmp_path / name, REPEATED)[0] == ["SELECT 0", "SELECT 1", "SELECT 2", "SELECT 3"]


BACKSLASHES = r"SELECT '\', b -- it's a note"


def test_backslashes_escape_nothing():
    assert one_line(BACKSLASHES + "\nFROM t WHERE c = 'd -- e'\nAND f = '\\'") == (
        r"SELECT '\', b  FROM t WHERE c = 'd -- e' AND f = '\'", True)
    assert one_line("SELECT 1 -- one\r, 2\n") == ("SELECT 1", True)  # a return alone ends no comment in SQLite
    assert hardness(r"SELECT a FROM t WHERE b = '\' OR c LIKE 'x' OR d = 'y'") == hardness(
        "SELECT a FROM t WHERE b = '/' OR c LIKE 'x' OR d = 'y'")
    assert hardness(r"SELECT a FROM t WHERE b = '\'' GROUP BY LIMIT'") == "easy"  # all in one string


def test_a_query_on_one_line_returns_the_same(tmp_path, tiny_db):
    queries = ["SELECT '\\' AS a, -- '\n 'b' AS b", "SELECT 1 -- x\r + 1\n+ 2", "SELECT /* ' \n */ '\\''--' \n",
               "SELECT 'a\tb', '\n', 'it''s\r\n\r\n', length('\tx') AS n\nFROM singer\nWHERE name <> 'a\nb' AND name\nNOT LIKE 'x\n%'",
               "SELECT name FROM singer WHERE name GLOB 'A\t*' OR 1 IN ('\n', 1) OR name || '\t' = '\t' ORDER\nBY name"]
    with SQLExecutor({"music": tiny_db}, workers=1) as executor:
        for sql in queries:
            line, same = one_line(sql)
            before, after = executor.run_many([("music", sql), ("music", line)])
            assert same and before.status == "ok" and before.rows == after.rows and not set("\t\r\n") & set(line)


@pytest.mark.parametrize("sql, line", [
    ("SELECT name AS 'a\nb' FROM singer", "SELECT name AS 'a b' FROM singer"),
    ("SELECT name 'a\tb' FROM singer", "SELECT name 'a b' FROM singer"),
    ("SELECT count(*) 'a\tb'", "SELECT count(*) 'a b'"), ("SELECT 1 FROM 'a\tb'", "SELECT 1 FROM 'a b'"),
    ('SELECT "a\nb" FROM t', 'SELECT "a b" FROM t'), ("SELECT t.[a\nb] FROM t", "SELECT t.[a b] FROM t")])
def test_names_that_no_line_can_hold_are_said(tmp_path, sql, line):
    assert one_line(sql) == (line, False)
    said = save_predictions(tmp_path / "p.sql", TWO, ["SELECT 'a\nb'", sql])
    assert "in 1 line (2), where a line cannot hold it; .json and .jsonl can" in said
    assert (tmp_path / "p.sql").read_text().splitlines() == ["SELECT ('a' || char(10) || 'b')", line]
    for ending in (".json", ".jsonl"):
        assert save_predictions(tmp_path / f"p{ending}", TWO, ["SELECT 1", sql]) == ""
        assert load_predictions(tmp_path / f"p{ending}", TWO)[0] == ["SELECT 1", sql]


@pytest.mark.parametrize("name, content, words", [
    ("p.sql", "SELECT 1\n", ["1 predictions", "2 questions"]),
    ("p.sql", "SELECT 1\tfilm\nSELECT 2\tfilm\n", ["question 717", "'film'", "'music'"]),
    ("p.json", '{"0": "SELECT 1\\t----- bird -----\\tsoap", "1": ""}', ["question 717", "'soap'", "'music'"]),
    ("p.json", '{"0": "SELECT 1"}', ["1 predictions", "2 questions"]),
    ("p.json", '{"717": "SELECT 1"}', ["1 of 2", "'718'"]),
    ("p.json", '["SELECT 1"]', ["predict_dev.json"]),
    ("p.json", '{\n"0": oops}', ["line 2", "broken JSON"]),
    ("p.jsonl", '{"id": 717, "sql": "SELECT 1"}\n{"id": 718}', ["line 2", "'sql'"]),
    ("p.jsonl", '{"id": 717, "sql": "a"}\n{"id": 717, "sql": "b"}', ["same id twice"]),
    ("p.jsonl", '{"id": 717, "sql": "a"}\n{"sql": "b"}', ["some records have an id"]),
])
def test_prediction_file_errors(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        load_predictions(tmp_path / name, TWO)
    assert all(word in str(error.value) for word in [name, *words]), error.value


# ---------------------------------------------------------------------------------------- command line

def own_data(tmp_path, tiny_db):
    records = [{"id": number, "question": "q", "db_id": "music", "sql": sql}
               for number, sql in enumerate(["SELECT 1", "SELECT 2", "SELECT bad"])]
    (tmp_path / "own.json").write_text(json.dumps(records))
    (tmp_path / "p.sql").write_text("SELECT 1\nSELECT 3\nSELECT 1\n")
    (tmp_path / "exclude.json").write_text("[1]")
    return ["--predictions", tmp_path / "p.sql", "--data", tmp_path / "own.json", "--workers", 1]


def test_command_line(tmp_path, tiny_db):
    arguments = own_data(tmp_path, tiny_db)
    command = [sys.executable, "evaluate.py", *map(str, arguments), "--skip-bad-gold", "--json", tmp_path / "out.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["execution_accuracy"] == {"bird": 0.5, "spider": 0.5} and content["n"] == 2
    assert [item["gold_status"] for item in content["examples"]] == ["ok", "ok", "error"]
    assert "paired by position" in done.stdout and "golds that fail: 1, left out" in done.stdout
    _, out, _ = run_in_process(evaluate, *arguments, "--exclude", tmp_path / "exclude.json", "--match", "bird")
    assert "\nall" in out and "spider" not in out
    assert out.partition("\nall")[2].split()[:2] == ["2", "50.0"]
    assert "left out 1 of 3 questions by --exclude" in out and "none of these" not in out
    protocol = json.loads((tmp_path / "out.json").read_text())["protocol"]
    assert protocol == protocol | {"test_suite": False, "lenient_format": False, "timeout": 30.0, "max_rows": 1_000_000}


@pytest.mark.parametrize("flag", ["--json", "--predictions-out"])
def test_a_file_that_cannot_be_written_is_said_before_the_work(tmp_path, tiny_db, flag):
    arguments = own_data(tmp_path, tiny_db)
    target = tmp_path / ("x" * 300)  # longer than any file system allows; root may write where others may not
    status, out, err = run_in_process(evaluate, *arguments, flag, target)
    assert status == 2 and f"cannot write {target}" in err and out == ""
    written = tmp_path / "kept.json"
    written.write_text("of before")
    check_folder(written)
    check_folder(tmp_path / "new.json")
    assert written.read_text() == "of before" and not (tmp_path / "new.json").exists()


def test_the_table_is_printed_and_the_other_files_written_where_one_cannot_be(tmp_path, tiny_db, monkeypatch, capsys):
    arguments = own_data(tmp_path, tiny_db)
    real = errors.write_text

    def full(file, text):
        if str(file).endswith("a.json"):
            raise UserError(f"cannot write {file}: No space left on device")
        real(file, text)

    monkeypatch.setattr(evaluate, "write_text", full)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--json", str(tmp_path / "a.json"),
                                      "--predictions-out", str(tmp_path / "q.sql")])
    with pytest.raises(UserError, match="No space left"):
        evaluate.main()
    assert "\nall" in capsys.readouterr().out and (tmp_path / "q.sql").read_text().count("\n") == 3


@pytest.mark.parametrize("extra, words", [
    (["--match", "exact"], "--match takes bird and spider"),
    (["--workers", "0"], "--workers is 0; it must be at least 1"),
    (["--timeout", "nan"], "--timeout is nan; it must be a finite number"),
    (["--timeout", "-1"], "--timeout is -1.0; it must be above 0"),
    (["--timeout", "0"], "--timeout is 0.0; it must be above 0"),
    (["--limit", "-3"], "--limit is -3; it must be at least 0"),
    (["--r-ves", "-1"], "--r-ves is -1; it must be at least 0"),
    (["--max-rows", "0"], "--max-rows is 0; it must be at least 1"),
    (["--memory-limit-mb", "0"], "--memory-limit-mb is 0; it must be at least 16"),
    (["--threads", "-3"], "--threads is -3; it must be at least 0"),
    (["--seed", "-1"], "--seed is -1; it must be at least 0"),
    (["--seed", "10000000"], "--seed is 10000000; it must be at most 1000000"),
    (["--batch", "0"], "--batch is 0; it must be at least 1"),
    (["--max-completion-tokens", "9", "--vote", "none"], "need a --model: leave out --vote, --max-completion-tokens"),
    (["--gold-cache", __file__], "test_evaluate.py is a file: give a folder"),
    (["--predictions", ""], "give --predictions FILE"),
    (["--json", "/nowhere/out.json"], "cannot write /nowhere/out.json"),
    (["--exclude", "gone.json"], "cannot read gone.json"),
    (["--predictions", "gone.sql"], "cannot read gone.sql")])
def test_bad_command_lines(tmp_path, tiny_db, extra, words):
    status, _, err = run_in_process(evaluate, *own_data(tmp_path, tiny_db), *extra)
    assert status == 2 and words in err and "Traceback" not in err


def parsed(*arguments):
    """The settings of a command line that names a file of predictions."""
    return evaluate.parse_arguments(["--predictions", "p.sql", *map(str, arguments)])[1]


@pytest.mark.parametrize("arguments, words", [
    (["--predictions", "p.sql", "--no-greedy", "--temperature", "0.5"], "leave out --temperature, --no-greedy"),
    (["--predictions", "p.sql", "--prompt-style", "full", "--answer", "fence"], "leave out --prompt-style, --answer"),
    (["--predictions", "p.sql", "--anyway"], "--anyway is for --compare"),
    (["--compare", "a", "b", "--match", "bird", "-n", "3"], "--json and --anyway alone: leave out -n, --match"),
    (["--compare", "a", "b", "--max-value-hints", "3", "--model", "m"], "leave out --model, --max-value-hints")])
def test_flags_that_would_change_nothing_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        evaluate.parse_arguments(arguments)
    assert evaluate.parse_arguments(["--compare", "a", "b", "--anyway", "--json", "c.json"])[1] is None
    assert parsed("--lenient-format", "--limit", 3, "--seed", 1, "--workers", 1).limit == 3


def test_what_is_excluded_is_told(tmp_path, tiny_db, capsys):
    own_data(tmp_path, tiny_db)
    config = parsed("--data", tmp_path / "own.json", "--exclude", tmp_path / "exclude.json", "--limit", 2)
    examples = load_dataset(config.data).examples

    def chosen(ids, examples=examples):
        (tmp_path / "exclude.json").write_text(json.dumps(ids))
        return evaluate.chosen(config, examples), " ".join(capsys.readouterr().out.split())

    kept, printed = chosen([0, 7, 8])
    assert kept == [1, 2] and "left out 1 of 3 questions by --exclude" in printed
    assert printed.endswith("; 2 of its 3 ids are none of these questions")
    assert chosen([]) == ([0, 1], "")
    kept, printed = chosen([2], examples[:2])  # of the file, but its run was trained on it
    assert kept == [0, 1] and "left out 0 of 2 questions" in printed
    with pytest.raises(UserError, match=r"exclude.json: none of its ids, such as '7', is one of .*own.json, split dev"):
        chosen([7, 8])


def test_every_number_has_a_range():
    for field in fields(EvaluateConfig):
        if field.type in (int, float, float | None):
            assert {"at_least", "above"} & field.metadata.keys(), field.name


def test_r_ves_needs_no_other_comparison(tmp_path, tiny_db):
    """The score is BIRD's whatever is compared: swapped columns are right for Spider and wrong for BIRD."""
    (tmp_path / "own.json").write_text(json.dumps([{"question": "q", "db_id": "music", "sql": "SELECT name, age FROM singer"},
                                                   {"question": "q", "db_id": "music", "sql": "SELECT 1"}]))
    (tmp_path / "p.sql").write_text("SELECT age, name FROM singer\nSELECT 1\n")
    status, _, err = run_in_process(evaluate, "--predictions", tmp_path / "p.sql", "--data", tmp_path / "own.json",
                                    "--workers", 1, "--match", "spider", "--r-ves", 1, "--json", tmp_path / "out.json")
    assert status == 0, err
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["execution_accuracy"] == {"spider": 1.0} and "bird" not in content["examples"][0]
    assert 25 <= content["timing"]["r_ves"] <= 100 * 1.25 ** 0.5 / 2


@pytest.mark.parametrize("fenced", ["```sql SELECT 1```", "```sql SELECT 1 ```\tmusic", "``` SELECT 1 ```"])
def test_lenient_predictions_may_be_fenced(tmp_path, tiny_db, fenced):
    arguments = own_data(tmp_path, tiny_db)
    (tmp_path / "p.sql").write_text(f"{fenced}\nSELECT 3\nSELECT 1\n")
    for flags, right in (([], 0), (["--lenient-format"], 1)):
        status, _, err = run_in_process(evaluate, *arguments, *flags, "--json", tmp_path / "out.json")
        assert status == 0, err
        assert [item["bird"] for item in json.loads((tmp_path / "out.json").read_text())["examples"]] == [right, 0, 0]


def test_no_text_and_no_encoding_ends_the_command(tmp_path, tiny_db):
    records = [{"id": "é\ud800", "question": "\udfff q", "db_id": "music", "sql": "SELECT oops\ud800", "difficulty": "schön"},
               {"id": "b", "question": "q", "db_id": "music", "sql": "SELECT 'é'", "difficulty": "易"}]
    (tmp_path / "own.json").write_text(json.dumps(records))
    (tmp_path / "p.jsonl").write_text('{"sql": "SELECT \\ud800"}\n{"sql": "SELECT \'\\u00e9\'"}\n')
    out, environment = tmp_path / "out.json", {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "evaluate.py", "--data", tmp_path / "own.json", "--workers", "1", "--json", out]
    done = subprocess.run([*command, "--predictions", tmp_path / "p.jsonl"], cwd=ROOT, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert content["execution_accuracy"] == {"bird": 0.5, "spider": 0.5} and content["examples"][1]["bird"] == 1
    done = subprocess.run([sys.executable, "evaluate.py", "--compare", out, out], cwd=ROOT, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "p.jsonl").write_bytes(b'{"sql": "SELECT \xff"}\n')
    done = subprocess.run([*command, "--predictions", tmp_path / "p.jsonl"], cwd=ROOT, capture_output=True, env=environment, check=False)
    assert done.returncode == 2 and b"is not UTF-8 text" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("system, correct", [("dail_sql_gpt4", 863), ("graphix_3b_picard", 839)])
def test_equal_to_the_official_verdicts(shared_data, system, correct):
    dev = load_dataset("spider", shared_data / "spider", "dev")
    sqls, _ = load_predictions(shared_data / "predictions" / f"{system}.sql", dev.examples)
    with SQLExecutor(dev.databases, workers=2, max_rows=100_000) as executor:  # two golds have over 10,000
        scores = score_predictions(dev.examples, sqls, executor, MATCHES)
    verdicts = [int(item.correct["spider"]) for item in scores]
    assert sum(verdicts) == correct
    assert verdicts == json.loads((shared_data / "predictions" / f"{system}.official.json").read_text())
