"""Attention over groups: G completions share the keys and values of their prompt.

transformers selects a model's attention by name. `enable(model)` selects `grouped_attention`. It is transformers' own
`sdpa` unless a call of the model passes `layout=`, an object that defines which tokens of the call see which:

    row_attention.RowLayout  a row that is a tree of prompts and completions, for the update; gradients flow through it
    grid.Grid                one new token per unfinished completion, for sampling

Both give the results of separate rows, but read a prompt once. A check on a small copy shows which models support it.
"""

import copy
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

NAME = "grouped"


def grouped_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, layout=None, **options):
    """An attention function of transformers. query [B, H, L, d], key and value [B, Hk, L, d] -> [B, L, H, d], None

    Raises ValueError: a layout together with a soft cap.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if options.get("softcap"):
        raise ValueError("its attention has a soft cap")
    return layout.attend(module.layer_idx, query, key, value, options["scaling"],
                         options.get("sliding_window")).transpose(1, 2), None


def causal_lm(model):
    """The transformers model itself, where peft has wrapped it in adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def enable(model) -> None:
    """Routes a model's attention through `grouped_attention`. Raises ValueError: the model does not use sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    causal = causal_lm(model)
    implementation = causal.config._attn_implementation
    if implementation not in (NAME, "sdpa"):
        raise ValueError(f"its attention is {implementation}, not sdpa")
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    causal.set_attn_implementation(NAME)


def no_mask(device) -> Tensor:
    """The attention_mask to pass with a layout: models use a mask of four dimensions as it is."""
    return torch.zeros(1, 1, 1, 1, device=device)


# ---- which models are exact


TOLERANCE = 2e-5  # of a log-probability, between two implementations that differ only by float32 rounding
_warned: "weakref.WeakSet" = weakref.WeakSet()  # models; one warning each
_verdicts: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()  # model -> {name of an implementation: bool}
SMALL_MODEL = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "pad_token_id": None, "bos_token_id": None,
               "eos_token_id": None, "initializer_range": 0.2}  # weights large enough that a difference shows
WINDOWS = ("sliding_window", "attention_chunk_size")  # shortened so that the check covers them


def is_exact(model, way: str, gap: Callable, quiet: bool = False) -> bool:
    """Whether a fast implementation gives a model's results; checked once per model. Warns if not, unless quiet.

    gap: takes a small model with random float32 weights and the layers of this one, computes a case both ways, and
        returns the largest difference of a log-probability. The real weights are not used, because bf16 ones round.
    """
    causal = causal_lm(model)
    verdicts = _verdicts.setdefault(causal, {})
    if way not in verdicts:
        try:
            with torch.autocast("cpu", enabled=False):
                difference = gap(small_copy(causal))
            reason = "" if difference <= TOLERANCE else f"log-probabilities differ by {difference:.2g}"
        except Exception as error:  # whatever fails for an architecture, the plain engine works
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        verdicts[way] = not reason
        if reason and not quiet and causal not in _warned:
            _warned.add(causal)
            warnings.warn(f"{type(causal).__name__} cannot run {way} ({reason}); the plain engine takes over, which is "
                          "slower and needs more memory", stacklevel=3)
    return verdicts[way]


def small_copy(causal):
    """A model of the same architecture and layers, as small as possible, with random float32 weights, on the CPU."""
    config = copy.deepcopy(causal.config)
    heads = getattr(config, "num_attention_heads", 1)
    shared = getattr(config, "num_key_value_heads", None) or heads
    sizes = SMALL_MODEL | {"num_attention_heads": 2 if shared < heads else 1, "num_key_value_heads": 1}
    for name, value in sizes.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for name in WINDOWS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 4)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        small = type(causal)(config).float().eval()
        for weight in small.parameters():
            if weight.dim() == 1:  # norms and biases start as ones and zeros, which would hide errors
                weight.add_(0.2 * torch.randn_like(weight))
    return small
