"""Ask your own SQLite database a question, with a trained model.

    python ask.py --model runs/demo/best --database shop.sqlite "Who is the oldest customer?"
    python ask.py --model runs/demo/best --database shop.sqlite            # a prompt for questions; .help
    python ask.py --model runs/demo/best --database shop.sqlite --serve    # on a page, http://127.0.0.1:8000

The model answers -n times. Candidates that return the same rows vote together. The winner is shown, with its SQL
and how many agreed. A separate process opens the database read-only (see sql_exec.py): whatever the model writes,
it cannot change the database.

By default, a policy trained here is asked as in its run: prompts and answers are written, limited and parsed in the
same way.
"""

import argparse
import cmd
import contextlib
import csv
import io
import os
import re
import shutil
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, run_main, sound
from common.options import Parser, add_arguments, build, check, option, shared
from common.wording import plural
from data import Example, PromptBuilder, PromptConfig, Schema, read_schema, schema_columns
from history import lineage, run_config_of, training_questions
from prompts.answer_format import AnswerFormat
from prompts.builder import full_schema
from questions import demo_world
from running.layers import fold, handed_on
from scoring.voting import VOTES, Candidate, Exam, choose, rank_groups, sample_candidates
from sql_exec import Execution, SQLExecutor

HISTORY = Path("~/.ask_history").expanduser()
WIDEST_CELL = 40  # characters of a cell shown in a terminal
ROWS_ON_PAGE = 200
HELP = """\
Type a question, or one of
  .schema [TABLE]   the tables and their columns
  .sql [QUERY]      edit the last query and run it again, or run another one (read-only)
  .votes            what the other candidates were
  .think            show the model's reasoning, or stop showing it
  .export FILE.csv  write the whole last result
  .help  .quit"""


@dataclass(frozen=True)
class AskConfig:
    """What to ask, and how."""  # ValueError for invalid values
    model: str = option("runs/demo/best", "an alias, a Hugging Face id or a local folder")
    database: str = option("", "the SQLite file to ask")
    samples: int = option(10, "candidates that vote; 1 is the greedy answer", at_least=1)  # also -n
    temperature: float = shared("temperature")
    vote: str = option("value-aware", "how the candidates vote", choices=VOTES)
    evidence: str = option("", "what the model should know besides the database, in your words")
    think: bool = option(False, "show the model's reasoning")
    rows: int = option(20, "rows of a result that are shown", at_least=1)
    max_completion_tokens: int = shared("max_completion_tokens")
    constrain: str = shared("constrain", "; of a policy trained here by default as in its run")
    turns: int = shared("turns", "; of a policy trained here by default as in its run")
    feedback: str = shared("feedback", "; of a policy trained here by default as in its run")
    lenient_format: bool | None = shared("lenient_format", " (default: as the run that made the model)")
    seed: int = shared("seed", ": the same question gets the same answer", at_most=2**32)
    threads: int = shared("threads")
    workers: int = shared("workers", default=2)
    timeout: float = shared("timeout", default=10.0)
    max_rows: int = option(10_000, "a longer result is refused as too large", at_least=1)

    def __post_init__(self):
        check(self)
        if not self.database:
            raise UserError("say which database to ask: --database FILE.sqlite")

    def exam(self, answer_style: str) -> Exam:
        """How the model answers here."""
        temperature = self.temperature if self.samples > 1 else 0.0
        return Exam(AnswerFormat(answer_style, bool(self.lenient_format)), self.max_completion_tokens, self.samples,
                    temperature, seed=self.seed)


# -------------------------------------------------------------------------------------------- answering

