"""traces.py: lists by hand, and on every gold query of the real data."""

import random

import pytest

from data import columns_of, load_dataset
from partial_credit.traces import template_trace
from rewards import parse_completion

SCHEMA = {"singer": ["singer_id", "Name", "Country", "age"], "concert": ["concert_id", "singer_id", "year", "Ticket Price"],
          "order list": ["id", "a`b"]}


def test_the_list_names_tables_columns_and_clauses():
    sql = "SELECT T1.name FROM singer AS T1 LEFT JOIN concert AS T2 ON T1.singer_id = T2.singer_id WHERE year > 3 LIMIT 1"
    assert template_trace(sql, SCHEMA) == "tables singer concert ; columns singer_id Name year ; clauses join where limit"
    assert template_trace("SELECT age FROM singer WHERE age > (SELECT avg(age) FROM singer) ORDER  BY age", SCHEMA) == (
        "tables singer ; columns age ; clauses where order by subquery")


def test_a_backslash_ends_no_string():
    r"""sqlparse's own lexer takes \' for an escaped quote, and what comes after for a part of the string."""
    sql = r"SELECT name FROM singer WHERE country = 'C:\' AND age > 3 ORDER BY year LIMIT 1"
    assert template_trace(sql, SCHEMA) == "tables singer ; columns Name Country age ; clauses where order by limit"
    sql = r"SELECT name FROM singer WHERE country = '\' AND name = 'age where limit'"  # words in a string are no clauses
    assert template_trace(sql, SCHEMA) == "tables singer ; columns Name Country ; clauses where"


def test_columns_with_a_clause_in_their_name_are_no_clauses():
    assert template_trace("SELECT year_join FROM artist", {"artist": ["year_join"]}) == (
        "tables artist ; columns year_join ; clauses select")


@pytest.mark.parametrize("name, folder, split", [
    ("spider", "spider", "train"), ("spider", "spider", "dev"), ("bird", "bird_superhero", "dev")])
def test_every_gold_query_of_the_real_data_has_traces_that_are_read_back(shared_data, name, folder, split):
    data = load_dataset(name, shared_data / folder, split)
    schemas = columns_of(data.databases)
    queries = dict.fromkeys((example.gold_sqls[0], example.db_id) for example in data.examples)  # each once
    for sql, db_id in queries:
        trace = template_trace(sql, schemas[db_id])
        assert trace.startswith("tables ") and " ; clauses " in trace
        assert parse_completion(f"<think> {trace} </think> {sql}") == (trace, sql)


def test_no_query_however_broken_ends_in_an_exception():
    rng, sqls = random.Random(0), [
        "SELECT a.name , ( SELECT max ( year ) FROM concert AS c WHERE c.singer_id = a.singer_id ) FROM singer AS a JOIN "
        "concert AS b ON a.singer_id = b.singer_id WHERE b.year IN ( 1 , 2 ) GROUP BY a.name ORDER BY a.age DESC LIMIT 3",
        "WITH x AS ( SELECT name FROM singer ) SELECT name FROM x UNION SELECT t.n FROM ( SELECT country AS n FROM singer ) t"]
    extra = ("(", ")", ",", ".", ";", "select", "from", "where", "as", "with", "union", "order", "by", "limit", "group", "on",
             "using", "left", "'a'", '"b"', "`c`", "-", "not")
    for _ in range(400):
        words = rng.choice(sqls).split()
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(words))
            words[place:place + rng.randint(0, 1)] = [rng.choice(extra)] * rng.randint(0, 1)
        sql = " ".join(words)
        assert " ; clauses " in f" ; {template_trace(sql, SCHEMA)}"
