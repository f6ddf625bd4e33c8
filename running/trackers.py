"""Where the metrics of a run are sent besides its folder: TensorBoard, Weights & Biases, trackio.

Each is an optional package, imported only if `--log` names it. Only the run's name is set here: WANDB_MODE (offline,
disabled) decides whether wandb goes online, TRACKIO_DIR where trackio stores its files.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from common.errors import UserError


class TensorBoard:
    """Events in the run's folder."""

    def __init__(self, folder: Path, settings: dict):
        self.writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
        self.writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def log(self, metrics: dict, step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of wandb, or of trackio, which has the same three functions. A resumed run is a new one there."""

    def __init__(self, package: str, folder: Path, settings: dict):
        module, options = import_module(package), {"dir": str(folder)} if package == "wandb" else {}
        try:
            self.run = module.init(project="text2sql-grpo", name=folder.name, config=settings, **options)
        except (OSError, getattr(module, "Error", OSError)) as error:  # wandb's, if it has no key
            raise UserError(f"--log {package} cannot start: {error} (WANDB_MODE=offline needs no account)") from error

    def log(self, metrics: dict, step: int) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS = ("tensorboard", "wandb", "trackio")


def check_trackers(names: str) -> list[str]:
    """The trackers that `--log a,b` names. Raises UserError for an unknown name or a missing package."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in TRACKERS:
            raise UserError(f"--log {names}: there is no tracker '{name}'; choose among {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise UserError(f"--log {name} needs {name}: pip install {name}, or leave it out, as metrics.jsonl has the "
                            "same numbers")
    return wanted


def open_trackers(names: str, folder: Path, settings: dict) -> list[TensorBoard | Wandb]:
    """Opens the trackers; each has log(metrics, step) and close()."""
    return [TensorBoard(folder, settings) if name == "tensorboard" else Wandb(name, folder, settings)
            for name in check_trackers(names)]
