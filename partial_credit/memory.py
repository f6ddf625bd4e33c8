"""The trace memory: verified reasoning, and the similarity of new thoughts to it (FINER-SQL, arXiv 2605.03465).

A wrong answer whose reasoning resembles verified reasoning earns partial credit: the cosine between its
embedding and the mean of the `top_k` most similar verified traces, by default of *other* databases, so that
the reasoning is rewarded and not the names. Thoughts of correct completions that pass a gate are added to the
memory.

Search is exact, by matrix product: 10^5 traces of 512 numbers take 200 MB and about 10 ms per query. Beyond 10^6
traces, put an approximate index (FAISS, HNSW) behind `_top_k`; nothing else changes.

Importing this file needs only numpy; the embedders that use torch and transformers import them.
"""

import json
import math
import operator
import re
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

WORD = re.compile(r"\w+")
VALUE = re.compile(r"(?<!\w)('[^'\n]*'|\"[^\"\n]*\"|\d+(\.\d+)?)(?!\w)")  # not the text between two apostrophes
SCOPES = ("other", "same", "any")
FORMAT = "trace-memory-2"
RECENT = 4096  # recent texts whose embeddings are cached
BLOCK = 256  # queries per matrix product, to bound its memory


# The paper's values of the thresholds that depend on the length of traces and their mentions of columns.
PAPER_GATE = {"memory_min_words": 30, "memory_max_words": 2000, "memory_min_columns": 2, "memory_min_density": 0.05}
CHOSEN = "chosen from the traces unless given"
RANGE = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}


# ---- settings, by the rules of common/options.py, repeated so that this file can be copied alone


def option(default, help: str, **metadata):
    """A field of a settings dataclass: its default, its help text, its range or choices."""
    return field(default=default, metadata={"help": help, **metadata})


def check(config) -> None:
    """Raises ValueError, naming the field, for a value that is not among its choices or not in its range."""
    for one in fields(config):
        value, meta = getattr(config, one.name), one.metadata
        if "choices" in meta and value not in meta["choices"]:
            raise ValueError(f"{one.name} is '{value}'; choose one of {', '.join(meta['choices'])}")
        for bound, holds in RANGE.items():
            if bound in meta and value is not None and not (math.isfinite(value) and holds(value, meta[bound])):
                raise ValueError(f"{one.name} is {value}; it must be {bound.replace('_', ' ')} {meta[bound]}")


