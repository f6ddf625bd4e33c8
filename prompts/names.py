"""Which words SQL may contain: those of SQLite and the names of one database. A lexical rule, not a grammar.

In the SQL of an answer every word is a keyword or a function of SQLite, a table or column of the database, a number, or
an alias. Punctuation and whatever is in quotes are free. These are aliases:

    a name that the answer has declared    FROM singer AS idols, SELECT COUNT(*) AS number, WITH old AS (…)
    one or two characters                  before a point, s.name, and after a name, FROM singer s
    t1, derived1, …                        everywhere, because they may come before their declaration

A column of a table that the query does not read is a name of the database, too; --constrain scope allows only those
that it can read (scope.py). Until the SQL begins, everything is allowed.

`NameRules(policy, schemas, format).of(db_id)` is a rule as `grpo.sample_groups` takes it. llguidance
(requirements-extra.txt) finds the tokens that keep a text within a regular expression; the expression is ours.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from common.errors import UserError
from prompts.answer_format import AnswerFormat
from prompts.sql_words import KEYWORDS, NAME, NUMBERED, QUOTES, SHORT, functions, one_of
from questions.example import Example
from questions.schema import columns_of

BETWEEN = rf"[\s(),.*=<>!+%|&~/-]|{QUOTES}"  # what may stand between words
DECLARED = re.compile(rf"\bas\s+({NAME})(?=\W)|(?:\b(?:with|recursive)\s+|\)\s*,\s*)({NAME})\s*(?:\([^()]*\)\s*)?as\b",
                      re.IGNORECASE)
QUOTED = re.compile(QUOTES)
PLACE = re.compile(r"(?:\w+\s*\.?\s*)?\w*\Z")
DECLARES = re.compile(r"\b(?:as|with|recursive)\s", re.IGNORECASE)  # before a name
MOST_PLACES = 4096  # remembered per database, 6 KB each with 49,152 tokens
# Where the SQL of an answer begins and what follows it, for each style of answer_format.py
FENCE = r"```(?i:sql(ite)?3?)?\s"
OPENING = {"think-sql": r"</think>", "think-answer": r"</think>\s*<answer>", "fence": FENCE}
CLOSING = {"think-sql": "", "think-answer": r"\s*(```\s*)?</answer>", "fence": r"\s*```"}


class NameRules:
    """The rules of the databases that a policy is asked about."""

    def __init__(self, policy, schemas: Mapping[str, Mapping[str, Iterable[str]]], answer_format: AnswerFormat,
                 scope: bool = False):
        """schemas: {db_id: {table: [column, …]}}. scope: also limit names to what the query can read.
        Raises UserError: llguidance is missing or cannot read the tokenizer."""
        self.schemas, self.style = schemas, answer_format.style
        self.fenced = answer_format.lenient or self.style == "think-answer"
        self.tokens, self.eos = tokens_of(policy), frozenset(policy.eos_ids)
        self.rules: dict[str, NameRule] = {}
        self.scope_of = scope_of(self.tokens, self.eos) if scope else lambda schema: None

    def of(self, db_id: str) -> "NameRule":
        """The rule of a database."""
        if db_id not in self.rules:
            schema = self.schemas[db_id]
            names = [*schema, *(column for columns in schema.values() for column in columns)]
            self.rules[db_id] = NameRule(self, names, self.scope_of(schema))
        return self.rules[db_id]

    def of_all(self, examples: Iterable[Example]) -> "list[NameRule]":
        """The rule of each question."""
        return [self.of(example.db_id) for example in examples]


def name_rules(constrain: str, policy, databases: Mapping[str, Path], answer_format: AnswerFormat) -> NameRules | None:
    """The rules of --constrain; None if it is `none`. Raises UserError as `NameRules`."""
    if constrain == "none":
        return None
    return NameRules(policy, columns_of(databases), answer_format, constrain == "scope")


def scope_of(tokens, eos):
    """A function that makes the ScopeTokens of a schema."""
    from prompts.scope_tokens import ScopeTokens, tokens_that_end_words  # which needs llguidance

    return partial(ScopeTokens, tokens, tokens_that_end_words(tokens, eos))


def tokens_of(policy):
    """llguidance's view of a policy's tokenizer. Raises UserError."""
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise UserError("--constrain needs llguidance: pip install -r requirements-extra.txt") from error
    width = policy.model.get_output_embeddings().weight.shape[0]
    try:
        return from_tokenizer(policy.tokenizer, n_vocab=width, eos_token=list(policy.eos_ids))
    except ValueError as error:
        raise UserError(f"--constrain cannot read this model's tokenizer: {error}") from error


def expression(names: Iterable[str], style: str = "think-sql", fenced: bool = False, ctes: bool = False) -> str:
    """The regular expression of the SQL of an answer, as llguidance reads it. ctes: whether WITH defines tables."""
    known = one_of({*names, *KEYWORDS, *functions()})
    words = "|".join([known, NUMBERED, "[0-9]+([eE][0-9]+)?", rf"(?i:as|with|recursive)\s+{NAME}",
                      rf"({SHORT})\s*\.\s*({known}|{NUMBERED}|[*]|{QUOTES})", rf"{known}\s+({SHORT})"])
    between = BETWEEN
    if ctes:  # ), name AS (
        between += rf"|\)\s*,\s*{NAME}\s*(\([^()]*\)\s*)?(?i:as(\s+(not\s+)?materialized)?)\s*\("
    sql = rf"({between})*(({words})(({between})+({words}))*({between})*)?;?\s*"
    return (rf"\s*({FENCE})?" if fenced else "") + sql + (r"(```\s*)?" if fenced and style == "think-sql" else
                                                           CLOSING[style])


class NameRule:
    """The rule of one database."""

    def __init__(self, rules: NameRules, names: Iterable[str], scope=None):
        """scope: ScopeTokens of the database."""
        self.scope = scope
        self.rules, self.names = rules, frozenset(name.lower() for name in names)
        self.expressions: dict[tuple, str] = {}
        self.known: dict[tuple, object] = {}  # {place: the tokens allowed there}
        self.words = -(-rules.tokens.vocab_size // 32)

    def start(self) -> "Writing":
        """The state of an answer of which nothing is written."""
        return Writing(self)

    def matcher(self, declared: frozenset[str], ctes: bool):
        """llguidance's state at the beginning of the SQL."""
        from llguidance import LLMatcher

        key = declared, ctes
        if key not in self.expressions:
            self.expressions[key] = LLMatcher.grammar_from_regex(
                expression(self.names | declared, self.rules.style, self.rules.fenced, ctes))
        return LLMatcher(self.rules.tokens, self.expressions[key])


