"""More than one process for a run: `torchrun --nproc-per-node N train.py …`. torch.distributed is the engine.

All processes go through the same steps on the same state. Each samples and scores its part of a step's questions; what
they found is gathered, so that advantages, metrics and the memory are those of the whole batch in all of them. Each
computes its part of the update's micro-batches, and gradients are summed. Process 0 alone prints, logs and saves.

`shard` spreads parameters, gradients and optimizer state over the processes (FSDP2); otherwise each has all of them.
With a single process nothing here does anything.
"""

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from types import MethodType

import torch
import torch.distributed as dist
from torch import Tensor

from grpo import Share, direct_logprobs, pack_group
from running.errors import UserError

# For a process that hangs. One that dies is noticed at once: torchrun ends the others, or their connections break.
TIMEOUT = timedelta(minutes=30)


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
def joined():
    """Joins the processes that torchrun has started, inside; only process 0 prints, and says what a user did wrong."""
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
        gather(None)  # process 0 writes its last files before any other ends, for torchrun would end it, too
        dist.destroy_process_group()
    except UserError as error:
        if not is_main() and not isinstance(error, LostProcess):
            raise SystemExit(2) from error  # process 0 says it
        raise
    finally:
        sys.stdout = printed


def leave(status: int) -> int:
    """Ends this process, if it was one of several, with its status; returns it otherwise.

    At once: while a process is torn down, PyTorch's threads can abort it, after all has been done and written.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


@contextmanager
def _together():
    """Around what all processes do together: one that is gone is one sentence. Raises LostProcess."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LostProcess(f"process {rank()} of {size()} has lost another one, so the run stops; go on from its newest "
                          f"checkpoint with --resume ({reason})") from error


# ---- what all processes know


def part(count: int) -> slice:
    """Which of `count` things are this process's; the parts of all are disjoint, in order, and may be empty."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def gather(value) -> list:
    """The value of each process, in their order, in all of them."""
    if size() == 1:
        return [value]
    values = [None] * size()
    with _together():
        dist.all_gather_object(values, value)
    return values


def merge(items: list) -> list:
    """One list of the items of all processes, in their order."""
    return [item for items in gather(items) for item in items]


def on_main(action: Callable):
    """What `action()` returns in process 0, in all of them; a UserError is raised in all of them."""
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


def share() -> Share:
    """This process's share of an update, for `grpo.policy_update`."""
    return Share(rank(), size(), gather, sum_gradients)


def sum_gradients(model) -> None:
    """Adds up the gradients of all processes; those of a sharded model were added up in backward."""
    if size() > 1 and not is_sharded(model):
        with _together():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    dist.all_reduce(weight.grad)


def copy_from_main(model) -> None:
    """Gives the model of every process the weights of process 0's."""
    if size() > 1:
        with _together():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, 0)


# ---- sharding


def is_sharded(model) -> bool:
    """Whether `shard` has spread the model over the processes."""
    return hasattr(model, "hooked_logprobs")


def shard(model) -> None:
    """Spreads parameters, and with them gradients and optimizer state, over the processes: FSDP2, a layer a unit.

    The optimizer is made after it. Forwards in which gradients are wanted go through `grpo.completion_logprobs`, and
    all processes do equally many; others go inside `whole`.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = next(model.parameters()).device
    sample = pack_group(torch.zeros(4, dtype=torch.long), [torch.zeros(2, dtype=torch.long)] * 2)
    with torch.no_grad():  # which way of computing is exact is found out before
        direct_logprobs(model, sample, 1.0)
    mesh = dist.init_device_mesh(device.type, (size(),))
    kinds = model._no_split_modules or ()  # the class of the layers, as transformers names it
    for layer in [module for module in model.modules() if type(module).__name__ in kinds]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for unit in _units(model):  # the loss is divided by the whole batch's normaliser, so gradients are summed
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    model.hooked_logprobs = MethodType(direct_logprobs, model)
    register_fsdp_forward_method(model, "hooked_logprobs")


def _units(model) -> list:
    from torch.distributed.fsdp import FSDPModule
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole(model):
    """Inside, every process has all parameters and can run the model at its own pace, without gradients."""
    units = _units(model) if is_sharded(model) else []
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()


def whole_weights(model) -> dict[str, Tensor] | None:
    """The weights of a sharded model by name, in process 0, on the CPU; None of a model that is not sharded."""
    if not is_sharded(model):
        return None
    once = {}  # tied weights are one tensor with two names
    for weight in model.state_dict(keep_vars=True).values():
        once[id(weight)] = _full(weight) if id(weight) not in once else once[id(weight)]
    return {name: once[id(weight)] for name, weight in model.state_dict(keep_vars=True).items()} if is_main() else {}


def whole_state(optimizer) -> dict:
    """The optimizer's state as that of a single process, in process 0, on the CPU where it was sharded."""
    state = optimizer.state_dict()
    full = {number: {name: _full(value) for name, value in values.items()} for number, values in state["state"].items()}
    return state | {"state": full}


def load_whole_state(optimizer, state: dict) -> None:
    """Takes up such a state, whatever number of processes wrote it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    optimizer.load_state_dict(state)
    for weight, values in optimizer.state.items():
        for name, value in values.items() if isinstance(weight, DTensor) else ():
            if value.shape == weight.shape:
                values[name] = distribute_tensor(value, weight.device_mesh, weight.placements)


def copy_whole(weight, values: Tensor) -> None:
    """Copies a whole tensor onto a parameter, of which each process may have a part."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(weight, DTensor):
        values = distribute_tensor(values.to(weight.device), weight.device_mesh, weight.placements)
    weight.copy_(values)


def _full(value):
    """A sharded tensor as a whole on the CPU of process 0, None in the others; anything else as it is."""
    if not hasattr(value, "full_tensor"):
        return value
    full = value.detach().full_tensor()
    return full.cpu() if is_main() else None
