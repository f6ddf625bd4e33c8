"""What flags that are left out mean: by the kind and the size of the model, by a recipe, or as in the run resumed.

Flags that are given always win. The values for pretrained models are where others' runs usually start (LoRA takes about
ten times the learning rate of full fine-tuning); none was tuned here.
"""

import json
from pathlib import Path

from plan import Shape
from sft import SHORT_TRACES

# The tiny policy starts from random weights and is trained by far larger steps than a pretrained model.
TINY_DEFAULTS = {"steps": 200, "lr": 3e-4, "lr_decay": True, "group_size": 8, "prompts_per_step": 32, "kl_coef": 0.0,
                 "temperature": 0.7, "advantage_scale": "none", "rewards": "format,execution,atomic=0.5,memory=0.5",
                 "max_completion_tokens": 80, "save_every": 100, "eval_every": 40, "cold_start_steps": 300,
                 "cold_start_lr": 3e-3, "prompt_loss": 0.3,
                 **SHORT_TRACES}
PRETRAINED_DEFAULTS = {"cold_start_steps": 0}
SIZE_DEFAULTS = {  # up to so many parameters
    1e9: {"group_size": 16, "prompts_per_step": 8, "lr": 2e-6, "gradient_checkpointing": False},
    4e9: {"group_size": 8, "prompts_per_step": 8, "lr": 1e-6, "gradient_checkpointing": True},
    float("inf"): {"group_size": 8, "prompts_per_step": 8, "lr": 5e-7, "gradient_checkpointing": True},
}
LORA_LR = 10  # times the learning rate
RECIPES = {  # arXiv 2605.03465; the 20 are the verified traces that form the memory's centroid
    "finer-sql": {"group_size": 32, "lr": 8e-6, "kl_coef": 0.04, "temperature": 1.0, "memory_top_k": 20,
                  "atomic_lambda": 0.05, "atomic_beta": 0.79, "atomic_gamma": 0.20,
                  "rewards": "format,execution,atomic,memory", "advantage_scale": "group", "loss": "grpo"},
}


def of_size(parameters: int, lora: bool) -> dict:
    """Defaults of a pretrained model of so many parameters."""
    values = next(values for limit, values in SIZE_DEFAULTS.items() if parameters <= limit)
    return values | ({"lr": LORA_LR * values["lr"]} if lora else {})


def of_model(config: dict | None, lora: bool) -> dict:
    """Defaults of a model by its config.json; None: those of `tiny`."""
    if config is None:
        return TINY_DEFAULTS
    try:
        return PRETRAINED_DEFAULTS | of_size(Shape.of(config).parameters(), lora)
    except ValueError:  # an architecture whose size we cannot tell
        return PRETRAINED_DEFAULTS


def of_run(folder: str) -> dict:
    """The settings of the run in a folder; none where there is no readable one, which opening it will tell."""
    try:
        return dict(json.loads((Path(folder) / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}
