"""Cold start: supervised fine-tuning on reasoning traces, so that GRPO starts from a policy that knows the format.

The loss is the mean cross-entropy of the completion tokens, `<think> trace </think> SQL <eos>`, given the prompt.

No teacher is needed to write the traces: `--mine` samples a model on questions with gold SQL, keeps what it got
right, and writes a file that train.py takes as --traces, for its cold start and its memory.

    python sft.py --mine mined.jsonl --model runs/demo/best
    python sft.py --mine mined.jsonl --model qwen2.5-coder-3b --data spider --data-dir SPIDER -n 4 --lenient-format
    python train.py --traces mined.jsonl

A trace is kept when
  (1) verified   its SQL returns the gold result under BIRD's and under Spider's comparison, and that has rows
  (2) useful     its reasoning passes the gate of the reward's memory (memory.py); none is nearly a copy of another
  (3) balanced   at most --max-per-question of its question and --max-per-cell of its database and difficulty are kept
                 before it; databases and difficulties take turns, each question gives one before any gives two
"""

import argparse
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import sqlparse
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import PromptBuilder, PromptConfig, columns_of, load_dataset
from rewards import RewardConfig, build_memory
from running.errors import UserError, check_folder, json_lines, run_main, write_whole
from running.guards import Heartbeat
from running.options import add_arguments, build
from scoring.answers import Examination, Progress
from scoring.verdicts import MATCHES
from scoring.voting import load_for_sampling
from sql_exec import SQLExecutor
from text2sql.memory import MemoryGate, TraceMemory

PASS_TOKENS, PASS_LOGITS = 2**14, 2**27  # of a forward pass of the cold start, at most; 2**27 are 512 MiB in float32
SHORT_TRACES = {"memory_min_words": 5, "memory_min_columns": 1}  # the gate for the demo, whose traces are short


@dataclass(frozen=True)
class SFTConfig:
    """Settings of the cold start."""

    cold_start_steps: int = field(default=400, metadata={"help": "supervised steps before GRPO; 0: none"})
    cold_start_batch: int = field(default=32, metadata={"help": "traces per supervised step"})
    cold_start_lr: float = field(default=1e-5, metadata={"help": "peak learning rate of the cold start"})
    prompt_loss: float = field(default=0.0, metadata={"help": "weight of the loss on prompt tokens; a policy from "
                                                              "random weights learns to copy from them"})


def completion_text(trace: str, sql: str) -> str:
    """What a policy is taught to write."""
    return f"<think> {trace} </think> {sql}"


def taught_text(example) -> str:
    """The completion that an example with a trace teaches; the trace of a teacher nobody checked has SQL of its own."""
    return completion_text(example.trace, example.trace_sql or example.gold_sqls[0])


def cold_start(model, pairs: Sequence[tuple[Tensor, Tensor]], config: SFTConfig, *, seed: int,
               autocast: Callable = nullcontext, quiet: bool = False) -> float:
    """Trains on (prompt [P], completion [C] with EOS) pairs; returns the loss of the last tenth, nats a token."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.cold_start_lr,
                                  betas=(0.9, 0.98), weight_decay=0.01)
    steps = config.cold_start_steps
    warmup = max(1, min(50, steps // 10))
    losses, heartbeat = [], Heartbeat()
    model.train()
    with tqdm(_batches(len(pairs), config.cold_start_batch, steps, seed), desc="cold start", unit="step",
              dynamic_ncols=True, disable=quiet or None) as bar:  # None: only on a terminal, else a line a minute
        for step, batch in enumerate(bar, 1):
            # linear warm-up, then cosine decay
            rate = min(step / warmup, 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)))
            for group in optimizer.param_groups:
                group["lr"] = config.cold_start_lr * rate
            optimizer.zero_grad(set_to_none=True)
            losses.append(_backward(model, [pairs[i] for i in batch], config.prompt_loss, autocast))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if not quiet:
                heartbeat.beat(f"cold start, step {step} of {steps}: loss {losses[-1]:.3f}")
    model.eval()
    tail = losses[-max(1, len(losses) // 10):]
    return sum(tail) / len(tail)


def _backward(model, pairs: Sequence[tuple[Tensor, Tensor]], prompt_loss: float, autocast: Callable) -> float:
    """Adds the gradient of a batch's loss, in as many passes as its size asks for; returns its completion loss."""
    def tokens(part):  # that carry a loss: of completions, of prompts
        return sum(len(completion) for _, completion in part), sum(len(prompt) - 1 for prompt, _ in part)

    total, loss = tokens(pairs), 0.0
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for part in passes(pairs, vocabulary, whole_rows=prompt_loss > 0):
        share, prompt_share = (n / of if of else 0.0 for n, of in zip(tokens(part), total, strict=True))
        with autocast():
            of_completions, of_prompts = supervised_losses(model, part, prompt_loss > 0)
        (share * of_completions + prompt_loss * prompt_share * of_prompts).backward()
        loss += share * of_completions.item()
    return loss


