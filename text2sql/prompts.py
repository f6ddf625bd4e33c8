"""From a question and its database to the prompt a policy reads.

Two styles. `full` is for pretrained models: CREATE TABLE statements with types, keys and sample values,
the cells the question mentions, the evidence, the question and the rules of the answer, inside the
tokenizer's chat template when it has one. `compact` is for the tiny from-scratch policy:

    singer ( singer_id , name , country ) concert ( concert_id , singer_id > singer . singer_id , year )
    hint : singer . country = 'France'
    question : How many singers are from France ?
    answer :

A prompt that is too long is shortened, never cut: (1) sample values go, (2) columns go that neither the
question or evidence, nor a hint, nor a key mentions. What still does not fit is left out and counted.
The gold SQL is never read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from running.errors import UserError
from text2sql.example import Example
from text2sql.schema import (
    STOP_WORDS,
    Column,
    Hint,
    Schema,
    Table,
    quote_identifier,
    quote_value,
    read_schema,
    value_index,
    words,
)

SYSTEM = "You are an expert in SQLite. You answer questions about a database by writing one SQLite query."
RULES = ("First reason step by step inside <think> and </think>. Then write exactly one SQLite query that "
         "answers the question, and nothing else: no code fence, no comment, no explanation.")


@dataclass(frozen=True)
class PromptConfig:
    """How prompts are written."""
    style: str = field(default="auto", metadata={
        "help": "full, compact, or auto: full when the tokenizer has a chat template, else compact",
        "flag": "prompt_style", "choices": ("auto", "full", "compact")})
    sample_values: int = field(default=3, metadata={
        "help": "sample values shown per column in the full style (0 to 5)"})
    max_value_hints: int = field(default=6, metadata={
        "help": "at most this many cells that the question mentions"})
    max_prompt_tokens: int = field(default=2048, metadata={
        "help": "longer prompts are shortened (sample values, then columns nothing mentions), else left out"})

    def __post_init__(self):
        if self.style not in ("auto", "full", "compact"):
            raise UserError(f"prompt style must be auto, full or compact, not {self.style!r}")
        if not 0 <= self.sample_values <= 5:
            raise UserError(f"sample_values must be 0 to 5, not {self.sample_values}")
        if self.max_value_hints < 0 or self.max_prompt_tokens < 1:
            raise UserError("max_value_hints must be at least 0 and max_prompt_tokens at least 1")


class PromptBuilder:
    """Writes prompts; reads a database when its first question comes, and only once."""

    def __init__(self, databases: Mapping[str, Path], tokenizer, config: PromptConfig | None = None):
        config = config or PromptConfig()
        self.databases = databases
        self.tokenizer = tokenizer
        self.config = config
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))
        automatic = "full" if self.has_chat_template else "compact"
        self.style = automatic if config.style == "auto" else config.style
        self._schema_texts: dict[tuple[str, int], str] = {}

    def text(self, example: Example) -> str:
        """The prompt as the model sees it, shortened if need be (it may still be too long, see `encode`)."""
        return self._fit(example)[0]

    def encode(self, example: Example) -> list[int] | None:
        """The prompt's token ids, or None when it does not fit even after shortening."""
        ids = self._fit(example)[1]
        return ids if len(ids) <= self.config.max_prompt_tokens else None

    def encode_all(self, examples: Iterable[Example]) -> tuple[list[tuple[Example, list[int]]],
                                                               tuple[str, ...]]:
        """The examples whose prompt fits, with their ids, and a note about those left out."""
        encoded = [(example, self.encode(example)) for example in examples]
        kept = [(example, ids) for example, ids in encoded if ids is not None]
        if len(kept) == len(encoded):
            return kept, ()
        return kept, (f"left out {len(encoded) - len(kept)} of {len(encoded)} questions: their prompt, even "
                      f"shortened, is longer than {self.config.max_prompt_tokens} tokens",)

    def hints(self, example: Example) -> list[Hint]:
        """The cells of the database that the question or the evidence mentions."""
        if not self.config.max_value_hints:
            return []
        index = value_index(self.databases[example.db_id])
        return index.hints(_mentioning(example), self.config.max_value_hints)

    # ------------------------------------------------------------------------------------ shortening

    def _fit(self, example) -> tuple[str, list[int]]:
        """The first prompt that fits, going down the shortening order; the shortest one when none does."""
        hints = self.hints(example)
        for level in (0, 1, 2) if self.style == "full" else (0, 2):  # compact prompts have no sample values
            text = self._wrap(self._body(example, hints, level))
            ids = self._ids(text)
            if len(ids) <= self.config.max_prompt_tokens:
                break
        return text, ids

    def _schema_text(self, example, hints, level) -> str:
        """The database at a shortening level: 0 everything, 1 no sample values, 2 needed columns only."""
        key = (example.db_id, level)
        if key in self._schema_texts:
            return self._schema_texts[key]
        schema = read_schema(self.databases[example.db_id])
        if level == 2:  # depends on the question, so it is not cached
            schema = needed_columns(schema, _mentioning(example), hints)
        if self.style == "full":
            text = full_schema(schema, self.config.sample_values if level == 0 else 0)
        else:
            text = compact_schema(schema)
        if level < 2:
            self._schema_texts[key] = text
        return text

    # --------------------------------------------------------------------------------------- writing

    def _body(self, example, hints, level) -> str:
        """The prompt before the chat template."""
        schema = self._schema_text(example, hints, level)
        if self.style == "compact":
            lines = [schema]
            if hints:
                lines.append("hint : " + " ; ".join(compact_hint(hint) for hint in hints))
            if example.evidence:
                lines.append("evidence : " + space_out(example.evidence))
            return "\n".join([*lines, "question : " + space_out(example.question), "answer :\n"])
        parts = ["Database schema:\n" + schema]
        if hints:
            parts.append("Values in the database that the question mentions:\n"
                         + "\n".join(f"{quote_identifier(hint.table)}.{quote_identifier(hint.column)} = "
                                     f"{quote_value(hint.value)}" for hint in hints))
        if example.evidence:
            parts.append("Evidence: " + example.evidence)
        return "\n\n".join([*parts, "Question: " + example.question, RULES])

    def _wrap(self, body: str) -> str:
        """The body as the tokenizer's chat template wants it, ready for the answer."""
        if self.style == "compact":
            return body
        if not self.has_chat_template:
            return f"{SYSTEM}\n\n{body}\n\nAnswer:\n"
        from jinja2.exceptions import TemplateError
        options = {"tokenize": False, "add_generation_prompt": True}
        system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": body}
        try:
            text = self.tokenizer.apply_chat_template([system, user], **options)
        except TemplateError:  # some templates (Gemma's) refuse a system message
            user["content"] = f"{SYSTEM}\n\n{body}"
            text = self.tokenizer.apply_chat_template([user], **options)
        # Templates of some reasoning models open <think> themselves; ours must be part of the answer.
        return re.sub(r"<think>\s*$", "", text)

    def _ids(self, text: str) -> list[int]:
        """Token ids; a chat template writes its own special tokens, so none are added after it.

        Without a tokenizer (its training text is being written) every prompt counts as short.
        """
        if self.tokenizer is None:
            return []
        templated = self.style == "full" and self.has_chat_template
        ids = list(self.tokenizer(text, add_special_tokens=not templated)["input_ids"])
        if not templated and ids and ids[-1] == getattr(self.tokenizer, "eos_token_id", None):
            ids.pop()  # some tokenizers end every text; the answer is still to come
        return ids


