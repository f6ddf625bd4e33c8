"""Brings README.md and ablations.md up to date: tables of flags and of ablations, line numbers of equations.

    python docs/readme.py

Flags are made from the fields of dataclasses (options.py), so the parser that a program builds is the whole truth; the
tables stand between `<!-- flags -->` and `<!-- /flags -->`. Equation n is where grpo.py says `# eq. (n)`. Between
`<!-- ablation NAME: measure; Δ measure -->` and `<!-- /ablation -->` stand means and differences of ablation-NAME.json,
the ablation.json that ablate.py wrote.
"""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path
from unittest import mock

DOCS = Path(__file__).resolve().parent
README, ABLATIONS = DOCS.parent / "README.md", DOCS / "ablations.md"
sys.path.insert(0, str(README.parent))
import ablate  # noqa: E402
import settings  # noqa: E402

PROGRAMS = {  # program: what else its first line says
    "train": "where the tiny policy has another default it is given after a slash",
    "evaluate": "", "ask": "", "sft": "mining of traces", "ablate": "", "report": "", "show": ""}
CORES = {("evaluate", "workers"), ("sft", "workers")}  # defaults that are the number of CPU cores


class Caught(Exception):
    """Carries the parser of a program that is about to read its command line."""


def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser that a program builds."""
    def catch(parser, *_):
        raise Caught(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", catch):
        try:
            importlib.import_module(program).main()
        except Caught as caught:
            return caught.args[0]
    raise AssertionError(f"{program}.py reads no command line")


def flag_table(program: str) -> str:
    """A table of every flag of a program, a section a dataclass."""
    tiny, pretrained, by_size = {}, {}, {}
    if program == "train":
        tiny, pretrained = settings.TINY_DEFAULTS, settings.PRETRAINED_DEFAULTS
        by_size = {name for values in settings.SIZE_DEFAULTS.values() for name in values}
    lines = ["| flag | default | what it is |", "|---|---|---|"]
    for group in parser_of(program)._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions and group.title not in ("options", "positional arguments"):
            lines.append(f"| **{group.title}** | | |")
        for action in actions:
            text, default = re.fullmatch(r"(.*?)(?: \(default: (.*)\))?", action.help.replace("%%", "%")).groups()
            default = pretrained.get(action.dest, default)
            cell = "CPU cores" if (program, action.dest) in CORES else f"`{default}`" if default is not None else ""
            if action.dest in by_size:
                cell, default = "[by size](#large-models)", tiny.get(action.dest, default)
                cell += f" / `{default}`"
            if str(tiny.get(action.dest, default)) != str(default):
                cell += f" / `{tiny[action.dest]}`"
            name = " ".join(filter(None, (", ".join(action.option_strings), values_of(action))))
            lines.append(f"| `{name}` | {cell} | {text.replace('|', '/')} |")
    return "\n".join(lines)


def values_of(action: argparse.Action) -> str:
    """What stands after a flag: `N`, `{a,b}`, `[N]` where it may be left out."""
    if action.nargs == 0:
        return ""
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    names = action.metavar or action.dest.upper()
    names = " ".join(names) if isinstance(names, tuple) else names
    return f"[{names}]" if action.nargs == "?" else names


def flag_tables() -> str:
    """The tables of all programs, each folded away."""
    parts = []
    for program, note in PROGRAMS.items():
        if (README.parent / f"{program}.py").is_file():
            summary = f"<code>{program}.py</code>{': ' + note if note else ''}"
            parts.append(f"<details><summary>{summary}</summary>\n\n{flag_table(program)}\n\n</details>")
    return "\n\n".join(parts)


def equation_lines() -> dict[int, int]:
    """{number of an equation: the first line of grpo.py's code that carries it}."""
    found = {}
    for number, line in enumerate((README.parent / "grpo.py").read_text().splitlines(), 1):
        for equation in re.findall(r"# eq\. \((\d)\)", line):
            found.setdefault(int(equation), number)
    return found


def ablation_table(name: str, columns: str) -> str:
    """A row a cell of an ablation: the measures named in `a; b; Δ a`."""
    summary = json.loads((DOCS / f"ablation-{name}.json").read_text())["summary"]
    names = columns.split("; ")
    differences = [name[2:] for name in names if name.startswith("Δ ")]
    return ablate.rows(summary, [name for name in names if not name.startswith("Δ ")], differences)


def with_ablations(text: str) -> str:
    """A text whose tables of ablations say what was measured."""
    return re.sub(r"(<!-- ablation (\w+): (.*?) -->\n).*?(<!-- /ablation -->)",
                  lambda found: found[1] + ablation_table(found[2], found[3]) + found[4], text, flags=re.DOTALL)


def up_to_date(text: str) -> str:
    """The README as it should be."""
    text = with_ablations(text)
    lines = equation_lines()
    text = re.sub(r"\[eq\. \((\d)\)\]\(grpo\.py#L\d*\)",
                  lambda found: f"[eq. ({found[1]})](grpo.py#L{lines[int(found[1])]})", text)
    head, rest = text.split("<!-- flags -->")
    _, tail = rest.split("<!-- /flags -->")
    return f"{head}<!-- flags -->\n{flag_tables()}\n<!-- /flags -->{tail}"


if __name__ == "__main__":
    README.write_text(up_to_date(README.read_text()))
    ABLATIONS.write_text(with_ablations(ABLATIONS.read_text()))
