"""Questions, their gold SQL and their databases: the demo world, Spider, BIRD, or your own files.

`load_dataset(name, data_dir, split)` returns a `Dataset` of frozen `Example`s, `load_splits` what a training run needs,
`load_for_evaluation` the questions that a run did not train on. Where a file is missing or malformed they raise
`UserError`, one sentence that names the file, the record and the field. Reading databases is the duty of
text2sql/schema.py, writing prompts that of prompts.py beside it; both are re-exported here.

Expected layouts
    demo     nothing: the databases are generated
    spider   DIR/train_spider.json, DIR/train_others.json (optional), DIR/dev.json, DIR/test.json,
             DIR/database/<db_id>/<db_id>.sqlite (test: DIR/test_database/ when it is there)
    bird     DIR/dev.json + DIR/dev_databases/<db_id>/<db_id>.sqlite, DIR/train/train.json +
             DIR/train/train_databases/..., DIR/mini_dev_sqlite.json + DIR/dev_databases/...
    a path   your own .json (a list) or .jsonl: question, db_id, sql (or SQL or query; a list means several
             equivalent golds), and optionally evidence, difficulty, id, trace, trace_sql, split. Databases are
             DIR/<db_id>.sqlite, DIR/<db_id>/<db_id>.sqlite or the same with .db; DIR is the file's own
             folder unless given, and a missing database is an error. Records with a `split` field (train, dev or
             test) belong to that split only, others to all.

What is held back from training
    Where the data bring no test questions of their own (your own file without `split`, an official dev split that is
    trained on), load_splits holds back about a fifth of them for the test and a tenth to choose the best policy by:
    whole databases for the test of a benchmark, else questions, together with all that share their text or gold SQL.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from running.errors import UserError, parse_json, read_text
from text2sql.example import Example
from text2sql.holdout import HeldBack, hold_out, not_shared, part_size, question_key
from text2sql.prompts import PromptBuilder, PromptConfig
from text2sql.schema import Schema, columns_of, is_sqlite, read_schema, schema_columns, value_index

__all__ = ["Dataset", "Example", "PromptBuilder", "PromptConfig", "Schema", "UserError", "Splits",
           "columns_of", "load_dataset", "load_for_evaluation", "load_splits", "read_schema", "reported_split",
           "run_config_of", "schema_columns", "value_index"]

SPIDER_FILES = {"train": ("train_spider.json", "train_others.json"), "dev": ("dev.json",),
                "test": ("test.json",)}
BIRD_FILES = {  # split -> (where the official archives put its questions, its folder of databases)
    "train": (("train.json", "train/train.json"), "train_databases"),
    "dev": (("dev.json", "dev/dev.json", "dev_20240627/dev.json"), "dev_databases"),
    "mini_dev": (("mini_dev_sqlite.json", "MINIDEV/mini_dev_sqlite.json",
                  "minidev/MINIDEV/mini_dev_sqlite.json"), "dev_databases"),
}
OWN_SPLITS = ("train", "dev", "test")  # what the field `split` of one's own records may say


class NoSuchSplit(UserError):
    """The data have no such split, or not here; whoever asked may do without it."""


@dataclass(frozen=True)
class Dataset:
    """Examples, the file of each database, and in words what was left out and why."""
    examples: list[Example]
    databases: dict[str, Path]
    notes: tuple[str, ...] = ()


def load_dataset(name: str, data_dir=None, split: str = "train", **demo_options) -> Dataset:
    """The examples of `demo`, `spider`, `bird` or a .json/.jsonl path; options (seed=, world=) go to the demo."""
    data_dir = Path(data_dir) if data_dir is not None else None
    if name == "demo":
        from text2sql import demo_world  # only the demo needs it
        try:
            records, databases = demo_world.load(split, data_dir, **demo_options)
        except ValueError as error:
            raise UserError(str(error)) from error
        return Dataset(_examples(records, f"demo world, split {split}"), databases)
    split = split.strip().lower()
    if name in ("spider", "bird"):
        return _load_official(name, data_dir, split)
    if _is_own(name):
        return _load_own(Path(name), data_dir or Path(name).parent, split)
    raise UserError(f"unknown dataset {name!r}: use demo, spider, bird, or a path ending in .json or .jsonl")


def _is_own(name: str) -> bool:
    """Whether the data are the user's own file."""
    return Path(name).suffix.lower() in (".json", ".jsonl")


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


