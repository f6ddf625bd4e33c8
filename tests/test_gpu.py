"""What only a GPU can show: that graphs replay what a step computes, and that FlexAttention is the other ways'."""

import copy

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import grpo
import settings
from engine import attention, bf16, decoding, distributed, grid, row_attention
from engine.bf16 import weights_to_sample_with
from engine.fast import FAST
from engine.grid import Grid
from engine.offload import CPUAdamW
from engine.tree import Tree
from grpo import PLAIN, GRPOConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CONFIG = GRPOConfig(group_size=12, max_completion_tokens=60, kl_coef=0.0)
PROMPTS = [torch.arange(3, 3 + n) for n in (40, 25, 33)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                                        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1)).cuda().eval()


def sampled(model, engine=FAST, seed=0, **options):
    return grpo.sample_groups(model, PROMPTS, CONFIG, eos_ids=range(20), seeds=range(seed, seed + 3), engine=engine, **options)


def texts(groups):
    return [completion.tolist() for group in groups for completion in group.completions]


def test_graphs_replay_the_step(model, monkeypatch):
    """Several rollouts, so that all sizes are replayed; against the same step without graphs, and the plain engine."""
    for seed in range(3):
        with_graphs, plain = sampled(model, seed=seed), sampled(model, PLAIN, seed=seed)
        with monkeypatch.context() as eager:
            eager.setattr(Grid, "advance", lambda grid, t, forward: (setattr(grid, "attended", min(
                grid.T, max(64, 1 << (t - 1).bit_length()))), grid.step(forward)))
            without = sampled(model, seed=seed)
        assert texts(with_graphs) == texts(without) == texts(plain)
        for one, two in zip(with_graphs, without, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.logps, two.logps, strict=True))
    graphs = decoding._grids[attention.causal_lm(model)].graphs
    assert sum(graph is not None for graph in graphs.values()) > 1


def test_graphs_are_recorded_anew_when_tensors_must_grow(model):
    """Larger tensors have other addresses, so the graphs go, and with the last of them the memory that they shared."""
    changed, some = copy.deepcopy(model), PROMPTS[:1]
    for seed in (0, 0, 1):
        grpo.sample_groups(changed, some, CONFIG, eos_ids=range(20), seeds=[seed], engine=FAST)
    for seed in (0, 0, 1):
        assert texts(sampled(changed, seed=seed)) == texts(sampled(changed, PLAIN, seed=seed))


def test_graphs_see_the_weights_of_now(model):
    changed = copy.deepcopy(model)
    sampled(changed), sampled(changed)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.mul_(0.7)
    assert texts(sampled(changed)) == texts(sampled(changed, PLAIN)) != texts(sampled(model))


def test_bf16_weights_are_refreshed_in_place(model):
    changed = copy.deepcopy(model)
    with torch.autocast("cuda", torch.bfloat16):
        with weights_to_sample_with(changed) as first:
            places = [weight.data_ptr() for weight in first.parameters()]
        sampled(changed)
        with torch.no_grad():
            changed.lm_head.weight.mul_(-1)
        after = sampled(changed)
        with weights_to_sample_with(changed) as second:
            assert places == [weight.data_ptr() for weight in second.parameters()]
            assert torch.equal(second.lm_head.weight, changed.lm_head.weight.bfloat16())
        fresh = sampled(copy.deepcopy(changed))
    assert texts(after) == texts(fresh)


@pytest.mark.parametrize("H, Hk, d", [(4, 2, 64), (9, 3, 64), (14, 2, 64), (4, 1, 256)])
def test_flex_attention_is_masked_attention(H, Hk, d):
    """Where it can be compiled at all, which is asked for each size of a head."""
    if not row_attention.can_flex(d, torch.float32):
        pytest.skip(f"no FlexAttention for heads of {d}")
    rows = [torch.tensor([p] * P + [q] * Q + [9 + i] * n) for p, P, q, Q, lengths in (
        (0, 100, 0, 20, (30, 70, 1)), (0, 100, 1, 30, (40, 90)), (1, 40, 0, 0, (20, 20)), (2, 64, 0, 0, (200,)))
        for i, n in enumerate(lengths)]
    nodes = Tree(rows).nodes
    query, key, value, weight = (torch.randn(1, heads, nodes[-1].stop, d, device="cuda", requires_grad=True)
                                 for heads in (H, Hk, Hk, H))
    for window in (None, 50):
        results = []
        for way in (row_attention.flex, row_attention.masked):
            out = way(row_attention.RowLayout(nodes, query.device), query, key, value, 0.125, window)
            results.append((out, *torch.autograd.grad((out * weight).sum(), (query, key, value))))
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)  # TF32 products


def test_a_long_row_needs_no_mask_of_its_square():
    """60,000 tokens, whose mask would take 3.6 GB, and PyTorch 7 times that to find its blocks."""
    rows = [torch.cat([torch.zeros(2000, dtype=torch.long), torch.full((2000,), i)]) for i in range(1, 30)]
    layout = row_attention.RowLayout(Tree(rows).nodes, torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row_attention.block_mask(layout, None)
    assert torch.cuda.max_memory_allocated() - before < 1e8


def test_prompts_on_one_database_are_prefilled_as_one_row(model, monkeypatch):
    schema = torch.arange(3, 203)
    prompts = [torch.cat([schema, torch.arange(300 + 9 * i, 320 + 9 * i)]) for i in range(4)]
    made, exact = [], decoding.row_prefill
    monkeypatch.setattr(decoding, "row_prefill", lambda *given: (made.append(given[2].size), exact(*given))[1])
    with torch.no_grad():
        layers, mask, logits = decoding.prefill(model, prompts)
        monkeypatch.setattr(decoding, "WORTH", 10**9)
        padded, _, expected = decoding.prefill(model, prompts)
    assert made == [200 + 4 * 20]
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)
    for pair, other in zip(layers, padded, strict=True):
        for kept, theirs in zip(pair, other, strict=True):
            torch.testing.assert_close(kept, theirs, rtol=1e-2, atol=1e-2)


