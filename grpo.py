"""Group Relative Policy Optimization, the whole algorithm, plainly, in PyTorch.

For a question q the policy samples a group of G completions o_1 … o_G, each is scored (R_i), and

    (1)  A_i = (R_i − mean(R)) / std(R)                            advantage of a completion in its group
    (2)  r_it = π(o_it | q, o_i<t) / π_old(o_it | q, o_i<t)        ratio, 1 at the first update
    (3)  S_it = min(r_it A_i, clip(r_it, 1 − ε_low, 1 + ε_high) A_i)             clipped surrogate
    (4)  D_it = exp(ρ_it) − ρ_it − 1,  ρ_it = log π_ref − log π                  KL to the reference ("k3")
    (5)  L = −mean_i mean_t (S_it − β D_it)                        the loss to minimise

from DeepSeekMath (arXiv 2402.03300). There is no value model: the group's mean reward is the baseline. The file follows
a training step: sample, log-probabilities, advantages, loss, update. What small implementations often get wrong:
1. log-probabilities are those of the sampling distribution, temperature included;
2. masks come from lengths, never from token ids, so a sampled EOS is trained and padding is not;
3. the loss is normalised by the whole batch, so accumulating gradients over micro-batches is exact;
4. a prompt's completions depend on its seed alone, not on the prompts sampled beside it.

Left out: rewards, files, arguments, several processes, and speed. Sampling and log-probabilities take nearly all the
time, so they are passed in as an `Engine`: `PLAIN` is the one to read, engine/fast.py computes the same faster:

    groups = sample_groups(model, prompts, config, eos_ids=[2])      # rollout
    advantages = group_advantages(rewards)                           # [B, G], from your rewards of the completions
    batches = micro_batches(groups, advantages, config)
    reference_logprobs(reference, batches, config)                   # unless kl_coef is 0
    stats = policy_update(model, optimizer, batches, config)

Variants of each step (DAPO, Dr. GRPO, GSPO, …) are in variants.py, one small function each. It is imported when a
config names one of them.
"""

import importlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

LOSSES: dict[str, tuple] = {}  # name -> (surrogate, average); GRPO's is below, the others are in variants.py
ADVANTAGES: dict[str, Callable] = {}  # name -> function from rewards to advantages; likewise


def variant(name: str) -> Callable:
    """A function in variants.py."""
    return getattr(importlib.import_module("variants"), name)


def find(table: dict, name: str, what: str):
    """The entry `name` of a table of `what`. Raises ValueError: there is none."""
    if name not in table:
        importlib.import_module("variants")  # adds its entries
    if name not in table:
        raise ValueError(f"{what} is '{name}'; choose one of {', '.join(table)}")
    return table[name]