def load_splits(name: str, data_dir=None, split: str = "train", *, traces=None, seed: int = 0,
                world: str = "default", dev_size: int = 200, test_size: int = 1000) -> Splits:
    """The sets of a training run; what is in dev or a test is not in training, nor is its gold SQL.

    The demo has splits of its own. Elsewhere the dataset's dev split is the test (of one's own file the records with
    `"split": "dev"`, else "test"); where there is none, or it is trained on, a test is held back from the training
    questions. So is dev, always.
    """
    if name == "demo":
        return _demo_splits(data_dir, split, traces, seed, world, dev_size, test_size)
    pool = load_dataset(name, data_dir, split)
    count = len(pool.examples)
    databases, notes = pool.databases, pool.notes
    label, given, lack = _given_test(name, data_dir, split) if test_size else ("", None, "")
    if given:
        chosen, more = _test_of(given, label, pool.examples, name)
        tests = {f"{label} split": random.Random(seed).sample(chosen, min(test_size, len(chosen)))}
        rest, databases, notes = pool.examples, databases | given.databases, notes + given.notes + more
    else:
        test = hold_out(pool.examples, part_size(test_size, count, 5), seed, by_database=not _is_own(name))
        tests, rest = {"test": test.held}, test.rest
        notes += _held_note(test, count, "for the test before and after", "--test-questions", lack) if test_size else ()
    dev = hold_out(rest, part_size(dev_size, count, 10), seed)
    notes += _held_note(dev, count, "to choose the best policy by", "--eval-questions") if dev_size else ()
    if _is_own(name) and len(dev.rest) < count:
        notes += _repeats_note(name, pool.examples)
    found, trace_notes = _traced(traces, databases, name)
    return _without_leaks(Splits(dev.rest, [example for example in dev.rest if example.trace] + found, dev.held,
                                 {part: questions for part, questions in tests.items() if questions},
                                 databases, tuple(dict.fromkeys(notes + trace_notes))), by_gold=True)


def _demo_splits(data_dir, split, traces, seed, world, dev_size, test_size) -> Splits:
    """The demo's own splits."""
    parts = {part: load_dataset("demo", data_dir, part, seed=seed, world=world)
             for part in (split, "cold", "dev", "test", "unseen")}
    databases = {db_id: path for part in parts.values() for db_id, path in part.databases.items()}
    found, notes = _traced(traces, databases, "the demo")
    tests = {part: parts[part].examples[:test_size] for part in ("test", "unseen")} if test_size else {}
    return _without_leaks(Splits(parts[split].examples, parts["cold"].examples + found,
                                 parts["dev"].examples[:dev_size], tests, databases, notes))


def _given_test(name, data_dir, split) -> tuple[str, Dataset | None, str]:
    """The split that is there to be the test and its questions; else, in words, why there is none."""
    if _is_own(name):
        labels = _own_labels(Path(name), split)
        if not any(labels):
            return "", None, f"{name} has no field 'split'"
        for label in ("dev", "test"):
            if label in labels and label != split.strip().lower():
                return label, load_dataset(name, data_dir, label), ""
        return "", None, f"{name} has no other record with \"split\": \"dev\" or \"test\""
    if split.strip().lower() != "train":
        return "", None, f"{name}'s {split} split is trained on"
    try:
        return "dev", load_dataset(name, data_dir, "dev"), ""
    except NoSuchSplit as error:
        return "", None, f"no other test questions were found ({error})"


def _test_of(given: Dataset, label: str, trained: list[Example], name) -> tuple[list[Example], tuple[str, ...]]:
    """The given test questions without those that training has too, and notes.

    In one's own file a shared gold query is only told: who marked the records may have meant it.
    """
    own = _is_own(name)
    kept = not_shared(given.examples, trained, by_gold=not own)
    notes = ()
    if len(kept) < len(given.examples):
        what = "questions" if own else "questions or their gold SQL"
        notes += (f"left out {len(given.examples) - len(kept)} of {len(given.examples)} test questions of {name}, "
                  f"split {label}: training has the same {what}",)
    shared = len(kept) - len(not_shared(kept, trained))
    if shared:
        notes += (f"{shared} of {len(kept)} test questions of {name}, split {label}, share their gold SQL with "
                  "training",)
    return kept, notes


