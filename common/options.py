"""From frozen dataclasses to command-line flags and back, so that help text, documentation and code agree.

A field `group_size: int = option(8, "completions per question", at_least=2)` becomes `--group-size N`. A dataclass of
settings calls `check` in its `__post_init__`, so that no value out of range ever exists; `build` makes it from flags.
grpo.py and partial_credit/memory.py import nothing from the project, so each has short versions of `option` and
`check` with the same rules (rewards.py uses those of memory.py).

    help                      the text of `--help` and of the table of flags; a field without it is not a flag
    choices                   the allowed values
    at_least, above, at_most  the range of a number; every number must be finite
    common                    shown by `--help`; the others by `--help-all`
    flag, alone               the name of the flag, if not the field's; its value if the flag is given without one
    unset                     the word for None, if that is the default and the value is decided later
"""

import argparse
import dataclasses
import difflib
import math
import operator
import os
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

from common.errors import UserError

OTHER_NAMES = {  # names of our flags in other tools
    "--learning-rate": "--lr", "--num-generations": "--group-size", "--beta": "--kl-coef", "--epsilon": "--clip-low",
    "--epsilon-high": "--clip-high", "--batch-size": "--prompts-per-step", "--epochs": "--steps",
    "--num-train-epochs": "--steps", "--max-steps": "--steps", "--warmup-steps": "--lr-warmup",
    "--lora-r": "--lora-rank", "--rank": "--lora-rank",
    "--max-new-tokens": "--max-completion-tokens", "--max-tokens": "--max-completion-tokens",
    "--model-name-or-path": "--model", "--checkpoint": "--model", "--db": "--database", "--dataset-name": "--data",
    "--resume-from-checkpoint": "--resume", "--report-to": "--log", "--num-return-sequences": "--samples"}
HIGHEST_SEED = 1_000_000  # a sample's seed is this one and two more numbers, in 64 bits
RANGE = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}
SHARED = {  # settings that several commands share
    "data": {"default": "demo", "help": "demo, spider, bird, or your own .json or .jsonl", "common": True},
    "data_dir": {"default": None, "help": "folder of the data and its databases", "common": True},
    "world": {"default": "default", "help": "world of the demo: default, or hard, where most traces above the simple "
                                            "tier are wrong"},
    "temperature": {"default": 1.0, "help": "of sampling", "above": 0},
    "max_completion_tokens": {"default": 512, "help": "a completion is cut at this many tokens; of a policy trained "
                                                      "here by default as in its run", "at_least": 1},
    "constrain": {"default": "none", "choices": ("none", "names", "scope"), "common": True,
                  "help": "names: SQL contains only keywords, functions, names of its database and aliases; scope: and "
                          "only columns of the tables that it reads (both need llguidance)"},
    "turns": {"default": 1, "choices": (1, 2), "at_least": 1,
              "help": "2: after an answer that does not run, the error and a second try follow"},
    "feedback": {"default": "error", "choices": ("error", "results"),
                 "help": "what a second try reads: the error; results: also columns and three rows of what ran"},
    "lenient_format": {"default": None, "help": "also take SQL inside a code fence"},
    "batch": {"default": 256, "help": "completions decoded side by side", "at_least": 1},
    "seed": {"default": 0, "help": "seed of sampling", "at_least": 0, "at_most": HIGHEST_SEED},
    "threads": {"default": 0, "help": "CPU threads of PyTorch; 0: PyTorch's choice", "at_least": 0, "common": True},
    "workers": {"default": os.cpu_count() or 1, "help": "SQL worker processes", "at_least": 1},
    "timeout": {"default": 5.0, "help": "seconds a query may take", "above": 0, "at_most": 1e6},
}


def option(default, help: str = "", **metadata):
    """A field of a settings dataclass: its default, its help text, and the metadata above."""
    return dataclasses.field(default=default, metadata=metadata | ({"help": help} if help else {}))


def shared(name: str, more: str = "", **other):
    """The field of SHARED with that name; `more` ends its help text; `other` replaces its default or metadata."""
    return option(**SHARED[name] | {"help": SHARED[name]["help"] + more} | other)


