"""Mine reasoning traces for the cold start (cold_start.py) from a model.

`--mine` samples a model on questions with gold SQL, keeps correct answers, and writes a file for --traces of train.py,
for its cold start and its memory. If mining is interrupted, the same command continues where it stopped. By default, a
policy trained here is asked as in its run: prompts and answers are written, limited and parsed in the same way.

    python sft.py --mine mined.jsonl --model runs/demo/best
    python sft.py --mine mined.jsonl --model qwen2.5-coder-3b --data spider --data-dir SPIDER -n 4 --lenient-format
    python train.py --traces mined.jsonl
    python sft.py --mine mined.jsonl --model runs/demo/best --repair        # also for a second try, train.py --turns 2

A trace is kept when
  (1) verified   its SQL returns the gold result under BIRD's and under Spider's comparison, and the result has rows
  (2) useful     its reasoning passes the gate of the memory (partial_credit/memory.py) and is no near-duplicate
  (3) balanced   its question has fewer than --max-per-question traces so far, its database and difficulty fewer than
                 --max-per-cell; databases and difficulties take turns, every question gives one before any gives two
"""

import argparse
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from cold_start import template_traces
from common.errors import UserError, check_folder, json_lines, run_main, write_whole
from common.options import Parser, add_arguments, build, check, option, shared
from data import PromptBuilder, PromptConfig, columns_of, load_dataset
from history import run_config_of
from partial_credit.memory import MemoryGate, TraceMemory, gate_for
from policy import load_for_sampling
from prompts.answer_format import AnswerFormat
from prompts.names import name_rules
from questions.example import Example
from rewards import RewardConfig, build_memory
from running.layers import fold, handed_on
from scoring.answers import Examination, Progress, fingerprint, ready_made
from scoring.voting import Exam
from second_try import Support
from sql_exec import SQLExecutor

# Settings that do not affect the samples.
FREE_TO_CHANGE = ("mine", "repair", "max_per_question", "max_per_cell", "embedder", "threads", "workers")


@dataclass(frozen=True)
class MineConfig:
    """What to mine, and how much of it to keep."""

    mine: str = option("", "write verified traces to this .jsonl file")
    model: str = option("", "the model to sample: an alias, a Hugging Face id or a folder")
    data: str = shared("data")
    data_dir: str | None = shared("data_dir")
    split: str = option("train", "the split to mine")
    world: str = shared("world")
    limit: int = option(0, "only this many questions, drawn by the seed; 0: all", at_least=0)
    samples: int = option(8, at_least=1)  # -n
    temperature: float = shared("temperature")
    max_completion_tokens: int = shared("max_completion_tokens")
    batch: int = shared("batch")
    constrain: str = shared("constrain", "; of a policy trained here by default as in its run")
    lenient_format: bool = shared("lenient_format", "; of a policy trained here by default as in its run",
                                  default=False)
    repair: bool = option(False, "also write, for --turns 2, answers that do not run, each with the trace that "
                                 "corrects it: the question's own, else one made from its gold SQL")
    max_per_question: int = option(2, "at most this many traces of a question, and as many failing answers", at_least=1)
    max_per_cell: int = option(20, "at most this many traces per database and difficulty", at_least=1)
    embedder: str = option("hash", "compares traces: hash (no model), policy (--model), or a Hugging Face "
                                   "encoder")
    seed: int = shared("seed", " and choosing, and of the demo world")
    threads: int = shared("threads")
    workers: int = shared("workers")
    timeout: float = shared("timeout")

    def __post_init__(self):
        check(self)
        if not self.mine or not self.model:
            raise UserError("give --mine FILE and --model NAME: the file to write traces to and the model to sample")
        check_folder(self.mine)

    def exam(self, answer_style: str) -> Exam:
        """How the model answers here."""
        return Exam(AnswerFormat(answer_style, bool(self.lenient_format)), self.max_completion_tokens, self.samples,
                    self.temperature, self.batch, self.seed)


