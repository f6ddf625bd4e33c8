"""grpo.py against naive versions, hand-computed values and exact enumeration. Row names (A1 …) follow the README."""

import contextlib
import dataclasses
import functools
import itertools
import math
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

import grpo
import policy
import variants
from engine import attention, decoding, draw, grid, lean, packing, row_attention, tree
from engine.fast import ENGINES, FAST, checkpointed
from grpo import PLAIN, GRPOConfig
from models import memory_plan

SMALL = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
         "bos_token_id": 2}
FAMILIES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "mistral": MistralConfig,
            "gemma": GemmaConfig}
EOS = 1


def make_model(family="qwen2", dtype=torch.float64, seed=0, **settings):
    torch.manual_seed(seed)
    extra = {"head_dim": 4} if family in ("qwen3", "gemma", "mistral") else {}
    config = FAMILIES[family](**(SMALL | extra | {"initializer_range": 0.3} | settings))
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for module in model.modules():  # transformers normalises in float32 even in a float64 model
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_rms_norm, module, plus_one=family == "gemma")
    return model


def _rms_norm(module, x, plus_one):
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return normed * (module.weight + 1 if plus_one else module.weight)


def a_group(lengths=(3, 1, 5, 4), prompt_length=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, 23, (n,), generator=generator)  # noqa: E731
    return draw(prompt_length), [draw(n) for n in lengths]


def sampled_groups(model, config, prompts=2, seed=0, eos_ids=(EOS,), engine=FAST, shortest=4):
    ids = [a_group(prompt_length=shortest + i, seed=seed + i)[0] for i in range(prompts)]
    return grpo.sample_groups(model, ids, config, eos_ids=eos_ids, seeds=range(1000 * seed, 1000 * seed + prompts),
                              engine=engine)


def packed_logprobs(model, packed, temperature):
    return packing.packed_logprobs(model, packed, temperature)


def padded_logprobs(model, packed, temperature):
    """The plain way, for the completions of a packed group."""
    return PLAIN.logprobs(model, [packed.prompt] * len(packed.completions), packed.completions, temperature)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ---- sampling


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_a1_log_probabilities_are_those_of_the_sampling_distribution(temperature, engine):
    model = make_model()
    config = GRPOConfig(group_size=4, temperature=temperature, max_completion_tokens=7)
    for group in sampled_groups(model, config, engine=ENGINES[engine]):
        for completion, logp in zip(group.completions, group.logps, strict=True):
            row = torch.cat([group.prompt, completion])[None]
            z = model(row).logits[0, len(group.prompt) - 1:-1]
            naive = F.log_softmax(z / temperature, -1).gather(-1, completion[:, None])[:, 0]
            torch.testing.assert_close(logp.double(), naive, atol=1e-5, rtol=1e-5)
        packed = packing.pack_group(group.prompt, group.completions)
        trained = ENGINES[engine].logprobs(model, [group.prompt] * 4, group.completions, temperature)
        torch.testing.assert_close(trained[packed.mask], torch.cat(group.logps).double(), atol=1e-5, rtol=1e-5)


def test_a2_no_helper_changes_its_inputs():
    model, (prompt, completions) = make_model(), a_group()
    rewards, mask = torch.tensor([[0.0, 1.0, 2.0, 2.0]]), torch.ones(4, 5)
    logp = torch.randn(4, 5)
    before = [t.clone() for t in (prompt, *completions, rewards, mask, logp)]
    packed = packing.pack_group(prompt, completions)
    packing.completion_logprobs(model, packed, 0.7)
    grpo.group_advantages(rewards)
    grpo.policy_loss(logp, logp, logp, rewards[0], mask, GRPOConfig())
    grpo.sample_groups(model, [prompt], GRPOConfig(group_size=2, max_completion_tokens=3), eos_ids=[EOS])
    for old, new in zip(before, (prompt, *completions, rewards, mask, logp), strict=True):
        assert torch.equal(old, new)


def test_a3_gradient_reaches_exactly_the_rows_that_predict_completion_tokens():
    prompt, completions = a_group(lengths=(3, 2))
    packed = packing.pack_group(prompt, completions)
    L = packed.input_ids.shape[1]
    logits = torch.randn(L, 23, dtype=torch.float64, requires_grad=True)
    logp = packing.token_logprobs(_Identity(23), logits[packed.predictors], torch.cat(completions), 1.0)
    loss, _ = grpo.policy_loss(packed.unpack(logp), packed.unpack(logp).detach(), None, torch.tensor([1.0, -1.0]),
                               packed.mask, GRPOConfig())
    loss.backward()
    # completion 1 stands at 6, 7, 8 and is predicted from 5 (the prompt's end), 6, 7; completion 2 at 9, 10 from 5, 9
    touched = logits.grad.abs().sum(-1).nonzero()[:, 0].tolist()
    assert touched == [5, 6, 7, 9]


class _Identity(torch.nn.Linear):
    """An lm_head that hands its input through, so that a test can choose the logits."""

    def __init__(self, size):
        super().__init__(size, size, bias=False, dtype=torch.float64)
        self.weight.data.copy_(torch.eye(size))


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a4_eos_is_part_of_a_completion_iff_it_was_sampled(engine):
    model = make_model()
    config = GRPOConfig(group_size=16, max_completion_tokens=6)
    for group in sampled_groups(model, config, eos_ids=(EOS, 5), engine=ENGINES[engine]):
        for completion, cut in zip(group.completions, group.truncated, strict=True):
            ends = [i for i, token in enumerate(completion.tolist()) if token in (EOS, 5)]
            assert ends == ([] if cut else [len(completion) - 1])
            assert not cut or len(completion) == 6
        packed = packing.pack_group(group.prompt, group.completions)
        assert packed.mask.sum(1).tolist() == [len(c) for c in group.completions]
    cuts = [cut for group in sampled_groups(model, config, prompts=3) for cut in group.truncated]
    assert any(cuts) and not all(cuts)


def test_a4_padding_id_equal_to_eos_or_to_a_sampled_token_changes_nothing():
    prompt, completions = a_group()
    completions = [torch.cat([c, torch.tensor([EOS])]) for c in completions]
    one = packing.completion_logprobs(make_model(pad_token_id=EOS), packing.pack_group(prompt, completions), 1.0)[0]
    two = packing.completion_logprobs(make_model(), packing.pack_group(prompt, completions), 1.0)[0]
    assert torch.equal(one, two) and (one[:, 0] != 0).all()


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a6_groups_come_prompt_major_in_prompt_order(engine):
    model = make_model()
    prompts = [a_group(prompt_length=n, seed=n)[0] for n in (9, 3, 6, 3, 8)]
    for rollout_batch in (4, 8, 100):
        config = GRPOConfig(group_size=4, max_completion_tokens=3, rollout_batch=rollout_batch)
        groups = grpo.sample_groups(model, prompts, config, eos_ids=[EOS], engine=ENGINES[engine])
        for prompt, group in zip(prompts, groups, strict=True):
            assert torch.equal(prompt, group.prompt) and len(group.completions) == 4
    # what was sampled for a prompt is likely under that prompt: its logps are recomputed from it
            for completion, logp in zip(group.completions, group.logps, strict=True):
                z = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1:-1]
                naive = F.log_softmax(z, -1).gather(-1, completion[:, None])[:, 0]
                torch.testing.assert_close(logp.double(), naive, atol=1e-5, rtol=1e-5)


