"""Shows a group in the terminal: its question, and the rewards of each completion.

    python -m running.show runs/demo                  # of the newest step, a group with right and wrong answers
    python -m running.show runs/demo --step 40 --question 3
    python train.py --verbose 10                      # the same every 10 steps during a run

Only terminals get colours, unless NO_COLOR is set. Completions are untrusted: unprintable characters, such as those
that control a terminal, are written out as ‹U+001B›.
"""

import os
import sys
from pathlib import Path
from textwrap import fill

from common.errors import UserError, as_json, run_main, visible
from common.options import Parser
from running.run_folder import RolloutLog

WIDTH = 80
ANSI_CODES = {"good": "32", "bad": "31", "soft": "2", "strong": "1"}


# ---------------------------------------------------------------------------------------- a group in the terminal

def group_text(group: dict, *, colour: bool, thoughts: bool = False) -> str:
    """A record of rollouts.jsonl for a terminal of 80 columns, the best completions first, equal ones once."""
    paint = painter(colour)
    completions = group["completions"]
    sampled = [c for c in completions if not c.get("from_trace")]
    right = f"{sum(c['correct'] for c in sampled)} of {len(sampled)} right"
    heading = one_line(" · ".join(filter(None, (f"step {group['step']}", group["db_id"], group["difficulty"]))))
    names = [name for name in completions[0]["rewards"] if name != "total"
             and (name in ("format", "execution") or any(c["rewards"][name] for c in completions))]
    lines = [paint("strong", f"{heading:<{WIDTH - len(right)}}{right}"), fill(one_line(group["question"]), WIDTH),
             paint("soft", fill(f"gold: {one_line(gold_text(group))}", WIDTH, subsequent_indent="      ")),
             paint("soft", f"{'':>3} {'advantage':>9} {'reward':>7}" + "".join(f" {name:>9}" for name in names))]
    alike = {}
    for completion in sorted(completions, key=lambda c: -c["rewards"]["total"]):
        key = completion.get("from_trace"), completion.get("first_try"), completion["text"]
        alike.setdefault(key, []).append(completion)
    for same in alike.values():
        lines.append(completion_lines(same[0], len(same), names, paint, thoughts))
    return "\n".join(lines)


def gold_text(group: dict) -> str:
    """The gold SQL, or the answer that is known instead."""
    return next(iter(group["gold_sqls"]), None) or f"the answer {as_json(group['answer'])}"


def completion_lines(completion: dict, count: int, names: list[str], paint, thoughts: bool) -> str:
    """Rewards, advantage and verdict in one line; below it the SQL and its error."""
    advantage, rewards = completion["advantage"], completion["rewards"]
    tone = "good" if advantage > 0 else "bad" if advantage < 0 else "soft"
    times = f"{count}×" if count > 1 else ""
    numbers = "".join(f" {rewards[name]:>9.2f}" for name in names)
    verdict = "another result" if completion["status"] == "ok" else one_line(completion["status"])
    head = f"{times:>3} {advantage:>+9.2f} {rewards['total']:>7.2f}{numbers}  "
    first = f"first try: {completion['first_try']}" if completion.get("first_try") else ""
    body = [first, completion.get("observation", ""), completion["thought"] if thoughts else "",
            completion["sql"] or completion["text"], completion["error"]]
    verdict = "right" if completion["correct"] else verdict
    source = ", a trace in place of a sample" if completion.get("from_trace") else ""
    return "\n".join([paint(tone, head + verdict + source),
                      *(fill(one_line(text), WIDTH, initial_indent="    ", subsequent_indent="      ", max_lines=3,
                             placeholder=" …") for text in body if text)])


def one_line(text: str) -> str:
    """Untrusted text as one line that cannot control a terminal."""
    return visible(" ".join(str(text).split()))


def painter(colour: bool):
    """A function (tone, text) -> text, which adds colour if `colour`."""
    return (lambda tone, text: f"\033[{ANSI_CODES[tone]}m{text}\033[0m") if colour else (lambda tone, text: text)


def wants_colour(stream) -> bool:
    """True on a terminal that shows colours, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# ------------------------------------------------------------------------------------------------------------ main

def find_group(folder: Path, step: int | None, question: int | None) -> dict:
    """A logged group; by default, of the newest step, the first with right and wrong completions, else the first."""
    log = RolloutLog(folder / "rollouts.jsonl")
    if not log.steps:
        raise UserError(f"{folder} has no rollouts.jsonl with a finished step")
    if step is not None and step not in log.steps:
        raise UserError(f"{folder} has no step {step}; it has {log.steps[0]} to {log.steps[-1]}")
    groups = log.read(log.steps[-1] if step is None else step)
    if question is not None:
        if not 1 <= question <= len(groups):
            raise UserError(f"that step has questions 1 to {len(groups)}, not {question}")
        return groups[question - 1]
    mixed = [group for group in groups if len({c["correct"] for c in group["completions"]}) == 2]
    return (mixed or groups)[0]


def main() -> None:
    """Show one group of a run."""
    parser = Parser("python -m running.show", description="Show a group of a run in the terminal.")
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/demo")
    parser.add_argument("--step", type=int, help="the step (default: the newest)")
    parser.add_argument("--question", type=int,
                        help="its number in the step, from 1 (default: the first with right and wrong answers)")
    parser.add_argument("--thoughts", action="store_true", help="show the reasoning too")
    given = parser.parse_args()
    group = find_group(given.run, given.step, given.question)
    print(group_text(group, colour=wants_colour(sys.stdout), thoughts=given.thoughts))


if __name__ == "__main__":
    run_main(main)
