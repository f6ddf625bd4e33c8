"""README and walkthrough say what the code says: numbers, equations, flags, files, commands, links."""

import doctest
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from conftest import tiny_database
from little_policy import LESSONS, little_policy_folder

import ablate
from grpo import GRPOConfig, group_advantages, policy_loss
from rewards import load_reward_module
from running.errors import UserError
from sql_exec import Execution

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import readme  # noqa: E402

README = (ROOT / "README.md").read_text()
WALKTHROUGH = (ROOT / "docs" / "walkthrough.md").read_text()
ABLATIONS = (ROOT / "docs" / "ablations.md").read_text()
SMALLER = {  # appended to a command, so that it takes a second or two
    "train.py": "--cold-start-steps 2 --cold-start-batch 2 --steps 1 --prompts-per-step 2 --group-size 2 --eval-every 0 "
                "--max-completion-tokens 12 --test-questions 0 --save-every 0 --threads 1 --sql-workers 1",
    "evaluate.py": "--max-completion-tokens 16 --workers 1", "ask.py": "-n 100 --max-completion-tokens 24 --workers 1",
    "sft.py": "--max-completion-tokens 24 --workers 1 --memory-min-words 2 --memory-min-columns 0 --memory-min-density 0",
    "report.py": "", "show.py": "--step 1"}


