"""Scores of SQL predictions: each compared with the gold query, then summarised with intervals.

evaluate.py is the command and documents what is measured; the trainer uses this file too.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill

import numpy as np
from tqdm import tqdm

from common.errors import visible
from questions.example import Example
from questions.holdout import twins_key
from scoring.hardness import LEVELS, hardness
from sql_exec import CANNOT_READ, MATCHES, Comparison, Execution, Results, SQLExecutor, soft_f1

LEVEL_ORDER = (*LEVELS, "simple", "moderate", "challenging")  # Spider's, then BIRD's names
BATCH = 256  # predictions whose results are held in memory at once
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
               2.120, 2.110, 2.101, 2.093)  # 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom


@dataclass(frozen=True)
class ExampleScore:
    """The score of one prediction. `correct` has a key for each requested comparison."""
    id: str
    db_id: str
    difficulty: str
    sql: str
    status: str       # of the prediction: ok, error, timeout, refused, too_large, format, truncated, too_long;
                      # unavailable: a database could not be read, so there is no verdict
    gold_status: str  # the same, or empty: the gold runs but returns no row
    error: str        # why the prediction did not run, else empty
    correct: dict[str, bool]
    soft_f1: float
    verified: bool = False  # right by every comparison, without Spider's replacement of the word `value`
    gold_error: str = ""    # why the gold did not run, else empty
    file: str = ""          # the database of `gold_error`, or of `error` if unavailable
    twins: str = ""         # equal for questions of one database that share their gold query; empty: unknown

    @property
    def unavailable(self) -> bool:
        """Whether a database could not be read: left out of every figure."""
        return self.status == "unavailable"

    @property
    def bad_gold(self) -> bool:
        """Whether no gold query ran."""
        return self.gold_status not in ("ok", "empty")

    def left_out(self, skip_bad_gold: bool) -> bool:
        """Whether it is left out of every figure."""
        return self.unavailable or skip_bad_gold and self.bad_gold


# --------------------------------------------------------------------------------------------- scoring

def score_predictions(examples: Sequence[Example], sqls: Sequence[str], executor: SQLExecutor,
                      matches: Sequence[str] = tuple(MATCHES), keep_distinct: bool = False,
                      progress: bool = False,
                      suite: dict[str, list[str]] | None = None,
                      levels: list[str] | None = None) -> list[ExampleScore]:
    """Score one SQL per question, in order; a prediction is right if it matches any of its gold queries.

    matches: names of sql_exec.MATCHES.
    suite: per db_id, other databases of the executor on which prediction and gold must also agree.
    levels: from `difficulty_levels` of all examples, if these are only a part.
    """
    levels = levels or difficulty_levels(examples)
    comparisons, scores = comparisons_named(matches, keep_distinct), []
    starts = range(0, len(examples), BATCH)
    for start in tqdm(starts, desc="scoring", unit="batch", disable=None if progress else True, leave=False):
        part = slice(start, start + BATCH)
        scores += [score for score, _ in judge(examples[part], sqls[part], levels[part], executor, comparisons, suite)]
    return scores


def comparisons_named(names: Sequence[str], keep_distinct: bool = False) -> tuple[Comparison, ...]:
    """The comparisons of these names; with `keep_distinct` Spider's comparison keeps DISTINCT."""
    return tuple(replace(MATCHES[name], keep_distinct=keep_distinct) for name in names)


def difficulty_levels(examples: Sequence[Example]) -> list[str]:
    """The data's own difficulty or tier; Spider's hardness of the gold SQL if no example has one."""
    if any(example.difficulty for example in examples):
        return [example.difficulty or "unlabelled" for example in examples]
    return [hardness(example.gold_sql) if example.gold_sqls else "unknown" for example in examples]


