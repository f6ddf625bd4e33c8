"""From a question and its database to the prompt a policy reads.

Two styles. `full` is for pretrained models: CREATE TABLE statements with types, keys and sample values,
the cells the question mentions, the evidence, the question and the rules of the answer, inside the
tokenizer's chat template when it has one. `compact` is for the tiny from-scratch policy:

    singer ( singer_id , name , country ) concert ( concert_id , singer_id > singer . singer_id , year )
    hint : singer . country = 'France'
    question : How many singers are from France ?
    answer :

A prompt that is too long is shortened, never cut, in this order:
    (1) sample values go;
    (2) columns go that neither the question or evidence, nor a hint, nor a key mentions;
    (3) tables go of which nothing is mentioned, be it a word of the name, a column or a cell;
    (4) tables go whose whole name is not mentioned, nor a cell of them, where there are others.
With a mentioned table stay those that its foreign keys point to, and tables that link two mentioned ones. What still
does not fit is left out and counted. `--tables` names the only tables that prompts may show.

What users and databases say is plain text, whatever it looks like (see plain_text.py): control tokens come from the
chat template alone. The gold SQL is never read here.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from running.errors import UserError
from running.options import check, option
from text2sql.example import Example
from text2sql.plain_text import MARK, control_tokens, encode, guarded
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
    style: str = option("auto", "full, compact, or auto: full when the tokenizer has a chat template, else compact",
                        flag="prompt_style", choices=("auto", "full", "compact"))
    tables: str = option("", "show these tables only, a,b (default: all)")
    sample_values: int = option(3, "sample values shown per column in the full style", at_least=0, at_most=5)
    max_value_hints: int = option(6, "at most this many cells that the question mentions", at_least=0)
    max_prompt_tokens: int = option(2048, "longer prompts are shortened (sample values, then columns, then tables that "
                                          "nothing mentions), else left out", at_least=1, common=True)

    def __post_init__(self):
        try:
            check(self)
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def table_names(self) -> list[str]:
        """The names of `tables`; one with a comma in it stands in double quotes."""
        names = next(csv.reader([self.tables], skipinitialspace=True), [])
        return [name.strip() for name in names if name.strip()]


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
        self._control = control_tokens(tokenizer)
        self._schema_texts: dict[tuple[str, int], str] = {}
        for db_id in databases if config.table_names else ():  # a wrong name is told before the first question
            self.schema(db_id)

    def text(self, example: Example) -> str:
        """The prompt as the model sees it, shortened if need be (it may still be too long, see `encode`)."""
        return self._fit(example)[0].replace(MARK, "")

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
        shown = {table.name for table in self.schema(example.db_id).tables} if self.config.table_names else None
        return index.hints(_mentioning(example), self.config.max_value_hints, shown)

    def schema(self, db_id: str) -> Schema:
        """The tables that prompts may show."""
        schema, wanted = read_schema(self.databases[db_id]), self.config.table_names
        if not wanted:
            return schema
        known = {table.name.lower(): table.name for table in schema.tables}
        for name in wanted:
            if name.lower() not in known:
                names = ", ".join(list(known.values())[:20]) + (" and others" if len(known) > 20 else "")
                raise UserError(f"--tables: {self.databases[db_id]} has no table {name!r}; it has {names}")
        return only_tables(schema, {name.lower() for name in wanted})

    # ------------------------------------------------------------------------------------ shortening

    def _fit(self, example) -> tuple[str, list[int]]:
        """The first prompt that fits, going down the shortening order; the shortest one when none does."""
        hints = self.hints(example)
        for level in (0, 1, 2, 3, 4) if self.style == "full" else (0, 2, 3, 4):  # compact ones have no sample values
            text = self._wrap(self._body(example, hints, level))
            ids = self._ids(text)
            if len(ids) <= self.config.max_prompt_tokens:
                break
        return text, ids

    def _schema_text(self, example, hints, level) -> str:
        """The database at a level of shortening: 0 whole, 1 no sample values, 2 fewer columns, 3 and 4 fewer tables."""
        key = (example.db_id, level)
        if key in self._schema_texts:
            return self._schema_texts[key]
        schema = self.schema(example.db_id)
        if level >= 2:  # depends on the question, so it is not cached
            if level >= 3:
                schema = needed_tables(schema, mentioned_tables(schema, _mentioning(example), hints)[level - 3])
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
        """The prompt before the chat template; of its text, only the rules may hold control tokens."""
        schema = self._schema_text(example, hints, level)
        if self.style == "compact":
            lines = [schema]
            if hints:
                lines.append("hint : " + " ; ".join(compact_hint(hint) for hint in hints))
            if example.evidence:
                lines.append("evidence : " + space_out(example.evidence))
            lines += ["question : " + space_out(example.question), "answer :\n"]
            return guarded("\n".join(lines), self._control)
        parts = ["Database schema:\n" + schema]
        if hints:
            parts.append("Values in the database that the question mentions:\n"
                         + "\n".join(f"{quote_identifier(hint.table)}.{quote_identifier(hint.column)} = "
                                     f"{quote_value(hint.value)}" for hint in hints))
        if example.evidence:
            parts.append("Evidence: " + example.evidence)
        parts.append("Question: " + example.question)
        return guarded("\n\n".join(parts), self._control) + "\n\n" + RULES

    def _wrap(self, body: str) -> str:
        """The body as the tokenizer's chat template wants it, ready for the answer."""
        if self.style == "compact":
            return body
        if not self.has_chat_template:
            return f"{SYSTEM}\n\n{body}\n\nAnswer:\n"
        from jinja2.exceptions import TemplateError
        system = {"role": "system", "content": SYSTEM}
        both = {"role": "user", "content": f"{SYSTEM}\n\n{body}"}  # some templates (Gemma's) refuse a system message
        for messages in ([system, {"role": "user", "content": body}], [both]):
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                break
            except TemplateError as error:
                problem = error
        else:
            raise UserError(f"the model's chat template fails ({problem}); --prompt-style compact goes without it")
        # Templates of reasoning models may open <think>, close it, or do both: ours is part of the answer.
        return re.sub(r"(<think>\s*)?(</think>\s*)?$", "", text)

    def _ids(self, text: str) -> list[int]:
        """Token ids; a chat template writes its own special tokens, so none are added after it.

        Without a tokenizer (its training text is being written) every prompt counts as short.
        """
        if self.tokenizer is None:
            return []
        templated = self.style == "full" and self.has_chat_template
        return encode(self.tokenizer, text, add_special_tokens=not templated)


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
    spoken = _spoken(text)
    hinted = {(hint.table, hint.column) for hint in hints}
    targets = {(table.lower(), column.lower()) for source in schema.tables for key in source.columns
               for table, column in key.references}

    def needed(table, column):
        is_key = (column.primary_key or column.references
                  or (table.name.lower(), column.name.lower()) in targets)
        return is_key or (table.name, column.name) in hinted or _is_mentioned(column.name, spoken)

    return Schema(tuple(Table(table.name, tuple(column for column in table.columns if needed(table, column)))
                        for table in schema.tables))


