"""From a question and its database to the prompt a policy reads.

A style is a template beside this file, or your own (see prompt_template.py, docs/prompts.md). `full` is for
pretrained models: CREATE TABLE statements with types, keys, descriptions and sample values, the cells the question
mentions, the evidence, the question and the rules of the answer, inside the tokenizer's chat template if it has one.
`compact` is for the tiny from-scratch policy:

    singer ( singer_id , name , country ) concert ( concert_id , singer_id > singer . singer_id , year )
    hint : singer . country = 'France'
    question : How many singers are from France ?
    answer :

`finer-sql` and `omnisql` have the layout of published models. A record's own `messages` or `prompt` are used
unchanged.

A prompt that is too long is shortened, never cut. These are removed, in this order:
    (1) descriptions of columns;
    (2) sample values;
    (3) columns that neither the question or evidence, nor a hint, nor a key mentions;
    (4) tables of which nothing is mentioned: no word of the name, no column and no cell;
    (5) tables of which neither the whole name nor a cell is mentioned, if others remain.
Tables that a mentioned table's foreign keys point to stay, and so do tables that link two mentioned ones. A question
whose prompt still does not fit is left out of training, with a note; evaluate.py counts it as a wrong answer.
`--tables` names the only tables that prompts may show.

Text of users and databases is plain text, whatever it looks like (see plain_text.py): control tokens come only from the
chat template and the template's own text. The gold SQL is never read here.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from common.errors import UserError
from common.options import check, option
from prompts.answer_format import ANSWER_STYLES, AnswerFormat
from prompts.chat import chat_text
from prompts.descriptions import described
from prompts.plain_text import MARK, control_tokens, encode, guarded, guarded_inside
from prompts.prompt_template import STYLES, PromptTemplate, Trusted, read_template, shipped
from prompts.schema_text import SchemaText, full_schema, space_out
from questions.example import Example
from questions.schema import (
    STOP_WORDS,
    UNSPACED,
    Hint,
    Schema,
    ValueIndex,
    fold,
    read_schema,
    value_index,
    words,
)

__all__ = ["PromptBuilder", "PromptConfig", "full_schema", "mentioned_tables", "needed_columns", "needed_tables",
           "only_tables", "space_out"]

SHORTENINGS = range(6)  # how far a prompt is shortened: 0 is the whole prompt
ANSWER = "\ufdd3"  # stands for an answer in a chat, a noncharacter as those of plain_text.py
OF_A_STYLE = {"omnisql": "fence"}  # the answer style of a shipped prompt style, if not think-sql


@dataclass(frozen=True)
class PromptConfig:
    """How prompts are written, and the answers to them."""
    style: str = option("auto", "full, compact, the layout of published models, or auto: full when the tokenizer has a "
                                "chat template, else compact", flag="prompt_style", choices=("auto", *STYLES))
    template: str = option("", "a prompt style of your own: a Jinja file, see docs/prompts.md", flag="prompt_template")
    answer_style: str = option("auto", "how answers are written and read; auto: fence for omnisql, else think-sql",
                               flag="answer", choices=("auto", *ANSWER_STYLES))
    descriptions: str = option("auto", "descriptions of columns; auto: BIRD's files where they lie beside the "
                                       "database; on: else the names in tables.json", choices=("auto", "on", "off"))
    tables: str = option("", "show these tables only, a,b (default: all)")
    sample_values: int = option(3, "sample values shown per column in the full style", at_least=0, at_most=5)
    max_value_hints: int = option(6, "at most this many cells that the question mentions", at_least=0)
    max_prompt_tokens: int = option(2048, "longer prompts are shortened (descriptions, sample values, then columns, "
                                          "then tables that nothing mentions); what is still too long is left out of "
                                          "training, and wrong in an evaluation", at_least=1, common=True)
    template_text: str = ""  # the content of the file `template`, so that a run stores it

    def __post_init__(self):
        check(self)
        # A run records the actual style, not `auto`; only this call can set a field of a frozen dataclass.
        if self.answer_style == "auto":
            answer = "think-sql" if self.template else OF_A_STYLE.get(self.style, "think-sql")
            object.__setattr__(self, "answer_style", answer)
        if self.template and not self.template_text:
            object.__setattr__(self, "template_text", read_template(self.template))

    @property
    def table_names(self) -> list[str]:
        """The names in `tables`; a name with a comma is in double quotes."""
        names = next(csv.reader([self.tables], skipinitialspace=True), [])
        return [name.strip() for name in names if name.strip()]


class PromptBuilder:
    """Writes prompts; reads a database once, at its first question."""

    def __init__(self, databases: Mapping[str, Path], tokenizer, config: PromptConfig | None = None):
        config = config or PromptConfig()
        self.databases = databases
        self.tokenizer = tokenizer
        self.config = config
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))
        automatic = "full" if self.has_chat_template else "compact"
        self.style = config.template or (automatic if config.style == "auto" else config.style)
        self.template_text = config.template_text or shipped(self.style)
        self._template = PromptTemplate.of(self.template_text, config.template or f"{self.style}.jinja")
        self._control = control_tokens(tokenizer)
        self._templated: bool | None = None  # whether this style's prompts are chats
        self._schemas: dict[str, Schema] = {}
        self._indexes: dict[str, ValueIndex] = {}  # as old as the schemas, even if a live writer changes the file
        self._schema_texts: dict[tuple[str, int], SchemaText] = {}
        for db_id in databases if config.table_names else ():  # reports a wrong name before the first question
            self.schema(db_id)

    def text(self, example: Example) -> str:
        """The prompt as the model sees it, shortened if necessary (it may still be too long, see `encode`)."""
        return self._fit(example)[0].replace(MARK, "")

    def encode(self, example: Example) -> list[int] | None:
        """The prompt's token ids, or None if it does not fit even after shortening."""
        ids = self._fit(example)[1]
        return ids if len(ids) <= self.config.max_prompt_tokens else None

    def encode_all(self, examples: Iterable[Example]) -> tuple[list[tuple[Example, list[int]]],
                                                               tuple[str, ...]]:
        """The examples whose prompt fits, with their token ids, and a note about those left out."""
        encoded = [(example, self.encode(example)) for example in examples]
        kept = [(example, ids) for example, ids in encoded if ids is not None]
        if len(kept) == len(encoded):
            return kept, ()
        return kept, (f"left out {len(encoded) - len(kept)} of {len(encoded)} questions: their prompt, even "
                      f"shortened, is longer than {self.config.max_prompt_tokens} tokens",)

    def turn(self, example: Example, said: str, ends: Iterable[str]) -> list[int]:
        """The token ids between an answer to this prompt and the next one, if the user says this in between: a message
        in a chat, else a line of its own. The token that ended the answer, one of `ends`, is not among them."""
        said = guarded(said, self._control)
        if not self._in_chat(example):
            return self._ids(f"\n{said}\n{'answer :' if self.style == 'compact' else 'Answer:'}\n", templated=True)
        chat = self._wrap([("user", "question"), ("assistant", ANSWER), ("user", said)])
        after = chat.partition(ANSWER)[2].lstrip()
        end = next((end for end in ends if after.startswith(end)), "")
        return self._ids(after.removeprefix(end), templated=True)

    def _in_chat(self, example: Example) -> bool:
        """Whether this prompt is a chat in the model's template."""
        if example.messages or example.prompt:
            return bool(example.messages) and self.has_chat_template
        if self._templated is None:
            self._templated = self._written(example, [], 0)[1]
        return self._templated

    def hints(self, example: Example) -> list[Hint]:
        """The cells of the database that the question or the evidence mentions."""
        if not self.config.max_value_hints:
            return []
        index = self._indexes.get(example.db_id)
        if index is None:
            index = self._indexes[example.db_id] = value_index(self.databases[example.db_id])
        shown = {table.name for table in self.schema(example.db_id).tables} if self.config.table_names else None
        return index.hints(_mentioning(example), self.config.max_value_hints, shown)

    def schema(self, db_id: str) -> Schema:
        """The tables that prompts may show, with the descriptions of their columns."""
        if db_id not in self._schemas:
            schema = self._shown_tables(read_schema(self.databases[db_id]), db_id)
            self._schemas[db_id] = described(schema, self.databases[db_id], self.config.descriptions)
        return self._schemas[db_id]

    def _shown_tables(self, schema: Schema, db_id: str) -> Schema:
        """The schema with only the tables of --tables, all by default. Raises UserError: there is no such table."""
        wanted = self.config.table_names
        if not wanted:
            return schema
        known = {table.name.lower(): table.name for table in schema.tables}
        for name in wanted:
            if name.lower() not in known:
                names = ", ".join(list(known.values())[:20]) + (" and others" if len(known) > 20 else "")
                raise UserError(f"--tables: {self.databases[db_id]} has no table {name!r}; it has {names}")
        return only_tables(schema, {name.lower() for name in wanted})

    def protocol(self) -> dict:
        """The settings that the prompts depend on, for an evaluation's protocol."""
        names = ("answer_style", "descriptions", "tables", "sample_values", "max_value_hints", "max_prompt_tokens")
        return {"prompt_style": Path(self.style).name, "template": sha256(self.template_text.encode()).hexdigest()[:16],
                **{name: getattr(self.config, name) for name in names}}

    # ------------------------------------------------------------------------------------ shortening

    def _fit(self, example) -> tuple[str, list[int]]:
        """(text, token ids) of the first prompt that fits, in the order of shortening; the shortest if none fits."""
        if example.messages or example.prompt:
            return self._ready_made(example)
        hints, text = self.hints(example), None
        for level in SHORTENINGS:
            shorter, templated = self._written(example, hints, level)
            if shorter == text:
                continue  # nothing of this kind was left to remove
            text, ids = shorter, self._ids(shorter, templated)
            if len(ids) <= self.config.max_prompt_tokens:
                break
        return text, ids

    def _schema_text(self, example, hints, level) -> SchemaText:
        """The schema at a level of shortening: 0 complete, 1 no descriptions, 2 no sample values, 3 fewer columns,
        4 and 5 fewer tables."""
        key = (example.db_id, level)
        if key in self._schema_texts:
            return self._schema_texts[key]
        schema = self.schema(example.db_id)
        if level >= 1:
            schema = without_descriptions(schema)
        if level >= 3:  # depends on the question, so it is not cached
            if level >= 4:
                schema = needed_tables(schema, mentioned_tables(schema, _mentioning(example), hints)[level - 4])
            schema = needed_columns(schema, _mentioning(example), hints)
        text = SchemaText(schema, self.config.sample_values if level < 2 else 0)
        if level < 3:
            self._schema_texts[key] = text
        return text

    # --------------------------------------------------------------------------------------- writing

    def _written(self, example, hints, level) -> tuple[str, bool]:
        """The prompt with a schema of this level, and whether the chat template was applied."""
        answer = self.config.answer_style
        rendered = self._template.render(
            schema=self._schema_text(example, hints, level), hints=hints, evidence=example.evidence,
            question=example.question, rules=Trusted(AnswerFormat(answer).rules), answer=answer)
        body = guarded_inside(rendered.body, self._control)
        if not rendered.chat:
            return body, False
        system = guarded_inside(rendered.system, self._control)
        return self._wrap([("system", system)] * bool(system) + [("user", body)]), self.has_chat_template

    def _ready_made(self, example) -> tuple[str, list[int]]:
        """The record's own prompt. `prompt` and `messages` are plain text; only a system message may contain the tags
        around the reasoning."""
        if example.prompt:
            text = guarded(example.prompt, self._control)
            return text, self._ids(text, templated=False)
        no_tags = tuple(token for token in self._control if token not in ("<think>", "</think>"))
        text = self._wrap([(role, guarded(content, no_tags if role == "system" else self._control))
                           for role, content in example.messages])
        return text, self._ids(text, self.has_chat_template)

    def _wrap(self, messages: list[tuple[str, str]]) -> str:
        """A chat of (role, content) in the tokenizer's chat template, ready for the answer."""
        if not self.has_chat_template:
            return "\n\n".join(content for _, content in messages) + "\n\nAnswer:\n"
        text = chat_text(self.tokenizer, messages)
        if self.config.answer_style == "fence":
            return text
        # Templates of reasoning models may open <think>, close it, or do both: ours is part of the answer.
        return re.sub(r"(<think>\s*)?(</think>\s*)?$", "", text)

    def _ids(self, text: str, templated: bool) -> list[int]:
        """Token ids; a chat template writes its own special tokens, so none are added.

        Without a tokenizer (while its training text is written) every prompt fits.
        """
        if self.tokenizer is None:
            return []
        return encode(self.tokenizer, text, add_special_tokens=not templated)


