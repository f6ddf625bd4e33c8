"""Cold start: supervised fine-tuning on reasoning traces, so that GRPO starts from a policy that knows the format.

The loss is the mean cross-entropy of the completion tokens, `<think> trace </think> SQL <eos>`, given the prompt.
"""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import sqlparse
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


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


def cold_start(model, pairs: Sequence[tuple[Tensor, Tensor]], config: SFTConfig, *, seed: int,
               autocast: Callable = nullcontext) -> float:
    """Trains on (prompt [P], completion [C] with EOS) pairs; returns the loss of the last tenth, nats a token."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.cold_start_lr,
                                  betas=(0.9, 0.98), weight_decay=0.01)
    steps = config.cold_start_steps
    warmup = max(1, min(50, steps // 10))
    losses = []
    model.train()
    with tqdm(_batches(len(pairs), config.cold_start_batch, steps, seed), desc="cold start", unit="step",
              dynamic_ncols=True) as bar:
        for step, batch in enumerate(bar, 1):
            # linear warm-up, then cosine decay
            rate = min(step / warmup, 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)))
            for group in optimizer.param_groups:
                group["lr"] = config.cold_start_lr * rate
            with autocast():
                loss, prompt_loss = supervised_losses(model, [pairs[i] for i in batch], config.prompt_loss > 0)
            optimizer.zero_grad(set_to_none=True)
            (loss + config.prompt_loss * prompt_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    tail = losses[-max(1, len(losses) // 10):]
    return sum(tail) / len(tail)


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
    logits = model(input_ids=ids, attention_mask=(position < total).long(), use_cache=False).logits  # [N, L, V]

    def mean_over(wanted: Tensor) -> Tensor:
        labels = ids.masked_fill(~wanted, -100)[:, 1:]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=-100)

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
