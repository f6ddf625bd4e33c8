"""Train a small language model to write SQL with GRPO.

    python train.py                                        # the demo: no download, under 8 minutes on 2 CPU cores
    python train.py --model qwen2.5-3b --data bird --data-dir BIRD
    python train.py --data spider --data-dir SPIDER --steps 20 --output runs/spider
    python train.py --plan --model qwen2.5-3b --lora-rank 16   # what memory it will need; loads nothing

The story of a run is `main`, top to bottom: load, cold start, then for each step
sample → score → advantages → update → log → save, and at the end held-out accuracy before and after.
"""

import copy
import json
import random
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
import report
from data import PromptBuilder, Splits, columns_of, load_splits
from engine import distributed, plan
from grpo import (
    group_advantages,
    overlong_penalty,
    packed_batches,
    policy_update,
    reference_logprobs,
    sample_groups,
)
from policy import (
    Policy,
    Reference,
    build_tiny,
    checkpoint_activations,
    free_space,
    load_policy,
    load_weights,
    require_model,
)
from rewards import RewardItem, RewardScorer, build_memory, load_reward_module
from running import show
from running.errors import UserError, run_main, write_whole
from running.guards import Guards, Heartbeat, describe_step
from running.run_folder import RunFolder, load_state, rollout_records, step_metrics, tensorboard_writer
from settings import MAY_CHANGE_ON_RESUME, Settings, memory_here, parse_settings, planned
from sft import cold_start, taught_text, template_trace
from sql_exec import SQLExecutor, bird_match, gold_is_ordered, spider_match

MATCHES = {"bird": lambda predicted, gold, sql: bird_match(predicted, gold),
           "spider": lambda predicted, gold, sql: spider_match(predicted, gold, gold_is_ordered(sql))}


def main() -> int:
    s = parse_settings(sys.argv[1:], __doc__)
    run = s.run
    if run.plan:
        print(plan.text(run.model, *planned(s), run.plan * 1e9 if run.plan > 0 else memory_here()))
        return 0
    if run.model != "tiny" and not run.resume:
        require_model(run.start or run.model)  # before the data, which can take minutes
    if run.threads:
        torch.set_num_threads(run.threads)
    with distributed.joined():
        status = run_all(s)
    return distributed.leave(status)


def run_all(s: Settings) -> int:
    """The run, in each process that takes part in it; returns the exit status."""
    run = s.run
    print(f"{run.model}: {s.grpo.group_size} completions a question, {run.prompts_per_step} questions a step, learning "
          f"rate {run.lr:g}, gradient checkpointing {'on' if run.gradient_checkpointing else 'off'}"
          + (f", recipe {run.recipe}" if run.recipe != "none" else ""))
    data = load_splits(run.data, run.data_dir, run.split, traces=run.traces, seed=run.seed,
                       world=run.world, dev_size=run.eval_questions, test_size=run.test_questions)
    folder = distributed.on_main(lambda: RunFolder(run.output, s.as_dict(), resume=run.resume,
                                                   may_change=MAY_CHANGE_ON_RESUME))
    for note in data.notes:
        print(note)
    with SQLExecutor(data.databases, workers=run.sql_workers, timeout=run.sql_timeout,
                     cache=folder.path / "gold_cache") as executor:
        try:
            trainer = Trainer(s, data, folder, executor)
        except UserError:
            if distributed.is_main():
                folder.discard_new()
            raise
        return trainer.train()


