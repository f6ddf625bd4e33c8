"""Guided groups: where all completions of a question are wrong, the last gives way to a trace with the gold SQL.

Policy gradient prefers one completion to another, so a question that no sample answers teaches nothing. After LUFFY
(arXiv 2504.14945), without its shaping of the ratio: a trace stands in for a sample, at the reward that a sample would
get. Its log-probabilities are the policy's own, so its ratio is 1 at the first update. All metrics are of samples.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from grpo import Engine, GRPOConfig, dropout_off
from policy import Policy
from rewards import RewardBreakdown, RewardItem, RewardScorer
from rollout import Rollout


class Guide:
    """The traces of a run's questions."""

    def __init__(self, traces: Sequence[Tensor | None], policy: Policy, engine: Engine, scorer: RewardScorer,
                 config: GRPOConfig, inside: Callable[[], AbstractContextManager]):
        """traces: of each question [C] with EOS, or None. inside: the context in which log-probabilities are computed,
        such as bf16 arithmetic."""
        self.traces, self.policy, self.engine, self.scorer = traces, policy, engine, scorer
        self.config, self.inside = config, inside

    def helps(self, rollout: Rollout) -> bool:
        """Whether all completions are wrong and there is a trace."""
        return (rollout.readable and not any(b.correct for b in rollout.rewards)
                and self.traces[rollout.number] is not None)

    def guided(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts; those that are all wrong with their trace in place of the last completion, if it is right."""
        stuck = [i for i, rollout in enumerate(rollouts) if self.helps(rollout)]
        found = list(rollouts)
        if not stuck:
            return found
        traces = [self.traces[found[i].number] for i in stuck]
        examples = [found[i].example for i in stuck]
        rewards = self.scorer.score([RewardItem(e.db_id, e.golds, self.policy.decode(trace), e.question)
                                     for e, trace in zip(examples, traces, strict=True)], remember=False)
        logps = self.logps([found[i] for i in stuck], traces)
        for i, trace, reward, logp in zip(stuck, traces, rewards, logps, strict=True):
            if reward.correct and logp.isfinite().all():  # --constrain may forbid it
                found[i] = with_trace(found[i], trace, reward, logp)
        return found

    @torch.no_grad()
    def logps(self, rollouts: Sequence[Rollout], traces: Sequence[Tensor]) -> list[Tensor]:
        """The policy's log-probabilities of a trace for each rollout. -> [C_i] each"""
        rules = [rollout.group.rules[-1] if rollout.group.rules else None for rollout in rollouts]
        with self.inside(), dropout_off(self.policy.model):
            rows = self.engine.logprobs(self.policy.model, [rollout.group.prompt for rollout in rollouts], list(traces),
                                        self.config.temperature, rules)
        return [row[:len(trace)] for row, trace in zip(rows.float().cpu(), traces, strict=True)]


def with_trace(rollout: Rollout, trace: Tensor, reward: RewardBreakdown, logp: Tensor) -> Rollout:
    """A rollout with a trace [C] in place of its last completion. logp: [C]"""
    group = rollout.group
    return replace(
        rollout, guided=True, rewards=[*rollout.rewards[:-1], reward],
        tried=[*rollout.tried[:-1], {}] if rollout.tried else (),
        group=replace(group, completions=[*group.completions[:-1], trace], logps=[*group.logps[:-1], logp],
                      truncated=[*group.truncated[:-1], False], entropies=(),
                      sampled=[*group.sampled[:-1], torch.ones(len(trace), dtype=torch.bool)] if group.sampled else ()))