def _held_note(part: HeldBack, count: int, purpose: str, flag: str, why: str = "") -> tuple[str, ...]:
    """In words, what was held back, why, how, and the flag for more or less of it."""
    why = f", because {why}" if why else ""
    if not part.held:
        return (f"no question is held back {purpose}{why}, and the {count} there are cannot be parted without shared "
                "gold SQL: add questions",)
    how = f": the databases {_shortlist(part.databases)}" if part.databases else \
        f"; {part.followed} of them moved with another one, for they share its gold SQL or text"
    return (f"held back {len(part.held)} of {count} questions {purpose}{why}{how} ({flag} says how many, 0: none)",)


def _repeats_note(name, examples: list[Example]) -> tuple[str, ...]:
    """In words, which questions are asked more than once."""
    ids = {}
    for example in examples:
        ids.setdefault(question_key(example), []).append(example.id)
    repeated = [" and ".join(same) for same in ids.values() if len(same) > 1]
    return (f"{name} asks {len(repeated)} questions more than once (ids {_shortlist(repeated)}): each of them is either "
            "trained on or held back, never both",) if repeated else ()


def _without_leaks(splits: Splits, by_gold: bool = False) -> Splits:
    """The same without traces of questions that are held back (as sft.py --mine may find some)."""
    held_back = [example for part in (splits.dev, *splits.tests.values()) for example in part]
    traced = not_shared(splits.traced, held_back, by_gold)
    count = len(splits.traced) - len(traced)
    note = (f"left out {count} of {len(splits.traced)} traces: their questions are held back",) if count else ()
    return replace(splits, traced=traced, notes=splits.notes + note)


def _traced(file, databases, name) -> tuple[list[Example], tuple[str, ...]]:
    """The records of a --traces file on databases of the data, and a note on others; each must have a trace."""
    if file is None:
        return [], ()
    examples = _examples(_read_records(Path(file)), str(file))
    for number, example in enumerate(examples, 1):
        if not example.trace:
            raise UserError(f"{file}, record {number}: field 'trace' is missing")
    known = [example for example in examples if example.db_id in databases]
    if len(known) == len(examples):
        return examples, ()
    unknown = sorted({example.db_id for example in examples} - databases.keys())
    problem = (f"{len(examples) - len(known)} of {len(examples)} traces in {file} have a db_id that no question of "
               f"{name} has ({_shortlist(unknown)}; it has {_shortlist(sorted(databases))})")
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
    if folder.parent.name == "checkpoints":
        places.append(folder.parents[1])
    for place in places:
        try:
            config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(config, dict) and isinstance(config.get("data"), str) and "model_type" not in config:
            return config
    return None


def reported_split(name: str) -> str:
    """The split of the test questions that a training run on these data reports: what to evaluate its policy on."""
    if name == "demo":
        return "test"
    return "test" if _is_own(name) and "dev" not in _own_labels(Path(name), "train") else "dev"


def load_for_evaluation(name: str, data_dir=None, split: str = "dev", run: dict | None = None,
                        **demo_options) -> Dataset:
    """As load_dataset, without the questions that the policy of this training run saw.

    Of one's own file without such a split these are the questions that the run held back under its name. Otherwise
    those are left out that the run, or one it began with, was trained on or chose its best policy by; only the split
    `train` is given as it is. Notes say which, and where nothing was held back.
    """
    if name == "demo":
        return _noted(load_dataset(name, data_dir, split, **demo_options), *_other_world(run, demo_options))
    split = split.strip().lower()
    runs = [one for one in _lineage(run) if _same_data(name, one)]
    if _is_own(name):
        labels = _own_labels(Path(name), split)
        if not any(labels) and not runs:
            return _noted(load_dataset(name, data_dir, split), *_nothing_held_back(name, len(labels), split, run))
        if not any(labels) or (runs and split not in labels):
            return _part_of(name, data_dir, split, runs)
    dataset = load_dataset(name, data_dir, split)
    if split == "train":
        return _noted(dataset, *(("the policy was trained on questions of this split",) if runs else ()))
    if not _is_own(name):  # the official train splits are about databases that the others do not have
        runs = [one for one in runs if one.get("split") != "train"]
    return _without_seen(dataset, f"{name}, split {split}", name, data_dir, runs)