@dataclass(frozen=True)
class Reply:
    """The winning candidate with its result, and the outcomes of the others."""
    answer: Candidate
    execution: Execution
    groups: list[tuple[int, str, int]]  # (votes, SQL, rows) of each group of equal results, the winner first
    failures: dict[str, int]            # how many candidates did not run, by status
    seconds: float
    advice: str = ""                    # if most answers missed the format

    @property
    def count(self) -> int:
        """How many candidates there were."""
        return sum(votes for votes, _, _ in self.groups) + sum(self.failures.values())

    @property
    def verdict(self) -> str:
        """The vote in one line."""
        others = [plural(len(self.groups) - 1, "other result")] if len(self.groups) > 1 else []
        others += [f"{count} {status}" for status, count in self.failures.items()]
        votes = self.groups[0][0] if self.groups else 0
        caution = "\nfew agree, so read the query with care" if 2 * votes < self.count else ""
        return (f"{votes} of {self.count} candidates return this"
                + (f"; {', '.join(others)}" if others else "") + f" ({self.seconds:.1f} s){caution}")

    def as_json(self) -> dict:
        """What a page shows; cells are text or null."""
        content = {"sql": self.answer.sql, "thought": self.answer.thought, "first_try": self.answer.first_try,
                   "observation": self.answer.observation, "verdict": self.verdict,
                   "votes": [f"{votes} x {plural(rows, 'row')}: {sql}" for votes, sql, rows in self.groups]
                   + [f"{count} x {status}" for status, count in self.failures.items()]}
        execution = self.execution
        if execution.status != "ok":
            reason = (f"the likeliest of {self.count} gives {execution.status}: {execution.error}"
                      if self.answer.sql else "no answer has a query in it")
            return content | {"error": f"No candidate runs; {reason}" + (f"; {self.advice}" if self.advice else "")}
        rows = execution.rows[:ROWS_ON_PAGE]
        shown = f", the first {len(rows)} shown" if len(rows) < len(execution.rows) else ""
        texts = [[None if cell is None else cell_text(cell) for cell in row] for row in rows]
        return content | {"columns": execution.columns, "rows": texts,
                          "count": plural(len(execution.rows), "row") + shown}


class Asker:
    """A model and a database; turns a question into a Reply."""

    def __init__(self, config: AskConfig, prompts: PromptConfig, policy=None):
        self.config, self.exam = config, config.exam(prompts.answer_style)
        self.path = check_database(config.database)
        self.note = unknown_database(config.model, run_config_of(config.model) or {}, self.path)
        from second_try import support_of  # here, so that --help does not wait for PyTorch
        if policy is None:
            from policy import load_for_sampling
            policy = load_for_sampling(config.model, config.threads)
        self.policy = policy
        self.builder = PromptBuilder({"database": self.path}, self.policy.tokenizer, prompts)
        self.executor = SQLExecutor({"database": self.path}, config.workers, config.timeout,
                                    config.max_rows)
        self.support = support_of(config, self.policy, self.builder, self.executor, self.exam.answer_format)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.executor.close()

    def ask(self, question: str) -> Reply:
        """Sample, run, vote."""
        config, began = self.config, time.perf_counter()
        example = Example("", "database", " ".join(sound(question).split()), (), sound(config.evidence))
        prompt = self.builder.encode(example)
        if prompt is None:
            raise UserError("the prompt for this database and question is longer than "
                            f"{self.builder.config.max_prompt_tokens} tokens: ask a shorter question, or "
                            "raise --max-prompt-tokens if the model reads more")
        candidates, = sample_candidates(self.policy, [prompt], self.exam, support=self.support, asked=[example])
        executions = self.executor.run_many([("database", candidate.sql) for candidate in candidates])
        if unread := next((one for one in executions if one.unread), None):  # without them the vote could differ
            raise UserError(f"{self.path} could not be read ({unread.error}), so the candidates cannot vote: ask again")
        groups = rank_groups(executions, [candidate.logprob for candidate in candidates], config.vote)
        statuses = Counter(candidate.broken or execution.status
                           for candidate, execution in zip(candidates, executions, strict=True))
        failures = {status: count for status, count in statuses.most_common() if status != "ok"}
        winner = choose(candidates, executions, config.vote)
        votes = [(len(group), candidates[group[0]].sql, len(executions[group[0]].rows)) for group in groups]
        advice = self.exam.answer_format.advice(statuses)
        return Reply(candidates[winner], executions[winner], votes, failures, time.perf_counter() - began, advice)

    def run(self, sql: str) -> Execution:
        """Run the user's own query, read-only like the model's."""
        return self.executor.run("database", sound(sql))

    def schema(self, table: str = "") -> str:
        """CREATE TABLE statements of one table or of all."""
        tables = [one for one in read_schema(self.path).tables if table.lower() in ("", one.name.lower())]
        if not tables:
            raise UserError(f"there is no table {table}; .schema alone shows all")
        return full_schema(Schema(tuple(tables)), 0)


