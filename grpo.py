"""Group Relative Policy Optimization, the algorithm and only it, in plain PyTorch.

For a question q the policy samples a group of G completions o_1 … o_G, each is scored (R_i), and

    (1)  A_i = (R_i − mean(R)) / std(R)                            advantage of a completion in its group
    (2)  r_it = π(o_it | q, o_i<t) / π_old(o_it | q, o_i<t)        ratio, 1 at the first update
    (3)  S_it = min(r_it A_i, clip(r_it, 1 − ε_low, 1 + ε_high) A_i)             clipped surrogate
    (4)  D_it = exp(ρ_it) − ρ_it − 1,  ρ_it = log π_ref − log π                  KL to the reference ("k3")
    (5)  L = −mean_i mean_t (S_it − β D_it)                        what the optimizer descends

from DeepSeekMath (arXiv 2402.03300). There is no value model: the group's mean reward is the baseline.

What is done here that small implementations often leave out:
1. log-probabilities are those of the sampling distribution, temperature included;
2. masks come from lengths, never from token ids, so a sampled EOS is trained and padding is not;
3. a prompt is computed once for its G completions, in sampling and in the update (packing.py);
4. logits exist for completion tokens only, a chunk at a time (packing.py);
5. the loss is normalised by the whole batch, so accumulation over micro-batches is exact.
What is left out: rewards, files, logging, arguments. Importing this file needs torch only.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.decoding import start_decoding
from engine.packing import (
    PackedGroup,
    completion_logprobs,
    direct_logprobs,
    dropout_off,
    pack_group,
    padded_logprobs,
    token_logprobs,
)

__all__ = ["GRPOConfig", "Group", "PackedGroup", "Share", "completion_logprobs", "direct_logprobs", "dropout_off",
           "flat_groups", "group_advantages", "kl_estimate", "loss_normalizer", "overlong_penalty", "pack_group",
           "packed_batches", "padded_logprobs", "policy_loss", "policy_update", "reference_logprobs", "sample_groups",
           "token_logprobs"]


def _setting(default, text: str, choices: tuple | None = None, at_least: float | None = None):
    return field(default=default, metadata={"help": text, "choices": choices, "at_least": at_least})


@dataclass(frozen=True)
class GRPOConfig:
    """The algorithm."""  # ValueError, naming the field, for a value that makes no sense

    group_size: int = _setting(8, "completions sampled per question (G)", at_least=2)
    temperature: float = _setting(1.0, "sampling temperature, also of the log-probabilities", at_least=1e-6)
    max_completion_tokens: int = _setting(512, "completions are truncated at this length", at_least=1)
    clip_low: float = _setting(0.2, "the ratio is clipped below at 1 - clip_low", at_least=0)
    clip_high: float = _setting(0.2, "the ratio is clipped above at 1 + clip_high (DAPO: 0.28)", at_least=0)
    kl_coef: float = _setting(0.04, "weight of the KL to the reference; 0 needs no reference", at_least=0)
    kl_estimator: str = _setting("k3", "per-token estimator of the KL", ("k1", "k2", "k3"))
    loss: str = _setting("grpo", "how token losses are averaged", ("grpo", "dapo", "dr_grpo", "gspo"))
    advantage_scale: str = _setting("group", "advantages are divided by the std of the group, the batch, or not",
                                    ("group", "batch", "none"))
    updates_per_rollout: int = _setting(1, "optimizer steps on each batch of rollouts", at_least=1)
    micro_batch: int = _setting(0, "completions per packed forward; 0: the whole group", at_least=0)
    rollout_batch: int = _setting(256, "completions decoded side by side", at_least=1)
    max_grad_norm: float = _setting(1.0, "gradients are clipped to this global norm", at_least=0)
    overlong: str = _setting("keep", "truncated completions: keep, mask in the loss, or penalise long ones (DAPO)",
                             ("keep", "mask", "penalise"))
    overlong_buffer: int = _setting(0, "tokens before the limit in which the penalty grows; 0: a fifth of it",
                                    at_least=0)

    def __post_init__(self):
        for setting in fields(self):
            value, meta = getattr(self, setting.name), setting.metadata
            if meta["choices"] and value not in meta["choices"]:
                raise ValueError(f"{setting.name} is '{value}'; choose one of {', '.join(meta['choices'])}")
            if meta["at_least"] is not None and not meta["at_least"] <= value < math.inf:
                raise ValueError(f"{setting.name} is {value}; it must be at least {meta['at_least']}")


@dataclass(frozen=True)
class Group:
    """One prompt and its sampled completions, on the CPU. EOS is part of a completion iff it was sampled."""

    prompt: Tensor  # [P]
    completions: list[Tensor]  # G times [C_i]
    logps: list[Tensor]  # G times [C_i], log-probabilities under the sampling distribution
    truncated: list[bool]  # G, True where no EOS came within max_completion_tokens


# ---- sampling


@torch.no_grad()
def sample_groups(model, prompts: Sequence[Tensor], config: GRPOConfig, *, eos_ids: Sequence[int],
                  group_size: int | None = None, temperature: float | None = None,
                  seeds: Sequence[int] | None = None) -> list[Group]:
    """Samples a group of completions for each prompt, in prompt order.

    Args:
        model: a causal language model of transformers.
        prompts: 1-D LongTensors of unequal length.
        eos_ids: the tokens that end a completion.
        group_size, temperature: override the config's (for evaluation: 1 and, greedily, 0 are allowed here).
        seeds: one a prompt. What is drawn for a prompt depends on its seed alone, not on the other prompts, so a batch
            can be split over processes; None: seeds from PyTorch's global generator.
    """
    G = config.group_size if group_size is None else group_size
    temperature = config.temperature if temperature is None else temperature
    per_batch = max(1, config.rollout_batch // G)
    seeds = torch.randint(2**62, (len(prompts),)).tolist() if seeds is None else seeds
    groups = []
    with dropout_off(model):
        for start in range(0, len(prompts), per_batch):
            batch = slice(start, start + per_batch)
            uniform = _uniform_numbers(seeds[batch], G, config.max_completion_tokens)
            groups += _sample_batch(model, list(prompts[batch]), uniform, temperature, eos_ids)
    return groups


def _uniform_numbers(seeds: Sequence[int], G: int, max_tokens: int) -> Tensor:
    """The random number behind every token that may be sampled, the same on every device. -> [B, G, max_tokens]"""
    return torch.stack([torch.rand(G, max_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                        for seed in seeds])


def _sample_batch(model, prompts, uniform, temperature, eos_ids) -> list[Group]:
    _, G, max_tokens = uniform.shape
    decoder = start_decoding(model, prompts, G, max_tokens)  # one prefill serves the G completions
    logits, device = decoder.logits, decoder.logits.device
    N, eos = len(prompts) * G, torch.tensor(list(eos_ids), device=device)
    uniform = uniform.reshape(N, max_tokens).to(device)
    tokens = torch.zeros(N, max_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(N, max_tokens, dtype=torch.float32, device=device)
    lengths = torch.zeros(N, dtype=torch.long, device=device)
    ended = torch.zeros(N, dtype=torch.bool, device=device)
    rows = torch.arange(N, device=device)  # the completions still growing
    for t in range(max_tokens):
        token, logp = sample_token(logits, temperature, uniform[rows, t])  # [n] each
        tokens[rows, t], logps[rows, t], lengths[rows] = token, logp, t + 1
        ended[rows] = torch.isin(token, eos)
        growing = (~ended[rows]).nonzero()[:, 0]
        if len(growing) == 0 or t == max_tokens - 1:
            break
        if len(growing) < len(rows):  # finished rows leave the batch
            decoder.keep(growing)
            rows, token = rows[growing], token[growing]
        logits = decoder.step(token)
    tokens, logps, lengths, ended = tokens.cpu(), logps.cpu(), lengths.tolist(), ended.tolist()
    groups = [(prompt.cpu(), range(b * G, b * G + G)) for b, prompt in enumerate(prompts)]  # prompt-major
    return [Group(prompt, [tokens[i, :lengths[i]] for i in members], [logps[i, :lengths[i]] for i in members],
                  [not ended[i] for i in members]) for prompt, members in groups]


def sample_token(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws a token a row from softmax(logits / temperature); 0 is greedy. [N, V] -> tokens [N], logps [N].

    uniform: [N], float64 in [0, 1), the randomness.
    """
    logp = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if not temperature:
        token = logp.argmax(-1, keepdim=True)
    else:  # the first token at which the distribution function passes the uniform number: one draw a row, not V
        cdf = logp.exp().double().cumsum(-1)
        token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp(max=logp.shape[1] - 1)
    return token[:, 0], logp.gather(-1, token)[:, 0]


