"""engine/offload.py: the optimizer on the CPU is the ordinary one, bit for bit, and keeps what bf16 weights lose."""

import json
import shutil

import pytest
import torch
from little_policy import LESSONS, little_policy_folder
from safetensors.torch import load_file
from test_grpo import _advantages, make_model, sampled_groups

import grpo
import train
from common.errors import UserError
from engine import offload
from engine.distributed import full_state, load_full_state
from engine.fast import FAST
from engine.offload import CPUAdamW
from settings import parse_settings

CONFIG = grpo.GRPOConfig(group_size=4, max_completion_tokens=5, kl_coef=0.0, updates_per_rollout=2, micro_batch=3,
                         max_grad_norm=0.05)


def three_updates(adamw, resumed=False, dtype=torch.float32):
    """A model after three rollouts of two updates, its gradients clipped; `resumed`: saved and loaded between them."""
    model = make_model(dtype=dtype)
    optimizer = adamw(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for seed in range(3):
        batches = grpo.micro_batches(sampled_groups(model, CONFIG, seed=seed), _advantages(4).float(), CONFIG)
        stats = grpo.policy_update(model, optimizer, batches, CONFIG, FAST)
        assert stats["grad_norm"] > CONFIG.max_grad_norm and not stats["skipped_updates"]
        if resumed:
            weights, state = {name: w.clone() for name, w in model.state_dict().items()}, full_state(model, optimizer)
            model = make_model(dtype=dtype, seed=9)
            model.load_state_dict(weights)
            optimizer = adamw(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
            load_full_state(model, optimizer, state)
    return model, optimizer


@pytest.mark.parametrize("resumed", [False, True])
def test_float32_weights_are_those_of_the_ordinary_optimizer_bit_for_bit(resumed):
    (plain, _), (offloaded, optimizer) = three_updates(torch.optim.AdamW), three_updates(CPUAdamW, resumed)
    start = make_model(dtype=torch.float32)
    for before, one, two in zip(start.parameters(), plain.parameters(), offloaded.parameters(), strict=True):
        assert torch.equal(one, two) and not torch.equal(before, two)
    assert all(weight.grad is None for weight in offloaded.parameters())
    assert optimizer.state_dict()["masters"] == []  # the weights themselves are saved


@pytest.mark.parametrize("resumed", [False, True])
def test_bf16_weights_have_float32_masters_that_are_saved(resumed):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4, bias=False).bfloat16()
    start, optimizer = model.weight.detach().float(), CPUAdamW(model.parameters(), lr=1e-5)
    for number in range(100):  # each step is far below the spacing of bf16 numbers near 0.3
        model.weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if resumed and number == 50:
            weight, state = model.weight.detach(), full_state(model, optimizer)
            model = torch.nn.Linear(4, 4, bias=False).bfloat16()
            model.load_state_dict({"weight": weight})
            optimizer = CPUAdamW(model.parameters(), lr=1e-5)
            load_full_state(model, optimizer, state)
    torch.testing.assert_close(optimizer.masters[0].detach(), start - 1e-3 * (1 + 1e-2 * start), rtol=0, atol=1e-4)
    assert torch.equal(model.weight, optimizer.masters[0].bfloat16()) and not torch.equal(model.weight.float(), start)


def test_gradients_are_summed_in_float32():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = CPUAdamW([weight], lr=0.1)
    for factor in (256.0, 1.0, 1.0):  # in bf16 256 + 1 is 256
        (factor * weight).sum().backward()
    assert optimizer.masters[0].grad.tolist() == [258.0, 258.0] and weight.grad is None


def test_gradients_on_their_way_are_waited_for(monkeypatch):
    """From a GPU they arrive late, and maybe only when they are waited for; those of one backward before it ends."""
    class Late:
        def __init__(self, gradient, copy):
            self.gradient, self.copy, self.asked = gradient, copy, 0

        def query(self):
            self.asked += 1
            return self.asked > 2 and self.synchronize() is None

        def synchronize(self):
            self.copy.copy_(self.gradient)

    def fetched(gradient, _):
        copy = torch.full_like(gradient, float("nan"))
        return copy, Late(gradient, copy)

    layers = [torch.nn.Linear(3, 3).bfloat16() for _ in range(5)]
    model, x = torch.nn.Sequential(*layers), torch.randn(4, 3).bfloat16()
    monkeypatch.setattr(offload, "fetched", fetched)
    optimizer, expected = CPUAdamW(model.parameters(), lr=0.1), [0.0] * 10
    for factor in (256.0, 1.0):
        grads = torch.autograd.grad((factor * model(x)).sum(), list(model.parameters()))
        expected = [before + grad.float() for before, grad in zip(expected, grads, strict=True)]
        (factor * model(x)).sum().backward()
        assert not optimizer.on_their_way
        for master, sum_ in zip(optimizer.masters, expected, strict=True):
            assert torch.equal(master.grad, sum_)


def test_a_run_and_its_resumption_are_those_of_the_ordinary_optimizer(tmp_path, tiny_db):
    """After a cold start, which leaves gradients behind; the gradient of each step comes from two passes."""
    records = [{"db_id": "music", "question": question, "query": sql, "trace": trace} for question, sql, trace in LESSONS]
    (tmp_path / "own.json").write_text(json.dumps([record | {"split": split} for record in records for split in ("train", "dev")]))

    def run(name, *more):
        flags = ["--data", str(tmp_path / "own.json"), "--data-dir", str(tmp_path), "--model", str(little_policy_folder(tiny_db)),
                 "--traces", str(tmp_path / "own.json"), "--cold-start-steps", "2", "--cold-start-batch", "2", "--steps", "4",
                 "--lr", "1e-3", "--prompts-per-step", "4", "--group-size", "4", "--micro-batch", "2", "--sql-workers", "1",
                 "--max-completion-tokens", "24", "--eval-every", "2", "--test-questions", "0", "--save-every", "2",
                 "--prompt-style", "compact"]
        assert train.run_all(parse_settings([*flags, "--output", str(tmp_path / name), *more])) == 0
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    losses = run("plain")
    assert run("cpu", "--optimizer-device", "cpu") == losses and all(losses[1:])
    shutil.rmtree(tmp_path / "cpu/checkpoints/step-4")
    assert run("cpu", "--optimizer-device", "cpu", "--resume") == losses
    one, two = (load_file(tmp_path / name / "checkpoints/step-4/model.safetensors") for name in ("plain", "cpu"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_several_processes_are_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(train.distributed, "size", lambda: 2)
    with pytest.raises(UserError, match="--optimizer-device cpu works in a single process only"):
        train.run_all(parse_settings(["--optimizer-device", "cpu", "--output", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


def test_a_cold_start_of_bf16_weights_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    flags = ["--optimizer-device", "cpu", "--model", "qwen2.5-3b"]
    parse_settings(flags)
    with pytest.raises(UserError, match="too coarse for the cold start"):
        parse_settings([*flags, "--cold-start-steps", "5"])
