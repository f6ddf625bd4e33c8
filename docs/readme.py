"""Brings README.md and the pages of docs/ up to date: flags, ablations, lines of equations, what a model needs.

    python docs/readme.py

Generated text stands between `<!-- NAME -->` and `<!-- /NAME -->`:
    flags                   every flag of every command. Flags are made from the fields of dataclasses
                            (common/options.py), so the parser that a command builds is the whole truth
    models                  the aliases of `--model`
    needs                   what `train.py --plan` says of `--model qwen2.5-3b`
    recipe NAME             the settings of a recipe, their values and sources
    lengths                 what `train.py --plan` says of longer prompts and completions
    ablation NAME: a; Δ a   the measure a and its differences, from results/ablation-NAME.json, which ablate.py wrote
Equation n is linked to the first line of grpo.py that says `# eq. (n)`. notebook.py makes walkthrough.ipynb.
"""

import argparse
import importlib
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from textwrap import fill
from unittest import mock

DOCS = Path(__file__).resolve().parent
ROOT, RESULTS = DOCS.parent, DOCS / "results"
sys.path.insert(0, str(ROOT))
import notebook  # noqa: E402

import ablate  # noqa: E402
import policy  # noqa: E402
import settings  # noqa: E402
from common import options  # noqa: E402
from models import memory_plan  # noqa: E402
from running import recipes  # noqa: E402

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(RESULTS.glob("*.md"))]
COMMANDS = {  # module: how it is called
    "train": "python train.py", "evaluate": "python evaluate.py", "ask": "python ask.py",
    "sft": "python sft.py --mine FILE", "ablate": "python ablate.py", "report": "python report.py",
    "running.show": "python -m running.show", "questions.text2sql_data": "python -m questions.text2sql_data"}
CORES = {("evaluate", "workers"), ("sft", "workers")}  # defaults that are the number of CPU cores
EXAMPLE = ["--model", "qwen2.5-3b", "--data", "bird", "--plan", "80"]  # of `needs`; a number makes it a card's plan
SIZES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b")  # of `lengths`
LENGTHS = ((2048, 512), (2048, 1024), (4096, 1536), (4096, 4096))
CARDS = (8, 12, 16, 24, 40, 48, 80, 141)  # gigabytes


class Caught(Exception):
    """Carries the parser of a command that is about to read its command line."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that a command builds."""
    def catch(parser, *_):
        raise Caught(parser)

    with (mock.patch.object(argparse.ArgumentParser, "parse_known_args", catch),
          mock.patch.object(sys, "argv", [f"{command}.py"])):
        try:
            importlib.import_module(command).main()
        except Caught as caught:
            return caught.args[0]
    raise AssertionError(f"{command} reads no command line")


# ---------------------------------------------------------------------------------------------- flags

def flag_table(command: str) -> str:
    """A table of every flag of a command, a section a dataclass."""
    lines = ["| flag | default | what it is |", "|---|---|---|"]
    for group in parser_of(command)._action_groups:
        actions = [action for action in group._group_actions if action.dest not in ("help", "help_all")]
        if actions and group.title not in ("options", "positional arguments"):
            lines.append(f"| **{group.title}** | | |")
        lines += [flag_row(command, action) for action in actions]
    return "\n".join(lines)


def flag_row(command: str, action: argparse.Action) -> str:
    """A flag, its default and its help text; what the short help of train.py shows has a star."""
    field = training_fields().get(action.dest) if command == "train" else None
    help_text = options.help_of(field) if field and action.help == argparse.SUPPRESS else action.help
    text, default = re.fullmatch(r"(.*?)(?: \(default: (.*)\))?", help_text.replace("%%", "%"), re.DOTALL).groups()
    cell = "CPU cores" if (command, action.dest) in CORES else default_cell(command, action.dest, default)
    name = " ".join(filter(None, (", ".join(action.option_strings), values_of(action))))
    star = " *" if field and field.metadata.get("common") else ""
    text = text.replace("|", r"\|")  # it ends no cell
    return f"| `{name}`{star} | {cell} | {text} |"


def default_cell(command: str, name: str, default: str | None) -> str:
    """A default; of train.py that of pretrained models, and after a slash that of `tiny` where it is another."""
    shown = f"`{default}`" if default is not None else ""
    if command != "train":
        return shown
    if name in settings.IN_BF16:
        return f"{shown}, in bf16 `{settings.IN_BF16[name]}`"
    tiny = settings.TINY.get(name, default)
    pretrained = {str(values.get(name, default)) for values in settings.KINDS.values()}
    if len(pretrained) > 1:
        return f"[by size](scale.md#defaults-by-size) / `{tiny}`"
    if {str(default)} != pretrained:
        (default,) = pretrained
        shown = f"`{default}`"
    return shown if str(tiny) == str(default) else f"{shown} / `{tiny}`"


def training_fields() -> dict:
    """{name of a setting of train.py: its dataclass field}."""
    return {field.name: field for config in settings.CONFIGS for field in fields(config)}


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
    """The tables of all commands, each under a heading."""
    return "\n\n".join(f"## `{call}`\n\n{flag_table(command)}" for command, call in COMMANDS.items())


