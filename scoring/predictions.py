"""Files of predicted SQL: read and write the formats of Spider and BIRD, and one of our own.

    .json    BIRD's predict_dev.json: {"0": "SQL\\t----- bird -----\\tdb_id", ...}
    .jsonl   one record per line with `sql` and, better, `id` (or `question_id`, or another of ID_FIELDS)
    others   Spider's: one SQL per line, optionally a tab and the db_id, then a tab and a score. As in the official
             evaluator a query ends at its first tab

Predictions are paired with the questions by id if the file has ids, else by position. Questions that share an id
are numbered, 12, 12-2, 12-3, as in the data.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError, json_lines, parse_json, read_text, sound, write_text
from common.wording import plural
from partial_credit.atomic import KEYWORDS, is_comment, lex
from questions.example import Example, id_text, unique_ids

BIRD_MARK = "\t----- bird -----\t"
ID_FIELDS = ("id", "question_id", "qid", "example_id", "instance_id", "sample_id", "uid", "idx", "index")  # in any case
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan|[-+]?inf", re.IGNORECASE)
LAST_WORD = re.compile(r"(?:\w+|[^\w\s])\Z")
UNFINISHED = KEYWORDS - {"isnull", "notnull"} | {"all", "limit", "offset", "glob", "match", "regexp"}  # end no query
BREAKS = re.compile(r"([\t\r\n]+)")  # what ends a field or a line


# ----------------------------------------------------------------------------------------------- reading

def load_predictions(file, examples: Sequence[Example]) -> tuple[list[str], str]:
    """One SQL per question in dataset order, and a sentence on how the file was paired with the questions."""
    file = Path(file)
    read = {".json": _bird_predictions, ".jsonl": _jsonl_predictions}.get(file.suffix.lower(), _line_predictions)
    ids, texts = read(read_text(file), file)
    texts, sentence = _pair(ids, texts, file, examples)
    known = {example.db_id.casefold() for example in examples}
    always = all(text.split("\t")[-1].strip().casefold() in known for text in texts if text)
    sqls = [_without_tail(text, example, known, always, file) for text, example in zip(texts, examples, strict=True)]
    if read is _line_predictions:
        cut = [number for number, sql in enumerate(sqls, 1) if "\t" in sql.strip()]
        sqls = [sql.strip().partition("\t")[0] for sql in sqls]
        if cut:
            sentence += (f"; {plural(len(cut), 'line')} cut at a tab inside the query, as Spider's official evaluator "
                         f"does, the first is line {cut[0]}")
    return sqls, sentence


def _without_tail(text, example, known, always, file) -> str:
    """The SQL before a db_id, a score or both; a db_id of another question reveals a shifted file.

    known: the db_ids of all questions, in lower case; always: every prediction ends with one.
    Raises UserError: the db_id is that of another question.
    """
    sql, mark, db_id = text.rpartition(BIRD_MARK)
    if mark:
        _check_db_id(db_id.split("\t")[0].strip(), example, file)
        return sql
    while "\t" in text:
        sql, _, tail = text.rpartition("\t")
        tail = tail.strip()
        is_db_id = tail.casefold() in known
        if not (is_db_id and always) and (_goes_on(sql) or not (is_db_id or not tail or NUMBER.fullmatch(tail))):
            break  # a tab inside the SQL
        if is_db_id:
            _check_db_id(tail, example, file)
        text, always = sql.rstrip(), False
    return text


def _check_db_id(db_id: str, example: Example, file) -> None:
    """Raises UserError: a prediction is for another database than its question."""
    if db_id.casefold() != example.db_id.casefold():
        raise UserError(f"{file}: the prediction for question {example.id} is for database "
                        f"{db_id!r}, but the question is about {example.db_id!r}")


def _goes_on(sql: str) -> bool:
    """Whether a query cannot end here, as after FROM, a comma or an operator."""
    last = LAST_WORD.search(sql.rstrip()[-20:])  # no relevant word is longer
    return bool(last) and (last[0].lower() in UNFINISHED or not (last[0][0].isalnum() or last[0][0] in "_)]\"'`;"))


# Readers return ({field that may be an id: its value in each record}, [SQL, perhaps with a tail]).

def _line_predictions(text, file) -> tuple[dict[str, list[str]], list[str]]:
    """One prediction per line; an empty line is an empty prediction."""
    return {}, [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def _bird_predictions(text, file) -> tuple[dict[str, list[str]], list[str]]:
    """An object's members; a value that is not text (a failed generation) is an empty prediction."""
    if not isinstance(parse_json(text, file), dict):
        raise UserError(f"{file} must map question numbers to SQL, as BIRD's predict_dev.json does")
    members = json.loads(text, object_pairs_hook=tuple)  # a dict would keep only the last of repeated names
    return ({ID_FIELDS[0]: [sound(name) for name, _ in members]},
            [sound(sql) if isinstance(sql, str) else "" for _, sql in members])