def option(default, help: str, **metadata):  # as in common/options.py: a field, its help text, its range or choices
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class GRPOConfig:
    """The algorithm."""  # raises ValueError, naming the field, for an invalid value
    group_size: int = option(8, "completions sampled per question (G)", at_least=2, common=True)
    temperature: float = option(1.0, "of sampling and of the log-probabilities", at_least=1e-6, common=True)
    max_completion_tokens: int = option(512, "completions are truncated at this length", at_least=1, common=True)
    clip_low: float = option(0.2, "the ratio is clipped below at 1 - clip_low", at_least=0)
    clip_high: float = option(0.2, "the ratio is clipped above at 1 + clip_high (DAPO: 0.28)", at_least=0)
    dual_clip: float = option(0.0, "where A < 0 the ratio is clipped above at this (usually 3); 0: not", at_least=0)
    kl_coef: float = option(0.04, "weight of the KL to the reference; 0 needs no reference", at_least=0, common=True)
    kl_estimator: str = option("k3", "per-token estimator of the KL in the loss", choices=("k2", "k3"))
    loss: str = option("grpo", "how token losses are averaged; gspo: one ratio per completion; cispo: the ratio is "
                               "a weight", choices=LOSSES, common=True)
    advantage_scale: str = option("group", "the std that divides advantages; gdpo: that of each reward in its group, "
                                           "then the batch's", choices=ADVANTAGES)
    sampler_cap: float = option(0.0, "a token weighs min(π_old / sampler's, this) (TRL: 2); 0: it weighs 1", at_least=0)
    sampler_veto: float = option(0.0, "drop completions with a larger |log(π_old / sampler's)|; 0: none", at_least=0)
    updates_per_rollout: int = option(1, "optimizer steps on each batch of rollouts", at_least=1)
    micro_batch: int = option(0, "completions per forward pass of the update; 0: whole groups", at_least=0)
    rollout_batch: int = option(256, "completions decoded side by side", at_least=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this global norm; 0: they are not", at_least=0)
    overlong: str = option("keep", "truncated completions: keep, mask in the loss, or penalise long ones (DAPO)",
                           choices=("keep", "mask", "penalise"))
    overlong_buffer: int = option(0, "tokens before the limit in which the penalty grows; 0: a fifth", at_least=0)

    def __post_init__(self):
        for one in fields(self):
            value, meta = getattr(self, one.name), one.metadata
            if isinstance(meta.get("choices"), dict):
                find(meta["choices"], value, one.name)
            elif "choices" in meta and value not in meta["choices"]:
                raise ValueError(f"{one.name} is '{value}'; choose one of {', '.join(meta['choices'])}")
            if "at_least" in meta and not meta["at_least"] <= value < math.inf:
                raise ValueError(f"{one.name} is {value}; it must be a number, at least {meta['at_least']}")


@dataclass(frozen=True)
class Group:
    """One prompt and its sampled completions, on the CPU. EOS is part of a completion iff it was sampled."""
    prompt: Tensor  # [P]
    completions: list[Tensor]  # G times [C_i]
    logps: list[Tensor]  # G times [C_i], log-probabilities under the sampling distribution
    truncated: list[bool]  # G, True where no EOS came within max_completion_tokens
    entropies: Sequence[Tensor] = ()  # G times [C_i], of the distribution each token was drawn from, in nats
    rules: Sequence = ()  # G, which tokens may be sampled, as prompts/names.py; none: all
    sampled: Sequence[Tensor] = ()  # G times bool [C_i], false on what second_try.py put in between; none: all true


@dataclass(frozen=True)
class Engine:
    """The two operations that take most of the time; a faster implementation can be passed in."""
    decode: Callable  # (model, B prompts, uniform [B, G, T], temperature, eos_ids, rules) -> B groups of G completions
    logprobs: Callable  # (model, N prompts, N completions, temperature, rules) -> logp [N, T] with gradient


@contextmanager
def dropout_off(model):
    """Evaluation mode inside, so that rollout and update see the same policy; restores each module's mode on exit."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---- sample
def plain_decode(model, prompts: Sequence[Tensor], uniform: Tensor, temperature: float, eos_ids,
                 rules: Sequence | None = None) -> list[Group]:
    """Samples B groups: one prefill of B·G rows, then one token per row at a time. uniform: random [B, G, T]"""
    (B, G, T), device = uniform.shape, next(model.parameters()).device
    written = [rule.start() for rule in rules or () for _ in range(G)]  # N, or none
    uniform = uniform.reshape(B * G, T).to(device)
    ids, mask = left_pad([prompt for prompt in prompts for _ in range(G)], device)  # [N, P] each, N = B·G
    position = (mask.cumsum(-1) - 1).clamp(min=0)  # [N, P]
    eos = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    drawn, cache, ended = [], None, torch.zeros(B * G, dtype=torch.bool, device=device)
    for t in range(T):
        out = model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
                    logits_to_keep=1)
        logits = out.logits[:, -1]
        if written:
            logits = variant("forbid")(logits, [one.bits() for one in written])
        drawn.append((*sample_token(logits, temperature, uniform[:, t]), ~ended))  # 4 times [N]
        for one, token in zip(written, drawn[-1][0].tolist() if written else (), strict=True):
            one.take(token)
        ended = ended | torch.isin(drawn[-1][0], eos)
        if ended.all():
            break
        cache, ids = out.past_key_values, drawn[-1][0][:, None]  # rows that have ended continue, ignored
        mask, position = F.pad(mask, (0, 1), value=1), position[:, -1:] + 1
    tokens, logps, entropies, alive = (torch.stack(column, dim=1) for column in zip(*drawn, strict=True))  # [N, t]
    return as_groups(prompts, G, tokens, logps, entropies, alive.sum(1), ended, rules)


def as_groups(prompts, G: int, tokens: Tensor, logps: Tensor, entropies: Tensor, lengths: Tensor,
              ended: Tensor, rules: Sequence | None = None) -> list[Group]:
    """Decoded rows as groups, on the CPU. tokens, logps, entropies [B·G, T], lengths, ended [B·G], prompt-major."""
    tokens, logps, entropies = ([row[:n] for row, n in zip(values.cpu(), lengths.tolist(), strict=True)]
                                for values in (tokens, logps, entropies))
    truncated = (~ended).tolist()
    parts = [slice(b * G, b * G + G) for b in range(len(prompts))]
    limits = [[rule] * G for rule in rules] if rules else [()] * len(prompts)
    return [Group(prompt.cpu(), tokens[part], logps[part], truncated[part], entropies[part], limit)
            for prompt, part, limit in zip(prompts, parts, limits, strict=True)]


def sample_token(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token per row from softmax(logits / temperature); 0 is greedy. [N, V] -> token, logp, entropy [N] each.

    uniform: [N], float64 in [0, 1), the only source of randomness."""
    logp = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    p = logp.exp()
    if not temperature:
        token = logp.argmax(-1, keepdim=True)
    else:  # the first token whose cumulative probability exceeds the uniform number: one draw per row, not V
        cdf = p.double().cumsum(-1)
        token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp(max=logp.shape[1] - 1)
    return token[:, 0], logp.gather(-1, token)[:, 0], torch.special.entr(p).sum(-1)


def left_pad(prompts: Sequence[Tensor], device) -> tuple[Tensor, Tensor]:
    """Stacks prompts of unequal length, padded on the left. -> ids [B, P], mask [B, P] of 0 and 1."""
    masks = [torch.ones_like(prompt) for prompt in prompts]
    return tuple(pad_sequence(rows, batch_first=True, padding_side="left").to(device) for rows in (prompts, masks))


# ---- log-probabilities
def plain_logprobs(model, prompts: Sequence[Tensor], completions: Sequence[Tensor], temperature: float,
                   rules: Sequence | None = None) -> Tensor:
    """Log-probability of every completion token under softmax(logits / temperature), with gradient. -> [N, T]

    N rows `prompt + completion`, padded on the right; T is the longest completion, and padding gets 0.
    rules: one per row, that it was sampled under; tokens that it forbade have no probability."""
    device, T = next(model.parameters()).device, max(len(c) for c in completions)
    rows = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
    lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]  # [N, 1]
    ids = pad_sequence(rows, batch_first=True).to(device)  # [N, L]
    seen = torch.arange(ids.shape[1], device=device) < lengths  # [N, L]
    logits = model(input_ids=ids, attention_mask=seen.long(), use_cache=False).logits  # [N, L, V]
    if any(rules or ()):
        logits = variant("forbid_in_rows")(logits, prompts, completions, rules)
    logp = target_logprobs(logits[:, :-1], ids[:, 1:], temperature)  # [N, L - 1], of tokens 1 … L - 1
    starts = torch.tensor([len(p) for p in prompts], device=device)[:, None]  # [N, 1]
    index = starts - 1 + torch.arange(T, device=device)  # completion token t is at P + t in its row, P + t - 1 in logp
    mask = index < lengths - 1  # [N, T]
    return logp.gather(1, index.clamp(max=logp.shape[1] - 1)) * mask


