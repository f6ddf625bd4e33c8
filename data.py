"""Questions, their gold SQL and their databases: the demo world, Spider, BIRD, or your own files.

`load_dataset(name, data_dir, split)` returns a `Dataset` of frozen `Example`s, `load_splits` what a training run needs,
`load_for_evaluation` the questions that a run did not train on. Where a file is missing or malformed they raise
`UserError`, one sentence that names the file, the record and the field. The layouts of files that can be read are in
text2sql/question_files.py; reading databases is the duty of schema.py beside it, writing prompts that of prompts.py;
both are re-exported here.

What is held back from training
    Where the data bring no test questions of their own (your own file without `split`, an official dev split that is
    trained on), load_splits holds back about a fifth of them for the test and a tenth to choose the best policy by:
    whole databases of a benchmark, else questions, together with all that share their text or gold SQL. In your own
    file with the splits train, dev and test the dev questions choose.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from hashlib import sha256
from pathlib import Path

from running.errors import UserError, stored_settings
from text2sql.example import Example
from text2sql.holdout import HeldBack, hold_out, not_shared, part_size, question_key
from text2sql.prompts import PromptBuilder, PromptConfig
from text2sql.question_files import (
    Dataset,
    NoSuchSplit,
    examples_of,
    has_golds,
    is_own,
    load_official,
    load_own,
    own_labels,
    read_records,
    shortlist,
)
from text2sql.schema import Schema, columns_of, read_schema, schema_columns, value_index

__all__ = ["Dataset", "Example", "PromptBuilder", "PromptConfig", "Schema", "UserError", "Splits", "as_its_run",
           "columns_of", "load_dataset", "load_for_evaluation", "load_splits", "not_seen_before", "path_of",
           "read_schema", "reported_split", "run_config_of", "schema_columns", "training_questions", "value_index"]


def load_dataset(name: str, data_dir=None, split: str = "train", **demo_options) -> Dataset:
    """The examples of `demo`, `spider`, `bird` or a .json/.jsonl path; options (seed=, world=) go to the demo."""
    data_dir = Path(data_dir) if data_dir is not None else None
    if name == "demo":
        from text2sql import demo_world  # only the demo needs it
        try:
            records, databases = demo_world.load(split, data_dir, **demo_options)
        except ValueError as error:
            raise UserError(str(error)) from error
        except OSError as error:  # such as a checkout that may only be read
            raise UserError(f"cannot write the demo's databases to {error.filename}: {error.strerror}; give a folder "
                            "that can be written with --data-dir") from error
        return Dataset(examples_of(records, f"demo world, split {split}"), databases)
    split = split.strip().lower()
    if name in ("spider", "bird"):
        return load_official(name, data_dir, split)
    if is_own(name):
        return load_own(Path(name), data_dir or Path(name).parent, split)
    raise UserError(f"unknown dataset {name!r}: use demo, spider, bird, or a path ending in .json or .jsonl")


# ----------------------------------------------------------------------------- the sets of a training run

@dataclass(frozen=True)
class Splits:
    """What a training run needs: `dev` chooses the best checkpoint, each set in `tests` is only reported."""
    train: list[Example]
    traced: list[Example]  # with verified reasoning: cold start and first memory
    dev: list[Example]
    tests: dict[str, list[Example]]
    databases: dict[str, Path]
    notes: tuple[str, ...] = ()
    dev_by_database: bool = True  # see `load_splits`; kept in config.json


def load_splits(name: str, data_dir=None, split: str = "train", *, traces=None, seed: int = 0,
                world: str = "default", dev_size: int = 200, test_size: int = 1000, by_database: bool = True) -> Splits:
    """The sets of a training run; what is in dev or a test is not in training, nor is its gold SQL.

    The demo has splits of its own, and so has one's own file whose records are marked train, dev and test. Elsewhere
    the dev split, or whichever of the two one's own file has, is the test; where there is none, or it is trained on, a
    test is held back from the training questions. So is dev then: `by_database` where the test has other databases
    than training, as those of benchmarks have (runs of older versions held back single questions).
    """
    if name == "demo":
        return _demo_splits(data_dir, split, traces, seed, world, dev_size, test_size)
    pool = load_dataset(name, data_dir, split)
    count = len(pool.examples)
    databases, notes = pool.databases, pool.notes
    own_dev = _given_dev(name, data_dir, split, pool.examples) if dev_size else None
    label, given, lack = _given_test(name, data_dir, split) if test_size else ("", None, "")
    if given:
        chosen, more = _apart_from(pool.examples + (own_dev.examples if own_dev else []), given, "test", label, name)
        tests = {f"{label} split": random.Random(seed).sample(chosen, min(test_size, len(chosen)))}
        rest, databases, notes = pool.examples, databases | given.databases, notes + given.notes + more
    else:
        test = hold_out(pool.examples, part_size(test_size, count, 5), seed, by_database=not is_own(name))
        tests, rest = {"test": test.held}, test.rest
        notes += _held_note(test, count, "for the test before and after", "--test-questions", lack) if test_size else ()
    if own_dev:
        dev = HeldBack(random.Random(seed).sample(own_dev.examples, min(dev_size, len(own_dev.examples))), rest)
        databases, notes = databases | own_dev.databases, notes + own_dev.notes
    else:
        apart = not is_own(name) or _are_on_other_databases(tests, rest)
        dev = hold_out(rest, part_size(dev_size, count, 10), seed, by_database and apart)
        notes += _held_note(dev, count, "to choose the best policy by", "--eval-questions") if dev_size else ()
    if is_own(name) and len(dev.rest) < count:
        notes += _repeats_note(name, pool.examples)
    found, trace_notes = _traced(traces, databases, name)
    every, unread = _test_questions(name, data_dir, split, pool.examples) if traces else ([], ())
    return _without_leaks(Splits(dev.rest, [example for example in dev.rest if example.trace] + found, dev.held,
                                 {part: questions for part, questions in tests.items() if questions},
                                 databases, tuple(dict.fromkeys(notes + trace_notes + unread)), by_database),
                          every, by_gold=not (is_own(name) and (given or every)), dev_by_gold=not own_dev)


def _demo_splits(data_dir, split, traces, seed, world, dev_size, test_size) -> Splits:
    """The demo's own splits."""
    if split not in ("train", "cold"):
        raise UserError(f"the demo cannot be trained on --split {split}, for its other splits are held out: give train "
                        "or cold")
    parts = {part: load_dataset("demo", data_dir, part, seed=seed, world=world)
             for part in (split, "cold", "dev", "test", "unseen")}
    databases = {db_id: path for part in parts.values() for db_id, path in part.databases.items()}
    found, notes = _traced(traces, databases, "the demo")
    tests = {part: parts[part].examples[:test_size] for part in ("test", "unseen")} if test_size else {}
    every = [example for part in ("dev", "test", "unseen") for example in parts[part].examples]
    return _without_leaks(Splits(parts[split].examples, parts["cold"].examples + found,
                                 parts["dev"].examples[:dev_size], tests, databases, notes), every)


