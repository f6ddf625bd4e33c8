"""Question files in the layouts of Spider, of BIRD, or your own, and their databases.

Expected layouts
    spider   DIR/train_spider.json, DIR/train_others.json (optional), DIR/dev.json, DIR/test.json,
             DIR/database/<db_id>/<db_id>.sqlite (test: DIR/test_database/ if it exists)
    bird     DIR/dev.json + DIR/dev_databases/<db_id>/<db_id>.sqlite, DIR/train/train.json +
             DIR/train/train_databases/..., DIR/mini_dev_sqlite.json + DIR/dev_databases/...
    a path   your own .json (a list) or .jsonl: question, db_id, sql (or SQL or query; a list means several
             equivalent golds) or in its place the answer (a value, a row as a list, or rows as a list of lists; with
             ordered: true, the order of the rows counts), and optionally evidence, difficulty, id, trace, trace_sql,
             first_try (a failing answer that the trace corrects), split, and a ready-made prompt: messages (a chat: a
             list of role and content) or prompt (a text).
             Databases are DIR/<db_id>.sqlite, DIR/<db_id>/<db_id>.sqlite or the same with .db; DIR is the file's own
             folder by default, and a missing database is an error. Records with a `split` field (train, dev or
             test) belong only to that split, others to all.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError, parse_json, read_text
from questions.example import Example, id_text, unique_ids
from questions.schema import is_sqlite
from sql_exec import GoldAnswer

SPIDER_FILES = {"train": ("train_spider.json", "train_others.json"), "dev": ("dev.json",),
                "test": ("test.json",)}
BIRD_FILES = {  # split -> (the question file's paths in the official archives, the folder of its databases)
    "train": (("train.json", "train/train.json"), "train_databases"),
    "dev": (("dev.json", "dev/dev.json", "dev_20240627/dev.json"), "dev_databases"),
    "mini_dev": (("mini_dev_sqlite.json", "MINIDEV/mini_dev_sqlite.json",
                  "minidev/MINIDEV/mini_dev_sqlite.json"), "dev_databases"),
}
ROLES = ("system", "user", "assistant")  # of ready-made messages
SQL_FIELDS = ("sql", "SQL", "query")
OWN_SPLITS = ("train", "dev", "test")  # values of the field `split` in a user's own records


class NoSuchSplit(UserError):
    """The data have no such split, or its files are missing; callers may continue without it."""


@dataclass(frozen=True)
class Dataset:
    """Examples, the file of each database, and notes on what was left out and why."""
    examples: list[Example]
    databases: dict[str, Path]
    notes: tuple[str, ...] = ()

    def noted(self, *notes: str) -> "Dataset":
        """The same with more notes."""
        return replace(self, notes=self.notes + notes)


# ---------------------------------------------------------------------------------- the three layouts

def is_own(name: str) -> bool:
    """Whether the data are the user's own file."""
    return Path(name).suffix.lower() in (".json", ".jsonl")


def load_official(name, data_dir, split) -> Dataset:
    """Spider or BIRD; questions whose database file is missing are left out and reported."""
    if data_dir is None:
        raise UserError(f"dataset {name} needs --data-dir, the folder that holds its files")
    files, folder = (_spider_files if name == "spider" else _bird_files)(data_dir, split)
    read = [(record, file, number) for file in files for number, record in enumerate(read_records(file), 1)]
    ids, notes = _ids_of([record for record, _, _ in read], ", ".join(map(str, files)))
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
                 f"missing under {folder}: {shortlist(missing)}",)
    return Dataset(kept, _checked(databases), notes)


def _spider_files(data_dir, split):
    """The question files that exist, and the folder of databases."""
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
    """The question file, at any of its paths in the official archives, and the folder of databases beside it."""
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


