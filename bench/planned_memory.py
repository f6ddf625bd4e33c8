"""How near is `train.py --plan` to the memory that a run takes?

    python bench/planned_memory.py                     # three sizes, about 10 M, 40 M and 120 M parameters, on the CPU
    python bench/planned_memory.py --lora-rank 8 --gradient-checkpointing

Each size is a Qwen2 with random weights, trained by `train.py` in a fresh process for three steps on prompts of exactly
the length given; its peak is that of its metrics.jsonl. What Python, libraries and data take is measured on a model of
next to nothing and taken off; the plan's own line for it is, too. Further arguments are flags of train.py.
"""

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import PromptBuilder, load_splits  # noqa: E402
from models import memory_plan  # noqa: E402
from policy import train_tokenizer  # noqa: E402

SIZES = {"nothing": (64, 1, 512), "10 M": (256, 8, 8_000), "40 M": (512, 8, 16_000), "120 M": (768, 11, 32_000)}
FLAGS = ["--steps", "3", "--save-every", "0", "--eval-every", "0", "--test-questions", "0", "--threads", "1",
         "--sql-workers", "1", "--prompts-per-step", "4", "--group-size", "8", "--max-completion-tokens", "64"]


def make_model(folder: Path, width: int, layers: int, vocabulary: int) -> None:
    """A Qwen2 with random weights and a tokenizer of digits and letters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = train_tokenizer(["name price item question answer table"] * 4, 300)
    torch.manual_seed(0)
    heads = width // 64
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_data(folder: Path, tokens: int) -> list[str]:
    """Questions about a database of one row, each with a prompt of exactly so many tokens; the flags that read them."""
    with sqlite3.connect(folder / "shop.sqlite") as database:
        database.execute("CREATE TABLE item (name TEXT, price INTEGER)")
        database.execute("INSERT INTO item VALUES ('lamp', 30)")
    flags = ["--data", str(folder / "mine.jsonl"), "--data-dir", str(folder)]
    tokenizer = train_tokenizer(["name price item question answer table"] * 4, 300)
    filler = 0
    for _ in range(2):  # a filler of n letters q makes a prompt longer by n tokens
        records = [{"question": f"Costs {100 + n}?", "db_id": "shop", "sql": "SELECT name FROM item", "split": "train",
                    "evidence": "q" * (1 + filler)} for n in range(40)]
        (folder / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        splits = load_splits(str(folder / "mine.jsonl"), str(folder), "train")
        builder = PromptBuilder(splits.databases, tokenizer, train.parse_settings(flags).prompts)
        lengths = {len(builder.encode(example)) for example in splits.train}
        filler += tokens - max(lengths)
    assert lengths == {tokens}, lengths
    return [*flags, "--max-prompt-tokens", str(tokens)]


def measured(flags: list[str], scratch: Path) -> float:
    """Bytes at the peak of a run."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        subprocess.run([sys.executable, "train.py", *flags, "--output", f"{folder}/run"], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(Path(folder, "run/metrics.jsonl").read_text().splitlines()[-1])["peak_memory_mb"] * 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=300, help="tokens (default: 300)")
    options, more = parser.parse_known_args()
    base, worst = 0.0, 0.0
    print(f"{'model':<9}{'parameters':>11}{'planned':>10}{'measured':>10}{'ratio':>8}   (MB, without libraries)")
    with tempfile.TemporaryDirectory() as scratch:
        data = make_data(Path(scratch), options.prompt)
        for name, size in SIZES.items():
            make_model(Path(scratch, name), *size)
            flags = [*FLAGS, *data, "--model", str(Path(scratch, name)), *more]
            shape, work = train.planned(train.parse_settings(flags))
            needed = memory_plan.peak(memory_plan.phases(shape, work))[1] - memory_plan.LIBRARIES
            found = measured(flags, Path(scratch))
            base = base or found - needed  # of the model of next to nothing
            ratio = needed / (found - base)
            worst = worst if name == "nothing" else max(worst, abs(ratio - 1))
            print(f"{name:<9}{shape.parameters() / 1e6:>9.1f} M{needed / 1e6:>10.0f}{(found - base) / 1e6:>10.0f}"
                  f"{ratio:>8.2f}", flush=True)
    print(f"Python, libraries and data: {base / 1e6:.0f} MB (planned: {memory_plan.LIBRARIES / 1e6:.0f}); "
          f"worst: {worst:.0%} off (limit 20 %)")
    return int(worst > 0.2)


if __name__ == "__main__":
    sys.exit(main())
