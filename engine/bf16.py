"""Weights to sample with: a bf16 copy of a model's matrices, refreshed in place before each rollout.

Under autocast every product would cast its weights again for each token. Weights that autocast leaves in float32 during
training (embeddings, norms) are the model's own tensors here too, so the residual stream is also float32, and sampler
and trainer round at the same places. Weights that are already bf16 (the base of LoRA adapters, and all weights if the
optimizer holds float32 copies) are shared, not copied. Adapters stay unmerged, because merging them into bf16 weights
would round away most of what they have learned.

If a model is sharded, each process has a whole copy, and all processes `refresh` theirs together before a rollout.
"""

import copy
import weakref
from contextlib import contextmanager

import torch
from torch import nn

_copies: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()  # model -> its copy


@contextmanager
def weights_to_sample_with(model):
    """Yields the model to decode with: under bf16 autocast the copy, else the model itself."""
    known, sharded = _copies.get(model), any(hasattr(module, "unshard") for module in model.modules())
    if not _in_bf16(model) or sharded and known is None:
        yield model
        return
    if not sharded:
        if known is None or _shapes(known) != _shapes(model):  # adapters were added
            known = _copies[model] = rounded_copy(model)
        with torch.no_grad():
            for new, old in zip(all_weights(known), all_weights(model), strict=True):
                if new is not old:
                    new.copy_(old)
    yield known


def all_weights(model) -> list[nn.Parameter]:
    """The weights of every module; a weight that two share comes twice."""
    return [weight for _, weight in model.named_parameters(remove_duplicate=False)]


def _shapes(model) -> list[torch.Size]:
    return [weight.shape for weight in all_weights(model)]


def refresh(model, sharded) -> bool:
    """Updates the bf16 copy of a sharded model; returns whether there is one to sample from.

    sharded: a `distributed.Sharded`, which gathers the weights one layer at a time.
    """
    if not _in_bf16(model):
        return False
    if model in _copies:
        sharded.copy_onto(_copies[model])
    else:
        _copies[model] = sharded.frozen_copy(like=rounded_copy(sharded.blank[0]))
    return True


def _in_bf16(model) -> bool:
    """Whether products of this model are computed in bf16 here."""
    kind = next(model.parameters()).device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


def rounded_copy(model):
    """A model whose matrices are bf16; its other weights are the model's own."""
    known = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()}).eval()
    for module in known.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dtype != torch.bfloat16 and _is_rounded(module, weight):
                setattr(module, name, nn.Parameter(weight.detach().bfloat16(), requires_grad=False))
    return known


def _is_rounded(module, weight) -> bool:
    """Whether autocast rounds a weight: the matrices of products and their biases."""
    return isinstance(module, nn.Linear) or weight.dim() > 1 and not isinstance(module, nn.Embedding)
