"""Ablations: the same training with one thing changed at a time, over several seeds.

    python ablate.py --grid rewards --seeds 5                          # five sets of rewards, 25 runs
    python ablate.py --grid loss --seeds 3 --world hard --steps 60     # flags of train.py apply to all runs
    python ablate.py --vary group_size=4,8 --vary loss=grpo,dapo       # your own grid: every combination
    python ablate.py --vary "rewards=format,execution;format,execution=2" --jobs 2

  (1) start     one cold start per seed, shared by all runs of that seed, so that runs can be compared in pairs
  (2) train     every cell of the grid from there, at most --jobs runs at once
  (3) measure   the best policy of each run answers held-out questions, once greedily and --samples times by sampling
  (4) compare   mean over seeds, and the mean difference from the baseline (the first cell) on the same seed, both with
                95 % t-intervals over seeds; if all seeds answer the same questions, the difference in accuracy also
                with 95 % bootstrap intervals: over twins (questions on one database that share their gold query) and
                seeds, both resampled, and with several databases over databases and seeds

The output folder contains ablation.json (everything measured), table.md, curves.svg, and a folder per run, whose
checkpoints and rollouts are deleted once it is measured (unless --keep). The same command given again skips finished
runs and continues the others.

Measures of a run
  accuracy        greedy execution accuracy of its best policy on held-out questions, which served neither to
                  train it nor to choose it; also by difficulty
  area            area under the curve of its accuracy on dev, divided by the length; the start is not included
  flat groups     share of groups whose rewards are all equal, over the run; all wrong: without a correct completion
  reward spread   standard deviation of the rewards in a group, mean over the run
  does not run    share of sampled answers without SQL that runs; greedy does not run: of greedy ones
  pass@N          whether any of the N = --samples answers to a question is right
  joins           joined tables per greedy answer with SQL; fewer than at the start: queries have become simpler
  result groups   number of different results among the --samples answers to a question
  collapse        1 if the last accuracy on dev is more than 5 points below the best, including the start's
  seconds         of its steps, without evaluations
  In ablation.json only: best on dev, last on dev; voted accuracy, by the value-aware vote of the --samples answers
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryFile

import numpy as np
from tqdm import tqdm

from cold_start import SFTConfig
from common.errors import UserError, as_json, parse_json, read_text, run_main, stored_settings, write_whole
from common.options import Parser, add_arguments, build, check, flag_of, option, unknown_argument
from common.run_layout import BEST, CHECKPOINTS, checkpoint_of, checkpoints_of, final_policy
from common.wording import html_text
from data import PromptConfig
from history import has_changed, reported_split
from questions.question_files import check_excluded, excluded
from running.guards import step_seconds
from running.plot import Plot, svg_points
from running.run_folder import check_settings, lock, owner_of_lock
from scoring.hardness import joins_in
from scoring.verdicts import crossed_interval, student_quantile
from settings import DEFAULTS_BEFORE, MAY_CHANGE_ON_RESUME, RunConfig, Settings, make_parser, parse_settings

ROOT = Path(__file__).resolve().parent
BOTH = "format,execution,atomic=0.5,memory=0.5"
GRIDS = {  # name -> cells: name -> flags of train.py; the first cell is the baseline
    "rewards": {
        "execution": {"rewards": "format,execution"},
        "+ atomic": {"rewards": "format,execution,atomic=0.5"},
        "+ memory": {"rewards": "format,execution,memory=0.5"},
        "+ both": {"rewards": BOTH},
        "+ both + result": {"rewards": BOTH + ",result=0.5"}},
    "signal": {  # what makes the dense rewards stronger, or sharper
        "execution": {"rewards": "format,execution"},
        "+ both": {"rewards": BOTH},
        "+ both, over std": {"rewards": BOTH, "advantage_scale": "group"},
        "+ both, linear atomic": {"rewards": "format,execution,atomic,memory=0.5", "atomic_beta": "0.8",
                                  "atomic_gamma": "1"},
        "+ atomic + result": {"rewards": "format,execution,atomic=0.5,result=0.5"}},
    "loss": {f"{loss} {kind}": {"loss": loss, "kl_estimator": kind, "kl_coef": "0.02"}
             for loss in ("grpo", "dapo", "dr_grpo", "gspo") for kind in ("k2", "k3")},
    "kl": {f"kl {weight}": {"kl_coef": weight} for weight in ("0", "0.01", "0.04", "0.1")},
    "group-size": {f"{B} x {G}": {"prompts_per_step": B, "group_size": G}  # the same number of completions
                   for B, G in (("32", "8"), ("128", "2"), ("64", "4"), ("16", "16"), ("8", "32"))},
    "variants": {  # two updates per rollout where the first alone would be the same
        "default": {}, "gdpo": {"advantage_scale": "gdpo"},
        "dapo, 2 updates": {"loss": "dapo", "updates_per_rollout": "2"},
        "cispo, 2 updates": {"loss": "cispo", "updates_per_rollout": "2", "clip_low": "1", "clip_high": "4"}},
    "advantage-scale": {scale: {"advantage_scale": scale} for scale in ("none", "group", "batch")},
    "dense": {name: {"rewards": rewards, "execution_runs": "1", "atomic_weights": weights, "memory_names": names}
              for name, rewards, weights, names in (  # the paper's rewards, and with both dense ones sharpened
                  ("execution", "format,execution", "equal", "written"),
                  ("+ atomic", "format,execution,atomic", "equal", "written"),
                  ("+ memory", "format,execution,memory", "equal", "written"),
                  ("+ both", "format,execution,atomic,memory", "equal", "written"),
                  ("+ both, sharpened", "format,execution,atomic,memory", "rare", "roles"))},
    "runs": {f"{value} for running": {"execution_runs": value} for value in ("1", "0.5", "0")},
    "embedder": {name: {"rewards": BOTH, "embedder": name} for name in ("hash", "policy")},
}
# Flags of train.py that are set here, and by what.
SET_HERE = {"seed": "see --seeds", "output": "see --output", "test_questions": "see --questions",
            "resume": "the same command continues", "start": "one for all runs of a seed"}
# All runs of a table choose their best policy, which is measured, equally often: these two must not change.
MAY_CHANGE = tuple(name for name in MAY_CHANGE_ON_RESUME if name not in ("eval_every", "steps"))
# Flags of the cold start, which cannot differ between runs that share it: eval_questions are held out from it, and
# `match` measures it.
OF_THE_START = {"model", "lora_rank", "recipe", "data", "data_dir", "split", "world", "traces", "eval_questions",
                "match", *(flag_of(field).removeprefix("--").replace("-", "_") for config in (SFTConfig, PromptConfig)
                  for field in fields(config))}
SHOWN = ("accuracy", "area", "flat groups", "all wrong", "reward spread", "does not run", "greedy does not run",
         "joins", "result groups", "collapse", "seconds")
APART = ("curve", "right")  # stored per run, but not measures
NOT_SHARES = ("reward spread", "joins", "result groups", "seconds")  # not shares, so not shown in per cent


# ------------------------------------------------------------------------------------------------ the plan

@dataclass(frozen=True)
class AblateConfig:
    """The ablation."""  # ValueError for invalid values

    grid: str = option("", f"a named grid: {', '.join(GRIDS)}")
    seeds: int = option(5, "seeds 0, 1, ...", at_least=1)
    jobs: int = option(1, "runs at once; each takes its share of the CPU's cores unless --threads is given", at_least=1)
    samples: int = option(30, "answers sampled per question when a run is measured", at_least=2)
    questions: int = option(200, "held-out questions to measure on, the first ones; 0: all", at_least=0)
    exclude: str | None = option(None, "file with a JSON list of ids of held-out questions to leave out")
    keep: bool = option(False, "keep the checkpoints and rollouts of finished runs")
    output: Path | None = option(None, "folder of the ablation (default: runs/ablation-GRID)")
    vary: tuple[str, ...] = ()  # FLAG=A,B,C, each a dimension of the grid
    command: str = ""           # as given, for ablation.json

    __post_init__ = check


@dataclass(frozen=True)
class Run:
    """One training run: a cell of the grid on a seed, or the start of a seed."""

    cell: str
    seed: int
    folder: Path
    flags: tuple[str, ...]
    settings: Settings

    @property
    def trained(self) -> bool:
        return (self.folder / "measures.json").exists() or (self.cell == "start" and self.has_begun)

    @property
    def has_begun(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        return bool(checkpoints_of(self.folder))


def cells_of(grid: str, vary: Sequence[str]) -> dict[str, dict[str, str]]:
    """Every combination of the named grid and of each --vary: name -> flags."""
    if grid and grid not in GRIDS:
        raise UserError(f"there is no grid {grid}; choose one of {', '.join(GRIDS)}, or give --vary flag=a,b,c")
    dimensions = [GRIDS[grid]] if grid else []
    for text in vary:
        name, _, values = text.partition("=")
        name = name.strip().replace("-", "_")
        split = [value.strip() for value in values.split(";" if ";" in values else ",") if value.strip()]
        if not name or not split:
            raise UserError(f"--vary {text!r} is not of the form flag=a,b,c")
        if name in SET_HERE:
            raise UserError(f"--vary {name} cannot be: ablate.py sets it for each run ({SET_HERE[name]})")
        if name in OF_THE_START:
            raise UserError(f"--vary {name} cannot be: the runs of a seed share their start, and {name} belongs to it")
        dimensions.append({f"{name}={value}": {name: value} for value in split})
    if not dimensions:
        raise UserError(f"give --grid NAME (one of {', '.join(GRIDS)}) or --vary flag=a,b,c")
    cells = {}
    for combination in product(*(dimension.items() for dimension in dimensions)):
        name = ", ".join(name for name, _ in combination)
        cells[name] = {flag: value for _, flags in combination for flag, value in flags.items()}
    return cells


def as_flags(values: Mapping[str, str]) -> list[str]:
    """{"kl_coef": "0"} to ["--kl-coef", "0"]; true and false are switches."""
    flags = []
    for name, value in values.items():
        name = name.replace("_", "-")
        flags += {"true": [f"--{name}"], "false": [f"--no-{name}"]}.get(value, [f"--{name}", value])
    return flags


def make_runs(given: AblateConfig, common: Sequence[str]) -> tuple[list[Run], list[Run]]:
    """The starts and the runs, seed by seed. Raises UserError for invalid flags, before any work."""
    excluded(given.exclude)  # raises UserError if it is invalid
    cells = cells_of(given.grid, given.vary)
    folders = {name: re.sub(r"[^\w.=+-]+", "-", name).strip("-") for name in cells}
    if len(set(folders.values())) < len(cells):
        raise UserError("two cells of the grid would share a folder; give their values other names")
    shared, common = split_rewards(common)
    flags_of = {name: flags | rewards_of(name, flags, shared) for name, flags in cells.items()}
    if "reward_module" in shared and not any("reward_module" in flags for flags in flags_of.values()):
        raise UserError(f"no cell uses --reward-module {shared['reward_module']}: name user=W in --rewards, or in "
                        "--vary \"rewards=...;...\"")
    # All weights, because --lora-rank auto depends on the free memory; the same questions in every cell.
    common = ["--threads", str(max(1, free_cores() // given.jobs)), "--lora-rank", "0", "--draw", "epochs", *common]
    common += ["--test-questions", str(questions_held_back(parse_settings(common).run, given))]

    def make(cell: str, seed: int, folder: str, made_by: Run | None = None, **values: str) -> Run:
        path = given.output / f"seed-{seed}" / folder
        flags = [*common, "--seed", str(seed), "--output", str(path), *as_flags(values)]
        return Run(cell, seed, path, tuple(flags),
                   parse_settings(flags, made_by=made_by and made_by.settings.as_dict()))

    starts = [make("start", seed, "start", steps="0", eval_every="0", **rewards_of_start(shared))
              for seed in range(given.seeds)]
    runs = [make(cell, start.seed, folders[cell], start, start=str(checkpoint_of(start.folder, 0)),
                 **flags_of[cell]) for start in starts for cell in cells]
    for run in starts + runs:
        if (run.folder / "config.json").exists():  # from an earlier call: it must be the same run
            check_settings(run.folder, run.settings.as_dict(), MAY_CHANGE, DEFAULTS_BEFORE)  # without a lock
            if has_changed(stored_settings(run.folder)):
                raise UserError(f"{run.settings.run.data} has changed since {run.folder} was trained on it: put it "
                                "back as it was, or give another --output")
    return starts, runs


def free_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def questions_held_back(run: RunConfig, given: AblateConfig) -> int:
    """--test-questions of a run: 0 if the data have their own test split, because ablate.py measures on that."""
    if run.data == "demo" or (run.data in ("spider", "bird") and run.split == "train"):
        return 0
    return given.questions or RunConfig.test_questions


def split_rewards(common: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """--rewards and --reward-module of all runs as {name: value}, and the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag in ("--rewards", "--reward-module"):
        parser.add_argument(flag)
    shared, others = parser.parse_known_args(common)
    return vars(shared), others


