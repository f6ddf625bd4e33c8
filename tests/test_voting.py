"""Grouping, voting, pass@k and sampling, against values worked out by hand."""

import math
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from policy import build_tiny
from prompts.answer_format import AnswerFormat
from scoring.voting import (
    Candidate,
    Exam,
    choose,
    greedy_sqls,
    group_results,
    pass_at_k,
    rank_groups,
    read_group,
    sample_candidates,
    says_something,
    side_by_side,
)
from sql_exec import Execution


def ran(*rows):
    return Execution("ok", ["a"] * len(rows[0]) if rows else [], list(rows))


def candidate(sql="SELECT 1", logprob=-1.0, truncated=False):
    return Candidate("text", "thought", sql, logprob, 5, truncated)


FAILED = Execution("error", error="no such table: t")


def test_groups_are_equal_sets_of_rows_compared_whole():
    long_a = ran(*[(i, "x" * 300) for i in range(2000)], (-1, "end"))
    long_b = ran(*[(i, "x" * 300) for i in range(2000)], (-2, "end"))  # differs in the last row only
    executions = [ran((1,), (2,)), FAILED, ran((2,), (1,), (1,)), ran((1.0,), (2,)), ran(("1",), ("2",)),
                  ran(), ran(), long_a, long_b, long_a]
    assert group_results(executions) == [[0, 2, 3], [4], [5, 6], [7, 9], [8]]
    assert group_results([FAILED, Execution("timeout")]) == []


@pytest.mark.parametrize("rows, telling", [
    ([], False), ([(0,)], False), ([(0.0, 0), (0, None)], False), ([(None,)], False), ([("",)], False),
    ([(0, 1)], True), ([("0",)], True), ([(0,), (0,), (3,)], True), ([(b"\0",)], True), ([(-1,)], True)])
def test_results_that_say_something(rows, telling):
    assert says_something(rows) is telling


def test_both_votes_by_hand():
    # empty: 4 votes; zero: 3; Ana: 2; Bo: 1; a failure
    executions = [ran()] * 4 + [ran((0,))] * 3 + [ran(("Ana",))] * 2 + [ran(("Bo",)), FAILED]
    logprobs = [-0.1] * 7 + [-5.0, -4.0, -0.01, -0.001]
    assert rank_groups(executions, logprobs, "majority") == [[0, 1, 2, 3], [4, 5, 6], [8, 7], [9]]
    assert rank_groups(executions, logprobs, "value-aware") == [[8, 7], [9], [0, 1, 2, 3], [4, 5, 6]]
    candidates = [candidate(logprob=logprob) for logprob in logprobs]
    assert choose(candidates, executions, "majority") == 0
    assert choose(candidates, executions, "value-aware") == 8  # Ana, the likelier of the two


def test_value_aware_falls_back_to_the_largest():
    executions = [ran((0,)), ran(), ran(), FAILED]
    assert rank_groups(executions, [0.0, -9.0, -9.0, 0.0])[0] == [1, 2]


@pytest.mark.parametrize("vote", ["majority", "value-aware"])
def test_ties_go_to_the_higher_mean_logprob_not_to_a_text(vote):
    executions = [ran(("a",)), ran(("z",)), ran(("z",)), ran(("a",))]
    assert rank_groups(executions, [-1.0, -0.1, -1.5, -1.0], vote) == [[1, 2], [0, 3]]  # means -0.8 and -1.0
    assert rank_groups(executions, [-0.1, -1.0, -1.0, -1.5], vote) == [[0, 3], [1, 2]]


def test_when_none_runs_the_likeliest_with_sql_answers():
    candidates = [candidate("", -0.1), candidate("SELECT a", -2.0), candidate("SELECT b", -1.0)]
    assert choose(candidates, [FAILED] * 3) == 2
    assert choose([candidate("", -3.0), candidate("", -2.0)], [FAILED] * 2) == 1


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == pytest.approx(1 / 4)
    assert pass_at_k(4, 1, 2) == pytest.approx(1 / 2)      # 1 - C(3,2)/C(4,2) = 1 - 3/6
    assert pass_at_k(5, 2, 3) == pytest.approx(9 / 10)     # 1 - C(3,3)/C(5,3) = 1 - 1/10
    assert pass_at_k(5, 0, 5) == 0.0 and pass_at_k(5, 1, 5) == 1.0
    for bad in (0, 6):
        with pytest.raises(ValueError, match="between 1 and n = 5"):
            pass_at_k(5, 2, bad)


def test_pass_at_k_counts_subsets():
    for correct in range(7):
        for k in range(1, 7):
            draws = list(combinations(range(6), k))  # candidates below `correct` are the correct ones
            share = sum(min(draw) < correct for draw in draws) / len(draws)
            assert pass_at_k(6, correct, k) == pytest.approx(share)


