"""The atomic reward: equal for forms of one query, below 1 for different ones, quick and safe on any input."""

import json
import math
import os
import random
import re
import sqlite3
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_credit import atomic
from partial_credit.atomic import atomic_operations, atomic_reward, rarity, shape_atomic

SCHEMA = {"singer": ["singer_id", "name", "country", "age"], "song": ["song_id", "singer_id", "title", "sales", "year"],
          "friend": ["a_id", "b_id", "since"]}

# (left, right): the same query. Those after SCHEMA ONLY need the schema to know it.
EQUIVALENT = [
    ("SELECT name FROM singer WHERE age > 30", "select  NAME\nfrom Singer -- the names\nwhere AGE>30 ;"),
    ("SELECT name FROM singer", "SELECT /* all */ name FROM singer"),
    ("SELECT name FROM singer", "SELECT `name` FROM [singer]"),
    ('SELECT "name" FROM "singer" WHERE "age" > 3', "SELECT name FROM singer WHERE age > 3"),
    ("SELECT T1.name FROM singer AS T1", "SELECT zed.name FROM singer AS zed"),
    ("SELECT T1.name FROM singer AS T1", "SELECT T1.name FROM singer T1"),
    ("SELECT T1.name FROM singer AS T1", "SELECT singer.name FROM singer"),
    ("SELECT T1.name FROM singer AS T1", "SELECT name FROM singer"),
    ("SELECT name AS n FROM singer", "SELECT name n FROM singer"),
    ("SELECT T1.name, T2.title FROM singer T1 JOIN song T2 ON T1.singer_id = T2.singer_id",
     "SELECT b.name, a.title FROM song AS a JOIN singer AS b ON a.singer_id = b.singer_id"),
    ("SELECT s.name FROM singer s JOIN song t ON s.singer_id = t.singer_id",
     "SELECT s.name FROM singer s INNER JOIN song t ON t.singer_id = s.singer_id"),
    ("SELECT s.name FROM singer s JOIN song t ON s.singer_id = t.singer_id WHERE t.year = 3",
     "SELECT s.name FROM singer s, song t WHERE t.year = 3 AND s.singer_id = t.singer_id"),
    ("SELECT s.name FROM singer s JOIN song t ON s.singer_id = t.singer_id",
     "SELECT s.name FROM singer s CROSS JOIN song t WHERE s.singer_id = t.singer_id"),
    ("SELECT s.name FROM singer s JOIN song t ON s.singer_id = t.singer_id",
     "SELECT s.name FROM singer s JOIN song t USING (singer_id)"),
    ("SELECT s.name FROM singer s JOIN song t USING ( singer_id )",
     "SELECT s.name FROM song t JOIN singer s USING(SINGER_ID)"),
    ("SELECT s.name FROM singer s LEFT JOIN song t ON s.singer_id = t.singer_id",
     "SELECT s.name FROM singer s LEFT OUTER JOIN song t ON t.singer_id = s.singer_id"),
    ("SELECT s.name FROM (singer s JOIN song t ON s.singer_id = t.singer_id) JOIN friend f ON f.a_id = s.singer_id",
     "SELECT s.name FROM friend f JOIN song t JOIN singer s ON s.singer_id = t.singer_id AND f.a_id = s.singer_id"),
    ("SELECT name FROM singer WHERE age = 3", "SELECT name FROM singer WHERE 3 = age"),
    ("SELECT name FROM singer WHERE age = 3", "SELECT name FROM singer WHERE age == 3"),
    ("SELECT name FROM singer WHERE age <> 3", "SELECT name FROM singer WHERE 3 != age"),
    ("SELECT name FROM singer WHERE age IS 3", "SELECT name FROM singer WHERE 3 IS age"),
    ("SELECT name FROM singer WHERE age IS 3", "SELECT name FROM singer WHERE age IS NOT DISTINCT FROM 3"),
    ("SELECT name FROM singer WHERE age IS NOT 3", "SELECT name FROM singer WHERE age IS DISTINCT FROM 3"),
    ("SELECT name FROM singer WHERE age IS NULL", "SELECT name FROM singer WHERE age ISNULL"),
    ("SELECT name FROM singer WHERE age IS NOT NULL", "SELECT name FROM singer WHERE age NOTNULL"),
    ("SELECT name FROM singer WHERE age NOT NULL", "SELECT name FROM singer WHERE NOT age IS NULL"),
    ("SELECT name FROM singer WHERE age < singer_id", "SELECT name FROM singer WHERE singer_id > age"),
    ("SELECT name FROM singer WHERE age >= 3", "SELECT name FROM singer WHERE 3 <= age"),
    ("SELECT name FROM singer WHERE age = 3 AND name = 'x'", "SELECT name FROM singer WHERE name = 'x' AND age = 3"),
    ("SELECT name FROM singer WHERE age = 3 OR name = 'x'", "SELECT name FROM singer WHERE (name = 'x' OR (age = 3))"),
    ("SELECT name FROM singer WHERE age = 1 AND (age = 2 AND age = 3)",
     "SELECT name FROM singer WHERE (age = 3 AND age = 1) AND age = 2"),
    ("SELECT name FROM singer WHERE age BETWEEN 3 AND 9", "SELECT name FROM singer WHERE age <= 9 AND 3 <= age"),
    ("SELECT name FROM singer WHERE age NOT BETWEEN 3 AND 9", "SELECT name FROM singer WHERE age > 9 OR age < 3"),
    ("SELECT name FROM singer WHERE age NOT BETWEEN 3 AND 9", "SELECT name FROM singer WHERE NOT (age BETWEEN 3 AND 9)"),
    ("SELECT name FROM singer WHERE NOT age = 3", "SELECT name FROM singer WHERE age != 3"),
    ("SELECT name FROM singer WHERE NOT (age < 3 OR name = 'x' AND country IS NULL)",
     "SELECT name FROM singer WHERE age >= 3 AND (name <> 'x' OR country IS NOT NULL)"),
    ("SELECT name FROM singer WHERE NOT NOT age > 3", "SELECT name FROM singer WHERE (age > 3)"),
    ("SELECT name FROM singer WHERE age BETWEEN 3 AND 9 OR age = 1",
     "SELECT name FROM singer WHERE 1 = age OR (age >= 3 AND age <= 9)"),
    ("SELECT name FROM singer WHERE age IN (1, 2)", "SELECT name FROM singer WHERE age IN (2,1)"),
    ("SELECT name FROM singer WHERE age NOT IN (1, 2)", "SELECT name FROM singer WHERE NOT age IN (2,1)"),
    ("SELECT name FROM singer WHERE name NOT LIKE 'a%'", "SELECT name FROM singer WHERE NOT (name LIKE 'a%')"),
    ("SELECT name FROM singer WHERE name = 'France'", 'SELECT name FROM singer WHERE name = "France"'),
    ("SELECT name FROM singer ORDER BY age", "SELECT name FROM singer ORDER BY age ASC"),
    ("SELECT name, age FROM singer ORDER BY 2", "SELECT name, age FROM singer ORDER BY age"),
    ("SELECT country, count(*) FROM singer GROUP BY 1", "SELECT country, count(*) FROM singer GROUP BY country"),
    ("SELECT country, count(*) AS n FROM singer GROUP BY country ORDER BY n DESC",
     "SELECT country, COUNT ( * ) FROM singer GROUP BY country ORDER BY count(*) DESC"),
    ("SELECT country, count(*) n FROM singer GROUP BY country HAVING n > 1",
     "SELECT country, count(*) FROM singer GROUP BY country HAVING count(*) > 1"),
    ("SELECT count(*) FROM singer GROUP BY country, age", "SELECT count(*) FROM singer GROUP BY age, country"),
    ("SELECT COUNT( * ) FROM singer", "SELECT count(*) FROM singer"),
    ("SELECT DISTINCT (name) FROM singer", "SELECT DISTINCT name FROM singer"),
    ("SELECT ((age)) + (2) FROM singer", "SELECT 2 + age FROM singer"),
    ("SELECT (age * 2) + 1 FROM singer", "SELECT age * 2 + 1 FROM singer"),
    ("SELECT name FROM singer LIMIT 2, 5", "SELECT name FROM singer LIMIT 5 OFFSET 2"),
    ("SELECT name FROM singer WHERE age = (SELECT max(x.age) FROM singer x)",
     "SELECT name FROM singer AS q WHERE (SELECT max(age) FROM singer) = q.age"),
    ("SELECT name FROM singer s WHERE EXISTS (SELECT 1 FROM song t WHERE t.singer_id = s.singer_id)",
     "SELECT name FROM singer AS A WHERE EXISTS (SELECT 1 FROM song AS B WHERE A.singer_id = B.singer_id)"),
    ("SELECT name FROM singer UNION SELECT title FROM song", "SELECT title FROM song UNION SELECT name FROM singer"),
    ("SELECT d.n FROM (SELECT count(*) AS n FROM singer) AS d", "SELECT m FROM (SELECT count(*) AS m FROM singer)"),
    ("WITH c AS (SELECT age FROM singer) SELECT max(age) FROM c",
     "WITH kids AS (SELECT T.age FROM singer T) SELECT max(kids.age) FROM kids"),
    ("SELECT a.name FROM singer a JOIN singer b ON a.age = b.singer_id WHERE b.country = 'Peru'",
     "SELECT x.name FROM singer y JOIN singer x ON y.singer_id = x.age WHERE y.country = 'Peru'"),
    ("SELECT a.name, b.name FROM friend f JOIN singer a ON f.a_id = a.singer_id JOIN singer b ON f.b_id = b.singer_id",
     "SELECT a.name, b.name FROM singer b JOIN friend f ON b.singer_id = f.b_id JOIN singer a ON f.a_id = a.singer_id"),
    ("SELECT sum(age) OVER w FROM singer WINDOW w AS (PARTITION BY country ORDER BY age)",
     "SELECT sum(age) OVER (PARTITION BY country ORDER BY age ASC) FROM singer"),
    ("SELECT sum(age) OVER (ORDER BY age ROWS 1 PRECEDING) FROM singer",
     "SELECT sum(age) OVER (ORDER BY age ROWS BETWEEN 1 PRECEDING AND CURRENT ROW) FROM singer"),
    ("SELECT singer.* FROM singer", "SELECT * FROM singer"),
]
WITH_SCHEMA = [
    ("SELECT name, title FROM singer JOIN song ON singer.singer_id = song.singer_id WHERE age > 3",
     "SELECT s.name, t.title FROM song t JOIN singer s ON t.singer_id = s.singer_id WHERE s.age > 3"),
    ("SELECT name FROM singer s WHERE EXISTS (SELECT 1 FROM song WHERE year = age)",
     "SELECT s.name FROM singer s WHERE EXISTS (SELECT 1 FROM song t WHERE s.age = t.year)"),
    ("SELECT name FROM singer NATURAL JOIN song", "SELECT name FROM singer JOIN song USING (singer_id)"),
    ('SELECT name FROM singer WHERE "France" IN (country, name)',
     "SELECT name FROM singer WHERE 'France' IN (name, country)"),
    ("SELECT age FROM (SELECT age, singer_id FROM singer) JOIN friend ON a_id = singer_id",
     "SELECT d.age FROM friend f JOIN (SELECT age, singer_id FROM singer) d ON f.a_id = d.singer_id"),
]