def check_database(file) -> Path:
    """The path of a database. Raises UserError if it has no tables."""
    path = Path(file)
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"{path} is an empty file: there is no table to ask about")
    if not any(table.columns for table in read_schema(path).tables):
        raise UserError(f"{path} has no tables to ask about")
    return path


def unknown_database(model: str, run: dict, path: Path) -> str:
    """A warning if the model was trained from random weights and never on such a database; else empty."""
    runs = list(lineage(run))
    if not runs or runs[-1].get("model") != "tiny":
        return ""
    try:
        known = [tables for one in runs for tables in databases_of(one)]
    except UserError:  # the data have been moved
        return ""
    if columns_by_table(schema_columns(read_schema(path))) in known:
        return ""
    names = dict.fromkeys(one["data"] for one in runs)
    data = " and ".join("the demo's ten databases" if name == "demo" else f"the databases of {name}" for name in names)
    return (f"{model} was trained from random weights, on {data} alone, and {path.name} is none of them: do not expect "
            "a right answer. Ask a pretrained model (--model qwen2.5-3b), or train one on questions about your own "
            "database: python train.py --model qwen2.5-0.5b --data questions.json")


def databases_of(run: dict) -> list[dict[str, set]]:
    """The tables of every database that a run was trained on, in the form of `columns_by_table`."""
    if run["data"] == "demo":
        lines = map(demo_world.parse_tables, demo_world.SEEN.values())
        return [columns_by_table({table.name: [table.key, *([table.parent.key] if table.parent else []), *table.pools]
                                  for table in tables}) for tables in lines]
    return [columns_by_table(schema_columns(read_schema(file)))
            for file in training_questions(run).databases.values()]


def columns_by_table(tables: Mapping[str, Iterable[str]]) -> dict[str, set]:
    """{table: its columns} in lower case, so that equal databases are equal."""
    return {table.lower(): {column.lower() for column in columns} for table, columns in tables.items()}


# --------------------------------------------------------------------------------------------- printing

def printable(text: str, keep: str = "") -> str:
    """Text that cannot control a terminal: control characters are escaped, except those in `keep`."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def cell_text(value) -> str:
    """A cell as displayed text."""
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"x'{value[:16].hex()}'" + (f" ({len(value)} bytes)" if len(value) > 16 else "")
    return printable(str(value))


def text_width(text: str) -> int:
    """Columns a text takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def table_lines(columns: list[str], rows: list[tuple], width: int) -> list[str]:
    """A table at most `width` characters wide; numbers align right; columns that do not fit are only counted."""
    lines: list[str] = []
    texts = [[printable(name)] + [cell_text(row[i]) for row in rows] for i, name in enumerate(columns)]
    shown = 0
    for i, cells in enumerate(texts):
        cells = [cell if len(cell) <= WIDEST_CELL else cell[:WIDEST_CELL - 1] + "…" for cell in cells]
        widest = max(map(text_width, cells))
        if lines and text_width(lines[0]) + 2 + widest > width:
            break
        right = bool(rows) and all(row[i] is None or isinstance(row[i], int | float) for row in rows)
        padding = [" " * (widest - text_width(cell)) for cell in cells]
        block = [pad + cell if right else cell + pad for pad, cell in zip(padding, cells, strict=True)]
        block.insert(1, "-" * widest)
        lines = [line + "  " + cell for line, cell in zip(lines, block, strict=True)] if lines else block
        shown += 1
    if shown < len(columns):
        lines.append(f"... and {len(columns) - shown} more columns")
    return [line.rstrip() for line in lines]