def rewards_of(cell: str, flags: Mapping[str, str], shared: Mapping[str, str]) -> dict[str, str]:
    """The reward flags of a cell, else those of all runs; the user's module only if `user` is among the rewards."""
    values = {name: value for name, value in (shared | flags).items() if name in ("rewards", "reward_module")}
    if "user" not in reward_names(values.get("rewards", "")):
        return {name: value for name, value in values.items() if name == "rewards" or name in flags}
    if "reward_module" not in values:
        raise UserError(f"the rewards of {cell} name user, so give --reward-module FILE.py with a function reward(...)")
    return values


def rewards_of_start(shared: Mapping[str, str]) -> dict[str, str]:
    """The reward flags of a start, without the user's own reward, because a start scores nothing."""
    if "rewards" not in shared:
        return {}
    return {"rewards": ",".join(part for part in shared["rewards"].split(",") if reward_names(part) != ["user"])}


def reward_names(rewards: str) -> list[str]:
    """`format,execution=2` to ["format", "execution"]."""
    return [part.partition("=")[0].strip() for part in rewards.split(",")]


# ------------------------------------------------------------------------------------------------- the work

class Stopped(Exception):
    """The run was interrupted; it can be continued."""


class Workers:
    """Runs the project's scripts as processes that `stop` can end cleanly, each on `threads` cores."""

    def __init__(self, threads: int = 1):
        self.processes, self.lock, self.stopping = set(), threading.Lock(), False
        # --threads limits only PyTorch; numpy uses all cores unless its library is limited.
        self.environment = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads),
                            "TQDM_MININTERVAL": "30"} | os.environ

    def call(self, script: str, arguments: Sequence[str], log: Path) -> None:
        """Runs a script and appends its output to `log`. Raises UserError if it fails."""
        with open(log, "a", encoding="utf-8") as file, self.lock:
            if self.stopping:
                raise Stopped
            process = subprocess.Popen(
                [sys.executable, str(ROOT / script), *arguments], stdout=file, stderr=subprocess.STDOUT,
                env=self.environment, start_new_session=True)  # `stop` passes Ctrl-C on
            self.processes.add(process)
        status = process.wait()
        self.processes.discard(process)
        if self.stopping:
            raise Stopped
        if status:
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
            raise UserError(f"{script} failed ({last.strip()}); see {log}")

    def stop(self) -> None:
        """Lets every process finish its step and save."""
        with self.lock:
            self.stopping = True
            for process in self.processes:
                process.send_signal(signal.SIGINT)


