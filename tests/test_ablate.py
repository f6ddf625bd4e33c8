"""ablate.py: grids, measures and intervals by hand, and a small ablation that is run, continued and compared."""

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from little_policy import LESSONS, little_policy_folder

import ablate
import evaluate
import train
from common.errors import UserError
from questions import demo_world

# ---- the grid


def test_every_named_grid_is_one_that_train_accepts(tmp_path):
    for name, cells in ablate.GRIDS.items():
        assert list(ablate.cells_of(name, [])) == list(cells) and len(cells) > 1
        for flags in cells.values():
            train.parse_settings([*ablate.as_flags(flags), "--output", str(tmp_path)])
    assert len(ablate.GRIDS["rewards"]) == 5 and len(ablate.GRIDS["loss"]) == 4 * 2
    completions = {int(f["prompts_per_step"]) * int(f["group_size"]) for f in ablate.GRIDS["group-size"].values()}
    assert len(completions) == 1


def test_combinations():
    cells = ablate.cells_of("advantage-scale", ["group-size=4,8", "rewards=format,execution;format"])
    assert len(cells) == 3 * 2 * 2
    assert cells["group, group_size=8, rewards=format"] == {"advantage_scale": "group", "group_size": "8", "rewards": "format"}
    assert ablate.as_flags({"lr_decay": "true", "lenient_format": "false", "kl_coef": "0"}) == [
        "--lr-decay", "--no-lenient-format", "--kl-coef", "0"]


@pytest.mark.parametrize("arguments, words", [
    ([], "give --grid NAME"), (["--vary", "lr"], "not of the form"), (["--vary", "=1"], "not of the form"),
    (["--vary", "cold_start_steps=1,2"], "belongs to it"), (["--vary", "world=default,hard"], "belongs to it"),
    (["--grid", "kl", "--seeds", "0"], "--seeds is 0; it must be at least 1"), (["--grid", "kl", "--seed", "1"], "is set by"),
    (["--grid", "kl", "--output", "x", "--resume"], "is set by"), (["--vary", "data=a,b"], "belongs to it"),
    (["--grid", "kl", "--group-size", "1"], "--group-size is 1; it must be at least 2"), (["--vary", "rewards=format;exec"], "no reward 'exec'"),
    (["--vary", "rewards=format,execution;format-execution"], "share a folder"),
    (["--grid", "nope"], "there is no grid nope"), (["--grid", "kl", "--jobs", "0"], "--jobs is 0"),
    (["--grid", "kl", "--samples", "1"], "--samples is 1"), (["--grid", "kl", "--questions", "-1"], "--questions is -1"),
    (["--vary", "rewards=format,execution;format,execution,user=0.2"], "execution,user=0.2 name user, so give --reward-mod"),
    (["--grid", "rewards", "--reward-module", "mine.py"], "no cell uses --reward-module mine.py: name user=W"),
    (["--vary", "reward_module=a.py,b.py"], "needs both"),
    *[(["--vary", f"{flag}=x,y"], f"{flag.replace('-', '_')} belongs to it") for flag in (
        "prompt_style", "prompt-template", "answer", "descriptions", "recipe", "eval_questions", "match")],
    (["--vary", "test_questions=1,2"], r"sets it for each run \(see --questions"), (["--vary", "seed=1,2"], "see --seeds"),
    (["--grid", "kl", "--test-questions", "50"], r"--test-questions is set by ablate.py for each run \(see --questions\)"),
    (["--grid", "kl", "--test-questions=50"], "see --questions"), (["--grid", "kl", "--start", "x"], "one for all runs")])
def test_bad_command_lines_are_refused_before_any_work(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "perform", None)
    with pytest.raises(UserError, match=words):
        ablate.make_runs(*ablate.parse_arguments(arguments))
    assert not list(tmp_path.iterdir())


def test_runs_are_measured_with_the_prompts_of_their_start(tmp_path):
    """Which the start takes from the run that made its model."""
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "config.json").write_text(json.dumps({"data": "demo", "style": "compact", "max_prompt_tokens": 77}))
    given = ["--grid", "kl", "--model", str(tmp_path / "best"), "--output", str(tmp_path / "out")]
    starts, runs = ablate.make_runs(*ablate.parse_arguments(given))
    assert {(run.settings.prompts.style, run.settings.prompts.max_prompt_tokens) for run in starts + runs} == {("compact", 77)}


