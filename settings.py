"""The settings of a run: every flag of train.py, its defaults, and the memory plan of a run.

A flag on the command line always wins. Other values come from layers of defaults (running/layers.py); this file defines
those for the kind of model (TINY, KINDS) and for bf16 arithmetic (IN_BF16). The values for pretrained models are usual
starting points (LoRA needs about ten times the learning rate of full fine-tuning); none was tuned here.
"""

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import variants  # noqa: F401 (all losses and advantages that flags can name)
from cold_start import SFTConfig
from common import options
from common.errors import UserError, stored_settings
from common.options import HIGHEST_SEED, check, option, shared
from common.run_layout import ADAPTERS
from data import PromptConfig
from grpo import GRPOConfig
from history import run_config_of
from models import memory_plan
from models.adapters import import_peft
from policy import ALIASES, computes_in_bf16, config_of
from prompts.answer_format import AnswerFormat
from rewards import MemoryGate, RewardConfig
from running.guards import GuardConfig
from running.layers import PROMPTS, fold, handed_on
from running.recipes import RECIPES, recipe_values
from scoring.voting import Exam

# The tiny policy starts from random weights and needs far larger steps than a pretrained model.
TINY = {"steps": 140, "draw": "informative", "lr": 4e-4, "lr_decay": True, "group_size": 8, "prompts_per_step": 32,
        "kl_coef": 0.0, "temperature": 0.7, "advantage_scale": "none", "execution_runs": 0.0,
        "rewards": "format,execution,atomic=0.5,memory=0.5", "max_completion_tokens": 80, "eval_every": 28,
        "cold_start_steps": 300, "cold_start_lr": 3e-3, "prompt_loss": 0.3}
# With LoRA, training on one group fits in 24 GB up to 4 billion parameters, in 40 GB up to 7 billion (docs/recipes.md).
KINDS = {  # pretrained models with up to this many parameters
    1e9: {"group_size": 16, "prompts_per_step": 8, "lr": 2e-6, "gradient_checkpointing": True,
          "max_prompt_tokens": 2048, "max_completion_tokens": 1024},
    4e9: {"group_size": 8, "prompts_per_step": 8, "lr": 1e-6, "gradient_checkpointing": True,
          "max_prompt_tokens": 4096, "max_completion_tokens": 1536},
    float("inf"): {"group_size": 8, "prompts_per_step": 8, "lr": 5e-7, "gradient_checkpointing": True,
                   "max_prompt_tokens": 4096, "max_completion_tokens": 1536},
}
LORA_LR = 10  # factor on the learning rates
PATHS = ("model", "data", "data_dir", "start", "traces", "reward_module", "embedder")  # settings that may be a path,
NAMES = ("", None, "tiny", *ALIASES, "demo", "spider", "bird", "template", "hash", "policy")  # unless one of these
AUTO_RANK = 16  # of the adapters that --lora-rank auto trains if all weights do not fit
IN_BF16 = {"sampler_cap": 2.0}  # sampler and trainer round differently


def parameters_of(config: dict | None) -> float:
    """The number of parameters of a model with this config.json; infinity if it is unknown."""
    try:
        return memory_plan.Shape.of(config or memory_plan.TINY).parameters()
    except ValueError:
        return float("inf")


def defaults_of_kind(config: dict | None, lora: bool, traces: bool) -> dict:
    """Defaults for a model with this config.json, or for `tiny` if it is None. A pretrained model is cold-started only
    if there are traces."""
    if config is None:
        return TINY
    start, parameters = {} if traces else {"cold_start_steps": 0}, parameters_of(config)
    known = parameters < float("inf")
    values = next(values for limit, values in KINDS.items() if parameters <= limit) if known else {}
    rates = {"lr": LORA_LR * values.get("lr", RunConfig.lr), "cold_start_lr": LORA_LR * SFTConfig.cold_start_lr}
    return start | values | (rates if lora else {})


def settings_of_run(folder: str) -> dict:
    """The settings of the run in a folder; empty if they cannot be read, which opening the folder reports."""
    stored = stored_settings(Path(folder))
    if stored is None:
        return {}
    earlier = {"log": "tensorboard" if stored.get("tensorboard") else ""}  # the flag before --log
    return earlier | stored | {"plan": None} | paths_from_here(stored)  # --plan was 0 in earlier runs


