"""Cold start: supervised fine-tuning on reasoning traces, so that GRPO starts from a policy that knows the format.

The loss is the mean cross-entropy of the completion tokens, `<think> trace </think> SQL <eos>` (or what --answer
says, see text2sql/answer_style.py), given the prompt. A trace is taught in the form that the reward reads: tags and
fences in it are removed, and if `parse_completion` still could not read it back, it is left out and counted.

No teacher is needed to write the traces. A template derives them from the gold SQL (text2sql/traces.py), or `--mine`
samples a model on questions with gold SQL, keeps what it got right, and writes a file that train.py takes as --traces,
for its cold start and its memory. When mining is interrupted, the same command continues where it stopped. Where no
flag says otherwise, a policy trained here is asked as in its run: prompts and answers are written, limited and read in
the same way.

    python sft.py --mine mined.jsonl --model runs/demo/best
    python sft.py --mine mined.jsonl --model qwen2.5-coder-3b --data spider --data-dir SPIDER -n 4 --lenient-format
    python train.py --traces mined.jsonl

A trace is kept when
  (1) verified   its SQL returns the gold result under BIRD's and under Spider's comparison, and the result has rows
  (2) useful     its reasoning passes the gate of the memory (text2sql/memory.py) and is no near-copy of another
  (3) balanced   its question has fewer than --max-per-question traces so far, its database and difficulty fewer than
                 --max-per-cell; databases and difficulties take turns, each question gives one before any gives two
"""

import argparse
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from os.path import commonprefix
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import PromptBuilder, PromptConfig, as_its_run, columns_of, load_dataset, run_config_of
from engine import distributed
from engine.fast import FAST
from engine.packing import fill
from grpo import Engine
from policy import load_for_sampling
from rewards import RewardConfig, build_memory, parse_completion
from running.errors import UserError, check_folder, json_lines, run_main, write_whole
from running.guards import Heartbeat
from running.options import HIGHEST_SEED, Parser, add_arguments, build, check, option
from scoring.answers import Examination, Progress, fingerprint
from scoring.verdicts import MATCHES, first_reasons
from settings import SFTConfig
from sql_exec import SQLExecutor
from text2sql.answer_style import ANSWER_STYLES, completion_text
from text2sql.example import Example
from text2sql.memory import MemoryGate, TraceMemory, gate_for
from text2sql.plain_text import encode_answers
from text2sql.prompts import prompt_config
from text2sql.traces import template_trace

__all__ = ["MineConfig", "SFTConfig", "cold_start", "cold_start_notes", "completion_text",
           "supervised_pairs", "taught_text", "teachable", "template_trace", "template_traces"]

PASS_TOKENS = 2**12  # of a forward pass of the cold start, where nothing else is said
TOGETHER = 4  # questions on one database that a cold start teaches side by side, so that their schema is computed once
OFTEN = 50  # times that a cold start may show each trace before we say that there are few
TAG = re.compile(r"</?think(?:ing)?\s*>", re.IGNORECASE)
FENCE_MARK = re.compile(r"^[ \t]*```[\w+-]*[ \t]*$\n?|```(?:sql(?:ite)?\b)?", re.MULTILINE | re.IGNORECASE)


def taught_text(example, answer_style: str = "think-sql") -> str:
    """The completion that an example with a trace teaches; the trace of a teacher nobody checked has SQL of its own."""
    return completion_text(example.trace, example.trace_sql or example.gold_sqls[0], answer_style)


# ---------------------------------------------------------------------------------------------- which traces are taught


def template_traces(examples: Sequence[Example], schemas: Mapping) -> list[Example]:
    """The examples, those without a trace with one that is made from their gold SQL.

    schemas: {db_id: {table: [column, ...]}}.
    """
    return [example if example.trace else replace(
        example, trace=template_trace(example.gold_sqls[0], schemas[example.db_id])) for example in examples]