def test_runs_are_measured_as_they_were_trained(tmp_path):
    (tmp_path / "own.jinja").write_text("{{ question }}")
    given, common = ablate.parse_arguments([
        "--grid", "kl", "--seeds", "1", "--output", str(tmp_path), "--prompt-template", str(tmp_path / "own.jinja"),
        "--answer", "fence", "--tables", 'a,"b, c"', "--max-completion-tokens", "77", "--lenient-format"])
    run = ablate.make_runs(given, common)[1][1]
    (run.folder / "checkpoints" / "step-3").mkdir(parents=True)
    (run.folder / "config.json").write_text(json.dumps(run.settings.as_dict()))
    _, config, prompts = evaluate.parse_arguments(ablate.evaluation_flags(run, given, tmp_path / "evaluation.json"))
    assert prompts == run.settings.prompts and prompts.template_text == "{{ question }}"
    assert (config.max_completion_tokens, config.lenient_format, config.vote) == (77, True, "none")


@pytest.mark.parametrize("output, why", [(__file__, "File exists"), (f"{__file__}/sub", "Not a directory")])
def test_an_output_that_cannot_be_is_refused_before_any_work(output, why, monkeypatch):
    monkeypatch.setattr(ablate, "perform", None)
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--grid", "kl", "--output", output])
    with pytest.raises(UserError, match=f"cannot write to --output .*{why}"):
        ablate.main()


def test_excluding_questions_of_other_data_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text(json.dumps([{"db_id": "d", "question": "?", "sql": "SELECT 1"}] * 3))
    (tmp_path / "left_out.json").write_text('["nope"]')
    monkeypatch.setattr(ablate, "perform", None)
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--grid", "kl", "--data", str(tmp_path / "mine.json"), "--output",
                                      str(tmp_path / "out"), "--exclude", str(tmp_path / "left_out.json")])
    with pytest.raises(UserError, match="none of its ids, such as 'nope', is one of .*mine.json"):
        ablate.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--grid", "kl", "--see", "7"], ["--vary", "see=7,8"]])
def test_a_flag_that_is_cut_short_is_none(arguments):
    with pytest.raises(UserError, match="there is no flag --see; did you mean --seed"):
        ablate.make_runs(*ablate.parse_arguments(arguments))


def modules_of(*arguments):
    """{cell: its reward module} of a grid, the start among them; and the rewards of the start."""
    starts, runs = ablate.make_runs(*ablate.parse_arguments(["--seeds", "1", *arguments]))
    rewards = starts[0].settings.rewards
    return {run.cell: run.settings.rewards.reward_module for run in starts + runs}, rewards.rewards


def test_a_reward_of_ones_own_goes_to_the_cells_that_name_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    user = "format,execution,user=0.2"
    modules, _ = modules_of("--vary", f"rewards=format,execution;{user}", "--reward-module", "mine.py")
    assert modules == {"start": None, "rewards=format,execution": None, f"rewards={user}": "mine.py"}
    modules, rewards = modules_of("--vary", "lr=1e-4,1e-5", f"--rewards={user}", "--reward-module=mine.py")
    assert modules == {"start": None, "lr=1e-4": "mine.py", "lr=1e-5": "mine.py"} and rewards == "format,execution"
    modules, _ = modules_of("--vary", "reward-module=a.py,b.py", "--rewards", user)
    assert modules == {"start": None, "reward_module=a.py": "a.py", "reward_module=b.py": "b.py"}
    modules, rewards = modules_of("--vary", "lr=1e-4,1e-5", "--rewards", "format,execution=2")
    assert set(modules.values()) == {None} and rewards == "format,execution=2"


@pytest.mark.parametrize("given, cores, threads, told", [
    (["--jobs", "2"], 8, 4, False), (["--jobs", "3"], 2, 1, False), ([], 6, 6, False),
    (["--jobs", "2", "--threads", "2"], 4, 2, False), (["--jobs", "2", "--threads", "2"], 2, 2, True)])
