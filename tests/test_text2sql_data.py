"""questions/text2sql_data.py: a clone of text2sql-data as a question file; GeoQuery comes out as it was once made by hand."""

import doctest
import json
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from conftest import run_in_process

from questions import text2sql_data
from questions.question_files import load_own
from questions.text2sql_data import fill, plain_sql

POPULATION = 'SELECT CITYalias0.POPULATION FROM CITY AS CITYalias0 WHERE CITYalias0.CITY_NAME = "city_name0" ;'
LARGEST = ("SELECT CITYalias0.CITY_NAME FROM CITY AS CITYalias0 WHERE CITYalias0.POPULATION = "
           "( SELECT MAX( CITYalias1.POPULATION ) FROM CITY AS CITYalias1 ) ;")


def query(sql, *sentences, query_split="train", **examples):
    """A query in the layout of the repository; sentences are (text, split, variables)."""
    return {"sql": [sql, "SELECT another"], "query-split": query_split,
            "variables": [{"name": name, "example": value, "location": "both", "type": "text"} for name, value in examples.items()],
            "sentences": [{"text": text, "question-split": split, "variables": variables} for text, split, variables in sentences]}


QUERIES = [
    query(POPULATION, ("how big is city_name0", "train", {"city_name0": "austin"}),
          ("what is the population of city_name0", "dev", {"city_name0": "coeur d'alene"}),
          ("how many live in the capital", "train", {"city_name0": ""}),
          ("how big is city_name0", "train", {"city_name0": "atlantis"}), query_split="test", city_name0="boise"),
    query(LARGEST, ("what is the largest city", "train", {}), ("which city is the largest", "test", {})),
    query("SELECT CITYalias0.MAYOR FROM CITY AS CITYalias0 ;", ("who is mayor", "train", {}), ("who are mayors", "dev", {})),
    query("SELECT COUNT( 1 ) FROM CITY AS CITYalias0 ;", ("how many cities are there", "7", {}), query_split="3"),
]


def tiny_clone(folder: Path, queries=QUERIES) -> Path:
    """A clone with few made-up cities."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "geography.json").write_text(json.dumps(queries))
    with closing(sqlite3.connect(folder / "data" / "geography-db.added-in-2020.sqlite")) as connection:
        connection.executescript("""
            CREATE TABLE city (city_name TEXT, population INT);
            INSERT INTO city VALUES ('austin', 345496), ('boise', 102249), ('coeur d''alene', 20054);
        """)
    return folder


def test_a_clone_becomes_records_and_what_is_left_out_is_said(tmp_path):
    out = tmp_path / "new" / "geoquery"
    status, shown, _ = run_in_process(text2sql_data, tiny_clone(tmp_path / "clone"), out)

    assert status == 0
    records = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    largest = "SELECT t1.city_name FROM city AS t1 WHERE t1.population = (SELECT MAX(t2.population) FROM city AS t2)"
    rows = [("how big is austin", "SELECT population FROM city WHERE city_name = 'austin'", "train", "test"),
            ("what is the population of coeur d'alene", "SELECT population FROM city WHERE city_name = 'coeur d''alene'", "dev", "test"),
            ("how many live in the capital", "SELECT population FROM city WHERE city_name = 'boise'", "train", "test"),
            ("what is the largest city", largest, "train", "train"), ("which city is the largest", largest, "test", "train"),
            ("how many cities are there", "SELECT COUNT(1) FROM city", None, "3")]
    assert [(r["question"], r["sql"], r.get("split"), r["query_split"]) for r in records] == rows
    assert [(r["id"], r["db_id"]) for r in records] == [(number, "geography") for number in range(6)]
    assert shown.splitlines() == [
        f"{out}/questions.jsonl: 6 questions (3 train, 1 dev, 1 test, 1 without a split)",
        "left out 2 questions: the SQL fails (no such column: CITYalias0.MAYOR)", "left out 1 question: the result is empty"]
    dataset = load_own(out / "questions.jsonl", out, "dev")
    assert len(dataset.examples) == 2 and dataset.databases == {"geography": out / "geography.sqlite"}


@pytest.mark.parametrize("sql, plain", [
    ("SELECT AVG ( Aalias0.X ) , COUNT( * ) FROM A AS Aalias0 , B AS Balias0 WHERE Aalias0.ID = Balias0.ID ;",
     "SELECT AVG(a.x) , COUNT(*) FROM a , b WHERE a.id = b.id"),
    ("SELECT Balias0.X FROM A AS Aalias0 , B AS Balias0 , A AS Aalias1 WHERE Aalias0.X = Aalias1.X",
     "SELECT b.x FROM a AS t1 , b , a AS t2 WHERE t1.x = t2.x"),
    ("SELECT MAX( DERIVED_TABLEalias0.DERIVED_FIELDalias0 ) FROM ( SELECT Aalias0.X , COUNT( 1 ) AS DERIVED_FIELDalias0 "
     "FROM A AS Aalias0 GROUP BY Aalias0.X ) AS DERIVED_TABLEalias0 ;",
     "SELECT MAX(derived0.field0) FROM (SELECT x , COUNT(1) AS field0 FROM a GROUP BY x) AS derived0"),
    ("SELECT Aalias0.* FROM A AS Aalias0 WHERE Aalias0.X IN ( \"( Aalias0.X ) ;\" , 'it''s' )",
     "SELECT * FROM a WHERE x IN ('( Aalias0.X ) ;' , 'it''s')")])
def test_queries_are_rewritten_as_people_write_them(sql, plain):
    assert plain_sql(sql) == plain


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(text2sql_data).failed == 0


def test_the_longest_variable_is_replaced():
    values = {"name1": "a", "name10": "b", "city_name1": "c"}
    assert fill("name10, name1 in city_name1", values) == "b, a in c" and fill("no name1", {}) == "no name1"


def without(name):
    """The first query without a field, its own or its sentences'."""
    first = {key: value for key, value in QUERIES[0].items() if key != name}
    if name in ("text", "question-split"):
        first["sentences"] = [{key: value for key, value in first["sentences"][0].items() if key != name}]
    return [QUERIES[1], first]


