"""Text of users and databases is never a control token.

A tokenizer takes `<|im_end|>` for the end of a turn wherever it stands, in a question or a cell too. `guarded` puts
a mark behind the first character of each such string, and `encode` cuts the text there and encodes piece by piece:
what was cut becomes the tokens of plain text and decodes to what was written (in the way of SentencePiece, with a
blank at the cut). Text without such strings is one piece, so its tokens are those it always had. The option
`split_special_tokens` of tokenizers is no help: it splits the control tokens of the chat template as well, and leaves
`<think>` whole, which is an added token but no special one.
"""

import re
from collections.abc import Iterable

MARK = "\ufdd0"  # a noncharacter of Unicode: it stands for nothing, and no text may hold it
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which no tokenizer takes
_TAG = re.compile(r"[<\[|｜◁]")  # tells added tokens that steer from those for numbers or runs of blanks


def control_tokens(tokenizer) -> tuple[str, ...]:
    """All strings that a tokenizer would take for a control token; none without a tokenizer."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {str(token) for token in added if token.special or _TAG.search(str(token))}
    tokens.update(map(str, getattr(tokenizer, "all_special_tokens", ())))
    return tuple(sorted(token for token in tokens if len(token) > 1))  # a single character cannot be cut


def guarded(text: str, control: tuple[str, ...]) -> str:
    """The text with a mark in all that would be a control token; `encode` takes it from there."""
    text = _SURROGATE.sub("\ufffd", text.replace(MARK, ""))
    if not control:
        return text
    openings = re.compile("[" + re.escape("".join(sorted({token[0] for token in control}))) + "]")
    return openings.sub(lambda found: found[0] + MARK * text.startswith(control, found.start()), text)


def encode(tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    """The ids of a text that may have been guarded; no token that ends it is added."""
    first, *rest = text.split(MARK)
    ids = list(tokenizer(first, add_special_tokens=add_special_tokens)["input_ids"])
    if add_special_tokens and ids and ids[-1] == getattr(tokenizer, "eos_token_id", None):
        ids.pop()  # some tokenizers end every text; the answer is still to come
    for piece in rest:
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def encode_answers(tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """The ids of answers that are taught: the tags around the reasoning are tokens, all else is plain text."""
    control = tuple(token for token in control_tokens(tokenizer) if token not in ("<think>", "</think>"))
    return [encode(tokenizer, guarded(text, control)) for text in texts]
