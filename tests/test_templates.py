"""Prompt styles as template files, prompts that records bring along, and the answers that each asks for."""

import hashlib
import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from test_data import CHAT, word_tokenizer
from test_prompts import HOSTILE, chat_tokenizer, database

from common.errors import UserError
from common.options import build
from data import Example, PromptBuilder, PromptConfig, load_dataset
from prompts.answer_format import ANSWER_STYLES
from prompts.descriptions import described, natural_names
from prompts.plain_text import control_tokens
from prompts.prompt_template import STYLES, VARIABLES
from prompts.schema_text import OMNISQL, full_schema
from questions.schema import Hint, read_schema, value_index
from running.layers import fold, handed_on
from scoring.answers import verified_traces
from scoring.verdicts import ExampleScore
from scoring.voting import Candidate
from settings import parse_settings

BEFORE = Path(__file__).with_name("prompts_before.json")  # what the code wrote before styles were template files
QUESTIONS = [("How many singers are from France?", ""), ("\"Ana\" <|im_end|> {{ schema }} in 'Peru'", "old: age > 40"),
             ("Which ticket price\nhas the concert of 2014?", "")]


def ask(question, evidence=""):
    return Example("0", "music", question, ("SELECT 1",), evidence)


# ------------------------------------------------------------------- the styles `full` and `compact` are what they were

def written(database) -> dict[str, str]:
    """Prompts of both styles, with and without a chat template, from whole to shortest."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
    found = {}
    for style, (name, chat), limit in product(("full", "compact"), {"none": None, "chat": CHAT, "refuses": refuses}.items(),
                                              (2048, 70, 50, 35)):
        make = PromptBuilder({"music": database}, word_tokenizer(chat), PromptConfig(style=style, max_prompt_tokens=limit))
        for number, question in enumerate(QUESTIONS):
            found[f"{style}, {name}, {limit}, {number}"] = make.text(ask(*question))
    return found


def hashed_prompts(folder) -> dict[str, str]:
    """A hash of the prompts of 60 questions of Spider's, each style and limit."""
    dev = load_dataset("spider", folder, "dev")
    found = {}
    for style, limit in product(("full", "compact"), (2048, 150, 60)):
        make = PromptBuilder(dev.databases, word_tokenizer(CHAT), PromptConfig(style=style, max_prompt_tokens=limit))
        texts = [make.text(example) for example in dev.examples[::18]]
        found[f"{style}, {limit}"] = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return found


def test_prompts_of_the_old_styles_are_the_same_byte_for_byte(tiny_db):
    before = json.loads(BEFORE.read_text())["music"]
    assert len(set(before.values())) > 20 and written(tiny_db) == before


@pytest.mark.parametrize("part", ["full, 2048", "full, 150", "full, 60", "compact, 2048", "compact, 150", "compact, 60"])
def test_real_prompts_of_the_old_styles_are_the_same_byte_for_byte(shared_data, part, real_prompts):
    assert real_prompts[part] == json.loads(BEFORE.read_text())["spider"][part]


@pytest.fixture(scope="module")
def real_prompts(shared_data):
    return hashed_prompts(shared_data / "spider")


# --------------------------------------------------------------------------------------------- templates of one's own

def own_template(tmp_path, text):
    file = tmp_path / "own.jinja"
    file.write_text(text)
    return str(file)


def builder(path, tokenizer=None, **config):
    return PromptBuilder({"music": path}, tokenizer or word_tokenizer(CHAT), PromptConfig(**config))


def test_a_template_of_ones_own(tiny_db, tmp_path):
    file = own_template(tmp_path, """{% set system %}Be brief.{% endset %}
{% for table in schema.tables %}
{{ table.name | name }}: {{ table.columns | map(attribute="name") | map("name") | join(", ") }}
{% endfor %}
{% for hint in hints %}
{{ hint | hint }}
{% endfor %}
{% if evidence %}
{{ evidence }}
{% endif %}
{{ question }} {{ rules }}
""")
    text = builder(tiny_db, template=file).text(ask("Who is from Peru?", "of singers"))
    assert text == ("<|system|>Be brief.<|end|><|user|>singer: singer_id, name, country, age, HomeTown\n"
                    'concert: concert_id, singer_id, year, "Ticket Price"\nsinger.country = \'Peru\'\nof singers\n'
                    f"Who is from Peru? {ANSWER_STYLES['think-sql'].rules}<|end|><|assistant|>")
    plain = own_template(tmp_path, "{% set chat = false %}{{ schema.compact }} {{ question | upper }}")
    assert builder(tiny_db, template=plain).text(ask("who?")).endswith(") WHO?")