def test_runs_side_by_side_share_the_cores(given, cores, threads, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "free_cores", lambda: cores)
    arguments = ["--grid", "kl", "--seeds", "1", "--output", str(tmp_path), *given]
    starts, runs = ablate.make_runs(*ablate.parse_arguments(arguments))
    assert {run.settings.run.threads for run in starts + runs} == {threads}
    used = []

    def perform(run, given, workers):
        used.append(workers.environment["OMP_NUM_THREADS"])
        return {"accuracy": 0.5}

    monkeypatch.setattr(ablate, "perform", perform)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sys, "argv", ["ablate.py", *arguments])
    assert ablate.main() == 0 and set(used) == {str(threads)}
    assert ("leave out --threads" in capsys.readouterr().out) == told
    assert ablate.free_cores() >= 1


def test_the_command_is_kept_so_that_a_shell_takes_it():
    given, _ = ablate.parse_arguments(["--vary", "rewards=format;format,execution", "--jobs", "2"])
    assert given.command == "ablate.py --vary 'rewards=format;format,execution' --jobs 2"
    assert given.output == Path("runs/ablation-own")


# ---- measures, by hand


def test_intervals_are_students_t():
    assert ablate.mean_interval([0.5]) == {"mean": 0.5, "interval": None}
    assert ablate.mean_interval([0.395] * 3)["interval"] is None  # three seeds that happen to agree are not certain
    found = ablate.mean_interval([1.0, 2.0, 3.0])  # deviation 1, so 4.303 / sqrt(3)
    assert found["mean"] == 2.0 and found["interval"] == pytest.approx([2 - 2.4843, 2 + 2.4843], abs=1e-4)
    rng, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        low, high = ablate.mean_interval(rng.normal(size=5).tolist())["interval"]
        hits += low <= 0 <= high
    assert 0.935 < hits / 2000 < 0.965
    many = ablate.mean_interval([0.0, 1.0] * 15)["interval"]  # 30 values: t = 2.045
    assert many[1] - 0.5 == pytest.approx(2.045 * np.std([0.0, 1.0] * 15, ddof=1) / np.sqrt(30), rel=0.002)


def test_area_under_a_curve():
    assert ablate.area_under([[10, 0.4]]) == 0.4
    assert ablate.area_under([[0, 0.0], [10, 1.0]]) == pytest.approx(0.5)
    assert ablate.area_under([[0, 0.2], [10, 0.4], [40, 0.4]]) == pytest.approx((10 * 0.3 + 30 * 0.4) / 40)


def test_what_the_metrics_say():
    def step(number, **more):
        return {"step": number, "flat_groups": 0.25 * number, "all_wrong_groups": 0.5, "reward_std": 0.1 * number,
                "seconds/rollout": 1.0, "seconds/update": 2.0, "seconds/rewards": 0.5, "seconds/rewards/atomic": 0.4, **more}

    found = ablate.training_measures([step(1), step(2, dev_accuracy=0.5), step(3, dev_accuracy=0.44)])
    assert found["flat groups"] == pytest.approx(0.5) and found["reward spread"] == pytest.approx(0.2)
    assert found["all wrong"] == 0.5 and found["seconds"] == pytest.approx(10.5)  # parts of a part count once
    assert found["curve"] == [[2, 0.5], [3, 0.44]] and found["area"] == pytest.approx(0.47)
    assert (found["best on dev"], found["last on dev"], found["collapse"]) == (0.5, 0.44, 1.0)
    kept = ablate.training_measures([step(1, dev_accuracy=0.55), step(2, dev_accuracy=0.50)])
    assert kept["collapse"] == 0.0  # five points are not more than five
    assert "collapse" not in ablate.training_measures([step(1)])
    fallen = ablate.training_measures([step(1, dev_accuracy=0.5, start_dev_accuracy=0.6), step(2, dev_accuracy=0.5)])
    assert (fallen["best on dev"], fallen["collapse"]) == (0.6, 1.0)  # best/ is that of the start
    assert fallen["curve"] == [[1, 0.5], [2, 0.5]] and fallen["area"] == pytest.approx(0.5)
    void = {"step": 4, "seconds/rollout": 2.0}  # no database could be read: there was nothing to measure
    assert ablate.training_measures([step(1), void]) == ablate.training_measures([step(1)]) | {"seconds": 3.5 + 2.0}
    assert ablate.training_measures([void]) == {"seconds": 2.0}


