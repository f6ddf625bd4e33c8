"""A run's folder: its configuration, its logs, and checkpoints, which are complete or absent.

    runs/NAME/config.json  metrics.jsonl  rollouts.jsonl  checkpoints/step-N/  best/  report.html

A checkpoint is written into a temporary folder, flushed to disk and renamed, so a kill at any instant leaves the
last good one. Its checksums.json contains the SHA-256 of every file; resuming skips a checkpoint that does not match.
Logs are appended line by line; resuming truncates them to the step of the checkpoint.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import socket
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from common.errors import UserError, as_json, flush, is_config_of_run, stored_settings, write_whole
from common.run_layout import BEST, CHECKPOINTS, checkpoint_of, checkpoints_of
from common.wording import exact_text
from second_try import masks

TRACE_CHARS = 200  # of a neighbouring trace in rollouts.jsonl


CHECKSUMS = "checksums.json"
NEW, OLD = ".new-", ".old-"  # prefixes: of what is being written, and of what it replaces
BEST_STEP = "step.txt"
LOCK = ".lock"
# What a run without a checkpoint may leave behind.
BEFORE_THE_START = {"config.json", f"{NEW}config.json", CHECKPOINTS, "gold_cache", LOCK}
LOGS = re.compile(r"wandb|events\.out\.tfevents.*")  # likewise, with --log
_locks: dict[Path, object] = {}  # open files; the system unlocks them when the process ends, however it ends


class RunFolder:
    """Opens or creates the folder of a run.

    A folder whose run was stopped before its first checkpoint does not count as one that holds a run.

    Raises:
        UserError: it holds another run and `resume` is off, or it holds none and `resume` is on, or a setting
            differs from the one the run was started with, or another process is running it.
    """

    def __init__(self, path: str | Path, settings: dict, *, resume: bool, may_change: tuple[str, ...] = (),
                 defaults: Mapping = MappingProxyType({}), made_of: Mapping = MappingProxyType({})):
        """made_of: further entries of config.json; its `questions`, {part: hash}, must be the same on resume."""
        self.path = Path(path)
        self.stored = stored_settings(self.path) or {}  # of the run that is resumed
        config, known = self.path / "config.json", (may_change, defaults, made_of.get("questions"))
        self.resumes = resume or self._has_only_begun(settings, *known)
        if resume:
            check_settings(self.path, settings, *known)
            done = max((step for step, _ in self.checkpoints()), default=0)
            if settings.get("steps", done) < done:
                raise UserError(f"{self.path} has done {done} steps, more than --steps {settings['steps']}: give a "
                                "larger number, or leave it out")
        elif self.path.is_file():
            raise UserError(f"--output {self.path} is a file: give a folder, which may be a new one")
        elif self.path.exists() and not self.resumes and not self._is_free():
            raise UserError(f"{self.path} already holds a run or other files: continue it with --resume, choose "
                            "another --output, or delete it")
        self.is_new, self.was_there = not self.resumes, self.path.exists()
        try:
            (self.path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            self._lock()
            for left in [*self.path.glob(".*-*"), *self.path.glob(f"{CHECKPOINTS}/.*-*")]:
                if left.name.startswith((NEW, OLD)):
                    clean_up(left.with_name(left.name.removeprefix(NEW).removeprefix(OLD)))
            before = self.stored if self.resumes else {}
            kept = {name: before[name] for name in settings if name in before and name not in may_change}
            # cwd: the folder to which paths in the settings are relative
            written = settings | kept | {"cwd": before.get("cwd") or str(Path.cwd())} | made_of
            write_whole(config, json.dumps(written, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}") from error

    def _has_only_begun(self, settings: dict, *known) -> bool:
        """Whether the same command was stopped before its first step; then it continues from its cold start."""
        if [step for step, _ in self.checkpoints()] != [0] or (self.path / "metrics.jsonl").exists():
            return False
        try:
            check_settings(self.path, settings, *known)
        except UserError:
            return False
        return True

    def _is_free(self) -> bool:
        """Whether nothing is lost when a run begins here."""
        others = {path.name for path in self.path.iterdir()} - BEFORE_THE_START
        ours = stored_settings(self.path) is not None and all(map(LOGS.fullmatch, others))
        return (ours or not others) and not any(
            self.path.glob(f"{CHECKPOINTS}/[!.]*"))  # anybody's: `discard_new` may delete them

    def _lock(self) -> None:
        """Keeps other processes out of the folder until this one ends."""
        if owner := lock(self.path):
            raise UserError(f"{self.path} is being trained by {owner}: let it end or stop it, then --resume")

    def discard_new(self) -> None:
        """Removes what a run that could not start has written, so that the same command can be given again."""
        if not self.is_new or self.checkpoints():
            return
        try:
            for path in self.path.iterdir():
                if path.name in BEFORE_THE_START or LOGS.fullmatch(path.name):
                    remove(path)
            if not self.was_there and not any(self.path.iterdir()):
                self.path.rmdir()
        except OSError as error:  # must not hide why the run could not start
            print(f"warning: {self.path} cannot be tidied up: {error.strerror}")

    def log(self, name: str, records: list[dict]) -> None:
        """Appends records to NAME.jsonl. Raises UserError: the disk is full or not writable."""
        path = self.path / f"{name}.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(as_json(record) + "\n" for record in records)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; the checkpoints are intact, so free some space "
                            "and --resume") from error

    def cut_logs(self, step: int) -> None:
        """Drops records after `step`, and half-written last lines."""
        for name in ("metrics", "rollouts"):
            path = self.path / f"{name}.jsonl"
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
                write_whole(path, "".join(line + "\n" for line in kept))

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint, oldest first."""
        return checkpoints_of(self.path)

    def first_checkpoint(self) -> Path:
        """The policy of step 0, which is the reference. Raises UserError if it is missing or damaged."""
        folder = checkpoint_of(self.path, 0)
        problem = damage(folder) if folder.exists() else "it is gone"
        if problem:
            raise UserError(f"cannot resume: the run compares with its policy of step 0, {folder}, and {problem}; put "
                            "it back, or start another --output")
        return folder

    def save_checkpoint(self, step: int, policy, state: dict, memory=None, keep: int = 2) -> None:
        """Writes checkpoints/step-N and deletes others, except the start (step 0) and the newest `keep`."""

        def fill(folder: Path) -> None:
            policy.save(folder)
            torch.save(state, folder / "trainer.pt")
            if memory is not None:
                memory.save(folder / "memory.npz")
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            sums = {path.relative_to(folder).as_posix(): checksum(path) for path in files}
            (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")

        replace_folder(checkpoint_of(self.path, step), fill)
        for old, folder in self.checkpoints()[:-keep]:
            if old:
                shutil.rmtree(folder)

    def newest_whole(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest undamaged checkpoint; None if there is no checkpoint.

        Damaged newer ones are renamed to damaged-step-N, so that nothing is lost and their names are free.
        Raises UserError if all checkpoints are damaged.
        """
        found = self.checkpoints()
        for step, folder in reversed(found):
            problem = damage(folder)
            if problem is None:
                return step, folder
            print(f"skipped {folder}: {problem}")
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        if found:
            raise UserError(f"{self.path} has no whole checkpoint left to resume; start another --output")
        return None

    def save_best(self, policy, step: int) -> None:
        """Replaces best/ with this policy, and records its step there."""

        def fill(folder: Path) -> None:
            policy.save_merged(folder)
            (folder / BEST_STEP).write_text(f"{step}\n")

        replace_folder(self.path / BEST, fill)

    def step_of_best(self) -> int:
        """The step of the policy in best/; -1 if there is none, or if an older version wrote it."""
        file = self.path / BEST / BEST_STEP
        return int(file.read_text()) if file.is_file() else -1


def lock(folder: Path) -> str:
    """Locks a folder until this process ends. Returns the other owner of the lock, empty if it is ours."""
    path = folder.resolve() / LOCK
    if path in _locks and path.exists():
        return ""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "another process"
    except OSError as error:  # a file system that has no locks
        print(f"warning: {folder} cannot be locked ({error.strerror}), as some network file systems cannot: see to it "
              "yourself that no other process trains in this folder")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[path] = file
    return ""


def owner_of_lock(folder: Path) -> str:
    """Which other process has locked a folder; empty for none."""
    path = folder.resolve() / LOCK
    if path in _locks or not path.exists():
        return ""
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until it is closed
        except BlockingIOError:
            return file.read().strip() or "another process"
        except OSError:  # a file system that has no locks: nobody can hold one
            pass
    return ""


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_settings(folder: Path, settings: dict, may_change: tuple[str, ...], defaults: Mapping,
                   questions: Mapping | None = None) -> None:
    """Raises UserError if the folder contains no run, or one with other settings or other questions.

    defaults: values of settings that older runs do not contain.
    questions: {part: hash}; None if they are unknown.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder} holds no run to resume (no config.json); start it without --resume")
    try:
        stored = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{config} cannot be read or is not valid JSON, so the run cannot be resumed") from error
    if not is_config_of_run(stored):
        raise UserError(f"{config} is not that of a run, so nothing can be resumed there: give --output the folder of "
                        "the run itself, not one of its checkpoints, or leave --resume out")
    stored = {**defaults, **stored}
    for name, value in settings.items():
        if name not in may_change and name in stored and not _same(stored[name], value, stored.get("cwd", "")):
            raise UserError(f"{folder} was started with {name} = {stored[name]}, not {value}: resume it with "
                            "the same settings, or start another --output")
    for part, known in (stored.get("questions") or {}).items():
        if questions and questions.get(part) != known:
            raise UserError(f"{folder} was started with other {part}: put the files of the data back as they were, or "
                            "start another --output")


def _same(stored, value, place: str) -> bool:
    """Whether a stored setting equals this value, or is the same path, relative to the folder `place`."""
    if isinstance(stored, str) and isinstance(value, str) and os.path.abspath(value) == os.path.abspath(
            os.path.join(place, stored)):
        return True
    return stored == json.loads(json.dumps(value))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its checksums; None if it is undamaged."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        wrong = [name for name, known in sums.items() if checksum(folder / name) != known]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read ({type(error).__name__})"
    return f"{wrong[0]} is not what was written" if wrong else None


def load_state(folder: Path, lazily: bool = False) -> dict:
    """The trainer's state of a checkpoint; lazily: read each tensor from the file when it is used.

    Raises UserError if it cannot be read.
    """
    try:
        return torch.load(folder / "trainer.pt", weights_only=True, mmap=lazily)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{folder} is not a whole checkpoint ({type(error).__name__} in trainer.pt); delete it to "
                        "resume an older one") from error


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def replace_folder(target: Path, fill) -> None:
    """Fills a new folder, flushes it to disk and replaces `target` with it.

    Raises:
        UserError: the disk is full or not writable; `target` is then unchanged.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch, old = clean_up(target)
        scratch.mkdir()
        fill(scratch)
        for file in scratch.rglob("*"):
            flush(file)
        flush(scratch)
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, old)
        os.rename(scratch, target)
        flush(target.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError, safetensors as its own
        shutil.rmtree(target.with_name(f"{NEW}{target.name}"), ignore_errors=True)
        raise UserError(f"cannot save {target}: {error}; older checkpoints are intact, so free some space and "
                        "--resume") from error
    shutil.rmtree(old, ignore_errors=True)


def clean_up(target: Path) -> tuple[Path, Path]:
    """Removes what a kill left while `target` was being written; restores a target that was only moved aside.

    Returns the path at which to write the next one, and the path to which to move the present one.
    """
    scratch, old = target.with_name(f"{NEW}{target.name}"), target.with_name(f"{OLD}{target.name}")
    if old.exists() and not target.exists():  # killed between the two renames of `replace_folder`
        old.rename(target)
    remove(old)
    remove(scratch)
    return scratch, old


def remove(path: Path) -> None:
    """Deletes a file, a link or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ reading a run's logs

