"""Policies: load, build and save a causal language model with its tokenizer. Nothing algorithmic.

`tiny` is built here: a Qwen2 of about one million random parameters, and a byte-level BPE tokenizer trained on the
questions of the run. Everything else is a checkpoint: an alias, a hub id, a local folder or a GGUF file.
"""

import contextlib
import copy
import os
import pickle
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.run_layout import ADAPTERS
from engine import distributed
from engine.attention import causal_lm
from engine.cores import share_cores
from history import run_config_of
from models.adapters import (
    FROZEN,
    TRAINED,
    adapters_in_force,
    add_frozen_adapters,
    add_lora,
    fault_in_training,
    has_adapters,
    hash_of_base,
    import_peft,
    live_weights,
    merged_weights,
    peft_quiet,
    refusal,
    silence,
)
from models.gguf_file import load_gguf
from models.model_files import (
    ALIASES,
    base_of_adapters,
    config_of,
    inspect_folder,
    known_prefix,
    missing_model,
    naming_adapters,
    refuse_large_vocabulary,
    refuse_nonfinite,
    refuse_quantised,
    refuse_unfit,
    require_model,
    weight_files,
)
from prompts.chat import chat_text

__all__ = ["ALIASES", "Policy", "Reference", "build_tiny", "checkpoint_activations", "config_of", "free_space",
           "load_policy", "prefers_bf16", "require_model", "train_tokenizer"]

# What transformers and its file readers raise for a broken checkpoint.
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, ArithmeticError,
                  SafetensorError, StrictDataclassError, pickle.UnpicklingError)
BASE = "base.txt"  # beside adapters: contains hash_of_base
END, PAD = "<|endoftext|>", "<|pad|>"
BF16_PARAMETERS = 20e6  # a smaller model computes in float32 on any CPU
BF16_CAPABILITY = (8, 0)  # the first compute capability with bf16 matrix products: Ampere


@dataclass
class Policy:
    """A causal language model, its tokenizer, and the ids that end a completion."""

    model: torch.nn.Module
    tokenizer: object
    eos_ids: tuple[int, ...]
    weights: dict[str, torch.Tensor] | None = None  # the gathered weights to save, if the model is sharded

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def decode(self, ids: torch.Tensor) -> str:
        """Text of a completion, without the token that ended it."""
        return self.tokenizer.decode([i for i in ids.tolist() if i not in self.eos_ids], skip_special_tokens=False)

    @property
    def end_id(self) -> int:
        """The token that ends a cold-start completion: the tokenizer's EOS, or else the first of `eos_ids`."""
        eos = self.tokenizer.eos_token_id
        return self.eos_ids[0] if eos is None else eos

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer and model, or LoRA adapters alone, so that plain transformers and vLLM load them."""
        options = {"selected_adapters": [TRAINED], "save_embedding_layers": False} if has_adapters(self.model) else {}
        with _quiet():
            self.model.save_pretrained(folder, state_dict=self.weights, **options)
        if has_adapters(self.model) and not self.weights:
            (Path(folder) / BASE).write_text(hash_of_base(self.model.get_input_embeddings().weight) + "\n")
        self._finish(folder)

    def save_merged(self, folder: str | Path) -> None:
        """As `save`, with LoRA adapters merged into the weights, one after the other on the CPU.

        A merge into bf16 weights rounds away most of what adapters learn in a short run. So the adapters are saved as
        well, in a subfolder, and `load_for_sampling` loads them from there.
        """
        if not has_adapters(self.model) or self.weights:  # sharded adapters stay as they are
            return self.save(folder)
        with _quiet():
            causal_lm(self.model).save_pretrained(folder, state_dict=merged_weights(self.model))
        self._finish(folder)
        if causal_lm(self.model).get_input_embeddings().weight.dtype != torch.float32:
            self.save(Path(folder) / ADAPTERS)

    def _finish(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        mask = os.umask(0)
        os.umask(mask)
        for file in Path(folder).rglob("*"):  # safetensors writes files that only their owner can read
            file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)


@contextlib.contextmanager
def _quiet():
    """Hides transformers' progress bars and reports while it loads or saves; errors are reported by our messages."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


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

    That class splits numbers into digits. The most frequent `numbers` are added as whole tokens, because a narrow
    model copies one token far more reliably than three in order.
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
        UserError: the checkpoint is missing or cannot be loaded, or peft is missing.
    """
    source = require_model(name)
    if (Path(source) / "adapter_config.json").is_file():
        return _load_adapters(Path(source), device, lora_rank, dtype)
    with _quiet():
        model, tokenizer = _read_checkpoint(name, source, dtype)
    refuse_nonfinite(source, model.named_parameters())
    model.to(device)
    for weight in model.parameters():  # weights of a file may start anywhere in memory, and this alignment changes
        weight.data = weight.data.clone()  # the last digit of matrix products: a resumed run would differ
    if lora_rank:
        model = add_lora(model, lora_rank)
    return Policy(model, tokenizer, _eos_ids(model, tokenizer))


def prefers_bf16(parameters: int, gpu: bool) -> bool:
    """Whether `--precision auto` means bf16 arithmetic: on hardware with bf16 instructions, and on a CPU only for a
    model that is large enough to gain."""
    if gpu:  # without CUDA here, the memory of a run on some GPU is planned: assume bf16
        return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= BF16_CAPABILITY
    knows = any(getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return knows and parameters > BF16_PARAMETERS


def computes_in_bf16(precision: str, parameters: float, gpu: bool) -> bool:
    """Whether --precision means bf16 arithmetic for a model of this many parameters."""
    return precision == "bf16" or precision == "auto" and prefers_bf16(parameters, gpu)


def load_for_sampling(name: str, threads: int = 0) -> Policy:
    """A policy on the GPU if there is one; threads 0 is PyTorch's choice.

    It computes in bf16 where training did, according to --precision of its run.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # the tokenizer warns of long prompts, which we shorten or refuse
    if threads:
        torch.set_num_threads(threads)
    share_cores()
    precision = (run_config_of(name) or {}).get("precision", "auto")
    name = unmerged(name)
    if torch.cuda.is_available():
        rounded = computes_in_bf16(precision, 0, gpu=True)
        return load_policy(name, device="cuda", dtype=torch.bfloat16 if rounded else torch.float32)
    policy = load_policy(name)
    parameters = sum(weight.numel() for weight in policy.model.parameters())
    rounded = computes_in_bf16(precision, parameters, gpu=False)
    for weight in policy.model.parameters() if rounded else ():  # not buffers: rotary positions stay exact
        weight.data = weight.data.bfloat16()
    return policy