def target_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Log-probability of each target, in float32 or wider. [..., V], [...] -> [...]"""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits / temperature, dim=-1).gather(-1, targets[..., None])[..., 0]


PLAIN = Engine(plain_decode, plain_logprobs)


@torch.no_grad()
def sample_groups(model, prompts: Sequence[Tensor], config: GRPOConfig, *, eos_ids: Sequence[int],
                  group_size: int | None = None, temperature: float | None = None,
                  seeds: Sequence[int] | None = None, engine: Engine = PLAIN,
                  rules: Sequence | None = None) -> list[Group]:
    """Samples a group of completions for each prompt [P], in order, from a causal language model from transformers.

    eos_ids: the tokens that end a completion.
    group_size, temperature: override the config's; 1 completion and temperature 0 (greedy) are allowed here.
    seeds: one per prompt, the only source of its randomness; None: drawn from PyTorch's global generator.
    rules: one per prompt, for tokens that must not be sampled, as prompts/names.py makes them; None: no rules."""
    G = config.group_size if group_size is None else group_size
    temperature = config.temperature if temperature is None else temperature
    per_batch = max(1, config.rollout_batch // G)
    seeds = torch.randint(2**62, (len(prompts),)).tolist() if seeds is None else seeds
    groups = []
    with dropout_off(model):
        for start in range(0, len(prompts), per_batch):
            batch = slice(start, start + per_batch)
            # One random number per token that may be sampled, the same on every device: [B, G, T]
            uniform = torch.stack([torch.rand(G, config.max_completion_tokens, dtype=torch.float64,
                                              generator=torch.Generator().manual_seed(s)) for s in seeds[batch]])
            groups += engine.decode(model, list(prompts[batch]), uniform, temperature, eos_ids,
                                    None if rules is None else rules[batch])
    return groups


# ---- advantages
def group_advantages(rewards: Tensor, scale: str = "group", components=None) -> Tensor:
    """Rewards relative to their group, eq. (1). [B, G] -> [B, G]

    scale: a name in ADVANTAGES; `group` is GRPO's, `batch`, `none` and `gdpo` are in variants.py.
    components: (rewards [K, B, G], weights [K]) that add up to these rewards, for scales that normalise each reward.
    A group whose rewards are equal up to rounding gets exactly 0.
    Raises ValueError: fewer than two completions per group, a reward that is not finite, an unknown scale."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [B, G] with G at least 2, but are {list(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not finite")
    return find(ADVANTAGES, scale, "advantage scale")(rewards, components)


