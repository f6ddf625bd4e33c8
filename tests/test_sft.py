"""sft.py: which traces are taught, the cold start's prompt loss, and mining: which traces are kept, and how it goes on.

The losses and batches of the cold start are in test_policy.py, template traces in test_traces.py.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from conftest import ROOT
from little_policy import LESSONS, little_policy_folder

import cold_start
import sft
import train
from common.errors import UserError
from data import Example, PromptBuilder, PromptConfig, columns_of, load_splits
from partial_credit.memory import HashEmbedder, MemoryGate, TraceMemory, gate_for
from policy import build_tiny
from prompts.answer_format import AnswerFormat
from rewards import RewardConfig, build_memory
from scoring.answers import Examination
from sql_exec import SQLExecutor

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
        config = cold_start.SFTConfig(cold_start_steps=40, cold_start_batch=1, cold_start_lr=1e-2, prompt_loss=weight)
        reported = cold_start.cold_start(start.model, pairs, config, seed=0)
        with torch.no_grad():
            losses[weight] = [loss.item() for loss in cold_start.supervised_losses(start.model, pairs, with_prompts=True)]
        assert reported < 0.5 and losses[weight][0] < 0.5  # the completion's loss is what is reported
    assert losses[1.0][1] < 0.5 < losses[0.0][1]


def test_a_cold_start_without_a_pair_is_refused_and_does_not_loop_for_ever():
    with pytest.raises(UserError, match="no trace to teach: give --traces, or --cold-start-steps 0"):
        cold_start.cold_start(None, [], cold_start.SFTConfig(cold_start_steps=2), seed=0)
    with pytest.raises(ValueError, match="no pairs"):
        cold_start._batches(0, 32, 2, seed=0)


# ---- which traces are taught


SCHEMAS = {"music": {"singer": ["singer_id", "name", "country", "age"], "concert": ["concert_id", "year"]}}


def taught(trace, sql="SELECT 1", trace_sql=""):
    return Example("q", "music", "?", (sql,), trace=trace, trace_sql=trace_sql)


def test_template_traces_fill_what_is_empty_and_keep_what_is_there():
    sql = "SELECT name FROM singer WHERE age > 3"
    examples = [taught("", sql), taught("mine", sql)]
    listed, mine = cold_start.template_traces(examples, SCHEMAS)
    assert listed == replace(examples[0], trace="tables singer ; columns name age ; clauses where") and mine == examples[1]


@pytest.mark.parametrize("trace, bare", [
    ("look at singer", "look at singer"),
    ("<think> look at singer </think>", "look at singer"),
    ("<think>\nlook\nat singer\n</think>\n\nSELECT name FROM singer", "look\nat singer"),  # a whole completion
    ("<think>look at singer</think>\n```sql\nSELECT 1\n```", "look at singer"),
    ("look at singer </think> SELECT 1", "look at singer"),  # the prompt opened the tag
    ("<think> look at singer", "look at singer"),  # cut at a limit
    ("Sure!\n<think>look at singer</think>", "look at singer"),
    ("<Thinking>look at singer</THINKING>", "look at singer"),
    ("```\nlook at singer\n```", "look at singer"),
    ("look at\n```sql\nSELECT name\n```\nof singer", "look at\nSELECT name\nof singer"),
    ("look at ```sql SELECT name``` of singer", "look at  SELECT name of singer")])
def test_tags_and_fences_of_a_trace_are_taken_off(tiny_db, trace, bare):
    with SQLExecutor({"music": tiny_db}, workers=1) as executor:
        (kept,), notes = cold_start.teachable([taught(trace)], executor, SCHEMAS, AnswerFormat())
    assert kept.trace == bare and notes == []
    assert AnswerFormat().read(cold_start.taught_text(kept, AnswerFormat())) == (bare, "SELECT 1")


@pytest.mark.parametrize("style, text", [
    ("think-answer", "<think> look at singer </think> <answer> SELECT 1 </answer>"), ("fence", "look at singer\n```sql\nSELECT 1\n```")])
def test_other_answers_are_taught_as_they_are_read(tiny_db, style, text):
    answer_format = AnswerFormat(style)
    examples = [taught("<think>look at singer</think>", trace_sql="```sql\nSELECT 1\n```"), taught("it is <answer> 1")]
    with SQLExecutor({"music": tiny_db}, workers=1) as executor:
        kept, notes = cold_start.teachable(examples, executor, SCHEMAS, answer_format)
    assert cold_start.taught_text(kept[0], answer_format) == text and answer_format.read(text) == ("look at singer", "SELECT 1")
    assert notes == []
    policy = build_tiny([text] * 3, seed=0, vocab_size=300, width=32, layers=1)
    builder = PromptBuilder({"music": tiny_db}, policy.tokenizer, PromptConfig(answer_style=style))
    (_, completion), *_ = cold_start.supervised_pairs(kept, builder, policy.tokenizer, policy.end_id)[0]
    assert policy.tokenizer.decode(completion) == text + policy.tokenizer.eos_token


def test_traces_that_cannot_be_taught_are_left_out_and_counted_by_their_reason(tiny_db):
    examples = [
        taught("look"), taught("fine", trace_sql="SELECT 2"), taught("fenced", trace_sql="```sql\nSELECT 3\n```"),
        taught("look", "SELECT nothing FROM nowhere"), taught("look", "DELETE"),
        replace(taught("look"), db_id="zoo"), replace(taught("look", "SELECT nothing"), db_id="bar"),
        taught("<think></think> SELECT 1"), taught("<think>one</think> SELECT 1 <think>two</think>"),
        taught("<think>a<think>b</think></think>"), taught("look", "SELECT '<think>'"),
        taught("look", trace_sql="SELECT 1; SELECT 2"), taught("look", trace_sql="the SQL is SELECT 1")]
    with SQLExecutor({"music": tiny_db}, workers=1) as executor:
        kept, notes = cold_start.teachable(examples, executor, SCHEMAS, AnswerFormat())
        assert cold_start.teachable([], executor, SCHEMAS, AnswerFormat()) == ([], [])
    assert [(one.trace, one.trace_sql) for one in kept] == [("look", ""), ("fine", "SELECT 2"), ("fenced", "SELECT 3")]
    assert sorted(notes) == sorted([
        "left out 2 of 13 traces: their db_id is not among the databases of the data (the first: 'bar')",
        "left out 2 of 13 traces: their gold SQL fails; the first of each kind:\n  "
        f"question q, error: near \"nothing\": syntax error ({tiny_db})\n  "
        f"question q, refused: only SELECT, WITH ... SELECT and VALUES may run, not 'DELETE' ({tiny_db})",
        "left out 1 of 13 traces: without tags and fences they hold no reasoning",
        "left out 3 of 13 traces: they hold several <think> tags",
        "left out 2 of 13 traces: their SQL is not one statement that can be read back"])


def test_pairs_of_prompts_that_fit_and_how_many_do_not(tiny_db):
    policy = build_tiny(["singer ( name , age )", "<think> look </think> SELECT 1"] * 3, seed=0, vocab_size=300, width=32,
                        layers=1)
    examples = [taught("look"), replace(taught("look"), question="Who? " * 400), taught("see")]

    def pairs_within(tokens):
        builder = PromptBuilder({"music": tiny_db}, policy.tokenizer, PromptConfig(max_prompt_tokens=tokens))
        return cold_start.supervised_pairs(examples, builder, policy.tokenizer, policy.end_id)

    pairs, notes = pairs_within(800)
    assert [policy.tokenizer.decode(completion) for _, completion in pairs] == [
        f"<think> {word} </think> SELECT 1{policy.tokenizer.eos_token}" for word in ("look", "see")]
    assert notes == ["cold start: left out 1 of 3 questions: their prompt, even shortened, is longer than 800 tokens"]
    with pytest.raises(UserError, match="the prompts of all 3 are longer than --max-prompt-tokens 5, even shortened"):
        pairs_within(5)
    assert len(pairs_within(10**5)[0]) == 3 and pairs_within(10**5)[1] == []


@pytest.mark.parametrize("steps, traces, words", [
    (200, 0, "no cold start: --cold-start-steps 200 has no traces to teach; give --traces FILE, or --traces template"),
    (0, 0, ""), (20, 20, ""),
    (0, 7, "7 traces are there, but --cold-start-steps is 0"),
    (20, 1, "only 1 traces for 46 training questions and shows each 640 times: --traces template makes one for every"),
    (200, 46, "only 46 traces for 46 training questions and shows each 139 times: lower --cold-start-steps")])
def test_a_cold_start_that_does_less_than_one_expects_is_told(steps, traces, words):
    notes = cold_start.cold_start_notes(cold_start.SFTConfig(cold_start_steps=steps), traces, 46)
    assert len(notes) == bool(words) and words in "".join(notes)


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
    done = subprocess.run([sys.executable, "sft.py", *map(str, own_data), "-n", "2", "--limit", "6", "--memory-min-words",
                           "30"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and error.startswith(f"error: no trace to write to {tmp_path / 'mined.jsonl'}: 12 comp")
    assert "(length " in error and "0 kept" in error and not (tmp_path / "mined.jsonl").exists()
    assert "with fewer than 30 or more than 2000 words (--memory-min-words, --memory-max-words)" in error
    assert f"kept in {tmp_path / 'mined.jsonl'}.progress, so the same command with another gate is done at once" in error


def test_refused_traces_are_counted_by_threshold_and_another_gate_needs_no_new_samples(own_data, tmp_path, monkeypatch,
                                                                                      capsys):
    with pytest.raises(UserError, match=r"refused \d+ with fewer than 9 columns of the schema \(--memory-min-columns\)"):
        mine(monkeypatch, *own_data, "-n", 4, "--memory-min-columns", 9)
    assert (tmp_path / "mined.jsonl.progress").exists()
    monkeypatch.setattr(Examination, "answer", lambda *_: pytest.fail("sampled anew"))
    mine(monkeypatch, *own_data, "-n", 4, *OPEN_GATE)
    assert "continuing: 24 of 24 questions are done" in capsys.readouterr().out
    assert (tmp_path / "mined.jsonl").exists() and not (tmp_path / "mined.jsonl.progress").exists()


def test_short_traces_pass_a_gate_that_is_chosen_from_them(own_data, tmp_path, monkeypatch, capsys):
    """Its traces have 3 to 6 words: all were refused by the paper's 30."""
    mine(monkeypatch, *own_data, "-n", 4)
    assert "length" not in capsys.readouterr().out and (tmp_path / "mined.jsonl").exists()


