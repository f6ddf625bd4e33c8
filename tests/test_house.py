"""The house: few rooms, imports that point one way, an algorithm that stands alone."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"minimal", "train", "evaluate", "ask", "sft", "ablate", "report"}
FOLDERS = {"common", "engine", "models", "partial_credit", "prompts", "questions", "running", "scoring"}
ROOMS = {path.stem for path in ROOT.glob("*.py")} | FOLDERS


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).glob("*.py")) if room in FOLDERS else [ROOT / f"{room}.py"]


def rooms_imported(room: str) -> set[str]:
    """The other rooms that a room takes something from, lazy imports too."""
    found = set()
    for file in files_of(room):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            found |= {name.split(".")[0] for name in names}
    return (found & ROOMS) - {room}


def test_every_folder_is_a_room_that_the_tests_know():
    assert {"grpo", "rewards", "sql_exec", "data", "train", "evaluate"} | COMMANDS <= ROOMS
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "bench", "docs", "runs"}
    assert folders == FOLDERS and not list(ROOT.glob("[!.]*/*/*.py"))


def test_imports_point_one_way():
    TopologicalSorter({room: rooms_imported(room) for room in ROOMS}).prepare()  # raises CycleError for a circle
    for room in ROOMS - COMMANDS:
        assert not rooms_imported(room) & COMMANDS, room
    assert rooms_imported("train") & COMMANDS <= {"report"}


def test_what_is_read_or_lifted_alone_imports_nothing_of_the_project():
    for room in ("grpo", "sql_exec", "common"):  # grpo.py looks variants.py up by name when a config asks for it
        assert rooms_imported(room) == set(), room
    assert rooms_imported("variants") == {"grpo"}


def test_the_algorithm_and_its_engine_run_elsewhere(tmp_path):
    """As docs/extend.md says; `common` is for several processes, which only torchrun starts."""
    for name in ("grpo.py", "variants.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "engine", tmp_path / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import engine.fast, grpo; print(grpo.GRPOConfig(loss='dapo').loss)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "dapo\n", done.stderr
    assert rooms_imported("engine") == {"grpo", "variants", "common"}


def test_minimal_takes_only_its_questions_from_the_project():
    """The algorithm is the file's own; the demo's questions are imported where they are loaded, so that it can be copied."""
    assert rooms_imported("minimal") == {"questions"}
    lines = (ROOT / "minimal.py").read_text().splitlines()
    ours = [line for line in lines if re.match(rf" *(from|import) ({'|'.join(ROOMS)})\b", line)]
    assert len(ours) == 1 and ours[0].startswith("    from questions.demo_world import load")


def test_a_bench_shadows_no_room():
    assert not {path.stem for path in (ROOT / "bench").glob("*.py")} & ROOMS
