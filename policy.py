"""Policies: load, build and save a causal language model with its tokenizer. Nothing algorithmic.

`tiny` is built here from random weights (a Qwen2 of about one million parameters and a byte-level BPE tokenizer
trained on the questions at hand); everything else is a Hugging Face checkpoint: an alias, a hub id or a local folder.
"""

import contextlib
import copy
import json
import os
import re
import shutil
import socket
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.attention import causal_lm
from engine.plan import PUBLISHED
from running.errors import UserError

ALIASES = {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-coder-0.5b": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "qwen2.5-coder-1.5b": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "qwen2.5-coder-3b": "Qwen/Qwen2.5-Coder-3B-Instruct",
    "qwen2.5-coder-7b": "Qwen/Qwen2.5-Coder-7B-Instruct",
    "finer-sql-3b-bird": "griffith-bigdata/FINER-SQL-3B-BIRD",
    "finer-sql-3b-spider": "griffith-bigdata/FINER-SQL-3B-Spider",
}
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
    """Loads a checkpoint by alias, local folder or hub id.

    With `lora_rank` the weights are frozen and adapters of that rank are trained instead (needs peft).

    Raises:
        UserError: the checkpoint is not there or cannot be loaded, or peft is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quiet()
    source = ALIASES.get(name, name)
    if (Path(source) / "adapter_config.json").is_file():
        return _load_adapters(Path(source), device, dtype)
    require_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_missing_model(name, source, error)) from error
    model.to(device)
    for weight in model.parameters():  # those of a file lie anywhere in memory, and products of matrices depend on
        weight.data = weight.data.clone()  # where their rows start, in the last digit: a resumed run would differ
    if lora_rank:
        model = _add_lora(model, lora_rank)
    return Policy(model, tokenizer, _eos_ids(model, tokenizer))


def load_for_sampling(name: str, threads: int = 0) -> Policy:
    """A policy on the GPU in bfloat16 where there is one, else on the CPU; threads 0 is PyTorch's choice."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # it tells how fast weights load, in the middle of our own output
    logging.set_verbosity_error()  # and the tokenizer warns of long prompts, which we shorten or refuse

    if threads:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        return load_policy(name, device="cuda", dtype=torch.bfloat16)
    return load_policy(name)


def _load_adapters(folder: Path, device: str, dtype: torch.dtype) -> Policy:
    """A LoRA checkpoint: its base model, named in its adapter_config.json, with the adapters on, trainable."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"{folder} needs peft for its adapters: pip install -r requirements-extra.txt") from error
    base = load_policy(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"],
                       device=device, dtype=dtype)
    return Policy(PeftModel.from_pretrained(base.model, str(folder), is_trainable=True), base.tokenizer, base.eos_ids)


def require_model(name: str) -> None:
    """Raises UserError, within seconds, when a checkpoint is neither here nor can be fetched."""
    source = ALIASES.get(name, name)
    if Path(source).exists():
        if not any((Path(source) / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
            raise UserError(f"{source} is not a model folder: it has no config.json")
    elif not _cached_config(source) and not _hub_answers():
        raise UserError(_missing_model(name, source, OSError("the hub cannot be reached")))


def config_of(name: str) -> dict:
    """The config.json of a checkpoint; of Qwen2.5 known here, else of its folder, the hub's cache or the hub.

    Raises UserError: it is not there or not readable.
    """
    source = ALIASES.get(name, name)
    size = re.search(r"-(0\.5|1\.5|3|7)b(?:-|$)", name.lower()) if source in ALIASES.values() else None
    if size:
        return PUBLISHED[f"{size[1]}b"]
    require_model(name)
    try:
        if (Path(source) / "adapter_config.json").is_file():
            return config_of(json.loads((Path(source) / "adapter_config.json").read_text())["base_model_name_or_path"])
        if Path(source).exists():
            file = Path(source) / "config.json"
        else:
            from huggingface_hub import hf_hub_download
            file = _cached_config(source) or hf_hub_download(source, "config.json")
        return json.loads(Path(file).read_text())
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_missing_model(name, source, error)) from error


def _cached_config(source: str) -> str | None:
    """The checkpoint's config.json in the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, "config.json")
    except HFValidationError:  # not even the form of a hub id
        return None
    return found if isinstance(found, str) else None


def _hub_answers(seconds: float = 3.0) -> bool:
    """Whether a connection to the hub opens soon; its own client would try again for a minute."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    endpoint = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=seconds).close()
    except OSError:
        return False
    return True


def _missing_model(name: str, source: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).exists():
        return f"cannot load the model in {source}: {reason}"
    known = ", ".join(["tiny", *ALIASES])
    if source.count("/") > 1 or source.startswith((".", "~")):  # no hub id looks like this
        return (f"there is no model in {source}: `python train.py` writes one to runs/demo/best, or choose one of "
                f"{known}")
    return (f"model '{name}' is neither a local folder nor reachable on the Hugging Face hub ({source}): get it with "
            f"`hf download {source}` while online, give a folder, or choose one of {known}")


def _eos_ids(model, tokenizer) -> tuple[int, ...]:
    """All ids that end a completion: the tokenizer's EOS and those of the generation config."""
    configured = getattr(model, "generation_config", None)
    ids = getattr(configured, "eos_token_id", None) or []
    ids = {*([ids] if isinstance(ids, int) else ids), tokenizer.eos_token_id} - {None}
    if not ids:
        raise UserError("the tokenizer has no EOS token, so completions would never end")
    return tuple(sorted(ids))


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
