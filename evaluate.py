"""Execution accuracy: does the predicted SQL return what the gold SQL returns?

    python evaluate.py --model runs/demo/best --split test                      # greedy answers to held-out questions
    python evaluate.py --model runs/demo/best --split test -n 30 --json A.json  # and 30 samples, value-aware voting
    python evaluate.py --predictions FILE --data spider --data-dir DIR --split dev --json B.json
    python evaluate.py --compare A.json B.json                                  # difference, and what flipped
    python evaluate.py --compare A0.json B0.json A1.json B1.json                # of seeds 0 and 1, and the mean

What is measured, for every question
  (1) status    the outcome of the answer as written: ok, error, timeout, refused, too_large, unavailable (the
                database could not be read); for a model also format (not reasoning followed by one query),
                truncated (the same, because it was cut at the length limit), and too_long (the prompt does not fit)
  (2) bird      BIRD's comparison: the same set of rows, columns in order
  (3) spider    Spider's test-suite comparison: the same bag of rows under some order of the columns, in row
                order if the gold has ORDER BY; both queries are first rewritten as in the official script
                (no DISTINCT unless --keep-distinct). On one database, or with --test-suite on every
                .sqlite in its folder
  (4) soft-F1   BIRD's partial credit for overlapping cells; with --r-ves N also BIRD's efficiency score

A --json file contains the protocol: prompts, answers, sampling, comparisons, limits, questions. If the protocols of two
files differ, --compare names the differences and refuses the files, unless --anyway is given.

By default, a policy trained here is asked as in its run: prompts and answers are written, limited and parsed in the
same way.

With -n the model answers n times; scoring/voting.py chooses one of the answers. Both votes, the greedy answer and
pass@k are reported side by side; --vote selects the answer that counts. If an evaluation with --json or --progress is
interrupted, the same command continues where it stopped.

A question whose gold query fails is reported, with the reason, and never counted as correct. It stays in the
denominator, as in the official scripts, unless --skip-bad-gold. A question is left out of every figure, with a warning,
if its database could not be read within the time limit of a query (a writer's lock, an I/O error, workers killed by the
system), or if a writer changed the database between prediction and gold in every attempt.

Intervals are 95 % bootstrap intervals over groups of twins: questions on one database with the same gold query, whose
answers are correlated. Spider's 1,034 dev questions form 551 such groups. These intervals cover the choice of questions
on the same databases; intervals over databases cover the choice of databases. Both are widened for few groups, as
Student's intervals are; if all groups agree, they are Clopper and Pearson's.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from textwrap import fill

import numpy as np
from tqdm import tqdm

from common.errors import UserError, as_json, check_folder, json_lines, run_main, write_text
from common.options import Parser, add_arguments, build, check, flag_of, option, shared
from data import Dataset, Example, PromptBuilder, PromptConfig, load_dataset
from history import load_for_evaluation, run_config_of
from prompts.answer_format import AnswerFormat
from questions.example import answers_among
from questions.question_files import check_excluded, excluded
from rewards import unwrap_fence
from running.layers import fold, handed_on
from scoring.answers import Examination, Progress, fingerprint, questions_hash, scores_of
from scoring.compare import compare, compare_seeds, print_comparison, print_seeds
from scoring.failures import failures_of, shares
from scoring.predictions import load_predictions, save_predictions
from scoring.verdicts import (
    ExampleScore,
    accuracies,
    bootstrap_interval,
    difficulty_levels,
    mean,
    percentages,
    print_accuracies,
    print_reasons,
    print_table,
    score_predictions,
    scores_as_json,
    suite_databases,
    summarise,
)
from scoring.voting import VOTES, Exam, pass_at_k
from scoring.writable import unwritable, unwritable_note
from sql_exec import MATCHES, SQLExecutor, r_ves_reward

__all__ = ["EvaluateConfig", "ExampleScore", "MATCHES", "bootstrap_interval", "compare", "difficulty_levels",
           "load_predictions", "print_comparison", "print_table", "score_predictions", "scores_as_json", "summarise"]


# ------------------------------------------------------------------------------------------ configuration

# Settings that do not affect the records of an evaluation.
FREE_TO_CHANGE = ("predictions", "vote", "r_ves", "skip_bad_gold", "json", "progress", "predictions_out", "save_traces",
                  "workers", "gold_cache")
# Settings of how a model answers, meaningless for a file of predictions; so are those of PromptConfig.
OF_A_MODEL = ("samples", "temperature", "vote", "greedy", "max_completion_tokens", "constrain", "turns",
              "feedback", "progress", "save_traces")


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate and how."""
    model: str = option("", "a model to evaluate: an alias, a Hugging Face id or a local folder")
    predictions: str = option("", "or predicted SQL: Spider's lines, BIRD's .json, or a .jsonl")
    data: str = shared("data")
    data_dir: str | None = shared("data_dir")
    split: str = option("dev", "the split to evaluate on")
    world: str = shared("world")
    limit: int = option(0, "only this many questions, the first; 0: all", at_least=0)
    exclude: str | None = option(None, "file with a JSON list of question ids to leave out")
    samples: int = option(1, at_least=1)  # -n
    temperature: float | None = option(None, "of sampling; 0 is greedy (default: 1 with -n above 1, else 0)",
                                       at_least=0)
    vote: str = option("value-aware", "which answer counts; none: the greedy one", choices=(*VOTES, "none"))
    greedy: bool = option(True, "also give the greedy answer, beside the samples")
    max_completion_tokens: int = shared("max_completion_tokens")
    batch: int = shared("batch")
    constrain: str = shared("constrain", "; of a policy trained here by default as in its run")
    turns: int = shared("turns", "; of a policy trained here by default as in its run")
    feedback: str = shared("feedback", "; of a policy trained here by default as in its run")
    lenient_format: bool | None = shared("lenient_format", " (default: as the run that made the model; in "
                                                           "--predictions no)")
    seed: int = shared("seed", ", and of the demo world")
    threads: int = shared("threads")
    match: str = option(",".join(MATCHES), "comparisons, separated by commas")
    keep_distinct: bool = option(False, "let Spider's comparison keep DISTINCT")
    test_suite: bool = option(False, "compare on every .sqlite in a database's folder")
    r_ves: int = option(0, "BIRD's efficiency score, from this many timed runs a query (BIRD: 100); 0: no", at_least=0)
    skip_bad_gold: bool = option(False, "leave out questions whose gold query fails")
    json: str | None = option(None, "write the scores to this file")
    progress: str | None = option(None, "where to keep the work done so far (default: beside --json)")
    predictions_out: str | None = option(None, "write the answers: .sql as Spider, .json as BIRD, .jsonl")
    save_traces: str | None = option(None, "write correct answers with their reasoning, for train's --traces")
    workers: int = shared("workers")
    timeout: float = shared("timeout", default=30.0)
    max_rows: int = option(1_000_000, "a longer result counts as too_large", at_least=1)
    memory_limit_mb: int = option(2048, "memory a SQL worker may take", at_least=16)
    gold_cache: str | None = option(None, "keep results of gold queries in this folder")

    def __post_init__(self):
        check(self)
        if bool(self.predictions) == bool(self.model):
            raise UserError("give --predictions FILE or --model NAME, " + ("not both" if self.model else
                            "because without one there is nothing to evaluate"))
        if self.samples > 1 and self.sampling_temperature < 1e-6:
            raise UserError(f"--temperature {self.temperature:g} cannot give {self.samples} sample(s)")
        if not self.matches or not set(self.matches) <= set(MATCHES):
            raise UserError(f"--match takes {' and '.join(MATCHES)}, separated by commas, not {self.match!r}")
        for file in filter(None, (self.json, self.progress, self.predictions_out, self.save_traces)):
            check_folder(file)
        if self.gold_cache and Path(self.gold_cache).is_file():
            raise UserError(f"--gold-cache {self.gold_cache} is a file: give a folder, which may be a new one")

    @property
    def sampling_temperature(self) -> float:
        """The temperature used; 0 if only the greedy answer is wanted."""
        return (1.0 if self.samples > 1 else 0.0) if self.temperature is None else self.temperature

    @property
    def matches(self) -> tuple[str, ...]:
        """The comparisons of --match."""
        return tuple(dict.fromkeys(name.strip() for name in self.match.split(",") if name.strip()))

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways of answering that are reported: greedy, (the first) sample, the votes."""
        if not self.sampling_temperature:
            return ("greedy",)
        return (*(["greedy"] if self.greedy else []), "sample", *VOTES)

    @property
    def answer(self) -> str:
        """The way of answering that counts; without a vote the greedy answer, or with --no-greedy the first sample."""
        return self.vote if self.vote in self.ways else self.ways[0]

    def exam(self, answer_style: str) -> Exam:
        """How a model answers here."""
        return Exam(AnswerFormat(answer_style, bool(self.lenient_format)), self.max_completion_tokens, self.samples,
                    self.sampling_temperature, self.batch, self.seed)


# ------------------------------------------------------------------------------------------- of a model

def summarise_records(records: Sequence[dict], config: EvaluateConfig) -> dict:
    """Every way of answering side by side, pass@k, and how the candidates fared."""
    scores = [scores_of([record], config.answer)[0] for record in records]
    kept = [record for record, score in zip(records, scores, strict=True) if not score.left_out(config.skip_bad_gold)]
    samples = [record["samples"] for record in kept]
    fates = sum((Counter(sample["statuses"]) for sample in samples), Counter())
    total = sum(fates.values()) or 1
    return {
        "model": config.model, "answer": config.answer, "samples_per_question": config.samples,
        "temperature": config.sampling_temperature, "lenient_format": bool(config.lenient_format),
        "answers": {way: accuracies(scores_of(kept, way)) for way in config.ways},
        "pass_at_k": {name: [mean([pass_at_k(config.samples, one["correct"][name], k) for one in samples])
                             for k in range(1, config.samples + 1)] for name in config.matches},
        "result_groups": mean([sample["groups"] for sample in samples]),
        "sample_statuses": {status: count / total for status, count in fates.most_common()},
        "sample_failures": shares(sum((Counter(sample.get("failures")) for sample in samples), Counter()), total),
        "truncated": sum(sample["truncated"] for sample in samples) / total,
        "second_tries": sum(sample.get("second_tries", 0) for sample in samples) / total,
        "timing": timing(records)}


def timing(records: Sequence[dict]) -> dict:
    """Median and 95th percentile of the seconds per question, by part; tokens generated per second."""
    parts = {name: [record["seconds"][name] for record in records]
             for name in ("prompt", "generation", "sql")}
    parts["total"] = [sum(record["seconds"].values()) for record in records]
    tokens = sum(record["samples"]["tokens"] for record in records)
    return {"seconds": {name: {"median": float(np.median(values)), "p95": float(np.percentile(values, 95))}
                        for name, values in parts.items()},
            "tokens_per_second": tokens / max(sum(parts["generation"]), 1e-9),
            "questions": {record["id"]: record["seconds"] for record in records}}


def print_model_table(summary: dict) -> None:
    """Prints the summary of `summarise_records` for a terminal of 80 columns."""
    n, count = summary["samples_per_question"], next(iter(summary["answers"].values()))["n"]
    rows = {way: part for way, part in summary["answers"].items() if way != "sample"}
    if summary["temperature"]:
        rows |= {f"pass@{k}": {"n": count, "execution_accuracy": {
            name: values[k - 1] for name, values in summary["pass_at_k"].items()}} for k in shown_k(n)}
        print(f"\n{n} sample{'s' * (n > 1)} a question at temperature {summary['temperature']:g}; "
              f"what counts above: {summary['answer']}")
        print_accuracies("answered by", rows)
        print(f"groups of equal results: {summary['result_groups']:.2f} a question")
        print(fill(f"samples: {percentages(summary['sample_statuses'])}", 80))
        if summary["sample_failures"]:
            print(fill(f"samples that do not run: {percentages(summary['sample_failures'])} of all", 80))
    if summary["protocol"]["turns"] > 1:
        print(f"answers that are second tries: {100 * summary['second_tries']:.1f} %")
    print(f"completions cut at the limit: {100 * summary['truncated']:.1f} %")
    answer_format = AnswerFormat(summary["protocol"]["answer_style"], summary["lenient_format"])
    advice = answer_format.advice(summary["sample_statuses"])
    if advice:
        print(fill(advice, 80, break_on_hyphens=False))
    print(f"{'seconds a question':<24}{'median':>10}{'p95':>10}")
    for name, values in summary["timing"]["seconds"].items():
        print(f"{name:<24}{values['median']:>10.4f}{values['p95']:>10.4f}")
    print(f"{summary['timing']['tokens_per_second']:.0f} tokens a second")


def shown_k(n: int) -> list[int]:
    """1, 5, 10, 20, 50, ... and n."""
    return [k for k in (1, 5, 10, 20, 50, 100) if k < n] + [n]


def records_as_json(records: Sequence[dict], config: EvaluateConfig) -> list[dict]:
    """What --json adds to each question: its SQL, each way's verdicts and how the samples fared."""
    return [{"difficulty": record["answers"][config.answer]["difficulty"],
             "sql": record["answers"][config.answer]["sql"],
             "answers": {way: {name: None if score["status"] == "unavailable" else int(right)
                               for name, right in score["correct"].items()}
                         for way, score in record["answers"].items()},
             "samples": record["samples"]} for record in records]


