"""policy.py and sft.py: the tiny policy, checkpoints, references, the cold start."""

import builtins
import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import grpo
import policy as policies
import sft
from policy import Policy, Reference, build_tiny, load_policy
from running import model_files
from running.errors import UserError

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
    monkeypatch.setattr(model_files, "_cached", lambda *_: None)  # nor does the cache at home count,
    monkeypatch.chdir(tmp_path)  # nor what runs in the checkout have left there
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
    with pytest.raises(UserError, match="cannot load the model in"):
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


def test_lora_reference_is_the_model_with_its_adapters_off(tiny, tmp_path):
    pytest.importorskip("peft", reason="peft is optional")
    tiny.save(tmp_path)
    subject = load_policy(str(tmp_path), lora_rank=4)
    trained = [p for p in subject.model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < 0.5 * sum(p.numel() for p in tiny.model.parameters())
    packed = grpo.pack_group(torch.tensor(tiny.tokenizer.encode(TEXTS[2])), [torch.tensor([5, 9, 6]), torch.tensor([8, 7])])
    with torch.no_grad():
        for p in trained:
            p.add_(0.3)
        adapted, _ = grpo.completion_logprobs(subject.model, packed, 1.0)
        with Reference(subject.model).active() as model:
            reference, _ = grpo.completion_logprobs(model, packed, 1.0)
    plain, _ = grpo.completion_logprobs(tiny.model.eval(), packed, 1.0)
    torch.testing.assert_close(reference, plain)
    assert (adapted - plain).abs().max() > 0.01


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


def test_supervised_losses_are_means_over_completion_and_prompt_tokens(tiny):
    pairs = _pairs(tiny)
    ours = sft.supervised_losses(tiny.model.eval(), pairs, with_prompts=True)
    terms = ([], [])
    for prompt, completion in pairs:
        row = torch.cat([prompt, completion])
        loss = F.cross_entropy(tiny.model(row[None]).logits[0, :-1], row[1:], reduction="none")
        terms[0].append(loss[len(prompt) - 1:])
        terms[1].append(loss[:len(prompt) - 1])
    for value, parts in zip(ours, terms, strict=True):
        torch.testing.assert_close(value, torch.cat(parts).mean())


@pytest.mark.parametrize("prompt_loss", [0.0, 0.3])
@pytest.mark.parametrize("name, limit", [("PASS_TOKENS", 20), ("PASS_LOGITS", 20_000)])
def test_a_batch_of_the_cold_start_in_several_passes_has_the_gradient_of_one(tiny, monkeypatch, prompt_loss, name, limit):
    pairs, model = _pairs(tiny) * 2 + _pairs(tiny)[:1], copy.deepcopy(tiny.model).double().eval()
    results = []
    for several in (False, True):
        if several:
            monkeypatch.setattr(sft, name, limit)
        parts = sft.passes(pairs, len(tiny.tokenizer), prompt_loss > 0)
        assert (len(parts) > 1) is several
        assert sorted(map(id, (pair for part in parts for pair in part))) == sorted(map(id, pairs))
        model.zero_grad()
        loss = sft._backward(model, pairs, prompt_loss, contextlib.nullcontext)
        results.append((loss, torch.cat([weight.grad.flatten() for weight in model.parameters()])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-14)


def test_cold_start_learns_and_is_reproducible(tiny):
    def run():
        subject = build_tiny(TEXTS, seed=2, vocab_size=320, width=32, layers=1)
        config = sft.SFTConfig(cold_start_steps=100, cold_start_batch=2, cold_start_lr=1e-2)
        loss = sft.cold_start(subject.model, _pairs(tiny), config, seed=0)
        return loss, torch.cat([p.flatten() for p in subject.model.parameters()])

    (loss, weights), (_, again) = run(), run()
    assert loss < 0.2 and torch.equal(weights, again)


def test_batches_show_every_pair_before_any_again():
    batches = sft._batches(5, 2, 10, seed=0)
    flat = [i for batch in batches for i in batch]
    assert len(batches) == 10 and all(sorted(flat[i:i + 5]) == list(range(5)) for i in range(0, 20, 5))


def test_template_traces_name_tables_columns_and_clauses():
    schema = {"singer": ["id", "name", "age"], "concert": ["sid", "year"]}
    sql = "SELECT T1.name FROM singer AS T1 JOIN concert AS T2 ON T1.id = T2.sid WHERE year > 3 AND name != 'age' LIMIT 1"
    assert sft.template_trace(sql, schema) == "tables singer concert ; columns id name sid year ; clauses join where limit"
    assert sft.template_trace("SELECT * FROM singer", schema) == "tables singer ; clauses select"
