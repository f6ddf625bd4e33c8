"""Datasets, schemas, value hints and prompts."""

import dataclasses
import json
import random
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data import Dataset, Example, PromptBuilder, PromptConfig, load_dataset, read_schema, schema_columns, value_index
from running.errors import UserError
from text2sql.prompts import needed_columns, space_out
from text2sql.schema import Hint, quote_identifier

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
    ([GOOD | {"id": "a"}, GOOD | {"id": "a"}], ["records 1 and 2", "'a'"]),
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
    code = f"from running import errors\ndef main():\n    {body}\nerrors.run_main(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, printed)


@pytest.mark.parametrize("lines", [1, 100_000])  # a pipe takes the first at once, and notices at the end
def test_a_reader_that_has_seen_enough_is_no_error(lines):
    code = ("import time\nfrom running import errors\ndef main():\n    time.sleep(0.3)\n"
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


def test_damaged_database_is_a_user_error(tmp_path):
    path = tmp_path / "bad.sqlite"
    path.write_bytes(b"SQLite format 3\0" + b"junk" * 100)
    with pytest.raises(UserError, match="bad.sqlite"):
        read_schema(path)
    with pytest.raises(UserError, match="cannot read"):
        read_schema(tmp_path / "gone.sqlite")


@pytest.mark.parametrize("name, quoted", [("age", "age"), ("Home Town", '"Home Town"'), ("order", '"order"'),
                                          ("2nd", '"2nd"'), ('a"b', '"a""b"'), ("année", "année")])
def test_quote_identifier_is_what_sqlite_accepts(name, quoted):
    assert quote_identifier(name) == quoted
    connection = sqlite3.connect(":memory:")
    connection.execute(f"CREATE TABLE t ({quoted} INT)")
    assert connection.execute(f"SELECT {quoted} FROM t").description[0][0] == name
    connection.close()


# ----------------------------------------------------------------------------------------- value hints

def test_hints(tiny_db):
    index = value_index(tiny_db)
    france, peru = Hint("singer", "country", "France"), Hint("singer", "country", "Peru")
    assert index.hints("singers from FRANCE, or from Peru?", 5) == [france, peru]
    assert index.hints("Francesco francese 30 2014", 5) == []  # whole words of text cells only
    assert index.hints("France and Peru", 1) == [france]
    assert index.hints("France's oldest", 5) == [france]


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


def test_style_follows_the_tokenizer_unless_told(tiny_db):
    assert builder(tiny_db).style == "compact" and builder(tiny_db, CHAT).style == "full"
    assert builder(tiny_db, CHAT, style="compact").text(example()).endswith("answer :\n")
    assert builder(tiny_db, style="full").text(example()).endswith("Answer:\n")


@pytest.mark.parametrize("config", [{"style": "long"}, {"sample_values": 6}, {"max_prompt_tokens": 0}])
def test_bad_prompt_settings(config):
    with pytest.raises(UserError):
        PromptConfig(**config)


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
        lengths.append((len(text.split()), "-- 1, 2, 3" in text, "year" in text, refused))
        assert "France" in text and "singer_id" in text and "no explanation." in text
    stages = list(dict.fromkeys(lengths))
    # whole; without samples; without unmentioned columns; the last one again, but refused
    assert [stage[1:] for stage in stages] == [
        (True, True, False), (False, True, False), (False, False, False), (False, False, True)]
    assert stages[0][0] > stages[1][0] > stages[2][0] == stages[3][0]


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