class Writing:
    """An answer being written."""

    def __init__(self, rule: NameRule):
        self.rule, self.tokens = rule, rule.rules.tokens
        self.text, self.taken = b"", []  # of the answer, then of its SQL; the SQL's tokens
        self.bare = ""  # the SQL with empty quotes
        self.declared, self.ctes, self.matcher, self.over = frozenset(), False, None, False

    def bits(self):
        """Which tokens may come next, a bit per token: a tensor of int32 [⌈V / 32⌉]; None if all may."""
        if self.matcher is None:
            return None
        bits = self.of_names()
        return self.rule.scope.narrow(bits, self.bare) if self.rule.scope else bits

    def of_names(self):
        """The tokens that keep to the names."""
        import torch  # here, so that scoring a predictions file does not import it

        place = self.place()
        if place in self.rule.known:
            return self.rule.known[place]
        bits = torch.zeros(self.rule.words, dtype=torch.int32)
        self.matcher.unsafe_compute_mask_ptr(bits.data_ptr(), bits.numel() * bits.element_size())
        if place and len(self.rule.known) < MOST_PLACES:
            self.rule.known[place] = bits
        return bits

    def place(self) -> tuple | None:
        """The current word, the one before it, and the names declared: what may come next depends on nothing else. None
        within quotes, where a name is declared, in a query with WITH, and in the other styles of answers."""
        words = PLACE.search(self.bare)[0].lower()
        if (self.ctes or self.rule.rules.style != "think-sql" or re.search(r"[\"`\[;\ufffd]", self.bare)
                or self.bare.count("'") % 2 or DECLARES.match(words)):
            return None
        return words, self.declared

    def take(self, token: int) -> None:
        """Adds the next token of the answer."""
        if self.over or token in self.rule.rules.eos:
            self.over, self.matcher = True, None
            return
        self.text += self.tokens.decode_bytes([token])
        if self.matcher:
            self.go_on([token])
        elif opening := re.search(OPENING[self.rule.rules.style].encode(), self.text):
            self.text, self.matcher = self.text[opening.end():], self.rule.matcher(self.declared, self.ctes)
            self.go_on(self.tokens.tokenize_bytes(self.text))

    def go_on(self, tokens: list[int]) -> None:
        """Adds tokens of the SQL. Names that it has declared become words of the rule."""
        self.taken += tokens
        self.over = not self.matcher.consume_tokens(tokens)
        self.bare = QUOTED.sub("''", self.text.decode(errors="replace"))
        ctes = bool(re.match(r"[\s(]*with\b", self.bare, re.IGNORECASE))
        declared = {name.lower() for pair in DECLARED.findall(self.bare) for name in pair
                    if not re.fullmatch(SHORT, name)}
        declared -= self.rule.names | {""}
        if not self.over and (declared, ctes) != (self.declared, self.ctes):
            self.declared, self.ctes = frozenset(declared), ctes
            self.matcher = self.rule.matcher(self.declared, ctes)
            self.over = not self.matcher.consume_tokens(self.taken)
        if self.over:  # the token that opened the SQL also began a word that is not allowed
            self.matcher = None
