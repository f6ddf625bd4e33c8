"""Errors of the user, each reported in one sentence, and readers and writers of files that raise them.

A script's `main` runs in `run_main`, which turns a `UserError` into one line on stderr and exit status 2.
"""

import contextlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")  # Python joins the pairs that encode a character
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of such a pair, as JSON escapes it


class UserError(Exception):
    """Bad input from the user; its text is one sentence, shown without a traceback."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's main: a UserError is one line on stderr and exit status 2, Ctrl-C 130, a closed pipe 141."""
    write_any_text()
    try:
        status = main()
        if sys.stdout:  # None if the shell closed it
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discards what is left in the buffer
        sys.exit(141)  # a shell's status for a program that SIGPIPE ended
    sys.exit(status or 0)


def write_any_text() -> None:
    """Makes stdout and stderr escape characters that their encoding lacks, so that no output ends a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's or a test's stream takes any text
            stream.reconfigure(errors="backslashreplace")


def sound(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD, because no file, tokenizer or database accepts them.

    They come from JSON ("\\ud800") and from command-line arguments that are not UTF-8.
    """
    return LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def read_text(file: Path) -> str:
    """The text of a file. Raises UserError if it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def parse_json(text: str, file, line: int | None = None):
    """The JSON value of a file, or of one line of it, with every string `sound`. Raises UserError, naming the line."""
    try:
        value = json.loads(text)
        return _sound_value(value) if ESCAPED_SURROGATE.search(text) else value
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {line or error.lineno}: broken JSON ({error.msg})") from error
    except RecursionError as error:
        raise UserError(f"{file}: JSON nested too deeply") from error
    except ValueError as error:  # a number of more than 4,300 digits
        raise UserError(f"{file}: a number is too long to be read") from error


def _sound_value(value):
    """The same JSON value with every string `sound`."""
    if isinstance(value, str):
        return sound(value)
    if isinstance(value, list):
        return [_sound_value(item) for item in value]
    if isinstance(value, dict):
        return {sound(name): _sound_value(item) for name, item in value.items()}
    return value


def as_json(value, **how) -> str:
    """A value as JSON that every parser accepts: null in place of Infinity and NaN."""
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **how)


def _finite(value):
    """The same value with None for every number that JSON cannot represent."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_lines(records: Iterable[dict]) -> str:
    """One JSON record per line."""
    return "".join(as_json(record) + "\n" for record in records)


def write_text(file, text: str) -> None:
    """Writes a file. Raises UserError if it cannot be written."""
    try:
        Path(file).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new one. Raises UserError if it cannot be written."""
    scratch = path.with_name(f".new-{path.name}")
    try:
        with open(scratch, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def flush(path: Path) -> None:
    """Flushes the content of a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(file) -> None:
    """Raises UserError if a file cannot be written, to report it before the work; the file stays unchanged."""
    path = Path(file).resolve()  # the target of a link
    try:
        if not path.parent.is_dir():
            raise UserError(f"cannot write {file}: its folder does not exist")
        if path.is_dir():
            raise UserError(f"cannot write {file}: it is a folder; name a file in it")
        is_new = not path.exists()
        if is_new or path.is_file():  # opening a pipe would wait for its reader
            open(path, "ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def visible(text: str) -> str:
    """The text with unprintable characters written out: NUL becomes ‹U+0000›."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else f"‹U+{ord(c):04X}›" for c in text)


def is_config_of_run(config) -> bool:
    """Whether the content of a config.json is that of a training run; the folder of a model also has such a file."""
    return isinstance(config, dict) and isinstance(config.get("data"), str) and "model_type" not in config


def stored_settings(folder: Path) -> dict | None:
    """The settings of the training run in a folder; None if there is none, or its config.json is unreadable."""
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return stored if is_config_of_run(stored) else None
