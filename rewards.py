"""Four rewards for a Text-to-SQL completion, and how they add up (FINER-SQL, arXiv 2605.03465).

    R = f · (w_f + w_x · x + w_a · a + w_m · m)

    f  format     1 for `<think> reasoning </think> one SQL statement`, else 0: it gates the others
    x  execution  0 does not run, 1 runs, 2 returns the gold result
    a  atomic     0 when correct, else φ(max_i J(A(sql), A(gold_i))): shared operations of the two queries (atomic.py)
    m  memory     1 when correct, else the cosine of the reasoning to the centroid of verified traces (memory.py)

and three more that are off unless they are given a weight: `result` (cell-level soft-F1 of the result tables), `schema`
(Jaccard index of the tables and columns mentioned), both 1 when correct, and `user` (a function of your own).

Any correct completion outranks any wrong one. A wrong one gets at most w_f + w_x + w_a φ(1) + w_m + w_r + w_s + w_u, a
correct one at least w_f + 2 w_x + w_m + w_r + w_s, so weights with w_x ≤ w_a φ(1) + w_u are refused. Where execution is
switched off there is no x to outrank by; a correct completion then gets a = φ(1), the most a wrong one can get.

What is switched off is not computed and imports nothing. SQL always runs: every log shows its status.
"""

import importlib.util
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from atomic import atomic_operations, atomic_reward, shape_atomic
from memory import SCOPES, MemoryGate, TraceMemory, make_embedder

__all__ = ["MemoryGate", "RewardBreakdown", "RewardConfig", "RewardItem", "RewardScorer", "TraceMemory",
           "atomic_operations", "atomic_reward", "build_memory", "load_reward_module", "make_embedder",
           "parse_completion", "parse_rewards", "shape_atomic"]

COMPONENTS = ("format", "execution", "atomic", "memory", "result", "schema", "user")
MAX_ATOMIC = shape_atomic(1.0)  # φ(1), the most that a wrong completion's SQL can earn

THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
FENCE = re.compile(r"```(?:sql|sqlite)?[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)
QUOTED = re.compile(r"'(?>[^']*)'|\"(?>[^\"]*)\"|`(?>[^`]*)`|\[(?>[^\]]*)\]|--[^\n]*|/\*.*?\*/", re.DOTALL)
STATEMENT = re.compile(r"[\s(]*(?:select|with|values|insert|update|delete|replace|create|drop|alter|pragma|explain|"
                       r"attach|detach|vacuum|begin|analyze)\b", re.IGNORECASE)


def parse_completion(text: str, lenient: bool = False) -> tuple[str, str] | None:
    """(thought, sql) of a completion, or None where its format is broken.

    The format is one non-empty `<think> … </think>`, first, then exactly one SQL statement and nothing else; a
    trailing semicolon is fine. A fenced block around the SQL breaks it, unless `lenient`.
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
        "help": "which completions earn the atomic reward: all wrong ones, only those that run, only those that fail",
        "choices": ("wrong", "runs", "fails")})
    lenient_format: bool = field(default=False, metadata={"help": "unwrap a fenced block around the SQL"})
    embedder: str = field(default="hash", metadata={
        "help": "embeds reasoning: hash (no model), policy (the reference), or a Hugging Face encoder"})
    memory_top_k: int = field(default=20, metadata={"help": "verified traces that form the centroid"})
    memory_scope: str = field(default="other", metadata={
        "help": "compare with traces of other databases, the same, or any", "choices": SCOPES})
    reward_module: str | None = field(default=None, metadata={
        "help": "a Python file with a function reward(...), see the README; its weight is user=W in --rewards"})

    def __post_init__(self):
        parse_rewards(self.rewards)
        for name, choices in (("atomic_when", ("wrong", "runs", "fails")), ("memory_scope", SCOPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is '{getattr(self, name)}'; choose one of {', '.join(choices)}")
        if self.memory_top_k < 1:
            raise ValueError(f"memory_top_k is {self.memory_top_k}; it must be at least 1")
        if bool(self.reward_module) != bool(self.weights["user"]):
            raise ValueError("a reward of your own needs both: reward_module, and user=W among the rewards")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each component, 0 where it is switched off."""
        return parse_rewards(self.rewards)


def parse_rewards(text: str) -> dict[str, float]:
    """`format,execution,atomic=0.5` to the weight of every component.

    Raises:
        ValueError: an unknown name, a weight that is no positive number, or weights with which a wrong completion
            could outrank a correct one.
    """
    weights = dict.fromkeys(COMPONENTS, 0.0)
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in COMPONENTS:
            raise ValueError(f"there is no reward '{name}'; choose among {', '.join(COMPONENTS)}")
        try:
            weights[name] = float(number or 1)
        except ValueError:
            raise ValueError(f"the weight of reward '{name}' is '{number}', which is not a number") from None
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"the weight of reward '{name}' is {number}; it must be positive")
    bonus = weights["atomic"] * MAX_ATOMIC + weights["user"]
    if weights["execution"] and weights["execution"] <= bonus:
        raise ValueError(f"with these weights a wrong completion could outrank a correct one: execution "
                         f"({weights['execution']:g}) must exceed {MAX_ATOMIC:.2f} x atomic + user ({bonus:.3g})")
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
    """What one completion earned: components before weighting, the weighted total, and what became of its SQL."""

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