def _lineage(run: dict | None) -> Iterator[dict]:
    """The run, the run that it began with, and so on."""
    known = []
    while run and run not in known:
        known.append(run)
        yield run
        run = run_config_of(str(run.get("start") or run.get("model") or ""))


def _same_data(name: str, run: dict) -> bool:
    """Whether a run was trained on these data: the same benchmark, or the same file."""
    return Path(name).resolve() == Path(run["data"]).resolve() if _is_own(name) else run["data"] == name


def _splits_of(name, data_dir, run: dict) -> Splits:
    """The sets that a run was trained and measured on."""
    folder = run.get("data_dir")
    if _is_own(name) or not folder or not Path(folder).is_dir():
        folder = data_dir
    sizes = {"dev_size": "eval_questions", "test_size": "test_questions", "seed": "seed"}
    return load_splits(name, folder, run.get("split", "train"),
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


def _without_seen(dataset: Dataset, what: str, name, data_dir, runs: list[dict]) -> Dataset:
    """The dataset without questions that one of the runs trained on or chose its best policy by."""
    kept = dataset.examples
    for run in runs:
        splits = _splits_of(name, data_dir, run)
        kept = not_shared(kept, splits.train + splits.dev, by_gold=not _is_own(name))
    if not kept:
        raise UserError(f"the policy was trained on, or chosen by, each of the {len(dataset.examples)} questions of "
                        + what)
    left_out = len(dataset.examples) - len(kept)
    note = (f"left out {left_out} of {len(dataset.examples)} questions of {what}: the policy was trained on them or on "
            "their gold SQL, or chosen by them",) if left_out else ()
    return _noted(replace(dataset, examples=kept), *note)


def _nothing_held_back(name, count: int, split: str, run: dict | None) -> tuple[str, ...]:
    """In words, that one's own file has no parts; nobody takes `train` for held back."""
    if split == "train":
        return ()
    known = f"the policy's run was trained on other data ({run['data']})" if run else \
        "whether the policy was trained on them is not known"
    return (f"{name} has no field 'split': all {count} records are used, and {known}",)


def _other_world(run: dict | None, options: dict) -> tuple[str, ...]:
    """In words, that a policy was trained on the demo of another seed or world, whose questions may be these."""
    if not run or run["data"] != "demo":
        return ()
    other = [f"{field} {run[field]}" for field, value in options.items() if run.get(field, value) != value]
    return (f"the policy was trained on the demo with {', '.join(other)}: some of these questions may have been among "
            "its own",) if other else ()


def _noted(dataset: Dataset, *notes: str) -> Dataset:
    """The dataset with more notes."""
    return replace(dataset, notes=dataset.notes + notes)


# ---------------------------------------------------------------------------------- the three layouts

def _load_official(name, data_dir, split) -> Dataset:
    """Spider or BIRD; questions whose database file is missing are left out and reported."""
    if data_dir is None:
        raise UserError(f"dataset {name} needs --data-dir, the folder that holds its files")
    files, folder = (_spider_files if name == "spider" else _bird_files)(data_dir, split)
    read = [(record, file, number) for file in files for number, record in enumerate(_read_records(file), 1)]
    ids, notes = _identities([record for record, _, _ in read], ", ".join(map(str, files)))
    examples = [_example(record, str(file), number, identity)
                for (record, file, number), identity in zip(read, ids, strict=True)]
    places = {example.db_id: folder / example.db_id / f"{example.db_id}.sqlite" for example in examples}
    databases = {db_id: path for db_id, path in places.items() if path.is_file()}
    missing = sorted(places.keys() - databases.keys())
    kept = [example for example in examples if example.db_id in databases]
    if not kept:
        raise NoSuchSplit(f"no database of {files[0]} was found; expected {folder}/<db_id>/<db_id>.sqlite")
    if missing:
        notes += (f"left out {len(examples) - len(kept)} of {len(examples)} questions whose database file is "
                 f"missing under {folder}: {_shortlist(missing)}",)
    return Dataset(kept, _checked(databases), notes)


def _spider_files(data_dir, split):
    """The question files that are there, and the folder of databases."""
    if split not in SPIDER_FILES:
        raise NoSuchSplit(f"Spider has the splits {', '.join(SPIDER_FILES)}, not {split!r}")
    required, *optional = (data_dir / file for file in SPIDER_FILES[split])
    folder = data_dir / "database"
    if split == "test" and (data_dir / "test_database").is_dir():
        folder = data_dir / "test_database"
    if not required.is_file() or not folder.is_dir():
        raise NoSuchSplit(f"Spider's {split} split expects {required} and {folder}/<db_id>/<db_id>.sqlite, "
                          f"but {folder if required.is_file() else required} does not exist")
    return [required, *(file for file in optional if file.is_file())], folder


def _bird_files(data_dir, split):
    """The question file, wherever the official archives put it, and the folder of databases beside it."""
    split = split.replace("-", "_")
    if split not in BIRD_FILES:
        raise NoSuchSplit(f"BIRD has the splits {', '.join(BIRD_FILES)}, not {split!r}")
    places, folder_name = BIRD_FILES[split]
    for place in places:
        file = data_dir / place
        if file.is_file():
            folders = [file.parent / folder_name, data_dir / folder_name]
            folder = next((folder for folder in folders if folder.is_dir()), None)
            if folder is None:
                raise NoSuchSplit(f"the databases of {file} are missing: "
                                  f"expected {folders[0]}/<db_id>/<db_id>.sqlite")
            return [file], folder
    raise NoSuchSplit(f"BIRD's {split} split expects {places[0]} and {folder_name}/<db_id>/<db_id>.sqlite "
                      f"under {data_dir} (looked for {', '.join(places)})")


def _load_own(file, data_dir, split) -> Dataset:
    """The user's own questions; here a missing database is an error, for nobody else will notice it."""
    records = _read_records(file)
    ids, notes = _identities(records, file)  # of the whole file, so that a record has one id in every split
    labels = _labels(records, file, split)
    chosen = [position for position, label in enumerate(labels) if label in (None, split)]
    if not chosen:
        found = ", ".join(f"{label} {count}" for label, count in Counter(labels).items())
        raise NoSuchSplit(f"{file} has no record of split {split!r}, only {found}")
    examples, databases = [], {}
    for position in chosen:
        example = _example(records[position], str(file), position + 1, ids[position])
        examples.append(example)
        if example.db_id not in databases:
            databases[example.db_id] = _find_database(file, position + 1, example.db_id, data_dir)
    return Dataset(examples, _checked(databases), notes)


def _own_labels(file: Path, asked: str) -> list[str | None]:
    """The splits of the records of one's own file."""
    return _labels(_read_records(file), file, asked.strip().lower())


def _labels(records: list, file, asked: str) -> list[str | None]:
    """Each record's split in lower case, None where it names none; a name nobody knows is an error, not left out."""
    labels = []
    for number, record in enumerate(records, 1):
        label = record.get("split") if isinstance(record, dict) else None
        label = label.strip().lower() if isinstance(label, str) else label
        if label not in (None, "", asked, *OWN_SPLITS):
            raise UserError(f"{file}, record {number}: field 'split' is {record['split']!r}; known are "
                            + ", ".join(OWN_SPLITS))
        labels.append(label or None)
    return labels


def _find_database(file, number, db_id, data_dir) -> Path:
    """The database of one of the user's records."""
    places = [data_dir / place for end in (".sqlite", ".db")
              for place in (f"{db_id}{end}", f"{db_id}/{db_id}{end}")]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"{file}, record {number}: no database for db_id {db_id!r}; looked for "
                    + ", ".join(str(place) for place in places))


