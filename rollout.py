"""A rollout: draw questions, sample a group of completions for each, score them.

    questions = drawing.draw(B)  →  groups = sample_groups(…)  →  rewards = scorer.score(…)

With --dynamic-sampling, fresh questions replace those whose completions are all right or all wrong. With --guided, a
trace stands in for a completion where all are wrong (guide.py). Several processes share each step's questions; every
process then gathers the rollouts of all.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from engine import distributed
from grpo import Engine, Group, GRPOConfig, group_advantages
from policy import Policy
from questions.example import Example
from rewards import RewardBreakdown, RewardConfig, RewardError, RewardItem, RewardScorer, readable, rewards_apart
from running.drawing import Drawing
from scoring.verdicts import first_reasons
from scoring.voting import side_by_side
from second_try import Support, answers, before
from settings import Settings
from variants import overlong_penalty


@dataclass(frozen=True)
class Question:
    """A question whose prompt fits."""

    example: Example
    prompt: Tensor  # [P]


@dataclass(frozen=True)
class Rollout:
    """A question, its completions and their rewards."""

    example: Example
    group: Group  # G completions
    rewards: list[RewardBreakdown]  # G
    tried: Sequence[dict[str, str]] = ()  # G, what came before each answer: second_try.before
    number: int = field(default=0, compare=False)  # of its question in the run
    guided: bool = False  # whether its last completion is a trace: guide.py

    @property
    def readable(self) -> bool:
        """Whether its completions have rewards, because the database could be read."""
        return readable(self.rewards)

    @property
    def mixed(self) -> bool:
        """Whether some of its completions are right and some wrong."""
        return self.readable and 0 < sum(b.correct for b in self.rewards) < len(self.rewards)


class RolloutMaker:
    """Makes the rollouts of a run's steps."""

    def __init__(self, s: Settings, policy: Policy, engine: Engine, questions: Sequence[Question], drawing: Drawing,
                 scorer: RewardScorer, inside: Callable[[], AbstractContextManager], support: Support | None = None,
                 guide=None):
        """inside: the context in which the policy samples, such as bf16 arithmetic. support: none by default. guide:
        guide.Guide, for --guided."""
        self.s, self.policy, self.engine, self.questions = s, policy, engine, questions
        self.drawing, self.scorer, self.inside, self.support = drawing, scorer, inside, support or Support()
        self.guide = guide

    def make(self, timed: Callable[[str], AbstractContextManager]) -> tuple[list[Rollout], list[Rollout]]:
        """The B rollouts that a step learns from, and all that were sampled for it.

        With --dynamic-sampling, it samples more until B are mixed or no extra rounds are left; the last unmixed ones
        fill the remaining places. Accuracy is measured on all samples, because the chosen ones would bias it.
        """
        B, extra = self.s.run.prompts_per_step, self.s.run.dynamic_sampling
        sampled = self.sample_and_score(B, timed)
        if not extra:
            return self.guided(sampled, timed), sampled
        while extra and sum(rollout.mixed for rollout in sampled) < B:
            sampled, extra = sampled + self.sample_and_score(B, timed), extra - 1
        mixed = [rollout for rollout in sampled if rollout.mixed]
        others = [rollout for rollout in sampled if not rollout.mixed]
        return self.guided(mixed[:B] + others[len(others) - max(0, B - len(mixed)):], timed), sampled

    def guided(self, rollouts: list[Rollout], timed: Callable[[str], AbstractContextManager]) -> list[Rollout]:
        """The rollouts; with --guided, those that are all wrong have a trace."""
        if not self.guide:
            return rollouts
        with timed("rollout"):
            return self.guide.guided(rollouts)

    def sample_and_score(self, count: int, timed: Callable[[str], AbstractContextManager]) -> list[Rollout]:
        """Rollouts of the next questions, by all processes together."""
        turn, numbers = self.drawing.drawn, self.drawing.draw(count)
        seeds = [self.s.run.seed * 1_000_003 + turn + i for i in range(count)]  # by the question's turn in the run
        mine = distributed.share_of(count)
        questions = [self.questions[number] for number in numbers[mine]]
        with timed("rollout"):
            groups = self.sample(questions, seeds[mine])
        with timed("rewards"):  # the seconds of each component are in scorer.seconds
            rollouts = self.score([question.example for question in questions], groups)
        rollouts = [replace(rollout, number=number) for number, rollout in zip(numbers, rollouts, strict=True)]
        read = [rollout for rollout in rollouts if rollout.readable]
        correct = [[b.correct for b in rollout.rewards] for rollout in read]  # [B][G]
        for row, rollout in zip(correct, read, strict=True):
            row[-1] |= bool(self.guide and self.guide.helps(rollout))  # a trace makes the group mixed
        self.drawing.learn([rollout.number for rollout in read], correct)
        return rollouts

    def sample(self, questions: Sequence[Question], seeds: Sequence[int]) -> list[Group]:
        """A group of completions per question."""
        split = partial(side_by_side, exam=replace(self.s.exam, batch=self.s.grpo.rollout_batch))
        with self.inside():
            return self.support.sample(self.policy, [question.prompt for question in questions],
                                       [question.example for question in questions], self.s.grpo, seeds=seeds,
                                       engine=self.engine, split=split)

    def score(self, examples: Sequence[Example], groups: Sequence[Group]) -> list[Rollout]:
        """The rollouts of all processes; each scores its own groups. The memory adds the thoughts of correct ones."""
        items = [RewardItem(example.db_id, example.golds, self.policy.decode(answer), example.question)
                 for example, group in zip(examples, groups, strict=True) for answer in answers(group)]
        found = distributed.everywhere(lambda: self.scorer.score(items, remember=False), RewardError)
        G = self.s.grpo.group_size
        rewards = [found[i:i + G] for i in range(0, len(found), G)]  # [B][G]
        if self.s.grpo.overlong == "penalise":  # half the margin, so that a correct one still outranks a wrong one
            rewards = penalise(rewards, 0.5 * self.s.rewards.margin * overlong_penalty(groups, self.s.grpo))
        tried = [before(self.policy, group) for group in groups]
        rollouts = distributed.merge([Rollout(example, group, row, tried=first) for example, group, row, first
                                      in zip(examples, groups, rewards, tried, strict=True)])
        if self.scorer.memory is not None and distributed.size() > 1:
            self.scorer.memory.exchange(((item.db_id, b.thought) for item, b in zip(items, found, strict=True)
                                         if b.status != "format"), distributed.gather)
        self.scorer.remember([(rollout.example.db_id, b.thought) for rollout in rollouts for b in rollout.rewards
                              if b.correct])
        return rollouts