class Parser(argparse.ArgumentParser):
    """Parses a command line. An error raises a UserError of one sentence, without the usage text."""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UserError(unknown_argument(unknown[0], self.flags()))
        return given

    def error(self, message: str):
        raise UserError(f"{message}: see --help")

    def flags(self) -> list[str]:
        """The names of all flags."""
        return [name for action in self._actions for name in action.option_strings]


def unknown_argument(argument: str, flags: Iterable[str]) -> str:
    """The message for an unknown argument, with the flag that was probably meant."""
    name = argument.partition("=")[0].replace("_", "-").lower()
    if not name.startswith("-"):
        return f"{argument!r} belongs to no flag: see --help"
    flags, other = list(flags), OTHER_NAMES.get(name)
    close = [other] if other in flags else difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
    return f"there is no flag {name}" + (f"; did you mean {close[0]}?" if close else ": see --help")


def check(config, values: typing.Mapping | None = None) -> None:
    """Raises ValueError, naming the flag, for a value that is not among its choices or not in its range.

    values: {field: value}, if `config` is a class; by default the values of the instance `config`.
    """
    values = vars(config) if values is None else values
    for field in (field for field in dataclasses.fields(config) if field.name in values):
        value, meta = values[field.name], field.metadata
        if meta.get("choices") and value not in meta["choices"]:
            raise ValueError(f"{flag_of(field)} is '{value}'; choose one of {', '.join(map(str, meta['choices']))}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise ValueError(f"{flag_of(field)} is {value}; it must be a finite number")
        for bound, holds in RANGE.items():
            if bound in meta and not holds(value, meta[bound]):
                raise ValueError(f"{flag_of(field)} is {value}; it must be {bound.replace('_', ' ')} {meta[bound]}")


def flag_of(field: dataclasses.Field) -> str:
    """The flag of a field, `--group-size`."""
    return "--" + field.metadata.get("flag", field.name).replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, config: type, show_all: bool = True) -> None:
    """Adds a flag for each field of a dataclass with a help text; unless `show_all`, help shows only common ones."""
    group = parser.add_argument_group(config.__doc__.splitlines()[0].rstrip("."))
    types_of = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if "help" not in field.metadata:
            continue
        shown = help_of(field) if show_all or field.metadata.get("common") else argparse.SUPPRESS
        # The namespace contains no defaults: an absent flag was not given, so the defaults of the layers apply.
        shared = {"dest": field.name, "default": argparse.SUPPRESS, "help": shown}
        kind = _plain_type(types_of[field.name])
        if kind is bool:
            group.add_argument(flag_of(field), action=argparse.BooleanOptionalAction, **shared)
        else:
            if "alone" in field.metadata:
                shared |= {"nargs": "?", "const": field.metadata["alone"]}
            choices = field.metadata.get("choices")
            group.add_argument(flag_of(field), type=reader_of(kind, field.metadata), choices=choices,
                               metavar=None if choices else kind.__name__.upper(), **shared)


def reader_of(kind: type, meta: typing.Mapping) -> Callable:
    """A function that converts a flag's text, or one of its words, to the value.

    It expands ~, because a shell does not in `--output=~/x`.
    """
    words = {meta.get("unset"): None, meta.get("alone"): meta.get("alone")}

    def read(text: str):
        if text in words:
            return words[text]
        return kind(os.path.expanduser(text) if kind in (str, Path) else text)
    read.__name__ = kind.__name__  # shown in argparse's messages
    return read


def help_of(field: dataclasses.Field) -> str:
    """Help text and default, with % escaped for argparse."""
    default = field.metadata.get("unset") if field.default is None else field.default
    shown = "" if default is None or default == "" else f" (default: {default})"
    return (field.metadata["help"] + shown).replace("%", "%%")


def build(config: type, values: dict):
    """Makes a config from the `values` that are its fields. Raises UserError, naming the flag, for an invalid one."""
    names = {field.name for field in dataclasses.fields(config)}
    own = {name: value for name, value in values.items() if name in names}
    try:
        check(config, own)  # first, so that the message names the flag, not the field
        return config(**own)
    except ValueError as error:
        raise UserError(str(error)) from error


def _plain_type(annotation) -> type:
    """`int` for `int | None`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation
