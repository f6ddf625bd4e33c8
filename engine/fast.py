"""The fast engine: the results of `grpo.PLAIN`, with each prompt computed once per group (decoding.py, packing.py).

A model that it does not support takes the plain engine, with one warning.
"""

from collections.abc import Callable
from functools import partial, wraps

import torch

from engine.decoding import decode
from engine.packing import logprobs
from grpo import Engine, plain_decode, plain_logprobs


def checkpointed(logprobs: Callable) -> Callable:
    """Log-probabilities with gradient checkpointing, if it is on. transformers checkpoints a layer in training mode
    only; the layer itself runs in its own mode, here and again in backward, so that dropout is as without it."""
    @wraps(logprobs)
    def compute(model, *rows):
        layers = [(layer, layer.training, layer._gradient_checkpointing_func) for layer in model.modules()
                  if getattr(layer, "gradient_checkpointing", False)]
        try:
            for layer, mode, checkpoint in layers:
                layer.training = torch.is_grad_enabled()
                layer._gradient_checkpointing_func = partial(_in_mode, layer, mode, checkpoint)
            return logprobs(model, *rows)
        finally:
            for layer, mode, checkpoint in layers:
                layer.training, layer._gradient_checkpointing_func = mode, checkpoint
    return compute


def _in_mode(layer, mode: bool, checkpoint: Callable, forward: Callable, *inputs):
    """`checkpoint(forward, *inputs)`, with the layer in this mode whenever `forward` runs."""
    def run(*inputs):
        outside, layer.training = layer.training, mode
        try:
            return forward(*inputs)
        finally:
            layer.training = outside
    return checkpoint(run, *inputs)


FAST = Engine(decode, checkpointed(logprobs))
ENGINES = {"fast": FAST, "plain": Engine(plain_decode, checkpointed(plain_logprobs))}