def load_own(file, data_dir, split) -> Dataset:
    """The user's own questions; here a missing database is an error, because nothing else would report it."""
    records = read_records(file)
    labels = _labels(records, file, split)
    chosen = [position for position, label in enumerate(labels) if label in (None, split)]
    if not chosen:
        found = ", ".join(f"{label} {count}" for label, count in Counter(labels).items())
        raise NoSuchSplit(f"{file} has no record of split {split!r}, only {found}")
    ids, notes = _ids_of([records[position] for position in chosen], file, chosen)
    if any(labels) and not all(labels):
        notes += (f"records of {file} without a field 'split', which belong to every split: {labels.count(None)}",)
    examples, databases = [], {}
    for position, identity in zip(chosen, ids, strict=True):
        example = _example(records[position], str(file), position + 1, identity)
        examples.append(example)
        if example.db_id not in databases:
            databases[example.db_id] = _find_database(file, position + 1, example.db_id, data_dir)
    return Dataset(examples, _checked(databases), notes)


def own_labels(file: Path, asked: str) -> list[str | None]:
    """The split of each record in a user's own file."""
    return _labels(read_records(file), file, asked.strip().lower())


def has_golds(file: Path, asked: str) -> bool:
    """Whether any record of this split in a user's own file has gold SQL or an answer, which a hidden test lacks."""
    records = read_records(file)
    labels = _labels(records, file, asked)
    return any(record.keys() & {*SQL_FIELDS, "answer"} for record, label in zip(records, labels, strict=True)
               if label == asked)


def _labels(records: list, file, asked: str) -> list[str | None]:
    """Each record's split in lower case, or None; an unknown split is an error, not left out."""
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
    """The same databases, after a check that each is a readable SQLite file."""
    for path in databases.values():
        try:
            if not is_sqlite(path):
                raise UserError(f"{path} is not a SQLite database")
        except OSError as error:
            raise UserError(f"cannot read the database {path}: {error.strerror}") from error
    return databases


# -------------------------------------------------------------------------------------------- records

def read_records(file: Path) -> list:
    """The records of a .json list or a .jsonl file; UserError if the content does not match the file's ending."""
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


def _ids_of(records: list, source, positions=None) -> tuple[list[str], tuple[str, ...]]:
    """A unique id for each record, and a note on those that were changed.

    A record without an id gets its position in the file.
    """
    positions, given = positions or range(len(records)), [_given_id(record) for record in records]
    ids, changed = unique_ids(given, positions), []
    for position, name, chosen in zip(positions, given, ids, strict=True):
        if chosen != (name or str(position)):
            why = f"repeats id {name!r}" if name else f"has no id, and its position, '{position}', is taken"
            changed.append(f"record {position + 1} {why}, so it is called {chosen!r}")
    return ids, (f"{source}: {shortlist(changed, 3, '; ')}",) if changed else ()


def _given_id(record) -> str | None:
    """The record's own id, or None."""
    values = [record.get(field) for field in ("id", "question_id")] if isinstance(record, dict) else []
    return next(filter(None, (id_text(value) for value in values if value is not None)), None)


def examples_of(records, source) -> list[Example]:
    """One Example per record; a record without an id gets its position."""
    ids, _ = _ids_of(records, source)
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

    messages, prompt = _messages(record, complain), record.get("prompt") or ""
    if not isinstance(prompt, str):
        complain("field 'prompt' must hold a text; a chat belongs in 'messages'")
    if messages and prompt:
        complain("fields 'messages' and 'prompt' both hold a prompt: leave one out")
    answer = _answer(record, complain)
    asked = messages[-1][1].strip() if messages else prompt.strip()  # the question, if it has no field of its own
    return Example(id=identity, db_id=text("db_id"), question=text("question", asked or None),
                   gold_sqls=() if answer else _gold_sqls(record, complain), evidence=text("evidence", ""),
                   difficulty=text("difficulty", ""), trace=text("trace", ""), trace_sql=text("trace_sql", ""),
                   messages=messages, prompt=prompt, answer=answer, first_try=text("first_try", ""))


