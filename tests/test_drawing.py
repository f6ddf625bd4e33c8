"""Which questions a step asks: all in turn, in runs on one database, and those that are likely to be partly right."""

import random

import pytest
import torch

from running.drawing import HALF_LIFE, PRIOR, Drawing, shape_of

RIGHT, WRONG, MIXED = [True] * 4, [False] * 4, [True, False, False, True]


def drawing(count=12, databases="abc", golds=("SELECT a FROM b",), **options):
    """Questions whose databases and gold queries take turns."""
    return Drawing([databases[n % len(databases)] for n in range(count)], [golds[n % len(golds)] for n in range(count)],
                   **{"seed": 3} | options)


def test_the_order_is_fresh_each_epoch_and_does_not_depend_on_the_size_of_a_step():
    steps = drawing(7)
    drawn = [number for _ in range(7) for number in steps.draw(3)]
    epochs = [drawn[i:i + 7] for i in range(0, 21, 7)]
    assert epochs == [random.Random(f"3/{epoch}").sample(range(7), 7) for epoch in range(3)]
    assert drawing(7).draw(21) == drawn and drawing(7, seed=4).draw(21) != drawn
    steps.learn(drawn[:3], [MIXED] * 3)
    assert steps.draw(3) == drawing(7).draw(24)[21:]  # what was learned changes nothing here


@pytest.mark.parametrize("informative", [False, True])
def test_the_questions_of_a_step_come_in_runs_on_one_database(informative):
    steps = drawing(12, "aaabbbbc", per_database=3, informative=informative)
    runs = [[steps.databases[number] for number in steps.draw(6)] for _ in range(6)]
    assert all(len(set(run[i:i + 3])) == 1 for run in runs[::2] for i in (0, 3))
    assert {database for run in runs for database in run} >= {"a", "b"}
    if not informative:  # an epoch is what it was, in another order: what is left of a database comes last
        once = drawing(12, "aaabbbbc", per_database=3).draw(12)
        assert sorted(once) == list(range(12)) and runs[0] != drawing(12, "aaabbbbc").draw(6)
        left = [steps.databases[number] for number in once[9:]]
        assert left in (["b", "b", "c"], ["c", "b", "b"])


def simulated(steps, answers, rounds, count=8):
    """Draws and learns; how many of each kind were drawn in the second half."""
    kinds = []
    for _ in range(rounds):
        numbers = steps.draw(count)
        steps.learn(numbers, [answers(number) for number in numbers])
        kinds += [answers(number) for number in numbers]
    late = kinds[len(kinds) // 2:]
    return [late.count(kind) / len(late) for kind in (RIGHT, WRONG, MIXED)]


def test_questions_that_are_always_right_or_always_wrong_are_seldom_asked_again():
    kinds = (RIGHT, WRONG, MIXED)
    answers = lambda number: kinds[number // 4 % 3]  # noqa: E731 (unrelated to shape and database)
    right, wrong, mixed = simulated(drawing(60, golds=("SELECT a FROM b", "SELECT a FROM b LIMIT 1"), informative=True), answers, 60)
    assert mixed > 0.6 and 0.02 < right < 0.25 and 0.02 < wrong < 0.25
    assert simulated(drawing(60), answers, 60)[2] == pytest.approx(1 / 3, abs=0.05)


def test_a_question_that_was_never_asked_is_judged_by_its_kin():
    golds = ("SELECT a FROM b", "SELECT COUNT(*) FROM b", "SELECT a FROM b WHERE c < 2")
    steps = drawing(90, "abcde", golds, informative=True)
    for asked in range(0, 30, 3):
        steps.learn([asked, asked + 1, asked + 2], [RIGHT, WRONG, MIXED])
    easy, hard, fair = steps.chances()[60:63]
    assert easy < hard * 1.2 < 0.8 * fair and hard < easy * 1.2
    assert all(0 < chance < 1 for chance in steps.chances())
    right, wrong, mixed = simulated(steps, lambda number: (RIGHT, WRONG, MIXED)[number % 3], 20)
    assert mixed > 0.8 and right > 0 and wrong > 0  # a shape that is not asked would never be known to have changed


def test_the_chance_of_disagreement_is_that_of_the_pass_rate_smoothed_and_fades():
    steps = drawing(2, informative=True)
    assert steps.chances() == [PRIOR] * 2
    steps.learn([0], [[True, False, False, False]])  # 3 of 6 pairs disagree
    known = [PRIOR]
    for _ in range(4):  # of all, of the shape, of the shape in its database, of the question
        known.append((0.5 + known[-1]) / 2)
    assert steps.chances() == [pytest.approx(known[4]), pytest.approx((PRIOR + 0.5) / 2 * 0.5 + 0.25)]
    for _ in range(HALF_LIFE):
        steps.learn([], [])
    assert steps.chances()[0] == pytest.approx(PRIOR + (0.5 - PRIOR) * (1 - (2 / 3) ** 4))
    for _ in range(50 * HALF_LIFE):
        steps.learn([], [])
    assert steps.chances() == pytest.approx([PRIOR] * 2)


def test_a_checkpoint_holds_all_that_the_next_draws_depend_on(tmp_path):
    rng, steps = random.Random(0), drawing(40, golds=("SELECT a FROM b", "SELECT a FROM b LIMIT 1"), informative=True, per_database=2)
    results = [[[rng.random() < 0.5 for _ in range(4)] for _ in range(6)] for _ in range(20)]
    for result in results[:10]:
        steps.learn(steps.draw(6), result)
    torch.save(steps.state(), tmp_path / "state.pt")
    later = [steps.draw(6) for result in results[10:] if not steps.learn(steps.draw(6), result)]
    resumed = drawing(40, golds=("SELECT a FROM b", "SELECT a FROM b LIMIT 1"), informative=True, per_database=2)
    resumed.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [resumed.draw(6) for result in results[10:] if not resumed.learn(resumed.draw(6), result)] == later
    old = drawing(7)
    old.load({"step": 2, "drawn": 6})  # from before anything was learned
    assert old.draw(3) == drawing(7).draw(9)[6:]


def test_a_step_may_ask_more_questions_than_there_are():
    for informative in (False, True):
        numbers = drawing(5, informative=informative).draw(12)
        assert len(numbers) == 12 and sorted(numbers[:5]) == sorted(numbers[5:10]) == list(range(5))


def test_the_shape_of_a_query_has_neither_names_nor_values():
    one = shape_of("SELECT count(*) FROM singer WHERE name = 'AND or >' AND age>25 ORDER BY age DESC LIMIT 3")
    assert one == "SELECT COUNT WHERE = AND > ORDER DESC LIMIT"
    assert one == shape_of('select COUNT( T1.id ) from "group" as T1 where T1.y = "x" and T1.z > 7 order by 2 desc limit 1')
    assert one != shape_of("SELECT COUNT(*) FROM singer WHERE name = 'a' AND age < 25 ORDER BY age DESC LIMIT 3")
