"""Variants of GRPO's steps: losses, advantages and weights, one small function each.

`GRPOConfig` names them, and grpo.py looks them up in its tables. A new loss is a surrogate (or an average) and a line
in LOSSES; a new kind of advantage is a function and a line in ADVANTAGES (docs/extend.md).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grpo import (
    ADVANTAGES,
    LOSSES,
    Group,
    GRPOConfig,
    clipped_surrogate,
    flat_groups,
    group_advantages,
    sequence_mean,
)

# ---- surrogates: logp, log_ratio [N, T], A [N, 1] or [N, T], mask [N, T], config -> the objective of each token and
# the log-ratios in it, [N, T] each


def sequence_ratio(logp: Tensor, log_ratio: Tensor, A: Tensor, mask: Tensor, config: GRPOConfig):
    """GSPO (arXiv 2507.18071): one ratio per sequence, the geometric mean of its tokens' ratios."""
    lengths = mask.sum(-1).clamp(min=1)  # [N]
    log_ratio = (log_ratio.sum(-1) / lengths)[:, None] * mask  # [N, T]
    return clipped_surrogate(logp, log_ratio, A, mask, config)


def clipped_weight(logp: Tensor, log_ratio: Tensor, A: Tensor, mask: Tensor, config: GRPOConfig):
    """CISPO (arXiv 2506.13585): the clipped ratio is a constant weight, so that no token loses its gradient."""
    weight = log_ratio.exp().clamp(1 - config.clip_low, 1 + config.clip_high)
    return weight.detach() * A * logp, log_ratio


def dual_clip(surrogate: Tensor, A: Tensor, config: GRPOConfig) -> Tensor:
    """Bounds the surrogate below where A < 0 (arXiv 1912.09729): beyond the bound, a bad token has no gradient."""
    return torch.where(A < 0, surrogate.maximum(config.dual_clip * A), surrogate)


# ---- averages: mask [N, T] -> divisor of each row's sum [N], divisor of the sum of rows


def token_mean(mask: Tensor, config: GRPOConfig) -> tuple[Tensor, float]:
    """DAPO (arXiv 2503.14476): every token of the batch weighs the same."""
    return torch.ones_like(mask[:, 0], dtype=torch.float32), mask.sum().item()


def constant_length(mask: Tensor, config: GRPOConfig) -> tuple[Tensor, float]:
    """Dr. GRPO (arXiv 2503.20783): every sequence is divided by the longest length allowed, not by its own."""
    ones, sequences = torch.ones_like(mask[:, 0], dtype=torch.float32), sequence_mean(mask, config)[1]
    return ones, sequences * config.max_completion_tokens


LOSSES |= {
    "dapo": (clipped_surrogate, token_mean),
    "dr_grpo": (clipped_surrogate, constant_length),
    "gspo": (sequence_ratio, sequence_mean),
    "cispo": (clipped_weight, token_mean),
}


# ---- advantages: rewards [B, G], components -> [B, G], as `grpo.group_advantages` takes and returns them


def over_batch_std(rewards: Tensor, components=None) -> Tensor:
    """Centred in the group, divided by the batch's standard deviation (REINFORCE++, arXiv 2501.03262)."""
    centred = unscaled(rewards)
    return centred if flat_groups(rewards).all() else centred / rewards.std()


def unscaled(rewards: Tensor, components=None) -> Tensor:
    """Centred in the group only (Dr. GRPO)."""
    return (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(flat_groups(rewards)[:, None], 0.0)


def gdpo(rewards: Tensor, components) -> Tensor:
    """GDPO (arXiv 2601.05242): K rewards, each divided by its standard deviation in the group, are weighted, summed
    and divided by the batch's, so that a reward that varies more does not drown the others.

    components: rewards [K, B, G] and their weights [K]."""
    if components is None:
        raise ValueError("gdpo needs the components of the rewards, which it scales one by one")
    apart, weights = components
    return over_batch_std(sum(w * group_advantages(R) for w, R in zip(weights, apart, strict=True)))


ADVANTAGES |= {"batch": over_batch_std, "none": unscaled, "gdpo": gdpo}


# ---- weights and penalties


def sampler_weights(gap: Tensor, config: GRPOConfig) -> Tensor:
    """The weight of each token's advantage, from gap = log π_old − log π_sampler, 0 up to rounding. [n, T] -> [n, T]

    For a sampler whose arithmetic differs from that of training: sampler_cap is truncated importance sampling
    (fengyao.notion.site/off-policy-rl), sampler_veto drops completions with a larger gap."""
    weights = gap.exp().clamp(max=config.sampler_cap) if config.sampler_cap else torch.ones_like(gap)
    return weights.masked_fill(gap.abs().amax(-1, keepdim=True) > (config.sampler_veto or math.inf), 0.0)


def overlong_penalty(groups: Sequence[Group], config: GRPOConfig) -> Tensor:
    """DAPO's soft punishment of length (arXiv 2503.14476, eq. 13), added to the rewards. -> [B, G]

    0 up to `max_completion_tokens - overlong_buffer` tokens, then falling linearly to -1 at the limit. Of a second try,
    the tokens since what was not sampled count."""
    limit = config.max_completion_tokens
    buffer = min(config.overlong_buffer or limit // 5 or 1, limit)
    sampled = [group.sampled or [torch.ones(len(c)) for c in group.completions] for group in groups]
    lengths = torch.tensor([[mask.float().flip(0).cumprod(0).sum() for mask in masks] for masks in sampled])  # [B, G]
    return ((limit - buffer - lengths) / buffer).clamp(-1, 0)


# ---- rules: which tokens a completion may contain, as prompts/names.py


def forbid(logits: Tensor, bits: Sequence[Tensor | None]) -> Tensor:
    """Logits of -inf for the tokens that a rule forbids, whose bit is 0. [N, V], N times int32 [⌈V / 32⌉] -> [N, V]

    None stands for a row without a rule; no rows at all, for none with one."""
    limited = [i for i, row in enumerate(bits) if row is not None]
    if not limited:
        return logits
    rows = torch.stack([bits[i] for i in limited])[..., None].to(logits.device)  # [n, ⌈V / 32⌉, 1]
    free = (rows >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1).flatten(1)[:, :logits.shape[1]]
    logits = logits.clone()
    logits[limited] = logits[limited].masked_fill(free == 0, -math.inf)
    return logits


def allowed(rule, completion: Tensor) -> list[Tensor | None]:
    """The tokens that a rule allowed in place of each token of a completion [C], as `forbid` takes them. -> C rows"""
    if rule is None:
        return [None] * len(completion)
    written, rows = rule.start(), []
    for token in completion.tolist():
        rows.append(written.bits())
        written.take(token)
    return rows


def forbid_in_rows(logits: Tensor, prompts: Sequence[Tensor], completions: Sequence[Tensor], rules: Sequence) -> Tensor:
    """`forbid` in rows `prompt + completion`, where the logits of a token stand one before it. -> [N, L, V]"""
    return torch.stack([forbid(row, [*[None] * (len(prompt) - 1), *allowed(rule, completion)])
                        for row, prompt, completion, rule in zip(logits, prompts, completions, rules, strict=True)])
