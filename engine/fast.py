"""The fast engine: the results of `grpo.PLAIN`, with each prompt computed once per group (decoding.py, packing.py).

A model that it does not support takes the plain engine, with one warning.
"""

from collections.abc import Callable
from functools import wraps

import torch

from engine.decoding import decode
from engine.packing import logprobs
from grpo import Engine, plain_decode, plain_logprobs


def checkpointed(logprobs: Callable) -> Callable:
    """Log-probabilities with gradient checkpointing, if it is on, of a model in evaluation mode. transformers
    checkpoints a layer in training mode only; the layer's inner modules, such as dropout, stay in evaluation mode."""
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
