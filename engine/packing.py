"""Log-probabilities of a group of completions, with the prompt computed once.

`pack_group` puts a prompt and its G completions into one row: G·(P + C) tokens of compute become P + G·C, and the
gradients are those of G separate rows. Attention runs block by block (attention.py), lm_head sees completion positions
only, a chunk at a time. It works with gradient checkpointing. The plain way is `grpo.plain_logprobs`.

Others compute a shared prompt once as well: Snowflake's ArcticTraining (ZoRRo) and verl's prefix grouper.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.attention import causal_lm, enable, is_exact, no_mask
from engine.row_attention import RowLayout
from grpo import MicroBatch, dropout_off, plain_logprobs, target_logprobs

LOGIT_CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in float32


@dataclass(frozen=True)
class PackedGroup:
    """One row `[prompt | c1 | … | cG]` in which a completion sees the prompt and itself."""

    input_ids: Tensor  # [1, L], L = P + ΣC_i
    position_ids: Tensor  # [1, L], every completion starts at P
    segment_ids: Tensor  # [L], 0 for the prompt, i for completion i
    predictors: Tensor  # [ΣC_i], the positions in the row whose hidden state predicts the completion tokens
    mask: Tensor  # bool [G, T], True on completion tokens, T the longest completion
    prompt: Tensor  # [P]
    completions: list[Tensor]  # G times [C_i]

    @property
    def lengths(self) -> tuple[int, list[int]]:
        """Of the prompt, and of the completions."""
        return len(self.prompt), self.mask.sum(-1).tolist()

    def unpack(self, values: Tensor) -> Tensor:
        """Spreads one value a completion token over the group, padding 0. [ΣC_i] -> [G, T]"""
        return _spread(values, self.mask)


def pack_group(prompt: Tensor, completions: Sequence[Tensor]) -> PackedGroup:
    """Packs a prompt [P] and completions [C_i] into one row: G·(P + C) tokens of compute become P + G·C.

    Raises ValueError: an empty prompt, no completion, or an empty completion.
    """
    if len(prompt) == 0 or not completions or any(len(c) == 0 for c in completions):
        raise ValueError("a group needs a prompt and completions of at least one token each")
    P, lengths = len(prompt), torch.tensor([len(c) for c in completions])
    within = torch.cat([torch.arange(len(c)) for c in completions])  # [ΣC_i], index of a token in its completion
    previous = P - 1 + torch.arange(len(within))  # token t is predicted by the row position of token t − 1,
    predictors = torch.where(within == 0, P - 1, previous)  # and token 0 by the last position of the prompt
    return PackedGroup(
        input_ids=torch.cat([prompt, *completions])[None],
        position_ids=torch.cat([torch.arange(P), P + within])[None],
        segment_ids=torch.repeat_interleave(torch.arange(len(lengths) + 1), F.pad(lengths, (1, 0), value=P)),
        predictors=predictors, mask=_mask(lengths.tolist()),
        prompt=prompt, completions=list(completions))


def _mask(lengths: Sequence[int]) -> Tensor:
    """True on the tokens of rows of these lengths, padded on the right. -> bool [N, T]"""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Puts values, one a token, where a mask is true, and 0 elsewhere. [ΣC], [N, T] -> [N, T]"""
    mask = mask.to(values.device)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def logprobs(model, prompts: Sequence[Tensor], completions: Sequence[Tensor], temperature: float) -> Tensor:
    """`grpo.plain_logprobs` by one packed row, in which completions of the same prompt that follow one another are a
    group. -> [N, T]"""
    if not can_pack(model):
        return plain_logprobs(model, prompts, completions, temperature)
    starts = [i for i in range(len(prompts)) if i == 0 or prompts[i] is not prompts[i - 1]]
    return packed_logprobs(model, [pack_group(prompts[i], completions[i:end])
                                   for i, end in zip(starts, [*starts[1:], len(prompts)], strict=True)], temperature)


def families(prompts: Sequence[Tensor]) -> list[list[int]]:
    """Indices of prompts, sorted, those together of which at least half is the same: questions on one database."""
    kin = []
    for i in sorted(range(len(prompts)), key=lambda i: prompts[i].tolist()):
        if kin and 2 * alike(prompts[kin[-1][0]], prompts[i]) >= len(prompts[i]):
            kin[-1].append(i)
        else:
            kin.append([i])
    return kin


def shared_by(prompts: Sequence[Tensor], family: Sequence[int]) -> int:
    """How many tokens a family has in common at its beginning: those of its first and last, for it is sorted."""
    return alike(prompts[family[0]], prompts[family[-1]])


def alike(a: Tensor, b: Tensor) -> int:
    """How many tokens two prompts [P] have in common at their beginning."""
    n = min(len(a), len(b))
    return int((a[:n] == b[:n]).cumprod(0).sum())


def join(batches: Sequence[MicroBatch], trained: Sequence[bool], tokens: int) -> list[MicroBatch]:
    """Puts groups, each a micro-batch, into passes of up to so many tokens, or of a single group.

    Those that are trained are not mixed with others, which need no gradient.
    """
    passes = []
    for kind in (True, False):
        chosen = [batch for batch, wanted in zip(batches, trained, strict=True) if wanted is kind]
        passes += fill(chosen, _tokens, tokens)
    return [_joined(batches) for batches in passes]


def _tokens(batches: Sequence[MicroBatch]) -> int:
    return sum(len(batch.prompts[0]) + sum(map(len, batch.completions)) for batch in batches)


def fill(items: Sequence, size: Callable[[list], int], tokens: int) -> list[list]:
    """Splits items, in their order, into parts whose size is at most this many tokens, or of a single item."""
    parts = []
    for item in items:
        if parts and size([*parts[-1], item]) <= tokens:
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts


