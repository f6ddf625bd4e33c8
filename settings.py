"""The settings of a run: every flag of train.py, what flags that are left out mean, and what of them is planned with.

Flags that are given always win; the rest comes from the kind and the size of the model, from a recipe, or from the run
that is resumed. The values for pretrained models are where others' runs usually start (LoRA takes about ten times the
learning rate of full fine-tuning); none was tuned here.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data import PromptConfig
from engine import plan
from grpo import GRPOConfig
from policy import config_of
from rewards import MemoryGate, RewardConfig
from running import options
from running.errors import UserError
from running.guards import GuardConfig
from sft import SFTConfig

# The tiny policy starts from random weights and is trained by far larger steps than a pretrained model.
TINY_DEFAULTS = {"steps": 200, "lr": 3e-4, "lr_decay": True, "group_size": 8, "prompts_per_step": 32, "kl_coef": 0.0,
                 "temperature": 0.7, "advantage_scale": "none", "rewards": "format,execution,atomic=0.5,memory=0.5",
                 "max_completion_tokens": 80, "save_every": 100, "eval_every": 40, "cold_start_steps": 300,
                 "cold_start_lr": 3e-3, "prompt_loss": 0.3}
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
        return PRETRAINED_DEFAULTS | of_size(plan.Shape.of(config).parameters(), lora)
    except ValueError:  # an architecture whose size we cannot tell
        return PRETRAINED_DEFAULTS


def of_run(folder: str) -> dict:
    """The settings of the run in a folder; none where there is no readable one, which opening it will tell."""
    try:
        return dict(json.loads((Path(folder) / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _option(default, text: str, **metadata):
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    model: str = _option("tiny", "tiny, an alias of the README's table, a Hugging Face id or a local folder")
    engine: str = _option("fast", "how sampling and log-probabilities are computed: fast, or plain as grpo.py shows it",
                          choices=("fast", "plain"))
    lora_rank: int = _option(0, "train adapters of this rank instead of all weights (needs peft)")
    gradient_checkpointing: bool = _option(False, "keep a layer's input only and compute the layer again in backward")
    reference_device: str = _option("policy", "where the KL's reference waits: beside the policy, or on the CPU, from "
                                              "where it is moved for its pass", choices=("policy", "cpu"))
    recipe: str = _option("none", "other defaults: finer-sql are the paper's (arXiv 2605.03465)",
                          choices=("none", *RECIPES))
    plan: float = _option(0.0, "print what memory the run will need and stop; with a number: on a card of so many GB",
                          alone=-1.0)
    data: str = _option("demo", "demo, spider, bird, or your own .json or .jsonl")
    data_dir: str | None = _option(None, "folder of the data and its databases")
    split: str = _option("train", "questions to train on")
    world: str = _option("default", "of the demo: default, or hard (its teacher mostly slips)")
    start: str | None = _option(None, "begin with this checkpoint of an earlier run of --model, without a cold start")
    traces: str | None = _option(None, "a .json or .jsonl with a `trace` a record, for cold start and memory")
    output: str | None = _option(None, "folder of the run (default: runs/DATA)")
    seed: int = _option(0, "seed of everything random")
    steps: int = _option(300, "GRPO steps")
    prompts_per_step: int = _option(8, "questions per step (B); B times G completions are sampled")
    dynamic_sampling: int = _option(0, "at most so many extra rollouts a step, in the place of questions whose "
                                       "completions are all right or all wrong (DAPO)")
    lr: float = _option(1e-6, "peak learning rate of GRPO")
    lr_warmup: int = _option(10, "steps of linear warm-up")
    lr_decay: bool = _option(False, "let the learning rate fall linearly to a tenth at the last step")
    eval_every: int = _option(50, "steps between greedy evaluations on held-back questions; 0: never")
    eval_questions: int = _option(200, "at most this many questions in such an evaluation")
    test_questions: int = _option(1000, "at most this many questions in the evaluations before and after; 0: none")
    save_every: int = _option(50, "steps between checkpoints; 0: only at the end")
    match: str = _option("bird", "when a result counts as the gold result", choices=("bird", "spider"))
    empty_gold: str = _option("keep", "questions whose gold result has no rows", choices=("keep", "drop"))
    sql_workers: int = _option(2, "processes that run SQL")
    sql_timeout: float = _option(5.0, "seconds a query may take")
    threads: int = _option(0, "CPU threads of PyTorch; 0: PyTorch's choice")
    verbose: int = _option(0, "print a coloured group every so many steps; 0: never, without a number: 10", alone=10)
    tensorboard: bool = _option(False, "also write TensorBoard events (needs tensorboard)")
    token_ratios_every: int = _option(10, "keep what the update did to each token of one group, every so many steps; "
                                          "0: never")
    keep: int = _option(2, "newest checkpoints that are kept, besides the start")
    sharding: str = _option("auto", "spread parameters, gradients and optimizer state over processes (FSDP2); auto: on "
                                    "GPUs, without --lora-rank", choices=("auto", "on", "off"))
    resume: bool = _option(False, "continue the run in the output folder from its newest checkpoint")


CONFIGS = (RunConfig, GRPOConfig, RewardConfig, MemoryGate, SFTConfig, PromptConfig, GuardConfig)
MAY_CHANGE_ON_RESUME = ("resume", "output", "threads", "sharding", "eval_every", "save_every", "sql_workers",
                        "tensorboard", "verbose", "token_ratios_every", "keep",
                        "max_skipped", "warn_flat_steps", "warn_kl", "warn_truncated",
                        "reference_device", "gradient_checkpointing", "plan")


@dataclass(frozen=True)
class Settings:
    """All settings of a run, one frozen dataclass a concern."""

    run: RunConfig
    grpo: GRPOConfig
    rewards: RewardConfig
    gate: MemoryGate
    sft: SFTConfig
    prompts: PromptConfig
    guards: GuardConfig

    def as_dict(self) -> dict:
        """Every setting by name, as written to config.json."""
        return {name: value for part in vars(self).values() for name, value in vars(part).items()}


def parse_settings(arguments: list[str], description: str = "") -> Settings:
    """Command line to settings; flags left out take the defaults above."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="tiny and pretrained models have defaults of their own: see settings.py")
    for config in CONFIGS:
        options.add_arguments(parser, config)
    given = vars(parser.parse_args(arguments))
    given = {"output": f"runs/{Path(given.get('data', 'demo')).stem}"} | given
    defaults = of_run(given["output"]) if given.get("resume") else {}
    if not defaults:
        model = given.get("model", "tiny")
        config = None if model == "tiny" else config_of(model)
        defaults = of_model(config, lora=given.get("lora_rank", 0) > 0) | RECIPES.get(given.get("recipe"), {})
    values = defaults | given
    try:
        settings = Settings(*(options.build(config, values) for config in CONFIGS))
    except ValueError as error:
        raise UserError(str(error)) from error
    for name, lowest in (("steps", 0), ("prompts_per_step", 1), ("cold_start_steps", 0), ("sql_workers", 1),
                         ("keep", 1), ("dynamic_sampling", 0)):
        if settings.as_dict()[name] < lowest:
            raise UserError(f"--{name.replace('_', '-')} must be at least {lowest}")
    if settings.grpo.overlong == "penalise" and not settings.rewards.margin:
        raise UserError("--overlong penalise needs the execution reward, which keeps correct completions ahead")
    return settings


def planned(s: Settings) -> tuple[plan.Shape, plan.Work]:
    """The model and the work that `--plan` reckons with. Raises UserError: its architecture is not known there."""
    run = s.run
    try:
        shape = plan.Shape.of(plan.TINY if run.model == "tiny" else config_of(run.model))
    except ValueError as error:
        raise UserError(f"cannot plan for {run.model}: {error}") from error
    return shape, plan.Work(
        prompt=s.prompts.max_prompt_tokens, completion=s.grpo.max_completion_tokens, group=s.grpo.group_size,
        prompts=run.prompts_per_step, micro_batch=s.grpo.micro_batch, rollout_batch=s.grpo.rollout_batch,
        reference=s.grpo.kl_coef > 0, reference_on_cpu=run.reference_device == "cpu", lora_rank=run.lora_rank,
        checkpointing=run.gradient_checkpointing, gpu=run.plan > 0 or torch.cuda.is_available(),
        frozen_copy=s.rewards.embedder == "policy" and s.rewards.weights["memory"] > 0)


def memory_here() -> float:
    """Bytes of the GPU where there is one, else of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return plan.machine_memory()
