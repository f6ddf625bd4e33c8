"""GRPO steps of random models, timed by phase: here, here the plain padded way, and in TRL.

    python bench/steps.py ours|padded|trl FOLDER PLAN      # what vs_trl.py, scaling.py and gpu.py start

Each side runs in a process of its own, which writes one line of JSON: per step the seconds of every phase and the
tokens sampled, and the process's memory.

The model has random weights, so nothing in it says when to stop. Lengths are therefore given: while sampling, EOS is
made impossible before a completion has its length, and certain there, on every side by the same function
(`force_end`), between the model's logits and the sampler. A group's lengths are spread evenly, in shuffled order, from
`shortest` × the limit up to the limit. Nothing else of a side is touched; a step has one prompt, its group, and one
update of all weights by AdamW.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
END, PAD = 0, 1  # token ids; a prompt has none of them
BENCH_MODEL = {"vocab_size": 8000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
               "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}  # 12.5 million
MISSING = """{python} cannot import trl. Make an environment for it, then pass its python:
    python3 -m venv .venv-trl
    .venv-trl/bin/pip install -r bench/requirements.txt
    python bench/{script} --trl-python .venv-trl/bin/python"""


@dataclass(frozen=True)
class Plan:
    """What every side does."""

    prompt: int  # tokens of a prompt
    completion: int  # the most tokens of a completion
    group: int  # completions a prompt (G)
    steps: int = 4  # the first of them warms up and is not counted
    shortest: float = 0.5  # of `completion`: the length of a group's shortest completion
    kl_coef: float = 0.04
    threads: int = 2  # 0: the libraries' choice
    device: str = "cpu"  # or cuda, then with float32 weights and bf16 arithmetic
    lora_rank: int = 0  # 0: all weights are trained
    checkpointing: bool = False  # of gradients
    seed: int = 0

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """A prompt a step."""
        rng = random.Random(self.seed)
        return [[rng.randrange(2, vocabulary) for _ in range(self.prompt)] for _ in range(self.steps)]

    def lengths(self) -> list[int]:
        """Of the completions of a group, the same in each step."""
        low, high = max(1, round(self.shortest * self.completion)), self.completion
        lengths = [low + round((high - low) * i / (self.group - 1)) for i in range(self.group)]
        random.Random(self.seed).shuffle(lengths)
        return lengths


class Failed(SystemExit):
    """A worker ended with an error; the message has the end of its error output."""


class Clock:
    """Seconds of the phases of each step."""

    def __init__(self, device: str):
        self.steps, self.device = [], device

    def now(self) -> float:
        if self.device == "cuda":
            import torch
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase: str):
        began = self.now()
        yield
        self.steps[-1][phase] = self.steps[-1].get(phase, 0.0) + self.now() - began


def force_end(logits, left):
    """Makes EOS impossible where a row has more than one token left, else certain. [n, V], [n] -> [n, V]"""
    logits = logits.masked_fill((left <= 1)[:, None], float("-inf"))
    logits[:, END] = logits.new_zeros(()).where(left <= 1, float("-inf"))
    return logits


def reward_of(number: int) -> float:
    """Any reward will do, if a group's are not all equal."""
    return float(number % 3)


# ---- here


@contextlib.contextmanager
def forced_lengths(lengths):
    """Inside, a group sampled by either engine has completions of these lengths [G]."""
    import torch.nn.functional as F

    import grpo
    from engine.grid import Grid

    sampled, of_plain, of_grid = itertools.count(), grpo.sample_token, Grid.draw

    def sample_token(logits, temperature, uniform):
        return of_plain(force_end(logits, lengths - next(sampled)), temperature, uniform)

    def draw(grid, logits):  # the empty places of a grid have the number G
        of_grid(grid, force_end(logits, F.pad(lengths, (0, 1))[grid.rows] - grid.t))

    with (mock.patch.object(grpo, "sample_token", sample_token), mock.patch.object(Grid, "draw", draw)):
        yield