def judge(examples, sqls, levels, executor, comparisons: Sequence[Comparison],
          suite=None) -> list[tuple[ExampleScore, Execution]]:
    """Run predictions and golds, rewritten for each comparison, and compare them. The Execution is that of the
    prediction as written."""
    verifying = [comparison.without_value_rule() for comparison in comparisons]
    questions = [(example.db_id, sql, example.golds) for example, sql in zip(examples, sqls, strict=True)]
    results = Results(executor, questions, [*comparisons, *verifying])
    judged = []
    for example, level, question in zip(examples, levels, questions, strict=True):
        db_id, sql, _ = question
        prediction, golds = results.predicted(db_id, sql), [results.gold(db_id, gold) for gold in example.golds]
        correct = {comparison.name: results.is_right(*question, comparison) for comparison in comparisons}
        verified = all(results.is_right(*question, comparison) for comparison in verifying)
        gold, file = gold_status(golds), str(executor.databases.get(db_id, ""))
        why = "" if gold in ("ok", "empty") else golds[0].error or ""
        score = ExampleScore(example.id, db_id, level, sql, prediction.status, gold, prediction.error or "", correct,
                             best_soft_f1(prediction, golds), verified, why, file, twins_key(example))
        unread = results.unread(*question, *comparisons, *verifying)
        if unread and gold in ("ok", "empty", "unavailable"):  # else the gold's own error is reported
            score = without_verdict(score, unread.error, file)
        elif suite and suite.get(db_id):
            score = _on_suite(score, example, golds, suite[db_id], executor, comparisons)
        judged.append((score, prediction))
    return judged


def without_verdict(score: ExampleScore, error: str, file: str) -> ExampleScore:
    """The score of a prediction without a verdict, because this file could not be read."""
    return replace(score, status="unavailable", error=error, file=file, correct=dict.fromkeys(score.correct, False),
                   soft_f1=0.0, verified=False)


def _on_suite(score, example, golds, others, executor, comparisons) -> ExampleScore:
    """A prediction is right if it matches one gold on every database. A gold that fails on any database is ignored.

    golds: executions of the golds on the first database; others: the names of the other databases.
    """
    ran = [[gold, *executor.run_gold([(db_id, sql) for db_id in others])]
           for sql, gold in zip(example.gold_sqls, golds, strict=True)]  # [golds][databases]
    sound = [sql for sql, found in zip(example.gold_sqls, ran, strict=True) if {one.status for one in found} == {"ok"}]
    failed = [(one, str(executor.databases[db_id])) for found in ran
              for db_id, one in zip((example.db_id, *others), found, strict=True) if one.status != "ok"]
    for one, file in failed:
        if one.status == "unavailable":
            return without_verdict(score, one.error, file)
    if not sound:
        one, file = failed[0]
        score = replace(score, gold_status=one.status, gold_error=one.error or "", file=file)
    correct, verified = dict.fromkeys(score.correct, False), False
    first = [example.db_id] if len(example.gold_sqls) > 1 else []  # with several golds, compare with this one alone
    for gold in sound if score.verified or any(score.correct.values()) else ():
        asked = [replace(example, db_id=db_id, gold_sqls=(gold,)) for db_id in (*first, *others)]
        sqls, levels = [score.sql] * len(asked), [score.difficulty] * len(asked)
        found = [one for one, _ in judge(asked, sqls, levels, executor, comparisons)]
        if unread := next((one for one in found if one.unavailable), None):
            return without_verdict(score, unread.error, unread.file)
        correct = {name: known or score.correct[name] and all(one.correct[name] for one in found)
                   for name, known in correct.items()}
        verified = verified or score.verified and all(one.verified for one in found)
    return replace(score, correct=correct, verified=verified)


def suite_databases(databases: dict[str, Path]) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """All databases and the other .sqlite files of their folders, and per db_id the names of those others.

    Only a folder with the name of the database contains variants of it, DIR/<db_id>/*.sqlite.
    """
    everything, suite = dict(databases), {}
    for db_id, path in databases.items():
        others = sorted(set(path.parent.glob("*.sqlite")) - {path}) if path.parent.name == db_id else []
        suite[db_id] = [f"{db_id}/{other.stem}" for other in others]
        everything |= dict(zip(suite[db_id], others, strict=True))
    return everything, suite