def unmerged(name: str) -> str:
    """The folder of the adapters if they were merged into bf16 weights and peft and their base are here; else `name`.
    """
    adapters = Path(name) / ADAPTERS
    if not (adapters / "adapter_config.json").is_file():
        return name
    try:
        import_peft("unmerged they need peft")
        require_model(base_of_adapters(adapters))
    except UserError as error:
        print(f"note: in {name} adapters are merged into bf16 weights, rounded; {error}", file=sys.stderr)
        return name
    return str(adapters)


def check_positions(policy: Policy, prompt: int, completion: int) -> None:
    """Raises UserError: a prompt and a completion of these lengths (tokens) exceed the positions of the model."""
    config = causal_lm(policy.model).config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and prompt + completion > positions:
        raise UserError(f"prompts of {prompt} tokens and completions of {completion} are longer than the {positions} "
                        "positions of the model: lower --max-prompt-tokens or --max-completion-tokens")


def _read_checkpoint(name: str, source: str, dtype: torch.dtype):
    """(model, tokenizer) of a folder, a hub id or a GGUF file. Raises UserError: it cannot be loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

    if source.lower().endswith(".gguf"):
        if name != source:
            print(f"{name}: from {source}", file=sys.stderr)
        model, tokenizer, info = load_gguf(Path(source), dtype)
        refuse_unfit(source, info)
        model.name_or_path = ALIASES.get(name, name)  # where LoRA adapters look for their base
        return model, tokenizer
    names = inspect_folder(Path(source)) if Path(source).exists() else []
    if prefix := known_prefix(names):
        print(f"{source}: the prefix {prefix} is taken off the names of its weights", file=sys.stderr)
    options = {"key_mapping": {f"^{re.escape(prefix)}": ""}} if prefix else {}
    try:
        refuse_quantised(source, PreTrainedConfig.get_config_dict(source)[0])
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, ignore_mismatched_sizes=True,
                                                           output_loading_info=True, **options)
    except LOADING_ERRORS as error:
        raise UserError(missing_model(name, error)) from error
    refuse_unfit(source, info)
    if "past_key_values" not in signature(model.forward).parameters:
        raise UserError(f"{name}: {type(model).__name__} keeps no keys and values, which sampling here goes on from; "
                        "choose another --model")
    refuse_large_vocabulary(source, tokenizer, model.get_input_embeddings().weight.shape[0])
    return model, tokenizer


def _load_adapters(folder: Path, device: str, lora_rank: int, dtype: torch.dtype) -> Policy:
    """A LoRA checkpoint: its base model, named in its adapter_config.json, with the adapters on, trainable."""
    peft, names = import_peft(f"{folder} needs peft for its adapters"), inspect_folder(folder)
    name, known = base_of_adapters(folder), folder / BASE
    with naming_adapters(folder):
        base = load_policy(name, device=device, dtype=dtype)
    if known.is_file() and known.read_text().strip() != hash_of_base(base.model.get_input_embeddings().weight):
        raise UserError(f"{folder}: the adapters were trained on other weights than {name} has "
                        "here: put the same base model back (that of the hub and a GGUF file of it differ)")
    try:
        with peft_quiet():
            config = peft.PeftConfig.from_pretrained(str(folder))
            _refuse_adapters(folder, refusal(config, trained=lora_rank > 0), lora_rank)
            model = peft.PeftModel.from_pretrained(base.model, str(folder), is_trainable=True).eval()
    except LOADING_ERRORS as error:
        raise UserError(missing_model(str(folder), error)) from error
    expected = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    if names:  # peft only warns; beside adapters of embeddings it saves the embeddings themselves
        found = {name for name in names if name in expected or ".base_layer." not in name}
        refuse_unfit(str(folder), {"missing_keys": expected - found, "unexpected_keys": found - expected,
                                   "mismatched_keys": ()})
    refuse_nonfinite(str(folder), model.named_parameters())
    if lora_rank and lora_rank != config.r:
        raise UserError(f"the adapters in {folder} have rank {config.r}: leave out --lora-rank {lora_rank}")
    _refuse_adapters(folder, fault_in_training(model) if lora_rank else "", lora_rank)
    return Policy(model, base.tokenizer, base.eos_ids)


def _refuse_adapters(folder: Path, reason: str, lora_rank: int) -> None:
    """Raises UserError if there is a reason why these adapters cannot be used."""
    if reason:
        raise UserError(f"the adapters in {folder} cannot be {'trained on' if lora_rank else 'used'} here, because "
                        f"{reason}: if peft can merge them into their base (merge_and_unload), save that model "
                        "together with its tokenizer, and give its folder")


def _eos_ids(model, tokenizer) -> tuple[int, ...]:
    """All ids that end a completion: EOS of tokenizer and generation config, end of turn of the chat template."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(configured) if isinstance(configured, list | tuple) else [configured]
    ids = {*ids, tokenizer.eos_token_id, _end_of_turn(tokenizer)} - {None}
    if not ids:
        raise UserError("the tokenizer has no EOS token, so completions would never end")
    return tuple(sorted(ids))


