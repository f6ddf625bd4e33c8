"""The house: few rooms, imports that point one way, an algorithm that stands alone."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"train", "evaluate", "ask", "sft", "ablate", "report"}
FOLDERS = {"engine", "text2sql", "scoring", "models", "running"}
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


@cache
def floor(room: str) -> int:
    return 1 + max((floor(other) for other in rooms_imported(room)), default=0)


def test_there_are_few_rooms():
    assert len(list(ROOT.glob("*.py"))) <= 12
    assert {"grpo", "rewards", "sql_exec", "data", "train", "evaluate"} | COMMANDS <= ROOMS
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "bench", "docs", "runs"}
    assert folders == FOLDERS and not list(ROOT.glob("[!.]*/*/*.py"))


def test_imports_point_one_way_and_the_house_has_at_most_seven_floors():
    TopologicalSorter({room: rooms_imported(room) for room in ROOMS}).prepare()  # raises CycleError for a circle
    floors = {room: floor(room) for room in ROOMS}
    assert max(floors.values()) <= 7
    for folder in FOLDERS:
        assert not rooms_imported(folder) & COMMANDS, folder


def test_the_algorithm_and_the_executor_import_nothing_of_the_project():
    assert rooms_imported("grpo") == rooms_imported("sql_exec") == rooms_imported("running") == set()
    assert len((ROOT / "grpo.py").read_text().splitlines()) < 400


def test_a_bench_shadows_no_room():
    assert not {path.stem for path in (ROOT / "bench").glob("*.py")} & ROOMS