@dataclass(frozen=True)
class MemoryGate:
    """Which correct thoughts enter the memory.

    None means the paper's threshold, unless `gate_for` replaces it by one that fits the traces.
    """

    memory_min_words: int | None = option(None, "a stored thought has at least this many words; "
                                                f"{CHOSEN}, at most 30", at_least=0)
    memory_max_words: int | None = option(None, "a stored thought has at most this many words; "
                                                f"{CHOSEN}, at least 2000", at_least=1)
    memory_min_columns: int | None = option(None, "it mentions at least this many columns of the schema; "
                                                  f"{CHOSEN}, at most 2", at_least=0)
    memory_min_density: float | None = option(None, "it has at least this many column mentions a word; "
                                                    f"{CHOSEN}, at most 0.05", at_least=0)
    memory_min_bigrams: float = option(0.6, "at least this share of its word pairs are different",
                                       at_least=0, at_most=1)
    memory_max_cosine: float = option(0.9, "its nearest stored trace is less similar than this", above=0)

    def __post_init__(self):
        check(self)
        least, most = self.memory_min_words, self.memory_max_words
        if least is not None and most is not None and least > most:
            raise ValueError(f"no thought has at least {least} words (--memory-min-words) and at most {most} "
                             "(--memory-max-words)")

    def threshold(self, name: str) -> float:
        """The threshold of that name; the paper's if it is None."""
        return PAPER_GATE[name] if getattr(self, name) is None else getattr(self, name)

    def rejection(self, thought: str, columns: Iterable[str] | None) -> str | None:
        """Why a thought is rejected, or None; without `columns` (lower case) the rules on columns do not apply."""
        words = thought.split()
        if not self.threshold("memory_min_words") <= len(words) <= self.threshold("memory_max_words"):
            return "length"
        bigrams = list(zip(words, words[1:], strict=False))
        if bigrams and len(set(bigrams)) < self.memory_min_bigrams * len(bigrams):
            return "repetition"
        if columns is not None:
            mentions = count_mentions(thought, columns)
            if len(mentions) < self.threshold("memory_min_columns"):
                return "columns"
            if mentions.total() < self.threshold("memory_min_density") * len(words):
                return "density"
        return None

    def explain(self, rejections: Mapping[str, int]) -> str:
        """How many thoughts each threshold has rejected, the most frequent first, with the flag that sets it."""
        least, most = self.threshold("memory_min_words"), self.threshold("memory_max_words")
        meanings = {
            "length": f"with fewer than {least} or more than {most} words (--memory-min-words, --memory-max-words)",
            "repetition": "that repeat themselves: too few of their word pairs are different (--memory-min-bigrams "
                          f"{self.memory_min_bigrams:g})",
            "columns": f"with fewer than {self.threshold('memory_min_columns')} columns of the schema "
                       "(--memory-min-columns)",
            "density": f"with fewer than {self.threshold('memory_min_density'):g} column mentions a word "
                       "(--memory-min-density)",
            "duplicate": f"that are nearly a stored one (--memory-max-cosine {self.memory_max_cosine:g})"}
        return ", ".join(f"{count} {meanings[reason]}" for reason, count in Counter(rejections).most_common() if count)


def gate_for(traces: Sequence[tuple[str, str]], columns: Mapping[str, Iterable[str]], gate: MemoryGate) -> MemoryGate:
    """The gate with each threshold that is None replaced by one that fits these (db_id, thought) pairs.

    The rule is the same for all: half the median of the traces, but never stricter than the paper's threshold (at most
    30 words, 2 columns and 0.05 mentions per word). The maximum is twice the median, but at least 2000 words. So a
    thought is rejected if it is far shorter than, or mentions far fewer columns than, the typical verified trace.
    Without traces the gate is unchanged. `columns`: {db_id: column names}.
    """
    if not traces:
        return gate
    known = {db_id: lower_case(names) for db_id, names in columns.items()}
    words = [len(thought.split()) for _, thought in traces]
    mentions = [count_mentions(thought, known.get(db_id, ())) for db_id, thought in traces]
    usual = float(np.median(words))
    fitting = {
        "memory_min_words": min(PAPER_GATE["memory_min_words"], int(usual / 2)),
        "memory_max_words": max(PAPER_GATE["memory_max_words"], int(2 * usual)),
        "memory_min_columns": min(PAPER_GATE["memory_min_columns"], int(np.median([len(one) for one in mentions]) / 2)),
        "memory_min_density": min(PAPER_GATE["memory_min_density"], float(np.median(
            [one.total() / max(count, 1) for one, count in zip(mentions, words, strict=True)]) / 2))}
    given = {name: value for name, value in vars(gate).items() if value is not None}
    fitting["memory_min_words"] = min(fitting["memory_min_words"], given.get("memory_max_words", math.inf))
    fitting["memory_max_words"] = max(fitting["memory_max_words"], given.get("memory_min_words", 0))
    return MemoryGate(**fitting | given)


def count_mentions(text: str, columns: Iterable[str]) -> Counter:
    """{column: number of mentions in `text`}, without zeros; `Free Meal (%)` is searched for as a phrase."""
    text = text.lower()
    words = Counter(WORD.findall(text))
    counts = ((name, words[name] if WORD.fullmatch(name) else text.count(name)) for name in columns if name)
    return Counter({name: count for name, count in counts if count})


