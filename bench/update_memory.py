"""How much memory does the loss over a large vocabulary take, here and the naive way?

    python bench/update_memory.py      # 2,400 tokens, a vocabulary of 151,936, width 896 (Qwen2.5-0.5B), float32

From the hidden states of a group's completions to the gradients of lm_head and of the hidden states: here in chunks
whose logits are computed again for backward (`packing.token_logprobs`), and the naive way, with all logits at once.
Each runs in a fresh process. What is counted is how far the process's peak rises above what it held before the
loss: lm_head, the hidden states, and room for both gradients. Prints a table in Markdown; the aim is at most 1 GB.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from steps import peak_mb

FLAGS = {"tokens": (2400, "completion tokens"), "vocabulary": (151_936, "tokens there are"),
         "width": (896, "of a hidden state"), "threads": (2, "of PyTorch")}
WAYS = ("chunked", "naive")


def naive_logprobs(head, hidden, targets, temperature: float):
    """All [N, V] logits at once."""
    logp = (head(hidden) / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0]


def run_worker(way: str, sizes: dict) -> dict:
    """The loss and its gradients, one way: megabytes added at the peak, seconds, norm of lm_head's gradient."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import grpo
    from engine import packing

    torch.set_num_threads(sizes["threads"])
    torch.manual_seed(0)
    N, V, D = sizes["tokens"], sizes["vocabulary"], sizes["width"]
    head = torch.nn.Linear(D, V, bias=False)
    hidden = torch.nn.Parameter(torch.empty(N, D).normal_())
    for parameter in (hidden, head.weight):
        parameter.grad = torch.zeros_like(parameter).fill_(0.0)  # touched, so that it is counted before
    targets, advantages = torch.randint(V, (N,)), torch.tensor([1.0, -1.0])
    before, began = peak_mb(), time.perf_counter()
    logp = (packing.token_logprobs if way == "chunked" else naive_logprobs)(head, hidden, targets, 1.0)
    logp = logp.view(2, -1)
    loss, _ = grpo.policy_loss(logp, logp.detach(), None, advantages, torch.ones_like(logp), grpo.GRPOConfig())
    loss.backward()
    return {"added_mb": peak_mb() - before, "seconds": time.perf_counter() - began,
            "norm": head.weight.grad.norm().item()}


def main() -> None:
    """Measure both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    sizes = vars(parser.parse_args())
    worker = sizes.pop("worker")
    if worker:
        print(json.dumps(run_worker(worker, sizes)))
        return
    print(f"| {sizes['tokens']} tokens, vocabulary {sizes['vocabulary']}, width {sizes['width']} | memory added, GB "
          "| seconds | norm of the gradient |\n|---|---|---|---|")
    for way in WAYS:
        flags = [f"--{name}={value}" for name, value in sizes.items()]
        done = subprocess.run([sys.executable, __file__, "--worker", way, *flags], stdout=subprocess.PIPE, check=True)
        result = json.loads(done.stdout)
        print(f"| {way} | {result['added_mb'] / 1024:.2f} | {result['seconds']:.0f} | {result['norm']:.6f} |")


if __name__ == "__main__":
    main()