def _joined(batches: Sequence[MicroBatch]) -> MicroBatch:
    T = max(batch.mask.shape[1] for batch in batches)
    lists = [[one for batch in batches for one in getattr(batch, name)]
             for name in ("rows", "prompts", "completions", "sampled_logps")]
    return MicroBatch(*lists, torch.cat([F.pad(batch.mask, (0, T - batch.mask.shape[1])) for batch in batches]))


def completion_logprobs(model, packed: PackedGroup, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every completion token under softmax(logits / temperature).

    -> logp [G, T] with gradient, entropy [G, T] without; padding 0; float32 or wider.
    """
    device, P = next(model.parameters()).device, len(packed.prompt)
    rows = [torch.cat([packed.prompt, c])[None].to(device) for c in packed.completions]
    with torch.no_grad():
        logits = torch.cat([model(input_ids=row, use_cache=False).logits[0, P - 1:-1] for row in rows])  # [ΣC_i, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        entropy = packed.unpack(torch.special.entr((logits / temperature).softmax(-1)).sum(-1))
    return logprobs(model, [packed.prompt] * len(packed.completions), packed.completions, temperature), entropy


def can_pack(model, quiet: bool = False) -> bool:
    """Whether a model takes packed rows; unless quiet a warning says if it cannot."""
    return is_exact(model, "packed rows", _gap, quiet)


def _gap(model) -> float:
    """Largest difference of a packed row's log-probabilities from those of padded rows."""
    prompts = [torch.arange(2, 9)] * 3 + [torch.arange(4, 8)]
    completions = [torch.arange(3, 3 + n) for n in (5, 1, 3, 4)]
    with torch.no_grad(), dropout_off(model):
        groups = [pack_group(prompts[0], completions[:3]), pack_group(prompts[3], completions[3:])]
        packed = packed_logprobs(model, groups, 1.0)
        return (packed - plain_logprobs(model, prompts, completions, 1.0)).abs().max().item()


def packed_logprobs(model, groups: Sequence[PackedGroup], temperature: float) -> Tensor:
    """Log-probability of every completion token of groups in one row, with gradient. -> [N, T]"""
    lm_head, hidden = packed_hidden(model, groups)
    completions = [completion for group in groups for completion in group.completions]
    logp = token_logprobs(lm_head, hidden, torch.cat(completions).to(hidden.device), temperature)  # [ΣC]
    return _spread(logp, _mask([len(completion) for completion in completions]))


def packed_hidden(model, groups: Sequence[PackedGroup]) -> tuple[torch.nn.Module, Tensor]:
    """lm_head, and the hidden states [ΣC, D] that predict the completion tokens of groups in one row."""
    causal = causal_lm(model)
    lm_head = causal.get_output_embeddings()
    device = lm_head.weight.device
    enable(model)
    starts = accumulate((group.input_ids.shape[1] for group in groups[:-1]), initial=0)
    predictors = torch.cat([start + group.predictors for start, group in zip(starts, groups, strict=True)])
    ids, positions = (torch.cat(rows, dim=1).to(device) for rows in zip(
        *((group.input_ids, group.position_ids) for group in groups), strict=True))  # [1, L] each
    hidden = causal.get_decoder()(
        input_ids=ids, position_ids=positions, use_cache=False, attention_mask=no_mask(device),
        layout=RowLayout([group.lengths for group in groups], device)).last_hidden_state[0]  # [L, D]
    return lm_head, hidden[predictors.to(device)]


def token_logprobs(lm_head, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Log-probability of each target. hidden [N, D], targets [N] -> [N]

    The [N, V] logits never exist at once: lm_head runs on chunks, which backward computes again. Where one chunk is
    enough its logits are kept.
    """
    chunk = max(1, LOGIT_CHUNK_ELEMENTS // lm_head.weight.shape[0])
    if len(hidden) <= chunk:
        return target_logprobs(lm_head(hidden), targets, temperature)
    if type(lm_head) is torch.nn.Linear and lm_head.bias is None:
        return _ChunkedLogprobs.apply(lm_head.weight, hidden, targets, temperature, chunk)
    return torch.cat([checkpoint(lambda h, y: target_logprobs(lm_head(h), y, temperature), h, y, use_reentrant=False)
                      for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)])


class _ChunkedLogprobs(torch.autograd.Function):
    """`token_logprobs` for a plain linear lm_head. One gradient of its weight is added to in place, chunk by chunk,
    where autograd would hold several, each as large as the weight."""

    @staticmethod
    def forward(ctx, weight, hidden, targets, temperature, chunk):
        ctx.save_for_backward(weight, hidden, targets)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, F.linear(hidden[:1], weight[:1]).dtype  # autocast's
        w = weight.to(ctx.dtype)  # once, where autocast would cast it for each chunk
        return torch.cat([target_logprobs(F.linear(h.to(ctx.dtype), w), y, temperature)
                          for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, hidden, targets = ctx.saved_tensors
        w, to_hidden = weight.to(ctx.dtype), torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[0] else None
        for h, y, g, out in zip(*(x.split(ctx.chunk) for x in (hidden, targets, grad, to_hidden)), strict=True):
            h = h.to(ctx.dtype)
            p = (F.linear(h, w).to(grad.dtype) / ctx.temperature).softmax(-1)
            d = p.mul_(-g[:, None]).scatter_add_(1, y[:, None], g[:, None]).div_(ctx.temperature)  # of the logits
            d = d.to(ctx.dtype)
            out.copy_(d @ w)
            if to_weight is not None:
                to_weight.addmm_(d.T, h) if weight.dtype == ctx.dtype else to_weight.add_(d.T @ h)
        return to_weight, to_hidden, None, None, None