def best_soft_f1(prediction: Execution, golds: Sequence[Execution]) -> float:
    """The best soft-F1 with any gold that ran; 0 if the prediction or every gold failed."""
    if prediction.status != "ok":
        return 0.0
    return max((soft_f1(prediction.rows, gold.rows) for gold in golds if gold.status == "ok"), default=0.0)


def gold_status(golds: Sequence[Execution]) -> str:
    """ok, empty (runs, but returns no row), or the official gold's failure if no gold runs."""
    running = [gold for gold in golds if gold.status == "ok"]
    if not running:
        return golds[0].status
    return "ok" if running[0].rows else "empty"


# ------------------------------------------------------------------------------------------- summaries

def summarise(scores: Sequence[ExampleScore], skip_bad_gold: bool = False) -> dict:
    """Accuracy with its interval, overall and by difficulty; soft-F1; shares of statuses; failed golds."""
    counted = [score for score in scores if not score.left_out(skip_bad_gold)]
    found = Counter(score.difficulty for score in counted)
    known = [level for level in LEVEL_ORDER if level in found]
    by_difficulty = {level: accuracies([score for score in counted if score.difficulty == level])
                     for level in known + sorted(found.keys() - set(known))}
    overall = accuracies(counted, scores[0].correct if scores else ())
    return {
        **overall,
        "mean_over_difficulties": {  # every difficulty or tier weighs the same
            name: mean([part["execution_accuracy"][name] for part in by_difficulty.values()])
            for name in overall["execution_accuracy"]},
        "by_difficulty": by_difficulty,
        "soft_f1": mean([score.soft_f1 for score in counted]),
        "statuses": {status: count / len(counted)
                     for status, count in Counter(score.status for score in counted).most_common()},
        "empty_golds": sum(score.gold_status == "empty" for score in counted),
        "bad_golds": [{"id": score.id, "db_id": score.db_id, "gold_status": score.gold_status,
                       "gold_error": score.gold_error, "file": score.file}
                      for score in scores if score.bad_gold and not score.unavailable],
        "bad_golds_skipped": skip_bad_gold,
        "unavailable": [{"id": score.id, "db_id": score.db_id, "error": score.error, "file": score.file}
                        for score in scores if score.unavailable],
    }


def accuracies(scores: Sequence[ExampleScore], names: Iterable[str] = ()) -> dict:
    """Execution accuracy under each comparison, with its interval over twins, and over databases if there are several.

    Answers to twins are correlated, and so are those to questions of one database: counted singly, the intervals would
    be too narrow.
    names: of the comparisons, needed if there are no scores.
    """
    names = scores[0].correct if scores else names
    values = {name: [float(score.correct[name]) for score in scores] for name in names}
    twins, databases = twins_of(scores), [score.db_id for score in scores]
    several = names if len(set(databases)) > 1 else ()
    return {"n": len(scores), "twin_groups": len(set(twins)), "databases": len(set(databases)),
            "execution_accuracy": {name: mean(values[name]) for name in names},
            "interval": {name: bootstrap_interval(values[name], twins) for name in names},
            "interval_over_databases": {name: bootstrap_interval(values[name], databases) for name in several}}


def twins_of(scores: Sequence[ExampleScore]) -> list[tuple]:
    """A key per score, shared only by twins; unique if they are unknown."""
    return [(score.db_id, score.twins or number) for number, score in enumerate(scores)]


def mean(values) -> float:
    """The mean; NaN without values."""
    return sum(values) / len(values) if values else math.nan


