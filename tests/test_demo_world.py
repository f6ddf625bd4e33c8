"""The demo world: balanced, reproducible, disjoint splits whose gold SQL runs and means something."""

import re
import sqlite3
from collections import Counter

import pytest

from questions import demo_world


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return {split: demo_world.load(split, folder) for split in demo_world.SPLITS}


def test_sizes_and_balance(splits):
    for split, (records, databases) in splits.items():
        assert Counter(r["difficulty"] for r in records) == demo_world.SIZES[split]
        assert len({(r["db_id"], r["question"]) for r in records}) == len(records)
        assert {r["db_id"] for r in records} == databases.keys()
    assert len(splits["train"][1]) >= 8 and sum(demo_world.SIZES["test"].values()) >= 300
    # no form of question carries a tier: the most frequent SQL shape of a tier stays under half of it
    for tier in demo_world.TIERS:
        shapes = Counter(_shape(r["sql"]) for r in splits["train"][0] if r["difficulty"] == tier)
        assert max(shapes.values()) < 0.5 * shapes.total() and len(shapes) >= 5


def _shape(sql):
    return re.sub(r"'[^']*'|\b\d+\b|\b[a-z_]+\b|[<>]|AVG|MIN|MAX|SUM|ASC|DESC", "?", sql)


def test_held_out_gold_sql_occurs_in_no_other_split(splits):
    sqls = {split: {(r["db_id"], r["sql"]) for r in records} for split, (records, _) in splits.items()}
    for held_out in ("dev", "test"):
        for other in demo_world.SPLITS:
            assert other == held_out or not sqls[held_out] & sqls[other]
    assert not splits["unseen"][1].keys() & splits["train"][1].keys()


def test_traces_only_in_cold_whose_upper_tiers_are_in_plain_words(splits):
    others = {word for text in demo_world.OTHER_WORDS.values() for word in text.replace("_", " ").split()}
    others -= {"of", "least", "cost"}  # "at least one of", and a column of its own in one database
    for split, (records, _) in splits.items():
        assert all(bool(r["trace"]) == (split == "cold") for r in records)
    spoken = {word for r in splits["train"][0] for word in r["question"].split()}
    assert len(others & spoken) > 0.8 * len(others)
    plain = {word for r in splits["cold"][0] if r["difficulty"] != "simple" for word in r["question"].split()}
    assert not others & plain


def test_half_the_upper_traces_of_cold_slip_and_a_slip_returns_something_else(splits):
    records, databases = splits["cold"]
    connections = {db_id: sqlite3.connect(path) for db_id, path in databases.items()}
    slips = Counter(r["difficulty"] for r in records if r["trace_sql"])
    assert slips["simple"] == 0
    for tier in demo_world.TIERS[1:]:
        assert 0.35 < slips[tier] / demo_world.SIZES["cold"][tier] < 0.6
    for r in records:
        if r["trace_sql"]:
            rows = [set(connections[r["db_id"]].execute(sql).fetchall()) for sql in (r["sql"], r["trace_sql"])]
            assert rows[0] != rows[1]
    assert not any(r["trace_sql"] for split, (records, _) in splits.items() if split != "cold" for r in records)


def test_every_gold_runs_and_is_not_decided_by_a_tie(splits):
    for records, databases in splits.values():
        connections = {db_id: sqlite3.connect(path) for db_id, path in databases.items()}
        for record in records:
            rows = connections[record["db_id"]].execute(record["sql"]).fetchall()
            assert rows and any(value not in (None, 0) for value in rows[0])


def test_ties_at_a_limit_are_noticed():
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (name TEXT, n INTEGER)")
    connection.executemany("INSERT INTO t VALUES (?, ?)", [("a", 3), ("b", 3), ("c", 2), ("d", 1)])
    assert not demo_world._is_clear(connection, "SELECT name FROM t ORDER BY n DESC LIMIT 1")
    assert demo_world._is_clear(connection, "SELECT name FROM t ORDER BY n ASC LIMIT 1")
    assert not demo_world._is_clear(connection, "SELECT name FROM t WHERE n > 5")


def test_the_same_seed_gives_the_same_world(tmp_path, splits):
    records, databases = demo_world.load("dev", tmp_path)
    assert records == splits["dev"][0]
    for db_id, path in databases.items():
        dumps = [list(sqlite3.connect(p).iterdump()) for p in (path, splits["dev"][1][db_id])]
        assert dumps[0] == dumps[1]
    assert demo_world.load("dev", tmp_path, seed=1)[0] != records


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(ValueError, match="no split 'valid'"):
        demo_world.load("valid", tmp_path)
