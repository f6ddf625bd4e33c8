"""policy.py and sft.py: the tiny policy, checkpoints, references, the cold start."""

import builtins
import contextlib
import copy
import itertools
import json
import os
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import cold_start
import grpo
import policy as policies
import train
from common.errors import UserError
from engine import tree
from engine.fast import FAST
from grpo import PLAIN
from models import model_files
from models.adapters import merged_weights
from policy import Policy, Reference, build_tiny, load_policy, load_weights
from prompts.answer_format import AnswerFormat
from scoring import voting

TEXTS = ["table singer ; keep age > 350 ; count rows", "SELECT COUNT(*) FROM singer WHERE age > 350",
         "singer ( singer_id , name , age )\nquestion : How many singers above 1250 ?\nanswer :\n"] * 4


@pytest.fixture(scope="module")
def tiny():
    return build_tiny(TEXTS, seed=0, vocab_size=320, width=32, layers=2)


def test_tokenizer_keeps_texts_tags_and_whole_numbers(tiny):
    for text in (*TEXTS, "<think> a </think> b", "naïve 東京 \t 'x''y' 12345 0.5"):
        assert tiny.tokenizer.decode(tiny.tokenizer.encode(text)) == text
    assert len(tiny.tokenizer.encode("350")) == len(tiny.tokenizer.encode("<think>")) == 1
    assert len(tiny.tokenizer.encode("3507")) > 1


def test_a_saved_policy_loads_with_plain_transformers_and_says_the_same(tiny, tmp_path):
    tiny.save(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompt = tiny.tokenizer.encode(TEXTS[2] + "<think>")
    assert tokenizer.encode(TEXTS[2] + "<think>") == prompt
    ids = torch.tensor([prompt])
    assert torch.equal(model(ids).logits, tiny.model.eval()(ids).logits)
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)[0, len(prompt):]
    again = load_policy(str(tmp_path))
    ours = grpo.sample_groups(again.model, [ids[0]], grpo.GRPOConfig(max_completion_tokens=12), eos_ids=again.eos_ids,
                              group_size=1, temperature=0.0)[0].completions[0]
    assert ours.tolist() == theirs.tolist() and again.eos_ids == tiny.eos_ids


def test_decode_drops_the_end_token_only(tiny):
    ids = tiny.tokenizer.encode("<think> a </think> b") + [tiny.eos_ids[0]]
    assert tiny.decode(torch.tensor(ids)) == "<think> a </think> b"


def test_every_end_token_of_the_checkpoint_ends_a_completion(tiny, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny.tokenizer), hidden_size=16, intermediate_size=16,
                                         num_hidden_layers=1, num_attention_heads=2))
    model.generation_config.eos_token_id = [5, 7]
    Policy(model, tiny.tokenizer, ()).save(tmp_path)
    assert load_policy(str(tmp_path)).eos_ids == (tiny.tokenizer.eos_token_id, 5, 7)


def test_missing_and_broken_models_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "hub_answers", lambda: False)
    monkeypatch.chdir(tmp_path)  # what runs have left in the checkout does not count
    for name in ("qwen2.5-3b", "nobody/nothing"):
        with pytest.raises(UserError, match="neither a local folder nor reachable"):
            load_policy(name)
    for name in ("runs/demo/best", "m.gguf", str(tmp_path / "absent"), "./absent"):
        with pytest.raises(UserError, match=f"there is no model in {name}: `python train.py` writes one"):
            load_policy(name)
    with pytest.raises(UserError, match="hf download Qwen/Qwen2.5-3B-Instruct"):
        load_policy("qwen2.5-3b")
    with pytest.raises(UserError, match="no config.json"):
        load_policy(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json, line 1: broken JSON"):
        load_policy(str(tmp_path))


def test_a_reference_is_a_frozen_copy(tiny):
    subject = build_tiny(TEXTS, seed=1, vocab_size=320, width=16, layers=1)
    reference = Reference(subject.model)
    before = [p.clone() for p in reference.model.parameters()]
    with torch.no_grad():
        for p in subject.model.parameters():
            p.add_(1.0)
    with reference.active() as model:
        assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, model.parameters(), strict=True))


