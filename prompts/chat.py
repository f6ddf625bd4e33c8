"""A chat as the model's own template writes it, with a check that no message is lost.

Templates differ: one refuses a system message (Gemma's), another drops it silently, a third expects the content of a
message in parts and drops plain text. So a chat is written in several ways, the plainest first, until the result
contains the text of each message.
"""

from collections.abc import Iterator
from datetime import datetime

from common.errors import UserError

# Some templates, as Llama's, print the date from a variable or a function: a fixed date keeps prompts the same. A macro
# shadows the function of transformers, because transformers converts functions passed to it into text.
DAY = datetime(2024, 7, 26)
DATE = DAY.strftime("%d %b %Y")
CODES = ("%-d", *(f"%{letter}" for letter in "aAbBdeHIjmMpSyY"))
STRFTIME_NOW = ("{%- macro strftime_now(format) -%}{{ format"
                + "".join(f" | replace('{code}', '{DAY.strftime(code)}')" for code in CODES) + " }}{%- endmacro -%}")


def chat_text(tokenizer, messages: list[tuple[str, str]], answer_follows: bool = True) -> str:
    """A chat of (role, content) in the tokenizer's chat template, by default ready for the answer.

    Raises UserError: the template fails, or leaves out a message.
    """
    problem = ""
    for chat in _ways(messages):
        written = [{"role": role, "content": content} for role, content in chat]
        try:
            template = tokenizer.get_chat_template()
            if "strftime_now" in template:
                template = STRFTIME_NOW + template
            text = tokenizer.apply_chat_template(written, chat_template=template, tokenize=False,
                                                 add_generation_prompt=answer_follows, date_string=DATE)
        except Exception as error:  # whatever a model's template raises is reported as its own
            problem = problem or f"fails ({error})"
            continue
        lost = _left_out(text, chat)
        if not lost:
            return text
        problem = problem or f"leaves out what the {lost}'s message says"
    raise UserError(f"the model's chat template {problem}; --prompt-style compact goes without it, as does a record's "
                    "own 'prompt'")


def _ways(messages: list[tuple[str, str]]) -> Iterator[list[tuple]]:
    """The chat unchanged; with the system message inside the user's; and both with each content in parts."""
    ways = [messages]
    if messages[0][0] == "system" and len(messages) > 1:
        (_, system), (role, first), *rest = messages
        ways.append([(role, f"{system}\n\n{first}"), *rest])
    yield from ways
    for way in ways:
        yield [(role, [{"type": "text", "text": content}]) for role, content in way]


def _left_out(text: str, chat: list[tuple]) -> str:
    """The role of a message whose text is missing in `text`; empty if none is."""
    contents = [(role, content if isinstance(content, str) else content[0]["text"]) for role, content in chat]
    for role, content in sorted(contents, key=lambda message: -len(message[1])):
        if content.strip() not in text:  # templates strip blanks around it
            return role
        text = text.replace(content.strip(), "", 1)  # a shorter message may repeat this text
    return ""