def test_a14_modes_come_back_even_after_an_exception_and_dropout_is_off_inside():
    model = make_model(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    prompt, completions = a_group()
    packed = packing.pack_group(prompt, completions)
    with pytest.raises(RuntimeError, match="stop"), grpo.dropout_off(model):
        one, _ = packing.completion_logprobs(model, packed, 1.0)
        two, _ = packing.completion_logprobs(model, packed, 1.0)
        assert torch.equal(one, two)
        raise RuntimeError("stop")
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a14_first_update_of_a_model_with_dropout_has_ratio_one(engine):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=64,
                                                        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1))
    model.train()
    _, stats = _update(model, GRPOConfig(group_size=4, max_completion_tokens=5, kl_coef=0.0, updates_per_rollout=2), lr=0,
                       engine=ENGINES[engine])
    assert stats["ratio_mean"] == 1.0 and stats["ratio_max"] == 1.0 and stats["sampler_gap"] < 1e-5


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a15_left_padding_and_what_stands_in_it_change_nothing(engine):
    model = make_model()
    short, long = a_group(prompt_length=3)[0], a_group(prompt_length=9, seed=1)[0]
    config = GRPOConfig(group_size=2, max_completion_tokens=5)
    greedy = lambda prompts: grpo.sample_groups(model, prompts, config, eos_ids=[EOS], temperature=0.0, engine=ENGINES[engine])  # noqa: E731
    alone, together = greedy([short])[0], greedy([short, long])[0]
    assert all(torch.equal(a, b) for a, b in zip(alone.completions, together.completions, strict=True))
    torch.testing.assert_close(torch.cat(alone.logps), torch.cat(together.logps))
    ids, mask = grpo.left_pad([short, long], "cpu")
    noise = torch.where(mask.bool(), ids, torch.full_like(ids, 17))
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    one, two = (model(x, attention_mask=mask, position_ids=position).logits[:, -1] for x in (ids, noise))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a16_under_bf16_the_first_ratio_is_one_and_later_updates_see_the_new_weights(monkeypatch, micro_batch):
    config = GRPOConfig(group_size=4, max_completion_tokens=5, kl_coef=0.0, updates_per_rollout=2, micro_batch=micro_batch)
    model, seen, loss = make_model(dtype=torch.float32), [], grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda logp, *rest: (seen.append(logp.detach()), loss(logp, *rest))[1])
    with torch.autocast("cpu", torch.bfloat16):
        groups = sampled_groups(model, config, shortest=9)  # long enough to be shared, as real prompts are
        stats = _apply(model, groups, _advantages(4), config, lr=0.5)
    assert all(logp.dtype == torch.float32 for logp in seen) and stats["sampler_gap"] < 0.005
    assert attention._verdicts[model] == dict.fromkeys(("shared prompts", "lean layers", "packed rows"), True)

    once, batches = make_model(dtype=torch.float32), grpo.micro_batches(groups, _advantages(4), config)
    first, second = seen[:len(batches)], seen[len(batches):]
    for expected in (first, second):  # each update's log-probabilities are those of the weights it starts from
        with torch.autocast("cpu", torch.bfloat16), grpo.dropout_off(once):
            fresh = [FAST.logprobs(once, batch.prompts, batch.completions, 1.0).detach() for batch in batches]
        assert all(torch.equal(a, b) for a, b in zip(fresh, expected, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            stats = _apply(once, groups, _advantages(4), dataclasses.replace(config, updates_per_rollout=1), lr=0.5)
        assert expected is second or stats["ratio_mean"] == stats["ratio_max"] == 1.0
    assert not torch.equal(first[0], second[0])


def tokens_a_pass(model, action):
    """How many tokens go through the model in each of its passes while something is done."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    result = action()
    hook.remove()
    return seen, result


@pytest.mark.parametrize("engine, prefill", [("fast", 6), ("plain", 4 * 6)])
def test_a20_sampling_uses_the_cache_even_with_gradient_checkpointing(engine, prefill):
    model = make_model()
    model.gradient_checkpointing_enable()
    model.train()
    config = GRPOConfig(group_size=4, max_completion_tokens=6)
    passes, _ = tokens_a_pass(model, lambda: grpo.sample_groups(model, [a_group()[0]], config, eos_ids=[], engine=ENGINES[engine]))
    assert passes == [prefill] + 5 * [4]  # a prefill of the prompt, then a token at a time


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_prompts_that_begin_alike_are_prefilled_as_padded_ones_are(family, monkeypatch):
    monkeypatch.setattr(tree, "LEAST", 0)
    if family == "gpt2":
        model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2)).double().eval()
    else:
        model = make_model(family)
    assert packing.can_pack(model)
    a, b = torch.arange(1, 9), torch.tensor([5, 4, 3])
    prompts = [torch.cat([a, b]), b, a, torch.cat([a, b[:1]]), b[:1], b[:1], torch.cat([b, a]), torch.cat([a, b])]
    with torch.no_grad():
        sizes, (layers, mask, logits) = tokens_a_pass(model, lambda: decoding.prefill(model, prompts))
        monkeypatch.setattr(decoding, "can_pack", lambda model, quiet: False)
        padded = decoding.prefill(model, prompts)
    assert sizes == [11 + 11] and torch.equal(mask, padded[1])  # those that begin with `a`, and those that do with `b`
    torch.testing.assert_close(logits, padded[2], rtol=1e-9, atol=1e-9)
    for pair, other in zip(layers, padded[0], strict=True):
        for kept, theirs in zip(pair, other, strict=True):
            P = theirs.shape[2]  # of a window only its last are kept there
            real = mask[:, None, -P:, None]
            torch.testing.assert_close(kept[:, :, -P:] * real, theirs * real, rtol=1e-9, atol=1e-9)


def test_completions_that_have_ended_leave_the_grid(monkeypatch):
    model, config = make_model(), GRPOConfig(group_size=16, max_completion_tokens=12)
    monkeypatch.setattr(grid, "SHRINK", 1.0)
    monkeypatch.setitem(grid.LOOK, "cpu", 3)
    passes, groups = tokens_a_pass(model, lambda: sampled_groups(model, config, prompts=1, eos_ids=(EOS, 3, 9)))
    growing = [sum(len(c) > t for c in groups[0].completions) for t in range(1, 12)]
    assert passes[1:] == [n for n in growing[::3] for _ in range(3)][:len(passes) - 1] and 0 < growing[3] < growing[0]
    assert len(passes) - 1 >= sum(n > 0 for n in growing)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_what_is_drawn_for_a_prompt_depends_on_its_seed_alone(engine):
    model, config = make_model(), GRPOConfig(group_size=4, max_completion_tokens=6)
    prompts, seeds = [a_group(prompt_length=3 + i, seed=i)[0] for i in range(5)], [7, 8, 9, 7, 8]

    def texts(chosen, batch=256):
        groups = grpo.sample_groups(model, [prompts[i] for i in chosen], replace(config, rollout_batch=batch),
                                    eos_ids=[EOS], seeds=[seeds[i] for i in chosen], engine=ENGINES[engine])
        return [[c.tolist() for c in group.completions] for group in groups]

    together = texts(range(5))
    assert together == texts(range(5), batch=8) == texts([0, 1]) + texts([2, 3, 4])
    assert together == [texts([i])[0] for i in range(5)]
    assert len({str(c) for c in together[0]}) > 1  # completions of a group differ
    seeds[0] += 1
    assert texts([0]) != [together[0]]


def test_a21_sampling_is_plain_temperature_sampling():
    logits = torch.tensor([[2.0, 0.0, -3.0]]).repeat(200_000, 1)
    token, logp, entropy = grpo.sample_token(logits, 1.5, torch.rand(len(logits), generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    share = torch.bincount(token, minlength=3) / len(token)
    torch.testing.assert_close(share, torch.softmax(logits[0] / 1.5, -1), atol=4e-3, rtol=0)
    assert share[2] > 0  # nothing is cut off
    torch.testing.assert_close(entropy[0], torch.distributions.Categorical(logits=logits[0] / 1.5).entropy())


# ---- advantages


def test_a5_advantages_have_pinned_values():
    rewards = torch.tensor([[0.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 5.0]], dtype=torch.float64)
    std0, std1 = math.sqrt(2 / 3), 1.0  # of the sample: divisor n - 1
    group = torch.tensor([[-1, 0, 1, 0], [-0.5, -0.5, -0.5, 1.5]], dtype=torch.float64)
    torch.testing.assert_close(grpo.group_advantages(rewards), group / torch.tensor([[std0], [std1]]))
    torch.testing.assert_close(grpo.group_advantages(rewards, "none"), group)
    torch.testing.assert_close(grpo.group_advantages(rewards, "batch"), group / rewards.std())


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a5_flat_groups_get_exactly_zero(scale):
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3], [1.0, 2.0, 3.0], [1e6 + 0.01, 1e6, 1e6]], dtype=torch.float64)
    advantages = grpo.group_advantages(rewards, scale)
    assert (advantages[[0, 2]] == 0).all() and (advantages[1] != 0).any()
    assert (grpo.group_advantages(torch.full((2, 4), 0.3), scale) == 0).all()
    assert (grpo.group_advantages(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), scale) == 0).all()


def test_a5_bad_rewards_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        grpo.group_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="not finite"):
        grpo.group_advantages(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="scale"):
        grpo.group_advantages(torch.zeros(1, 2), "std")


def gdpo_advantages(components, weights):
    """[K, B, G], [K] -> [B, G]"""
    return grpo.group_advantages(components.sum(0), "gdpo", (components, weights))


def test_gdpo_has_the_values_computed_by_hand():
    """arXiv 2601.05242: each reward standardised in its group, weighted, summed, divided by the batch's std."""
    first = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)  # the second group is flat in this reward
    second = torch.tensor([[0.0, 0.001], [5.0, 0.0]], dtype=torch.float64)
    h = math.sqrt(0.5)  # (0 - 1/2) / (1 / sqrt 2)
    total = torch.tensor([[-h - 2 * h, h + 2 * h], [2 * h, -2 * h]], dtype=torch.float64)
    std = math.sqrt((2 * (3 * h) ** 2 + 2 * (2 * h) ** 2) / 3)  # its mean is 0, the divisor n - 1
    found = gdpo_advantages(torch.stack([first, second]), [1.0, 2.0])
    torch.testing.assert_close(found, total / std)
    torch.testing.assert_close(gdpo_advantages(100 * torch.stack([first, second]), [1.0, 2.0]), found)
    assert (gdpo_advantages(torch.stack([first, -first]), [1.0, 1.0]) == 0).all()  # they cancel: flat
    with pytest.raises(ValueError, match="argument 2 is longer"):
        gdpo_advantages(torch.stack([first, second]), [1.0])
    with pytest.raises(ValueError, match="components"):
        grpo.group_advantages(first, "gdpo")


def test_gdpo_tells_apart_what_the_sum_does_not():
    """The paper's example: rewards (0, 1) and (0, 2) of two completions get the same advantage from their sum."""
    one, two = torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]])
    both = torch.cat([one, two], dim=1)  # [K, B, G]
    summed, apart = grpo.group_advantages(both.sum(0)), gdpo_advantages(both, [1.0, 1.0])
    assert torch.equal(summed[0], summed[1]) and torch.allclose(2 * apart[0], apart[1])


@pytest.mark.parametrize("name, value", [("group_size", 1), ("temperature", 0.0), ("loss", "ppo"), ("kl_coef", -1.0),
                                         ("kl_estimator", "k1"), ("advantage_scale", "mean"), ("kl_coef", math.inf)])
def test_config_names_the_field_that_makes_no_sense(name, value):
    with pytest.raises(ValueError, match=name):
        GRPOConfig(**{name: value})


# ---- loss


@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_a7_clipping_value_and_gradient(ratio, A):
    config = GRPOConfig(clip_low=0.2, clip_high=0.3, kl_coef=0.0)
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, stats = grpo.policy_loss(logp, torch.zeros(1, 1), None, torch.tensor([A]), torch.ones(1, 1), config)
    loss.backward()
    expected = {(0.5, 1.0): (-0.5, -0.5), (1.0, 1.0): (-1.0, -1.0), (2.0, 1.0): (-1.3, 0.0),
                (0.5, -1.0): (0.8, 0.0), (1.0, -1.0): (1.0, 1.0), (2.0, -1.0): (2.0, 2.0)}[ratio, A]
    assert loss.item() == pytest.approx(expected[0]) and logp.grad.item() == pytest.approx(expected[1])
    assert stats["clip_fraction_low"] == float((ratio, A) == (0.5, -1.0))
    assert stats["clip_fraction_high"] == float((ratio, A) == (2.0, 1.0))


