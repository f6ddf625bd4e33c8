"""Questions, their gold SQL and their databases: the demo world, Spider, BIRD, or your own files.

`load_dataset(name, data_dir, split)` returns a `Dataset` of frozen `Example`s; `load_splits` returns the sets of a
training run. history.py finds which of them a policy has seen. A missing or malformed file raises `UserError`, one
sentence that names the file, the record and the field. questions/question_files.py lists the file layouts. The names
that read databases (questions/schema.py) and write prompts (prompts/) are re-exported here.

Held-out sets
    Some data have no test questions: your own file without `split`, or an official dev split that is trained on.
    Then load_splits holds out about a fifth of the questions as the test set and a tenth as the dev set: whole
    databases of a benchmark, else single questions with all that share their text or gold SQL. If your own file has
    the splits train, dev and test, its dev split is the dev set.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from prompts.builder import PromptBuilder, PromptConfig
from questions.example import Example
from questions.holdout import HeldBack, hold_out, not_shared, part_size, question_key
from questions.question_files import (
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
from questions.schema import Schema, columns_of, read_schema, schema_columns, value_index

__all__ = ["Dataset", "Example", "PromptBuilder", "PromptConfig", "Schema", "Splits", "UserError", "columns_of",
           "load_dataset", "load_splits", "read_schema", "schema_columns", "value_index"]


def load_dataset(name: str, data_dir=None, split: str = "train", **demo_options) -> Dataset:
    """The examples of `demo`, `spider`, `bird` or a .json/.jsonl path; demo_options: seed= and world= of the demo."""
    data_dir = Path(data_dir) if data_dir is not None else None
    if name == "demo":
        from questions import demo_world  # only the demo needs it
        try:
            records, databases = demo_world.load(split, data_dir, **demo_options)
        except ValueError as error:
            raise UserError(str(error)) from error
        except OSError as error:  # such as a read-only checkout
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
    """The sets of a training run: `dev` chooses the best checkpoint, each set in `tests` is only reported."""
    train: list[Example]
    traced: list[Example]  # with verified reasoning: cold start and first memory
    dev: list[Example]
    tests: dict[str, list[Example]]
    databases: dict[str, Path]
    notes: tuple[str, ...] = ()
    dev_by_database: bool = True  # see `load_splits`; stored in config.json


def load_splits(name: str, data_dir=None, split: str = "train", *, traces=None, seed: int = 0,
                world: str = "default", dev_size: int = 200, test_size: int = 1000, by_database: bool = True) -> Splits:
    """The sets of a training run; training contains no question of dev or a test, nor its gold SQL.

    The demo has splits of its own, and so does your own file if its records are marked train, dev and test. Otherwise
    the test is the official dev split, or the split dev or test of your own file. If there is none, or it is trained
    on, a test is held out from the training questions. Dev is then held out too, `by_database` if test and training
    share no database, as in benchmarks (runs of older versions held out single questions).
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
    """The `Splits` of the demo."""
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
    """(label, questions, "") of the split that serves as the test; ("", None, reason) if there is none."""
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
    """The dev questions that training does not contain, of a user's file with both dev and test; else None."""
    others = {"dev", "test"} - {split.strip().lower()}
    if not is_own(name) or len(others) < 2 or not all(has_golds(Path(name), label) for label in others):
        return None
    dev = load_dataset(name, data_dir, "dev")
    kept, notes = _apart_from(trained, dev, "dev", "dev", name)
    return replace(dev, examples=kept).noted(*notes)


def _are_on_other_databases(tests: Mapping[str, list[Example]], trained: list[Example]) -> bool:
    """Whether there are test questions, and none uses a training database."""
    tested = {example.db_id for questions in tests.values() for example in questions}
    return bool(tested) and tested.isdisjoint(example.db_id for example in trained)


def _test_questions(name, data_dir, split, trained: list[Example]) -> tuple[list[Example], tuple[str, ...]]:
    """All test questions that training does not contain, and notes on unreadable splits. A run reports only a sample
    of one split, but evaluate.py scores them all."""
    labels = {"dev"} if split.strip().lower() == "train" else set()
    if is_own(name):
        labels = {"dev", "test"} & set(own_labels(Path(name), split)) - {split.strip().lower()}
    questions, notes = [], ()
    for label in sorted(labels):
        try:
            questions += load_dataset(name, data_dir, label).examples
        except UserError as error:  # training does not need this split
            notes += (f"whether traces are of questions of the split {label} is not known, for it cannot be read: "
                      f"{error}",)
    return not_shared(questions, trained, by_gold=not is_own(name)), notes


def _apart_from(trained: list[Example], given: Dataset, use: str, label: str,
                name) -> tuple[list[Example], tuple[str, ...]]:
    """The questions given for a use (dev or test) that `trained` does not contain, and notes.

    In a user's own file a shared gold query is only reported, because it may be intended.
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
    """A note on what was held out, why and how, with the flag for its size."""
    why = f", because {why}" if why else ""
    if not part.held:
        return (f"no question is held back {purpose}{why}, and the {count} there are cannot be parted without shared "
                "gold SQL: add questions",)
    how = f": the databases {shortlist(part.databases)}" if part.databases else \
        f"; {part.followed} of them moved with another one, for they share its gold SQL or text"
    return (f"held back {len(part.held)} of {count} questions {purpose}{why}{how} ({flag} says how many, 0: none)",)


def _repeats_note(name, examples: list[Example]) -> tuple[str, ...]:
    """A note on questions that are asked more than once."""
    ids = {}
    for example in examples:
        ids.setdefault(question_key(example), []).append(example.id)
    repeated = [" and ".join(same) for same in ids.values() if len(same) > 1]
    return (f"questions that {name} asks more than once: {len(repeated)} (ids {shortlist(repeated)}); each is either "
            "trained on or held back, never both",) if repeated else ()


def _without_leaks(splits: Splits, every: list[Example], by_gold: bool = True, dev_by_gold: bool = True) -> Splits:
    """The splits without traces of held-out questions (sft.py --mine may find such traces).

    every: all test questions of the data; `splits.tests` may contain only a sample.
    by_gold, dev_by_gold: also drop traces that share only a gold query with a test or dev question.
    """
    tests = [example for part in (*splits.tests.values(), every) for example in part]
    traced = not_shared(not_shared(splits.traced, splits.dev, dev_by_gold), tests, by_gold)
    count = len(splits.traced) - len(traced)
    note = (f"left out {count} of {len(splits.traced)} traces: their questions are held back",) if count else ()
    return replace(splits, traced=traced, notes=splits.notes + note)


def _traced(file, databases, name) -> tuple[list[Example], tuple[str, ...]]:
    """The records of a --traces file whose database is among `databases`, and a note on the others.

    Raises UserError: a record has no trace, or none has such a database.
    """
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
