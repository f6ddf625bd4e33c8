"""A second try after an error (--turns 2): the completion goes on.

    first try     <think> … </think> SELECT nam FROM singer <end>
    observation   error: no such column: nam
    second try    <think> … </think> SELECT name FROM singer <end>

All three are one completion [C]. The policy sees the observation but did not sample it: `Group.sampled` is false there,
so that it has no part in loss, ratio, KL, entropy or length. The answer, which is scored, is that of the second try.

What is observed depends on --feedback
    error     an error of the database in one line, or that the answer misses the format; a query that runs stands
    results   also the columns of a result, its first rows and how many there are; so every answer gets a second try

A completion that was cut at the length limit gets no second try, nor does one whose database could not be read. The
observation is a message of the user in the model's chat template; without a template it is a line of its own. The
tokens of prompt and first try stay as they were sampled, even where the template would strip earlier reasoning.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from common.wording import exact_text, plural
from grpo import Engine, Group, GRPOConfig, sample_groups
from prompts.answer_format import AnswerFormat
from prompts.names import NameRules, name_rules
from questions.example import Example
from sql_exec import Execution, SQLExecutor

OBSERVED = 128  # tokens of an observation at most
ROWS, CELL = 3, 40  # of a result that are shown; characters of a cell
APART = 2**40  # between the seeds of a question's completions and those of their second tries
AT_ONCE = 64  # results held in memory at once
OBSERVATION = re.compile(r"^(error|\d+ rows?): .*$", re.MULTILINE)


@dataclass(frozen=True)
class Support:
    """What a policy has beside its prompts: rules for its words (--constrain), and a second try (--turns)."""

    names: NameRules | None = None
    second: "SecondTry | None" = None

    def longest(self, limit: int) -> int:
        """The tokens of a completion at most, if a try has up to `limit`."""
        return longest(limit, 1 if self.second is None else 2)

    def sample(self, policy, prompts: Sequence[Tensor], asked: Sequence[Example], config: GRPOConfig, *,
               seeds: Sequence[int], engine: Engine, split: Callable, temperature: float | None = None,
               group_size: int | None = None) -> list[Group]:
        """`grpo.sample_groups` with this support. asked: the question of each prompt. split: (lengths of prompts) ->
        indices of those to decode together, for second tries."""
        sample = partial(sample_groups, policy.model, config=config, eos_ids=policy.eos_ids, temperature=temperature,
                         engine=engine)
        groups = sample(prompts, group_size=group_size, seeds=seeds, rules=self.names and self.names.of_all(asked))
        if self.second is None:
            return groups
        return self.second.go_on(groups, asked, seeds, partial(sample, group_size=1), split)


def longest(limit: int, turns: int) -> int:
    """The tokens of a completion of so many tries at most, each of up to `limit` tokens."""
    return limit if turns == 1 else 2 * limit + OBSERVED


def support_of(config, policy, builder, executor: SQLExecutor, answer_format: AnswerFormat) -> Support:
    """The support that the settings `constrain`, `turns` and `feedback` ask for. Raises UserError as `NameRules`."""
    second = SecondTry(policy, builder, executor, answer_format, config.feedback) if config.turns > 1 else None
    return Support(name_rules(config.constrain, policy, builder.databases, answer_format), second)


@dataclass(frozen=True)
class SecondTry:
    """Runs the SQL of first tries, and lets those go on that need it."""

    policy: object
    builder: object  # of the prompts
    executor: SQLExecutor
    answer_format: AnswerFormat
    feedback: str = "error"

    def go_on(self, groups: Sequence[Group], asked: Sequence[Example], seeds: Sequence[int], sample: Callable,
              split: Callable) -> list[Group]:
        """The groups with second tries.

        sample: (prompts, seeds=…, rules=…) -> a group of one completion per prompt. split: as in `Support.sample`.
        """
        ended = [(b, i) for b, group in enumerate(groups) for i, cut in enumerate(group.truncated) if not cut]
        texts = [self.policy.decode(groups[b].completions[i]) for b, i in ended]
        observed = dict(zip(ended, self.observe([asked[b] for b, _ in ended], texts), strict=True))
        again = [place for place in ended if observed[place] is not None]
        prompts = [torch.cat([groups[b].prompt, groups[b].completions[i], observed[b, i]]) for b, i in again]
        own = [seeds[b] + APART * (1 + i) for b, i in again]
        rules = [groups[b].rules[i] for b, i in again if groups[b].rules]
        second = {}
        for part in split([len(prompt) for prompt in prompts]):
            if self.policy.device.type == "cuda" and not rules:  # a graph needs a number of rows that comes again
                part = part + part[-1:] * (-len(part) % 16)
            found = sample([prompts[k] for k in part], seeds=[own[k] for k in part],
                           rules=[rules[k] for k in part] if rules else None)
            second |= {again[k]: one for k, one in zip(part, found, strict=True)}
        return [joined(group, {i: (observed[b, i], second[b, i]) for i in range(len(group.completions))
                               if (b, i) in second}) for b, group in enumerate(groups)]

    def observe(self, asked: Sequence[Example], texts: Sequence[str]) -> list[Tensor | None]:
        """The tokens [O] between an answer and the next, per answer; None where the answer stands."""
        read = [self.answer_format.read(text) for text in texts]
        words, run = [self.words(None)] * len(texts), [i for i, parsed in enumerate(read) if parsed]
        for start in range(0, len(run), AT_ONCE):
            part = run[start:start + AT_ONCE]
            ran = self.executor.run_many([(asked[i].db_id, read[i][1]) for i in part])
            for i, execution in zip(part, ran, strict=True):
                words[i] = self.words(execution)
        return [self.tokens(example, said) for example, said in zip(asked, words, strict=True)]

    def words(self, execution: Execution | None) -> str:
        """What is observed, in one line; empty if nothing is. execution: of the answer's SQL, None without one"""
        if execution is None:
            return f"error: the answer is not {self.answer_format.in_words}"
        if execution.unread or execution.status == "ok" and self.feedback == "error":
            return ""
        if execution.status != "ok":
            return one_line(f"error: {execution.error or execution.status}")
        shown = [execution.columns, *execution.rows[:ROWS]]
        rows = ", ".join(f"({', '.join('NULL' if cell is None else exact_text(cell)[:CELL] for cell in row)})"
                         for row in shown)
        return one_line(f"{plural(len(execution.rows), 'row')}: {rows}" + ", …" * (len(execution.rows) > ROWS))

    def tokens(self, example: Example, words: str) -> Tensor | None:
        """An observation as the model reads it, shortened if it is long. -> [O]; None for no words"""
        if not words:
            return None
        ends = [self.policy.tokenizer.decode([end]) for end in self.policy.eos_ids]
        while len(ids := self.builder.turn(example, words, ends)) > OBSERVED and len(words) > 1:
            words = words[:len(words) * 3 // 4]
        return torch.tensor(ids)


def one_line(text: str) -> str:
    return " ".join(text.split())


# ---- tries of a completion


def joined(group: Group, second: dict[int, tuple[Tensor, Group]]) -> Group:
    """A group with second tries. second: {index of a completion: its observation [O], and the group of one}"""
    if not second:
        return group
    lists = {name: list(getattr(group, name)) for name in ("completions", "logps", "truncated", "entropies", "rules")}
    sampled = [torch.ones(len(completion), dtype=torch.bool) for completion in group.completions]
    for i, (observed, again) in second.items():
        nothing = torch.zeros(len(observed))
        for name, between in (("completions", observed), ("logps", nothing), ("entropies", nothing)):
            first, after = lists[name][i], getattr(again, name)[0]
            lists[name][i] = torch.cat([first, between.to(first), after])
        sampled[i] = torch.cat([sampled[i], nothing.bool(), torch.ones(len(again.completions[0]), dtype=torch.bool)])
        lists["truncated"][i] = again.truncated[0]
        if group.rules:
            lists["rules"][i] = RuleOfTries(group.rules[i], tuple(sampled[i].tolist()))
    return replace(group, **lists, sampled=sampled)


def masks(group: Group) -> list[Tensor]:
    """Which tokens of each completion were sampled. -> G times bool [C_i]"""
    return list(group.sampled) or [torch.ones(len(completion), dtype=torch.bool) for completion in group.completions]


def tries(group: Group) -> list[list[Tensor]]:
    """The tokens of each completion's first try, observation and second try; of the first try alone if it stands."""
    if not group.sampled:
        return [[completion] for completion in group.completions]
    return [list(completion.tensor_split((mask.int().diff().nonzero()[:, 0] + 1).tolist()))
            for completion, mask in zip(group.completions, group.sampled, strict=True)]


def answers(group: Group) -> list[Tensor]:
    """The tokens of the last try, which is the answer. -> G times [C_i]"""
    return [parts[-1] for parts in tries(group)]


def share(groups: Sequence[Group]) -> float:
    """The share of completions that have a second try."""
    again = sum(not mask.all() for group in groups for mask in group.sampled)
    return again / sum(len(group.completions) for group in groups)


def before(policy, group: Group) -> list[dict[str, str]]:
    """`first_try` and `observation` of each completion as text, without the chat template's part; nothing if its first
    try stands."""
    return [before_answer(policy, *parts[:2]) if parts[1:] else {} for parts in tries(group)]


def before_answer(policy, first: Tensor, observed: Tensor) -> dict[str, str]:
    text = policy.tokenizer.decode(observed.tolist(), skip_special_tokens=True)
    line = OBSERVATION.search(text)
    return {"first_try": policy.decode(first), "observation": line[0] if line else text.strip()}


@dataclass(frozen=True)
class RuleOfTries:
    """The rule of a completion with a second try, in which it begins anew. What was not sampled is free."""

    rule: object  # of each try, as prompts/names.py
    sampled: tuple[bool, ...]  # C

    def start(self) -> "WritingTries":
        return WritingTries(self)


class WritingTries:
    """Such a completion being written; see `prompts.names.Writing`."""

    def __init__(self, rule: RuleOfTries):
        self.rule, self.place, self.writing = rule.rule, 0, rule.rule.start()
        self.sampled = rule.sampled

    def bits(self) -> Tensor | None:
        return self.writing.bits() if self.sampled[self.place] else None

    def take(self, token: int) -> None:
        if self.sampled[self.place]:
            self.writing.take(token)
        elif self.sampled[self.place + 1]:
            self.writing = self.rule.start()
        self.place += 1