def paths_from_here(stored: dict) -> dict:
    """The relative paths of a run that was started in another folder, made absolute; empty if it started here."""
    if stored.get("cwd", "") in ("", str(Path.cwd())):
        return {}
    there = {name: Path(stored["cwd"], stored[name]) for name in PATHS if stored.get(name, "") not in NAMES}
    return {name: str(path) for name, path in there.items() if path.exists()}


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    model: str = option("tiny", "tiny, an alias of docs/scale.md, a Hugging Face id, a local folder or a GGUF file",
                        common=True)
    engine: str = option("fast", "how rollouts and log-probabilities are computed: fast, or plain as grpo.py shows it",
                         choices=("fast", "plain"), common=True)
    precision: str = option("auto", "of arithmetic, on float32 weights; auto: bf16 on GPUs of compute capability 8.0 "
                                    "and more, and on CPUs with AMX or AVX512-BF16 for models of over 20 million "
                                    "parameters",
                            choices=("auto", "float32", "bf16"), common=True)
    lora_rank: int | None = option(None, "train adapters of this rank (needs peft), or with 0 all weights; auto: all "
                                         f"weights where --plan says that they fit, else adapters of rank {AUTO_RANK}",
                                   at_least=0, unset="auto", common=True)
    gradient_checkpointing: bool = option(False, "keep only the inputs of layers; compute them again in backward")
    tokens_per_pass: int = option(0, "in the update whole groups go through the model together, up to so many tokens; "
                                     "0: as memory allows", at_least=0)
    reference_device: str = option("policy", "where the KL's reference is kept between its passes: beside the policy, "
                                              "or on the CPU", choices=("policy", "cpu"))
    recipe: str = option("none", "other defaults, see docs/recipes.md; finer-sql is that of the paper",
                          choices=("none", *RECIPES), common=True)
    optimizer_device: str = option("policy", "where the optimizer is: beside the policy, or on the CPU, so that a GPU "
                                              "holds bf16 weights only", choices=("policy", "cpu"))
    plan: float | str | None = option(None, "print what memory the run will need and stop; with a number: on a card of "
                                            "this many GB", alone="here", above=0, common=True)
    data: str = shared("data")
    data_dir: str | None = shared("data_dir")
    split: str = option("train", "the split to train on")
    world: str = shared("world")
    start: str | None = option(None, "begin with this checkpoint of an earlier run of --model, without a cold start; "
                                     "prompts are written as in that run")
    traces: str | None = option(None, "a .json or .jsonl whose records have a `trace`, for cold start and memory; "
                                      "template: traces made from the gold SQL", common=True)
    output: str | None = option(None, "folder of the run (default: runs/DATA)", common=True)
    seed: int = option(0, "seed of everything random", at_least=0, at_most=HIGHEST_SEED, common=True)
    steps: int = option(300, "GRPO steps; with --resume the step at which the run now ends", at_least=0, common=True)
    prompts_per_step: int = option(8, "questions per step (B); B times G completions are sampled",
                                   at_least=1, common=True)
    draw: str = option("epochs", "which questions a step asks: all in turn, or those whose completions are likely to "
                                 "be partly right, by what rollouts have shown", choices=("epochs", "informative"))
    questions_per_database: int = option(1, "so many questions of a step on the same database come side by side, where "
                                            "their schema is computed once; it divides --prompts-per-step", at_least=1)
    dynamic_sampling: int = option(0, "at most this many extra rollouts per step, to replace questions whose "
                                       "completions are all right or all wrong (DAPO); those left over have advantage "
                                       "0, so dense rewards do not count there", at_least=0)
    guided: bool = option(False, "where all completions of a question are wrong, one gives way to a trace with gold "
                                 "SQL (guide.py, after LUFFY)")
    lr: float = option(1e-6, "peak learning rate of GRPO", above=0, common=True)
    lr_warmup: int = option(10, "steps of linear warm-up", at_least=0)
    lr_decay: bool = option(False, "let the learning rate fall linearly to a tenth at the last step")
    eval_every: int = option(50, "steps between greedy evaluations on held-back questions; 0: never",
                             at_least=0, common=True)
    eval_questions: int = option(200, "at most this many questions in such an evaluation", at_least=0)
    eval_samples: int = option(0, "samples per question in such an evaluation, for the curves of their accuracy and of "
                                  "pass@k; 0: only the greedy answer", at_least=0)
    test_questions: int = option(1000, "at most this many questions in the evaluations before and after; 0: none",
                                 at_least=0, common=True)
    save_every: int = option(50, "steps between checkpoints; 0: only at the end", at_least=0)
    constrain: str = shared("constrain", "; in rollouts and evaluations")
    turns: int = shared("turns", "; in rollouts and evaluations")
    feedback: str = shared("feedback")
    match: str = option("bird", "how results are compared with the gold result", choices=("bird", "spider"))
    empty_gold: str = option("keep", "training questions whose gold result has no rows", choices=("keep", "drop"))
    sql_workers: int = option(2, "processes that run SQL", at_least=1)
    sql_timeout: float = shared("timeout")
    threads: int = shared("threads")
    verbose: int = option(0, "steps between printed groups, in colour; 0: none, without a number: 10", alone=10,
                         at_least=0)
    log: str = option("", "also send metrics to these trackers: tensorboard,wandb,trackio, whose packages it needs")
    token_ratios_every: int = option(10, "steps between records of what the update did to each token of one group; "
                                          "0: never", at_least=0)
    keep: int = option(2, "how many of the newest checkpoints are kept, besides that of step 0", at_least=1)
    sharding: str = option("auto", "spread parameters, gradients and optimizer state over processes (FSDP2); auto: on "
                                    "GPUs, without --lora-rank", choices=("auto", "on", "off"))
    resume: bool = option(False, "continue the run in the output folder from its newest checkpoint", common=True)

    __post_init__ = check


