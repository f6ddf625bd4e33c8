"""A prompt's style is a small Jinja file. Its output is the user's message; its variables set the rest:

    {% set system %}You write SQLite queries.{% endset %}       the system message (none by default)
    {% set chat = false %}                                      the output skips the model's chat template
    Tables:
    {{ schema }}
    {% if evidence %}
    Note: {{ evidence }}
    {% endif %}
    {{ question }}
    {{ rules }}

Variables
    schema     the tables as CREATE TABLE statements; also schema.compact, schema.with_hints(hints),
               schema.omnisql(hints), and schema.tables, each with a name and columns (name, type, primary_key,
               references, samples, description). A prompt that is too long is rendered again with a shorter schema
    hints      cells that the question mentions, each with table, column, value; filters: hint, compact_hint
    evidence, question
    rules      the answer format of --answer in words; `answer` is the name of that style
Filters: those of Jinja, name (quoted where SQL needs it), literal (a value in SQL), space_out.

Only the file's own text and `rules` may contain control tokens of the tokenizer: other output of {{ }} is plain text.
The template runs in Jinja's sandbox and reads no other file.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common.errors import UserError, read_text
from prompts.plain_text import NONCHARACTERS, enclosed
from prompts.schema_text import compact_hint, full_hint, space_out
from questions.schema import quote_identifier, quote_value

STYLES = ("full", "compact", "finer-sql", "omnisql")  # NAME.jinja beside this file
VARIABLES = ("schema", "hints", "evidence", "question", "rules", "answer")
FILTERS = {"name": quote_identifier, "literal": quote_value, "hint": full_hint, "compact_hint": compact_hint,
           "space_out": space_out}


class Trusted(str):
    """Text that may contain control tokens."""


@dataclass(frozen=True)
class Rendered:
    """A prompt before the chat template; text of users and databases is enclosed, see plain_text.py."""
    body: str
    system: str
    chat: bool


def shipped(style: str) -> str:
    """The text of a style's file."""
    return (Path(__file__).parent / f"{style}.jinja").read_text(encoding="utf-8")


def read_template(file: str) -> str:
    """The text of a user's file. Raises UserError: it cannot be read, or is not a prompt template."""
    text = read_text(Path(file))
    PromptTemplate.of(text, file)
    return text


class PromptTemplate:
    """A compiled template. Raises UserError, one sentence with the file's name, if the template is wrong."""

    def __init__(self, text: str, name: str):
        from jinja2 import StrictUndefined, TemplateSyntaxError, meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.name = name
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_printed, trim_blocks=True,
                                                    lstrip_blocks=True)
        environment.filters |= FILTERS
        del environment.filters["random"], environment.globals["lipsum"]  # a prompt must be the same each time
        text = NONCHARACTERS.sub("", text)
        try:
            used = meta.find_undeclared_variables(environment.parse(text))
            self._template = environment.from_string(text)
        except TemplateSyntaxError as error:
            raise UserError(f"{name}, line {error.lineno}: {error.message}") from error
        unknown = sorted(used - set(VARIABLES) - environment.globals.keys())
        if unknown:
            raise UserError(f"{name} uses {unknown[0]!r}, which is not known; known are {', '.join(VARIABLES)}")
        if "question" not in used:
            raise UserError(f"{name} does not print the question: write {{{{ question }}}} where it belongs")

    @classmethod
    @lru_cache(maxsize=32)
    def of(cls, text: str, name: str) -> "PromptTemplate":
        """A template, compiled once."""
        return cls(text, name)

    def render(self, **variables) -> Rendered:
        """The prompt of a question. Raises UserError: the template fails."""
        try:
            module = self._template.make_module(variables)
            written = Rendered(str(module), str(getattr(module, "system", "")), bool(getattr(module, "chat", True)))
        except Exception as error:  # whatever the user's template raises is reported as theirs
            raise UserError(f"{self.name} fails: {error}") from error
        if written.system and not written.chat:
            raise UserError(f"{self.name} sets system and chat = false, but without a chat there is no system message: "
                            "print its text where it belongs")
        return written


def _printed(value) -> str:
    """The text that {{ }} puts into the prompt."""
    return value if isinstance(value, Trusted) else enclosed(str(value))