# ---- advantages


def group_advantages(rewards: Tensor, scale: str = "group") -> Tensor:
    """Rewards relative to their group, eq. (1). [B, G] -> [B, G]

    scale: `group` divides by the group's standard deviation (GRPO), `batch` by that of all rewards, `none` by
    nothing (Dr. GRPO, arXiv 2503.20783). Standard deviations are the sample's (divisor n − 1). A group whose
    rewards are equal but for rounding gets exactly 0.
    Raises ValueError: fewer than two completions a group, a reward that is not finite, an unknown scale.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [B, G] with G at least 2, but are {list(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not finite")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"advantage scale is '{scale}'; choose one of group, batch, none")
    flat = flat_groups(rewards)[:, None]  # [B, 1]
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # eq. (1)
    if scale == "group":
        advantages = advantages / rewards.std(dim=1, keepdim=True).masked_fill(flat, 1.0)
    elif scale == "batch" and not flat.all():
        advantages = advantages / rewards.std()
    return advantages.masked_fill(flat, 0.0)


def overlong_penalty(lengths: Tensor, config: GRPOConfig) -> Tensor:
    """DAPO's soft punishment of length (arXiv 2503.14476, eq. 13), to be added to the reward. [B, G] -> [B, G]

    0 up to `max_completion_tokens - overlong_buffer` tokens, then falling linearly to -1 at the limit.
    """
    buffer = min(config.overlong_buffer or config.max_completion_tokens // 5 or 1, config.max_completion_tokens)
    return ((config.max_completion_tokens - buffer - lengths) / buffer).clamp(-1, 0)


def flat_groups(rewards: Tensor) -> Tensor:
    """Which groups have nothing to compare: all rewards equal but for rounding. [B, G] -> bool [B]"""
    spread = rewards.amax(dim=1) - rewards.amin(dim=1)
    return spread <= 1e-6 * rewards.abs().amax(dim=1).clamp(min=1.0)


# ---- loss


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) for tokens sampled from π; elementwise. joschu.net/blog/kl-approx.html

    In expectation k1 and k3 equal the KL. As a loss, k2 has the KL's gradient, k3 (GRPO's choice) that of
    KL(π_ref ‖ π), and k1 none at all: its expected gradient is zero.
    """
    log_ratio = ref_logp - logp  # ρ of eq. (4)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return torch.expm1(log_ratio) - log_ratio  # eq. (4)
    raise ValueError(f"KL estimator is '{kind}'; choose one of k1, k2, k3")


