"""traces.py: plans and lists by hand for each clause, and on every gold query of the real data."""

import random

import pytest

from data import columns_of, load_dataset
from rewards import parse_completion
from text2sql.atomic import names_in
from text2sql.traces import TRACE_TEMPLATES, plan_trace, template_trace

SCHEMA = {"singer": ["singer_id", "Name", "Country", "age"], "concert": ["concert_id", "singer_id", "year", "Ticket Price"],
          "order list": ["id", "a`b"]}


@pytest.mark.parametrize("sql, plan", [
    ("SELECT count(*) FROM singer", "Use singer. Show count(*)."),
    ("select NAME from SINGER where country = 'France' and age > 30",
     "From singer: Name, Country, age. Keep rows where Country = 'France' and age > 30. Show Name."),
    ("SELECT DISTINCT country FROM singer WHERE name LIKE \"%B\\%\" OR age < -5 ;",
     "From singer: Country, Name, age. Keep rows where Name like \"%B\\%\" or age < -5. Show distinct Country."),
    ("SELECT T1.name, max(T2.year - 1) FROM singer AS T1 JOIN concert AS T2 ON T1.singer_id = T2.singer_id "
     "WHERE T2.year BETWEEN 2014 AND 2015 GROUP BY T1.name HAVING count(*) >= 2 ORDER BY T1.age DESC, name LIMIT 3",
     "From singer: Name, age. From concert: year. Join singer with concert on singer_id. Keep rows where concert.year "
     "between 2014 and 2015. Group by Name. Keep groups where count(*) >= 2. Sort by age descending, Name ascending. Take "
     "the first 3. Show Name, max(year - 1)."),
    ("SELECT T1.singer_id FROM singer T1 LEFT OUTER JOIN concert T2 ON T1.age = T2.year AND T2.year > 1, `order list`",
     "From singer: singer_id. Join singer left with concert on singer.age = concert.year and concert.year > 1, then with "
     "`order list`. Show singer.singer_id."),
    ("SELECT a.name FROM singer a JOIN singer b ON a.age = b.age WHERE b.name = 'Bo'",
     "From a (singer): Name. From b (singer): Name. Join a (singer) with b (singer) on age. Keep rows where b.Name = 'Bo'. "
     "Show a.Name."),
    ("SELECT T1.name FROM singer AS T1, singer AS T2 WHERE T1.age > T2.age",
     "From T1 (singer): Name, age. From T2 (singer): age. Join T1 (singer) with T2 (singer). Keep rows where T1.age > "
     "T2.age. Show T1.Name."),
    ("SELECT name FROM singer JOIN concert USING (singer_id) LIMIT 5, 2",
     "From singer: Name. Join singer with concert on singer_id. Skip the first 5. Take the first 2. Show Name."),
    ("SELECT name FROM singer WHERE age > (SELECT avg(age) FROM singer) AND singer_id NOT IN (SELECT singer_id FROM concert)",
     "For A: from singer: age; show avg(age). For B: from concert: singer_id; show singer_id. From singer: Name, age, "
     "singer_id. Keep rows where age > A and singer_id not in B. Show Name."),
    ("SELECT name FROM singer AS s WHERE EXISTS (SELECT 1 FROM concert WHERE concert.singer_id = s.singer_id)",
     "For A: from concert: singer_id; keep rows where singer_id = singer.singer_id; show 1. From singer: Name. Keep rows "
     "where exists A. Show Name."),
    ("SELECT name FROM singer WHERE age < 3 INTERSECT SELECT name FROM singer EXCEPT SELECT country FROM singer ORDER BY 1",
     "For A: from singer: Name, age; keep rows where age < 3; show Name. For B: from singer: Name; show Name. For C: from "
     "singer: Country; show Country. Show the rows that A and B share. Show the rows of these that are not in C. Sort by 1 "
     "ascending."),
    ("SELECT year FROM concert UNION ALL SELECT age FROM singer UNION SELECT 1",
     "For A: from concert: year; show year. For B: from singer: age; show age. For C: show 1. Show all rows of A and of B. "
     "Show the rows of these and of C, each once."),
    ("SELECT t.n FROM (SELECT count(*) AS n FROM singer GROUP BY country) AS t WHERE t.n > 1",
     "For A: from singer: Country; group by Country; show count(*) as n. From A: n. Keep rows where n > 1. Show n."),
    ("SELECT count(*) AS year FROM concert", "Use concert. Show count(*) as year."),
    ("WITH old AS (SELECT name, age FROM singer WHERE age > 40) SELECT name FROM old ORDER BY age",
     "For old: from singer: Name, age; keep rows where age > 40; show Name, age. From old: name, age. Sort by age ascending. "
     "Show name."),
    ("SELECT [Ticket Price], cast(year AS real), CASE WHEN year > 1 THEN 'new' ELSE \"old\" END FROM concert",
     "From concert: `Ticket Price`, year. Show `Ticket Price`, cast(year as real), case when year > 1 then 'new' else "
     "\"old\" end."),
    ("SELECT `a``b` FROM `order list`", "From `order list`: `a``b`. Show `a``b`."),
    ("SELECT nothing, concert.x FROM singer", "Use singer. Show nothing, concert.x."),
    ("VALUES (1, 2)", "Show the rows (1, 2)."),
    ("SELECT name FROM singer WHERE", "tables singer ; columns Name ; clauses where"),  # what nobody can read
    ("SELECT name FROM singer; DROP TABLE singer", "tables singer ; columns Name ; clauses select"),
    ("", "clauses select")])