def advantages_of(rewards: Sequence[Sequence[RewardBreakdown]], weights: RewardConfig, config: GRPOConfig) -> Tensor:
    """The advantages of completions with these rewards, eq. (1); 0 in groups whose database could not be read.
    [B][G] -> [B, G]"""
    read = [i for i, row in enumerate(rewards) if readable(row)]
    advantages = torch.zeros(len(rewards), len(rewards[0]))
    if not read:
        return advantages
    rows = [rewards[i] for i in read]
    components = None
    if config.advantage_scale == "gdpo":
        apart, weights = rewards_apart(rows, weights)  # [K][B][G], [K]
        components = torch.tensor(apart), weights
    totals = torch.tensor([[b.total for b in row] for row in rows])  # [B, G]
    advantages[read] = group_advantages(totals, config.advantage_scale, components)
    return advantages


def step_advantages(rollouts: Sequence[Rollout], s: Settings) -> Tensor:
    """The advantages of a step's rollouts. -> [B, G]

    With --dynamic-sampling, groups that are not mixed get 0: execution accuracy decides, because the shaped reward
    differs among wrong completions."""
    advantages = advantages_of([rollout.rewards for rollout in rollouts], s.rewards, s.grpo)
    if s.run.dynamic_sampling:
        advantages[[not rollout.mixed for rollout in rollouts]] = 0.0
    return advantages


def penalise(rewards: Sequence[Sequence[RewardBreakdown]], penalties: Tensor) -> list[list[RewardBreakdown]]:
    """Adds a penalty [B, G] to the totals of the rewards [B][G]; it is logged as `overlong`."""
    return [[replace(b, total=b.total + penalty, overlong=penalty) for b, penalty in zip(row, values, strict=True)]
            for row, values in zip(rewards, penalties.tolist(), strict=True)]


def print_unreadable(rollouts: Iterable[Rollout], step: int, databases) -> None:
    """Prints which rollouts are left out of a step because their database could not be read."""
    rollouts = list(rollouts)
    unread = [(rollout.example, next(b for b in rollout.rewards if b.unavailable))
              for rollout in rollouts if not rollout.readable]
    if unread:
        tqdm.write(f"warning, step {step}: {len(unread)} of {len(rollouts)} groups are left out, since their "
                   "database could not be read")
        print_first_reasons([(e.id, b.status, b.error, e.db_id) for e, b in unread], databases, tqdm.write)


def print_first_reasons(failures: Sequence[tuple[str, str, str, str]], databases, write: Callable = print) -> None:
    """Prints the first (question, status, error, db_id) of each kind, one per line."""
    for line in first_reasons([(*failure, str(databases[db_id])) for *failure, db_id in failures]):
        write(f"  {line}")
