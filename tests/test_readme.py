"""README and docs say what the code says: numbers, equations, flags, files, commands, links, edits."""

import doctest
import importlib.util
import io
import json
import re
import shlex
import shutil
import sqlite3
import sys
import types
import xml.etree.ElementTree as ET
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import tiny_database
from little_policy import LESSONS, little_policy_folder
from test_text2sql_data import tiny_clone

import ablate
import grpo
from common import options
from common.errors import UserError
from grpo import GRPOConfig, group_advantages, policy_loss
from policy import load_policy
from rewards import load_reward_module
from settings import parse_settings
from sql_exec import MATCHES, Execution, SQLExecutor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import readme  # noqa: E402

PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in readme.PAGES}
README, WALKTHROUGH = PAGES["README.md"], PAGES["docs/walkthrough.md"]
ABLATIONS, DENSE = PAGES["docs/results/ablations.md"], PAGES["docs/results/dense-rewards.md"]
REWARDS, EXTEND, PITFALLS = PAGES["docs/rewards.md"], PAGES["docs/extend.md"], PAGES["docs/pitfalls.md"]
OWN_REWARD = re.search(r"```python\n(def reward\(.*?)```", REWARDS, re.DOTALL)[1]
OWN_TEMPLATE = re.search(r"```\n(\{% set system.*?)```", PAGES["docs/prompts.md"], re.DOTALL)[1]
MEASURES = {*ablate.SHOWN, "greedy does not run", "voted accuracy", "best on dev", "last on dev"}  # ablate.py writes
FOLDERS = ("common", "engine", "models", "partial_credit", "prompts", "questions", "running", "scoring")
SMALLER = {  # appended to a command, so that it takes a second or two
    "train.py": "--cold-start-steps 2 --cold-start-batch 2 --steps 1 --prompts-per-step 2 --group-size 2 --eval-every 0 "
                "--max-completion-tokens 12 --test-questions 0 --save-every 0 --threads 1 --sql-workers 1",
    "evaluate.py": "--workers 1", "ask.py": "-n 100 --max-completion-tokens 24 --workers 1",
    "sft.py": "--max-completion-tokens 24 --workers 1 --memory-min-words 2 --memory-min-columns 0 --memory-min-density 0",
    "report.py": "", "running.show": "--step 1", "questions.text2sql_data": "--traces 2"}