# (left, right): different queries, a clause or construct each.
DIFFERENT = [
    ("SELECT name FROM singer", "SELECT name FROM song"),
    ("SELECT name FROM singer", "SELECT age FROM singer"),
    ("SELECT name FROM singer", "SELECT DISTINCT name FROM singer"),
    ("SELECT name, age FROM singer", "SELECT age, name FROM singer"),
    ("SELECT name, age, name FROM singer", "SELECT age, name, age FROM singer"),
    ("SELECT name, name FROM singer", "SELECT name FROM singer"),
    ("SELECT name FROM singer", "SELECT * FROM singer"),
    ("SELECT count(*) FROM singer", "SELECT count(name) FROM singer"),
    ("SELECT count(*) FROM singer", "SELECT * FROM singer"),
    ("SELECT singer.* FROM singer JOIN song", "SELECT song.* FROM singer JOIN song"),
    ("SELECT count(name) FROM singer", "SELECT count(DISTINCT name) FROM singer"),
    ("SELECT max(age) FROM singer", "SELECT min(age) FROM singer"),
    ("SELECT a.name FROM singer a LEFT JOIN song b ON a.singer_id = b.singer_id",
     "SELECT a.name FROM singer a JOIN song b ON a.singer_id = b.singer_id"),
    ("SELECT a.name FROM singer a LEFT JOIN song b ON a.singer_id = b.singer_id",
     "SELECT a.name FROM song b LEFT JOIN singer a ON a.singer_id = b.singer_id"),
    ("SELECT a.name FROM singer a LEFT JOIN song b ON a.singer_id = b.singer_id",
     "SELECT a.name FROM singer a RIGHT JOIN song b ON a.singer_id = b.singer_id"),
    ("SELECT a.name FROM singer a LEFT JOIN song b ON a.singer_id = b.singer_id",
     "SELECT a.name FROM singer a FULL JOIN song b ON a.singer_id = b.singer_id"),
    ("SELECT a.name FROM singer a LEFT JOIN song b ON a.singer_id = b.singer_id AND b.year = 1",
     "SELECT a.name FROM singer a LEFT JOIN song b ON a.singer_id = b.singer_id WHERE b.year = 1"),
    ("SELECT a.name FROM singer a LEFT JOIN song b ON a.singer_id = b.singer_id JOIN friend f ON f.a_id = b.singer_id",
     "SELECT a.name FROM singer a LEFT JOIN (song b JOIN friend f ON f.a_id = b.singer_id) "
     "ON a.singer_id = b.singer_id"),
    ("SELECT a.name FROM singer a JOIN song b ON a.singer_id = b.singer_id",
     "SELECT a.name FROM singer a JOIN song b ON a.singer_id = b.song_id"),
    ("SELECT a.name FROM singer a JOIN song b ON a.singer_id = b.singer_id", "SELECT a.name FROM singer a, song b"),
    ("SELECT * FROM singer a JOIN song b USING (singer_id)",
     "SELECT * FROM singer a JOIN song b ON a.singer_id = b.singer_id"),
    ("SELECT name FROM singer NATURAL JOIN song", "SELECT name FROM singer JOIN song"),
    ("SELECT a.name FROM singer a JOIN singer b ON a.age = b.singer_id WHERE a.country = 'Peru'",
     "SELECT a.name FROM singer a JOIN singer b ON a.age = b.singer_id WHERE b.country = 'Peru'"),
    ("SELECT T1.name FROM singer T1 JOIN song T2 ON T1.singer_id = T2.singer_id WHERE T1.singer_id = 1",
     "SELECT T1.name FROM singer T1 JOIN song T2 ON T1.singer_id = T2.singer_id WHERE T2.singer_id = 1"),
    ("SELECT a.name FROM singer a JOIN singer b ON a.age < b.age",
     "SELECT a.name FROM singer a JOIN singer b ON a.age > b.age"),
    ("SELECT name FROM singer WHERE age > 3", "SELECT name FROM singer"),
    ("SELECT name FROM singer WHERE age > 3", "SELECT name FROM singer WHERE age >= 3"),
    ("SELECT name FROM singer WHERE age > 3", "SELECT name FROM singer WHERE age < 3"),
    ("SELECT name FROM singer WHERE age = 3", "SELECT name FROM singer WHERE age <> 3"),
    ("SELECT name FROM singer WHERE age = 3", "SELECT name FROM singer WHERE age = 4"),
    ("SELECT name FROM singer WHERE name = 'a'", "SELECT name FROM singer WHERE name = 'A'"),
    ('SELECT name FROM singer WHERE name = "a"', 'SELECT name FROM singer WHERE name = "A"'),
    ("SELECT name FROM singer WHERE age = 1 AND age = 2", "SELECT name FROM singer WHERE age = 1 OR age = 2"),
    ("SELECT name FROM singer WHERE (age = 1 OR age = 2) AND (age = 3 OR age = 4)",
     "SELECT name FROM singer WHERE (age = 1 OR age = 3) AND (age = 2 OR age = 4)"),
    ("SELECT name FROM singer WHERE age = 1 OR (age = 2 AND age = 3)",
     "SELECT name FROM singer WHERE (age = 1 OR age = 2) AND age = 3"),
    ("SELECT name FROM singer WHERE NOT (age = 1 AND name = 'a')", "SELECT name FROM singer WHERE age <> 1 AND name <> 'a'"),
    ("SELECT name FROM singer WHERE NOT age < 3", "SELECT name FROM singer WHERE age > 3"),
    ("SELECT name FROM singer WHERE name LIKE 'a'", "SELECT name FROM singer WHERE name NOT LIKE 'a'"),
    ("SELECT name FROM singer WHERE name LIKE 'a'", "SELECT name FROM singer WHERE name GLOB 'a'"),
    (r"SELECT name FROM singer WHERE name LIKE 'a\%' ESCAPE '\'", r"SELECT name FROM singer WHERE name LIKE 'a\%'"),
    ("SELECT name FROM singer WHERE age IN (1, 2)", "SELECT name FROM singer WHERE age IN (1, 3)"),
    ("SELECT name FROM singer WHERE age IN (1, 2)", "SELECT name FROM singer WHERE age NOT IN (1, 2)"),
    ("SELECT name FROM singer WHERE age BETWEEN 1 AND 2", "SELECT name FROM singer WHERE age NOT BETWEEN 1 AND 2"),
    ("SELECT name FROM singer WHERE age BETWEEN 1 AND 2", "SELECT name FROM singer WHERE age BETWEEN 2 AND 1"),
    ("SELECT name FROM singer WHERE age IS NULL", "SELECT name FROM singer WHERE age IS NOT NULL"),
    ("SELECT name FROM singer WHERE age IS 3", "SELECT name FROM singer WHERE age = 3"),
    ("SELECT name FROM singer WHERE (age, name) = (1, 2)", "SELECT name FROM singer WHERE (name, age) = (1, 2)"),
    ("SELECT name FROM singer WHERE name = 'a' COLLATE NOCASE", "SELECT name FROM singer WHERE name = 'a'"),
    ("SELECT age - singer_id FROM singer", "SELECT age - name FROM singer"),
    ("SELECT age - singer_id FROM singer", "SELECT singer_id - age FROM singer"),
    ("SELECT age - (singer_id - 1) FROM singer", "SELECT age - singer_id - 1 FROM singer"),
    ("SELECT (age + 1) * 2 FROM singer", "SELECT age + 1 * 2 FROM singer"),
    ("SELECT age % 2 FROM singer", "SELECT age / 2 FROM singer"),
    ("SELECT name || country FROM singer", "SELECT country || name FROM singer"),
    ("SELECT -age FROM singer", "SELECT ~age FROM singer"),
    ("SELECT strftime('%Y', name) FROM singer", "SELECT strftime('%m', name) FROM singer"),
    ('SELECT strftime("%m", name) FROM singer', 'SELECT strftime("%M", name) FROM singer'),
    ("SELECT substr(name, 1, 2) FROM singer", "SELECT substr(name, 2, 2) FROM singer"),
    ("SELECT CASE WHEN age > 3 THEN 1 ELSE 2 END FROM singer",
     "SELECT CASE WHEN age > 3 THEN 2 ELSE 1 END FROM singer"),
    ("SELECT CASE WHEN age > 3 THEN 1 END FROM singer", "SELECT CASE WHEN age > 3 THEN 1 ELSE 0 END FROM singer"),
    ("SELECT CASE age WHEN 3 THEN 1 END FROM singer", "SELECT CASE singer_id WHEN 3 THEN 1 END FROM singer"),
    ("SELECT CAST(age AS REAL) FROM singer", "SELECT CAST(age AS INTEGER) FROM singer"),
    ("SELECT count(*) FILTER (WHERE age > 1) FROM singer", "SELECT count(*) FILTER (WHERE age > 2) FROM singer"),
    ("SELECT count(*) FROM singer GROUP BY country", "SELECT count(*) FROM singer GROUP BY age"),
    ("SELECT count(*) FROM singer GROUP BY country", "SELECT count(*) FROM singer GROUP BY country, age"),
    ("SELECT count(*) FROM singer GROUP BY country HAVING count(*) > 1",
     "SELECT count(*) FROM singer GROUP BY country HAVING count(*) > 2"),
    ("SELECT country FROM singer GROUP BY country HAVING country > 1",
     "SELECT country FROM singer WHERE country > 1 GROUP BY country"),
    ("SELECT name FROM singer ORDER BY age", "SELECT name FROM singer ORDER BY age DESC"),
    ("SELECT name FROM singer ORDER BY age, country", "SELECT name FROM singer ORDER BY country, age"),
    ("SELECT name FROM singer ORDER BY age", "SELECT name FROM singer ORDER BY age NULLS LAST"),
    ("SELECT name FROM singer LIMIT 1", "SELECT name FROM singer LIMIT 2"),
    ("SELECT name FROM singer LIMIT 1", "SELECT name FROM singer LIMIT 1 OFFSET 2"),
    ("SELECT name FROM singer LIMIT 1 OFFSET 1", "SELECT name FROM singer LIMIT 1 OFFSET 2"),
    ("SELECT name FROM singer UNION SELECT title FROM song",
     "SELECT name FROM singer UNION ALL SELECT title FROM song"),
    ("SELECT name FROM singer UNION SELECT title FROM song",
     "SELECT name FROM singer INTERSECT SELECT title FROM song"),
    ("SELECT name FROM singer EXCEPT SELECT title FROM song", "SELECT title FROM song EXCEPT SELECT name FROM singer"),
    ("SELECT name FROM singer UNION SELECT name FROM singer", "SELECT name FROM singer"),
    ("SELECT age FROM singer UNION ALL SELECT age FROM singer",
     "SELECT age FROM singer UNION ALL SELECT age FROM singer UNION ALL SELECT age FROM singer"),
    ("SELECT name FROM singer UNION SELECT title FROM song EXCEPT SELECT since FROM friend",
     "SELECT name FROM singer EXCEPT SELECT title FROM song UNION SELECT since FROM friend"),
    ("WITH c AS (SELECT age FROM singer) SELECT * FROM c", "WITH c AS (SELECT age + 1 FROM singer) SELECT * FROM c"),
    ("WITH c AS (SELECT age FROM singer), d AS (SELECT name FROM singer) SELECT * FROM c",
     "WITH c AS (SELECT age FROM singer), d AS (SELECT name FROM singer) SELECT * FROM d"),
    ("WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 5) SELECT n FROM c",
     "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 2 FROM c WHERE n < 5) SELECT n FROM c"),
    ("SELECT name FROM singer WHERE age IN (SELECT year FROM song)",
     "SELECT name FROM singer WHERE age IN (SELECT sales FROM song)"),
    ("SELECT name FROM singer WHERE age > (SELECT avg(age) FROM singer)",
     "SELECT name FROM singer WHERE age > (SELECT max(age) FROM singer)"),
    ("SELECT name FROM singer s WHERE age > (SELECT avg(t.age) FROM singer t WHERE t.country = s.country)",
     "SELECT name FROM singer s WHERE age > (SELECT avg(t.age) FROM singer t WHERE t.country = t.country)"),
    ("SELECT name FROM singer WHERE EXISTS (SELECT 1 FROM song)",
     "SELECT name FROM singer WHERE NOT EXISTS (SELECT 1 FROM song)"),
    ("SELECT (SELECT max(year) FROM song) FROM singer", "SELECT (SELECT max(sales) FROM song) FROM singer"),
    ("SELECT * FROM (SELECT age FROM singer)", "SELECT * FROM (SELECT name FROM singer)"),
    ("SELECT name FROM singer ORDER BY (SELECT max(year) FROM song)",
     "SELECT name FROM singer ORDER BY (SELECT min(year) FROM song)"),
    ("SELECT rank() OVER (ORDER BY age) FROM singer", "SELECT rank() OVER (ORDER BY age DESC) FROM singer"),
    ("SELECT rank() OVER (ORDER BY age) FROM singer", "SELECT row_number() OVER (ORDER BY age) FROM singer"),
    ("SELECT sum(age) OVER (PARTITION BY country) FROM singer", "SELECT sum(age) OVER (PARTITION BY name) FROM singer"),
    ("SELECT sum(age) OVER (ORDER BY age ROWS 1 PRECEDING) FROM singer",
     "SELECT sum(age) OVER (ORDER BY age RANGE 1 PRECEDING) FROM singer"),
    ("SELECT sum(age) OVER w FROM singer WINDOW w AS (ORDER BY age)",
     "SELECT sum(age) OVER w FROM singer WINDOW w AS (ORDER BY name)"),
    ("SELECT value FROM json_each('[1]')", "SELECT value FROM json_each('[2]')"),
    ("VALUES (1, 2)", "VALUES (2, 1)"),
    ("SELECT x'ab'", "SELECT x'ac'"),
]