class Trainer:
    """What the steps share. `train` is the story, the other methods are its verbs."""

    def __init__(self, s: Settings, data: Splits, folder: RunFolder, executor: SQLExecutor):
        self.s, self.data, self.folder, self.executor = s, data, folder, executor
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        checkpoint = distributed.on_main(folder.newest_whole) if s.run.resume else None
        self.policy = self._load_policy(checkpoint)
        self.builder = PromptBuilder(data.databases, self.policy.tokenizer, s.prompts)
        self.train_set = self._usable(data.train, "training")
        self.dev_set = self._usable(data.dev, "dev")
        self.test_sets = {name: self._usable(examples, name) for name, examples in data.tests.items()}
        self.step, self.drawn, self.best, self.before = 0, 0, -1.0, {}  # drawn: questions used so far
        self.stop_requested = self.stopping = False  # by a signal to this process; agreed by all of them
        self.guards, self.heartbeat = Guards(s.guards), Heartbeat()
        self.events = tensorboard_writer(folder.path) if s.run.tensorboard and distributed.is_main() else None
        if not checkpoint and not s.run.start:
            self._cold_start()
        distributed.copy_from_main(self.policy.model)
        away = "cpu" if s.run.reference_device == "cpu" else None
        self.reference = Reference(self.policy.model, away) if s.grpo.kl_coef else None
        self.scorer = self._make_scorer(resumed=bool(checkpoint))
        if self._wants_sharding():
            distributed.shard(self.policy.model)
        parameters = [p for p in self.policy.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=s.run.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                           fused=self.device == "cuda")
        if checkpoint:
            self._resume(*checkpoint)

    def train(self) -> int:
        """Runs the remaining steps; returns the exit status."""
        run = self.s.run
        if not self.before and self.test_sets:
            self.before = {name: self.evaluate(questions, name) for name, questions in self.test_sets.items()}
        if self.step == 0:
            self.save()  # the start: step 0 is the reference
        bar = tqdm(total=run.steps, initial=self.step, desc="GRPO", unit="step", dynamic_ncols=True,
                   disable=None if distributed.is_main() else True)  # None: only on a terminal, else a line a minute
        with stop_signals(self), bar:
            while self.step < run.steps and not self.stopping:
                self.step += 1
                metrics = self.take_step()
                self.watch(metrics)
                bar.update()
                bar.set_postfix(reward=f"{metrics['reward']:.2f}", acc=f"{metrics['execution_accuracy']:.2f}",
                                kl=f"{metrics.get('kl', 0.0):.3f}", dev=f"{self.best:.2f}")
                if run.save_every and self.step % run.save_every == 0:
                    self.save()
                self.stopping = any(distributed.gather(self.stop_requested))
        self.save()
        if not self.stopping and self.test_sets:
            self.compare()
        if self.events:
            self.events.close()
        if self.step and distributed.is_main():
            print(f"report: {report.write_report(self.folder.path)}")
        if self.stopping:
            print(f"stopped after step {self.step}; continue with --resume --output {run.output}")
            return 130
        return 0

    def watch(self, metrics: dict) -> None:
        """Heartbeat and guards. Raises UserError: too many steps in a row without a finite gradient."""
        self.heartbeat.beat(describe_step(metrics, self.s.run.steps))
        for warning in self.guards.watch(metrics):
            tqdm.write(warning)
        if self.guards.must_stop:
            raise UserError(f"the last {self.guards.skipped} steps had no finite gradient, so the run stops at step "
                            f"{self.step}; their groups are in {self.folder.path / 'rollouts.jsonl'}: start another "
                            "--output with a lower --lr, or --resume from the last checkpoint")

    def take_step(self) -> dict:
        """One GRPO step: sample → score → advantages → update → log."""
        s, policy, clock = self.s, self.policy, Stopwatch()
        examples, groups, breakdowns = self.rollout(clock)  # [B], [B], [B][G]
        rewards = torch.tensor([[b.total for b in row] for row in breakdowns])  # [B, G]
        if s.grpo.overlong == "penalise":  # half the margin, so that a correct completion still outranks a wrong one
            lengths = torch.tensor([[float(len(c)) for c in group.completions] for group in groups])
            rewards = rewards + 0.5 * s.rewards.margin * overlong_penalty(lengths, s.grpo)
        advantages = group_advantages(rewards, s.grpo.advantage_scale)  # [B, G]
        if s.run.dynamic_sampling:  # by execution accuracy, not by the shaped reward, which differs among wrong ones
            advantages[[not teaches(row) for row in breakdowns]] = 0.0
        batches, share = packed_batches(groups, s.grpo), distributed.share()
        ref_logps = None
        if self.reference:
            with self.autocast(cache=False), self.reference.active(self.device) as model:
                ref_logps = reference_logprobs(model, batches, s.grpo, share)
        clock.lap("reference")

        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with self.autocast(cache=False), show.watch_tokens(policy, groups, advantages, s.grpo) as watched:
            stats = policy_update(policy.model, self.optimizer, groups, batches, advantages, ref_logps, s.grpo, share)
        self.optimizer.zero_grad(set_to_none=True)  # sampling needs their memory
        clock.lap("update")
        return self.log(examples, groups, breakdowns, advantages, stats, watched, clock)

    def log(self, examples, groups, breakdowns, advantages, stats: dict, watched: dict, clock: "Stopwatch") -> dict:
        """Writes what became of a step, its accuracy on dev included; returns its line of metrics."""
        s = self.s
        extra = {f"seconds/rewards/{name}": value for name, value in self.scorer.seconds.items()}
        extra |= {"lr": self.learning_rate(), "memory_size": len(self.scorer.memory or ()),
                 "sql_worker_restarts": sum(distributed.gather(self.executor.worker_restarts)),
                 "questions_drawn": self.drawn}
        if self.dev_set and s.run.eval_every and (self.step % s.run.eval_every == 0 or self.step == s.run.steps):
            extra["dev_accuracy"] = self.evaluate_dev()
        metrics = step_metrics(self.step, groups, breakdowns, advantages, stats, clock.laps, extra)
        if not distributed.is_main():
            return metrics
        self.folder.log("metrics", [metrics])
        if self.events:
            for name, value in metrics.items():
                self.events.add_scalar(name, value, self.step)
        records = rollout_records(self.step, examples, groups, breakdowns, advantages, watched)
        self.folder.log("rollouts", records)
        if s.run.verbose and self.step % s.run.verbose == 0:
            tqdm.write(show.group_text(records[next(iter(watched))], colour=show.wants_colour(sys.stdout)))
        return metrics

    # ------------------------------------------------------------------------------------------- a step's verbs

    def rollout(self, clock: "Stopwatch") -> tuple[list, list, list]:
        """B examples with their groups and the groups' RewardBreakdowns; each process samples and scores a part.

        With --dynamic-sampling, questions whose completions are all right or all wrong give way to fresh ones while
        extra rollouts are left; what is still missing then is filled up with the last of them.
        """
        s, policy = self.s, self.policy
        kept, others, B = [], [], s.run.prompts_per_step
        for _ in range(1 + s.run.dynamic_sampling):
            seeds = [s.run.seed * 1_000_003 + self.drawn + i for i in range(B)]  # by a question's turn in the run
            questions = self.next_questions()
            mine = distributed.part(B)
            prompts = [torch.tensor(ids) for _, ids in questions[mine]]
            examples = [example for example, _ in questions[mine]]
            with self.autocast(), distributed.whole(policy.model):
                groups = sample_groups(policy.model, prompts, s.grpo, eos_ids=policy.eos_ids, seeds=seeds[mine])
            clock.lap("rollout")
            scored = self.score(examples, groups)
            clock.lap("rewards")  # the seconds of each component are in scorer.seconds
            if not s.run.dynamic_sampling:
                return tuple(map(list, zip(*scored, strict=True)))
            kept += [item for item in scored if teaches(item[2])]
            others += [item for item in scored if not teaches(item[2])]
            if len(kept) >= B:
                break
        chosen = kept[:B] + others[len(others) - max(0, B - len(kept)):]
        return tuple(map(list, zip(*chosen, strict=True)))

    def next_questions(self) -> list:
        """The next B (example, prompt ids): a fresh order each epoch, a function of seed and `drawn` alone."""
        count, B = len(self.train_set), self.s.run.prompts_per_step
        chosen = range(self.drawn, self.drawn + B)
        self.drawn += B
        orders = {epoch: random.Random(f"{self.s.run.seed}/{epoch}").sample(range(count), count)
                  for epoch in {n // count for n in chosen}}
        return [self.train_set[orders[n // count][n % count]] for n in chosen]

    def score(self, examples, groups) -> list[tuple]:
        """(example, group, RewardBreakdowns of its completions) for the groups of all processes; each scores its."""
        G = self.s.grpo.group_size
        items = [RewardItem(example.db_id, example.gold_sqls, self.policy.decode(completion), example.question)
                 for example, group in zip(examples, groups, strict=True) for completion in group.completions]
        breakdowns = self.scorer.score(items, remember=False)
        rows = [breakdowns[i:i + G] for i in range(0, len(breakdowns), G)]
        scored = distributed.merge(list(zip(examples, groups, rows, strict=True)))
        if self.scorer.memory is not None and distributed.size() > 1:
            self.scorer.memory.exchange((b.thought for b in breakdowns if b.status != "format"), distributed.gather)
        self.scorer.remember([(example.db_id, b.thought) for example, _, row in scored for b in row if b.correct])
        return scored

    def learning_rate(self) -> float:
        """Linear warm-up, then constant or a linear fall to a tenth."""
        run = self.s.run
        rate = min(1.0, self.step / max(run.lr_warmup, 1))
        return run.lr * rate * (1 - 0.9 * self.step / max(run.steps, 1) if run.lr_decay else 1.0)

    def autocast(self, cache: bool = True):
        """bf16 arithmetic on a GPU, full precision elsewhere; master weights stay float32.

        With `cache` the bf16 copies of the weights are kept, for sampling; while weights change they must not be.
        """
        if self.device != "cuda":
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=cache)

    # ---------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, questions: list, name: str) -> dict:
        """Greedy execution accuracy on (example, prompt ids) pairs, as `evaluate.summarise` gives it."""
        examples, mine = [example for example, _ in questions], distributed.part(len(questions))
        with self.autocast(), distributed.whole(self.policy.model):
            sqls = evaluate.greedy_sqls(self.policy, [ids for _, ids in questions[mine]],
                                        self.s.grpo.max_completion_tokens)
        scores = evaluate.score_predictions(examples[mine], sqls, self.executor,
                                            levels=evaluate.difficulty_levels(examples)[mine])
        return evaluate.summarise(distributed.merge(scores))

    def evaluate_dev(self) -> float:
        """Accuracy on dev, the mean over tiers where there are tiers; a new best policy is kept in best/."""
        accuracy = self.evaluate(self.dev_set, "dev")["mean_over_difficulties"][self.s.run.match]
        if accuracy > self.best:
            self.best = accuracy
            policy = self.savable_policy()
            distributed.on_main(lambda: self.folder.save_best(policy))
        return accuracy

    # --------------------------------------------------------------------------------------------- preparation

    def _load_policy(self, checkpoint: tuple[int, Path] | None) -> Policy:
        run = self.s.run
        if checkpoint or run.start or run.model != "tiny":
            source = str(checkpoint[1]) if checkpoint else run.start or run.model
            policy = load_policy(source, device=self.device, lora_rank=0 if checkpoint else run.lora_rank,
                                 dtype=self.base_dtype)
        else:
            writer = PromptBuilder(self.data.databases, None, self.s.prompts)
            texts = [writer.text(e) for e in self.data.train]
            texts += [taught_text(e) for e in self.traced]
            policy = build_tiny(texts, seed=run.seed)
            policy.model.to(self.device)
        if run.gradient_checkpointing:
            checkpoint_activations(policy.model)
        sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in policy.model.parameters()]
        needed = plan.disk(sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained), run.keep)
        if not checkpoint and free_space(self.folder.path) < needed:
            raise UserError(f"{self.folder.path} is on a disk with {free_space(self.folder.path) / 1e9:.1f} GB free, "
                            f"but checkpoints of this model need about {needed / 1e9:.1f} GB; choose another --output")
        return policy

    @property
    def base_dtype(self) -> torch.dtype:
        """Of the weights: float32, but bf16 on a GPU where only adapters, themselves float32, are trained."""
        return torch.bfloat16 if self.s.run.lora_rank and self.device == "cuda" else torch.float32

    @cached_property
    def schemas(self) -> dict:
        """{db_id: {table: [column, ...]}}, as the rewards take them."""
        return columns_of(self.data.databases)

    @cached_property
    def traced(self) -> list:
        """Examples with a verified trace; the tiny policy, which knows nothing, also learns from template traces."""
        traced = self.data.traced
        if not traced and self.s.run.model == "tiny":
            traced = [replace(e, trace=template_trace(e.gold_sqls[0], self.schemas[e.db_id])) for e in self.data.train]
        golds = self.executor.run_gold([(e.db_id, e.gold_sqls[0]) for e in traced])
        kept = [e for e, gold in zip(traced, golds, strict=True) if gold.status == "ok"]
        if len(kept) < len(traced):
            print(f"left out {len(traced) - len(kept)} of {len(traced)} traces: their gold SQL fails")
        return kept

    def _usable(self, examples: list, name: str) -> list:
        """(example, prompt ids) of the questions whose gold SQL runs and whose prompt fits; says what was left out."""
        golds = self.executor.run_gold([(e.db_id, e.gold_sqls[0]) for e in examples[distributed.part(len(examples))]])
        golds = distributed.merge([gold.status if gold.status != "ok" or gold.rows else "empty" for gold in golds])
        wanted = {"ok"} if self.s.run.empty_gold == "drop" and name == "training" else {"ok", "empty"}
        kept = [e for e, status in zip(examples, golds, strict=True) if status in wanted]
        if set(golds) - {"ok"}:
            left_out = len(examples) - len(kept)
            print(f"{name} golds: {dict(Counter(golds))}; {left_out} of {len(examples)} questions left out")
        encoded, notes = self.builder.encode_all(kept)
        for note in notes:
            print(f"{name}: {note}")
        if not encoded and name == "training":
            raise UserError("no training question is usable: every gold SQL fails or every prompt is too long")
        return encoded

    def _wants_sharding(self) -> bool:
        run, several = self.s.run, distributed.size() > 1
        return several and (run.sharding == "on" or run.sharding == "auto" and self.device == "cuda"
                            and not hasattr(self.policy.model, "disable_adapter"))

    def _cold_start(self) -> None:
        s, tokenizer = self.s, self.policy.tokenizer
        if not s.sft.cold_start_steps or not self.traced:
            return
        encoded, _ = self.builder.encode_all(self.traced)
        pairs = [(torch.tensor(ids), torch.tensor(tokenizer.encode(taught_text(e),
                  add_special_tokens=False) + [self.policy.end_id])) for e, ids in encoded]
        loss = cold_start(self.policy.model, pairs, s.sft, seed=s.run.seed, autocast=self.autocast,
                          quiet=not distributed.is_main())
        print(f"cold start: {s.sft.cold_start_steps} steps on {len(pairs)} traces, loss {loss:.3f} nats a token")

    def _make_scorer(self, resumed: bool) -> RewardScorer:
        s = self.s
        frozen = None
        if s.rewards.embedder == "policy":  # the policy of step 0, so that embeddings do not move as it learns
            start = self.policy
            if resumed:
                start = load_policy(str(self.folder.checkpoints()[0][1]), device=self.device, dtype=self.base_dtype)
            frozen = copy.deepcopy(start.model).requires_grad_(False).eval().get_decoder()
        memory = build_memory(s.rewards, s.gate, self.schemas, frozen, self.policy.tokenizer)
        if memory is not None and not resumed:
            verified = [(e.db_id, e.trace) for e in self.traced if not e.trace_sql]
            memory.add_many(verified)
            print(f"memory: {len(memory)} of {len(verified)} verified traces passed the gate {dict(memory.rejections)}")
        user = load_reward_module(s.rewards.reward_module) if s.rewards.reward_module else None
        return RewardScorer(s.rewards, self.executor, self.schemas, memory, match=MATCHES[s.run.match],
                            user_reward=user)

    # ------------------------------------------------------------------------------------------ save and resume

    def save(self) -> None:
        """A checkpoint from which `--resume` continues bit for bit (on CPU)."""
        if distributed.on_main(lambda: any(step == self.step for step, _ in self.folder.checkpoints())):
            return
        state = {"step": self.step, "drawn": self.drawn, "best": self.best, "before": self.before,
                 "optimizer": distributed.whole_state(self.optimizer)}
        policy = self.savable_policy()
        distributed.on_main(lambda: self.folder.save_checkpoint(self.step, policy, state, self.scorer.memory,
                                                                keep=self.s.run.keep))

    def savable_policy(self) -> Policy:
        """The policy; of a sharded one with its weights put together."""
        return replace(self.policy, weights=distributed.whole_weights(self.policy.model))

    def _resume(self, step: int, checkpoint: Path) -> None:
        """Takes up the state of a checkpoint; the reference is the policy of step 0."""
        state = load_state(checkpoint)
        self.step, self.drawn = state["step"], state["drawn"]
        self.best, self.before = state["best"], state["before"]
        distributed.load_whole_state(self.optimizer, state["optimizer"])
        if self.reference:
            self.reference.load(self.folder.checkpoints()[0][1])
        if self.scorer.memory is not None:
            self.scorer.memory.load(checkpoint / "memory.npz")
        if distributed.is_main():
            self.folder.cut_logs(step)
        print(f"resuming from {checkpoint}")

    def compare(self) -> None:
        """Prints the held-out accuracy of the best policy by dev beside that of the start."""
        best = self.folder.path / "best"
        if self.s.run.eval_every and self.dev_set and best.exists():
            load_weights(self.policy, best)
        after = {name: self.evaluate(questions, name) for name, questions in self.test_sets.items()}
        if not distributed.is_main():
            return
        print(before_after_table(self.before, after, self.s.run.match))
        write_whole(self.folder.path / "result.json", json.dumps({"before": self.before, "after": after}, indent=1))
        print(f"policy: {best if best.exists() else self.folder.checkpoints()[-1][1]}")


def before_after_table(before: dict, after: dict, match: str) -> str:
    """Held-out execution accuracy before and after GRPO, a line a tier, with 95 % intervals; 80 columns."""
    lines = [f"{'held-out execution accuracy, %':<32}{'n':>5}{'before GRPO':>21}{'after GRPO':>21}"]

    def cell(part: dict) -> str:
        low, high = part["interval"][match]
        return f"{100 * part['execution_accuracy'][match]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    for name, end in after.items():
        start, tiers = before[name], list(end["by_difficulty"])
        for tier in tiers if len(tiers) > 1 else []:
            lines.append(f"{name + ': ' + tier:<32}{end['by_difficulty'][tier]['n']:>5}"
                         f"{cell(start['by_difficulty'][tier]):>21}{cell(end['by_difficulty'][tier]):>21}")
        lines.append(f"{name + ': all':<32}{end['n']:>5}{cell(start):>21}{cell(end):>21}")
        gain = end["execution_accuracy"][match] - start["execution_accuracy"][match]
        lines.append(f"{'':<32}{'':>5}{'gain':>21}{100 * gain:>+20.1f} ")
    return "\n".join(lines)


def teaches(breakdowns: list) -> bool:
    """Whether some completions of a group are right and some wrong."""
    return 0 < sum(b.correct for b in breakdowns) < len(breakdowns)


class Stopwatch:
    """Seconds of each phase of a step."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[name], self._start = self.laps.get(name, 0.0) + now - self._start, now


@contextmanager
def stop_signals(trainer: Trainer):
    """Ctrl-C or SIGTERM lets the step finish and its checkpoint be written; a second one stops at once."""

    def request(number, frame):
        if trainer.stop_requested and distributed.size() == 1:  # torchrun passes Ctrl-C on, which then comes twice
            raise KeyboardInterrupt
        trainer.stop_requested = True

    old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_main(main)
