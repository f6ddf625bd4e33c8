"""Four rewards for a Text-to-SQL completion, and how they add up (FINER-SQL, arXiv 2605.03465).

    R = f · (w_f + w_x · x + w_a · a + w_m · m)

    f  format     1 for `<think> reasoning </think> one SQL statement`, else 0: it gates the others; other styles
                  of answers are in prompts/answer_format.py
    x  execution  0 does not run, 1 runs (`execution_runs`), 2 returns the gold result
    a  atomic     0 when correct, else φ(max_i J(A(sql), A(gold_i))), J the share of common operations
    m  memory     1 when correct, else the cosine of the reasoning to a centroid of verified traces

Three more are off unless they have a weight: `result` (cell-level soft-F1 of the result tables), `schema`
(Jaccard index of the tables and columns mentioned), both 1 when correct, and `user` (a function of your own).

Any correct completion outranks any wrong one. A wrong one gets at most w_f + w_x + w_a φ(1) + w_m + w_r +
w_s + w_u, a correct one at least w_f + 2 w_x + w_m + w_r + w_s, so weights with w_x ≤ w_a φ(1) + w_u are
refused, whatever `execution_runs` is. Without the execution reward, a correct completion gets a = φ(1), the
most that a wrong one can get, so it never ranks below one; `user` is then refused.

If a question has an answer in place of gold SQL, atomic and schema are 0 for right and wrong completions alike;
execution alone decides the order.

A component that is off is not computed and imports nothing. `format` switched off loses its weight w_f but
remains the gate, because without it there is no SQL to score. SQL always runs: the memory needs its verdict,
and every log shows its status.

If the database cannot be read, a completion has the status `unavailable` and no reward, and its group is left
out of the step (`readable`).
"""

import importlib.util
import inspect
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from partial_credit.atomic import atomic_operations, atomic_reward, names_in, rarity, shape_atomic
from partial_credit.memory import SCOPES, MemoryGate, Roles, TraceMemory, check, make_embedder, option
from prompts.answer_format import AnswerFormat, unwrap_fence
from sql_exec import Comparison, Execution, Gold, Results, soft_f1

__all__ = ["MemoryGate", "RewardBreakdown", "RewardConfig", "RewardError", "RewardItem", "RewardScorer", "TraceMemory",
           "atomic_operations", "atomic_reward", "build_memory", "build_rarity", "load_reward_module", "make_embedder",
           "parse_completion", "parse_rewards", "readable", "rewards_apart", "shape_atomic", "soft_f1", "unwrap_fence"]

COMPONENTS = ("format", "execution", "atomic", "memory", "result", "schema", "user")
MAX_ATOMIC = shape_atomic(1.0)  # φ(1) of the paper's shaping: the most that a wrong completion's SQL earns
NEIGHBOURS = 2  # nearest traces stored with a wrong completion, for people to read
MARGIN = 1e-6  # of the sum of all weights; float32 cannot resolve a smaller difference

ARGUMENTS = ("question", "db_id", "gold_sqls", "thought", "sql", "execution")  # of the user's reward function
SIGNATURE = f"reward({', '.join(ARGUMENTS)})"


# ---- settings


