"""From several completions to one answer: sample candidates, group them by what they return, vote.

    sample    `sample_candidates`: n completions a question from one shared prefill, or the greedy one
    group     `group_results`: candidates that run and return the same set of rows, compared whole
    vote      `rank_groups`: `majority` puts the largest group first; `value-aware`, the FINER-SQL paper's
              vote, first asks that a result says something: it has rows, and not only zeros and NULLs
    estimate  `pass_at_k`: the chance that k candidates contain a correct one

Ties go to the group with the higher mean log-probability a token, never to an order of texts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rewards import parse_completion
from sql_exec import Execution, Rows, result_key

VOTES = ("value-aware", "majority")


# -------------------------------------------------------------------------------------------- candidates

@dataclass(frozen=True)
class Candidate:
    """A completion, taken apart."""

    text: str        # as the model wrote it
    thought: str     # its reasoning
    sql: str         # empty where the format is broken
    logprob: float   # mean over its tokens, under the distribution it was drawn from
    tokens: int
    truncated: bool  # no end within the allowed length

    @property
    def broken(self) -> str:
        """Why there is no SQL to run, `truncated` or `format`; empty where there is some."""
        if self.sql:
            return ""
        return "truncated" if self.truncated else "format"


def sample_candidates(policy, encoded_prompts: Sequence[Sequence[int]], n: int = 1, temperature: float = 0.0,
                      max_completion_tokens: int = 512, batch: int = 128, lenient: bool = False, seed: int = 0,
                      answer_style: str = "think-sql") -> list[list[Candidate]]:
    """n candidates a prompt, in prompt order; prompts of similar length are decoded side by side.

    temperature 0 is greedy; `batch` completions are decoded at once. The same arguments, the same candidates.
    answer_style: how they are read, one of prompts/answer_format.py.
    Raises UserError: a prompt and its answer are longer than the model has positions.
    """
    import torch  # here, so that scoring a predictions file does not wait for it

    from engine.fast import FAST
    from grpo import GRPOConfig, sample_groups
    from policy import check_positions

    check_positions(policy, max(map(len, encoded_prompts), default=0), max_completion_tokens)
    order = sorted(range(len(encoded_prompts)), key=lambda i: len(encoded_prompts[i]))
    prompts = [torch.tensor(encoded_prompts[i], dtype=torch.long) for i in order]
    config = GRPOConfig(max_completion_tokens=max_completion_tokens, rollout_batch=batch)
    groups = sample_groups(policy.model, prompts, config, eos_ids=policy.eos_ids, group_size=n,
                           temperature=temperature, seeds=[seed * 1_000_003 + i for i in order], engine=FAST)
    candidates = {i: read_group(policy, group, lenient, answer_style) for i, group in zip(order, groups, strict=True)}
    return [candidates[i] for i in range(len(encoded_prompts))]


def read_group(policy, group, lenient: bool = False, answer_style: str = "think-sql") -> list[Candidate]:
    """The completions of a `grpo.Group` as candidates."""
    return [read_text(policy.decode(tokens), logps.double().mean().item(), len(tokens), truncated, lenient,
                      answer_style)
            for tokens, logps, truncated in zip(group.completions, group.logps, group.truncated, strict=True)]


def read_text(text: str, logprob: float, tokens: int, truncated: bool, lenient: bool = False,
              answer_style: str = "think-sql") -> Candidate:
    """A completion as a candidate, read as the reward reads it."""
    thought, sql = parse_completion(text, lenient, answer_style) or ("", "")
    return Candidate(text, thought, sql, logprob, tokens, truncated)


# -------------------------------------------------------------------------------------------------- vote

def group_results(executions: Sequence[Execution]) -> list[list[int]]:
    """Indices of the executions that ran, those with equal results together, in order of appearance."""
    groups: dict[frozenset, list[int]] = {}
    for index, execution in enumerate(executions):
        if execution.status == "ok":
            groups.setdefault(result_key(execution.rows), []).append(index)
    return list(groups.values())


def says_something(rows: Rows) -> bool:
    """Whether a result has a cell that is neither zero nor NULL nor an empty text."""
    return any(cell not in (0, None, "") for row in rows for cell in row)


def rank_groups(executions: Sequence[Execution], logprobs: Sequence[float],
                vote: str = "value-aware") -> list[list[int]]:
    """The groups of `group_results`, the winner first; in each, the likeliest candidate first."""
    def strength(group):
        telling = vote == "majority" or says_something(executions[group[0]].rows)
        return telling, len(group), math.fsum(logprobs[index] for index in group) / len(group)

    groups = sorted(group_results(executions), key=strength, reverse=True)
    return [sorted(group, key=lambda index: -logprobs[index]) for group in groups]


def choose(candidates: Sequence[Candidate], executions: Sequence[Execution],
           vote: str = "value-aware") -> int:
    """The index of the answer: the likeliest candidate of the winning group.

    When none of them runs, it is the likeliest of those with SQL, or of all when none has any.
    """
    logprobs = [candidate.logprob for candidate in candidates]
    ranked = rank_groups(executions, logprobs, vote)
    if ranked:
        return ranked[0][0]
    return max(range(len(candidates)), key=lambda index: (bool(candidates[index].sql), logprobs[index]))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that k of the n candidates, drawn without replacement, contain one of the correct ones.

    This is the unbiased estimator of arXiv 2107.03374: 1 − C(n − c, k) / C(n, k).
    """
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; it must be between 1 and n = {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
