"""GRPO for Text-to-SQL in one file: the whole algorithm and nothing else. The first file to read.

A policy (a language model) is asked a question about a database and answers `<think> reasoning </think> SQL`. For each
question it samples a group of G answers o_1 … o_G. Each answer gets a reward R_i by running its SQL. Then

    (1)  A_i = (R_i − mean(R)) / std(R)                            advantage: better or worse than its group?
    (2)  r_it = π(o_it | q, o_i<t) / π_old(o_it | q, o_i<t)        ratio, 1 here, but its gradient is that of log π
    (3)  S_it = r_it A_i                                           surrogate: likelier if better, less likely if worse
    (5)  L = −mean_i mean_t S_it                                   what the optimizer descends

numbered as in grpo.py. There is no value model: the mean of the group is the baseline. A tiny policy is built here from
random weights and first taught the format by a careless teacher, half of whose answers to the harder questions contain
a slip. GRPO sees no answers, only whether its own are right. On two CPU cores, without a download:

    $ python minimal.py
    before GRPO: 45.1% of 206 held-out questions right (24 s)
    step 10: reward 0.59, right 55%
    …
    step 80: reward 0.54, right 48%
    after GRPO: 61.7% of 206 held-out questions right (91 s)

What it leaves out, and where that is:
 1. clipping in eq. (3) and several updates per rollout, for which π_old must be kept: grpo.py, `clipped_surrogate`
 2. the KL to a reference, eq. (4): grpo.py, `kl_estimate`
 3. other losses and advantages (DAPO, Dr. GRPO, GSPO, …): variants.py
 4. micro-batches, and passes in which the prompt of a group stands once: grpo.py, engine/packing.py
 5. a decoder that copies no cache and drops rows that have ended; GPUs, bf16, several processes: engine/
 6. atomic and memory rewards: rewards.py, partial_credit/
 7. untrusted SQL in worker processes with limits of time and memory: sql_exec.py
 8. prompts with keys, sample values and hints, chat templates: prompts/
 9. Spider, BIRD, your own questions: data.py
10. choosing the best checkpoint on a dev set, saving, resume, logs, the report: train.py, running/
"""

import argparse
import random
import re
import sqlite3
import time

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

B, G = 16, 8  # questions per step, answers per question
T = 64  # tokens of the longest answer
TEMPERATURE = 0.7  # of sampling, and so of the log-probabilities: π is the distribution that was sampled from
DATABASES = ("music", "shop", "school", "travel", "library")  # of the demo's ten, as there are only minutes to learn


# ---- questions, policy
def load_questions(split: str) -> list[dict]:
    """The demo's questions: prompt, gold sql, database; in the split `cold` also a taught answer."""
    from questions.demo_world import load  # the only import of the project; replace it by questions of your own

    records, files = load(split)
    dbs = {name: sqlite3.connect(f"file:{files[name]}?mode=ro", uri=True) for name in DATABASES}
    for db in dbs.values():
        db.set_progress_handler(lambda: True, 1_000_000)  # stops a query after so many instructions
    schemas = {name: " / ".join(f"{table} {columns}" for table, columns in db.execute(
        "SELECT t.name, group_concat(c.name, ' ') FROM sqlite_master t, pragma_table_info(t.name) c GROUP BY t.name"))
        for name, db in dbs.items()}
    return [{"prompt": f"{schemas[r['db_id']]} / {r['question']}\n", "sql": r["sql"], "db": dbs[r["db_id"]],
             "answer": f"<think> {r['trace']} </think> {r['trace_sql'] or r['sql']}"}
            for r in records if r["db_id"] in dbs]