class RolloutLog:
    """An index of rollouts.jsonl by step, so that a step can be read without the others."""

    def __init__(self, file: Path):
        self.file = file
        self.places: dict[int, list[int]] = defaultdict(list)  # step -> offsets of its lines
        offset = 0
        if file.is_file():
            with open(file, "rb") as lines:
                for line in lines:
                    if (step := self._step_of(line)) is not None:
                        self.places[step].append(offset)
                    offset += len(line)
        self.steps = sorted(self.places)

    @staticmethod
    def _step_of(line: bytes) -> int | None:
        """The line's step; an ordinary line is matched, not parsed."""
        if (start := re.match(rb'\{"step": (\d+), ', line)) and line.endswith(b"}\n"):
            return int(start[1])
        record = parse_record(line)
        return record and record["step"]

    def read(self, step: int) -> list[dict]:
        """The groups of a step."""
        with open(self.file, "rb") as lines:
            groups = []
            for offset in self.places[step]:
                lines.seek(offset)
                groups.append(parse_record(lines.readline()))
        return [group for group in groups if group]


def parse_record(line: bytes) -> dict | None:
    """The record of one line of a log, None if it is broken."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


# --------------------------------------------------------------------------------------------------- records


def step_metrics(step: int, rollouts, components, stats: dict, seconds: dict, extra: dict) -> dict:
    """The line of metrics.jsonl for one step.

    Args:
        rollouts: all that were sampled. Reward metrics leave out rollouts whose database could not be read; if none
            could, they are missing.
        components: names of the rewards.
        stats: from `policy_update`.
        seconds: of each phase.
        extra: other metrics of the step.
    """
    flat = [b for rollout in rollouts for b in rollout.rewards]
    read = [rollout.rewards for rollout in rollouts if rollout.readable]
    groups = [rollout.group for rollout in rollouts]
    sampled = [mask for group in groups for mask in masks(group)]
    lengths = torch.tensor([float(mask.sum()) for mask in sampled])
    truncated = [cut for group in groups for cut in group.truncated]
    statuses = Counter(b.status for b in flat)
    return {"step": step, **(reward_metrics(read, components) if read else {}), **stats,
            "entropy": torch.cat([e for group in groups for e in group.entropies])[torch.cat(sampled)].mean().item(),
            "completion_length": lengths.mean().item(), "completion_length_max": lengths.max().item(),
            "truncated": sum(truncated) / len(truncated),
            **{f"status/{name}": count / len(flat) for name, count in sorted(statuses.items())},
            **{f"seconds/{name}": value for name, value in seconds.items()},
            "tokens_per_second": lengths.sum().item() / sum(seconds.values()), "peak_memory_mb": peak_memory_mb(),
            **extra}


def reward_metrics(breakdowns, components) -> dict[str, float]:
    """The metrics of rewards and accuracy, from B lists of G RewardBreakdowns."""
    totals = torch.tensor([[b.total for b in row] for row in breakdowns])  # [B, G]
    correct = torch.tensor([[float(b.correct) for b in row] for row in breakdowns])
    return {"reward": totals.mean().item(), "reward_std": totals.std(dim=1).mean().item(),
            **{f"reward/{name}": sum(getattr(b, name) for row in breakdowns for b in row) / totals.numel()
               for name in components},
            "execution_accuracy": correct.mean().item(),
            "all_wrong_groups": (correct.sum(1) == 0).float().mean().item(),
            "all_right_groups": (correct.mean(1) == 1).float().mean().item()}


def rollout_records(step: int, rollouts, components, advantages, watched: dict) -> list[dict]:
    """The lines of rollouts.jsonl for one step: every rollout with its completions, rewards and advantages, except
    those whose database could not be read, because they have no rewards.

    `watched`, {number of a rollout: a dict per completion}, adds its tokens and their probability ratios.
    """
    return [{"step": step, "id": rollout.example.id, "db_id": rollout.example.db_id,
             "question": rollout.example.question, "evidence": rollout.example.evidence,
             "difficulty": rollout.example.difficulty, "gold_sqls": list(rollout.example.gold_sqls),
             **({"answer": rollout.example.answer.rows} if rollout.example.answer else {}),
             "completions": [{
                 "text": b.text, "thought": b.thought, "sql": b.sql, "status": b.status, "error": b.error,
                 "correct": b.correct,
                 "rewards": {"total": b.total} | {name: getattr(b, name) for name in components},
                 "advantage": advantages[i, j].item(), "tokens": int(mask.sum()),
                 "truncated": rollout.group.truncated[j], **(rollout.tried[j] if rollout.tried else {}),
                 "columns": list(b.columns),
                 "rows": [[exact_text(cell) if isinstance(cell, bytes) or cell in (math.inf, -math.inf) else cell
                           for cell in row] for row in b.rows],
                 "row_count": b.row_count,
                 "neighbours": [trace | {"thought": trace["thought"][:TRACE_CHARS]} for trace in b.neighbours],
                 **({"from_trace": True} if rollout.guided and j == len(rollout.rewards) - 1 else {}),
                 **(watched[i][j] if i in watched else {})}
                 for j, (b, mask) in enumerate(zip(rollout.rewards, masks(rollout.group), strict=True))]}
            for i, rollout in enumerate(rollouts) if rollout.readable]


def peak_memory_mb() -> float:
    """Peak memory so far in MiB: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")  # on Linux, where ru_maxrss includes the memory of the parent process
    if status.is_file():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB on Linux
