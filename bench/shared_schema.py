"""What does it save that questions on one database go through the model with their schema once?

    python bench/shared_schema.py      # SmolLM2-135M's shape, 8 questions on one database, 8 completions each

A rollout and an update of all weights, without and with sharing between questions. Without, a question's prompt stands
once for its completions, as a pass of its own. Weights and tokens are random, so no two completions begin alike; those
of a trained policy do, which saves more. Lengths are given, as in steps.py. Tokens are those that go through the model.
Prints a table in Markdown; both ways must find the same gradient.
"""

import argparse
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import steps  # noqa: E402

FLAGS = {"schema": (350, "tokens that all prompts begin with"), "question": (40, "further tokens of a prompt"),
         "completion": (40, "the most tokens of a completion"), "questions": (8, "on the database"),
         "group": (8, "completions a question"), "pass": (4096, "tokens that go through the model together"),
         "layers": (30, "of the model"), "threads": (2, "of PyTorch"), "bf16": (0, "1: updates in bf16")}
ALONE = 10**9  # tokens that a shared beginning must save, so that none is shared


def build_model(layers: int):
    """SmolLM2-135M with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from policy import config_of

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config_of("smollm2-135m") | {"num_hidden_layers": layers})).eval()


def ask(sizes: dict, vocabulary: int) -> list:
    """Prompts [P] that begin with one schema."""
    import torch

    generator = torch.Generator().manual_seed(0)
    schema, *questions = (torch.randint(2, vocabulary, (n,), generator=generator)
                          for n in (sizes["schema"], *[sizes["question"]] * sizes["questions"]))
    return [torch.cat([schema, question]) for question in questions]


class Measure:
    """Seconds of something, and tokens that go through the model meanwhile."""

    def __init__(self, model):
        self.tokens = 0
        model.get_input_embeddings().register_forward_hook(self.count)

    def count(self, module, given, output) -> None:
        self.tokens += given[0].numel()

    def __call__(self, action):
        self.tokens, began = 0, time.perf_counter()
        result = action()
        return result, self.tokens, time.perf_counter() - began


def measure(sizes: dict) -> list[tuple]:
    """(what, tokens, seconds, tokens, seconds), without sharing and with it."""
    import torch

    import grpo
    from engine import decoding, packing, tree
    from engine.fast import FAST

    torch.set_num_threads(sizes["threads"])
    model, G, B = build_model(sizes["layers"]), sizes["group"], sizes["questions"]
    plan = steps.Plan(sizes["schema"] + sizes["question"], sizes["completion"], G)
    config = grpo.GRPOConfig(group_size=G, max_completion_tokens=plan.completion, kl_coef=0.0, max_grad_norm=1e9)
    prompts, clock = ask(sizes, model.config.vocab_size), Measure(model)
    lengths = torch.tensor(plan.lengths()).repeat(B)  # [B·G]
    advantages = torch.randn(B, G, generator=torch.Generator().manual_seed(0))
    for look in (decoding.can_share, decoding.forward_of, packing.can_pack):  # at small models
        look(model)

    def rollout():
        with steps.forced_lengths(lengths):
            return grpo.sample_groups(model, prompts, config, eos_ids=[steps.END], seeds=range(B), engine=FAST)

    def update(batches):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return grpo.policy_update(model, optimizer, batches, config, FAST)

    FAST.logprobs(model, prompts[:1], [prompts[1][:9]], 1.0).sum().backward()  # warms up
    with mock.patch.object(tree, "LEAST", ALONE):
        _, *alone = clock(rollout)
    groups, *shared = clock(rollout)
    batches = grpo.micro_batches(groups, advantages, config)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(sizes["bf16"])):
        for _ in range(2):  # the first of each takes its memory from the system, which later steps have
            before, *apart = clock(lambda: update(batches))
            after, *joined = clock(lambda: update(packing.join(batches, config, sizes["pass"])))
    assert abs(after["grad_norm"] / before["grad_norm"] - 1) < (2e-2 if sizes["bf16"] else 1e-3), (before, after)
    return [("rollout", *alone, *shared), ("update", *apart, *joined)]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    sizes = vars(parser.parse_args())
    print(f"{sizes['questions']} questions × {sizes['group']} completions, {sizes['threads']} threads\n\n"
          "| | tokens apart | s | tokens shared | s | times faster |\n|---|---|---|---|---|---|")
    for what, tokens, seconds, fewer, less in measure(sizes):
        print(f"| {what} | {tokens:,} | {seconds:.1f} | {fewer:,} | {less:.1f} | {seconds / less:.2f} |", flush=True)


if __name__ == "__main__":
    main()