def test_a_cell_whose_database_was_locked_is_measured_again(tmp_path):
    folder = tmp_path / "cell"
    folder.mkdir()
    run, given = SimpleNamespace(folder=folder, trained=True), SimpleNamespace(samples=1, questions=1, exclude=None)

    def call(script, flags, log):
        unread = [{"id": "1", "db_id": "music", "error": "database is locked", "file": "music.sqlite"}]
        (folder / "evaluation.json").write_text(json.dumps({"unavailable": unread}))

    with (pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="1 questions could not be evaluated in "
                                                               r".*cell: database is locked \(music.sqlite\); the same")):
        patch.setattr(ablate, "evaluation_flags", lambda *given: [])
        ablate.perform(run, given, SimpleNamespace(call=call))
    assert not (folder / "measures.json").exists()


def test_differences_are_paired_by_seed():
    results = {"base": {0: {"accuracy": 0.1}, 1: {"accuracy": 0.5}, 2: {"accuracy": 0.3}},
               "other": {0: {"accuracy": 0.2, "curve": [[1, 0.2], [2, 0.4]]},
                         2: {"accuracy": 0.42, "curve": [[1, 0.4], [2, 0.6], [3, 0.9]]}}}
    summary = ablate.summarise(results, "base")
    found = summary["other"]["measures"]["accuracy"]
    assert summary["other"]["seeds"] == 2 and found["mean"] == pytest.approx(0.31)
    assert found["difference"]["mean"] == pytest.approx(0.11)  # of seeds 0 and 2
    assert found["difference"]["interval"] == pytest.approx([0.11 - 12.706 * 0.01, 0.11 + 12.706 * 0.01])
    assert "difference" not in summary["base"]["measures"]["accuracy"]
    results["other"][3] = {"accuracy": 0.9}  # a seed that failed in the baseline has a mean, but no difference
    table = ablate.table(ablate.summarise(results, "base"), "base")
    assert "| other | 3 | 50.7 [" in table and "| other | 2 | +11.0 [" in table
    assert [step for step, _ in summary["other"]["curve"]] == [1, 2]  # where every seed has one
    text = ablate.table(summary, "base")
    assert "| other | 2 | 31.0 [-108.8, 170.8] |" in text and "+11.0 [-16.1, 23.7]".replace("-16.1", "-1.7") in text


def marks(right, databases=1, twins=1):
    """Marks [Q] as ablate.json has them: as many questions in each database, groups of so many twins."""
    parts = np.array_split(np.asarray(right), databases)
    return {f"db{i}": " ".join("".join(map(str, part[j:j + twins])) for j in range(0, len(part), twins))
            for i, part in enumerate(parts)}


def test_intervals_over_twins_databases_and_seeds():
    rng = np.random.default_rng(1)

    def runs(share, questions="q", **how):
        return {seed: {"accuracy": share, "right": {"questions": questions, "marks": marks(
            np.repeat((rng.random(200) < share).astype(int), 2), **how)}} for seed in range(4)}

    base, better = runs(0.3, databases=4), runs(0.6, databases=4)
    found = ablate.drawn_intervals(better, base)
    mean = np.mean([(sum(text.count("1") for text in better[s]["right"]["marks"].values())
                     - sum(text.count("1") for text in base[s]["right"]["marks"].values())) / 400 for s in range(4)])
    low, high = found["over twins"]
    assert low < mean < high and 0.1 < high - low < 0.2
    assert found["over databases"][0] < mean < found["over databases"][1]
    same, unseen = ablate.drawn_intervals(base, base), {"over twins": 400, "over databases": 4}  # no group changed
    assert same == {over: pytest.approx([0.025 ** (1 / K) - 1, 1 - 0.025 ** (1 / K)]) for over, K in unseen.items()}
    assert ablate.drawn_intervals({9: better[0]}, base) == {}  # no seed in common
    assert ablate.drawn_intervals(runs(0.3, "others"), base) == {}  # other questions, as the demo's are by seed
    assert ablate.drawn_intervals({0: {"accuracy": 0.1}}, base) == {}  # measured before it was kept
    old = {0: {"accuracy": 0.1, "right": {"questions": "q", "marks": "0101"}}}
    assert ablate.drawn_intervals(old, old) == {}  # and before twins were
    summary = ablate.summarise({"base": base, "other": better}, "base")
    assert summary["other"]["measures"]["accuracy"]["difference"] | found == summary["other"]["measures"]["accuracy"]["difference"]
    text = ablate.rows({"other": summary["other"]}, [], ["accuracy"])
    assert text.count("[") == 3 and f"+30.0 [–] [{100 * low:.1f}, {100 * high:.1f}] [" in text  # seeds agree by chance
    assert ablate.in_words("accuracy", {"mean": 0.5, "interval": None}) == "50.0"
    assert "right" not in summary["other"]["measures"]


