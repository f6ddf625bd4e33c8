"""From frozen dataclasses to command-line flags and back, so that help text, documentation and code are one.

A field `group_size: int = field(default=8, metadata={"help": ...})` becomes `--group-size N`. Metadata may also hold
`choices`, `flag` (a name other than the field's) and `alone` (the value of the flag without one).
"""

import argparse
import dataclasses
import types
import typing


def flag_of(field: dataclasses.Field) -> str:
    """The flag of a field, `--group-size`."""
    return "--" + field.metadata.get("flag", field.name).replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, config: type) -> None:
    """Adds a flag for every field of a dataclass that has a help text."""
    group = parser.add_argument_group(config.__doc__.splitlines()[0].rstrip("."))
    types_of = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if "help" not in field.metadata:
            continue
        # Defaults are left out of the namespace: what is absent was not given, so other defaults may apply.
        common = {"dest": field.name, "default": argparse.SUPPRESS, "help": help_of(field)}
        kind = _plain_type(types_of[field.name])
        if kind is bool:
            group.add_argument(flag_of(field), action=argparse.BooleanOptionalAction, **common)
        else:
            if "alone" in field.metadata:
                common |= {"nargs": "?", "const": field.metadata["alone"]}
            group.add_argument(flag_of(field), type=kind, choices=field.metadata.get("choices"),
                               metavar=None if field.metadata.get("choices") else kind.__name__.upper(), **common)


def help_of(field: dataclasses.Field) -> str:
    """Help text and default, with % safe for argparse."""
    default = "" if field.default is None or field.default == "" else f" (default: {field.default})"
    return (field.metadata["help"] + default).replace("%", "%%")


def build(config: type, values: dict):
    """Makes a config from those of `values` that are its fields."""
    names = {field.name for field in dataclasses.fields(config)}
    return config(**{name: value for name, value in values.items() if name in names})


def _plain_type(annotation) -> type:
    """`int` for `int | None`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation
