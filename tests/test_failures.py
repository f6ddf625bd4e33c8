"""scoring/failures.py: why answers do not run, by real errors of SQLite on the music database."""

import pytest

from questions.schema import columns_of
from scoring.failures import KINDS, failures_of, kind_of
from scoring.verdicts import ExampleScore
from sql_exec import SQLExecutor

FAILING = [
    ("SELECT title FROM singer", "unknown name"), ("SELECT singer.title FROM singer", "unknown name"),
    ("SELECT T1.title FROM singer AS T1", "unknown name"), ("SELECT name FROM singers", "unknown name"), ("SELECT sums(age) FROM singer", "unknown name"),
    ("SELECT year FROM singer", "other table"), ("SELECT concert.year FROM singer", "other table"), ("SELECT s.year FROM singer s", "other table"),
    ("SELECT T1.year FROM singer AS T1 JOIN concert AS T2 ON T1.id = T2.singer_id", "other table"),
    ("SELECT T3.name FROM singer AS T1", "unknown alias"), ("SELECT x.year FROM singer", "unknown alias"),
    ("SELECT name FROM singer WHERE", "syntax"), ("SELECT name FROM FROM singer", "syntax"), ("SELECT 'name FROM singer", "syntax"),
    ("SELECT name FROM singer WHERE MAX(age) > 3", "other"), ("SELECT name FROM singer, singer AS other", "other")]


@pytest.mark.parametrize("sql, kind", FAILING)
def test_the_kind_of_a_failure(tiny_db, sql, kind):
    with SQLExecutor({"music": tiny_db}) as executor:
        execution, = executor.run_many([("music", sql)])
    assert execution.status == "error", execution
    assert kind_of("error", execution.error, sql, columns_of({"music": tiny_db})["music"]) == kind, execution.error


def test_failures_are_shares_of_all_answers(tiny_db):
    def score(status, error="", sql="SELECT 1"):
        return ExampleScore("1", "music", "easy", sql, status, "ok", error, {"bird": False}, 0.0)

    scores = [score("ok"), score("ok"), score("truncated"), score("format"), score("timeout"), score("unavailable"),
              score("error", "no such column: year", "SELECT year FROM singer"), score("error", "no such column: title", "SELECT title FROM singer")]
    found = failures_of(scores, {"music": tiny_db})
    assert found == {kind: pytest.approx(1 / 7) for kind in KINDS if kind not in ("unknown alias", "syntax")}
    assert failures_of(scores[:2], {"music": tiny_db}) == {}