def perform(run: Run, given: AblateConfig, workers: Workers) -> dict:
    """Trains and measures a run, skipping what is done; returns its measures."""
    file, how = run.folder / "measures.json", [given.samples, given.questions, sorted(excluded(given.exclude))]
    if file.exists():
        stored = parse_json(read_text(file), file)
        if stored["how"] == how:
            return stored["measures"]
    log = run.folder.parent / f"{run.folder.name}.log"
    if not run.trained:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        if owner := owner_of_lock(run.folder):  # such as a run that outlived its ablate.py
            raise UserError(f"{run.folder} is being trained by {owner}: let it end or stop it, then give the same "
                            "command again")
        if not run.has_begun:  # killed before its first checkpoint: nothing to continue
            shutil.rmtree(run.folder, ignore_errors=True)
            golds = run.folder.parent / "start" / "gold_cache"  # results of the same questions
            if golds.exists():
                shutil.copytree(golds, run.folder / "gold_cache")
        workers.call("train.py", [*run.flags, *(["--resume"] if run.has_begun else [])], log)
    evaluation = run.folder / "evaluation.json"
    workers.call("evaluate.py", evaluation_flags(run, given, evaluation), log)
    found = json.loads(evaluation.read_text())
    if unread := found.get("unavailable"):  # cells are compared question by question
        raise UserError(f"{len(unread)} questions could not be evaluated in {run.folder}: {unread[0]['error']} "
                        f"({unread[0]['file']}); the same command evaluates again")
    measures = measures_of(run, found)
    write_whole(file, as_json({"how": how, "measures": measures}, indent=1) + "\n")
    if not given.keep and run.cell != "start":
        for folder in (CHECKPOINTS, "gold_cache") if (run.folder / BEST).exists() else ("gold_cache",):
            shutil.rmtree(run.folder / folder, ignore_errors=True)
        (run.folder / "rollouts.jsonl").unlink(missing_ok=True)
    return measures


