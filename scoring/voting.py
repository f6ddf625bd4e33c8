"""From several completions to one answer: sample candidates, group them by their results, vote.

    sample    `sample_candidates`: n completions per question from one shared prefill, or the greedy one
    group     `group_results`: candidates that run and return the same set of complete rows
    vote      `rank_groups`: `majority` puts the largest group first; `value-aware`, the FINER-SQL paper's
              vote, prefers results with content: rows that are not only zeros and NULLs
    estimate  `pass_at_k`: the probability that k candidates contain a correct one

Ties go to the group with the higher mean log-probability per token, never to an order of texts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tqdm import tqdm

from prompts.answer_format import AnswerFormat
from questions.example import Example
from running.guards import Heartbeat
from sql_exec import Execution, Rows, result_key

VOTES = ("value-aware", "majority")


# -------------------------------------------------------------------------------------------- candidates

@dataclass(frozen=True)
class Candidate:
    """A completion and its parts."""

    text: str        # of the answer, as the model wrote it
    thought: str     # its reasoning
    sql: str         # empty if the format is broken
    logprob: float   # mean over the tokens of all its tries, under the sampling distribution
    tokens: int      # of all its tries
    truncated: bool  # no end within the allowed length
    first_try: str = ""    # of an answer that is a second try (second_try.py), and what was observed after it
    observation: str = ""

    @property
    def broken(self) -> str:
        """Why there is no SQL to run, `truncated` or `format`; empty if there is some."""
        if self.sql:
            return ""
        return "truncated" if self.truncated else "format"


@dataclass(frozen=True)
class Exam:
    """How a policy answers questions."""

    answer_format: AnswerFormat
    max_completion_tokens: int
    samples: int = 1          # completions per question
    temperature: float = 0.0  # 0: greedy
    batch: int = 128          # completions decoded side by side
    seed: int = 0
    room: tuple[float, float] = (math.inf, math.inf)  # tokens decoded side by side: prompts; prompts and completions

    @property
    def greedy(self) -> "Exam":
        """The same settings for the greedy answer alone."""
        return replace(self, samples=1, temperature=0.0)


def greedy_sqls(policy, prompts: Sequence[Sequence[int]], exam: Exam, progress: bool = False,
                support=None, asked: Sequence[Example] = ()) -> list[str]:
    """The SQL of the greedy completion for each prompt, in order; empty if the format is broken."""
    return [greedy.sql for greedy, in sample_candidates(policy, prompts, exam.greedy, progress, support, asked)]


def sample_candidates(policy, encoded_prompts: Sequence[Sequence[int]], exam: Exam, progress: bool = False,
                      support=None, asked: Sequence[Example] = ()) -> list[list[Candidate]]:
    """`exam.samples` candidates per prompt, in prompt order. The same arguments give the same candidates.

    progress: show the number of answered questions. support: second_try.Support, which needs the question of each
    prompt, `asked`; None: no support.
    Raises UserError: a prompt and its answer are longer than the model has positions.
    """
    import torch  # here, so that scoring a predictions file does not import it

    from engine.fast import FAST
    from grpo import GRPOConfig
    from policy import check_positions
    from second_try import Support

    support, lengths = support or Support(), [len(prompt) for prompt in encoded_prompts]
    check_positions(policy, max(lengths, default=0), support.longest(exam.max_completion_tokens))
    config = GRPOConfig(max_completion_tokens=exam.max_completion_tokens, rollout_batch=exam.batch)
    candidates, heartbeat = {}, Heartbeat()
    with tqdm(total=len(lengths), desc="answering", unit="question", leave=False,
              disable=None if progress else True) as bar:
        for part in side_by_side(lengths, exam):
            groups = support.sample(policy, [torch.as_tensor(encoded_prompts[i], dtype=torch.long) for i in part],
                                    [asked[i] for i in part] if asked else (), config, engine=FAST,
                                    group_size=exam.samples, temperature=exam.temperature,
                                    seeds=[exam.seed * 1_000_003 + i for i in part],
                                    split=partial(side_by_side, exam=replace(exam, samples=1)))
            candidates |= {i: read_group(policy, group, exam.answer_format)
                           for i, group in zip(part, groups, strict=True)}
            bar.update(len(part))
            if progress:
                heartbeat.beat(f"answered {len(candidates)} of {len(lengths)} questions")
    return [candidates[i] for i in range(len(lengths))]


def side_by_side(lengths: Sequence[int], exam: Exam) -> Iterator[list[int]]:
    """Indices of prompts to decode together, of similar length: as many as `exam` allows, at least one."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        count = min(len(order), max(1, exam.batch // exam.samples))
        while count > 1 and not fits(count, lengths[order[count - 1]], exam):
            count -= 1
        yield order[:count]
        order = order[count:]


def fits(count: int, length: int, exam: Exam) -> bool:
    """Whether there is room for `count` prompts of up to `length` tokens and their completions."""
    prompts, whole = exam.room
    completions = exam.samples * exam.max_completion_tokens
    return count * length <= prompts and count * (length + completions) <= whole


def read_group(policy, group, answer_format: AnswerFormat) -> list[Candidate]:
    """The completions of a `grpo.Group` as candidates."""
    from second_try import answers, before, masks

    return [read_text(policy.decode(tokens), logps[mask].double().mean().item(), int(mask.sum()), truncated,
                      answer_format, **earlier)
            for tokens, logps, mask, truncated, earlier
            in zip(answers(group), group.logps, masks(group), group.truncated, before(policy, group), strict=True)]


def read_text(text: str, logprob: float, tokens: int, truncated: bool, answer_format: AnswerFormat,
              **before: str) -> Candidate:
    """A completion as a candidate, read as the reward reads it. before: its first try and what was observed"""
    thought, sql = answer_format.read(text) or ("", "")
    return Candidate(text, thought, sql, logprob, tokens, truncated, **before)


# -------------------------------------------------------------------------------------------------- vote

def group_results(executions: Sequence[Execution]) -> list[list[int]]:
    """Indices of the executions that ran, grouped by equal results, in order of appearance."""
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

    If none of them runs, it is the likeliest of those with SQL, or of all if none has any.
    """
    logprobs = [candidate.logprob for candidate in candidates]
    ranked = rank_groups(executions, logprobs, vote)
    if ranked:
        return ranked[0][0]
    return max(range(len(candidates)), key=lambda index: (bool(candidates[index].sql), logprobs[index]))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that k of the n candidates, drawn without replacement, contain a correct one.

    This is the unbiased estimator of arXiv 2107.03374: 1 − C(n − c, k) / C(n, k).
    """
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; it must be between 1 and n = {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