def our_steps(model, plan: Plan, clock: Clock, padded: bool) -> list[int]:
    """Runs the steps as train.py does, with the plain engine where `padded`; the tokens sampled in each."""
    import torch

    import grpo
    from engine import decoding, fast
    from policy import Reference

    config = grpo.GRPOConfig(group_size=plan.group, max_completion_tokens=plan.completion, kl_coef=plan.kl_coef)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    torch.manual_seed(plan.seed)
    reference, sampled = Reference(model) if plan.kl_coef else None, []
    engine = fast.ENGINES["plain" if padded else "fast"]
    if not padded:  # looks at small models, before lengths are forced
        decoding.can_share(model)
        decoding.forward_of(model)
    lengths = torch.tensor(plan.lengths(), device=plan.device)

    def phase(name):  # as train.py does: bf16 arithmetic on a GPU, of weights as they are now
        stack = contextlib.ExitStack()
        stack.enter_context(clock(name))
        stack.enter_context(torch.autocast(plan.device, torch.bfloat16, enabled=plan.device == "cuda"))
        return stack

    rewards = torch.tensor([[reward_of(i) for i in range(plan.group)]])
    for prompt in plan.prompts(model.config.vocab_size):
        clock.steps.append({})
        with clock("step"):
            with phase("rollout"), forced_lengths(lengths):
                groups = grpo.sample_groups(model, [torch.tensor(prompt)], config, eos_ids=[END], engine=engine)
            batches = grpo.micro_batches(groups, grpo.group_advantages(rewards), config)
            if reference:
                with phase("reference"), reference.active() as frozen:
                    grpo.reference_logprobs(frozen, batches, config, engine)
            with phase("update"):
                grpo.policy_update(model, optimizer, batches, config, engine)
        sampled.append(sum(map(len, groups[0].completions)))
    return sampled


# ---- TRL


def trl_steps(folder: str, plan: Plan, clock: Clock) -> list[int]:
    """Runs TRL's GRPOTrainer, timing its methods from outside; the tokens sampled in each step."""
    import torch
    from datasets import Dataset
    from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback
    from trl import GRPOTrainer

    class ForcedLengths(LogitsProcessor):
        def __call__(self, input_ids, scores):
            done = input_ids.shape[1] - plan.prompt
            return force_end(scores, torch.tensor(plan.lengths(), device=scores.device) - done)

    class TimedTrainer(GRPOTrainer):
        def _generate_single_turn(self, *given, **named):
            with clock("rollout"):
                ids, logprobs = super()._generate_single_turn(*given, **named)
            sampled.append(sum(map(len, ids)))
            return ids, logprobs

        def _get_per_token_logps_and_entropies(self, *given, **named):
            with contextlib.nullcontext() if torch.is_grad_enabled() else clock("reference"):
                return super()._get_per_token_logps_and_entropies(*given, **named)

        def _prepare_inputs(self, *given, **named):  # rollout, rewards, reference
            with clock("prepare"):
                return super()._prepare_inputs(*given, **named)

    class Steps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.steps.append({"began": clock.now()})

        def on_step_end(self, *_, **__):
            step = clock.steps[-1]
            step["step"] = clock.now() - step.pop("began")
            step["update"] = step["step"] - step.pop("prepare")

    sampled, tokenizer = [], word_tokenizer(folder)
    prompts = plan.prompts(len(tokenizer))
    data = Dataset.from_list([{"prompt": " ".join(map(word, prompt))} for prompt in prompts])
    trainer = TimedTrainer(
        model=folder, args=trl_config(folder, plan), train_dataset=data, processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [reward_of(i) for i in range(len(completions))],
        callbacks=[Steps()], peft_config=trl_lora(plan))
    trainer.model.generate = functools.partial(trainer.model.generate,
                                               logits_processor=LogitsProcessorList([ForcedLengths()]))
    trainer.train()
    return sampled


