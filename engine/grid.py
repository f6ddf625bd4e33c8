"""Unfinished completions in a grid [B, M]: M for each of B prompts.

`Grid.step` adds one token to each of them. It is tensors in, tensors out: its shapes do not depend on what is sampled
and nothing waits for a result, so that a GPU replays it as one graph. Every few tokens `Grid.look` checks which have
ended, and shrinks the grid.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.draw import draw
from variants import forbid

GRAPHS = ("cuda",)  # types of device that replay a step
LOOK = {"cuda": 16, "cpu": 4}  # tokens between two looks
SHRINK = 7 / 8  # largest share of its rows for which a smaller grid is worth the copies
PADDING = {"cuda": 256, "cpu": 1}  # prompts are padded to a multiple of this, because each length needs its own graphs


class Grid:
    """The unfinished completions. Its tensors stay at their addresses from rollout to rollout as long as they are large
    enough, because a graph on a GPU stores the addresses."""

    def __init__(self):
        self.memory: dict[str, Tensor] = {}  # flat buffers; the tensors are their first part
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        self.pool = None  # memory that the graphs share
        self.replays = True  # whether a step can be a graph
        self.failed = None  # a graph that could not be recorded
        self.weights: tuple[int, ...] = ()  # addresses of the weights

    def start(self, prompts: list[tuple[Tensor, Tensor]], mask: Tensor, logits: Tensor, uniform: Tensor,
              temperature: float, eos_ids: Sequence[int], weights: tuple[int, ...] = (),
              rules: Sequence | None = None) -> None:
        """Stores the prompts from `prefill` and draws the first token of G completions per prompt.

        uniform: [B, G, T]. weights: addresses of the weights that `advance` will use. rules: B, as
        `grpo.sample_groups` takes them; each token then waits for the one before, so that no graph is used.
        """
        if weights != self.weights:
            self.graphs, self.weights = {}, weights
        self.device, self.temperature = logits.device, temperature
        (self.B, self.M, self.T), N = uniform.shape, uniform.shape[0] * uniform.shape[1]
        self.written = [rule.start() for rule in rules or () for _ in range(self.M)]  # N, and None for an empty place
        self.written += [None] if rules else []
        P = mask.shape[1]
        more = -P % PADDING.get(self.device.type, 1)
        self.prompts = [  # per layer [B, Hk, P, d] each; with a window, only the last of P
            [self.keep(f"prompt {n}/{i}", F.pad(x, (0, 0, more if x.shape[2] == P else 0, 0)))
             for i, x in enumerate(pair)] for n, pair in enumerate(prompts)]
        self.place_completions()
        for kept in (kept for pair in self.completions for kept in pair):
            kept.zero_()  # old values are masked, but a NaN would spread: 0 times NaN, NaN minus infinity
        self.padding = self.keep("padding", F.pad(~mask, (more, 0), value=True))  # [B, P]
        self.position = self.keep("position", mask.sum(-1, keepdim=True).expand(-1, self.M))  # [B, M], of the newest
        self.token = self.keep("token", torch.zeros(N, dtype=torch.long))  # [B·M], the newest
        self.ended = self.keep("ended", torch.zeros(N, dtype=torch.bool))  # [B·M]
        self.rows = self.keep("rows", torch.arange(N))  # [B·M], indices of the completions among all that were started
        self.eos = self.keep("eos", torch.tensor([list(eos_ids) or [-1]]))  # [1, E]
        self.t = self.keep("t", torch.zeros(1, dtype=torch.long))  # index of the newest token
        # One extra row receives what the empty places of a smaller grid compute
        self.uniform = self.keep("uniform", F.pad(uniform.reshape(N, self.T), (0, 0, 0, 1)))  # [N + 1, T]
        self.tokens = self.keep("tokens", torch.zeros(N + 1, self.T, dtype=torch.long))
        self.logps, self.entropies = (self.keep(name, torch.zeros(N + 1, self.T)) for name in ("logps", "entropies"))
        self.lengths = self.keep("lengths", torch.zeros(N + 1, dtype=torch.long))
        self.draw(logits.repeat_interleave(self.M, 0))

    def results(self) -> tuple[Tensor, ...]:
        """tokens, logps, entropies [N, T] each, lengths [N], ended [N]."""
        tokens, logps, entropies, lengths = (kept[:-1].clone() for kept in (self.tokens, self.logps, self.entropies,
                                                                            self.lengths))
        return tokens, logps, entropies, lengths, (tokens.gather(1, lengths[:, None] - 1) == self.eos).any(-1)

    def keep(self, name: str, values: Tensor) -> Tensor:
        """Copies the values to the buffer of this name."""
        kept = self.place(name, values.shape, values.dtype)
        return kept.copy_(values)

    def place(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in the buffer of this name, with the old content."""
        size, flat = math.prod(shape), self.memory.get(name)
        if flat is None or flat.numel() < size or (flat.dtype, flat.device) != (dtype, self.device):
            flat = self.memory[name] = torch.empty(size, dtype=dtype, device=self.device)
            self.graphs = {}
        return flat[:size].view(shape)

    def place_completions(self) -> None:
        """Places the keys and values of the completions, [B, Hk, M, T, d] each per layer."""
        self.completions = [
            [self.place(f"completions {n}/{i}", (self.B, x.shape[1], self.M, self.T, x.shape[3]), x.dtype)
             for i, x in enumerate(pair)] for n, pair in enumerate(self.prompts)]

    # ---- a token

    def advance(self, t: int, forward: Callable) -> None:
        """Computes token t of every completion; on a GPU by a graph per size of the grid and number of keys.

        forward: (token [R], position [R], grid) -> logits [R, V]; it calls `attend` once per layer.
        """
        if self.device.type not in GRAPHS or self.written:
            self.attended = min(self.T, -(-t // 16) * 16)
            return self.step(forward)
        self.attended = min(self.T, max(64, 1 << (t - 1).bit_length()))
        seen = tuple(keys.shape[2] for keys, _ in self.prompts)  # fewer than P where a layer has a window
        key = (self.B, self.M, *self.uniform.shape, self.padding.shape[1], seen, self.attended, self.temperature,
               self.eos.shape[1])
        if key in self.graphs and self.replays and self.graphs[key] is None:
            self.graphs[key] = self.record(forward)
        if self.graphs.setdefault(key) is None:  # the first time without a graph, which also initialises libraries
            return self.step(forward)
        self.graphs[key].replay()

    def record(self, forward: Callable):
        """Records a step as a graph without computing it; returns None, with one warning, if that fails."""
        if not any(self.graphs.values()):  # a pool ends with the last of its graphs
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self.pool):
                self.step(forward)
        except RuntimeError as error:  # whatever CUDA reports; nothing was computed, so nothing is lost
            self.failed = graph  # PyTorch's allocator may still refer to it
            self.refuse_graphs(str(error).splitlines()[0])
            return None
        return graph

    def refuse_graphs(self, reason: str) -> None:
        """Computes every later step without a graph; warns once, with the reason."""
        if self.replays:
            warnings.warn(f"a step of decoding cannot be recorded as a CUDA graph ({reason}); sampling is slower",
                          stacklevel=4)
        self.replays = False

    def step(self, forward: Callable) -> None:
        """Computes the newest token of every completion and draws the next."""
        P, n = self.padding.shape[1], self.attended
        self.distance = P + self.t - torch.arange(P + n, device=self.device)  # [P + n], from the newest token to a key
        ahead = (self.distance[P:] < 0).expand(self.B, n)
        hidden = torch.cat([self.padding, ahead], dim=1)[:, None, None]
        self.bias = hidden.float().masked_fill_(hidden, float("-inf"))  # [B, 1, 1, P + n], added to scores
        logits = forward(self.token, self.position.flatten(), self)
        self.t += 1
        self.position += 1
        self.draw(logits)

    def draw(self, logits: Tensor) -> None:
        """Draws token t of every completion from its logits [B·M, V]."""
        rows, t = self.rows, self.t
        written = [self.written[i] for i in rows.tolist()] if self.written else []
        logits = forbid(logits, [one and one.bits() for one in written])
        token, logp, entropy = draw(logits, self.temperature, self.uniform[rows, t])
        for one, chosen in zip(written, token.tolist() if written else (), strict=True):
            if one:
                one.take(chosen)
        self.tokens[rows, t], self.logps[rows, t], self.entropies[rows, t] = token, logp, entropy
        self.lengths[rows] = torch.where(self.ended, self.lengths[rows], t + 1)
        self.token.copy_(token)
        self.ended |= (token[:, None] == self.eos).any(-1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float,
               window: int | None = None) -> Tensor:
        """[B·M, H, 1, d], 2 × [B·M, Hk, 1, d] -> [B·M, H, 1, d]; the new keys and values are stored."""
        (B, M), H, (_, Hk, _, d), n = (self.B, self.M), query.shape[1], key.shape, self.attended
        prompt_keys, prompt_values = self.prompts[layer]  # [B, Hk, P, d]
        keys, values = self.completions[layer]  # [B, Hk, M, T, d]
        for kept, new in ((keys, key), (values, value)):
            kept.index_copy_(3, self.t, new.view(B, M, Hk, 1, -1).transpose(1, 2).to(kept.dtype))
        # heads that share a key-value head are adjacent, so that one product serves a whole prompt
        query = query.view(B, M, Hk, H // Hk, d).transpose(1, 2).to(values.dtype)  # [B, Hk, M, r, d]
        bias = self.bias if window is None else self.bias.masked_fill(self.distance >= window, float("-inf"))
        in_parts = self.device.type == "cpu" and values.dtype == torch.bfloat16 and window is None  # else not faster
        way = parts if in_parts else products
        with torch.autocast(self.device.type, enabled=False):
            out = way(query, prompt_keys, prompt_values, keys[..., :n, :], values[..., :n, :],
                      bias[..., -prompt_keys.shape[2] - n:], scaling)
        return out.to(values.dtype).transpose(1, 2).reshape(B * M, H, 1, -1)

    # ---- between tokens

    def look(self, t: int) -> bool:
        """Whether any completion is unfinished; shrinks the grid if few are. t: tokens per completion"""
        growing = ~self.ended.view(self.B, self.M).cpu()
        counts = growing.sum(1)  # [B]
        B, M = self.bucket(int((counts > 0).sum())), self.bucket(int(counts.max()))
        if B and B * M <= SHRINK * self.B * self.M:
            self.shrink(growing, min(B, self.B), min(M, self.M), t)
        return B > 0

    def bucket(self, n: int) -> int:
        """A size of at least n; on a GPU one of few, because each needs a graph."""
        if self.device.type != "cuda" or n < 4:
            return n
        power = 1 << (n - 1).bit_length()
        return power * 3 // 4 if n <= power * 3 // 4 else power

    def shrink(self, growing: Tensor, B: int, M: int, t: int) -> None:
        """Moves these completions, bool [B, M], to a smaller grid. t: tokens per completion"""
        first = growing.sum(1).sign().argsort(descending=True, stable=True)[:B]  # [B'], prompts, unfinished ones first
        order = growing[first].int().argsort(dim=1, descending=True, stable=True)[:, :M]  # [B', M'], likewise
        empty = ~growing[first].gather(1, order).flatten().to(self.device)  # [B'·M'], places without a completion
        prompt, place = first[:, None].to(self.device), order.to(self.device)
        at = (prompt * self.M + place).flatten()  # [B'·M']
        rows = self.rows[at].masked_fill(empty, len(self.uniform) - 1)
        state = {"rows": rows, "token": self.token[at], "ended": empty, "position": self.position[prompt, place],
                 "padding": self.padding[prompt[:, 0]]}
        for name, values in state.items():
            setattr(self, name, self.keep(name, values))
        old, (self.B, self.M) = self.completions, (B, M)
        self.place_completions()
        for n, pair in enumerate(self.completions):  # layer by layer, so that only one layer exists twice
            for i, new in enumerate(pair):
                moved = old[n][i][prompt, :, place, :t]  # [B', M', Hk, t, d]
                new.zero_()[..., :t, :] = moved.transpose(1, 2)
                self.prompts[n][i] = self.keep(f"prompt {n}/{i}", self.prompts[n][i][prompt[:, 0]])


# ---- attention of a token: query [B, Hk, M, r, d], the prompts' keys and values [B, Hk, P, d], the completions'
# [B, Hk, M, n, d], bias [B, 1, 1, P + n] added to scores -> [B, Hk, M, r, d]


def products(query, prompt_keys, prompt_values, keys, values, bias, scaling: float) -> Tensor:
    """By matrix products, on any device."""
    M, P = query.shape[2], prompt_keys.shape[2]
    found = torch.cat([scores(query.flatten(2, 3), prompt_keys), scores(query, keys).flatten(2, 3)], dim=-1)
    weights = torch.add(bias, found, alpha=scaling, out=found).softmax(-1).to(values.dtype)  # [B, Hk, M·r, P + n]
    out = weights[..., P:].unflatten(2, (M, -1)) @ values
    return out + (weights[..., :P] @ prompt_values).view_as(out)


def scores(query: Tensor, keys: Tensor) -> Tensor:
    """Products of queries and keys, in float32 or wider: they must not be rounded. [*, m, d], [*, n, d] -> [*, m, n]"""
    if query.dtype != torch.bfloat16:
        return query @ keys.mT
    if not query.is_cuda:
        return query.float() @ keys.float().mT
    flat = torch.bmm(query.flatten(0, -3), keys.flatten(0, -3).mT, out_dtype=torch.float32)
    return flat.unflatten(0, query.shape[:-2])


def parts(query, prompt_keys, prompt_values, keys, values, bias, scaling: float) -> Tensor:
    """On a CPU, by its FlashAttention over the prompt and over the completion, combined as in row_attention.py.

    A query must see some key of the prompt, so there is no window.
    """
    attend = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, dropout_p=0.0, scale=scaling)
    (B, Hk, M, r, _), P = query.shape, prompt_keys.shape[2]
    bias = bias.to(query.dtype)
    out, log = attend(query.flatten(2, 3), prompt_keys, prompt_values, attn_mask=bias[..., :P].expand(B, 1, M * r, P))
    more, other = attend(*(x.flatten(0, 1) for x in (query, keys, values)),
                         attn_mask=bias[:1, ..., P:].expand(1, 1, r, keys.shape[3]))  # all are at the same token
    share = torch.sigmoid(log.reshape(B, Hk, M, r, 1) - other.reshape(B, Hk, M, r, 1))
    return out.view(query.shape) * share + more.reshape(query.shape) * (1 - share)
