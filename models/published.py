"""Sizes of published models, so that a run can be planned before anything is downloaded."""


def _qwen(width: int, inner: int, layers: int, heads: int, kv_heads: int = 2, vocabulary: int = 151936,
          tied: bool = True) -> dict:
    return {"model_type": "qwen2", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
            "tie_word_embeddings": tied}


def _sizes(kind: str, width: int, inner: int, layers: int, heads: int, kv_heads: int, head: int,
           vocabulary: int) -> dict:
    return {"model_type": kind, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head, "vocab_size": vocabulary,
            "tie_word_embeddings": True}


# From config.json on the hub: Qwen2.5 and Qwen2.5-Coder, base and Instruct, by size; the others by alias.
PUBLISHED = {"0.5b": _qwen(896, 4864, 24, 14), "1.5b": _qwen(1536, 8960, 28, 12), "3b": _qwen(2048, 11008, 36, 16),
             "7b": _qwen(3584, 18944, 28, 28, 4, 152064, tied=False),
             "qwen3-0.6b": _sizes("qwen3", 1024, 3072, 28, 16, 8, 128, 151936),
             "qwen3-1.7b": _sizes("qwen3", 2048, 6144, 28, 16, 8, 128, 151936),
             "qwen3-4b": _sizes("qwen3", 2560, 9728, 36, 32, 8, 128, 151936),
             "smollm2-135m": _sizes("llama", 576, 1536, 30, 9, 3, 64, 49152),
             "smollm2-360m": _sizes("llama", 960, 2560, 32, 15, 5, 64, 49152),
             "smollm2-1.7b": _sizes("llama", 2048, 8192, 24, 32, 32, 64, 49152),
             "llama-3.2-1b": _sizes("llama", 2048, 8192, 16, 32, 8, 64, 128256),
             "llama-3.2-3b": _sizes("llama", 3072, 8192, 28, 24, 8, 128, 128256),
             "gemma-3-270m": _sizes("gemma3_text", 640, 2048, 18, 4, 1, 256, 262144),
             "gemma-3-1b": _sizes("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144)}
