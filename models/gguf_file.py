"""GGUF files, the format of llama.cpp: read as a transformers model with full-precision weights and its tokenizer.

A GGUF file is metadata (sizes, vocabulary, chat template) followed by tensors, most of them quantised. Here the `gguf`
package unpacks every tensor, and each must match one in the model. A file that cannot be read exactly is refused,
because an almost correct model would train and answer almost as well. Decoders of the Llama family with a byte-level
BPE vocabulary can be read: SmolLM2, Llama 3, Qwen2.5, Qwen3. transformers reads more kinds, but a hundred times slower
(it walks the vocabulary three times), and it drops biases, Llama 3's rotary scaling and SmolLM2's splitting of digits.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from common.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # types of values
STRING, ARRAY = 8, 9
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens
TENSOR_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
               "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
               "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
               "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
ROTARY = "rope_freqs.weight"  # the divisors of the rotary frequencies in Llama 3.1 and later

# How a vocabulary splits text before its merges apply; {} is the longest run of digits that stays together.
WORD_RULE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
             r"|\s+(?!\S)|\s+")
QWEN, LLAMA3 = WORD_RULE.replace("{}", ""), WORD_RULE.replace("{}", "{1,3}")
CUTS = {"smollm": "digits", "gpt-2": "", "qwen2": QWEN, "deepseek-r1-qwen": QWEN, "llama-bpe": LLAMA3,
        "llama3": LLAMA3}


@dataclass
class GGUFFile:
    """The metadata of a file, and the positions of its tensors."""

    path: Path
    metadata: dict
    tensors: dict[str, tuple[int, tuple[int, ...], int]]  # name -> (quantisation, shape, offset in the file)
    size: int  # minimum size of the file in bytes

    def value(self, name: str, default=None):
        """A value of the architecture, as `llama.block_count`. Raises UserError: it is missing and has no default."""
        found = self.metadata.get(f"{self.metadata['general.architecture']}.{name}", default)
        if found is None:
            raise UserError(f"{self.path} does not say its {name}, so the model cannot be built")
        return found


def find_gguf(source: str | Path) -> Path | None:
    """The GGUF file of a path: itself, or the only one in a folder without config.json; None: no GGUF.

    Raises UserError: the folder contains several.
    """
    path = Path(source)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists() or (path / "adapter_config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} GGUF files: give one of them, for example {found[0]}")
    return found[0] if found else None


# ----------------------------------------------------------------------------------------------------- the file

def read_gguf(path: Path) -> GGUFFile:
    """Reads everything but the tensors' data. Raises UserError: not a GGUF file, truncated, or of an unsupported kind.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _parse(path, data)
            size = len(data)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (struct.error, UnicodeDecodeError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} is empty, truncated or damaged, as its metadata cannot be read: fetch it "
                        "again") from error
    if size < found.size:
        raise UserError(f"{path} is truncated: it has {size:,} bytes of {found.size:,}; fetch it again")
    _refuse_unknown(found)
    return found


