"""Four rewards for a Text-to-SQL completion, and how they add up (FINER-SQL, arXiv 2605.03465).

    R = f · (w_f + w_x · x + w_a · a + w_m · m)

    f  format     1 for `<think> reasoning </think> one SQL statement`, else 0: it gates the others
    x  execution  0 does not run, 1 runs, 2 returns the gold result
    a  atomic     0 when correct, else φ(max_i J(A(sql), A(gold_i))), J the share of common operations
    m  memory     1 when correct, else the cosine of the reasoning to a centroid of verified traces

and three more that are off unless they are given a weight: `result` (cell-level soft-F1 of the result
tables), `schema` (Jaccard index of the tables and columns mentioned), both 1 when correct, and `user` (a
function of your own, whatever it says).

Any correct completion outranks any wrong one. A wrong one gets at most w_f + w_x + w_a φ(1) + w_m + w_r +
w_s + w_u, a correct one at least w_f + 2 w_x + w_m + w_r + w_s, so weights with w_x ≤ w_a φ(1) + w_u are
refused. Where execution is switched off there is no x to outrank by: a correct completion then gets a =
φ(1), the most that a wrong one can get, so it is never below one, and `user` is refused.

What is switched off is not computed and imports nothing. `format` switched off loses its weight w_f but
remains the gate, for without it there is no SQL to score. SQL always runs: memory must know what is
correct, and every log shows the status of the SQL.
"""

import importlib.util
import inspect
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from text2sql.atomic import atomic_operations, atomic_reward, names_in, shape_atomic
from text2sql.memory import SCOPES, MemoryGate, TraceMemory, make_embedder

__all__ = ["MemoryGate", "RewardBreakdown", "RewardConfig", "RewardItem", "RewardScorer", "TraceMemory",
           "atomic_operations", "atomic_reward", "build_memory", "load_reward_module", "make_embedder",
           "parse_completion", "parse_rewards", "shape_atomic", "soft_f1"]

COMPONENTS = ("format", "execution", "atomic", "memory", "result", "schema", "user")
ATOMIC_WHEN = ("wrong", "runs", "fails")
MAX_ATOMIC = shape_atomic(1.0)  # φ(1) of the paper's shaping: the most that a wrong completion's SQL earns
NEIGHBOURS = 2  # nearest traces that are kept of a wrong completion, for people to read
MARGIN = 1e-6  # of the sum of all weights; by less, float32 could not tell correct from wrong

THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
FENCE = re.compile(r"```(?:sql|sqlite)?[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)
# Strings, quoted names and comments. One that is not closed runs to the end, so that a scan stays linear.
QUOTED = re.compile(r"'[^']*(?:'|\Z)|\"[^\"]*(?:\"|\Z)|`[^`]*(?:`|\Z)|\[[^\]]*(?:\]|\Z)"
                    r"|--[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
STATEMENT = re.compile(r"[\s(]*+(?:select|with|values|insert|update|delete|replace|create|drop|alter|pragma|"
                       r"explain|attach|detach|vacuum|begin|analyze)\b", re.IGNORECASE)


def parse_completion(text: str, lenient: bool = False) -> tuple[str, str] | None:
    """(thought, sql) of a completion, or None where its format is broken.

    The format is one non-empty `<think> … </think>`, first, then exactly one SQL statement and nothing else;
    a trailing semicolon is fine. A fenced block around the SQL breaks it, unless `lenient`.
    """
    match = THINK.fullmatch(text)
    if not match or text.count("<think>") != 1 or text.count("</think>") != 1:
        return None
    thought, sql = match[1].strip(), match[2].strip()
    if lenient and (fenced := FENCE.fullmatch(sql)):
        sql = fenced[1].strip()
    bare = QUOTED.sub(" ", sql).strip().rstrip(";").strip()  # without strings and comments
    if not thought or ";" in bare or "```" in sql or not STATEMENT.match(bare):
        return None
    return thought, sql


# ---- settings


@dataclass(frozen=True)
class RewardConfig:
    """The rewards."""  # ValueError for weights or names that make no sense

    rewards: str = field(default="format,execution,atomic,memory", metadata={
        "help": "rewards that are summed, with optional weights: format,execution=2,atomic=0.5,memory"})
    atomic_when: str = field(default="wrong", metadata={
        "help": "which completions earn the atomic reward: all wrong ones, those that run, those that fail",
        "choices": ATOMIC_WHEN})
    atomic_lambda: float = field(default=0.05, metadata={
        "help": "l in l j + (1 - l) b j^g, the atomic reward for an overlap of j"})
    atomic_beta: float = field(default=0.79, metadata={"help": "b in it, the height of its steep part"})
    atomic_gamma: float = field(default=0.20, metadata={"help": "g in it, the smaller the steeper near 0"})
    lenient_format: bool = field(default=False, metadata={"help": "unwrap a fenced block around the SQL"})
    embedder: str = field(default="hash", metadata={
        "help": "embeds reasoning: hash (no model), policy (the reference), or a Hugging Face encoder"})
    memory_top_k: int = field(default=20, metadata={"help": "verified traces that form the centroid"})
    memory_scope: str = field(default="other", metadata={
        "help": "compare with traces of other databases, the same, or any", "choices": SCOPES})
    reward_module: str | None = field(default=None, metadata={
        "help": "a Python file with a function reward(...), see the README; user=W in --rewards weighs it"})

    def __post_init__(self):
        for name, choices in (("atomic_when", ATOMIC_WHEN), ("memory_scope", SCOPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is '{getattr(self, name)}'; choose one of {', '.join(choices)}")
        for name in ("atomic_lambda", "atomic_beta", "atomic_gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        if self.memory_top_k < 1:
            raise ValueError(f"memory_top_k is {self.memory_top_k}; it must be at least 1")
        if bool(self.reward_module) != bool(self.weights["user"]):
            raise ValueError("a reward of your own needs both: reward_module, and user=W among the rewards")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each component, 0 where it is switched off."""
        return parse_rewards(self.rewards, self.shape(1.0))

    @property
    def margin(self) -> float:
        """How far the lowest reward of a correct completion lies above the highest of a wrong one."""
        weights = self.weights
        if not weights["execution"]:
            return 0.0
        return weights["execution"] - weights["user"] - weights["atomic"] * self.shape(1.0)

    def shape(self, j: float) -> float:
        """φ(j) of these settings."""
        return shape_atomic(j, self.atomic_lambda, self.atomic_beta, self.atomic_gamma)


def parse_rewards(text: str, max_atomic: float = MAX_ATOMIC) -> dict[str, float]:
    """`format,execution,atomic=0.5` to the weight of every component; `max_atomic` is φ(1).

    Raises:
        ValueError: an unknown or repeated name, a weight that is no positive number, or weights with which a
            wrong completion could outrank a correct one.
    """
    weights = dict.fromkeys(COMPONENTS, 0.0)
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in COMPONENTS:
            raise ValueError(f"there is no reward '{name}'; choose among {', '.join(COMPONENTS)}")
        if weights[name]:
            raise ValueError(f"reward '{name}' is named twice")
        try:
            weights[name] = float(number or 1)
        except ValueError:
            raise ValueError(f"the weight of reward '{name}' is '{number}', which is not a number") from None
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"the weight of reward '{name}' is {number}; it must be positive")
    execution, user = weights["execution"], weights["user"]
    bonus = user + (weights["atomic"] * max_atomic if execution else 0)  # what only wrong completions may get
    if (execution or user) and execution - bonus < MARGIN * sum(weights.values()):
        raise ValueError(f"with these weights a wrong completion could outrank a correct one: execution "
                         f"({execution:g}) must exceed {max_atomic:.2f} x atomic + user ({bonus:.3g})")
    return weights


# ---- scoring


class RewardItem(NamedTuple):
    """One completion to score."""

    db_id: str
    gold_sqls: Sequence[str]
    text: str
    question: str = ""


@dataclass(frozen=True)
class RewardBreakdown:
    """What one completion earned: components before weighting, the weighted total, what became of its SQL."""

    format: float = 0.0
    execution: float = 0.0
    atomic: float = 0.0
    memory: float = 0.0
    total: float = 0.0
    status: str = "format"  # ok, error, timeout, refused, too_large; `format` where there was no SQL to run
    result: float = 0.0
    schema: float = 0.0
    user: float = 0.0
    correct: bool = False
    text: str = ""
    thought: str = ""
    sql: str = ""
    error: str = ""
    columns: tuple = ()
    rows: tuple = ()  # the first rows of the result, for people to read
    row_count: int = 0  # of the whole result
    neighbours: tuple = ()  # nearest traces of a wrong completion: dicts of db_id, thought, similarity


class RewardScorer:
    """Scores completions.

    Args:
        executor: has run_many and run_gold, [(db_id, sql)] to executions (status, columns, rows, error), as
            sql_exec.SQLExecutor.
        schemas: {db_id: {table: [column, ...]}}.
        memory: a TraceMemory, or None where the memory reward is off.
        match: (predicted rows, gold rows, gold SQL) -> bool.
        user_reward: from `load_reward_module`.

    Raises:
        ValueError: a reward has a weight, but what it needs (memory, user_reward) was not given.
    """

    def __init__(self, config: RewardConfig, executor, schemas: Mapping, memory: TraceMemory | None = None, *,
                 match: Callable, user_reward: Callable | None = None):
        self.config, self.weights = config, config.weights
        self.executor, self.schemas, self.memory = executor, schemas, memory
        self.match, self.user_reward = match, user_reward
        self.seconds: dict[str, float] = {}  # of each component, in the last call of `score`
        for name, needed in (("memory", memory), ("user", user_reward)):
            if self.weights[name] and needed is None:
                raise ValueError(f"the {name} reward has a weight, but there is nothing to compute it with")

    def score(self, items: Sequence[RewardItem], remember: bool = True) -> list[RewardBreakdown]:
        """One RewardBreakdown a completion, in order; then the memory learns thoughts of the correct ones (`remember`).

        SQL runs in the executor's processes while a thread here embeds the thoughts, so the parts of
        `seconds` can add up to more than the call took.
        """
        self.seconds = {}
        parsed = [parse_completion(item.text, self.config.lenient_format) for item in items]
        shaped = [i for i, pair in enumerate(parsed) if pair]  # the completions that have the format
        with ThreadPoolExecutor(1) as thread:
            embedding = thread.submit(self._embed, [parsed[i][0] for i in shaped])
            with self._clock("execution"):
                executions, golds = self._execute(items, parsed, shaped)
                correct = {i for i in shaped if self._is_correct(executions[i], golds[i])}
            embedding.result()  # raises what the thread raised
        wrong = [i for i in shaped if i not in correct]
        similarity, neighbours = self._memory(items, parsed, correct, wrong)
        parts = {"format": dict.fromkeys(shaped, 1.0),
                 "execution": {i: (executions[i].status == "ok") + float(i in correct) for i in shaped},
                 "atomic": self._atomic(items, parsed, executions, correct, wrong),
                 "memory": similarity,
                 "result": self._result(executions, golds, correct, wrong),
                 "schema": self._schema(items, parsed, correct, wrong),
                 "user": self._user(items, parsed, executions, shaped)}
        if remember:  # only now, so that the order within a step makes no difference
            self.remember([(items[i].db_id, parsed[i][0]) for i in sorted(correct)])
        return [self._breakdown(i, item, parsed[i], executions.get(i), i in correct, parts, neighbours.get(i, ()))
                for i, item in enumerate(items)]

    def remember(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Shows the memory the (db_id, thought) of correct completions."""
        if self.weights["memory"]:
            with self._clock("memory"):
                self.memory.add_many(pairs)

    def _breakdown(self, i, item, pair, execution, is_correct, parts, neighbours) -> RewardBreakdown:
        if pair is None:
            return RewardBreakdown(text=item.text, error="not `<think> reasoning </think> SQL`")
        values = {name: part.get(i, 0.0) for name, part in parts.items()}
        total = sum(self.weights[name] * value for name, value in values.items())  # f = 1 here
        return RewardBreakdown(**values, total=total, status=execution.status, correct=is_correct,
                               text=item.text, thought=pair[0], sql=pair[1], error=execution.error or "",
                               columns=tuple(execution.columns), rows=tuple(execution.rows[:5]),
                               row_count=len(execution.rows), neighbours=tuple(neighbours))

    def _embed(self, thoughts: list[str]) -> None:
        """Every thought in one batch: wrong ones are compared with the memory, correct ones enter it."""
        if self.weights["memory"]:
            with self._clock("memory"):
                self.memory.prepare(thoughts)

    def _execute(self, items, parsed, shaped) -> tuple[dict, dict]:
        """Executions of the predictions and of all their golds, by index."""
        predicted = self.executor.run_many([(items[i].db_id, parsed[i][1]) for i in shaped])
        gold_pairs = list(dict.fromkeys((items[i].db_id, sql) for i in shaped for sql in items[i].gold_sqls))
        gold_of = dict(zip(gold_pairs, self.executor.run_gold(gold_pairs), strict=True))
        golds = {i: [(sql, gold_of[items[i].db_id, sql]) for sql in items[i].gold_sqls] for i in shaped}
        return dict(zip(shaped, predicted, strict=True)), golds

    def _is_correct(self, execution, golds) -> bool:
        """True when it ran and matches a gold that ran; a gold that fails never makes anything correct."""
        return execution.status == "ok" and any(
            gold.status == "ok" and self.match(execution.rows, gold.rows, sql) for sql, gold in golds)

    def _atomic(self, items, parsed, executions, correct, wrong) -> dict[int, float]:
        if not self.weights["atomic"]:
            return {}
        wanted = {"wrong": lambda i: True, "runs": lambda i: executions[i].status == "ok",
                  "fails": lambda i: executions[i].status != "ok"}[self.config.atomic_when]
        with self._clock("atomic"):
            overlaps = {i: atomic_reward(parsed[i][1], items[i].gold_sqls, self.schemas.get(items[i].db_id))
                        for i in wrong if wanted(i)}
        # Without the execution reward a correct completion must not fall behind for being correct.
        return ({i: self.config.shape(j) for i, j in overlaps.items()}
                | dict.fromkeys(correct, 0.0 if self.weights["execution"] else self.config.shape(1.0)))

    def _memory(self, items, parsed, correct, wrong) -> tuple[dict[int, float], dict[int, list[dict]]]:
        """The reward of each completion, and the nearest traces of each wrong one."""
        if not self.weights["memory"]:
            return {}, {}
        with self._clock("memory"):
            compared = self.memory.compare([(items[i].db_id, parsed[i][0]) for i in wrong], NEIGHBOURS)
        scores = {i: similarity for i, (similarity, _) in zip(wrong, compared, strict=True)}
        return (scores | dict.fromkeys(correct, 1.0),
                {i: nearest for i, (_, nearest) in zip(wrong, compared, strict=True)})

    def _result(self, executions, golds, correct, wrong) -> dict[int, float]:
        if not self.weights["result"]:
            return {}
        with self._clock("result"):
            scores = {i: max((soft_f1(executions[i].rows, gold.rows) for _, gold in golds[i]
                              if gold.status == "ok"), default=0.0)
                      for i in wrong if executions[i].status == "ok"}
        return scores | dict.fromkeys(correct, 1.0)

    def _schema(self, items, parsed, correct, wrong) -> dict[int, float]:
        if not self.weights["schema"]:
            return {}
        with self._clock("schema"):
            scores = {i: max(schema_overlap(parsed[i][1], gold, self.schemas.get(items[i].db_id, {}))
                             for gold in items[i].gold_sqls) for i in wrong}
        return scores | dict.fromkeys(correct, 1.0)

    def _user(self, items, parsed, executions, shaped) -> dict[int, float]:
        if not self.weights["user"]:
            return {}
        with self._clock("user"):
            scores = {i: float(self.user_reward(question=items[i].question, db_id=items[i].db_id,
                                                gold_sqls=tuple(items[i].gold_sqls), thought=parsed[i][0],
                                                sql=parsed[i][1], execution=executions[i])) for i in shaped}
        for value in scores.values():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"the reward module returned {value}, which is not between 0 and 1")
        return scores

    @contextmanager
    def _clock(self, name: str):
        """Adds the seconds spent inside to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def soft_f1(predicted: Sequence[tuple], gold: Sequence[tuple]) -> float:
    """Soft-F1 of two result tables in [0, 1], row against row, as in BIRD mini-dev's `calculate_f1_score`.

    Repeated rows are dropped first; a cell matches when its value is anywhere in the other row.
    """
    predicted, gold = list(dict.fromkeys(map(tuple, predicted))), list(dict.fromkeys(map(tuple, gold)))
    if not predicted and not gold:
        return 1.0
    hits, extra, missed = 0.0, max(0, len(predicted) - len(gold)), max(0, len(gold) - len(predicted))
    for row, target in zip(predicted, gold, strict=False):
        found = sum(value in target for value in row)
        hits += found / len(target)
        extra += (len(row) - found) / len(target)
        missed += sum(value not in row for value in target) / len(target)
    return 2 * hits / (2 * hits + extra + missed)


def schema_overlap(sql: str, gold: str, schema: Mapping[str, Sequence[str]]) -> float:
    """Jaccard index of the tables and columns of `schema` that two queries mention, 0 where neither does."""
    known = {name.lower() for table, columns in schema.items() for name in (table, *columns)}
    mine, theirs = names_in(sql) & known, names_in(gold) & known
    return len(mine & theirs) / len(mine | theirs) if mine | theirs else 0.0


# ---- parts that a configuration asks for


def build_memory(config: RewardConfig, gate: MemoryGate, schemas: Mapping, model=None, tokenizer=None):
    """The TraceMemory that a configuration asks for, or None. `model` is the frozen backbone for `policy`."""
    if not config.weights["memory"]:
        return None
    embed = make_embedder(config.embedder, model, tokenizer)
    columns = {db_id: [column for names in schema.values() for column in names]
               for db_id, schema in schemas.items()}
    return TraceMemory(embed, embed.dim, config.memory_top_k, scope=config.memory_scope, gate=gate,
                       columns=columns)


def load_reward_module(path: str | Path) -> Callable:
    """The function `reward(question, db_id, gold_sqls, thought, sql, execution)` of a file, in [0, 1].

    It is called with keyword arguments for every completion that has the format. `execution` has status,
    columns, rows, error and seconds.

    Raises:
        ValueError: the file is missing, does not run, or has no such function.
    """
    if not Path(path).is_file() or Path(path).suffix != ".py":
        raise ValueError(f"reward module {path} is not a Python file that exists")
    spec = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises is reported as theirs
        raise ValueError(f"reward module {path} cannot be loaded: {type(error).__name__}: {error}") from error
    reward = getattr(module, "reward", None)
    if not callable(reward):
        raise ValueError(f"reward module {path} has no function named reward")
    arguments = dict.fromkeys(("question", "db_id", "gold_sqls", "thought", "sql", "execution"))
    try:
        inspect.signature(reward).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"reward in {path} must take {', '.join(arguments)}: {error}") from error
    return reward