def main() -> None:
    """Mine traces."""
    config, gate, prompts = parse_arguments()
    dataset = load_dataset(config.data, config.data_dir, config.split, seed=config.seed, world=config.world)
    for note in dataset.notes:
        print(note)
    examples = dataset.examples
    if 0 < config.limit < len(examples):
        examples = random.Random(config.seed).sample(examples, config.limit)
    progress = Progress(f"{config.mine}.progress", fingerprint(config, prompts, examples, FREE_TO_CHANGE))
    if progress.done:
        print(f"continuing: {sum(map(len, progress.done.values()))} of {len(examples)} questions are done")
    policy = load_for_sampling(config.model, config.threads)
    try:
        memory = build_memory(RewardConfig(embedder=config.embedder), gate, columns_of(dataset.databases),
                              policy.model.get_decoder(), policy.tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    builder, exam = PromptBuilder(dataset.databases, policy.tokenizer, prompts), config.exam(prompts.answer_style)
    with SQLExecutor(dataset.databases, config.workers, config.timeout) as executor:
        names = name_rules(config.constrain, policy, dataset.databases, exam.answer_format)
        examination = Examination(policy, builder, executor, exam, ("sample",), keep_distinct=True, traces=exam.samples,
                                  support=Support(names), failures=exam.samples)
        records = sample(examination, examples, progress)
    repairs = choose_repairs(records, examples, columns_of(dataset.databases), config) if config.repair else []
    write_traces(config, records, memory, progress, exam.answer_format, repairs)


def sample(examination: Examination, examples: Sequence[Example], progress: Progress) -> list[dict]:
    """Samples the model; on Ctrl-C, prints how to continue."""
    try:
        return examination.run(examples, progress)
    except KeyboardInterrupt:
        print(f"\nwhat is done is kept in {progress.file}; the same command continues")
        raise


def write_traces(config: MineConfig, records: Sequence[dict], memory: TraceMemory, progress: Progress,
                 answer_format: AnswerFormat, repairs: Sequence[dict] = ()) -> None:
    """Chooses traces and writes the file, repairs last. Raises UserError, with the reason, if there is neither."""
    verified = [(trace["db_id"], trace["trace"]) for record in records for trace in record["traces"]]
    memory.gate = gate_for(verified, memory.columns, memory.gate)
    kept = choose_traces(records, memory, config)
    summary = summary_of(records, kept, memory)
    if not verified and not repairs:
        progress.finish()  # useless to a command that parses answers differently
        raise UserError(f"no trace to write to {config.mine}: {summary}: "
                        + why_none_verified(records, answer_format))
    if not kept and not repairs:
        raise UserError(f"no trace to write to {config.mine}: {summary}: the gate refused "
                        f"{memory.gate.explain(memory.rejections)}; what was sampled is kept in {progress.file}, so "
                        "the same command with another gate is done at once")
    write_whole(Path(config.mine), json_lines([*kept, *repairs]))
    corrected = f"; and {len(repairs)} answers that do not run, each with the trace that corrects it"
    print(f"{config.mine}: {summary}" + corrected * config.repair)
    progress.finish()


def parse_arguments(arguments=None) -> tuple[MineConfig, MemoryGate, PromptConfig]:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--samples", type=int, default=argparse.SUPPRESS, metavar="N",
                        help=f"completions sampled per question (default: {MineConfig.samples})")
    kinds = (MineConfig, MemoryGate, PromptConfig)
    for kind in kinds:
        add_arguments(parser, kind)
    given = vars(parser.parse_args(arguments))
    run = run_config_of(given["model"]) if given.get("model") else None
    values = fold(made_by=handed_on(run), flags=given)
    return tuple(build(kind, values) for kind in kinds)


def why_none_verified(records: Sequence[dict], answer_format: AnswerFormat) -> str:
    """What to try if no completion is verified, depending on whether the format, the length or the SQL fails."""
    fates = sum((Counter(record["samples"]["statuses"]) for record in records), Counter())
    unread = fates.pop("unavailable", 0)  # nothing is known of these, not even their format
    if unread and not fates:
        return "no database could be read; try again when they can"
    if not fates:
        return "no prompt fits; raise --max-prompt-tokens"
    met = 1 - (fates["format"] + fates["truncated"]) / fates.total()
    return answer_format.advice(fates) or (f"{met:.0%} of the completions met the format, but none returned the gold "
                                           "result; try a larger -n, another --model or easier questions")


