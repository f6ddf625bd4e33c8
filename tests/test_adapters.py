"""Adapters that others have trained: which kinds are trained on here, which are sampled from, and which are refused."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import grpo
from common.errors import UserError
from engine.fast import FAST
from models.adapters import FROZEN
from policy import Reference, build_tiny, config_of, load_policy, load_weights

peft = pytest.importorskip("peft", reason="peft is optional")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's, of what these kinds cannot do

IDS = torch.arange(3, 40)
SOME = ["q_proj", "v_proj"]  # they have biases


def lora(targets=SOME, **settings):
    return peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **settings)


TRAINED = {"plain": lora(), "rsLoRA": lora(use_rslora=True), "DoRA": lora([*SOME, "down_proj"], use_dora=True),
           "PiSSA": lora(init_lora_weights="pissa"), "OLoRA": lora(init_lora_weights="olora"),
           "Gaussian": lora(init_lora_weights="gaussian"), "bias": lora(lora_bias=True)}
SAMPLED = {  # and refused by a run, with these words
    "bias of the base": (lora(bias="lora_only"), "bias = 'lora_only'"), "head": (lora([*SOME, "lm_head"]), "adapt the head"),
    "embeddings": (lora([*SOME, "embed_tokens"]), "adapt the embeddings"),
    "modules": (lora(modules_to_save=["lm_head", "embed_tokens", "norm"]), "modules_to_save = "),
    "tokens": (lora(trainable_token_indices=[3, 4, 5]), "trainable_token_indices = "),
    "bias without one": (lora(["down_proj"], lora_bias=True), "merged into a Linear layer they would answer otherwise"),
    "LoHa": (peft.LoHaConfig(r=4, target_modules=SOME), "of kind LOHA"),
    "LoKr": (peft.LoKrConfig(r=4, target_modules=SOME), "of kind LOKR"),
    "VeRA": (peft.VeraConfig(r=4, target_modules=["q_proj"]), "of kind VERA"),
    "OFT": (peft.OFTConfig(r=4, oft_block_size=0, target_modules=SOME), "of kind OFT"),
    "IA3": (peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]), "of kind IA3")}
REFUSED = {
    "prompt tuning": (peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "of kind PROMPT_TUNING"),
    "norms": (peft.LNTuningConfig(target_modules=["norm"]), "of kind LN_TUNING"),
    "aLoRA": (lora(alora_invocation_tokens=[7, 8]), r"alora_invocation_tokens = \[7, 8\]"),
    "random": (lora(init_lora_weights="pissa_niter_2"), "'pissa_niter_2' begins otherwise")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build_tiny(["SELECT COUNT(*) FROM singer WHERE age > 350"] * 4, seed=0, vocab_size=320, width=32, layers=2).save(folder)
    return folder


def adapters_of(config, base, folder):
    """The folder of adapters of this kind, which speak."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, copy.deepcopy(config))
    _move(model, 0.1)
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def _move(model, by):
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(by * torch.randn_like(weight))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS[None]).logits


@pytest.mark.parametrize("kind", TRAINED)
def test_adapters_are_frozen_merged_and_found_again_without_a_change(base, tmp_path, kind):
    folder = adapters_of(TRAINED[kind], base, tmp_path / "theirs")
    policy = load_policy(folder, lora_rank=4)
    assert [*policy.model.peft_config] == ["default"] and all(
        weight.requires_grad == (".lora_" in name) for name, weight in policy.model.named_parameters())
    start = logits(policy.model)
    reference = Reference(policy.model)
    assert torch.equal(logits(policy.model), start)
    policy.save(tmp_path / "step-0")
    _move(policy.model, 0.1)
    moved = logits(policy.model)
    with reference.active() as model:
        assert torch.equal(logits(model), start) and not torch.allclose(moved, start, atol=0.1)
    policy.save(tmp_path / "step-9")
    policy.save_merged(tmp_path / "best")
    policy.save_merged(tmp_path / "best")  # merging leaves nothing behind
    assert torch.equal(logits(policy.model), moved)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "best")), moved)
    again = load_policy(str(tmp_path / "step-9"))
    assert torch.equal(logits(again.model), moved)
    reference = Reference(again.model)
    reference.load(tmp_path / "step-0")
    with reference.active() as model:
        assert torch.equal(logits(model), start)
    load_weights(again, tmp_path / "best")
    torch.testing.assert_close(logits(again.model), moved)


