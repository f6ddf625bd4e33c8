"""How far a bf16 sampler and the trainer are apart, and both from float32; and what a token costs:

    make smollm2 && python bench/sampler_gap.py           # on a CPU with AMX or AVX512-BF16

Samples four groups of four completions and computes their log-probabilities again as an update does, in bf16 and in
float32. Prints the mean absolute differences, nats a token (the first is `sampler_gap` in metrics.jsonl), and the
milliseconds of a decoding step of all sixteen, the best of --repeats.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.fast import FAST  # noqa: E402
from grpo import Group, GRPOConfig, sample_groups  # noqa: E402
from policy import load_policy  # noqa: E402

SCHEMA = 3 * ("CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER); "
              "CREATE TABLE concert (id INTEGER PRIMARY KEY, title TEXT, year INTEGER, "
              "singer_id INTEGER REFERENCES singer(id)); ")
QUESTIONS = ("How many singers are older than 30? Answer:",
             "List the titles of concerts of 2014 by singers from France. Answer:",
             "Which country has the most singers? Think first.", "Explain the schema in English.")


def sample(model, prompts, tokens: int) -> list[Group]:
    """Four completions of each, of exactly so many tokens."""
    config = GRPOConfig(group_size=4, max_completion_tokens=tokens)
    return sample_groups(model, prompts, config, eos_ids=[], seeds=range(len(prompts)), engine=FAST)


def apart(model, groups, arithmetic) -> dict[str, float]:
    """Mean absolute differences of the log-probabilities."""
    prompts = [group.prompt for group in groups for _ in group.completions]
    completions = [completion for group in groups for completion in group.completions]
    sampler = torch.stack([logp for group in groups for logp in group.logps])
    with torch.no_grad():
        exact = FAST.logprobs(model, prompts, completions, 1.0).cpu()
        with arithmetic:
            trainer = FAST.logprobs(model, prompts, completions, 1.0).cpu()
    pairs = {"sampler, trainer": (sampler, trainer), "sampler, float32": (sampler, exact),
             "trainer, float32": (trainer, exact)}
    return {name: (one - two).abs().mean().item() for name, (one, two) in pairs.items()}


def step_ms(model, prompts, tokens: int, repeats: int) -> float:
    """Milliseconds of a decoding step, the prefill left out."""
    def seconds(n: int) -> float:
        began = time.perf_counter()
        sample(model, prompts, n)
        return time.perf_counter() - began

    sample(model, prompts, 2)
    return 1e3 * min(seconds(tokens) - seconds(2) for _ in range(repeats)) / (tokens - 2)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="an alias or a folder (default: smollm2-135m)")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="of the measurement of a step (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = load_policy(options.model)
    prompts = [torch.tensor(policy.tokenizer.encode(SCHEMA + question)) for question in QUESTIONS]
    arithmetic = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    with arithmetic:
        groups = sample(policy.model, prompts, options.tokens)
        ms = step_ms(policy.model, prompts, options.tokens, options.repeats)
    print("| apart, nats a token | |\n|---|---|")
    for name, value in apart(policy.model, groups, arithmetic).items():
        print(f"| {name} | {value:.4f} |")
    print(f"| a decoding step of 16, ms | {ms:.1f} |")


if __name__ == "__main__":
    main()