def trl_config(folder: str, plan: Plan):
    """One prompt a step, one update a rollout, and the same algorithm as here."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=plan.group, num_generations=plan.group,
        steps_per_generation=1, num_iterations=1, gradient_accumulation_steps=1, max_steps=plan.steps,
        max_completion_length=plan.completion, beta=plan.kl_coef, loss_type="grpo", temperature=1.0,
        gradient_checkpointing=plan.checkpointing, bf16=plan.device == "cuda", use_cpu=plan.device == "cpu",
        use_vllm=False, learning_rate=1e-6, shuffle_dataset=False, seed=plan.seed, save_strategy="no", report_to="none",
        logging_steps=10**6, disable_tqdm=True, model_init_kwargs={"dtype": "float32"})


def trl_lora(plan: Plan):
    """The adapters of policy.py."""
    if not plan.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=plan.lora_rank, lora_alpha=2 * plan.lora_rank, lora_dropout=0.0, target_modules="all-linear",
                      task_type="CAUSAL_LM")


def word(token: int) -> str:
    """The text of a token: all of one length, so that no word holds another."""
    return f"t{token:06d}"


def word_tokenizer(folder: str):
    """A token is a word, so that a prompt's text has exactly the prompt's tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    words = {word(i): i for i in range(AutoConfig.from_pretrained(folder).vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=word(PAD)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=word(END), pad_token=word(PAD))


# ---- processes


def build_model(settings: dict):
    """A Qwen2 with random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**settings, max_position_embeddings=32_768, bos_token_id=None,
                                        eos_token_id=END, pad_token_id=PAD))


def save_model(folder: str, settings: str) -> None:
    """A Qwen2 with random weights, as a checkpoint."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    build_model(json.loads(settings)).save_pretrained(folder)


def peak_mb() -> float:
    """The most memory this process has held so far."""
    status = Path("/proc/self/status")  # on Linux, where ru_maxrss also counts what the process that started it held
    if status.is_file():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB on Linux


def run_worker(side: str, folder: str, plan: Plan) -> dict:
    """What a process of one side reports."""
    import torch
    from transformers import AutoModelForCausalLM

    if side == "trl":
        import datasets  # noqa: F401
        import trl  # noqa: F401
        from trl import GRPOTrainer  # noqa: F401  (trl imports what is asked for)
    else:
        sys.path.insert(0, str(ROOT))
        import policy
    if plan.threads:
        torch.set_num_threads(plan.threads)
    clock, imported = Clock(plan.device), peak_mb()
    if side == "trl":
        tokens = trl_steps(folder, plan, clock)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(plan.device)
        model = policy.add_lora(model, plan.lora_rank) if plan.lora_rank else model
        if plan.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tokens = our_steps(model, plan, clock, padded=side == "padded")
    gpu = {"gpu_mb": torch.cuda.max_memory_allocated() / 2**20, "gpu": torch.cuda.get_device_name()} \
        if plan.device == "cuda" else {}
    return {"steps": clock.steps, "tokens": tokens, "imported_mb": imported, "peak_mb": peak_mb(), **gpu}


def make_model(folder: str, settings: dict) -> None:
    """`save_model` in a process of its own."""
    subprocess.run([sys.executable, __file__, "model", folder, json.dumps(settings)], check=True)


def measure(side: str, folder: str, plan: Plan, python: str = sys.executable) -> dict:
    """`run_worker` in a fresh process. Raises Failed when that fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if plan.threads:
        environment["OMP_NUM_THREADS"] = str(plan.threads)
    command = [python, __file__, side, folder, json.dumps(dataclasses.asdict(plan))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise Failed(f"the process of {side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def can_import(python: str, module: str) -> bool:
    """Whether that python has a module."""
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


if __name__ == "__main__":
    if sys.argv[1] == "model":
        save_model(*sys.argv[2:])
    else:
        print(json.dumps(run_worker(sys.argv[1], sys.argv[2], Plan(**json.loads(sys.argv[3])))))
