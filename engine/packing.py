"""Log-probabilities of completions, with common prefixes computed once.

`pack_group` puts a prompt and its G completions into one row: G·(P + C) tokens of compute become P + G·C, and the
gradients are those of G separate rows. `pack` does so with several prompts, which may share prefixes themselves, as
questions on one database do (tree.py). lm_head sees completion positions only, a chunk at a time. Gradient
checkpointing works. The plain version is `grpo.plain_logprobs`.

Others also compute a shared prompt once: Snowflake's ArcticTraining (ZoRRo) and verl's prefix grouper.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.attention import causal_lm, enable, is_exact, no_mask
from engine.row_attention import RowLayout
from engine.tree import Node, Tree
from grpo import GRPOConfig, MicroBatch, dropout_off, has_gradient, plain_logprobs, target_logprobs
from variants import allowed, forbid

LONGEST = 2**14  # tokens of a pass: more gain nothing, and a group of more is split
LISTS = ("prompts", "completions", "sampled_logps", "rules")  # of a MicroBatch, one entry per completion
LOGIT_CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in float32


@dataclass(frozen=True)
class PackedRow:
    """Completions of one or several prompts in one row; each completion sees its prompt and itself."""

    input_ids: Tensor  # [1, L]
    nodes: Sequence[Node]  # the row as a tree, see tree.py
    targets: Tensor  # [ΣC_i], the places of the completion tokens in the row
    predictors: Tensor  # [ΣC_i], the places whose hidden state predicts them
    mask: Tensor  # bool [N, T], True on completion tokens, T the longest completion
    prompts: Sequence[Tensor]  # N times [P_i]
    completions: Sequence[Tensor]  # N times [C_i]

    def unpack(self, values: Tensor) -> Tensor:
        """Spreads one value per completion token over the completions, padding 0. [ΣC_i] -> [N, T]"""
        mask = self.mask.to(values.device)
        return values.new_zeros(mask.shape).masked_scatter(mask, values)


class PackedGroup(PackedRow):
    """The row `[prompt | c1 | … | cG]`, L = P + ΣC_i."""

    @property
    def prompt(self) -> Tensor:
        return self.prompts[0]  # [P]

    @property
    def position_ids(self) -> Tensor:
        return RowLayout(self.nodes, "cpu").positions[None]  # [1, L], every completion starts at P

    @property
    def segment_ids(self) -> Tensor:
        return RowLayout(self.nodes, "cpu").spread(range(len(self.nodes)))  # [L], 0: the prompt, i: completion i


def pack_group(prompt: Tensor, completions: Sequence[Tensor]) -> PackedGroup:
    """Packs a prompt [P] and completions [C_i] into one row: G·(P + C) tokens of compute become P + G·C.

    Raises ValueError: an empty prompt, no completion, or an empty completion.
    """
    if len(prompt) == 0 or not completions or any(len(c) == 0 for c in completions):
        raise ValueError("a group needs a prompt and completions of at least one token each")
    apart = [torch.cat([prompt, torch.full_like(c, 2**62 + i)]) for i, c in enumerate(completions)]  # no common prefix
    return _packed(PackedGroup, [prompt] * len(completions), completions, Tree(apart, least=0))


def pack(prompts: Sequence[Tensor], completions: Sequence[Tensor], least: int | None = None) -> PackedRow:
    """Packs N completions, each with its prompt, into one row. A common prefix appears once: a schema, a prompt, the
    beginning of completions.

    least: tokens that each common prefix must save; None: `tree.LEAST`.
    """
    return _packed(PackedRow, prompts, completions, Tree(_rows(prompts, completions), least))


def _packed(kind: type, prompts: Sequence[Tensor], completions: Sequence[Tensor], tree: Tree) -> PackedRow:
    """The row of a tree."""
    places = [at[len(prompt) - 1:] for prompt, at in zip(prompts, tree.places, strict=True)]  # from the prompt's last
    return kind(input_ids=tree.ids(_rows(prompts, completions)), nodes=tree.nodes,
                targets=torch.cat([at[1:] for at in places]), predictors=torch.cat([at[:-1] for at in places]),
                mask=_mask([len(c) for c in completions]), prompts=prompts, completions=completions)


def _rows(prompts: Sequence[Tensor], completions: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]


def _mask(lengths: Sequence[int]) -> Tensor:
    """True on the tokens of rows of these lengths, padded on the right. -> bool [N, T]"""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def logprobs(model, prompts: Sequence[Tensor], completions: Sequence[Tensor], temperature: float,
             rules: Sequence | None = None) -> Tensor:
    """`grpo.plain_logprobs` in one packed row. -> [N, T]"""
    if not can_pack(model):
        return plain_logprobs(model, prompts, completions, temperature, rules)
    return packed_logprobs(model, pack(prompts, completions), temperature, rules)


# ---- passes


def fill(groups: Sequence[Sequence[Tensor]], tokens: int) -> list[list[int]]:
    """Splits groups of rows into parts whose trees have up to `tokens` tokens, or of a single group. Groups with a
    common prefix stay together. -> the groups' indices per part"""
    group_of = [number for number, rows in enumerate(groups) for _ in rows]
    tree, added, whole = Tree([row for rows in groups for row in rows]), Counter(), Counter()
    for i in tree.order:
        whole[group_of[i]] += tree.added[i] if group_of[i] in whole else len(tree.rows[i])
        added[group_of[i]] += tree.added[i]
    parts, size = [], 0
    for number in added:
        size += added[number]
        if not parts or size > tokens:
            parts.append([])
            size = whole[number]
        parts[-1].append(number)
    return parts


