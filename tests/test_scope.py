"""prompts/scope.py: what a query may go on with, by the tables that it reads; prompts/scope_tokens.py: as tokens."""

import re

import pytest
import torch
from test_names import policy, refused  # noqa: F401 (a fixture)

from data import columns_of, load_dataset
from prompts.answer_format import AnswerFormat
from prompts.names import QUOTED, NameRules
from prompts.scope import WORD, Reader

SCHEMA = {"singer": ["singer_id", "name", "age", "birth date"], "concert": ["year", "singer_id", "length"], "song": ["song_id", "title", "singer_id"]}


def rule_of(policy, **style):  # noqa: F811
    return NameRules(policy, {"music": SCHEMA}, AnswerFormat(**style), scope=True).of("music")


@pytest.mark.parametrize("sql", [
    "SELECT name FROM singer", "SELECT NAME , count(*) FROM Singer WHERE Age > 3 GROUP BY Name HAVING COUNT(*) > 2 ORDER BY AVG(age) DESC LIMIT 1",
    "SELECT t1.name FROM singer AS t1 JOIN concert AS t2 ON t1.singer_id = t2.singer_id WHERE t2.year = 2014 AND length > 3",
    "SELECT T2.year FROM singer T1 JOIN concert T2 ON T1.singer_id = T2.singer_id", "SELECT concert.year FROM singer , concert WHERE singer.name = 'x'",
    "SELECT name FROM singer WHERE singer_id NOT IN (SELECT singer_id FROM concert WHERE concert.singer_id = singer.singer_id AND age = 1)",
    "SELECT (SELECT max(year) FROM concert WHERE concert.singer_id = s.singer_id) FROM singer AS s", "SELECT * FROM singer WHERE \"birth date\" = 'a'",
    "SELECT name FROM singer UNION SELECT title FROM song ORDER BY name", "SELECT length(name) FROM singer", "SELECT length FROM concert",
    "SELECT avg(d.field1) FROM (SELECT count(*) AS field1 , singer_id FROM concert GROUP BY singer_id) AS d WHERE field1 > 2", "SELECT age AS years FROM singer ORDER BY years",
    "WITH old AS (SELECT name FROM singer) SELECT name FROM old", "SELECT t1.name FROM singer AS t1 WHERE t1.age = (SELECT max(t2.age) FROM singer AS t2)",
    "SELECT name , title FROM singer JOIN song USING (singer_id) WHERE singer_id = 1.5", "SELECT name FROM singer NATURAL JOIN concert WHERE singer_id = 2e3",
    "SELECT t1.title FROM song AS t1 JOIN singer AS t3 ON t1.singer_id = t2.singer_id JOIN concert AS t2 ON t2.singer_id = t3.singer_id",
    "SELECT CASE WHEN age BETWEEN 1 AND 2 THEN 'a' ELSE 'b' END FROM singer", "SELECT rank() OVER (PARTITION BY name ORDER BY age ROWS BETWEEN 1 PRECEDING AND CURRENT ROW) FROM singer",
    "SELECT year FROM concert WHERE year IS NOT DISTINCT FROM 2014 EXCEPT SELECT age FROM singer"])
def test_what_is_right_is_allowed(policy, sql):  # noqa: F811
    assert refused(policy, rule_of(policy), f"<think> any words </think> {sql}") is None
    assert refused(policy, rule_of(policy, style="think-answer"), f"<think> any words </think> <answer> {sql} </answer>") is None
    assert refused(policy, rule_of(policy, lenient=True), f"<think> any words </think> ```sql\n{sql}\n```") is None