def evaluated_split(run: RunConfig) -> str:
    """The split that a run is measured on."""
    own_part = run.data in ("spider", "bird") and run.split != "train"  # a part of it was held out
    return run.split if own_part else reported_split(run.data)


def evaluation_flags(run: Run, given: AblateConfig, evaluation: Path) -> list[str]:
    """evaluate.py's command line for a run: greedy answers count, and --samples at temperature 1 give the rest.

    By itself evaluate.py asks a policy as in its run, except for --tables.
    """
    s = run.settings
    values = {"model": final_policy(run.folder), "data": s.run.data, "split": evaluated_split(s.run),
              "world": s.run.world, "seed": s.run.seed, "match": s.run.match, "threads": s.run.threads, "vote": "none",
              "samples": given.samples, "temperature": 1.0, "limit": given.questions, "json": evaluation,
              "tables": s.prompts.tables, "workers": s.run.sql_workers, "timeout": s.run.sql_timeout,
              "gold_cache": given.output / "gold_cache"}
    flags = as_flags({name: str(value) for name, value in values.items()})
    flags += ["--data-dir", s.run.data_dir] if s.run.data_dir else []
    return flags + (["--exclude", given.exclude] if given.exclude else [])


# ----------------------------------------------------------------------------------------------- measures

def measures_of(run: Run, evaluation: dict) -> dict:
    """The measures of a finished run, and its curve of dev accuracy as [[step, accuracy], ...]."""
    match = run.settings.run.match
    measures = {"accuracy": evaluation["execution_accuracy"][match]}
    measures |= {f"accuracy, {level}": scores["execution_accuracy"][match]
                 for level, scores in evaluation["by_difficulty"].items()}
    measures[f"pass@{evaluation['samples_per_question']}"] = evaluation["pass_at_k"][match][-1]
    measures |= {"voted accuracy": evaluation["answers"]["value-aware"]["execution_accuracy"][match],
                 "result groups": evaluation["result_groups"],
                 "does not run": 1 - evaluation["sample_statuses"].get("ok", 0.0),
                 "greedy does not run": 1 - evaluation["statuses"].get("ok", 0.0)}
    joins = [joins_in(item["sql"]) for item in evaluation["examples"] if item["sql"]]
    measures["joins"] = fmean(joins) if joins else 0.0
    measures["right"] = {"questions": evaluation["protocol"]["questions"],
                         "marks": marks_of(evaluation["examples"], match)}
    file = run.folder / "metrics.jsonl"
    steps = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return measures | (training_measures(steps) if steps else {})