def _categoricals():
    logits = torch.tensor([0.3, -1.1, 0.8], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([-0.5, 0.4, 0.9], dtype=torch.float64), -1)
    return logits, ref


def test_a8_kl_estimators_are_unbiased_by_enumeration():
    logits, ref = _categoricals()
    logp = torch.log_softmax(logits, -1)
    exact = (logp.exp() * (logp - ref)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((logp.exp() * grpo.kl_estimate(logp, ref, kind)).sum(), exact, rtol=1e-12, atol=0)
    assert (grpo.kl_estimate(logp, ref, "k3") >= 0).all() and (grpo.kl_estimate(logp, ref, "k2") >= 0).all()
    tiny = grpo.kl_estimate(torch.tensor(-1.0), torch.tensor(-1.0 + 1e-4), "k3")
    assert tiny.item() == pytest.approx(5e-9, rel=1e-2)  # expm1 keeps it; exp(x) - x - 1 would give 0 or noise
    with pytest.raises(ValueError, match="k4"):
        grpo.kl_estimate(logp, ref, "k4")


def test_a9_gradients_of_the_estimators_by_enumeration():
    logits, ref = _categoricals()

    def expected_gradient(kind):  # E over samples of d estimate / d logits, the samples held fixed
        logp = torch.log_softmax(logits, -1)
        return torch.autograd.grad((logp.detach().exp() * grpo.kl_estimate(logp, ref, kind)).sum(), logits)[0]

    def exact(f):
        return torch.autograd.grad(f(torch.log_softmax(logits, -1)), logits)[0]

    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_gradient("k2"), exact(lambda p: (p.exp() * (p - ref)).sum()))
    torch.testing.assert_close(expected_gradient("k3"), exact(lambda p: (ref.exp() * (ref - p)).sum()))


@pytest.mark.parametrize("loss, short, long", [
    ("grpo", 1 / 2, 1 / 20), ("dapo", 1 / 11, 1 / 11), ("dr_grpo", 1 / 40, 1 / 40), ("gspo", 1 / 2, 1 / 20),
    ("cispo", 1 / 11, 1 / 11)])
def test_a10_weight_of_a_token_in_each_loss(loss, short, long):
    config = GRPOConfig(loss=loss, kl_coef=0.0, max_completion_tokens=20)
    logp = torch.zeros(2, 10, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(10) < torch.tensor([[1], [10]])
    grpo.policy_loss(logp, logp.detach(), None, torch.ones(2), mask, config)[0].backward()
    expected = -torch.stack([F.one_hot(torch.tensor(0), 10) * short, torch.full((10,), long)]).double()
    torch.testing.assert_close(logp.grad, expected)


@pytest.mark.parametrize("loss, expected", [
    ("grpo", (-1.28 + 0.5 * (1 - math.log(2)) + (1.6 + 2.2 + 0.5 * (math.log(2) - 0.5)) / 2) / 2),
    ("dapo", (-1.28 + 0.5 * (1 - math.log(2)) + 1.6 + 2.2 + 0.5 * (math.log(2) - 0.5)) / 3),
    ("dr_grpo", (-1.28 + 0.5 * (1 - math.log(2)) + 1.6 + 2.2 + 0.5 * (math.log(2) - 0.5)) / (2 * 4)),
    ("gspo", (-1.28 + 0.5 * (1 - math.log(2)) + (1.6 + 1.6 + 0.5 * (math.log(2) - 0.5)) / 2) / 2),
    ("cispo", (-1.28 * math.log(1.5) + 2 * (0.8 * math.log(0.5) + 1.1 * math.log(1.1))
               + 0.5 * (1 - math.log(2) + math.log(2) - 0.5)) / 3)])
def test_each_loss_has_the_value_computed_by_hand(loss, expected):
    """A = 1, ratio 1.5, clipped at 1.28; A = -2, ratios 0.5, clipped at 0.8, and 1.1 (gspo: both 0.55 ** 0.5)."""
    config = GRPOConfig(loss=loss, clip_low=0.2, clip_high=0.28, kl_coef=0.5, max_completion_tokens=4)
    logp = torch.tensor([[1.5, 7.0], [0.5, 1.1]], dtype=torch.float64).log()  # 7 is padding
    ref = logp + torch.tensor([[2.0, 9.0], [1.0, 0.5]], dtype=torch.float64).log()  # k3: 1 - ln 2, 0, ln 2 - 1/2
    mask = torch.tensor([[True, False], [True, True]])
    value, stats = grpo.policy_loss(logp, torch.zeros(2, 2).double(), ref, torch.tensor([1.0, -2.0]), mask, config)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert stats["kl"] == pytest.approx(0.5 / 3) and stats["clip_fraction_high"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("ratio, weight", [(0.1, 0.5), (1.0, 1.0), (2.0, 2.0), (9.0, 5.0)])
def test_cispo_clips_the_weight_and_keeps_the_gradient_of_every_token(ratio, weight, A):
    """The gradient of -weight A log π is -weight A, whatever the sign of A; ScaleRL's min(ratio, 5) has no lower bound."""
    config = GRPOConfig(loss="cispo", clip_low=0.5, clip_high=4.0, kl_coef=0.0)
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, _ = grpo.policy_loss(logp, torch.zeros(1, 1), None, torch.tensor([A]), torch.ones(1, 1), config)
    loss.backward()
    assert logp.grad.item() == pytest.approx(-weight * A) and loss.item() == pytest.approx(-weight * A * math.log(ratio))


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("ratio, A, expected, gradient", [
    (2.0, -1.0, 2.0, 2.0), (4.0, -1.0, 3.0, 0.0), (0.5, -1.0, 0.8, 0.0), (4.0, 1.0, -1.2, 0.0), (0.5, 1.0, -0.5, -0.5)])
def test_dual_clip_bounds_what_a_wrong_completion_can_cost(loss, ratio, A, expected, gradient):
    """c = 3: min(r A, clip(r) A) is not below c A where A < 0; nothing else changes."""
    config = GRPOConfig(dual_clip=3.0, kl_coef=0.0, loss=loss, max_completion_tokens=1)
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, _ = grpo.policy_loss(logp, torch.zeros(1, 1), None, torch.tensor([A]), torch.ones(1, 1), config)
    loss.backward()
    assert loss.item() == pytest.approx(expected) and logp.grad.item() == pytest.approx(gradient)


def test_sampler_weights_are_truncated_ratios_and_a_veto_takes_the_whole_completion():
    gap = torch.tensor([[math.log(1.5), math.log(4.0)], [math.log(0.25), 0.0]], dtype=torch.float64)
    weights = lambda **settings: variants.sampler_weights(gap, GRPOConfig(**settings)).tolist()  # noqa: E731
    assert weights() == [[1, 1], [1, 1]]
    assert sum(weights(sampler_cap=2.0), []) == pytest.approx([1.5, 2.0, 0.25, 1.0])
    assert weights(sampler_veto=1.38) == [[0, 0], [0, 0]]  # ln 4 = 1.386, above it in both directions
    assert weights(sampler_veto=1.39) == [[1, 1], [1, 1]]
    gap[0, 1] = 0.0
    assert sum(weights(sampler_cap=2.0, sampler_veto=1.0), []) == pytest.approx([1.5, 1.0, 0, 0])


@pytest.mark.parametrize("updates", [1, 2])
def test_the_update_weighs_tokens_by_training_over_sampler(updates):
    """A sampler that was off: its log-probabilities are shifted by hand, and the gradient is that of weighted terms."""
    config = GRPOConfig(group_size=4, max_completion_tokens=5, kl_coef=0.0, loss="dapo", max_grad_norm=1e9,
                        sampler_cap=1.25, sampler_veto=0.9, micro_batch=3, updates_per_rollout=updates)
    model, advantages = make_model(), _advantages(4)
    groups = sampled_groups(model, config)
    shifts = [torch.tensor([0.0, -0.5, 0.2, 0.1, -0.1]), torch.tensor([0.1, 0.1, -1.0, 0.0, 0.0])]  # the second: vetoed
    groups = [replace(group, logps=[logp + shifts[j % 2][:len(logp)] for j, logp in enumerate(group.logps)])
              for group in groups]
    stats = _apply(model, groups, advantages, config, lr=0)
    ours = gradients(model)
    model.zero_grad()
    tokens = sum(len(c) for group in groups for c in group.completions)
    for group, row in zip(groups, advantages, strict=True):
        for j, (completion, A) in enumerate(zip(group.completions, row, strict=True)):
            logp = _token_logprobs(model, group, completion)
            shift = shifts[j % 2][:len(completion)].double()
            weights = (-shift).exp().clamp(max=1.25) * float((shift.abs() <= 0.9).all())
            (-(A * weights * logp).sum() / tokens).backward()
    torch.testing.assert_close(ours, gradients(model), rtol=1e-5, atol=1e-7)  # the sampler's numbers are float32
    assert 0.1 < stats["sampler_gap"] < 0.5


@pytest.mark.parametrize("kind, expected", [("k1", (-math.log(2), math.log(4))),
                                            ("k2", (math.log(2) ** 2 / 2, math.log(4) ** 2 / 2)),
                                            ("k3", (1 - math.log(2), math.log(4) - 0.75))])
def test_each_kl_estimator_has_the_value_computed_by_hand(kind, expected):
    """Where the reference finds the token twice as likely as the policy, and a quarter as likely."""
    logp = torch.tensor([0.25, 0.5], dtype=torch.float64).log()
    ref = torch.tensor([0.5, 0.125], dtype=torch.float64).log()
    assert grpo.kl_estimate(logp, ref, kind).tolist() == pytest.approx(expected, rel=1e-12)


def test_gspo_clips_whole_sequences_by_their_geometric_mean_ratio():
    config = GRPOConfig(loss="gspo", kl_coef=0.0, clip_low=0.1, clip_high=0.1)
    logp = torch.tensor([[0.3, 0.1], [0.02, 0.04]], dtype=torch.float64, requires_grad=True)
    loss, stats = grpo.policy_loss(logp, torch.zeros(2, 2), None, torch.ones(2), torch.ones(2, 2), config)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.1 + math.exp(0.03)) / 2)
    assert (logp.grad[0] == 0).all() and stats["clip_fraction_high"] == 0.5
    torch.testing.assert_close(logp.grad[1], torch.full((2,), -math.exp(0.03) / 4, dtype=torch.float64))


