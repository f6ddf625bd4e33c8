"""Which tokens keep a query in scope (scope.py), a bit per token, as names.py has them for names.

A token may go on with the word that is being written, end it, or both and more: ` FROM`, `.name`, ` (SELECT`. So two
states of the reader count: that before this word for all tokens, and that after it for those that end it.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from llguidance import LLMatcher
from torch import Tensor

from prompts.scope import Next, Reader

WRITTEN = re.compile(r"(?:\w+\s*\.\s*)?\w*\s*\Z")  # the word being written, with its qualifier
FENCE = re.compile(r"\A\s*```\w*\s")
ENDS = re.compile(r"[\"`\[;\ufffd]|</")  # within quotes, at the end, or within a letter
MOST = 4096  # of each kind remembered per database; a state of 49,152 tokens takes 6 KB


class ScopeTokens:
    """Those of one database."""

    def __init__(self, tokens, ends_word: Tensor, schema: Mapping[str, Iterable[str]]):
        """tokens: llguidance's view of a tokenizer. ends_word: `tokens_that_end_words`. schema: {table: [column, …]}"""
        self.tokens, self.ends_word, self.reader = tokens, ends_word, Reader(schema)
        self.read: dict[str, Next | None] = {}
        self.begun: dict[Next, LLMatcher] = {}
        self.known: dict[tuple[Next, str], Tensor | None] = {}

    def narrow(self, bits: Tensor, text: str) -> Tensor:
        """Those of the tokens `bits` that keep a text with empty quotes in scope; all of them if none does."""
        text = FENCE.sub("", text)
        if ENDS.search(text) or text.count("'") % 2:
            return bits
        start = WRITTEN.search(text).start()
        word = text[start:].lower()
        found = self.allowed(text[:start], word)
        if word.strip():
            ended = word[-1].isspace()
            then = self.allowed(text + " ", "")
            if found is not None and then is not None:
                found = found & (then if ended else then | ~self.ends_word)
            elif ended:
                found = then
        both = bits if found is None else bits & found
        return both if both.any() else bits

    def allowed(self, text: str, word: str) -> Tensor | None:
        """The tokens that may follow a text and the beginning of a word; None: all."""
        if text not in self.read:
            if len(self.read) >= MOST:
                self.read.clear()
            self.read[text] = self.reader.next(text)
        after = self.read[text]
        if after is None:
            return None
        if (after, word) not in self.known:
            if len(self.known) >= MOST:
                self.known.clear()
            self.known[after, word] = self.compute(after, word)
        return self.known[after, word]

    def compute(self, after: Next, word: str) -> Tensor | None:
        """The tokens by llguidance; None if the word itself is not allowed, which the token before it began."""
        if after not in self.begun:
            grammar = LLMatcher.grammar_from_regex(after.expression())
            self.begun[after] = LLMatcher(self.tokens, grammar, log_level=0)
        matcher = self.begun[after].deep_copy()
        if not matcher.consume_tokens(self.tokens.tokenize_bytes(word.encode())):
            return None
        bits = torch.zeros_like(self.ends_word)
        matcher.unsafe_compute_mask_ptr(bits.data_ptr(), bits.numel() * bits.element_size())
        return bits


def tokens_that_end_words(tokens, eos: Collection[int]) -> Tensor:
    """A bit for each token that begins with something else than a letter, a digit or a point, and for those of EOS."""
    ending = torch.zeros(-(-tokens.vocab_size // 32) * 32, dtype=torch.bool)
    for token in range(tokens.vocab_size):
        ending[token] = token in eos or not re.match(rb"[\w.]", tokens.decode_bytes([token]))
    return (ending.view(-1, 32).long() << torch.arange(32)).sum(1).to(torch.int32)  # [⌈V / 32⌉]