def _messages(record, complain) -> tuple[tuple[str, str], ...]:
    """The (role, content) of a ready-made chat, which ends with the user's message."""
    messages = record.get("messages") or []
    if not isinstance(messages, list):
        complain("field 'messages' must hold a list of role and content")
    chat = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            complain(f"field 'messages' must hold objects with a role ({', '.join(ROLES)}) and a text as content")
        chat.append((role, content))
    if chat and chat[-1][0] != "user":
        complain("field 'messages' must end with the user's message: leave the answer out")
    return tuple(chat)


def _gold_sqls(record, complain) -> tuple[str, ...]:
    """The gold queries, from the first field that holds text (Spider's own `sql` field is a parse tree)."""
    for field in SQL_FIELDS:
        value = record.get(field)
        golds = value if isinstance(value, list) else [value]
        if golds and all(isinstance(gold, str) and gold.strip() for gold in golds):
            return tuple(gold.strip() for gold in golds)
    present = [field for field in SQL_FIELDS if field in record]
    if present:
        complain(f"field {present[0]!r} must hold a query, or a list of queries")
    complain("field 'sql' (or 'SQL' or 'query') is missing, and so is 'answer'")


def _answer(record, complain) -> GoldAnswer | None:
    """The answer that is known in place of gold SQL; None where there is none (a lone null is [null])."""
    value, ordered = record.get("answer"), record.get("ordered") or False
    if value is None:
        if ordered:
            complain("field 'ordered' belongs to an 'answer': leave it out, because ORDER BY in the gold SQL decides")
        return None
    if both := [field for field in SQL_FIELDS if record.get(field)]:
        complain(f"fields {both[0]!r} and 'answer' are both given: leave one out")
    if not isinstance(ordered, bool):
        complain("field 'ordered' must be true or false")
    rows = value if isinstance(value, list) else [value]
    if not any(isinstance(row, list) for row in rows):
        rows = [rows] if rows else []  # of an empty list there is no row
    if not all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows):
        complain("field 'answer' must hold rows that are lists of the same number of values, at least one")
    if any(isinstance(cell, list | dict) for row in rows for cell in row):
        complain("field 'answer' must hold a value, a row (a list of values) or rows (a list of lists), without "
                 "objects or further lists in them")
    if any(cell != cell for row in rows for cell in row):  # pandas writes NULL so; it would equal no result
        complain("field 'answer' holds NaN, which SQL does not have: write null")
    return GoldAnswer(tuple(tuple(int(cell) if isinstance(cell, bool) else cell for cell in row) for row in rows),
                      ordered)


def shortlist(names, shown=5, between=", ") -> str:
    """Some of the names, and how many more there are."""
    return between.join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def excluded(file) -> set[str]:
    """The question ids of an --exclude file; Spider's ids are positions from 0."""
    if file is None:
        return set()
    ids = parse_json(read_text(Path(file)), file)
    if not isinstance(ids, list) or not all(isinstance(item, int | str) for item in ids):
        raise UserError(f"{file} must hold a JSON list of question ids")
    return {str(item) for item in ids}


def check_excluded(file, name: str, data_dir, split: str) -> None:
    """Raises UserError: an --exclude file is malformed, or has no id of this file or of a benchmark's split.

    For the demo, whose ids are not read here, every --exclude file with ids is an error.
    """
    ids, known = excluded(file), set()
    if not ids:
        return
    if name != "demo":
        examples = examples_of(read_records(Path(name)), name) if is_own(name) else load_official(
            name, Path(data_dir), split.strip().lower()).examples
        known = {example.id for example in examples}
    if not ids & known:
        raise UserError(f"--exclude {file}: none of its ids, such as {min(ids)!r}, is one of {name}, split {split}"
                        + (f", such as {min(known)!r}" if known else "") + ": give ids of these data")