def test_ctrl_c_loses_nothing(own_data, tmp_path, monkeypatch, capsys):
    arguments = [*own_data, *OPEN_GATE, "-n", 4, "--batch", 8]  # three batches of eight questions
    mine(monkeypatch, *arguments)
    whole, answer, calls = (tmp_path / "mined.jsonl").read_bytes(), Examination.answer, []
    (tmp_path / "mined.jsonl").unlink()

    def interrupted(self, examples, levels, number):
        calls.append(number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, examples, levels, number)

    monkeypatch.setattr(Examination, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mine(monkeypatch, *arguments)
    assert f"kept in {tmp_path / 'mined.jsonl'}.progress; the same command continues" in capsys.readouterr().out
    with pytest.raises(UserError, match="another temperature"):
        mine(monkeypatch, *arguments, "--temperature", 0.5)
    mine(monkeypatch, *arguments)
    assert calls == [0, 8, 8, 16] and "continuing: 8 of 24 questions are done" in capsys.readouterr().out
    assert (tmp_path / "mined.jsonl").read_bytes() == whole and not (tmp_path / "mined.jsonl.progress").exists()


def of_fates(**statuses):
    return [{"samples": {"statuses": statuses}, "traces": []}]


@pytest.mark.parametrize("statuses, lenient, words", [
    ({"format": 88, "ok": 12}, False, "12.0 % of the answers meet the format, <think> reasoning </think> and then one query and "
                                      "nothing else; --lenient-format also takes SQL in a code fence; a cold start teaches the "
                                      "format: train.py --traces template"),
    ({"format": 100}, True, "0.0 % of the answers meet the format, <think> reasoning </think> and then one query and nothing else; "
                            "a cold start teaches the format: train.py --traces template"),
    ({"truncated": 60, "ok": 40}, True, "and nothing else; a higher --max-completion-tokens lets answers end; a cold start teaches"),
    ({"error": 70, "format": 10}, False, "88% of the completions met the format, but none returned the gold result"),
    ({"unavailable": 90, "format": 10}, False, "0.0 % of the answers meet the format"),  # of those that could be run
    ({}, False, "no prompt fits; raise --max-prompt-tokens")])
def test_nothing_verified_names_the_reason(statuses, lenient, words):
    assert words in sft.why_none_verified(of_fates(**statuses), AnswerFormat(lenient=lenient))


def test_a_model_that_never_meets_the_format_is_told_so(own_data, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"0 different ones verified.*meet the format"):
        mine(monkeypatch, *own_data, "-n", 2, "--limit", 4, "--max-completion-tokens", 2)
    assert not (tmp_path / "mined.jsonl.progress").exists()  # which another way of reading could not continue


@pytest.mark.parametrize("arguments, words", [
    ([], "give --mine FILE and --model NAME"),
    (["--mine", "x.jsonl"], "give --mine FILE and --model NAME"),
    (["--mine", "/nowhere/x.jsonl", "--model", "m"], "cannot write /nowhere/x.jsonl"),
    (["--mine", "x.jsonl", "--model", "m", "-n", "0"], "--samples is 0; it must be at least 1"),
    (["--mine", "x.jsonl", "--model", "m", "--temperature", "0"], "--temperature is 0.0; it must be above 0"),
    (["--mine", "x.jsonl", "--model", "m", "--timeout", "1e7"], "--timeout is 10000000.0; it must be at most 1000000.0"),
    (["--mine", "x.jsonl", "--model", "m", "--max-per-cell", "0"], "--max-per-cell is 0; it must be at least 1"),
    (["--mine", "x.jsonl", "--model", "m", "--memory-min-bigrams", "2"], "--memory-min-bigrams is 2.0; it must be at most 1"),
    (["--mine", "x.jsonl", "--model", "m", "--memory-min-words", "9", "--memory-max-words", "3"], "no thought has at least 9"),
    (["--mine", "x.jsonl", "--model", "m", "--data", "gone.json"], "cannot read gone.json")])
def test_bad_command_lines(monkeypatch, arguments, words):
    with pytest.raises(UserError) as error:
        mine(monkeypatch, *arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_bad_embedder_or_a_folder_in_the_way_is_one_sentence(own_data, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="neither hash, policy"):
        mine(monkeypatch, *own_data, "--embedder", tmp_path / "none")
    # the file of an interruption before the first batch keeps nothing, and so does not block other settings
    (tmp_path / "mined.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        mine(monkeypatch, *own_data, *OPEN_GATE, "-n", 2, "--limit", 6, "--embedder", "policy")


@pytest.mark.parametrize("config, bad", [
    (cold_start.SFTConfig, {"cold_start_steps": -1, "cold_start_batch": 0, "cold_start_lr": 0.0, "prompt_loss": -0.1}),
    (sft.MineConfig, {"limit": -1, "samples": 0, "temperature": 0.0, "max_completion_tokens": 0, "batch": 0,
                      "max_per_question": 0, "max_per_cell": 0, "threads": -3, "workers": 0, "timeout": 0.0})])
def test_every_number_states_its_range(config, bad):
    given = {"mine": "x.jsonl", "model": "m"} if config is sft.MineConfig else {}
    numbers = {one.name for one in fields(config) if isinstance(one.default, int | float) and one.type not in (bool, "bool")}
    assert numbers - {"seed"} == set(bad)
    config(**given)
    for name, value in bad.items():
        for wrong in (value, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is {wrong}; it must be"):
                config(**given, **{name: wrong})


def test_the_gate_fits_the_demo_s_traces_as_its_own_thresholds_did(tmp_path):
    """5 words and one column were set by hand for them; what is chosen from them now is the same."""
    given = ["--mine", "x.jsonl", "--model", "m"]
    assert sft.parse_arguments(given)[1] == MemoryGate()
    assert sft.parse_arguments([*given, "--memory-min-words", "9"])[1] == MemoryGate(memory_min_words=9)
    splits = load_splits("demo", tmp_path, seed=0)
    schemas = columns_of(splits.databases)
    memory = build_memory(RewardConfig(), MemoryGate(), schemas)
    verified = [(one.db_id, one.trace) for one in splits.traced if not one.trace_sql]
    memory.gate = gate_for(verified, memory.columns, memory.gate)
    assert memory.gate == MemoryGate(5, 2000, 1, 0.05)
    memory.add_many(verified)
    assert (len(memory), len(verified), memory.rejections) == (1656, 1902, {"duplicate": 246})
    assert memory.start_note(len(verified)) == ""