CONFIGS = (RunConfig, GRPOConfig, RewardConfig, MemoryGate, SFTConfig, PromptConfig, GuardConfig)
# The values in runs that are older than the setting.
DEFAULTS_BEFORE = {"draw": "epochs", "questions_per_database": 1, "execution_runs": 1.0, "atomic_weights": "equal",
                   "memory_names": "written", "constrain": "none", "turns": 1, "feedback": "error",
                   "guided": False}
MAY_CHANGE_ON_RESUME = ("resume", "output", "steps", "threads", "sharding", "eval_every", "eval_samples", "save_every",
                        "sql_workers", "log", "verbose", "token_ratios_every", "keep",
                        "max_skipped", "warn_flat_steps", "warn_format_steps", "warn_kl", "warn_truncated",
                        "warn_sampler_gap",
                        "reference_device", "gradient_checkpointing", "plan")


@dataclass(frozen=True)
class Settings:
    """All settings of a run, one frozen dataclass per concern."""

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

    @property
    def answer_format(self) -> AnswerFormat:
        """How completions are taught and parsed."""
        return AnswerFormat(self.prompts.answer_style, self.rewards.lenient_format)

    @property
    def exam(self) -> Exam:
        """How the run's evaluations sample: greedily, within the memory that `--plan` counts for a rollout."""
        return Exam(self.answer_format, self.grpo.max_completion_tokens, room=rollout_room(self))


def make_parser(description: str = "", show_all: bool = True) -> options.Parser:
    """The parser of train.py's command line."""
    parser = options.Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                            allow_abbrev=False, epilog="--model tiny has other defaults, and some depend on the size "
                                                       "of a pretrained model: see docs/flags.md")
    parser.add_argument("--help-all", action="help", help="show every flag; --help shows those that most runs need")
    for config in CONFIGS:
        options.add_arguments(parser, config, show_all)
    return parser


def parse_settings(arguments: list[str], description: str = "", auto_rank: int = 0,
                   made_by: dict | None = None) -> Settings:
    """Parses the command line; flags left out take the defaults of the layers. Raises UserError.

    auto_rank: what `--lora-rank auto` means for a pretrained model; `fit` chooses it.
    made_by: the settings of the run that --start comes from, if it has not begun; otherwise they are read from there.
    """
    parsed = make_parser(description, show_all="--help-all" in arguments).parse_args(arguments)
    given = {name: value for name, value in vars(parsed).items() if value is not None}
    given = {"output": f"runs/{Path(given.get('data', 'demo')).stem}"} | given
    source = str(given.get("start") or given.get("model", ""))
    if not made_by and source and not given.get("resume"):
        made_by = run_config_of(source)
    values = fold(**layers_of(given, auto_rank, made_by))
    settings = Settings(*(options.build(config, values) for config in CONFIGS))
    check_together(settings)
    check_source(settings.run, made_by)
    return settings


def layers_of(given: dict, auto_rank: int, made_by: dict | None) -> dict[str, dict]:
    """The layers of a training run's settings, for `fold`. given: the parsed flags; the rest as in `parse_settings`."""
    resumed = settings_of_run(given["output"]) if given.get("resume") else {}
    if resumed:
        return {"resumed": resumed, "flags": given}
    model = given.get("model", "tiny")
    config = None if model == "tiny" else config_of(model)
    parameters, rank = parameters_of(config), given.get("lora_rank", auto_rank if config else 0)
    kind = defaults_of_kind(config, lora=rank > 0, traces=bool(given.get("traces")))
    bf16 = computes_in_bf16(given.get("precision", "auto"), parameters, torch.cuda.is_available())
    return {"kind": {"lora_rank": rank} | kind, "bf16": IN_BF16 if bf16 else {},
            "recipe": recipe_values(given.get("recipe", "none"), parameters),
            "made_by": handed_on(made_by, PROMPTS), "flags": given}  # it trained the policy on such prompts