def policy_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, advantages: Tensor, mask: Tensor,
                config: GRPOConfig, normalizer: float | None = None, entropy: Tensor | None = None):
    """Clipped surrogate plus `kl_coef` times KL, eq. (2)–(5). -> (scalar loss, statistics as floats)

    Args:
        logp, old_logp, ref_logp: [N, T]; gradients flow through logp only. ref_logp may be None (no KL).
        advantages: [N], one a completion.
        mask: [N, T], true on the tokens that count.
        normalizer: the divisor of the sum, of the *whole* batch where these rows are a part of it
            (`loss_normalizer`); None: that of these rows.
        entropy: [N, T], only for the statistics, which are means over these tokens.
    """
    mask = mask.to(logp.dtype)
    lengths = mask.sum(-1).clamp(min=1)  # [N]
    A = advantages.detach().to(logp.dtype)[:, None]  # [N, 1]
    log_ratio = (logp - old_logp.detach()) * mask
    if config.loss == "gspo":  # one ratio a sequence, the geometric mean of its tokens' (arXiv 2507.18071)
        log_ratio = (log_ratio.sum(-1) / lengths)[:, None] * mask
    ratio = log_ratio.exp()  # eq. (2)  [N, T]
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)  # clip-higher where clip_high > clip_low (DAPO)
    token_loss = -torch.minimum(ratio * A, clipped * A)  # eq. (3)
    kl = None if ref_logp is None else kl_estimate(logp, ref_logp.detach(), config.kl_estimator)
    if kl is not None and config.kl_coef:
        token_loss = token_loss + config.kl_coef * kl
    row_loss = (token_loss * mask).sum(-1)  # [N]
    if config.loss in ("grpo", "gspo"):  # mean over a sequence's tokens, then over sequences
        row_loss = row_loss / lengths
    # dapo: every token of the batch weighs the same (arXiv 2503.14476); dr_grpo: a constant length (2503.20783)
    divisor = loss_normalizer(mask, config) if normalizer is None else normalizer
    return row_loss.sum() / max(divisor, 1), _statistics(ratio, log_ratio, A, mask, config, kl, entropy)  # eq. (5)