def over_group_std(rewards: Tensor, components=None) -> Tensor:
    """Centred, divided by the group's standard deviation (divisor n − 1), eq. (1). [B, G] -> [B, G]"""
    flat = flat_groups(rewards)[:, None]  # [B, 1]
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # eq. (1)
    return (advantages / rewards.std(dim=1, keepdim=True).masked_fill(flat, 1.0)).masked_fill(flat, 0.0)


ADVANTAGES["group"] = over_group_std


def flat_groups(rewards: Tensor) -> Tensor:
    """Whether all rewards of a group are equal up to rounding, per group. [B, G] -> bool [B]"""
    spread = rewards.amax(dim=1) - rewards.amin(dim=1)
    return spread <= 1e-6 * rewards.abs().amax(dim=1).clamp(min=1.0)


# ---- loss
def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) for tokens sampled from π; elementwise. joschu.net/blog/kl-approx.html

    In expectation k1 and k3 equal the KL. As a loss, k2 has the KL's gradient and k3 (GRPO's choice) that of
    KL(π_ref ‖ π). k1's expected gradient is zero, so it is a metric only."""
    log_ratio = ref_logp - logp  # ρ of eq. (4)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return torch.expm1(log_ratio) - log_ratio  # eq. (4)
    raise ValueError(f"KL estimator is '{kind}'; choose one of k1, k2, k3")


def policy_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, advantages: Tensor, mask: Tensor,
                config: GRPOConfig, normalizer: float | None = None) -> tuple[Tensor, dict[str, float]]:
    """Clipped surrogate plus `kl_coef` times KL, eq. (2)–(5). -> (scalar loss, statistics averaged over these tokens)

    logp, old_logp, ref_logp: [N, T]; gradients flow through logp only. ref_logp may be None (no KL).
    advantages: [N], one per completion, or [N, T]. mask: [N, T], true on the tokens that count.
    normalizer: `loss_normalizer` of the *whole* batch if these rows are only a part of it; None: of these rows."""
    surrogate_of, average = find(LOSSES, config.loss, "loss")
    mask = mask.to(logp.dtype)
    A = advantages.detach().to(logp.dtype).view(len(logp), -1)  # [N, 1] or [N, T]
    log_ratio = (logp - old_logp.detach()) * mask
    surrogate, log_ratio = surrogate_of(logp, log_ratio, A, mask, config)  # [N, T] each
    kl = None if ref_logp is None else kl_estimate(logp, ref_logp.detach(), config.kl_estimator)
    if kl is not None and config.kl_coef:
        surrogate = surrogate - config.kl_coef * kl
    divisors, total = average(mask, config)
    row_loss = -(surrogate * mask).sum(-1) / divisors  # [N]
    loss = row_loss.sum() / max(total if normalizer is None else normalizer, 1)  # eq. (5)
    with torch.no_grad():
        ratio = log_ratio.exp()
        values = {"ratio_mean": ratio, "approx_kl": torch.expm1(log_ratio) - log_ratio,  # KL(π_old ‖ π)
                  "clip_fraction_low": (ratio < 1 - config.clip_low) & (A < 0),
                  "clip_fraction_high": (ratio > 1 + config.clip_high) & (A > 0)}
        if kl is not None:
            values |= {"kl": kl, "kl_k1": kl_estimate(logp, ref_logp, "k1")}
        stats = {name: ((value * mask).sum() / mask.sum().clamp(min=1)).item() for name, value in values.items()}
        stats["ratio_max"] = (ratio * mask).max().item()
    return loss, stats