def passes(pairs: Sequence[tuple[Tensor, Tensor]], vocabulary: int, whole_rows: bool) -> list[list]:
    """Splits a batch so that no pass has too many tokens or logits, like lengths together; a small batch stays whole.

    whole_rows: logits are wanted of prompts as well.
    """
    def fits(part) -> bool:
        longest = max(len(prompt) + len(completion) for prompt, completion in part)
        kept = longest if whole_rows else longest - min(len(prompt) for prompt, _ in part) + 1
        return len(part) * longest <= PASS_TOKENS and len(part) * kept * vocabulary <= PASS_LOGITS

    if fits(pairs):
        return [list(pairs)]
    parts: list[list] = [[]]
    for pair in sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1])):
        if parts[-1] and not fits([*parts[-1], pair]):
            parts.append([])
        parts[-1].append(pair)
    return parts


def supervised_losses(model, pairs: Sequence[tuple[Tensor, Tensor]], with_prompts: bool = False):
    """Mean cross-entropies of the completion tokens and of the prompt tokens of right-padded rows (scalars, nats).

    Padding carries no loss; the second is 0 unless `with_prompts`.
    """
    device = next(model.parameters()).device
    rows = [torch.cat(pair) for pair in pairs]
    L = max(map(len, rows))
    ids = torch.stack([F.pad(row, (0, L - len(row))) for row in rows]).to(device)  # [N, L]
    position = torch.arange(L, device=device)
    prompt = torch.tensor([len(p) for p, _ in pairs], device=device)[:, None]
    total = torch.tensor([len(row) for row in rows], device=device)[:, None]
    kept = L if with_prompts else L - int(prompt.min()) + 1  # the last K positions; what comes before predicts prompts
    logits = model(input_ids=ids, attention_mask=(position < total).long(), use_cache=False,
                   logits_to_keep=kept).logits  # [N, K, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    def mean_over(wanted: Tensor) -> Tensor:
        labels = ids.masked_fill(~wanted, -100)[:, L - kept + 1:]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)

    completion_loss = mean_over((position >= prompt) & (position < total))
    return completion_loss, mean_over(position < prompt) if with_prompts else completion_loss.new_zeros(())


def _batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """`steps` batches of indices; every pair is seen once before any is seen again."""
    rng, order = random.Random(seed), []
    while len(order) < size * steps:
        order += rng.sample(range(count), count)
    return [order[i * size:(i + 1) * size] for i in range(steps)]


def template_trace(sql: str, schema: dict[str, list[str]]) -> str:
    """A plain reasoning trace for a gold SQL without one: its tables, its columns, and the clauses it needs.

    Args:
        schema: {table: [column, ...]} of the database.
    """
    words = [value for kind, value in sqlparse.lexer.tokenize(sql) if kind not in sqlparse.tokens.Literal.String.Single]
    spoken = {word.strip('"`[]').lower() for word in words}
    tables = [table for table in schema if table.lower() in spoken]
    columns = list(dict.fromkeys(c for table in tables for c in schema[table] if c.lower() in spoken))
    known = ("join", "where", "group by", "having", "order by", "limit", "intersect", "union", "except")
    clauses = [clause for clause in known
               if any(word.lower().split() == clause.split() or word.lower().endswith(clause) for word in words)]
    nested = ["subquery"] if sum(word.lower() == "select" for word in words) > 1 else []
    return " ; ".join(f"{name} {' '.join(items)}" for name, items in
                      (("tables", tables), ("columns", columns), ("clauses", clauses + nested or ["select"])) if items)


# ---------------------------------------------------------------------------------------------- mining traces


