"""Decoding of groups, a token of every completion at a time: prompts are computed once for their G completions.

`SharedDecoder` keeps a prompt's keys and values once and reads them once a token for the whole group; `CopyingDecoder`
repeats them in the model's own cache, for models whose attention cannot be exchanged. A model is checked against the
latter on first use. This file is a part of grpo.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import SharedPrompts, enable, is_exact, no_mask, window_allows


def start_decoding(model, prompts: Sequence[Tensor], G: int, max_tokens: int) -> "CopyingDecoder":
    """Prefills B prompts of unequal length for G completions each; the decoder's `logits` [B·G, V] come next.

    Rows are prompt-major: completion j of prompt b is row b·G + j.
    """
    longest = max(len(prompt) for prompt in prompts)
    shared = window_allows(model, longest + max_tokens) and is_exact(
        model, "shared prompts", lambda: _gap(model, prompts), "copying each prompt's keys and values")
    return (SharedDecoder if shared else CopyingDecoder)(model, prompts, G, max_tokens)


class CopyingDecoder:
    """Decodes with the cache of transformers, in which each completion has a copy of its prompt."""

    def __init__(self, model, prompts: Sequence[Tensor], G: int, max_tokens: int):
        ids, mask = left_pad(prompts, next(model.parameters()).device)  # [B, P] each
        out = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                    use_cache=True, logits_to_keep=1)
        self.model, self.logits = model, out.logits[:, -1].repeat_interleave(G, 0)  # [B·G, V]
        self.position = mask.sum(-1, keepdim=True).repeat_interleave(G, 0)  # [B·G, 1], of the next token
        self._take(out.past_key_values, mask, G, max_tokens)

    def _take(self, cache, mask: Tensor, G: int, max_tokens: int) -> None:
        self.cache, self.mask = cache, mask.repeat_interleave(G, 0)
        cache.batch_repeat_interleave(G)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on; indices [n] in ascending order."""
        self.position = self.position[rows]
        self._keep(rows)

    def _keep(self, rows: Tensor) -> None:
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)

    def step(self, tokens: Tensor) -> Tensor:
        """Appends a token to each row; the logits of what follows. [n] -> [n, V]"""
        self.logits = self._forward(tokens[:, None]).logits[:, -1]
        self.position = self.position + 1
        return self.logits

    def _forward(self, ids: Tensor):
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self.model(input_ids=ids, attention_mask=self.mask, position_ids=self.position,
                          past_key_values=self.cache, use_cache=True)


class SharedDecoder(CopyingDecoder):
    """Decodes with one copy of each prompt's keys and values (`attention.SharedPrompts`)."""

    def _take(self, cache, mask: Tensor, G: int, max_tokens: int) -> None:
        enable(self.model)
        self.layout = SharedPrompts([(layer.keys, layer.values) for layer in cache.layers], mask, G, max_tokens)

    def _keep(self, rows: Tensor) -> None:
        self.layout.keep(rows)

    def _forward(self, ids: Tensor):
        out = self.model(input_ids=ids, attention_mask=no_mask(ids.device), position_ids=self.position,
                         use_cache=False, layout=self.layout)
        self.layout.length += 1
        return out


def _gap(model, prompts: Sequence[Tensor]) -> float:
    """Largest difference between both decoders on the ends of two prompts, two completions each, rows leaving."""
    prompts = [prompts[0][-32:], prompts[-1][-24:]]
    decoders = [kind(model, prompts, 2, 3) for kind in (SharedDecoder, CopyingDecoder)]
    rows = torch.arange(2 * len(prompts), device=decoders[0].logits.device)
    gaps = []
    for kept in (rows, rows[1:], rows[:-2]):
        tokens = decoders[1].logits.argmax(-1)[kept]
        shared, copied = [(decoder.keep(kept), decoder.step(tokens))[1].float().log_softmax(-1) for decoder in decoders]
        gaps.append((shared - copied).abs().max().item())
    return max(gaps)


def left_pad(prompts: Sequence[Tensor], device) -> tuple[Tensor, Tensor]:
    """Stacks prompts of unequal length, padded on the left. -> ids [B, P], mask [B, P] of 0 and 1."""
    P = max(len(p) for p in prompts)
    ids = torch.stack([F.pad(p, (P - len(p), 0)) for p in prompts]).to(device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, (torch.arange(P, device=device) >= P - lengths[:, None]).long()
