"""How an answer is written and read: one style for the prompt's rules, the cold start, the reward and the evaluation.

    think-sql      <think> reasoning </think> SELECT ...              ours, and FINER-SQL's (arXiv 2605.03465)
    think-answer   <think> reasoning </think> <answer> SELECT ... </answer>, the SQL in a fence or not: SLM-SQL's
                   (arXiv 2507.22478)
    fence          reasoning, then the SQL in a code fence; of several fences the last: OmniSQL's (arXiv 2503.02240)

Each asks for exactly one SQL statement; a trailing semicolon is fine.
"""

import re
from dataclasses import dataclass

THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
FENCE = re.compile(r"```[ \t]*(?:sql(?:ite)?3?(?=\s)|\w*sql[ \t]*(?=\r?\n))?(.*)```", re.DOTALL | re.IGNORECASE)
# Strings, quoted names and comments. One that is not closed runs to the end, so that a scan stays linear.
QUOTED = re.compile(r"'[^']*(?:'|\Z)|\"[^\"]*(?:\"|\Z)|`[^`]*(?:`|\Z)|\[[^\]]*(?:\]|\Z)"
                    r"|--[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
STATEMENT = re.compile(r"[\s(]*+(?:select|with|values|insert|update|delete|replace|create|drop|alter|pragma|"
                       r"explain|attach|detach|vacuum|begin|analyze)\b", re.IGNORECASE)


@dataclass(frozen=True)
class AnswerStyle:
    """One style."""
    rules: str   # what a prompt says of it
    layout: str  # what the cold start teaches, with {trace} and {sql}
    format: str  # its format in a few words, for messages


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


def completion_text(trace: str, sql: str, style: str = "think-sql") -> str:
    """What a policy is taught to write."""
    return ANSWER_STYLES[style].layout.format(trace=trace, sql=sql)


def parse_completion(text: str, lenient: bool = False, style: str = "think-sql") -> tuple[str, str] | None:
    """(thought, sql) of a completion, or None where its format is broken.

    In the styles that think the format is one non-empty `<think> … </think>`, first, then exactly one SQL statement
    and nothing else. In think-sql a fenced block around the SQL breaks it, unless `lenient`. Of a fence's answer the
    thought is what stands before the last fence; it may be empty, and what follows that fence is not read.
    """
    parts = _last_fence(text) if style == "fence" else _after_thought(text, lenient, style)
    if parts is None:
        return None
    thought, sql = parts[0].strip(), parts[1].strip()
    bare = QUOTED.sub(" ", sql).strip().rstrip(";").strip()  # without strings and comments
    if not (thought or style == "fence") or ";" in bare or "```" in sql or not STATEMENT.match(bare):
        return None
    return thought, sql


def _after_thought(text, lenient, style) -> tuple[str, str] | None:
    """The parts of `<think> … </think>` and the answer, without the marks around it."""
    match = THINK.fullmatch(text)
    if not match or text.count("<think>") != 1 or text.count("</think>") != 1:
        return None
    sql = match[2].strip()
    if style == "think-answer":
        if not sql.startswith("<answer>") or not sql.endswith("</answer>") or sql.count("answer>") != 2:
            return None
        sql = sql[len("<answer>"):-len("</answer>")]
    return match[1], unwrap_fence(sql) if lenient or style == "think-answer" else sql


def _last_fence(text) -> tuple[str, str] | None:
    """What stands before the last code fence, without tags, and what is in it; None where a fence is left open."""
    pieces = text.split("```")
    if len(pieces) < 3 or len(pieces) % 2 == 0:
        return None
    *before, inside, _ = pieces
    return re.sub(r"</?think>", " ", "```".join(before)), unwrap_fence(f"```{inside}```")


def unwrap_fence(sql: str) -> str:
    """The SQL inside a Markdown fence, on one line or several; a text without one stays as it is."""
    fenced = FENCE.fullmatch(sql.strip())
    return fenced[1].strip() if fenced else sql
