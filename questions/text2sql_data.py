"""Turns a dataset of github.com/jkkummerfeld/text2sql-data, such as GeoQuery, into a question file for train.py.

    git clone https://github.com/jkkummerfeld/text2sql-data
    python -m questions.text2sql_data text2sql-data geoquery

reads CLONE/data/geography.json and its database, and writes OUT/questions.jsonl and OUT/geography.sqlite. One query
there has many questions, with variables in both:

    {"sql": ['SELECT CITYalias0.POPULATION FROM CITY AS CITYalias0 WHERE CITYalias0.CITY_NAME = "city_name0" ;'],
     "query-split": "train", "variables": [{"name": "city_name0", "example": "austin"}],
     "sentences": [{"text": "how big is city_name0", "question-split": "dev", "variables": {"city_name0": "boston"}}]}

becomes one record per question, its SQL as people write it:

    {"id": 0, "db_id": "geography", "question": "how big is boston", "split": "dev", "query_split": "train",
     "sql": "SELECT population FROM city WHERE city_name = 'boston'"}

Of several queries, the first counts, as in the paper of that repository. Questions are left out whose query fails on
the database or returns no row, because every empty result would be right. Small datasets have folds in place of
splits; their records have no `split`, so that train.py holds questions back itself.

--traces 100 also writes what a user with few queries and many answers has: traces.jsonl, 100 training questions with
their SQL and a trace made from it, and answers.jsonl, in which the other training questions have an answer and no SQL.
"""

import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, json_lines, parse_json, read_text, run_main, write_whole
from common.options import Parser
from common.wording import plural
from partial_credit.traces import template_trace
from questions.question_files import OWN_SPLITS
from questions.schema import columns_of
from sql_exec import SQLExecutor

STRING = re.compile(r"""("[^"]*"|'[^']*')""")
TABLE = re.compile(r"\b(\w+) AS (\1alias\d+)\b")  # CITY AS CITYalias0
COLUMN = re.compile(r"\b(\w+alias\d+|derived\d+)\.(\w+|\*)")  # CITYalias0.POPULATION


@dataclass(frozen=True)
class Question:
    """A question with its query as the repository writes it, both with their values; `where` names its record."""
    text: str
    sql: str
    split: str
    query_split: str
    where: str


# ---------------------------------------------------------------------------------- reading

def read_questions(file: Path) -> list[Question]:
    """The questions of a dataset, in the order of the file. Raises UserError for a missing file or field."""
    queries = parse_json(read_text(file), file)
    if not isinstance(queries, list):
        raise UserError(f"{file} must hold a list of queries, not {type(queries).__name__}")
    questions = []
    for number, query in enumerate(queries, 1):
        where = f"{file}, query {number}"
        sqls, query_split = field(query, "sql", list, where), field(query, "query-split", str, where)
        if not sqls or not isinstance(sqls[0], str):
            raise UserError(f"{where}: field 'sql' must hold a list of texts")
        examples = {field(variable, "name", str, where): field(variable, "example", str, where)
                    for variable in field(query, "variables", list, where)}
        for sentence in field(query, "sentences", list, where):
            given = field(sentence, "variables", dict, where)
            values = examples | {name: str(value) for name, value in given.items() if value}
            questions.append(Question(fill(field(sentence, "text", str, where), values), fill(sqls[0], values),
                                      field(sentence, "question-split", str, where), query_split, where))
    return questions