# ---- LoRA


@pytest.fixture
def adapted(tiny, tmp_path):
    """A LoRA policy whose cold start has moved its adapters."""
    pytest.importorskip("peft", reason="peft is optional")
    tiny.save(tmp_path / "base")
    subject = load_policy(str(tmp_path / "base"), lora_rank=4)
    config = cold_start.SFTConfig(cold_start_steps=20, cold_start_batch=2, cold_start_lr=1e-2)
    cold_start.cold_start(subject.model, _pairs(tiny), config, seed=0)
    return subject


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


def trained_of(model):
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def test_the_reference_of_adapters_is_the_policy_of_step_0_not_the_base(tiny, adapted):
    trained, states = trained_of(adapted.model), torch.get_rng_state()
    assert 0 < sum(p.numel() for _, p in trained) < 0.5 * sum(p.numel() for p in tiny.model.parameters())
    start = logits(adapted.model)
    assert (start - logits(tiny.model)).abs().max() > 0.1  # the cold start taught something
    reference = Reference(adapted.model)
    assert torch.equal(torch.get_rng_state(), states)
    optimizer = torch.optim.AdamW([p for p in adapted.model.parameters() if p.requires_grad], lr=0.1)
    for moved in (False, True, True):
        with reference.active() as model:
            assert torch.equal(logits(model), start)
        with pytest.raises(ZeroDivisionError), reference.active():
            1 / 0  # noqa: B018
        now = trained_of(adapted.model)  # the same objects, and only they are trained
        assert [(name, id(p)) for name, p in now] == [(name, id(p)) for name, p in trained]
        assert torch.equal(logits(adapted.model), start) is not moved
        adapted.model(torch.arange(3, 40)[None]).logits.square().mean().backward()
        assert all(p.grad is not None for p in optimizer.param_groups[0]["params"])
        optimizer.step()


def test_only_the_trained_adapters_are_saved_and_the_reference_is_found_again_in_step_0(adapted, tmp_path):
    start = logits(adapted.model)
    Reference(adapted.model)
    adapted.save(tmp_path / "step-0")
    assert {path.name for path in (tmp_path / "step-0").iterdir() if "adapter" in path.name or path.is_dir()} == {
        "adapter_config.json", "adapter_model.safetensors"}
    assert all("reference" not in name for name in load_file(tmp_path / "step-0" / "adapter_model.safetensors"))
    with torch.no_grad():
        for _, weight in trained_of(adapted.model):
            weight.add_(0.1)
    end = logits(adapted.model)
    adapted.save(tmp_path / "step-9")
    again = load_policy(str(tmp_path / "step-9"))
    reference = Reference(again.model)
    with reference.active() as model:
        assert torch.equal(logits(model), end)
    reference.load(tmp_path / "step-0")
    with reference.active() as model:
        assert torch.equal(logits(model), start)
    assert torch.equal(logits(again.model), end)


def test_a_reference_copy_is_found_again_in_step_0(tiny, tmp_path):
    tiny.save(tmp_path)
    moved = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(0.1)
    reference = Reference(moved, "cpu")
    reference.load(tmp_path)
    with reference.active() as model:
        assert torch.equal(logits(model), logits(tiny.model))