def join(batches: Sequence[MicroBatch], config: GRPOConfig, tokens: int, processes: int = 1) -> list[MicroBatch]:
    """Joins groups, each a micro-batch, into passes of up to `tokens` tokens, or of a single group.

    Groups without a gradient need no pass, so they are not mixed with others. A group of over LONGEST tokens is split.
    Every process gets a pass.
    """
    if processes > 1:
        tokens = min(tokens, math.ceil(Tree([row for b in batches for row in _rows(b.prompts, b.completions)]).size
                                       / processes))
    passes = []
    for kind in (True, False):
        chosen = [part for batch in batches if has_gradient(batch, config) is kind
                  for part in _split(batch, max(tokens, LONGEST))]
        parts = fill([_rows(batch.prompts, batch.completions) for batch in chosen], tokens)
        passes += [_joined([chosen[i] for i in part]) for part in parts]
    return passes


def _split(batch: MicroBatch, tokens: int) -> list[MicroBatch]:
    """Splits a group into parts of up to `tokens` tokens, or of a single completion."""
    parts = []
    for some in fill([[row] for row in _rows(batch.prompts, batch.completions)], tokens):
        some = sorted(some)
        prompts, completions, sampled, rules = ([getattr(batch, name)[i] for i in some] for name in LISTS)
        mask = batch.mask[some, :max(map(len, completions))]
        parts.append(MicroBatch(prompts, completions, sampled, batch.advantages[some], mask, batch.normalizer, rules))
    return parts


def _joined(batches: Sequence[MicroBatch]) -> MicroBatch:
    T = max(batch.mask.shape[1] for batch in batches)
    prompts, completions, sampled, rules = ([one for batch in batches for one in getattr(batch, name)]
                                            for name in LISTS)
    mask = torch.cat([F.pad(batch.mask, (0, T - batch.mask.shape[1])) for batch in batches])
    return MicroBatch(prompts, completions, sampled, torch.cat([batch.advantages for batch in batches]), mask,
                      batches[0].normalizer, rules)


# ---- log-probabilities


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
    if not can_pack(model):
        return plain_logprobs(model, packed.prompts, packed.completions, temperature), entropy
    return packed_logprobs(model, packed, temperature), entropy


def can_pack(model, quiet: bool = False) -> bool:
    """Whether a model takes packed rows; warns if not, unless quiet."""
    return is_exact(model, "packed rows", _gap, quiet)


def _gap(model) -> float:
    """Largest difference between the log-probabilities of a packed row and of padded rows."""
    prompts = [torch.arange(2, 9)] * 3 + [torch.arange(2, 7), torch.arange(4, 8)]
    completions = [torch.arange(3, 3 + n) for n in (5, 1, 3, 4, 4)]
    with torch.no_grad(), dropout_off(model):
        packed = packed_logprobs(model, pack(prompts, completions, least=0), 1.0)
        return (packed - plain_logprobs(model, prompts, completions, 1.0)).abs().max().item()