def test_packed_rows_have_the_log_probabilities_and_gradients_of_padded_ones(model):
    groups = sampled(model)
    prompts = [group.prompt for group in groups for _ in group.completions]
    completions = [completion for group in groups for completion in group.completions]
    results = []
    for engine in (FAST, PLAIN):
        model.zero_grad()
        logp = engine.logprobs(model, prompts, completions, 1.0)
        (logp * torch.linspace(-1, 1, logp.numel(), device="cuda").view_as(logp)).sum().backward()
        results.append((logp.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])))
    (logp, gradient), (expected, exact) = results
    torch.testing.assert_close(logp, expected, rtol=1e-2, atol=1e-2)
    assert (gradient - exact).norm() < 2e-2 * exact.norm()


def test_scores_of_bf16_keys_are_float32(model):
    """Of parts of larger tensors, as a grid's completions are."""
    query, keys = torch.randn(3, 2, 4, 6, 64).cuda().bfloat16(), torch.randn(3, 2, 4, 99, 64).cuda().bfloat16()[..., :40, :]
    found = grid.scores(query, keys)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), query.double() @ keys.double().mT, rtol=1e-4, atol=1e-4)


def test_a_bf16_sampler_is_close_to_the_trainer(model):
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        groups = sampled(model)
        for group in groups:
            logp = FAST.logprobs(model, [group.prompt] * 12, group.completions, 1.0)
            gaps = [(row[:len(one)].cpu() - one).abs() for row, one in zip(logp, group.logps, strict=True)]
            assert torch.cat(gaps).mean() < 0.02


@pytest.mark.parametrize("checked", [True, False])
def test_a_step_that_asks_for_a_value_is_not_replayed(monkeypatch, checked):
    """Found before a graph is recorded, or by the recording that fails."""
    torch.manual_seed(0)
    rotation = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1,
                                         rope_parameters=rotation)).cuda().eval()
    if not checked:
        monkeypatch.setattr(decoding, "can_replay", lambda *_: True)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph") as told:
        found = [texts(sampled(model, seed=seed)) for seed in (0, 0)]
    assert len(told) == 1 and found == [texts(sampled(model, PLAIN))] * 2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_an_optimizer_on_the_cpu_is_that_on_the_card(model, dtype, tolerance):
    """Two backward passes a step, so that gradients are summed; weights of bf16 against float32 ones."""
    ends = []
    for adamw, kind in ((torch.optim.AdamW, torch.float32), (CPUAdamW, dtype)):
        changed = copy.deepcopy(model).to(kind)
        optimizer = adamw(changed.parameters(), lr=1e-2, weight_decay=0.0)
        for seed in range(3):
            for part in torch.randint(500, (2, 4, 30), generator=torch.Generator().manual_seed(seed)).cuda():
                changed(input_ids=part, labels=part).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            ends.append(changed(input_ids=part, labels=part).loss.item())
        assert all(weight.grad is None for weight in changed.parameters())
    with torch.no_grad():
        assert abs(ends[0] - ends[1]) < tolerance * ends[0] < 0.9 * model(input_ids=part, labels=part).loss


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone, in which a single card shows what a sharded model does."""
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_sharded_model_samples_by_graphs_from_its_bf16_copy(model, one_process):
    """Recorded in the first rollouts, replayed with other weights in the next, after autocast has dropped its cache."""
    alone, changed = copy.deepcopy(model), copy.deepcopy(model)
    several = distributed.Sharded(changed, FAST)
    for step in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            with distributed.unsharded(several):
                found = texts(sampled(changed, seed=step % 2))
            assert found == texts(sampled(alone, seed=step % 2))
        with torch.no_grad():
            for weight in (*changed.parameters(), *alone.parameters()):
                weight.mul_(0.9)
    graphs = decoding._grids[attention.causal_lm(bf16._copies[changed])].graphs
    assert sum(graph is not None for graph in graphs.values()) > 1


def test_the_optimizers_state_of_a_sharded_model_lies_on_the_cpu_and_comes_back_to_the_card(model, one_process):
    changed = copy.deepcopy(model)
    several = distributed.Sharded(changed, FAST)
    optimizer, fresh = (torch.optim.AdamW(changed.parameters(), lr=rate, fused=True) for rate in (1e-3, 1.0))
    several.engine.logprobs(changed, PROMPTS, PROMPTS, 1.0).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    state = distributed.full_state(changed, optimizer)
    assert all(value.device.type == "cpu" for values in state["state"].values() for value in values.values())
    distributed.load_full_state(changed, fresh, state)
    for weight, values in optimizer.state.items():
        for name, value in values.items():
            assert fresh.state[weight][name].device.type == "cuda" and torch.equal(
                *(x.full_tensor() if distributed.is_sharded(x) else x for x in (fresh.state[weight][name], value)))


def test_the_memory_that_is_free_is_that_of_the_card(model):
    before = settings.memory_free()
    held = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    assert before - settings.memory_free() == pytest.approx(held.numel(), rel=0.05)
    assert before <= torch.cuda.get_device_properties(0).total_memory + settings.plan.LIBRARIES


def test_the_grid_waits_for_nothing_between_looks(model):
    sampled(model)
    one, forward = decoding._grids[attention.causal_lm(model)], decoding.forward_of(model)
    one.attended = one.T
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.t.fill_(5)
        with torch.no_grad():
            one.step(lambda token, position, grid: forward(model, token, position, grid))
    finally:
        torch.cuda.set_sync_debug_mode("default")