# More of SQLite's grammar: parses here, and SQLite agrees that it is valid.
GRAMMAR = [
    "SELECT 1", "VALUES (1, 'a'), (2, 'b')", "SELECT * FROM (VALUES (1), (2))",
    "SELECT NULL, TRUE, 1e5, .5, 0x1F, ?1, :p",
    "SELECT main.singer.name FROM main.singer", "SELECT name FROM singer INDEXED BY singer_age WHERE age = 1",
    "SELECT name FROM singer NOT INDEXED", "SELECT name FROM singer WHERE name IN ()",
    "SELECT name FROM singer WHERE age IN friend_ids",
    "SELECT name FROM singer WHERE (age, name) IN (SELECT year, title FROM song)",
    "SELECT name FROM singer WHERE (age, name) IN (VALUES (1, 'a'))", "SELECT age AS 'the age' FROM singer",
    "SELECT name FROM singer ORDER BY age COLLATE NOCASE DESC NULLS FIRST LIMIT 1 + 1 OFFSET 2",
    "SELECT group_concat(DISTINCT name) FROM singer", "SELECT name -> '$.a', name ->> '$.b' FROM singer",
    "SELECT age & 1 | 2 << 3 >> 1 FROM singer", "SELECT - + ~ age, NOT age FROM singer",
    "SELECT a.*, b.title FROM singer a, song b",
    "SELECT name FROM singer WHERE age IS NOT DISTINCT FROM 3 AND name GLOB 'a*'",
    "SELECT sum(age) FILTER (WHERE age > 1) OVER (w ROWS BETWEEN UNBOUNDED PRECEDING AND 1 FOLLOWING EXCLUDE TIES) "
    "FROM singer WINDOW w AS (PARTITION BY country ORDER BY age), v AS (w)",
    "SELECT lag(age, 1, 0) OVER (ORDER BY age GROUPS BETWEEN 1 PRECEDING AND CURRENT ROW EXCLUDE NO OTHERS) FROM "
    "singer",
    "WITH a AS MATERIALIZED (SELECT 1 AS x), b(y) AS NOT MATERIALIZED (SELECT x FROM a) SELECT y FROM b UNION SELECT "
    "x FROM a",
    "WITH RECURSIVE up(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM up LIMIT 5) SELECT n FROM up",
    "SELECT name FROM singer WHERE age > (SELECT avg(age) FROM (SELECT age FROM singer WHERE age IN (SELECT year "
    "FROM song)))",
    "SELECT a.name FROM singer a NATURAL LEFT OUTER JOIN song b",
    "SELECT a.name FROM singer a FULL OUTER JOIN song b ON 1",
    "SELECT a.name FROM (singer a LEFT JOIN song b USING (singer_id)) JOIN friend f ON f.a_id = a.singer_id",
    "SELECT j.value FROM singer s, json_each(s.name) AS j WHERE j.key > 1",
    "SELECT cast(age AS decimal(10, 2)) FROM singer",
    "SELECT count(*), (SELECT 1 UNION SELECT 2 ORDER BY 1 LIMIT 1) FROM singer GROUP BY substr(name, 1, 1) HAVING "
    "max(age)",
    r"SELECT name FROM singer WHERE name LIKE '50\%' ESCAPE '\' AND country = 'a'",
    "SELECT name FROM singer WHERE age%singer_id = 1",
    "SELECT CASE age WHEN 1 THEN 'a' ELSE CASE WHEN age THEN 'b' END END FROM singer",
    "SELECT 'it''s', \"name\", [age], `age` FROM singer",
    "SELECT name FROM singer WHERE age NOT IN (1) AND age NOT BETWEEN 1 AND 2 AND name NOT GLOB 'a' AND age NOT NULL",
    "SELECT key FROM (SELECT 1 AS key)",
    "SELECT max(age, 3), total(age), iif(age, 1, 2), replace(name, 'a', 'b') FROM singer;",
]

