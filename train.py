"""Train a small language model to write SQL with GRPO.

    python train.py                                        # the demo: no download, 5 minutes on 2 CPU cores
    python train.py --model qwen2.5-3b --data bird --data-dir BIRD   # all weights, or adapters where they do not fit
    python train.py --data spider --data-dir SPIDER --steps 20 --output runs/spider
    python train.py --plan --model qwen2.5-3b --lora-rank 16   # what memory it will need; loads nothing

The story of a run is `Trainer.train`, top to bottom: cold start, freeze the reference, then for each step
sample → score → advantages → update → evaluate → log → save, and at the end held-out accuracy before and after.
One step is `Trainer.take_step`; the algorithm in it is grpo.py.
"""

import copy
import math
import os
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from tqdm import tqdm

import report
import second_try
from cold_start import (
    PASS_TOKENS,
    cold_start,
    cold_start_notes,
    second_tries,
    supervised_pairs,
    taught_text,
    teachable,
    template_traces,
)
from common.errors import UserError, as_json, run_main, write_whole
from common.run_layout import ADAPTERS, BEST
from data import PromptBuilder, Splits, columns_of, load_splits
from engine import distributed
from engine.attention import causal_lm
from engine.cores import share_cores
from engine.fast import ENGINES
from engine.offload import CPUAdamW
from engine.packing import join
from grpo import MicroBatch, micro_batches, reference_logprobs
from guide import Guide
from held_out import HeldOut, before_after_table
from history import began_with, data_hash, has_changed, hashes_of, not_seen_before, run_config_of, with_ancestors
from models import memory_plan
from partial_credit.memory import TraceMemory, gate_for
from policy import (
    Policy,
    Reference,
    build_tiny,
    check_positions,
    checkpoint_activations,
    computes_in_bf16,
    free_space,
    load_policy,
    load_weights,
    require_model,
)
from prompts.plain_text import encode_answers
from questions.example import answers_among
from rewards import (
    COMPONENTS,
    RewardError,
    RewardScorer,
    build_memory,
    build_rarity,
    load_reward_module,
)
from rollout import Question, Rollout, RolloutMaker, print_first_reasons, print_unreadable, step_advantages
from running import show
from running.drawing import Drawing
from running.guards import Guards, Heartbeat, describe_step
from running.run_folder import RunFolder, load_state, rollout_records, step_metrics
from running.token_ratios import TokenWatch, widest_group
from running.trackers import check_trackers, open_trackers
from scoring.writable import unwritable, unwritable_note
from settings import (
    DEFAULTS_BEFORE,
    MAY_CHANGE_ON_RESUME,
    Settings,
    fit,
    memory_free,
    parse_settings,
    plan_text,
    planned,
    wants_sharding,
)
from sql_exec import MATCHES, SQLExecutor


def main() -> int:
    s = parse_settings(sys.argv[1:], __doc__)
    run = s.run
    if run.plan:
        print(plan_text(sys.argv[1:], s))
        return 0
    if run.model != "tiny" and not run.resume:
        require_model(run.start or run.model)  # before the data, which can take minutes
    check_trackers(run.log)
    if run.threads:
        torch.set_num_threads(run.threads)
    share_cores()
    if not torch.cuda.is_available():
        compute_deterministically()
    with distributed.process_group():
        status = run_all(fitted(s))
    return distributed.exit_process(status)


