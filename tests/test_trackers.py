"""running/trackers.py: the numbers arrive, with the packages' own readers; nothing is imported that is not named."""

import json
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import train
from common.errors import UserError
from running import trackers
from settings import parse_settings

ROOT = Path(__file__).parents[1]
STEPS = [{"reward": 1.5, "kl": 0.25}, {"reward": 2.0, "kl": 0.5}]


def log_two_steps(name: str, folder: Path) -> None:
    (tracker,) = trackers.open_trackers(name, folder, {"lr": 1e-6, "model": "tiny", "data_dir": None})
    for step, metrics in enumerate(STEPS, 1):
        tracker.log(metrics, step)
    tracker.close()


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_two_steps("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("reward", "kl"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(n, m[name]) for n, m in enumerate(STEPS, 1)]
    assert b"lr: 1e-06" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def log_in_a_process(name: str, folder: Path) -> None:
    """These packages read the environment when they are imported, and write their last lines when the process ends."""
    code = (f"import sys; sys.path[:0] = {sys.path!r}; from pathlib import Path; import test_trackers;"
            f"test_trackers.log_two_steps({name!r}, Path({str(folder)!r}))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_wandb_writes_its_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_in_a_process("wandb", tmp_path)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert all(part in content for part in (b"text2sql-grpo", tmp_path.name.encode(), b"reward", b"1.5"))


def test_wandb_without_a_key_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is optional")
    code = ("from pathlib import Path; from common import errors; from running import trackers;"
            "errors.run_main(lambda: trackers.open_trackers('wandb', Path('.'), {}))")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", ":".join([str(ROOT), *sys.path]))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "error: --log wandb cannot start: No API key" in done.stderr and "Traceback" not in done.stderr


def test_trackio_stores_every_number(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is optional")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    log_in_a_process("trackio", tmp_path)
    with sqlite3.connect(next(tmp_path.glob("*.db"))) as stored:
        rows = [(step, json.loads(metrics)) for step, metrics in stored.execute("SELECT step, metrics FROM metrics ORDER BY step")]
    assert rows == list(enumerate(STEPS, 1))


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_missing_package_is_one_sentence_before_anything_is_read(name, monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    monkeypatch.setattr(train, "load_splits", lambda *_, **__: pytest.fail("data was read"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--log", name, "--output", str(tmp_path / "run")])
    with pytest.raises(UserError, match=f"--log {name} needs {name}: pip install {name}"):
        train.main()
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_one_sentence_and_none_is_none(tmp_path):
    with pytest.raises(UserError, match="no tracker 'mlflow'; choose among tensorboard, wandb, trackio"):
        trackers.check_trackers("tensorboard,mlflow" if find_spec("tensorboard") else "mlflow")
    assert trackers.open_trackers("", tmp_path, {}) == []


def test_nothing_is_imported_that_is_not_named():
    code = ("import sys, train; from running.trackers import check_trackers, open_trackers; open_trackers('', None, {});"
            "print([m for m in sys.modules if m.split('.')[0] in ('tensorboard', 'wandb', 'trackio')])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_a_run_that_was_started_with_the_older_flag_keeps_its_events(tmp_path):
    first = parse_settings(["--output", str(tmp_path)]).as_dict()
    del first["log"]
    (tmp_path / "config.json").write_text(json.dumps(first | {"tensorboard": True}))
    assert parse_settings(["--resume", "--output", str(tmp_path)]).run.log == "tensorboard"
    (tmp_path / "config.json").write_text(json.dumps(first | {"tensorboard": False}))
    assert parse_settings(["--resume", "--output", str(tmp_path)]).run.log == ""