NOT_SQL = [
    "", " ", ";", "I cannot answer", "error", "DROP TABLE singer", "INSERT INTO singer VALUES (1)",
    "```sql\nSELECT 1\n```",
    "SELECT", "SELECT FROM singer", "SELECT name FROM", "SELECT name WHERE", "SELECT name FROM singer WHERE",
    "SELECT name FROM singer WHERE age >", "SELECT name FROM singer WHERE age BETWEEN 1",
    "SELECT name FROM singer GROUP age",
    "SELECT name FROM singer LIMIT", "SELECT name FROM singer; SELECT 1", "SELECT (name FROM singer",
    "SELECT name) FROM singer", "SELECT a b c FROM singer", "SELECT name FROM singer s t u", "SELECT 'open",
    "SELECT name FROM singer WHERE age = 1 WHERE age = 2", "SELECT name WHERE age = 1 FROM singer", "SELECT CASE END",
    "SELECT count( FROM", "SELECT a FROM t JOIN u ON t.a = u.b 'x' WHERE 1",
]


@pytest.fixture(scope="module")
def music():
    """An in-memory database of SCHEMA with random rows, to check the pairs themselves."""
    connection, rng = sqlite3.connect(":memory:"), random.Random(0)
    for table, columns in SCHEMA.items():
        connection.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
        texts = {"name", "country", "title"}
        for _ in range(40):
            row = [rng.choice(("a", "A", "x", "Peru", "France", None)) if column in texts
                   else rng.choice((*range(10), None)) for column in columns]
            connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", row)
    connection.execute("CREATE INDEX singer_age ON singer (age)")
    connection.execute("CREATE TABLE friend_ids (id)")
    yield connection
    connection.close()


