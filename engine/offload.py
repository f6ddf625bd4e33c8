"""AdamW on the CPU, for full fine-tuning on a card that is too small for the optimizer.

A trained parameter costs 16 bytes: a float32 weight, its gradient, two moments. Here the card holds a bf16 weight (2
bytes) and nothing else of it; the float32 *master* weight, the gradient and the moments lie in main memory. The price
is time: gradients travel to the CPU in every backward pass, weights travel back after every step.
"""

from functools import partial

import torch
from torch import Tensor


class CPUAdamW(torch.optim.AdamW):
    """AdamW whose parameters are float32 copies, on the CPU, of those of a model, which it keeps up to date.

    A gradient of the model is taken over, in float32, as soon as backward has made it; the model's `grad` stays None.
    From a GPU it travels on a stream of its own, into page-locked memory, while backward goes on. With a float32 model
    on the CPU the weights are those of plain AdamW, bit for bit. For a single process.
    """

    def __init__(self, parameters, **settings):
        self.live = list(parameters)
        self.masters = [torch.nn.Parameter(p.detach().to("cpu", torch.float32, copy=True)) for p in self.live]
        super().__init__(self.masters, **settings)
        self.on_their_way: list[tuple] = []  # (master, its gradient on the CPU, what says that it has arrived)
        self.stream = torch.cuda.Stream() if any(weight.is_cuda for weight in self.live) else None
        for weight, master in zip(self.live, self.masters, strict=True):
            weight.grad = None  # what the cold start left
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
        """As AdamW's; with the masters where the model's own weights are rounded."""
        rounded = any(weight.dtype != torch.float32 for weight in self.live)
        return super().state_dict() | {"masters": [master.detach() for master in self.masters] if rounded else []}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for master, saved in zip(self.masters, state["masters"], strict=bool(state["masters"])):
            master.copy_(saved)


class Arrived:
    """What a copy that is there already has for an event."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def fetched(gradient: Tensor, stream) -> tuple:
    """A gradient on the CPU, or on its way there on a stream of the GPU; and what says that it has arrived."""
    if not gradient.is_cuda:
        return gradient, Arrived()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        copy = torch.empty_like(gradient, device="cpu", pin_memory=True).copy_(gradient, non_blocking=True)
    gradient.record_stream(stream)  # its memory is not given away before
    return copy, stream.record_event()


def sent(master: Tensor, weight: Tensor) -> Tensor:
    """A master as its weight takes it over: for a GPU rounded here, in page-locked memory."""
    if not weight.is_cuda:
        return master
    return torch.empty_like(weight, device="cpu", pin_memory=True).copy_(master)