def marks_of(examples: Sequence[dict], match: str) -> dict[str, str]:
    """{db_id: "1 00 101"}: a digit per question, 1 if it is right, and a word per group of twins."""
    words = {}
    for number, item in enumerate(examples):
        twins = words.setdefault(item["db_id"], {})
        key = item["twins"] or number
        twins[key] = twins.get(key, "") + str(int(item[match]))
    return {db_id: " ".join(twins.values()) for db_id, twins in words.items()}


def training_measures(steps: Sequence[dict]) -> dict:
    """The measures of a run from the lines of its metrics.jsonl."""
    names = {"flat groups": "flat_groups", "all wrong": "all_wrong_groups", "reward spread": "reward_std"}
    measures = {name: fmean(step[key] for step in steps if key in step) for name, key in names.items()
                if any(key in step for step in steps)}  # absent if no database could be read
    measures["seconds"] = sum(map(step_seconds, steps))
    curve = [[step["step"], step["dev_accuracy"]] for step in steps if "dev_accuracy" in step]
    if curve:
        start = [step["start_dev_accuracy"] for step in steps if "start_dev_accuracy" in step]  # the start may be best
        best, last = max([*start, *(accuracy for _, accuracy in curve)]), curve[-1][1]
        measures |= {"area": area_under(curve), "best on dev": best, "last on dev": last,
                     "collapse": float(best - last > 0.05 + 1e-9), "curve": curve}
    return measures