# ------------------------------------------------------------------------------------------- shortening

def without_descriptions(schema: Schema) -> Schema:
    """The schema without the descriptions of its columns."""
    return Schema(tuple(replace(table, columns=tuple(replace(column, description="") for column in table.columns))
                        for table in schema.tables))


def needed_columns(schema: Schema, text: str, hints: Iterable[Hint]) -> Schema:
    """The schema with only the columns that the text, a hint or a key mentions, else a table's first column."""
    spoken = _spoken(text)
    hinted = {(hint.table, hint.column) for hint in hints}
    targets = {(table.lower(), column.lower()) for source in schema.tables for key in source.columns
               for table, column in key.references}

    def needed(table, column):
        is_key = (column.primary_key or column.references
                  or (table.name.lower(), column.name.lower()) in targets)
        return is_key or (table.name, column.name) in hinted or _is_mentioned(column.name, spoken)

    return Schema(tuple(
        replace(table, columns=tuple(column for column in table.columns if needed(table, column)) or table.columns[:1])
        for table in schema.tables))


def mentioned_tables(schema: Schema, text: str, hints: Iterable[Hint]) -> tuple[set[str], set[str]]:
    """Two sets of tables (lower case): those of which a word of the name, a column or a cell is mentioned; and among
    these, those mentioned by their whole name or a cell, or all if there are none."""
    spoken, hinted = _spoken(text), {hint.table.lower() for hint in hints}
    somehow, wholly = set(hinted), set(hinted)
    for table in schema.tables:
        name, parts = table.name.lower(), [part for part in _parts(table.name) if part not in STOP_WORDS]
        if fold(name) in spoken or parts and all(_forms(part) & spoken for part in parts):
            wholly.add(name)
        if any(_is_mentioned(known, spoken) for known in (table.name, *(column.name for column in table.columns))):
            somehow.add(name)
    somehow |= wholly
    return somehow, wholly or somehow