def choose_repairs(records: Sequence[dict], examples: Sequence[Example], schemas: Mapping,
                   config: MineConfig) -> list[dict]:
    """Failing answers to questions with gold SQL, each with the trace that corrects it, as records for --traces; with
    the limits of traces per question, and per database and difficulty.

    schemas: {db_id: {table: [column, ...]}}.
    """
    traced = {example.id: example for example in template_traces(examples, schemas) if example.gold_sqls}
    of_cell, kept = Counter(), []
    for rank in range(config.max_per_question):  # every question gives one before any gives two
        for record in records:
            example, failing = traced.get(record["id"]), record["failing"][rank:rank + 1]
            cell = example and (example.db_id, record["answers"]["sample"]["difficulty"])
            if example and failing and of_cell[cell] < config.max_per_cell:
                of_cell[cell] += 1
                kept.append(repair_of(example, failing[0], rank + 1))
    return kept


def repair_of(example: Example, failing: str, number: int) -> dict:
    """A record for --traces: a question's trace, after an answer that fails."""
    return {"id": f"{example.id}-repair-{number}", "db_id": example.db_id, "question": example.question,
            "sql": example.gold_sql, "evidence": example.evidence, "difficulty": example.difficulty,
            "trace": example.trace, "trace_sql": example.trace_sql, "first_try": failing, **ready_made(example)}


def choose_traces(records: Sequence[dict], memory: TraceMemory, config: MineConfig) -> list[dict]:
    """Verified traces that pass the memory's gate, balanced; `memory` counts those that do not.

    Args:
        records: from `Examination`, one per question.
        memory: empty; the chosen traces are added to it.
    """
    rng, cells = random.Random(config.seed), {}  # (database, difficulty) -> traces in the order of their turn
    turns = [(rank, rng.random(), record["answers"]["sample"]["difficulty"], trace)
             for record in records for rank, trace in enumerate(record["traces"])]
    for _, _, difficulty, trace in sorted(turns, key=lambda turn: turn[:2]):  # all first traces, then all second ones
        cells.setdefault((trace["db_id"], difficulty), []).append(trace)
    memory.prepare((trace["db_id"], trace["trace"]) for traces in cells.values() for trace in traces)
    kept, of_question, of_cell = [], Counter(), Counter()
    for turn in zip_longest(*cells.values()):
        for cell, trace in zip(cells, turn, strict=True):
            if trace is None or of_question[trace["id"]] == config.max_per_question or \
                    of_cell[cell] == config.max_per_cell or not memory.add(trace["db_id"], trace["trace"]):
                continue
            of_question[trace["id"]] += 1
            of_cell[cell] += 1
            kept.append(trace | {"id": f"{trace['id']}-trace-{of_question[trace['id']]}"})
    return kept


def summary_of(records: Sequence[dict], kept: Sequence[dict], memory: TraceMemory) -> str:
    """In one line: how many completions were sampled, verified, refused by the gate and why, over the limits, kept."""
    sampled = sum(sum(record["samples"]["statuses"].values()) for record in records)
    verified = sum(len(record["traces"]) for record in records)
    refused = memory.rejections.total()
    unread = sum("unavailable" in record["samples"]["statuses"] for record in records)
    difficulties = Counter(trace["difficulty"] for trace in kept if trace["difficulty"])
    left_out = f", {unread} questions left out, since their database could not be read" if unread else ""
    return (f"{sampled} completions of {len(records)} questions sampled{left_out}, {verified} different ones verified, "
            f"{refused} refused by the gate{counted(memory.rejections)}, {verified - refused - len(kept)} over the "
            f"limits, {len(kept)} kept{counted(difficulties)}")


def counted(counts: Counter) -> str:
    """` (simple 3, join 1)`."""
    return f" ({', '.join(f'{name} {count}' for name, count in counts.most_common())})" if counts else ""


if __name__ == "__main__":
    run_main(main)
