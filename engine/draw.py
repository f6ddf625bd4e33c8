"""Draws a token from a large vocabulary: `grpo.sample_token` with a shorter cumulative sum."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # tokens whose probabilities are summed before the search among them


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token per row from softmax(logits / temperature); 0 is greedy. [N, V] -> token, logp, entropy [N] each

    uniform: [N], float64 in [0, 1), the only source of randomness.
    """
    logp = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    p = logp.exp()
    token = invert_cdf(p, uniform) if temperature else logp.argmax(-1)
    entropy = -(p * logp.clamp(min=-1e4)).sum(-1)  # 0 times -inf would not be 0
    return token, logp.gather(-1, token[:, None])[:, 0], entropy


def invert_cdf(p: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform number. [N, V], float64 [N] -> [N]"""
    N, V = p.shape
    blocks = F.pad(p, (0, -V % BLOCK)).view(N, -1, BLOCK)
    cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # [N, V / BLOCK]
    target = uniform[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[1] - 1)  # [N, 1]
    within = blocks.gather(1, block[..., None].expand(N, 1, BLOCK))[:, 0].double().cumsum(-1)  # [N, BLOCK]
    rest = target - F.pad(cdf, (1, 0)).gather(1, block)
    rest = torch.minimum(rest, within[:, -1:] * (1 - 2**-52))  # rounding must not lead past the block's last token
    return (block * BLOCK + torch.searchsorted(within, rest, right=True).clamp(max=BLOCK - 1)).clamp(max=V - 1)[:, 0]