@pytest.mark.parametrize("text, words", [
    ("{{ question }", "line 1: unexpected '}'"), ("\n{% if question %}", "line 2: Unexpected end of template"),
    ("{{ question }} {{ schemas }}", "uses 'schemas', which is not known; known are " + ", ".join(VARIABLES)),
    ("{{ question | shout }}", "line 1: No filter named 'shout'"), ("{{ schema }}", "does not print the question"),
    ("{{ question }} {{ schema.columns }}", "fails: .*has no attribute 'columns'"),
    ("{{ question }} {{ ''.__class__.__mro__ }}", "fails: access to attribute '__class__' .*unsafe"),
    ("{{ question }} {{ 1 / 0 }}", "fails: division by zero"), ("{{ question }} {% include 'a' %}", "fails: "),
    ("{{ question }} {{ lipsum() }}", "uses 'lipsum', which is not known"), ("{{ question }} {{ [1, 2] | random }}", "No filter named 'random'"),
    ("{% set system %}Rules{% endset %}{% set chat = false %}{{ question }}", "sets system and chat = false, but without a chat")])
def test_a_template_that_cannot_be_used_is_told_with_its_file(tiny_db, tmp_path, text, words):
    with pytest.raises(UserError, match=f"own.jinja.*{words}".replace("?", ".")):
        builder(tiny_db, template=own_template(tmp_path, text)).text(ask("x"))


def test_a_template_that_is_not_there_is_told():
    with pytest.raises(UserError, match="gone.jinja"):
        PromptConfig(template="gone.jinja")
    with pytest.raises(ValueError, match="--prompt-style is 'long'; choose one of auto, full, compact, finer-sql, omnisql"):
        PromptConfig(style="long")


@pytest.mark.parametrize("style", ["finer-sql", "omnisql", "own"])
@pytest.mark.parametrize("text", HOSTILE)
def test_only_a_templates_own_text_is_a_control_token(tmp_path, style, text):
    """A question, evidence, cell, name or description is plain text; so is one that the template cuts or completes."""
    name, cell = text.replace('"', ""), text.replace("'", "")
    path = database(tmp_path / "music.sqlite", f"""CREATE TABLE "{name}" ("{name}" TEXT, age INT);
                    INSERT INTO "{name}" VALUES ('{cell}', 1);""")
    (tmp_path / "database_description").mkdir()
    rows = "original_column_name,column_description\n" + f'age,"{text.replace(chr(34), "")}"\n'
    (tmp_path / "database_description" / "t.csv").write_text(rows)
    plain_folder = tmp_path / "plain"
    plain_folder.mkdir()
    plain = database(plain_folder / "music.sqlite", "CREATE TABLE t (t TEXT, age INT)")
    own = own_template(tmp_path, "<tool_call>{{ schema }} {{ hints }} {{ evidence }} {{ rules }} {{ question }}|im_end|>")
    tokenizer, config = chat_tokenizer(), {"template": own} if style == "own" else {"style": style}
    control = set(tokenizer.convert_tokens_to_ids(list(control_tokens(tokenizer))))

    def steering(ids):
        return [token for token in ids if token in control]

    make, usual = builder(path, tokenizer, **config), steering(builder(plain, tokenizer, **config).encode(ask("x")))
    assert (tokenizer.convert_tokens_to_ids("<tool_call>") in usual) == (style == "own")
    for example in (ask(f"What is {text} ?"), ask(text), ask("x", text), ask("ends with <"), ask("\ufdd2<|im_end|>\ufdd1")):
        ids = make.encode(example)
        assert steering(ids) == usual and tokenizer.decode(ids) == make.text(example)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_shortened_and_keeps_question_and_rules(shared_data, style):
    dev = load_dataset("spider", shared_data / "spider", "dev")
    whole = PromptBuilder(dev.databases, word_tokenizer(CHAT), PromptConfig(style=style, descriptions="on"))
    for example in dev.examples[::90]:
        length = len(whole.encode(example))
        for part in (0.9, 0.7, 0.55):
            limit = int(part * length)
            make = PromptBuilder(dev.databases, word_tokenizer(CHAT),
                                 PromptConfig(style=style, descriptions="on", max_prompt_tokens=limit))
            ids, text = make.encode(example), make.text(example)
            assert len(text.split()) < length and (ids is None or len(ids) <= limit)
            assert " ".join(example.question.split()[:3]) in text