def bag(connection, sql):
    return sorted(connection.execute(sql).fetchall(), key=repr)


@pytest.mark.parametrize("left, right", EQUIVALENT)
def test_forms_of_one_query_score_one(left, right, music):
    for schema in (None, SCHEMA):
        assert atomic_operations(left, schema) == atomic_operations(right, schema)
        assert atomic_reward(left, right, schema) == atomic_reward(right, left, schema) == 1.0
    assert bag(music, left) == bag(music, right)


@pytest.mark.parametrize("left, right", EQUIVALENT[:8] + DIFFERENT[:8])
def test_rare_operations_weigh_more(left, right):
    """By hand, and what holds of the unweighted overlap: symmetric, 1 for equal sets, none for a set without common."""
    weight = rarity([("SELECT name FROM singer", SCHEMA)] * 6 + [("SELECT name FROM singer WHERE age > 30", SCHEMA)] * 2)
    assert weight("where singer.age > 30") == math.log(10 / 3) < weight("where singer.made_up > 1") == math.log(10)
    common = sorted(atomic_operations("SELECT name FROM singer", SCHEMA))
    assert all(weight(operation) == math.log(10 / 9) for operation in common) and len(common) == 2
    score = atomic_reward(left, right, SCHEMA, weight)
    assert score == atomic_reward(right, left, SCHEMA, weight) and 0 <= score <= 1
    assert (score == 1.0) == (atomic_reward(left, right, SCHEMA) == 1.0)
    assert (score == 0.0) == (atomic_reward(left, right, SCHEMA) == 0.0)
    gold, part = "SELECT name FROM singer WHERE age > 30", "SELECT name FROM singer"
    assert atomic_reward(part, gold, SCHEMA) == pytest.approx(2 / 3)
    assert atomic_reward(part, gold, SCHEMA, weight) == pytest.approx(
        2 * math.log(10 / 9) / (2 * math.log(10 / 9) + math.log(10 / 3)))