def commands():
    """The commands in plain code blocks and in the text of all pages, the README's first."""
    found = []
    for page in PAGES.values():
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
        lines = [line.partition(" #")[0].strip() for kind, block in blocks if not kind for line in block.splitlines()]
        inline = re.findall(r"`((?:python|make|torchrun|pip) [^`]+)`", re.sub(r"^#.*$|^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE))
        found += [" ".join(line.split()) for line in lines + inline if re.match(r"(python|make|pip|torchrun) ", line)]
    return list(dict.fromkeys(found))


def test_the_readme_fits_one_sitting():
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 20_000


def test_each_reader_finds_a_door_on_the_first_screens():
    start = "\n".join(README.splitlines()[:60])
    for reader in ("Students", "Researchers", "Engineers"):
        assert f"- **{reader}**" in start
    assert "make demo" in start and "```python\n" in start and "docs/curves.png" in start


def test_the_step_of_the_readme_trains(tmp_path):
    """Completions that beat their group become more likely."""
    policy = load_policy(str(little_policy_folder(tiny_database(tmp_path / "music.sqlite"))))
    torch.manual_seed(0)
    prompts = [torch.tensor(policy.tokenizer.encode(question)) for question, _, _ in LESSONS[:2]]
    known = {name: getattr(grpo, name) for name in ("sample_groups", "group_advantages", "plain_logprobs", "policy_loss")}
    known |= {"torch": torch, "pad_sequence": torch.nn.utils.rnn.pad_sequence, "model": policy.model,
              "tokenizer": policy.tokenizer, "config": GRPOConfig(max_completion_tokens=8, kl_coef=0), "prompts": prompts,
              "questions": LESSONS[:2], "reward": lambda question, tokens: float(tokens.sum() % 7),
              "optimizer": torch.optim.SGD(policy.model.parameters(), lr=1e-3)}
    exec(re.search(r"```python\n(groups = .*?)```", README, re.DOTALL)[1], known)

    assert known["advantages"].any()
    before = after = 0.0
    for group, A in zip(known["groups"], known["advantages"], strict=True):
        before += sum(a * logp.sum().item() for a, logp in zip(A.tolist(), group.logps, strict=True))
        logp = grpo.plain_logprobs(policy.model, [group.prompt] * len(A), group.completions, 1.0)
        after += (A[:, None] * logp).sum().item()
    assert after > before


@pytest.mark.parametrize("page, least", [("docs/walkthrough.md", 20), ("docs/rewards.md", 24)])
def test_every_number_shown_is_computed_by_the_code(page, least, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages make a database
    result = doctest.testfile(str(ROOT / page), module_relative=False)
    assert result.failed == 0 and result.attempted >= least


def cells(line):
    """The numbers of a line of a table, behind its first cell."""
    return [float(cell) for cell in line.strip("| \n").split("|")[1:]]


def test_the_tables_of_the_walkthrough_are_computed_by_the_code():
    tables = {line.split("|")[1].strip(): line for line in WALKTHROUGH.splitlines() if line.startswith("| ")}
    rewards = torch.tensor([cells(tables[f"rewards of question {n}"]) for n in (1, 2)])
    advantages = group_advantages(rewards)
    shown = re.findall(r"^o\d  (\d) █+ +([+-]\d\.\d{3}) ", WALKTHROUGH, re.MULTILINE)  # of the plot
    assert torch.tensor([float(R) for R, _ in shown]).tolist() == rewards.flatten().tolist()
    assert torch.allclose(torch.tensor([float(A) for _, A in shown]), advantages.flatten(), atol=6e-4)

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


@pytest.mark.parametrize("page", PAGES)
def test_what_is_generated_is_up_to_date(page):
    assert readme.up_to_date(PAGES[page]) == PAGES[page], "run: python docs/readme.py"


def test_every_setting_of_a_run_is_in_the_table_of_flags():
    table = PAGES["docs/flags.md"].split("## `python evaluate.py`")[0]
    for field in readme.training_fields().values():
        if "help" in field.metadata:
            row = next(line for line in table.splitlines() if re.match(rf"\| `{options.flag_of(field)}[ ,]", line))
            assert field.metadata["help"].partition(" (default")[0].replace("|", "\\|") in row
            assert ("` * |" in row) == bool(field.metadata.get("common")), row


NOT_YET_RUN = {"ablation-dense": ("+ atomic", "+ memory")}  # as docs/results/dense-rewards.md says


def test_ablations_are_those_of_the_commands_shown(tmp_path, monkeypatch):
    (tmp_path / "SPIDER").mkdir()
    (tmp_path / "SPIDER" / "dev_exclude.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    files = sorted(readme.RESULTS.glob("ablation-*.json"))
    assert len(files) == 6
    for file in files:
        content = json.loads(file.read_text())
        assert f"python {content['command']}\n" in ABLATIONS + DENSE, f"{file.name} was made by {content['command']}"
        starts, runs = ablate.make_runs(*ablate.parse_arguments(content["command"].split()[1:]))
        runs = [run for run in runs if run.cell not in NOT_YET_RUN.get(file.stem, ())]
        cells_now = list(dict.fromkeys(run.cell for run in starts + runs))  # k1 was a loss when this was measured
        assert cells_now == [cell for cell in content["runs"] if "k1" not in cell.split()]
        assert all(set(content["runs"][run.cell]) >= {str(run.seed)} for run in runs)  # every run was finished
        summary = ablate.rounded(ablate.summarise(content["runs"], content["baseline"]))
        assert summary.keys() == content["summary"].keys()
        for cell, part in summary.items():  # of rounded runs, hence within the rounding
            for name, value in part["measures"].items():
                assert value["mean"] == pytest.approx(content["summary"][cell]["measures"][name]["mean"], abs=2e-5)
        assert file.stat().st_size < 60_000
        by_tier = {name for name in summary[content["baseline"]]["measures"] if name.startswith("accuracy, ")}
        assert all(part["measures"].keys() <= MEASURES | by_tier for part in summary.values()), file.name
        if any(part["curve"] for part in summary.values()):
            assert ET.fromstring(file.with_suffix(".svg").read_text()) is not None


def test_commands_of_every_program_are_found():
    assert {"train.py", "evaluate.py", "ask.py", "sft.py", "ablate.py", "report.py", "running.show",
            "questions.text2sql_data"} <= {
        word for command in commands() for word in command.split()}
    assert commands()[:2] == ["make demo", "make test"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with all that the commands mention, small: data in three layouts, a model, a run."""
    folder = tmp_path_factory.mktemp("readme")
    for place in ("my_databases", "SPIDER/database/music", "BIRD/train/train_databases/music", "BIRD/dev_databases/music"):
        (folder / place).mkdir(parents=True)
        database = tiny_database(folder / place / "music.sqlite")
    records = [{"db_id": "music", "question": question, "query": sql, "trace": thought} for question, sql, thought in LESSONS]
    for place in ("SPIDER/train_spider.json", "SPIDER/dev.json", "BIRD/train/train.json", "BIRD/dev.json"):
        (folder / place).write_text(json.dumps(records))
    (folder / "SPIDER" / "dev_exclude.json").write_text("[5]")
    splits = [record | {"split": split} for record in records for split in ("train", "dev", "test")]
    (folder / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in splits))
    (folder / "FILE").write_text("".join(f"{record['query']}\n" for record in records))
    (folder / "my_rewards.py").write_text(OWN_REWARD)
    (folder / "my.jinja").write_text(OWN_TEMPLATE)
    tiny_clone(folder / "text2sql-data")
    scores = {"examples": [{"id": "1", "db_id": "music", "gold_status": "ok", "bird": 1}]}
    for name in ("A.json", "B.json"):
        (folder / name).write_text(json.dumps(scores))
    shutil.copytree(ROOT / "docs" / "shop", folder / "docs" / "shop")
    (folder / "demo_data" / "seed-0" / "shop").mkdir(parents=True)
    shutil.copy(database, folder / "demo_data" / "seed-0" / "shop" / "shop.sqlite")
    for place in ("my/shop.sqlite", "SPIDER/database/concert_singer/concert_singer.sqlite"):
        (folder / place).parent.mkdir(parents=True)
        with closing(sqlite3.connect(folder / place)) as connection:
            connection.executescript((ROOT / "docs" / "shop" / "shop.sql").read_text())
    return folder, str(little_policy_folder(database))


@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command, workplace, monkeypatch):
    """As it stands on the page, with a small model and data, and fewer steps; all in one folder, in their order."""
    folder, model = workplace
    words = ["0" if word == "S" else model if word == "path/to/checkpoint" or re.search("runs/.*/(best|checkpoints)|qwen|smollm2-135|OmniSQL-7B|finer-sql-3b", word)
             else word for word in shlex.split(command)]
    if words[0] in ("make", "pip"):
        assert_named_in_makefile(words)
        return
    script = next(word for word in words if word.endswith(".py") or word in SMALLER)
    if script.startswith(("bench/", "docs/")) or script == "minimal.py":  # tests/test_minimal.py runs it
        assert (ROOT / script).is_file()
        return
    if "--help" in words or "--help-all" in words:  # tests of their own
        return
    monkeypatch.chdir(folder)
    if script == "ablate.py":
        ablate.make_runs(*ablate.parse_arguments(words[2:]))  # tests/test_ablate.py runs it on a small grid
        return
    arguments = words[words.index(script) + 1:]
    if "--resume" in arguments:  # the run decides the rest
        arguments += ["--eval-every", "0"]
    else:
        arguments += [] if "--compare" in words else SMALLER[script].split()
        arguments += ["--max-completion-tokens", "16"] if script == "evaluate.py" and "--model" in words else []
        if "--data" not in words and script == "train.py" or "demo" in words:  # .ci/run runs the real demo
            arguments = ["test" if word == "unseen" else word for word in arguments]  # a split of the demo alone
            arguments += ["--data", "mine.jsonl", "--data-dir", "my_databases"]
        if script == "train.py" and "--output" not in words:
            arguments += ["--output", f"runs/{len(list(folder.glob('runs/*')))}" if (folder / "runs/demo").exists() else "runs/demo"]
    if words[0] == "torchrun":
        parse_settings(arguments)  # tests/test_distributed.py runs several processes
        return
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # of ask.py without a question
    try:
        assert importlib.import_module(script.removesuffix(".py")).main() in (0, None)
    except UserError as error:
        missing = re.search("needs (peft|tensorboard)", str(error))  # optional, see requirements-extra.txt
        assert missing and importlib.util.find_spec(missing[1]) is None, error


def assert_named_in_makefile(words):
    """A `make` target exists, and what `pip` installs is what a target installs."""
    makefile = (ROOT / "Makefile").read_text()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
        assert words[1] not in ("demo", "test") or f"make {words[1]}" in (ROOT / ".ci" / "run").read_text()
    else:
        assert " ".join(words[1:]).replace("install ", "install --quiet ") in makefile


def test_the_file_tree_is_complete():
    tree = re.search(r"# The files\n\n```\n(.*?)```", (ROOT / "docs" / "files.md").read_text(), re.DOTALL)[1]
    shown, folder = {}, ""
    for line in tree.splitlines():
        name, comment = line.split(maxsplit=1)
        folder = folder if line.startswith(" ") else name if name.endswith("/") else ""
        shown[folder + name if line.startswith(" ") else name] = comment
    files = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).glob("*.*"))]
    assert set(shown) == {str(path.relative_to(ROOT)) for path in files} | {f"{name}/" for name in FOLDERS} | {
        "bench/", "docs/", "tests/", "Makefile", ".ci/run"}
    assert list(shown)[:7] == ["minimal.py", "train.py", "evaluate.py", "grpo.py", "rewards.py", "sql_exec.py", "data.py"]


def test_every_bench_is_named_and_the_makefile_runs_those_that_exist():
    scripts = {path.stem for path in (ROOT / "bench").glob("*.py")}
    assert scripts == set(re.findall(r"bench/(\w+)\.py", PAGES["docs/speed.md"]))
    run = re.search(r"for script in (.*?);", (ROOT / "Makefile").read_text())[1].split()
    assert set(run) <= scripts


@pytest.mark.parametrize("room, parts", [("grpo", set()), ("sql_exec", set()),
                                         ("rewards", {"sql_exec", "partial_credit.atomic", "partial_credit.memory", "prompts.answer_format"})])
def test_rooms_that_stand_alone_import_their_parts_only(room, parts):
    ours = {path.stem for path in ROOT.glob("*.py")} | set(FOLDERS)
    for name in {room, *parts}:
        source = (ROOT / f"{name.replace('.', '/')}.py").read_text()
        imports = re.findall(r"^ *(?:from|import) ([\w.]+)", source, re.MULTILINE)
        assert {module for module in imports if module.split(".")[0] in ours} <= parts, name


def edits(page, section):
    """[(file, old text, new text)] of the diffs in a section of a page."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)[1]
    found = []
    for file, diff in re.findall(r"^```diff (\S+)\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE):
        lines = diff.splitlines()
        found.append((file, *("\n".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))))
    return found


def edited(section):
    """The module that the edits of a section of docs/extend.md make of one file; each must fit in one place."""
    changes = edits(EXTEND, section)
    (file,) = {file for file, _, _ in changes}
    source = (ROOT / file).read_text()
    assert len(changes) <= 3
    for _, old, new in changes:
        assert source.count(old) == 1, f"docs/extend.md: {file} has this {source.count(old)} times:\n{old}"
        source = source.replace(old, new)
    module = types.ModuleType("edited")
    module.__file__ = str(ROOT / file)
    sys.modules["edited"] = module  # where dataclasses look for the names in their annotations
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def test_the_edits_that_change_the_loss_work(monkeypatch):
    monkeypatch.delitem(grpo.LOSSES, "sapo", raising=False)  # undone at the end, as the edit is
    edited("Change the loss")
    torch.manual_seed(0)
    old, A, mask = torch.randn(4, 3), torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.ones(4, 3).bool()

    def gradient(logp, loss):
        logp = logp.clone().requires_grad_()
        grpo.policy_loss(logp, old, None, A, mask, GRPOConfig(loss=loss))[0].backward()
        return logp.grad

    torch.testing.assert_close(gradient(old, "sapo"), gradient(old, "grpo"))  # all ratios are 1
    moved = old + 0.5 * A[:, None]  # beyond the clip range in the wanted direction
    faded, whole = gradient(moved, "sapo").abs(), gradient(old, "sapo").abs()
    assert not gradient(moved, "grpo").any() and (faded > 0).all() and (faded[A < 0] < whole[A < 0]).all()


def test_the_edits_that_add_a_reward_work(tmp_path):
    rewards = edited("Add a reward")
    gold, config = "SELECT name FROM singer", rewards.RewardConfig(rewards="format,execution,length=0.5")
    texts = [f"<think> all names </think> {sql}" for sql in (gold, gold + " LIMIT 0", "SELECT 1")]
    with SQLExecutor({"music": tiny_database(tmp_path / "music.sqlite")}, workers=1) as executor:
        scorer = rewards.RewardScorer(config, executor, {}, match=MATCHES["bird"])
        scored = scorer.score([rewards.RewardItem("music", [gold], text) for text in texts])
    assert [one.length for one in scored] == pytest.approx([1.0, len(gold) / (len(gold) + 8), 8 / len(gold)])
    assert scored[0].total == 1 + 2 + 0.5 and scored[0].total > scored[1].total > scored[2].total


@pytest.mark.parametrize("path", sorted(path for path in ROOT.glob("**/*.py") if path.relative_to(ROOT).parts[0] in (path.name, *FOLDERS, "bench", "docs")),
                         ids=lambda path: path.name)
def test_d_nothing_is_tied_to_one_machine(path):
    """No address but this machine's own, no home folder, no killing of processes by name."""
    source = path.read_text()
    addresses = set(re.findall(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", source))
    assert addresses <= {"127.0.0.1"}
    assert not re.search(r"/(?:home|Users|root|mnt|workspace)/\w|pkill|killall", source)


def test_the_reward_of_ones_own_runs(tmp_path):
    source = OWN_REWARD
    assert len(source.strip().splitlines()) <= 10
    (tmp_path / "my_rewards.py").write_text(source)
    reward = load_reward_module(tmp_path / "my_rewards.py")

    def value(sql, status="ok"):
        return reward(question="?", db_id="x", gold_sqls=("SELECT 1",), thought="", sql=sql,
                      execution=Execution(status, (), [], None, 0.0))

    assert value("SELECT 1") == 1.0 and value("SELECT 1", "error") == 0.0
    assert 0 < value("S" * 200) < 1 and value("S" * 500) == 0.0


@pytest.mark.parametrize("page", PAGES)
def test_links_pictures_and_scripts_exist(page):
    folder = (ROOT / page).parent
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", PAGES[page]):
        linked = (folder / target).resolve() if target else ROOT / page
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked.read_text()), f"{target}#{anchor}"
    for script in re.findall(r"bench/\w+\.py", PAGES[page]):
        assert (ROOT / script).is_file(), script


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]


def test_pictures_are_small_and_there_is_one_in_the_readme():
    pictures = re.findall(r"\]\((docs/\w+\.png)\)", README)
    assert len(pictures) == 1 and all(path.stat().st_size < 150_000 for path in (ROOT / "docs").glob("*.png"))


def test_named_tests_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PITFALLS)
    assert len(named) >= 20
    for name in named:
        assert f"def {name}(" in tests, name