# ------------------------------------------------------------------------------------------- full style

def full_schema(schema: Schema, sample_values: int) -> str:
    """CREATE TABLE statements, sample values as comments."""
    return "\n".join(_create_table(table, sample_values) for table in schema.tables)


def _create_table(table: Table, sample_values: int) -> str:
    """One CREATE TABLE statement."""
    keys = [column for column in table.columns if column.primary_key]
    lines = []
    for column in table.columns:
        definition = " ".join(filter(None, (quote_identifier(column.name), column.type)))
        if [column] == keys:
            definition += " PRIMARY KEY"
        samples = ", ".join(quote_value(value) for value in column.samples[:sample_values])
        lines.append((definition, f"  -- {' '.join(samples.split())}" if samples else ""))
    if len(keys) > 1:
        lines.append((f"PRIMARY KEY ({', '.join(quote_identifier(column.name) for column in keys)})", ""))
    for column in table.columns:
        for target, target_column in column.references:
            lines.append((f"FOREIGN KEY ({quote_identifier(column.name)}) REFERENCES "
                          f"{quote_identifier(target)} ({quote_identifier(target_column)})", ""))
    body = "\n".join(f"  {definition}{',' if number < len(lines) else ''}{comment}"
                     for number, (definition, comment) in enumerate(lines, 1))
    return f"CREATE TABLE {quote_identifier(table.name)} (\n{body}\n);"


# ---------------------------------------------------------------------------------------- compact style

def compact_schema(schema: Schema) -> str:
    """All tables on one line, lower case: `name ( column , column , key > table . column )`."""
    return " ".join(f"{compact_name(table.name)} ( {' , '.join(map(_compact_column, table.columns))} )"
                    for table in schema.tables)


def _compact_column(column: Column) -> str:
    """The column's name and where its first foreign key points."""
    name = compact_name(column.name)
    if not column.references:
        return name
    table, target = column.references[0]
    return f"{name} > {compact_name(table)} . {compact_name(target)}"


def compact_name(name: str) -> str:
    """A name in lower case; SQLite folds the case of ASCII letters only."""
    return quote_identifier(name.lower() if name.isascii() else name)


def compact_hint(hint: Hint) -> str:
    """`table . column = 'value'`."""
    return f"{compact_name(hint.table)} . {compact_name(hint.column)} = {quote_value(hint.value)}"


def space_out(text: str) -> str:
    """The text on one line, spaces around quotes and before the final punctuation, otherwise as it is."""
    text = re.sub(r'["“”‘]|(?<!\w)[\'’]|[\'’](?!\w)', r" \g<0> ", text)
    text = re.sub(r"\s*([?.!]+)\s*$", r" \1", text)
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------- shortening

def needed_columns(schema: Schema, text: str, hints: Iterable[Hint]) -> Schema:
    """The schema with only the columns that the text, a hint or a key mentions; every table stays."""
    spoken = {form for word in words(text) for form in (word, word.removesuffix("s"))}
    hinted = {(hint.table, hint.column) for hint in hints}
    targets = {(table.lower(), column.lower()) for source in schema.tables for key in source.columns
               for table, column in key.references}

    def needed(table, column):
        is_key = (column.primary_key or column.references
                  or (table.name.lower(), column.name.lower()) in targets)
        return is_key or (table.name, column.name) in hinted or _is_mentioned(column.name, spoken)

    return Schema(tuple(Table(table.name, tuple(column for column in table.columns if needed(table, column)))
                        for table in schema.tables))


def _is_mentioned(name: str, spoken: set[str]) -> bool:
    """True when a telling word of the name is spoken: "HomeTown" and "home_town" by "town"."""
    parts = words(re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name))
    return name.lower() in spoken or any(part in spoken or part.removesuffix("s") in spoken for part in parts
                                         if len(part) > 2 and part not in STOP_WORDS)


def _mentioning(example) -> str:
    """Everything the user said: question and evidence."""
    return f"{example.question} {example.evidence}"
