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
OPEN, CLOSE = "\ufdd1", "\ufdd2"  # two more: between them stands what users and databases say
NONCHARACTERS = re.compile("[\ufdd0-\ufdd2]")
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
    return guarded_inside(enclosed(text), control)


def enclosed(text: str) -> str:
    """A text of users or databases, between the marks that say so."""
    return OPEN + NONCHARACTERS.sub("", text) + CLOSE


def guarded_inside(text: str, control: tuple[str, ...]) -> str:
    """The same for a text of which only the parts between OPEN and CLOSE come from users and databases: a control token
    without a letter of theirs is left as it is."""
    foreign, pieces, is_foreign = False, [], []
    for piece in re.split(f"([{OPEN}{CLOSE}])", text):
        if piece in (OPEN, CLOSE):
            foreign = piece == OPEN
        else:
            pieces.append(piece)
            is_foreign += [foreign] * len(piece)
    plain = _SURROGATE.sub("\ufffd", "".join(pieces))
    if not control:
        return plain

    def marked(found):
        start = found.start()
        touched = any(plain.startswith(token, start) and True in is_foreign[start:start + len(token)]
                      for token in control)
        return found[0] + MARK * touched

    openings = re.compile("[" + re.escape("".join(sorted({token[0] for token in control}))) + "]")
    return openings.sub(marked, plain)


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
