"""Text of users and databases is never a control token.

A tokenizer reads `<|im_end|>` as the end of a turn wherever it occurs, even in a question or a cell. `guarded` puts
a mark after the first character of each such string, and `encode` splits the text there and encodes each piece:
the string becomes tokens of plain text and decodes to itself (with SentencePiece, with a blank at the split). Text
without such strings is one piece, so its tokens do not change. The option `split_special_tokens` of tokenizers does
not help: it also splits the control tokens of the chat template, and it does not split `<think>`, which is an added
token but not a special one.
"""

import re
from collections.abc import Iterable

MARK = "\ufdd0"  # a noncharacter of Unicode: it has no meaning, and no text may contain it
OPEN, CLOSE = "\ufdd1", "\ufdd2"  # two more: they enclose text of users and databases
NONCHARACTERS = re.compile("[\ufdd0-\ufdd2]")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which no tokenizer accepts
_TAG = re.compile(r"[<\[|｜◁]")  # distinguishes control tokens from added tokens for numbers or runs of blanks


def control_tokens(tokenizer) -> tuple[str, ...]:
    """All strings that a tokenizer would read as a control token; none without a tokenizer."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {str(token) for token in added if token.special or _TAG.search(str(token))}
    tokens.update(map(str, getattr(tokenizer, "all_special_tokens", ())))
    return tuple(sorted(token for token in tokens if len(token) > 1))  # a single character cannot be split


def guarded(text: str, control: tuple[str, ...]) -> str:
    """The text with a mark inside each string that would be a control token, for `encode`."""
    return guarded_inside(enclosed(text), control)


def enclosed(text: str) -> str:
    """A text of users or databases between OPEN and CLOSE."""
    return OPEN + NONCHARACTERS.sub("", text) + CLOSE


def guarded_inside(text: str, control: tuple[str, ...]) -> str:
    """As `guarded`, but only the parts between OPEN and CLOSE come from users and databases: a control token without
    a character of theirs is left unchanged."""
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
    """The ids of a text that may be guarded, without an EOS token at the end."""
    first, *rest = text.split(MARK)
    ids = list(tokenizer(first, add_special_tokens=add_special_tokens)["input_ids"])
    if add_special_tokens and ids and ids[-1] == getattr(tokenizer, "eos_token_id", None):
        ids.pop()  # some tokenizers append EOS; the answer follows
    for piece in rest:
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def encode_answers(tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """The ids of cold-start answers: the tags around the reasoning are tokens, all else is plain text."""
    control = tuple(token for token in control_tokens(tokenizer) if token not in ("<think>", "</think>"))
    return [encode(tokenizer, guarded(text, control)) for text in texts]