@dataclass(frozen=True)
class MineConfig:
    """What to mine, and how much of it to keep."""

    mine: str = field(default="", metadata={"help": "write verified traces to this .jsonl file"})
    model: str = field(default="", metadata={"help": "the model to sample: an alias, a Hugging Face id or a folder"})
    data: str = field(default="demo", metadata={"help": "demo, spider, bird, or your own .json or .jsonl"})
    data_dir: str | None = field(default=None, metadata={"help": "folder of the data and its databases"})
    split: str = field(default="train", metadata={"help": "which questions"})
    world: str = field(default="default", metadata={"help": "of the demo: default, or hard (its teacher mostly slips)"})
    limit: int = field(default=0, metadata={"help": "only this many questions, drawn by the seed; 0: all"})
    samples: int = 8  # -n
    temperature: float = field(default=1.0, metadata={"help": "of sampling"})
    max_completion_tokens: int = field(default=512, metadata={"help": "a completion is cut at this many tokens"})
    batch: int = field(default=256, metadata={"help": "completions decoded side by side"})
    lenient_format: bool = field(default=False, metadata={"help": "also take SQL inside a code fence"})
    max_per_question: int = field(default=2, metadata={"help": "at most this many traces of a question"})
    max_per_cell: int = field(default=20, metadata={"help": "at most this many of a (database, difficulty)"})
    embedder: str = field(default="hash", metadata={
        "help": "tells how near traces are: hash (no model), policy (--model), or a Hugging Face encoder"})
    seed: int = field(default=0, metadata={"help": "seed of sampling and choosing, and of the demo world"})
    threads: int = field(default=0, metadata={"help": "CPU threads of PyTorch; 0: PyTorch's choice"})
    workers: int = field(default=os.cpu_count() or 1, metadata={"help": "SQL worker processes"})
    timeout: float = field(default=5.0, metadata={"help": "seconds a query may take"})

    matches, keep_distinct, ways = MATCHES, True, ("sample",)  # how `Examination` answers and judges here

    def __post_init__(self):
        if not self.mine or not self.model:
            raise UserError("give --mine FILE and --model NAME: traces of which model are to be written where")
        for name in ("samples", "temperature", "max_completion_tokens", "batch", "max_per_question", "max_per_cell",
                     "workers", "timeout"):
            if not 0 < getattr(self, name) < math.inf:
                shown = "-n" if name == "samples" else "--" + name.replace("_", "-")
                raise UserError(f"{shown} must be above zero, not {getattr(self, name)}")
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
    policy = load_for_sampling(config.model, config.threads)
    schemas = columns_of(dataset.databases)
    try:
        memory = build_memory(RewardConfig(embedder=config.embedder), gate, schemas, policy.model.get_decoder(),
                              policy.tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    builder = PromptBuilder(dataset.databases, policy.tokenizer, prompts)
    with SQLExecutor(dataset.databases, config.workers, config.timeout) as executor:
        examination = Examination(policy, builder, executor, config, traces=config.samples)
        records = examination.run(examples, Progress(None, {}))
    kept = choose_traces(records, memory, config)
    summary = summary_of(records, kept, memory)
    if not kept:
        raise UserError(f"no trace to write to {config.mine}: {summary}")
    try:
        write_whole(Path(config.mine), json_lines(kept))
    except OSError as error:
        raise UserError(f"cannot write {config.mine}: {error.strerror}") from error
    print(f"{config.mine}: {summary}")


def parse_arguments(arguments=None) -> tuple[MineConfig, MemoryGate, PromptConfig]:
    """The command line; the gate has the demo's thresholds on the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--samples", type=int, default=argparse.SUPPRESS, metavar="N",
                        help=f"completions sampled a question (default: {MineConfig.samples})")
    configs = (MineConfig, MemoryGate, PromptConfig)
    for config in configs:
        add_arguments(parser, config)
    given = vars(parser.parse_args(arguments))
    defaults = SHORT_TRACES if given.get("data", "demo") == "demo" else {}
    return tuple(build(config, defaults | given) for config in configs)


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
    memory.prepare(trace["trace"] for traces in cells.values() for trace in traces)
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
    difficulties = Counter(trace["difficulty"] for trace in kept if trace["difficulty"])
    return (f"{sampled} completions of {len(records)} questions sampled, {verified} different ones verified, "
            f"{refused} refused by the gate{counted(memory.rejections)}, {verified - refused - len(kept)} over the "
            f"limits, {len(kept)} kept{counted(difficulties)}")


def counted(counts: Counter) -> str:
    """` (simple 3, join 1)`."""
    return f" ({', '.join(f'{name} {count}' for name, count in counts.most_common())})" if counts else ""


if __name__ == "__main__":
    run_main(main)
