"""Descriptions of the columns of a database, from the files that come with benchmarks.

    BIRD      <db_id>/database_description/<table>.csv beside the database, with original_column_name, column_name,
              column_description, data_format and value_description. The files are UTF-8, with or without BOM, or
              Windows' cp1252; some lack columns; the case of names may differ from the database
    Spider    tables.json (test_tables.json, BIRD's dev_tables.json and train_tables.json) in a folder above, with the
              columns' names in plain English

A description that adds nothing to the column's name is left out. The others appear in the prompt as comments.
"""

import csv
import io
import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from common.errors import UserError
from questions.schema import Schema

LONGEST = 300  # characters of a description; the rest is cut
NAME_FILES = ("tables.json", "test_tables.json", "dev_tables.json", "train_tables.json")


def described(schema: Schema, database: Path, kind: str = "auto") -> Schema:
    """The schema with descriptions of its columns. `kind`: auto (BIRD's files), on (else natural names too), off."""
    found = {} if kind == "off" else of_csv_files(Path(database).parent / "database_description")
    if kind == "on" and not found:
        found = natural_names(Path(database))
    if not found:
        return schema

    def told(table, column):
        text = found.get((table.name.lower(), column.name.strip().lower()), "")
        return replace(column, description=text)

    return Schema(tuple(replace(table, columns=tuple(told(table, column) for column in table.columns))
                        for table in schema.tables))


# -------------------------------------------------------------------------------------------- BIRD's

def of_csv_files(folder: Path) -> dict[tuple[str, str], str]:
    """{(table, column), both in lower case: description} from a folder of CSV files; empty without one.

    Raises:
        UserError: a file cannot be read, or is not CSV.
    """
    found = {}
    for file in sorted(folder.glob("*.[cC][sS][vV]")) if folder.is_dir() else ():
        try:
            rows = list(csv.reader(io.StringIO(_decoded(file.read_bytes()), newline="")))
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}; --descriptions off goes without it") from error
        except csv.Error as error:
            raise UserError(f"{file} is no CSV file ({error}); correct it, or give --descriptions off") from error
        header = [name.strip().lower() for name in rows[0]] if rows else []
        for row in rows[1:]:
            fields = dict(zip(header, (" ".join(cell.split()) for cell in row), strict=False))
            column = fields.get("original_column_name") or fields.get("column_name", "")
            text = _description(column, fields)
            if text:
                found[file.stem.strip().lower(), column.lower()] = text
    return found


def _decoded(content: bytes) -> str:
    """The text of a file in UTF-8, with or without BOM, or in cp1252; Latin-1 decodes the bytes that cp1252 cannot."""
    for encoding in ("utf-8-sig", "cp1252", "latin-1"):
        try:
            return content.decode(encoding).replace("\0", "")
        except UnicodeDecodeError:
            continue
    raise AssertionError("Latin-1 decodes every byte")


def _description(column: str, fields: dict[str, str]) -> str:
    """A row's description, else natural name, if it differs from the column's name, and the meaning of its values."""
    meaning = next((text for text in (fields.get("column_description", ""), fields.get("column_name", ""))
                    if _letters(text) not in ("", _letters(column))), "")
    values = fields.get("value_description", "")
    text = "; ".join(filter(None, (meaning, values if values != meaning else "")))
    return text if len(text) <= LONGEST else text[:LONGEST - 1].rstrip() + "…"


def _letters(text: str) -> str:
    """Only the letters and digits, in lower case."""
    return re.sub(r"[\W_]+", "", text).lower()


# ------------------------------------------------------------------------------------------ Spider's

def natural_names(database: Path) -> dict[tuple[str, str], str]:
    """{(table, column), both in lower case: the column's name in plain English}, if that differs from the name."""
    for folder in database.absolute().parents[:3]:
        for name in NAME_FILES:
            if (folder / name).is_file():
                found = _names_of_file(folder / name).get(database.stem)
                if found is not None:
                    return found
    return {}


@lru_cache(maxsize=8)
def _names_of_file(file: Path) -> dict[str, dict[tuple[str, str], str]]:
    """The natural names of every database of a tables.json. Raises UserError: it has another layout."""
    try:
        return {one["db_id"]: _names_of(one) for one in json.loads(file.read_text(encoding="utf-8"))}
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; --descriptions off goes without it") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{file} has not the layout of Spider's tables.json ({type(error).__name__}: {error}); "
                        "correct it, or give --descriptions off") from error


def _names_of(record: dict) -> dict[tuple[str, str], str]:
    """The natural names of one database."""
    found, tables = {}, record["table_names_original"]
    for (number, column), (_, name) in zip(record["column_names_original"], record["column_names"], strict=True):
        if number >= 0 and _letters(name) != _letters(column):
            found[tables[number].lower(), column.strip().lower()] = " ".join(name.split())
    return found