def check_source(run: RunConfig, made_by: dict | None) -> None:
    """Raises UserError if the settings of a run do not suit the policy that it starts from.

    made_by: the settings of the run that made this policy, if any.
    """
    source = run.start or run.model
    before = (made_by or {}).get("model", run.model)
    if run.start and (before == "tiny") != (run.model == "tiny"):
        raise UserError(f"--start {run.start} was trained from --model {before}, but this run has the defaults of "
                        f"--model {run.model}: give --model {before}")
    if not run.resume and (Path(source) / ADAPTERS).is_dir():
        raise UserError(f"{source} has its LoRA adapters merged into bf16 weights, rounded: begin with "
                        f"{Path(source) / ADAPTERS} and --lora-rank")
    if not run.lora_rank and not run.resume and (Path(source) / "adapter_config.json").is_file():
        raise UserError(f"{source} holds LoRA adapters, which are trained with --lora-rank, and at its learning rate: "
                        "give the rank that they have")


def check_together(s: Settings) -> None:
    """Raises UserError for settings that exclude each other."""
    if s.grpo.overlong == "penalise" and not s.rewards.margin:
        raise UserError("--overlong penalise needs the execution reward, which keeps correct completions ahead")
    if s.grpo.advantage_scale == "gdpo" and (s.grpo.overlong == "penalise" or s.rewards.weights["user"]):
        raise UserError("--advantage-scale gdpo standardises each reward by itself, so with --overlong penalise or the "
                        "reward user a wrong completion could outrank a correct one: leave one of them out")
    if s.run.feedback != "error" and s.run.turns == 1:
        raise UserError(f"--feedback {s.run.feedback} says what a second try reads: give --turns 2 as well")
    if 0 < s.grpo.dual_clip <= 1:
        raise UserError(f"--dual-clip is {s.grpo.dual_clip:g}; it must be above 1, or 0 for none")
    if s.run.prompts_per_step % s.run.questions_per_database:
        raise UserError(f"--questions-per-database {s.run.questions_per_database} does not divide --prompts-per-step "
                        f"{s.run.prompts_per_step}: choose one that does")
    rounded = s.run.optimizer_device == "cpu" and s.run.model != "tiny" and torch.cuda.is_available()
    if rounded and s.sft.cold_start_steps and not s.run.start:
        raise UserError("--optimizer-device cpu leaves bf16 weights on the GPU, too coarse for the cold start: run it "
                        "without, --steps 0, then go on with --start OUTPUT/checkpoints/step-0")
    if s.run.lora_rank and s.run.model == "tiny" and not s.run.start:
        raise UserError("--lora-rank trains adapters of a pretrained model, but --model is tiny, which is trained "
                        "whole: leave --lora-rank out or choose another --model")


def fit(arguments: list[str], s: Settings, room: float, processes: int = 1) -> tuple[Settings, list[str]]:
    """The settings with the rank chosen for --lora-rank auto, and notes on what was chosen and what may not fit.

    arguments: from which `parse_settings` made s. room: bytes of memory available to each process.
    Raises UserError if the run exceeds `room` by more than the error of the plan.
    """
    if s.run.model == "tiny" or s.run.resume:
        return s, []
    adapted = parse_settings(arguments, auto_rank=AUTO_RANK)
    auto, free = adapted.run.lora_rank != s.run.lora_rank, f"of {room / 1e9:.1f} GB that are free"

    def chosen_by_auto(what: str) -> list[str]:
        return [f"--lora-rank auto: {what}"] if auto else []

    try:
        whole = peak_of(s, processes)
    except UserError as error:
        return s, chosen_by_auto(f"all weights are trained; whether they fit is not known: {error}")
    if whole <= memory_plan.SHARE * room:
        return s, chosen_by_auto(f"all weights are trained, which needs {whole / 1e9:.1f} GB {free}")
    chosen = min(adapted, s, key=lambda one: peak_of(one, processes))  # adapters of a very small model save nothing
    need, rank = peak_of(chosen, processes), chosen.run.lora_rank
    trained = f"adapters of rank {rank}" if rank else "all weights"
    short = f"training {trained} of {s.run.model} needs {memory_plan.missing(*planned(chosen, None, processes), room)}"
    if need > (1 + memory_plan.ERROR) * room:
        raise UserError(short)
    if auto and rank:
        import_peft(f"all weights of {s.run.model} need {whole / 1e9:.1f} GB {free}, and adapters need peft")
    notes = chosen_by_auto(f"{trained} are trained, which needs {need / 1e9:.1f} GB {free}; all weights need "
                           f"{whole / 1e9:.1f} GB")
    if need > memory_plan.SHARE * room:
        notes.append(f"warning: memory may run out: {short}")
    return chosen, notes


