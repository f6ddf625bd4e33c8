"""Questions that a model cannot answer, because its tokenizer changes what their gold SQL says."""

import json
from types import SimpleNamespace

import pytest
from conftest import run_in_process
from little_policy import little_policy_folder
from test_evaluate import Locked
from test_prompts import database
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import evaluate
import train
from data import Example
from policy import train_tokenizer
from scoring.writable import unwritable
from sql_exec import SQLExecutor

NFD, WIDE = "Cafe\u0301", "\uff21\uff22"  # an accent of its own; letters of full width
GOLDS = [("SELECT  COUNT(*)  FROM shop WHERE name = 'Paris'",), (f"SELECT id FROM shop WHERE name = '{NFD}'",),
         (f"SELECT id FROM shop WHERE name = '{WIDE}'",), ("SELECT id FROM Shop",),
         (f"SELECT id FROM shop WHERE name = '{NFD}'", "SELECT 2"), (f"SELECT id FROM nowhere WHERE name = '{NFD}'",)]


@pytest.fixture
def shop(tmp_path):
    return database(tmp_path / "shop.sqlite", f"""CREATE TABLE shop (id INT, name TEXT);
                    INSERT INTO shop VALUES (1, 'Paris'), (2, '{NFD}'), (3, '{WIDE}');""")


@pytest.fixture
def executor(shop):
    with SQLExecutor({"shop": shop}, workers=1) as executor:
        yield executor


def examples():
    return [Example(str(i), "shop", "?", golds) for i, golds in enumerate(GOLDS)]


def normalising(normalizer):
    tokenizer = train_tokenizer([gold for golds in GOLDS for gold in golds] * 3, 300)
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def without_bytes():
    """One token a letter, and none for letters beyond ASCII."""
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate("?" + "".join(map(chr, range(32, 127))))}, [], unk_token="?"))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


def one_blank():
    """Words, which lose their capitals and the width of blanks between them."""
    words = sorted({word for golds in GOLDS for gold in golds for word in gold.lower().split()})
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


TOKENIZERS = {"as it is": (lambda: normalising(None), []), "NFC": (lambda: normalising(normalizers.NFC()), [1]),
              "NFKC": (lambda: normalising(normalizers.NFKC()), [1, 2]), "no bytes": (without_bytes, [1, 2]),
              "lower case": (lambda: normalising(normalizers.Lowercase()), [0, 1, 2]), "words": (one_blank, [0, 1, 2])}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_golds_that_a_tokenizer_changes_are_found_where_the_result_is_another(executor, name):
    """Not where keywords or blanks change, another gold can be written, or the gold fails by itself."""
    make, expected = TOKENIZERS[name]
    found = unwritable(make(), examples(), executor, ["bird"])
    assert sorted(found) == expected
    if name == "NFC":
        assert found[1] == ascii("'Cafe\u0301'") + " becomes " + ascii("'Caf\xe9'")
    if name == "lower case":
        assert found[0] == "\"'Paris'\" becomes \"'paris'\""


def test_a_database_that_cannot_be_read_says_nothing_about_the_tokenizer(executor):
    nfc = normalising(normalizers.NFC())
    assert sorted(unwritable(nfc, examples(), executor, ["bird"])) == [1]
    assert not unwritable(nfc, examples(), Locked(executor, "Caf\xe9"), ["bird"])


@pytest.mark.parametrize("name, kept", [("training", 5), ("dev", 6)])
def test_a_run_leaves_them_out_of_training_and_says_so(executor, capsys, name, kept):
    run = SimpleNamespace(match="bird", empty_gold="keep")
    builder = SimpleNamespace(encode_all=lambda questions: ([(example, [1]) for example in questions], ()))
    trainer = SimpleNamespace(s=SimpleNamespace(run=run), executor=executor, builder=builder,
                              policy=SimpleNamespace(tokenizer=normalising(normalizers.NFC())))
    trainer.unwritable_among = lambda *arguments: train.Trainer.unwritable_among(trainer, *arguments)
    questions = [example for example in examples() if example.id != "5"] + [Example("x", "shop", "?", ("SELECT 1",))]
    found = train.Trainer.usable(trainer, questions, name)
    assert len(found) == kept and ("1" in {question.example.id for question in found}) == (name == "dev")
    printed = capsys.readouterr().out
    assert f"changes the SQL of 1 of 6 {name} questions so that its result is another (1: " in printed
    assert ("left out" if name == "training" else "count as wrong") in printed


def test_an_evaluation_counts_them_as_wrong_and_names_them(shop, tiny_db, tmp_path):
    records = [{"id": f"q{i}", "db_id": "shop", "question": "How many?", "sql": gold} for i, (gold, *_) in enumerate(GOLDS[:3])]
    (tmp_path / "own.json").write_text(json.dumps(records))
    status, out, _ = run_in_process(
        evaluate, "--model", little_policy_folder(tiny_db), "--data", tmp_path / "own.json", "--data-dir", tmp_path, "--split", "train",
        "--max-completion-tokens", 4, "--threads", 1, "--workers", 1, "--prompt-style", "compact", "--json", tmp_path / "out.json")
    assert status == 0 and "1 of 3 golds so that its result is another (q1:" in " ".join(out.split())
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["unwritable"] == ["q1"] and content["n"] == 3