def print_result(execution: Execution, config: AskConfig) -> None:
    """Prints the rows of a query, or why it failed."""
    if execution.status != "ok":
        print(f"{execution.status}: {printable(execution.error or '')}")
        return
    rows = execution.rows[:config.rows]
    print("\n".join(table_lines(execution.columns, rows, shutil.get_terminal_size().columns)))
    count = len(execution.rows)
    print(f"({plural(count, 'row')}" + (f", the first {len(rows)} shown" if len(rows) < count else "") + ")")


def print_reply(reply: Reply, config: AskConfig, think: bool) -> None:
    """Prints the reasoning (if wanted), the SQL, the result and the vote; or what went wrong and what may help."""
    answer = reply.answer
    if think and answer.thought:
        print("reasoning: " + printable(answer.thought.strip(), keep="\n") + "\n")
    if not answer.sql:
        print(f"None of the {reply.count} answers has a query in it; the likeliest one begins:\n"
              f"  {printable(answer.text)[:300]}\n{reply.advice}")
        return
    if answer.first_try:
        print(f"first try: {printable(answer.first_try)}\n{printable(answer.observation)}\n")
    print(printable(answer.sql, keep="\n"))
    if reply.execution.status == "ok":
        print()
        print_result(reply.execution, config)
        print(reply.verdict)
        return
    print(f"\nNone of the {reply.count} candidates runs. This is the likeliest one; its "
          f"{reply.execution.status}: {printable(reply.execution.error or '')}\n"
          "It may help to name tables and columns as the database does (.schema), or to correct the query "
          "(.sql)." + (f"\n{reply.advice}" if reply.advice else ""))


# --------------------------------------------------------------------------------------------- a session

