"""LoRA adapters (peft): adding them, merging them into the weights, and a frozen second set of them.

A model with adapters has two sets: TRAINED, and FROZEN, the reference of the KL penalty. FROZEN is a copy of TRAINED at
step 0, after the cold start: a penalty towards the base alone, without adapters, would undo the cold start.
"""

import contextlib
import copy
import hashlib
import warnings

import torch

from common.errors import UserError

TRAINED, FROZEN = "default", "reference"  # "default" is peft's name for its first set

# Kinds of adapters that can be sampled from unmerged; only LoRA is trained.
SAMPLED_KINDS = ("LORA", "LOHA", "LOKR", "VERA", "IA3", "OFT")
# Settings of LoRA that allow freezing, merging and loading again; and those that allow at least sampling.
TRAINED_SETTINGS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias",
    "eva_config", "init_lora_weights"}
SAMPLED_SETTINGS = TRAINED_SETTINGS | {"bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"}
# Allowed initialisations: peft repeats them at each load, so they must be deterministic.
BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva", "pissa", "olora")
TOLERANCE = 1e-2  # relative difference of logits through rounding; real errors are far larger


def add_lora(model, rank: int):
    """The frozen model, wrapped by peft, with trainable adapters of this rank. Raises UserError: no peft."""
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
    """Hides peft's warnings that users cannot act on, and those of missing weights, which are refused afterwards."""
    with warnings.catch_warnings():
        # peft uses an attribute that is deprecated in transformers 5.23
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        yield


@torch.no_grad()
def hash_of_base(embeddings: torch.Tensor) -> str:
    """Identifies the base of adapters: a hash of its first embeddings in bf16, equal for float32 and bf16 copies."""
    rows = embeddings[:64].to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(rows.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def has_adapters(model) -> bool:
    """Whether peft has wrapped the model."""
    return hasattr(model, "peft_config")


def live_weights(model, adapter: str) -> dict[str, torch.Tensor]:
    """The model's live tensors by their names in a saved folder: those of one adapter, or of the whole model."""
    own = model.state_dict(keep_vars=True)
    if not has_adapters(model):
        return own
    if adapter:
        return {name.replace(f".{adapter}.", ".").replace("magnitude_vector.weight", "magnitude_vector"): weight
                for name, weight in own.items() if f".{adapter}." in name}  # the shorter name: as peft saves DoRA's
    return {name.removeprefix("base_model.model.").replace(".base_layer.", "."): weight for name, weight in own.items()
            if ".lora_" not in name}


def adapted_layers(model) -> list:
    """The layers that have trained adapters."""
    return [layer for layer in model.modules()
            if TRAINED in getattr(layer, "lora_A", {}) or TRAINED in getattr(layer, "lora_embedding_A", {})]


@contextlib.contextmanager
def _float32(layer):
    """The layer's base has float32 weights in this context, so that peft can merge adapters; its own are restored."""
    kept = [(weight, weight.data) for weight in layer.get_base_layer().parameters()]
    try:
        for weight, data in kept:
            weight.data = data.float()
        yield
    finally:
        layer.merged_adapters.clear()
        for weight, data in kept:
            weight.data = data


@torch.no_grad()
def merged_weights(model) -> dict[str, torch.Tensor]:
    """All weights on the CPU, with the trained adapters merged by peft, without a second model on the GPU."""
    live = live_weights(model, "")
    merged = {id(weight): weight.detach().cpu() for weight in live.values()}
    for layer in adapted_layers(model):
        kinds = [(weight, weight.dtype) for weight in layer.get_base_layer().parameters()]
        with _float32(layer):
            layer.merge(safe_merge=True, adapter_names=[TRAINED])  # safe_merge: into new tensors
            merged |= {id(weight): weight.detach().to("cpu", kind) for weight, kind in kinds}
    return {name: merged[id(weight)] for name, weight in live.items()}


@torch.no_grad()
def silence(model) -> None:
    """Makes the trained adapters add nothing; in place, because recorded CUDA graphs read these addresses."""
    for layer in adapted_layers(model):
        for weight in layer.lora_B[TRAINED].parameters():
            weight.zero_()
        if TRAINED in layer.lora_magnitude_vector:  # DoRA's row norms
            layer.lora_magnitude_vector[TRAINED].weight.copy_(layer.get_base_layer().weight.norm(dim=1))


# ------------------------------------------------------------------------------------ what cannot be used here

def refusal(config, trained: bool) -> str:
    """Why adapters of this peft config cannot be used here, in words; empty if they can."""
    kind = config.peft_type.value
    if kind not in (("LORA",) if trained else SAMPLED_KINDS):
        return f"they are of kind {kind}"
    if kind != "LORA":
        return ""
    usual, known = vars(type(config)()), TRAINED_SETTINGS if trained else SAMPLED_SETTINGS
    unknown = [name for name, value in vars(config).items()
               if name not in known and not name.startswith("_") and value != usual[name]]
    if unknown:
        return f"they have {unknown[0]} = {getattr(config, unknown[0])!r}"
    if config.init_lora_weights not in BEGINNINGS:
        return f"init_lora_weights = {config.init_lora_weights!r} begins otherwise each time that they are loaded"
    return ""


@torch.no_grad()
def fault_in_training(model) -> str:
    """Why these adapters cannot be trained, in words: freezing or merging them would change the outputs. Empty if they
    can."""
    causal = model.get_base_model()
    for name, layer in (("embeddings", causal.get_input_embeddings()), ("head", causal.get_output_embeddings())):
        if hasattr(layer, "base_layer"):
            return f"they adapt the {name} of the model, which merging may not keep apart"
    ids, known = torch.arange(8, device=next(model.parameters()).device)[None], FROZEN in model.peft_config
    before = model(ids).logits
    add_frozen_adapters(model)
    with adapters_in_force(model, FROZEN):
        frozen = model(ids).logits
    if _differ(frozen, before) or _differ(model(ids).logits, before):
        return "a frozen copy of them answers otherwise"
    if not known:
        model.delete_adapter(FROZEN)
    return next((f"merged into a {type(layer.get_base_layer()).__name__} layer they would answer otherwise"
                 for layer in adapted_layers(model) if _merging_changes(layer)), "")


def _merging_changes(layer) -> bool:
    """Whether merging the layer's adapters changes its outputs on random inputs."""
    weight = layer.get_base_layer().weight
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0)).to(weight.device)
    with _float32(layer):
        before = layer(x)
        try:
            layer.merge(safe_merge=True, adapter_names=[TRAINED])
        except RuntimeError:  # such as adapters with a bias on a base without one
            return True
        return _differ(layer(x), before)


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() > TOLERANCE * b.norm())


@contextlib.contextmanager
def adapters_in_force(model, adapter: str):
    """Activates these adapters in this context; restores which parameters are trained, because peft changes it."""
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
    """Copies the trained adapters into a second set, FROZEN, without changing the run's random state.

    Initialisations such as PiSSA rewrite the base, so the second set is created without one.
    """
    if FROZEN not in model.peft_config:
        flags = [(weight, weight.requires_grad) for weight in model.parameters()]
        device = next(model.parameters()).device
        config = copy.deepcopy(model.peft_config[TRAINED])
        config.init_lora_weights = False
        with torch.random.fork_rng([device] if device.type == "cuda" else []), peft_quiet():
            model.add_adapter(FROZEN, config)
        for weight, flag in flags:
            weight.requires_grad_(flag)
    trained, frozen = live_weights(model, TRAINED), live_weights(model, FROZEN)
    for name, weight in frozen.items():
        weight.requires_grad_(False).copy_(trained[name])
