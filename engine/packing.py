"""Log-probabilities of a group of completions, with the prompt computed once.

`pack_group` puts a prompt and its G completions into one row, G·(P + C) tokens of compute become P + G·C, and the
gradients are those of G separate rows. `completion_logprobs` runs it: lm_head sees completion positions only, in
chunks. It works with gradient checkpointing, and computes attention block by block (attention.py) or, with models that
do not let it, under a 4-D mask; each way is checked against the plain padded forward on first use. This file is a part
of grpo.py, which re-exports it.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.attention import PackedLayout, causal_lm, enable, is_exact, no_mask, window_allows

LOGIT_CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in float32


@contextmanager
def dropout_off(model):
    """Evaluation mode inside, so that rollout and update see the same policy; every module's mode comes back.

    Where gradients are wanted, layers with gradient checkpointing stay in training mode, which is what switches
    the checkpointing on; their dropout sits in child modules and is off.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for module, _ in modes:
            if torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
                module.training = True
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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

    def layout(self, device) -> PackedLayout:
        """Where in the row each token of each completion stands, for attention block by block."""
        starts = F.pad(self.mask.sum(-1).cumsum(0), (1, 0))[:-1] + len(self.prompt)  # [G]
        slots = (starts[:, None] + torch.arange(self.mask.shape[1])) * self.mask  # [G, T]
        return PackedLayout(len(self.prompt), slots.to(device), self.mask.to(device))

    def attention_mask(self, dtype: torch.dtype, device) -> Tensor:
        """Additive mask [1, 1, L, L]: 0 where a query (row) may see a key (column), else the lowest number."""
        segment = self.segment_ids.to(device)
        seen = ((segment == 0) | (segment == segment[:, None])).tril()  # [L, L]
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]

    def unpack(self, values: Tensor) -> Tensor:
        """Spreads one value a completion token over the group, padding 0. [ΣC_i] -> [G, T]"""
        mask = self.mask.to(values.device)
        return values.new_zeros(mask.shape).masked_scatter(mask, values)


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
        predictors=predictors, mask=torch.arange(int(lengths.max())) < lengths[:, None],
        prompt=prompt, completions=list(completions))


def completion_logprobs(model, packed: PackedGroup, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every completion token under softmax(logits / temperature).

    -> logp [G, T] with gradient, entropy [G, T] without; padding 0; float32 or wider. A model that cannot run a
    packed row (found by comparing both ways on first use) takes the padded way instead, with a warning.
    """
    hooked = getattr(model, "hooked_logprobs", None)  # of a model that is sharded over processes (distributed.py)
    return hooked(packed, temperature) if hooked else direct_logprobs(model, packed, temperature)


def direct_logprobs(model, packed: PackedGroup, temperature: float) -> tuple[Tensor, Tensor]:
    """`completion_logprobs` of a model that is here as a whole."""
    ways = {"packed rows in blocks": "a mask over the whole row", "packed rows": "padded rows"}
    reach = len(packed.prompt) + packed.mask.shape[1]
    for way, instead in ways.items() if window_allows(model, reach) else ():
        if is_exact(model, way, lambda way=way: _gap(model, packed, temperature, way), instead):
            return _packed_logprobs(model, packed, temperature, way)
    return padded_logprobs(model, packed, temperature)


def _packed_logprobs(model, packed: PackedGroup, temperature: float, way: str) -> tuple[Tensor, Tensor]:
    causal = causal_lm(model)
    backbone, lm_head = causal.get_decoder(), causal.get_output_embeddings()
    device, dtype = lm_head.weight.device, causal.get_input_embeddings().weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if way == "packed rows in blocks":
        enable(model)
        attention = {"attention_mask": no_mask(device), "layout": packed.layout(device)}
    else:
        attention = {"attention_mask": packed.attention_mask(dtype, device)}
    hidden = backbone(input_ids=packed.input_ids.to(device), position_ids=packed.position_ids.to(device),
                      use_cache=False, **attention).last_hidden_state[0]
    targets = torch.cat(packed.completions).to(device)
    logp, entropy = token_logprobs(lm_head, hidden[packed.predictors.to(device)], targets, temperature)
    return packed.unpack(logp), packed.unpack(entropy)


def _gap(model, packed: PackedGroup, temperature: float, way: str) -> float:
    """Largest difference of a packed from the padded forward, on the prompt and its two longest completions."""
    sample = pack_group(packed.prompt, sorted(packed.completions, key=len)[-2:])
    with torch.no_grad(), dropout_off(model):
        difference = (_packed_logprobs(model, sample, temperature, way)[0]
                      - padded_logprobs(model, sample, temperature)[0])
    return difference.abs().max().item()


def token_logprobs(lm_head, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution. hidden [N, D], targets [N] -> [N], [N]

    The [N, V] logits never exist at once: lm_head runs on chunks, which backward computes again. Where one chunk is
    enough its logits are kept.
    """
    chunk = max(1, LOGIT_CHUNK_ELEMENTS // lm_head.weight.shape[0])
    if len(hidden) <= chunk:
        return _chunk_logprobs(lm_head, hidden, targets, temperature)
    if type(lm_head) is torch.nn.Linear and lm_head.bias is None:
        return _ChunkedLogprobs.apply(lm_head.weight, hidden, targets, temperature, chunk)
    pieces = [checkpoint(_chunk_logprobs, lm_head, h, y, temperature, use_reentrant=False)
              for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)]
    logp, entropy = zip(*pieces, strict=True)
    return torch.cat(logp), torch.cat(entropy)


def _chunk_logprobs(lm_head, hidden, targets, temperature):
    return _gather_logprobs(lm_head(hidden), targets, temperature)


class _ChunkedLogprobs(torch.autograd.Function):
    """`token_logprobs` for a plain linear lm_head. One gradient of its weight is added to in place, chunk by chunk,
    where autograd would hold several, each as large as the weight."""

    @staticmethod
    def forward(ctx, weight, hidden, targets, temperature, chunk):
        pieces = [_gather_logprobs(F.linear(h, weight), y, temperature)
                  for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)]
        logp, entropy = map(torch.cat, zip(*pieces, strict=True))
        ctx.save_for_backward(weight, hidden, targets)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, F.linear(hidden[:1], weight[:1]).dtype  # autocast's
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
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


def _gather_logprobs(logits, targets, temperature):  # [..., V], [...] -> [...], [...]
    logp = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[..., None])[..., 0], entropy


def padded_logprobs(model, packed: PackedGroup, temperature: float) -> tuple[Tensor, Tensor]:
    """The plain way: G padded rows `prompt + completion`, all logits. Same results as `completion_logprobs`."""
    device, P, T = next(model.parameters()).device, len(packed.prompt), packed.mask.shape[1]
    ids = torch.stack([F.pad(torch.cat([packed.prompt, c]), (0, T - len(c))) for c in packed.completions]).to(device)
    mask = F.pad(packed.mask, (P, 0), value=True).to(device)
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, P - 1:-1]  # [G, T, V]
    logp, entropy = _gather_logprobs(logits, ids[:, P:], temperature)
    return logp * mask[:, P:], entropy * mask[:, P:]