def teachable(examples: Sequence[Example], executor, schemas: Mapping,
              answer_style: str = "think-sql") -> tuple[list[Example], list[str]]:
    """The traces that can be taught, without tags and fences, and a sentence a reason on those left out."""
    known = [example for example in examples if example.db_id in schemas]
    golds = executor.run_gold([(example.db_id, example.gold_sqls[0]) for example in known])
    strangers = sorted({example.db_id for example in examples} - set(schemas))
    reasons = Counter()
    if strangers:
        reasons[f"their db_id is not among the databases of the data (the first: {strangers[0]!r})"] = (
            len(examples) - len(known))
    kept, failed = [], []
    for example, gold in zip(known, golds, strict=True):
        if gold.status != "ok":
            failed.append((example.id, gold.status, gold.error or "", str(executor.databases[example.db_id])))
            continue
        clean, reason = without_tags(example, answer_style)
        if reason:
            reasons[reason] += 1
        else:
            kept.append(clean)
    notes = [f"left out {count} of {len(examples)} traces: {reason}" for reason, count in reasons.items()]
    if failed:
        notes.append("\n  ".join([f"left out {len(failed)} of {len(examples)} traces: their gold SQL fails; the first "
                                  "of each kind:", *first_reasons(failed)]))
    return kept, notes


def without_tags(example: Example, answer_style: str = "think-sql") -> tuple[Example, str]:
    """The example as it can be taught, so that it is read back as it is; and the reason where that cannot be."""
    trace, sql = bare_trace(example.trace), example.trace_sql or example.gold_sqls[0]
    if not trace:
        return example, "without tags and fences they hold no reasoning"
    if TAG.search(trace) or TAG.search(sql):
        return example, "they hold several <think> tags"
    read = parse_completion(completion_text(trace, sql), lenient=True)  # takes a fence off the SQL of a teacher
    if read is None or read != parse_completion(completion_text(*read, answer_style), style=answer_style):
        return example, "their SQL is not one statement that can be read back"
    return replace(example, trace=read[0], trace_sql=read[1] if example.trace_sql else ""), ""


def bare_trace(text: str) -> str:
    """The reasoning of a trace that may be a whole completion: what its tags enclose, without the marks of fences."""
    closing = ["/" in tag for tag in TAG.findall(text)]
    if closing not in ([], [False], [True], [False, True]):  # one may be missing: prompts can open, limits can cut
        return text
    pieces = TAG.split(text)
    return FENCE_MARK.sub("", pieces[1] if closing[:1] == [False] else pieces[0]).strip()


def supervised_pairs(examples: Sequence[Example], builder: PromptBuilder, tokenizer,
                     end_id: int) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """(prompt, completion with `end_id`) of the traces whose prompt fits, and a sentence on those left out.

    Raises:
        UserError: there are traces, but no prompt fits.
    """
    encoded, notes = builder.encode_all(examples)
    if examples and not encoded:
        raise UserError(f"no trace can be taught: the prompts of all {len(examples)} are longer than "
                        f"--max-prompt-tokens {builder.config.max_prompt_tokens}, even shortened")
    style = builder.config.answer_style
    answers = encode_answers(tokenizer, [taught_text(example, style) for example, _ in encoded])
    pairs = [(torch.tensor(ids), torch.tensor([*answer, end_id]))
             for (_, ids), answer in zip(encoded, answers, strict=True)]
    return pairs, [f"cold start: {note}" for note in notes]


def cold_start_notes(config: SFTConfig, traces: int, questions: int) -> list[str]:
    """Sentences on a cold start that does not do what one may expect of it; `questions` are those to train on."""
    steps = config.cold_start_steps
    if not traces:
        return [f"no cold start: --cold-start-steps {steps} has no traces to teach; give --traces FILE, or --traces "
                "template for reasoning made from the gold SQL"] if steps else []
    if not steps:
        return [f"no cold start: {traces} traces are there, but --cold-start-steps is 0; they only fill the memory"]
    times = round(steps * config.cold_start_batch / traces)
    if times <= OFTEN:
        return []
    more = "--traces template makes one for every question; else " if traces < questions else ""
    return [f"the cold start has only {traces} traces for {questions} training questions and shows each {times} times: "
            f"{more}lower --cold-start-steps"]


# ---------------------------------------------------------------------------------------------- teaching them