@pytest.mark.parametrize("lora", [(), ("--lora-rank", "2")])
def test_the_first_update_of_a_run_with_a_cold_start_has_no_kl_and_a_resumed_run_the_same(tiny, tiny_db, tmp_path, monkeypatch, lora):
    if lora:
        pytest.importorskip("peft", reason="peft is optional")
    tiny.save(tmp_path / "base")
    columns = ("name", "country", "age", "singer_id", "HomeTown", "name, age")
    (tmp_path / "own.json").write_text(json.dumps([
        {"question": f"Show the {column} of all", "db_id": tiny_db.stem, "sql": f"SELECT {column} FROM singer",
         "trace": f"{column} of singer", "split": "train"} for column in columns]))

    def run(folder, steps, *more):
        flags = ["--model", tmp_path / "base", *lora, "--data", tmp_path / "own.json", "--data-dir", tiny_db.parent, "--cold-start-steps", 8, "--cold-start-lr", 1e-2, "--kl-coef", 0.1,
                 "--lr", 1e-2, "--steps", steps, "--prompts-per-step", 1, "--group-size", 2, "--max-completion-tokens", 8,
                 "--eval-every", 0, "--test-questions", 0, "--save-every", 1, "--rewards", "format", "--sql-workers", 1,
                 "--advantage-scale", "none", "--prompt-style", "compact", "--lr-warmup", 0, "--threads", 1,
                 "--output", tmp_path / folder, *more]
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags)])
        assert train.main() == 0
        return [json.loads(line)["kl"] for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]

    whole = run("whole", 3)
    assert whole[0] == 0.0
    run("resumed", 3)
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").glob("checkpoints/step-*/*.safetensors")]
    assert names and all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
                         for name in names)  # adapters begin at random: by the seed
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-3")
    assert run("resumed", 3, "--resume") == whole


def test_a_lora_policy_warns_of_nothing(tiny, tmp_path):
    pytest.importorskip("peft", reason="peft is optional")
    tiny.save(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subject = load_policy(str(tmp_path / "base"), lora_rank=2)
        Reference(subject.model)
        subject.save(tmp_path / "adapters")
        subject.save_merged(tmp_path / "merged")
        load_policy(str(tmp_path / "adapters"))
        load_policy(str(tmp_path / "merged"))


def test_adapters_that_do_not_fit_are_refused(adapted, tmp_path):
    adapted.save(tmp_path / "adapters")
    file = tmp_path / "adapters" / "adapter_model.safetensors"
    whole = load_file(file)
    first = sorted(whole)[0]
    for weights, sentence in ((dict(list(whole.items())[1:]), "lacks 1 weight"),
                              (whole | {"base_model.model.other": torch.ones(2)}, "has no place for 1 weight .*other"),
                              (whole | {first: torch.ones(3, 3)}, "size mismatch|other shapes")):
        save_file(weights, file)
        with pytest.raises(UserError, match=sentence):
            load_policy(str(tmp_path / "adapters"))
    save_file(whole, file)
    with pytest.raises(UserError, match="have rank 4: leave out --lora-rank 8"):
        load_policy(str(tmp_path / "adapters"), lora_rank=8)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    embeddings = next(name for name in weights if "embed_tokens" in name)
    for moved, sentence in ((0.0, ""), (0.1, "were trained on other weights than")):  # bf16 forgives rounding alone
        save_file(weights | {embeddings: weights[embeddings] + moved}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=sentence) if moved else contextlib.nullcontext():
            load_policy(str(tmp_path / "adapters"), dtype=torch.bfloat16)
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not name the model that the adapters were trained on"):
        load_policy(str(tmp_path / "adapters"))


def test_weights_are_loaded_into_the_live_model(tiny, adapted, tmp_path):
    """Merged weights and adapters into a LoRA policy, plain weights into a plain one; the tensors stay where they are."""
    at_best = logits(adapted.model)
    adapted.save(tmp_path / "adapters")
    adapted.save_merged(tmp_path / "merged")
    with torch.no_grad():
        for _, weight in trained_of(adapted.model):
            weight.add_(0.1)
    places = [weight.data_ptr() for weight in adapted.model.parameters()]
    load_weights(adapted, tmp_path / "adapters")
    assert torch.equal(logits(adapted.model), at_best)
    load_weights(adapted, tmp_path / "merged")
    torch.testing.assert_close(logits(adapted.model), at_best)
    assert torch.equal(logits(adapted.model), logits(load_policy(str(tmp_path / "merged")).model))
    assert places == [weight.data_ptr() for weight in adapted.model.parameters()]
    plain = Policy(copy.deepcopy(tiny.model), tiny.tokenizer, tiny.eos_ids)
    plain.save(tmp_path / "plain")
    expected = logits(plain.model)
    with torch.no_grad():
        plain.model.model.norm.weight.add_(1.0)
    load_weights(plain, tmp_path / "plain")
    assert torch.equal(logits(plain.model), expected)
    other = build_tiny(TEXTS, seed=1, vocab_size=320, width=16, layers=1)
    with pytest.raises(UserError, match="do not fit .*has other shapes of"):
        load_weights(other, tmp_path / "plain")


def test_nothing_is_copied_on_the_way_to_a_merged_folder(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("a second model was made"))
    monkeypatch.setattr(type(adapted.model), "merge_and_unload", lambda *_: pytest.fail("merged in place"), raising=False)
    before = {name: weight.clone() for name, weight in adapted.model.state_dict().items()}
    merged_weights(adapted.model)
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.model.state_dict().items())


# ---- what is wrong with a checkpoint


def test_what_is_saved_has_the_mode_of_the_umask(adapted, tmp_path):
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            adapted.save(tmp_path / f"{mask}" / "adapters")
            adapted.save_merged(tmp_path / f"{mask}" / "merged")
        finally:
            os.umask(before)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / f"{mask}").rglob("*") if path.is_file()}
        assert set(modes.values()) == {0o666 & ~mask} and "model.safetensors" in modes


@pytest.fixture
def checkpoint(tiny, tmp_path):
    tiny.save(tmp_path / "model")
    return tmp_path / "model"


def changed(folder, change):
    """Rewrites the weights of a checkpoint."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def untied(folder):
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


UNFIT = {
    "a layer is missing": (lambda w: {n: t for n, t in w.items() if ".layers.1." not in n}, r"lacks 12 weights \(model.layers.1.*, …\)"),
    "one more": (lambda w: w | {"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}, r"has no place for 1 weight \(model.layers.7"),
    "another shape": (lambda w: w | {"model.norm.weight": torch.ones(7)}, r"has other shapes of 1 weight \(model.norm.weight\)"),
    "another vocabulary": (lambda w: w | {"model.embed_tokens.weight": torch.ones(99, 32)}, r"has other shapes of .*embed_tokens"),
    "some prefixed": (lambda w: {("module." + n if "mlp" in n else n): t for n, t in w.items()}, "lacks .*; has no place for"),
    "another prefix": (lambda w: {"student." + n: t for n, t in w.items()}, "lacks"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_weights_that_do_not_fit_end_the_run(checkpoint, name, capfd):
    change, sentence = UNFIT[name]
    changed(checkpoint, change)
    with pytest.raises(UserError, match=f"the weights in {checkpoint} do not fit its config: it {sentence}"):
        load_policy(str(checkpoint))
    assert capfd.readouterr() == ("", "")  # transformers' own report would stand beside the sentence


def test_a_tied_head_may_be_absent_and_an_untied_one_not(checkpoint):
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    load_policy(str(checkpoint))
    untied(checkpoint)
    with pytest.raises(UserError, match=r"lacks 1 weight \(lm_head.weight\)"):
        load_policy(str(checkpoint))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_known_prefixes_are_taken_off_and_said(checkpoint, tiny, prefix, capsys):
    changed(checkpoint, lambda weights: {prefix + name: weight for name, weight in weights.items()})
    assert torch.equal(logits(load_policy(str(checkpoint)).model), logits(tiny.model))
    assert f"the prefix {prefix} is taken off" in capsys.readouterr().err


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return change


def _without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def _larger_tokenizer(folder):
    larger = build_tiny(TEXTS, seed=0, vocab_size=340, width=16, layers=1).tokenizer
    larger.add_tokens(["<more>"] * 1 + [f"<{i}>" for i in range(30)])
    larger.save_pretrained(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n"
BROKEN = {
    "LFS weights": (_write("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer, .* `git lfs pull`"),
    "LFS tokenizer": (_write("tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
    "truncated": (_cut, "model.safetensors is truncated: it has .* bytes of"),
    "header cut": (_write("model.safetensors", b"\xff\0\0"), "model.safetensors is empty, truncated or damaged"),
    "not safetensors": (_write("model.safetensors", b"\x10" + b"\0" * 7 + b"nothing like JSON"), "is empty, truncated or damaged"),
    "no weights": (_without("model.safetensors"), "has a config but no weights"),
    "no tokenizer": (_without("tokenizer.json"), "has no tokenizer"),
    "empty tokenizer": (_write("tokenizer.json", b""), "cannot load the model in"),
    "large tokenizer": (_larger_tokenizer, "has ids up to 3.., but the model's embedding has only 324 rows"),
    "4 bits": (_config(quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}), r"quantised \(bitsandbytes, 4 bits\)"),
    "GPTQ": (_config(quantization_config={"bits": 4, "quant_method": "gptq"}), r"quantised \(gptq, 4 bits\)"),
    "AWQ": (_config(quantization_config={"bits": 4, "quant_method": "awq"}), r"quantised \(awq, 4 bits\)"),
    "FP8": (_config(quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\)"),
    "unknown kind": (_config(model_type="nonsense"), "cannot load the model in"),
    "no heads": (_config(num_attention_heads=0), "cannot load the model in"),
    "wrong type": (_config(num_hidden_layers="two"), "cannot load the model in"),
    "no kind": (_write("config.json", b"{}"), "config.json names no model_type"),
    "config is a list": (_write("config.json", b"[]"), "config.json names no model_type"),
    "an index without its part": (lambda folder: (_without("model.safetensors")(folder), _write(
        "model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}')(folder)), "cannot read .*gone.safetensors"),
    "a broken index": (lambda folder: (_without("model.safetensors")(folder), _write(
        "model.safetensors.index.json", b"[]")(folder)), "does not say which file holds which weight"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_sentence(checkpoint, name):
    change, sentence = BROKEN[name]
    change(checkpoint)
    with pytest.raises(UserError, match=sentence) as caught:
        load_policy(str(checkpoint))
    assert "\n" not in str(caught.value) and str(checkpoint) in str(caught.value)


def test_the_folder_of_a_run_names_its_policy(tiny, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text('{"steps": 3}')
    with pytest.raises(UserError, match="is the folder of a run, not of a model: it has saved no policy yet"):
        load_policy(str(run))
    for step in (9, 10):
        tiny.save(run / "checkpoints" / f"step-{step}")
    (run / "checkpoints" / "step-11-backup").mkdir()  # somebody else's
    for folder in (run, run / "checkpoints"):
        with pytest.raises(UserError, match=f"use {run}/checkpoints/step-10$"):
            load_policy(str(folder))
    tiny.save(run / "best")
    with pytest.raises(UserError, match=f"use {run}/best$"):
        policies.config_of(str(run))
    load_policy(str(run / "best"))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match="is a file, but neither a model folder nor a GGUF file"):
        load_policy(str(tmp_path / "weights.bin"))


def test_prompts_longer_than_the_positions_of_a_model_are_told(tiny):
    policies.check_positions(tiny, 4000, 96)
    with pytest.raises(UserError, match="prompts of 4000 tokens and completions of 97 are longer than the 4096 positions"):
        policies.check_positions(tiny, 4000, 97)
    with pytest.raises(UserError, match="prompts of 4000 tokens"):  # who samples from a model need not remember to ask
        voting.sample_candidates(tiny, [[5], [5] * 4000], voting.Exam(AnswerFormat(), 97))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_weight_with_nan_is_named(checkpoint, value):
    def broken(weights):
        weights["model.layers.1.mlp.up_proj.weight"][0, 3] = weights["model.norm.weight"][2] = float(value)
        return weights

    changed(checkpoint, broken)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(UserError, match=f"the weights in {checkpoint} are broken: model.layers.1.mlp.up_proj.weight and 1 more holds NaN"):
            load_policy(str(checkpoint), dtype=dtype)


# ---- token ids


def test_token_0_may_end_a_completion_whoever_says_so(tiny, tmp_path):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    assert tokenizer.eos_token_id == 0
    model = copy.deepcopy(tiny.model)
    for configured, expected in ((0, (0,)), ([0], (0,)), ([5, 0], (0, 5)), (None, (0,)), (5, (0, 5))):
        model.generation_config.eos_token_id = configured
        assert policies._eos_ids(model, tokenizer) == expected
    tokenizer.eos_token = None
    for configured, expected in ((0, (0,)), ([0, 5], (0, 5))):
        model.generation_config.eos_token_id = configured
        assert policies._eos_ids(model, tokenizer) == expected
        assert Policy(model, tokenizer, expected).end_id == 0
    model.generation_config.eos_token_id = None
    with pytest.raises(UserError, match="no EOS token"):
        policies._eos_ids(model, tokenizer)


def test_the_token_with_which_the_chat_template_closes_an_answer_ends_a_completion(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    assert tokenizer.eos_token == "<|endoftext|>"
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for closing, expected in (("<end_of_turn>", (0, end)), (" <end_of_turn>\n", (0, end)), ("\n", (0,)),
                              ("{{ raise_exception('no') }}", (0,))):
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + closing + "{% endfor %}"
        assert policies._eos_ids(tiny.model, tokenizer) == expected
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>"]}, replace_extra_special_tokens=False)
    parts = "{% for m in messages %}<start_of_turn>{% for part in m.content %}{{ part.text }}{% endfor %}<end_of_turn>{% endfor %}"
    tokenizer.chat_template = parts  # which prints nothing of a plain text
    assert policies._eos_ids(tiny.model, tokenizer) == (0, end)


def test_lora_without_peft_says_what_to_install(tiny, tmp_path, monkeypatch):
    tiny.save(tmp_path)
    plain_import = builtins.__import__

    def no_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return plain_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_peft)
    with pytest.raises(UserError, match="requirements-extra.txt"):
        load_policy(str(tmp_path), lora_rank=4)


def test_free_space_of_a_folder_yet_to_be_made(tmp_path):
    assert policies.free_space(tmp_path / "a" / "b") > 0


# ---- sft


def _pairs(tiny):
    encode = lambda text: torch.tensor(tiny.tokenizer.encode(text))  # noqa: E731
    return [(encode(TEXTS[2]), encode("<think> count </think> SELECT 1")), (encode("x"), encode("<think> a </think> b c d"))]


def _questions(tiny):
    """Pairs on two databases, in turns."""
    texts = [(f"{TEXTS[2]}question : How many are older than 1250 ?", "<think> count </think> SELECT 1"),
             ("concert ( year )\nquestion : Years ?", "<think> a </think> b c d"),
             (f"{TEXTS[2]}question : How many ?", "<think> age </think> SELECT 2"),
             ("concert ( year )\nquestion : Years above 350 ?", "<think> a </think> b"),
             (f"{TEXTS[2]}question : How many singers ?", "<think> name </think> SELECT 1, 3")]
    return [tuple(torch.tensor(tiny.tokenizer.encode(text)) for text in pair) for pair in texts]


def pass_size(pairs):
    """Tokens of a pass over these pairs."""
    return tree.Tree([torch.cat(pair) for pair in pairs]).size


def test_supervised_losses_are_means_over_completion_and_prompt_tokens(tiny):
    pairs = _pairs(tiny)
    ours = cold_start.supervised_losses(tiny.model.eval(), pairs, with_prompts=True)
    terms = ([], [])
    for prompt, completion in pairs:
        row = torch.cat([prompt, completion])
        loss = F.cross_entropy(tiny.model(row[None]).logits[0, :-1], row[1:], reduction="none")
        terms[0].append(loss[len(prompt) - 1:])
        terms[1].append(loss[:len(prompt) - 1])
    for value, parts in zip(ours, terms, strict=True):
        torch.testing.assert_close(value, torch.cat(parts).mean())


@pytest.mark.parametrize("prompt_loss", [0.0, 0.3])
def test_a_batch_of_the_cold_start_in_several_passes_has_the_gradient_of_one(tiny, prompt_loss):
    """With either engine; the model's norms are in float32."""
    pairs, model = _questions(tiny), copy.deepcopy(tiny.model).double().eval()
    results, whole = [], pass_size(pairs)
    for tokens, engine, count in ((whole, FAST, 1), (whole - 1, FAST, 2), (1, FAST, 5), (whole, PLAIN, 1)):
        parts = cold_start.passes(pairs, tokens)
        assert len(parts) == count and (tokens == 1 or all(pass_size(part) <= tokens for part in parts))
        assert sorted(id(row) for part in parts for pair in part for row in pair) == sorted(
            id(row) for pair in pairs for row in pair)
        model.zero_grad()
        loss = cold_start._backward(model, pairs, prompt_loss, contextlib.nullcontext, tokens, engine)
        results.append((loss, torch.cat([weight.grad.flatten() for weight in model.parameters()])))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-5, atol=1e-7)


def test_what_questions_on_one_database_have_in_common_goes_through_the_model_once(tiny, monkeypatch):
    pairs, seen = _questions(tiny), []
    assert sorted(map(sorted, cold_start.families([prompt for prompt, _ in pairs]))) == [[0, 2, 4], [1, 3]]
    monkeypatch.setattr(tree, "LEAST", 0)
    whole = sum(len(row) for pair in pairs for row in pair)
    schemas = [tiny.tokenizer.encode(text) for text in (f"{TEXTS[2]}question : How many", "concert ( year )\nquestion : Years")]
    assert pass_size(pairs) <= whole - 2 * len(schemas[0]) - len(schemas[1])
    decoder = tiny.model.get_decoder()
    monkeypatch.setattr(decoder, "forward", lambda *a, f=decoder.forward, **k: (seen.append(k["input_ids"]), f(*a, **k))[1])
    cold_start.supervised_losses(tiny.model.eval(), *cold_start.passes(pairs, whole))
    assert [row.shape for row in seen] == [(1, pass_size(pairs))]
    with torch.no_grad():
        loss = cold_start.supervised_losses(tiny.model, pairs)[0]  # in any order
        each = [cold_start.supervised_losses(tiny.model, [pair])[0] * len(pair[1]) for pair in pairs]
    torch.testing.assert_close(loss, sum(each) / sum(len(completion) for _, completion in pairs))


def test_cold_start_learns_and_is_reproducible(tiny):
    def run():
        subject = build_tiny(TEXTS, seed=2, vocab_size=320, width=32, layers=1)
        config = cold_start.SFTConfig(cold_start_steps=100, cold_start_batch=2, cold_start_lr=1e-2)
        loss = cold_start.cold_start(subject.model, _pairs(tiny), config, seed=0)
        return loss, torch.cat([p.flatten() for p in subject.model.parameters()])

    (loss, weights), (_, again) = run(), run()
    assert loss < 0.2 and torch.equal(weights, again)


def test_batches_show_every_pair_before_any_again():
    batches = cold_start._batches(5, 2, 10, seed=0)
    flat = [i for batch in batches for i in batch]
    assert len(batches) == 10 and all(sorted(flat[i:i + 5]) == list(range(5)) for i in range(0, 20, 5))


def test_batches_show_a_few_questions_on_one_database_side_by_side():
    kin = [list(range(9)), [9], list(range(10, 14))]
    flat = [i for batch in cold_start._batches(14, 7, 4, 0, kin) for i in batch]
    assert sorted(flat[:14]) == sorted(flat[14:]) == list(range(14)) and flat[:14] != flat[14:]
    runs = [len(list(run)) for _, run in itertools.groupby(flat[:14], lambda i: i // 9 + i // 10)]
    assert sum(runs) == 14 and max(runs) >= cold_start.TOGETHER


def test_template_traces_name_tables_columns_and_clauses():
    schema = {"singer": ["id", "name", "age"], "concert": ["sid", "year"]}
    sql = "SELECT T1.name FROM singer AS T1 JOIN concert AS T2 ON T1.id = T2.sid WHERE year > 3 AND name != 'age' LIMIT 1"
    assert cold_start.template_trace(sql, schema) == "tables singer concert ; columns id name sid year ; clauses join where limit"
    assert cold_start.template_trace("SELECT * FROM singer", schema) == "tables singer ; clauses select"