@pytest.mark.parametrize("left, right", WITH_SCHEMA)
def test_the_schema_tells_whose_a_bare_column_is(left, right, music):
    assert atomic_operations(left, SCHEMA) == atomic_operations(right, SCHEMA)
    assert atomic_reward(left, right, SCHEMA) == 1.0 and bag(music, left) == bag(music, right)


@pytest.mark.parametrize("left, right", DIFFERENT)
def test_different_queries_score_below_one(left, right):
    for schema in (None, SCHEMA):
        score = atomic_reward(left, right, schema)
        assert 0 <= score < 1 and score == atomic_reward(right, left, schema)
        assert atomic_reward(left, left, schema) == atomic_reward(right, right, schema) == 1.0


@pytest.mark.parametrize("sql", GRAMMAR)
def test_sqlite_grammar(sql, music):
    if "FULL OUTER" not in sql or sqlite3.sqlite_version_info >= (3, 39):
        music.execute("EXPLAIN " + sql, {"p": 1, "1": 1} if ":p" in sql else ())
    assert atomic_operations(sql) and atomic_operations(sql, SCHEMA)


@pytest.mark.parametrize("sql", NOT_SQL)
def test_what_is_not_one_select_has_no_operations(sql):
    assert atomic_operations(sql) == frozenset()
    assert atomic_reward(sql, sql) == 0.0 == atomic_reward(sql, "SELECT 1")


def test_any_two_queries_score_the_same_both_ways_and_one_only_with_the_same_operations():
    queries = [sql for pair in EQUIVALENT + WITH_SCHEMA + DIFFERENT for sql in pair] + GRAMMAR + NOT_SQL
    rng = random.Random(0)
    for _ in range(3000):
        left, right = rng.choice(queries), rng.choice(queries)
        operations, score = atomic_operations(left, SCHEMA), atomic_reward(left, right, SCHEMA)
        assert 0 <= score <= 1 and score == atomic_reward(right, left, SCHEMA)
        assert (score == 1) == (bool(operations) and operations == atomic_operations(right, SCHEMA)), (left, right)


def test_operations_read_well():
    sql = ("SELECT T1.name, count(*) FROM singer AS T1 JOIN song AS T2 ON T1.singer_id = T2.singer_id "
           "WHERE T2.year IN (SELECT since FROM friend) GROUP BY T1.name ORDER BY count(*) DESC LIMIT 3")
    assert atomic_operations(sql) == {
        "from singer", "from song", "on singer.singer_id = song.singer_id",
        "select singer.name", "select count(*)", "select singer.name then count(*)",
        "where song.year in {from friend; select friend.since}", "where in > from friend",
        "where in > select friend.since",
        "group by singer.name", "order by count(*) desc", "limit 3"}


def test_a_subquery_keeps_its_operations_to_itself():
    inner = "SELECT a.name FROM singer a JOIN song b ON a.singer_id = b.singer_id"
    for sql in (f"SELECT 1 FROM friend WHERE since IN ({inner})", f"SELECT * FROM ({inner})",
                f"WITH c AS ({inner}) SELECT * FROM c", f"SELECT ({inner})"):
        assert not atomic_operations(inner) & atomic_operations(sql)
    assert 0 < atomic_reward("SELECT 1 FROM friend WHERE since IN (SELECT name FROM singer)",
                             "SELECT 1 FROM friend WHERE since IN (SELECT name FROM singer WHERE age = 1)") < 1


def test_more_of_the_gold_never_scores_lower():
    gold = "SELECT name, age FROM singer WHERE age > 3 AND country = 'x' GROUP BY name HAVING count(*) > 1 ORDER BY age"
    steps = ["SELECT title FROM song", "SELECT title FROM singer", "SELECT name FROM singer",
             "SELECT name, age FROM singer", "SELECT name, age FROM singer WHERE age > 3",
             "SELECT name, age FROM singer WHERE age > 3 AND country = 'x'",
             gold.split(" HAVING")[0], gold.split(" ORDER")[0], gold]
    scores = [atomic_reward(sql, gold) for sql in steps]
    assert scores[0] == 0 and scores[-1] == 1 and all(a < b for a, b in zip(scores, scores[1:], strict=False))


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30), min_size=1))
def test_monotone_in_the_overlap(found, gold):
    found = {f"x{i}" for i in found}
    gold = {f"x{i}" for i in gold}
    for operation in gold - found:
        less, more = (atomic.jaccard(frozenset(x), frozenset(gold)) for x in (found, found | {operation}))
        assert less < more


def test_several_golds_take_the_best():
    golds = ["SELECT name FROM song", "SELECT name FROM singer"]
    assert atomic_reward("SELECT name FROM singer", golds) == 1.0 == atomic_reward("SELECT name FROM singer",
    tuple(golds))
    assert atomic_reward("SELECT name FROM singer", []) == 0.0
    assert atomic_reward("SELECT name FROM singer", golds[0]) == pytest.approx(0.0)


def test_shaping_is_the_papers():
    assert shape_atomic(0.0) == 0.0
    assert shape_atomic(1.0) == pytest.approx(0.05 + 0.95 * 0.79)
    assert shape_atomic(0.5) == pytest.approx(0.05 * 0.5 + 0.95 * 0.79 * 0.5**0.2)
    values = [shape_atomic(j / 100) for j in range(101)]
    assert values == sorted(values)


def test_same_operations_in_another_process():
    sql = ("SELECT a.name, b.name FROM singer a JOIN singer b ON a.age = b.age WHERE a.age IN "
           "(SELECT since FROM friend JOIN song ON a_id = song_id WHERE year > 3 AND sales < 2 OR title LIKE "
           "'very long text' AND singer_id BETWEEN 1 AND 2 AND year IN (1, 2, 3))")
    code = f"from atomic import atomic_operations\nprint(sorted(atomic_operations({sql!r})))"
    for seed in ("1", "2"):
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                                cwd=os.path.dirname(atomic.__file__), env={**os.environ, "PYTHONHASHSEED": seed}).stdout
        assert output.strip() == str(sorted(atomic_operations(sql)))


