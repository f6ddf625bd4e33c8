"""The effect of an update on each token of one group, for the report: its probability after / before, eq. (2)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from grpo import Engine, Group, GRPOConfig, dropout_off, micro_batches
from second_try import masks


def widest_group(advantages: Tensor) -> int:
    """The index of the group with the widest range of advantages. advantages: [B, G]"""
    return int((advantages.amax(1) - advantages.amin(1)).argmax())


class TokenWatch:
    """Create it before the update; ask it for the ratios after the update."""

    def __init__(self, policy, group: Group, config: GRPOConfig, engine: Engine,
                 inside: Callable[[], AbstractContextManager]):
        """inside: the context in which log-probabilities are computed, such as bf16 arithmetic."""
        self.policy, self.group, self.config, self.engine, self.inside = policy, group, config, engine, inside
        self.before = self.logps()

    @torch.no_grad()
    def logps(self) -> list[Tensor]:
        """Log-probabilities of the completions under the current policy. -> G times [C_i]"""
        logps, no_advantages = [], torch.zeros(1, len(self.group.completions))
        with self.inside(), dropout_off(self.policy.model):
            for batch in micro_batches([self.group], no_advantages, self.config):
                rows = self.engine.logprobs(self.policy.model, batch.prompts, batch.completions,
                                            self.config.temperature, batch.rules)
                logps += [row[:len(c)] for row, c in zip(rows.float().cpu(), batch.completions, strict=True)]
        return logps

    def ratios(self) -> Sequence[dict]:
        """Per completion, its tokens as text and their ratios."""
        return [{"tokens_text": [self.policy.tokenizer.decode([token]) for token in tokens[mask].tolist()],
                 "ratios": [round(ratio, 4) for ratio in (new - old)[mask].exp().tolist()]}
                for tokens, mask, old, new in zip(self.group.completions, masks(self.group), self.before, self.logps(),
                                                  strict=True)]
