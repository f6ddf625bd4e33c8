"""Policies: load, build and save a causal language model with its tokenizer. Nothing algorithmic.

`tiny` is built here from random weights (a Qwen2 of about one million parameters and a byte-level BPE tokenizer
trained on the questions at hand); everything else is a checkpoint: an alias, a hub id, a local folder or a GGUF file.
"""

import contextlib
import copy
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.attention import causal_lm
from running.errors import UserError
from running.gguf_file import load_gguf
from running.model_files import ALIASES, base_of_adapters, config_of, missing_model, refuse_unfit, require_model

__all__ = ["ALIASES", "Policy", "Reference", "build_tiny", "checkpoint_activations", "config_of", "free_space",
           "load_policy", "require_model", "train_tokenizer"]

END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass
class Policy:
    """A causal language model, its tokenizer, and the ids that end a completion."""

    model: torch.nn.Module
    tokenizer: object
    eos_ids: tuple[int, ...]
    weights: dict[str, torch.Tensor] | None = None  # what is saved of a model that is sharded over processes

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def decode(self, ids: torch.Tensor) -> str:
        """Text of a completion, without the token that ended it."""
        return self.tokenizer.decode([i for i in ids.tolist() if i not in self.eos_ids], skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Writes model and tokenizer so that plain transformers (and vLLM) load them."""
        _quiet()
        # Of a LoRA policy: the adapters, which `load_policy` puts on their base.
        self.model.save_pretrained(folder, state_dict=self.weights)
        self.tokenizer.save_pretrained(folder)

    def save_merged(self, folder: str | Path) -> None:
        """As `save`, with LoRA adapters merged into the weights."""
        if not hasattr(self.model, "merge_and_unload") or self.weights:  # sharded adapters stay as they are
            return self.save(folder)
        Policy(copy.deepcopy(self.model).merge_and_unload(), self.tokenizer, self.eos_ids).save(folder)


def _quiet() -> None:
    """Loading and saving draw no progress bars of their own amid ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def build_tiny(texts: Iterable[str], *, seed: int, vocab_size: int = 1000, width: int = 128, layers: int = 4,
               heads: int = 4) -> Policy:
    """Builds the tiny policy: random weights, and a tokenizer trained on `texts`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = train_tokenizer(texts, vocab_size)
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
                         max_position_embeddings=4096, rope_theta=10000.0, tie_word_embeddings=True,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
                         initializer_range=0.06)  # a narrow model learns to copy sooner from larger weights
    return Policy(Qwen2ForCausalLM(config), tokenizer, (tokenizer.eos_token_id,))


def train_tokenizer(texts: Iterable[str], vocab_size: int, numbers: int = 400):
    """A byte-level BPE tokenizer of the class that transformers pairs with Qwen2, so that AutoTokenizer restores it.

    That class splits numbers into digits; the most frequent `numbers` are added whole, as a narrow model copies one
    token far more surely than the order of three.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    texts = list(texts)
    blank = Qwen2Tokenizer(eos_token=END, pad_token=PAD)
    tokenizer = blank.train_new_from_iterator(texts, vocab_size, show_progress=False)
    counts = Counter(number for text in texts for number in re.findall(r"(?<!\w)\d{2,}(?!\w)", text))
    whole = [AddedToken(number, single_word=True, normalized=False) for number, _ in counts.most_common(numbers)]
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")] + whole)
    return tokenizer


def load_policy(name: str, *, device: str = "cpu", lora_rank: int = 0, dtype: torch.dtype = torch.float32) -> Policy:
    """Loads a checkpoint by alias, local folder, GGUF file or hub id.

    With `lora_rank` the weights are frozen and adapters of that rank are trained instead (needs peft).

    Raises:
        UserError: the checkpoint is not there or cannot be loaded, or peft is missing.
    """
    _quiet()
    source = require_model(name)
    if (Path(source) / "adapter_config.json").is_file():
        return _load_adapters(Path(source), device, dtype)
    model, tokenizer = _read_checkpoint(name, source, dtype)
    model.to(device)
    for weight in model.parameters():  # those of a file lie anywhere in memory, and products of matrices depend on
        weight.data = weight.data.clone()  # where their rows start, in the last digit: a resumed run would differ
    if lora_rank:
        model = _add_lora(model, lora_rank)
    return Policy(model, tokenizer, _eos_ids(model, tokenizer))


def _read_checkpoint(name: str, source: str, dtype: torch.dtype):
    """(model, tokenizer) of a folder, a hub id or a GGUF file. Raises UserError: it cannot be loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source.lower().endswith(".gguf"):
        if name != source:
            print(f"{name}: from {source}", file=sys.stderr)
        model, tokenizer, info = load_gguf(Path(source), dtype)
        refuse_unfit(source, info)
        model.name_or_path = ALIASES.get(name, name)  # where LoRA adapters look for their base
        return model, tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, ignore_mismatched_sizes=True,
                                                           output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(missing_model(name, error)) from error
    refuse_unfit(source, info)
    return model, tokenizer


def _load_adapters(folder: Path, device: str, dtype: torch.dtype) -> Policy:
    """A LoRA checkpoint: its base model, named in its adapter_config.json, with the adapters on, trainable."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"{folder} needs peft for its adapters: pip install -r requirements-extra.txt") from error
    base = load_policy(base_of_adapters(folder), device=device, dtype=dtype)
    return Policy(PeftModel.from_pretrained(base.model, str(folder), is_trainable=True), base.tokenizer, base.eos_ids)


def _eos_ids(model, tokenizer) -> tuple[int, ...]:
    """All ids that end a completion: the tokenizer's EOS, those of the generation config, the chat template's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(configured) if isinstance(configured, list | tuple) else [configured]
    ids = {*ids, tokenizer.eos_token_id, _end_of_turn(tokenizer)} - {None}
    if not ids:
        raise UserError("the tokenizer has no EOS token, so completions would never end")
    return tuple(sorted(ids))


def _end_of_turn(tokenizer) -> int | None:
    """The control token with which the chat template closes an answer; None where there is none."""
    import jinja2  # it is there where a chat template can be used

    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        closing = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("ANSWER")[2]
    except (jinja2.TemplateError, TypeError, ValueError):  # of a template that wants another kind of chat
        return None
    ids = tokenizer.encode(closing.lstrip(), add_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _add_lora(model, rank: int):
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--lora-rank needs peft: pip install -r requirements-extra.txt") from error
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear",
                                            task_type="CAUSAL_LM"))


def checkpoint_activations(model) -> None:
    """Gradient checkpointing: a layer's activations are computed again in backward instead of being kept."""
    causal = causal_lm(model)
    options = {"use_reentrant": False}
    if hasattr(causal, "activation_checkpointing_enable"):  # the older name is deprecated in transformers 5.23
        causal.activation_checkpointing_enable(options)
    else:
        causal.gradient_checkpointing_enable(options)


class Reference:
    """The frozen policy that the KL penalty pulls towards: a copy, or the same model with its adapters off.

    A copy may be kept on the CPU (`device`), from where it is lent to the GPU for its pass; bit for bit the same.
    """

    def __init__(self, model, device: str | None = None):
        self.adapters = hasattr(model, "disable_adapter")
        self.model = model if self.adapters else _frozen_copy(model, device)

    @contextlib.contextmanager
    def active(self, device: str | None = None):
        """Yields the model with the reference's weights in force, on this device while it is used."""
        if self.adapters:
            with self.model.disable_adapter():
                yield self.model
            return
        at_home = [(tensor, tensor.data) for tensor in (*self.model.parameters(), *self.model.buffers())]
        try:
            for tensor, data in at_home:
                tensor.data = data.to(device or data.device)
            yield self.model
        finally:
            for tensor, data in at_home:
                tensor.data = data


def _frozen_copy(model, device: str | None):
    """A copy that is not trained; made on the CPU where the GPU has no room for a second model."""
    if device is None or device == str(next(model.parameters()).device):
        return copy.deepcopy(model).requires_grad_(False).eval()
    home = next(model.parameters()).device
    frozen = copy.deepcopy(model.to(device)).requires_grad_(False).eval()
    model.to(home)  # in place: an optimizer made earlier still holds these parameters
    return frozen


def free_space(folder: Path) -> int:
    """Bytes free on the disk that will hold `folder`."""
    existing = next(p for p in [folder, *folder.resolve().parents] if p.exists())
    return shutil.disk_usage(existing).free
