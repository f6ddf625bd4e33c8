"""Sampling that computes, stores and reads each prompt once for its G completions; otherwise as `grpo.plain_decode`."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import lean
from engine.attention import causal_lm, enable, is_exact, no_mask
from engine.bf16 import weights_to_sample_with
from engine.grid import GRAPHS, LOOK, Grid
from engine.packing import LONGEST, can_pack
from engine.row_attention import RowLayout, masked
from engine.tree import Tree
from grpo import Group, as_groups, dropout_off, left_pad, plain_decode, plain_logprobs

WORTH = 2  # factor by which one row must save tokens on a GPU, because its attention needs a mask


def decode(model, prompts: Sequence[Tensor], uniform: Tensor, temperature: float,
           eos_ids: Sequence[int], rules: Sequence | None = None) -> list[Group]:
    """Samples the groups of B prompts. uniform: [B, G, T], as `grpo.plain_decode` takes it."""
    if not can_share(model):
        return plain_decode(model, prompts, uniform, temperature, eos_ids, rules)
    with weights_to_sample_with(model) as sampler:
        return grid_decode(sampler, forward_of(model), prompts, uniform, temperature, eos_ids, rules)


def grid_decode(model, forward: Callable, prompts, uniform, temperature, eos_ids, rules=None) -> list[Group]:
    """`decode` with a forward pass of one token, as `forward_of` chooses it."""
    grid, (_, G, T) = _grids.setdefault(causal_lm(model), Grid()), uniform.shape
    step = partial(forward, model)
    addresses = tuple(weight.data_ptr() for weight in model.parameters())
    grid.start(*prefill(model, prompts), uniform, temperature, eos_ids, addresses, rules)
    if grid.device.type in GRAPHS and not rules and not can_replay(model, forward):
        grid.refuse_graphs("the model asks for a value, as dynamic rotary positions do")
    for t in range(1, T):
        if (t - 1) % LOOK.get(grid.device.type, 16) == 0 and not grid.look(t):
            break
        grid.advance(t, step)
    return as_groups(prompts, G, *grid.results(), rules)


def prefill(model, prompts) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Keys and values of B prompts, [B, Hk, P, d] each per layer; their mask [B, P]; next token's logits [B, V]."""
    device = next(model.parameters()).device
    ids, mask = left_pad(prompts, device)  # [B, P] each
    if can_pack(model, quiet=True):
        tree = Tree(prompts)
        if device.type == "cpu" or tree.size <= min(LONGEST, ids.numel() / WORTH):
            return row_prefill(model, prompts, tree)
    out = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=True, logits_to_keep=1)
    enable(model)
    kept = [(layer.keys.to(layer.values.dtype), layer.values) for layer in out.past_key_values.layers]
    return kept, mask.bool(), out.logits[:, -1]


def row_prefill(model, prompts, tree: Tree) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """`prefill` as one row without padding, in which a common prefix of prompts appears once."""
    enable(model)
    device = next(model.parameters()).device
    places, mask = left_pad(tree.places, device)  # [B, P] each
    layout = KeepingLayout(tree.nodes, device)
    logits = model(input_ids=tree.ids(prompts).to(device), position_ids=layout.positions[None], use_cache=False,
                   attention_mask=no_mask(device), layout=layout, logits_to_keep=places[:, -1]).logits[0]
    kept = [tuple(x[0][:, places].transpose(0, 1) for x in layout.kept.pop(n)) for n in range(len(layout.kept))]
    return kept, mask.bool(), logits


@dataclass(frozen=True)
class KeepingLayout(RowLayout):
    """A row that stores its keys and values, {layer: 2 × [1, Hk, L, d]}."""

    kept: dict = field(default_factory=dict)

    def attend(self, layer, query, key, value, scaling, window=None):
        self.kept[layer] = key.to(value.dtype), value
        if query.is_cuda:  # a prefill is too short to compile FlexAttention for
            return masked(self, query, key, value, scaling, window)
        return super().attend(layer, query, key, value, scaling, window)


_grids: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()  # model -> Grid


# ---- which models can do it


def module_forward(model, token: Tensor, position: Tensor, grid: Grid) -> Tensor:
    """The logits after a token, by the model's own modules. [R], [R] -> [R, V]"""
    return model(input_ids=token[:, None], position_ids=position[:, None], use_cache=False, layout=grid,
                 attention_mask=no_mask(token.device)).logits[:, -1]


def forward_of(model) -> Callable:
    """The forward pass of one token: that of lean.py where it is exact, else that of the model's modules."""
    fits = is_exact(model, "lean layers", lambda small: _gap(small, lean.forward), quiet=True)
    return lean.forward if fits else module_forward


def can_share(model) -> bool:
    """Whether a model's completions can share their prompt; warns if not."""
    return is_exact(model, "shared prompts", lambda small: _gap(small, module_forward))


def can_replay(model, forward: Callable) -> bool:
    """Whether a token needs only tensor operations, so that a GPU can replay it. Checked before a graph is recorded,
    because a failed recording leaves PyTorch's memory in disorder."""
    return is_exact(model, "graphs", lambda small: _asks(small, forward), quiet=True)


def _asks(model, forward: Callable) -> float:
    """Returns 0; raises if computing a token reads a tensor's value, because fake tensors have none."""
    grid, prompts = Grid(), [torch.arange(2, 9), torch.arange(3, 6)]
    with torch.no_grad(), dropout_off(model):
        grid.start(*prefill(model, prompts), torch.rand(2, 3, 4, dtype=torch.float64), 1.0, [0])
        grid.attended = 4
        with FakeTensorMode(allow_non_fake_inputs=True):
            grid.step(partial(forward, model))
    return 0.0


def _gap(model, forward: Callable) -> float:
    """Largest difference between a sampled token's log-probability and the plain one."""
    prompts, uniform = [torch.arange(2, 9), torch.arange(3, 6)], torch.rand(2, 3, 4, dtype=torch.float64)
    gaps = []
    with torch.no_grad(), dropout_off(model):
        for group in grid_decode(model, forward, prompts, uniform, 1.0, range(0, 64, 3)):
            exact = plain_logprobs(model, [group.prompt] * 3, group.completions, 1.0)
            gaps += [(row[:len(logp)] - logp).abs().max().item()
                     for row, logp in zip(exact, group.logps, strict=True)]
    return max(gaps)
