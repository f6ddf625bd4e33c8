"""memory.py: hand-computed centroids, scopes, the gate, exact storage, embedders on models made here."""

import random
import subprocess
import sys
import zlib
from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import ROOT

from partial_credit.memory import (
    HashEmbedder,
    MemoryGate,
    ModelEmbedder,
    Roles,
    TraceMemory,
    count_mentions,
    gate_for,
    make_embedder,
)

OPEN = MemoryGate(memory_min_words=1, memory_min_columns=0, memory_min_density=0.0, memory_max_cosine=2.0)
VECTORS = {"east": [1, 0], "north": [0, 1], "both": [1, 1], "west": [-1, 0], "nothing": [0, 0], "": [0, -1]}


class Table:
    """An embedder that looks its two-dimensional vectors up and counts what it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        return np.array([VECTORS[text] for text in texts], float)


def filled(*traces, **settings):
    memory = TraceMemory(Table(), 2, **({"gate": OPEN} | settings))
    for db_id, thought in traces:
        assert memory.add(db_id, thought)
    return memory


def test_hand_computed_centroid():
    memory = filled(("a", "east"), ("b", "north"), ("b", "west"), top_k=2)
    # nearest two of `both`: east and north, centroid (1/2, 1/2); of `east`: east and north
    assert memory.similarity("c", "both") == pytest.approx(1.0)
    assert memory.similarity("c", "east") == pytest.approx(np.sqrt(0.5))
    assert memory.similarity("a", "east") == pytest.approx(-np.sqrt(0.5))  # only b: north and west


@pytest.mark.parametrize("scope, expected", [("other", 0.0), ("same", 1.0), ("any", np.sqrt(0.5))])
def test_scopes(scope, expected):
    memory = filled(("a", "east"), ("b", "north"), scope=scope)
    assert memory.similarity("a", "east") == pytest.approx(expected)


def test_empty_memory_one_trace_and_all_of_one_database():
    assert filled().similarity("a", "east") == 0.0
    assert filled(("a", "east")).similarity("a", "east") == 0.0
    assert filled(("a", "east"), ("a", "north")).similarity("a", "both") == 0.0
    assert filled(("a", "east")).similarity("b", "both") == pytest.approx(np.sqrt(0.5))
    assert filled(("a", "nothing")).similarity("b", "east") == 0.0
    assert filled(("a", "east"), ("a", "west")).similarity("b", "north") == 0.0  # the centroid is the origin


def test_the_nearest_traces_come_with_the_similarity():
    memory = filled(("a", "east"), ("b", "north"), ("b", "west"), top_k=2)
    similarity, nearest = memory.compare([("c", "both"), ("c", "east")], count=1)[0]
    assert similarity == memory.similarity("c", "both")
    assert nearest == [{"db_id": "a", "thought": "east", "similarity": pytest.approx(np.sqrt(0.5))}]
    assert memory.compare([("c", "both")])[0][1] == [] and filled().compare([("c", "both")], 1) == [(0.0, [])]


def test_similarity_does_not_depend_on_order_and_stays_within_one():
    rng = np.random.default_rng(0)
    vectors = {f"t{i}": rng.normal(size=8) for i in range(60)}
    traces = [(f"db{i % 5}", f"t{i}") for i in range(50)]
    results = []
    for order in (range(50), reversed(range(50)), rng.permutation(50)):
        memory = TraceMemory(lambda texts: np.stack([vectors[t] for t in texts]), 8, top_k=7, gate=OPEN)
        for i in order:
            memory.add(*traces[i])
        results.append([memory.similarity(f"db{i % 6}", f"t{50 + i}") for i in range(10)])
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)
    np.testing.assert_allclose(results[0], results[2], atol=1e-6)
    assert np.abs(results).max() <= 1.0


def test_batches_give_what_single_queries_give_and_texts_are_embedded_once():
    memory = filled(("a", "east"), ("b", "north"))
    pairs = [("a", "both"), ("c", "west"), ("b", "both")]
    assert memory.similarities(pairs) == [memory.similarity(*pair) for pair in pairs]
    memory.add("c", "both")
    assert sorted(memory.embed.asked) == ["both", "east", "north", "west"]


THOUGHT = "First take the name of each singer then keep those whose age is above thirty and order them by age so " \
          "that the youngest one comes first in the list of rows we return"


@pytest.mark.parametrize("thought, reason", [
    (THOUGHT, None), ("too short", "length"), ("word " * 2001, "length"),
    ("name age " * 20, "repetition"), (THOUGHT.replace("age", "rank"), "columns"),
    (THOUGHT + " " + " ".join(f"filler{i}" for i in range(80)), "density")])
def test_the_gate_of_the_paper(thought, reason):
    assert MemoryGate().rejection(thought, frozenset({"name", "age", "wage"})) == reason
    memory = TraceMemory(HashEmbedder(), 512, columns={"db": ["Name", "AGE", "wage"]})
    assert memory.add("db", thought) == (reason is None)
    assert dict(memory.rejections) == ({reason: 1} if reason else {})


# Thirty short traces, as a template writes them: 10 words, 2 columns; and two odd ones.
SHORT = [("db", f"table singer{i} ; keep age > {i}0 ; show name") for i in range(30)]
COLUMNS = {"db": ["Name", "AGE", "wage"]}


def test_a_gate_without_thresholds_is_the_paper_s():
    """30 words, 2000 words, 2 columns, 0.05 mentions a word."""
    columns = frozenset({"name", "age"})
    for words, reason in ((29, "length"), (30, None), (2000, None), (2001, "length")):
        thought = " ".join("name" if i % 10 == 0 else "age" if i % 10 == 1 else f"w{i}" for i in range(words))
        assert MemoryGate().rejection(thought, columns) == reason
    assert MemoryGate().rejection("name " + " ".join(f"w{i}" for i in range(30)), columns) == "columns"
    assert MemoryGate().rejection("name age " + " ".join(f"w{i}" for i in range(39)), columns) == "density"


def test_thresholds_are_half_the_median_of_the_traces_and_never_stricter_than_the_paper_s():
    traces = [*SHORT, ("db", "go"), ("db", "table singer ; " * 20)]
    assert len(SHORT[0][1].split()) == 10
    fitting = gate_for(traces, COLUMNS, MemoryGate())
    assert fitting == MemoryGate(memory_min_words=5, memory_max_words=2000, memory_min_columns=1, memory_min_density=0.05)
    memory = TraceMemory(HashEmbedder(), 512, gate=replace(fitting, memory_max_cosine=2.0), columns=COLUMNS)
    assert sum(memory.add_many(traces)) == 30 and memory.rejections == {"length": 1, "repetition": 1}
    assert sum(TraceMemory(HashEmbedder(), 512, columns=COLUMNS).add_many(traces)) == 0  # as it was: all refused

    long = [("db", " ".join(f"name age w{i}" for i in range(600 + i))) for i in range(3)]  # 1800 words and more
    assert gate_for(long, COLUMNS, MemoryGate()) == MemoryGate(30, 3606, 1, 0.05)
    prose = [("db", f"we think about it for a while {i}") for i in range(5)]  # that names no column
    fitting = gate_for(prose, COLUMNS, MemoryGate())
    assert (fitting.memory_min_columns, fitting.memory_min_density) == (0, 0.0)
    assert fitting.rejection(prose[0][1], frozenset({"name"})) is None
    assert gate_for([], COLUMNS, MemoryGate()) == MemoryGate()


def test_thresholds_that_are_given_stay():
    given = MemoryGate(memory_min_words=7, memory_min_columns=2, memory_max_cosine=0.5, memory_min_density=0.0)
    fitting = gate_for(SHORT, COLUMNS, given)
    assert fitting == replace(given, memory_max_words=2000)
    assert gate_for(SHORT, COLUMNS, MemoryGate(memory_max_words=3)).memory_min_words == 3
    assert gate_for(SHORT, COLUMNS, MemoryGate(memory_min_words=2500)).memory_max_words == 2500
    with pytest.raises(ValueError, match="at least 50 words .--memory-min-words. and at most 10 "):
        MemoryGate(memory_min_words=50, memory_max_words=10)


def test_a_memory_that_starts_empty_or_nearly_so_says_why_and_names_the_flags():
    def note(gate, traces):
        memory = TraceMemory(HashEmbedder(), 512, gate=gate, columns=COLUMNS)
        memory.add_many(traces)
        return memory.start_note(len(traces))

    assert note(MemoryGate(), SHORT) == (
        "the memory starts empty, with none of 30 verified traces: the gate refused 30 with fewer than 30 or more than "
        "2000 words (--memory-min-words, --memory-max-words)")
    strict = MemoryGate(memory_min_words=1, memory_min_columns=3)
    assert "refused 30 with fewer than 3 columns of the schema (--memory-min-columns)" in note(strict, SHORT)
    dense = MemoryGate(memory_min_words=1, memory_min_density=0.5)
    assert "30 with fewer than 0.5 column mentions a word (--memory-min-density)" in note(dense, SHORT)
    same = note(replace(OPEN, memory_max_cosine=0.9), SHORT[:1] * 30)
    assert same == ("the memory starts with only 1 of 30 verified traces: the gate refused 29 that are nearly a stored "
                    "one (--memory-max-cosine 0.9)")
    assert "30 that repeat themselves" in note(replace(OPEN, memory_min_bigrams=1.0), [("db", "a b a b")] * 30)
    assert "no verified traces" in note(MemoryGate(), []) and "at least 30 words" in note(MemoryGate(), [])
    assert note(OPEN, SHORT) == "" == note(replace(OPEN, memory_max_cosine=0.9), SHORT[:1] * 10)  # one of ten is enough


def test_every_number_of_the_gate_states_its_range():
    bad = {"memory_min_words": -1, "memory_max_words": 0, "memory_min_columns": -1, "memory_min_density": -0.1,
           "memory_min_bigrams": 1.5, "memory_max_cosine": 0.0}
    assert set(bad) == {one.name for one in fields(MemoryGate)}
    for name, value in bad.items():
        for wrong in (value, float("nan")):
            with pytest.raises(ValueError, match=f"{name} is {wrong}; it must be"):
                MemoryGate(**{"memory_min_words": 0, name: wrong})
    MemoryGate()


def test_the_memory_needs_nothing_of_the_project(tmp_path):
    (tmp_path / "memory.py").write_text((ROOT / "partial_credit" / "memory.py").read_text())
    code = "import memory; memory.gate_for([('a', 'b c')], {}, memory.MemoryGate()); memory.TraceMemory(len, 1)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={})


def test_columns_of_several_words_are_found_as_phrases():
    mentions = count_mentions("Take the Free Meal (%) of each school, free meal (%) and its name.",
                              ["free meal (%)", "name", "school", "meal count", ""])
    assert mentions == {"free meal (%)": 2, "name": 1, "school": 1}


def test_add_many_is_add_in_order_with_one_embedding():
    memory, one_by_one = filled(), filled()
    memory.gate = one_by_one.gate = replace(OPEN, memory_max_cosine=0.9)
    batches, embed = [], memory.embed
    memory.embed = lambda texts: batches.append(len(texts)) or embed(texts)
    pairs = [("a", "east"), ("b", "north"), ("a", "east"), ("c", "both"), ("b", "")]
    assert memory.add_many(pairs) == [one_by_one.add(*pair) for pair in pairs] == [True, True, False, True, False]
    assert batches == [3] and memory.thoughts == one_by_one.thoughts and memory.rejections == one_by_one.rejections
    assert memory.add_many([]) == [] and memory.similarities([]) == []


def test_add_many_in_blocks_keeps_what_a_plain_search_would_keep():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(900, 6))  # of so few dimensions that many are near one another
    unit_vectors, kept = vectors / np.linalg.norm(vectors, axis=1, keepdims=True), []
    for i in range(900):
        if not kept or (unit_vectors[kept] @ unit_vectors[i]).max() < 0.9:
            kept.append(i)
    memory = TraceMemory(lambda texts: vectors[[int(t) for t in texts]], 6, gate=replace(OPEN, memory_max_cosine=0.9))
    traces = [("db", str(i)) for i in range(900)]
    added = memory.add_many(traces[:700]) + memory.add_many(traces[700:])
    assert [i for i in range(900) if added[i]] == kept and memory.thoughts == [str(i) for i in kept]
    assert 100 < len(kept) < 700 and memory.rejections == {"duplicate": 900 - len(kept)}


def test_duplicates_are_rejected_and_counted():
    memory = TraceMemory(HashEmbedder(), 512)
    assert memory.add("a", THOUGHT) and not memory.add("b", THOUGHT + " now")
    assert len(memory) == 1 and memory.rejections["duplicate"] == 1


def test_growing_past_the_first_buffer():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 16))
    memory = TraceMemory(lambda texts: vectors[[int(t) for t in texts]], 16, top_k=1, gate=OPEN)
    for i in range(300):
        memory.add(f"db{i}", str(i))
    assert len(memory) == 300 and memory.similarity("x", "123") == pytest.approx(1.0)
    assert memory.compare([("x", "123")], 1)[0][1][0]["thought"] == "123"


def test_among_ten_thousand_traces_the_similarity_is_that_of_a_plain_search():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(10_020, 384)).astype(np.float32)
    memory = TraceMemory(lambda texts: vectors[[int(text) for text in texts]], 384, gate=OPEN)
    memory.add_many([(f"db{i % 50}", str(i)) for i in range(10_000)])
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    for i in range(10_000, 10_020):
        others = unit[:10_000][np.arange(10_000) % 50 != i % 50]
        nearest = others[np.argsort(-(others @ unit[i]))[:20]].mean(axis=0)
        expected = nearest @ unit[i] / np.linalg.norm(nearest)
        assert memory.similarity(f"db{i % 50}", str(i)) == pytest.approx(expected, abs=1e-5)


def test_save_and_load_are_exact(tmp_path):
    memory = filled(("a", "east"), ("b", "north"), ("ü", "both"))
    memory.save(tmp_path / "memory.npz")
    loaded = TraceMemory(Table(), 2, gate=OPEN).load(tmp_path / "memory.npz")
    assert (loaded.thoughts, loaded.db_ids) == (memory.thoughts, memory.db_ids)
    assert loaded.similarity("c", "west") == memory.similarity("c", "west")
    loaded.save(tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as again, np.load(tmp_path / "memory.npz") as first:
        assert set(again) == set(first) and again["vectors"].tobytes() == first["vectors"].tobytes()
    empty = TraceMemory(Table(), 2)
    empty.save(tmp_path / "empty.npz")
    assert len(TraceMemory(Table(), 2).load(tmp_path / "empty.npz")) == 0


def test_a_loaded_memory_continues_exactly(tmp_path):
    """Also where an embedding depends on the batch: what was embedded once is not embedded again."""
    def embed(texts):
        rng = np.random.default_rng(zlib.crc32(" ".join(texts).encode()))  # another batch, another vector
        return rng.normal(size=(len(texts), 4))

    def step(memory, number):
        pairs = [(f"db{i % 3}", f"thought {i * number % 17}") for i in range(8)]
        memory.prepare(pairs)
        similarities = memory.similarities(pairs[::2])
        memory.add_many(pairs[1::2])
        return similarities

    gate = MemoryGate(memory_min_words=2, memory_max_cosine=0.99)
    whole, half = TraceMemory(embed, 4, gate=gate), TraceMemory(embed, 4, gate=gate)
    for number in (1, 2, 3):
        assert step(whole, number) == step(half, number)
    half.save(tmp_path / "memory.npz")
    half = TraceMemory(embed, 4, gate=gate).load(tmp_path / "memory.npz")
    for number in (4, 5, 6):
        assert step(whole, number) == step(half, number)
    assert (half.thoughts, half.db_ids, half.rejections) == (whole.thoughts, whole.db_ids, whole.rejections)


def test_texts_are_stored_as_they_are_and_take_their_own_length(tmp_path):
    thoughts = ["a \ud800 b", "nul \0", "x\0", "日本 " * 3, "word " * 20_000, *(f"short {i}" for i in range(200))]
    memory = TraceMemory(lambda texts: np.ones((len(texts), 2)), 2, gate=replace(OPEN, memory_max_words=10**6,
                                                                                memory_min_bigrams=0.0))
    memory.add_many([("db", thought) for thought in thoughts])
    memory.save(tmp_path / "memory.npz")
    assert TraceMemory(Table(), 2).load(tmp_path / "memory.npz").thoughts == thoughts
    assert (tmp_path / "memory.npz").stat().st_size < 300_000


def test_truncated_and_foreign_files_are_refused(tmp_path):
    filled(("a", "east")).save(tmp_path / "memory.npz")
    whole = (tmp_path / "memory.npz").read_bytes()
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros((1, 2)))
    bad = {"cut": whole[:len(whole) // 2], "empty": b"", "text": b"hello",
           "other": (tmp_path / "other.npz").read_bytes(), "array": (tmp_path / "array.npy").read_bytes()}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a whole trace memory"):
            TraceMemory(Table(), 2).load(tmp_path / name)
    with pytest.raises(ValueError, match="this embedder makes 3"):
        TraceMemory(lambda texts: np.zeros((len(texts), 3)), 3).load(tmp_path / "memory.npz")
    with pytest.raises(ValueError, match="not a whole"):
        TraceMemory(Table(), 2).load(tmp_path / "absent.npz")


def test_a_file_with_any_byte_changed_or_cut_is_refused_or_the_same(tmp_path):
    memory, path, rng = filled(("a", "east"), ("b", "north")), tmp_path / "memory.npz", random.Random(0)
    memory.save(path)
    whole = path.read_bytes()
    for number in range(400):
        place = rng.randrange(len(whole))
        changed = whole[:place] + (bytes([whole[place] ^ (1 << number % 8)]) + whole[place + 1:] if number % 4 else b"")
        path.write_bytes(changed)
        subject = filled(("c", "both"))
        try:
            subject.load(path)
            assert subject.thoughts == memory.thoughts and subject.similarity("x", "both") == pytest.approx(1.0)
        except ValueError as error:
            assert "memory.npz" in str(error) and subject.thoughts == ["both"]  # as it was


def test_wrong_shapes_and_settings_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        TraceMemory(lambda texts: np.full((1, 2), np.nan), 2, gate=OPEN).add("a", "b")
    with pytest.raises(ValueError, match="embedder gave"):
        TraceMemory(lambda texts: np.zeros((1, 3)), 2, gate=OPEN).add("a", "b")
    with pytest.raises(ValueError, match="scope"):
        TraceMemory(Table(), 2, scope="all")
    with pytest.raises(ValueError, match="top_k"):
        TraceMemory(Table(), 2, top_k=0)


def test_the_hash_embedder_is_the_same_in_another_process():
    code = "from partial_credit.memory import HashEmbedder; print(HashEmbedder(64)(['join singer and concert']).tolist())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={"PYTHONHASHSEED": "7"})
    assert eval(run.stdout) == HashEmbedder(64)(["join singer and concert"]).tolist()


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_a_long_text_keeps_the_token_that_last_pooling_reads():
    import torch

    class Tokenizer:  # puts token 9 at the end of every text, as Qwen3-Embedding's does
        model_max_length = 4

        def __call__(self, texts, truncation, max_length):
            assert truncation
            return {"input_ids": [[len(w) for w in text.split()][:max_length - 1] + [9] for text in texts]}

    class Model(torch.nn.Module):
        config = type("Config", (), {"hidden_size": 10, "max_position_embeddings": 100})

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.eye(10), requires_grad=False)

        def forward(self, input_ids, attention_mask):
            assert input_ids.shape[1] <= 4
            return type("Output", (), {"last_hidden_state": self.table[input_ids]})

    embed = ModelEmbedder(Model(), Tokenizer(), pooling="last", batch=2)
    assert embed(["a bb", "a a a a a a a", "ccc"]).argmax(1).tolist() == [9, 9, 9]
    mean = ModelEmbedder(Model(), Tokenizer(), batch=2)(["a bb", "a a a a a a a", "ccc"])
    np.testing.assert_allclose(mean[1, [1, 9]], unit(np.array([3.0, 1.0])), atol=1e-6)  # rows keep their order
    np.testing.assert_allclose(mean[2, [3, 9]], unit(np.array([1.0, 1.0])), atol=1e-6)


def test_model_embedders_pool_without_padding(tmp_path):
    import torch
    from transformers import Qwen3Config, Qwen3Model

    from policy import build_tiny

    policy = build_tiny(["table singer ; keep age > 30", "count rows of concert"] * 3, seed=0, width=16, layers=1)
    mean = make_embedder("policy", policy.model.get_decoder(), policy.tokenizer)
    texts = ["count rows", "table singer ; keep age > 30 ; count rows of concert"]
    ids = torch.tensor([policy.tokenizer.encode(texts[0])])
    with torch.no_grad():
        naive = policy.model.get_decoder()(input_ids=ids).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(mean(texts)[0], unit(naive), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(mean(texts * 20), axis=1), 1.0, atol=1e-5)

    torch.manual_seed(0)
    encoder = Qwen3Model(Qwen3Config(vocab_size=len(policy.tokenizer), hidden_size=16, intermediate_size=16, head_dim=8,
                                     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))
    encoder.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    last = make_embedder(str(tmp_path))
    assert isinstance(last, ModelEmbedder) and last.pooling == "last" and last.dim == 16
    with torch.no_grad():
        naive = encoder.eval()(input_ids=ids).last_hidden_state[0, -1].numpy()
    np.testing.assert_allclose(last(texts)[0], unit(naive), atol=1e-5)
    with pytest.raises(ValueError, match="neither hash"):
        make_embedder(str(tmp_path / "absent"))


def test_reasoning_is_compared_by_its_roles():
    """What is stored and what passes the gate is the thought as written; what is embedded has no names and no values."""
    schemas = {"music": {"singer": ["name", "Birth_Year"]}, "zoo": {"animals": ["weight", "zoo name"]}}
    read, seen = Roles(schemas), []
    assert read("music", "From singer: name. Keep rows where birth_year > 1990 and name = 'Al B'.") == (
        "from table column keep rows where column value and column value")
    assert read("zoo", "From animals: weight of the Animals") == "from table column of the table"
    assert read("unknown", "From singer: name") == "from singer name"
    assert read("music", "the singer's name and the album's year, 3.5 or 4th") == (
        "the table s column and the album s column value or 4th")
    assert Roles({"x": {"t": ["song_count"]}})("x", "Count songs by song_count") == "count column by column"

    def embed(texts):
        seen.extend(texts)
        return HashEmbedder()(texts)

    gate = MemoryGate(memory_min_words=2, memory_min_columns=1, memory_min_density=0.0)
    columns = {db_id: [c for names in schema.values() for c in names] for db_id, schema in schemas.items()}
    memory = TraceMemory(embed, 512, gate=gate, columns=columns, read=read)
    thought = "From singer: name"
    memory.prepare([("music", thought)])
    assert memory.add("music", thought) and memory.thoughts == [thought] and seen == ["from table column"]
    assert memory.similarity("zoo", "From animals: weight") == pytest.approx(1.0, abs=1e-6)
    # what sounds alike is a copy within a database only, also when both come together
    assert memory.add_many([("zoo", "From animals: weight"), ("music", "From singer: birth_year"),
                            ("zoo", "From animals: zoo name")]) == [True, False, True]
    assert memory.similarity("music", thought) > 0.9  # of the zoo, not only its own
    plain = TraceMemory(HashEmbedder(), 512, gate=gate, columns=columns)
    plain.add("music", thought)
    assert plain.similarity("zoo", "From animals: weight") < 0.5
