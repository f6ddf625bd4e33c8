"""minimal.py computes what grpo.py computes, samples what it trains on, and learns."""

import re
import sqlite3
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from little_policy import little_policy_folder
from transformers import Qwen2Config, Qwen2ForCausalLM

import grpo
import minimal

ROOT = Path(__file__).resolve().parents[1]
EOS = 0


@pytest.fixture
def model():
    """A policy over seven tokens whose distributions are far from uniform."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, initializer_range=0.5)
    return Qwen2ForCausalLM(config).double().eval()


def rows_of(padded):
    """What a pair of ids and mask [N, L] holds, without padding."""
    return [ids[mask.bool()] for ids, mask in zip(*padded, strict=True)]


def sampled(model, groups: int, size: int):
    """Prompts of unequal length and their completions; a group's prompts side by side."""
    torch.manual_seed(1)
    prompts = minimal.pad([[1 + (b + i) % 6 for i in range(2 + b)] for b in range(groups) for _ in range(size)], left=True)
    return prompts, minimal.sample(model, prompts, EOS, 0.7)


def test_an_update_is_that_of_grpo(model, monkeypatch):
    monkeypatch.setattr(minimal, "T", 9)
    prompts, completions = sampled(model, groups=3, size=4)
    assert len(set(completions[1].sum(1).tolist())) > 1  # completions of unequal length
    rewards = torch.tensor([[1, 0.1, 0, 0.1], [0.1, 0.1, 0.1, 0.1], [1, 1, 1, 0]], dtype=torch.float64)
    advantages, mask = minimal.group_advantages(rewards), completions[1]
    expected = grpo.group_advantages(rewards, "group")
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-9)

    loss = minimal.policy_loss(minimal.logprobs(model, prompts, completions, 0.7), advantages.flatten(), mask)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    logp = grpo.plain_logprobs(model, rows_of(prompts), rows_of(completions), 0.7)
    other, _ = grpo.policy_loss(logp, logp.detach(), None, expected.flatten(), mask.bool(), grpo.GRPOConfig())
    torch.testing.assert_close(loss, other, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradients, torch.autograd.grad(other, list(model.parameters())), rtol=0, atol=1e-9)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3


def test_log_probabilities_are_those_of_grpo(model, monkeypatch):
    monkeypatch.setattr(minimal, "T", 9)
    prompts, completions = sampled(model, groups=4, size=3)
    logp = minimal.logprobs(model, prompts, completions, 0.7) * completions[1]
    expected = grpo.plain_logprobs(model, rows_of(prompts), rows_of(completions), 0.7)
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-9)


def test_sampling_draws_from_the_distribution_that_is_trained(model, monkeypatch):
    """The shares of all completions of up to two tokens are their probabilities."""
    monkeypatch.setattr(minimal, "T", 2)
    N = 20_000
    torch.manual_seed(2)
    every = [[EOS], *([first, second] for first, second in product(range(1, 7), range(7)))]
    for prompt in ([3, 1, 4], [5]):
        # a longer row beside the prompt, so that it is padded
        drawn = minimal.sample(model, minimal.pad([[2, 6, 5, 1]] + [prompt] * N, left=True), EOS, 0.7)
        counts = {tuple(row.tolist()): 0 for row in map(torch.tensor, every)}
        for row in rows_of(drawn)[1:]:
            counts[tuple(row.tolist())] += 1  # a KeyError would be tokens after EOS
        with torch.no_grad():
            logp = grpo.plain_logprobs(model, [torch.tensor(prompt)] * len(every), list(map(torch.tensor, every)), 0.7)
        p = logp.sum(1).exp()
        assert p.sum() == pytest.approx(1) and p.max() < 0.9
        error = torch.tensor(list(counts.values())) / N - p
        assert (error.abs() < 5 * (p * (1 - p) / N).sqrt() + 1e-4).all()


def test_greedy_answers_are_those_of_grpo(model, monkeypatch):
    monkeypatch.setattr(minimal, "T", 9)
    prompts = minimal.pad([[1, 2], [3, 4, 5, 6], [6]], left=True)
    groups = grpo.sample_groups(model, rows_of(prompts), grpo.GRPOConfig(max_completion_tokens=9), eos_ids=[EOS],
                                group_size=1, temperature=0)
    answers = rows_of(minimal.sample(model, prompts, EOS, 0))
    assert [row.tolist() for row in answers] == [group.completions[0].tolist() for group in groups]