# ---------------------------------------------------------------------------------------------- models

def model_table() -> str:
    """A row an alias."""
    return "\n".join(["| `--model` | checkpoint |", "|---|---|", *(f"| `{alias}` | `{source}` |"
                                                                   for alias, source in policy.ALIASES.items())])


def needs() -> str:
    """Card, disk and time of a training with `--model qwen2.5-3b`, with adapters and without."""
    lora, full = memory_and_disk([*EXAMPLE, "--lora-rank", "16"]), memory_and_disk(EXAMPLE)
    return fill(f"With `--lora-rank 16`, `--model qwen2.5-3b` needs {lora[0]:.1f} GB of GPU memory (a card of "
                f"{card(lora[0])} GB) and {lora[1]:.0f} GB of disk for checkpoints. Training all weights needs "
                f"{full[0]:.1f} GB (a card of {card(full[0])} GB) and {full[1]:.0f} GB of disk. Without the flag: all "
                "weights if they fit, else adapters. `python train.py --plan 24 --model qwen2.5-3b "
                "--lora-rank 16` computes this and loads nothing. The time of such a step has not been measured.",
                width=120, break_on_hyphens=False)


def memory_and_disk(arguments: list[str]) -> tuple[float, float]:
    """Gigabytes of memory and of disk that a run on a GPU needs at its peak."""
    s = settings.parse_settings(arguments)
    shape, work = settings.planned(s)
    trained = shape.adapters(work.lora_rank) if work.lora_rank else shape.parameters()
    weights = 2 * shape.parameters() + 4 * trained if work.lora_rank else 4 * trained  # a frozen base is bf16
    peak = memory_plan.peak(memory_plan.phases(shape, work))[1]
    return peak / 1e9, memory_plan.disk(weights, 4 * trained, s.run.keep) / 1e9


def card(gigabytes: float) -> int:
    """The smallest usual card on which so much memory can be planned for."""
    return min(size for size in CARDS if gigabytes <= memory_plan.SHARE * size)


def lengths() -> str:
    """Gigabytes at the peak of a training on a GPU, with adapters and with all weights, by prompt and completion."""
    head = " | ".join(f"{P:,} + {T:,}" for P, T in LENGTHS)
    lines = [f"| `--model` | {head} |", "|---" * (1 + len(LENGTHS)) + "|"]
    for model in SIZES:
        cells = []
        for P, T in LENGTHS:
            flags = [*EXAMPLE, "--model", model, "--max-prompt-tokens", str(P), "--max-completion-tokens", str(T)]
            cells.append(f"{memory_and_disk([*flags, '--lora-rank', '16'])[0]:.0f}, {memory_and_disk(flags)[0]:.0f}")
        lines.append(f"| `{model}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recipe_table(name: str) -> str:
    """A row a setting of a recipe: its flag, its value (that of small models where it is another) and its source."""
    fields, small = training_fields(), recipes.SMALL.get(name, {})
    lines = ["| flag | value | source |", "|---|---|---|"]
    for setting, (value, source) in recipes.RECIPES[name].items():
        other = f"; up to 1 B: `{small[setting][0]}`" if setting in small else ""
        lines.append(f"| `{options.flag_of(fields[setting])}` | `{value}`{other} | {source} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- equations, ablations

def equation_lines() -> dict[int, int]:
    """{number of an equation: the first line of grpo.py's code that carries it}."""
    found = {}
    for number, line in enumerate((ROOT / "grpo.py").read_text().splitlines(), 1):
        for equation in re.findall(r"# eq\. \((\d)\)", line):
            found.setdefault(int(equation), number)
    return found


def ablation_table(name: str, columns: str) -> str:
    """A row a cell of an ablation: the measures named in `a; b; Δ a`."""
    summary = json.loads((RESULTS / f"ablation-{name}.json").read_text())["summary"]
    names = columns.split("; ")
    differences = [name[2:] for name in names if name.startswith("Δ ")]
    return ablate.rows(summary, [name for name in names if not name.startswith("Δ ")], differences)


# ---------------------------------------------------------------------------------------------- pages

def up_to_date(text: str) -> str:
    """A page as it should be."""
    lines = equation_lines()
    text = re.sub(r"\[eq\. \((\d)\)\]\(((?:\.\./)?grpo\.py)#L\d*\)",
                  lambda found: f"[eq. ({found[1]})]({found[2]}#L{lines[int(found[1])]})", text)
    text = re.sub(r"(<!-- ablation (\w+): (.*?) -->\n).*?(<!-- /ablation -->)",
                  lambda found: found[1] + ablation_table(found[2], found[3]) + found[4], text, flags=re.DOTALL)
    text = re.sub(r"(<!-- recipe (\S+) -->\n).*?(<!-- /recipe -->)",
                  lambda found: f"{found[1]}{recipe_table(found[2])}\n{found[3]}", text, flags=re.DOTALL)
    for name, write in (("flags", flag_tables), ("models", model_table), ("needs", needs), ("lengths", lengths)):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
                      lambda found, write=write: f"{found[1]}{write()}\n{found[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(up_to_date(page.read_text()))
    notebook.write()
