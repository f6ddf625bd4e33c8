"""Precision and memory: autocast, gradient checkpointing, the reference elsewhere, adapters merged."""

import copy
import json
import sys
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
from engine.bf16 import weights_to_sample_with
from engine.fast import FAST
from policy import Reference, build_tiny, checkpoint_activations, load_for_sampling, load_policy, prefers_bf16
from settings import parse_settings

TEXTS = ["table singer ; keep age > 350 ; count rows", "SELECT COUNT(*) FROM singer WHERE age > 350"] * 4
CONFIG = grpo.GRPOConfig(group_size=4, max_completion_tokens=8, kl_coef=0.0)
ADVANTAGES = torch.tensor([[1.0, -1.0, 0.5, -0.5]])


@pytest.fixture(scope="module")
def tiny():
    return build_tiny(TEXTS, seed=0, vocab_size=320, width=32, layers=2)


def sampled(policy, seed=0):
    prompt = torch.tensor(policy.tokenizer.encode(TEXTS[0]))
    return grpo.sample_groups(policy.model, [prompt], CONFIG, eos_ids=policy.eos_ids,
                              seeds=[seed], engine=FAST)


def updated(model, groups, config=CONFIG):
    """A copy of the model after policy_update, and its statistics."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    stats = grpo.policy_update(model, optimizer, grpo.micro_batches(groups, ADVANTAGES, config), config, FAST)
    return model, stats


def test_autocast_never_computes_with_weights_of_before_an_update(tiny):
    """It keeps 16-bit copies of the weights; the second update of a rollout must not see those of the first."""
    groups, config, ends = sampled(tiny), grpo.GRPOConfig(**vars(CONFIG) | {"updates_per_rollout": 3}), []
    for cache in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            ends.append(updated(tiny.model, groups, config))
    (one, stats), (two, expected) = ends
    assert stats == expected and stats["ratio_max"] > 1.01
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_autocast_keeps_the_fast_ways_of_sampling_and_updating(tiny):
    """Rounding does not decide whether a model can be run so."""
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error", UserWarning)
        fresh = build_tiny(TEXTS, seed=1, vocab_size=320, width=64, layers=4)
        updated(fresh.model, sampled(fresh))


def test_bf16_weights_to_sample_with_stay_in_place_and_are_those_of_now(tiny):
    model = copy.deepcopy(tiny.model)
    with weights_to_sample_with(model) as same:
        assert same is model  # no bf16 arithmetic is asked for
    places = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), weights_to_sample_with(model) as sampler:
            assert sampler.model.embed_tokens.weight is model.lm_head.weight  # which it is tied to
            rounded = 0
            for new, old in zip(*(dict(one.named_parameters(remove_duplicate=False)).values() for one in (sampler, model)),
                                strict=True):
                if new is not old:
                    assert new.dtype == torch.bfloat16 and torch.equal(new, old.bfloat16())
                    rounded += 1
            assert rounded == 1 + 2 * (7 + 3)  # lm_head; the matrices and biases of the layers, not their norms
            places.append([weight.data_ptr() for weight in sampler.parameters()])
        updated_in_place = torch.optim.SGD(model.parameters(), lr=1.0)
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        updated_in_place.step()
    assert places[0] == places[1]


def test_a_bf16_sampler_rounds_where_the_trainer_does():
    """With rounded sums of layers and rounded scores they were 0.04 nats a token apart here."""
    fresh = build_tiny(TEXTS, seed=2, vocab_size=320, width=64, layers=6)
    for weight in fresh.model.parameters():
        weight.data.mul_(3 if weight.dim() > 1 else 1)
    with torch.autocast("cpu", torch.bfloat16):
        groups = sampled(fresh)
        assert updated(fresh.model, groups)[1]["sampler_gap"] < 0.004


@pytest.mark.parametrize("capability, wanted", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_bf16_is_chosen_on_cards_that_have_it(monkeypatch, capability, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert [prefers_bf16(parameters, gpu=True) for parameters in (0, 3e9)] == [wanted, wanted]
    loaded = {}
    monkeypatch.setattr("policy.load_policy", lambda name, **options: loaded.update(options))
    load_for_sampling("qwen2.5-3b")
    assert loaded == {"device": "cuda", "dtype": torch.bfloat16 if wanted else torch.float32}
    s = parse_settings(["--model", "qwen2.5-3b", "--optimizer-device", "cpu", "--lora-rank", "8"])
    assert s.grpo.sampler_cap == (2.0 if wanted else 0.0)


def test_gradient_checkpointing_changes_no_weight_and_uses_no_deprecated_call(tiny):
    groups = sampled(tiny)
    plain, _ = updated(tiny.model, groups)
    model = copy.deepcopy(tiny.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        checkpoint_activations(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    again, _ = updated(model, groups)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))


def test_gradient_checkpointing_before_the_call_was_renamed():
    class Older:
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            self.options = gradient_checkpointing_kwargs

    model = Older()
    checkpoint_activations(model)
    assert model.options == {"use_reentrant": False}


def test_a_reference_elsewhere_is_lent_for_its_pass_and_comes_back(tiny):
    """A dtype stands for a GPU, as `Tensor.to` takes either."""
    reference, away = Reference(tiny.model, "cpu"), torch.float64
    before = [(p.data_ptr(), p.clone()) for p in reference.model.parameters()]
    batch, = grpo.micro_batches(sampled(tiny), ADVANTAGES, CONFIG)
    with reference.active() as model:
        grpo.reference_logprobs(model, [batch], CONFIG, FAST)
    expected = batch.ref_logps
    with reference.active(away) as model:
        assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {away}
        assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied
        grpo.reference_logprobs(model, [batch], CONFIG, FAST)
        torch.testing.assert_close(batch.ref_logps.float(), expected)
    with pytest.raises(ZeroDivisionError), reference.active(away):
        1 / 0  # noqa: B018
    for parameter, (place, value) in zip(reference.model.parameters(), before, strict=True):
        assert parameter.data_ptr() == place and torch.equal(parameter, value)


@pytest.fixture(scope="module")
def adapted(tiny, tmp_path_factory):
    pytest.importorskip("peft", reason="peft is optional")
    folder = tmp_path_factory.mktemp("base")
    tiny.save(folder)
    policy = load_policy(str(folder), lora_rank=4)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return policy


def test_a_merged_policy_loads_with_plain_transformers_and_says_the_same(adapted, tiny, tmp_path):
    adapted.save_merged(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    prompt = torch.tensor([tiny.tokenizer.encode(TEXTS[0])])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    theirs = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1]:]
    greedy = [grpo.sample_groups(one.model, [prompt[0]], grpo.GRPOConfig(max_completion_tokens=12), eos_ids=one.eos_ids,
                                 group_size=1, temperature=0.0, engine=FAST)[0].completions[0] for one in (adapted, tiny)]
    assert tokenizer.decode(greedy[0]) == tokenizer.decode(theirs)
    assert greedy[0].tolist() != greedy[1].tolist()  # the adapters speak


def test_adapters_on_a_bf16_base_are_float32(adapted, tmp_path):
    adapted.save(tmp_path)
    for policy in (load_policy(str(tmp_path), dtype=torch.bfloat16),
                   load_policy(adapted.model.peft_config["default"].base_model_name_or_path, lora_rank=4, dtype=torch.bfloat16)):
        kinds = {(p.requires_grad, p.dtype) for p in policy.model.parameters()}
        assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_adapters_are_sampled_unmerged_beside_a_base_that_is_not_copied(adapted, tmp_path):
    adapted.save(tmp_path)
    policy = load_policy(str(tmp_path), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        with weights_to_sample_with(policy.model) as sampler:
            shared = [new.data_ptr() == old.data_ptr() for new, old in zip(sampler.parameters(), policy.model.parameters(), strict=True)]
            assert shared == [not weight.requires_grad for weight in policy.model.parameters()]
        groups = sampled(policy)
        stats = updated(policy.model, groups)[1]
    assert stats["sampler_gap"] < 0.02


def test_what_merging_rounds_away_is_kept_beside_the_merged_weights(adapted, tmp_path, monkeypatch, capsys):
    base = adapted.model.peft_config["default"].base_model_name_or_path
    policy, prompt = load_policy(base, lora_rank=4, dtype=torch.bfloat16), torch.arange(3, 12)[None]
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(3e-4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.save_merged(tmp_path / "best")

    def answers(one):
        with torch.no_grad():
            return one.model.float()(input_ids=prompt).logits

    sampler = load_for_sampling(str(tmp_path / "best"))
    monkeypatch.setitem(sys.modules, "peft", None)
    merged = load_for_sampling(str(tmp_path / "best"))
    assert "unmerged they need peft" in capsys.readouterr().err
    whole, coarse = (answers(load_policy(base, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    learned, kept, rounded = answers(policy) - coarse, answers(sampler) - whole, answers(merged) - coarse
    assert (kept - learned).norm() < 0.05 * learned.norm() < 0.3 * learned.norm() < (rounded - learned).norm()


@pytest.mark.parametrize("precision, dtype", [("auto", torch.float32), ("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_policy_is_asked_in_the_precision_of_its_run(tiny, tmp_path, precision, dtype):
    tiny.save(tmp_path / "best")
    (tmp_path / "config.json").write_text(json.dumps({"data": "demo", "precision": precision}))
    model = load_for_sampling(str(tmp_path / "best")).model
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} == {torch.float32}  # of positions


def test_gradient_checkpointing_of_adapters_changes_nothing(adapted):
    groups = sampled(adapted)
    plain, _ = updated(adapted.model, groups)
    model = copy.deepcopy(adapted.model)
    checkpoint_activations(model)
    again, _ = updated(model, groups)
    moved = 0
    for a, b, start in zip(plain.parameters(), again.parameters(), adapted.model.parameters(), strict=True):
        assert torch.equal(a, b)
        moved += not torch.equal(a, start)
    assert moved > 10
