"""What a card does here, beside what it could do, in eight minutes at most:

    python bench/gpu.py                                              # here, the plain engine, transformers' generate
    python bench/gpu.py --trl-python .venv-trl/bin/python            # and a whole step of TRL
    python bench/gpu.py --tiny        # a check on the CPU that the bench itself works; none of its figures count

Qwen2.5-0.5B and -3B with random weights, made on the card, bf16 arithmetic. The rows that matter most come first, and
none begins after --minutes. Prompts have 1,500 tokens.

    decode   milliseconds a token for so many completions of one prompt, 150 tokens each; beside the time in which the
             card's memory could be read: the weights in bf16, the prompt's keys and values, half the completions'
    answer   one question answered by 30 samples of 150 to 300 tokens, seconds
    update   eight groups of 16 completions of 150 to 300 tokens, seconds; MFU: the arithmetic that they need when a
             prompt is computed once, forward and backward, without what checkpointing repeats, over the card's peak in
             bf16; peak memory beside that of --plan, without the CUDA context; cpu: with the optimizer there
    gap      how far sampler and trainer are apart in bf16, nats a token
    step     a whole step of one group, beside TRL's with generate (steps.py), 0.5B
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import steps
from steps import Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MODELS = {
    "0.5B": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "3B": {"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
           "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True}}
TINY = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
CARDS = {"H200": (989, 4.8), "H100": (989, 3.35), "A100": (312, 2.0), "L40S": (362, 0.86), "L4": (121, 0.3),
         "4090": (165, 1.0)}  # dense bf16 TFLOP/s, TB/s
ROWS = [("decode", "0.5B", 0, (16, 64, 128, 256)), ("gap", "0.5B", 0, ()), ("update", "0.5B", 0, ()),
        ("update", "0.5B", 0, ("cpu",)), ("decode", "3B", 16, (16, 64, 256)), ("gap", "3B", 16, ()),
        ("answer", "3B", 16, ()), ("update", "3B", 16, ()), ("update", "3B", 0, ()), ("step", "0.5B", 0, ())]


class Bench:
    """The card and the models on it."""

    def __init__(self, options):
        import torch

        self.torch, self.options, self.began = torch, options, time.perf_counter()
        self.device = "cpu" if options.tiny else "cuda"
        self.prompt, self.longest, self.groups = (24, 8, 2) if options.tiny else (1500, 300, 8)
        name = "" if options.tiny else torch.cuda.get_device_name()
        known = next((figures for card, figures in CARDS.items() if card in name), (0, 0))
        self.peak, self.bandwidth = (given or found for given, found in zip(
            (options.peak_tflops, options.bandwidth), known, strict=True))
        print(f"{name or 'CPU'}: {self.peak} TFLOP/s, {self.bandwidth} TB/s\n\n| what | model | here | plain engine | "
              "generate | limit or share | memory, GB (plan) |\n|---|---|---|---|---|---|---|", flush=True)

    def late(self) -> bool:
        return time.perf_counter() - self.began > 60 * self.options.minutes

    def model(self, name: str, rank: int):
        """On the device, float32, or a bf16 base with float32 adapters."""
        from models.adapters import add_lora
        from policy import checkpoint_activations

        settings = TINY if self.options.tiny else MODELS[name]
        with self.torch.device(self.device):
            model = steps.build_model(settings)
        model = add_lora(model.bfloat16(), rank) if rank else model
        if name == "3B":
            checkpoint_activations(model)
        return model.eval()

    def clock(self, action) -> float:
        """Seconds, best of two after one that warms up."""
        seconds = []
        for _ in range(3):
            self.sync()
            began = time.perf_counter()
            action()
            self.sync()
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:])

    def sync(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def arithmetic(self):
        return self.torch.autocast(self.device, self.torch.bfloat16, cache_enabled=False)

    # ---- rows

    def decode(self, name: str, rank: int, sizes) -> None:
        model, T = self.model(name, rank), self.longest // 2
        for rows in sizes:
            ms = {}
            for engine in ("fast", "plain") if rows <= 64 else ("fast",):
                ms[engine] = self.per_token(lambda tokens, e=engine, n=rows: self.sample(model, e, n, tokens), T)
            if rows <= 64:
                ms["generate"] = self.per_token(lambda tokens, n=rows: self.generate(model, n, tokens), T)
            limit = 1e3 * self.bytes_a_token(model, rows, T) / (self.bandwidth or 1) / 1e12
            self.show(f"{rows} rows, ms a token", name, rank, *(f"{ms[key]:.2f}" if key in ms else ""
                      for key in ("fast", "plain", "generate")), f"{limit:.2f} ms: {limit / ms['fast']:.0%}")
            if self.late():
                return

    def per_token(self, run, T: int) -> float:
        """Milliseconds, the prefill left out."""
        return 1e3 * (self.clock(lambda: run(T)) - self.clock(lambda: run(1))) / (T - 1)

    def sample(self, model, engine: str, rows: int, tokens: int) -> list:
        from engine.fast import ENGINES
        from grpo import GRPOConfig, sample_groups

        config = GRPOConfig(group_size=max(2, rows), max_completion_tokens=tokens, rollout_batch=rows)
        with self.arithmetic():
            return sample_groups(model, [self.a_prompt()], config, eos_ids=[], seeds=[0], engine=ENGINES[engine])

    def generate(self, model, rows: int, tokens: int) -> None:
        ids = self.a_prompt().repeat(rows, 1).to(self.device)
        with self.torch.no_grad(), self.arithmetic():
            model.generate(input_ids=ids, attention_mask=self.torch.ones_like(ids), do_sample=True, eos_token_id=None,
                           max_new_tokens=tokens, min_new_tokens=tokens)

    def answer(self, name: str, rank: int, _) -> None:
        from engine.fast import ENGINES
        from grpo import GRPOConfig, sample_groups

        model, plan = self.model(name, rank), Plan(self.prompt, self.longest, 30)
        self.sample(model, "fast", 2, 2)  # looks at small models
        lengths = self.torch.tensor(plan.lengths(), device=self.device)
        config = GRPOConfig(group_size=30, max_completion_tokens=self.longest)

        def run():
            with self.arithmetic(), steps.forced_lengths(lengths):
                sample_groups(model, [self.a_prompt()], config, eos_ids=[steps.END], seeds=[0], engine=ENGINES["fast"])

        self.show("one question, 30 samples, s", name, rank, f"{self.clock(run):.2f}", "", "", "")

    def gap(self, name: str, rank: int, _) -> None:
        from sampler_gap import apart

        model = self.model(name, rank)
        groups = self.sample(model, "fast", 16, self.longest)
        self.show("sampler_gap, nats a token", name, rank,
                  f"{apart(model, groups, self.arithmetic())['sampler, trainer']:.4f}")

    def update(self, name: str, rank: int, where) -> None:
        """Eight groups, in passes as train.py makes them."""
        import grpo
        from engine.fast import ENGINES
        from engine.offload import CPUAdamW
        from engine.packing import join
        from models import memory_plan

        torch, model, plan = self.torch, self.model(name, rank), Plan(self.prompt, self.longest, 16)
        adamw = CPUAdamW if where else torch.optim.AdamW
        model = model.bfloat16() if where else model
        draw = torch.Generator().manual_seed(0)
        groups = [self.a_group(plan, draw) for _ in range(self.groups)]
        config = grpo.GRPOConfig(group_size=16, max_completion_tokens=self.longest, kl_coef=0.0)
        shape = memory_plan.Shape.of(model.config.to_dict())
        work = memory_plan.Work(self.prompt, self.longest, 16, self.groups, 0, 256, False, False, rank,
                                name == "3B", True, True)
        memory = torch.cuda.get_device_properties(0).total_memory if self.device == "cuda" else 1e9
        work = dataclasses.replace(work, optimizer_on_cpu=bool(where))
        work = dataclasses.replace(work, pass_tokens=memory_plan.tokens_per_pass(shape, work, memory / 4))
        advantages = torch.randn(self.groups, 16, generator=draw)
        batches = join(grpo.micro_batches(groups, advantages, config), config, work.pass_tokens)
        optimizer = adamw([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)

        def run():
            with self.arithmetic():
                grpo.policy_update(model, optimizer, batches, config, ENGINES["fast"])

        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = self.clock(run)
        used = update_flops(model.config, plan, bool(rank)) * self.groups / seconds / 1e12
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else 0.0
        parts = memory_plan.phases(shape, work)["update"]
        planned = sum(size for part, size in parts.items() if part not in ("KV cache", "bf16 weights", "CUDA context"))
        share = f"MFU {used / self.peak:.0%}" if self.peak else f"{used:.3f} TFLOP/s"
        on_cpu = ", cpu" if where else ""
        self.show(f"update of {self.groups} groups, {len(batches)} passes{on_cpu}, s", name, rank, f"{seconds:.2f}", "",
                  "", share, f"{peak:.1f} ({planned / 1e9:.1f})")

    def a_group(self, plan: Plan, draw):
        from grpo import Group

        rows = [self.torch.randint(2, 200, (n,), generator=draw) for n in plan.lengths()]
        return Group(self.a_prompt(), rows, [self.torch.zeros(len(row)) for row in rows], [False] * plan.group)

    def step(self, name: str, rank: int, _) -> None:
        python = self.options.trl_python
        if not steps.can_import(python, "trl"):
            return print(steps.MISSING.format(python=python, script="gpu.py"), file=sys.stderr)
        shape = Plan(24, 8, 2, threads=1) if self.options.tiny else Plan(1500, 300, 16, device="cuda", threads=0)
        with tempfile.TemporaryDirectory() as folder:
            steps.make_model(folder, TINY if self.options.tiny else MODELS[name])
            sides = {side: steps.measure(side, folder, shape, python if side == "trl" else sys.executable)
                     for side in ("ours", "trl")}
        ours, theirs = (statistics.median(step["step"] for step in side["steps"][1:]) for side in sides.values())
        self.show(f"whole step, s (TRL {theirs:.2f})", name, rank, f"{ours:.2f}", "", "", f"{theirs / ours:.1f} times")

    # ---- what they share

    def a_prompt(self):
        return self.torch.arange(self.prompt) % 190 + 2

    def bytes_a_token(self, model, rows: int, T: int) -> float:
        """That have to be read for a token of all rows."""
        config = model.config
        weights = 2 * sum(weight.numel() for weight in model.parameters())
        head = config.hidden_size // config.num_attention_heads
        kv = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head
        return weights + kv * (self.prompt + rows * T / 2)

    def show(self, what: str, name: str, rank: int, *cells: str) -> None:
        cells = [*cells, "", "", "", "", ""][:5]
        print(f"| {what} | {name}{f' LoRA {rank}' if rank else ''} | {' | '.join(cells)} |", flush=True)


def update_flops(config, plan: Plan, frozen: bool) -> float:
    """Of a forward and a backward over a group, its prompt computed once. frozen: no gradient of the weights."""
    D, L, V = config.hidden_size, config.num_hidden_layers, config.vocab_size
    shared = config.num_key_value_heads / config.num_attention_heads
    weights = L * D * (2 * D + 2 * D * shared + 3 * config.intermediate_size)
    P, completions = plan.prompt, plan.lengths()
    pairs = P * P / 2 + sum(C * P + C * C / 2 for C in completions)  # of a query and a key that it sees
    forward = 2 * weights * (P + sum(completions)) + 4 * L * D * pairs + 2 * V * D * sum(completions)
    return forward * (2 if frozen else 3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to check the bench")
    parser.add_argument("--minutes", type=float, default=8, help="after which no row begins (default: 8)")
    parser.add_argument("--only", nargs="+", choices=sorted({row[0] for row in ROWS}), help="only these rows")
    parser.add_argument("--peak-tflops", type=float, help="of the card in bf16 (default: by its name)")
    parser.add_argument("--bandwidth", type=float, help="of the card's memory, TB/s (default: by its name)")
    parser.add_argument("--trl-python", default=sys.executable, help="python that has TRL (default: this one)")
    return parser.parse_args()


def main() -> None:
    """Measures row by row; prints each as soon as it is known."""
    options = parse()
    import torch

    if not options.tiny and not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a CUDA GPU (--tiny checks the bench itself without one)")
    bench = Bench(options)
    for kind, name, rank, sizes in ROWS:
        if options.only and kind not in options.only:
            continue
        if bench.late():
            print(f"no time for {kind} {name}", file=sys.stderr)
            continue
        if rank and not steps.can_import(sys.executable, "peft"):
            print(f"no row of {kind} {name} LoRA: peft is missing", file=sys.stderr)
            continue
        try:
            getattr(bench, kind)(name, rank, sizes)
        except (RuntimeError, steps.Failed) as error:  # out of memory, most of all; other rows may fit
            print(f"| {kind} | {name} | {str(error).strip().splitlines()[-1][:100]} | | | | |", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
