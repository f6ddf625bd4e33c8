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
    With a float32 model on the CPU the weights are those of plain AdamW, bit for bit. For a single process.
    """

    def __init__(self, parameters, **settings):
        self.live = list(parameters)
        self.masters = [torch.nn.Parameter(p.detach().to("cpu", torch.float32, copy=True)) for p in self.live]
        super().__init__(self.masters, **settings)
        for weight, master in zip(self.live, self.masters, strict=True):
            weight.grad = None  # what the cold start left
            weight.register_post_accumulate_grad_hook(partial(_take_gradient, master))

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        for weight, master in zip(self.live, self.masters, strict=True):
            weight.copy_(master)

    def state_dict(self) -> dict:
        """As AdamW's; with the masters where the model's own weights are rounded."""
        rounded = any(weight.dtype != torch.float32 for weight in self.live)
        return super().state_dict() | {"masters": [master.detach() for master in self.masters] if rounded else []}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for master, saved in zip(self.masters, state["masters"], strict=bool(state["masters"])):
            master.copy_(saved)


def _take_gradient(master: Tensor, weight: Tensor) -> None:
    gradient = weight.grad.to("cpu", torch.float32)
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    weight.grad = None