def test_kl_enters_per_token_with_its_coefficient():
    config = GRPOConfig(kl_coef=0.5, kl_estimator="k2")
    logp, ref = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.2, -0.4]], dtype=torch.float64)
    loss, stats = grpo.policy_loss(logp, logp, ref, torch.zeros(1), torch.ones(1, 2), config)
    assert stats["kl"] == pytest.approx((0.02 + 0.08) / 2) and loss.item() == pytest.approx(0.5 * stats["kl"])


def test_a18_entropy_is_that_of_the_distribution():
    model, (prompt, completions) = make_model(), a_group()
    packed = packing.pack_group(prompt, completions)
    _, entropy = packing.completion_logprobs(model, packed, 0.8)
    for row, completion in zip(entropy, completions, strict=True):
        z = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1:-1] / 0.8
        exact = torch.distributions.Categorical(logits=z).entropy()
        torch.testing.assert_close(row[:len(completion)], exact)
        assert (row[len(completion):] == 0).all()


def test_overlong_completions_can_be_masked_out():
    model = make_model()
    config = GRPOConfig(group_size=8, max_completion_tokens=4, kl_coef=0.0, overlong="mask", max_grad_norm=1e9)
    groups = sampled_groups(model, config, prompts=1, seed=2)
    assert any(groups[0].truncated) and not all(groups[0].truncated)
    _apply(model, groups, _advantages(8)[:1], config, lr=0)
    masked = gradients(model)
    kept = [i for i, cut in enumerate(groups[0].truncated) if not cut]
    rest = grpo.Group(groups[0].prompt, [groups[0].completions[i] for i in kept],
                      [groups[0].logps[i] for i in kept], [False] * len(kept))
    plain = GRPOConfig(group_size=8, max_completion_tokens=4, kl_coef=0.0, max_grad_norm=1e9)
    _apply(model, [rest], _advantages(8)[:1, kept], plain, lr=0)
    torch.testing.assert_close(gradients(model), masked, rtol=1e-10, atol=1e-14)


# ---- decoding


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_both_engines_sample_the_same_groups(family, temperature):
    """Unequal prompts and lengths, rows and whole prompts that end early; log-probabilities and entropies too."""
    model = make_model(family)
    prompts = [torch.tensor(p) for p in ([5, 6, 7, 8, 9], [3, 4], [10, 11, 12])]
    config = GRPOConfig(group_size=5, max_completion_tokens=9)
    plain, fast = (grpo.sample_groups(model, prompts, config, eos_ids=(EOS, 5, 9), seeds=[1, 2, 3], engine=engine,
                                      temperature=temperature) for engine in (PLAIN, FAST))
    assert attention._verdicts[model] == {"shared prompts": True, "packed rows": True, "lean layers": family != "gemma"}
    for one, two in zip(plain, fast, strict=True):
        assert torch.equal(one.prompt, two.prompt) and one.truncated == two.truncated
        for a, b in zip(one.completions, two.completions, strict=True):
            assert torch.equal(a, b)
        for name in ("logps", "entropies"):
            torch.testing.assert_close(torch.cat(getattr(one, name)), torch.cat(getattr(two, name)), rtol=1e-5, atol=1e-6)
    assert not temperature or len({len(c) for group in fast for c in group.completions}) > 2


@pytest.mark.parametrize("look", [1, 2, 5])
@pytest.mark.parametrize("sizes", ["exact", "of a GPU"])
def test_shrinking_grids_sample_what_the_plain_engine_samples(monkeypatch, look, sizes):
    """Grids of one model, one after the other, of other shapes; prompts that end whole; places that stay empty."""
    monkeypatch.setitem(grid.LOOK, "cpu", look)
    if sizes == "of a GPU":
        monkeypatch.setitem(grid.PADDING, "cpu", 8)
        power = lambda n: 1 << (n - 1).bit_length() if n else 0  # noqa: E731
        monkeypatch.setattr(grid.Grid, "bucket", lambda self, n: power(n))
    model, grids = make_model(), set()
    shrink = grid.Grid.shrink
    monkeypatch.setattr(grid.Grid, "shrink", lambda self, growing, B, M, t: (grids.add((B, M)), shrink(self, growing, B, M, t)))
    for P, G, T, temperature in ((4, 7, 40, 1.0), (2, 3, 5, 1.3), (5, 9, 20, 1.0), (3, 1, 9, 0.0)):
        prompts = [a_group(prompt_length=3 + 4 * i, seed=i)[0] for i in range(P)]
        config = GRPOConfig(group_size=max(2, G), max_completion_tokens=T)
        plain, fast = (grpo.sample_groups(model, prompts, config, eos_ids=(EOS, 5, 11), seeds=range(P), engine=engine,
                                          group_size=G, temperature=temperature) for engine in (PLAIN, FAST))
        for one, two in zip(plain, fast, strict=True):
            assert one.truncated == two.truncated
            assert [c.tolist() for c in one.completions] == [c.tolist() for c in two.completions]
            for name in ("logps", "entropies"):
                torch.testing.assert_close(torch.cat(getattr(one, name)), torch.cat(getattr(two, name)), rtol=1e-5, atol=1e-6)
    assert len(grids) > 3


def test_tensors_of_the_grid_stay_where_they_are_and_results_are_not_among_them():
    """Over tokens, rollouts and updates: a graph on a GPU has their addresses."""
    model, config = make_model(), GRPOConfig(group_size=6, max_completion_tokens=9, kl_coef=0.0)
    groups = sampled_groups(model, config)
    grid = decoding._grids[model]
    before = {name: flat.data_ptr() for name, flat in grid.memory.items()}
    kept = [logp.clone() for logp in groups[0].logps]
    _apply(model, groups, _advantages(6), config, lr=0.1)
    sampled_groups(model, config, seed=3)
    sampled_groups(model, replace(config, max_completion_tokens=4), prompts=1, seed=4)
    assert before == {name: flat.data_ptr() for name, flat in grid.memory.items()}
    assert all(torch.equal(a, b) for a, b in zip(kept, groups[0].logps, strict=True))


@pytest.mark.parametrize("forward", ["lean", "modules"])
def test_a_step_of_the_grid_depends_on_no_data(forward):
    """Fake tensors have no values, so what asks for one (a number, a shape, a branch) raises."""
    model, one = make_model("qwen3", dtype=torch.float32), grid.Grid()
    attention.enable(model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        layers, one.attended = [(torch.randn(3, 2, 7, 4), torch.randn(3, 2, 7, 4)) for _ in range(2)], 16
        one.start(layers, torch.ones(3, 7, dtype=torch.bool), torch.randn(3, 23), torch.rand(3, 4, 32, dtype=torch.float64), 0.8, [EOS])
        step = functools.partial(lean.forward if forward == "lean" else decoding.module_forward, model)
        for _ in range(3):
            one.step(step)
        assert isinstance(one.token, FakeTensor) and one.token.shape == (12,)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            one.ended.any().item()  # as it would be found


def test_a_graph_that_cannot_be_recorded_leaves_the_step_as_it_is_with_one_warning(monkeypatch):
    class Refused:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *_):
            pass

    model, config = make_model(dtype=torch.float32), GRPOConfig(group_size=6, max_completion_tokens=12)
    expected = sampled_groups(model, config)
    monkeypatch.setattr(grid, "GRAPHS", ("cpu",))
    monkeypatch.setattr(decoding, "GRAPHS", ("cpu",))
    for name in ("graph_pool_handle", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", Refused)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph .operation not permitted") as told:
        found = sampled_groups(model, config)
        sampled_groups(model, config, seed=3)
    assert len(told) == 1
    for one, two in zip(expected, found, strict=True):
        assert [c.tolist() for c in one.completions] == [c.tolist() for c in two.completions]


@pytest.mark.parametrize("rotation, replays", [("default", True), ("dynamic", False)])
def test_a_model_that_asks_for_a_value_is_not_recorded(rotation, replays):
    model = make_model(dtype=torch.float32, rope_parameters={"rope_type": rotation, "rope_theta": 1e4, "factor": 2.0})
    for forward in (lean.forward, decoding.module_forward):
        attention._verdicts.pop(model, None)
        assert decoding.can_replay(model, forward) == replays
        assert decoding.forward_of(model) is lean.forward


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.003)])
def test_attention_of_a_token_in_both_ways(dtype, tolerance):
    """In bf16 scores are not rounded, only weights and results; else they are off by 0.007."""
    torch.manual_seed(0)
    B, Hk, M, r, P, n, d = 3, 2, 4, 3, 17, 6, 8
    query, prompt, completion = ((4 * torch.randn(*shape)).to(dtype).double() for shape in (
        (B, Hk, M, r, d), (2, B, Hk, P, d), (2, B, Hk, M, n, d)))
    bias = torch.zeros(B, 1, 1, P + n)
    bias[0, ..., :5] = bias[..., -2:] = float("-inf")
    scores = torch.cat([query @ prompt[0, :, :, None].mT, query @ completion[0].mT], -1) * 0.3 + bias[:, :, None].double()
    weights = scores.softmax(-1)
    exact = weights[..., :P] @ prompt[1, :, :, None] + weights[..., P:] @ completion[1]
    for way in (grid.products, grid.parts):
        found = way(*(x.to(dtype) for x in (query, *prompt, *completion)), bias, 0.3)
        assert (found - exact).norm() < tolerance * exact.norm()