class Session(cmd.Cmd):
    """The interactive prompt: a line is a question, or a command that begins with a dot."""
    prompt = "ask> "

    def __init__(self, asker: Asker):
        super().__init__()
        self.asker, self.think = asker, asker.config.think
        self.reply: Reply | None = None
        self.sql, self.execution = "", None  # the last query and its result
        self.intro = (f"{asker.path.name}: {plural(len(read_schema(asker.path).tables), 'table')}. "
                      "Ask a question, or type .help")

    def loop(self) -> None:
        """Ask until .quit or the end of input."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # the input may be invalid UTF-8
        with history():
            while True:
                try:
                    return self.cmdloop()
                except KeyboardInterrupt:  # ends the question, not the session
                    print("\ninterrupted (.quit leaves)")
                except UserError as error:
                    print(f"error: {error}")
                self.intro = None  # cmdloop would print it again

    def parseline(self, line: str) -> tuple[str, str, str]:
        """(command without its dot, its argument, the line); the command of a question is empty."""
        line = line.strip()
        command, _, rest = line.partition(" ")
        return command[1:] if command.startswith(".") else "", rest.strip(), line

    def completenames(self, text: str, *_) -> list[str]:
        """The commands that begin with `text`."""
        return [f".{name}" for name in super().completenames(text[1:])] if text.startswith(".") else []

    def emptyline(self) -> None:
        """Does nothing; by default cmd repeats the last line."""

    def default(self, line: str) -> bool:
        """Handles a question, an unknown command, or the end of input, which cmd calls EOF."""
        if line == "EOF":
            print()
            return True
        if line.startswith("."):
            raise UserError(f"there is no command {line.partition(' ')[0]}; .help lists them")
        self.reply = self.asker.ask(line)
        self.sql, self.execution = self.reply.answer.sql, self.reply.execution
        print_reply(self.reply, self.asker.config, self.think)
        return False

    def do_help(self, _) -> None:
        print(HELP)

    def do_quit(self, _) -> bool:
        return True

    do_exit = do_quit

    def do_schema(self, table: str) -> None:
        print(printable(self.asker.schema(table), keep="\n"))

    def do_think(self, _) -> None:
        self.think = not self.think
        print(f"the reasoning is {'shown' if self.think else 'hidden'}")

    def do_votes(self, _) -> None:
        if self.reply is None:
            raise UserError("nothing was asked yet")
        for votes, sql, rows in self.reply.groups:
            print(f"{votes:>4} x  {plural(rows, 'row')}: {printable(sql)}")
        for status, count in self.reply.failures.items():
            print(f"{count:>4} x  {status}")

    def do_sql(self, sql: str) -> None:
        """Run a query: the one given, or the last one after the user edited it."""
        sql = sql or edit(self.sql)
        if sql:
            self.sql, self.execution = sql, self.asker.run(sql)
            print_result(self.execution, self.asker.config)

    def do_export(self, file: str) -> None:
        """Write the last result as CSV; NULL is an empty field, a blob is hexadecimal."""
        if self.execution is None or self.execution.status != "ok":
            raise UserError("there is no result to export yet")
        if not file:
            raise UserError("say where to: .export FILE.csv")
        try:
            with open(os.path.expanduser(file), "x", newline="", encoding="utf-8") as target:
                writer = csv.writer(target)
                writer.writerow(self.execution.columns)
                writer.writerows([cell.hex() if isinstance(cell, bytes) else cell for cell in row]
                                 for row in self.execution.rows)
        except FileExistsError as error:
            raise UserError(f"{file} is already there; choose another name") from error
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}") from error
        print(f"{plural(len(self.execution.rows), 'row')} written to {file}")


def edit(sql: str) -> str:
    """Let the user edit a query in the terminal; empty if nothing is to run."""
    if not sql:
        raise UserError("there is no query to edit yet; .sql SELECT ... runs one")
    try:
        import readline
    except ImportError:
        readline = None
    if readline is None or not sys.stdin.isatty():
        raise UserError(f"there is no terminal to edit on; give the query after .sql, for example .sql {sql}")
    readline.set_startup_hook(lambda: readline.insert_text(" ".join(sql.split("\n"))))
    try:
        return input("sql> ").strip()
    except EOFError:  # Ctrl-D: the query stays as it was
        print()
        return ""
    finally:
        readline.set_startup_hook()


@contextlib.contextmanager
def history():
    """In a terminal, arrow keys recall earlier lines, including those of earlier sessions."""
    try:
        import readline
    except ImportError:
        readline = None
    if readline is None or not sys.stdin.isatty():
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(HISTORY)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(HISTORY)


# ------------------------------------------------------------------------------------------------ main

def parse_arguments(arguments=None) -> tuple[argparse.Namespace, AskConfig, PromptConfig]:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", help="the question; without it, a prompt for as many as you like")
    parser.add_argument("-n", dest="samples", type=int, default=argparse.SUPPRESS, metavar="N",
                        help="the same as --samples")
    parser.add_argument("--serve", nargs="?", type=int, const=8000, metavar="PORT",
                        help="answer on a page in the browser instead (default port: 8000; 0: any free one)")
    add_arguments(parser, AskConfig)
    add_arguments(parser, PromptConfig)
    given = parser.parse_args(arguments)
    values = fold(made_by=handed_on(run_config_of(getattr(given, "model", AskConfig.model))), flags=vars(given))
    return given, build(AskConfig, values), build(PromptConfig, values)


def main() -> int:
    """Answer one question, a session of them, or those of a page. Exit status 1: no candidate ran."""
    given, config, prompts = parse_arguments()
    if given.question is not None and not re.search(r"\w", given.question):
        raise UserError("the question is empty")
    if given.question is not None and given.serve is not None:
        raise UserError("--serve answers the questions that are asked on its page: leave out the question or --serve")
    with Asker(config, prompts) as asker:
        if asker.note:
            print(f"note: {asker.note}\n")
        if given.serve is not None:
            from running.ask_page import serve
            serve(asker, given.serve)
        elif given.question is None:
            Session(asker).loop()
        else:
            reply = asker.ask(given.question)
            print_reply(reply, config, config.think)
            return int(reply.execution.status != "ok")
    return 0


if __name__ == "__main__":
    run_main(main)