def cold_start(model, pairs: Sequence[tuple[Tensor, Tensor]], config: SFTConfig, *, seed: int,
               autocast: Callable = nullcontext, quiet: bool = False, tokens_per_pass: int = PASS_TOKENS,
               engine: Engine = FAST) -> float:
    """Trains on (prompt [P], completion [C] with EOS) pairs; returns the loss of the last tenth, nats a token.

    tokens_per_pass: what goes through the model together, at most; a batch takes as many passes as it needs, and
    several processes share them out.
    Raises:
        UserError: there are no pairs.
    """
    if not pairs:
        raise UserError("the cold start has no trace to teach: give --traces, or --cold-start-steps 0 to go without it")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.cold_start_lr,
                                  betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    steps = config.cold_start_steps
    warmup = max(1, min(50, steps // 10))
    losses, heartbeat = [], Heartbeat()
    model.train()
    kin = families([prompt for prompt, _ in pairs]) if not config.prompt_loss else None
    with tqdm(_batches(len(pairs), config.cold_start_batch, steps, seed, kin), desc="cold start", unit="step",
              dynamic_ncols=True, disable=quiet or None) as bar:  # None: only on a terminal, else a line a minute
        for step, batch in enumerate(bar, 1):
            # linear warm-up, then cosine decay
            rate = min(step / warmup, 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)))
            for group in optimizer.param_groups:
                group["lr"] = config.cold_start_lr * rate
            optimizer.zero_grad(set_to_none=True)
            losses.append(_backward(model, [pairs[i] for i in batch], config.prompt_loss, autocast,
                                    tokens_per_pass, engine))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if not quiet:
                heartbeat.beat(f"cold start, step {step} of {steps}: loss {losses[-1]:.3f}")
    model.eval()
    tail = losses[-max(1, len(losses) // 10):]
    return sum(tail) / len(tail)


def _backward(model, pairs: Sequence[tuple[Tensor, Tensor]], prompt_loss: float, autocast: Callable,
              tokens_per_pass: int, engine: Engine) -> float:
    """Adds the gradient of a batch's loss; returns its completion loss. Each process makes as many passes as its share
    of the batch asks for."""
    def tokens(part):  # that carry a loss: of completions, of prompts
        return sum(len(completion) for _, completion in part), sum(len(prompt) - 1 for prompt, _ in part)

    total, loss = tokens(pairs), 0.0
    parts = passes(pairs, tokens_per_pass)
    most = max(distributed.gather(len(parts)))
    for part in parts:
        share, prompt_share = (n / of if of else 0.0 for n, of in zip(tokens(part), total, strict=True))
        with autocast():
            of_completions, of_prompts = supervised_losses(model, part, prompt_loss > 0, engine)
        (share * of_completions + prompt_loss * prompt_share * of_prompts).backward()
        loss += share * of_completions.item()
    with autocast():
        distributed.make_idle_passes(model, engine, most - len(parts))
    distributed.sum_gradients(model)
    return sum(distributed.gather(loss))


def passes(pairs: Sequence[tuple[Tensor, Tensor]], tokens: int) -> list[list]:
    """Splits this process's share of a batch so that no pass has more tokens than these, where it has more than one
    pair. Pairs that begin alike are in one share."""
    rows = [torch.cat(pair) for pair in pairs]
    mine = sorted(range(len(pairs)), key=lambda i: rows[i].tolist())[distributed.share_of(len(pairs))]
    return [[pairs[mine[i]] for i in part] for part in fill([[rows[i]] for i in mine], tokens)]


def supervised_losses(model, pairs: Sequence[tuple[Tensor, Tensor]], with_prompts: bool = False,
                      engine: Engine = FAST) -> tuple[Tensor, Tensor]:
    """Mean cross-entropies of the completion tokens and of the prompt tokens (scalars, nats).

    A prompt's first token is given; the second is 0 unless `with_prompts`. The fast engine makes one row of all pairs,
    without padding, in which what several begin with stands once.
    """
    rows, given = [torch.cat(pair) for pair in pairs], [prompt[:1] if with_prompts else prompt for prompt, _ in pairs]
    logp = engine.logprobs(model, given, [row[len(tokens):] for row, tokens in zip(rows, given, strict=True)],
                           1.0)  # [N, T]
    first, prompt, total = (torch.tensor(list(map(len, sizes)))[:, None]
                            for sizes in (given, [prompt for prompt, _ in pairs], rows))
    position = first + torch.arange(logp.shape[1])  # [N, T], of each token in its row
    taught, read = (mask.to(logp.device) for mask in ((position >= prompt) & (position < total), position < prompt))
    return -logp[taught].mean(), -logp[read].mean() if with_prompts else logp.new_zeros(())


def families(prompts: Sequence[Tensor]) -> list[list[int]]:
    """Indices of prompts, those together that begin with the same half: questions on one database."""
    rows, kin = [prompt.tolist() for prompt in prompts], []
    for i in sorted(range(len(rows)), key=rows.__getitem__):
        if kin and 2 * len(commonprefix([rows[kin[-1][0]], rows[i]])) >= len(rows[i]):
            kin[-1].append(i)
        else:
            kin.append([i])
    return kin


def _batches(count: int, size: int, steps: int, seed: int, kin: Sequence[list[int]] | None = None) -> list[list[int]]:
    """`steps` batches of indices; every pair is seen once before any is seen again, a few of a family side by side.

    Raises:
        ValueError: there are no pairs.
    """
    if count < 1:
        raise ValueError("there are no pairs to make batches of")
    rng, order = random.Random(seed), []
    while len(order) < size * steps:
        few = [[i] for i in range(count)]
        if kin is not None:
            mixed = [rng.sample(family, len(family)) for family in kin]
            few = [family[i:i + TOGETHER] for family in mixed for i in range(0, len(family), TOGETHER)]
        order += [i for some in rng.sample(few, len(few)) for i in some]
    return [order[i * size:(i + 1) * size] for i in range(steps)]


# ---------------------------------------------------------------------------------------------- mining traces


# Settings on which the samples do not depend.
FREE_TO_CHANGE = ("mine", "max_per_question", "max_per_cell", "embedder", "threads", "workers")


@dataclass(frozen=True)
class MineConfig:
    """What to mine, and how much of it to keep."""

    mine: str = option("", "write verified traces to this .jsonl file")
    model: str = option("", "the model to sample: an alias, a Hugging Face id or a folder")
    data: str = option("demo", "demo, spider, bird, or your own .json or .jsonl")
    data_dir: str | None = option(None, "folder of the data and its databases")
    split: str = option("train", "the split to mine")
    world: str = option("default", "world of the demo: default, or hard, where most traces above the simple tier "
                                   "are wrong")
    limit: int = option(0, "only this many questions, drawn by the seed; 0: all", at_least=0)
    samples: int = field(default=8, metadata={"at_least": 1})  # -n
    temperature: float = option(1.0, "of sampling", above=0)
    max_completion_tokens: int = option(512, "a completion is cut at this many tokens; of a policy trained here by "
                                            "default as in its run", at_least=1)
    batch: int = option(256, "completions decoded side by side", at_least=1)
    lenient_format: bool = option(False, "also take SQL inside a code fence; of a policy trained here by default as in "
                                         "its run")
    max_per_question: int = option(2, "at most this many traces of a question", at_least=1)
    max_per_cell: int = option(20, "at most this many traces per database and difficulty", at_least=1)
    embedder: str = option("hash", "compares traces: hash (no model), policy (--model), or a Hugging Face "
                                   "encoder")
    seed: int = option(0, "seed of sampling and choosing, and of the demo world", at_least=0,
                       at_most=HIGHEST_SEED)
    threads: int = option(0, "CPU threads of PyTorch; 0: PyTorch's choice", at_least=0)
    workers: int = option(os.cpu_count() or 1, "SQL worker processes", at_least=1)
    timeout: float = option(5.0, "seconds a query may take", above=0, at_most=1e6)

    matches, keep_distinct, ways = tuple(MATCHES), True, ("sample",)  # how `Examination` answers and judges here

    def __post_init__(self):
        if not self.mine or not self.model:
            raise UserError("give --mine FILE and --model NAME: the file to write traces to and the model to sample")
        check_folder(self.mine)

    @property
    def sampling_temperature(self) -> float:
        return self.temperature


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
    records = sample(config, PromptBuilder(dataset.databases, policy.tokenizer, prompts), policy, examples, progress)
    write_traces(config, records, memory, progress, prompts.answer_style)


def sample(config: MineConfig, builder: PromptBuilder, policy, examples: Sequence[Example],
           progress: Progress) -> list[dict]:
    """Lets the model answer; Ctrl-C says how to go on."""
    with SQLExecutor(builder.databases, config.workers, config.timeout) as executor:
        try:
            return Examination(policy, builder, executor, config, traces=config.samples).run(examples, progress)
        except KeyboardInterrupt:
            print(f"\nwhat is done is kept in {progress.file}; the same command continues")
            raise


def write_traces(config: MineConfig, records: Sequence[dict], memory: TraceMemory, progress: Progress,
                 answer_style: str = "think-sql") -> None:
    """Chooses traces and writes the file. Raises UserError: there is none to write, and why."""
    verified = [(trace["db_id"], trace["trace"]) for record in records for trace in record["traces"]]
    memory.gate = gate_for(verified, memory.columns, memory.gate)
    kept = choose_traces(records, memory, config)
    summary = summary_of(records, kept, memory)
    if not verified:
        progress.finish()  # of no use to a command that reads answers in another way
        raise UserError(f"no trace to write to {config.mine}: {summary}: "
                        + why_none_verified(records, config, answer_style))
    if not kept:
        raise UserError(f"no trace to write to {config.mine}: {summary}: the gate refused "
                        f"{memory.gate.explain(memory.rejections)}; what was sampled is kept in {progress.file}, so "
                        "the same command with another gate is done at once")
    write_whole(Path(config.mine), json_lines(kept))
    print(f"{config.mine}: {summary}")
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
    try:
        run = run_config_of(given["model"]) if given.get("model") else None
        configs = (build(MineConfig, as_its_run(given, run)), build(MemoryGate, given), prompt_config(given, run))
        for config in configs:
            check(config)
    except ValueError as error:
        raise UserError(str(error)) from error
    return configs


def why_none_verified(records: Sequence[dict], config: MineConfig, answer_style: str = "think-sql") -> str:
    """What to do when no completion is verified: whether it is the format, the length or the SQL."""
    fates = sum((Counter(record["samples"]["statuses"]) for record in records), Counter())
    unread = fates.pop("unavailable", 0)  # of these nothing is known, not even whether they met the format
    if unread and not fates:
        return "no database could be read; try again when they can"
    total = fates.total() or 1
    met = 1 - (fates["format"] + fates["truncated"] + fates["too_long"]) / total
    if not fates.total():
        return "no prompt fits; raise --max-prompt-tokens"
    if fates["truncated"] > total / 2:
        return (f"{fates['truncated'] / total:.0%} of the completions were cut at --max-completion-tokens "
                f"{config.max_completion_tokens}; raise it, or teach the model to stop (train.py --traces template)")
    if met < 0.5:
        can_be_lenient = answer_style == "think-sql" and not config.lenient_format
        fence = " --lenient-format also takes SQL inside a code fence;" if can_be_lenient else ""
        return (f"only {met:.0%} of the completions met the format, {ANSWER_STYLES[answer_style].format};{fence} "
                "train.py --traces template teaches it in a cold start")
    return (f"{met:.0%} of the completions met the format, but none returned the gold result; try a larger -n, another "
            "--model or easier questions")


def choose_traces(records: Sequence[dict], memory: TraceMemory, config: MineConfig) -> list[dict]:
    """Verified traces that pass the memory's gate, balanced; `memory` counts those that do not.

    Args:
        records: of `Examination`, one a question.
        memory: empty; what is kept enters it.
    """
    rng, cells = random.Random(config.seed), {}  # (database, difficulty) -> traces in the order of their turn
    turns = [(rank, rng.random(), record["answers"]["sample"]["difficulty"], trace)
             for record in records for rank, trace in enumerate(record["traces"])]
    for _, _, difficulty, trace in sorted(turns, key=lambda turn: turn[:2]):  # every question's first, then seconds
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
    """In one line: how many were sampled, verified, refused by the gate and why, over the limits, kept."""
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