def _end_of_turn(tokenizer) -> int | None:
    """The control token with which the chat template closes an answer, or None."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = [("user", "question"), ("assistant", "ANSWER")]
    try:
        closing = chat_text(tokenizer, chat, answer_follows=False).rpartition("ANSWER")[2]
    except UserError:  # the template accepts no such chat
        return None
    ids = tokenizer.encode(closing.lstrip(), add_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


@torch.no_grad()
def load_weights(policy: Policy, folder: str | Path) -> None:
    """Copies a saved policy's weights into this one's live model, tensor by tensor, without a second model in memory.

    Merged weights go into the base of a LoRA policy, whose adapters then add nothing.
    Raises UserError: they do not fit.
    """
    folder, adapted = Path(folder), has_adapters(policy.model)
    adapters = (folder / "adapter_config.json").is_file()
    _copy_saved(folder, live_weights(policy.model, TRAINED if adapters else ""))
    if adapted and not adapters:
        silence(policy.model)


@torch.no_grad()
def _copy_saved(folder: Path, live: dict[str, torch.Tensor]) -> None:
    """Copies the tensors of a saved folder into the live ones of the same name."""
    names = set(inspect_folder(folder))
    if not names <= live.keys():  # some architectures have other names on disk than in memory
        saved = load_policy(str(folder)).model.state_dict()
        tensors = ((name, saved[name]) for name in saved)
    else:
        tensors = ((name, file.get_tensor(name)) for path in weight_files(folder)
                   for file in [safe_open(path, framework="pt")] for name in file.keys())  # noqa: SIM118
    copied, mismatched = set(), []
    for name, tensor in tensors:
        if name in live and live[name].shape == tensor.shape:
            distributed.copy_whole(live[name], tensor)
            copied.add(id(live[name]))
        elif name in live:
            mismatched.append((name,))
    refuse_unfit(str(folder), {"missing_keys": [name for name, weight in live.items() if id(weight) not in copied],
                               "unexpected_keys": [], "mismatched_keys": mismatched})


def checkpoint_activations(model) -> None:
    """Gradient checkpointing: backward recomputes a layer's activations instead of storing them."""
    causal = causal_lm(model)
    options = {"use_reentrant": False}
    if hasattr(causal, "activation_checkpointing_enable"):  # the older name is deprecated in transformers 5.23
        causal.activation_checkpointing_enable(options)
    else:
        causal.gradient_checkpointing_enable(options)


class Reference:
    """The frozen reference policy of the KL penalty, that of step 0: a copy of the model, or of its adapters.

    A copied model may stay on the CPU (`device`) and move to the GPU for its pass only, with bit-identical results.
    Copied adapters are a second set in the same model, active during that pass only.
    """

    def __init__(self, model, device: str | None = None, sharded: distributed.Sharded | None = None):
        self.adapters = has_adapters(model)
        if self.adapters:
            self.model = model
            add_frozen_adapters(model)
        else:
            self.model = sharded.frozen_copy(device) if sharded else _frozen_copy(model, device)

    def load(self, folder: str | Path) -> None:
        """Loads the reference from this folder: a resumed run keeps that of its step 0."""
        _copy_saved(Path(folder), live_weights(self.model, FROZEN if self.adapters else ""))

    @contextlib.contextmanager
    def active(self, device: str | None = None):
        """Yields the model with the reference weights active, on this device during the context."""
        if self.adapters:
            with adapters_in_force(self.model, FROZEN):
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
    """A frozen copy on `device`; made there, because the GPU may have no room for a second model."""
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