def _given_test(name, data_dir, split) -> tuple[str, Dataset | None, str]:
    """The split that is there to be the test and its questions; else, in words, why there is none."""
    if is_own(name):
        labels = own_labels(Path(name), split)
        if not any(labels):
            return "", None, f"{name} has no field 'split'"
        for label in ("test", "dev"):
            if label != split.strip().lower() and has_golds(Path(name), label):
                return label, load_dataset(name, data_dir, label), ""
        return "", None, f"{name} has no other record with \"split\": \"dev\" or \"test\" and gold SQL"
    if split.strip().lower() != "train":
        return "", None, f"{name}'s {split} split is trained on"
    try:
        return "dev", load_dataset(name, data_dir, "dev"), ""
    except NoSuchSplit as error:
        return "", None, f"no other test questions were found ({error})"


def _given_dev(name, data_dir, split, trained: list[Example]) -> Dataset | None:
    """The dev questions of one's own file that has test questions, too, without those that training has."""
    others = {"dev", "test"} - {split.strip().lower()}
    if not is_own(name) or len(others) < 2 or not all(has_golds(Path(name), label) for label in others):
        return None
    dev = load_dataset(name, data_dir, "dev")
    kept, notes = _apart_from(trained, dev, "dev", "dev", name)
    return _noted(replace(dev, examples=kept), *notes)


def _are_on_other_databases(tests: Mapping[str, list[Example]], trained: list[Example]) -> bool:
    """Whether there are test questions, and none on a database of training."""
    tested = {example.db_id for questions in tests.values() for example in questions}
    return bool(tested) and tested.isdisjoint(example.db_id for example in trained)


def _test_questions(name, data_dir, split, trained: list[Example]) -> tuple[list[Example], tuple[str, ...]]:
    """All test questions that the data bring and training does not have: a run reports a sample of one split at most,
    and evaluate.py counts every one. And notes on splits that cannot be read."""
    labels = {"dev"} if split.strip().lower() == "train" else set()
    if is_own(name):
        labels = {"dev", "test"} & set(own_labels(Path(name), split)) - {split.strip().lower()}
    questions, notes = [], ()
    for label in sorted(labels):
        try:
            questions += load_dataset(name, data_dir, label).examples
        except UserError as error:  # which training does not need
            notes += (f"whether traces are of questions of the split {label} is not known, for it cannot be read: "
                      f"{error}",)
    return not_shared(questions, trained, by_gold=not is_own(name)), notes


