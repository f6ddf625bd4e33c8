"""Several processes per run: `torchrun --nproc-per-node N train.py …`, with torch.distributed.

All processes take the same steps on the same state. Each samples and scores its part of a step's questions; the results
are gathered, so that every process has the advantages, metrics and memory of the whole batch. Each computes its part of
the cold start's passes and of the update's micro-batches, and gradients are summed. Only process 0 prints, logs and
saves.

`Sharded` spreads parameters, gradients and optimizer state over the processes (FSDP2); otherwise each has all of them.
With a single process, nothing here has an effect.
"""

import copy
import math
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

import grpo
from common.errors import UserError
from engine import bf16
from engine.decoding import can_share, decode
from grpo import Engine, GRPOConfig, MicroBatch, UpdateSums, backward, clip, dropout_off, has_gradient, step_if_finite

# For a process that hangs. One that dies is noticed at once: torchrun ends the others, or their connections break.
TIMEOUT = timedelta(minutes=30)
SHORTEST = ([torch.zeros(1, dtype=torch.long)],) * 2  # a prompt and a completion of one token, for passes of weight 0


class LostProcess(UserError):
    """Another process of the run has ended."""


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints, logs and saves."""
    return rank() == 0


@contextmanager
def process_group():
    """Joins the processes that torchrun has started; inside, only process 0 prints and reports user errors."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    printed = sys.stdout
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    try:
        yield
        gather(None)  # process 0 writes its last files first: torchrun would end it once another has ended
        dist.destroy_process_group()
    except UserError as error:
        if not is_main() and not isinstance(error, LostProcess):
            raise SystemExit(2) from error  # process 0 reports it
        raise
    finally:
        sys.stdout = printed


def exit_process(status: int) -> int:
    """Ends this process with its status if it is one of several; else returns the status.

    It ends at once, because PyTorch's threads can abort a process during teardown, after all its work.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


@contextmanager
def _together():
    """The context of what all processes do together. Raises LostProcess, one sentence: another has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LostProcess(f"process {rank()} of {size()} has lost another one, so the run stops; go on from its newest "
                          f"checkpoint with --resume ({reason})") from error


# ---- what all processes share


def share_of(count: int) -> slice:
    """This process's part of `count` items; the parts are disjoint, in order, and may be empty."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def gather(value) -> list:
    """The values of all processes, in rank order, in every process."""
    if size() == 1:
        return [value]
    values = [None] * size()
    with _together():
        dist.all_gather_object(values, value)
    return values


def merge(items: list) -> list:
    """One list of the items of all processes, in rank order."""
    return [item for items in gather(items) for item in items]


def everywhere(action: Callable, *errors: type[Exception]):
    """The result of `action()` in this process; one of these errors in any process is raised in all of them, so that
    process 0 reports it."""
    result, failure = None, None
    try:
        result = action()
    except errors as error:
        failure = error
    for failed in gather(failure):
        if failed is not None:
            raise failed
    return result


def on_main(action: Callable):
    """The result of `action()` in process 0, for all processes; a UserError is raised in all of them."""
    outcome = None
    if is_main():
        try:
            outcome = action()
        except UserError as error:
            outcome = error
    outcome = gather(outcome)[0]
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


# ---- what all processes compute


def policy_update(model, optimizer, batches: list[MicroBatch], config: GRPOConfig, engine: Engine) -> dict[str, float]:
    """`grpo.policy_update` by all processes. Each has a part of the rollout's micro-batches (`divide`); optimizer steps
    use the gradients of all, and the statistics cover all micro-batches."""
    if size() == 1:
        return grpo.policy_update(model, optimizer, batches, config, engine)
    sums, skipped = UpdateSums(), 0
    own = sum(has_gradient(batch, config) for batch in batches)
    most = max(gather(own))  # before the passes, because each pass of a sharded model waits for all processes
    with dropout_off(model):
        for update in range(config.updates_per_rollout):
            optimizer.zero_grad(set_to_none=True)
            loss = sum(backward(model, batch, update == 0, config, sums, engine) for batch in batches)
            make_idle_passes(model, engine, most - own)
            sum_gradients(model)
            norm = clip(optimizer, config)
            grad_norm = step_if_finite(optimizer, (norm.full_tensor() if is_sharded(norm) else norm).item())
            skipped += not math.isfinite(grad_norm)
    return merge_stats({"loss": loss, "grad_norm": grad_norm, "skipped_updates": skipped} | sums.means())


def divide(batches: list[MicroBatch], config: GRPOConfig) -> list[MicroBatch]:
    """This process's micro-batches of an update: an equal share of those that have a gradient, and of the others."""
    return [batch for kind in (True, False)
            for batch in [batch for batch in batches if has_gradient(batch, config) is kind][rank()::size()]]


