"""A very small policy that has learnt four questions about the tiny database, for tests that need answers."""

import tempfile
from pathlib import Path

import torch

from data import Example, PromptBuilder, PromptConfig
from policy import build_tiny
from prompts.answer_format import AnswerFormat

LESSONS = [
    ("How many singers are there?", "SELECT COUNT(*) FROM singer", "count the rows of singer"),
    ("Who is the oldest singer?", "SELECT name FROM singer ORDER BY age DESC LIMIT 1", "sort singer by age"),
    ("List the years of concerts.", "SELECT year FROM concert", "show the year of each concert"),
    ("List the years of concerts.", "SELECT DISTINCT year FROM concert", "show the year of each concert"),
    ("Which country has Bo?", "SELECT country FROM singer WHERE name = 'Bo'", "look up Bo"),
    ("Which country has Bo?", "SELECT nation FROM singer WHERE name = 'Bo'", "look up Bo"),
]


_trained: list[Path] = []  # prompts depend on the tables only, and every test has the same ones


def little_policy_folder(database: Path) -> Path:
    """The policy as a folder that `load_policy` takes; trained once a test run, in a second or two."""
    if not _trained:
        _trained.append(_train(database))
    return _trained[0]


def _train(database: Path) -> Path:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    databases, config = {"music": database}, PromptConfig(style="compact")
    examples = [Example(str(i), "music", question, (sql,)) for i, (question, sql, _) in enumerate(LESSONS)]
    answers = [AnswerFormat().write(trace, sql) for _, sql, trace in LESSONS]
    writer = PromptBuilder(databases, None, config)
    policy = build_tiny([writer.text(example) for example in examples] * 3 + answers * 3, seed=0,
                        vocab_size=500, width=64, layers=2)
    builder = PromptBuilder(databases, policy.tokenizer, config)
    rows = [builder.encode(example) + policy.tokenizer.encode(answer) + [policy.tokenizer.eos_token_id]
            for example, answer in zip(examples, answers, strict=True)]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        policy.model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    policy.model.eval()
    folder = Path(tempfile.mkdtemp(prefix="little_policy_"))
    policy.save(folder)
    return folder