def _apart_from(trained: list[Example], given: Dataset, use: str, label: str,
                name) -> tuple[list[Example], tuple[str, ...]]:
    """The questions given for a use (dev or test) without those that training, or dev, has too, and notes.

    In one's own file a shared gold query is only reported, as whoever marked the records may have meant it.
    """
    own, others = is_own(name), "training" if use == "dev" else "training or dev"
    kept = not_shared(given.examples, trained, by_gold=not own)
    notes = ()
    if len(kept) < len(given.examples):
        what = "questions" if own else "questions or their gold SQL"
        notes += (f"left out {len(given.examples) - len(kept)} of {len(given.examples)} {use} questions of {name}, "
                  f"split {label}: {others} has the same {what}",)
    shared = len(kept) - len(not_shared(kept, trained))
    if shared:
        notes += (f"{use} questions of {name}, split {label}, that share their gold SQL with {others}: {shared} of "
                  f"{len(kept)}",)
    return kept, notes


def _held_note(part: HeldBack, count: int, purpose: str, flag: str, why: str = "") -> tuple[str, ...]:
    """In words, what was held back, why, how, and the flag for more or less of it."""
    why = f", because {why}" if why else ""
    if not part.held:
        return (f"no question is held back {purpose}{why}, and the {count} there are cannot be parted without shared "
                "gold SQL: add questions",)
    how = f": the databases {shortlist(part.databases)}" if part.databases else \
        f"; {part.followed} of them moved with another one, for they share its gold SQL or text"
    return (f"held back {len(part.held)} of {count} questions {purpose}{why}{how} ({flag} says how many, 0: none)",)


def _repeats_note(name, examples: list[Example]) -> tuple[str, ...]:
    """In words, which questions are asked more than once."""
    ids = {}
    for example in examples:
        ids.setdefault(question_key(example), []).append(example.id)
    repeated = [" and ".join(same) for same in ids.values() if len(same) > 1]
    return (f"questions that {name} asks more than once: {len(repeated)} (ids {shortlist(repeated)}); each is either "
            "trained on or held back, never both",) if repeated else ()


def _without_leaks(splits: Splits, every: list[Example], by_gold: bool = True, dev_by_gold: bool = True) -> Splits:
    """The same without traces of questions that are held back (as sft.py --mine may find some).

    every: all test questions that the data bring; `splits.tests` may hold a sample of them.
    by_gold, dev_by_gold: whether a gold query in common with a test or dev question counts, too.
    """
    tests = [example for part in (*splits.tests.values(), every) for example in part]
    traced = not_shared(not_shared(splits.traced, splits.dev, dev_by_gold), tests, by_gold)
    count = len(splits.traced) - len(traced)
    note = (f"left out {count} of {len(splits.traced)} traces: their questions are held back",) if count else ()
    return replace(splits, traced=traced, notes=splits.notes + note)


def not_seen_before(splits: Splits, name: str, data_dir, earlier: dict | None) -> Splits:
    """The same without dev and test questions that the run which this one begins with was trained on or chosen by."""
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


def _traced(file, databases, name) -> tuple[list[Example], tuple[str, ...]]:
    """The records of a --traces file on databases of the data, and a note on others; each must have a trace."""
    if file is None:
        return [], ()
    examples = examples_of(read_records(Path(file)), str(file))
    for number, example in enumerate(examples, 1):
        if not example.trace:
            raise UserError(f"{file}, record {number}: field 'trace' is missing")
    known = [example for example in examples if example.db_id in databases]
    if len(known) == len(examples):
        return examples, ()
    unknown = sorted({example.db_id for example in examples} - databases.keys())
    problem = (f"{len(examples) - len(known)} of {len(examples)} traces in {file} have a db_id that no question of "
               f"{name} has ({shortlist(unknown)}; it has {shortlist(sorted(databases))})")
    if not known:
        raise UserError(f"{problem}: correct the field, or give the traces of these data")
    return known, (f"left out {problem}: correct the field",)


# ------------------------------------------------------------------- what a trained policy is evaluated on

def run_config_of(model: str) -> dict | None:
    """The config.json of the training run that made a policy's folder (or whose folder this is); None without one."""
    if not Path(model).is_dir():
        return None
    folder = Path(model).resolve()
    places = [folder, folder.parent] if folder.name == "best" else [folder]
    if folder.name == "adapters" and folder.parent.name == "best":
        places.append(folder.parents[1])
    if folder.parent.name == "checkpoints":
        places.append(folder.parents[1])
    found = (stored_settings(place) for place in places)
    return next((config for config in found if config is not None), None)


def as_its_run(given: Mapping, run: Mapping | None) -> dict:
    """The given settings; where they are silent, completions are as long as in the run that made the model, and are
    read as there."""
    kinds, run = {"max_completion_tokens": int, "lenient_format": bool}, run or {}
    return {name: run[name] for name, kind in kinds.items() if isinstance(run.get(name), kind)} | dict(given)


