"""plan.py and settings.py: what a run needs and what it does by default, from the model's configuration alone."""

import contextlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_in_process
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import grpo
import policy as policies
import settings
import train
from common.errors import UserError
from engine import bf16, packing
from engine.fast import checkpointed
from engine.offload import CPUAdamW
from models import adapters, memory_plan, model_files, published
from running import layers, recipes

ROOT = Path(__file__).parents[1]
SMALL = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2}
MODELS = [(Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
          (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False, "num_key_value_heads": 4}),
          (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 1}),
          (LlamaForCausalLM, LlamaConfig, {}),
          (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
          (LlamaForCausalLM, LlamaConfig, {"head_dim": 24}),
          (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "attention_bias": True}),
          (MistralForCausalLM, MistralConfig, {}),
          (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 16})]
WORK = memory_plan.Work(prompt=200, completion=40, group=8, prompts=4, micro_batch=0, rollout_batch=256, reference=True,
                 reference_on_cpu=False, lora_rank=0, checkpointing=False, gpu=False)


def saved_config(model, folder):
    """The config.json that transformers writes for a model."""
    model.config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind, config, changes", MODELS)
def test_parameters_are_counted_exactly(kind, config, changes, tmp_path):
    model = kind(config(**SMALL | changes))
    shape = memory_plan.Shape.of(saved_config(model, tmp_path))
    assert shape.parameters() == sum(p.numel() for p in model.parameters())


