"""Datasets, schemas, value hints and prompts."""

import dataclasses
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest
from conftest import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.errors import UserError, parse_json, write_whole
from common.options import build
from data import (
    Dataset,
    Example,
    PromptBuilder,
    PromptConfig,
    load_dataset,
    load_splits,
    read_schema,
    schema_columns,
    value_index,
)
from history import (
    data_hash,
    has_changed,
    hashes_of,
    lineage,
    load_for_evaluation,
    not_seen_before,
    reported_split,
    run_config_of,
    with_ancestors,
)
from prompts.builder import needed_columns, space_out
from prompts.schema_text import full_schema
from questions import demo_world, schema
from questions.holdout import groups_of, normalised_sql
from questions.schema import Hint, ValueIndex, quote_always, quote_identifier
from sql_exec import SQLExecutor

CHAT = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def word_tokenizer(chat_template=None):
    """A tokenizer that makes one token a word, with or without a chat template."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", chat_template=chat_template)


def example(question="How many singers are from France?", **fields):
    defaults = {"id": "0", "db_id": "music", "question": question, "gold_sqls": ("SELECT 1",)}
    return Example(**(defaults | fields))


def builder(path, chat_template=None, **config):
    return PromptBuilder({"music": path}, word_tokenizer(chat_template), PromptConfig(**config))


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# ------------------------------------------------------------------------------------- official layouts

def test_spider(shared_data):
    dev = load_dataset("spider", shared_data / "spider", "dev")
    assert len(dev.examples) == 1034 and dev.notes == ()
    assert [item.id for item in dev.examples[:2]] == ["0", "1"]
    assert dev.examples[0].gold_sqls == ("SELECT count(*) FROM singer",)
    train = load_dataset("spider", shared_data / "spider", "train")
    assert len(train.examples) == 7000 - 262
    assert "262 of 7000" in train.notes[0] and "formula_1, music_2, sakila_1" in train.notes[0]
    assert len({item.id for item in train.examples}) == len(train.examples)


def test_bird(shared_data):
    dataset = load_dataset("bird", shared_data / "bird_superhero", "dev")
    assert len(dataset.examples) == 129 and dataset.notes == ()
    first = dataset.examples[0]
    assert (first.id, first.difficulty) == ("717", "simple")
    assert first.evidence.startswith("3-D Man refers to")


@pytest.mark.parametrize("split, file, folder", [
    ("train", "train/train.json", "train/train_databases"), ("dev", "dev.json", "dev_databases"),
    ("mini-dev", "MINIDEV/mini_dev_sqlite.json", "MINIDEV/dev_databases")])
def test_bird_archive_layouts(tmp_path, tiny_db, split, file, folder):
    target = tmp_path / folder / "music" / "music.sqlite"
    target.parent.mkdir(parents=True)
    tiny_db.rename(target)
    write(tmp_path / file, [{"db_id": "music", "question": "q", "SQL": "SELECT 1"}])
    assert load_dataset("bird", tmp_path, split).databases == {"music": target}


def test_spider_train_others_continue_the_numbering(tmp_path, tiny_db):
    target = tmp_path / "database" / "music" / "music.sqlite"
    target.parent.mkdir(parents=True)
    tiny_db.rename(target)
    for name in ("train_spider.json", "train_others.json"):
        write(tmp_path / name, [{"db_id": "music", "question": name, "query": "SELECT 1"}] * 2)
    dataset = load_dataset("spider", tmp_path)
    assert [(item.id, item.question) for item in dataset.examples] == [
        ("0", "train_spider.json"), ("1", "train_spider.json"),
        ("2", "train_others.json"), ("3", "train_others.json")]


# --------------------------------------------------------------------------------------- the user's own

@pytest.mark.parametrize("place", ["music.sqlite", "music/music.sqlite", "music.db", "music/music.db"])
def test_own_file(tmp_path, tiny_db, place):
    (tmp_path / "dbs" / "music").mkdir(parents=True)
    tiny_db.rename(tmp_path / "dbs" / place)
    record = {"question": "q ", "db_id": "music", "SQL": ["SELECT 1", "SELECT 2"], "evidence": "e",
              "difficulty": "hard", "id": 7, "trace": "t"}
    expected = Example("7", "music", "q", ("SELECT 1", "SELECT 2"), "e", "hard", "t")
    own_json = write(tmp_path / "own.json", [record])
    own_lines = write(tmp_path / "own.jsonl", "\ufeff" + json.dumps(record) + "\n\n")
    for path in (own_json, own_lines):
        dataset = load_dataset(path, tmp_path / "dbs", "dev")
        assert dataset == Dataset([expected], {"music": tmp_path / "dbs" / place})


def test_own_file_splits(tmp_path, tiny_db):
    base = {"db_id": "music", "sql": "SELECT 1"}
    path = write(tmp_path / "own.json", [base | {"question": "a", "split": "train"}, base | {"question": "b"},
                                         base | {"question": "c", "split": "dev"}])
    assert [item.question for item in load_dataset(path, split="dev").examples] == ["b", "c"]
    assert [item.id for item in load_dataset(path, split="dev").examples] == ["1", "2"]


GOOD = {"question": "q", "db_id": "music", "sql": "SELECT 1"}


@pytest.mark.parametrize("content, words", [
    ('[\n{"question": 1,,}]', ["own.json", "line 2", "broken JSON"]),
    ({"a": 1}, ["own.json", "list"]),
    ([], ["no records"]),
    ([GOOD, {"question": "q", "sql": "SELECT 1"}], ["record 2", "'db_id' is missing"]),
    ([GOOD | {"question": " "}], ["record 1", "'question'", "empty"]),
    ([GOOD | {"sql": 3}], ["record 1", "'sql'", "query"]),
    ([{"question": "q", "db_id": "music"}], ["record 1", "'sql' (or 'SQL' or 'query') is missing"]),
    ([GOOD, "text"], ["record 2", "object"]),
    ([GOOD | {"evidence": 5}], ["record 1", "'evidence'"]),
    ([GOOD, GOOD | {"db_id": "nowhere"}], ["own.json, record 2", "nowhere.sqlite", "nowhere.db"]),
    ([GOOD | {"db_id": "text"}], ["text.db", "not a SQLite database"]),
    ([GOOD | {"split": "valid"}], ["record 1", "'split' is 'valid'", "train, dev, test"]),
    ([GOOD | {"split": 1}], ["record 1", "'split' is 1"]),
    (json.dumps(GOOD) + "\n" + json.dumps(GOOD), ["own.json", "an object a line", "name it own.jsonl"]),
    (json.dumps(GOOD), ["own.json", "name it own.jsonl"]),
    ("\n", ["own.json holds no records"]),
    ("[" + "1" * 5000 + "]", ["own.json", "a number is too long"]),
    ([GOOD | {"split": "train"}], ["no record of split 'dev'"]),
])
def test_own_file_errors(tmp_path, tiny_db, content, words):
    (tmp_path / "text.db").write_text("hello")
    with pytest.raises(UserError) as error:
        load_dataset(write(tmp_path / "own.json", content), split="dev")
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_broken_jsonl_names_the_line(tmp_path, tiny_db):
    path = write(tmp_path / "own.jsonl", json.dumps(GOOD) + "\n\n{oops\n")
    with pytest.raises(UserError, match="own.jsonl, line 3: broken JSON"):
        load_dataset(path)


def test_a_list_named_jsonl_is_told(tmp_path):
    with pytest.raises(UserError, match=r"own.jsonl holds a JSON list.*name it own.json$"):
        load_dataset(write(tmp_path / "own.jsonl", json.dumps([GOOD])))


@pytest.mark.parametrize("ids, expected, words", [
    ([7.0, 7, "8.0", 8.5], ["7", "7-2", "8.0", "8.5"], "record 2 repeats id '7', so it is called '7-2'"),
    (["12", 12, "12", "12-2"], ["12", "12-3", "12-4", "12-2"], "record 2 repeats id '12', so it is called '12-3'"),
    (["3", "a", "b", None], ["3", "a", "b", "3-2"], "record 4 has no id, and its position, '3', is taken, so it is called"),
    ([None, "0", " ", "0"], ["0-2", "0", "2", "0-3"], "record 1 has no id, and its position, '0', is taken"),
    (["a", None, None], ["a", "1", "2"], None)])
def test_ids_are_made_unique_and_told(tmp_path, tiny_db, ids, expected, words):
    records = [GOOD | ({"id": identity} if identity is not None else {}) for identity in ids]
    dataset = load_dataset(write(tmp_path / "own.json", records))
    assert [item.id for item in dataset.examples] == expected
    assert [words in note for note in dataset.notes] == ([True] if words else [])


def test_repeated_ids_of_an_official_file_are_told(tmp_path, tiny_db):
    target = tmp_path / "dev_databases" / "music" / "music.sqlite"
    target.parent.mkdir(parents=True)
    tiny_db.rename(target)
    write(tmp_path / "dev.json", [GOOD | {"question_id": 7, "question": word} for word in "abc"])
    dataset = load_dataset("bird", tmp_path, "dev")
    assert [item.id for item in dataset.examples] == ["7", "7-2", "7-3"]
    assert "record 3 repeats id '7', so it is called '7-3'" in dataset.notes[0]


def test_each_split_of_an_own_file_may_count_anew(tmp_path, tiny_db):
    path = write(tmp_path / "own.json", [GOOD | {"id": 1, "split": "train"}, GOOD | {"id": 1, "split": "dev"}])
    for split in ("train", "dev"):
        dataset = load_dataset(path, split=split)
        assert [item.id for item in dataset.examples] == ["1"] and dataset.notes == ()


def test_split_names_are_read_in_any_case(tmp_path, tiny_db):
    path = write(tmp_path / "own.json", [GOOD | {"question": "a", "split": "Train"}, GOOD | {"question": "b", "split": None},
                                         GOOD | {"question": "c", "split": " DEV "}])
    assert [item.question for item in load_dataset(path, split="train").examples] == ["a", "b"]
    dev = load_dataset(path, split="Dev")
    assert [item.question for item in dev.examples] == ["b", "c"]
    assert dev.notes[0].endswith("which belong to every split: 1")


def test_lone_surrogates_are_replaced(tmp_path, tiny_db):
    text = json.dumps([GOOD | {"question": "x"}]).replace("x", r"caf\ud800 \ud83d\ude00")
    question = load_dataset(write(tmp_path / "own.json", text)).examples[0].question
    assert question == "caf\N{REPLACEMENT CHARACTER} \N{GRINNING FACE}"
    assert parse_json(r'{"a\udfff": [["\udc00"], 1, null]}', "f") == {
        "a\N{REPLACEMENT CHARACTER}": [["\N{REPLACEMENT CHARACTER}"], 1, None]}
    write_whole(tmp_path / "out", "a\ud800b")
    assert (tmp_path / "out").read_text() == "a?b"


def test_what_is_not_utf8_is_told(tmp_path):
    (tmp_path / "own.json").write_bytes(b'[{"question": "caf\xe9"}]')
    with pytest.raises(UserError, match=r"own.json is not UTF-8 text \(byte 18\): save it as UTF-8"):
        load_dataset(str(tmp_path / "own.json"))


# ------------------------------------------------------------------------------- what is held back from training

def shared_with_training(splits):
    """(questions, gold queries, databases) that held-back questions share with training."""
    held = [item for part in (splits.dev, *splits.tests.values()) for item in part]

    def shared(key):
        return len({key(item) for item in held} & {key(item) for item in splits.train})

    return (shared(lambda item: (item.db_id, item.question.lower())),
            shared(lambda item: (item.db_id, normalised_sql(item.gold_sqls[0]))), shared(lambda item: item.db_id))


def own_file(folder, count, name="own.json", **fields):
    """A file of so many different questions about the music database."""
    return write(folder / name, [{"question": f"Question {i}?", "db_id": "music", "sql": f"SELECT {i}"} | fields
                                 for i in range(count)])


def run_of(path, **more):
    """The settings of a training run on a file, as its config.json has them."""
    return {"data": str(path), "data_dir": None, "split": "train", "seed": 0, "eval_questions": 200,
            "test_questions": 1000} | more


def test_spider_train_holds_back_databases(shared_data):
    splits = load_splits("spider", shared_data / "spider")
    assert (len(splits.train), len(splits.dev)) == (7000 - 262 - 198, 198)
    assert shared_with_training(splits) == (0, 0, 0)  # as the test, which is on other databases too
    assert splits.notes[-1].startswith("held back 198 of 6738 questions to choose the best policy by: the databases movie_1, musical")


def test_a_run_from_before_holds_back_by_gold_as_it_did(shared_data):
    splits = load_splits("spider", shared_data / "spider", by_database=False)
    assert (len(splits.train), len(splits.dev)) == (7000 - 262 - 200, 200)
    assert {name: len(part) for name, part in splits.tests.items()} == {"dev split": 1000}
    assert shared_with_training(splits) == (0, 0, len({item.db_id for item in splits.dev}))
    assert splits.notes[-1].startswith("held back 200 of 6738 questions to choose the best policy by; 82 of them moved")
    golds = [(item.db_id, normalised_sql(item.gold_sqls[0])) for item in splits.dev]
    assert len(golds) - len(set(golds)) == 82


def test_training_on_spider_dev_tests_on_other_databases(shared_data):
    splits = load_splits("spider", shared_data / "spider", "dev")
    test = splits.tests["test"]
    assert (len(splits.train), len(splits.dev), len(test)) == (740, 100, 194)
    assert shared_with_training(splits) == (0, 0, 0)
    databases = {item.db_id for item in test}
    assert len(databases) == 4 and databases.isdisjoint(item.db_id for item in splits.train + splits.dev)
    assert len({item.id for item in splits.train + splits.dev + test}) == 1034
    assert "because spider's dev split is trained on" in splits.notes[0] and "course_teach" in splits.notes[0]
    assert "--test-questions" in splits.notes[0] and "--eval-questions" in splits.notes[1]
    other = load_splits("spider", shared_data / "spider", "dev", seed=1).tests["test"]
    assert {item.db_id for item in other} != databases


def test_training_on_one_database_tests_on_other_questions(shared_data):
    splits = load_splits("bird", shared_data / "bird_superhero", "dev")
    assert (len(splits.train), len(splits.dev), len(splits.tests["test"])) == (92, 12, 25)
    assert shared_with_training(splits) == (0, 0, 1)
    nothing = load_splits("bird", shared_data / "bird_superhero", "dev", dev_size=0, test_size=0)
    assert len(nothing.train) == 129 and not nothing.dev and not nothing.tests and not nothing.notes


def test_the_shop_of_the_docs_has_fifty_questions_that_all_have_an_answer(tmp_path):
    shop = ROOT / "docs" / "shop"
    with closing(sqlite3.connect(tmp_path / "shop.sqlite")) as connection:
        connection.executescript((shop / "shop.sql").read_text())
    splits = load_splits(str(shop / "shop.jsonl"), tmp_path, "train")
    assert (len(splits.train), len(splits.dev), len(splits.tests["test"])) == (35, 5, 10)
    assert shared_with_training(splits) == (0, 0, 1)
    examples = splits.train + splits.dev + splits.tests["test"]
    with SQLExecutor(splits.databases, 1) as executor:
        golds = executor.run_gold([(example.db_id, example.gold_sqls[0]) for example in examples])
    assert all(gold.status == "ok" and gold.rows and gold.rows[0][0] is not None for gold in golds)


def test_mini_dev_is_no_test_of_itself(tmp_path, tiny_db):
    for place in ("dev_databases/music/music.sqlite", "dev_databases/opera/opera.sqlite"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_bytes(tiny_db.read_bytes())
    records = [{"question": f"Question {i}?", "db_id": ["music", "opera"][i % 5 == 0], "SQL": f"SELECT {i}"}
               for i in range(40)]
    write(tmp_path / "dev.json", records)
    write(tmp_path / "mini_dev_sqlite.json", records[:30])
    splits = load_splits("bird", tmp_path, "mini-dev")
    assert (len(splits.train), len(splits.dev), len(splits.tests["test"])) == (21, 3, 6)
    assert {item.db_id for item in splits.tests["test"]} == {"opera"}
    run = run_of("bird", data_dir=str(tmp_path), split="mini-dev")
    dev = load_for_evaluation("bird", tmp_path, "dev", run)
    assert len(dev.examples) == 16 and "left out 24 of 40 questions of bird, split dev" in dev.notes[0]
    assert shared_with_training(dataclasses.replace(splits, tests={"dev": dev.examples})) == (0, 0, 1)


def test_a_training_archive_without_dev_brings_its_test(tmp_path, tiny_db):
    target = tmp_path / "database" / "music" / "music.sqlite"
    target.parent.mkdir(parents=True)
    tiny_db.rename(target)
    own_file(tmp_path, 40, "train_spider.json")
    splits = load_splits("spider", tmp_path)
    assert (len(splits.train), len(splits.dev), len(splits.tests["test"])) == (28, 4, 8)
    assert "no other test questions were found (Spider's dev split expects" in splits.notes[0]
    write(tmp_path / "dev.json", [{"question": "q"}])  # there, but broken: an error, not a note
    with pytest.raises(UserError, match="record 1: field 'db_id' is missing"):
        load_splits("spider", tmp_path)


@pytest.mark.parametrize("count, sizes", [(46, (33, 4, 9)), (8, (6, 1, 1)), (4, (2, 1, 1)), (3, (2, 0, 1)),
                                          (2, (2, 0, 0)), (1, (1, 0, 0))])
def test_an_own_file_without_splits_is_parted(tmp_path, tiny_db, count, sizes):
    path = own_file(tmp_path, count)
    splits = load_splits(path)
    assert (len(splits.train), len(splits.dev), len(splits.tests.get("test", []))) == sizes
    assert shared_with_training(splits)[:2] == (0, 0)
    assert "--test-questions" in splits.notes[0] or count < 3
    assert all("held back" in note for note in splits.notes[:2]) and "has no field 'split'" in splits.notes[0]


def test_the_parts_change_little_when_records_are_added(tmp_path, tiny_db):
    before, after = (load_splits(own_file(tmp_path, count, f"{count}.json")) for count in (100, 104))
    trained = {item.question for item in before.train}
    assert sum(item.question in trained for item in after.dev + after.tests["test"]) <= 3


def test_questions_that_share_gold_or_text_stay_together(tmp_path, tiny_db):
    base = {"db_id": "music"}
    records = [base | {"question": f"Question {i // 2}{'?' if i % 2 else '!'}", "sql": f"SELECT {i // 2}{';' * (i % 2)}"}
               for i in range(40)]
    records += [base | {"question": "Twice?", "sql": "SELECT 'a'"}, base | {"question": "twice?", "sql": "SELECT 'b'"}]
    splits = load_splits(write(tmp_path / "own.json", records))
    assert shared_with_training(splits) == (0, 0, 1)
    assert (len(splits.train), len(splits.dev), len(splits.tests["test"])) == (30, 4, 8)
    assert "4 of them moved with another one" in splits.notes[0] and "2 of them moved" in splits.notes[1]
    assert "asks more than once: 1 (ids 40 and 41)" in splits.notes[2]
    one_gold = load_splits(write(tmp_path / "own.json", [base | {"question": str(i), "sql": "SELECT 1"} for i in range(20)]))
    assert len(one_gold.train) == 20 and "cannot be parted without shared gold SQL" in one_gold.notes[0]
    pairs = load_splits(write(tmp_path / "own.json", records[:8]))
    assert (len(pairs.train), len(pairs.dev), len(pairs.tests["test"])) == (4, 2, 2)


def test_groups_are_joined_through_others():
    def ask(question, *golds):
        return Example("0", "music", question, golds)

    chain = [ask("a", "SELECT  x"), ask("b", "select y"), ask("c", "SELECT X;", 'SELECT "Y"'), ask("d", "SELECT 'y'"),
             ask("A ", "SELECT z"), Example("0", "opera", "a", ("SELECT x",))]
    assert [[item.question for item in group] for group in groups_of(chain)] == [["a", "c", "d", "A "], ["b"], ["a"]]


def test_marked_records_are_tested_as_marked(tmp_path, tiny_db):
    records = [GOOD | {"question": f"t{i}", "sql": f"SELECT {i}", "split": "train"} for i in range(10)]
    records += [GOOD | {"question": "t3", "sql": "SELECT 99", "split": "dev"},  # training has the question
                GOOD | {"question": "other words", "sql": "SELECT 4", "split": "dev"},
                GOOD | {"question": "new", "sql": "SELECT 98", "split": "dev"}]
    path = write(tmp_path / "own.json", records)
    splits = load_splits(path)
    assert sorted(item.question for item in splits.tests["dev split"]) == ["new", "other words"]
    assert "left out 1 of 3 test questions" in splits.notes[0] and "share their gold SQL with training or dev: 1 of 2" in splits.notes[1]
    assert reported_split(path) == "dev" and load_for_evaluation(path, run=run_of(path)).notes
    named_test = write(tmp_path / "b.json", [record | {"split": record["split"].replace("dev", "test")} for record in records])
    assert len(load_splits(named_test).tests["test split"]) == 2 and reported_split(named_test) == "test"
    write(tmp_path / "own.json", records[:10] + [records[11] | {"db_id": "gone"}])
    with pytest.raises(UserError, match="record 11: no database for db_id 'gone'"):
        load_splits(path)


def marked(**counts):
    """So many different records of each split."""
    return [GOOD | {"question": f"{part} {i}", "sql": f"SELECT {i} AS {part}", "split": part}
            for part, count in counts.items() for i in range(count)]


def test_of_marked_records_dev_chooses_and_test_is_reported(tmp_path, tiny_db):
    records = marked(train=20, dev=6, test=8)
    records[20]["question"] = "train 3"  # dev has a question of training, and test one of dev
    records[30]["question"] = "dev 4"
    path = write(tmp_path / "own.json", records)
    splits = load_splits(path)
    assert [item.question for item in splits.train] == [f"train {i}" for i in range(20)]  # nothing more is held back
    assert sorted(item.question for item in splits.dev) == [f"dev {i}" for i in range(1, 6)]
    assert {name: len(part) for name, part in splits.tests.items()} == {"test split": 7}
    assert splits.notes == (f"left out 1 of 8 test questions of {path}, split test: training or dev has the same questions",
                            f"left out 1 of 6 dev questions of {path}, split dev: training has the same questions")
    assert len(load_splits(path, dev_size=2).dev) == 2 and load_splits(path, test_size=0).dev == splits.dev
    assert not load_splits(path, dev_size=0).dev and len(load_splits(path, dev_size=0).train) == 20
    backwards = load_splits(path, split="dev")  # whoever trains on dev is tested on test, and chooses by held-back ones
    assert (len(backwards.train), len(backwards.dev), list(backwards.tests)) == (5, 1, ["test split"])
    shared = load_splits(write(tmp_path / "own.json", [record | {"sql": "SELECT 1", "trace": "look"} for record in marked(train=4, dev=2, test=2)]))
    assert len(shared.traced) == 4 and "dev questions of" in shared.notes[1] and "that share their gold SQL" in shared.notes[1]


def test_marked_records_are_evaluated_as_they_were_used(tmp_path, tiny_db):
    path = write(tmp_path / "own.json", marked(train=20, dev=6, test=8))
    assert reported_split(path) == "test"
    run = run_of(path, eval_every=50)
    test, dev = (load_for_evaluation(path, split=split, run=run) for split in ("test", "dev"))
    assert len(test.examples) == 8 and not test.notes
    assert len(dev.examples) == 6
    assert dev.notes == ("the run chose its best policy by 6 of these questions: --split test has others",)
    assert not load_for_evaluation(path, split="dev", run=run | {"eval_every": 0}).notes
    records = marked(train=20, dev=6)  # without a test, dev is reported
    records[20]["question"] = load_splits(write(tmp_path / "two.json", records)).dev[0].question
    path = write(tmp_path / "two.json", records)
    assert records[20]["question"] in {item.question for item in load_splits(path).dev}
    assert [item.question for item in load_for_evaluation(path, run=run_of(path, eval_every=50)).examples] == [
        f"dev {i}" for i in range(1, 6)]
    hidden = [{name: value for name, value in record.items() if (name, record["split"]) != ("sql", "test")}
              for record in marked(train=20, dev=6, test=8)]
    path = write(tmp_path / "hidden.json", hidden)  # as a benchmark gives it away
    assert list(load_splits(path).tests) == ["dev split"] and reported_split(path) == "dev"
    hidden[-1]["sql"] = "SELECT 1"
    with pytest.raises(UserError, match="record 27: field 'sql'"):
        load_splits(write(tmp_path / "half.json", hidden))


def test_dev_has_other_databases_than_training_where_the_test_has(tmp_path, tiny_db):
    for name in "abcdefghijklmn":
        (tmp_path / f"{name}.sqlite").write_bytes(tiny_db.read_bytes())
    records = [GOOD | {"db_id": db_id, "question": f"{db_id} {i}", "sql": f"SELECT {i}", "split": "train" if db_id < "m" else "test"}
               for db_id in "abcdefghijklmn" for i in range(10)]
    path = write(tmp_path / "own.json", records)
    splits, before = load_splits(path), load_splits(path, by_database=False)
    assert shared_with_training(splits) == (0, 0, 0) and shared_with_training(before)[2] > 0
    assert (len(splits.dev), len({item.db_id for item in splits.dev}), len(before.dev)) == (10, 1, 12)
    for record in records[::20]:
        record["split"] = "test"  # on a database of training
    assert shared_with_training(load_splits(write(tmp_path / "own.json", records)))[2] > 0


def test_traces_of_unknown_databases_are_told(tmp_path, tiny_db):
    path = own_file(tmp_path, 4)
    lines = [{"question": f"T{i}", "db_id": db_id, "sql": "SELECT 77", "trace": "look"}
             for i, db_id in enumerate(["music", "musik", "opera"])]
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(json.dumps(line) + "\n" for line in lines))
    splits = load_splits(path, traces=str(traces))
    assert [item.question for item in splits.traced] == ["T0"]
    assert "left out 2 of 3 traces in" in splits.notes[-1] and "musik, opera; it has music" in splits.notes[-1]
    traces.write_text(json.dumps(lines[1]))
    with pytest.raises(UserError, match=r"1 of 1 traces .* db_id that no question of .*own.json has \(musik; it has music"):
        load_splits(path, traces=str(traces))


# ------------------------------------------------------------------------------- what a policy is evaluated on

def run_folder(folder, **settings):
    """A run's folder with the policies that it saves."""
    for place in ("best", "checkpoints/step-3"):
        (folder / place).mkdir(parents=True)
        write(folder / place / "config.json", {"model_type": "qwen2"})
    write(folder / "config.json", settings)
    return folder