def _jsonl_predictions(text, file) -> tuple[dict[str, list[str]], list[str]]:
    """One record per line."""
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record = parse_json(line, file, number)
        if not isinstance(record, dict) or not isinstance(record.get("sql"), str):
            raise UserError(f"{file}, line {number}: field 'sql' is missing or not a text")
        records.append({name.lower(): value for name, value in record.items() if value is not None}
                       | {"sql": record["sql"]})
    fields = [name for name in ID_FIELDS if any(name in record for record in records)]
    whole = [name for name in fields if all(name in record for record in records)]
    if fields and not whole:
        raise UserError(f"{file}: some records have an id and some have none (field {fields[0]!r})")
    others = set.intersection(*map(set, records)) - {"sql", *ID_FIELDS} if records else ()
    return ({name: [id_text(record[name]) for record in records] for name in [*whole, *sorted(others)]},
            [record["sql"] for record in records])


def _pair(ids, texts, file, examples) -> tuple[list[str], str]:
    """Pairs by id if a field has the questions' ids, whatever its name; else by position, or by numbers from 0."""
    wanted = unique_ids([example.id for example in examples])
    for names in ids.values():
        by_id = dict(zip(unique_ids(names), texts, strict=True))
        if by_id.keys() >= set(wanted):
            _check_repeats(names, wanted, file)
            extra = len(by_id) - len(wanted)
            return ([by_id[name] for name in wanted],
                    "paired by id" + (f"; {extra} predictions are for other questions" if extra else ""))
    known = [names for field, names in ids.items() if field in ID_FIELDS]
    return _by_position(known, texts, wanted, file), "paired by position: the file does not use the questions' ids"


def _by_position(ids, texts, wanted, file) -> list[str]:
    """The texts in the order of a field that counts from 0, or in file order without ids."""
    counting = [list(map(int, names)) for names in ids
                if sorted(names) == sorted(str(position) for position in range(len(texts)))]
    if ids and not counting:
        _check_repeats(ids[0], wanted, file)
        missing = [name for name in wanted if name not in set(unique_ids(ids[0]))]
        raise UserError(f"{file} has no prediction for {len(missing)} of {len(wanted)} questions, "
                        f"for example id {missing[0]!r}")
    if len(texts) != len(wanted):
        raise UserError(f"{file} has {len(texts)} predictions, but the data has {len(wanted)} questions; "
                        "without ids they can only be paired by position")
    if not counting:
        return texts
    return [text for _, text in sorted(zip(counting[0], texts, strict=True))]


def _check_repeats(names: Sequence[str], wanted: Sequence[str], file) -> None:
    """Raises UserError: an id has more predictions than questions."""
    for name, own in zip(names, unique_ids(names), strict=True):
        if own != name and name in wanted and own not in wanted:
            raise UserError(f"{file} has the same id twice: {name!r}")


# ----------------------------------------------------------------------------------------------- writing

def save_predictions(file, examples: Sequence[Example], sqls: Sequence[str]) -> str:
    """Write one SQL per question in the format of the file's ending; the official scripts read it.

    Returns a sentence on queries that had to be changed to fit on one line; usually empty.
    """
    file, changed = Path(file), []
    ids, pairs = unique_ids([example.id for example in examples]), list(zip(examples, sqls, strict=True))
    if file.suffix.lower() == ".json":
        content = {name: f"{sql}{BIRD_MARK}{example.db_id}" for name, (example, sql) in zip(ids, pairs, strict=True)}
        text = json.dumps(content, indent=1) + "\n"
    elif file.suffix.lower() == ".jsonl":
        text = json_lines({"id": name, "db_id": example.db_id, "sql": sql}
                          for name, (example, sql) in zip(ids, pairs, strict=True))
    else:  # the official script reads an empty line as the end of a dialogue: write a wrong `SELECT` instead
        lines = [one_line(sql) for sql in sqls]
        changed = [number for number, (_, same) in enumerate(lines, 1) if not same]
        text = "".join((sql or "SELECT") + "\n" for sql, _ in lines)
    write_text(file, text)
    if not changed:
        return ""
    return (f"{file}: a name with a tab or a line break has spaces instead in {plural(len(changed), 'line')} "
            f"({', '.join(map(str, changed[:5]))}{', ...' if changed[5:] else ''}), where a line cannot hold it; .json "
            "and .jsonl can")


def one_line(sql: str) -> tuple[str, bool]:
    """The query on one line without comments and tabs, which would end it; and whether its meaning is unchanged.

    Tabs and line breaks in string literals become char(...); in names that is impossible.
    """
    if not BREAKS.search(sql):
        return sql.strip(), True
    line, same = "", True
    for kind, text in lex(sql):
        if is_comment(kind, text):
            text = " "
        elif text[0] in "'\"`[" and BREAKS.search(text):
            if text[0] == "'" and _wants_value(line):
                text = _spelled(text)
            else:
                same = False
        line += re.sub("[\t\r\n]", " ", text)
    return line.strip(), same


def _wants_value(sql: str) -> bool:
    """Whether quoted text after this SQL is a value, rather than the name of a table or a column."""
    last = LAST_WORD.search(sql.rstrip()[-20:])
    return bool(last) and _goes_on(sql) and last[0].lower() not in ("as", "from", "join", ".")


def _spelled(literal: str) -> str:
    """'a<line feed>b' as ('a' || char(10) || 'b')."""
    parts = [f"char({', '.join(str(ord(sign)) for sign in part)})" if BREAKS.fullmatch(part) else f"'{part}'"
             for part in BREAKS.split(literal[1:-1]) if part]
    return f"({' || '.join(parts)})"