def field(record, name: str, kind: type, where: str):
    """A field of a record. Raises UserError where it is missing or not of that type."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise UserError(f"{where}: field {name!r} is missing or not a {kind.__name__}")
    return value


def fill(text: str, values: dict[str, str]) -> str:
    """The text with each variable replaced by its value; where `city_name0` is one, it does not contain `name0`."""
    if not values:
        return text
    names = sorted(values, key=len, reverse=True)  # name10 before name1
    return re.sub("|".join(map(re.escape, names)), lambda found: values[found[0]], text)


# ---------------------------------------------------------------------------------- SQL as people write it

def plain_sql(sql: str) -> str:
    """The query with aliases only where a table occurs more than once, and with strings in single quotes.

    >>> plain_sql('SELECT MAX( CITYalias0.POPULATION ) FROM CITY AS CITYalias0 WHERE CITYalias0.CITY_NAME = "la" ;')
    "SELECT MAX(population) FROM city WHERE city_name = 'la'"
    """
    strings = ("'" + text[1:-1].replace("'", "''") + "'" for text in STRING.findall(sql))
    code = STRING.sub("\0", sql)  # NUL marks the place of a string
    code = re.sub(r"\bDERIVED_TABLEalias(\d+)", r"derived\1", code)
    code = re.sub(r"\bDERIVED_FIELDalias(\d+)", r"field\1", code)
    tables = {alias: table.lower() for table, alias in TABLE.findall(code)}
    uses = Counter(tables.values())
    repeated = [alias for alias, table in tables.items() if uses[table] > 1]
    names = tables | {alias: f"t{number}" for number, alias in enumerate(repeated, 1)}

    def plain_table(found: re.Match) -> str:
        table, name = tables[found[2]], names[found[2]]
        return table if table == name else f"{table} AS {name}"

    def plain_column(found: re.Match) -> str:
        alias, column = found[1], found[2].lower()
        return column if list(tables) == [alias] else f"{names.get(alias, alias)}.{column}"

    code = COLUMN.sub(plain_column, TABLE.sub(plain_table, code))
    code = re.sub(r"\b(AVG|COUNT|MAX|MIN|SUM) \(", r"\1(", code).replace("( ", "(").replace(" )", ")").rstrip(" ;")
    return re.sub("\0", lambda _: next(strings), code)


# ---------------------------------------------------------------------------------- the conversion

def convert(questions: list[Question], db_id: str, database: Path) -> tuple[list[dict], Counter]:
    """Records for a question file, and how many questions were left out for each reason.

    Raises UserError where a rewritten query does not return the very rows of the original.
    """
    records, left_out = [], Counter()
    with SQLExecutor({db_id: database}) as executor:
        originals = executor.run_many((db_id, question.sql) for question in questions)
        rewritten = [plain_sql(question.sql) for question in questions]
        results = executor.run_many((db_id, sql) for sql in rewritten)
    for question, original, sql, result in zip(questions, originals, rewritten, results, strict=True):
        if original.unread:
            raise UserError(original.error)
        if original.status != "ok":
            left_out[f"the SQL fails ({original.error or original.status})"] += 1
        elif not original.rows:
            left_out["the result is empty"] += 1
        elif (result.status, result.rows) != ("ok", original.rows):
            raise UserError(f"{question.where}: the result of the query changes when it is rewritten as {sql}")
        else:
            split = {"split": question.split} if question.split in OWN_SPLITS else {}
            records.append({"id": len(records), "db_id": db_id, "question": question.text, "sql": sql, **split,
                            "query_split": question.query_split})
    return records, left_out


def few_traces(records: list[dict], db_id: str, database: Path, count: int, seed: int) -> tuple[list, list]:
    """`count` random training questions with a trace each; all records, where the other training questions have the
    result of their SQL in place of it.

    Raises UserError where there are not so many training questions.
    """
    train = [record for record in records if record.get("split", "train") == "train"]
    if not 0 < count <= len(train):
        raise UserError(f"--traces is {count}; it must be from 1 to the number of training questions, {len(train)}")
    schema = columns_of({db_id: database})[db_id]
    chosen = random.Random(seed).sample(train, count)
    traces = [record | {"trace": template_trace(record["sql"], schema)} for record in chosen]
    others = [record for record in train if record not in chosen]
    with SQLExecutor({db_id: database}) as executor:
        results = executor.run_many((db_id, record["sql"]) for record in others)
    rows = {record["id"]: [*map(list, result.rows)] for record, result in zip(others, results, strict=True)}
    answers = [{name: value for name, value in record.items() if name != "sql"} | {"answer": rows[record["id"]]}
               if record["id"] in rows else record for record in records]
    return traces, answers


def find_database(folder: Path, name: str) -> Path:
    """The SQLite database of a dataset."""
    found = sorted(folder.glob(f"{name}-db*.sqlite"))
    if not found:
        raise UserError(f"{folder} has no SQLite database {name}-db*.sqlite, which the queries of {name} need")
    return found[0]


def main() -> None:
    """Convert a dataset and print what was left out."""
    parser = Parser("python -m questions.text2sql_data",
                    description="Turn a dataset of github.com/jkkummerfeld/text2sql-data into a question file.")
    parser.add_argument("clone", type=Path, help="folder of the cloned repository")
    parser.add_argument("out", type=Path, help="folder of the question file and the database")
    parser.add_argument("--database", default="geography", help="the dataset (default: geography)")
    parser.add_argument("--traces", type=int, default=0, metavar="N",
                        help="also write traces.jsonl, N training questions with a trace, and answers.jsonl, where the "
                             "other training questions have answers in place of SQL")
    parser.add_argument("--seed", type=int, default=0, help="draws the N questions (default: 0)")
    given = parser.parse_args()
    data, name = given.clone / "data", given.database
    questions, database = read_questions(data / f"{name}.json"), find_database(data, name)
    records, left_out = convert(questions, name, database)
    if not records:
        raise UserError(f"none of the queries of {name} returns a row of {database}")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(database, given.out / f"{name}.sqlite")
    except OSError as error:
        raise UserError(f"cannot write {given.out / f'{name}.sqlite'}: {error.strerror or error}") from error
    write_whole(given.out / "questions.jsonl", json_lines(records))
    splits = Counter(record.get("split", "without a split") for record in records)
    print(f"{given.out / 'questions.jsonl'}: {plural(len(records), 'question')} ("
          + ", ".join(f"{count} {split}" for split, count in splits.most_common()) + ")")
    for reason, count in left_out.most_common():
        print(f"left out {plural(count, 'question')}: {reason}")
    if given.traces:
        files = few_traces(records, name, database, given.traces, given.seed)
        for file, some in zip(("traces.jsonl", "answers.jsonl"), files, strict=True):
            write_whole(given.out / file, json_lines(some))
        print(f"{given.out / 'traces.jsonl'}: {plural(given.traces, 'trace')}\n{given.out / 'answers.jsonl'}: all "
              f"questions, {sum('answer' in record for record in files[1])} with an answer in place of SQL")


if __name__ == "__main__":
    run_main(main)