def commands():
    """The lines of the README's plain code blocks that are commands."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    lines = [line.partition(" #")[0].strip() for kind, block in blocks if not kind for line in block.splitlines()]
    inline = re.findall(r"`((?:python|make|torchrun) [^`]+)`", README)
    return [line for line in lines + inline if re.match(r"(python|make|pip|torchrun) ", line)]


@pytest.mark.parametrize("document", ["README.md", "docs/walkthrough.md"])
def test_every_number_shown_is_computed_by_the_code(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the README makes a database
    result = doctest.testfile(str(ROOT / document), module_relative=False)
    assert result.failed == 0 and result.attempted > 20


def cells(line):
    """The numbers of a line of a table, behind its first cell."""
    return [float(cell) for cell in line.strip("| \n").split("|")[1:]]


def test_the_tables_of_the_walkthrough_are_computed_by_the_code():
    tables = {line.split("|")[1].strip(): line for line in WALKTHROUGH.splitlines() if line.startswith("| ")}
    rewards = torch.tensor([cells(tables[f"rewards of question {n}"]) for n in (1, 2)])
    advantages = group_advantages(rewards)
    shown = torch.tensor([cells(tables[f"question {n}"]) for n in (1, 2)])
    assert torch.allclose(shown, advantages, atol=6e-4)

    old = torch.tensor([[-1.0, -0.5], [-1.2, -0.7], [-0.9, 0.0], [-1.6, -0.4]])
    logp = (old + torch.tensor([[0.3, 0.05], [-0.4, -0.1], [-0.1, 0.0], [0.0, 0.1]])).requires_grad_()
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]]).bool()
    loss, _ = policy_loss(logp, old, None, advantages[0], mask, GRPOConfig(), normalizer=8)
    loss.backward()
    rows = [line for line in WALKTHROUGH.splitlines() if re.match(r"\| \$o_\d\$[^(|]*\| -?\d", line)]
    assert len(rows) == 6
    for row in rows:
        i = int(re.search(r"o_(\d)", row)[1]) - 1
        t = int("second" in row)
        ratio = (logp[i, t] - old[i, t]).exp().item()
        clipped = min(max(ratio, 0.8), 1.2)
        A = advantages[0, i].item()
        expected = [A, ratio, clipped, min(ratio * A, clipped * A), logp.grad[i, t].item()]
        assert cells(row) == pytest.approx(expected, abs=6e-4), row


def test_every_equation_stands_in_the_readme_and_at_its_line():
    tagged = {int(n) for n in re.findall(r"\\tag\{(\d)\}", README)}
    linked = {int(n) for n in re.findall(r"\[eq\. \((\d)\)\]\(grpo\.py#L\d+\)", README)}
    docstring = {int(n) for n in re.findall(r"^ {4}\((\d)\)  ", (ROOT / "grpo.py").read_text(), re.MULTILINE)}
    assert tagged == linked == set(readme.equation_lines()) == docstring == {1, 2, 3, 4, 5}


def test_grpo_stays_short():
    assert len((ROOT / "grpo.py").read_text().splitlines()) < 400


def test_flags_line_numbers_and_measured_tables_are_up_to_date():
    assert readme.up_to_date(README) == README, "run: python docs/readme.py"
    assert readme.with_ablations(ABLATIONS) == ABLATIONS, "run: python docs/readme.py"


def test_ablations_are_those_of_the_commands_shown():
    files = sorted((ROOT / "docs").glob("ablation-*.json"))
    assert len(files) == 5
    for file in files:
        content = json.loads(file.read_text())
        assert f"python {content['command']}\n" in ABLATIONS, f"{file.name} was made by {content['command']}"
        starts, runs = ablate.plan(*ablate.parse_arguments(content["command"].split()[1:]))
        assert list(content["runs"]) == list(dict.fromkeys(run.cell for run in starts + runs))
        assert all(set(content["runs"][run.cell]) >= {str(run.seed)} for run in runs)  # every run was finished
        summary = ablate.rounded(ablate.summarise(content["runs"], content["baseline"]))
        assert summary.keys() == content["summary"].keys()
        for cell, part in summary.items():  # of rounded runs, hence within the rounding
            for name, value in part["measures"].items():
                assert value["mean"] == pytest.approx(content["summary"][cell]["measures"][name]["mean"], abs=2e-5)
        assert ET.fromstring(file.with_suffix(".svg").read_text()) is not None and file.stat().st_size < 60_000


def test_commands_of_every_program_are_found():
    assert {"train.py", "evaluate.py", "ask.py", "sft.py", "ablate.py", "report.py", "show.py"} <= {
        word for command in commands() for word in command.split()}
    assert "make demo" in commands() and "make test" in commands()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with all that the README's commands mention, small: data in three layouts, a model, a run."""
    folder = tmp_path_factory.mktemp("readme")
    for place in ("my_databases", "SPIDER/database/music", "BIRD/train/train_databases/music"):
        (folder / place).mkdir(parents=True)
        database = tiny_database(folder / place / "music.sqlite")
    records = [{"db_id": "music", "question": question, "query": sql, "trace": thought} for question, sql, thought in LESSONS]
    for place in ("SPIDER/train_spider.json", "SPIDER/dev.json", "BIRD/train/train.json"):
        (folder / place).write_text(json.dumps(records))
    splits = [record | {"split": split} for record in records for split in ("train", "dev", "test")]
    (folder / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in splits))
    (folder / "FILE").write_text("".join(f"{record['query']}\n" for record in records))
    (folder / "my_rewards.py").write_text(re.search(r"```python\n(def reward\(.*?)```", README, re.DOTALL)[1])
    shutil.copy(database, folder / "shop.sqlite")
    return folder, str(little_policy_folder(database))