def test_twins_that_are_answered_alike_count_once():
    rng = np.random.default_rng(2)
    halves = [np.repeat(rng.integers(0, 2, 200), 2) for _ in range(2)]
    width = {}
    for twins in (1, 2):  # the same answers, taken as 400 questions and as 200 pairs of twins
        sides = [{0: {"right": {"questions": "q", "marks": marks(half, twins=twins)}}} for half in halves]
        found = ablate.drawn_intervals(*sides)
        assert found.keys() == {"over twins"}  # one database says nothing of others
        width[twins] = found["over twins"][1] - found["over twins"][0]
    assert 1.25 < width[2] / width[1] < 1.6  # the root of two


def test_marks_keep_twins_together():
    examples = [{"db_id": db_id, "twins": twins, "bird": right} for db_id, twins, right in (
        ("a", "x", 1), ("a", "y", 0), ("a", "x", 0), ("b", "x", 1), ("b", "", 1), ("b", "", 0))]
    assert ablate.marks_of(examples, "bird") == {"a": "10 0", "b": "1 1 0"}


def test_the_plot_is_one_picture_with_a_line_and_a_band_a_cell():
    def curve(*means):
        return [[10 * i, {"mean": m, "interval": [m - 0.1, m + 0.1]}] for i, m in enumerate(means, 1)]

    summary = {f"cell <{i}>": {"curve": curve(0.3, 0.4, 0.5 + i / 50)} for i in range(9)} | {
        "start": {"curve": []}, "alone": {"curve": [[10, {"mean": 0.2, "interval": None}]]}}
    picture = ET.fromstring(ablate.draw_curves(summary))
    tags = [element.tag.rpartition("}")[2] for element in picture]
    assert tags.count("polyline") == 10 and tags.count("polygon") == 9
    points = [tuple(map(float, p.split(","))) for e in picture if "points" in e.attrib for p in e.get("points").split()]
    assert all(ablate.LEFT <= x <= ablate.RIGHT and ablate.TOP <= y <= ablate.BOTTOM for x, y in points)
    assert ablate.draw_curves({"start": {"curve": []}}) == ""


# ---- a small ablation


@pytest.fixture
def small(tmp_path, tiny_db, monkeypatch):
    """Runs an ablation of two cells on two seeds in this process; returns (arguments, scripts called so far)."""
    records = [{"id": f"q{i}", "question": LESSONS[i % 6][0], "db_id": "music", "sql": LESSONS[i % 6][1],
                "difficulty": ["low", "high"][i % 2]} for i in range(40)]
    (tmp_path / "own.json").write_text(json.dumps(records))
    arguments = ["--vary", "rewards=format,execution;format,execution,atomic", "--seeds", 2, "--samples", 3, "--questions", 6,
                 "--model", little_policy_folder(tiny_db), "--data", tmp_path / "own.json", "--steps", 2, "--lr", 1e-4,
                 "--prompts-per-step", 2, "--group-size", 3, "--max-completion-tokens", 40, "--prompt-style", "compact",
                 "--eval-every", 1, "--save-every", 1, "--sql-workers", 1, "--kl-coef", 0, "--threads", 1,
                 "--output", tmp_path / "out"]
    called = []

    def call(self, script, flags, log):
        called.append((script, Path(log).stem, "--resume" in flags))
        monkeypatch.setattr(sys, "argv", [script, *flags])
        assert not {"train.py": train.main, "evaluate.py": evaluate.main}[script]()

    monkeypatch.setattr(ablate.Workers, "call", call)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # signals belong to the main thread
    return list(map(str, arguments)), called


