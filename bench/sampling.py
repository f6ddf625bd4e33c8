"""How much cheaper are n samples from one shared prefill than n separate greedy generations?

    python bench/sampling.py      # 30 samples, 1,000 prompt tokens, a small model
    python bench/sampling.py --width 256 --layers 4 --completion 32 --repeats 1

Both sides write exactly the same number of tokens: no token ends a completion. The model has random weights,
which cost as much as trained ones. Prints seconds (the median of the repeats) and their ratio; the aim is at
most a third.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.fast import FAST  # noqa: E402
from grpo import GRPOConfig, sample_groups  # noqa: E402


def build_model(width: int, layers: int, vocabulary: int):
    """A Qwen2 with random weights, on the GPU where there is one."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    heads = max(1, width // 64)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096)).eval()
    return model.to("cuda", torch.bfloat16) if torch.cuda.is_available() else model


def generate(model, prompt, n: int, temperature: float, tokens: int) -> None:
    """n completions of exactly so many tokens from one prompt."""
    config = GRPOConfig(max_completion_tokens=tokens, rollout_batch=n)
    group, = sample_groups(model, [prompt], config, eos_ids=(-1,), group_size=n, temperature=temperature,
                           seeds=[0], engine=FAST)
    assert [len(completion) for completion in group.completions] == [tokens] * n


def seconds(action, repeats: int) -> float:
    """The median time of an action."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


OPTIONS = {"samples": (30, "completions"), "prompt": (1000, "tokens of the prompt"),
           "completion": (64, "tokens of a completion"), "width": (512, "of the model"),
           "layers": (8, "of the model"), "vocabulary": (32_000, "of the model"),
           "repeats": (3, "of each measurement"), "threads": (0, "of PyTorch; 0: its choice")}


def main() -> None:
    """Measure both ways and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = build_model(options.width, options.layers, options.vocabulary)
    prompt = torch.randint(options.vocabulary, (options.prompt,), generator=torch.Generator().manual_seed(0))
    generate(model, prompt, 2, 1.0, 2)  # warm up

    def together():
        generate(model, prompt, options.samples, 1.0, options.completion)

    def separately():
        for _ in range(options.samples):
            generate(model, prompt, 1, 0.0, options.completion)

    shared, separate = seconds(together, options.repeats), seconds(separately, options.repeats)
    print(f"{options.samples} samples, one prefill:   {shared:8.2f} s\n"
          f"{options.samples} greedy generations:    {separate:8.2f} s\n"
          f"ratio:                     {shared / separate:8.3f}  (aim: at most 0.333)")


if __name__ == "__main__":
    main()