def area_under(curve: Sequence[Sequence[float]]) -> float:
    """The area under [(x, y), ...], joined by straight lines, divided by the width; for a single point, its y."""
    width = curve[-1][0] - curve[0][0]
    if not width:
        return curve[0][1]
    return sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in zip(curve, curve[1:], strict=False)) / width


def mean_interval(values: Sequence[float]) -> dict:
    """The mean and its 95 % t-interval, which is None for one value or equal values, because the spread is unknown."""
    mean, n = fmean(values), len(values)
    if len(set(values)) < 2:
        return {"mean": mean, "interval": None}
    half = student_quantile(n - 1) * stdev(values) / math.sqrt(n)
    return {"mean": mean, "interval": [mean - half, mean + half]}


def drawn_intervals(runs: Mapping[int, dict], base: Mapping[int, dict]) -> dict[str, list[float]]:
    """Intervals of the difference in accuracy over twins, and over databases if there are several.

    Empty if seeds differ in their questions, or if an older version, which recorded no twins, measured them.
    """
    seeds = [seed for seed in runs if seed in base]
    rights = [measures[seed].get("right", {}) for measures in (runs, base) for seed in seeds]
    if len({right.get("questions") for right in rights}) != 1 or not all(
            isinstance(right.get("marks"), dict) for right in rights):
        return {}
    words = [[word for text in right["marks"].values() for word in text.split()] for right in rights]  # [2 S][K]
    right = np.array([[word.count("1") for word in row] for row in words])  # [2 S, K]
    changes, sizes = right[:len(seeds)] - right[len(seeds):], np.array([len(word) for word in words[0]])  # [S, K], [K]
    found = {"over twins": crossed_interval(changes, sizes)}
    first = np.cumsum([0, *(len(text.split()) for text in rights[0]["marks"].values())])[:-1]  # first of each database
    if len(first) > 1:
        found["over databases"] = crossed_interval(np.add.reduceat(changes, first, axis=1),
                                                   np.add.reduceat(sizes, first))
    return found


def summarise(results: Mapping[str, Mapping[int, dict]], baseline: str) -> dict:
    """Per cell, every measure over its seeds, and its paired difference from the baseline on the same seeds."""
    summary = {}
    for cell, runs in results.items():
        base, intervals = results.get(baseline, {}), {}
        for name in dict.fromkeys(name for measures in runs.values() for name in measures if name not in APART):
            values = {seed: measures[name] for seed, measures in runs.items() if name in measures}
            intervals[name] = mean_interval(list(values.values()))
            pairs = [value - base[seed][name] for seed, value in values.items() if name in base.get(seed, {})]
            if pairs and cell != baseline:
                intervals[name]["difference"] = mean_interval(pairs) | {"seeds": len(pairs)}
        if cell != baseline and "difference" in intervals.get("accuracy", {}):
            intervals["accuracy"]["difference"] |= drawn_intervals(runs, base)
        curves = [dict(map(tuple, measures["curve"])) for measures in runs.values() if "curve" in measures]
        shared = sorted(set.intersection(*map(set, curves))) if curves else []
        summary[cell] = {"seeds": len(runs), "measures": intervals,
                         "curve": [[step, mean_interval([curve[step] for curve in curves])] for step in shared]}
    return summary


# ------------------------------------------------------------------------------------------------- output

def table(summary: dict, baseline: str) -> str:
    """Markdown: the measures of every cell, then its differences from the baseline."""
    names = list(dict.fromkeys(name for found in summary.values() for name in found["measures"]))
    tiers, passes = [name for name in names if ", " in name], [name for name in names if name.startswith("pass@")]
    shown = (*SHOWN, *passes)
    others = {cell: found for cell, found in summary.items() if cell not in (baseline, "start")}
    titles = {"Mean over seeds [95 % interval]": (summary, shown, ()), "By difficulty": (summary, tiers, ()),
              f"Difference to `{baseline}` on the same seeds [95 % over seeds] [of accuracy also over twins] [and over "
              "databases]": (others, (), (*shown, *tiers))}
    return "\n".join(f"{title}:\n\n{rows(*what)}" for title, what in titles.items())