@pytest.mark.parametrize("kind", ["plain", "DoRA", "PiSSA", "bias"])
def test_rounding_of_a_bf16_base_is_no_fault(base, tmp_path, kind):
    folder = adapters_of(TRAINED[kind], base, tmp_path / "theirs")
    policy = load_policy(folder, lora_rank=4, dtype=torch.bfloat16)
    assert FROZEN not in policy.model.peft_config
    assert {weight.dtype for weight in policy.model.get_base_model().state_dict().values()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("kind", SAMPLED)
def test_other_adapters_answer_as_in_peft_and_are_not_trained_on(base, tmp_path, kind):
    config, words = SAMPLED[kind]
    folder = adapters_of(config, base, tmp_path)
    policy = load_policy(folder)
    theirs = logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)).log_softmax(-1)[0]
    with torch.no_grad():
        ours = FAST.logprobs(policy.model, [IDS[:10]], [IDS[10:]], 1.0)[0]
    torch.testing.assert_close(ours, theirs[9:-1].gather(1, IDS[10:, None])[:, 0])
    group, = grpo.sample_groups(policy.model, [IDS], grpo.GRPOConfig(max_completion_tokens=1), eos_ids=(0,), group_size=1,
                                temperature=1.0, seeds=[0], engine=FAST)
    torch.testing.assert_close(group.logps[0][0], theirs[-1, group.completions[0][0]])
    with pytest.raises(UserError, match=f"the adapters in {folder} cannot be trained on here, because .*{words}"):
        load_policy(folder, lora_rank=4)


@pytest.mark.parametrize("rank, verb", [(0, "used"), (4, "trained on")])
@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_would_answer_otherwise_are_refused(base, tmp_path, kind, rank, verb):
    config, words = REFUSED[kind]
    folder = adapters_of(config, base, tmp_path)
    with pytest.raises(UserError, match=f"cannot be {verb} here, because .*{words}.*: if peft can merge them") as caught:
        load_policy(folder, lora_rank=rank)
    assert "\n" not in str(caught.value)


def test_adapters_of_a_base_that_is_quantised_missing_or_itself_adapters_say_what_to_change(base, tmp_path):
    folder = adapters_of(lora(), base, tmp_path / "adapters")
    file = tmp_path / "adapters" / "adapter_config.json"
    config, packed, nested = json.loads(file.read_text()), tmp_path / "packed", tmp_path / "nested"
    packed.mkdir()
    four_bits = {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}
    (packed / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | four_bits))
    for name in ("tokenizer.json", "model.safetensors"):
        (packed / name).write_bytes((base / name).read_bytes())
    adapters_of(lora(), base, nested)
    remedy = f"in full precision, write so as base_model_name_or_path into {file}"
    for named, words in ((packed, rf"the weights in {packed} are quantised \(bitsandbytes, 4 bits\).*{remedy}"),
                         (tmp_path / "gone", f"there is no model in {tmp_path}/gone.*{remedy}"),
                         (nested, f"{file} names adapters as its base, {nested}: merge those")):
        file.write_text(json.dumps(config | {"base_model_name_or_path": str(named)}))
        for ask in (load_policy, config_of):  # before anything is loaded as well
            with pytest.raises(UserError, match=words) as caught:
                ask(folder)
            assert "\n" not in str(caught.value)


def test_adapters_with_nan_are_refused(base, tmp_path):
    folder = adapters_of(lora(), base, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"the weights in {folder} are broken: .*lora_B.* holds NaN or infinity"):
        load_policy(folder)
