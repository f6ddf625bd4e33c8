"""Attention over a group: G completions share the keys and values of their prompt.

transformers lets a model's attention be exchanged by name. `enable(model)` puts `grouped_attention` there, which is its
own `sdpa` until a call of the model carries `layout=`, an object that knows how the tokens of the call belong together:

    PackedLayout   a row [prompt | c1 | … | cG], for the update; gradients flow through it
    SharedPrompts  one new token for each completion under way, for sampling

Both compute what G separate rows would, and read the prompt once.
"""

import copy
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

NAME = "grouped"
EXPANDED_ELEMENTS = 2**24  # of the prompt's keys, repeated for some completions: 64 MiB in float32


def grouped_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, layout=None, **options):
    """An attention function of transformers. query [B, H, L, d], key and value [B, Hk, L, d] -> [B, L, H, d], None

    Raises ValueError: a layout together with a soft cap.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if options.get("softcap"):
        raise ValueError("its attention has a soft cap")
    return layout.attend(module.layer_idx, query, key, value, options["scaling"]).transpose(1, 2), None


def causal_lm(model):
    """The transformers model itself, where peft has wrapped it in adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def enable(model) -> None:
    """Routes a model's attention through `grouped_attention`. Raises ValueError where it cannot be."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    causal = causal_lm(model)
    implementation = causal.config._attn_implementation
    if implementation not in (NAME, "sdpa"):
        raise ValueError(f"its attention is {implementation}, not sdpa")
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    causal.set_attn_implementation(NAME)


def window_allows(model, tokens: int) -> bool:
    """Whether no layer of the model has a sliding window shorter than this many tokens."""
    holders = [model.config, *model.modules()]
    windows = [getattr(holder, "sliding_window", None) for holder in holders]
    return all(tokens <= window for window in windows if isinstance(window, int))


def no_mask(device) -> Tensor:
    """What to give as attention_mask beside a layout: models take a mask of four dimensions as it is."""
    return torch.zeros(1, 1, 1, 1, device=device)


def per_head(key: Tensor, heads: int) -> Tensor:
    """Repeats the key-value heads that several query heads share. [B, Hk, L, d] -> [B, heads, L, d]"""
    return key if key.shape[1] == heads else key.repeat_interleave(heads // key.shape[1], dim=1)


# ---- the update


@dataclass(frozen=True)
class PackedLayout:
    """A row [prompt | c1 | … | cG]: the prompt sees itself, a completion the prompt and itself, all causally."""

    prompt: int  # P
    slots: Tensor  # [G, T], the position in the row of token t of completion i; anything where there is none
    mask: Tensor  # bool [G, T], True where there is one

    def attend(self, _, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """[1, H, L, d], 2 × [1, Hk, L, d] -> [1, H, L, d]"""
        (G, T), P, H = self.slots.shape, self.prompt, query.shape[1]
        key, value = per_head(key, H), per_head(value, H)
        first = F.scaled_dot_product_attention(query[:, :, :P], key[:, :, :P], value[:, :, :P],
                                               is_causal=True, scale=scaling)  # [1, H, P, d]
        size = max(1, EXPANDED_ELEMENTS // (H * (P + T) * key.shape[-1]))  # completions at a time
        if size >= G:
            rest = [self._completions(query, key, value, scaling, self.slots)]
        else:  # what is repeated for them is not kept for backward but made again
            rest = [checkpoint(self._completions, query, key, value, scaling, slots, use_reentrant=False)
                    for slots in self.slots.split(size)]
        rest = torch.cat(rest).transpose(1, 2)[self.mask]  # [ΣC_i, H, d]
        return torch.cat([first, rest.transpose(0, 1)[None]], dim=2)

    def _completions(self, query, key, value, scaling, slots) -> Tensor:
        """Attention of some completions, slots [g, T] -> [g, H, T, d]"""
        (g, T), P = slots.shape, self.prompt
        seen = torch.ones(T, P + T, dtype=torch.bool, device=query.device).tril(P)
        own_query, own_key, own_value = (x[0][:, slots].transpose(0, 1) for x in (query, key, value))  # [g, H, T, d]
        keys = torch.cat([key[:, :, :P].expand(g, -1, -1, -1), own_key], dim=2)  # [g, H, P + T, d]
        values = torch.cat([value[:, :, :P].expand(g, -1, -1, -1), own_value], dim=2)
        return F.scaled_dot_product_attention(own_query, keys, values, attn_mask=seen, scale=scaling)


# ---- sampling


class SharedPrompts:
    """Keys and values of B prompts, once each, and of N completions under way, each of one of the prompts.

    Args:
        prompts: per layer the keys and the values of the prompts, [B, Hk, P, d] each.
        mask: [B, P], true on the prompts' tokens.
        G, length: completions a prompt, and the most tokens one may get.
    """

    def __init__(self, prompts: list[tuple[Tensor, Tensor]], mask: Tensor, G: int, length: int):
        self.prompts, self.mask = prompts, mask.bool()
        self.completions: list[tuple[Tensor, Tensor] | None] = [None] * len(prompts)  # [N, Hk, length, d] each
        self.room, self.length = length, 0  # length: tokens they have, the one being computed not counted
        self.of = torch.arange(len(mask), device=mask.device).repeat_interleave(G)  # [N], a completion's prompt
        self._number()

    def keep(self, rows: Tensor) -> None:
        """Only these completions go on, and the prompts they belong to. [n]"""
        prompts, self.of = self.of[rows].unique(return_inverse=True)
        if len(prompts) < len(self.mask):
            self.mask = self.mask[prompts]
            self.prompts = [(k[prompts], v[prompts]) for k, v in self.prompts]
        t = self.length
        for layer, pair in enumerate(self.completions):  # one after the other, so that only one is there twice
            self.completions[layer] = pair and tuple(self._with_room(x[rows, :, :t]) for x in pair)
        self._number()

    def _number(self) -> None:
        """Number of each completion among those of its prompt, [N]; they stand in the order of their prompts."""
        counts = self.of.bincount(minlength=len(self.mask))
        self.number = torch.arange(len(self.of), device=self.of.device) - (counts.cumsum(0) - counts)[self.of]
        self.most = int(counts.max())

    def _with_room(self, keys: Tensor) -> Tensor:
        N, Hk, t, d = keys.shape
        room = keys.new_empty(N, Hk, self.room, d)
        room[:, :, :t] = keys
        return room

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """[N, H, 1, d], 2 × [N, Hk, 1, d] -> [N, H, 1, d]; the new keys and values are kept."""
        N, H, _, d = query.shape
        Hk, t = key.shape[1], self.length + 1
        if self.completions[layer] is None:
            self.completions[layer] = (self._with_room(key[:, :, :0]), self._with_room(value[:, :, :0]))
        keys, values = self.completions[layer]
        keys[:, :, t - 1], values[:, :, t - 1] = key[:, :, 0], value[:, :, 0]
        prompt_keys, prompt_values = self.prompts[layer]
        query = query.reshape(N, Hk, H // Hk, d) * scaling  # the heads that share a key-value head are side by side
        to_prompt = self._by_row(self._by_prompt(query) @ prompt_keys.mT)  # [N, Hk, H/Hk, P]
        to_prompt = to_prompt.masked_fill(~self.mask[self.of][:, None, None], float("-inf"))
        to_itself = query @ keys[:, :, :t].mT  # [N, Hk, H/Hk, t]
        weights = torch.cat([to_prompt, to_itself], dim=-1)
        weights = weights.softmax(-1, torch.promote_types(weights.dtype, torch.float32)).to(value.dtype)
        P = to_prompt.shape[-1]
        from_prompt = self._by_row(self._by_prompt(weights[..., :P]) @ prompt_values)
        return (from_prompt + weights[..., P:] @ values[:, :, :t]).reshape(N, H, 1, d)

    def _by_prompt(self, rows: Tensor) -> Tensor:
        """Gathers the completions of a prompt, so that one product serves them. [N, Hk, r, x] -> [B, Hk, n·r, x]"""
        grid = rows.new_zeros(len(self.mask), self.most, *rows.shape[1:])
        grid[self.of, self.number] = rows
        return grid.transpose(1, 2).flatten(2, 3)

    def _by_row(self, grid: Tensor) -> Tensor:
        """The inverse. [B, Hk, n·r, x] -> [N, Hk, r, x]"""
        return grid.unflatten(2, (self.most, -1)).transpose(1, 2)[self.of, self.number]


# ---- trust, after one look


_verdicts: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()  # model -> {name of a way: bool}
SMALL = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "pad_token_id": None, "bos_token_id": None,
         "eos_token_id": None}


def is_exact(model, way: str, gap: Callable) -> bool:
    """Whether a fast way of computing gives a model's results; found out once, and a warning says if not.

    gap: takes a small model with random float32 weights and the layers of this one, computes a case both ways, and
        returns the largest difference of a log-probability. The real weights are not asked: in bf16 they round.
    """
    causal = causal_lm(model)
    verdicts = _verdicts.setdefault(causal, {})
    if way not in verdicts:
        try:
            with torch.autocast("cpu", enabled=False):
                difference = gap(small_copy(causal))
            reason = "" if difference <= 1e-3 else f"log-probabilities differ by {difference:.2g}"
        except Exception as error:  # whatever an architecture trips over, the plain way is there
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        verdicts[way] = not reason
        if reason:
            warnings.warn(f"{type(causal).__name__} cannot run {way} ({reason}); the plain engine takes over, which is "
                          "slower and needs more memory", stacklevel=3)
    return verdicts[way]


def small_copy(causal):
    """A model of the same architecture and layers, as small as possible, with random float32 weights, on the CPU."""
    config = copy.deepcopy(causal.config)
    heads = getattr(config, "num_attention_heads", 1)
    shared = getattr(config, "num_key_value_heads", None) or heads
    sizes = SMALL | {"num_attention_heads": 2 if shared < heads else 1, "num_key_value_heads": 1}
    for name, value in sizes.items():
        if hasattr(config, name):
            setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(causal)(config).float().eval()
