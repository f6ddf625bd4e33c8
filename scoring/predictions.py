"""Files of predicted SQL: read and write the formats of Spider and BIRD, and one of our own.

    .json    BIRD's predict_dev.json: {"0": "SQL\\t----- bird -----\\tdb_id", ...}
    .jsonl   a record a line with `sql` and, better, `id`
    others   Spider's: one SQL a line, then perhaps a tab and the db_id

Predictions are paired with the questions by id where the file has one, else by position.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from sqlparse import lexer
from sqlparse import tokens as T

from running.errors import UserError, json_lines, parse_json, read_text, write_text
from text2sql.example import Example

BIRD_MARK = "\t----- bird -----\t"


# ----------------------------------------------------------------------------------------------- reading

def load_predictions(file, examples: Sequence[Example]) -> tuple[list[str], str]:
    """One SQL a question in dataset order, and a sentence that says how the file was paired with them."""
    file = Path(file)
    read = {".json": _bird_predictions, ".jsonl": _jsonl_predictions}.get(file.suffix, _line_predictions)
    texts, sentence = _pair(read(read_text(file), file), file, examples)
    known = {example.db_id for example in examples}
    return [_without_db_id(text, example, known, file)
            for text, example in zip(texts, examples, strict=True)], sentence


def _without_db_id(text, example, known, file) -> str:
    """The SQL before an appended db_id; a db_id of another question betrays a shifted file."""
    sql, mark, db_id = text.rpartition(BIRD_MARK if BIRD_MARK in text else "\t")
    if mark != BIRD_MARK and db_id not in known:  # no tab, or one inside the SQL
        return text
    if db_id.strip() != example.db_id:
        raise UserError(f"{file}: the prediction for question {example.id} is for database "
                        f"{db_id.strip()!r}, but the question is about {example.db_id!r}")
    return sql


def _line_predictions(text, file) -> list[tuple[str | None, str]]:
    """(None, SQL perhaps with db_id) of each line; an empty line is an empty prediction."""
    return [(None, line.rstrip("\r")) for line in text.removesuffix("\n").split("\n")]


def _bird_predictions(text, file) -> list[tuple[str | None, str]]:
    """(key, SQL with db_id) pairs; what is no text (a failed generation) is an empty prediction."""
    content = parse_json(text, file)
    if not isinstance(content, dict):
        raise UserError(f"{file} must map question numbers to SQL, as BIRD's predict_dev.json does")
    return [(key, value if isinstance(value, str) else "") for key, value in content.items()]


def _jsonl_predictions(text, file) -> list[tuple[str | None, str]]:
    """(id or None, SQL) pairs of a file with a record a line."""
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record = parse_json(line, file, number)
        if not isinstance(record, dict) or not isinstance(record.get("sql"), str):
            raise UserError(f"{file}, line {number}: field 'sql' is missing or not a text")
        pairs.append((str(record["id"]) if "id" in record else None, record["sql"]))
    if len({key is None for key, _ in pairs}) > 1:
        raise UserError(f"{file}: some records have an id and some have none")
    return pairs


def _pair(pairs, file, examples) -> tuple[list[str], str]:
    """By id when the file has the questions' ids; by position when it has none, or only numbers from 0."""
    keys = [key for key, _ in pairs]
    by_key = dict(pairs) if None not in keys else dict(enumerate(text for _, text in pairs))
    if len(by_key) < len(pairs):
        raise UserError(f"{file} has the same id twice")
    missing = [example.id for example in examples if example.id not in by_key]
    if not missing:
        extra = len(by_key) - len(examples)
        return ([by_key[example.id] for example in examples],
                "paired by id" + (f"; {extra} predictions are for other questions" if extra else ""))
    by_position = {int(key): text for key, text in by_key.items() if str(key).isdecimal()}
    if sorted(by_position) != list(range(len(pairs))):
        raise UserError(f"{file} has no prediction for {len(missing)} of {len(examples)} questions, "
                        f"for example id {missing[0]!r}")
    if len(pairs) != len(examples):
        raise UserError(f"{file} has {len(pairs)} predictions, but the data has {len(examples)} questions; "
                        "without ids they can only be paired by position")
    return ([by_position[number] for number in range(len(pairs))],
            "paired by position: the file does not use the questions' ids")


# ----------------------------------------------------------------------------------------------- writing

def save_predictions(file, examples: Sequence[Example], sqls: Sequence[str]) -> None:
    """Write one SQL a question in the format of the file's ending; the official scripts read it."""
    file = Path(file)
    pairs = list(zip(examples, sqls, strict=True))
    if file.suffix == ".json":
        content = {example.id: f"{sql}{BIRD_MARK}{example.db_id}" for example, sql in pairs}
        text = json.dumps(content, indent=1) + "\n"
    elif file.suffix == ".jsonl":
        text = json_lines({"id": example.id, "db_id": example.db_id, "sql": sql} for example, sql in pairs)
    else:  # the official script takes an empty line for the end of a dialogue: `SELECT` is wrong, but a line
        text = "".join((one_line(sql) or "SELECT") + "\n" for _, sql in pairs)
    write_text(file, text)


def one_line(sql: str) -> str:
    """The query on one line without tabs, which separate fields; its comments go if they must."""
    if "\n" in sql or "\r" in sql:
        sql = "".join(" " if kind in T.Comment else text for kind, text in lexer.tokenize(sql))
    for blank in "\t\r\n":
        sql = sql.replace(blank, " ")
    return sql.strip()


