"""How an answer is written and read: one style for the prompt's rules, the cold start, the reward and the evaluation.

    think-sql      <think> reasoning </think> SELECT ...              ours, and FINER-SQL's (arXiv 2605.03465)
    think-answer   <think> reasoning </think> <answer> SELECT ... </answer>, the SQL with or without a fence: SLM-SQL's
                   (arXiv 2507.22478)
    fence          reasoning, then the SQL in a code fence, the last one if several: OmniSQL's (arXiv 2503.02240)

Each style asks for exactly one SQL statement; a trailing semicolon is fine.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
FENCE = re.compile(r"```[ \t]*(?:sql(?:ite)?3?(?=\s)|\w*sql[ \t]*(?=\r?\n))?(.*)```", re.DOTALL | re.IGNORECASE)
# Strings, quoted names and comments. An unclosed one runs to the end, so that a scan stays linear.
QUOTED = re.compile(r"'[^']*(?:'|\Z)|\"[^\"]*(?:\"|\Z)|`[^`]*(?:`|\Z)|\[[^\]]*(?:\]|\Z)"
                    r"|--[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
STATEMENT = re.compile(r"[\s(]*+(?:select|with|values|insert|update|delete|replace|create|drop|alter|pragma|"
                       r"explain|attach|detach|vacuum|begin|analyze)\b", re.IGNORECASE)


@dataclass(frozen=True)
class AnswerStyle:
    """One style."""
    rules: str   # the instruction in the prompt
    layout: str  # what the cold start teaches, with {trace} and {sql}
    format: str  # the format in a few words, for messages


ANSWER_STYLES = {
    "think-sql": AnswerStyle(
        "First reason step by step inside <think> and </think>. Then write exactly one SQLite query that "
        "answers the question, and nothing else: no code fence, no comment, no explanation.",
        "<think> {trace} </think> {sql}", "<think> reasoning </think> and then one query and nothing else"),
    "think-answer": AnswerStyle(
        "First reason step by step inside <think> and </think>. Then write exactly one SQLite query that "
        "answers the question inside <answer> and </answer>, and nothing else.",
        "<think> {trace} </think> <answer> {sql} </answer>",
        "<think> reasoning </think> and then <answer> one query </answer>"),
    "fence": AnswerStyle(
        "First reason step by step. Then write exactly one SQLite query that answers the question, in a code block:\n"
        "```sql\n-- your query\n```",
        "{trace}\n```sql\n{sql}\n```", "reasoning and then one query in a code fence, the last of the answer"),
}


@dataclass(frozen=True)
class AnswerFormat:
    """How an answer is written and read."""
    style: str = "think-sql"  # a name of ANSWER_STYLES
    lenient: bool = False     # also read SQL inside a code fence, if the style has none

    @property
    def rules(self) -> str:
        """The instruction in the prompt."""
        return ANSWER_STYLES[self.style].rules

    @property
    def in_words(self) -> str:
        """The format in a few words, for messages."""
        return ANSWER_STYLES[self.style].format

    def write(self, thought: str, sql: str) -> str:
        """The completion that the cold start teaches."""
        return ANSWER_STYLES[self.style].layout.format(trace=thought, sql=sql)

    def read(self, text: str) -> tuple[str, str] | None:
        """(thought, sql) of a completion, or None if its format is broken.

        In the think styles the format is one non-empty `<think> … </think>`, then exactly one SQL statement and nothing
        else. In think-sql a fence around the SQL breaks the format, unless `lenient`. In the style fence the thought
        is the text before the last fence, possibly empty; text after that fence is ignored.
        """
        parts = _last_fence(text) if self.style == "fence" else self._after_thought(text)
        if parts is None:
            return None
        thought, sql = parts[0].strip(), parts[1].strip()
        bare = QUOTED.sub(" ", sql).strip().rstrip(";").strip()  # without strings and comments
        if not (thought or self.style == "fence") or ";" in bare or "```" in sql or not STATEMENT.match(bare):
            return None
        return thought, sql

    def _after_thought(self, text) -> tuple[str, str] | None:
        """(content of `<think> … </think>`, content of the answer)."""
        match = THINK.fullmatch(text)
        if not match or text.count("<think>") != 1 or text.count("</think>") != 1:
            return None
        sql, with_tags = match[2].strip(), self.style == "think-answer"
        if with_tags:
            if not sql.startswith("<answer>") or not sql.endswith("</answer>") or sql.count("answer>") != 2:
                return None
            sql = sql[len("<answer>"):-len("</answer>")]
        return match[1], unwrap_fence(sql) if self.lenient or with_tags else sql

    def advice(self, statuses: Mapping[str, float]) -> str:
        """Advice in one sentence if most completions miss the format; empty if at least half of them meet it.

        statuses: the count or the share of completions with each status.
        """
        read = sum(count for status, count in statuses.items() if status != "too_long")
        cut, missed = statuses.get("truncated", 0), statuses.get("truncated", 0) + statuses.get("format", 0)
        if not read or missed / read <= 0.5:
            return ""
        can_be_lenient = self.style == "think-sql" and not self.lenient
        remedies = ["--lenient-format also takes SQL in a code fence"] if can_be_lenient else []
        remedies += ["a higher --max-completion-tokens lets answers end"] if 2 * cut > missed else []
        remedies.append("a cold start teaches the format: train.py --traces template, or --traces FILE, which "
                        "sft.py --mine writes with a model that meets it")
        return (f"{100 * (1 - missed / read):.1f} % of the answers meet the format, {self.in_words}; "
                f"{'; '.join(remedies)}")


def _last_fence(text) -> tuple[str, str] | None:
    """The text before the last code fence, without tags, and the fence's content; None if a fence is left open."""
    pieces = text.split("```")
    if len(pieces) < 3 or len(pieces) % 2 == 0:
        return None
    *before, inside, _ = pieces
    return re.sub(r"</?think>", " ", "```".join(before)), unwrap_fence(f"```{inside}```")


def unwrap_fence(sql: str) -> str:
    """The SQL inside a Markdown fence, on one line or several; a text without a fence is unchanged."""
    fenced = FENCE.fullmatch(sql.strip())
    return fenced[1].strip() if fenced else sql