def clipped_surrogate(logp: Tensor, log_ratio: Tensor, A: Tensor, mask: Tensor,
                      config: GRPOConfig) -> tuple[Tensor, Tensor]:
    """Eq. (2) and (3). [N, T], [N, T], [N, 1] or [N, T], [N, T] -> the surrogate and the log-ratios in it, [N, T]"""
    ratio = log_ratio.exp()  # eq. (2)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)  # clip-higher where clip_high > clip_low (DAPO)
    surrogate = torch.minimum(ratio * A, clipped * A)  # eq. (3)
    return variant("dual_clip")(surrogate, A, config) if config.dual_clip else surrogate, log_ratio


def sequence_mean(mask: Tensor, config: GRPOConfig) -> tuple[Tensor, float]:
    """The mean over a sequence's tokens, then over sequences, eq. (5); fully masked sequences do not count.

    mask [N, T] -> divisor of each row's sum [N], divisor of the sum of rows"""
    lengths = mask.sum(-1)
    return lengths.clamp(min=1), (lengths > 0).sum().item()


LOSSES["grpo"] = clipped_surrogate, sequence_mean


def loss_normalizer(mask: Tensor, config: GRPOConfig) -> float:
    """The divisor of these rows' summed loss; the divisors of a batch's parts add up to the batch's. mask [N, T]"""
    return find(LOSSES, config.loss, "loss")[1](mask, config)[1]


# ---- update
@dataclass
class MicroBatch:
    """Completions that go through the model in one pass. The first update fills in `old_logps`."""
    prompts: list[Tensor]  # n times [P]
    completions: list[Tensor]  # n times [C_i]
    sampled_logps: list[Tensor]  # n times [C_i], of the sampler
    advantages: Tensor  # [n]
    mask: Tensor  # bool [n, T], true on the tokens that count in the loss
    normalizer: float  # `loss_normalizer` of the whole rollout
    rules: list  # n, each None or the rule that the completion was sampled under
    ref_logps: Tensor | None = None  # [n, T], of the reference
    old_logps: Tensor | None = None  # [n, T], of the policy before the first update


def micro_batches(groups: Sequence[Group], advantages: Tensor, config: GRPOConfig) -> list[MicroBatch]:
    """Splits a rollout into passes of `micro_batch` completions, all of one group; 0: one whole group per pass.

    advantages: [B, G]"""
    batches, size = [], config.micro_batch
    for group, A in zip(groups, advantages, strict=True):
        left_out = [cut and config.overlong == "mask" for cut in group.truncated]
        counted = [0 if out else len(c) for c, out in zip(group.completions, left_out, strict=True)]
        for start in range(0, len(counted), size or len(counted)):
            part = slice(start, start + (size or len(counted)))
            completions = group.completions[part]
            mask = torch.arange(max(map(len, completions))) < torch.tensor(counted[part])[:, None]  # [n, T]
            if group.sampled:
                mask &= pad_sequence(list(group.sampled[part]), batch_first=True)
            rules = list(group.rules[part]) or [None] * len(completions)
            batches.append(MicroBatch([group.prompt] * len(completions), completions, group.logps[part], A[part], mask,
                                      0.0, rules))
    normalizer = sum(loss_normalizer(batch.mask, config) for batch in batches)
    for batch in batches:
        batch.normalizer = normalizer
    return batches


@torch.no_grad()
def reference_logprobs(model, batches: Sequence[MicroBatch], config: GRPOConfig, engine: Engine = PLAIN) -> None:
    """Stores each micro-batch's log-probabilities under the reference in its `ref_logps`."""
    with dropout_off(model):
        for batch in batches:
            batch.ref_logps = engine.logprobs(model, batch.prompts, batch.completions, config.temperature,
                                              batch.rules)


