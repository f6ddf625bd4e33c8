"""guide.py: where all completions are wrong, a trace with the gold SQL takes the place of one."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import run_in_process, tiny_database
from little_policy import little_policy_folder
from test_grpo import make_model

import train
from engine.fast import FAST
from grpo import PLAIN, GRPOConfig, group_advantages, micro_batches, policy_update, sample_groups
from guide import Guide
from questions.example import Example
from rewards import RewardBreakdown
from rollout import Rollout
from running import show

CONFIG = GRPOConfig(group_size=4, max_completion_tokens=8, temperature=0.7, kl_coef=0.0, max_grad_norm=1e9)
TRACE = torch.tensor([9, 4, 7, 2])


def breakdown(correct: bool, status: str = "ok") -> RewardBreakdown:
    return RewardBreakdown(total=2.0 * correct + 1.0, correct=correct, status=status)


class Scorer:
    """Says that everything is right, or wrong."""

    def __init__(self, correct=True):
        self.correct, self.asked = correct, []

    def score(self, items, remember):
        assert not remember
        self.asked += items
        return [breakdown(self.correct) for _ in items]


def rollouts_of(model, engine, correct, rules=None):
    """A rollout per row of `correct`, and a guide that has a trace for all but the last question."""
    prompts = [torch.arange(3, 9 + i) for i in range(len(correct))]
    groups = sample_groups(model, prompts, CONFIG, eos_ids=[2], seeds=range(len(prompts)), engine=engine, rules=rules)
    return [Rollout(Example(str(i), "db", f"question {i}", ("SELECT 1",)), group, [breakdown(right) for right in row], number=i)
            for i, (group, row) in enumerate(zip(groups, correct, strict=True))]


def guide_of(model, engine, traces, scorer=None):
    policy = SimpleNamespace(model=model, decode=lambda ids: " ".join(map(str, ids.tolist())))
    return Guide(traces, policy, engine, scorer or Scorer(), CONFIG, nullcontext)


@pytest.mark.parametrize("engine", [PLAIN, FAST])
def test_a_trace_stands_in_for_the_last_completion_where_all_are_wrong(engine):
    model, scorer = make_model(), Scorer()
    correct = [[False] * 4, [False, True, False, False], [True] * 4, [False] * 4]
    rollouts = rollouts_of(model, engine, correct)
    guide = guide_of(model, engine, [TRACE, TRACE, TRACE, None], scorer)
    found = guide.guided(rollouts)
    assert [rollout.guided for rollout in found] == [True, False, False, False]
    assert found[1:] == rollouts[1:] and len(scorer.asked) == 1 and scorer.asked[0].question == "question 0"
    group, before = found[0].group, rollouts[0].group
    assert torch.equal(group.completions[3], TRACE) and found[0].rewards[3].correct and found[0].mixed
    assert all(torch.equal(new, old) for new, old in zip(group.completions[:3], before.completions[:3], strict=True))
    logits = model(torch.cat([group.prompt, TRACE])[None]).logits[0, len(group.prompt) - 1:-1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, TRACE[:, None])[:, 0]
    torch.testing.assert_close(group.logps[3].double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("engine", [PLAIN, FAST])
def test_the_gradient_is_that_of_the_written_out_group(engine):
    """In float64: the sum over three wrong samples and the trace, with ratio 1 and no sampler's gap."""
    model = make_model()
    found = guide_of(model, engine, [TRACE]).guided(rollouts_of(model, engine, [[False] * 4]))
    advantages = group_advantages(torch.tensor([[b.total for b in found[0].rewards]], dtype=torch.float64))
    batches = micro_batches([found[0].group], advantages, CONFIG)
    stats = policy_update(model, torch.optim.SGD(model.parameters(), lr=0.0), batches, CONFIG, engine)
    assert stats["ratio_max"] == 1.0 and stats["sampler_gap"] < 1e-6
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    group, loss = found[0].group, 0.0
    for completion, advantage in zip(group.completions, advantages[0], strict=True):
        logits = model(torch.cat([group.prompt, completion])[None]).logits[0, len(group.prompt) - 1:-1] / 0.7
        logp = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        loss -= advantage * logp.mean() / 4
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=0)