class TraceMemory:
    """Verified traces with their embeddings.

    Args:
        embed: maps a list of texts to an array [n, dim], normalised here; each text is embedded once.
        dim: length of an embedding.
        top_k: number of nearest traces whose mean is the centroid.
        scope: compare with traces of `other` databases, of the `same`, or of `any`.
        gate: which thoughts may enter.
        columns: {db_id: column names}; without them the gate's rules on columns do not apply.
        read: maps (db_id, thought) to the text to embed, as `Roles` does; None: the thought as written.

    Raises:
        ValueError: an unknown scope, or a top_k below 1.
    """

    def __init__(self, embed: Callable, dim: int, top_k: int = 20, *, scope: str = "other",
                 gate: MemoryGate | None = None, columns: Mapping[str, Iterable[str]] | None = None,
                 read: Callable[[str, str], str] | None = None):
        if scope not in SCOPES:
            raise ValueError(f"memory scope is '{scope}'; choose one of {', '.join(SCOPES)}")
        if top_k < 1:
            raise ValueError(f"memory top_k is {top_k}; it must be at least 1")
        self.embed, self.dim, self.top_k, self.scope, self.read = embed, dim, top_k, scope, read
        self.gate = gate or MemoryGate()
        self.columns = {db_id: lower_case(names) for db_id, names in (columns or {}).items()}
        self._clear()

    def _clear(self) -> None:
        self.rejections: Counter = Counter()  # reason -> number of rejected thoughts
        self.thoughts: list[str] = []
        self.db_ids: list[str] = []
        self._vectors = np.zeros((64, self.dim), np.float32)  # grows by doubling; len(self) rows are in use
        self._databases = np.zeros(64, np.int64)  # the number of each trace's database
        self._number_of: dict[str, int] = {}
        self._recent: OrderedDict[str, np.ndarray] = OrderedDict()  # text -> vector, most recently used last

    def __len__(self) -> int:
        return len(self.thoughts)

    # ---- writing

    def add(self, db_id: str, thought: str, columns: Iterable[str] | None = None) -> bool:
        """Stores the thought of a correct completion if the gate accepts it; counts rejections by reason."""
        return self.add_many([(db_id, thought)], columns)[0]

    def add_many(self, pairs: Sequence[tuple[str, str]], columns: Iterable[str] | None = None) -> list[bool]:
        """`add` of (db_id, thought) pairs one after the other, embedded and compared in batches."""
        reasons = [self.gate.rejection(thought, self.columns.get(db_id) if columns is None else lower_case(columns))
                   for db_id, thought in pairs]
        passed = [i for i, reason in enumerate(reasons) if reason is None]
        for start in range(0, len(passed), BLOCK):
            block = passed[start:start + BLOCK]
            vectors = self._embed([pairs[i] for i in block])  # [n, dim]
            cosines, within = vectors @ self._vectors[:len(self)].T, vectors @ vectors.T  # [n, len(self)], [n, n]
            if self.read:  # without names, thoughts on two databases may be equal, but are not duplicates
                own = self._numbers(pairs[i][0] for i in block)  # [n]
                cosines[self._databases[:len(self)] != own[:, None]] = within[own != own[:, None]] = -1.0
            nearest = cosines.max(1, initial=-1.0)  # [n], among the stored ones
            for row, i in enumerate(block):
                if nearest[row] >= self.gate.memory_max_cosine:
                    reasons[i] = "duplicate"
                else:
                    self._append(*pairs[i], vectors[row])
                    np.maximum(nearest, within[row], out=nearest)
        self.rejections.update(reason for reason in reasons if reason is not None)
        return [reason is None for reason in reasons]

    def prepare(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Embeds the thoughts of (db_id, thought) pairs in one batch; `similarities` and `add` reuse the result."""
        self._embed(list(pairs))

    def exchange(self, pairs: Iterable[tuple[str, str]], gather: Callable[[dict], list[dict]]) -> None:
        """Shares embeddings between the processes of a run: each then caches those of all processes' pairs only.

        So no text is embedded twice, all processes add the same vectors, and the memory that one process saves is that
        of all when the run resumes.
        """
        own = list(dict.fromkeys(pairs))
        parts = gather(dict(zip(self._texts(own), self._embed(own), strict=True)))
        self._recent = OrderedDict((text, vector) for part in reversed(parts) for text, vector in part.items())

    def _numbers(self, db_ids: Iterable[str]) -> np.ndarray:
        """The numbers of databases; a new database gets the next number."""
        return np.array([self._number_of.setdefault(db_id, len(self._number_of)) for db_id in db_ids], np.int64)

    def _append(self, db_id: str, thought: str, vector: np.ndarray) -> None:
        if len(self) == len(self._vectors):
            self._vectors = np.concatenate([self._vectors, np.zeros_like(self._vectors)])
            self._databases = np.concatenate([self._databases, np.zeros_like(self._databases)])
        self._vectors[len(self)] = vector
        self._databases[len(self)] = self._numbers([db_id])[0]
        self.thoughts.append(thought)
        self.db_ids.append(db_id)

    def start_note(self, offered: int) -> str:
        """A sentence if the gate accepted few or none of the verified traces offered at the start, else empty."""
        gate = self.gate
        if not offered:
            words, columns = gate.threshold("memory_min_words"), gate.threshold("memory_min_columns")
            return ("the memory starts empty, for there are no verified traces; the reasoning of correct completions "
                    f"enters it when it has at least {words} words and mentions at least {columns} columns "
                    "(--memory-min-words, --memory-min-columns)")
        if len(self) >= offered / 10:
            return ""
        start = f"with only {len(self)}" if len(self) else "empty, with none"
        return (f"the memory starts {start} of {offered} verified traces: the gate refused "
                + gate.explain(self.rejections))

    # ---- reading

    def similarity(self, db_id: str, thought: str) -> float:
        """cos(e(thought), c), where c is the mean of the top-k most similar traces in scope; 0 if there are none."""
        return self.similarities([(db_id, thought)])[0]

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """`similarity` of many (db_id, thought) pairs; their texts are embedded in one batch."""
        return [similarity for similarity, _ in self.compare(pairs)]

    def compare(self, pairs: Sequence[tuple[str, str]], count: int = 0) -> list[tuple[float, list[dict]]]:
        """`similarity` of many (db_id, thought) pairs, each with its `count` nearest traces for display."""
        if not len(self):
            return [(0.0, [])] * len(pairs)
        vectors = self._embed(pairs)  # [n, dim]
        result = []
        for start in range(0, len(pairs), BLOCK):
            block = vectors[start:start + BLOCK]
            cosines = block @ self._vectors[:len(self)].T  # [BLOCK, len(self)]
            for vector, row, (db_id, _) in zip(block, cosines, pairs[start:start + BLOCK], strict=True):
                nearest = self._top_k(row, db_id, self.top_k)
                result.append((self._to_centroid(vector, nearest), [
                    {"db_id": self.db_ids[i], "thought": self.thoughts[i], "similarity": float(row[i])}
                    for i in nearest[:count]]))
        return result

    def _to_centroid(self, vector: np.ndarray, nearest: np.ndarray) -> float:
        if not len(nearest):
            return 0.0
        centroid = self._vectors[nearest].mean(0)
        length = float(np.linalg.norm(centroid))
        return float(np.clip(vector @ centroid / length, -1.0, 1.0)) if length > 0 else 0.0

    def _top_k(self, cosines: np.ndarray, db_id: str, k: int) -> np.ndarray:
        """Indices of the k most similar traces in scope, most similar first; ties: oldest first."""
        databases, own = self._databases[:len(self)], self._number_of.get(db_id, -1)
        in_scope = {"other": databases != own, "same": databases == own, "any": databases >= 0}[self.scope]
        candidates = np.flatnonzero(in_scope)
        if len(candidates) > k:
            kth = np.partition(cosines[candidates], len(candidates) - k)[len(candidates) - k]
            candidates = candidates[cosines[candidates] >= kth]
        return candidates[np.argsort(-cosines[candidates], kind="stable")][:k]

    def _texts(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The texts to embed for (db_id, thought) pairs."""
        return [self.read(*pair) if self.read else pair[1] for pair in pairs]

    def _embed(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Unit vectors [n, dim]; only texts that are not cached are embedded, in one batch."""
        texts = self._texts(pairs)
        new = list(dict.fromkeys(text for text in texts if text not in self._recent))
        if new:
            vectors = np.asarray(self.embed(new), np.float32)
            if vectors.shape != (len(new), self.dim):
                raise ValueError(f"the embedder gave {list(vectors.shape)}, not {[len(new), self.dim]}")
            if not np.isfinite(vectors).all():
                raise ValueError("the embedder gave numbers that are not finite")
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            self._recent.update(zip(new, vectors / np.where(lengths > 0, lengths, 1.0), strict=True))
        for text in texts:
            self._recent.move_to_end(text)
        result = np.array([self._recent[text] for text in texts], np.float32).reshape(-1, self.dim)
        while len(self._recent) > max(RECENT, len(texts)):
            self._recent.popitem(last=False)
        return result

    # ---- files

    def save(self, path: str | Path) -> None:
        """Writes an .npz file (no pickle) from which `load` continues exactly: traces, counts, recent texts.

        Recent texts are included because a model's embedding of a text varies in the last digits with its batch.
        All texts are one JSON string: numpy would pad each to the longest.
        """
        texts = json.dumps({"thoughts": self.thoughts, "db_ids": self.db_ids, "recent": list(self._recent),
                            "rejections": self.rejections})
        recent = np.array(list(self._recent.values()), np.float32).reshape(-1, self.dim)
        np.savez(path, format=np.array(FORMAT), vectors=self._vectors[:len(self)], recent=recent,
                 texts=np.frombuffer(texts.encode(), np.uint8))

    def load(self, path: str | Path) -> "TraceMemory":
        """Replaces the content by exactly that of a saved memory; returns itself.

        Raises:
            ValueError: the file is truncated, is not a trace memory, or has embeddings of another length.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                if str(stored["format"]) != FORMAT:
                    raise ValueError(f"its format is {stored['format']}")
                vectors, recent = stored["vectors"], stored["recent"]
                texts = json.loads(stored["texts"].tobytes())
            thoughts, db_ids, recent_texts = texts["thoughts"], texts["db_ids"], texts["recent"]
            counts = (len(thoughts), len(db_ids), len(recent_texts))
            rejections = Counter(texts["rejections"])
        except UNREADABLE as error:
            raise ValueError(f"{path} is not a whole trace memory ({error})") from error
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"{path} has vectors {list(vectors.shape)}, but this embedder makes {self.dim}")
        if counts != (len(vectors), len(vectors), len(recent)):
            raise ValueError(f"{path} is not a whole trace memory (texts and embeddings differ in number)")
        self._clear()
        for db_id, thought, vector in zip(db_ids, thoughts, vectors, strict=True):
            self._append(db_id, thought, vector)
        self._recent.update(zip(recent_texts, recent, strict=True))
        self.rejections = rejections
        return self


# What numpy, zipfile and json raise for a damaged or foreign file.
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, KeyError, EOFError, RuntimeError,
              zipfile.BadZipFile, zlib.error)