def test_plans_by_hand(sql, plan):
    assert plan_trace(sql, SCHEMA) == plan


def test_the_list_names_tables_columns_and_clauses():
    sql = "SELECT T1.name FROM singer AS T1 LEFT JOIN concert AS T2 ON T1.singer_id = T2.singer_id WHERE year > 3 LIMIT 1"
    assert template_trace(sql, SCHEMA) == "tables singer concert ; columns singer_id Name year ; clauses join where limit"
    assert template_trace("SELECT age FROM singer WHERE age > (SELECT avg(age) FROM singer) ORDER  BY age", SCHEMA) == (
        "tables singer ; columns age ; clauses where order by subquery")


def test_a_backslash_ends_no_string():
    r"""sqlparse's own lexer takes \' for an escaped quote, and what comes after for a part of the string."""
    sql = r"SELECT name FROM singer WHERE country = 'C:\' AND age > 3 ORDER BY year LIMIT 1"
    assert template_trace(sql, SCHEMA) == "tables singer ; columns Name Country age ; clauses where order by limit"
    assert r"Keep rows where Country = 'C:\' and age > 3." in plan_trace(sql, SCHEMA)
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
    for number, (sql, db_id) in enumerate(queries):
        schema = schemas[db_id]
        listed, plan = template_trace(sql, schema), plan_trace(sql, schema)
        for trace in (listed, plan):
            assert "```" not in trace and ";  " not in trace
            assert parse_completion(f"<think> {trace} </think> {sql}") == (trace, sql)
        if number % 10 == 0:
            assert [write(sql, schema) for write in TRACE_TEMPLATES.values()] == [listed, plan]
        assert plan != listed and "Show " in plan  # none is one that cannot be planned
        for table in {table.lower() for table in schema} & names_in(sql):
            assert table in plan.lower()


def test_no_query_however_broken_ends_in_an_exception():
    rng, sqls = random.Random(0), [
        "SELECT a.name , ( SELECT max ( year ) FROM concert AS c WHERE c.singer_id = a.singer_id ) FROM singer AS a JOIN "
        "concert AS b ON a.singer_id = b.singer_id WHERE b.year IN ( 1 , 2 ) GROUP BY a.name ORDER BY a.age DESC LIMIT 3",
        "WITH x AS ( SELECT name FROM singer ) SELECT name FROM x UNION SELECT t.n FROM ( SELECT country AS n FROM singer ) t"]
    extra = ("(", ")", ",", ".", ";", "select", "from", "where", "as", "with", "union", "order", "by", "limit", "group", "on",
             "using", "left", "'a'", '"b"', "`c`", "-", "not")
    planned = 0
    for _ in range(400):
        words = rng.choice(sqls).split()
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(words))
            words[place:place + rng.randint(0, 1)] = [rng.choice(extra)] * rng.randint(0, 1)
        sql = " ".join(words)
        planned += plan_trace(sql, SCHEMA) != template_trace(sql, SCHEMA)
    assert 30 < planned < 370