# ------------------------------------------------------------------------------------------- efficiency

def r_ves(examples: Sequence[Example], scores: Sequence[ExampleScore], executor: SQLExecutor,
          repeats: int) -> list[float]:
    """BIRD mini-dev's efficiency score of each question: 100 · sqrt(reward), 0 where the answer is wrong.

    Prediction and gold run in turn, `repeats` times each; the mean ratio of their times decides. Questions whose
    database could not be read meanwhile are left out.
    """
    pairs = zip(examples, scores, strict=True)
    bar = tqdm(pairs, desc="timing", unit="question", total=len(scores), leave=False, dynamic_ncols=True)
    values, unread = [], 0
    for example, score in bar:
        ratio = time_ratio(example, score.sql, executor, repeats) if score.correct["bird"] else 0.0
        if ratio is None:
            unread += 1
        else:
            values.append(100 * math.sqrt(r_ves_reward(ratio, 1.0)) if score.correct["bird"] else 0.0)
    if unread:
        tqdm.write(f"warning: {unread} questions are left out of R-VES, since their database could not be read")
    return values


def time_ratio(example: Example, sql: str, executor: SQLExecutor, repeats: int) -> float | None:
    """Mean of gold time / prediction time over repeated runs, without outliers beyond three deviations; None if the
    database could not be read."""
    ratios, gold_sql, *others = [], *example.gold_sqls
    if others:  # the first gold that runs: one that fails takes no time
        gold_sql = next((one for one in example.gold_sqls if executor.run(example.db_id, one).status == "ok"), gold_sql)
    for _ in range(repeats):
        predicted = executor.run(example.db_id, sql)
        gold = executor.run(example.db_id, gold_sql)
        if not predicted.unread and not gold.unread:  # what did not run took no time
            ratios.append(gold.seconds / max(predicted.seconds, 1e-9))
    return clean_mean(ratios) if ratios else None


