"""The memory that a run will need, from the model's configuration alone.

    python train.py --plan --model qwen2.5-3b --lora-rank 16       # is this machine large enough?
    python train.py --plan 24 --model qwen2.5-3b --lora-rank 16    # is a card of 24 GB?

The phases of a step need different things, so the table has a column for each: keys and values during sampling,
gradients and activations during the update. The peak is the largest column, for the longest prompts and completions
that the flags allow. The formulas follow packing.py, row_attention.py, decoding.py and bf16.py.
Arithmetic only: this file imports nothing of the project; bench/planned_memory.py compares it with measurements.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.packing import LONGEST as MOST
from second_try import longest

CHUNK = 2**24  # elements of logits that exist at once (packing.py)
PASS = 1.5e8  # bytes stored for backward by a pass of several groups of the tiny policy on a CPU
LIBRARIES = 0.45e9  # bytes of Python with torch and transformers on a CPU, and of a CUDA context on a GPU
LEAST = 2**10  # tokens per pass
BLOCK, BLOCK_BYTES = 128, 64  # the side of a mask block on a GPU in tokens, and the bytes of its entry in the mask
SLACK = 0.4  # share of temporary memory: the C library's heap, for blocks under 32 MiB, does not return all of it
SHARE = 0.95  # of a card's or machine's memory that a plan may use
ERROR = 0.1  # largest relative error: plans were 0.93 to 1.09 times what bench/planned_memory.py measured on a CPU


MODEL_TYPES = ("qwen2", "qwen3", "llama", "mistral", "gemma3_text")  # model types that can be planned
TINY = {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1402,
        "tie_word_embeddings": True}  # the largest size of policy.build_tiny


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of the Llama family."""

    vocabulary: int  # V
    width: int  # D
    inner: int  # I, of the MLP
    layers: int
    heads: int  # H
    kv_heads: int  # Hk
    head: int  # d
    tied: bool  # lm_head is the embedding
    biases: int  # elements of all biases and head norms of a layer

    @classmethod
    def of(cls, config: Mapping) -> "Shape":
        """From a config.json. Raises ValueError: another architecture, or a size is missing."""
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(f"its model_type is {kind}; only {', '.join(MODEL_TYPES)} can be planned")
        try:
            D, inner, H = (config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
            V, layers = config["vocab_size"], config["num_hidden_layers"]
        except KeyError as error:
            raise ValueError(f"its config.json has no {error.args[0]}") from error
        Hk = config.get("num_key_value_heads") or H
        d = config.get("head_dim") or D // H
        inputs = (H + 2 * Hk) * d  # biases of q, k, v
        # qwen3 and gemma3: norms of q and k; gemma3: two more norms around attention and MLP
        biases = {"qwen2": inputs, "qwen3": 2 * d, "gemma3_text": 2 * d + 2 * D}.get(kind, 0)
        if kind in ("qwen3", "llama") and config.get("attention_bias"):
            biases += inputs + D
        if kind == "llama" and config.get("mlp_bias"):
            biases += 2 * inner + D
        tied = config.get("tie_word_embeddings", kind == "gemma3_text")
        return cls(V, D, inner, layers, H, Hk, d, bool(tied), biases)

    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear maps of a layer: q, k, v, o, gate, up, down."""
        D, inner, q, kv = self.width, self.inner, self.heads * self.head, self.kv_heads * self.head
        return [(D, q), (D, kv), (D, kv), (q, D), (D, inner), (D, inner), (inner, D)]

    def parameters(self) -> int:
        """The number of parameters of the whole model; tied embeddings count once."""
        layer = sum(i * o for i, o in self.linears()) + self.biases + 2 * self.width
        return self.layers * layer + self.width + self.vocabulary * self.width * (1 if self.tied else 2)

    def adapters(self, rank: int) -> int:
        """The number of parameters of LoRA adapters on all linear maps of all layers."""
        return self.layers * rank * sum(i + o for i, o in self.linears())


@dataclass(frozen=True)
class Work:
    """The settings of a step that determine its memory."""

    prompt: int  # tokens, P
    completion: int  # tokens of a try, T
    group: int  # completions per question, G
    prompts: int  # questions per step, B
    micro_batch: int  # completions per packed row; 0: the whole group
    rollout_batch: int  # completions decoded side by side
    reference: bool  # there is a KL penalty
    reference_on_cpu: bool
    lora_rank: int
    checkpointing: bool
    gpu: bool
    bf16: bool = False  # arithmetic
    pass_tokens: int = 0  # groups go through the model together up to this many tokens; 0: one by one
    frozen_copy: bool = False  # a copy of the first policy embeds the memory's traces
    optimizer_on_cpu: bool = False  # engine/offload.py
    shards: int = 1  # processes over which parameters, gradients and optimizer are spread (distributed.py)
    half_base: bool = True  # in bf16 arithmetic the frozen weights under adapters are bf16 too
    turns: int = 1  # tries of a completion

    @property
    def longest(self) -> int:
        """The tokens of a whole completion. Second tries are sampled in the room of the first ones."""
        return longest(self.completion, self.turns)

    @property
    def half(self) -> bool:
        """Whether the model's weights themselves are bf16: frozen under adapters, or with float32 masters on the CPU.
        """
        return self.bf16 and (self.lora_rank > 0 and self.half_base or self.gpu and self.optimizer_on_cpu)


Phases = dict[str, dict[str, float]]  # {moment: {what: bytes}}


def phases(shape: Shape, work: Work) -> Phases:
    """Bytes per item in each phase of a step; the peak is the largest sum."""
    weights = shape.parameters()
    trained = shape.adapters(work.lora_rank) if work.lora_rank else weights
    half = work.half
    stored, offloaded = 2 if half else 4, work.gpu and work.optimizer_on_cpu
    masters = 4 * trained if work.optimizer_on_cpu else 0
    always = {"parameters": (weights * stored + (4 * trained if work.lora_rank else 0)) / work.shards,
              "optimizer": (0 if offloaded else 8 * trained + masters) / work.shards,
              "KV cache": keys_and_values(shape, work)}  # stays allocated, see engine/grid.py
    if work.bf16 and not (half and not work.lora_rank):
        always["bf16 weights"] = copy_to_sample_with(shape, work)
    copy = work.reference and not work.lora_rank
    if work.frozen_copy:
        always["memory's embedder"] = weights * stored
    reference = {"reference": stored * weights} if copy else {}
    # Offloaded gradients leave the GPU one by one, so only the largest counts.
    gradients = stored * shape.vocabulary * shape.width if offloaded else 4 * trained / work.shards
    on_device = {} if work.reference_on_cpu and work.gpu else reference
    found = {"sampling": always | on_device | sampling(shape, work)}
    if work.reference:
        found["reference"] = always | reference | forward(shape, work)
    found["update"] = always | on_device | {"gradients": gradients} | update(shape, work)
    if work.shards > 1:  # what a process gathers temporarily
        found["sampling"]["gathered"] = 0 if work.bf16 else stored * weights
        found["update"]["gathered"] = gathered(shape, stored)
    on_heap = not work.gpu and 4 * row_tokens(work) * shape.inner < 2**25
    for parts in found.values():
        passing = sum(parts.get(name, 0) for name in ("gradients", "KV cache", "activations", "logits chunk"))
        parts["allocator"] = SLACK * passing if on_heap else 0
        parts["CUDA context" if work.gpu else "Python and libraries"] = LIBRARIES
    return found


def copy_to_sample_with(shape: Shape, work: Work) -> float:
    """Bytes of the bf16 copy for sampling (bf16.py). That of a sharded model has its own float32 embeddings."""
    if work.half and work.shards == 1:
        return 2 * shape.adapters(work.lora_rank)
    embeddings = 0 if work.half or work.shards == 1 else (4 if shape.tied else 2) * shape.vocabulary * shape.width
    return 2 * shape.parameters() + embeddings


def gathered(shape: Shape, stored: int) -> float:
    """Bytes gathered in the backward of a sharded layer: weights and gradients of this layer, the next one, and outside
    the layers."""
    layer = sum(i * o for i, o in shape.linears())
    return 4 * layer + stored * (2 * layer + shape.parameters() - shape.layers * layer)


def bytes_of(work: Work) -> int:
    """Bytes per number in activations, keys and values."""
    return 2 if work.bf16 else 4


def side_by_side(prompts: int, group: int, rollout_batch: int) -> int:
    """The number of a step's prompts that are decoded side by side."""
    return min(prompts, max(1, rollout_batch // group))


def sampled_together(work: Work) -> int:
    """`side_by_side` of this work."""
    return side_by_side(work.prompts, work.group, work.rollout_batch)


def keys_and_values(shape: Shape, work: Work) -> float:
    """Bytes of the KV cache of the prompts and completions that are decoded side by side."""
    tokens = sampled_together(work) * (work.prompt + work.group * work.completion)
    return tokens * 2 * shape.kv_heads * shape.head * shape.layers * bytes_of(work)


def sampling(shape: Shape, work: Work) -> dict[str, float]:
    """Bytes of the temporary activations of a prefill or a decoding step, and of the sampled logits."""
    number, prompts = bytes_of(work), sampled_together(work)
    rows = prompts * work.group
    cache = prompts * work.prompt * 2 * shape.kv_heads * shape.head * shape.layers * number  # before it is copied
    prefill = prompts * work.prompt * (3 * shape.inner + 6 * shape.width) * number + prompts * work.prompt**2 + cache
    token = 3 * rows * shape.heads * (work.prompt + work.longest) * 4  # scores of attention
    return {"activations": max(prefill, token), "logits chunk": rows * shape.vocabulary * (20 + number)}


def forward(shape: Shape, work: Work) -> dict[str, float]:
    """Bytes of a packed row without gradients."""
    row, number = row_tokens(work), bytes_of(work)
    return {"activations": row * (3 * shape.inner + 6 * shape.width + attention_elements(shape, work)) * number,
            "logits chunk": 4 * 4 * logits_of(shape, work), "attention mask": mask_bytes(work)}


def update(shape: Shape, work: Work) -> dict[str, float]:
    """Bytes of a packed row with gradients: what is stored for backward, and what backward adds at its peak."""
    number, row = bytes_of(work), row_tokens(work)
    layer = layer_bytes(shape, work)
    between = row * shape.width * (2 if work.half else 4)  # a layer's input
    kept = shape.layers * between + layer if work.checkpointing else shape.layers * layer
    kept += 4 * row * shape.width * number  # around the last norm
    gradients = (3 * shape.inner + 2 * shape.width) * 4 + 2 * attention_elements(shape, work) * number
    passing = row * gradients  # backward of a layer
    stored = 2 if work.half else 4
    head = 0 if work.lora_rank else 2 * stored * shape.vocabulary * shape.width  # gradient of lm_head, not yet added
    casts = 2 * shape.parameters() if work.bf16 and not work.half and not work.checkpointing else 0
    return {"autocast": casts, "activations": kept + max(0, passing - head),
            "logits chunk": 4 * 4 * logits_of(shape, work) + head, "attention mask": mask_bytes(work)}


def together(work: Work) -> int:
    """Completions of a group in a packed row: all, unless --micro-batch is smaller or they are too long."""
    return work.micro_batch or min(
        work.group, max(1, (max(MOST, work.pass_tokens) - work.prompt) // work.longest))


def group_tokens(work: Work) -> int:
    """Tokens of a prompt and its completions in one row."""
    return work.prompt + together(work) * work.longest


def row_tokens(work: Work) -> int:
    """Tokens of a packed row: one group, or as many as --tokens-per-pass allows. Shared prefixes reduce them."""
    one = group_tokens(work)
    return one if work.micro_batch else one * max(1, min(work.prompts, work.pass_tokens // one))


def mask_bytes(work: Work) -> int:
    """Bytes of the block mask of a row's attention; a CPU needs none."""
    return BLOCK_BYTES * (-(-row_tokens(work) // BLOCK))**2 if work.gpu else 0


def logits_of(shape: Shape, work: Work) -> int:
    """Elements of logits in memory at once."""
    completions = row_tokens(work) // group_tokens(work) * together(work)
    return min(max(CHUNK, shape.vocabulary), completions * work.longest * shape.vocabulary)


def layer_bytes(shape: Shape, work: Work) -> int:
    """Bytes that a layer stores for its backward, for a packed row."""
    D, q, number = shape.width, shape.heads * shape.head, bytes_of(work)
    norms = (2 if work.lora_rank else 4) * D * 4  # their inputs and, unless frozen, outputs; float32
    inputs = (5 if work.bf16 else 2) * D * number + q * number  # of q, k, v, gate, up and o; autocast casts for each
    mlp = 4 * shape.inner * number
    attention = attention_elements(shape, work) * number + 4 * shape.heads  # and each head's log-sum-exp weight
    return row_tokens(work) * (norms + inputs + mlp + attention)


def attention_elements(shape: Shape, work: Work) -> int:
    """Elements of query, key, value and output per token; FlexAttention does not repeat keys (row_attention.py)."""
    return 2 * shape.head * (shape.heads + (shape.kv_heads if work.gpu else shape.heads))


def tokens_per_pass(shape: Shape, work: Work, memory: float) -> int:
    """The number of tokens per pass so that about `memory` bytes are stored for backward."""
    one = replace(work, pass_tokens=0)
    return min(MOST, max(LEAST, int(memory * row_tokens(one) / (shape.layers * layer_bytes(shape, one)))))


def peak(found: Phases) -> tuple[str, float]:
    """(the phase that needs most, its bytes)"""
    return max(((moment, sum(parts.values())) for moment, parts in found.items()), key=lambda pair: pair[1])


def disk(weights: int, trained: int, keep: int) -> int:
    """The most bytes that a run's checkpoints take: the start, `keep` and one being written, best/ twice.

    weights: bytes of the model; trained: bytes of the trained weights, all of them or adapters.
    """
    return trained * (1 + 3 * (keep + 1)) + 2 * weights


# ---------------------------------------------------------------------------------------------------------- to read

def table(found: Phases) -> str:
    """Gigabytes: one line per item, one column per phase."""
    names = list(dict.fromkeys(name for parts in found.values() for name, size in parts.items() if size))
    order = ["parameters", "gradients", "optimizer", "reference", "memory's embedder", "bf16 weights", "KV cache",
             "gathered", "autocast", "activations", "attention mask", "logits chunk", "allocator", "CUDA context",
             "Python and libraries"]
    lines = [f"{'GB':<22}" + "".join(f"{moment:>11}" for moment in found)]
    for name in sorted(names, key=order.index):
        lines.append(f"{name:<22}" + "".join(f"{parts[name] / 1e9:>11.2f}" if parts.get(name) else f"{'-':>11}"
                                             for parts in found.values()))
    totals = "".join(f"{sum(parts.values()) / 1e9:>11.2f}" for parts in found.values())
    return "\n".join([*lines, f"{'total':<22}{totals}"])


def smaller(shape: Shape, work: Work, limit: float) -> list[str]:
    """Flags with which the run would fit, the cheapest first; empty if none suffice."""
    part = max(1, together(work) // 4)
    changes = {f"--rollout-batch {max(work.group, work.rollout_batch // 4)}":
               {"rollout_batch": max(work.group, work.rollout_batch // 4)},
               "--gradient-checkpointing": {"checkpointing": True}, f"--micro-batch {part}": {"micro_batch": part},
               "--reference-device cpu": {"reference_on_cpu": True},
               "--precision bf16": {"half_base": True},
               "--optimizer-device cpu": {"optimizer_on_cpu": work.shards == 1},  # for a single process
               "--lora-rank 16": {"lora_rank": work.lora_rank or 16, "shards": work.shards if work.lora_rank else 1},
               f"--max-completion-tokens {work.completion // 2}": {"completion": work.completion // 2},
               f"--max-prompt-tokens {work.prompt // 2}": {"prompt": work.prompt // 2}}

    def fits(flags: list[str]) -> bool:
        changed = replace(work, **{name: value for flag in flags for name, value in changes[flag].items()})
        return peak(phases(shape, changed))[1] <= limit

    flags = next((list(changes)[:n] for n in range(1, len(changes) + 1) if fits(list(changes)[:n])), [])
    for flag in list(flags):  # drop those that are not needed
        if fits([other for other in flags if other != flag]):
            flags.remove(flag)
    return flags


def text(name: str, shape: Shape, work: Work, limit: float) -> str:
    """The output of `train.py --plan` for a card or machine with `limit` bytes."""
    found = phases(shape, work)
    moment, need = peak(found)
    place = "a card" if work.gpu else "this machine's memory"
    trained = f", {shape.adapters(work.lora_rank) / 1e6:.1f} M of adapters trained" if work.lora_rank else ""
    lines = [f"{name}: {shape.parameters() / 1e6:,.1f} M parameters{trained}",
             f"prompts of {work.prompt} and completions of {work.longest} tokens, the longest allowed; {work.group} "
             f"completions a question; gradient checkpointing {'on' if work.checkpointing else 'off'}", "",
             table(found), ""]
    if work.gpu and work.optimizer_on_cpu:
        trained = shape.adapters(work.lora_rank) if work.lora_rank else shape.parameters()
        lines += [f"the optimizer needs {16 * trained / 1e9:.1f} GB of main memory", ""]
    verdict = f"peak: {need / 1e9:.1f} GB, in {moment}; {place} of {limit / 1e9:.1f} GB"
    if need <= SHARE * limit:
        return "\n".join([*lines, f"{verdict}: it fits"])
    return "\n".join([*lines, f"{verdict}: it does not fit; {advice(shape, work, limit)}"])


def advice(shape: Shape, work: Work, limit: float) -> str:
    """A clause that says what would make it fit."""
    flags = smaller(shape, work, SHARE * limit)
    return f"it would fit with {' '.join(flags)}" if flags else "no flag makes it fit: take a smaller model"


def missing(shape: Shape, work: Work, room: float) -> str:
    """How much is needed, how much of `room` (free bytes) is missing, and what would fit; follows `it needs`."""
    moment, need = peak(phases(shape, work))
    few = max(0, need - room) / 1e9
    return (f"{need / 1e9:.1f} GB in {moment}, and {room / 1e9:.1f} GB are free, {few:.1f} GB too few; "
            f"{advice(shape, work, room)}")


# ------------------------------------------------------------------------------------------------- of this machine

# Control groups of Linux: folder, file of the limit, file of the usage, field of the reclaimable part
GROUPS = {"": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
          "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, or the limit of its container."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *(limit for limit, _ in memory_limits(root))])


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of `machine_memory` that are free."""
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():  # not Linux
        return machine_memory(root)
    available = int(re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text())[1]) * 1024
    return max(0, min([available, *(limit - taken for limit, taken in memory_limits(root))]))


def memory_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, bytes in use) of each limited control group of this process."""
    file, found = root / "proc/self/cgroup", []
    for line in file.read_text().splitlines() if file.is_file() else ():
        _, kind, path = line.split(":", 2)
        if kind not in GROUPS:
            continue
        place, limit, taken, spare = GROUPS[kind]
        for folder in [Path(path), *Path(path).parents]:  # a container may see its own group as the root
            group = root / place / str(folder).lstrip("/")
            if (group / limit).is_file() and (group / limit).read_text().strip().isdigit():
                cache = re.search(rf"^{spare} (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
                found.append((int((group / limit).read_text()), int((group / taken).read_text()) - int(cache[1])))
    return found