def test_a_row_that_is_not_a_number_spoils_no_other():
    """Keys and values of a broken rollout stay in memory; nothing of them may be seen by the next."""
    model, config = make_model(), GRPOConfig(group_size=6, max_completion_tokens=9)
    clean = sampled_groups(model, config)
    weight = model.model.layers[0].self_attn.v_proj.weight
    value = weight.detach().clone()
    weight.data.fill_(float("nan"))
    sampled_groups(model, config)
    weight.data.copy_(value)
    for one, two in zip(clean, sampled_groups(model, config), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.logps, two.logps, strict=True))


@pytest.mark.parametrize("V", [5, 256, 300, 8_000])
def test_drawing_by_blocks_is_drawing_by_the_whole_cumulative_sum(V):
    generator = torch.Generator().manual_seed(V)
    logits = 4 * torch.randn(2_000, V, generator=generator)
    logits[:500, V // 2:] = float("-inf")  # what cannot be drawn, at the end of blocks and of the vocabulary
    logits[500:1_000, : V // 2] = float("-inf")
    uniform = torch.rand(2_000, dtype=torch.float64, generator=generator)
    uniform[::5] = 0.0
    for temperature in (0.0, 0.7, 1.0):
        for one, two in zip(draw.draw(logits, temperature, uniform), grpo.sample_token(logits, temperature, uniform), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        last = draw.draw(logits, temperature, torch.full_like(uniform, 1 - 2**-53))
        assert last[1].isfinite().all()  # rounding does not lead to what cannot be drawn


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a18_the_samplers_entropy_is_that_of_the_distribution(engine):
    model = make_model()
    for group in sampled_groups(model, GRPOConfig(group_size=3, max_completion_tokens=5, temperature=0.8), engine=ENGINES[engine]):
        for completion, entropy in zip(group.completions, group.entropies, strict=True):
            z = model(torch.cat([group.prompt, completion])[None]).logits[0, len(group.prompt) - 1:-1] / 0.8
            torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=z).entropy().float(), rtol=1e-5, atol=1e-6)


def test_a_model_whose_attention_cannot_be_exchanged_takes_the_plain_engine_with_one_warning():
    model = make_model(attn_implementation="eager")
    model.set_attn_implementation("eager")
    config, prompts = GRPOConfig(group_size=2, max_completion_tokens=4), [torch.tensor([3, 4, 5])]
    with pytest.warns(UserWarning, match="cannot run shared prompts .*its attention is eager") as warned:
        groups = [grpo.sample_groups(model, prompts, config, eos_ids=[EOS], seeds=[1], engine=FAST)[0] for _ in range(2)]
    assert len(warned) == 1 and torch.equal(groups[0].completions[0], groups[1].completions[0])


# ---- packed groups


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_packed_equals_padded_in_logprobs_and_gradients(family, tied, checkpointing):
    model = make_model(family, tie_word_embeddings=tied)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prompt, completions = a_group()
    packed = packing.pack_group(prompt, completions)
    weights = torch.randn(packed.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (packed_logprobs, padded_logprobs):
        model.zero_grad()
        with grpo.dropout_off(model):
            logp = checkpointed(forward)(model, packed, 0.7)
            (logp * weights).sum().backward()
        results.append((logp.detach(), gradients(model)))
    assert packing.can_pack(model)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def nested_rows(seed=0, prompts=7, group=3):
    """Prompts that begin alike to any depth, one of them twice, as do their completions. -> N prompts, N completions"""
    generator = torch.Generator().manual_seed(seed)
    some = lambda most: torch.randint(2, 5, (int(torch.randint(1, most, (), generator=generator)),), generator=generator)  # noqa: E731
    beginnings, rows = [some(12)], []
    while len(beginnings) < prompts:
        start = beginnings[int(torch.randint(len(beginnings), (), generator=generator))]
        beginnings.append(torch.cat([start, some(9)]))
    for prompt in [*beginnings[::-1], beginnings[2].clone(), torch.arange(5, 20)]:
        rows += [(prompt.clone(), torch.cat([some(7), torch.tensor([EOS])])) for _ in range(group)]
    return [prompt for prompt, _ in rows], [completion for _, completion in rows]


def seen_by_hand(rows, found):
    """bool [L, L]: whether the token at place i sees that at j, as the rows themselves say."""
    seen = torch.zeros(found.size, found.size, dtype=torch.bool)
    for places in found.places:
        seen[places[:, None], places] |= torch.ones(len(places), len(places), dtype=torch.bool).tril()
    return seen


@pytest.mark.parametrize("least", [0, 5, 16, 10**9])
def test_a_tree_holds_what_rows_begin_with_once_and_each_token_sees_its_own_row(least):
    for seed in range(5):
        rows = [torch.cat(pair) for pair in zip(*nested_rows(seed), strict=True)]
        found = tree.Tree(rows, least)
        ids, layout = found.ids(rows)[0], row_attention.RowLayout(found.nodes, "cpu")
        for row, places in zip(rows, found.places, strict=True):
            assert ids[places].tolist() == row.tolist() and layout.positions[places].tolist() == list(range(len(row)))
        places = torch.arange(found.size)
        assert torch.equal(layout.rule(None)(None, None, places[:, None], places), seen_by_hand(rows, found))
        beginnings = {tuple(row[:n].tolist()) for row in rows for n in range(1, len(row) + 1)}  # tokens of a whole trie
        different = {tuple(row.tolist()) for row in rows}
        assert found.size == {0: len(beginnings), 10**9: sum(map(len, different))}.get(least, found.size)
        assert len(beginnings) <= found.size <= sum(map(len, different)) and sum(found.added) == found.size
        assert [node.stop for node in found.nodes] == [node.start for node in found.nodes[1:]] + [found.size]


def test_rows_that_extend_each_other_thousands_deep():
    rows = [torch.ones(i + 1, dtype=torch.long) for i in range(3000)]  # a recursion would run out of stack
    found = tree.Tree(rows, least=0)
    assert found.size == len(found.nodes) == 3000 and found.added == [1] * 3000
    assert all(torch.equal(places, torch.arange(len(row))) for row, places in zip(rows, found.places, strict=True))
    assert {node.end for node in found.nodes} == {3000}
    assert sum(map(len, packing.fill([[row] for row in rows], 1000))) == 3000


NESTED = tree.Tree([torch.cat(pair) for pair in zip(*nested_rows(), strict=True)], least=0)
GROUPS = [packing.pack_group(torch.arange(P), [torch.arange(n) for n in lengths]).nodes
          for P, lengths in ((6, (3, 1, 5)), (5, (7,)), (150, (100, 70, 1)))]


@pytest.mark.parametrize("nodes", [NESTED.nodes, *GROUPS])
def test_three_ways_of_attention_in_a_row_are_one(nodes, monkeypatch):
    """By parts, by FlexAttention (without gradients on a CPU), with a mask, also one of few queries; float64."""
    generator, L = torch.Generator().manual_seed(0), nodes[-1].stop
    query, key, value, weight = (torch.randn(1, heads, L, 8, dtype=torch.float64, generator=generator, requires_grad=True)
                                 for heads in (4, 2, 2, 4))
    results = []
    for way, elements in ((row_attention.parts, 1), (row_attention.masked, 10**9), (row_attention.masked, 5 * L)):
        monkeypatch.setattr(row_attention, "MASK_ELEMENTS", elements)
        options = () if way is row_attention.parts else (None,)
        out = way(row_attention.RowLayout(nodes, query.device), query, key, value, 0.3, *options)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (query, key, value))))
    for one, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        for window in (None, 3):
            flex, masked = (way(row_attention.RowLayout(nodes, query.device), query.detach(), key.detach(), value.detach(),
                                0.3, window) for way in (row_attention.flex, row_attention.masked))
            torch.testing.assert_close(flex, masked, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3, 200])
@pytest.mark.parametrize("lengths", [[(40, (3, 1, 5))], [(256, (128, 300, 1)), (700, (2, 90))], [(100, (30,) * 40)]])
def test_blocks_of_a_rows_mask_are_those_of_the_whole_mask(lengths, window):
    """Nodes that end within blocks and at their edges; PyTorch finds the blocks by making the mask of L × L."""
    rows = [torch.cat([torch.full((P,), g), torch.full((n,), 9 + i)]) for g, (P, ns) in enumerate(lengths) for i, n in enumerate(ns)]
    layout = row_attention.RowLayout(tree.Tree(rows).nodes, torch.device("cpu"))
    L = len(layout.ends)
    ours = row_attention.block_mask(layout, window)
    exact = create_block_mask(layout.rule(window), None, None, L, L, device="cpu")
    assert ours.shape == exact.shape and ours.seq_lengths == exact.seq_lengths
    missing, more = exact.to_dense() > ours.to_dense(), ours.to_dense() > exact.to_dense()
    assert not missing.any() and (window is not None or not more.any())
    i = torch.arange(L)
    whole = F.pad(layout.rule(window)(None, None, i[:, None], i), (0, -L % 128, 0, -L % 128))
    full = full_blocks(ours)
    assert whole.view(len(full), 128, len(full), 128).all(3).all(1)[full].all()  # those said to be full are
    assert window is not None or torch.equal(full, full_blocks(exact))
    held = sum(t.numel() * t.element_size() for t in vars(ours).values() if isinstance(t, torch.Tensor))
    assert held <= memory_plan.BLOCK_BYTES * len(full)**2


