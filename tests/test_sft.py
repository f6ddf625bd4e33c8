"""sft.py: the cold start's prompt loss, and mining: which traces are kept, how many, and that the trainer takes them.

The losses, batches and template traces of the cold start are in test_policy.py.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from little_policy import LESSONS, little_policy_folder

import sft
import train
from data import load_splits
from policy import build_tiny
from running.errors import UserError
from text2sql.memory import HashEmbedder, MemoryGate, TraceMemory

OPEN_GATE = ["--memory-min-words", 1, "--memory-min-columns", 0, "--memory-min-density", 0]
OPEN = MemoryGate(memory_min_words=1, memory_min_columns=0, memory_min_density=0.0, memory_max_cosine=2.0)


# ---- the cold start


def test_prompt_loss_also_teaches_the_prompt():
    text = "singer ( name , age ) question : How many singers are there ? answer :"
    start = build_tiny([text, "<think> count </think> SELECT 1"] * 3, seed=0, vocab_size=300, width=32, layers=1)
    weights = {name: value.clone() for name, value in start.model.state_dict().items()}
    pairs = [(torch.tensor(start.tokenizer.encode(text)), torch.tensor(start.tokenizer.encode(" SELECT 1")))]
    losses = {}
    for weight in (0.0, 1.0):
        start.model.load_state_dict(weights)
        config = sft.SFTConfig(cold_start_steps=40, cold_start_batch=1, cold_start_lr=1e-2, prompt_loss=weight)
        reported = sft.cold_start(start.model, pairs, config, seed=0)
        with torch.no_grad():
            losses[weight] = [loss.item() for loss in sft.supervised_losses(start.model, pairs, with_prompts=True)]
        assert reported < 0.5 and losses[weight][0] < 0.5  # the completion's loss is what is reported
    assert losses[1.0][1] < 0.5 < losses[0.0][1]


# ---- choosing, by hand


def record(number, db_id, difficulty, *thoughts):
    trace = {"id": f"q{number}", "db_id": db_id, "question": "?", "sql": "SELECT 1", "difficulty": difficulty}
    return {"answers": {"sample": {"difficulty": difficulty or "easy"}}, "samples": {"statuses": {"ok": 4}},
            "traces": [trace | {"trace": thought} for thought in thoughts]}


def chosen(records, gate=OPEN, columns=None, **limits):
    config = sft.MineConfig(mine="x.jsonl", model="m", **limits)
    memory = TraceMemory(HashEmbedder(), 512, gate=gate, columns=columns)
    kept = sft.choose_traces(records, memory, config)
    return kept, sft.summary_of(records, kept, memory)


def random_records(seed=0):
    rng = random.Random(seed)
    words = [f"word{n}" for n in range(400)]
    return [record(n, f"db{n % 3}", rng.choice(("low", "high")), *(" ".join(rng.sample(words, 8)) for _ in range(n % 5)))
            for n in range(120)]


def test_at_most_so_many_of_a_question_and_of_a_database_and_difficulty():
    records = random_records()
    kept, summary = chosen(records, max_per_question=2, max_per_cell=7)
    cells = Counter((trace["db_id"], trace["difficulty"]) for trace in kept)
    assert len(cells) == 6 and set(cells.values()) == {7} and len(kept) == 42
    assert max(Counter(trace["id"].split("-")[0] for trace in kept).values()) == 1  # there were enough questions
    assert {cell for cell, _ in zip(cells, range(6), strict=False)} == {
        (trace["db_id"], trace["difficulty"]) for trace in kept[:6]}  # they take turns
    assert summary == ("480 completions of 120 questions sampled, 240 different ones verified, 0 refused by the gate, "
                       "198 over the limits, 42 kept (" + ", ".join(
                           f"{name} {count}" for name, count in Counter(t["difficulty"] for t in kept).most_common()) + ")")
    everything, _ = chosen(records, max_per_question=3, max_per_cell=10**6)
    assert len(everything) == sum(min(n % 5, 3) for n in range(120))
    ids = [trace["id"] for trace in everything]
    assert len(set(ids)) == len(ids) and "q4-trace-3" in ids and "q4-trace-4" not in ids
    assert [trace["id"] for trace in kept] == [trace["id"] for trace in chosen(records, max_per_cell=7)[0]]
    assert [trace["id"] for trace in kept] != [trace["id"] for trace in chosen(records, max_per_cell=7, seed=1)[0]]


def test_questions_give_their_likeliest_trace_and_a_refused_one_makes_room_for_the_next():
    records = [record(0, "a", "", "first name", "second name"), record(1, "a", "", "no such thing", "third name")]
    gate = replace(OPEN, memory_min_columns=1)
    kept, summary = chosen(records, gate, {"a": ["Name"]}, max_per_question=1)
    assert {trace["trace"] for trace in kept} == {"first name", "third name"}
    assert "4 different ones verified, 1 refused by the gate (columns 1), 1 over the limits, 2 kept" in summary


def test_near_copies_are_refused_whatever_their_question():
    records = [record(n, "a", "low", "sort the singers by age and take the first") for n in range(3)]
    kept, summary = chosen(records, replace(OPEN, memory_max_cosine=0.9))
    assert len(kept) == 1 and "2 refused by the gate (duplicate 2), 0 over the limits, 1 kept (low 1)" in summary


# ---- the command


@pytest.fixture
def own_data(tmp_path, tiny_db):
    """24 questions about the tiny database, and the command that mines them with the little policy."""
    records = [{"id": f"q{i}", "question": LESSONS[i % 6][0], "db_id": "music", "sql": LESSONS[i % 6][1],
                "difficulty": ["low", "high"][i % 2]} for i in range(24)]
    (tmp_path / "own.json").write_text(json.dumps(records))
    return ["--mine", tmp_path / "mined.jsonl", "--model", little_policy_folder(tiny_db), "--data", tmp_path / "own.json",
            "--threads", 1, "--workers", 1, "--max-completion-tokens", 60, "--prompt-style", "compact"]


def mine(monkeypatch, *arguments):
    """sft.py --mine in this process."""
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, arguments)])
    sft.main()


def test_mined_traces_are_verified_and_seed_cold_start_and_memory(own_data, tmp_path, monkeypatch, capsys):
    mine(monkeypatch, *own_data, *OPEN_GATE, "-n", 4)
    out = capsys.readouterr()
    traces = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert {(trace["trace"], trace["sql"]) for trace in traces} >= {
        ("count the rows of singer", "SELECT COUNT(*) FROM singer"),
        ("sort singer by age", "SELECT name FROM singer ORDER BY age DESC LIMIT 1")}
    assert "96 completions of 24 questions sampled" in out.out and f"{len(traces)} kept" in out.out and "24/24" in out.err
    assert "duplicate" in out.out  # six questions, four times each
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mined.jsonl", "music.sqlite", "own.json"]
    first = (tmp_path / "mined.jsonl").read_bytes()
    mine(monkeypatch, *own_data, *OPEN_GATE, "-n", 4)
    assert (tmp_path / "mined.jsonl").read_bytes() == first

    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [
        "--data", tmp_path / "own.json", "--traces", tmp_path / "mined.jsonl", "--cold-start-steps", 2, "--steps", 1,
        "--prompts-per-step", 2, "--group-size", 2, "--max-completion-tokens", 8, "--eval-every", 0, "--eval-questions", 0,
        "--test-questions", 0, "--threads", 1, "--sql-workers", 1, *OPEN_GATE, "--output", folder])])
    assert train.main() == 0
    printed = capsys.readouterr().out
    assert f"cold start: 2 steps on {len(traces)} traces" in printed and f"memory: {len(traces)} of {len(traces)}" in printed


def test_traces_of_held_back_questions_do_not_reach_training(tmp_path, tiny_db):
    records = [{"id": f"q{i}", "question": f"Question {i}?", "db_id": "music", "sql": f"SELECT {i}"} for i in range(20)]
    (tmp_path / "own.json").write_text(json.dumps(records))
    lines = [json.dumps(one | {"trace": "look"}) + "\n" for one in records]
    (tmp_path / "traces.jsonl").write_text("".join(lines))
    splits = load_splits(str(tmp_path / "own.json"), traces=str(tmp_path / "traces.jsonl"), test_size=0)
    assert len(splits.dev) == 2 and {one.id for one in splits.traced} == {one.id for one in splits.train}
    assert splits.notes[-1] == "left out 2 of 20 traces: their questions are held back"


def test_nothing_to_keep_is_said_with_the_reasons_and_writes_nothing(own_data, tmp_path):
    done = subprocess.run([sys.executable, "sft.py", *map(str, own_data), "-n", "2", "--limit", "6"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and error.startswith(f"error: no trace to write to {tmp_path / 'mined.jsonl'}: 12 comp")
    assert "(length " in error and "0 kept" in error and not (tmp_path / "mined.jsonl").exists()  # the paper's gate


@pytest.mark.parametrize("arguments, words", [
    ([], "give --mine FILE and --model NAME"),
    (["--mine", "x.jsonl"], "give --mine FILE and --model NAME"),
    (["--mine", "/nowhere/x.jsonl", "--model", "m"], "cannot write /nowhere/x.jsonl"),
    (["--mine", "x.jsonl", "--model", "m", "-n", "0"], "-n must be above zero"),
    (["--mine", "x.jsonl", "--model", "m", "--temperature", "0"], "--temperature must be above zero"),
    (["--mine", "x.jsonl", "--model", "m", "--max-per-cell", "0"], "--max-per-cell must be above zero"),
    (["--mine", "x.jsonl", "--model", "m", "--data", "gone.json"], "cannot read gone.json")])
def test_bad_command_lines(monkeypatch, arguments, words):
    with pytest.raises(UserError) as error:
        mine(monkeypatch, *arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_bad_embedder_or_a_folder_in_the_way_is_one_sentence(own_data, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="neither hash, policy"):
        mine(monkeypatch, *own_data, "--embedder", tmp_path / "none")
    (tmp_path / "mined.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        mine(monkeypatch, *own_data, *OPEN_GATE, "-n", 2, "--limit", 6, "--embedder", "policy")


def test_the_demo_has_a_gate_of_its_own():
    given = ["--mine", "x.jsonl", "--model", "m"]
    assert sft.parse_arguments(given)[1] == MemoryGate(**sft.SHORT_TRACES)
    assert sft.parse_arguments([*given, "--memory-min-words", "9"])[1].memory_min_words == 9
    assert sft.parse_arguments([*given, "--data", "own.json"])[1] == MemoryGate()
