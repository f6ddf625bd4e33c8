"""Completions under way, in a grid [B, M]: M of each of B prompts.

`Grid.step` gives every one of them a token. It is tensors in, tensors out: its shapes do not depend on what is sampled
and nothing waits for a result, so that a GPU replays it as one graph. Every few tokens `Grid.look` asks which have
ended, and goes on with a smaller grid.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.draw import draw

LOOK = {"cuda": 16, "cpu": 4}  # tokens between two looks
SHRINK = 7 / 8  # of its rows a smaller grid may have at most, to be worth its copies
PADDING = {"cuda": 256, "cpu": 1}  # prompts are padded to a multiple of this, for each length needs graphs of its own


class Grid:
    """The completions under way. Its tensors stay where they are from rollout to rollout, as long as they are large
    enough: a graph on a GPU keeps their addresses."""

    def __init__(self):
        self.memory: dict[str, Tensor] = {}  # flat, of which the tensors are the first part
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        self.pool = None  # of memory that the graphs share
        self.weights: tuple[int, ...] = ()  # their addresses

    def start(self, prompts: list[tuple[Tensor, Tensor]], mask: Tensor, logits: Tensor, uniform: Tensor,
              temperature: float, eos_ids: Sequence[int], weights: tuple[int, ...] = ()) -> None:
        """Takes over the prompts from `prefill` and draws a first token for G completions of each.

        uniform: [B, G, T]. weights: addresses of the weights that `advance` will use.
        """
        if weights != self.weights:
            self.graphs, self.weights = {}, weights
        self.device, self.temperature = logits.device, temperature
        (self.B, self.M, self.T), N = uniform.shape, uniform.shape[0] * uniform.shape[1]
        P = mask.shape[1]
        more = -P % PADDING.get(self.device.type, 1)
        self.prompts = [  # a layer [B, Hk, P, d] each, or of P the last that its window sees
            [self.keep(f"prompt {n}/{i}", F.pad(x, (0, 0, more if x.shape[2] == P else 0, 0)))
             for i, x in enumerate(pair)] for n, pair in enumerate(prompts)]
        self.place_completions()
        for kept in (kept for pair in self.completions for kept in pair):
            kept.zero_()  # what is left there is not seen, but a NaN would be felt: 0 times NaN, NaN minus infinity
        self.padding = self.keep("padding", F.pad(~mask, (more, 0), value=True))  # [B, P]
        self.position = self.keep("position", mask.sum(-1, keepdim=True).expand(-1, self.M))  # [B, M], of the newest
        self.token = self.keep("token", torch.zeros(N, dtype=torch.long))  # [B·M], the newest
        self.ended = self.keep("ended", torch.zeros(N, dtype=torch.bool))  # [B·M]
        self.rows = self.keep("rows", torch.arange(N))  # [B·M], numbers of the completions among all that were started
        self.eos = self.keep("eos", torch.tensor([list(eos_ids) or [-1]]))  # [1, E]
        self.t = self.keep("t", torch.zeros(1, dtype=torch.long))  # number of the newest token
        # One more row than completions takes what the empty places of a smaller grid compute
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
        """A copy of the values at the address of this name."""
        kept = self.place(name, values.shape, values.dtype)
        return kept.copy_(values)

    def place(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor at the address of this name; its content is what was there."""
        size, flat = math.prod(shape), self.memory.get(name)
        if flat is None or flat.numel() < size or (flat.dtype, flat.device) != (dtype, self.device):
            flat = self.memory[name] = torch.empty(size, dtype=dtype, device=self.device)
            self.graphs = {}
        return flat[:size].view(shape)

    def place_completions(self) -> None:
        """Keys and values of the completions, in a layer [B, Hk, M, T, d] each."""
        self.completions = [
            [self.place(f"completions {n}/{i}", (self.B, x.shape[1], self.M, self.T, x.shape[3]), x.dtype)
             for i, x in enumerate(pair)] for n, pair in enumerate(self.prompts)]

    # ---- a token

    def advance(self, t: int, forward: Callable) -> None:
        """Token t of every completion, on a GPU by a graph: one for each size of the grid and number of keys.

        forward: (token [R], position [R], grid) -> logits [R, V]; it calls `attend` once a layer.
        """
        if self.device.type != "cuda":
            self.attended = min(self.T, -(-t // 16) * 16)
            return self.step(forward)
        self.attended = min(self.T, max(64, 1 << (t - 1).bit_length()))
        seen = tuple(keys.shape[2] for keys, _ in self.prompts)  # fewer than P where a layer has a window
        key = (self.B, self.M, *self.uniform.shape, self.padding.shape[1], seen, self.attended, self.temperature,
               self.eos.shape[1])
        if key not in self.graphs:  # the first time as it is, which also makes the libraries ready
            self.graphs[key] = None
            return self.step(forward)
        if self.graphs[key] is None:
            if not any(self.graphs.values()):  # a pool ends with the last of its graphs
                self.pool = torch.cuda.graph_pool_handle()
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key], pool=self.pool):  # records and computes nothing
                self.step(forward)
        self.graphs[key].replay()

    def step(self, forward: Callable) -> None:
        """Computes the newest token of every completion and draws the next."""
        P, n = self.padding.shape[1], self.attended
        self.distance = P + self.t - torch.arange(P + n, device=self.device)  # [P + n], from the newest token to a key
        ahead = (self.distance[P:] < 0).expand(self.B, n)
        hidden = torch.cat([self.padding, ahead], dim=1)[:, None, None]
        self.bias = hidden.float().masked_fill_(hidden, float("-inf"))  # [B, 1, 1, P + n], to be added to scores
        logits = forward(self.token, self.position.flatten(), self)
        self.t += 1
        self.position += 1
        self.draw(logits)

    def draw(self, logits: Tensor) -> None:
        """Draws the token t of every completion from its logits. [B·M, V]"""
        rows, t = self.rows, self.t
        token, logp, entropy = draw(logits, self.temperature, self.uniform[rows, t])
        self.tokens[rows, t], self.logps[rows, t], self.entropies[rows, t] = token, logp, entropy
        self.lengths[rows] = torch.where(self.ended, self.lengths[rows], t + 1)
        self.token.copy_(token)
        self.ended |= (token[:, None] == self.eos).any(-1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float,
               window: int | None = None) -> Tensor:
        """[B·M, H, 1, d], 2 × [B·M, Hk, 1, d] -> [B·M, H, 1, d]; the new keys and values are kept."""
        (B, M), H, (_, Hk, _, d), n = (self.B, self.M), query.shape[1], key.shape, self.attended
        prompt_keys, prompt_values = self.prompts[layer]  # [B, Hk, P, d]
        keys, values = self.completions[layer]  # [B, Hk, M, T, d]
        for kept, new in ((keys, key), (values, value)):
            kept.index_copy_(3, self.t, new.view(B, M, Hk, 1, -1).transpose(1, 2).to(kept.dtype))
        keys, values, P = keys[..., :n, :], values[..., :n, :], prompt_keys.shape[2]
        # the heads that share a key-value head stand side by side, so that one product serves all of a prompt
        query = (query * scaling).view(B, M, Hk, H // Hk, d).transpose(1, 2).to(keys.dtype)  # [B, Hk, M, r, d]
        to_prompt = query.reshape(B, Hk, -1, d) @ prompt_keys.mT  # [B, Hk, M·r, P]
        to_completion = (query @ keys.mT).flatten(2, 3)  # [B, Hk, M·r, n]
        bias = self.bias if window is None else self.bias.masked_fill(self.distance >= window, float("-inf"))
        scores = torch.cat([to_prompt, to_completion], dim=-1).add_(bias[..., -P - n:])
        weights = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
        out = weights[..., P:].unflatten(2, (M, -1)) @ values  # [B, Hk, M, r, d]
        out = out + (weights[..., :P] @ prompt_values).view_as(out)
        return out.transpose(1, 2).reshape(B * M, H, 1, -1)

    # ---- between tokens

    def look(self, t: int) -> bool:
        """Whether any completion goes on; where few do, in a smaller grid. t: tokens they have"""
        growing = ~self.ended.view(self.B, self.M).cpu()
        counts = growing.sum(1)  # [B]
        B, M = self.bucket(int((counts > 0).sum())), self.bucket(int(counts.max()))
        if B and B * M <= SHRINK * self.B * self.M:
            self.shrink(growing, min(B, self.B), min(M, self.M), t)
        return B > 0

    def bucket(self, n: int) -> int:
        """A size of at least n; on a GPU one of few, for each needs a graph."""
        if self.device.type != "cuda" or n < 4:
            return n
        power = 1 << (n - 1).bit_length()
        return power * 3 // 4 if n <= power * 3 // 4 else power

    def shrink(self, growing: Tensor, B: int, M: int, t: int) -> None:
        """Goes on with these completions, bool [B, M], in a smaller grid. t: tokens they have"""
        first = growing.sum(1).sign().argsort(descending=True, stable=True)[:B]  # [B'], prompts, those that go on first
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
        for n, pair in enumerate(self.completions):  # one after the other, so that only one is there twice
            for i, new in enumerate(pair):
                moved = old[n][i][prompt, :, place, :t]  # [B', M', Hk, t, d]
                new.zero_()[..., :t, :] = moved.transpose(1, 2)
                self.prompts[n][i] = self.keep(f"prompt {n}/{i}", self.prompts[n][i][prompt[:, 0]])
