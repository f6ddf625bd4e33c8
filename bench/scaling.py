"""How does a step's cost grow with the group and with the prompt, here and the plain padded way?

    python bench/scaling.py      # G from 4 to 64 at 800 prompt tokens, prompts of 200 to 4,000 tokens at G = 8

The padded way gives each completion a row and a cache of its own, in which its prompt is computed anew. Model: a Qwen2
of 1.6 million random weights (`--width`, `--layers`), float32, lengths as in steps.py. Each point is the fastest of
`--repeats` steps after one that warms up. Prints two tables in Markdown, in seconds; the last row is the slope of the
least-squares line: milliseconds a completion more, or a thousand prompt tokens more.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import steps  # noqa: E402
from steps import Plan  # noqa: E402

COLUMNS = [(side, phase) for phase in ("rollout", "update") for side in ("ours", "padded")]
FLAGS = {"completion": (40, "the most tokens of a completion"), "prompt": (800, "tokens of the prompt, as G grows"),
         "group": (8, "G, as the prompt grows"), "width": (128, "of the model"), "layers": (4, "of the model"),
         "repeats": (2, "counted steps a point"), "threads": (2, "of PyTorch")}


def model_settings(width: int, layers: int) -> dict:
    """Heads of 32, two of them to a key-value head."""
    return {"vocab_size": 4000, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
            "num_attention_heads": width // 32, "num_key_value_heads": width // 64, "tie_word_embeddings": True}


def point(model, plan: Plan) -> dict[tuple[str, str], float]:
    """Seconds of rollout and update on both sides."""
    found = {}
    for side in ("ours", "padded"):
        clock = steps.Clock("cpu")
        steps.our_steps(model, plan, clock, padded=side == "padded")
        for phase in ("rollout", "update"):
            found[side, phase] = min(step[phase] for step in clock.steps[1:])
    return found


def slope(xs: list[int], ys: list[float]) -> float:
    """Of the least-squares line."""
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def table(title: str, unit: str, scale: float, points: dict[int, dict]) -> str:
    """Markdown: a row a point, then the slopes, in milliseconds a `unit`."""
    lines = [f"| {title} | rollout here | padded | update here | padded |", "|---|---|---|---|---|"]
    lines += [f"| {x} | " + " | ".join(f"{found[column]:.2f}" for column in COLUMNS) + " |"
              for x, found in points.items()]
    slopes = [1000 * scale * slope(list(points), [found[column] for found in points.values()]) for column in COLUMNS]
    return "\n".join(lines + [f"| ms a {unit} | " + " | ".join(f"{value:.1f}" for value in slopes) + " |"])


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--groups", type=numbers, default=[4, 8, 16, 32, 64], help="values of G")
    parser.add_argument("--prompts", type=numbers, default=[200, 500, 1000, 2000, 4000], help="lengths of prompts")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    model = steps.build_model(model_settings(options.width, options.layers))

    def measure(prompt: int, group: int) -> dict:
        return point(model, Plan(prompt, options.completion, group, steps=1 + options.repeats, kl_coef=0.0))

    by_group = {G: measure(options.prompt, G) for G in options.groups}
    print(table(f"G, prompt {options.prompt}, completions up to {options.completion}", "completion", 1, by_group))
    by_prompt = {P: measure(P, options.group) for P in options.prompts}
    print()
    print(table(f"prompt, G = {options.group}", "1,000 tokens", 1000, by_prompt))


if __name__ == "__main__":
    main()
