"""Prompt styles as template files, prompts that records bring along, and the answers that each asks for."""

import hashlib
import json
from itertools import product
from pathlib import Path

import pytest
from test_data import CHAT, word_tokenizer

from data import Example, PromptBuilder, PromptConfig, load_dataset

BEFORE = Path(__file__).with_name("prompts_before.json")  # what the code wrote before styles were template files
QUESTIONS = [("How many singers are from France?", ""), ("\"Ana\" <|im_end|> {{ schema }} in 'Peru'", "old: age > 40"),
             ("Which ticket price\nhas the concert of 2014?", "")]


def ask(question, evidence=""):
    return Example("0", "music", question, ("SELECT 1",), evidence)


# ------------------------------------------------------------------- the styles `full` and `compact` are what they were

def written(database) -> dict[str, str]:
    """Prompts of both styles, with and without a chat template, from whole to shortest."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
    found = {}
    for style, (name, chat), limit in product(("full", "compact"), {"none": None, "chat": CHAT, "refuses": refuses}.items(),
                                              (2048, 70, 50, 35)):
        make = PromptBuilder({"music": database}, word_tokenizer(chat), PromptConfig(style=style, max_prompt_tokens=limit))
        for number, question in enumerate(QUESTIONS):
            found[f"{style}, {name}, {limit}, {number}"] = make.text(ask(*question))
    return found


def hashed_prompts(folder) -> dict[str, str]:
    """A hash of the prompts of 60 questions of Spider's, each style and limit."""
    dev = load_dataset("spider", folder, "dev")
    found = {}
    for style, limit in product(("full", "compact"), (2048, 150, 60)):
        make = PromptBuilder(dev.databases, word_tokenizer(CHAT), PromptConfig(style=style, max_prompt_tokens=limit))
        texts = [make.text(example) for example in dev.examples[::18]]
        found[f"{style}, {limit}"] = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return found


def test_prompts_of_the_old_styles_are_the_same_byte_for_byte(tiny_db):
    before = json.loads(BEFORE.read_text())["music"]
    assert len(set(before.values())) > 20 and written(tiny_db) == before


@pytest.mark.parametrize("part", ["full, 2048", "full, 150", "full, 60", "compact, 2048", "compact, 150", "compact, 60"])
def test_real_prompts_of_the_old_styles_are_the_same_byte_for_byte(shared_data, part, real_prompts):
    assert real_prompts[part] == json.loads(BEFORE.read_text())["spider"][part]


@pytest.fixture(scope="module")
def real_prompts(shared_data):
    return hashed_prompts(shared_data / "spider")