@dataclass(frozen=True)
class RewardConfig:
    """The rewards."""  # raises ValueError for invalid weights or names

    rewards: str = option("format,execution,atomic,memory", "rewards that are summed, with optional weights: "
                          "format,execution=2,atomic=0.5,memory", common=True)
    execution_runs: float = option(1.0, "what SQL that runs and is wrong earns in the execution reward, where the gold "
                                        "result earns 2; see docs/results/dense-rewards.md", at_least=0, at_most=1)
    atomic_when: str = option("wrong", "which completions earn the atomic reward: all wrong ones, those that run, "
                                       "those that fail", choices=("wrong", "runs", "fails"))
    atomic_weights: str = option("equal", "weight of an operation in the atomic reward: equal for all, or larger for "
                                          "those that are rarer in the training questions", choices=("equal", "rare"))
    atomic_lambda: float = option(0.05, "lambda in the atomic reward for an overlap j, lambda j + (1 - lambda) beta "
                                        "j^gamma", at_least=0, at_most=1)
    atomic_beta: float = option(0.79, "beta in the atomic reward: what its power term adds at full overlap",
                                at_least=0, at_most=1)
    atomic_gamma: float = option(0.20, "gamma in the atomic reward: the smaller, the steeper it rises near 0",
                                 at_least=0, at_most=1)
    lenient_format: bool = option(False, "also take SQL inside a code fence (--answer think-sql)", common=True)
    embedder: str = option("hash", "embeds reasoning: hash (no model), policy (that of step 0), or a Hugging Face "
                                   "encoder")
    memory_top_k: int = option(20, "this many of the nearest verified traces form the centroid", at_least=1)
    memory_scope: str = option("other", "compare with traces of other databases, the same, or any", choices=SCOPES)
    memory_names: str = option("written", "names, numbers and quoted values in compared reasoning: as written, or "
                                          "replaced by their roles (table, column, value)",
                               choices=("written", "roles"))
    reward_module: str | None = option(None, "a Python file with a function reward(...), see docs/rewards.md; user=W "
                                             "in --rewards weighs it")

    def __post_init__(self):
        check(self)
        failing, running = self.weights["atomic"] * self.shape(1.0), self.execution_runs * self.weights["execution"]
        if self.atomic_when == "fails" and failing > running:
            raise ValueError(f"with --atomic-when fails, wrong SQL can earn {failing:.2f} when it fails and only "
                             f"{running:.2f} when it runs: raise --execution-runs or the weight of execution, or lower "
                             "that of atomic")
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
        most = self.execution_runs * weights["execution"] + weights["user"] + weights["atomic"] * self.shape(1.0)
        return 2 * weights["execution"] - most

    def shape(self, j: float) -> float:
        """φ(j) with these settings."""
        return shape_atomic(j, self.atomic_lambda, self.atomic_beta, self.atomic_gamma)


def parse_rewards(text: str, max_atomic: float = MAX_ATOMIC) -> dict[str, float]:
    """Parses `format,execution,atomic=0.5` into the weight of every component; `max_atomic` is φ(1).

    Raises:
        ValueError: an unknown or repeated name, a weight that is not a positive number, or weights with which a
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
    bonus = user + (weights["atomic"] * max_atomic if execution else 0)  # what only wrong completions can earn
    if (execution or user) and execution - bonus < MARGIN * sum(weights.values()):
        raise ValueError(f"with these weights a wrong completion could outrank a correct one: execution "
                         f"({execution:g}) must exceed {max_atomic:.2f} x atomic + user ({bonus:.3g})")
    return weights


# ---- scoring


def parse_completion(text: str, lenient: bool = False, style: str = "think-sql") -> tuple[str, str] | None:
    """(thought, sql) of a completion, or None where its format is broken: `AnswerFormat.read`."""
    return AnswerFormat(style, lenient).read(text)


class RewardError(ValueError):
    """The user's reward module cannot be used; the text is one sentence."""


class RewardItem(NamedTuple):
    """One completion to score."""

    db_id: str
    golds: Sequence[Gold]
    text: str
    question: str = ""

    @property
    def gold_sqls(self) -> tuple[str, ...]:
        """The golds that are queries; none if the answer is known instead."""
        return tuple(gold for gold in self.golds if isinstance(gold, str))


@dataclass(frozen=True)
class RewardBreakdown:
    """One completion's rewards: components before weighting, the weighted total, and the outcome of its SQL."""

    format: float = 0.0
    execution: float = 0.0
    atomic: float = 0.0
    memory: float = 0.0
    total: float = 0.0
    status: str = "format"  # ok, error, timeout, refused, too_large; `format` where there was no SQL to run;
                            # `unavailable` where the database could not be read: the rewards then mean nothing
    result: float = 0.0
    schema: float = 0.0
    user: float = 0.0
    overlong: float = 0.0  # the penalty for length that train.py adds
    correct: bool = False
    text: str = ""
    thought: str = ""
    sql: str = ""
    error: str = ""
    columns: tuple = ()
    rows: tuple = ()  # the first rows of the result, for people to read
    row_count: int = 0  # of the whole result
    neighbours: tuple = ()  # nearest traces of a wrong completion: dicts of db_id, thought, similarity
    has_gold_sql: bool = True  # else its question has an answer instead

    @property
    def unavailable(self) -> bool:
        """Whether the database could not be read, so that the rewards mean nothing."""
        return self.status == "unavailable"


def readable(row: Sequence[RewardBreakdown]) -> bool:
    """Whether all completions of a group have a reward, because their database could be read."""
    return not any(breakdown.unavailable for breakdown in row)