def run_ablation(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["ablate.py", *arguments])
    status = ablate.main()
    out = Path(arguments[arguments.index("--output") + 1])
    return status, json.loads((out / "ablation.json").read_text())


def without_times(content):
    return json.dumps({cell: {seed: {k: v for k, v in measures.items() if k != "seconds"} for seed, measures in runs.items()}
                       for cell, runs in content["runs"].items()})


def test_an_ablation_is_run_skipped_continued_and_checked(small, tmp_path, monkeypatch, capsys):
    arguments, called = small
    status, content = run_ablation(monkeypatch, arguments)
    printed, out = capsys.readouterr(), tmp_path / "out"
    names = ["rewards=format,execution", "rewards=format,execution,atomic"]
    assert status == 0 and list(content["runs"]) == ["start", *names] and content["baseline"] == names[0]
    assert [script for script, _, _ in called] == ["train.py", "evaluate.py"] * 6
    assert printed.err.count("accuracy") + printed.out.count("  accuracy ") >= 6  # a line a run
    for seed in ("0", "1"):
        for cell, folder in zip(names, ("rewards=format-execution", "rewards=format-execution-atomic"), strict=True):
            measures, path = content["runs"][cell][seed], out / f"seed-{seed}" / folder
            lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            evaluation = json.loads((path / "evaluation.json").read_text())
            assert len(lines) == 2 and measures["flat groups"] == pytest.approx(np.mean([x["flat_groups"] for x in lines]),
                                                                                  abs=1e-5)
            right = evaluation["answers"]["greedy"]["execution_accuracy"]["bird"]
            assert measures["accuracy"] == pytest.approx(right, abs=1e-5) and right > 0
            assert 0 <= measures["does not run"] < 1 and 0 < measures["result groups"] <= 3
            assert measures["pass@3"] == pytest.approx(evaluation["pass_at_k"]["bird"][2], abs=1e-5)
            words = measures["right"]["marks"]["music"].split()
            found = [int(mark) for mark in "".join(words)]
            assert np.mean(found) == pytest.approx(right) and len(found) == evaluation["n"]
            assert len(words) == len({item["twins"] for item in evaluation["examples"]})
            assert [step for step, _ in measures["curve"]] == [x["step"] for x in lines]
            assert [y for _, y in measures["curve"]] == pytest.approx([x["dev_accuracy"] for x in lines], abs=1e-5)
            assert not (path / "checkpoints").exists() and (path / "best" / "config.json").exists()
    spreads = [[content["runs"][cell][seed]["reward spread"] for seed in "01"] for cell in names]
    assert spreads[0] != spreads[1] or not any(spreads[0])  # the rewards do differ
    assert (out / "table.md").read_text() in printed.out and ET.fromstring((out / "curves.svg").read_text()) is not None

    called.clear()  # the same again: nothing is left to do
    assert without_times(run_ablation(monkeypatch, arguments)[1]) == without_times(content) and called == []

    lost = out / "seed-1" / "rewards=format-execution"  # a run that was killed before it was measured
    (lost / "measures.json").unlink()
    kept = run_ablation(monkeypatch, [*arguments, "--keep"])[1]
    assert without_times(kept) == without_times(content)
    assert called == [("train.py", "rewards=format-execution", False), ("evaluate.py", "rewards=format-execution", False)]
    called.clear()
    (lost / "measures.json").unlink()  # and one that was killed after a checkpoint
    (lost / "evaluation.json").unlink()
    assert without_times(run_ablation(monkeypatch, arguments)[1]) == without_times(content)
    assert called == [("train.py", "rewards=format-execution", True), ("evaluate.py", "rewards=format-execution", False)]

    called.clear()  # another number of samples is measured anew, not trained anew
    again = run_ablation(monkeypatch, [*arguments, "--samples", "2", "--seeds", "1"])[1]
    assert {script for script, _, _ in called} == {"evaluate.py"} and len(called) == 3
    assert again["runs"][names[0]]["0"]["curve"] == content["runs"][names[0]]["0"]["curve"]
    for flag, words in ((("--lr", "0.1"), "lr = 0.0001, not 0.1"), (("--eval-every", "7"), "eval_every = .*, not 7")):
        with pytest.raises(UserError, match=f"was started with {words}"):  # by evaluations the best policy is chosen
            run_ablation(monkeypatch, [*arguments, *flag])
    data = out.parent / "own.json"
    data.write_text(data.read_text() + "\n")
    with pytest.raises(UserError, match="own.json has changed since .* was trained on it"):
        run_ablation(monkeypatch, arguments)


