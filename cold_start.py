"""Cold start: supervised fine-tuning on reasoning traces, so that GRPO starts from a policy that writes the format.

The loss is the mean cross-entropy of the completion tokens, `<think> trace </think> SQL <eos>` (or the style of
--answer, see prompts/answer_format.py), given the prompt. A trace is taught in the form that the reward reads: its tags
and fences are removed. A trace that `AnswerFormat.read` still cannot read back is left out and counted.

The traces need no teacher: a template derives them from the gold SQL (partial_credit/traces.py), or sft.py mines them
from a model.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from common.options import check, option
from data import PromptBuilder
from engine import distributed
from engine.fast import FAST
from engine.packing import fill
from grpo import Engine
from partial_credit.traces import failing_query, template_trace
from prompts.answer_format import AnswerFormat
from prompts.plain_text import encode_answers
from questions.example import Example
from running.guards import Heartbeat
from scoring.verdicts import first_reasons

__all__ = ["SFTConfig", "cold_start", "cold_start_notes", "supervised_pairs", "taught_text", "teachable",
           "template_trace", "template_traces"]

PASS_TOKENS = 2**12  # default per forward pass of the cold start
TOGETHER = 4  # questions on one database that a batch takes side by side, so that their schema is computed once
OFTEN = 50  # times a cold start may show each trace before a note says that they are few
TAG = re.compile(r"</?think(?:ing)?\s*>", re.IGNORECASE)
FENCE_MARK = re.compile(r"^[ \t]*```[\w+-]*[ \t]*$\n?|```(?:sql(?:ite)?\b)?", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class SFTConfig:
    """Settings of the cold start."""

    cold_start_steps: int = option(400, "supervised steps before GRPO; 0: none, the default of a pretrained model "
                                       "without --traces", at_least=0, common=True)
    cold_start_batch: int = option(32, "traces per supervised step", at_least=1)
    cold_start_lr: float = option(1e-5, "peak learning rate of the cold start", above=0)
    prompt_loss: float = option(0.0, "weight of the loss on prompt tokens; a policy from random weights learns to copy "
                                     "from them", at_least=0)

    __post_init__ = check


class Pair(NamedTuple):
    """A completion to teach, and what it follows. A plain (prompt, completion) is one without a failing first try."""

    prompt: Tensor  # [P]
    completion: Tensor  # [C], with EOS
    own: int | None = None  # tokens of the prompt before a failing first try, which must not be taught; None: P

    @property
    def read(self) -> int:
        """Tokens that `prompt_loss` teaches, counted from the prompt's beginning."""
        return len(self.prompt) if self.own is None else self.own


def taught_text(example, answer_format: AnswerFormat) -> str:
    """The completion that an example with a trace teaches; an unverified teacher's trace has its own SQL."""
    return answer_format.write(example.trace, example.trace_sql or example.gold_sql)


# ---------------------------------------------------------------------------------------------- which traces are taught


def template_traces(examples: Sequence[Example], schemas: Mapping) -> list[Example]:
    """The examples; those without a trace get one made from their gold SQL. Those with neither are left out.

    schemas: {db_id: {table: [column, ...]}}.
    """
    return [example if example.trace else replace(
        example, trace=template_trace(example.gold_sql, schemas[example.db_id])) for example in examples
        if example.trace or example.gold_sqls]


def second_tries(examples: Sequence[Example], schemas: Mapping, answer_format: AnswerFormat) -> list[Example]:
    """For each trace, one that corrects a failing answer to its question: that of `failing_query`."""
    wrong = [failing_query(example.gold_sql, schemas[example.db_id]) for example in examples]
    return [replace(example, first_try=answer_format.write(template_trace(sql, schemas[example.db_id]), sql))
            for example, sql in zip(examples, wrong, strict=True) if sql]


