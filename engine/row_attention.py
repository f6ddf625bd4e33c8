"""Attention within a row that is a tree of tokens (tree.py), by three functions with the same result:

    parts   on a CPU: node by node, each seen by itself and its descendants, without wasted products
    flex    on a GPU: FlexAttention, which skips the empty blocks of the row's mask
    masked  anywhere: scaled dot product attention with a mask; for sliding windows, and where flex is missing
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from engine.tree import Node

BLOCK = 128  # side of FlexAttention's blocks, in tokens
MASK_ELEMENTS = 2**24  # of a mask, held at once
SHORT, UNEVEN = 16, 4  # a batch holds runs of up to UNEVEN · max(SHORT, its shortest) tokens


@dataclass(frozen=True)
class RowLayout:
    """Which tokens of a row see which, as the nodes of a tree."""

    nodes: Sequence[Node]
    device: torch.device
    blocks: dict = field(default_factory=dict)  # {window: BlockMask}, made by the first layer

    def attend(self, _, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None) -> Tensor:
        """[1, H, L, d], 2 × [1, Hk, L, d] -> [1, H, L, d]"""
        if window is not None and window >= max(node.depth + node.stop - node.start for node in self.nodes):
            window = None
        if query.is_cuda and can_flex(value.shape[-1], value.dtype):
            return flex(self, query, key, value, scaling, window)
        if query.device.type == "cpu" and window is None:
            return parts(self, query, key, value, scaling)
        return masked(self, query, key, value, scaling, window)

    @cached_property
    def positions(self) -> Tensor:
        """The position of each token in its text. [L]"""
        return self.spread([node.depth - node.start for node in self.nodes]) + torch.arange(
            self.nodes[-1].stop, device=self.device)

    @cached_property
    def ends(self) -> Tensor:
        """For each token, the place up to which it is visible. [L]"""
        return self.spread([node.end for node in self.nodes])

    def spread(self, values: Sequence[int]) -> Tensor:
        """Expands one value per node to one per token. -> [L]"""
        lengths = torch.tensor([node.stop - node.start for node in self.nodes])
        return torch.tensor(list(values)).repeat_interleave(lengths).to(self.device)

    def rule(self, window: int | None) -> Callable:
        """Whether the token at i sees the one at j, elementwise, FlexAttention's mask_mod: (_, _, i, j) -> bool."""
        positions, ends = self.positions, self.ends  # tensors in a closure, as a compiler can follow them

        def sees(_, __, i, j):
            seen = (j <= i) & (i < ends[j])
            return seen if window is None else seen & (positions[i] - positions[j] < window)

        return sees

    @cached_property
    def parts(self) -> list[tuple["Rows", "Rows", bool]]:
        """(queries, keys, whether these queries come for the first time). A node with descendants is seen by itself and
        by them; leaves see themselves and are batched by length."""
        found, batch = [], []
        for node in self.nodes:
            if node.end > node.stop:
                found.append((Rows([range(node.start, node.end)], self.device),
                              Rows([range(node.start, node.stop)], self.device), node.depth == 0))
        for run in sorted((range(n.start, n.stop) for n in self.nodes if n.end == n.stop), key=len):
            if not batch or len(run) > UNEVEN * max(SHORT, len(batch[-1][0])):
                batch.append([])
            batch[-1].append(run)
        alone = [Rows(runs, self.device) for runs in batch]
        return found + [(rows, rows, False) for rows in alone]