def rewards_apart(rows: Sequence[Sequence[RewardBreakdown]], config: RewardConfig) -> tuple[list, list[float]]:
    """The rewards that have a weight, [K][B][G], and their weights [K], for GDPO, which standardises each reward.

    That changes the rewards' relative weights, so the margin above does not hold. A correct completion still outranks
    every wrong one of its group, because it has the maximum of each reward: its atomic reward is φ(1) here, not 0
    (without gold SQL it is 0 for all).
    """
    weights = {name: weight for name, weight in config.weights.items() if weight}
    best = config.shape(1.0)

    def value(name: str, b: RewardBreakdown) -> float:
        return best if name == "atomic" and b.correct and b.has_gold_sql else getattr(b, name)

    return [[[value(name, b) for b in row] for row in rows] for name in weights], list(weights.values())


@dataclass
class Scored:
    """The state of one completion in the format while it is scored."""

    item: RewardItem
    thought: str
    sql: str
    execution: Execution | None = None  # of the SQL as written
    golds: Sequence[Execution] = ()  # of the gold queries as written, or the answer
    correct: bool = False
    unread: Execution | None = None  # the execution, of prediction or gold, that could not read the database
    components: dict[str, float] = field(default_factory=lambda: {"format": 1.0})
    neighbours: Sequence[dict] = ()

    def breakdown(self, weights: Mapping[str, float]) -> RewardBreakdown:
        """The components and their weighted sum; f = 1 here."""
        if self.unread:
            return RewardBreakdown(format=1.0, status="unavailable", text=self.item.text, thought=self.thought,
                                   sql=self.sql, error=self.unread.error)
        total = sum(weights[name] * value for name, value in self.components.items())
        execution = self.execution
        return RewardBreakdown(**self.components, total=total, status=execution.status, correct=self.correct,
                               text=self.item.text, thought=self.thought, sql=self.sql, error=execution.error or "",
                               columns=tuple(execution.columns), rows=tuple(execution.rows[:5]),
                               row_count=len(execution.rows), neighbours=tuple(self.neighbours),
                               has_gold_sql=bool(self.item.gold_sqls))