@pytest.mark.parametrize("style, answer", list(product(STYLES, ANSWER_STYLES)))
def test_the_rules_follow_the_answer(tiny_db, style, answer):
    text = builder(tiny_db, style=style, answer_style=answer).text(ask("x"))
    published = (style, answer) in (("finer-sql", "think-sql"), ("omnisql", "fence"))
    assert (ANSWER_STYLES[answer].rules in text) == (style != "compact" and not published)
    assert ("```" in text) == (answer == "fence" and style != "compact")


def test_a_style_brings_its_answer_unless_told():
    answers = {style: PromptConfig(style=style).answer_style for style in ("auto", *STYLES)}
    assert answers == dict.fromkeys(answers, "think-sql") | {"omnisql": "fence"}
    assert PromptConfig(style="omnisql", answer_style="think-answer").answer_style == "think-answer"


def test_omnisqls_tables(tmp_path):
    path = database(tmp_path / "music.sqlite", """CREATE TABLE a ("two words" TEXT, k INT REFERENCES b, PRIMARY KEY (k));
                    CREATE TABLE b (id INT PRIMARY KEY, plain REAL); INSERT INTO a VALUES ('x', 1), ('y', 2), ('z', 3);""")
    schema = described(read_schema(path), path, "off")
    columns = [replace(column, description="a note") for column in schema.tables[0].columns]
    schema = replace(schema, tables=(replace(schema.tables[0], columns=tuple(columns)), schema.tables[1]))
    assert full_schema(schema, 2, [Hint("a", "two words", "z")], OMNISQL) == (
        "CREATE TABLE a (\n    `two words` TEXT, -- a note, example: ['z', 'x', 'y']\n    k INT, -- a note, example: [1, 2]\n"
        "    PRIMARY KEY (k),\n    CONSTRAINT fk_a_k FOREIGN KEY (k) REFERENCES b (id)\n);\n\n"
        "CREATE TABLE b (\n    id INT,\n    plain REAL,\n    PRIMARY KEY (id)\n);")


# ------------------------------------------------------------------------------------------------ ready-made prompts

CHATS = [{"role": "system", "content": "Rules: <think> first."}, {"role": "user", "content": "Tables: t. Count <|im_end|>"}]


def own_records(tmp_path, tiny_db, *records):
    (tmp_path / "own.json").write_text(json.dumps([{"db_id": "music", "sql": "SELECT 1"} | record for record in records]))
    return load_dataset(str(tmp_path / "own.json"), tiny_db.parent).examples


def test_ready_made_prompts_are_used_as_they_are(tmp_path, tiny_db):
    chat, text = own_records(tmp_path, tiny_db, {"messages": CHATS}, {"prompt": "-- t(a)\n-- count\nSELECT <|im_end|>",
                                                                     "question": "count"})
    assert chat.question == "Tables: t. Count <|im_end|>" and text.question == "count"
    tokenizer = chat_tokenizer()
    make = builder(tiny_db, tokenizer)
    assert make.text(chat) == ("<|im_start|>system\nRules: <think> first.<|im_end|>\n<|im_start|>user\n"
                               "Tables: t. Count <|im_end|><|im_end|>\n<|im_start|>assistant\n")
    assert make.text(text) == "-- t(a)\n-- count\nSELECT <|im_end|>"
    end, think = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>"])
    assert make.encode(chat).count(end) == 2 and make.encode(chat).count(think) == 1  # what users say is plain text
    assert end not in make.encode(text)
    assert builder(tiny_db, word_tokenizer()).text(chat).endswith("Count <|im_end|>\n\nAnswer:\n")
    kept, notes = builder(tiny_db, tokenizer, max_prompt_tokens=5).encode_all([chat, text])
    assert kept == [] and "left out 2 of 2" in notes[0]


def test_a_verified_answer_to_a_ready_made_prompt_keeps_it(tmp_path, tiny_db):
    chat, = own_records(tmp_path, tiny_db, {"messages": CHATS, "question": "count"})
    score = ExampleScore("0", "music", "", "SELECT 1", "ok", "ok", "", {"bird": True}, 1.0, True)
    answer = Candidate("", "a thought", "SELECT 1", -1.0, 3, False)
    trace, = verified_traces(chat, [answer], {"SELECT 1": (score, None)})
    read, = own_records(tmp_path, tiny_db, trace)
    assert read.messages == chat.messages and read.trace == "a thought"