def policy_update(model, optimizer, batches: Sequence[MicroBatch], config: GRPOConfig,
                  engine: Engine = PLAIN) -> dict[str, float]:
    """Takes `updates_per_rollout` optimizer steps on one rollout.

    Returns the statistics of `policy_loss`, averaged over `tokens` and updates; `loss` and `grad_norm` (before
    clipping) of the last update; `skipped_updates`, those without a finite gradient; `sampler_gap`, the mean
    |log-probability of sampler − training| over `trained_tokens`, those of the `tokens` that went through the model."""
    sums, skipped = UpdateSums(), 0
    with dropout_off(model):
        for update in range(config.updates_per_rollout):
            optimizer.zero_grad(set_to_none=True)
            loss = sum(backward(model, batch, update == 0, config, sums, engine) for batch in batches)
            grad_norm = step_if_finite(optimizer, clip(optimizer, config).item())
            skipped += not math.isfinite(grad_norm)
    return {"loss": loss, "grad_norm": grad_norm, "skipped_updates": skipped} | sums.means()


def backward(model, batch: MicroBatch, first: bool, config: GRPOConfig, sums: "UpdateSums",
             engine: Engine = PLAIN) -> float:
    """Adds a micro-batch's gradient to the model's and its statistics to the sums. -> its part of the loss

    first: whether this is the first update on the rollout.
    Raises ValueError: the loss has a KL term, but `reference_logprobs` was not called."""
    if not has_gradient(batch, config):
        sums.add(batch, {"ratio_mean": 1.0})
        return 0.0
    if config.kl_coef and batch.ref_logps is None:
        raise ValueError("kl_coef needs a reference: call reference_logprobs, or set kl_coef to 0")
    logp = engine.logprobs(model, batch.prompts, batch.completions, config.temperature, batch.rules)  # [n, T]
    if first:
        batch.old_logps = logp.detach()  # on policy: this is the old policy, so the ratio is exactly 1
    gap = batch.old_logps - pad_sequence(batch.sampled_logps, batch_first=True).to(logp)  # [n, T]
    gap = gap * batch.mask.to(gap)
    A = batch.advantages.to(logp)[:, None]  # [n, 1]
    if config.sampler_cap or config.sampler_veto:
        A = A * variant("sampler_weights")(gap, config)  # [n, T]
    loss, stats = policy_loss(logp, batch.old_logps, batch.ref_logps, A, batch.mask.to(logp.device), config,
                              batch.normalizer)
    loss.backward()
    sums.add(batch, stats, gap if first else None)
    return loss.item()


def has_gradient(batch: MicroBatch, config: GRPOConfig) -> bool:
    """Whether a micro-batch needs a pass: if all advantages are 0, only the KL has a gradient. With several updates
    every micro-batch needs one, because the statistics cover its ratios."""
    return bool(config.kl_coef or config.updates_per_rollout > 1 or batch.advantages.any())


def clip(optimizer, config: GRPOConfig) -> Tensor:
    """Clips the gradient to `max_grad_norm`; returns its norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)


def step_if_finite(optimizer, norm: float) -> float:
    """Takes an optimizer step if the gradient's norm is finite; returns the norm."""
    if math.isfinite(norm):
        optimizer.step()
        torch.clear_autocast_cache()  # else autocast would reuse copies of the old weights in the next update
    return norm


class UpdateSums:
    """Sums the statistics of an update's passes."""

    def __init__(self):
        self.totals, self.ratio_max = Counter({"tokens": 0, "trained_tokens": 0, "sampler_gap": 0.0}), 1.0

    def add(self, batch: MicroBatch, stats: dict[str, float], gap: Tensor | None = None) -> None:
        """Adds `policy_loss`'s statistics of a micro-batch. gap: [n, T], old − sampler's log-probabilities"""
        tokens = int(batch.mask.sum())
        self.ratio_max = max(self.ratio_max, stats.pop("ratio_max", 1.0))
        self.totals.update({name: value * tokens for name, value in stats.items()} | {"tokens": tokens})
        if gap is not None:
            self.totals.update(sampler_gap=gap.abs().sum().item(), trained_tokens=tokens)

    def means(self) -> dict[str, float]:
        """The averages over all passes."""
        counts = {name: self.totals.pop(name) for name in ("tokens", "trained_tokens")}
        gap = self.totals.pop("sampler_gap") / max(1, counts["trained_tokens"])
        means = {name: total / max(1, counts["tokens"]) for name, total in self.totals.items()}
        return {"ratio_max": self.ratio_max, "sampler_gap": gap, **counts, **means}