def test_the_run_of_a_policy_is_found(tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run", data="own.json", seed=3)
    for place in (run, run / "best", run / "checkpoints" / "step-3"):
        assert run_config_of(str(place)) == {"data": "own.json", "seed": 3}
    (tmp_path / "link").symlink_to(run / "best")
    assert run_config_of(str(tmp_path / "link")) == {"data": "own.json", "seed": 3}
    monkeypatch.chdir(run)
    assert run_config_of("best") and run_config_of("./checkpoints/step-3/")
    assert run_config_of("tiny") is None and run_config_of("org/model") is None
    (run / "gold_cache").mkdir()
    assert run_config_of("gold_cache") is None
    write(run / "config.json", "{broken")
    assert run_config_of("best") is None
    write(run / "config.json", {"model_type": "qwen2", "data": "x"})
    assert run_config_of(str(run)) is None


def test_an_own_file_is_evaluated_as_the_run_parted_it(tmp_path, tiny_db):
    path = own_file(tmp_path, 46)
    run, splits = run_of(path), load_splits(path)
    dev, test, train = (load_for_evaluation(path, split=split, run=run) for split in ("dev", "Test", "train"))
    assert (dev.examples, test.examples, train.examples) == (splits.dev, splits.tests["test"], splits.train)
    assert "4 of 46 records" in dev.notes[0] and "--split test: 9" in dev.notes[0]
    assert reported_split(path) == "test"
    assert load_for_evaluation(path, run=run_of(path, seed=5)).examples == load_splits(path, seed=5).dev
    assert len(load_for_evaluation(path, run=run_of(path, eval_questions=2)).examples) == 2
    with pytest.raises(UserError, match="held back no dev questions of .*; --split test has 9"):
        load_for_evaluation(path, run=run_of(path, eval_questions=0))
    with pytest.raises(UserError, match="no split 'exam'"):
        load_for_evaluation(path, split="exam", run=run)
    all_trained = load_for_evaluation(path, run=run_of(path, eval_questions=0, test_questions=0))
    assert len(all_trained.examples) == 46 and "the policy was trained on them" in all_trained.notes[0]


@pytest.mark.parametrize("run, words", [(None, "is not known"), (run_of("demo"), "trained on other data (demo)"),
                                        (run_of("other.json"), "trained on other data (other.json)")])
def test_where_nothing_was_held_back_it_is_said(tmp_path, tiny_db, run, words):
    dataset = load_for_evaluation(own_file(tmp_path, 46), run=run)
    assert len(dataset.examples) == 46 and "all 46 records are used" in dataset.notes[0] and words in dataset.notes[0]
    assert not load_for_evaluation(own_file(tmp_path, 46), split="train", run=run).notes


def test_what_an_earlier_run_trained_on_is_left_out(tmp_path, tiny_db):
    path = own_file(tmp_path, 46)
    run_folder(tmp_path / "first", **run_of(path, seed=1))
    second = run_of(path, start=str(tmp_path / "first" / "best"))
    assert load_splits(path).tests["test"] != load_splits(path, seed=1).tests["test"]
    seen = {item.id for item in load_splits(path, seed=1).train + load_splits(path, seed=1).dev}
    expected = [item for item in load_splits(path).tests["test"] if item.id not in seen]
    assert 0 < len(expected) < 9
    dataset = load_for_evaluation(path, split="test", run=second)
    assert dataset.examples == expected and f"left out {9 - len(expected)} of 9" in dataset.notes[1]
    shutil.rmtree(tmp_path / "first")  # a run keeps what it began with
    gone = second | {"began_with": run_of(path, seed=1)}
    assert load_for_evaluation(path, split="test", run=gone).examples == expected
    assert list(lineage(gone)) == [gone, run_of(path, seed=1)] and not list(lineage(gone | {"began_with": None}))[1:]


def test_a_copy_of_the_questions_is_known_as_the_same_data(tmp_path, tiny_db):
    path = own_file(tmp_path, 46)
    copy = shutil.copy(path, tmp_path / "copy.json")
    held_back = load_splits(path).tests["test"]
    run = run_of("gone.json", data_hash=data_hash(path))
    assert load_for_evaluation(copy, split="test", run=run).examples == held_back and not has_changed(run)
    here = run | {"data": path}
    assert not has_changed(here)
    other = own_file(tmp_path, 45)
    assert len(load_for_evaluation(other, split="test", run=run).examples) == 45 and has_changed(here)


def test_a_chain_of_runs_is_kept_whole(tmp_path, tiny_db):
    first, second = run_of("demo"), run_of("demo", seed=1, start=str(tmp_path / "first"))
    run_folder(tmp_path / "first", **first)
    kept = with_ancestors(second)
    shutil.rmtree(tmp_path / "first")
    assert len(list(lineage(kept))) == 2 and len(list(lineage(second))) == 1 and with_ancestors(None) is None


def test_hashes_tell_other_questions_and_other_traces(tmp_path, tiny_db):
    splits = load_splits(own_file(tmp_path, 46))
    assert hashes_of(splits) == hashes_of(load_splits(own_file(tmp_path, 46)))
    for part, changed in (("dev questions", replace(splits, dev=splits.dev[::-1])),
                          ("test questions", replace(splits, tests={})),
                          ("traces", replace(splits, traced=[replace(splits.train[0], trace="count them")])),
                          ("training questions", replace(splits, train=splits.train[1:]))):
        differing = [name for name, known in hashes_of(splits).items() if hashes_of(changed)[name] != known]
        assert differing == [part]


def test_a_run_that_goes_on_from_another_is_not_measured_on_what_that_one_saw(tmp_path, tiny_db):
    path = own_file(tmp_path, 46)
    splits, other = load_splits(path), load_splits(path, seed=1)
    assert not_seen_before(splits, path, None, None) == splits == not_seen_before(splits, path, None, run_of(path))
    assert not_seen_before(splits, path, None, run_of("demo")) == splits
    cut = not_seen_before(splits, path, None, run_of(path, seed=1))
    seen = {item.id for item in other.train + other.dev}
    assert cut.dev == [item for item in splits.dev if item.id not in seen]
    assert cut.tests.get("test", []) == [item for item in splits.tests["test"] if item.id not in seen]
    count = 13 - len(cut.dev) - len(cut.tests.get("test", []))
    assert count > 5 and f"left out {count} held-back questions" in cut.notes[-1] and cut.train == splits.train


def test_paths_of_a_run_are_relative_to_where_it_was_started(tmp_path, tiny_db, monkeypatch):
    path = own_file(tmp_path, 46)
    run_folder(tmp_path / "runs" / "first", **run_of("own.json", cwd=str(tmp_path), model="smollm2-135m"))
    last = run_of("own.json", cwd=str(tmp_path), start="runs/first/best")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert list(lineage(last)) == [last, run_of("own.json", cwd=str(tmp_path), model="smollm2-135m")]
    dataset = load_for_evaluation(path, split="test", run=last)
    assert dataset.examples == load_splits(path).tests["test"] and "held back for the test" in dataset.notes[0]
    old = {name: value for name, value in last.items() if name != "cwd"}  # says nothing of where it was
    assert len(load_for_evaluation(path, run=old).examples) == 46 and list(lineage(old)) == [old]
    monkeypatch.chdir(tmp_path)
    for run in (old, last | {"cwd": "/gone"}, last | {"cwd": str(tmp_path / "elsewhere")}):  # moved, the last two
        assert load_for_evaluation("own.json", split="test", run=run).examples == dataset.examples
        assert len(list(lineage(run))) == 2
    (tmp_path / "BIRD" / "dev_databases" / "music").mkdir(parents=True)
    tiny_db.rename(tmp_path / "BIRD" / "dev_databases" / "music" / "music.sqlite")
    own_file(tmp_path / "BIRD", 40, "dev.json")
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = run_of("bird", data_dir="BIRD", cwd=str(tmp_path), split="dev")
    assert len(load_for_evaluation("bird", tmp_path / "BIRD", "dev", run).examples) == 8


def test_an_official_dev_split_is_evaluated_without_what_was_trained_on(shared_data):
    folder = shared_data / "spider"
    run = run_of("spider", data_dir=str(folder), split="dev")
    dev = load_for_evaluation("spider", folder, "dev", run)
    assert dev.examples == load_splits("spider", folder, "dev").tests["test"] and len(dev.examples) == 194
    assert "left out 840 of 1034 questions of spider, split dev" in dev.notes[0]
    for other in (None, run | {"split": "train"}, run_of("demo")):
        whole = load_for_evaluation("spider", folder, "dev", other)
        assert len(whole.examples) == 1034 and not whole.notes
    with pytest.raises(UserError, match="each of the 1034 questions of spider, split dev"):
        load_for_evaluation("spider", folder, "dev", run | {"test_questions": 0})


def test_the_demo_of_another_seed_is_told(tmp_path):
    run = run_of("demo", world="hard", seed=3)
    options = {"seed": 0, "world": "default"}
    dataset = load_for_evaluation("demo", tmp_path, "dev", run, **options)
    assert dataset.examples == load_dataset("demo", tmp_path, "dev", **options).examples
    assert "with seed 3, world hard" in dataset.notes[0]
    assert not load_for_evaluation("demo", tmp_path, "dev", run | options, **options).notes


@pytest.mark.parametrize("split, settings, words", [
    ("dev", {}, "the run chose its best policy by these questions: --split test has others"),
    ("dev", {"eval_every": 0}, ""), ("dev", {"eval_questions": 0}, ""), ("test", {}, ""), ("unseen", {}, ""),
    ("train", {}, "trained on these questions"), ("cold", {}, "trained on these questions"), ("train", {"split": "cold"}, ""),
    ("dev", {"seed": 3}, "with seed 3")])
def test_what_a_policy_of_the_demo_has_seen_is_told(tmp_path, monkeypatch, split, settings, words):
    monkeypatch.setattr(demo_world, "SIZES", {part: dict.fromkeys(demo_world.TIERS, 2) for part in demo_world.SPLITS})
    options = {"seed": 0, "world": "default"}
    run = run_of("demo", **{"world": "default", "eval_every": 40} | settings)
    later = run_of("own.json", start=str(run_folder(tmp_path / "first", **run) / "best"))
    for one in (run, later):  # its own, and that of a policy it began with
        notes = load_for_evaluation("demo", tmp_path, split, one, **options).notes
        assert len(notes) == bool(words) and all(words in note for note in notes)
    assert not load_for_evaluation("demo", tmp_path, split, None, **options).notes


@pytest.mark.parametrize("split", ["test", "dev", "unseen"])
def test_what_the_demo_reports_cannot_be_trained_on(tmp_path, split):
    with pytest.raises(UserError, match=f"--split {split}, .*give train or cold"):
        load_splits("demo", tmp_path, split)


def test_traces_of_test_questions_that_a_run_does_not_report_are_left_out_as_well(tmp_path, tiny_db, monkeypatch):
    own = [GOOD | {"question": f"{part} {i}", "sql": f"SELECT {i} AS {part}", "split": part}
           for part in ("train", "dev", "test") for i in range(40)]
    (tmp_path / "database" / "music").mkdir(parents=True)
    (tmp_path / "database" / "music" / "music.sqlite").write_bytes(tiny_db.read_bytes())
    for name, part in (("train_spider", "train"), ("dev", "dev")):
        write(tmp_path / f"{name}.json", [one for one in own if one["split"] == part])
    traces = write(tmp_path / "traces.json", [one | {"trace": "look"} for one in own])
    path = write(tmp_path / "own.json", own)
    for name, folder, left in ((path, None, {"train"}), ("spider", tmp_path, {"train", "test"})):  # Spider has no test here
        for size in (5, 0):
            splits = load_splits(name, folder, traces=traces, test_size=size)
            assert {item.question.split()[0] for item in splits.traced} == left, (name, size)
            assert len(splits.traced) == (40 if name == path else 36) + 40 * (len(left) - 1)  # one's own dev needs no other
    monkeypatch.setattr(demo_world, "SIZES", {part: dict.fromkeys(demo_world.TIERS, 5) for part in demo_world.SPLITS})
    asked = [item for part in ("dev", "test") for item in load_dataset("demo", tmp_path, part).examples]
    traces = write(tmp_path / "traces.json", [{"question": item.question, "db_id": item.db_id, "sql": "SELECT 1", "trace": "look"}
                                              for item in asked])
    for size in (5, 0):
        splits = load_splits("demo", tmp_path, traces=traces, dev_size=3, test_size=size)
        assert len(splits.traced) == 20 and "left out 40 of 60 traces" in splits.notes[-1]


def test_a_test_split_that_training_does_not_need_may_be_hidden(tmp_path, tiny_db):
    own = [GOOD | {"question": f"{part} {i}", "sql": f"SELECT {i} AS {part}", "split": part}
           for part in ("train", "dev") for i in range(20)]
    path = write(tmp_path / "own.json", [*own, {"db_id": "music", "question": "hidden?", "split": "test"}])
    traces = write(tmp_path / "traces.json", [one | {"trace": "look"} for one in own])
    splits = load_splits(path, traces=traces)
    assert {item.question.split()[0] for item in splits.traced} == {"train"}
    assert any("whether traces are of questions of the split test is not known" in note and "'sql'" in note for note in splits.notes)


@pytest.mark.parametrize("name, split, words", [
    ("spider", "train", ["train_spider.json", "database/<db_id>/<db_id>.sqlite"]),
    ("spider", "exam", ["train, dev, test", "'exam'"]),
    ("bird", "dev", ["dev.json", "dev_databases/<db_id>/<db_id>.sqlite"]),
    ("bird", "exam", ["'exam'"]),
    ("wikisql", "dev", ["unknown dataset 'wikisql'"]),
    ("gone.json", "dev", ["gone.json", "No such file"]),
])
def test_missing_data_is_explained(tmp_path, name, split, words):
    with pytest.raises(UserError) as error:
        load_dataset(name, tmp_path, split)
    assert all(word in str(error.value) for word in words), error.value


def test_official_layout_without_any_database(tmp_path):
    write(tmp_path / "dev.json", [{"db_id": "gone", "question": "q", "query": "SELECT 1"}])
    (tmp_path / "database").mkdir()
    with pytest.raises(UserError, match="no database"):
        load_dataset("spider", tmp_path, "dev")
    with pytest.raises(UserError, match="--data-dir"):
        load_dataset("spider")


@pytest.mark.parametrize("body, status, printed", [
    ("raise errors.UserError('bad input')", 2, "error: bad input\n"),
    ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ("return None", 0, ""), ("return 1", 1, "")])
def test_run_main(body, status, printed):
    code = f"from common import errors\ndef main():\n    {body}\nerrors.run_main(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, printed)


@pytest.mark.parametrize("raised", ["", "    raise errors.UserError('caf\\xe9 \\ud800')\n"])
def test_output_never_dies_of_its_encoding(raised):
    code = f"from common import errors\ndef main():\n    print('caf\\xe9 \\u2588 \\ud800')\n{raised}errors.run_main(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False,
                          env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
    assert (done.returncode, done.stdout) == (2 if raised else 0, b"caf\\xe9 \\u2588 \\ud800\n")
    assert done.stderr == (b"error: caf\\xe9 \\ud800\n" if raised else b"")


def test_a_closed_stdout_is_no_error():
    code = "from common import errors\nerrors.run_main(lambda: print('text'))"
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" >&-', sys.executable, code], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("lines", [1, 100_000])  # a pipe takes the first at once, and notices at the end
def test_a_reader_that_has_seen_enough_is_no_error(lines):
    code = ("import time\nfrom common import errors\ndef main():\n    time.sleep(0.3)\n"
            f"    print('text\\n' * {lines})\nerrors.run_main(main)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        assert child.stderr.read() == b"" and child.wait() == 141


# ---------------------------------------------------------------------------------------------- schema

def test_read_schema(tiny_db):
    schema = read_schema(tiny_db)
    assert schema_columns(schema) == {"singer": ["singer_id", "name", "country", "age", "HomeTown"],
                                      "concert": ["concert_id", "singer_id", "year", "Ticket Price"]}
    singer, concert = schema.tables
    assert singer.columns[0].primary_key and not singer.columns[1].primary_key
    assert singer.columns[2].samples == ("France", "Peru")
    assert concert.columns[1].references == (("singer", "singer_id"),)  # the bare REFERENCES means the key


def test_a_changed_file_is_read_again(tiny_db):
    assert value_index(tiny_db) is value_index(tiny_db) and read_schema(tiny_db) is read_schema(tiny_db)
    connection = sqlite3.connect(tiny_db)
    connection.execute("CREATE TABLE song (title TEXT)")
    connection.execute("INSERT INTO song VALUES ('Thunder')")
    connection.commit()
    connection.close()
    assert "song" in schema_columns(read_schema(tiny_db))
    assert value_index(tiny_db).hints("who sang thunder?", 1) == [Hint("song", "title", "Thunder")]


def test_odd_databases(tmp_path):
    path = tmp_path / "odd.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript('''
        CREATE TABLE "order" ("a b" TEXT, "say ""hi""" TEXT, "select" INT, made INT AS ("select" + 1));
        INSERT INTO "order" VALUES (CAST(x'ff41' AS TEXT), 'x', 1);
        CREATE TABLE pair (a INT, b INT, PRIMARY KEY (b, a));
        CREATE TABLE child (x INT, y INT, FOREIGN KEY (x, y) REFERENCES PAIR);
        CREATE VIEW fine AS SELECT "a b" FROM "order";
        CREATE VIEW broken AS SELECT * FROM gone;
        CREATE VIEW endless AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)
                               SELECT i FROM n WHERE i < 0;
    ''')
    connection.close()
    schema = read_schema(path)
    assert schema_columns(schema) == {"order": ["a b", 'say "hi"', "select", "made"], "pair": ["a", "b"],
                                      "child": ["x", "y"], "fine": ["a b"], "endless": ["i"]}
    assert schema.tables[0].columns[0].samples == ("\ufffdA",)  # invalid UTF-8 is replaced, not raised
    assert [column.references for column in schema.tables[2].columns] == [(("pair", "b"),), (("pair", "a"),)]
    text = builder(path, style="full").text(example("?"))
    assert '"say ""hi""" TEXT' in text and "PRIMARY KEY (a, b)" in text
    assert value_index(path).hints("is x there", 5) == []  # one letter, not written as a capital


def test_unknown_collations_and_infinities_are_read(tmp_path):
    path = tmp_path / "odd.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript("""
            PRAGMA writable_schema = ON;
            CREATE TABLE town (name TEXT COLLATE NOCASE, area REAL);
            INSERT INTO town VALUES ('Oslo', 9e999), ('Bergen', -9e999), ('', 1.5);
            CREATE INDEX by_name ON town (name);
            CREATE VIEW named AS SELECT DISTINCT name FROM town ORDER BY name DESC;
            UPDATE sqlite_master SET sql = replace(sql, 'NOCASE', 'LOCALIZED');""")
    connection.close()
    samples = {(table.name, column.name): {*column.samples} for table in read_schema(path).tables for column in table.columns}
    assert samples == {("town", "name"): {"Oslo", "Bergen"}, ("town", "area"): {1.5}, ("named", "name"): {"Oslo", "Bergen"}}
    assert [hint.table for hint in value_index(path).hints("Which land has Oslo?", 9)] == ["town", "named"]


ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT "


def test_views_are_read_once_within_one_bound(tmp_path, monkeypatch, capsys):
    """The bound counts what SQLite does, so it cuts at the same place everywhere."""
    path = tmp_path / "views.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript("CREATE TABLE town (name TEXT, land TEXT); INSERT INTO town VALUES ('Oslo', 'Norway');"
                                 "CREATE VIEW early AS SELECT land FROM town; CREATE TABLE late (name TEXT);"
                                 "INSERT INTO late VALUES ('Rome');" + "".join(
                                     f"CREATE VIEW endless{i} AS {ENDLESS} max(x) AS most, 'far' AS word, 1 AS one FROM c;"
                                     for i in range(30)) + "CREATE VIEW broken AS SELECT name FROM nowhere;")
    connection.close()
    queries, execute = [], schema.query
    monkeypatch.setattr(schema, "query", lambda *given: queries.append(given[1]) or execute(*given))
    monkeypatch.setattr(schema, "VIEW_STEPS", 2)
    tables = {table.name: [column.samples for column in table.columns] for table in read_schema(path).tables}
    assert tables == {"town": [("Oslo",), ("Norway",)], "early": [("Norway",)], "late": [("Rome",)]} | {
        f"endless{i}": [(), (), ()] for i in range(30)}
    assert sum("CASE" in one for one in queries) == 2  # a view, and the first that is endless
    assert "views of this database take long to read" in (told := capsys.readouterr().err) and "and 25 more" in told
    assert [hint.value for hint in value_index(path).hints("Is Rome far from Oslo in Norway?", 9)] == ["Rome", "Oslo", "Norway", "Norway"]
    assert "not all their cells are looked for in questions: endless0" in capsys.readouterr().err


def test_a_very_wide_table_is_read_in_few_rows(tmp_path, monkeypatch):
    path = tmp_path / "wide.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE wide ({', '.join(f'c{i} TEXT' for i in range(2000))})")
        connection.executemany(f"INSERT INTO wide VALUES ({', '.join('?' * 2000)})",
                               [[f"v{row} {i}" for i in range(2000)] for row in range(12)])
    connection.close()
    monkeypatch.setattr(schema, "SAMPLE_CELLS", 6000)
    monkeypatch.setattr(schema, "INDEX_CELLS", 8000)
    table, = read_schema(path).tables
    assert {column.samples for column in table.columns[:1]} == {("v0 0", "v1 0", "v2 0")} and len(table.columns) == 2000
    assert len(value_index(path).cells) == 8000
    monkeypatch.setattr(schema, "INDEX_BYTES", 100)  # and no more is read than there is room for
    monkeypatch.setattr(schema, "CHUNK", 1)
    queries, read = [], schema.read_cells
    monkeypatch.setattr(schema, "read_cells", lambda *given: (queries.append(1) or one for one in read(*given)))
    assert len(schema.ValueIndex(path).cells) < 30 and len(queries) == 1


def test_a_trouble_that_passes_is_no_empty_table(tiny_db, monkeypatch):
    """A writer's lock between two queries: columns or samples must not be missing without a word."""
    def query(connection, sql, parameters=()):
        if "xinfo" in sql:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise error
        return connection.execute(sql, parameters)

    monkeypatch.setattr(schema, "query", query)
    with pytest.raises(UserError, match="cannot read the database .*music.sqlite: database is locked"):
        read_schema(tiny_db)


def test_a_live_writer_makes_one_index(tiny_db, monkeypatch):
    built, init = [], ValueIndex.__init__
    monkeypatch.setattr(ValueIndex, "__init__", lambda index, path: built.append(path) or init(index, path))
    builder = PromptBuilder({"music": tiny_db}, None, PromptConfig(style="compact"))
    for number in range(4):
        assert builder.hints(Example("1", "music", "singers from Lyon", ()))[0].value == "Lyon"
        with sqlite3.connect(tiny_db) as writer:
            writer.execute("INSERT INTO singer (name) VALUES (?)", [f"Di {number}"])
        writer.close()
    assert len(built) == 1 and value_index(tiny_db) is value_index(tiny_db) is not builder._indexes["music"]
    assert len(built) == 2 and sum(path == str(tiny_db) for path in schema._indexes) == 1


def test_damaged_database_is_a_user_error(tmp_path):
    path = tmp_path / "bad.sqlite"
    path.write_bytes(b"SQLite format 3\0" + b"junk" * 100)
    with pytest.raises(UserError, match="bad.sqlite"):
        read_schema(path)
    with pytest.raises(UserError, match="cannot read"):
        read_schema(tmp_path / "gone.sqlite")


@pytest.mark.parametrize("name, quoted", [("age", "age"), ("Home Town", '"Home Town"'), ("order", '"order"'),
                                          ("2nd", '"2nd"'), ('a"b', '"a""b"'), ("année", "année"),
                                          ('"`', '"""`"')])
def test_quote_identifier_is_what_sqlite_accepts(name, quoted):
    assert quote_identifier(name) == quoted
    for written in (quoted, quote_identifier(name, "`"), quote_always(name), quote_always(name, "`")):
        connection = sqlite3.connect(":memory:")
        connection.execute(f"CREATE TABLE t ({written} INT)")
        assert connection.execute(f"SELECT {written} FROM t").description[0][0] == name
        connection.close()


# ----------------------------------------------------------------------------------------- value hints

def test_hints(tiny_db):
    index = value_index(tiny_db)
    france, peru = Hint("singer", "country", "France"), Hint("singer", "country", "Peru")
    assert index.hints("singers from FRANCE, or from Peru?", 5) == [france, peru]
    assert index.hints("Francesco francese 30 2014", 5) == []  # whole words of text cells only
    assert index.hints("France and Peru", 1) == [france]
    assert index.hints("France's oldest", 5) == [france]


def test_long_columns_leave_room_for_the_cells_of_later_ones(tmp_path, monkeypatch):
    path = tmp_path / "log.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE log (a TEXT, b TEXT, c TEXT)")
        connection.executemany("INSERT INTO log VALUES (?, ?, ?)", [[f"{name} {n} {'x' * 60}" for name in "abc"] for n in range(50)])
        connection.execute("CREATE TABLE country (name TEXT)")
        connection.execute("INSERT INTO country VALUES ('France')")
        connection.commit()
    monkeypatch.setattr(schema, "INDEX_BYTES", 2000)
    assert [hint.value for hint in schema.ValueIndex(path).hints("How many are from France?", 5)] == ["France"]


def test_hints_prefer_the_longest_cell(tmp_path):
    path = tmp_path / "power.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE power (name TEXT, kind TEXT)")
    connection.executemany("INSERT INTO power VALUES (?, ?)", [
        ("Super Strength", "F"), ("Strength", "the"), ("3-D Man", "7"), ("dog", "Dog")])
    connection.commit()
    connection.close()
    index = value_index(path)

    def values(text):
        return [hint.value for hint in index.hints(text, 9)]
    assert values("who has super strength?") == ["Super Strength"]
    assert values("super strength, strength") == ["Super Strength", "Strength"]
    assert values("the powers of 3-d man") == ["3-D Man"]
    assert values("of sex F, not f or the") == ["F"] and values("f") == []
    assert values("7 dogs") == ["7", "dog", "Dog"]


@pytest.mark.parametrize("position, hint", [
    (4, ("singer", "country", "France")),
    (700, ("contestants", "contestant_name", "Tabatha Gehling"))])
def test_hints_of_spider_questions(shared_data, position, hint):
    dev = load_dataset("spider", shared_data / "spider", "dev")
    hints = PromptBuilder(dev.databases, word_tokenizer()).hints(dev.examples[position])
    assert hint in [(found.table.lower(), found.column.lower(), found.value) for found in hints]


# --------------------------------------------------------------------------------------------- prompts

def test_compact_prompt(tiny_db):
    question = "Is \"Ana\" from the singer's town 'France'?"
    text = builder(tiny_db).text(example(question, evidence="old: age > 40"))
    assert text == (
        "singer ( singer_id , name , country , age , hometown ) "
        'concert ( concert_id , singer_id > singer . singer_id , year , "ticket price" )\n'
        "hint : singer . name = 'Ana' ; singer . country = 'France'\n"
        "evidence : old: age > 40\n"
        "question : Is \" Ana \" from the singer's town ' France ' ?\n"
        "answer :\n")
    plain = builder(tiny_db).text(example("How many?"))
    assert plain.endswith(")\nquestion : How many ?\nanswer :\n")  # no hint and no evidence line


@pytest.mark.parametrize("text, spaced", [
    ("How old?", "How old ?"), ("Really?!", "Really ?!"), ("U.S. size 3.5.", "U.S. size 3.5 ."),
    ("the dogs' age  is\n5", "the dogs ' age is 5"), ("no end", "no end")])
def test_space_out(text, spaced):
    assert space_out(text) == spaced


def test_full_prompt_in_a_chat_template(tiny_db):
    text = builder(tiny_db, CHAT).text(example(evidence="French means France"))
    assert text.startswith("<|system|>You are an expert in SQLite.") and text.endswith("<|end|><|assistant|>")
    for part in ["CREATE TABLE singer (\n  singer_id INTEGER PRIMARY KEY,  -- 1, 2, 3\n", "'France', 'Peru'",
                 "FOREIGN KEY (singer_id) REFERENCES singer (singer_id)\n);",
                 '"Ticket Price" REAL,  -- 9.5, 12.0',
                 "singer.country = 'France'", "Evidence: French means France",
                 "Question: How many singers are from France?", "<think> and </think>"]:
        assert part in text, part


def test_chat_templates_that_need_care(tiny_db):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
    text = builder(tiny_db, refuses).text(example())
    assert text.startswith("<|user|>You are an expert")
    opens_thought = CHAT + "<think>\n"
    assert builder(tiny_db, opens_thought).text(example()).endswith("<|assistant|>")
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    text = builder(tiny_db, dated + CHAT).text(example())  # as Llama 3.2 has it
    assert text.startswith("26 Jul 2024<|")  # a resumed run must read the same tomorrow


@pytest.mark.parametrize("style", ["full", "finer-sql"])
def test_sample_values_are_shown_as_they_are(tmp_path, style):
    path = tmp_path / "music.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE school (name TEXT)")
        connection.executemany("INSERT INTO school VALUES (?)", [("Amador  Valley High",), ("Bo ",), ("two\nlines",), ("one\n",)])
        connection.commit()
    text = builder(path, style=style).text(example("How many schools?"))
    assert "'Amador  Valley High'" in text and "'Bo '" in text and "two" not in text and "'one" not in text


def test_style_follows_the_tokenizer_unless_told(tiny_db):
    assert builder(tiny_db).style == "compact" and builder(tiny_db, CHAT).style == "full"
    assert builder(tiny_db, CHAT, style="compact").text(example()).endswith("answer :\n")
    assert builder(tiny_db, style="full").text(example()).endswith("Answer:\n")


@pytest.mark.parametrize("config, flag", [({"style": "long"}, "--prompt-style is 'long'"), ({"sample_values": 6}, "--sample-values is 6"),
                                          ({"max_prompt_tokens": 0}, "--max-prompt-tokens is 0")])
def test_bad_prompt_settings(config, flag):
    with pytest.raises(ValueError, match=flag):
        PromptConfig(**config)
    with pytest.raises(UserError, match=flag):
        build(PromptConfig, config)


def test_gold_never_influences_a_prompt(tiny_db):
    for template in (None, CHAT):
        make = builder(tiny_db, template, max_prompt_tokens=60)
        pairs = [("SELECT 1", ""), ("SELECT year FROM concert WHERE country = 'Peru'", "Peru")]
        texts = {make.text(example(gold_sqls=(sql,), trace=trace, difficulty=trace)) for sql, trace in pairs}
        assert len(texts) == 1


def test_shortening_order(tiny_db):
    question = example("How many singers are from France?")
    whole = builder(tiny_db, style="full").text(question)
    lengths = []
    for limit in range(len(whole.split()), 0, -1):
        make = builder(tiny_db, style="full", max_prompt_tokens=limit)
        text = make.text(question)
        refused = make.encode(question) is None
        lengths.append((len(text.split()), "-- 1, 2, 3" in text, "year" in text, "TABLE concert" in text, refused))
        assert "France" in text and "singer_id" in text and "no explanation." in text
    stages = list(dict.fromkeys(lengths))
    # whole; without samples; without unmentioned columns; without unmentioned tables; the last one again, but refused
    assert [stage[1:] for stage in stages] == [
        (True, True, True, False), (False, True, True, False), (False, False, True, False),
        (False, False, False, False), (False, False, False, True)]
    assert stages[0][0] > stages[1][0] > stages[2][0] > stages[3][0] == stages[4][0]


def test_a_table_without_a_needed_column_keeps_its_first(tmp_path):
    path = tmp_path / "u.sqlite"
    sqlite3.connect(path).executescript("CREATE TABLE u (a TEXT, b TEXT); CREATE TABLE towns (name, land)").connection.close()
    short = needed_columns(read_schema(path), "which land is it?", [])
    assert schema_columns(short) == {"u": ["a"], "towns": ["land"]}
    assert full_schema(short, 0) == "CREATE TABLE u (\n  a TEXT\n);\nCREATE TABLE towns (\n  land\n);"


def test_needed_columns(tiny_db):
    hints = [Hint("singer", "country", "Peru")]
    kept = needed_columns(read_schema(tiny_db), "the town of 2015, by ticket", hints)
    assert schema_columns(kept) == {"singer": ["singer_id", "country", "HomeTown"],
                                    "concert": ["concert_id", "singer_id", "Ticket Price"]}


def test_encode_all_leaves_out_and_counts(tiny_db):
    examples = [example(), example("word " * 300)]
    kept, notes = builder(tiny_db, max_prompt_tokens=80).encode_all(examples)
    assert [item for item, _ in kept] == examples[:1]
    assert "1 of 2" in notes[0] and "80 tokens" in notes[0]
    assert builder(tiny_db).encode_all(examples)[1] == ()


@pytest.mark.parametrize("style", ["compact", "full"])
def test_real_prompts_stay_under_their_limit(shared_data, style):
    dev = load_dataset("spider", shared_data / "spider", "dev")
    tokenizer, rng = word_tokenizer(), random.Random(0)
    for limit in (60, 150, 400):
        make = PromptBuilder(dev.databases, tokenizer, PromptConfig(style=style, max_prompt_tokens=limit))
        sample = rng.sample(dev.examples, 60)
        kept, notes = make.encode_all(sample)
        assert all(len(ids) <= limit for _, ids in kept)
        assert bool(notes) == (len(kept) < len(sample))
        for item, ids in kept[:5]:
            swapped = dataclasses.replace(item, gold_sqls=("SELECT 'other'",))
            assert make.encode(swapped) == ids and " ".join(item.question.split()[:2]) in make.text(item)


def test_a_place_where_the_demo_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the demo's databases to .*file.*--data-dir"):
        load_dataset("demo", tmp_path / "file")