def per_head(key: Tensor, heads: int) -> Tensor:
    """Repeats the key-value heads that several query heads share. [B, Hk, L, d] -> [B, heads, L, d]"""
    return key if key.shape[1] == heads else key.repeat_interleave(heads // key.shape[1], dim=1)


def masked(layout: RowLayout, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """As `RowLayout.attend`, one chunk of queries at a time; backward rebuilds their mask."""
    (H, L), sees = query.shape[1:3], layout.rule(window)
    key, value, places = per_head(key, H), per_head(value, H), torch.arange(L, device=query.device)

    def some(query, i):
        return F.scaled_dot_product_attention(query, key, value, sees(None, None, i[:, None], places), scale=scaling)

    n = max(1, MASK_ELEMENTS // L)
    return torch.cat([checkpoint(some, *one, use_reentrant=False, preserve_rng_state=False)
                      for one in zip(query.split(n, 2), places.split(n), strict=True)], dim=2)


# ---- FlexAttention


@cache
def can_flex(head: int, dtype: torch.dtype, device: str = "cuda") -> bool:
    """Whether FlexAttention for heads of this size and type compiles here, with its backward; warns if not."""
    def same(tensor):
        return tensor

    layout = RowLayout([Node(0, 64, 128, 0), Node(64, 96, 96, 64), Node(96, 128, 128, 64)], torch.device(device))
    try:
        with torch.enable_grad(), saved_tensors_hooks(same, same):  # not those of an enclosing checkpoint
            x = torch.zeros(1, 1, 128, head, device=device, dtype=dtype, requires_grad=True)
            flex(layout, x, x, x, 1.0, None).sum().backward()
    except Exception as error:  # whatever the compiler raises, `masked` works
        warnings.warn(f"FlexAttention cannot be compiled for heads of {head} in {dtype} ({type(error).__name__}); "
                      "updates are slower", stacklevel=4)
        return False
    return True


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=True)


def flex(layout: RowLayout, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """As `RowLayout.attend`."""
    from torch.nn.attention.flex_attention import flex_attention

    if window not in layout.blocks:
        layout.blocks[window] = block_mask(layout, window)
    attend = compiled_flex() if query.is_cuda else flex_attention
    return attend(query.to(value.dtype), key.to(value.dtype), value, block_mask=layout.blocks[window], scale=scaling,
                  enable_gqa=query.shape[1] != key.shape[1])


def block_mask(layout: RowLayout, window: int | None):
    """Which blocks of the row's mask are empty, full or partial, without building that mask. A block of keys before a
    block of queries is seen by all, some or none of them; its tokens' `ends` decide."""
    from torch.nn.attention.flex_attention import BlockMask

    L = len(layout.ends)
    n = -(-L // BLOCK)
    first = torch.arange(n, device=layout.device)[:, None] * BLOCK  # [n, 1], place of each block's first token

    def least_and_most(values):
        """The minimum and maximum per block. [L] -> [n] each"""
        last = values[-1:].expand(n * BLOCK - L)
        return torch.cat([values, last]).view(n, BLOCK).aminmax(dim=1)

    (soonest, latest), (low, high) = least_and_most(layout.ends), least_and_most(layout.positions)
    before, itself = first > first.T, first == first.T  # [n, n], queries × keys
    some = itself | before & (first < latest)
    full = before & (first + BLOCK <= soonest)
    if window is not None:
        some &= low[:, None] - high < window
        full &= high[:, None] - low < window
    tables = []  # number of chosen blocks [1, 1, n]; indices, chosen ones first [1, 1, n, n]
    for chosen in (some & ~full, full):
        tables += [chosen.sum(-1)[None, None].int(),
                   chosen.int().argsort(dim=-1, descending=True, stable=True)[None, None].int()]
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK, mask_mod=layout.rule(window), seq_lengths=(L, L))


# ---- part by part


class Rows:
    """Runs of tokens of a row, side by side as a batch: m runs of up to A tokens, padded at the end."""

    def __init__(self, runs: Sequence[range], device):
        lengths, A = torch.tensor([len(run) for run in runs]), max(map(len, runs))
        self.only = runs[0] if len(runs) == 1 else None  # one run needs no copies
        starts = torch.tensor([run.start for run in runs])
        real = torch.arange(A) < lengths[:, None]  # [m, A]
        table = (starts[:, None] + torch.arange(A)) * real
        self.padding, self.table = ~real.to(device), table.to(device)  # [m, A], places in the row
        self.places, self.tokens = real.flatten().nonzero()[:, 0].to(device), table[real].to(device)  # [Σ]

    def take(self, x: Tensor) -> Tensor:
        """[L, H, …] -> [m, H, A, …]"""
        batch = x[None, self.only.start:self.only.stop] if self.only else x[self.table]
        return batch.transpose(1, 2)

    def flat(self, batch: Tensor) -> Tensor:
        """[m, H, A, …] -> [Σ, H, …], without padding"""
        rows = batch.transpose(1, 2).flatten(0, 1)
        return rows if self.only else rows[self.places]

    def index(self):
        """Their places in the row, for assignment."""
        return slice(self.only.start, self.only.stop) if self.only else self.tokens


def parts(layout: RowLayout, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """As `RowLayout.attend`."""
    H = query.shape[1]
    rows = (x[0].transpose(0, 1).to(value.dtype)  # autocast does not cast for what follows
            for x in (query, per_head(key, H), per_head(value, H)))  # [L, H, d] each
    return _Parts.apply(*rows, layout, scaling).transpose(0, 1)[None]


class _Parts(torch.autograd.Function):
    """Attention of a row, combined from that of its parts.

    The output of a query over some keys is a mean o_k, whose unnormalised weights sum to exp(l_k). Over all keys it is
    Σ exp(l_k − l) o_k with l = log Σ exp(l_k). Backward of a part, given the row's o and l, is its share of the row's
    gradient (FlashAttention, arXiv 2205.14135, appendix B). In a part, query i sees the keys up to key i; queries after
    the last key, in descendants of its node, see all.
    """

    @staticmethod
    def forward(ctx, query, key, value, layout, scaling):
        """[L, H, d] × 3 -> [L, H, d]"""
        out = torch.zeros_like(query)
        total = query.new_full(query.shape[:2], float("-inf"),
                               dtype=torch.promote_types(query.dtype, torch.float32))  # l, [L, H]
        for queries, keys, first in layout.parts:
            o, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries.take(query), keys.take(key), keys.take(value), 0.0, True, scale=scaling)
            o, log, at = queries.flat(o), queries.flat(log.view(o.shape[:3])), queries.index()
            if not first:  # combine with the output over the keys above
                both = torch.logaddexp(total[at], log)
                o = out[at] * (total[at] - both).exp()[..., None] + o * (log - both).exp()[..., None]
                log = both
            out[at], total[at] = o.to(out.dtype), log
        ctx.save_for_backward(query, key, value, out, total)
        ctx.layout, ctx.scaling = layout, scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *saved, total = ctx.saved_tensors
        kind = torch.promote_types(saved[0].dtype, torch.float32)  # in bf16, this backward takes up to 4 times as long
        query, key, value, out, grad = (x.to(kind) for x in (*saved, grad))
        to_query, to_key, to_value = (torch.zeros_like(x) for x in (query, key, value))
        for queries, keys, _ in ctx.layout.parts:
            log = queries.take(total).masked_fill(queries.padding[:, None], float("inf"))  # [m, H, A], padding weighs 0
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                queries.take(grad), queries.take(query), keys.take(key), keys.take(value), queries.take(out), log,
                0.0, True, scale=ctx.scaling)
            for to, rows, part in zip((to_query, to_key, to_value), (queries, keys, keys), found, strict=True):
                to[rows.index()] += rows.flat(part)
        return *(x.to(saved[0].dtype) for x in (to_query, to_key, to_value)), None, None
