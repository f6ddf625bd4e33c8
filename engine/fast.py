"""The fast engine: what `grpo.PLAIN` computes, with each prompt computed once for its group (decoding.py, packing.py).

A model that cannot be run so takes the plain engine, with one warning.
"""

from collections.abc import Callable
from functools import wraps

import torch

from engine.decoding import decode
from engine.packing import logprobs
from grpo import Engine, plain_decode, plain_logprobs


def checkpointed(logprobs: Callable) -> Callable:
    """Log-probabilities of a model in evaluation mode, whose layers all the same keep only their inputs for backward if
    gradient checkpointing is on. transformers has a layer do so in training mode only; what is inside it, such as
    dropout, need not be in that mode."""
    @wraps(logprobs)
    def compute(model, *rows):
        layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        modes = [layer.training for layer in layers]
        try:
            for layer in layers:
                layer.training = torch.is_grad_enabled()
            return logprobs(model, *rows)
        finally:
            for layer, mode in zip(layers, modes, strict=True):
                layer.training = mode
    return compute


FAST = Engine(decode, checkpointed(logprobs))
ENGINES = {"fast": FAST, "plain": Engine(plain_decode, checkpointed(plain_logprobs))}