def lower_case(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.lower() for name in names)


class Roles:
    """Removes from reasoning what is specific to one database: names become `table` or `column`, values `value`.

        From singer: name. Keep rows where age > 30.  ->  from table column keep rows where column value

    The structure of the reasoning remains. Values are numbers and quoted text. Parts of names count as names, except
    OF_REASONING (`count` of `song_count`). A name of both a table and a column becomes `table`.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Iterable[str]]]):
        self.roles = {db_id: {form: "column" for columns in schema.values() for name in columns for form in forms(name)}
                      | {form: "table" for table in schema for form in forms(table)}
                      for db_id, schema in schemas.items()}

    def __call__(self, db_id: str, text: str) -> str:
        roles = self.roles.get(db_id, {})
        words = WORD.findall(VALUE.sub(" value ", text.lower()))
        return " ".join(roles.get(word, word) for word in words)


# Words of the reasoning itself, even if a column's name contains them.
OF_REASONING = frozenset(WORD.findall("""
    a all and are as at average avg both by clauses column columns count distinct each every except first for from
    group having in intersect is it join keep last least less limit max maximum min minimum more most not number of
    on or order rows select show sort sum table tables take than the then to union value where which with"""))


def forms(name: str) -> set[str]:
    """A name and its parts, lower case, with their plurals."""
    parts = {name.lower(), *WORD.findall(name.lower().replace("_", " "))} - OF_REASONING
    return parts | {f"{part}s" for part in parts}


# ---- embedders: callables from a list of texts to an array [n, dim], with an attribute `dim`


class HashEmbedder:
    """Word unigrams and bigrams hashed into `dim` signed buckets: no model, the same on every machine."""

    def __init__(self, dim: int = 512):
        self.dim = dim

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            words = WORD.findall(text.lower())
            for gram in words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]:
                code = zlib.crc32(gram.encode("utf-8", "replace"))
                row[code % self.dim] += 1.0 if code >> 31 else -1.0
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1.0)


class ModelEmbedder:
    """Hidden states of a transformers model: their mean, or the last token's (`pooling="last"`)."""

    def __init__(self, model, tokenizer, pooling: str = "mean", batch: int = 32, max_tokens: int = 2048):
        self.model, self.tokenizer, self.dim = model, tokenizer, model.config.hidden_size
        self.pooling, self.batch = pooling, batch
        longest = getattr(model.config, "max_position_embeddings", None) or max_tokens
        self.max_tokens = min(max_tokens, longest, tokenizer.model_max_length)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        # The tokenizer truncates, so that the token it appends to a text (which "last" reads) stays at the end.
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # similar lengths together: little padding
        vectors = np.zeros((len(ids), self.dim), np.float32)
        with torch.no_grad():
            for start in range(0, len(ids), self.batch):
                chosen = order[start:start + self.batch]
                pooled = self._pool([ids[i] or [0] for i in chosen]).float()
                vectors[chosen] = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
        return vectors

    def _pool(self, ids: list[list[int]]):
        """Embeds token lists of unequal length, padded on the right. -> [n, dim]"""
        import torch

        device, L = next(self.model.parameters()).device, max(map(len, ids))
        tokens = torch.tensor([row + [0] * (L - len(row)) for row in ids], device=device)  # [n, L]
        lengths = torch.tensor([len(row) for row in ids], device=device)[:, None]
        mask = torch.arange(L, device=device) < lengths
        hidden = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state  # [n, L, dim]
        if self.pooling == "last":
            return hidden[torch.arange(len(ids), device=device), lengths[:, 0] - 1]
        return (hidden.float() * mask[..., None]).sum(1) / lengths


def make_embedder(name: str, model=None, tokenizer=None) -> Callable:
    """`hash`, `policy` (the frozen reference given as model and tokenizer), or a Hugging Face encoder.

    `model` is a backbone without its head, whose output has `last_hidden_state`. An encoder is given by name
    or path and runs on the GPU if there is one.

    Raises:
        ValueError: the encoder is missing, or `policy` without a model.
    """
    if name == "hash":
        return HashEmbedder()
    if name == "policy":
        if model is None or tokenizer is None:
            raise ValueError("the `policy` embedder needs the policy's model and tokenizer")
        return ModelEmbedder(model, tokenizer)
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        encoder, tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"embedder '{name}' is neither hash, policy, a folder nor on the hub") from error
    encoder.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    # Qwen3-Embedding uses the hidden state of the last token, <|endoftext|>, which its tokenizer appends.
    pooling = "last" if encoder.config.model_type == "qwen3" else "mean"
    return ModelEmbedder(encoder, tokenizer, pooling)
