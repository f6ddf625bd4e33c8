"""Which questions a model cannot answer, because its tokenizer changes their gold SQL.

Some tokenizers compose letters and accents (NFC), remove capitals or accents, or have no token for a letter. A model
then cannot write a name or a cell with these, however well it is trained. A change is harmless if the result stays the
same, as with lower-case keywords; so the changed query is run and compared.
"""

from collections.abc import Sequence

from prompts.answer_format import QUOTED
from prompts.plain_text import encode_answers
from questions.example import Example
from scoring.verdicts import score_predictions


def unwritable(tokenizer, examples: Sequence[Example], executor, matches: Sequence[str]) -> dict[int, str]:
    """{position: where the tokenizer changes it} of the examples without a writable gold query. A gold is writable if
    the tokenizer reproduces it, or if the changed query still matches by one of these comparisons."""
    golds = [(i, gold.strip()) for i, example in enumerate(examples) for gold in example.gold_sqls]
    ids = encode_answers(tokenizer, [gold for _, gold in golds])
    written = [tokenizer.decode(tokens, skip_special_tokens=False).strip() for tokens in ids]
    kept = {i for (i, gold), text in zip(golds, written, strict=True) if text == gold}
    changed = [(i, gold, text) for (i, gold), text in zip(golds, written, strict=True) if i not in kept]
    scores = score_predictions([examples[i] for i, _, _ in changed], [text for _, _, text in changed], executor,
                               matches)
    kept |= {i for (i, _, _), score in zip(changed, scores, strict=True)
             if score.left_out(skip_bad_gold=True) or any(score.correct.values())}
    return {i: _difference(gold, text) for i, gold, text in reversed(changed) if i not in kept}


def unwritable_note(lost: dict[int, str], examples: Sequence[Example], what: str, fate: str) -> str:
    """A sentence on these examples, which names the first."""
    first = min(lost)
    return (f"the model's tokenizer changes the SQL of {len(lost)} of {len(examples)} {what} so that its result is "
            f"another ({examples[first].id}: {lost[first]}): {fate}")


def _difference(a: str, b: str) -> str:
    """Where two queries begin to differ, in quoted text if possible; in ASCII, so that similar letters look different.
    """
    quoted = zip(QUOTED.findall(a), QUOTED.findall(b), strict=False)
    a, b = next(((x, y) for x, y in quoted if x != y), (a, b))
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return " becomes ".join(ascii(text[max(0, start - 8):start + 8]) for text in (a, b))
