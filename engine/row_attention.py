"""Attention within a row of groups [prompt | c1 | … | cG | prompt | …], in three ways that compute the same:

    parts   on a CPU: prompts, completions, and completions on their prompts, each by a product that wastes nothing
    flex    on a GPU: FlexAttention, which leaves out the blocks of the row's mask that are empty
    masked  anywhere: scaled dot product attention with a mask of L × L; for sliding windows, and where flex is missing
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """How the tokens of a row belong together: a prompt sees itself, a completion its prompt and itself, causally.

    A group of one completion is one run of tokens.
    """

    groups: Sequence[tuple[int, Sequence[int]]]  # length of a prompt, lengths of its completions
    device: torch.device
    masks: dict = field(default_factory=dict)  # {window: mask}, made by the first layer

    def attend(self, _, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None) -> Tensor:
        """[1, H, L, d], 2 × [1, Hk, L, d] -> [1, H, L, d]"""
        if window is not None and window >= max(P + max(lengths) for P, lengths in self.groups):
            window = None
        if query.is_cuda and can_flex():
            return flex(self, query, key, value, scaling, window)
        if query.device.type == "cpu" and window is None:
            return parts(self, query, key, value, scaling)
        return masked(self, query, key, value, scaling, window)

    @cached_property
    def runs(self) -> list[list[range]]:
        """A group's runs of tokens, as positions in the row: its prompt, then its completions."""
        sizes = [[P + lengths[0]] if len(lengths) == 1 else [P, *lengths] for P, lengths in self.groups]
        ends = accumulate(n for group in sizes for n in group)
        return [[range(end - n, end) for n in group for end in [next(ends)]] for group in sizes]

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token its group, its run in the group, and its position in its completion's text, [L] each."""
        rows = [(g, r, len(runs[0]) * (r > 0) + i) for g, runs in enumerate(self.runs) for r, run in enumerate(runs)
                for i in range(len(run))]
        return tuple(torch.tensor(rows, device=self.device).unbind(1))

    def rule(self, window: int | None) -> Callable:
        """Whether the token at i sees the one at j, elementwise, as FlexAttention asks for it: (_, _, i, j) -> bool."""
        group, run, position = self.tokens  # tensors in a closure, as a compiler can follow them

        def sees(_, __, i, j):
            seen = (j <= i) & (group[i] == group[j]) & ((run[j] == 0) | (run[i] == run[j]))
            return seen if window is None else seen & (position[i] - position[j] < window)

        return sees

    @cached_property
    def parts(self) -> list[tuple["Rows", "Rows", bool]]:
        """(queries, keys, causally): prompts and completions see themselves, then completions their prompts."""
        prompts, completions = [group[0] for group in self.runs], [run for group in self.runs for run in group[1:]]
        alone = [Rows(runs, self.device) for runs in (prompts, completions) if runs]
        return [(rows, rows, True) for rows in alone] + [
            (Rows([range(group[1].start, group[-1].stop)], self.device), Rows(group[:1], self.device), False)
            for group in self.runs if len(group) > 1]


def per_head(key: Tensor, heads: int) -> Tensor:
    """Repeats the key-value heads that several query heads share. [B, Hk, L, d] -> [B, heads, L, d]"""
    return key if key.shape[1] == heads else key.repeat_interleave(heads // key.shape[1], dim=1)


def masked(layout: RowLayout, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """As `RowLayout.attend`."""
    if window not in layout.masks:
        i = torch.arange(query.shape[2], device=query.device)
        layout.masks[window] = layout.rule(window)(None, None, i[:, None], i)  # [L, L]
    H = query.shape[1]
    return F.scaled_dot_product_attention(query, per_head(key, H), per_head(value, H), layout.masks[window],
                                          scale=scaling)


# ---- FlexAttention


@cache
def can_flex() -> bool:
    """Whether FlexAttention can be compiled here; a warning says if not."""
    try:
        x = torch.zeros(1, 1, 128, 64, device="cuda", dtype=torch.bfloat16)
        flex(RowLayout([(64, (32, 32))], x.device), x, x, x, 1.0, None)
    except Exception as error:  # whatever a compiler trips over, the other way is there
        warnings.warn(f"FlexAttention cannot be compiled ({type(error).__name__}); updates are slower", stacklevel=4)
        return False
    return True


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=True)


def flex(layout: RowLayout, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """As `RowLayout.attend`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if window not in layout.masks:
        L = query.shape[2]
        layout.masks[window] = create_block_mask(layout.rule(window), None, None, L, L, device=query.device)
    attend = compiled_flex() if query.is_cuda else flex_attention
    return attend(query.to(value.dtype), key.to(value.dtype), value, block_mask=layout.masks[window], scale=scaling,
                  enable_gqa=query.shape[1] != key.shape[1])


# ---- part by part


class Rows:
    """Runs of tokens of a row, side by side as a batch: m runs of up to A tokens, padded at the end."""

    def __init__(self, runs: Sequence[range], device):
        lengths, A = torch.tensor([len(run) for run in runs]), max(map(len, runs))
        self.only = runs[0] if len(runs) == 1 else None  # one run needs no copies
        starts = torch.tensor([run.start for run in runs])
        real = torch.arange(A) < lengths[:, None]  # [m, A]
        table = (starts[:, None] + torch.arange(A)) * real
        self.padding, self.table = ~real.to(device), table.to(device)  # [m, A], positions in the row
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
        """Where in the row they stand, for assignments."""
        return slice(self.only.start, self.only.stop) if self.only else self.tokens


def parts(layout: RowLayout, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """As `RowLayout.attend`."""
    H = query.shape[1]
    rows = (x[0].transpose(0, 1).to(value.dtype)  # autocast would not do it for what follows
            for x in (query, per_head(key, H), per_head(value, H)))  # [L, H, d] each
    return _Parts.apply(*rows, layout, scaling).transpose(0, 1)[None]


class _Parts(torch.autograd.Function):
    """Attention of a row from that of its parts.

    What a query finds among some keys is a mean o_k with weights that sum to exp(l_k), before they are normalised. Over
    all keys it is Σ exp(l_k − l) o_k with l = log Σ exp(l_k). Backward of a part, given the whole's o and l, is its
    share of the whole's gradient (FlashAttention, arXiv 2205.14135, appendix B).
    """

    @staticmethod
    def forward(ctx, query, key, value, layout, scaling):
        """[L, H, d] × 3 -> [L, H, d]"""
        out = torch.empty_like(query)
        total = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))  # l, [L, H]
        for queries, keys, causal in layout.parts:
            o, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries.take(query), keys.take(key), keys.take(value), 0.0, causal, scale=scaling)
            o, log, at = queries.flat(o), queries.flat(log.view(o.shape[:3])), queries.index()
            if not causal:  # completions that have seen themselves now see their prompts
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
        query, key, value, out, total = ctx.saved_tensors
        to_query, to_key, to_value = (torch.zeros_like(x) for x in (query, key, value))
        for queries, keys, causal in ctx.layout.parts:
            log = queries.take(total).masked_fill(queries.padding[:, None], float("inf"))  # [m, H, A], weighs nothing
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                queries.take(grad), queries.take(query), keys.take(key), keys.take(value), queries.take(out), log,
                0.0, causal, scale=ctx.scaling)
            for to, rows, part in zip((to_query, to_key, to_value), (queries, keys, keys), found, strict=True):
                to[rows.index()] += rows.flat(part)
        return to_query, to_key, to_value, None, None