def full_blocks(mask):
    """Which blocks are taken to be full. -> bool [n, n]"""
    full = torch.zeros(mask.full_kv_indices.shape[-2:], dtype=torch.bool)
    for row, (count, indices) in enumerate(zip(mask.full_kv_num_blocks[0, 0].tolist(), mask.full_kv_indices[0, 0].tolist(), strict=True)):
        full[row, indices[:count]] = True
    return full


def test_flex_attention_without_a_backward_is_not_used():
    """As on a CPU, where it has only a forward; asked for within a checkpoint, whose hooks it leaves alone."""
    row_attention.can_flex.cache_clear()
    x, verdicts = torch.ones(3, requires_grad=True), []
    with torch.no_grad():
        row_attention.flex(row_attention.RowLayout(GROUPS[0], torch.device("cpu")), *torch.zeros(3, 1, 1, 15, 8), 1.0, None)

    def layer(x):
        verdicts.append(row_attention.can_flex(8, torch.float64, "cpu"))
        return x * x

    with pytest.warns(UserWarning, match="cannot be compiled for heads of 8 in torch.float64") as warned:
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert verdicts == [False, False] and len(warned) == 1 and x.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("family, settings, checkpointing", [
    ("qwen2", {}, False), ("llama", {}, True), ("gemma", {"tie_word_embeddings": True}, False), ("mistral", {"sliding_window": 5}, True),
    ("qwen2", {"sliding_window": 7, "max_window_layers": 1, "use_sliding_window": True}, False)])
def test_rows_that_begin_alike_have_the_logprobs_and_gradients_of_padded_ones(family, settings, checkpointing, monkeypatch):
    """Questions on one database, a question asked twice, completions that begin alike: any nesting; float64."""
    model, (prompts, completions) = make_model(family, **settings), nested_rows(seed=1)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    monkeypatch.setattr(tree, "LEAST", 0)
    results = []
    for engine in ENGINES.values():
        model.zero_grad()
        with grpo.dropout_off(model):
            logp = engine.logprobs(model, prompts, completions, 0.7)
            (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
        results.append((logp.detach(), gradients(model)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert all(attention._verdicts[model].values())


@pytest.mark.parametrize("name", ENGINES)
def test_checkpointing_a_layer_that_applies_dropout_itself_changes_nothing(name):
    """OPT's does, from its own mode, which transformers wants to be training if it is to checkpoint the layer."""
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=40, dropout=0.3)).double()
    prompts, completions = nested_rows(seed=1)
    results, forwards = [], []
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: forwards.append(1))
    for checkpointing, modes in ((False, False), (True, False), (False, True), (True, True)):
        model.zero_grad()
        if checkpointing:
            policy.checkpoint_activations(model)
        for layer in model.model.decoder.layers:
            layer.gradient_checkpointing = checkpointing
        with contextlib.nullcontext() if modes else grpo.dropout_off(model):  # as in the cold start, as in the update
            model.train(modes)
            torch.manual_seed(1)
            logp = ENGINES[name].logprobs(model, prompts, completions, 0.7)
            forwards.clear()
            logp.sum().backward()
            assert len(forwards) == checkpointing  # backward computes the layer again
        results.append((logp.detach(), gradients(model)))
    for (one, one_gradients), (two, two_gradients) in (results[:2], results[2:]):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one_gradients, two_gradients)


def test_copies_of_a_prompt_are_one_prompt():
    """As FSDP makes them: it hands a module copies of all tensors in its arguments."""
    model, schema = make_model(), torch.arange(3, 23)
    questions = [torch.cat([schema, torch.full((9,), 5 + i)]) for i in range(3)]
    prompts = [prompt.clone() for prompt in questions for _ in range(4)]
    completions = [torch.full((2,), 5 + i) for i in range(4)] * 3
    passes, logp = tokens_a_pass(model, lambda: FAST.logprobs(model, prompts, completions, 1.0))
    assert passes == [20 + 3 * (9 + 4 * 2)]
    torch.testing.assert_close(logp, PLAIN.logprobs(model, prompts, completions, 1.0), rtol=1e-9, atol=1e-12)


def test_the_fast_engine_takes_completions_of_several_prompts():
    model, prompts, completions = make_model(), [], []
    for seed in range(3):
        prompt, group = a_group(lengths=(3, 1, 4 + seed), prompt_length=4 + seed, seed=seed)
        prompts, completions = prompts + [prompt] * 3, completions + group
    results = []
    for engine in (FAST, PLAIN):
        model.zero_grad()
        logp = engine.logprobs(model, prompts, completions, 0.7)
        (logp * torch.arange(logp.numel()).view_as(logp)).sum().backward()
        results.append((logp.detach(), gradients(model)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_sliding_windows_shorter_than_the_row_are_fast_too():
    """Mistral: all layers have one; Qwen2: some. Windows end within prompts, at their ends and within completions."""
    layers = {"max_window_layers": 1, "use_sliding_window": True}
    for family, window in itertools.product(("mistral", "qwen2"), (2, 5, 8, 100)):
        model = make_model(family, sliding_window=window, **(layers if family == "qwen2" else {}))
        prompts, completions = [a_group()[0]] * 4 + [a_group(prompt_length=3)[0]], [*a_group()[1], torch.arange(3, 9)]
        results = []
        for engine in (FAST, PLAIN):
            model.zero_grad()
            logp = engine.logprobs(model, prompts, completions, 0.7)
            (logp * torch.arange(logp.numel()).view_as(logp)).sum().backward()
            groups = grpo.sample_groups(model, [prompts[0], prompts[-1]], GRPOConfig(group_size=4, max_completion_tokens=9),
                                        eos_ids=[EOS, 5], seeds=[1, 2], engine=engine)
            results.append((logp.detach(), gradients(model), torch.cat([row for group in groups for row in group.logps])))
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9 if one.dtype == torch.float64 else 1e-5, atol=1e-6)
        assert all(attention._verdicts[model].values())


def test_a_model_that_cannot_run_packed_rows_falls_back_with_a_warning(monkeypatch):
    """Its layers do not pass the layout on, so completions would see one another."""
    forward = Qwen2Attention.forward
    monkeypatch.setattr(Qwen2Attention, "forward", lambda self, *args, layout=None, **options: forward(self, *args, **options))
    model, packed = make_model(), packing.pack_group(*a_group())
    with pytest.warns(UserWarning, match="Qwen2ForCausalLM cannot run packed rows "):
        logp, _ = packing.completion_logprobs(model, packed, 1.0)
    torch.testing.assert_close(logp, padded_logprobs(model, packed, 1.0))


HYBRIDS = {
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3},
    "Qwen3Next": {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "num_experts": 4,
                  "linear_value_head_dim": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "FalconH1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "Llama4Text": {"head_dim": 8, "attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 64}}
