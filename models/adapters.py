"""LoRA adapters (peft): adding them, merging them into the weights, and a frozen second set of them.

A model with adapters has two sets: TRAINED, and FROZEN, which the KL penalty pulls towards. FROZEN holds what TRAINED
held at step 0, after the cold start: the base alone, with no adapter, would pull what the cold start taught back out.
"""

import contextlib
import copy
import hashlib
import warnings

import torch

from running.errors import UserError

TRAINED, FROZEN = "default", "reference"  # peft calls the first one so


def add_lora(model, rank: int):
    """The frozen model in peft's wrapping, with adapters of this rank that are trained. Raises UserError: no peft."""
    peft = import_peft("--lora-rank needs peft")
    with peft_quiet():
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0,
                                                          target_modules="all-linear", task_type="CAUSAL_LM"))


def import_peft(why: str):
    """The peft package. Raises UserError: it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{why}: pip install -r requirements-extra.txt") from error
    return peft


@contextlib.contextmanager
def peft_quiet():
    """Without peft's warnings of what users cannot help, and of missing weights, which are refused afterwards."""
    with warnings.catch_warnings():
        # peft asks for what transformers 5.23 calls deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        yield


@torch.no_grad()
def hash_of_base(embeddings: torch.Tensor) -> str:
    """By which adapters know their base again: of its first embeddings in bf16, alike in float32 and bf16 copies."""
    rows = embeddings[:64].to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(rows.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def has_adapters(model) -> bool:
    """Whether peft has wrapped the model."""
    return hasattr(model, "peft_config")


def live_weights(model, adapter: str) -> dict[str, torch.Tensor]:
    """The model's own tensors by the names that they have in a saved folder: of one adapter, or of the whole model."""
    own = model.state_dict(keep_vars=True)
    if not has_adapters(model):
        return own
    if adapter:
        return {name.replace(f".{adapter}.", "."): weight for name, weight in own.items() if f".{adapter}." in name}
    return {name.removeprefix("base_model.model.").replace(".base_layer.", "."): weight for name, weight in own.items()
            if ".lora_" not in name}


@torch.no_grad()
def merged_weights(model) -> dict[str, torch.Tensor]:
    """All weights on the CPU, with what the trained adapters add to them; no second model is made on the GPU."""
    merged = {id(weight): weight.detach().cpu() for weight in live_weights(model, "").values()}
    for layer in model.modules():
        if TRAINED in getattr(layer, "lora_A", {}):
            base, weight = layer.get_base_layer().weight, layer.get_delta_weight(TRAINED).float().cpu()
            merged[id(base)] = (weight + merged[id(base)]).to(base.dtype)
    return {name: merged[id(weight)] for name, weight in live_weights(model, "").items()}


@contextlib.contextmanager
def adapters_in_force(model, adapter: str):
    """Inside, these adapters speak; which parameters are trained stays as it was, though peft changes that."""
    before, trained = model.active_adapter, [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        model.set_adapter(adapter, inference_mode=True)
        yield
    finally:
        model.set_adapter(before)
        for weight, flag in trained:
            weight.requires_grad_(flag)


@torch.no_grad()
def add_frozen_adapters(model) -> None:
    """Copies the trained adapters into a second set, FROZEN, without touching the run's random numbers."""
    if FROZEN not in model.peft_config:
        flags = [(weight, weight.requires_grad) for weight in model.parameters()]
        device = next(model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), peft_quiet():
            model.add_adapter(FROZEN, copy.deepcopy(model.peft_config[TRAINED]))
        for weight, flag in flags:
            weight.requires_grad_(flag)
    trained, frozen = live_weights(model, TRAINED), live_weights(model, FROZEN)
    for name, weight in frozen.items():
        weight.requires_grad_(False).copy_(trained[name])