def loss_normalizer(mask: Tensor, config: GRPOConfig) -> float:
    """What the summed loss of these rows is divided by; additive over the parts of a batch. mask [N, T]"""
    if config.loss == "dapo":
        return mask.sum().item()
    sequences = (mask.sum(-1) > 0).sum().item()
    return sequences * config.max_completion_tokens if config.loss == "dr_grpo" else sequences


@torch.no_grad()
def _statistics(ratio, log_ratio, A, mask, config, kl, entropy) -> dict[str, float]:
    values = {"approx_kl": torch.expm1(log_ratio) - log_ratio,  # from the old policy to this one
              "clip_fraction_low": (ratio < 1 - config.clip_low) & (A < 0),
              "clip_fraction_high": (ratio > 1 + config.clip_high) & (A > 0), "ratio_mean": ratio}
    values |= {name: value for name, value in (("kl", kl), ("entropy", entropy)) if value is not None}
    means = {name: ((value * mask).sum() / mask.sum().clamp(min=1)).item() for name, value in values.items()}
    return means | {"ratio_max": (ratio * mask).max().item()}


# ---- update


@dataclass(frozen=True)
class Share:
    """What this process does of an update that several compute together (distributed.py); by default all of it."""

    rank: int = 0
    size: int = 1
    gather: Callable[[object], list] = lambda value: [value]  # the value of each process, in their order
    sum_gradients: Callable = lambda model: None  # over the processes

    def of(self, numbers: Sequence[int]) -> Sequence[int]:
        """The part of this process; no part is longer than another by more than one."""
        return numbers[self.rank::self.size]


ALONE = Share()
NOTHING = pack_group(torch.zeros(1, dtype=torch.long), [torch.zeros(1, dtype=torch.long)])  # a pass that weighs 0


def packed_batches(groups: Sequence[Group], config: GRPOConfig) -> list[tuple[int, slice, PackedGroup]]:
    """The micro-batches of a rollout: (index of the group, its completions in this one, packed row)."""
    size = config.micro_batch or max(len(group.completions) for group in groups)
    parts = [(index, slice(start, start + size)) for index, group in enumerate(groups)
             for start in range(0, len(group.completions), size)]
    return [(i, rows, pack_group(groups[i].prompt, groups[i].completions[rows])) for i, rows in parts]


@torch.no_grad()
def reference_logprobs(model, batches, config: GRPOConfig, share: Share = ALONE) -> dict[int, Tensor]:
    """Log-probabilities [n, T] of the reference for the micro-batches of `packed_batches`, by number."""
    with dropout_off(model):
        return {n: completion_logprobs(model, batches[n][2], config.temperature)[0]
                for n in share.of(range(len(batches)))}