def load_pretrained(path: str):
    """-> model, encode (text -> ids), decode (ids -> text), the id that ends an answer."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return (model, lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode,
            tokenizer.eos_token_id)


def build_tiny(texts: list[str]):
    """The same, of half a million random weights; a token is a word of these texts."""
    def words(text):
        return re.findall(r"[',]|[^\s',]+", text)

    vocabulary = ["<eos>", "<unknown>", *sorted({word for text in texts for word in words(text)})]
    numbers = {word: i for i, word in enumerate(vocabulary)}
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.06))  # large: it learns to copy sooner
    return (model, lambda text: [numbers.get(word, 1) for word in words(text)],
            lambda ids: re.sub(r"' (.*?) '", r"'\1'", " ".join(vocabulary[i] for i in ids)), 0)  # ' Rome ' -> 'Rome'


# ---- sample
def pad(rows: list[list], left: bool = False) -> tuple[Tensor, Tensor]:
    """N rows of unequal length -> values, mask [N, L]. Masks come from lengths, as the pad id may be that of EOS."""
    L = max(map(len, rows))
    fill = [[0] * (L - len(row)) for row in rows]
    pairs = [(f + row, f + [1] * len(row)) if left else (row + f, [1] * len(row) + f)
             for f, row in zip(fill, rows, strict=True)]
    return tuple(torch.tensor(column) for column in zip(*pairs, strict=True))


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)  # left padding has none of its own


@torch.no_grad()
def sample(model, prompts: tuple[Tensor, Tensor], eos: int, temperature: float) -> tuple[Tensor, Tensor]:
    """prompts: ids, mask [N, P], padded on the left so that all rows go on at the same column -> ids, mask [N, t]"""
    (ids, mask), P, cache = prompts, prompts[0].shape[1], None
    alive, new = torch.ones(len(ids), 1, dtype=torch.long), ids  # [N, 1], [N, P]
    while alive.any() and ids.shape[1] < P + T:
        out = model(input_ids=new, attention_mask=mask, position_ids=positions(mask)[:, -new.shape[1]:],
                    past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1]  # [N, V]; later passes compute the new token only
        new = (torch.multinomial((logits / temperature).softmax(-1), 1) if temperature
               else logits.argmax(-1, keepdim=True))  # [N, 1]
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, alive], 1)
        alive = alive * (new != eos)  # EOS belongs to the answer, so the policy learns when to stop; the rest does not
    return ids[:, P:], mask[:, P:]


# ---- reward
def run(db: sqlite3.Connection, sql: str) -> set | None:
    """The rows of a query; None if it fails. A set, as BIRD compares: order and duplicates do not count."""
    try:
        return set(db.execute(sql).fetchmany(1000))
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None


def reward(text: str, question: dict) -> float:
    """0: not in the format; 0.1: in the format; 1: its SQL returns what the gold SQL returns."""
    answer = re.fullmatch(r"<think>.*</think>\s*(SELECT\b.*)", text, re.DOTALL)
    rows = answer and run(question["db"], answer[1])
    return 0.0 if not answer else 0.1 if rows is None or rows != run(question["db"], question["sql"]) else 1.0


# ---- advantages, log-probabilities, loss
def group_advantages(rewards: Tensor) -> Tensor:
    """[B, G] -> [B, G]. Where all rewards of a group are equal there is nothing to learn: all 0."""
    flat = (rewards == rewards[:, :1]).all(1, keepdim=True)
    centred = (rewards - rewards.mean(1, keepdim=True)).masked_fill(flat, 0.0)  # exactly: Adam would magnify rounding
    return centred / rewards.std(1, keepdim=True).clamp(min=1e-3)  # eq. (1)


def logprobs(model, prompts, completions, temperature: float) -> Tensor:
    """prompts: ids, mask [N, P]; completions: ids, mask [N, T] -> log-probabilities [N, T], with gradient"""
    ids, mask = (torch.cat(pair, 1) for pair in zip(prompts, completions, strict=True))  # [N, P + T]
    targets = completions[0]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False,
                   logits_to_keep=targets.shape[1] + 1).logits[:, :-1]  # [N, T, V]; position t - 1 predicts token t
    return (logits / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def policy_loss(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """logp, mask [N, T], advantages [N] -> scalar"""
    ratio = (logp - logp.detach()).exp()  # eq. (2): on policy, π_old is π
    surrogate = ratio * advantages[:, None]  # eq. (3)
    return -((surrogate * mask).sum(1) / mask.sum(1)).mean()  # eq. (5)


# ---- train
def optimizer_of(model, lr: float, steps: int):
    """-> a function that makes one step down a loss; the learning rate rises for 10 steps, then falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / 10, 1 - n / max(steps, 1)))

    def descend(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return descend


def main():
    parser = argparse.ArgumentParser(description="GRPO for Text-to-SQL in one file.")
    parser.add_argument("--model", help="a pretrained model to train instead of the tiny one: folder or hub id")
    parser.add_argument("--cold-start-steps", type=int, default=250)
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    start = time.time()
    cold, train, test = (load_questions(split) for split in ("cold", "train", "test"))
    model, encode, decode, eos = load_pretrained(args.model) if args.model else build_tiny(
        [question[field] for question in cold + train for field in ("prompt", "answer")])

    def answer(questions: list[dict], temperature: float):
        """-> prompts, completions, rewards of the questions"""
        prompts = pad([encode(question["prompt"]) for question in questions], left=True)
        ids, mask = completions = sample(model, prompts, eos, temperature)
        texts = [decode(row[:n]).strip() for row, n in zip(ids.tolist(), (mask * (ids != eos)).sum(1), strict=True)]
        return prompts, completions, torch.tensor(list(map(reward, texts, questions)))

    def report(when: str) -> None:
        right = (answer(test, temperature=0)[2] == 1).float().mean()
        print(f"{when}: {right:.1%} of {len(test)} held-out questions right ({time.time() - start:.0f} s)", flush=True)

    # Cold start, supervised, so that some answers are right at all. Prompt tokens weigh 0.3: they teach it to copy.
    descend = optimizer_of(model, 1e-5 if args.model else 3e-3, args.cold_start_steps)
    for _ in range(args.cold_start_steps):
        pairs = [(encode(q["prompt"]), encode(q["answer"]) + [eos]) for q in random.sample(cold, 32)]
        ids, mask = pad([prompt + taught for prompt, taught in pairs])
        weights, _ = pad([[0.3] * (len(prompt) - 1) + [1.0] * len(taught) for prompt, taught in pairs])
        logp = logprobs(model, (ids[:, :1], mask[:, :1]), (ids[:, 1:], mask[:, 1:]), 1.0)
        descend(-(logp * weights).sum() / weights.sum())
    report("before GRPO")

    descend = optimizer_of(model, 1e-6 if args.model else 5e-4, args.steps)
    for step in range(1, args.steps + 1):
        questions = [question for question in random.sample(train, B) for _ in range(G)]  # B·G, a group side by side
        prompts, completions, rewards = answer(questions, TEMPERATURE)
        advantages = group_advantages(rewards.view(B, G)).flatten()  # [B·G]
        logp = logprobs(model, prompts, completions, TEMPERATURE)
        descend(policy_loss(logp, advantages, completions[1]))
        if step % 10 == 0:
            print(f"step {step}: reward {rewards.mean():.2f}, right {(rewards == 1).float().mean():.0%}", flush=True)
    report("after GRPO")


if __name__ == "__main__":
    main()