@pytest.mark.parametrize("queries, message", [
    *((without(name), f"query 2: field '{name}' is missing or not a {kind}") for name, kind in
      {"sql": "list", "query-split": "str", "variables": "list", "sentences": "list", "text": "str", "question-split": "str"}.items()),
    ([QUERIES[0] | {"sql": []}], "query 1: field 'sql' must hold a list of texts"),
    ({"sql": []}, "geography.json must hold a list of queries, not dict"),
    ([QUERIES[2]], "none of the queries of geography returns a row"),
    ([query('SELECT CITYalias0.CITY_NAME FROM CITY AS CITYalias0 WHERE CITYalias0.CITY_NAME = "population" OR "city_name" = CITYalias0.CITY_NAME', ("?", "train", {}))],
     "query 1: the result of the query changes when it is rewritten as SELECT city_name FROM city")])  # "city_name" is a column, 'city_name' a text
def test_what_is_missing_or_changes_a_result_is_one_sentence(tmp_path, queries, message):
    status, _, error = run_in_process(text2sql_data, tiny_clone(tmp_path / "clone", queries), tmp_path / "out")
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_missing_files_and_folders_are_one_sentence(tmp_path):
    clone = tiny_clone(tmp_path / "clone")
    database = clone / "data" / "geography-db.added-in-2020.sqlite"
    (tmp_path / "file").touch()
    for arguments, message in [
            ((tmp_path / "none", tmp_path), f"cannot read {tmp_path}/none/data/geography.json: No such file or directory"),
            ((clone, tmp_path, "--database", "atis"), f"cannot read {clone}/data/atis.json: No such file or directory"),
            ((clone, tmp_path / "file" / "out"), f"cannot write {tmp_path}/file/out/geography.sqlite: Not a directory")]:
        assert run_in_process(text2sql_data, *arguments) == (2, "", f"error: {message}\n")
    database.write_text("no database")
    assert run_in_process(text2sql_data, clone, tmp_path)[2] == f"error: cannot read {database}: it is not a SQLite database\n"
    database.unlink()
    assert f"{clone}/data has no SQLite database geography-db*.sqlite" in run_in_process(text2sql_data, clone, tmp_path)[2]


def test_geoquery_is_what_was_measured_with(tmp_path, shared_data):
    """Record for record, and the database byte for byte."""
    status, shown, _ = run_in_process(text2sql_data, shared_data / "text2sql-data", tmp_path)
    assert status == 0 and "left out 28 questions: the result is empty\n" in shown
    assert sum(int(line.split()[2]) for line in shown.splitlines() if "the SQL fails" in line) == 5

    made, expected = ([json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
                      for folder in (tmp_path, shared_data / "geoquery"))
    assert made == expected and Counter(record["split"] for record in made) == {"train": 526, "dev": 48, "test": 270}
    assert (tmp_path / "geography.sqlite").read_bytes() == (shared_data / "geoquery" / "geography.sqlite").read_bytes()


def test_traces_writes_a_few_traces_and_the_answers_to_the_other_training_questions(tmp_path):
    clone, out = tiny_clone(tmp_path / "clone"), tmp_path / "out"
    status, shown, _ = run_in_process(text2sql_data, clone, out, "--traces", 2, "--seed", 3)

    def read(name):
        return [json.loads(line) for line in (out / name).read_text().splitlines()]

    questions, traces, answers = read("questions.jsonl"), read("traces.jsonl"), read("answers.jsonl")
    assert status == 0 and shown.splitlines()[-2:] == [
        f"{out}/traces.jsonl: 2 traces", f"{out}/answers.jsonl: all questions, 2 with an answer in place of SQL"]
    chosen = {trace["id"] for trace in traces}
    train = {q["id"] for q in questions if q.get("split", "train") == "train"}
    assert len(chosen) == 2 and chosen < train and all(trace["trace"].startswith("tables city") for trace in traces)
    values = {"how big is austin": [[345496]], "how many live in the capital": [[102249]],
              "what is the largest city": [["austin"]], "how many cities are there": [[3]]}
    for question, record in zip(questions, answers, strict=True):
        if question["id"] in train - chosen:
            assert "sql" not in record and record["answer"] == values[question["question"]]
        else:
            assert record == question
    run_in_process(text2sql_data, clone, tmp_path / "again", "--traces", 2, "--seed", 3)
    assert (tmp_path / "again" / "traces.jsonl").read_text() == (out / "traces.jsonl").read_text()


@pytest.mark.parametrize("count", [-1, 5])
def test_more_traces_than_training_questions_are_refused(tmp_path, count):
    status, _, errors = run_in_process(text2sql_data, tiny_clone(tmp_path / "clone"), tmp_path / "out", "--traces", count)
    assert status == 2 and f"--traces is {count}; it must be from 1 to the number of training questions, 4" in errors