def policy_update(model, optimizer, groups: Sequence[Group], batches, advantages: Tensor,
                  ref_logps: dict[int, Tensor] | None, config: GRPOConfig,
                  share: Share = ALONE) -> dict[str, float]:
    """`updates_per_rollout` optimizer steps on one rollout, which is never sampled again.

    Several processes give it the same rollout, and each computes its share of the micro-batches.

    Args:
        batches: from `packed_batches(groups, config)`.
        advantages: [B, G].
        ref_logps: from `reference_logprobs`, or None when kl_coef is 0.
    Returns:
        statistics over tokens and updates, and of the last update `loss`, `grad_norm` (before clipping);
        `skipped_updates` (gradients not finite); `sampler_gap`, the mean |log-probability of sampler − training|.
    """
    masks = [packed.mask & ~torch.tensor(groups[i].truncated[rows])[:, None] if config.overlong == "mask"
             else packed.mask for i, rows, packed in batches]
    normalizer = sum(loss_normalizer(mask, config) for mask in masks)  # of the whole batch
    old_logps, totals, ratio_max, skipped = {}, Counter(), 0.0, 0
    # Without a KL term a group of equal rewards has no gradient at all, so its forward pass is saved.
    useful = [n for n, (i, rows, _) in enumerate(batches) if ref_logps is not None or advantages[i, rows].any()] or [0]
    mine = share.of(useful)
    with dropout_off(model):
        for update in range(config.updates_per_rollout):
            optimizer.zero_grad(set_to_none=True)
            loss_sum = 0.0
            for n in mine:
                i, rows, packed = batches[n]
                logp, entropy = completion_logprobs(model, packed, config.temperature)  # [n, T]
                if update == 0:  # on policy: this is the old policy, so the ratio is exactly 1
                    old_logps[n] = logp.detach()
                loss, stats = policy_loss(logp, old_logps[n], ref_logps[n] if ref_logps else None,
                                          advantages[i, rows].to(logp.device), masks[n].to(logp.device), config,
                                          normalizer, entropy)
                loss.backward()
                loss_sum += loss.item()
                ratio_max = max(ratio_max, stats.pop("ratio_max"))
                totals.update({name: value * int(masks[n].sum()) for name, value in stats.items()})
            if len(mine) < math.ceil(len(useful) / share.size):  # as many passes as other processes make
                (0 * completion_logprobs(model, NOTHING, config.temperature)[0]).sum().backward()
            share.sum_gradients(model)
            grad_norm = _clip_and_step(model, optimizer, config)
            skipped += not math.isfinite(grad_norm)
    totals["loss"] = loss_sum
    totals["sampler_gap"] = sum(_sampler_gap(groups, batches[n], old_logps[n]) for n in mine)
    totals, ratio_max = _over_processes(share, totals, ratio_max)
    tokens = max(1, config.updates_per_rollout * sum(int(masks[n].sum()) for n in useful))
    seen = sum(int(batches[n][2].mask.sum()) for n in useful)
    return {"loss": totals.pop("loss"), "sampler_gap": totals.pop("sampler_gap") / seen, "ratio_max": ratio_max,
            "grad_norm": grad_norm, "skipped_updates": skipped} | {
        name: value / tokens for name, value in totals.items()}


def _clip_and_step(model, optimizer, config: GRPOConfig) -> float:
    """An optimizer step, unless the gradient is not finite; returns the gradient's norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()  # of all shards
    if math.isfinite(norm):
        optimizer.step()
        torch.clear_autocast_cache()  # under autocast it would lend the next update the weights of before
    return norm


def _sampler_gap(groups: Sequence[Group], batch, old_logp: Tensor) -> float:
    """Sum over a micro-batch's tokens of |log-probability of the sampler − training|."""
    i, rows, packed = batch
    return (old_logp.cpu()[packed.mask] - torch.cat(groups[i].logps[rows])).abs().sum().item()


def _over_processes(share: Share, totals: Counter, largest: float) -> tuple[Counter, float]:
    """Sums and the maximum over all processes."""
    sums, parts = Counter(), share.gather((totals, largest))
    for part, _ in parts:
        sums.update(part)
    return sums, max(other for _, other in parts)