class RewardScorer:
    """Scores completions.

    Args:
        executor: has run_many and run_gold, [(db_id, sql)] to executions (status, columns, rows, error), as
            sql_exec.SQLExecutor.
        schemas: {db_id: {table: [column, ...]}}.
        memory: a TraceMemory, or None where the memory reward is off.
        match: (predicted rows, gold rows, gold SQL) -> bool.
        user_reward: from `load_reward_module`.
    """

    def __init__(self, config: RewardConfig, executor, schemas: Mapping, memory: TraceMemory | None = None, *,
                 match: Callable, user_reward: Callable | None = None):
        self.config, self.weights = config, config.weights
        self.executor, self.schemas, self.memory = executor, schemas, memory
        self.match, self.user_reward = match, user_reward
        self.seconds: dict[str, float] = {}  # of each component, in the last call of `score`

    def score(self, items: Sequence[RewardItem]) -> list[RewardBreakdown]:
        """One RewardBreakdown a completion, in order; then the memory learns the thoughts of the correct ones."""
        self.seconds = {}
        parsed = [parse_completion(item.text, self.config.lenient_format) for item in items]
        shaped = [i for i, pair in enumerate(parsed) if pair]  # the completions that have the format
        with self._clock("execution"):
            executions, golds = self._execute(items, parsed, shaped)
            correct = {i for i in shaped if self._is_correct(items[i], executions[i], golds[i])}
        wrong = [i for i in shaped if i not in correct]
        parts = {"format": dict.fromkeys(shaped, 1.0),
                 "execution": {i: 2.0 if i in correct else float(executions[i].status == "ok") for i in shaped},
                 "atomic": self._atomic(items, parsed, executions, correct, wrong),
                 "memory": self._memory(items, parsed, correct, wrong),
                 "result": self._result(executions, golds, correct, wrong),
                 "schema": self._schema(items, parsed, correct, wrong),
                 "user": self._user(items, parsed, executions, shaped)}
        if self.memory is not None:
            with self._clock("memory"):
                for i in sorted(correct):
                    self.memory.add(items[i].db_id, parsed[i][0])
        return [self._breakdown(i, item, parsed[i], executions.get(i), i in correct, parts)
                for i, item in enumerate(items)]

    def _breakdown(self, i, item, pair, execution, is_correct, parts) -> RewardBreakdown:
        values = {name: part.get(i, 0.0) for name, part in parts.items()}
        total = values["format"] * sum(self.weights[name] * value for name, value in values.items())
        if pair is None:
            return RewardBreakdown(text=item.text, error="not `<think> reasoning </think> SQL`")
        return RewardBreakdown(**values, total=total, status=execution.status, correct=is_correct, text=item.text,
                               thought=pair[0], sql=pair[1], error=execution.error or "",
                               columns=tuple(execution.columns), rows=tuple(execution.rows[:5]))

    def _execute(self, items, parsed, shaped) -> tuple[dict, dict]:
        """Executions of the predictions and of all their golds, by index."""
        predicted = self.executor.run_many([(items[i].db_id, parsed[i][1]) for i in shaped])
        gold_pairs = list(dict.fromkeys((items[i].db_id, sql) for i in shaped for sql in items[i].gold_sqls))
        gold_of = dict(zip(gold_pairs, self.executor.run_gold(gold_pairs), strict=True))
        golds = {i: [(sql, gold_of[items[i].db_id, sql]) for sql in items[i].gold_sqls] for i in shaped}
        return dict(zip(shaped, predicted, strict=True)), golds

    def _is_correct(self, item, execution, golds) -> bool:
        """True when it ran and matches a gold that ran; a gold that fails never makes anything correct."""
        return execution.status == "ok" and any(
            gold.status == "ok" and self.match(execution.rows, gold.rows, sql) for sql, gold in golds)

    def _atomic(self, items, parsed, executions, correct, wrong) -> dict[int, float]:
        if not self.weights["atomic"]:
            return {}
        wanted = {"wrong": lambda i: True, "runs": lambda i: executions[i].status == "ok",
                  "fails": lambda i: executions[i].status != "ok"}[self.config.atomic_when]
        with self._clock("atomic"):
            scores = {i: shape_atomic(atomic_reward(parsed[i][1], items[i].gold_sqls, self.schemas.get(items[i].db_id)))
                      for i in wrong if wanted(i)}
        # Without the execution reward a correct completion must not fall behind for being correct.
        return scores | dict.fromkeys(correct, 0.0 if self.weights["execution"] else MAX_ATOMIC)

    def _memory(self, items, parsed, correct, wrong) -> dict[int, float]:
        if not self.weights["memory"] or self.memory is None:
            return {}
        with self._clock("memory"):
            scores = self.memory.similarities([(items[i].db_id, parsed[i][0]) for i in wrong])
        return dict(zip(wrong, scores, strict=True)) | dict.fromkeys(correct, 1.0)

    def _result(self, executions, golds, correct, wrong) -> dict[int, float]:
        if not self.weights["result"]:
            return {}
        from sql_exec import soft_f1  # only where it is switched on

        with self._clock("result"):
            scores = {i: max((soft_f1(executions[i].rows, gold.rows) for _, gold in golds[i] if gold.status == "ok"),
                             default=0.0) for i in wrong if executions[i].status == "ok"}
        return scores | dict.fromkeys(correct, 1.0)

    def _schema(self, items, parsed, correct, wrong) -> dict[int, float]:
        if not self.weights["schema"]:
            return {}
        with self._clock("schema"):
            scores = {i: max(schema_overlap(parsed[i][1], gold, self.schemas[items[i].db_id])
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

    def _clock(self, name: str):
        return _Clock(self.seconds, name)


class _Clock:
    """Adds the seconds spent inside to `seconds[name]`."""

    def __init__(self, seconds: dict, name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start


def schema_overlap(sql: str, gold: str, schema: Mapping[str, Sequence[str]]) -> float:
    """Jaccard index of the tables and columns of `schema` that two queries mention."""
    names = {name.lower() for table, columns in schema.items() for name in (table, *columns)}
    words = [{word.lower() for word in re.findall(r"\w+", text)} & names for text in (sql, gold)]
    return len(words[0] & words[1]) / len(words[0] | words[1]) if words[0] | words[1] else 0.0


# ---- parts that a configuration asks for


def build_memory(config: RewardConfig, gate: MemoryGate, schemas: Mapping, model=None, tokenizer=None):
    """The TraceMemory that a configuration asks for, or None. `model` is the frozen backbone for `policy`."""
    if not config.weights["memory"]:
        return None
    embed = make_embedder(config.embedder, model, tokenizer)
    columns = {db_id: [column for names in schema.values() for column in names] for db_id, schema in schemas.items()}
    return TraceMemory(embed, embed.dim, config.memory_top_k, scope=config.memory_scope, gate=gate, columns=columns)


def load_reward_module(path: str | Path) -> Callable:
    """The function `reward(question, db_id, gold_sqls, thought, sql, execution) -> float in [0, 1]` of a file.

    Raises:
        ValueError: the file is missing, does not run, or has no such function.
    """
    if not Path(path).is_file():
        raise ValueError(f"reward module {path} does not exist")
    spec = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises is reported as theirs
        raise ValueError(f"reward module {path} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "reward", None)):
        raise ValueError(f"reward module {path} has no function named reward")
    return module.reward