def _checked(databases) -> dict[str, Path]:
    """The same databases, once each is known to be SQLite."""
    for path in databases.values():
        try:
            if not is_sqlite(path):
                raise UserError(f"{path} is not a SQLite database")
        except OSError as error:
            raise UserError(f"cannot read the database {path}: {error.strerror}") from error
    return databases


# -------------------------------------------------------------------------------------------- records

def _read_records(file: Path) -> list:
    """The records of a .json list or a .jsonl file; one that is named as the other is told so."""
    text = read_text(file)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{file} holds no records")
    start, one_a_line = text.lstrip()[0], file.suffix.lower() == ".jsonl"
    if one_a_line and start == "[":
        raise UserError(f"{file} holds a JSON list, not an object a line: name it {file.with_suffix('.json').name}")
    if not one_a_line and start == "{" and (len(lines) == 1 or _is_object(lines[0][1])):
        raise UserError(f"{file} must hold a list of records; it holds an object a line: name it "
                        + file.with_suffix(".jsonl").name)
    records = [parse_json(line, file, number) for number, line in lines] if one_a_line else parse_json(text, file)
    if not isinstance(records, list):
        raise UserError(f"{file} must hold a list of records, not {type(records).__name__}")
    if not records:
        raise UserError(f"{file} holds no records")
    return records


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _identities(records: list, source) -> tuple[list[str], tuple[str, ...]]:
    """An id for each record, no two alike, and a note on those that had to be numbered.

    A record without one has its position as its id. Of records with the same id the first keeps it, the others get
    a number: 12, 12-2, 12-3.
    """
    given = [_identity(record) for record in records]
    taken, first, ids, changed = {name for name in given if name is not None}, set(), [], []
    turns = Counter()  # name -> number of the last record that was called by it
    for position, name in enumerate(given):
        wanted = str(position) if name is None else name
        chosen = wanted
        while chosen in first or (chosen in taken and (name is None or chosen != name)):
            turns[wanted] += 1
            chosen = f"{wanted}-{turns[wanted] + 1}"
        first.add(chosen)
        ids.append(chosen)
        if chosen != wanted:
            why = "has no id, and its position is the id of another" if name is None else f"repeats id {name!r}"
            changed.append(f"record {position + 1} {why}: it is {chosen!r} here")
    return ids, (f"{source}: {len(changed)} ids are not unique; {_shortlist(changed, 3, '; ')}",) if changed else ()


