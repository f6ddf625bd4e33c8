"""The places of policies in the folder of a run; running/run_folder.py writes them.

    runs/NAME/checkpoints/step-N/    the policy of a step
    runs/NAME/best/                  the best policy on dev; also best/adapters/ if merging the adapters lost precision
"""

import re
from pathlib import Path

CHECKPOINTS, BEST, ADAPTERS = "checkpoints", "best", "adapters"
STEP = re.compile(r"step-(\d+)")  # a folder of another name, such as step-10-backup, is somebody else's


def checkpoint_of(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / CHECKPOINTS / f"step-{step}"


def checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first."""
    found = [(STEP.fullmatch(path.name), path) for path in (run / CHECKPOINTS).glob("step-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def final_policy(run: Path) -> Path | None:
    """The best policy, or the newest if a run has no dev questions; None before the first is saved."""
    policies = [run / BEST, *(folder for _, folder in reversed(checkpoints_of(run)))]
    return next((folder for folder in policies if folder.is_dir()), None)


def runs_of(policy: Path) -> list[Path]:
    """The folders that may be the run which made a policy, by the policy's path; its own folder comes first."""
    runs = [policy]
    if policy.name == BEST:
        runs.append(policy.parent)
    if (policy.parent.name, policy.name) == (BEST, ADAPTERS) or policy.parent.name == CHECKPOINTS:
        runs.append(policy.parents[1])
    return runs