def plan_text(arguments: list[str], s: Settings) -> str:
    """What `--plan` prints."""
    limit, adapted = memory_planned_for(s.run), parse_settings(arguments, auto_rank=AUTO_RANK)
    text = memory_plan.text(s.run.model, *planned(s), limit)
    if adapted.run.lora_rank == s.run.lora_rank or peak_of(s) <= memory_plan.SHARE * limit:
        return text
    least = peak_of(adapted)
    verdict = "they fit" if least <= memory_plan.SHARE * limit else "they do not fit either"
    return f"{text}\n--lora-rank auto would train adapters of rank {AUTO_RANK}, {least / 1e9:.1f} GB: {verdict}"


def peak_of(s: Settings, processes: int = 1) -> float:
    """Peak memory of each process, in bytes."""
    return memory_plan.peak(memory_plan.phases(*planned(s, None, processes)))[1]


def wants_sharding(run: RunConfig, processes: int, gpu: bool) -> bool:
    """Whether parameters are sharded over this many processes."""
    return processes > 1 and (run.sharding == "on" or run.sharding == "auto" and gpu and not run.lora_rank)


def planned(s: Settings, config: dict | None = None, processes: int = 1) -> tuple[memory_plan.Shape, memory_plan.Work]:
    """The model, and the work of each process, that `--plan` counts. config: the model's config.json, if already read.

    Raises UserError for an unknown architecture, and for `--plan` with the plain engine.
    """
    run = s.run
    if run.plan and run.engine == "plain":
        raise UserError("--plan counts the memory of --engine fast; the plain engine, which is for reading, needs more")
    try:
        shape = memory_plan.Shape.of(config or (memory_plan.TINY if run.model == "tiny" else config_of(run.model)))
    except ValueError as error:
        raise UserError(f"cannot plan for {run.model}: {error}") from error
    gpu = isinstance(run.plan, float) or torch.cuda.is_available()
    work = memory_plan.Work(
        prompt=s.prompts.max_prompt_tokens, completion=s.grpo.max_completion_tokens, turns=run.turns,
        group=s.grpo.group_size,
        prompts=math.ceil(run.prompts_per_step / processes), micro_batch=s.grpo.micro_batch,
        rollout_batch=s.grpo.rollout_batch,
        reference=s.grpo.kl_coef > 0, reference_on_cpu=run.reference_device == "cpu", lora_rank=run.lora_rank,
        optimizer_on_cpu=run.optimizer_device == "cpu",
        shards=processes if wants_sharding(run, processes, gpu) else 1,
        half_base=computes_in_bf16(run.precision, 0, gpu),  # as `Trainer.base_dtype`
        checkpointing=run.gradient_checkpointing, gpu=gpu,
        bf16=computes_in_bf16(run.precision, shape.parameters(), gpu),
        frozen_copy=s.rewards.embedder == "policy" and s.rewards.weights["memory"] > 0)
    memory = memory_planned_for(run) / (4 if gpu else 8 * processes)
    if run.model == "tiny" and not gpu:
        memory = memory_plan.PASS  # on every machine, so that runs are reproducible
    return shape, replace(work, pass_tokens=run.tokens_per_pass or memory_plan.tokens_per_pass(shape, work, memory))


def rollout_room(s: Settings) -> tuple[int, int]:
    """The most tokens that a rollout decodes side by side: of prompts, and of prompts and completions."""
    G, P = s.grpo.group_size, s.prompts.max_prompt_tokens
    together = memory_plan.side_by_side(s.run.prompts_per_step, G, s.grpo.rollout_batch)
    return together * P, together * (P + G * s.grpo.max_completion_tokens)


def memory_planned_for(run: RunConfig) -> float:
    """Memory in bytes of the card that --plan names, else of the GPU if there is one, else of this machine."""
    if isinstance(run.plan, float):
        return run.plan * 1e9
    gpu = torch.cuda.is_available()
    return torch.cuda.get_device_properties(0).total_memory if gpu else memory_plan.machine_memory()


def memory_free(processes_here: int = 1) -> float:
    """Bytes that each process on this machine may use: the free ones and those that its libraries already occupy."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + memory_plan.LIBRARIES  # this call creates the CUDA context
    return memory_plan.free_memory() / processes_here + memory_plan.LIBRARIES