def clean_mean(values: Sequence[float]) -> float:
    """The mean of the values within three standard deviations of their mean, as BIRD cleans its ratios."""
    values = np.asarray(values)
    return float(values[np.abs(values - values.mean()) <= 3 * values.std()].mean())


# ------------------------------------------------------------------------------------------------ main

def parse_arguments(arguments=None):
    """The command line as (namespace, EvaluateConfig, PromptConfig); the configs are None for a comparison."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--samples", type=int, default=argparse.SUPPRESS, metavar="N",
                        help="answers per question, which vote (default: 1, the greedy answer)")
    parser.add_argument("--compare", nargs="+", metavar=("A.json", "B.json"),
                        help="compare two --json files; more pairs: one per seed, and the mean over them")
    parser.add_argument("--anyway", action="store_true", help="compare what was measured under different protocols")
    add_arguments(parser, EvaluateConfig)
    add_arguments(parser, PromptConfig)
    given = parser.parse_args(arguments)
    refuse_idle_flags(given)
    if given.compare:
        return given, None, None
    run = run_config_of(given.model) if getattr(given, "model", None) else None
    values = fold(made_by=handed_on(run), flags=vars(given))
    return given, build(EvaluateConfig, values), build(PromptConfig, values)


def refuse_idle_flags(given: argparse.Namespace) -> None:
    """Raises UserError for flags that would change nothing."""
    flags = {one.name: flag_of(one) for config in (EvaluateConfig, PromptConfig) for one in fields(config)}
    idle, why = [], ""
    if given.compare:
        idle, why = [name for name in flags if name != "json"], "--compare takes --json and --anyway alone"
    elif getattr(given, "predictions", "") and not getattr(given, "model", ""):
        idle, why = (*OF_A_MODEL, *vars(PromptConfig())), "--predictions FILE goes without flags that need a --model"
    flags |= {"samples": "-n", "greedy": "--greedy" if getattr(given, "greedy", False) else "--no-greedy"}
    wrong = [flags[name] for name in idle if name in given]
    if wrong:
        raise UserError(f"{why}: leave out {', '.join(wrong)}")
    if given.anyway and not given.compare:
        raise UserError("--anyway is for --compare: leave it out")


def main() -> None:
    """Evaluate a model or a predictions file, or compare two evaluations."""
    given, config, prompts = parse_arguments()
    if config is None:
        if len(given.compare) == 2:
            print_comparison(result := compare(*given.compare, given.anyway))
        else:
            print_seeds(result := compare_seeds(given.compare, given.anyway))
        if getattr(given, "json", None):
            write_text(given.json, as_json(result, indent=1) + "\n")
        return
    config, dataset = settle(config)
    for note in dataset.notes:
        print(fill(note, 80, break_long_words=False, break_on_hyphens=False))
    databases, suite = suite_databases(dataset.databases) if config.test_suite else (dataset.databases, None)
    with SQLExecutor(databases, config.workers, config.timeout, config.max_rows, config.memory_limit_mb,
                     config.gold_cache) as executor:
        if config.model:
            evaluate_model(config, prompts, dataset, executor, suite)
        else:
            evaluate_predictions(config, dataset, executor, suite)


def settle(config: EvaluateConfig) -> tuple[EvaluateConfig, Dataset]:
    """The config with `lenient_format` resolved, and the questions; by default as in the run that made the model."""
    where = {"data_dir": config.data_dir, "split": config.split, "seed": config.seed, "world": config.world}
    run = run_config_of(config.model) if config.model else None
    lenient = bool(config.lenient_format)
    dataset = load_for_evaluation(config.data, run=run, **where) if config.model else load_dataset(config.data, **where)
    if lenient and run and run.get("lenient_format"):
        note = "SQL in a code fence counts, as in the run that made the model (--no-lenient-format: it does not)"
        dataset = replace(dataset, notes=(*dataset.notes, note))
    return replace(config, lenient_format=lenient), dataset


def chosen(config: EvaluateConfig, examples: Sequence[Example]) -> list[int]:
    """Positions of the questions that --exclude and --limit leave; prints how many --exclude left out."""
    ids, asked = excluded(config.exclude), {example.id for example in examples}
    kept = [i for i, example in enumerate(examples) if example.id not in ids]
    if not ids & asked:
        check_excluded(config.exclude, config.data, config.data_dir, config.split)
    if ids:
        others = f"; {len(ids - asked)} of its {len(ids)} ids are none of these questions" if ids - asked else ""
        print(fill(f"left out {len(examples) - len(kept)} of {len(examples)} questions by --exclude {config.exclude}"
                   + others, 80, break_long_words=False, break_on_hyphens=False))
    return kept[:config.limit or None]


def check_golds(config: EvaluateConfig, examples: Sequence[Example]) -> None:
    """Raises UserError: a flag needs gold SQL, and some questions have an answer instead."""
    wanted = ["--test-suite"] * config.test_suite + ["--r-ves"] * bool(config.r_ves)
    found = answers_among(examples)
    if wanted and found:
        raise UserError(f"{' and '.join(wanted)} cannot be measured, since {found}: give --exclude FILE with "
                        "the ids of these questions, or do without")


def evaluate_predictions(config: EvaluateConfig, dataset, executor: SQLExecutor, suite) -> None:
    """Score a predictions file."""
    sqls, pairing = load_predictions(config.predictions, dataset.examples)
    print(fill(f"predictions {pairing}", 80, break_on_hyphens=False))
    if config.lenient_format:
        sqls = [unwrap_fence(sql) for sql in sqls]
    kept = chosen(config, dataset.examples)
    examples = [dataset.examples[i] for i in kept]
    check_golds(config, examples)
    scores = score_predictions(examples, [sqls[i] for i in kept], executor, config.matches,
                               config.keep_distinct, progress=True, suite=suite)
    report_scores(config, examples, scores, executor, suite, {})


def evaluate_model(config: EvaluateConfig, prompts: PromptConfig, dataset, executor: SQLExecutor,
                   suite) -> None:
    """Let a model answer, and score its answers."""
    examples = [dataset.examples[i] for i in chosen(config, dataset.examples)]
    check_golds(config, examples)
    progress = Progress(config.progress or (config.json and f"{config.json}.progress"),
                        fingerprint(config, prompts, examples, FREE_TO_CHANGE))
    if progress.done:
        print(f"continuing: {sum(map(len, progress.done.values()))} of {len(examples)} questions are done")
    from policy import load_for_sampling  # here, so that scoring a predictions file does not wait for PyTorch
    from second_try import support_of

    policy = load_for_sampling(config.model, config.threads)
    builder = PromptBuilder(dataset.databases, policy.tokenizer, prompts)
    exam = config.exam(prompts.answer_style)
    support = support_of(config, policy, builder, executor, exam.answer_format)
    written = builder.protocol() | {"precision": str(policy.model.dtype).removeprefix("torch.")}
    if any(example.messages or example.prompt for example in examples):
        written["prompt_style"] = "ready-made"
    print(f"prompts: {written['prompt_style']}; answers: {written['answer_style']}")
    lost = unwritable(policy.tokenizer, examples, executor, config.matches)
    if lost:
        print(fill(unwritable_note(lost, examples, "golds", "no answer to these questions can be right, and they count "
                                   "as wrong"), 80, break_on_hyphens=False))
    try:
        records = Examination(policy, builder, executor, exam, config.ways,
                              matches=config.matches, keep_distinct=config.keep_distinct,
                              suite=suite, support=support).run(examples, progress)
        report_scores(config, examples, scores_of(records, config.answer), executor, suite, written, records,
                      [examples[i].id for i in sorted(lost)])
    except KeyboardInterrupt:
        if progress.file:
            print(f"\nwhat is done is kept in {progress.file}; the same command continues")
        raise
    progress.finish()


def report_scores(config: EvaluateConfig, examples, scores, executor: SQLExecutor, suite, written: dict,
                  records=None, unwritable_ids: Sequence[str] = ()) -> None:
    """Writes the files, then prints the tables, so that neither a closed terminal nor an unwritable file loses results.

    written: for a model, how its prompts were written, and its precision.
    unwritable_ids: ids of questions whose gold SQL the tokenizer changes.
    """
    summary = summarise(scores, config.skip_bad_gold)
    if not summary["n"]:
        print_reasons([(one["id"], "unavailable", one["error"], one["file"]) for one in summary["unavailable"]])
        raise UserError("no question is left to score: every one was excluded, its gold query fails, or its database "
                        "could not be read")
    if "spider" in config.matches:
        summary["spider_metric"] = spider_metric(config, suite)
    summary["failures"] = failures_of(scores, executor.databases, config.skip_bad_gold)
    content = scores_as_json(scores, summary) | {"protocol": protocol_of(config, examples, summary, written)}
    if records:
        content |= summarise_records(records, config) | {"unwritable": list(unwritable_ids)}
        for item, more in zip(content["examples"], records_as_json(records, config), strict=True):
            item |= more
    if config.r_ves:
        right = scores if "bird" in config.matches else score_predictions(
            examples, [score.sql for score in scores], executor, ["bird"], suite=suite)  # R-VES is BIRD's score
        kept = [i for i, score in enumerate(scores)
                if not score.left_out(config.skip_bad_gold) and not right[i].unavailable]
        content.setdefault("timing", {})["r_ves"] = mean(
            r_ves([examples[i] for i in kept], [right[i] for i in kept], executor, config.r_ves))
    problems = write_files(config, examples, scores, content, records)
    print_table(summary)
    if "spider" in config.matches:
        print(f"spider: {summary['spider_metric']}")
    if records:
        print_model_table(content)
    if config.r_ves:
        print(f"R-VES {content['timing']['r_ves']:.2f}, from {config.r_ves} timed runs a query")
    if problems:
        kept = "; the answers are kept, so the same command writes them at once"
        raise UserError("; ".join(problems) + (kept if records and (config.json or config.progress) else ""))


def write_files(config: EvaluateConfig, examples, scores, content: dict, records) -> list[str]:
    """Writes every requested file and returns the errors; an error with one file does not affect the others."""
    def write_traces(file):
        traces = [trace for record in records for trace in record["traces"]]
        write_text(file, json_lines(traces))
        return f"{len(traces)} verified traces written to {file}"

    problems = []
    for file, write in (
            (config.json, lambda file: write_text(file, as_json(content, indent=1) + "\n")),
            (config.predictions_out, lambda file: save_predictions(file, examples, [score.sql for score in scores])),
            (config.save_traces, write_traces)):
        try:
            note = write(file) if file else ""
        except UserError as error:
            problems.append(str(error))
            continue
        if note:
            print(fill(note, 80, break_long_words=False))
    return problems


def protocol_of(config: EvaluateConfig, examples, summary: dict, written: dict) -> dict:
    """Everything except the model that a score depends on; how a predictions file was made is unknown."""
    shown = {"data": Path(config.data).name, "split": config.split, "questions": questions_hash(examples)[:16],
             "test_suite": config.test_suite, "lenient_format": bool(config.lenient_format),
             "timeout": config.timeout, "max_rows": config.max_rows}
    if "spider" in config.matches:
        shown["spider_metric"] = summary["spider_metric"]
    if not config.model:
        return shown
    return shown | written | {
        "answer": config.answer, "samples": config.samples, "temperature": config.sampling_temperature,
        "max_completion_tokens": config.max_completion_tokens, "constrain": config.constrain,
        "turns": config.turns, **({"feedback": config.feedback} if config.turns > 1 else {})}


def spider_metric(config: EvaluateConfig, suite: dict[str, list[str]] | None) -> str:
    """The name of Spider's metric that was computed, in words."""
    distinct = "DISTINCT " + ("kept" if config.keep_distinct else "ignored")
    sizes = [1 + len(others) for others in (suite or {}).values()]
    if not sizes or max(sizes) == 1:
        found = "; no folder holds more than one .sqlite" if config.test_suite else ""
        return f"test-suite comparison on a single database, {distinct}{found}"
    return f"test suite of {min(sizes)} to {max(sizes)} databases for each db_id, {distinct}"


if __name__ == "__main__":
    run_main(main)
