"""Sampling with each prompt computed, stored and read once for its G completions; otherwise as `grpo.plain_decode`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.attention import SharedPrompts, enable, is_exact, no_mask, window_allows
from grpo import Group, as_groups, dropout_off, left_pad, plain_decode, plain_logprobs, sample_token


def decode(model, prompts: Sequence[Tensor], uniform: Tensor, temperature: float,
           eos_ids: Sequence[int]) -> list[Group]:
    """Samples the groups of B prompts. uniform: [B, G, T], as `grpo.plain_decode` takes it."""
    if not can_share(model, max(map(len, prompts)) + uniform.shape[2]):
        return plain_decode(model, prompts, uniform, temperature, eos_ids)
    return shared_decode(model, prompts, uniform, temperature, eos_ids)


def shared_decode(model, prompts, uniform, temperature, eos_ids) -> list[Group]:
    """Rows that have ended leave the batch."""
    (B, G, T), decoder = uniform.shape, SharedDecoder(model, prompts, uniform.shape[1], uniform.shape[2])
    logits, device, N = decoder.logits, decoder.logits.device, B * G
    eos, uniform = torch.tensor(list(eos_ids), dtype=torch.long, device=device), uniform.reshape(N, T).to(device)
    tokens = torch.zeros(N, T, dtype=torch.long, device=device)
    logps, entropies = torch.zeros(N, T, device=device), torch.zeros(N, T, device=device)
    lengths = torch.zeros(N, dtype=torch.long, device=device)
    ended = torch.zeros(N, dtype=torch.bool, device=device)
    rows = torch.arange(N, device=device)  # the completions still growing
    for t in range(T):
        token, logps[rows, t], entropies[rows, t] = sample_token(logits, temperature, uniform[rows, t])  # [n] each
        tokens[rows, t], lengths[rows] = token, t + 1
        ended[rows] = torch.isin(token, eos)
        growing = (~ended[rows]).nonzero()[:, 0]
        if len(growing) == 0 or t == T - 1:
            break
        if len(growing) < len(rows):
            decoder.keep(growing)
            rows, token = rows[growing], token[growing]
        logits = decoder.step(token)
    return as_groups(prompts, G, tokens, logps, entropies, lengths, ended)


class SharedDecoder:
    """Prefills B prompts for G completions each; `logits` [B·G, V] come next, prompt-major."""

    def __init__(self, model, prompts: Sequence[Tensor], G: int, max_tokens: int):
        ids, mask = left_pad(prompts, next(model.parameters()).device)  # [B, P] each
        out = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                    use_cache=True, logits_to_keep=1)
        self.model, self.logits = model, out.logits[:, -1].repeat_interleave(G, 0)  # [B·G, V]
        self.position = mask.sum(-1, keepdim=True).repeat_interleave(G, 0)  # [B·G, 1], of the next token
        enable(model)
        self.layout = SharedPrompts([(layer.keys, layer.values) for layer in out.past_key_values.layers], mask, G,
                                    max_tokens)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on; indices [n] in ascending order."""
        self.position = self.position[rows]
        self.layout.keep(rows)

    def step(self, tokens: Tensor) -> Tensor:
        """Appends a token to each row; the logits of what follows. [n] -> [n, V]"""
        out = self.model(input_ids=tokens[:, None], attention_mask=no_mask(tokens.device), position_ids=self.position,
                         use_cache=False, layout=self.layout)
        self.layout.length += 1
        self.position = self.position + 1
        return out.logits[:, -1]


def can_share(model, tokens: int) -> bool:
    """Whether a model's completions can share their prompt up to this position; a warning says if they cannot."""
    return window_allows(model, tokens) and is_exact(model, "shared prompts", _gap)


def _gap(model) -> float:
    """Largest difference of a sampled token's log-probability from that of the plain forward."""
    prompts, uniform = [torch.arange(2, 9), torch.arange(3, 6)], torch.rand(2, 3, 4, dtype=torch.float64)
    gaps = []
    with torch.no_grad(), dropout_off(model):
        for group in shared_decode(model, prompts, uniform, 1.0, range(0, 64, 3)):
            exact = plain_logprobs(model, [group.prompt] * 3, group.completions, 1.0)
            gaps += [(row[:len(logp)] - logp).abs().max().item()
                     for row, logp in zip(exact, group.logps, strict=True)]
    return max(gaps)
