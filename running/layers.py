"""The layers of defaults that a setting's value comes from, in their one order: a later layer wins.

    kind     what suits this kind of model: tiny, or a pretrained one of some size     settings.py
    bf16     what arithmetic in bf16 needs                                             settings.py
    recipe   what somebody else trains with                                            running/recipes.py
    made_by  what the run that made the policy hands on                                `handed_on`
    resumed  all settings of the run that continues, in place of the layers above      settings.py
    flags    what the command line says

What no layer names has the default of its dataclass. train.py uses every layer; evaluate.py, sft.py and ask.py, which
take a policy as it is, use `made_by` and `flags`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields

from prompts.builder import PromptConfig

LAYERS = ("kind", "bf16", "recipe", "made_by", "resumed", "flags")
PROMPTS = tuple(field.name for field in fields(PromptConfig) if field.name != "tables")  # which name one database's
ANSWERS = ("max_completion_tokens", "lenient_format")


def fold(**layers: Mapping) -> dict:
    """{setting: value}, each from the last of LAYERS that has it; a layer may be left out.

    A layer that names a prompt style or a template replaces the template of the layers before it, with its text.
    """
    values = {}
    for layer in (layers.get(name, {}) for name in LAYERS):
        if {"style", "template"} & layer.keys():
            values.pop("template", None)
            values.pop("template_text", None)
        values |= layer
    return values


def handed_on(run: Mapping | None, names: Iterable[str] = PROMPTS + ANSWERS) -> dict:
    """The settings among `names` that a training run hands on to those who use its policy: how prompts are written, how
    long answers may be and how they are read. Empty without a run."""
    older = {"descriptions": "off"}  # in runs from before there was this setting
    return older | {name: run[name] for name in names if name in run} if run else {}