@pytest.mark.parametrize("command", list(dict.fromkeys(commands())))
def test_every_command_runs(command, workplace, monkeypatch):
    """As it stands in the README, with a small model and data, and fewer steps; all in one folder, in their order."""
    folder, model = workplace
    words = ["0" if word == "S" else model if word in ("path/to/checkpoint", "runs/demo/best") or "qwen" in word else word
             for word in shlex.split(command)]
    if words[0] in ("make", "pip"):
        assert words[0] == "make" or words[1:] == ["install", "-r", "requirements.txt"]  # which `make test` begins with
        target = words[1] if words[0] == "make" else "test"
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert f"make {target}" in (ROOT / ".ci" / "run").read_text()
        return
    script = next(word for word in words if word.endswith(".py"))
    if script == "ablate.py":
        readme.parser_of("ablate").parse_args(words[2:])
        assert "ablate" in (ROOT / "tests" / "test_ablate.py").read_text()  # which runs it on a small grid
        return
    words += SMALLER[script].split()
    if "--data" not in words and script == "train.py" or "demo" in words:  # .ci/run runs the real demo
        words += ["--data", "mine.jsonl", "--data-dir", "my_databases"]
    if script == "train.py" and "--output" not in words:
        words += ["--output", f"runs/{len(list(folder.glob('runs/*')))}" if (folder / "runs/demo").exists() else "runs/demo"]
    monkeypatch.chdir(folder)
    if words[0] == "torchrun":
        words[words.index(script)] = str(ROOT / script)
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return
    monkeypatch.setattr(sys, "argv", words[1:])
    try:
        assert importlib.import_module(script[:-3]).main() in (0, None)
    except UserError as error:
        missing = re.search("needs (peft|tensorboard)", str(error))  # optional, see requirements-extra.txt
        assert missing and importlib.util.find_spec(missing[1]) is None, error


def test_the_file_tree_is_complete():
    tree = re.search(r"## The files\n\n```\n(.*?)```", README, re.DOTALL)[1]
    names = {line.split()[0] for line in tree.splitlines()}
    assert all(len(line.split(maxsplit=1)) == 2 for line in tree.splitlines()), "one comment a file"
    files = {path.name for path in ROOT.glob("*.py")} | {"report_template.html", "Makefile", ".ci/run"}
    assert names == files | {"bench/", "docs/", "tests/"}
    for folder in ("bench", "docs"):
        for path in (ROOT / folder).glob("*.py"):
            line = next(line for line in tree.splitlines() if line.startswith(f"{folder}/"))
            assert path.name in line, path


@pytest.mark.parametrize("room, parts", [("grpo", {"packing", "attention", "decoding"}), ("rewards", {"atomic", "memory"}),
                                         ("sql_exec", set())])
def test_rooms_that_stand_alone_import_their_parts_only(room, parts):
    ours = {path.stem for path in ROOT.glob("*.py")}
    for name in {room, *parts}:
        imports = re.findall(r"^ *(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.MULTILINE)
        assert set(imports) & ours <= parts, name


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("docs/*.py")]),
                         ids=lambda path: path.name)
def test_d_nothing_is_tied_to_one_machine(path):
    """No address but this machine's own, no home folder, no killing of processes by name."""
    source = path.read_text()
    addresses = set(re.findall(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", source))
    assert addresses <= {"127.0.0.1"}
    assert not re.search(r"/(?:home|Users|root|mnt|workspace)/\w|pkill|killall", source)


def test_the_reward_of_ones_own_runs(tmp_path):
    source = re.search(r"```python\n(def reward\(.*?)```", README, re.DOTALL)[1]
    assert len(source.strip().splitlines()) <= 10
    (tmp_path / "my_rewards.py").write_text(source)
    reward = load_reward_module(tmp_path / "my_rewards.py")

    def value(sql, status="ok"):
        return reward(question="?", db_id="x", gold_sqls=("SELECT 1",), thought="", sql=sql,
                      execution=Execution(status, (), [], None, 0.0))

    assert value("SELECT 1") == 1.0 and value("SELECT 1", "error") == 0.0
    assert 0 < value("S" * 200) < 1 and value("S" * 500) == 0.0


def test_links_pictures_and_named_tests_exist():
    for text, folder in ((README, ROOT), (WALKTHROUGH, ROOT / "docs"), (ABLATIONS, ROOT / "docs")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (folder / target).exists(), target
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                          for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)]
    pictures = re.findall(r"\]\((docs/\w+\.png)\)", README)
    assert len(pictures) == 2 and all((ROOT / picture).stat().st_size < 150_000 for picture in pictures)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) >= 20
    for name in named:
        assert f"def {name}(" in tests, name