def test_adapters_are_counted_exactly(tmp_path):
    pytest.importorskip("peft", reason="peft is optional")
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL))
    shape = memory_plan.Shape.of(saved_config(model, tmp_path))
    adapted = adapters.add_lora(model, 4)
    assert shape.adapters(4) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_the_published_models_have_the_published_numbers_of_parameters():
    counts = {size: memory_plan.Shape.of(config).parameters() for size, config in published.PUBLISHED.items()}
    assert counts == {"0.5b": 494_032_768, "1.5b": 1_543_714_304, "3b": 3_085_938_688, "7b": 7_615_616_512,
                      "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
                      "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
                      "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
                      "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952}
    for name, source in policies.ALIASES.items():
        size = name if name in counts else next(size for size in counts if f"-{size}" in name)
        assert policies.config_of(name) == policies.config_of(source) == published.PUBLISHED[size]


def test_the_tiny_policy_is_not_larger_than_planned():
    built = policies.build_tiny([f"SELECT {n} FROM t{n} WHERE a > {7 * n}" for n in range(10, 999)], seed=0)
    assert sum(p.numel() for p in built.model.parameters()) <= memory_plan.Shape.of(memory_plan.TINY).parameters() <= 1.1e6


@pytest.mark.parametrize("changes", [{}, {"gpu": True, "bf16": True}, {"bf16": True, "lora_rank": 8}, {"checkpointing": True},
                                     {"gpu": True, "reference_on_cpu": True}, {"reference": False, "frozen_copy": True},
                                     {"pass_tokens": 2000}, {"optimizer_on_cpu": True},
                                     {"gpu": True, "bf16": True, "optimizer_on_cpu": True}])
def test_totals_are_the_sums_of_their_lines(changes):
    shape = memory_plan.Shape.of(published.PUBLISHED["3b"])
    found = memory_plan.phases(shape, memory_plan.replace(WORK, **changes))
    lines = memory_plan.table(found).splitlines()
    rows = {line[:22].strip(): line[22:].split() for line in lines}
    for column, (moment, parts) in enumerate(found.items()):
        shown = sum(float(cells[column]) for name, cells in rows.items() if name not in ("GB", "total") and cells[column] != "-")
        assert rows["GB"][column] == moment
        assert shown == pytest.approx(float(rows["total"][column]), abs=0.005 * len(rows))
        assert sum(parts.values()) / 1e9 == pytest.approx(float(rows["total"][column]), abs=0.006)
    assert memory_plan.peak(found)[1] == max(sum(parts.values()) for parts in found.values())


def kept_for_backward(layers, width=128, autocast=False, lora=0, checkpointing=False):
    """Bytes that autograd keeps of a packed row, weights and their casts left out."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=300, hidden_size=width, intermediate_size=320, num_hidden_layers=layers,
                                         num_attention_heads=4, num_key_value_heads=2))
    model = adapters.add_lora(model.bfloat16() if autocast else model, lora) if lora else model
    if checkpointing:
        policies.checkpoint_activations(model)
    packed = packing.pack_group(torch.arange(WORK.prompt), [torch.arange(WORK.completion)] * WORK.group)
    weights = {p.numel() for p in model.parameters() if p.dim() == 2}
    kept = {}

    def note(tensor):
        if tensor.dim() != 2 or tensor.numel() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    arithmetic = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if autocast else contextlib.nullcontext()
    with arithmetic, grpo.dropout_off(model):
        with torch.no_grad():
            packing.can_pack(model)  # looks once
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            checkpointed(packing.packed_logprobs)(model, packed, 1.0)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("autocast, lora", [(False, 0), (True, 0), (False, 4), (True, 4)])
def test_what_a_layer_keeps_for_backward(autocast, lora):
    """Autocast on the CPU stands for that on a GPU: the same tensors are kept."""
    if lora:
        pytest.importorskip("peft", reason="peft is optional")
    counted = kept_for_backward(3, autocast=autocast, lora=lora) - kept_for_backward(2, autocast=autocast, lora=lora)
    shape = memory_plan.Shape(300, 128, 320, 2, 4, 2, 32, True, 0)
    assert memory_plan.layer_bytes(shape, memory_plan.replace(WORK, bf16=autocast, lora_rank=lora)) == pytest.approx(counted, rel=0.06)


def test_checkpointing_keeps_the_inputs_of_layers_only():
    counted = kept_for_backward(4, checkpointing=True) - kept_for_backward(2, checkpointing=True)
    assert counted == pytest.approx(2 * memory_plan.row_tokens(WORK) * 128 * 4, rel=0.02)


def test_a_row_is_as_long_as_the_passes_that_are_made_of_a_group():
    """Of one that fits, of one that is cut, and of one that --tokens-per-pass lets be whole."""
    for group, completion, pass_tokens in ((8, 40, 0), (32, 2048, 9000), (32, 2048, 40_000)):
        work = memory_plan.replace(WORK, prompt=2048, completion=completion, group=group, pass_tokens=pass_tokens, prompts=1, gpu=True)
        groups = [grpo.Group(torch.arange(2048), [torch.arange(completion) + i for i in range(group)], [None] * group, [False] * group)]
        passes = packing.join(grpo.micro_batches(groups, torch.ones(1, group), grpo.GRPOConfig()), grpo.GRPOConfig(), pass_tokens)
        longest = max(packing.pack(b.prompts, b.completions).input_ids.numel() for b in passes)
        assert memory_plan.row_tokens(work) == longest <= max(memory_plan.MOST, pass_tokens)
        assert memory_plan.phases(memory_plan.Shape.of(published.PUBLISHED["0.5b"]), work)["update"]["attention mask"] == memory_plan.mask_bytes(work) < 1e7
        assert memory_plan.mask_bytes(memory_plan.replace(work, gpu=False)) == 0


@pytest.mark.parametrize("limit", [24, 40, 80])
def test_the_flags_that_are_advised_make_it_fit_and_none_is_idle(limit):
    shape = memory_plan.Shape.of(published.PUBLISHED["3b"])
    work = memory_plan.replace(WORK, prompt=2048, completion=512, group=32, gpu=True, bf16=True)
    given = {"--gradient-checkpointing": {"checkpointing": True}, "--reference-device": {"reference_on_cpu": True},
             "--micro-batch": {"micro_batch": 8}, "--rollout-batch": {"rollout_batch": 64}, "--lora-rank": {"lora_rank": 16},
             "--optimizer-device": {"optimizer_on_cpu": True}}
    flags = memory_plan.smaller(shape, work, limit * 1e9)
    assert flags

    def need(flags):
        changed = {name: value for flag in flags for name, value in given[flag.split()[0]].items()}
        return memory_plan.peak(memory_plan.phases(shape, memory_plan.replace(work, **changed)))[1]

    assert need(flags) <= limit * 1e9 < min(need([other for other in flags if other != flag]) for flag in flags)
    assert memory_plan.smaller(shape, work, 1e9) == []


def test_an_optimizer_on_the_cpu_leaves_bf16_weights_and_no_state_on_the_card():
    """What the class holds of a float32 and of a bf16 model, beside the plan."""
    shape, gpu = memory_plan.Shape.of(published.PUBLISHED["3b"]), memory_plan.replace(WORK, gpu=True, bf16=True, optimizer_on_cpu=True, checkpointing=True)
    found, n = memory_plan.phases(shape, gpu)["update"], shape.parameters()
    assert found["parameters"] == found["reference"] == 2 * n and found["optimizer"] == 0
    assert found["gradients"] == 2 * shape.vocabulary * shape.width  # the largest, which goes when it is made
    assert memory_plan.phases(shape, memory_plan.replace(WORK, optimizer_on_cpu=True))["update"]["optimizer"] == 12 * n  # on a CPU it costs
    assert "the optimizer needs 49.4 GB of main memory" in memory_plan.text("qwen2.5-3b", shape, gpu, 24e9)
    model = torch.nn.Linear(8, 4, bias=False).bfloat16()
    optimizer = CPUAdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    held = [*optimizer.masters, *(m.grad for m in optimizer.masters),
            *(value for state in optimizer.state.values() for value in state.values() if value.numel() > 1)]
    assert sum(t.numel() * t.element_size() for t in held) == 16 * 32 and model.weight.grad is None


def test_plan_prints_and_writes_nothing(tmp_path):
    folder = tmp_path / "run"
    flags = ["--plan", "24", "--model", "qwen2.5-3b", "--output", folder]
    full, lora = run_in_process(train, *flags), run_in_process(train, *flags, "--lora-rank", "16")
    assert (full[0], lora[0], full[2], lora[2]) == (0, 0, "", "") and not folder.exists()
    assert "24.0 GB: it fits" in lora[1]
    assert "does not fit; it would fit with --reference-device cpu --optimizer-device cpu" in full[1]
    assert re.search(r"^--lora-rank auto would train adapters of rank 16, .* GB: they fit$", full[1], re.MULTILINE)
    assert "auto" not in lora[1]
    for name in ("parameters", "gradients", "optimizer", "KV cache", "activations", "logits chunk", "total"):
        assert re.search(rf"^{name} ", lora[1], re.MULTILINE), name


def test_a_model_that_cannot_be_planned_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="its model_type is gpt2"):
        train.planned(train.parse_settings(["--plan", "--model", str(tmp_path)]))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(UserError, match="has no intermediate_size"):
        train.planned(train.parse_settings(["--plan", "--model", str(tmp_path)]))
    monkeypatch.setattr(model_files, "hub_answers", lambda: False)
    with pytest.raises(UserError, match="hf download nobody/nothing"):
        train.parse_settings(["--plan", "--model", "nobody/nothing"])


@pytest.mark.parametrize("more", [(), ("--lora-rank", "16")])
def test_a_missing_model_is_told_before_data_is_read_or_a_folder_written(tmp_path, monkeypatch, more):
    monkeypatch.setattr(model_files, "hub_answers", lambda: False)
    monkeypatch.setattr(train, "load_splits", lambda *_, **__: pytest.fail("data was read"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "qwen2.5-3b", "--output", str(tmp_path / "run"), *more])
    with pytest.raises(UserError, match="hf download Qwen/Qwen2.5-3B-Instruct"):
        train.main()
    assert not (tmp_path / "run").exists()


def test_the_plan_is_of_the_fast_engine_and_of_evaluations_too():
    s = train.parse_settings(["--plan", "24", "--model", "qwen2.5-3b", "--engine", "plain"])
    with pytest.raises(UserError, match="--plan counts the memory of --engine fast"):
        settings.planned(s)
    shape, work = settings.planned(train.parse_settings(["--plan", "24", "--model", "qwen2.5-3b"]))
    prompts, tokens = settings.rollout_room(train.parse_settings(["--model", "qwen2.5-3b"]))
    assert prompts == memory_plan.sampled_together(work) * work.prompt
    assert memory_plan.keys_and_values(shape, work) == tokens * 2 * shape.kv_heads * shape.head * shape.layers * 2


# ---- does it fit this machine?


def fitted(room, *flags, model="qwen2.5-3b", processes=1):
    arguments = ["--model", model, *flags]
    return settings.fit(arguments, train.parse_settings(arguments), room, processes)


def test_all_weights_are_trained_where_they_fit_and_adapters_where_they_do_not():
    pytest.importorskip("peft", reason="peft is optional")
    alike = ("--precision", "float32")  # on every machine
    whole = train.parse_settings(["--model", "qwen2.5-3b", *alike])
    adapted = train.parse_settings(["--model", "qwen2.5-3b", "--lora-rank", "16", *alike])
    assert (whole.run.lora_rank, adapted.run.lr) == (0, 10 * whole.run.lr)
    full, lora = settings.peak_of(whole), settings.peak_of(adapted)
    for flags in (alike, (*alike, "--lora-rank", "auto")):
        chosen, (note,) = fitted(1.01 * full / memory_plan.SHARE, *flags)
        assert chosen == whole and note.startswith("--lora-rank auto: all weights are trained")
        chosen, (note,) = fitted(0.99 * full / memory_plan.SHARE, *flags)
        assert chosen == adapted and "adapters of rank 16 are trained" in note  # its learning rates, too
        chosen, notes = fitted(lora, *flags)  # within the error of the plan
        assert chosen == adapted and notes[1].startswith("warning: memory may run out: training adapters of rank 16")
    with pytest.raises(UserError, match="^training adapters of rank 16 of qwen2.5-3b needs .* GB too few; it would fit with "
                                        "[^.]*--max-completion-tokens 768"):
        fitted(lora / (1 + memory_plan.ERROR) / 1.3, *alike)
    with pytest.raises(UserError, match="no flag makes it fit: take a smaller model"):
        fitted(4e9)


def test_a_rank_that_is_given_is_kept_and_refused_only_beyond_the_error_of_the_plan():
    for rank, trained in (("0", "all weights"), ("8", "adapters of rank 8")):
        flags = ("--lora-rank", rank)
        s = train.parse_settings(["--model", "qwen2.5-3b", *flags])
        need = settings.peak_of(s)
        assert fitted(need / memory_plan.SHARE + 1, *flags) == (s, [])
        chosen, (note,) = fitted(need, *flags)
        assert chosen == s and note.startswith("warning: memory may run out")
        with pytest.raises(UserError, match=f"training {trained} of .* GB too few; it would fit with --"):
            fitted(need / (1 + memory_plan.ERROR) - 1, *flags)


def test_adapters_without_peft_are_one_sentence_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"of 50.0 GB that are free, and adapters need peft: pip install -r requirements-extra.txt$"):
        fitted(50e9)
    assert fitted(500e9)[0].run.lora_rank == 0


def test_tiny_resumed_and_unknown_models_are_not_compared(tmp_path):
    assert fitted(0, model="tiny") == (train.parse_settings([]), [])
    (tmp_path / "config.json").write_text(json.dumps(train.parse_settings(["--model", "qwen2.5-3b"]).as_dict() | {"plan": 0.0}))
    again = train.parse_settings(["--resume", "--output", str(tmp_path)])
    assert settings.fit(["--resume", "--output", str(tmp_path)], again, 0) == (again, []) and again.run.plan is None
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    chosen, (note,) = fitted(0, model=str(tmp_path))
    assert chosen.run.lora_rank == 0 and "its model_type is gpt2" in note


def test_a_sharded_run_needs_less_in_each_process():
    flags = ["--model", "qwen2.5-3b", "--sharding", "on", "--kl-coef", "0", "--precision", "float32"]
    s = train.parse_settings(flags)
    shape, work = settings.planned(s, processes=4)
    assert (work.shards, work.prompts) == (4, 2)
    assert settings.planned(train.parse_settings([*flags, "--sharding", "off"]), processes=4)[1].shards == 1
    found, n = memory_plan.phases(shape, work), shape.parameters()
    update = found["update"]
    assert [update[name] for name in ("parameters", "gradients", "optimizer")] == [n, n, 2 * n]  # 4, 4 and 8 bytes over 4
    assert found["sampling"]["gathered"] == 4 * n and 0 < update["gathered"] < 4 * n
    rounded = memory_plan.phases(shape, memory_plan.replace(work, bf16=True))["sampling"]
    embedding = shape.vocabulary * shape.width
    assert (rounded["gathered"], rounded["bf16 weights"]) == (0, 2 * n + 4 * embedding)  # its copy is filled layer by layer
    need = settings.peak_of(s, 4)
    assert need < settings.peak_of(s) and fitted(need / memory_plan.SHARE + 1, *flags[2:], processes=4)[0].run.lora_rank == 0


def test_processes_on_a_cpu_share_the_memory_that_passes_may_take(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory_plan, "machine_memory", lambda: 200e9)
    s = train.parse_settings(["--model", "qwen2.5-0.5b", "--precision", "float32"])
    alone, of_four = (settings.planned(s, processes=n)[1].pass_tokens for n in (1, 4))
    assert memory_plan.LEAST < of_four == pytest.approx(alone / 4, abs=1) and alone < memory_plan.MOST


@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_of_a_sharded_model_has_float32_embeddings_of_its_own(tied):
    config = Qwen2Config(**memory_plan.TINY | {"tie_word_embeddings": tied})
    copied = {id(weight): weight for weight in bf16.all_weights(bf16.rounded_copy(Qwen2ForCausalLM(config)))}.values()
    planned = memory_plan.copy_to_sample_with(memory_plan.Shape.of(config.to_dict()), memory_plan.replace(WORK, bf16=True, shards=2))
    assert planned == pytest.approx(sum(weight.numel() * weight.element_size() for weight in copied), rel=0.01)


def test_adapters_on_a_cpu_have_a_float32_base_unless_bf16_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(policies, "prefers_bf16", lambda parameters, gpu: gpu or parameters > 20e6)  # as with AMX
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for more, base, copied in (([], 4, 2), (["--precision", "bf16"], 2, 0), (["--plan", "24"], 2, 0)):
        shape, work = settings.planned(train.parse_settings(["--model", "qwen2.5-3b", "--lora-rank", "16", *more]))
        n, adapters = shape.parameters(), shape.adapters(16)
        found = memory_plan.phases(shape, work)["sampling"]
        assert found["parameters"] == base * n + 4 * adapters
        assert found["bf16 weights"] == (copied * n or 2 * adapters)
        if not more:
            assert memory_plan.smaller(shape, work, 0.7 * memory_plan.peak(memory_plan.phases(shape, work))[1]) == ["--precision bf16"]


@pytest.mark.parametrize("version, files", [
    (2, {"sys/fs/cgroup/memory.max": "8000000000", "sys/fs/cgroup/memory.current": "5000000000",
         "sys/fs/cgroup/memory.stat": "anon 3\ninactive_file 1000000000\n", "sys/fs/cgroup/box/memory.max": "max"}),
    (1, {"sys/fs/cgroup/memory/box/memory.limit_in_bytes": "8000000000",
         "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "5000000000",
         "sys/fs/cgroup/memory/box/memory.stat": "inactive_file 7\ntotal_inactive_file 1000000000\n"})])
def test_the_memory_that_is_free_is_that_of_the_container(tmp_path, version, files):
    """A limited group above, or this one: its limit less what is taken, where that is no cache of files."""
    files |= {"proc/self/cgroup": "0::/box\n" if version == 2 else "4:memory:/box\n3:cpuset:/\n",
              "proc/meminfo": "MemTotal:  99000000 kB\nMemAvailable:    3000000 kB\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_plan.machine_memory(tmp_path) == min(8_000_000_000, memory_plan.machine_memory(tmp_path / "nothing"))
    assert memory_plan.free_memory(tmp_path) == 3_000_000 * 1024
    (tmp_path / "proc/meminfo").write_text("MemAvailable:    90000000 kB\n")
    assert memory_plan.free_memory(tmp_path) == 4_000_000_000
    assert 0 < memory_plan.free_memory() <= memory_plan.machine_memory()


# ---- defaults


def test_defaults_follow_the_size_of_the_model_and_given_flags_win():
    by_size = {name: train.parse_settings(["--model", name]) for name in ("qwen2.5-0.5b", "qwen2.5-3b", "qwen2.5-7b")}
    small, middle, large = by_size.values()
    assert small.grpo.group_size > middle.grpo.group_size and small.run.lr > middle.run.lr > large.run.lr
    assert [s.run.gradient_checkpointing for s in by_size.values()] == [True, True, True]
    assert [(s.prompts.max_prompt_tokens, s.grpo.max_completion_tokens) for s in by_size.values()] == [(2048, 1024), *[(4096, 1536)] * 2]
    lora = train.parse_settings(["--model", "qwen2.5-3b", "--lora-rank", "16"])
    assert lora.run.lr == 10 * middle.run.lr and lora.sft.cold_start_lr == 10 * middle.sft.cold_start_lr
    given = train.parse_settings(["--model", "qwen2.5-3b", "--lr", "3e-5", "--group-size", "4", "--no-gradient-checkpointing"])
    assert (given.run.lr, given.grpo.group_size, given.run.gradient_checkpointing) == (3e-5, 4, False)
    assert train.parse_settings([]).run.lr == settings.TINY["lr"]


def test_what_a_sampler_in_bf16_gets_wrong_is_bounded_by_default():
    flags = ["--model", "qwen2.5-0.5b", "--precision"]
    caps = [train.parse_settings([*flags, *more]).grpo.sampler_cap for more in (
        ["bf16"], ["float32"], ["bf16", "--sampler-cap", "0"], ["float32", "--recipe", "grpo-2026"])]
    assert caps == [2.0, 0.0, 0.0, 2.0] and train.parse_settings(["--precision", "bf16"]).grpo.sampler_cap == 2.0


def test_the_docs_show_the_defaults_by_size():
    rows = re.findall(r"^\| (?:up to \d B|more) \| (\d+) \| (\d+) \| (\S+) \((\S+)\) \| (on|off) \| (\d+) \| (\d+) \|$",
                      (ROOT / "docs" / "scale.md").read_text(), re.MULTILINE)
    shown = [{"group_size": int(G), "prompts_per_step": int(B), "lr": float(lr), "gradient_checkpointing": on == "on",
              "max_prompt_tokens": int(P), "max_completion_tokens": int(T)} for G, B, lr, _, on, P, T in rows]
    assert shown == list(settings.KINDS.values())
    assert [float(row[3]) for row in rows] == pytest.approx([settings.LORA_LR * one["lr"] for one in shown])


@pytest.mark.parametrize("flags, message", [
    ("--advantage-scale gdpo --overlong penalise", "gdpo standardises each reward by itself"),
    ("--advantage-scale gdpo --rewards format,execution=2,user=0.5 --reward-module x.py", "the reward user"),
    ("--atomic-when fails --rewards format,execution,atomic --execution-runs 0.5", "can earn 0.80 when it fails and only 0.50 when it runs"),
    ("--atomic-when fails --rewards format,atomic", "only 0.00 when it runs"),
    ("--dual-clip 0.5", "--dual-clip is 0.5; it must be above 1, or 0")])
def test_settings_that_make_no_sense_together_are_one_sentence(flags, message):
    with pytest.raises(UserError, match=message):
        train.parse_settings(flags.split())


def test_an_unknown_architecture_takes_the_general_defaults(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert train.parse_settings(["--model", str(tmp_path)]).run.lr == settings.RunConfig.lr


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("model", ["tiny", "qwen2.5-0.5b", "qwen2.5-3b", "unknown"])
def test_every_value_of_a_recipe_has_a_source_and_is_taken(name, model, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    s = train.parse_settings(["--model", str(tmp_path) if model == "unknown" else model, "--recipe", name]).as_dict()
    small = recipes.SMALL.get(name, {}) if model in ("tiny", "qwen2.5-0.5b") else {}
    for setting, (value, source) in (recipes.RECIPES[name] | small).items():
        assert s[setting] == value and type(s[setting]) is type(value) and len(source) >= 4, setting
    assert small.keys() <= recipes.RECIPES[name].keys()


def test_the_code_of_the_paper_differs_by_size_and_given_flags_win():
    by_size = [train.parse_settings(["--model", f"qwen2.5-{size}", "--recipe", "finer-sql-code"]) for size in ("0.5b", "3b")]
    assert [(s.grpo.group_size, s.prompts.max_prompt_tokens, s.run.steps) for s in by_size] == [(32, 2048, 1500), (16, 4096, 1000)]
    for s in by_size:
        assert (s.run.lr, s.grpo.max_completion_tokens, s.grpo.loss, s.grpo.sampler_cap) == (5e-6, 2048, "dapo", 2.0)
        assert s.rewards.weights["memory"] == 0 and s.run.prompts_per_step == 1 and s.rewards.atomic_when == "runs"
    given = train.parse_settings(["--model", "qwen2.5-3b", "--recipe", "finer-sql-code", "--group-size", "4"])
    assert given.grpo.group_size == 4 and given.run.lr == 5e-6


@pytest.mark.parametrize("name", ["finer-sql", "finer-sql-paper"])
@pytest.mark.parametrize("model", ["tiny", "qwen2.5-3b"])
def test_the_recipe_of_the_paper(model, name):
    s = train.parse_settings(["--model", model, "--recipe", name])
    assert (s.grpo.group_size, s.run.lr, s.grpo.kl_coef, s.grpo.temperature) == (32, 8e-6, 0.04, 1.0)
    assert (s.rewards.memory_top_k, s.rewards.atomic_lambda, s.rewards.atomic_beta, s.rewards.atomic_gamma) == (20, 0.05, 0.79, 0.2)
    assert set(s.rewards.weights.values()) <= {0.0, 1.0} and s.as_dict()["recipe"] == name
    given = train.parse_settings(["--model", model, "--recipe", name, "--group-size", "4", "--kl-coef", "0"])
    assert (given.grpo.group_size, given.grpo.kl_coef, given.run.lr) == (4, 0.0, 8e-6)


def test_each_layer_of_defaults_wins_over_those_before_it(tmp_path):
    made_by = parse_settings_as_json(["--prompt-style", "finer-sql", "--sample-values", "1", "--tables", "a", "--lr", "1"])
    flags = ["--model", "qwen2.5-0.5b", "--precision", "bf16", "--output", str(tmp_path)]

    def values(*more, made_by=None):
        s = settings.parse_settings([*flags, *more], made_by=made_by)
        return s.run.lr, s.grpo.sampler_cap, s.prompts.style, s.prompts.max_prompt_tokens, s.prompts.sample_values, s.prompts.tables

    by_kind = values()
    assert by_kind == (2e-6, 2.0, "auto", 2048, 3, "")  # dataclass < kind < bf16
    assert values("--recipe", "laptop") == (2e-5, 2.0, "compact", 512, 3, "")
    handed_on = values("--recipe", "laptop", made_by=made_by | {"max_prompt_tokens": 99})  # its prompts alone, for any table
    assert handed_on == (2e-5, 2.0, "finer-sql", 99, 1, "")
    given = values("--recipe", "laptop", "--prompt-style", "full", "--lr", "3e-5", made_by=made_by)
    assert given == (3e-5, 2.0, "full", 2048, 1, "")
    resumed = {"data": "demo", "lr": 0.5, "style": "omnisql"}  # all others as they were before they were settings
    (tmp_path / "config.json").write_text(json.dumps(resumed))
    assert values("--recipe", "laptop", "--resume", "--sample-values", "2") == (0.5, 0.0, "omnisql", 2048, 2, "")
    assert list(layers.fold(flags={"a": 3}, kind={"a": 1, "b": 1}, recipe={"b": 2}).items()) == [("a", 3), ("b", 2)]


def test_a_prompt_style_replaces_the_template_of_the_layers_before_it():
    below = {"style": "auto", "template": "p.jinja", "template_text": "x"}
    for flags, wanted in (({"seed": 1}, below | {"seed": 1}), ({"style": "full"}, {"style": "full"}),
                          ({"template": "q.jinja"}, {"style": "auto", "template": "q.jinja"})):
        for name in ("made_by", "resumed"):
            assert layers.fold(**{name: below}, flags=flags) == wanted


def parse_settings_as_json(flags):
    """The settings of a run as another reads them in its config.json."""
    return json.loads(json.dumps(settings.parse_settings(flags).as_dict()))


def test_resuming_needs_no_flag_but_the_folder(tmp_path):
    first = train.parse_settings(["--model", "qwen2.5-3b", "--lr", "3e-5", "--output", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps(first.as_dict()))
    again = train.parse_settings(["--resume", "--output", str(tmp_path)]).as_dict()
    assert again == first.as_dict() | {"resume": True}
