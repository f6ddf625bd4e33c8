"""What a policy has seen: the runs that made it, and the questions that remain for its evaluation.

A run's config.json records its training data and the settings of the runs that it started from. So no policy is
evaluated on questions that trained it or chose it, unless a note says so.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from common.errors import UserError, stored_settings
from common.run_layout import runs_of
from data import Splits, load_dataset, load_splits
from questions.holdout import not_shared
from questions.question_files import (
    Dataset,
    has_golds,
    is_own,
    own_labels,
)


def run_config_of(model: str) -> dict | None:
    """The config.json of the training run that made this policy folder, or whose folder this is; None without one."""
    if not Path(model).is_dir():
        return None
    found = map(stored_settings, runs_of(Path(model).resolve()))
    return next((config for config in found if config is not None), None)


def reported_split(name: str) -> str:
    """The split that a training run on these data reports as its test: the one to evaluate its policy on."""
    if name == "demo":
        return "test"
    if not is_own(name):
        return "dev"
    return "dev" if "dev" in own_labels(Path(name), "train") and not has_golds(Path(name), "test") else "test"


def load_for_evaluation(name: str, data_dir=None, split: str = "dev", run: dict | None = None,
                        **demo_options) -> Dataset:
    """As load_dataset, without the questions that the policy of this training run has seen.

    If your own file has no such split, these are the questions that the run held out under that name. Otherwise the
    questions that trained or chose the policy of the run, or of a run that it started from, are left out. Two
    exceptions: the split `train` is returned whole, and your own split `dev`, beside a test, keeps the questions that
    chose. Notes report what was left out, and whether nothing was held out.
    """
    if name == "demo":
        return load_dataset(name, data_dir, split, **demo_options).noted(*_demo_notes(run, split, demo_options))
    split = split.strip().lower()
    runs = [one for one in lineage(run) if _same_data(name, one)]
    if is_own(name):
        labels = own_labels(Path(name), split)
        if not any(labels) and not runs:
            return load_dataset(name, data_dir, split).noted(*_nothing_held_back(name, len(labels), split, run))
        if not any(labels) or (runs and split not in labels and not {"dev", "test"} & set(labels)):
            return _part_of(name, data_dir, split, runs)
    dataset = load_dataset(name, data_dir, split)
    if split == "train":
        return dataset.noted(*(("the policy was trained on questions of this split",) if runs else ()))
    if not is_own(name):  # the official train splits are about databases that the others do not have
        runs = [one for one in runs if one.get("split") != "train"]
    dev_chooses = is_own(name) and split == "dev" and reported_split(name) == "test"
    return _without_seen(dataset, f"{name}, split {split}", name, data_dir, runs, dev_chooses)


def lineage(run: dict | None) -> Iterator[dict]:
    """The run, the run that it started from, and so on."""
    known = []
    while run and run not in known:
        known.append(run)
        yield run
        run = began_with(run)


def began_with(run: dict) -> dict | None:
    """The settings of the run that this one started from: its own record of them, because that folder may be gone;
    an older run has no such record, so they are read from the folder."""
    if "began_with" in run:
        return run["began_with"]
    source = run.get("start") or run.get("model")
    return run_config_of(str(path_of(run, source))) if source else None


def with_ancestors(run: dict | None) -> dict | None:
    """A run's settings that include those of all its ancestors, so that none of their folders is needed."""
    whole = None
    for one in reversed(list(lineage(run))):
        whole = one | {"began_with": whole}
    return whole


def hashes_of(splits: "Splits") -> dict[str, str]:
    """{part: hash of its complete records}: a resumed run checks that they are unchanged."""
    parts = {"training questions": splits.train, "dev questions": splits.dev, "traces": splits.traced,
             "test questions": [example for part in splits.tests.values() for example in part]}
    return {name: sha256(json.dumps([example.as_tuple() for example in part]).encode()).hexdigest()[:16]
            for name, part in parts.items()}


def path_of(run: dict, path: str) -> Path:
    """A path among a run's settings, resolved against the folder in which the run was started. Older runs do not
    record that folder, and a run may have moved: then the path is relative to the current folder."""
    there = Path(run.get("cwd", ""), path)
    return there if there.exists() else Path(path)


def training_questions(run: dict) -> Dataset:
    """The questions that a run was trained on, with their databases, according to its config.json."""
    name, folder = run["data"], run.get("data_dir")
    options = {field: run[field] for field in ("seed", "world") if field in run} if name == "demo" else {}
    return load_dataset(str(path_of(run, name)) if is_own(name) else name, folder and path_of(run, folder),
                        run.get("split", "train"), **options)


def _same_data(name: str, run: dict) -> bool:
    """Whether a run was trained on these data: the same benchmark, or the same file or a copy of it."""
    if not is_own(name):
        return run["data"] == name
    same_place = Path(name).resolve() == path_of(run, run["data"]).resolve()
    return same_place or bool(run.get("data_hash")) and run["data_hash"] == data_hash(name)


def data_hash(name: str) -> str | None:
    """A hash of a user's own file of questions; None for a benchmark or a missing file."""
    return sha256(Path(name).read_bytes()).hexdigest()[:16] if is_own(name) and Path(name).is_file() else None


def has_changed(run: dict) -> bool:
    """Whether the user's own file of questions has changed since a run was trained on it."""
    known = run.get("data_hash")
    return bool(known) and data_hash(str(path_of(run, run["data"]))) not in (known, None)