def teachable(examples: Sequence[Example], executor, schemas: Mapping,
              answer_format: AnswerFormat) -> tuple[list[Example], list[str]]:
    """The traces that can be taught, without tags and fences, and one sentence per reason on those left out."""
    with_sql = [example for example in examples if example.gold_sqls or example.trace_sql]
    known = [example for example in with_sql if example.db_id in schemas]
    golds = executor.run_gold([(example.db_id, example.golds[0]) for example in known])
    strangers = sorted({example.db_id for example in with_sql} - set(schemas))
    reasons = Counter()
    if len(with_sql) < len(examples):
        reasons["they lead to an answer, and to no SQL (field 'trace_sql')"] = len(examples) - len(with_sql)
    if strangers:
        reasons[f"their db_id is not among the databases of the data (the first: {strangers[0]!r})"] = (
            len(with_sql) - len(known))
    kept, failed = [], []
    for example, gold in zip(known, golds, strict=True):
        if gold.status != "ok":
            failed.append((example.id, gold.status, gold.error or "", str(executor.databases[example.db_id])))
            continue
        clean, reason = without_tags(example, answer_format)
        if reason:
            reasons[reason] += 1
        else:
            kept.append(clean)
    notes = [f"left out {count} of {len(examples)} traces: {reason}" for reason, count in reasons.items()]
    if failed:
        notes.append("\n  ".join([f"left out {len(failed)} of {len(examples)} traces: their gold SQL fails; the first "
                                  "of each kind:", *first_reasons(failed)]))
    return kept, notes


def without_tags(example: Example, answer_format: AnswerFormat) -> tuple[Example, str]:
    """The example in a form that is read back unchanged; and the reason if there is no such form."""
    trace, sql = bare_trace(example.trace), example.trace_sql or example.gold_sql
    if not trace:
        return example, "without tags and fences they hold no reasoning"
    if TAG.search(trace) or TAG.search(sql):
        return example, "they hold several <think> tags"
    read = AnswerFormat(lenient=True).read(AnswerFormat().write(trace, sql))  # removes a fence from a teacher's SQL
    if read is None or read != answer_format.read(answer_format.write(*read)):
        return example, "their SQL is not one statement that can be read back"
    return replace(example, trace=read[0], trace_sql=read[1] if example.trace_sql else ""), ""


def bare_trace(text: str) -> str:
    """The reasoning of a trace that may be a whole completion: the text between its tags, without fence marks."""
    closing = ["/" in tag for tag in TAG.findall(text)]
    if closing not in ([], [False], [True], [False, True]):  # a prompt may hold the first, a limit cut the second
        return text
    pieces = TAG.split(text)
    return FENCE_MARK.sub("", pieces[1] if closing[:1] == [False] else pieces[0]).strip()


def supervised_pairs(examples: Sequence[Example], builder: PromptBuilder, tokenizer, end_id: int,
                     second=None) -> tuple[list[tuple[Tensor, Tensor] | Pair], list[str]]:
    """(prompt, completion with `end_id`) of the traces whose prompt fits, and a sentence on those left out.

    second: second_try.SecondTry, or None. A trace that is a second try gives a Pair: it is taught after the failing
    answer and what is observed then, which belong to its prompt.
    Raises:
        UserError: there are traces, but no prompt fits.
    """
    firsts, others = ([example for example in examples if bool(example.first_try) is tried] for tried in (False, True))
    seen = [None] * len(others)
    if second:
        seen = distributed.on_main(lambda: second.observe(others, [example.first_try for example in others]))
    again = [(example, ids) for example, ids in zip(others, seen, strict=True) if ids is not None]
    fitting, notes = builder.encode_all([*firsts, *(example for example, _ in again)])
    if len(again) < len(others):
        notes += (f"left out {len(others) - len(again)} of {len(others)} second tries: "
                  + ("their first try does not fail" if second else "only --turns 2 teaches them"),)
    if (firsts or again) and not fitting:
        raise UserError(f"no trace can be taught: the prompts of all {len(examples)} are longer than "
                        f"--max-prompt-tokens {builder.config.max_prompt_tokens}, even shortened")
    answer_format = AnswerFormat(builder.config.answer_style)
    answers = encode_answers(tokenizer, [taught_text(example, answer_format) for example, _ in fitting])
    tries = encode_answers(tokenizer, [example.first_try for example, _ in fitting])
    observed, pairs = {id(example): ids for example, ids in again}, []
    for (example, ids), answer, first in zip(fitting, answers, tries, strict=True):
        prompt, completion = torch.tensor(ids), torch.tensor([*answer, end_id])
        if example.first_try:
            between = torch.cat([torch.tensor([*first, end_id]), observed[id(example)]])
            pairs.append(Pair(torch.cat([prompt, between]), completion, len(prompt)))
        else:
            pairs.append((prompt, completion))
    return pairs, [f"cold start: {note}" for note in notes]


