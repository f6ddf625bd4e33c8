"""The trace memory: verified reasoning, and how close a new thought comes to it (FINER-SQL, arXiv 2605.03465).

A wrong answer whose reasoning resembles verified reasoning earns partial credit: the cosine between its embedding
and the mean of the `top_k` most similar verified traces, by default of *other* databases, so that what is rewarded
is the way of reasoning and not the names. The memory grows by the thoughts of correct completions that pass a gate.

Search is exact, by matrix product: 10^5 traces of 512 numbers take 200 MB and about 10 ms a query. Past 10^6 traces
the same interface wants an approximate index (FAISS, HNSW) behind `_top_k`, and nothing else changes.

Importing this file needs numpy only; torch and transformers are imported by the embedders that use them.
"""

import re
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

WORD = re.compile(r"\w+")
SCOPES = ("other", "same", "any")
FORMAT = "trace-memory-1"


@dataclass(frozen=True)
class MemoryGate:
    """Which correct thoughts enter the memory; the defaults are the paper's."""

    memory_min_words: int = field(default=30, metadata={"help": "a stored thought has at least this many words"})
    memory_max_words: int = field(default=2000, metadata={"help": "and at most this many"})
    memory_min_columns: int = field(default=2, metadata={"help": "it mentions at least this many schema columns"})
    memory_min_density: float = field(default=0.05, metadata={"help": "column mentions per word, at least"})
    memory_min_bigrams: float = field(default=0.6, metadata={"help": "share of unique bigrams, at least"})
    memory_max_cosine: float = field(default=0.9, metadata={"help": "its nearest stored trace is less similar"})

    def rejection(self, thought: str, columns: frozenset[str] | None) -> str | None:
        """Why a thought does not enter, or None; `columns` (lower case) None skips the rules about columns."""
        words = thought.split()
        if not self.memory_min_words <= len(words) <= self.memory_max_words:
            return "length"
        bigrams = list(zip(words, words[1:], strict=False))
        if bigrams and len(set(bigrams)) < self.memory_min_bigrams * len(bigrams):
            return "repetition"
        if columns is not None:
            mentioned = [word for word in WORD.findall(thought.lower()) if word in columns]
            if len(set(mentioned)) < self.memory_min_columns:
                return "columns"
            if len(mentioned) < self.memory_min_density * len(words):
                return "density"
        return None