def _splits_of(name, data_dir, run: dict) -> Splits:
    """The sets that a run was trained and measured on."""
    folder = run.get("data_dir")
    folder = folder and path_of(run, folder)
    if is_own(name) or not folder or not folder.is_dir():
        folder = data_dir
    sizes = {"dev_size": "eval_questions", "test_size": "test_questions", "seed": "seed"}
    return load_splits(name, folder, run.get("split", "train"), by_database=run.get("dev_by_database", False),
                       **{option: run[field] for option, field in sizes.items() if field in run})


def _part_of(name, data_dir, split, runs: list[dict]) -> Dataset:
    """The questions of a user's own file that the newest run used as `split`."""
    splits = _splits_of(name, data_dir, runs[0])
    parts = {"train": splits.train, "dev": splits.dev, "test": splits.tests.get("test", [])}
    if split not in parts:
        raise UserError(f"{name} has no split {split!r}; its training run made {', '.join(parts)}")
    total = sum(map(len, parts.values()))
    if not parts["dev"] and not parts["test"]:
        return Dataset(splits.train, splits.databases, (
            f"the run held nothing back: all {total} records of {name} are used, and the policy was trained on them",))
    if not parts[split]:
        other = "test" if parts["test"] else "dev"
        raise UserError(f"the training run held back no {split} questions of {name}; --split {other} has "
                        f"{len(parts[other])}")
    use = {"train": "trained on", "dev": "held back to choose the best policy by",
           "test": "held back for the test before and after"}
    others = ", ".join(f"--split {part}: {len(questions)}" for part, questions in parts.items() if part != split)
    note = f"{len(parts[split])} of {total} records of {name}: those that the training run {use[split]} ({others})"
    dataset = Dataset(parts[split], splits.databases, (note,))
    return dataset if split == "train" else _without_seen(dataset, f"{name}, split {split}", name, data_dir, runs[1:])


def _without_seen(dataset: Dataset, what: str, name, data_dir, runs: list[dict],
                  dev_chooses: bool = False) -> Dataset:
    """The dataset without questions that one of the runs was trained on or, unless `dev_chooses`, chose its best policy
    by."""
    kept, notes = dataset.examples, ()
    for run in runs:
        splits = _splits_of(name, data_dir, run)
        kept = not_shared(kept, splits.train + ([] if dev_chooses else splits.dev), by_gold=not is_own(name))
        chose = len(kept) - len(not_shared(kept, splits.dev, by_gold=False))
        if chose and run.get("eval_every"):
            notes += (f"the run chose its best policy by {chose} of these questions: --split test has others",)
    if not kept:
        raise UserError(f"the policy was trained on, or chosen by, each of the {len(dataset.examples)} questions of "
                        + what)
    left_out = len(dataset.examples) - len(kept)
    note = (f"left out {left_out} of {len(dataset.examples)} questions of {what}: the policy was trained on them or on "
            "their gold SQL, or chosen by them",) if left_out else ()
    return replace(dataset, examples=kept).noted(*note, *notes)


def _nothing_held_back(name, count: int, split: str, run: dict | None) -> tuple[str, ...]:
    """A note that a user's own file has no splits; none for `train`, which nobody takes for a held-out set."""
    if split == "train":
        return ()
    known = f"the policy's run was trained on other data ({run['data']})" if run else \
        "whether the policy was trained on them is not known"
    return (f"{name} has no field 'split': all {count} records are used, and {known}",)


def _demo_notes(run: dict | None, split: str, options: dict) -> tuple[str, ...]:
    """Notes on which of these demo questions a policy, or one that it started from, has seen."""
    notes = []
    for one in [one for one in lineage(run) if one["data"] == "demo"]:
        other = [f"{field} {one[field]}" for field, value in options.items() if one.get(field, value) != value]
        if other:
            notes.append(f"the policy was trained on the demo with {', '.join(other)}: some of these questions may "
                         "have been among its own")
        elif split in ("cold", one.get("split", "train")):
            notes.append("the policy was trained on these questions: --split test has others")
        elif split == "dev" and one.get("eval_every") and one.get("eval_questions"):
            notes.append("the run chose its best policy by these questions: --split test has others")
    return tuple(dict.fromkeys(notes))


def not_seen_before(splits: Splits, name: str, data_dir, earlier: dict | None) -> Splits:
    """The splits without dev and test questions that trained or chose the policy of an `earlier` run or its ancestors.
    """
    dev, tests = splits.dev, splits.tests
    for run in lineage(earlier):
        if name != "demo" and _same_data(name, run):
            before = _splits_of(name, data_dir, run)
            seen = before.train + (before.dev if before.dev != splits.dev else [])  # the same dev may choose again
            dev = not_shared(dev, seen, by_gold=not is_own(name))
            tests = {part: not_shared(questions, seen, by_gold=not is_own(name)) for part, questions in tests.items()}
    count = len(splits.dev) - len(dev) + sum(len(splits.tests[part]) - len(tests[part]) for part in tests)
    note = (f"left out {count} held-back questions: an earlier run that this one begins with was trained on them or "
            "chosen by them (the same --seed holds back the same questions)",) if count else ()
    return replace(splits, dev=dev, tests={part: questions for part, questions in tests.items() if questions},
                   notes=splits.notes + note)