def make_idle_passes(model, engine: Engine, count: int) -> None:
    """Makes passes of weight 0, because a sharded model needs the same number of passes from all processes."""
    for _ in range(count):
        (0 * engine.logprobs(model, *SHORTEST, 1.0)).sum().backward()


def merge_stats(stats: dict[str, float]) -> dict[str, float]:
    """The statistics of an update, from each process's statistics of its part."""
    parts = gather(stats)
    tokens, trained = (sum(part[name] for part in parts) for name in ("tokens", "trained_tokens"))

    def weighted_mean(name: str, weight: str, total: float) -> float:
        return sum(part.get(name, 0.0) * part[weight] for part in parts) / max(1, total)

    merged = {name: weighted_mean(name, "tokens", tokens)
              for name in dict.fromkeys(name for part in parts for name in part)}
    return merged | {"loss": sum(part["loss"] for part in parts), "grad_norm": stats["grad_norm"],
                     "skipped_updates": stats["skipped_updates"], "tokens": tokens, "trained_tokens": trained,
                     "ratio_max": max(part["ratio_max"] for part in parts),
                     "sampler_gap": weighted_mean("sampler_gap", "trained_tokens", trained)}


def sum_gradients(model) -> None:
    """Sums the gradients of all processes; backward has already summed those of a sharded model."""
    if size() > 1 and any(gather(any(weight.grad is not None for weight in model.parameters()))):
        with _together():  # if no process has any, zeros would still move weights, by AdamW's momentum
            for weight in model.parameters():
                if weight.requires_grad and not is_sharded(weight):
                    weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    dist.all_reduce(weight.grad)


def copy_from_main(model) -> None:
    """Copies process 0's weights to the model of every process."""
    if size() > 1:
        with _together():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, 0)


# ---- sharding


class Sharded(torch.nn.Module):
    """A model whose parameters, gradients and optimizer state are spread over the processes: FSDP2, one unit per layer.

    Make it before the optimizer. `engine` computes log-probabilities through it, and all processes must make the same
    number of passes; sample inside `unsharded`.
    """

    def __init__(self, model, engine: Engine):
        from torch.distributed.fsdp import fully_shard

        super().__init__()
        self.model, self.logprobs = model, engine.logprobs
        self.samples_from_copy = engine.decode is decode and can_share(model)  # in bf16 arithmetic, see bf16.py
        self.blank = [_with_weights_of(model, "meta")]  # in a list, where FSDP does not find its parameters
        self.engine = Engine(engine.decode, lambda _, *rows: self(*rows))  # through __call__, where FSDP's hooks are
        mesh = dist.init_device_mesh(next(model.parameters()).device.type, (size(),))
        kinds = model._no_split_modules or ()  # the class of the layers, as transformers names it
        for layer in [module for module in model.modules() if type(module).__name__ in kinds]:
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)  # a pass without gradients must leave shards, too
        for unit in self.units():  # the loss is divided by the whole batch's normaliser, so gradients are summed
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        with torch.no_grad():  # FSDP requires that the whole module runs before a part of it samples
            self(*SHORTEST, 1.0)

    def forward(self, *rows) -> Tensor:
        return self.logprobs(self.model, *rows)

    def units(self) -> list:
        from torch.distributed.fsdp import FSDPModule
        return [module for module in self.modules() if isinstance(module, FSDPModule)]

    def frozen_copy(self, device=None, like=None):
        """A separate model with all current weights, frozen. All processes make it together.

        like: a model without values, for the types of the weights; None: this model's types.
        """
        device = device or next(self.model.parameters()).device
        frozen = _with_weights_of(like or self.blank[0], device).to(device).requires_grad_(False).eval()
        self.copy_onto(frozen)
        return frozen

    @torch.no_grad()
    def copy_onto(self, whole) -> None:
        """Copies all weights onto a whole model, unit by unit, so that only one is gathered at a time."""
        for unit in self.units():
            unit.unshard()
            for new, own in zip(bf16.all_weights(whole), bf16.all_weights(self.model), strict=True):
                if not is_sharded(own):
                    new.copy_(own)
            unit.reshard()


