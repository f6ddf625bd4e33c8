"""Weights to sample with: a bf16 copy of a float32 model, taken anew before each rollout, at the same addresses.

Under autocast every product would cast its weights again, for each token. Weights that are bf16 already (the base of
LoRA adapters, and all where the optimizer has others) are shared, not copied. Adapters stay beside them, unmerged:
merged into bf16 weights, most of what they have learned would be rounded away.

Of a model that is sharded over processes each has a whole copy, which they `refresh` together before a rollout.
"""

import copy
import weakref
from contextlib import contextmanager

import torch

_copies: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()  # model -> its copy


@contextmanager
def weights_to_sample_with(model):
    """Yields the model to decode with: under bf16 autocast the copy, without autocast inside; else the model itself."""
    known, sharded = _copies.get(model), any(hasattr(module, "unshard") for module in model.modules())
    if not _in_bf16(model) or sharded and known is None:
        yield model
        return
    if not sharded:
        weights = list(model.parameters())
        if known is None or [p.shape for p in known.parameters()] != [p.shape for p in weights]:  # adapters have come
            known = _copies[model] = _copy(model)
        with torch.no_grad():
            for new, old in zip(known.parameters(), weights, strict=True):
                if new is not old:
                    new.copy_(old)
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        yield known


def refresh(model, sharded) -> bool:
    """Whether there is a bf16 copy of a sharded model to sample from; it is brought up to date.

    sharded: of `distributed.Sharded`, which gathers the weights a layer at a time.
    """
    if not _in_bf16(model):
        return False
    if model in _copies:
        sharded.copy_onto(_copies[model])
    else:
        _copies[model] = sharded.frozen_copy(dtype=torch.bfloat16)
    return True


def _in_bf16(model) -> bool:
    """Whether products of this model are computed in bf16 here."""
    kind = next(model.parameters()).device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


def _copy(model):
    """A bf16 model; weights that are bf16 are the model's own."""
    memo = {}
    for weight in model.parameters():
        shared = weight.dtype == torch.bfloat16
        memo[id(weight)] = weight if shared else torch.nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
    return copy.deepcopy(model, memo).eval()