def test_names_in_leaves_strings_and_comments_out():
    assert {"a", "b c", "t"} <= atomic.names_in("SELECT A, `B c` FROM [t] -- x")
    assert not {"x", "y"} & atomic.names_in("SELECT 'x' FROM t /* y */ -- x")
    assert atomic.names_in("SELECT 'open") == set() == atomic.names_in("a" * 10**6)


def test_a_gold_is_parsed_once():
    atomic.cached_operations.cache_clear()
    for k in range(50):
        atomic_reward(f"SELECT name FROM singer LIMIT {k}", "SELECT name FROM singer", dict(SCHEMA))
    assert atomic.cached_operations.cache_info().misses == 51


# Hostile input.

HOSTILE = [
    "(" * 10_000, "SELECT " + "(" * 10_000 + "1" + ")" * 10_000, "x" * 1_000_000, "'" * 1_000_000,
    "SELECT 1 " + "-- " * 300_000, "SELECT " + "a," * 500_000 + "a",  # so far too long, from here too deep
    "SELECT " + "(" * 2_400 + "1" + ")" * 2_400, "SELECT * FROM " + "(" * 2_400 + "t" + ")" * 2_400,
    "SELECT " + "(SELECT " * 500 + "1" + ")" * 500, "SELECT * FROM " + "(SELECT * FROM " * 300 + "t" + ")" * 300,
    "SELECT " + "NOT " * 1_200 + "1", "SELECT " + "- " * 2_400 + "1", "SELECT " + "f(" * 1_600 + "1" + ")" * 1_600,
    "SELECT " + "case when 1 then " * 220 + "1" + " end" * 220]
PIECES_OF_TROUBLE = [
    "'", '"', "`", "[", "/*", "*/", "--", "# ", "#", "$", "$a$", "''", "\\'", "'\\", '"\\', "(", ")", "a ", "a.", "a$",
    "1", "1.", ".", "1e", "0x", "-", "- ", "/", "%", "%(", "?", ":", "@", "_", "´", "é", "\x00", "𝒜", "\n", "\t ", "\r",
    "left ", "group ", "order ", "end ", "not ", "union ", "asc nulls ", "at time zone '", "with' time zone '", "go ",
    "go 1", "double ", "lateral view ", "create or "]  # what the lexer's patterns begin with


def within(piece, start="SELECT ", end="", close="", limit=atomic.MAX_LENGTH):
    """`start piece piece ... end close close ...`, as long as the limit allows."""
    count = (limit - len(start) - len(end)) // len(piece + close)
    return start + piece * count + end + close * count


DEEP = 13  # nestings that are still parsed
GROWING = [  # what could double with each step, or take quadratic time
    within("a+", end="a"), within("a,", end="a"), within("a=1 OR ", "SELECT a FROM t WHERE ", "a"),
    within(" BETWEEN 1 AND 2", "SELECT a"), within("t t,", "SELECT a FROM ", "t"),
    within(" JOIN t USING (a)", "SELECT a FROM t"), within(" UNION SELECT 1", "SELECT 1"),
    within("a LIKE ", "SELECT * FROM t WHERE a LIKE ", "a"), within("(a OR ", "SELECT a FROM t WHERE ", "a", ")", 150),
    within("a||", "SELECT " + "x" * 2_000 + " AS a FROM t ORDER BY ", "a"),
    within("a,", "SELECT " + "sum(a) OVER w," * 200 + "1 FROM t WINDOW w AS (ORDER BY ", "a)"),
    "SELECT a FROM " + ",".join(f"t t{k}" for k in range(60)) + " WHERE "
    + " AND ".join(f"t{k % 60}.a=t{k % 59}.b" for k in range(240)),
    "SELECT " + "(SELECT a||a AS a FROM t ORDER BY a||" * DEEP + "a" + ")" * DEEP,
    "SELECT " + "".join(f"(SELECT a+a AS a FROM (SELECT a FROM t{k}) WHERE a IN " for k in range(DEEP)) + "(1)"
    + ")" * DEEP,
    "SELECT a FROM t WHERE " + "a IN (SELECT b FROM u WHERE " * DEEP + "1" + ")" * DEEP,
    "WITH " + ",".join(f"c{k} AS (SELECT a||a AS a FROM c{k - 1})" for k in range(1, 110)) + " SELECT a FROM c1"]


def seconds_of(sql):
    best = float("inf")
    for _ in range(3):  # the least of three: other processes must not decide
        atomic.cached_operations.cache_clear()
        start = time.process_time()
        atomic_operations(sql, SCHEMA)
        best = min(best, time.process_time() - start)
        if best < 0.05:
            break
    return best


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_input_is_refused_quickly(number):
    assert atomic_operations(HOSTILE[number]) == frozenset()
    assert seconds_of(HOSTILE[number]) < 0.3  # 0.1 on an idle machine


@pytest.mark.parametrize("piece", PIECES_OF_TROUBLE)
def test_nothing_below_the_length_limit_is_slow(piece):
    for start in ("", "SELECT ", "SELECT '"):
        sql = start + piece * ((atomic.MAX_LENGTH - 10) // len(piece))
        assert seconds_of(sql) < 0.3


@pytest.mark.parametrize("number", range(len(GROWING)))
def test_nothing_grows_without_bound(number):
    sql = GROWING[number]
    assert len(sql) <= atomic.MAX_LENGTH and seconds_of(sql) < 0.3
    assert sum(map(len, atomic_operations(sql))) < 5_000_000


def test_a_long_query_is_fine_but_not_one_of_countless_tokens():
    longest = "SELECT " + ", ".join(f"column_{k} + {k}" for k in range(250)) + " FROM singer"
    assert 4_000 < len(longest) <= atomic.MAX_LENGTH and atomic_reward(longest, longest) == 1.0
    assert atomic_operations("SELECT " + "a," * 1_400 + "a") and not atomic_operations("SELECT " + "a," * 1_600 + "a")


def test_reasonable_nesting_is_fine():
    assert atomic_reward("SELECT " + "(" * 40 + "1" + ")" * 40, "SELECT 1") == 1.0
    nested = "SELECT a FROM t0"
    for k in range(1, 10):
        nested = f"SELECT a FROM t{k} WHERE a IN ({nested})"
    assert atomic_reward(nested, nested) == 1.0


FRAGMENTS = ["SELECT", "FROM", "WHERE", "GROUP", "BY", "HAVING", "ORDER", "LIMIT", "OFFSET", "UNION", "ALL",
             "INTERSECT",
             "EXCEPT", "JOIN", "LEFT", "NATURAL", "ON", "USING", "AS", "WITH", "RECURSIVE", "VALUES", "DISTINCT",
             "CASE",
             "WHEN", "THEN", "ELSE", "END", "CAST", "IN", "IS", "NOT", "NULL", "LIKE", "ESCAPE", "BETWEEN", "AND", "OR",
             "EXISTS", "OVER", "PARTITION", "ROWS", "WINDOW", "FILTER", "COLLATE", "INDEXED", "(", "(", ")", ")", ",",
             ".",
             ";", "*", "+", "-", "=", "<", "<>", "||", "'x'", '"y"', "`z`", "[w]", "a", "b", "t1.a", "t2.b", "t1", "t2",
             "count(", "1", "2.5", "?1", ":p", "@", "$", "#", "\\", "--", "/*", "*/", "'"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40), st.text(max_size=30))
