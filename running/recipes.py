"""Recipes: named sets of defaults, each value with its source.

`RECIPES[name]` is {setting: (value, source)}; `SMALL[name]` contains the differences for models of up to a billion
parameters. docs/recipes.md shows both. Settings that are not in a recipe keep their defaults.

    paper    arXiv 2605.03465
    scripts  github.com/thanhdath/finer-sql at commit d7a9999: scripts/train_3b.sh and train_0.5b.sh, which call
             grpo_writer.py, a reward function for TRL 0.25.1 (requirements.txt)
"""

WRITER = "grpo_writer.py"
TRL = "default of TRL 0.25.1"
PAPER = {
    "group_size": (32, "paper"),
    "lr": (8e-6, "paper; also the default of grpo_writer.py"),
    "kl_coef": (0.04, "paper"),
    "temperature": (1.0, "paper"),
    "loss": ("grpo", "paper: the equation of GRPO"),
    "advantage_scale": ("group", "paper: the equation of GRPO"),
    "rewards": ("format,execution,atomic,memory", "paper"),
    "memory_top_k": (20, "paper"),
    "atomic_lambda": (0.05, "paper"),
    "atomic_beta": (0.79, "paper"),
    "atomic_gamma": (0.20, "paper"),
}
CODE = {
    "steps": (1000, "train_3b.sh"),
    "group_size": (16, "train_3b.sh"),
    "prompts_per_step": (1, "train_3b.sh: 16 completions in 16 passes of one are a step"),
    "lr": (5e-6, "train_3b.sh, train_0.5b.sh"),
    "lr_warmup": (0, WRITER),
    "lr_decay": (True, f"{TRL}: a linear fall, there to 0, here to a tenth"),
    "max_completion_tokens": (2048, "train_3b.sh, train_0.5b.sh"),
    "max_prompt_tokens": (4096, "train_3b.sh"),
    "gradient_checkpointing": (True, WRITER),
    "kl_coef": (0.04, WRITER),
    "temperature": (1.0, WRITER),
    "loss": ("dapo", TRL),
    "advantage_scale": ("group", TRL),
    "clip_low": (0.2, TRL),
    "clip_high": (0.2, TRL),
    "sampler_cap": (2.0, f"{TRL}, which samples with vLLM"),
    "max_grad_norm": (1.0, WRITER),
    "rewards": ("format,execution,atomic", "train_3b.sh, train_0.5b.sh: --no-memory"),
    "atomic_when": ("runs", f"{WRITER}: only SQL that runs earns it"),
    "atomic_lambda": (0.05, WRITER),
    "atomic_beta": (0.79, WRITER),
    "atomic_gamma": (0.20, WRITER),
    "empty_gold": ("keep", "no --filter-empty-gt in the scripts"),
    "save_every": (100, "train_3b.sh, train_0.5b.sh"),
}
MODERN = {
    "loss": ("dapo", "default of TRL (loss_type) and verl (loss_agg_mode: token-mean)"),
    "kl_coef": (0.0, "default of TRL (beta) and verl (use_kl_loss); DAPO, arXiv 2503.14476"),
    "clip_low": (0.2, "default of TRL and verl; DAPO"),
    "clip_high": (0.28, "DAPO; recommended by TRL"),
    "dual_clip": (3.0, "default of verl (clip_ratio_c); arXiv 1912.09729"),
    "sampler_cap": (2.0, "default of TRL 0.25.1 (vllm_importance_sampling_cap)"),
    "advantage_scale": ("group", "default of TRL and verl; DAPO (ScaleRL, arXiv 2510.13786: batch)"),
    "temperature": (1.0, "default of TRL and verl; DAPO"),
    "group_size": (16, "DAPO (TRL: 8)"),
    "lr": (1e-6, "default of TRL and verl; DAPO"),
    "max_completion_tokens": (4096, "our choice: DAPO has 20,480 for mathematics, TRL and verl 512 by default"),
    "max_prompt_tokens": (4096, "train_3b.sh of FINER-SQL (DAPO: 2,048)"),
    "overlong": ("penalise", "DAPO"),
    "dynamic_sampling": (3, "DAPO (up to 10 rollouts)"),
    "gradient_checkpointing": (True, "default of TRL and verl"),
}
LAPTOP = {
    "style": ("compact", "fewest tokens for a schema"),
    "traces": ("template", "needs no teacher"),
    "max_prompt_tokens": (512, "97 % of Spider's prompts are shorter; the others leave out columns not mentioned"),
    "max_completion_tokens": (128, "longer than 96 % of the template's traces with their SQL"),
    "cold_start_steps": (120, "for time"),
    "cold_start_batch": (16, "for time"),
    "cold_start_lr": (3e-4, "tried with SmolLM2-135M on one GPU"),
    "steps": (30, "for time"),
    "prompts_per_step": (8, "64 completions a step"),
    "group_size": (8, "64 completions a step"),
    "lr": (2e-5, "twice what was tried on a GPU with 256 completions a step"),
    "lr_warmup": (2, "few steps"),
    "kl_coef": (0.0, "no pass of a reference"),
    "temperature": (0.7, "nearer to the greedy answers that are measured, as in the demo, docs/results/demo.md"),
    "advantage_scale": ("none", "groups with right and wrong answers weigh most, as in the demo, docs/results/demo.md"),
    "rewards": ("format,execution,atomic", "the memory hardly tells right from wrong, docs/results/dense-rewards.md"),
    "execution_runs": (0.0, "with 1, joins earned nothing where they were needed, docs/results/dense-rewards.md"),
    "atomic_weights": ("rare", "separates SQL that runs from SQL that fails better, docs/results/dense-rewards.md"),
    "gradient_checkpointing": (False, "passes are small, see --tokens-per-pass"),
    "eval_every": (15, "twice"),
    "eval_questions": (64, "few, for time"),
    "test_questions": (128, "few, for time"),
    "save_every": (15, "with each evaluation"),
}
RECIPES = {"finer-sql-paper": PAPER, "finer-sql-code": CODE, "grpo-2026": MODERN, "laptop": LAPTOP,
           "finer-sql": PAPER}  # the last: an older name of the paper's
SMALL = {"finer-sql-code": {
    "steps": (1500, "train_0.5b.sh"),
    "group_size": (32, "train_0.5b.sh"),
    "max_prompt_tokens": (2048, "train_0.5b.sh"),
}}


def recipe_values(name: str, parameters: float = float("inf")) -> dict:
    """{setting: value} of a recipe for a model with this many parameters; empty for `none`."""
    small = SMALL.get(name, {}) if parameters <= 1e9 else {}
    return {setting: value for setting, (value, _) in (RECIPES.get(name, {}) | small).items()}