def _identity(record) -> str | None:
    """The id that a record brings."""
    fields = [record.get(field) for field in ("id", "question_id")] if isinstance(record, dict) else []
    return next((str(value).strip() for value in fields if value is not None and str(value).strip()), None)


def _examples(records, source) -> list[Example]:
    """One Example a record; where a record has no id, its position is its id."""
    ids, _ = _identities(records, source)
    return [_example(record, source, number, name)
            for number, (record, name) in enumerate(zip(records, ids, strict=True), 1)]


def _example(record, source, number, identity) -> Example:
    """Check and convert record `number` (from 1) of `source`."""
    def complain(problem):
        raise UserError(f"{source}, record {number}: {problem}")

    if not isinstance(record, dict):
        complain(f"expected an object with fields, found {type(record).__name__}")

    def text(field, default=None):
        value = record.get(field, default)
        if value is None and default is not None:
            value = default
        if not isinstance(value, str) or (default is None and not value.strip()):
            complain(f"field {field!r} is " + ("empty or not a text" if field in record else "missing"))
        return value.strip()

    return Example(id=identity, db_id=text("db_id"), question=text("question"), gold_sqls=_gold_sqls(record, complain),
                   evidence=text("evidence", ""), difficulty=text("difficulty", ""), trace=text("trace", ""),
                   trace_sql=text("trace_sql", ""))


def _gold_sqls(record, complain) -> tuple[str, ...]:
    """The gold queries, from the first field that holds text (Spider's own `sql` field is a parse tree)."""
    for field in ("sql", "SQL", "query"):
        value = record.get(field)
        golds = value if isinstance(value, list) else [value]
        if golds and all(isinstance(gold, str) and gold.strip() for gold in golds):
            return tuple(gold.strip() for gold in golds)
    present = [field for field in ("sql", "SQL", "query") if field in record]
    if present:
        complain(f"field {present[0]!r} must hold a query, or a list of queries")
    complain("field 'sql' (or 'SQL' or 'query') is missing")


def _shortlist(names, shown=5, between=", ") -> str:
    """Some of the names, and how many more there are."""
    return between.join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