def _parse(path: Path, data: mmap.mmap) -> GGUFFile:
    if data[:8] == b"version ":
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
    if data[:4] != b"GGUF":
        raise UserError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    version, tensor_count, value_count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise UserError(f"{path} is GGUF of version {version & 0xffff or version >> 24}, or big-endian; little-endian "
                        "versions 2 and 3 can be read")
    position, metadata, tensors = 24, {}, {}
    for _ in range(value_count):
        key, position = _text(data, position)
        metadata[key], position = _value(data, position + 4, struct.unpack_from("<I", data, position)[0])
    for _ in range(tensor_count):
        name, position = _text(data, position)
        (dimensions,) = struct.unpack_from("<I", data, position)
        shape = struct.unpack_from(f"<{dimensions}Q", data, position + 4)
        kind, offset = struct.unpack_from("<IQ", data, position + 4 + 8 * dimensions)
        tensors[name] = kind, shape[::-1], offset  # the file's first dimension is the innermost
        position += 16 + 8 * dimensions
    alignment = metadata.get("general.alignment", 32)
    start = -(-position // alignment) * alignment
    tensors = {name: (kind, shape, start + offset) for name, (kind, shape, offset) in tensors.items()}
    size = max((offset + _bytes(path, kind, shape) for kind, shape, offset in tensors.values()), default=0)
    return GGUFFile(path, metadata, tensors, size)


def _text(data, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, position)
    end = position + 8 + length
    if end > len(data):
        raise ValueError("past the end of the file")
    return data[position + 8:end].decode(), end


def _value(data, position: int, kind: int):
    """(a metadata value, the position after it)"""
    if kind == STRING:
        return _text(data, position)
    if kind != ARRAY:
        form = f"<{NUMBERS.get(kind, '-')}"  # struct.error for an unknown kind
        return struct.unpack_from(form, data, position)[0], position + struct.calcsize(form)
    kind, count = struct.unpack_from("<IQ", data, position)
    position += 12
    if kind in NUMBERS:
        form = f"<{count}{NUMBERS[kind]}"
        return list(struct.unpack_from(form, data, position)), position + struct.calcsize(form)
    values = []
    for _ in range(count):
        value, position = _value(data, position, kind)
        values.append(value)
    return values, position


def _bytes(path: Path, kind: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data. Raises UserError: its quantisation is unknown."""
    gguf = _package(path)
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} holds tensors of quantisation {kind}, which the installed gguf package does not "
                        "know; take a file in F16, Q8_0 or Q4_K_M") from error
    return prod(shape) // block * size


def _package(path: Path):
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path} needs the gguf package: pip install -r requirements-extra.txt") from error
    return gguf


def _refuse_unknown(file: GGUFFile) -> None:
    """Raises UserError: the file would load, but as a different model."""
    metadata, kind = file.metadata, file.metadata.get("general.architecture")
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"{file.path} is one of {metadata['split.count']} parts: join them with "
                        "`llama-gguf-split --merge`")
    if kind not in ARCHITECTURES:
        raise UserError(f"{file.path} is a GGUF file of architecture {kind}; {', '.join(ARCHITECTURES)} can be read: "
                        "take this model's Hugging Face folder instead")
    vocabulary, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if vocabulary != "gpt2" or split not in CUTS:
        raise UserError(f"{file.path} has a vocabulary of kind {vocabulary}/{split}; gpt2 with {', '.join(CUTS)} can "
                        "be read: take this model's Hugging Face folder instead")
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    for what, present in ((f"{scaling} scaling of its rotary angles", scaling != "none"),
                          ("a mixture of experts", metadata.get(f"{kind}.expert_count"))):
        if present:
            raise UserError(f"{file.path} has {what}, which cannot be read: take this model's Hugging Face folder "
                            "instead")


# ---------------------------------------------------------------------------------------- config, weights, tokenizer

def gguf_config(file: GGUFFile) -> dict:
    """The content of the model's config.json, from the metadata."""
    kind, ids = file.metadata["general.architecture"], file.metadata
    heads, width = file.value("attention.head_count"), file.value("embedding_length")
    head = file.value("attention.key_length", file.value("rope.dimension_count", width // heads))
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} has no token_embd.weight, so it is not a whole model")
    config = {
        "model_type": kind, "vocab_size": file.tensors["token_embd.weight"][1][0], "hidden_size": width,
        "intermediate_size": file.value("feed_forward_length"), "num_hidden_layers": file.value("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": file.value("attention.head_count_kv", heads),
        "head_dim": head, "max_position_embeddings": file.value("context_length"),
        "rms_norm_eps": float(f"{file.value('attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5, not its float32
        "rope_parameters": {"rope_type": "default", "rope_theta": file.value("rope.freq_base", 10000.0)},
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": ids.get("tokenizer.ggml.bos_token_id"), "eos_token_id": ids.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": ids.get("tokenizer.ggml.padding_token_id")}
    if kind != "qwen2":  # qwen2 always has biases
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if kind == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if ROTARY in file.tensors:
        config["rope_parameters"] |= _llama3_rotary(file, head, config["rope_parameters"]["rope_theta"])
    return config


def _llama3_rotary(file: GGUFFile, head: int, theta: float) -> dict:
    """Llama 3's rotary parameters, recovered from the divisor of each frequency, which is all that the file contains.
    Raises UserError: the divisors are not Llama 3's."""
    divisors = _tensor(file, ROTARY)
    factor, low, high, positions = divisors.max().item(), 1.0, 4.0, 8192  # the last three: as in all releases
    wavelengths = 2 * torch.pi * theta ** (torch.arange(0, head, 2) / head)
    blend = ((positions / wavelengths - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-4):
        raise UserError(f"{file.path} scales its rotary angles in a way that is not Llama 3's: take this model's "
                        "Hugging Face folder instead")
    return {"rope_type": "llama3", "factor": round(factor, 4), "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": positions}


def _tensor(file: GGUFFile, name: str) -> torch.Tensor:
    """A tensor in float32. Raises UserError: its quantisation cannot be unpacked."""
    import numpy

    gguf, (number, shape, offset) = _package(file.path), file.tensors[name]
    kind = gguf.GGMLQuantizationType(number)
    plain = {"F32": numpy.float32, "F16": numpy.float16, "F64": numpy.float64}.get(kind.name)
    data = numpy.fromfile(file.path, dtype=plain or numpy.uint8, offset=offset,
                          count=prod(shape) if plain else _bytes(file.path, number, shape))
    try:
        unpacked = data if plain else gguf.dequantize(data.reshape(*shape[:-1], -1), kind)
    except NotImplementedError as error:
        raise UserError(f"{file.path} holds tensors of quantisation {kind.name}, which the gguf package cannot unpack; "
                        "take a file in F16, Q8_0 or Q4_K_M") from error
    return torch.from_numpy(unpacked.astype(numpy.float32)).reshape(shape)


def gguf_weights(file: GGUFFile, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """All weights under the names of transformers. Raises UserError: a tensor has no counterpart there."""
    heads = file.value("attention.head_count")
    kv_heads, weights = file.value("attention.head_count_kv", heads), {}
    for name in file.tensors:
        if name == ROTARY:  # in the config
            continue
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        whole = re.fullmatch(r"(\w+)\.(weight|bias)", name)
        if layer and layer[2] in LAYER_NAMES:
            place = f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"
        elif whole and whole[1] in TENSOR_NAMES:
            place = f"{TENSOR_NAMES[whole[1]]}.{whole[2]}"
        else:
            raise UserError(f"{file.path} holds a tensor that the model has no place for: {name}")
        tensor = _tensor(file, name)
        if file.metadata["general.architecture"] == "llama" and layer and layer[2] in ("attn_q", "attn_k"):
            tensor = _unpermuted(tensor, heads if layer[2] == "attn_q" else kv_heads)
        weights[place] = tensor.to(dtype)
    return weights


def _unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in transformers' order: the two rows of a rotation are half a head apart; in llama.cpp they are adjacent."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def gguf_tokenizer(file: GGUFFile):
    """The tokenizer, with the chat template, the special tokens and the word splitting that the file names."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    values = {key.removeprefix("tokenizer."): value for key, value in file.metadata.items()}
    tokens, split = values["ggml.tokens"], values["ggml.pre"]
    merges = [tuple(merge.split(" ")) for merge in values.get("ggml.merges", [])]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges,
                                 ignore_merges=split.startswith("llama")))
    if CUTS[split] == QWEN:
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer, inner.decoder = _pre_tokenizer(CUTS[split]), decoders.ByteLevel()
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {role: tokens[values[f"ggml.{name}_token_id"]] for role, name in roles.items()
             if f"ggml.{name}_token_id" in values}
    kinds = list(zip(tokens, values.get("ggml.token_type", []), strict=False))
    inner.add_special_tokens([AddedToken(text, normalized=False, special=True) for text, k in kinds if k == CONTROL])
    inner.add_tokens([AddedToken(text, normalized=False) for text, k in kinds if k == USER_DEFINED])
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    if values.get("ggml.add_bos_token") and "bos" in named:
        bos = named["bos"]
        first = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
                                              special_tokens=[(bos, values["ggml.bos_token_id"])])
        inner.post_processor = processors.Sequence([inner.post_processor, first])
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=values.get("chat_template"),
                                   model_max_length=file.value("context_length"), clean_up_tokenization_spaces=False,
                                   **{f"{role}_token": text for role, text in named.items()})


def _pre_tokenizer(split: str):
    from tokenizers import Regex, pre_tokenizers

    if split in ("", "digits"):
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]) if split else words
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def load_gguf(path: Path, dtype: torch.dtype):
    """(model, tokenizer, loading info of transformers) of a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    file = read_gguf(path)
    config = AutoConfig.for_model(**gguf_config(file))
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    model, info = kind.from_pretrained(None, config=config, state_dict=gguf_weights(file, dtype), dtype=dtype,
                                       ignore_mismatched_sizes=True, output_loading_info=True)
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    model.generation_config.eos_token_id = list(dict.fromkeys(i for i in ends if i is not None)) or None
    model.name_or_path = str(path)  # where LoRA adapters look for their base
    return model, gguf_tokenizer(file), info
