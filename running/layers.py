"""The layers of defaults that a setting's value comes from, in order: a later layer wins.

    kind     what suits this kind of model: tiny, or a pretrained one of some size     settings.py
    bf16     what arithmetic in bf16 needs                                             settings.py
    recipe   the values of --recipe                                                    running/recipes.py
    made_by  what the run that made the policy hands on                                `handed_on`
    resumed  all settings of the run that continues, in place of the layers above      settings.py
    flags    what the command line says

A setting in no layer has the default of its dataclass. train.py uses every layer; evaluate.py, sft.py and ask.py use
`made_by` and `flags`, because they take a policy as it is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields

from prompts.builder import PromptConfig

LAYERS = ("kind", "bf16", "recipe", "made_by", "resumed", "flags")
PROMPTS = tuple(field.name for field in fields(PromptConfig) if field.name != "tables")  # they belong to one database
ANSWERS = ("max_completion_tokens", "lenient_format", "constrain", "turns", "feedback")


def fold(**layers: Mapping) -> dict:
    """{setting: value}, each from the last of LAYERS that contains it; a layer may be left out.

    A layer with a prompt style or a template replaces the template, and its text, of the layers before it.
    """
    values = {}
    for layer in (layers.get(name, {}) for name in LAYERS):
        if {"style", "template"} & layer.keys():
            values.pop("template", None)
            values.pop("template_text", None)
        values |= layer
    return values


def handed_on(run: Mapping | None, names: Iterable[str] = PROMPTS + ANSWERS) -> dict:
    """The settings among `names` that a training run hands on to later uses of its policy: how prompts are written, how
    long answers may be, what limits their words, whether a second try follows, how they are parsed. Empty without a
    run."""
    older = {"descriptions": "off"}  # in runs older than this setting
    return older | {name: run[name] for name in names if name in run} if run else {}
