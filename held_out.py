"""Greedy execution accuracy on held-out questions during training, and the table of before and after."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from tqdm import tqdm

from engine import distributed
from policy import Policy
from rollout import Question, print_first_reasons
from scoring.answers import questions_hash
from scoring.hardness import joins_in
from scoring.verdicts import difficulty_levels, of_the_same, score_predictions, summarise
from scoring.voting import greedy_sqls, sample_candidates
from second_try import Support
from settings import Settings
from sql_exec import SQLExecutor


class HeldOut:
    """Measures a policy on held-out questions, by all processes together."""

    def __init__(self, s: Settings, policy: Policy, executor: SQLExecutor, databases: Mapping,
                 inside: Callable[[], AbstractContextManager], support: Support | None = None):
        """inside: the context in which the policy samples, such as bf16 arithmetic. support: that of rollouts."""
        self.s, self.policy, self.executor, self.databases, self.inside = s, policy, executor, databases, inside
        self.support = support

    def announce(self, questions: Sequence[Question], name: str, step: int) -> dict:
        """Runs `measure`; prints a line before it and the accuracy after it."""
        if not distributed.is_main():
            return self.measure(questions, step)
        print(f"step {step}: evaluating {len(questions)} questions of {name}", flush=True)
        found = self.measure(questions, step)
        accuracy = found["execution_accuracy"][self.s.run.match]
        print(f"step {step}: {100 * accuracy:.1f} % of {name} right", flush=True)
        return found

    def measure(self, questions: Sequence[Question], step: int) -> dict:
        """`summarise` of the greedy answers, their joins, and a hash of the questions whose database could be read."""
        examples, mine = [question.example for question in questions], distributed.share_of(len(questions))
        with self.inside():
            sqls = greedy_sqls(self.policy, [question.prompt for question in questions[mine]], self.s.exam,
                               distributed.is_main(), self.support, examples[mine])
        scores = score_predictions(examples[mine], sqls, self.executor, levels=difficulty_levels(examples)[mine])
        scores = distributed.merge([score if sql or score.unavailable else replace(score, status="format")
                                    for score, sql in zip(scores, sqls, strict=True)])
        read = [example for example, score in zip(examples, scores, strict=True) if not score.unavailable]
        found = summarise(scores) | {"questions": questions_hash(read),
                                     "joins": sum(joins_in(score.sql) for score in scores) / max(1, len(scores))}
        if unread := found["unavailable"]:
            tqdm.write(f"warning, step {step}: {len(unread)} of {len(questions)} questions are left out of this "
                       "evaluation, since their database could not be read")
            print_first_reasons([(one["id"], "unavailable", one["error"], one["db_id"]) for one in unread],
                                self.databases, tqdm.write)
        return found

    def sample(self, questions: Sequence[Question], n: int) -> dict[str, float]:
        """`samples`, the accuracy of n samples per question at the temperature of training, and `pass_at_n`, the share
        of questions with a right one. The same policy gives the same samples."""
        asked = questions[distributed.share_of(len(questions))]
        exam = replace(self.s.exam, samples=n, temperature=self.s.grpo.temperature)
        with self.inside():
            candidates = sample_candidates(self.policy, [question.prompt for question in asked], exam,
                                           support=self.support, asked=[question.example for question in asked])
        scores = score_predictions([question.example for question in asked for _ in range(n)],
                                   [candidate.sql for some in candidates for candidate in some], self.executor,
                                   levels=[""] * (len(asked) * n))  # nobody reads them
        right = distributed.merge([score.correct[self.s.run.match] for score in scores])
        return {"samples": sum(right) / len(right),
                "pass_at_n": sum(any(right[i:i + n]) for i in range(0, len(right), n)) / (len(right) // n)}


def before_after_table(before: dict, after: dict, match: str) -> str:
    """Held-out execution accuracy before and after GRPO, one line per tier, with 95 % intervals; 80 columns.

    Questions whose database could not be read are left out, so the two figures may cover different questions.
    """
    lines = [f"{'held-out execution accuracy, %':<32}{'n':>5}{'before GRPO':>21}{'after GRPO':>21}"]

    def bounds(interval) -> str:
        low, high = interval
        return f"[{100 * low:.1f}, {100 * high:.1f}]"

    def cell(part: dict | None) -> str:
        if not part or not part["n"]:
            return "-"
        return f"{100 * part['execution_accuracy'][match]:.1f} {bounds(part['interval'][match])}"

    for name, end in after.items():
        start, tiers = before[name], list(end["by_difficulty"])
        for tier in tiers if len(tiers) > 1 else []:
            lines.append(f"{name + ': ' + tier:<32}{end['by_difficulty'][tier]['n']:>5}"
                         f"{cell(start['by_difficulty'].get(tier)):>21}{cell(end['by_difficulty'][tier]):>21}")
        lines.append(f"{name + ': all':<32}{end['n']:>5}{cell(start):>21}{cell(end):>21}")
        shown = [bounds(part["interval_over_databases"][match]) if part.get("interval_over_databases") else "-"
                 for part in (start, end)]
        if shown[0] != "-":  # absent from runs that an older version began
            lines.append(f"{'  over ' + str(end['databases']) + ' databases':<37}{shown[0]:>21}{shown[1]:>21}")
        if not of_the_same(start, end):
            lines.append(f"  the gain is unknown: the {start['n']} questions measured before differ from these")
            continue
        gain = end["execution_accuracy"][match] - start["execution_accuracy"][match]
        lines.append(f"{'':<32}{'':>5}{'gain':>21}{100 * gain:>+20.1f} ")
    return "\n".join(lines)