def test_random_words_raise_nothing(words, text):
    for sql in (" ".join(words), "SELECT a FROM t WHERE " + " ".join(words), " ".join(words) + text):
        operations = atomic_operations(sql, SCHEMA)
        assert atomic_reward(sql, sql, SCHEMA) == float(bool(operations))


def mutate(sql, rng):
    """One to three tokens or characters of a query dropped, doubled, swapped or replaced."""
    pieces = re.findall(r"\w+|\s+|.", sql, re.DOTALL)
    for _ in range(rng.randint(1, 3)):
        i, j = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        character = chr(rng.randrange(1, 0x3000))
        pieces[i] = rng.choice(("", pieces[i] * 2, pieces[j], rng.choice(FRAGMENTS), " ( " + pieces[i], character))
    return "".join(pieces)


# Real queries.

PIECES = re.compile(r"'(?:''|[^'])*'|\"(?:\"\"|[^\"])*\"|`[^`]*`|\[[^\]]*\]|\w+|<=|>=|<>|!=|\|\||[^\s\w]|\s+")
KEYWORDS = {"select", "from", "where", "group", "order", "having", "limit", "on", "join", "left", "right", "inner",
"outer",
            "full", "cross", "natural", "union", "intersect", "except", "as", "using", "and", "or", "not", "in",
            "between",
            "like", "is", "desc", "asc", "by", "set", "when", "case", "then", "else", "end", "distinct"}


def is_word(piece):
    return bool(re.fullmatch(r"[A-Za-z_]\w*", piece))


def find_aliases(words):
    """Lower-case table aliases: `table [AS] alias` after FROM, JOIN or a comma."""
    aliases = []
    for i, word in enumerate(words):
        follow = words[i + 1:i + 4] + [""] * 3
        alias = follow[2] if follow[1].lower() == "as" else follow[1]
        table = word.lower() in ("from", "join") or (word == "," and re.fullmatch(r"[Tt]\d", alias))
        if table and is_word(follow[0]) and is_word(alias) and alias.lower() not in KEYWORDS:
            aliases.append(alias.lower())
    return sorted(set(aliases))


def rewrite(sql, rng):
    """The same query with other aliases, letter case, white space and comments."""
    words = [piece for piece in PIECES.findall(sql) if not piece.isspace()]
    aliases = find_aliases(words)
    names = dict(zip(aliases, rng.sample([f"zz{k}q" for k in range(20)], len(aliases)), strict=True))
    text, previous = "", ""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        declared = previous.lower() == "as" or (is_word(previous) and previous.lower() not in KEYWORDS)
        if word.lower() in names and (after == "." or declared):
            word = names[word.lower()]
        if word[0] not in "'\"`[":
            word = rng.choice((word.upper(), word.lower(), word.capitalize()))
        text += "" if "." in (previous, word) else rng.choice((" ", "  ", "\n", "\t", " /* c */ "))
        text += word
        previous = word
    return text + rng.choice(("", ";", " ; ", " -- end"))


def real_queries(folder):
    """(db_id, SQL) of Spider dev and train and of BIRD superhero, and the schemas of Spider."""
    schemas = {}
    for database in json.loads((folder / "spider/tables.json").read_text()):
        columns = database["column_names_original"]
        schemas[database["db_id"]] = {table: [column for owner, column in columns if owner == number]
                                      for number, table in enumerate(database["table_names_original"])}
    queries = []
    for path, key in (("spider/dev", "query"), ("spider/train_spider", "query"), ("bird_superhero/dev", "SQL")):
        queries += [(record["db_id"], record[key]) for record in json.loads((folder / f"{path}.json").read_text())]
    return queries, schemas


def test_every_real_gold_equals_its_rewritten_self(shared_data):
    queries, schemas = real_queries(shared_data)
    rng, changed = random.Random(0), 0
    assert len(queries) == 1034 + 7000 + 129
    for database, sql in dict.fromkeys(queries):  # each once
        schema = schemas.get(database) if rng.random() < 0.5 else None
        other = rewrite(sql, rng)
        changed += "zz" in other.lower()
        assert atomic_operations(sql, schema), sql
        assert atomic_reward(sql, sql, schema) == 1.0
        assert atomic_reward(other, sql, schema) == 1.0, (sql, other)
    assert changed > 1_500  # the rewriter does find aliases


def test_no_wrong_prediction_of_two_systems_scores_one(shared_data):
    """Score 1 says "the same query", so the official evaluator must call it correct too."""
    queries, schemas = real_queries(shared_data)
    for system in ("dail_sql_gpt4", "graphix_3b_picard"):
        verdicts = json.loads((shared_data / f"predictions/{system}.official.json").read_text())
        predictions = (shared_data / f"predictions/{system}.sql").read_text().splitlines()
        scores = [atomic_reward(sql.split("\t")[0], gold, schemas[database])
                  for sql, (database, gold) in zip(predictions, queries[:1034], strict=True)]
        assert all(verdict for verdict, score in zip(verdicts, scores, strict=True) if score == 1)
        assert sum(score == 1 for score in scores) > 600


def test_mutated_queries_raise_nothing(shared_data):
    """2,000 here; FUZZ=100000 or `python bench/reward_speed.py --fuzz 100000` for more."""
    queries, schemas = real_queries(shared_data)
    rng = random.Random(1)
    for _ in range(int(os.environ.get("FUZZ", 2_000))):
        database, gold = rng.choice(queries)
        assert 0.0 <= atomic_reward(mutate(gold, rng), gold, schemas.get(database)) <= 1.0