def test_what_is_measured_was_held_out(small, tmp_path, monkeypatch):
    records = [{"question": f"How many singers are older than {i}?", "db_id": "music",
                "sql": f"SELECT COUNT(*) FROM singer WHERE age > {i}"} for i in range(46)]
    (tmp_path / "own.json").write_text(json.dumps(records))  # without a field `split`
    arguments, _ = small
    run_ablation(monkeypatch, [*arguments[2:], "--seeds", "1", "--steps", "6", "--prompts-per-step", "6", "--keep",
                               "--group-size", "2", "--eval-every", "0", "--questions", "0", "--samples", "2",
                               "--vary", "kl_coef=0"])
    start, run = (tmp_path / "out" / "seed-0" / name for name in ("start", "kl_coef=0"))
    drawn = {json.loads(line)["question"] for line in (run / "rollouts.jsonl").read_text().splitlines()}
    for folder in (start, run):
        measured = [example["id"] for example in json.loads((folder / "evaluation.json").read_text())["examples"]]
        asked = {records[int(identity)]["question"] for identity in measured}
        assert len(asked) == 9 and not drawn & asked  # a fifth of 46
    assert len(drawn) > 30  # of the 33 that are left, dev taken off


@pytest.mark.parametrize("flags, questions, split", [
    (["--data", "demo"], 0, "test"), (["--data", "spider", "--data-dir", "X"], 0, "dev"),
    (["--data", "bird", "--data-dir", "X", "--split", "mini_dev"], 200, "mini_dev"),
    (["--data", "bird", "--data-dir", "X", "--split", "dev", "--questions", "0"], 1000, "dev")])
def test_the_part_that_is_measured(tmp_path, flags, questions, split):
    given, common = ablate.parse_arguments(["--grid", "kl", "--seeds", "1", "--output", str(tmp_path), *flags])
    with pytest.raises(UserError, match="cannot read left_out.json"):  # before any work
        ablate.make_runs(replace(given, exclude="left_out.json"), common)
    (tmp_path / "left_out.json").write_text("[3]")
    given = replace(given, exclude=str(tmp_path / "left_out.json"))
    starts, runs = ablate.make_runs(given, common)
    assert {run.settings.run.test_questions for run in starts + runs} == {questions}
    (runs[0].folder / "best").mkdir(parents=True)
    words = ablate.evaluation_flags(runs[0], given, tmp_path / "evaluation.json")
    assert words[words.index("--exclude") + 1] == str(tmp_path / "left_out.json")
    assert words[words.index("--split") + 1] == split and words[words.index("--model") + 1] == str(runs[0].folder / "best")


def test_a_shared_start_gives_what_a_cold_start_of_its_own_gives(small, tmp_path, monkeypatch):
    flags = ["--data", str(tmp_path / "own.json"), "--cold-start-steps", "3", "--cold-start-batch", "4", "--steps", "2",
             "--prompts-per-step", "2", "--group-size", "2", "--max-completion-tokens", "8", "--eval-every", "0",
             "--test-questions", "0", "--sql-workers", "1", "--threads", "1"]

    def trained(name, *more):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--output", str(tmp_path / name), *more])
        assert train.main() == 0
        return tmp_path / name / "checkpoints"

    whole, start = trained("whole"), trained("start", "--steps", "0")
    shared = trained("shared", "--start", str(start / "step-0"))
    for step in ("step-0", "step-2"):
        assert (whole / step / "model.safetensors").read_bytes() == (shared / step / "model.safetensors").read_bytes()