def test_a_trace_that_is_not_right_or_is_forbidden_changes_nothing():
    model = make_model()
    rollouts = rollouts_of(model, PLAIN, [[False] * 4])
    assert guide_of(model, PLAIN, [TRACE], Scorer(correct=False)).guided(rollouts) == rollouts
    odd = SimpleNamespace(start=lambda: SimpleNamespace(bits=lambda: torch.tensor([0x55555555, 0x55555555], dtype=torch.int32),
                                                        take=lambda token: None))
    rollouts = rollouts_of(model, PLAIN, [[False] * 4], rules=[odd])  # even tokens only; the trace has odd ones
    assert guide_of(model, PLAIN, [TRACE]).guided(rollouts) == rollouts


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Flags of a short run on a question that the little policy answers, and two that it never does."""
    folder = tmp_path_factory.mktemp("songs")
    records = [{"db_id": "music", "question": "Which country has Bo?", "sql": "SELECT country FROM singer WHERE name = 'Bo'"},
               {"db_id": "music", "question": "Who is oldest?", "sql": "SELECT name FROM singer ORDER BY age DESC LIMIT 1"},
               {"db_id": "music", "question": "How many are there, then?", "answer": 77}]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    model = little_policy_folder(tiny_database(folder / "music.sqlite"))
    return ["--model", model, "--data", folder / "mine.jsonl", "--threads", 1, "--max-completion-tokens", 60, "--cold-start-steps", 0,
            "--prompt-style", "compact", "--prompts-per-step", 3, "--group-size", 4, "--rewards", "format,execution", "--kl-coef", 0,
            "--eval-questions", 0, "--test-questions", 0, "--lr", 1e-4, "--draw", "informative", "--guided", "--token-ratios-every", 0]


def logs(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_run_learns_from_traces_counts_samples_only_and_resumes(songs, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, out, errors = run_in_process(train, *songs, "--steps", 3, "--output", whole)
    assert status == 0 and "guided: 2 of 3 training questions have a trace" in out, out + errors
    metrics, records = logs(whole, "metrics.jsonl"), logs(whole, "rollouts.jsonl")
    traces = [(record, c) for record in records for c in record["completions"] if c.get("from_trace")]
    assert {record["question"] for record, _ in traces} == {"Who is oldest?"} and len(traces) >= 2
    assert all(c["correct"] and c["advantage"] > 1 and c["sql"].startswith("SELECT name") for _, c in traces)
    for line in metrics:
        samples = [c for record in records if record["step"] == line["step"] for c in record["completions"] if not c.get("from_trace")]
        assert round(line["execution_accuracy"] * 12, 4) == sum(c["correct"] for c in samples)
        assert line["sampler_gap"] < 1e-4 and line["ratio_mean"] == 1.0
    shown = show.group_text(traces[0][0], colour=False)
    assert "0 of 3 right" in shown and "right, a trace in place of a sample" in shown
    for steps in (1, 3):
        flags = [*songs, "--steps", steps, "--output", parts] if steps == 1 else ["--resume", "--steps", steps, "--output", parts]
        status, out, errors = run_in_process(train, *flags)
        assert status == 0, out + errors
    assert logs(parts, "rollouts.jsonl") == records


def test_questions_without_gold_sql_cannot_be_guided(songs, tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"db_id": "music", "question": "How many?", "answer": 3}))
    tiny_database(tmp_path / "music.sqlite")
    flags = [*songs, "--steps", 1, "--prompts-per-step", 1, "--output", tmp_path / "run"]
    flags[3] = tmp_path / "mine.jsonl"
    status, _, errors = run_in_process(train, *flags)
    assert status == 2 and "--guided has no traces" in errors and "no training question has gold SQL" in errors