OTHERS = {"SmolLM3": {}, "Gemma3Text": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*HYBRIDS, *OTHERS])
def test_other_architectures_are_run_exactly_or_take_the_plain_engine_with_one_warning(kind):
    """Layers that keep a state instead of keys, chunks of attention, layers without rotation, sliding windows."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL | {"hidden_size": 32, "num_hidden_layers": 4} | (HYBRIDS | OTHERS)[kind])
    model = AutoModelForCausalLM.from_config(config).float().eval()
    config, prompts = GRPOConfig(group_size=3, max_completion_tokens=12), [torch.arange(3, 12), torch.arange(5, 9)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fast, plain = (grpo.sample_groups(model, prompts, config, eos_ids=[EOS], seeds=[1, 2], engine=e) for e in (FAST, PLAIN))
        trained = FAST.logprobs(model, [prompts[0]] * 3 + [prompts[1]] * 3, [c for g in fast for c in g.completions], 1.0)
    assert sum("the plain engine takes over" in str(one.message) for one in warned) == (kind in HYBRIDS)
    rows = [(one, two) for a, b in zip(fast, plain, strict=True) for one, two in zip(a.logps, b.logps, strict=True)]
    for row, (one, two) in zip(trained, rows, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
        torch.testing.assert_close(row[:len(one)], one, rtol=0, atol=1e-5)


def test_bf16_weights_do_not_decide_what_a_model_can_run():
    """Rounding of large weights would: the check is made on a small float32 model of the same layers."""
    model = make_model(dtype=torch.bfloat16, initializer_range=3.0)
    sampled_groups(model, GRPOConfig(group_size=4, max_completion_tokens=5))
    FAST.logprobs(model, [torch.tensor([3, 4])] * 2, [torch.tensor([5]), torch.tensor([6, 7])], 1.0)
    assert attention._verdicts[model] == dict.fromkeys(("shared prompts", "lean layers", "packed rows"), True)


def test_pack_group_layout():
    packed = packing.pack_group(torch.tensor([7, 8]), [torch.tensor([3]), torch.tensor([4, 5, 6])])
    assert packed.input_ids.tolist() == [[7, 8, 3, 4, 5, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3, 4]]
    assert packed.segment_ids.tolist() == [0, 0, 1, 2, 2, 2]
    assert packed.predictors.tolist() == [1, 1, 3, 4]
    assert packed.mask.tolist() == [[True, False, False], [True, True, True]]
    for bad in ((torch.tensor([], dtype=torch.long), [torch.tensor([1])]), (torch.tensor([1]), []),
                (torch.tensor([1]), [torch.tensor([], dtype=torch.long)])):
        with pytest.raises(ValueError, match="at least one token"):
            packing.pack_group(*bad)


class LargestLogits(TorchDispatchMode):
    """Remembers the most rows of V columns that any operation made, backward included."""

    def __init__(self, V):
        super().__init__()
        self.V, self.rows = V, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == self.V:
            self.rows = max(self.rows, out.numel() // self.V)
        return out


class OtherLinear(torch.nn.Linear):
    """An lm_head that is not plainly linear, as far as its type tells."""


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", [torch.nn.Linear, OtherLinear])
def test_a23_chunked_lm_head_has_the_naive_values_and_gradients(monkeypatch, kind, trained):
    torch.manual_seed(0)
    head = kind(3, 50, bias=False).double().requires_grad_(trained)  # frozen, as under LoRA, or not
    hidden, targets = torch.randn(33, 3, dtype=torch.float64, requires_grad=True), torch.randint(50, (33,))
    weights = torch.randn(33, dtype=torch.float64)
    inputs = [hidden, head.weight] if trained else [hidden]
    z = head(hidden) / 0.9
    naive = F.log_softmax(z, -1).gather(-1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((naive * weights).sum(), inputs)
    monkeypatch.setattr(packing, "LOGIT_CHUNK_ELEMENTS", 50 * 4)
    with LargestLogits(50) as largest:
        logp = packing.token_logprobs(head, hidden, targets, 0.9)
        found = torch.autograd.grad((logp * weights).sum(), inputs)
    assert largest.rows == 4
    torch.testing.assert_close(logp, naive, rtol=1e-12, atol=0)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


def test_a23_chunked_lm_head_under_bf16_autocast(monkeypatch):
    """Products in bf16, everything else in float32: as close to float32 as the unchunked head, gradients included."""
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(16, 50, bias=False), torch.randint(50, (33,))
    hidden, weights = torch.randn(33, 16, requires_grad=True), torch.randn(33)
    results = []
    for elements, bf16 in ((50 * 4, True), (10**9, True), (10**9, False)):
        monkeypatch.setattr(packing, "LOGIT_CHUNK_ELEMENTS", elements)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logp = packing.token_logprobs(head, hidden, targets, 0.9)
        assert logp.dtype == torch.float32
        results.append((logp.detach(), *torch.autograd.grad((logp * weights).sum(), [hidden, head.weight])))
    for chunked, whole, exact in zip(*results, strict=True):
        assert (chunked - exact).norm() < 1.5 * (whole - exact).norm() + 1e-6 < 0.02 * exact.norm()


def test_a23_the_weight_of_the_head_is_cast_once_a_pass(monkeypatch):
    class Casts(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.found += operation is torch.ops.aten._to_copy.default and args[0].shape == (50, 16)
            return operation(*args, **kwargs or {})

    head, hidden = torch.nn.Linear(16, 50, bias=False), torch.randn(33, 16, requires_grad=True)
    monkeypatch.setattr(packing, "LOGIT_CHUNK_ELEMENTS", 50 * 4)
    with Casts() as casts, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logp = packing.token_logprobs(head, hidden, torch.randint(50, (33,)), 0.9)
        forward = casts.found
        logp.sum().backward()
    assert (forward, casts.found) == (1, 2)


def test_a23_the_update_runs_lm_head_on_completion_positions_only(monkeypatch):
    model, (prompt, completions) = make_model(), a_group()
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[0]))
    packed_logprobs(model, packing.pack_group(prompt, completions), 1.0)
    assert sum(rows) == sum(map(len, completions))


# ---- update


def _advantages(G, B=2):
    return torch.randn(B, G, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _apply(model, groups, advantages, config, lr, reference=None, engine=FAST):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    batches = grpo.micro_batches(groups, advantages, config)
    if reference:
        grpo.reference_logprobs(reference, batches, config, engine)
    return grpo.policy_update(model, optimizer, batches, config, engine)


def test_an_update_never_leaves_the_kl_out_without_a_word():
    model, config = make_model(), GRPOConfig(group_size=3, max_completion_tokens=5)
    with pytest.raises(ValueError, match="kl_coef needs a reference"):
        _update(model, config, lr=0.1)
    _update(model, replace(config, kl_coef=0.0), lr=0.1)


def _update(model, config, lr, reference=None, engine=FAST):
    groups = sampled_groups(model, config, engine=engine)
    return groups, _apply(model, groups, _advantages(config.group_size), config, lr, reference, engine)


@pytest.mark.parametrize("updates, kl_coef", [(1, 0.0), (2, 0.1)])
def test_three_whole_steps_are_the_same_with_both_engines(updates, kl_coef):
    """float64, groups of unequal lengths, micro-batches: weights, statistics and what is sampled next."""
    config = GRPOConfig(group_size=5, max_completion_tokens=7, kl_coef=kl_coef, updates_per_rollout=updates, micro_batch=2,
                        clip_low=0.01, clip_high=0.01)
    models, reference = {name: make_model() for name in ENGINES}, make_model(seed=1)
    for step in range(3):
        seen = {}
        for name, engine in ENGINES.items():
            groups = sampled_groups(models[name], config, prompts=3, seed=step, eos_ids=(EOS, 6, 12), engine=engine)
            advantages = grpo.group_advantages(torch.tensor([[float(c[0] % 3) for c in g.completions] for g in groups]).double())
            stats = _apply(models[name], groups, advantages, config, 0.5, reference if kl_coef else None, engine)
            seen[name] = stats, [c.tolist() for g in groups for c in g.completions]
        (fast, texts), (plain, expected) = seen["fast"], seen["plain"]
        assert texts == expected and len({len(c) for c in texts}) > 1
        assert {k: v for k, v in fast.items() if k != "sampler_gap"} == pytest.approx(
            {k: v for k, v in plain.items() if k != "sampler_gap"}, rel=1e-9, abs=1e-12)
        for one, two in zip(models["fast"].parameters(), models["plain"].parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_passes_of_several_groups_have_the_update_of_single_ones(tokens):
    """float64, groups of unequal prompts and lengths, one of them flat and so not trained; statistics too."""
    config, results = GRPOConfig(group_size=4, max_completion_tokens=6, kl_coef=0.0, max_grad_norm=1e9, overlong="mask"), []
    groups, reference = sampled_groups(make_model(), config, prompts=5, eos_ids=(EOS, 6, 12)), make_model(seed=1)
    advantages = _advantages(4, B=5)
    advantages[2] = 0.0
    with_kl = replace(config, kl_coef=0.1)
    for joined in (False, True):
        model, batches = make_model(), grpo.micro_batches(groups, advantages, config)
        if joined:
            batches = packing.join(batches, config, tokens)
            assert len(batches) == {1: 5, 40: len(batches), 10**6: 2}[tokens]
            assert [len(b.prompts) for b in batches if not b.advantages.any()] == [4]  # the flat group is alone
            assert sorted(torch.cat([b.advantages for b in batches])) == sorted(advantages.flatten())
            assert all(len(b.prompts) == 4 or packing.pack(b.prompts, b.completions).input_ids.numel() <= tokens for b in batches)
        grpo.reference_logprobs(reference, batches, with_kl, FAST)
        stats = grpo.policy_update(model, torch.optim.SGD(model.parameters(), lr=0.5), batches, with_kl, FAST)
        results.append((stats, torch.cat([weight.flatten() for weight in model.parameters()])))
    (one, weights), (two, expected) = results
    assert one == pytest.approx(two, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


def test_a13_statistics_are_means_over_all_tokens_of_flat_groups_too():
    """One group flat: its tokens count with ratio 1 and no clipping, also where no pass is made for them."""
    model = make_model()
    config = GRPOConfig(group_size=4, max_completion_tokens=5, kl_coef=0.0)
    groups, advantages = sampled_groups(model, config), _advantages(4)
    advantages[0] = 0.0
    stats = _apply(model, groups, advantages, config, lr=0)
    counts = [sum(map(len, group.completions)) for group in groups]
    assert stats["tokens"] == sum(counts) and stats["trained_tokens"] == counts[1] and stats["ratio_mean"] == 1.0
    twice = replace(config, updates_per_rollout=2, clip_low=0.0, clip_high=0.0, max_grad_norm=1e9)
    batches, optimizer = grpo.micro_batches(groups, advantages, twice), torch.optim.SGD(model.parameters(), lr=0.5)
    old = [FAST.logprobs(model, b.prompts, b.completions, 1.0).detach() for b in batches]
    stats = grpo.policy_update(model, optimizer, batches, replace(twice, updates_per_rollout=1), FAST)
    new = [FAST.logprobs(model, b.prompts, b.completions, 1.0).detach() for b in batches]
    clipped = sum((((n > o) & (b.advantages[:, None] > 0)) & b.mask).sum() for n, o, b in zip(new, old, batches, strict=True))
    model = make_model()
    stats = grpo.policy_update(model, torch.optim.SGD(model.parameters(), lr=0.5), batches, twice, FAST)
    assert stats["clip_fraction_high"] == pytest.approx(clipped.item() / (2 * sum(counts)))  # two updates, none in the first


def test_no_clipping_of_the_gradient_when_its_largest_norm_is_zero():
    results = []
    for norm in (0, 1e9):
        model = make_model()
        _update(model, GRPOConfig(group_size=4, max_completion_tokens=5, kl_coef=0.0, max_grad_norm=norm), lr=0.5)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results) and not torch.equal(results[0], torch.cat([p.detach().flatten() for p in make_model().parameters()]))


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_a11_the_gradient_does_not_depend_on_micro_batches_or_order(loss):
    model, reference = make_model(), make_model(seed=1)
    base = {"group_size": 8, "max_completion_tokens": 6, "loss": loss, "kl_coef": 0.1, "max_grad_norm": 1e9}
    groups = sampled_groups(model, GRPOConfig(**base), prompts=2)
    advantages = _advantages(8)
    results = []
    for size in (0, 1, 2, 4, 8):
        _apply(model, groups, advantages, GRPOConfig(micro_batch=size, **base), 0, reference)
        results.append(gradients(model))
    _apply(model, groups[::-1], advantages.flip(0), GRPOConfig(**base), 0, reference)
    results.append(gradients(model))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_a12_first_update_is_reinforce_with_baseline(loss):
    model = make_model()
    config = GRPOConfig(group_size=4, max_completion_tokens=5, kl_coef=0.0, max_grad_norm=1e9, loss=loss)
    groups, stats = _update(model, config, lr=0)
    ours = gradients(model)
    assert stats["ratio_mean"] == 1.0 and stats["ratio_max"] == 1.0
    assert stats["approx_kl"] == stats["clip_fraction_low"] == stats["clip_fraction_high"] == 0.0
    model.zero_grad()
    for group, row in zip(groups, _advantages(4), strict=True):
        for completion, A in zip(group.completions, row, strict=True):
            z = model(torch.cat([group.prompt, completion])[None]).logits[0, len(group.prompt) - 1:-1]
            logp = F.log_softmax(z, -1).gather(-1, completion[:, None])[:, 0]
            tokens = sum(len(c) for group in groups for c in group.completions)
            weight = {"dapo": 1 / tokens, "cispo": 1 / tokens, "dr_grpo": 1 / (8 * 5)}.get(loss, 1 / (8 * len(completion)))
            (-A * logp.sum() * weight).backward()
    torch.testing.assert_close(ours, gradients(model), rtol=1e-9, atol=1e-12)


def test_a13_several_updates_reuse_one_rollout(monkeypatch):
    model = make_model()
    config = GRPOConfig(group_size=4, max_completion_tokens=5, kl_coef=0.0, updates_per_rollout=3)
    groups = sampled_groups(model, config)
    olds = []
    loss = grpo.policy_loss
    monkeypatch.setattr(grpo, "sample_groups", None)
    monkeypatch.setattr(grpo, "policy_loss", lambda logp, old, *rest: (olds.append(old.clone()), loss(logp, old, *rest))[1])
    stats = _apply(model, groups, _advantages(4), config, lr=0.5)
    assert len(olds) == 6 and all(torch.equal(olds[i], olds[i % 2]) for i in range(6))
    assert stats["ratio_max"] > 1.0 and stats["approx_kl"] > 0.0


def _token_logprobs(model, group, completion):
    z = model(torch.cat([group.prompt, completion])[None]).logits[0, len(group.prompt) - 1:-1]
    return F.log_softmax(z, -1).gather(-1, completion[:, None])[:, 0]


def _written_out(logps, olds, refs, advantages, config):
    """Eq. (2) to (5), a completion at a time."""
    losses = []
    for logp, old, ref, A in zip(logps, olds, refs, advantages, strict=True):
        ratio = (logp - old).mean().exp().expand_as(logp) if config.loss == "gspo" else (logp - old).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        kl = (ref - logp).exp() - (ref - logp) - 1
        surrogate = clipped.detach() * A * logp if config.loss == "cispo" else torch.minimum(ratio * A, clipped * A)
        losses.append(config.kl_coef * kl - surrogate)
    if config.loss in ("dapo", "dr_grpo", "cispo"):
        constant = len(losses) * config.max_completion_tokens
        return torch.cat(losses).sum() / (constant if config.loss == "dr_grpo" else len(torch.cat(losses)))
    return sum(tokens.mean() for tokens in losses) / len(losses)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_two_updates_on_one_rollout_equal_the_equations_written_out(loss):
    config = GRPOConfig(group_size=4, max_completion_tokens=5, kl_coef=0.1, updates_per_rollout=2, clip_low=0.02,
                        clip_high=0.03, loss=loss, max_grad_norm=1e9, micro_batch=3)
    model, naive, reference = make_model(), make_model(), make_model(seed=1)
    groups, advantages = sampled_groups(model, config), _advantages(4)
    stats = _apply(model, groups, advantages, config, 0.3, reference)
    assert stats["clip_fraction_low"] + stats["clip_fraction_high"] > 0.1

    rows, olds = [(group, completion) for group in groups for completion in group.completions], None
    refs = [_token_logprobs(reference, *row).detach() for row in rows]
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        logps = [_token_logprobs(naive, *row) for row in rows]
        olds = olds or [logp.detach() for logp in logps]
        _written_out(logps, olds, refs, advantages.flatten(), config).backward()
        optimizer.step()
    for one, two in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_updates_that_are_not_finite_are_skipped_and_counted():
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    config = GRPOConfig(group_size=4, max_completion_tokens=5, kl_coef=0.0)
    groups = sampled_groups(model, config)
    advantages = _advantages(4)
    advantages[0, 0] = math.inf
    assert _apply(model, groups, advantages, config, lr=0.1)["skipped_updates"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a22_monte_carlo_gradient_converges_to_the_exact_policy_gradient():
    """Three tokens, two positions, no EOS: all nine sequences are enumerated."""
    model = make_model(vocab_size=3, hidden_size=8, num_hidden_layers=1, pad_token_id=None, eos_token_id=None,
                       bos_token_id=None)
    prompt = torch.tensor([0, 2, 1])
    sequences = [torch.tensor(s) for s in itertools.product(range(3), repeat=2)]
    value = {tuple(s.tolist()): float((7 * s[0] + 3 * s[1] * s[1]) % 5) for s in sequences}

    logp = PLAIN.logprobs(model, [prompt] * 9, sequences, 1.0)  # [9, 2]
    probabilities = logp.sum(-1).exp()
    assert probabilities.sum().item() == pytest.approx(1.0)
    rewards = torch.tensor([value[tuple(s.tolist())] for s in sequences], dtype=torch.float64)
    (probabilities * rewards).sum().backward()  # ascend E[R]
    exact = gradients(model)

    G = 20_000
    config = GRPOConfig(group_size=G, max_completion_tokens=2, kl_coef=0.0, advantage_scale="none", loss="dr_grpo",
                        max_grad_norm=1e9, rollout_batch=G)
    group = grpo.sample_groups(model, [prompt], config, eos_ids=[], seeds=[0], engine=FAST)[0]
    rewards = torch.tensor([[value[tuple(c.tolist())] for c in group.completions]], dtype=torch.float64)
    advantages = grpo.group_advantages(rewards, "none")
    # Equal sequences share a row: a row's weight is its summed advantage, so the packed row stays short.
    keys = [tuple(c.tolist()) for c in group.completions]
    weights = torch.tensor([[sum(a for k, a in zip(keys, advantages[0].tolist(), strict=True) if k == tuple(s.tolist()))
                             for s in sequences]], dtype=torch.float64)
    nine = grpo.Group(prompt, sequences, [torch.zeros(2)] * 9, [True] * 9)
    model.zero_grad()
    _apply(model, [nine], weights * 9 / G, config, lr=0)
    estimate = -2 * gradients(model)  # dr_grpo divides by the constant length 2; the loss is minus the objective
    cosine = F.cosine_similarity(estimate, exact, dim=0).item()
    assert cosine > 0.995
    assert (estimate.norm() / exact.norm()).item() == pytest.approx(1.0, abs=0.05)


def test_importing_grpo_needs_torch_only():
    code = "import sys, grpo; print([m for m in ('transformers', 'sqlparse', 'sql_exec', 'rewards') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == "[]"


def test_without_kl_flat_groups_cost_no_forward_and_change_no_gradient(monkeypatch):
    model = make_model()
    config = GRPOConfig(group_size=4, max_completion_tokens=5, kl_coef=0.0, max_grad_norm=1e9)
    groups = sampled_groups(model, config, prompts=3)
    advantages = torch.cat([_advantages(4), torch.zeros(1, 4, dtype=torch.float64)])
    _apply(model, groups, advantages, config, lr=0)
    skipped = gradients(model)
    forwards = []
    counting = replace(FAST, logprobs=lambda *args: (forwards.append(1), FAST.logprobs(*args))[1])
    _apply(model, groups, advantages, config, lr=0, engine=counting)
    assert len(forwards) == 2
    _apply(model, groups, advantages + 1e-300, config, lr=0, engine=counting)  # not zero, so nothing is skipped
    assert len(forwards) == 2 + 3
    torch.testing.assert_close(gradients(model), skipped, rtol=1e-10, atol=1e-14)


def asked(databases=3, questions=4, group=3):
    """Micro-batches, each a group, whose databases come in turns."""
    groups = []
    for q in range(questions):
        for db in range(databases):
            prompt = torch.tensor([3 + db] * 40 + [9 + q] * 10)
            completions = [torch.tensor([8 + j] * 20) for j in range(group)]
            groups.append(grpo.Group(prompt, completions, [torch.zeros(20)] * group, [False] * group))
    return grpo.micro_batches(groups, torch.arange(float(len(groups) * group)).view(-1, group), GRPOConfig(group_size=group))


def test_passes_count_a_schema_once_and_hold_questions_on_the_same_database():
    batches = asked()
    four = 40 + 4 * (10 + 3 * 20)
    for tokens, count, schemas in ((four, 3, 3), (four - 1, 4, 6), (3 * four, 1, 3)):
        passes = packing.join(batches, GRPOConfig(), tokens)
        sizes = [packing.pack(b.prompts, b.completions).input_ids.numel() for b in passes]
        assert len(passes) == count and max(sizes) <= tokens
        assert sum(sizes) == 40 * schemas + 12 * (10 + 3 * 20)
        assert count != 3 or all(len({int(prompt[0]) for prompt in b.prompts}) == 1 for b in passes)


def test_passes_are_found_with_one_tree(monkeypatch):
    made = []
    monkeypatch.setattr(packing, "Tree", lambda *rows: (made.append(len(rows[0])), tree.Tree(*rows))[1])
    parts = packing.fill([[torch.arange(30)] * 2] * 250, 100)
    assert made == [500] and parts == [list(range(250))]


def test_a_group_that_is_too_long_for_a_row_is_cut(monkeypatch):
    monkeypatch.setattr(packing, "LONGEST", 100)
    batches = asked(1, 1, 5)
    passes = packing.join(batches, GRPOConfig(), 60)
    assert [b.advantages.tolist() for b in passes] == [[0, 1], [2, 3], [4]] and [b.mask.shape for b in passes] == [(2, 20), (2, 20), (1, 20)]
    assert [b.advantages.tolist() for b in packing.join(batches, GRPOConfig(), 150)] == [[0, 1, 2, 3, 4]]  # as --tokens-per-pass wants it