@pytest.mark.parametrize("record, words", [
    ({"messages": "hello"}, "'messages' must hold a list"), ({"messages": [["user", "x"]]}, "objects with a role"),
    ({"messages": [{"role": "robot", "content": "x"}]}, r"\(system, user, assistant\)"),
    ({"messages": [*CHATS, {"role": "assistant", "content": "SELECT 1"}]}, "must end with the user's message"),
    ({"messages": CHATS, "prompt": "x"}, "leave one out"), ({"prompt": ["x"]}, "'prompt' must hold a text"), ({}, "'question'")])
def test_a_broken_ready_made_prompt_is_told(tmp_path, tiny_db, record, words):
    with pytest.raises(UserError, match=f"own.json, record 1: .*{words}"):
        own_records(tmp_path, tiny_db, record)


# ------------------------------------------------------------------------------------------------------ descriptions

@pytest.fixture
def superhero(shared_data, tmp_path):
    """BIRD's superhero database with description files as BIRD's are: BOM, cp1252, lacking columns, other case."""
    source = shared_data / "bird_superhero" / "dev_databases" / "superhero" / "superhero.sqlite"
    folder = tmp_path / "superhero"
    (folder / "database_description").mkdir(parents=True)
    shutil.copy(source, folder)
    header = "original_column_name,column_name,column_description,data_format,value_description"
    files = {"Superhero.csv": (f'\ufeff{header}\r\nid,,the unique identifier,integer,\r\nheight_cm ,height cm,"the height,\r\nin ""cm""",'
                               'integer,"0 or NULL means:\n missing"\r\n', "utf-8"),
             "colour.CSV": (f"{header}\ncolour,,the hero\u2019s color \xe9,text,\n", "cp1252"),
             "race.csv": ("original_column_name,column_description\nrace,race\nid\n", "utf-8"), "gone.csv": (f"{header}\nx,,y\n", "utf-8"),
             "gender.csv": ("", "utf-8"), "publisher.csv": (f"{header}\npublisher_name,,maker \x81,text,\n", "latin-1")}
    for name, (text, encoding) in files.items():
        (folder / "database_description" / name).write_bytes(text.encode(encoding))
    return folder / "superhero.sqlite"


def hero(question="How tall is 3-D Man?"):
    return Example("0", "superhero", question, ("SELECT 1",))


def hero_builder(path, **config):
    return PromptBuilder({"superhero": path}, word_tokenizer(CHAT), PromptConfig(**{"style": "full"} | config))


def test_birds_descriptions_stand_in_the_prompt(superhero):
    text = hero_builder(superhero).text(hero())
    for part in ('height_cm INTEGER,  -- the height, in "cm"; 0 or NULL means: missing: 188', "id INTEGER PRIMARY KEY,  -- the unique identifier: 1",
                 "colour TEXT  -- the hero\u2019s color \xe9: ", "race TEXT  -- '-'", "publisher_name TEXT  -- maker \x81: "):
        assert part in text, part
    assert 'height_cm INTEGER, -- the height, in "cm"; 0 or NULL means: missing, example: [' in hero_builder(superhero, style="omnisql").text(hero())
    off = hero_builder(superhero, descriptions="off").text(hero())
    assert "the height" not in off and "height_cm INTEGER,  -- 188" in off
    assert "the height" not in hero_builder(superhero, style="compact").text(hero())


def test_descriptions_are_the_first_to_go(superhero):
    whole, off = hero_builder(superhero), hero_builder(superhero, descriptions="off")
    stages = []
    for limit in range(len(whole.encode(hero())), 40, -5):
        text = hero_builder(superhero, max_prompt_tokens=limit).text(hero())
        stages.append(("the height" in text, "-- 188" in text or ": 188" in text, "weight_kg" in text, "hero_power" in text))
    assert list(dict.fromkeys(stages))[:3] == [(True,) * 4, (False, True, True, True), (False, False, True, True)]
    assert hero_builder(superhero, max_prompt_tokens=len(whole.encode(hero())) - 1).text(hero()) == off.text(hero())


def test_real_birds_prompt_without_files_is_as_before(shared_data):
    path = shared_data / "bird_superhero" / "dev_databases" / "superhero" / "superhero.sqlite"
    if (path.parent / "database_description").exists():
        pytest.skip("the data have descriptions")
    assert hero_builder(path).text(hero()) == hero_builder(path, descriptions="off").text(hero())