def reported_split(name: str) -> str:
    """The split of the test questions that a training run on these data reports: what to evaluate its policy on."""
    if name == "demo":
        return "test"
    if not is_own(name):
        return "dev"
    return "dev" if "dev" in own_labels(Path(name), "train") and not has_golds(Path(name), "test") else "test"


def load_for_evaluation(name: str, data_dir=None, split: str = "dev", run: dict | None = None,
                        **demo_options) -> Dataset:
    """As load_dataset, without the questions that the policy of this training run saw.

    Of one's own file without such a split these are the questions that the run held back under its name. Otherwise
    those are left out that the run, or one it began with, was trained on or chose its best policy by; only the split
    `train` is given as it is, and one's own split `dev`, where there is a test as well, with the questions that chose.
    Notes say which, and where nothing was held back.
    """
    if name == "demo":
        return _noted(load_dataset(name, data_dir, split, **demo_options), *_demo_notes(run, split, demo_options))
    split = split.strip().lower()
    runs = [one for one in lineage(run) if _same_data(name, one)]
    if is_own(name):
        labels = own_labels(Path(name), split)
        if not any(labels) and not runs:
            return _noted(load_dataset(name, data_dir, split), *_nothing_held_back(name, len(labels), split, run))
        if not any(labels) or (runs and split not in labels and not {"dev", "test"} & set(labels)):
            return _part_of(name, data_dir, split, runs)
    dataset = load_dataset(name, data_dir, split)
    if split == "train":
        return _noted(dataset, *(("the policy was trained on questions of this split",) if runs else ()))
    if not is_own(name):  # the official train splits are about databases that the others do not have
        runs = [one for one in runs if one.get("split") != "train"]
    dev_chooses = is_own(name) and split == "dev" and reported_split(name) == "test"
    return _without_seen(dataset, f"{name}, split {split}", name, data_dir, runs, dev_chooses)


def lineage(run: dict | None) -> Iterator[dict]:
    """The run, the run that it began with, and so on."""
    known = []
    while run and run not in known:
        known.append(run)
        yield run
        run = began_with(run)


def began_with(run: dict) -> dict | None:
    """The settings of the run that made what a run began with: as it keeps them, for that folder may be gone; of an
    older run those that are found there."""
    if "began_with" in run:
        return run["began_with"]
    source = run.get("start") or run.get("model")
    return run_config_of(str(path_of(run, source))) if source else None


def with_ancestors(run: dict | None) -> dict | None:
    """A run's settings with those of all that it began with inside, so that none of their folders is needed."""
    whole = None
    for one in reversed(list(lineage(run))):
        whole = one | {"began_with": whole}
    return whole


def hashes_of(splits: "Splits") -> dict[str, str]:
    """{part: a hash of its questions with all that their records say}, by which a resumed run knows them again."""
    parts = {"training questions": splits.train, "dev questions": splits.dev, "traces": splits.traced,
             "test questions": [example for part in splits.tests.values() for example in part]}
    return {name: sha256(json.dumps([astuple(example) for example in part]).encode()).hexdigest()[:16]
            for name, part in parts.items()}


def path_of(run: dict, path: str) -> Path:
    """A path among a run's settings, which is relative to the folder in which the run was started; to the present one
    where that is not known, as of older runs, or it is not there, as of a run that has moved."""
    there = Path(run.get("cwd", ""), path)
    return there if there.exists() else Path(path)


def training_questions(run: dict) -> Dataset:
    """What a run was trained on, with the databases, as its config.json says."""
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
    """A hash of one's own file of questions; None of a benchmark or where there is no such file."""
    return sha256(Path(name).read_bytes()).hexdigest()[:16] if is_own(name) and Path(name).is_file() else None


def has_changed(run: dict) -> bool:
    """Whether one's own file of questions is not what it was when a run was trained on it."""
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
    """The questions of one's own file that the newest run used as `split`."""
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
    """The dataset without questions that one of the runs trained on, nor, unless they are there for choosing, those
    that chose its best policy."""
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
    return _noted(replace(dataset, examples=kept), *note, *notes)


def _nothing_held_back(name, count: int, split: str, run: dict | None) -> tuple[str, ...]:
    """In words, that one's own file has no parts; nobody takes `train` for held back."""
    if split == "train":
        return ()
    known = f"the policy's run was trained on other data ({run['data']})" if run else \
        "whether the policy was trained on them is not known"
    return (f"{name} has no field 'split': all {count} records are used, and {known}",)


def _demo_notes(run: dict | None, split: str, options: dict) -> tuple[str, ...]:
    """In words, what a policy, or one that it began with, has seen of these questions of the demo."""
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


def _noted(dataset: Dataset, *notes: str) -> Dataset:
    """The dataset with more notes."""
    return replace(dataset, notes=dataset.notes + notes)
