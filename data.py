"""Questions, their gold SQL and their databases: the demo world, Spider, BIRD, or your own files.

`load_dataset(name, data_dir, split)` returns a `Dataset` of frozen `Example`s. Where a file is missing or
malformed it raises `UserError`, one sentence that names the file, the record and the field. Reading
databases is the duty of schema.py, writing prompts that of prompts.py; both are re-exported here.

Expected layouts
    demo     nothing: the databases are generated
    spider   DIR/train_spider.json, DIR/train_others.json (optional), DIR/dev.json, DIR/test.json,
             DIR/database/<db_id>/<db_id>.sqlite (test: DIR/test_database/ when it is there)
    bird     DIR/dev.json + DIR/dev_databases/<db_id>/<db_id>.sqlite, DIR/train/train.json +
             DIR/train/train_databases/..., DIR/mini_dev_sqlite.json + DIR/dev_databases/...
    a path   your own .json (a list) or .jsonl: question, db_id, sql (or SQL or query; a list means several
             equivalent golds), and optionally evidence, difficulty, id, trace, trace_sql, split. Databases are
             DIR/<db_id>.sqlite, DIR/<db_id>/<db_id>.sqlite or the same with .db; DIR is the file's own
             folder unless given. Records with a `split` field belong to that split only, others to all.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from running.errors import UserError, parse_json, read_text
from text2sql.example import Example
from text2sql.prompts import PromptBuilder, PromptConfig
from text2sql.schema import Schema, columns_of, is_sqlite, read_schema, schema_columns, value_index

__all__ = ["Dataset", "Example", "PromptBuilder", "PromptConfig", "Schema", "UserError", "Splits",
           "columns_of", "load_dataset", "load_splits", "read_schema", "schema_columns", "value_index"]

SPIDER_FILES = {"train": ("train_spider.json", "train_others.json"), "dev": ("dev.json",),
                "test": ("test.json",)}
BIRD_FILES = {  # split -> (where the official archives put its questions, its folder of databases)
    "train": (("train.json", "train/train.json"), "train_databases"),
    "dev": (("dev.json", "dev/dev.json", "dev_20240627/dev.json"), "dev_databases"),
    "mini_dev": (("mini_dev_sqlite.json", "MINIDEV/mini_dev_sqlite.json",
                  "minidev/MINIDEV/mini_dev_sqlite.json"), "dev_databases"),
}


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
    if name in ("spider", "bird"):
        return _load_official(name, data_dir, split)
    if name.endswith((".json", ".jsonl")):
        return _load_own(Path(name), data_dir or Path(name).parent, split)
    raise UserError(f"unknown dataset {name!r}: use demo, spider, bird, or a path ending in .json or .jsonl")


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
    """The sets of a training run.

    The demo has splits of its own. Elsewhere dev questions are held back from the training questions, and the
    dataset's dev split is the test set (the user's own file: its records with `"split": "dev"`, if there are any).
    """
    if name == "demo":
        parts = {part: load_dataset("demo", data_dir, part, seed=seed, world=world)
                 for part in (split, "cold", "dev", "test", "unseen")}
        traced = parts["cold"].examples + _traced(traces)
        databases = {db_id: path for part in parts.values() for db_id, path in part.databases.items()}
        tests = {part: parts[part].examples[:test_size] for part in ("test", "unseen")} if test_size else {}
        return _without_leaks(Splits(parts[split].examples, traced, parts["dev"].examples[:dev_size], tests, databases))
    train = load_dataset(name, data_dir, split)
    shuffled = random.Random(seed).sample(train.examples, len(train.examples))
    held_back = min(dev_size, len(shuffled) // 10)
    dev, rest = shuffled[:held_back], shuffled[held_back:]
    try:
        test = load_dataset(name, data_dir, "dev") if test_size else Dataset([], {})
    except UserError as error:
        test = Dataset([], {}, (f"no test questions: {error}",))
    known = {example.id for example in train.examples} if name.endswith((".json", ".jsonl")) else set()
    chosen = [example for example in test.examples if example.id not in known]
    chosen = random.Random(seed).sample(chosen, min(test_size, len(chosen)))
    traced = [example for example in rest if example.trace] + _traced(traces)
    return _without_leaks(Splits(rest, traced, dev, {"dev split": chosen} if chosen else {},
                                 train.databases | test.databases, tuple(dict.fromkeys(train.notes + test.notes))))


def _without_leaks(splits: Splits) -> Splits:
    """The same without traces of questions that are held back (as sft.py --mine may find some)."""
    held_back = {(example.db_id, example.question) for part in (splits.dev, *splits.tests.values()) for example in part}
    traced = [example for example in splits.traced if (example.db_id, example.question) not in held_back]
    count = len(splits.traced) - len(traced)
    note = (f"left out {count} of {len(splits.traced)} traces: their questions are held back",) if count else ()
    return replace(splits, traced=traced, notes=splits.notes + note)


def _traced(file) -> list[Example]:
    """The records of a --traces file; each must have a trace."""
    if file is None:
        return []
    examples = _examples(_read_records(Path(file)), str(file))
    for number, example in enumerate(examples, 1):
        if not example.trace:
            raise UserError(f"{file}, record {number}: field 'trace' is missing")
    return examples


# ---------------------------------------------------------------------------------- the three layouts

def _load_official(name, data_dir, split) -> Dataset:
    """Spider or BIRD; questions whose database file is missing are left out and reported."""
    if data_dir is None:
        raise UserError(f"dataset {name} needs --data-dir, the folder that holds its files")
    files, folder = (_spider_files if name == "spider" else _bird_files)(data_dir, split)
    examples = []
    for file in files:
        examples += _examples(_read_records(file), str(file), first_id=len(examples))
    places = {example.db_id: folder / example.db_id / f"{example.db_id}.sqlite" for example in examples}
    databases = {db_id: path for db_id, path in places.items() if path.is_file()}
    missing = sorted(places.keys() - databases.keys())
    kept = [example for example in examples if example.db_id in databases]
    if not kept:
        raise UserError(f"no database of {files[0]} was found; expected {folder}/<db_id>/<db_id>.sqlite")
    notes = ()
    if missing:
        notes = (f"left out {len(examples) - len(kept)} of {len(examples)} questions whose database file is "
                 f"missing under {folder}: {_shortlist(missing)}",)
    return Dataset(kept, _checked(databases), notes)


def _spider_files(data_dir, split):
    """The question files that are there, and the folder of databases."""
    if split not in SPIDER_FILES:
        raise UserError(f"Spider has the splits {', '.join(SPIDER_FILES)}, not {split!r}")
    required, *optional = (data_dir / file for file in SPIDER_FILES[split])
    folder = data_dir / "database"
    if split == "test" and (data_dir / "test_database").is_dir():
        folder = data_dir / "test_database"
    if not required.is_file() or not folder.is_dir():
        raise UserError(f"Spider's {split} split expects {required} and {folder}/<db_id>/<db_id>.sqlite, "
                        f"but {folder if required.is_file() else required} does not exist")
    return [required, *(file for file in optional if file.is_file())], folder


def _bird_files(data_dir, split):
    """The question file, wherever the official archives put it, and the folder of databases beside it."""
    split = split.replace("-", "_")
    if split not in BIRD_FILES:
        raise UserError(f"BIRD has the splits {', '.join(BIRD_FILES)}, not {split!r}")
    places, folder_name = BIRD_FILES[split]
    for place in places:
        file = data_dir / place
        if file.is_file():
            folders = [file.parent / folder_name, data_dir / folder_name]
            folder = next((folder for folder in folders if folder.is_dir()), None)
            if folder is None:
                raise UserError(f"the databases of {file} are missing: "
                                f"expected {folders[0]}/<db_id>/<db_id>.sqlite")
            return [file], folder
    raise UserError(f"BIRD's {split} split expects {places[0]} and {folder_name}/<db_id>/<db_id>.sqlite "
                    f"under {data_dir} (looked for {', '.join(places)})")


def _load_own(file, data_dir, split) -> Dataset:
    """The user's own questions; here a missing database is an error, for nobody else will notice it."""
    records = _read_records(file)
    if any("split" in record for record in records if isinstance(record, dict)):
        numbered = [(number, record) for number, record in enumerate(records, 1)
                    if not isinstance(record, dict) or record.get("split", split) == split]
        if not numbered:
            raise UserError(f"{file} has no record of split {split!r}")
    else:
        numbered = list(enumerate(records, 1))
    examples = [_example(record, str(file), number) for number, record in numbered]
    databases, seen = {}, {}
    for (number, _), example in zip(numbered, examples, strict=True):
        if example.id in seen:
            raise UserError(f"{file}, records {seen[example.id]} and {number}: both have id {example.id!r}")
        seen[example.id] = number
        if example.db_id not in databases:
            databases[example.db_id] = _find_database(file, number, example.db_id, data_dir)
    return Dataset(examples, _checked(databases))


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
    """The records of a .json list or a .jsonl file."""
    text = read_text(file)
    if file.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        records = [parse_json(line, file, number) for number, line in lines if line.strip()]
    else:
        records = parse_json(text, file)
    if not isinstance(records, list):
        raise UserError(f"{file} must hold a list of records, not {type(records).__name__}")
    if not records:
        raise UserError(f"{file} holds no records")
    return records


def _examples(records, source, first_id=0) -> list[Example]:
    """One Example a record; where a record has no id, its position is its id."""
    return [_example(record, source, number, first_id) for number, record in enumerate(records, 1)]


def _example(record, source, number, first_id=0) -> Example:
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

    identity = record.get("id", record.get("question_id"))
    return Example(id=str(first_id + number - 1 if identity is None else identity),
                   db_id=text("db_id"), question=text("question"), gold_sqls=_gold_sqls(record, complain),
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


def _shortlist(names, shown=5) -> str:
    """Some of the names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