def needed_tables(schema: Schema, mentioned: set[str]) -> Schema:
    """The schema with the mentioned tables, those that their foreign keys point to, and those that link two of them;
    unchanged if none is mentioned."""
    targets = {table.name.lower(): {target.lower() for column in table.columns for target, _ in column.references}
               for table in schema.tables}
    linking = {name for name, pointed_to in targets.items() if len(pointed_to & mentioned) > 1}
    pointed_to = {target for name in mentioned & targets.keys() for target in targets[name]}
    return only_tables(schema, mentioned | linking | pointed_to) if mentioned else schema


def only_tables(schema: Schema, names: set[str]) -> Schema:
    """The schema with only the tables of these names (lower case), without foreign keys to others."""
    def told(column):
        return replace(column, references=tuple(pair for pair in column.references if pair[0].lower() in names))

    return Schema(tuple(replace(table, columns=tuple(map(told, table.columns)))
                        for table in schema.tables if table.name.lower() in names))


def _spoken(text: str) -> set[str]:
    """The words of a text, and their singulars."""
    return {form for word in words(text) for form in _forms(word)}


def _forms(word: str) -> set[str]:
    """A word and what its singular may be."""
    return {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)} - {""}


def _parts(name: str) -> list[str]:
    """The words in a name: "HomeTown" and "home_town" have "home" and "town"."""
    return words(re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name))


def _is_mentioned(name: str, spoken: set[str]) -> bool:
    """Whether a significant word of the name occurs: "HomeTown" by "town", "城市" within a longer word."""
    if UNSPACED.search(name) and any(fold(name) in word for word in spoken):
        return True
    return fold(name) in spoken or any(_forms(part) & spoken for part in _parts(name)
                                         if len(part) > 2 and part not in STOP_WORDS)


def _mentioning(example) -> str:
    """The user's text: question and evidence."""
    return f"{example.question} {example.evidence}"
