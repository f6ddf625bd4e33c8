"""A policy answers questions: greedy and sampled candidates, each judged, and one record per question.

Records are plain JSON, saved batch by batch, so that an interrupted evaluation loses at most one batch.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError, as_json, parse_json, read_text, write_text, write_whole
from prompts.builder import PromptBuilder
from questions.example import Example
from questions.schema import columns_of
from scoring.failures import kind_of
from scoring.verdicts import ExampleScore, comparisons_named, difficulty_levels, judge, without_verdict
from scoring.voting import VOTES, Candidate, Exam, choose, group_results, sample_candidates
from sql_exec import MATCHES, SQLExecutor

QUESTIONS_AT_ONCE = 64  # questions a model answers side by side; an interruption loses at most these
JUDGED_AT_ONCE = 64  # candidates whose results are held in memory at once


class Examination:
    """A policy answers questions, one batch at a time. Each question gives a record, ready for JSON:

    answers   {way of answering: ExampleScore as a dict}; ways are greedy, sample (the first) and the votes
    samples   counts over the n candidates: correct (per comparison), statuses, groups, truncated, second_tries, tokens
    traces    verified answers with their reasoning, the likeliest first, at most `traces` of them
    failing   texts of answers whose SQL does not run, likewise, at most `failures` of them; if any are wanted
    seconds   for the prompt, for generation (a batch's time divided evenly) and for the candidates' SQL
    """

    def __init__(self, policy, builder: PromptBuilder, executor: SQLExecutor, exam: Exam, ways: Sequence[str], *,
                 matches: Sequence[str] = tuple(MATCHES), keep_distinct: bool = False, suite=None, traces: int = 1,
                 support=None, failures: int = 0):
        """support: second_try.Support of the policy. failures: how many failing answers a record keeps."""
        self.policy, self.builder, self.exam, self.ways, self.support = policy, builder, exam, ways, support
        self.matches, self.traces, self.failures = matches, traces, failures
        self.schemas: dict[str, dict] = {}  # those read so far
        self.how_to_judge = (executor, comparisons_named(matches, keep_distinct), suite)

    def run(self, examples: Sequence[Example], progress: "Progress") -> list[dict]:
        """The records of all questions, in order. A batch's candidates depend only on the settings."""
        levels = difficulty_levels(examples)
        size = min(QUESTIONS_AT_ONCE, self.exam.batch)
        with tqdm(total=len(examples), desc="answering", unit="question", dynamic_ncols=True) as bar:
            for start in range(0, len(examples), size):
                part = slice(start, start + size)
                if start not in progress.done:
                    progress.add(start, self.answer(examples[part], levels[part], start))
                bar.update(len(progress.done[start]))
        return [record for start in sorted(progress.done) for record in progress.done[start]]

    def answer(self, examples, levels, number: int) -> list[dict]:
        """The records of one batch; `number` seeds its random draws."""
        began = time.perf_counter()
        prompts = [self.builder.encode(example) for example in examples]  # None if one does not fit
        prompt_seconds = (time.perf_counter() - began) / len(examples)
        fitting = [i for i, prompt in enumerate(prompts) if prompt is not None]
        greedy, samples, seconds = self.complete([prompts[i] for i in fitting], number, [examples[i] for i in fitting])
        candidates = {i: ([], []) for i in range(len(examples))}
        candidates |= dict(zip(fitting, zip(greedy, samples, strict=True), strict=True))
        records = []
        step = max(1, JUDGED_AT_ONCE // self.exam.samples)
        for start in range(0, len(examples), step):
            part = range(start, min(start + step, len(examples)))
            verdicts = self.verdicts([(examples[i], levels[i], *candidates[i]) for i in part])
            records += [self.record(examples[i], *candidates[i], verdict, {
                "prompt": prompt_seconds, "generation": seconds if candidates[i][1] else 0.0})
                for i, verdict in zip(part, verdicts, strict=True)]
        return records

    def complete(self, prompts, number: int, asked: Sequence[Example] = ()) -> tuple[list, list, float]:
        """For each prompt a list with its greedy candidate (or none) and its n samples; seconds per prompt."""
        exam = replace(self.exam, seed=self.exam.seed * 1_000_003 + number)
        began, greedy = time.perf_counter(), [[] for _ in prompts]
        if "greedy" in self.ways:
            greedy = samples = sample_candidates(self.policy, prompts, exam.greedy, support=self.support, asked=asked)
        if exam.temperature:
            began = time.perf_counter()
            samples = sample_candidates(self.policy, prompts, exam, support=self.support, asked=asked)
        return greedy, samples, (time.perf_counter() - began) / max(1, len(prompts))

    def verdicts(self, questions) -> list[dict]:
        """{SQL: (ExampleScore, Execution)} of each (example, level, greedy, samples); each SQL runs once."""
        tasks = [(i, example, level, sql) for i, (example, level, greedy, samples) in enumerate(questions)
                 for sql in dict.fromkeys(c.sql for c in greedy + samples or [NO_CANDIDATE])]
        numbers, examples, levels, sqls = zip(*tasks, strict=True)
        verdicts = [{} for _ in questions]
        judged = judge(examples, sqls, levels, *self.how_to_judge)
        for i, sql, verdict in zip(numbers, sqls, judged, strict=True):
            verdicts[i][sql] = verdict
        return verdicts

    def record(self, example: Example, greedy, samples, verdicts: dict, seconds: dict) -> dict:
        """The record of a question; `verdicts` maps each SQL to its (ExampleScore, Execution)."""
        verdicts = without_partial(verdicts)
        scores = [verdicts[candidate.sql][0] for candidate in samples]
        executions = [verdicts[candidate.sql][1] for candidate in samples]
        fates = Counter("unavailable" if score.unavailable else candidate.broken or score.status
                        for candidate, score in zip(samples, scores, strict=True))
        failed = [(candidate.broken or score.status, score.error, candidate.sql)
                  for candidate, score in zip(samples, scores, strict=True)
                  if not score.unavailable and (candidate.broken or score.status != "ok")]
        failures = Counter(kind_of(*one, self.schema(example.db_id)) for one in failed)
        distinct = {candidate.sql: verdicts[candidate.sql][1].seconds for candidate in samples}
        return {
            "id": example.id,
            "answers": {way: asdict(score_of(candidate, verdicts))
                        for way, candidate in self.picks(greedy, samples, executions).items()},
            "samples": {
                "correct": {name: sum(score.correct[name] for score in scores) for name in self.matches},
                "statuses": dict(sorted(fates.items())), "failures": dict(failures),
                "groups": len(group_results(executions)),
                "truncated": sum(candidate.truncated for candidate in samples),
                "second_tries": sum(bool(candidate.observation) for candidate in samples),
                "tokens": sum(candidate.tokens for candidate in samples)},
            "traces": verified_traces(example, greedy + samples, verdicts)[:self.traces],
            **({"failing": failing_answers(samples, verdicts)[:self.failures]} if self.failures else {}),
            "seconds": seconds | {"sql": sum(distinct.values())}}

    def schema(self, db_id: str) -> dict:
        """{table: [column, ...]} of a database; empty if there is none of that name."""
        databases = self.how_to_judge[0].databases
        if db_id not in self.schemas:
            self.schemas |= columns_of({db_id: databases[db_id]}) if db_id in databases else {db_id: {}}
        return self.schemas[db_id]

    def picks(self, greedy, samples, executions) -> dict[str, Candidate]:
        """The candidate that each way of answering picks."""
        if not samples:
            return dict.fromkeys(self.ways, NO_CANDIDATE)
        picks = {"greedy": greedy[:1], "sample": samples[:1]}
        picks |= {vote: [samples[choose(samples, executions, vote)]] for vote in VOTES}
        return {way: picks[way][0] for way in self.ways}


def without_partial(verdicts: dict) -> dict:
    """The verdicts; all unavailable if the database could not be read for one, because a vote needs them all."""
    unread = next((score for score, _ in verdicts.values() if score.unavailable), None)
    if not unread:
        return verdicts
    return {sql: (without_verdict(score, unread.error, unread.file), execution)
            for sql, (score, execution) in verdicts.items()}


def score_of(candidate: Candidate, verdicts: dict) -> ExampleScore:
    """The score of a candidate; its status gives the reason if there was no SQL to run."""
    score = verdicts[candidate.sql][0]
    if score.unavailable:
        return score
    status = "too_long" if candidate is NO_CANDIDATE else candidate.broken or score.status
    return replace(score, status=status)


NO_CANDIDATE = Candidate("", "", "", -math.inf, 0, False)  # for a question whose prompt does not fit


def verified_traces(example: Example, candidates: Sequence[Candidate], verdicts: dict) -> list[dict]:
    """Verified candidates with reasoning, the likeliest first and each once, as records for --traces.

    A candidate is verified if every comparison matches, with the word `value` left in the SQL. A gold result without
    rows verifies nothing, because many wrong queries return no rows.
    """
    def verified(candidate):
        score = verdicts[candidate.sql][0]
        return candidate.thought.strip() and score.gold_status == "ok" and score.verified

    right = sorted(filter(verified, candidates), key=lambda candidate: -candidate.logprob)
    answers = dict.fromkeys((candidate.thought.strip(), candidate.sql, candidate.first_try) for candidate in right)
    return [{"id": example.id, "db_id": example.db_id, "question": example.question, "sql": sql,
             "evidence": example.evidence, "difficulty": example.difficulty, "trace": thought,
             **({"first_try": first} if first else {}), **ready_made(example)}
            for thought, sql, first in answers]


def ready_made(example: Example) -> dict:
    """The fields of a record with a prompt of its own."""
    chat = [{"role": role, "content": content} for role, content in example.messages]
    return {"messages": chat} if chat else {"prompt": example.prompt} if example.prompt else {}


def failing_answers(candidates: Sequence[Candidate], verdicts: dict) -> list[str]:
    """The different answers whose SQL does not run, the likeliest first; none that was cut."""
    failed = [candidate for candidate in candidates
              if candidate.sql and verdicts[candidate.sql][0].status not in ("ok", "unavailable")]
    return list(dict.fromkeys(one.text for one in sorted(failed, key=lambda one: -one.logprob)))


class Progress:
    """Finished batches, in a file so that an interrupted evaluation can continue; without one only in memory.

    The first line contains the settings, each other line a batch; a line that was cut short by a kill is dropped.
    """

    def __init__(self, file, settings: dict):
        self.file, self.done = file and Path(file), {}
        if self.file is None:
            return
        settings = json.loads(json.dumps(settings))
        lines = read_text(self.file).split("\n")[:-1] if self.file.exists() else []
        found = parse_json(lines[0], self.file, 1) if lines else None
        if len(lines) == 1 and isinstance(found, dict) and found.keys() == settings.keys():
            lines = []  # no batch was finished, so the settings may differ
        if lines:
            self._check(found, settings)
        for number, line in enumerate(lines[1:], 2):
            batch = parse_json(line, self.file, number)
            self.done[batch["batch"]] = batch["records"]
        write = write_whole if lines else write_text  # a full disk must not destroy finished batches
        write(self.file, "\n".join(lines or [json.dumps(settings)]) + "\n")

    def _check(self, found, settings) -> None:
        found = found if isinstance(found, dict) else {}
        differing = [name for name in settings if name not in found or found[name] != settings[name]]
        if differing:
            raise UserError(f"{self.file} keeps an interrupted evaluation with another {differing[0]}: "
                            "finish that one with the same command, or delete the file")

    def add(self, batch: int, records: list[dict]) -> None:
        """Store the records of a batch, after a round trip through JSON."""
        line = as_json({"batch": batch, "records": records})
        self.done[batch] = json.loads(line)["records"]
        if self.file is None:
            return
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.file}: {error.strerror}") from error

    def finish(self) -> None:
        """Delete the file: all results are saved elsewhere."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def fingerprint(config, prompts, examples: Sequence[Example], free: Collection[str]) -> dict:
    """All that the records of an examination depend on; `free` names settings that do not matter."""
    model = Path(config.model)  # a folder, or a GGUF file
    weights = [model] if model.is_file() else sorted(model.glob("*.safetensors")) + sorted(model.glob("*.bin"))
    return {**{name: value for name, value in vars(config).items() if name not in free}, **vars(prompts),
            "questions": questions_hash(examples),
            "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights]}


def questions_hash(examples: Sequence[Example]) -> str:
    """A hash of the questions with their gold SQL or answer, evidence and ready-made prompts."""
    asked = [[example.id, example.db_id, example.question, example.evidence, example.golds, example.messages,
              example.prompt] for example in examples]
    return sha256(json.dumps(asked).encode()).hexdigest()


def scores_of(records: Sequence[dict], way: str) -> list[ExampleScore]:
    """The scores of one way of answering."""
    return [ExampleScore(**record["answers"][way]) for record in records]