def test_updates_make_what_is_rewarded_likelier(model, monkeypatch):
    monkeypatch.setattr(minimal, "T", 2)
    prompts = minimal.pad([[1, 2]] * 8 + [[3]] * 8, left=True)
    descend, shares = minimal.optimizer_of(model, 0.02, 40), []
    for _ in range(40):
        completions = minimal.sample(model, prompts, EOS, 1.0)
        rewards = (completions[0][:, 0] == 4).double()
        shares.append(rewards.mean().item())
        advantages = minimal.group_advantages(rewards.view(2, 8)).flatten()
        descend(minimal.policy_loss(minimal.logprobs(model, prompts, completions, 1.0), advantages, completions[1]))
    assert sum(shares[:5]) / 5 < 0.5 and sum(shares[-5:]) / 5 > 0.9


@pytest.mark.parametrize("text, expected", [
    ("<think> count </think> SELECT COUNT(*) FROM singer", 1.0),
    ("<think> count </think> SELECT 3", 1.0),  # the same rows
    ("<think> count </think> SELECT COUNT(*) FROM concert WHERE year = 2015", 0.1),
    ("<think> count </think> SELECT COUNT(*) FROM nobody", 0.1),
    ("<think> count </think> SELECT 3; SELECT 3", 0.1),
    ("<think> count </think> SELECT '\0'", 0.1),
    ("<think> endless </think> SELECT COUNT(*) FROM (WITH RECURSIVE n AS (SELECT 1 UNION ALL SELECT 1 FROM n) SELECT * FROM n)", 0.1),
    ("<think> count </think> DELETE FROM singer", 0.0),
    ("<think> count SELECT 3", 0.0),
    ("SELECT 3", 0.0)])
def test_rewards(tiny_db, text, expected):
    db = sqlite3.connect(f"file:{tiny_db}?mode=ro", uri=True)
    db.set_progress_handler(lambda: True, 1_000_000)
    assert minimal.reward(text, {"db": db, "sql": "SELECT COUNT(*) FROM singer"}) == expected
    failing = {"db": db, "sql": "SELECT nothing FROM nobody"}
    assert minimal.reward(text, failing) < 1  # SQL that fails is not right because the gold fails, too
    db.close()


def test_words_are_copied_as_they_are():
    text = "<think> keep city = 'Rome' </think> SELECT COUNT(*) , name FROM t WHERE city = 'Rome' AND a = 'B c'"
    model, encode, decode, eos = minimal.build_tiny([text])
    assert decode(encode(text)) == text
    assert encode("Rome")[0] in encode("'Rome'") and eos not in encode(text)
    assert sum(weight.numel() for weight in model.parameters()) < 1e6


def test_a_pretrained_model_can_be_given(tiny_db):
    model, encode, decode, eos = minimal.load_pretrained(str(little_policy_folder(tiny_db)))
    assert decode(encode("SELECT name FROM singer")) == "SELECT name FROM singer" and encode("singer")[-1] != eos
    ids, mask = minimal.sample(model, minimal.pad([encode("singer")], left=True), eos, 0)
    assert ids.shape == mask.shape and 1 <= ids.shape[1] <= minimal.T


def test_no_held_out_question_is_trained_on():
    cold, train, test = (minimal.load_questions(split) for split in ("cold", "train", "test"))
    for part in (cold, train):
        for field in ("sql", "prompt"):
            assert not {question[field] for question in part} & {question[field] for question in test}
    taught = [minimal.reward(q["answer"], q) for q in cold]
    assert min(taught) == 0.1 and sum(taught) / len(taught) > 0.7  # the format is right, some SQL is not


def test_a_short_run_prints_before_and_after():
    done = subprocess.run([sys.executable, ROOT / "minimal.py", "--cold-start-steps", "2", "--steps", "1"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for when in ("before", "after"):
        assert re.search(rf"^{when} GRPO: \d+\.\d% of \d+ held-out questions right", done.stdout, re.MULTILINE)