def bootstrap_interval(values: Sequence[float], groups: Sequence | None = None, samples: int = 2000,
                       seed: int = 0, span: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean; the same values always give the same interval.

    groups: the group of each value; values of one group are drawn together. None: each value by itself.
    span: the least and the greatest possible value.
    """
    values = np.asarray(values, dtype=float)  # [n]
    if not len(values):
        return math.nan, math.nan
    number = {}
    members = [number.setdefault(group, len(number)) for group in (range(len(values)) if groups is None else groups)]
    sums, sizes = np.bincount(members, values), np.bincount(members)  # [K]
    drawn = np.random.default_rng(seed).integers(len(sums), size=(samples, len(sums)))  # [samples, K]
    low, high = np.percentile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), (2.5, 97.5))
    return widened(low, high, values.mean(), len(sums), span)


def crossed_interval(changes: np.ndarray, sizes: np.ndarray, draws: int = 2000) -> list[float]:
    """A 95 % bootstrap interval of the mean change per question. Each draw takes S seeds and K groups of questions,
    with replacement. sizes: questions per group. [S, K], [K] -> [low, high]

    Few seeds underestimate the spread between seeds: with three, it counts 2.6 times less than in Student's interval,
    and with one not at all.
    """
    (S, K), rng = changes.shape, np.random.default_rng(0)
    means = []
    for _ in range(draws):
        seeds, groups = rng.integers(S, size=S), rng.integers(K, size=K)
        means.append(changes[seeds][:, groups].sum() / (S * sizes[groups].sum()))
    return list(widened(*np.percentile(means, (2.5, 97.5)), float(changes.sum() / (S * sizes.sum())), K, (-1.0, 1.0)))


def widened(low: float, high: float, mean: float, count: int, span: tuple[float, float]) -> tuple[float, float]:
    """A bootstrap interval over `count` groups, widened by the ratio of Student's interval to the normal one, because
    few groups vary less than their population. With a single group the interval is the whole span.

    If all groups are equal, the bootstrap shows no variation. Then a share of 1 - 0.025^(1 / count) of the population
    may differ unseen, anywhere in the span, with 2.5 % probability (Clopper and Pearson's interval).
    """
    least, greatest = span
    if count < 2:
        return least, greatest
    if low == high:
        unseen = 1 - 0.025 ** (1 / count)
        return float(mean - unseen * (mean - least)), float(mean + unseen * (greatest - mean))
    factor = student_quantile(count - 1) / 1.96 * math.sqrt(count / (count - 1))
    return float(max(least, mean - factor * (mean - low))), float(min(greatest, mean + factor * (high - mean)))


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with this many degrees of freedom."""
    return T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else 1.96 + 2.45 / freedom


def print_table(summary: dict) -> None:
    """Prints the summary in 80 columns."""
    names = list(summary["execution_accuracy"])
    levels = summary["by_difficulty"] if len(summary["by_difficulty"]) > 1 else {}
    levels = {level: part | {"interval_over_databases": {}} for level, part in levels.items()}  # in --json only
    print_accuracies("execution accuracy, %", {"all": summary} | levels)
    if levels:
        cells = "".join(f"{100 * summary['mean_over_difficulties'][name]:>10.1f}{'':15}" for name in names)
        print(f"{'mean over difficulties':<30}{cells}".rstrip())
    if summary["twin_groups"] < summary["n"]:
        print(f"intervals draw questions that share a gold query together: {summary['twin_groups']} groups")
    print(fill(f"soft-F1 {100 * summary['soft_f1']:.1f} %;  answers: {percentages(summary['statuses'])}", 80))
    if summary.get("failures"):
        print(fill(f"answers that do not run: {percentages(summary['failures'])} of all", 80))
    if summary["empty_golds"]:
        print(f"golds without any row: {summary['empty_golds']}")
    if summary["bad_golds"]:
        verdict = "left out" if summary["bad_golds_skipped"] else "counted as wrong (see --skip-bad-gold)"
        print(fill(f"golds that fail: {len(summary['bad_golds'])}, {verdict}; the first of each kind:", 80))
        print_reasons([(gold["id"], gold["gold_status"], gold["gold_error"], gold["file"])
                       for gold in summary["bad_golds"]])
    if summary["unavailable"]:
        print(fill(f"warning: {len(summary['unavailable'])} questions are left out of every figure, since their "
                   "database could not be read; when it can, measure again:", 80))
        print_reasons([(one["id"], "unavailable", one["error"], one["file"]) for one in summary["unavailable"]])


def print_reasons(failures: Sequence[tuple[str, str, str, str]]) -> None:
    """Prints the first failure of each kind, a few lines each."""
    for line in first_reasons(failures):
        print(fill(line, 80, initial_indent="  ", subsequent_indent="    ", break_long_words=False,
                   break_on_hyphens=False))


def first_reasons(failures: Iterable[tuple[str, str, str, str]], most: int = 5) -> list[str]:
    """Why queries failed: the first reason of each kind, the number of similar ones, and the file.

    failures: (id of the question, status, error, file of the database).
    """
    kinds: dict[tuple[str, str], list] = {}
    for identity, status, error, file in failures:
        kind = error.removeprefix(f"{CANNOT_READ} {file}: ").partition(": ")[0]  # "no such column" of whatever name
        kinds.setdefault((status, kind), []).append((identity, error, file))
    lines = []
    for (status, _), found in list(kinds.items())[:most]:
        identity, error, file = found[0]
        where = f" ({file})" if file and file not in error else ""
        others = f"; and {len(found) - 1} more like it" if len(found) > 1 else ""
        lines.append(f"question {visible(identity)}, {status}: {visible(error)}{visible(where)}{others}")
    if len(kinds) > most:
        lines.append(f"and {len(kinds) - most} further kinds")
    return lines


def print_accuracies(title: str, parts: dict[str, dict]) -> None:
    """Prints one line per part with its execution accuracies, and one with their intervals over databases, if any."""
    names = list(next(iter(parts.values()))["execution_accuracy"])
    headings = "".join(f"{name + ' [95 % interval]':>25}" for name in names)
    print(f"{title:<24}{'n':>6}{headings}")
    for label, part in parts.items():
        cells = "".join(f"{percent_with_interval(part, name):>25}" for name in names)
        print(f"{visible(label)[:24]:<24}{part['n']:>6}{cells}".rstrip())
        if part.get("interval_over_databases"):
            bounds = [part["interval_over_databases"][name] for name in names]
            cells = "".join(f"{bounds_in_percent(*pair):>25}" for pair in bounds)
            print(f"{'  over ' + str(part['databases']) + ' databases':<30}{cells}")


def percentages(shares: dict[str, float]) -> str:
    """`ok 98.0 %, error 2.0 %`."""
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())


def percent_with_interval(part: dict, name: str) -> str:
    """`63.8 [ 58.1,  69.4]`."""
    percent = f"{100 * part['execution_accuracy'][name]:.1f}"
    if "interval" not in part:
        return percent + " " * 16
    return f"{percent} {bounds_in_percent(*part['interval'][name])}"


def bounds_in_percent(low: float, high: float) -> str:
    """`[ 58.1,  69.4]`."""
    return f"[{100 * low:5.1f},{100 * high:6.1f}]"


def scores_as_json(scores: Sequence[ExampleScore], summary: dict) -> dict:
    """What --json writes: accuracies, n, an entry per question in dataset order (1 correct, 0 wrong, null unknown).

    Questions of one db_id with the same `twins` share their gold query.
    """
    return summary | {"examples": [
        {"id": score.id, "db_id": score.db_id, "twins": score.twins, "status": score.status,
         "gold_status": score.gold_status,
         **{name: None if score.unavailable else int(correct) for name, correct in score.correct.items()}}
        for score in scores]}


def of_the_same(before: dict | None, after: dict) -> bool:
    """Whether two summaries are of the same questions, so that their difference is meaningful."""
    if not before or not before["n"] or before["n"] != after["n"]:
        return False
    asked = {part["questions"] for part in (before, after) if "questions" in part}  # older versions did not store this
    return len(asked) < 2