def _with_weights_of(model, device):
    """A copy of a model with uninitialised weights of the same shapes and types, on this device."""
    memo = {id(weight): torch.nn.Parameter(torch.empty_like(weight, device=device), weight.requires_grad)
            for weight in model.parameters()}
    return copy.deepcopy(model, memo)


@contextmanager
def unsharded(sharded: Sharded | None):
    """The context in which every process can sample at its own pace: from a bf16 copy, updated here, or else from the
    model itself, with all parameters gathered."""
    copied = sharded and sharded.samples_from_copy and bf16.refresh(sharded.model, sharded)
    units = sharded.units() if sharded and not copied else []
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()


def is_sharded(value) -> bool:
    """Whether a value is a DTensor, of which each process has a part. (Importing that class takes seconds.)"""
    return hasattr(value, "full_tensor")


def full_weights(model) -> dict[str, Tensor]:
    """The weights of a sharded model by name, in process 0, on the CPU; empty in the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    first, own = {}, model.state_dict(keep_vars=True)  # tied weights are one tensor with two names
    return {name: whole[first.setdefault(id(weight), name)] for name, weight in own.items()} if is_main() else {}


def full_state(model, optimizer) -> dict:
    """The optimizer's state as that of a single process; for a sharded model in process 0 only, on the CPU."""
    if not optimizer.state or not _any_sharded(model):  # PyTorch would step an optimizer without a state
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    numbers = {name: n for n, name in enumerate(_trained(model))}
    return {"state": {numbers[name]: values for name, values in state["state"].items()},
            "param_groups": [group | {"params": [numbers[name] for name in group["params"]]}
                             for group in state["param_groups"]]} if is_main() else {}


def load_full_state(model, optimizer, state: dict) -> None:
    """Loads a `full_state`, whatever number of processes wrote it; a sharded model takes that of process 0, one tensor
    at a time."""
    if not state["state"] or not _any_sharded(model):
        return optimizer.load_state_dict(state)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    names = _trained(model)
    named = {"state": {names[number]: values for number, values in state["state"].items()},
             "param_groups": [group | {"params": [names[number] for number in group["params"]]}
                              for group in state["param_groups"]]}
    set_optimizer_state_dict(model, optimizer, named, options=StateDictOptions(full_state_dict=True,
                                                                               broadcast_from_rank0=True))


def _any_sharded(model) -> bool:
    return any(map(is_sharded, model.parameters()))


def _trained(model) -> list[str]:
    """The names of the trained parameters, in the order in which optimizers number them."""
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def copy_whole(weight, values: Tensor) -> None:
    """Copies a whole tensor onto a parameter that may be sharded."""
    if is_sharded(weight):
        from torch.distributed.tensor import distribute_tensor
        values = distribute_tensor(values.to(weight.device), weight.device_mesh, weight.placements)
    weight.copy_(values)