# -------------------------------------------------------------------------------------------- sampling

def test_reading_a_group():
    texts = ["<think> a </think> SELECT 1", "SELECT 1", "<think> a"]
    policy = SimpleNamespace(decode=lambda tokens: texts[tokens[0]])
    group = SimpleNamespace(completions=[torch.tensor([i, 7]) for i in range(3)],
                            logps=[torch.tensor([-1.0, -3.0])] * 3, truncated=[False, False, True], sampled=())
    first, second, third = read_group(policy, group, AnswerFormat())
    assert (first.thought.strip(), first.sql, first.logprob, first.tokens) == ("a", "SELECT 1", -2.0, 2)
    assert [one.broken for one in (first, second, third)] == ["", "format", "truncated"]
    assert second.sql == "" and second.text == "SELECT 1"


@pytest.fixture(scope="module")
def random_policy():
    torch.set_num_threads(1)
    return build_tiny(["SELECT name FROM singer"] * 3, seed=0, vocab_size=300, width=32, layers=2)


PROMPTS = [[10, 11, 12], [20, 21, 22, 23, 24, 25], [30], [40, 41, 42, 43]]


def test_candidates_come_in_prompt_order_whatever_the_batch(random_policy):
    exam = Exam(AnswerFormat(), max_completion_tokens=6)
    alone = [sample_candidates(random_policy, [prompt], exam)[0] for prompt in PROMPTS]
    for other in (*(replace(exam, batch=batch) for batch in (1, 2, 128)), replace(exam, room=(8, 40))):
        together = sample_candidates(random_policy, PROMPTS, other)
        assert [[one.text for one in group] for group in together] == [[one.text for one in group]
                                                                       for group in alone]
    assert sample_candidates(random_policy, [], exam) == []


@pytest.mark.parametrize("exam, parts", [
    (Exam(AnswerFormat(), 5, batch=4), [[1, 2, 3, 0], [4, 5]]),  # shortest first, equal lengths in order
    (Exam(AnswerFormat(), 5, batch=4, room=(8, math.inf)), [[1, 2, 3], [0], [4], [5]]),
    (Exam(AnswerFormat(), 5, batch=4, room=(math.inf, 24)), [[1, 2, 3], [0, 4], [5]]),
    (Exam(AnswerFormat(), 5, batch=4, room=(1, 1)), [[1], [2], [3], [0], [4], [5]]),  # one prompt always is decoded
    (Exam(AnswerFormat(), 5, batch=4, samples=2), [[1, 2], [3, 0], [4, 5]]),
    (Exam(AnswerFormat(), 5, batch=4, samples=2, room=(math.inf, 23)), [[1], [2], [3], [0], [4], [5]]),
    (Exam(AnswerFormat(), 5, batch=4, samples=9), [[1], [2], [3], [0], [4], [5]])])
def test_no_more_is_decoded_side_by_side_than_there_is_room_for(exam, parts):
    assert list(side_by_side([5, 1, 2, 2, 7, 9], exam)) == parts


def test_greedy_answers_are_read_in_the_format_of_the_exam(monkeypatch):
    """In the order of the prompts, whatever was decoded together, with one greedy completion each."""
    def greedy(model, prompts, config, *, group_size, temperature, **_):
        assert (group_size, temperature, config.max_completion_tokens) == (1, 0.0, 5)
        sizes.append(len(prompts))
        return [SimpleNamespace(completions=[prompt], logps=[torch.zeros(len(prompt))], truncated=[False], sampled=()) for prompt in prompts]

    monkeypatch.setattr("second_try.sample_groups", greedy)
    monkeypatch.setattr("policy.check_positions", lambda *_: None)
    policy = SimpleNamespace(model=None, eos_ids=(), decode=lambda tokens: f"<think> a </think> ```sql SELECT {len(tokens)}```")
    exam, lengths = Exam(AnswerFormat(lenient=True), 5, samples=3, temperature=1.0, batch=4), [5, 1, 2, 2, 7, 9]
    prompts, sizes = [[0] * length for length in lengths], []
    assert greedy_sqls(policy, prompts, exam) == [f"SELECT {length}" for length in lengths]
    assert greedy_sqls(policy, prompts, replace(exam, answer_format=AnswerFormat())) == [""] * 6 and sizes == [4, 2] * 2


def test_the_seed_decides(random_policy):
    def draw(seed):
        groups = sample_candidates(random_policy, PROMPTS, Exam(AnswerFormat(), 6, 3, 1.0, seed=seed))
        assert [len(group) for group in groups] == [3] * 4
        return [one.text for group in groups for one in group]

    assert draw(1) == draw(1) != draw(2)