def fitted(s: Settings) -> Settings:
    """The settings with a --lora-rank that fits this machine's memory, the same in all processes."""
    room = min(distributed.gather(memory_free(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))
    s, notes = fit(sys.argv[1:], s, room, distributed.size())
    for note in notes:
        print(note)
    return s


def compute_deterministically() -> None:
    """The same seed gives the same run, bit for bit, on the same number of threads: gradients of indexing are summed
    in a fixed order. An update took 0.99 times as long as without. CPU only: some GPU operations cannot do it."""
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms(True), which imports a compiler: 3 s
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads such memory, and filling takes time


def run_all(s: Settings) -> int:
    """The run, in each of its processes; returns the exit status."""
    run = s.run
    if run.optimizer_device == "cpu" and distributed.size() > 1:
        raise UserError("--optimizer-device cpu works in a single process only: leave it out, as --sharding on spreads "
                        "the optimizer")
    if run.sharding == "on" and run.lora_rank and s.grpo.kl_coef and distributed.size() > 1:
        raise UserError("--sharding on cannot compute the KL to adapters of step 0: leave it out, because with "
                        "--lora-rank each process has the frozen weights anyway, or give --kl-coef 0")
    print(f"{run.model}: {s.grpo.group_size} completions a question, {run.prompts_per_step} questions a step, learning "
          f"rate {run.lr:g}, gradient checkpointing {'on' if run.gradient_checkpointing else 'off'}"
          + (f", sampler cap {s.grpo.sampler_cap:g}" if s.grpo.sampler_cap else "")
          + (f", recipe {run.recipe}" if run.recipe != "none" else ""))
    data, earlier = load_questions(s)
    folder = distributed.on_main(lambda: RunFolder(run.output, s.as_dict(), resume=run.resume,
                                                   may_change=MAY_CHANGE_ON_RESUME, defaults=DEFAULTS_BEFORE,
                                                   made_of={"began_with": earlier, "questions": hashes_of(data),
                                                            "data_hash": data_hash(run.data),
                                                            "dev_by_database": data.dev_by_database}))
    for note in filter(None, (*data.notes, answers_note(s, data.train))):
        print(note)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; during steps, see `stop_signals`
    with SQLExecutor(data.databases, workers=run.sql_workers, timeout=run.sql_timeout,
                     cache=folder.path / "gold_cache") as executor:
        try:
            return Trainer(s, data, folder, executor).train()
        except RewardError as error:
            raise UserError(str(error)) from error
        except KeyboardInterrupt:
            if distributed.is_main() and folder.checkpoints():
                print(f"go on from step {folder.checkpoints()[-1][0]} with --resume --output {run.output}")
            raise
        finally:
            if distributed.is_main():
                folder.discard_new()  # if it has no checkpoint


def load_questions(s: Settings) -> tuple[Splits, dict | None]:
    """The run's questions, and the settings of the earlier run that it begins with, if any. Held-back questions that
    the earlier run saw are left out."""
    run = s.run
    traces = None if run.traces == "template" else run.traces
    resumed, source = run_config_of(run.output) if run.resume else None, run.start or run.model
    data = load_splits(run.data, run.data_dir, run.split, traces=traces, seed=run.seed, world=run.world,
                       dev_size=run.eval_questions, test_size=run.test_questions,
                       by_database=resumed.get("dev_by_database", False) if resumed else True)
    earlier = with_ancestors(began_with(resumed) if resumed else run_config_of(source))
    if earlier and not resumed:
        print(f"prompts are written as in the run that made {source}, unless a flag says otherwise: style "
              f"{s.prompts.template or s.prompts.style}, up to {s.prompts.max_prompt_tokens} tokens")
    if earlier and has_changed(earlier):
        print(f"warning: {earlier['data']} has changed since {source} was trained on it: questions held back now may "
              "have been seen then")
    return not_seen_before(data, run.data, run.data_dir, earlier), earlier


def answers_note(s: Settings, examples: list) -> str:
    """A sentence on training questions that have an answer and no gold SQL, and on the rewards that need gold SQL;
    empty if there are none."""
    found = answers_among(examples)
    silent = [name for name in ("atomic", "schema") if s.rewards.weights[name]]
    nothing = f", so no {' or '.join(silent)} reward" if silent else ""
    return f"training: {found}{nothing}" if found else ""


@dataclass
class StepRecord:
    """The results of one step, for its logs."""

    rollouts: list[Rollout] = field(default_factory=list)  # B, those that the step learns from
    sampled: list[Rollout] = field(default_factory=list)  # also those that --dynamic-sampling replaced
    advantages: torch.Tensor | None = None  # [B, G]
    stats: dict[str, float] = field(default_factory=dict)  # of the update
    token_ratios: dict = field(default_factory=dict)  # {index of a rollout: its TokenWatch.ratios}
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase
    extra: dict[str, float] = field(default_factory=dict)  # further metrics

    @contextmanager
    def timed(self, phase: str):
        """Adds the seconds spent inside to those of a phase."""
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


class Trainer:
    """The state that the steps share. `train` is the story, the other methods are its verbs."""

    def __init__(self, s: Settings, data: Splits, folder: RunFolder, executor: SQLExecutor):
        self.s, self.data, self.folder, self.executor = s, data, folder, executor
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.step, self.best, self.before, self.at_start = 0, -1.0, {}, {}
        self.stop_requested = self.stopping = False  # by a signal to this process; by all processes
        self.guards, self.heartbeat = Guards(s.guards), Heartbeat()
        self.checkpoint = distributed.on_main(folder.newest_whole) if folder.resumes else None  # (step, folder)
        self.schemas = columns_of(data.databases)  # {db_id: {table: [column, ...]}}
        self.traced = self.verified_traces()
        torch.manual_seed(s.run.seed)  # for adapters, which start at random, and dropout in the cold start
        self.policy = self.load_policy()
        self.bf16, self.pass_tokens = self.arithmetic()
        self.builder = PromptBuilder(data.databases, self.policy.tokenizer, s.prompts)
        self.questions = self.usable(data.train, "training")
        self.dev_set = self.usable(data.dev, "dev")
        usable = {name: self.usable(examples, name) for name, examples in data.tests.items()}
        self.test_sets = {name: questions for name, questions in usable.items() if questions}
        check_positions(self.policy, s.prompts.max_prompt_tokens,
                        second_try.longest(s.grpo.max_completion_tokens, s.run.turns))
        self.user_reward, self.memory = self.load_rewards()  # before anything is trained
        self.trackers = open_trackers(s.run.log, folder.path, s.as_dict()) if distributed.is_main() else []
        self.sharded, self.engine = self.share_model()
        self.support = second_try.support_of(s.run, self.policy, self.builder, executor, s.answer_format)
        self.held_out = HeldOut(s, self.policy, executor, data.databases, self.sampling, self.support)
        self.drawing = self.make_drawing()
        self.reference = self.optimizer = self.scorer = self.rollout_maker = None  # `prepare` makes them

    def train(self) -> int:
        """Runs the remaining steps; returns the exit status."""
        run = self.s.run
        self.prepare()
        bar = tqdm(total=run.steps, initial=self.step, desc="GRPO", unit="step", dynamic_ncols=True,
                   disable=None if distributed.is_main() else True)  # None: only on a terminal, else a line per minute
        with stop_signals(self), bar:
            while self.step < run.steps and not self.stopping:
                self.step += 1
                record = self.take_step()
                if self.step == 1:
                    record.extra |= self.at_start
                if self.evaluation_is_due():
                    record.extra |= self.evaluate_dev()
                metrics = self.log(record)
                self.watch(metrics)
                bar.update()
                bar.set_postfix(reward=f"{metrics.get('reward', math.nan):.2f}",
                                acc=f"{metrics.get('execution_accuracy', math.nan):.2f}",
                                kl=f"{metrics.get('kl', 0.0):.3f}", dev=f"{self.best:.2f}")
                if run.save_every and self.step % run.save_every == 0:
                    self.save()
                self.stopping = any(distributed.gather(self.stop_requested))
        self.save()
        return self.finish()

    def prepare(self) -> None:
        """Cold start, reference, rewards, optimizer; restores a resumed run; measures held-out accuracy before."""
        run = self.s.run
        if run.start and not self.checkpoint:
            print(f"begins with {run.start}, without a cold start")
        elif not self.checkpoint:
            self.cold_start()
        self.reference = self.freeze_reference()  # the policy of step 0, or None
        self.scorer = self.make_scorer()
        self.optimizer = self.make_optimizer()
        guide = self.make_guide() if run.guided else None
        self.rollout_maker = RolloutMaker(self.s, self.policy, self.engine, self.questions, self.drawing, self.scorer,
                                          self.sampling, self.support, guide)
        if self.checkpoint:
            self.resume(*self.checkpoint)
        elif distributed.is_main():
            self.folder.cut_logs(0)  # those of a run whose checkpoints are gone
        if self.step == 0:
            self.save()  # step 0 is the reference, and most of a short run's time
            if run.steps and self.evaluation_is_due():
                found = self.evaluate_dev()  # step 0 may remain the best
                self.at_start = {f"start_{name}": accuracy for name, accuracy in found.items()}
        if not self.before and self.test_sets:
            self.before = self.evaluate_tests()

    def take_step(self) -> StepRecord:
        """One GRPO step: sample → score → advantages → update."""
        s, record = self.s, StepRecord()
        record.rollouts, record.sampled = self.rollout_maker.make(record.timed)  # B questions, G completions each
        record.advantages = step_advantages(record.rollouts, s)  # [B, G]
        with record.timed("reference"):
            batches = self.passes(record)
            self.compute_reference(batches)
        with record.timed("update"):
            self.set_learning_rate()
            watched = self.watch_tokens(record)
            with self.autocast(cache=False):
                record.stats = distributed.policy_update(self.policy.model, self.optimizer, batches, s.grpo,
                                                         self.engine)
            self.optimizer.zero_grad(set_to_none=True)  # sampling needs the gradients' memory
            record.token_ratios = {number: watch.ratios() for number, watch in watched.items()}
        return record

    def log(self, record: StepRecord) -> dict:
        """Logs a step; returns its metrics."""
        print_unreadable(record.sampled, self.step, self.data.databases)
        read = [rollout.readable for rollout in record.rollouts]
        if any(read):
            record.stats["flat_groups"] = (~record.advantages[read].any(1)).float().mean().item()
        extra = {f"seconds/rewards/{name}": value for name, value in self.scorer.take_seconds().items()} | record.extra
        extra |= {"lr": self.learning_rate(), "memory_size": len(self.scorer.memory or ()),
                  "sql_worker_restarts": sum(distributed.gather(self.executor.worker_restarts)),
                  "questions_drawn": self.drawing.drawn}
        if self.support.second:
            extra["second_tries"] = second_try.share([rollout.group for rollout in record.sampled])
        parts = (*COMPONENTS, "overlong") if self.s.grpo.overlong == "penalise" else COMPONENTS
        metrics = step_metrics(self.step, record.sampled, parts, record.stats, record.seconds, extra)
        if not distributed.is_main():
            return metrics
        self.folder.log("metrics", [metrics])
        for tracker in self.trackers:
            tracker.log(metrics, self.step)
        records = rollout_records(self.step, record.rollouts, parts, record.advantages, record.token_ratios)
        self.folder.log("rollouts", records)
        if records and self.s.run.verbose and self.step % self.s.run.verbose == 0:
            widest = widest_group(record.advantages[read])
            tqdm.write(show.group_text(records[widest], colour=show.wants_colour(sys.stdout)))
        return metrics

    def watch(self, metrics: dict) -> None:
        """Heartbeat and guards. Raises UserError: too many steps in a row without a finite gradient."""
        self.heartbeat.beat(describe_step(metrics, self.s.run.steps))
        for warning in self.guards.watch(metrics):
            tqdm.write(warning)
        if self.guards.must_stop:
            raise UserError(f"the last {self.guards.skipped} steps had no finite gradient, so the run stops at step "
                            f"{self.step}; their groups are in {self.folder.path / 'rollouts.jsonl'}: start another "
                            "--output with a lower --lr, or --resume from the last checkpoint")

    def finish(self) -> int:
        """Accuracy before and after, and the report; returns the exit status."""
        if not self.stopping and self.test_sets:
            self.compare()
        for tracker in self.trackers:
            tracker.close()
        if self.step and distributed.is_main():
            print(f"report: {report.write_report(self.folder.path)}")
        if self.stopping:
            print(f"stopped after step {self.step}; continue with --resume --output {self.s.run.output}")
            return 130
        return 0

    # ------------------------------------------------------------------------------------------- a step's verbs

    def passes(self, record: StepRecord) -> list[MicroBatch]:
        """This process's passes of the update: with --micro-batch, some completions of a group; else as many whole
        groups as --tokens-per-pass allows, but few enough that every process gets a pass."""
        s, groups = self.s, [rollout.group for rollout in record.rollouts]
        batches = micro_batches(groups, record.advantages, s.grpo)
        if not s.grpo.micro_batch and s.run.engine != "plain":
            batches = join(batches, s.grpo, self.pass_tokens, distributed.size())
        return distributed.divide(batches, s.grpo)

    def compute_reference(self, batches: list[MicroBatch]) -> None:
        """Stores the reference's log-probabilities in the micro-batches, if there is a reference."""
        if self.reference:
            with self.autocast(cache=False), self.reference.active(self.device) as model:
                reference_logprobs(model, batches, self.s.grpo, ENGINES[self.s.run.engine])  # never sharded

    def watch_tokens(self, record: StepRecord) -> dict[int, TokenWatch]:
        """{index: watch} of the rollout whose token ratios go to rollouts.jsonl; empty in most steps."""
        run = self.s.run
        if not run.token_ratios_every or self.step % run.token_ratios_every and self.step != run.steps:
            return {}
        widest = widest_group(record.advantages)
        return {widest: TokenWatch(self.policy, record.rollouts[widest].group, self.s.grpo, self.engine,
                                   partial(self.autocast, cache=False))}

    def learning_rate(self, steps: int | None = None) -> float:
        """Linear warm-up, then constant or a linear decay to a tenth at the last of `steps` (default: --steps)."""
        run = self.s.run
        rate = min(1.0, self.step / max(run.lr_warmup, 1))
        return run.lr * rate * (1 - 0.9 * self.step / max(steps or run.steps, 1) if run.lr_decay else 1.0)

    def set_learning_rate(self) -> None:
        """Sets the optimizer's learning rate for this step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()

    def autocast(self, cache: bool = True):
        """bf16 arithmetic where --precision asks for it; master weights stay float32.

        With `cache`, autocast reuses the weights' bf16 copies, so the weights must not change.
        """
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16, cache_enabled=cache)

    @contextmanager
    def sampling(self):
        """The context in which the policy can sample."""
        with self.autocast(), distributed.unsharded(self.sharded):
            yield

    # ---------------------------------------------------------------------------------------------- evaluation

    def evaluation_is_due(self) -> bool:
        """Whether this step ends with an evaluation on dev."""
        run = self.s.run
        return bool(self.dev_set and run.eval_every) and (self.step % run.eval_every == 0 or self.step == run.steps)

    def evaluate_dev(self) -> dict[str, float]:
        """The metrics of dev; saves a new best policy in best/. Does neither if a database could not be read, because
        accuracies on different questions cannot be compared."""
        measure = self.held_out.measure if self.step else partial(self.held_out.announce, name="dev")
        found = measure(self.dev_set, step=self.step)
        if found["unavailable"]:
            return {}
        accuracy = found["execution_accuracy"][self.s.run.match]
        if accuracy > self.best:
            self.best = accuracy
            policy = self.savable_policy()
            distributed.on_main(lambda: self.folder.save_best(policy, self.step))
        found = {"accuracy": accuracy, "joins": found["joins"]}
        if self.s.run.eval_samples:
            found |= self.held_out.sample(self.dev_set, self.s.run.eval_samples)
        return {f"dev_{name}": value for name, value in found.items()}

    def evaluate_tests(self) -> dict[str, dict]:
        """The accuracy of the current policy on each test set."""
        return {name: self.held_out.announce(questions, name, self.step) for name, questions in self.test_sets.items()}

    def compare(self) -> None:
        """Prints the held-out accuracy of the best policy on dev beside that of the start, which is measured once."""
        best, after = self.folder.path / BEST, self.before
        chosen = bool(self.s.run.eval_every and self.dev_set) and best.exists()
        step = distributed.on_main(self.folder.step_of_best) if chosen else self.step
        if chosen and step:
            adapters = best / ADAPTERS  # exact, because merging would round them
            load_weights(self.policy, adapters if adapters.is_dir() else best)  # into the same model, to save memory
        if step:
            after = self.evaluate_tests()
        if not distributed.is_main():
            return
        print(before_after_table(self.before, after, self.s.run.match))
        write_whole(self.folder.path / "result.json", as_json({"before": self.before, "after": after}, indent=1))
        same = " (that of step 0, because no later one was better on dev)" if self.step and not step else ""
        print(f"policy: {best if chosen else self.folder.checkpoints()[-1][1]}{same}")

    # --------------------------------------------------------------------------------------------- preparation

    def share_model(self) -> tuple:
        """Gives all processes the same weights, or with sharding a part of them each.

        -> the sharded model or None, the engine that computes with it
        """
        engine = ENGINES[self.s.run.engine]
        distributed.copy_from_main(self.policy.model)
        if not wants_sharding(self.s.run, distributed.size(), self.device == "cuda"):
            return None, engine
        sharded = distributed.Sharded(self.policy.model, engine)
        return sharded, sharded.engine

    def load_rewards(self) -> tuple:
        """The user's reward and the memory, each None if it is off. `make_scorer` makes a memory whose embedder is the
        policy, after the cold start."""
        s = self.s
        try:
            user_reward = load_reward_module(s.rewards.reward_module) if s.rewards.reward_module else None
            memory = build_memory(s.rewards, s.gate, self.schemas) if s.rewards.embedder != "policy" else None
        except ValueError as error:
            raise UserError(str(error)) from error
        return user_reward, memory

    def verified_traces(self) -> list:
        """Examples with a verified trace, or one made from the gold SQL if --traces asks for it or the tiny policy has
        no other."""
        traced = self.data.traced
        if self.s.run.traces == "template" or not traced and self.s.run.model == "tiny":
            traced, asked = template_traces(self.data.train, self.schemas), self.data.train
            if len(traced) < len(asked):
                print(f"no template makes a trace for {len(asked) - len(traced)} of {len(asked)} training questions: "
                      "they have no gold SQL")
            if self.s.run.turns > 1:
                with_sql = [example for example in traced if example.gold_sqls]
                traced = [*traced, *second_tries(with_sql, self.schemas, self.s.answer_format)]
        kept, notes = teachable(traced, self.executor, self.schemas, self.s.answer_format)
        for note in notes:
            print(note)
        return kept

    def cold_start(self) -> None:
        """Supervised steps on reasoning traces, so that GRPO starts from a policy that writes the format."""
        s = self.s
        for note in cold_start_notes(s.sft, len(self.traced), len(self.data.train)):
            print(note)
        if not s.sft.cold_start_steps or not self.traced:
            return
        taught = [replace(e, gold_sqls=(e.trace_sql or e.gold_sql,)) for e in self.traced]
        lost = self.unwritable_among(taught, "traces", "they are not taught")
        traced = [example for i, example in enumerate(self.traced) if i not in lost]
        pairs, notes = supervised_pairs(traced, self.builder, self.policy.tokenizer, self.policy.end_id,
                                        self.support.second)
        for note in notes:
            print(note)
        loss = cold_start(self.policy.model, pairs, s.sft, seed=s.run.seed, quiet=not distributed.is_main(),
                          autocast=partial(self.autocast, cache=False), engine=self.engine,
                          tokens_per_pass=self.pass_tokens or PASS_TOKENS)
        print(f"cold start: {s.sft.cold_start_steps} steps on {len(pairs)} traces, loss {loss:.3f} nats a token")

    def freeze_reference(self) -> Reference | None:
        """The policy of step 0 for the KL penalty (`resume` restores its weights); None without a penalty."""
        if not self.s.grpo.kl_coef:
            return None
        return Reference(self.policy.model, "cpu" if self.s.run.reference_device == "cpu" else None, self.sharded)

    def make_scorer(self) -> RewardScorer:
        """The scorer, whose memory starts with the verified traces."""
        s, memory = self.s, self.memory
        if s.rewards.embedder == "policy" and s.rewards.weights["memory"]:  # of step 0, so that embeddings stay fixed
            if self.checkpoint:
                frozen = load_policy(str(self.first_checkpoint), device=self.device, dtype=self.base_dtype).model
            else:
                frozen = self.sharded.frozen_copy() if self.sharded else copy.deepcopy(self.policy.model)
            frozen = frozen.requires_grad_(False).eval().get_decoder()
            memory = build_memory(s.rewards, s.gate, self.schemas, frozen, self.policy.tokenizer)
        if memory is not None:
            self.start_memory(memory)
        return RewardScorer(s.rewards, self.executor, self.schemas, memory, match=MATCHES[s.run.match],
                            user_reward=self.user_reward, answer_format=s.answer_format,
                            rarity=build_rarity(s.rewards, self.data.train, self.schemas))

    def start_memory(self, memory: TraceMemory) -> None:
        """Fits the gate to the verified traces (equally when resumed); a new run's memory also adds them."""
        verified = [(e.db_id, e.trace) for e in self.traced if not e.trace_sql and not e.first_try]
        memory.gate = gate_for(verified, memory.columns, memory.gate)
        if self.checkpoint:
            return
        memory.add_many(verified)
        print(f"memory: {len(memory)} of {len(verified)} verified traces passed the gate {dict(memory.rejections)}")
        if note := memory.start_note(len(verified)):
            print(f"warning: {note}")
        if memory.scope == "other" and len({e.db_id for e in (*self.data.train, *self.traced)}) == 1:
            print("warning: all questions are on one database, and the memory compares with traces of others, so its "
                  "reward is 0 for every wrong answer: give --memory-scope any, or leave memory out of --rewards")

    def make_guide(self) -> Guide:
        """The traces for groups that are all wrong: those of --traces, else made from the gold SQL."""
        s, known = self.s, {(e.db_id, e.question): e for e in self.traced
                          if not e.first_try and not e.trace_sql}
        examples = [known.get((question.example.db_id, question.example.question), question.example)
                    for question in self.questions]
        numbers = [i for i, example in enumerate(examples) if example.trace or example.gold_sqls]
        taught = template_traces([examples[i] for i in numbers], self.schemas)
        texts = encode_answers(self.policy.tokenizer, [taught_text(example, s.answer_format) for example in taught])
        traces = {i: torch.tensor([*ids, self.policy.end_id]) for i, ids in zip(numbers, texts, strict=True)
                  if len(ids) < s.grpo.max_completion_tokens}
        if not traces:
            raise UserError(f"--guided has no traces for {s.run.data}: no training question has gold SQL that fits "
                            f"--max-completion-tokens {s.grpo.max_completion_tokens}")
        print(f"guided: {len(traces)} of {len(examples)} training questions have a trace that fits "
              f"--max-completion-tokens {s.grpo.max_completion_tokens}")
        return Guide([traces.get(i) for i in range(len(examples))], self.policy, self.engine, self.scorer, s.grpo,
                     partial(self.autocast, cache=False))

    def make_drawing(self) -> Drawing:
        """Draws the training questions of the steps."""
        run, examples = self.s.run, [question.example for question in self.questions]
        return Drawing([example.db_id for example in examples], [example.gold_sql for example in examples],
                       seed=run.seed, informative=run.draw == "informative", per_database=run.questions_per_database)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW on the trained parameters."""
        parameters = [p for p in self.policy.model.parameters() if p.requires_grad]
        adamw = CPUAdamW if self.s.run.optimizer_device == "cpu" else torch.optim.AdamW
        return adamw(parameters, lr=self.s.run.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def load_policy(self) -> Policy:
        run = self.s.run
        if self.checkpoint or run.start or run.model != "tiny":
            source = str(self.checkpoint[1]) if self.checkpoint else run.start or run.model
            policy = load_policy(source, device=self.device, lora_rank=0 if self.checkpoint else run.lora_rank,
                                 dtype=self.base_dtype)
        else:
            writer = PromptBuilder(self.data.databases, None, self.s.prompts)
            texts = [writer.text(e) for e in self.data.train]
            texts += [taught_text(e, self.s.answer_format) for e in self.traced]
            policy = build_tiny(texts, seed=run.seed)
            policy.model.to(self.device)
        if run.gradient_checkpointing:
            checkpoint_activations(policy.model)
        sizes = [(p.numel() * (4 if p.requires_grad else p.element_size()), p.requires_grad)  # trained in float32
                 for p in policy.model.parameters()]
        needed = memory_plan.disk(sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained),
                                  run.keep)
        if not self.checkpoint and free_space(self.folder.path) < needed:
            raise UserError(f"{self.folder.path} is on a disk with {free_space(self.folder.path) / 1e9:.1f} GB free, "
                            f"but checkpoints of this model need about {needed / 1e9:.1f} GB; choose another --output")
        return policy

    def arithmetic(self) -> tuple[bool, int]:
        """Whether arithmetic is in bf16, and how many tokens a pass of the update takes (0: one group)."""
        run, model = self.s.run, causal_lm(self.policy.model)
        parameters = sum(weight.numel() for weight in model.parameters())
        bf16 = computes_in_bf16(run.precision, parameters, self.device == "cuda")
        try:
            return bf16, planned(self.s, model.config.to_dict(), distributed.size())[1].pass_tokens
        except UserError:  # an architecture whose memory use is unknown
            return bf16, run.tokens_per_pass

    @property
    def base_dtype(self) -> torch.dtype:
        """The type of the weights: float32. In bf16 arithmetic it is bf16 if only (float32) adapters are trained, or if
        the optimizer of a GPU's model holds float32 copies on the CPU; the tiny policy does not need that."""
        run = self.s.run
        rounded = run.lora_rank or self.device == "cuda" and run.optimizer_device == "cpu" and run.model != "tiny"
        asked = computes_in_bf16(run.precision, 0, self.device == "cuda")  # on a CPU only if named explicitly
        return torch.bfloat16 if rounded and asked else torch.float32

    @cached_property
    def first_checkpoint(self) -> Path:
        """The folder of step 0; its files are verified once."""
        return distributed.on_main(self.folder.first_checkpoint)

    def usable(self, examples: list, name: str) -> list[Question]:
        """The questions whose gold SQL runs and whose prompt fits; prints what was left out."""
        mine = examples[distributed.share_of(len(examples))]
        compared = MATCHES[self.s.run.match].prepare  # if the compared form of a gold fails, no answer is right
        asked = [(e.db_id, sql) for e in mine for sql in (e.golds[0], compared(e.golds[0]))]
        ran = self.executor.run_gold(asked)  # each once
        golds = [gold if also.status == "ok" else also for gold, also in zip(ran[::2], ran[1::2], strict=True)]
        golds = distributed.merge([(gold.status if gold.status != "ok" or gold.rows else "empty", gold.error or "")
                                   for gold in golds])
        wanted = {"ok"} if self.s.run.empty_gold == "drop" and name == "training" else {"ok", "empty"}
        kept = [e for e, (status, _) in zip(examples, golds, strict=True) if status in wanted]
        statuses = Counter(status for status, _ in golds)
        if statuses.keys() - {"ok"}:
            left_out = len(examples) - len(kept)
            print(f"{name} golds: {dict(statuses)}; {left_out} of {len(examples)} questions left out")
            print_first_reasons([(e.id, status, error, e.db_id) for e, (status, error)
                                 in zip(examples, golds, strict=True) if error], self.data.databases)
        fate = "they are left out" if name == "training" else "they count as wrong"
        lost = self.unwritable_among(kept, f"{name} questions", f"no answer to them can be right, so {fate}")
        if name == "training":
            kept = [example for i, example in enumerate(kept) if i not in lost]
        encoded, notes = self.builder.encode_all(kept)
        for note in notes:
            print(f"{name}: {note}")
        if not encoded and name == "training":
            raise UserError("no training question is usable: every gold SQL fails, is changed by the tokenizer or has "
                            "a prompt that is too long")
        return [Question(example, torch.tensor(ids)) for example, ids in encoded]

    def unwritable_among(self, examples: list, what: str, fate: str) -> dict[int, str]:
        """{index: reason} of examples whose SQL this model cannot write, the same in all processes; prints `fate`."""
        lost = distributed.on_main(lambda: unwritable(self.policy.tokenizer, examples, self.executor,
                                                      [self.s.run.match]))
        if lost:
            print(unwritable_note(lost, examples, what, fate))
        return lost

    # ------------------------------------------------------------------------------------------ save and resume

    def save(self) -> None:
        """A checkpoint from which `--resume` continues bit for bit (on CPU)."""
        if distributed.on_main(lambda: any(step == self.step for step, _ in self.folder.checkpoints())):
            return
        state = {"step": self.step, **self.drawing.state(), "best_accuracy": self.best, "before": self.before,
                 "optimizer": distributed.full_state(self.policy.model, self.optimizer)}
        policy = self.savable_policy()
        distributed.on_main(lambda: self.folder.save_checkpoint(self.step, policy, state, self.scorer.memory,
                                                                keep=self.s.run.keep))

    def savable_policy(self) -> Policy:
        """The policy; if it is sharded, with its weights gathered."""
        if not self.sharded:
            return self.policy
        return replace(self.policy, weights=distributed.full_weights(self.policy.model))

    def resume(self, step: int, checkpoint: Path) -> None:
        """Restores the state of a checkpoint."""
        state = load_state(checkpoint, lazily=bool(self.sharded))  # only process 0 reads all of it
        self.step = state["step"]
        self.drawing.load(state)
        self.best, self.before = state.get("best_accuracy", -1.0), state["before"]  # `best` was a mean over tiers
        if self.folder.step_of_best() > step:  # that step will be redone, and the best one before it is gone
            self.best = -1.0
        self.say_new_length()
        distributed.load_full_state(self.policy.model, self.optimizer, state["optimizer"])
        if self.reference:
            self.reference.load(self.first_checkpoint)
        if self.scorer.memory is not None:
            self.scorer.memory.load(checkpoint / "memory.npz")
        if distributed.is_main():
            self.folder.cut_logs(step)
        print(f"resuming from {checkpoint}")

    def say_new_length(self) -> None:
        """Prints what a new number of steps changes in a resumed run."""
        steps, before = self.s.run.steps, self.folder.stored.get("steps", self.s.run.steps)
        if before == steps:
            return
        print(f"the run goes on to step {steps} instead of {before}")
        if self.s.run.lr_decay and self.step:
            print(f"warning: --lr-decay spreads its fall over all steps, so from step {self.step} on the learning rate "
                  f"is {self.learning_rate():.3g}, where it was {self.learning_rate(before):.3g}: the result is not "
                  f"that of a run that began with --steps {steps}")


@contextmanager
def stop_signals(trainer: Trainer):
    """On Ctrl-C or SIGTERM, finishes the step and writes its checkpoint; a second one stops at once."""

    def request(number, frame):
        if trainer.stop_requested and distributed.size() == 1:  # torchrun forwards Ctrl-C, so it comes twice
            raise KeyboardInterrupt
        if not trainer.stop_requested and distributed.is_main():
            tqdm.write("finishing the step; Ctrl-C again to stop at once")
        trainer.stop_requested = True

    old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_main(main)