class TraceMemory:
    """Verified traces with their embeddings.

    Args:
        embed: maps texts to an array [n, dim]; rows are normalised here. Each text is embedded once.
        dim: length of an embedding.
        top_k: how many nearest traces form the centroid.
        scope: compare with traces of `other` databases, of the `same`, or of `any`.
        gate: which thoughts may enter.
        columns: {db_id: column names}; without them the gate's rules about columns do not apply.
    """

    def __init__(self, embed: Callable, dim: int, top_k: int = 20, *, scope: str = "other",
                 gate: MemoryGate | None = None, columns: Mapping[str, Sequence[str]] | None = None):
        if scope not in SCOPES:
            raise ValueError(f"memory scope is '{scope}'; choose one of {', '.join(SCOPES)}")
        if top_k < 1:
            raise ValueError(f"memory top_k is {top_k}; it must be at least 1")
        self.embed, self.dim, self.top_k, self.scope = embed, dim, top_k, scope
        self.gate = gate or MemoryGate()
        self.columns = {db_id: frozenset(name.lower() for name in names) for db_id, names in (columns or {}).items()}
        self.rejections: Counter = Counter()
        self.thoughts: list[str] = []
        self.db_ids: list[str] = []
        self._vectors = np.zeros((64, dim), np.float32)  # grows by doubling; rows past len(self) are unused
        self._databases = np.zeros(64, np.int64)  # the number of each trace's database
        self._number_of: dict[str, int] = {}
        self._embedded: OrderedDict[str, np.ndarray] = OrderedDict()  # the latest texts, so none is embedded twice

    def __len__(self) -> int:
        return len(self.thoughts)

    def add(self, db_id: str, thought: str, columns: Sequence[str] | None = None) -> bool:
        """Stores the thought of a correct completion if the gate lets it in; rejections are counted by reason."""
        known = frozenset(c.lower() for c in columns) if columns is not None else self.columns.get(db_id)
        reason = self.gate.rejection(thought, known)
        if reason is None:
            vector = self._embed([thought])[0]
            if len(self) and float((self._vectors[:len(self)] @ vector).max()) >= self.gate.memory_max_cosine:
                reason = "duplicate"
        if reason is not None:
            self.rejections[reason] += 1
            return False
        self._append(db_id, thought, vector)
        return True

    def similarity(self, db_id: str, thought: str) -> float:
        """cos(e(thought), c), c the mean of the top-k most similar traces in scope; 0 where there are none."""
        return self.similarities([(db_id, thought)])[0]

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """`similarity` of many (db_id, thought) pairs; their texts are embedded in one batch."""
        if not len(self) or not pairs:
            return [0.0] * len(pairs)
        vectors = self._embed([thought for _, thought in pairs])  # [n, dim]
        cosines = vectors @ self._vectors[:len(self)].T  # [n, N]
        return [self._to_centroid(vector, row, db_id) for vector, row, (db_id, _) in
                zip(vectors, cosines, pairs, strict=True)]

    def neighbours(self, db_id: str, thought: str, count: int = 3) -> list[dict]:
        """The nearest traces in scope, for people to read."""
        if not len(self):
            return []
        cosines = self._vectors[:len(self)] @ self._embed([thought])[0]
        return [{"db_id": self.db_ids[i], "thought": self.thoughts[i], "similarity": float(cosines[i])}
                for i in self._top_k(cosines, db_id, count)]

    def _to_centroid(self, vector: np.ndarray, cosines: np.ndarray, db_id: str) -> float:
        nearest = self._top_k(cosines, db_id, self.top_k)
        if not len(nearest):
            return 0.0
        centroid = self._vectors[nearest].mean(0)
        length = float(np.linalg.norm(centroid))
        return float(np.clip(vector @ centroid / length, -1.0, 1.0)) if length > 0 else 0.0

    def _top_k(self, cosines: np.ndarray, db_id: str, k: int) -> np.ndarray:
        """Indices of the k most similar traces in scope, most similar first; equal ones by age."""
        databases, own = self._databases[:len(self)], self._number_of.get(db_id, -1)
        in_scope = {"other": databases != own, "same": databases == own, "any": databases >= 0}[self.scope]
        candidates = np.flatnonzero(in_scope)
        if len(candidates) > k:
            kth = np.partition(cosines[candidates], len(candidates) - k)[len(candidates) - k]
            candidates = candidates[cosines[candidates] >= kth]
        return candidates[np.argsort(-cosines[candidates], kind="stable")][:k]

    def _append(self, db_id: str, thought: str, vector: np.ndarray) -> None:
        if len(self) == len(self._vectors):
            self._vectors = np.concatenate([self._vectors, np.zeros_like(self._vectors)])
            self._databases = np.concatenate([self._databases, np.zeros_like(self._databases)])
        self._vectors[len(self)] = vector
        self._databases[len(self)] = self._number_of.setdefault(db_id, len(self._number_of))
        self.thoughts.append(thought)
        self.db_ids.append(db_id)

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [n, dim]; only texts not seen lately are embedded, in one batch."""
        new = list(dict.fromkeys(text for text in texts if text not in self._embedded))
        if new:
            vectors = np.asarray(self.embed(new), np.float32)
            if vectors.shape != (len(new), self.dim):
                raise ValueError(f"the embedder gave {list(vectors.shape)} for {len(new)} texts, dim {self.dim}")
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            self._embedded.update(zip(new, vectors / np.where(lengths > 0, lengths, 1.0), strict=True))
        result = np.stack([self._embedded[text] for text in texts])
        while len(self._embedded) > 10_000:
            self._embedded.popitem(last=False)
        return result

    def save(self, path: str | Path) -> None:
        """Writes the traces and their vectors to an .npz file (no pickle)."""
        np.savez(path, format=np.array(FORMAT), vectors=self._vectors[:len(self)],
                 thoughts=np.array(self.thoughts, np.str_), db_ids=np.array(self.db_ids, np.str_))

    def load(self, path: str | Path) -> "TraceMemory":
        """Replaces the content by that of a saved memory, exactly; returns itself.

        Raises:
            ValueError: the file is truncated, is no trace memory, or was made with embeddings of another length.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                if str(stored["format"]) != FORMAT:
                    raise ValueError(f"its format is {stored['format']}")
                vectors, thoughts, db_ids = stored["vectors"], stored["thoughts"].tolist(), stored["db_ids"].tolist()
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a whole trace memory ({error})") from error
        if vectors.ndim != 2 or vectors.shape != (len(thoughts), self.dim) or len(db_ids) != len(thoughts):
            raise ValueError(f"{path} holds embeddings {list(vectors.shape)}, but this embedder makes {self.dim}")
        self.__init__(self.embed, self.dim, self.top_k, scope=self.scope, gate=self.gate, columns=self.columns)
        for db_id, thought, vector in zip(db_ids, thoughts, vectors, strict=True):
            self._append(db_id, thought, vector)
        return self


# ---- embedders: callables from a list of texts to an array [n, dim], with an attribute `dim`


class HashEmbedder:
    """Word unigrams and bigrams hashed into `dim` signed buckets; needs no model and is the same on every machine."""

    def __init__(self, dim: int = 512):
        self.dim = dim

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            words = WORD.findall(text.lower())
            for gram in words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]:
                code = zlib.crc32(gram.encode())
                row[code % self.dim] += 1.0 if code >> 31 else -1.0
        return vectors


class ModelEmbedder:
    """Hidden states of a transformers model: their mean over the tokens, or the last token's (`pooling="last"`)."""

    def __init__(self, model, tokenizer, pooling: str = "mean", batch: int = 32, max_tokens: int = 512):
        self.model, self.tokenizer, self.dim = model, tokenizer, model.config.hidden_size
        self.pooling, self.batch, self.max_tokens = pooling, batch, max_tokens

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        pieces = []
        with torch.no_grad():
            for start in range(0, len(texts), self.batch):
                ids = [self.tokenizer.encode(t)[:self.max_tokens] or [0] for t in texts[start:start + self.batch]]
                pieces.append(self._pool(ids).float().cpu().numpy())
        return np.concatenate(pieces)

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
        return (hidden * mask[..., None]).sum(1) / lengths


def make_embedder(name: str, model=None, tokenizer=None) -> Callable:
    """`hash`, `policy` (the frozen reference given as model and tokenizer), or a Hugging Face encoder by name or path.

    Raises:
        ValueError: the encoder is not there, or `policy` without a model.
    """
    if name == "hash":
        return HashEmbedder()
    if name == "policy":
        if model is None:
            raise ValueError("the `policy` embedder needs the policy's model")
        return ModelEmbedder(model, tokenizer)
    from transformers import AutoModel, AutoTokenizer

    try:
        encoder, tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"embedder '{name}' is neither hash, policy, a local folder nor reachable on the hub") from error
    # Qwen3-Embedding gathers a text's meaning in its last token, <|endoftext|>, which its tokenizer adds.
    return ModelEmbedder(encoder, tokenizer, pooling="last" if encoder.config.model_type == "qwen3" else "mean")
