"""AdamW on the CPU, for full fine-tuning on a card that is too small for the optimizer.

A trained parameter costs 16 bytes: a float32 weight, its gradient, two moments. Here the card holds only a bf16 weight
(2 bytes) per parameter; the float32 *master* weight, the gradient and the moments are in main memory. The price is
time: gradients travel to the CPU in every backward pass, and weights travel back after every step.
"""

from functools import partial

import torch
from torch import Tensor


class CPUAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of a model's parameters on the CPU; each step also updates the model.

    It takes each gradient, in float32, as soon as backward has computed it; the model's `grad` stays None. From a GPU a
    gradient travels on a separate stream, into page-locked memory, while backward continues. With a float32 model on
    the CPU the weights are those of plain AdamW, bit for bit. For a single process.
    """

    def __init__(self, parameters, **settings):
        self.live = list(parameters)
        self.masters = [torch.nn.Parameter(p.detach().to("cpu", torch.float32, copy=True)) for p in self.live]
        super().__init__(self.masters, **settings)
        self.on_their_way: list[tuple] = []  # (master, its gradient on the CPU, event of its arrival)
        self.stream = torch.cuda.Stream() if any(weight.is_cuda for weight in self.live) else None
        for weight, master in zip(self.live, self.masters, strict=True):
            weight.grad = None  # left from the cold start
            weight.register_post_accumulate_grad_hook(partial(self._take_gradient, master))

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        for weight, master in zip(self.live, self.masters, strict=True):
            weight.copy_(sent(master, weight), non_blocking=True)  # while the next is rounded

    def _take_gradient(self, master: Tensor, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        self.on_their_way.append((master, *fetched(gradient, self.stream)))
        while self.on_their_way and self.on_their_way[0][2].query():
            self._add_first()
        if self.on_their_way:
            torch.autograd.Variable._execution_engine.queue_callback(self._add_all)  # when backward ends

    def _add_all(self) -> None:
        while self.on_their_way:
            self._add_first()

    @torch.no_grad()
    def _add_first(self) -> None:
        master, gradient, arrival = self.on_their_way.pop(0)
        arrival.synchronize()
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    def state_dict(self) -> dict:
        """AdamW's, with the masters if the model's own weights are rounded."""
        rounded = any(weight.dtype != torch.float32 for weight in self.live)
        return super().state_dict() | {"masters": [master.detach() for master in self.masters] if rounded else []}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for master, saved in zip(self.masters, state["masters"], strict=bool(state["masters"])):
            master.copy_(saved)


class Arrived:
    """The event of a copy that has already arrived."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def fetched(gradient: Tensor, stream) -> tuple:
    """A gradient on the CPU, or on its way there on a stream of the GPU; and the event of its arrival."""
    if not gradient.is_cuda:
        return gradient, Arrived()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        copy = torch.empty_like(gradient, device="cpu", pin_memory=True).copy_(gradient, non_blocking=True)
    gradient.record_stream(stream)  # its memory is not reused before the copy ends
    return copy, stream.record_event()


def sent(master: Tensor, weight: Tensor) -> Tensor:
    """A master, ready to be copied to its weight: for a GPU rounded here, in page-locked memory."""
    if not weight.is_cuda:
        return master
    return torch.empty_like(weight, device="cpu", pin_memory=True).copy_(master)