def test_a_run_that_fails_is_reported_and_the_others_go_on(small, tmp_path, monkeypatch, capsys):
    arguments, _ = small
    real = ablate.Workers.call

    def call(self, script, flags, log):
        if "atomic" in log.stem and "seed-1" in str(log):
            raise UserError(f"train.py failed (out of memory); see {log}")
        real(self, script, flags, log)

    monkeypatch.setattr(ablate.Workers, "call", call)
    status, content = run_ablation(monkeypatch, arguments)
    printed = capsys.readouterr()
    assert status == 1 and "failed (out of memory); see" in printed.out + printed.err
    assert [len(content["runs"][cell]) for cell in content["runs"]] == [2, 2, 1]


def locked(folder):
    """A process that holds the folder's lock until it is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    code = f"import fcntl, time; f = open({str(folder / '.lock')!r}, 'w'); f.write('process 7 on there'); f.flush(); " \
           "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_ablation_in_a_folder_touches_nothing(small, tmp_path, monkeypatch):
    arguments, called = small
    first = tmp_path / "out" / "seed-0" / "start"
    first.mkdir(parents=True)
    (first / "half-written").write_text("of the other ablation")
    process = locked(tmp_path / "out")
    try:
        with pytest.raises(UserError, match="out is in use by process 7 on there: let it end or stop it"):
            run_ablation(monkeypatch, arguments)
    finally:
        process.kill()
        process.wait()
    assert (first / "half-written").exists() and not called and not (tmp_path / "out" / "table.md").exists()


def test_a_run_that_outlived_its_ablation_is_left_alone(small, tmp_path, monkeypatch):
    arguments, called = small
    first = tmp_path / "out" / "seed-0" / "start"
    process = locked(first)
    (first / "half-written").write_text("by the run that goes on")
    try:
        with pytest.raises(UserError, match="without its cold start"):
            run_ablation(monkeypatch, [*arguments, "--seeds", "1"])
    finally:
        process.kill()
        process.wait()
    assert (first / "half-written").exists() and not called


def test_processes_are_called_stopped_and_their_last_words_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    (tmp_path / "good.py").write_text("import sys; print('hello', *sys.argv[1:])")
    (tmp_path / "bad.py").write_text("print('error: no luck'); raise SystemExit(2)")
    (tmp_path / "slow.py").write_text("import time, sys\ntry: print('up', flush=True); time.sleep(60)\n"
                                      "except KeyboardInterrupt: print('saved'); sys.exit(130)")
    workers, log = ablate.Workers(), tmp_path / "log"
    workers.call("good.py", ["a"], log)
    assert log.read_text() == "hello a\n" and not workers.processes
    with pytest.raises(UserError, match=r"bad.py failed \(error: no luck\); see"):
        workers.call("bad.py", [], log)
    with ablate.ThreadPoolExecutor(1) as pool:
        future = pool.submit(workers.call, "slow.py", [], tmp_path / "slow.log")
        end = time.monotonic() + 20
        while "up" not in ((tmp_path / "slow.log").read_text() if (tmp_path / "slow.log").exists() else ""):
            assert time.monotonic() < end
            time.sleep(0.01)
        workers.stop()
        assert isinstance(future.exception(20), ablate.Stopped)
    assert (tmp_path / "slow.log").read_text() == "up\nsaved\n"
    with pytest.raises(ablate.Stopped):
        workers.call("good.py", [], log)


# ---- the hard world


def test_the_hard_world_differs_in_its_traces_only(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_world, "SIZES", {split: dict.fromkeys(demo_world.TIERS, 50) for split in demo_world.SPLITS})
    for split in demo_world.SPLITS:
        (records, databases), (hard, same) = (demo_world.load(split, tmp_path, world=world) for world in ("default", "hard"))
        assert databases == same and (records == hard) == (split != "cold")
    hard, default = (demo_world.load("cold", tmp_path, world=world)[0] for world in ("hard", "default"))
    assert [record["question"] for record in hard] == [record["question"] for record in default]
    slips, fewer = (sum(bool(record["trace_sql"]) for record in records) for records in (hard, default))
    upper = sum(record["difficulty"] != "simple" for record in hard)
    assert fewer < 0.5 * upper < 0.75 * upper < slips  # a slip that gives the right result here is no slip
    with pytest.raises(ValueError, match="no demo world 'easy'; choose one of default, hard"):
        demo_world.load("cold", tmp_path, world="easy")