def mentioned_tables(schema: Schema, text: str, hints: Iterable[Hint]) -> tuple[set[str], set[str]]:
    """The tables (lower case) of which a word of the name, a column or a cell is mentioned; of these, those mentioned
    by their whole name or a cell, or all where there are none."""
    spoken, hinted = _spoken(text), {hint.table.lower() for hint in hints}
    somehow, wholly = set(hinted), set(hinted)
    for table in schema.tables:
        name, parts = table.name.lower(), [part for part in _parts(table.name) if part not in STOP_WORDS]
        if name in spoken or parts and all(_forms(part) & spoken for part in parts):
            wholly.add(name)
        if any(_is_mentioned(known, spoken) for known in (table.name, *(column.name for column in table.columns))):
            somehow.add(name)
    somehow |= wholly
    return somehow, wholly or somehow


def needed_tables(schema: Schema, mentioned: set[str]) -> Schema:
    """The schema with the mentioned tables, those that their foreign keys point to, and those that link two of them;
    where none is mentioned, all of it."""
    targets = {table.name.lower(): {target.lower() for column in table.columns for target, _ in column.references}
               for table in schema.tables}
    linking = {name for name, pointed_to in targets.items() if len(pointed_to & mentioned) > 1}
    pointed_to = {target for name in mentioned & targets.keys() for target in targets[name]}
    return only_tables(schema, mentioned | linking | pointed_to) if mentioned else schema


def only_tables(schema: Schema, names: set[str]) -> Schema:
    """The schema with the tables of these names (lower case) alone; foreign keys to others are not told."""
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
    """True when a telling word of the name is spoken: "HomeTown" by "town"."""
    return name.lower() in spoken or any(_forms(part) & spoken for part in _parts(name)
                                         if len(part) > 2 and part not in STOP_WORDS)


def _mentioning(example) -> str:
    """Everything the user said: question and evidence."""
    return f"{example.question} {example.evidence}"