def packed_logprobs(model, packed: PackedRow, temperature: float, rules: Sequence | None = None) -> Tensor:
    """Log-probability of every completion token of a row, with gradient. rules: as `grpo.plain_logprobs`. -> [N, T]"""
    causal = causal_lm(model)
    lm_head = causal.get_output_embeddings()
    device, layout = lm_head.weight.device, RowLayout(packed.nodes, lm_head.weight.device)
    enable(model)
    hidden = causal.get_decoder()(
        input_ids=packed.input_ids.to(device), position_ids=layout.positions[None], use_cache=False,
        attention_mask=no_mask(device), layout=layout).last_hidden_state[0]  # [L, D]
    place, which = packed.targets.unique(return_inverse=True)  # [n], [ΣC]: tokens of a common prefix count once
    before = torch.empty_like(place).scatter_(0, which, packed.predictors).to(device)  # [n]
    bits = []
    if any(rules or ()):
        every = [row for one in zip(rules, packed.completions, strict=True) for row in allowed(*one)]  # ΣC
        owner = torch.empty_like(place).scatter_(0, which, torch.arange(len(which)))  # [n], a completion token there
        bits = [every[i] for i in owner.tolist()]
    logp = token_logprobs(lm_head, hidden[before], packed.input_ids[0, place].to(device), temperature, bits)  # [n]
    return packed.unpack(logp[which.to(device)])


def token_logprobs(lm_head, hidden: Tensor, targets: Tensor, temperature: float, bits: Sequence = ()) -> Tensor:
    """Log-probability of each target. hidden [N, D], targets [N], bits as `grpo.forbid` takes them -> [N]

    The [N, V] logits never exist at once: lm_head runs on chunks, which backward recomputes. If one chunk is enough,
    its logits are stored.
    """
    chunk = max(1, LOGIT_CHUNK_ELEMENTS // lm_head.weight.shape[0])
    if len(hidden) <= chunk:
        return target_logprobs(forbid(lm_head(hidden), bits), targets, temperature)
    bits = [bits[start:start + chunk] for start in range(0, len(hidden), chunk)]  # per chunk
    if type(lm_head) is torch.nn.Linear and lm_head.bias is None:
        return _ChunkedLogprobs.apply(lm_head.weight, hidden, targets, temperature, chunk, bits)
    return torch.cat([checkpoint(lambda h, y, b: target_logprobs(forbid(lm_head(h), b), y, temperature), *one,
                                 use_reentrant=False)
                      for one in zip(hidden.split(chunk), targets.split(chunk), bits, strict=True)])


class _ChunkedLogprobs(torch.autograd.Function):
    """`token_logprobs` for a plain linear lm_head. All chunks add to one gradient of its weight in place; autograd
    would hold several, each as large as the weight."""

    @staticmethod
    def forward(ctx, weight, hidden, targets, temperature, chunk, bits):
        ctx.save_for_backward(weight, hidden, targets)
        ctx.dtype = F.linear(hidden[:1], weight[:1]).dtype  # autocast's
        ctx.temperature, ctx.chunk, ctx.bits = temperature, chunk, bits
        w = weight.to(ctx.dtype)  # once; autocast would cast it per chunk
        return torch.cat([target_logprobs(forbid(F.linear(h.to(ctx.dtype), w), b), y, temperature)
                          for h, y, b in zip(hidden.split(chunk), targets.split(chunk), bits, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, hidden, targets = ctx.saved_tensors
        w, to_hidden = weight.to(ctx.dtype), torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[0] else None
        parts = (x.split(ctx.chunk) for x in (hidden, targets, grad, to_hidden))
        for h, y, g, out, b in zip(*parts, ctx.bits, strict=True):
            h = h.to(ctx.dtype)
            p = (forbid(F.linear(h, w), b).to(grad.dtype) / ctx.temperature).softmax(-1)
            d = p.mul_(-g[:, None]).scatter_add_(1, y[:, None], g[:, None]).div_(ctx.temperature)  # of the logits
            d = d.to(ctx.dtype)
            out.copy_(d @ w)
            if to_weight is not None:
                to_weight.addmm_(d.T, h) if weight.dtype == ctx.dtype else to_weight.add_(d.T @ h)
        return to_weight, to_hidden, None, None, None, None
