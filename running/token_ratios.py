"""What an update does to each token of one group, for the report: its probability after over before, eq. (2)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from grpo import Engine, Group, GRPOConfig, dropout_off


def widest_group(advantages: Tensor) -> int:
    """The number of the group with most to learn. advantages: [B, G]"""
    return int((advantages.amax(1) - advantages.amin(1)).argmax())


class TokenWatch:
    """Made before the update, asked for the ratios after it."""

    def __init__(self, policy, group: Group, config: GRPOConfig, engine: Engine,
                 inside: Callable[[], AbstractContextManager]):
        """inside: what log-probabilities are computed in, such as bf16 arithmetic."""
        self.policy, self.group, self.config, self.engine, self.inside = policy, group, config, engine, inside
        self.before = self.logps()

    @torch.no_grad()
    def logps(self) -> list[Tensor]:
        """Log-probabilities of the completions under the policy as it is. -> G times [C_i]"""
        completions, size, logps = self.group.completions, self.config.micro_batch or len(self.group.completions), []
        with self.inside(), dropout_off(self.policy.model):
            for start in range(0, len(completions), size):
                part = completions[start:start + size]
                rows = self.engine.logprobs(self.policy.model, [self.group.prompt] * len(part), part,
                                            self.config.temperature)
                logps += [row[:len(c)] for row, c in zip(rows.float().cpu(), part, strict=True)]
        return logps

    def ratios(self) -> Sequence[dict]:
        """Per completion its tokens as text and their ratios."""
        return [{"tokens_text": [self.policy.tokenizer.decode([token]) for token in tokens.tolist()],
                 "ratios": [round(ratio, 4) for ratio in (new - old).exp().tolist()]}
                for tokens, old, new in zip(self.group.completions, self.before, self.logps(), strict=True)]