@pytest.mark.parametrize("sql, ending", [
    ("SELECT name FROM singer WHERE year = 1", "year = 1"),  # of another table
    ("SELECT t1.name FROM singer AS t1 WHERE t1.year = 1", "t1.year = 1"), ("SELECT singer.year FROM singer", ".year FROM singer"),
    ("SELECT name FROM singer WHERE t2.age = 1", "2.age = 1"), ("SELECT singer.name FROM singer AS t1 WHERE singer.age = 1", "WHERE singer.age = 1"),
    ("SELECT title FROM singer", "singer"), ("SELECT title , name FROM song", "end"),  # FROM lacks a table
    ("SELECT title , name FROM song WHERE song_id = 1", "WHERE song_id = 1"), ("SELECT t1.name FROM singer", "end"),
    ("SELECT age FROM singer WHERE age IN (SELECT title , year FROM song)", ")"), ("SELECT t1.title FROM singer AS t1", "singer AS t1"),
    ("SELECT name FROM singer , concert WHERE singer_id = 1", "singer_id = 1"),  # ambiguous
    ("SELECT name FROM singer WHERE length = 1", "= 1"),  # a function only
    ("SELECT name FROM singer WHERE count(*) > 1", "count(*) > 1"), ("SELECT name FROM singer WHERE age = 1 WHERE age = 2", "WHERE age = 2"),
    ("SELECT name FROM singer WHERE age 3", "3"), ("SELECT name FROM singer GROUP BY ORDER BY age", "ORDER BY age"),
    ("SELECT name FROM singer GROUPS BY age", "S BY age"), ("SELECT name FROM upper(name)", "upper(name)"), ("SELECT name FROM singer or x", " x"),
    ("SELECT x.title FROM (SELECT name FROM singer) AS x", "end")])
def test_what_is_out_of_scope_is_refused(policy, sql, ending):  # noqa: F811
    found = refused(policy, rule_of(policy), f"<think> x </think> {sql}")
    assert found is not None and found.strip() and ending.endswith(found.strip()), found


def test_what_a_subquery_in_from_shows_is_known(policy):  # noqa: F811
    reader = Reader(SCHEMA)
    inner = "SELECT a FROM (SELECT name , count(*) AS n FROM singer) AS d WHERE "
    assert reader.next(inner).names == {"name", "n", "a"} - {"a"}
    assert reader.next("SELECT a FROM (SELECT * FROM singer) AS d WHERE ").names is None
    assert reader.next("SELECT 1)") is None


def test_where_nothing_is_in_scope_the_rule_of_names_holds(policy):  # noqa: F811
    """A mask without a token would be no distribution."""
    rule = rule_of(policy)
    bits = rule.scope.narrow(torch.full_like(rule.scope.ends_word, -1), "SELECT name FROM singer WHERE year")
    assert bits.any()


def forbids(reader, sql, expressions) -> bool:
    """Whether the words of a query are not all allowed where they come; as ScopeTokens says for tokens."""
    bare = QUOTED.sub("''", sql)
    for start in [*(match.start() for match in WORD.finditer(bare) if re.match(r"\w", match[0])), len(bare) + 1]:
        after = reader.next(f"{bare} "[:start])
        if after is None:
            continue
        if after not in expressions:
            expressions[after] = re.compile(after.expression())
        if not expressions[after].fullmatch(bare[start:]):
            return True
    return False


def test_gold_queries_are_allowed_but_for_the_two_conventions(policy, shared_data):  # noqa: F811
    """24 of all 3,854 of Spider's training questions, of which every eighth is asked here. Those forbidden read the table of a column without a qualifier by a JOIN, or count aliases in another order; and one of Spider
    reads a table that its database lacks."""
    def count(name, *where, every=1):
        dataset = load_dataset(name, *where, seed=0, world="default")
        schemas, expressions = columns_of(dataset.databases), {}
        readers = {db_id: Reader(schema) for db_id, schema in schemas.items()}
        golds = sorted({(example.db_id, sql) for example in dataset.examples for sql in example.gold_sqls})[::every]
        lost = [gold for gold in golds if forbids(readers[gold[0]], gold[1], expressions)]
        rules = NameRules(policy, schemas, AnswerFormat(), scope=True)
        for db_id, sql in golds[::60]:  # the same by tokens
            assert (refused(policy, rules.of(db_id), f"<think> x </think> {sql}") is not None) is ((db_id, sql) in lost), sql
        return len(golds), len(lost)

    geoquery = shared_data / "geoquery"
    found = {"demo": count("demo", None, "test"), "superhero": count("bird", str(shared_data / "bird_superhero"), "dev"),
             **{split: count(str(geoquery / "questions.jsonl"), str(geoquery), split) for split in ("train", "test")},
             **{f"spider {split}": count("spider", str(shared_data / "spider"), split, every=every) for split, every in (("dev", 1), ("train", 8))}}
    assert found == {"demo": (385, 34), "superhero": (128, 1), "train": (375, 1), "test": (214, 0), "spider dev": (564, 0),
                     "spider train": (482, 1)}