class RewardScorer:
    """Scores completions.

    Args:
        executor: as sql_exec.SQLExecutor, with run_many and run_gold, [(db_id, sql)] -> executions (status, columns,
            rows, error).
        schemas: {db_id: {table: [column, ...]}}.
        memory: a TraceMemory, or None where the memory reward is off.
        match: decides whether a result is right, one of sql_exec.MATCHES.
        user_reward: from `load_reward_module`.
        rarity: from `build_rarity`.
        answer_format: how completions are read; None: think-sql, with `config.lenient_format`.

    Raises:
        ValueError: a reward has a weight, but what it needs (memory, user_reward, rarity) is missing.
    """

    def __init__(self, config: RewardConfig, executor, schemas: Mapping, memory: TraceMemory | None = None, *,
                 match: Comparison, user_reward: Callable | None = None, rarity: Callable[[str], float] | None = None,
                 answer_format: AnswerFormat | None = None):
        self.config, self.weights = config, config.weights
        self.answer_format = answer_format or AnswerFormat(lenient=config.lenient_format)
        self.executor, self.schemas, self.memory = executor, schemas, memory
        self.match, self.user_reward, self.rarity = match, user_reward, rarity
        self.seconds: dict[str, float] = {}  # per component since `take_seconds`
        for name, needed in (("memory", memory), ("user", user_reward)):
            if self.weights[name] and needed is None:
                raise ValueError(f"the {name} reward has a weight, but there is nothing to compute it with")
        if self.weights["atomic"] and (rarity is None) != (config.atomic_weights == "equal"):
            raise ValueError(f"atomic_weights is '{config.atomic_weights}', and rarity must be given for 'rare' only")

    def score(self, items: Sequence[RewardItem], remember: bool = True) -> list[RewardBreakdown]:
        """One RewardBreakdown per completion, in order; with `remember`, the memory then adds correct thoughts.

        SQL runs in the executor's processes while a thread here embeds the thoughts, so the parts of
        `seconds` can add up to more than the call took.

        Raises:
            RewardError: the user's reward fails, or does not return a number between 0 and 1.
        """
        read = [(item, self.answer_format.read(item.text)) for item in items]
        records = [Scored(item, *parts) if parts else None for item, parts in read]
        shaped = [record for record in records if record]  # the completions that have the format
        with ThreadPoolExecutor(1) as thread:
            embedding = thread.submit(self._embed, [(record.item.db_id, record.thought) for record in shaped])
            self._execute(shaped)
            embedding.result()  # raises what the thread raised
        known = [record for record in shaped if not record.unread]
        for component in (self._atomic, self._memory, self._result, self._schema, self._user):
            component(known)
        if remember:  # only now, so that the order within a step makes no difference
            self.remember([(record.item.db_id, record.thought) for record in shaped if record.correct])
        return [record.breakdown(self.weights) if record else self._without_format(item)
                for item, record in zip(items, records, strict=True)]

    def _without_format(self, item: RewardItem) -> RewardBreakdown:
        """The rewards of a completion that is not in the format."""
        return RewardBreakdown(text=item.text, error=f"not {self.answer_format.in_words}")

    def remember(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Offers the (db_id, thought) pairs of correct completions to the memory."""
        if self.weights["memory"]:
            with self._clock("memory"):
                self.memory.add_many(pairs)

    def take_seconds(self) -> dict[str, float]:
        """The seconds per component since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _embed(self, pairs: list[tuple[str, str]]) -> None:
        """Embeds all thoughts in one batch: wrong ones are compared with the memory, correct ones enter it."""
        if self.weights["memory"]:
            with self._clock("memory"):
                self.memory.prepare(pairs)

    def _execute(self, records: Sequence[Scored]) -> None:
        """Runs predictions and golds: as written for the status, in the comparison's form for the verdict."""
        with self._clock("execution"):
            questions = [(record.item.db_id, record.sql, record.item.golds) for record in records]
            results = Results(self.executor, questions, [self.match])
            for record, (db_id, sql, golds) in zip(records, questions, strict=True):
                record.execution = results.predicted(db_id, sql)
                record.golds = [results.gold(db_id, gold) for gold in golds]
                record.unread = results.unread(db_id, sql, golds, self.match)
                record.correct = not record.unread and results.is_right(db_id, sql, golds, self.match)
                runs = self.config.execution_runs * (record.execution.status == "ok")
                record.components["execution"] = 2.0 if record.correct else runs

    def _atomic(self, records: Sequence[Scored]) -> None:
        if not self.weights["atomic"]:
            return
        # Without the execution reward, a correct completion must not rank below a wrong one.
        when_correct = 0.0 if self.weights["execution"] else self.config.shape(1.0)
        with self._clock("atomic"):
            for record in with_gold_sql(records):
                runs = record.execution.status == "ok"
                if record.correct:
                    record.components["atomic"] = when_correct
                elif self.config.atomic_when == "wrong" or runs == (self.config.atomic_when == "runs"):
                    schema = self.schemas.get(record.item.db_id)
                    overlap = atomic_reward(record.sql, record.item.gold_sqls, schema, self.rarity)
                    record.components["atomic"] = self.config.shape(overlap)

    def _memory(self, records: Sequence[Scored]) -> None:
        """Also stores the nearest traces of each wrong completion."""
        if not self.weights["memory"]:
            return
        wrong = [record for record in records if not record.correct]
        with self._clock("memory"):
            compared = self.memory.compare([(record.item.db_id, record.thought) for record in wrong], NEIGHBOURS)
        for record in records:
            record.components["memory"] = 1.0
        for record, (similarity, nearest) in zip(wrong, compared, strict=True):
            record.components["memory"], record.neighbours = similarity, nearest

    def _result(self, records: Sequence[Scored]) -> None:
        if not self.weights["result"]:
            return
        with self._clock("result"):
            for record in records:
                golds = [gold for gold in record.golds if gold.status == "ok" and record.execution.status == "ok"]
                record.components["result"] = 1.0 if record.correct else max(
                    (soft_f1(record.execution.rows, gold.rows) for gold in golds), default=0.0)

    def _schema(self, records: Sequence[Scored]) -> None:
        if not self.weights["schema"]:
            return
        with self._clock("schema"):
            for record in with_gold_sql(records):
                schema = self.schemas.get(record.item.db_id, {})
                record.components["schema"] = 1.0 if record.correct else max(
                    schema_overlap(record.sql, gold, schema) for gold in record.item.gold_sqls)

    def _user(self, records: Sequence[Scored]) -> None:
        if not self.weights["user"]:
            return
        with self._clock("user"):
            for record in records:
                record.components["user"] = self._ask_user(record)

    def _ask_user(self, record: Scored) -> float:
        """The user's reward of a completion. Raises RewardError: it fails, or is not a number between 0 and 1."""
        item = record.item
        where = (f"for the SQL {shorten(record.sql, 200)!r} of the question {shorten(item.question, 200)!r} "
                 f"(database {item.db_id})")
        try:
            value = self.user_reward(question=item.question, db_id=item.db_id, gold_sqls=item.gold_sqls,
                                     thought=record.thought, sql=record.sql, execution=record.execution)
        except Exception as error:  # whatever the user's function raises is reported as theirs
            raise RewardError(f"the reward function of your module failed {where}: "
                              f"{type(error).__name__}: {error}") from error
        number = _as_number(value)
        if not 0.0 <= number <= 1.0:
            raise RewardError(f"the reward function of your module returned {value!r:.100} {where}; "
                              "it must return a number between 0 and 1")
        return number

    @contextmanager
    def _clock(self, name: str):
        """Adds the seconds spent inside to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def with_gold_sql(records: Sequence[Scored]) -> list[Scored]:
    """The records with gold SQL, which a comparison of operations or names needs."""
    return [record for record in records if record.item.gold_sqls]


def _as_number(value) -> float:
    """A Python, NumPy or PyTorch number as a float; NaN for anything else."""
    if isinstance(value, str | bytes | bytearray):  # float("0.5") would succeed
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # PyTorch raises the last for several numbers
        return math.nan


def schema_overlap(sql: str, gold: str, schema: Mapping[str, Sequence[str]]) -> float:
    """Jaccard index of the tables and columns of `schema` that two queries mention; 0 if neither mentions any."""
    known = {name.lower() for table, columns in schema.items() for name in (table, *columns)}
    mine, theirs = names_in(sql) & known, names_in(gold) & known
    return len(mine & theirs) / len(mine | theirs) if mine | theirs else 0.0


# ---- parts that a configuration asks for


def build_memory(config: RewardConfig, gate: MemoryGate, schemas: Mapping, model=None, tokenizer=None):
    """The TraceMemory that a configuration asks for, or None. `model` is the frozen backbone for embedder `policy`."""
    if not config.weights["memory"]:
        return None
    embed = make_embedder(config.embedder, model, tokenizer)
    columns = {db_id: [column for names in schema.values() for column in names]
               for db_id, schema in schemas.items()}
    read = Roles(schemas) if config.memory_names == "roles" else None
    return TraceMemory(embed, embed.dim, config.memory_top_k, scope=config.memory_scope, gate=gate,
                       columns=columns, read=read)


def build_rarity(config: RewardConfig, examples: Sequence, schemas: Mapping) -> Callable[[str], float] | None:
    """Weights of operations from the first golds of training examples, or None if all weigh the same."""
    if not config.weights["atomic"] or config.atomic_weights == "equal":
        return None
    return rarity([(example.gold_sql, schemas[example.db_id]) for example in examples if example.gold_sqls])


def load_reward_module(path: str | Path) -> Callable:
    """The function `reward(question, db_id, gold_sqls, thought, sql, execution)` in a file; it returns 0 to 1.

    It is called with keyword arguments for every completion that has the format. `gold_sqls` is empty if the
    question has an answer instead. `execution` has status,
    columns, rows, error and seconds.

    Raises:
        RewardError: the file is missing, does not run, or has no such function.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise RewardError(f"--reward-module {path}: there is no such Python file; name one that ends in .py and has a "
                          f"function {SIGNATURE}")
    spec = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises is reported as theirs
        raise RewardError(f"--reward-module {path} cannot be loaded: {type(error).__name__}: {error}") from error
    reward = getattr(module, "reward", None)
    if not callable(reward):
        raise RewardError(f"--reward-module {path} has no function named reward; it needs {SIGNATURE}")
    try:
        inspect.signature(reward).bind(**dict.fromkeys(ARGUMENTS))
    except (TypeError, ValueError) as error:
        raise RewardError(f"--reward-module {path}: its function reward must take {', '.join(ARGUMENTS)} "
                          f"({error})") from error
    return reward
