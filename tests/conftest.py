"""Fixtures that every test file shares."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one a core
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/nonexistent/hub"}  # models cached at home change no test

import contextlib
import io
import sqlite3
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts are flat files, not a package

SLOWEST = ("test_distributed", "test_train", "test_bench", "test_ask", "test_resume", "test_ablate", "test_policy")


def pytest_collection_modifyitems(items):
    """The files that take longest begin, so that the workers end together."""
    def turn(item):
        name = item.path.stem
        return SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)

    items.sort(key=turn)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (Spider, BIRD superhero, predictions); tests skip where it is absent."""
    folder = Path(os.environ.get("TEXT2SQL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set TEXT2SQL_DATA)")
    return folder


@pytest.fixture
def tiny_db(tmp_path) -> Path:
    """A small music database: singers, and the concerts that point to them."""
    return tiny_database(tmp_path / "music.sqlite")


def run_in_process(module, *arguments) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command, run in this process, which spares the seconds of its imports."""
    from common.errors import run_main

    out, err = io.StringIO(), io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          pytest.raises(SystemExit) as ended):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        run_main(module.main)
    return ended.value.code, out.getvalue(), err.getvalue()


def tiny_database(path: Path) -> Path:
    """Makes the music database at a place of one's own."""
    connection = sqlite3.connect(path)
    connection.executescript("""
        CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INT, HomeTown TEXT);
        CREATE TABLE concert (concert_id INTEGER PRIMARY KEY, singer_id INT REFERENCES singer, year INT,
                              "Ticket Price" REAL);
        INSERT INTO singer VALUES (1, 'Ana', 'France', 30, 'Lyon'), (2, 'Bo', 'Peru', 41, 'Lima'),
                                  (3, 'Cy', 'France', 25, NULL);
        INSERT INTO concert VALUES (1, 1, 2014, 9.5), (2, 1, 2015, 12.0), (3, 2, 2015, 7.25);
    """)
    connection.close()
    return path