def cold_start_notes(config: SFTConfig, traces: int, questions: int) -> list[str]:
    """Notes on a cold start without traces, without steps or with few traces. questions: number to train on"""
    steps = config.cold_start_steps
    if not traces:
        return [f"no cold start: --cold-start-steps {steps} has no traces to teach; give --traces FILE, or --traces "
                "template for reasoning made from the gold SQL"] if steps else []
    if not steps:
        return [f"no cold start: {traces} traces are there, but --cold-start-steps is 0; they only fill the memory"]
    times = round(steps * config.cold_start_batch / traces)
    if times <= OFTEN:
        return []
    more = "--traces template makes one for every question with gold SQL; else " if traces < questions else ""
    return [f"the cold start has only {traces} traces for {questions} training questions and shows each {times} times: "
            f"{more}lower --cold-start-steps"]


# ---------------------------------------------------------------------------------------------- teaching them


def cold_start(model, pairs: Sequence[tuple[Tensor, Tensor]], config: SFTConfig, *, seed: int,
               autocast: Callable = nullcontext, quiet: bool = False, tokens_per_pass: int = PASS_TOKENS,
               engine: Engine = FAST) -> float:
    """Trains on pairs (`Pair`, or prompt [P] and completion [C] with EOS); returns the loss of the last tenth, nats per
    token.

    tokens_per_pass: the most that go through the model together; a batch takes as many passes as it needs, and
    several processes share them.
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
    kin = families([prompt for prompt, *_ in pairs]) if not config.prompt_loss else None
    with tqdm(_batches(len(pairs), config.cold_start_batch, steps, seed, kin), desc="cold start", unit="step",
              dynamic_ncols=True, disable=quiet or None) as bar:  # None: only on a terminal, else a line per minute
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


def _backward(model, pairs: Sequence[Pair], prompt_loss: float, autocast: Callable,
              tokens_per_pass: int, engine: Engine) -> float:
    """Adds the gradient of a batch's loss; returns its completion loss. Each process makes as many passes as its share
    of the batch needs."""
    def tokens(part):  # numbers of tokens with a loss: of completions, of prompts
        return sum(len(pair.completion) for pair in part), sum(pair.read - 1 for pair in part)

    pairs = [Pair(*pair) for pair in pairs]
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


def passes(pairs: Sequence[Pair], tokens: int) -> list[list]:
    """Splits this process's share of a batch into passes of up to `tokens` tokens, or of a single pair. Sorting puts
    pairs with a common prefix into one share."""
    rows = [torch.cat(pair[:2]) for pair in pairs]
    mine = sorted(range(len(pairs)), key=lambda i: rows[i].tolist())[distributed.share_of(len(pairs))]
    return [[pairs[mine[i]] for i in part] for part in fill([[rows[i]] for i in mine], tokens)]


def supervised_losses(model, pairs: Sequence[Pair], with_prompts: bool = False,
                      engine: Engine = FAST) -> tuple[Tensor, Tensor]:
    """Mean cross-entropies of the completion tokens and of the prompt tokens (scalars, nats).

    A prompt's first token has no loss; the second mean is 0 unless `with_prompts`. The fast engine packs all pairs into
    one row without padding, in which a common prefix appears once.
    """
    pairs = [Pair(*pair) for pair in pairs]
    rows = [torch.cat(pair[:2]) for pair in pairs]
    given = [pair.prompt[:1] if with_prompts else pair.prompt for pair in pairs]
    logp = engine.logprobs(model, given, [row[len(tokens):] for row, tokens in zip(rows, given, strict=True)],
                           1.0)  # [N, T]
    lengths = [(len(tokens), pair.read, len(pair.prompt), len(row))
               for tokens, pair, row in zip(given, pairs, rows, strict=True)]
    first, own, prompt, total = torch.tensor(lengths).T[..., None]  # [N, 1] each
    position = first + torch.arange(logp.shape[1])  # [N, T], of each token in its row
    taught, read = (mask.to(logp.device) for mask in ((position >= prompt) & (position < total), position < own))
    return -logp[taught].mean(), -logp[read].mean() if with_prompts else logp.new_zeros(())


def families(prompts: Sequence[Tensor]) -> list[list[int]]:
    """Groups the indices of prompts whose first half is the same: questions on one database."""
    rows, kin = [prompt.tolist() for prompt in prompts], []
    for i in sorted(range(len(rows)), key=rows.__getitem__):
        if kin and 2 * len(commonprefix([rows[kin[-1][0]], rows[i]])) >= len(rows[i]):
            kin[-1].append(i)
        else:
            kin.append([i])
    return kin


def _batches(count: int, size: int, steps: int, seed: int, kin: Sequence[list[int]] | None = None) -> list[list[int]]:
    """`steps` batches of indices; every pair comes once before any comes again, a few of a family side by side.

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
