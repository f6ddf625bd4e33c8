"""One token through a decoder of the Llama family, in as few operations as possible.

A decoding step of a small model is bound by the number of operations, not by their arithmetic, and the modules of
transformers use about twice as many as necessary. `forward` computes the same with the same weights. decoding.py uses
it for models for which it is exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import causal_lm

WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"


def forward(model, token: Tensor, position: Tensor, grid) -> Tensor:
    """The logits after a token. [R], [R] -> [R, V]

    grid: stores keys and values and computes attention; see `grid.Grid.attend`.
    """
    causal = causal_lm(model)
    decoder = causal.model
    x, R = decoder.embed_tokens(token), len(token)  # [R, D], float32 where only products are bf16 (bf16.py)
    dtype = causal.get_output_embeddings().weight.dtype  # of products
    cos, sin = decoder.rotary_emb(x, position[:, None])  # [R, 1, d] each
    for n, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        h = norm(layer.input_layernorm, x).to(dtype)
        query, key, value = (linear(module, h).view(R, -1, attention.head_dim)
                             for module in (attention.q_proj, attention.k_proj, attention.v_proj))  # [R, heads, d]
        if hasattr(attention, "q_norm"):
            query, key = norm(attention.q_norm, query), norm(attention.k_norm, key)
        query, key = rotate(torch.cat([query, key], dim=1), cos, sin).split((query.shape[1], key.shape[1]), dim=1)
        window = getattr(attention, "sliding_window", getattr(causal.config, "sliding_window", None))
        out = grid.attend(n, query[:, :, None], key[:, :, None], value[:, :, None], attention.scaling, window)
        x = x + linear(attention.o_proj, out.reshape(R, -1))
        h = norm(layer.post_attention_layernorm, x).to(dtype)
        x = x + linear(mlp.down_proj, mlp.act_fn(linear(mlp.gate_proj, h)) * linear(mlp.up_proj, h))
    return linear(causal.get_output_embeddings(), norm(decoder.norm, x).to(dtype)).contiguous()


def linear(module, x: Tensor) -> Tensor:
    """A linear map. [R, i] -> [R, o]

    On a CPU with AVX2 the weight is the left factor, because MKL's product is then up to twice as fast for few rows.
    With AVX-512 it is slower for two to eight rows, and no faster for more.
    """
    if type(module) is not torch.nn.Linear or x.dtype != torch.float32 or x.is_cuda or WIDE:
        return module(x)
    if module.bias is None:
        return (module.weight @ x.T).T
    return torch.addmm(module.bias[:, None], module.weight, x.T).T


def norm(module, x: Tensor) -> Tensor:
    """RMSNorm over the last dimension."""
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    return F.rms_norm(x.to(module.weight.dtype), x.shape[-1:], module.weight, epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves against halves. [R, heads, d], 2 × [R, 1, d] -> [R, heads, d]"""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