def rows(summary: dict, means: Sequence[str], differences: Sequence[str]) -> str:
    """Markdown: a row per cell, with the means of the measures `means` and the differences of `differences`."""
    units = {name: name if name in NOT_SHARES else f"{name}, %" for name in (*means, *differences)}
    shown = [units[name] for name in means] + [("Δ " if means else "") + units[name] for name in differences]
    lines = [f"| | seeds | {' | '.join(shown)} |", f"|---|---|{'---|' * len(shown)}"]
    for cell, found in summary.items():
        measures = found["measures"]
        texts = [in_words(name, measures.get(name)) for name in means]
        texts += [in_words(name, measures.get(name, {}).get("difference"), "+") for name in differences]
        seeds = found["seeds"]
        if not means:  # for differences, only seeds that the baseline has too
            pairs = [value["difference"] for value in measures.values() if "difference" in value]
            seeds = max((pair.get("seeds", seeds) for pair in pairs), default=0)
        lines.append(f"| {cell} | {seeds} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def in_words(name: str, value: dict | None, sign: str = "") -> str:
    """A mean and its interval; shares are in per cent."""
    if not value:
        return ""
    scale, digits = (1, 0 if name == "seconds" else 2) if name in NOT_SHARES else (100, 1)
    text = f"{scale * value['mean']:{sign}.{digits}f}"
    if name == "collapse":  # a count of few runs has no t-interval
        return text
    intervals = [value["interval"], *(value[over] for over in ("over twins", "over databases") if over in value)]
    for bounds in intervals if any(intervals) else ():  # in fixed order, the first over seeds
        text += f" [{', '.join(f'{scale * bound:.{digits}f}' for bound in bounds)}]" if bounds else " [–]"
    return text


PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # safe for colour-blind readers
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 48, 570, 16, 360  # the plot inside it


def draw_curves(summary: dict) -> str:
    """SVG: accuracy on dev over the steps, a line per cell with a band for its 95 % interval over seeds."""
    curves = {cell: found["curve"] for cell, found in summary.items() if found["curve"]}
    points = [(step, *(value["interval"] or (value["mean"],) * 2))
              for curve in curves.values() for step, value in curve]
    if not points:
        return ""
    last = max(step for step, _, _ in points)
    low = max(0.0, math.floor(10 * min(low for _, low, _ in points)) / 10)
    high = min(1.0, math.ceil(10 * max(high for _, _, high in points)) / 10)
    plot = Plot(LEFT, RIGHT, TOP, BOTTOM, (0, last), (low, high), label_drop=4, label_below=18)
    drawn = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    drawn += [plot.grid_line(tick / 10, f"{10 * tick} %", 'stroke="#ddd"')
              for tick in range(round(10 * low), round(10 * high) + 1)]
    drawn += [plot.x_label(step) for step in sorted({0, *(step for step, _, _ in points)})]
    drawn.append(f'<text x="{plot.x(last / 2):.1f}" y="{HEIGHT - 4}" text-anchor="middle">GRPO step; accuracy on dev, '
                 'mean and 95 % interval over seeds</text>')
    for number, (cell, curve) in enumerate(curves.items()):
        colour = PALETTE[number % len(PALETTE)]
        dashes = f' stroke-dasharray="{6 * (number // len(PALETTE))},3"' if number >= len(PALETTE) else ""
        band = [(plot.x(step), plot.y(value["interval"][side])) for side, order in ((0, curve), (1, curve[::-1]))
                for step, value in order if value["interval"]]
        line = [(plot.x(step), plot.y(value["mean"])) for step, value in curve]
        if band:
            drawn.append(f'<polygon points="{svg_points(band)}" fill="{colour}" opacity="0.12"/>')
        drawn.append(f'<polyline points="{svg_points(line)}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        drawn.append(f'<path d="M{RIGHT + 12},{TOP + 10 + 20 * number}h24" stroke="{colour}" stroke-width="2"'
                     f'{dashes}/><text x="{RIGHT + 42}" y="{TOP + 14 + 20 * number}">{html_text(cell)}</text>')
    return "\n".join([*drawn, "</svg>", ""])


def write_results(given: AblateConfig, results: Mapping[str, Mapping[int, dict]], baseline: str) -> str:
    """Writes ablation.json, table.md and curves.svg for the runs finished so far; returns the table."""
    given.output.mkdir(parents=True, exist_ok=True)
    summary = summarise(results, baseline)
    content = {"command": given.command, "baseline": baseline, "summary": summary, "runs": results}
    text = table(summary, baseline)
    for name, written in (("ablation.json", as_json(rounded(content)) + "\n"), ("table.md", text),
                          ("curves.svg", draw_curves(summary))):
        write_whole(given.output / name, written)
    return text


def rounded(value):
    """JSON with its numbers rounded to five decimals, far below the differences between seeds."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


# ---------------------------------------------------------------------------------------------------- main

def parse_arguments(arguments: Sequence[str]) -> tuple[AblateConfig, list[str]]:
    """Our own flags, and those that go to train.py."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, epilog="Every other flag goes to train.py, for all runs.")
    parser.add_argument("--vary", action="append", default=[], metavar="FLAG=A,B,C",
                        help="values of a flag of train.py; separated by ; where values have commas")
    add_arguments(parser, AblateConfig)
    given, common = parser.parse_known_args(arguments)
    known = [*parser.flags(), *make_parser().flags()]
    for flag in common:
        if flag.startswith("-") and not flag[1:2].isdigit() and flag.partition("=")[0] not in known:
            raise UserError(unknown_argument(flag, known))
        name = flag.split("=")[0].removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in SET_HERE:
            raise UserError(f"{flag} is set by ablate.py for each run ({SET_HERE[name]})")
    output = Path("runs") / f"ablation-{getattr(given, 'grid', '') or 'own'}"
    values = {"output": output, "command": shlex.join(["ablate.py", *arguments])} | vars(given)
    return build(AblateConfig, values | {"vary": tuple(given.vary)}), common


def main() -> int:
    """Run the grid."""
    given, common = parse_arguments(sys.argv[1:])
    starts, runs = make_runs(given, common)
    run = starts[0].settings.run
    if run.data != "demo":
        check_excluded(given.exclude, run.data, run.data_dir, evaluated_split(run))
    claim(given.output)
    baseline, failures = runs[0].cell, 0
    results = {run.cell: {} for run in starts + runs}  # {cell: {seed: measures}}
    threads = runs[0].settings.run.threads
    if threads > 1 and given.jobs * threads > free_cores():
        print(f"note: {given.jobs} runs at once with {threads} threads each share {free_cores()} cores: "
              "leave out --threads, and each gets its part of them, or give fewer --jobs")
    workers = Workers(threads)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell lets background processes ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    with ThreadPoolExecutor(given.jobs) as pool, tqdm(total=len(starts + runs), desc="ablation", unit="run") as bar:
        try:
            for phase in (starts, runs):
                waiting = {pool.submit(perform, run, given, workers): run for run in phase}
                for done in as_completed(waiting):
                    run, error = waiting[done], done.exception()
                    failures += error is not None
                    bar.update()
                    bar.write(progress_line(run, error, {} if error else done.result()))
                    if error is None:
                        results[run.cell][run.seed] = done.result()
                if failures and phase is starts:
                    raise UserError("without its cold start a seed has no runs")
        except BaseException:
            workers.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            text = write_results(given, {cell: runs for cell, runs in results.items() if runs}, baseline)
    print(text)
    print(f"{given.output / 'ablation.json'}, table.md, curves.svg")
    return 1 if failures else 0


def claim(folder: Path) -> None:
    """Keeps other ablations out of the folder. Raises UserError if one is running there, or if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            owner = lock(folder)
    except OSError as error:
        raise UserError(f"cannot write to --output {folder}: {error.strerror}; give another folder") from error
    if owner:
        raise UserError(f"{folder} is in use by {owner}: let it end or stop it, or give another --output")


def progress_line(run: Run, error: BaseException | None, measures: dict) -> str:
    """The outcome of a run, in one line."""
    head = f"seed {run.seed}  {run.cell:<20}"
    if isinstance(error, UserError):
        return f"{head}  {error}"
    if error is not None:
        raise error
    seconds = f"  {measures['seconds']:.0f} s" if "seconds" in measures else ""
    return f"{head}  accuracy {100 * measures['accuracy']:.1f} %{seconds}"


if __name__ == "__main__":
    run_main(main)