def test_a_description_file_that_is_no_csv_is_told(superhero):
    (superhero.parent / "database_description" / "race.csv").write_text('original_column_name\n"' + "x" * 200_000 + '"\n')
    with pytest.raises(UserError, match="race.csv is no CSV file .*--descriptions off"):
        hero_builder(superhero).text(hero())
    assert hero_builder(superhero, descriptions="off").text(hero())


def test_spiders_natural_names(shared_data):
    dev = load_dataset("spider", shared_data / "spider", "dev")
    path = dev.databases["pets_1"]
    names = natural_names(path)
    assert names["student", "stuid"] == "student id" and ("student", "age") not in names
    example = next(example for example in dev.examples if example.db_id == "pets_1")
    texts = {kind: PromptBuilder(dev.databases, word_tokenizer(CHAT), PromptConfig(descriptions=kind)).text(example)
             for kind in ("auto", "on", "off")}
    assert texts["auto"] == texts["off"] and "-- student id: 1001" in texts["on"]


def test_another_tables_json_is_told(tiny_db):
    (tiny_db.parent / "tables.json").write_text('[{"db_id": "music"}]')
    with pytest.raises(UserError, match="tables.json has not the layout of Spider's"):
        builder(tiny_db, descriptions="on").text(ask("x"))


# ---------------------------------------------------------------------------------------- hints in every language

CITIES = ["北京", "北京大学", "東京", "男", "São Paulo", "Zürich", "서울", "ไทย", "iPhone手机", "ガス", "カ行", "ABC大学"]


@pytest.mark.parametrize("question, cells", [
    ("北京大学有多少学生？", ["北京大学"]), ("从北京到東京的火车", ["北京", "東京"]), ("男生有多少", []),
    ("students from sao paulo or ZURICH", ["São Paulo", "Zürich"]), ("São Paulo", ["São Paulo"]), ("서울에서 온 학생", ["서울"]),
    ("คนไทยกี่คน", ["ไทย"]), ("买ｉＰｈｏｎｅ手机的人", ["iPhone手机"]), ("カス行", []), ("XABC大学", []), ("xABC大学 ABC大学", ["ABC大学"])])
def test_cells_are_found_without_spaces_and_accents(tmp_path, question, cells):
    values = ", ".join(f"('{city}')" for city in CITIES)
    path = database(tmp_path / "c.sqlite", f"CREATE TABLE city (name TEXT); INSERT INTO city VALUES {values};")
    assert [hint.value for hint in value_index(path).hints(question, 9)] == cells
    assert value_index(path).hints(question, 9, tables={"other"}) == []


def test_a_column_named_within_a_longer_word_is_mentioned(tmp_path):
    path = database(tmp_path / "music.sqlite", "CREATE TABLE t (城市 TEXT, 年龄 INT, naïveté INT, x INT)")
    text = builder(path, style="full", max_prompt_tokens=1).text(ask("年龄大于三十的人的 naivete"))
    assert "年龄" in text and "naïveté" in text and "城市" not in text and " x " not in text


# ----------------------------------------------------------------------------------------- a run and its model

def test_a_model_is_prompted_as_its_run_prompted_it(tiny_db, tmp_path):
    file = own_template(tmp_path, "{{ question }} of the run")
    run = parse_settings(["--prompt-template", file, "--answer", "think-answer", "--tables", "singer", "--sample-values", "2"]).as_dict()
    run = json.loads(json.dumps(run))
    Path(file).write_text("{{ question }} of another day")

    def prompt_config(given, run=None):
        return build(PromptConfig, fold(made_by=handed_on(run), flags=given))

    config = prompt_config({}, run)
    assert (config.answer_style, config.sample_values, config.tables) == ("think-answer", 2, "")
    assert builder(tiny_db, template=config.template, template_text=config.template_text).template_text.endswith("of the run")
    assert prompt_config({"template": file}, run).template_text.endswith("another day")
    other = prompt_config({"style": "full", "answer_style": "fence"}, run)
    assert (other.template, other.template_text, other.style, other.answer_style) == ("", "", "full", "fence")
    assert prompt_config({}, {"data": "bird", "style": "compact"}).descriptions == "off"  # a run older than the setting
    assert prompt_config({"style": "omnisql"}) == PromptConfig(style="omnisql")
