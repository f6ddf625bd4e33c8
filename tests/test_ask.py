"""Asking a database: one question, a session, the local page (in a real browser where there is one)."""

import html
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_in_process
from little_policy import little_policy_folder

import ask
from ask import AskConfig, Asker, Session, cell_text, print_reply, printable, table_lines
from common.errors import UserError
from data import PromptConfig
from history import run_config_of
from prompts.answer_format import AnswerFormat
from questions import demo_world
from running.ask_page import Server, serve
from scoring.voting import Candidate

NAMES = "SELECT name FROM singer WHERE country = 'France'"
SCRIPT = [  # what the model answers: (SQL, logprob)
    (NAMES, -0.5), (NAMES, -0.6), ("SELECT name FROM singer WHERE age < 40", -0.1),
    ("SELECT name FROM singer WHERE age > 99", -0.1), ("SELECT oops", -0.1), ("", -3.0)]


def candidates(script):
    return [Candidate(f"<think> thought </think> {sql}", "a thought", sql, logprob, 5, False)
            for sql, logprob in script]


@pytest.fixture
def asker(tiny_db, monkeypatch):
    """An Asker whose model answers by the script; a test may put another script in `asker.script`."""
    def sample(policy, prompts, exam, support, asked):
        made.prompts += prompts
        return [candidates(made.script)[:exam.samples]]

    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}

    monkeypatch.setattr(ask, "sample_candidates", sample)
    config = AskConfig(database=str(tiny_db), workers=1, timeout=0.5)
    with Asker(config, PromptConfig(), policy=SimpleNamespace(tokenizer=tokenizer)) as made:
        made.script, made.prompts = SCRIPT, []
        yield made


# ------------------------------------------------------------------------------------------- answering

def test_the_vote_decides(asker):
    reply = asker.ask("Who is  from\nFrance?")
    assert reply.execution.rows == [("Ana",), ("Cy",)]
    assert reply.answer.sql == "SELECT name FROM singer WHERE age < 40"
    # both queries return Ana and Cy, so the three of them win, and the likeliest of the three is shown
    assert reply.groups == [(3, reply.answer.sql, 2), (1, "SELECT name FROM singer WHERE age > 99", 0)]
    assert reply.failures == {"error": 1, "format": 1} and reply.count == 6
    assert "few agree" not in reply.verdict
    asker.script = [("SELECT 1", -1.0), ("SELECT 2", -2.0), ("SELECT 3", -3.0)]
    assert "few agree" in asker.ask("q").verdict
    assert reply.verdict.startswith("3 of 6 candidates return this; 1 other result, 1 error, 1 format (")
    assert "question : Who is from France ?" in "".join(map(chr, asker.prompts[0]))


def test_candidates_do_not_vote_on_a_database_that_cannot_be_read(asker):
    asker.ask("q")
    asker.executor.settings["timeout"] = 0.05
    asker.executor._workers.pop().kill()
    writer = sqlite3.connect(asker.path, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match=r"music.sqlite could not be read \(database is locked\), so .* ask again"):
        asker.ask("q")
    writer.close()
    assert asker.ask("q").execution.rows == [("Ana",), ("Cy",)]


def test_evidence_reaches_the_prompt(asker):
    asker.config = AskConfig(database=asker.config.database, evidence="old means above 40")
    asker.ask("Who is old?")
    assert "evidence : old means above 40" in "".join(map(chr, asker.prompts[0]))


def test_printed_reply(asker, capsys):
    print_reply(asker.ask("q"), asker.config, think=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reasoning: a thought" and lines[2].startswith("SELECT name")
    assert lines[4:9] == ["name", "----", "Ana", "Cy", "(2 rows)"]


@pytest.mark.parametrize("script, words", [
    ([("SELECT oops", -1.0), ("SELECT nope", -0.5), ("", -0.1)],
     ["SELECT nope", "None of the 3 candidates runs", "no such column: nope", ".schema"]),
    ([("", -1.0)] * 2, ["None of the 2 answers has a query in it", "<think> thought </think>", "0.0 % of the answers meet",
                        "the format, <think> reasoning </think> and then", "--lenient-format", "--traces", "--mine"]),
    ([("DROP TABLE singer", -1.0)], ["refused: only SELECT"])])
def test_no_candidate_runs(asker, capsys, script, words):
    asker.script = script
    reply = asker.ask("q")
    print_reply(reply, asker.config, think=False)
    printed = capsys.readouterr().out
    assert all(word in printed for word in words), printed
    assert reply.execution.status != "ok" and "error" in reply.as_json()


def test_answers_that_are_cut_are_told(asker, monkeypatch):
    def sample(*_, **__):
        return [[Candidate("<think> and so", "", "", -1.0, 9, True)] * 2 + [Candidate("SELECT 1", "", "", -2.0, 9, False)]]

    monkeypatch.setattr(ask, "sample_candidates", sample)
    error = asker.ask("q").as_json()["error"]
    assert error.startswith("No candidate runs; no answer has a query in it; 0.0 % of the answers meet the format")
    assert "a higher --max-completion-tokens lets answers end" in error


def test_most_answers_without_the_format_are_told_even_where_one_has_sql(asker, capsys):
    asker.script = [("SELECT oops", -1.0), ("", -2.0), ("", -2.0)]
    print_reply(asker.ask("q"), asker.config, think=False)
    assert "None of the 3 candidates runs" in (printed := capsys.readouterr().out) and "33.3 % of the answers" in printed


def trained(folder, **config):
    """The folder of a policy that a run with these settings would have made."""
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "config.json").write_text(json.dumps({"model": "tiny", "data": "demo", "split": "train"} | config))
    return str(folder / "best")


def test_a_policy_of_random_weights_knows_the_databases_of_its_data_only(tmp_path, tiny_db):
    def note(model, path):
        return ask.unknown_database(model, run_config_of(model) or {}, path)

    shop = tmp_path / "any name.sqlite"
    tables = demo_world.parse_tables(demo_world.SEEN["shop"])
    demo_world.build_database(shop, tables, random.Random(7))  # other rows, and another name
    demo = trained(tmp_path / "demo")
    assert note(demo, shop) == ""
    assert "the demo's ten databases alone, and music.sqlite is none of them" in note(demo, tiny_db)
    again = trained(tmp_path / "again", model=demo)  # began with that policy
    assert "the demo's ten databases alone" in note(again, tiny_db) and note(again, shop) == ""
    for name, config in {"pretrained": {"model": "qwen2.5-3b"}, "gone": {"data": str(tmp_path / "gone.json")}}.items():
        assert note(trained(tmp_path / name, **config), tiny_db) == ""
    (tmp_path / "own.json").write_text(json.dumps([{"question": "q", "db_id": "music", "sql": "SELECT 1"}]))
    own = trained(tmp_path / "own", data=str(tmp_path / "own.json"))
    assert note(own, tiny_db) == ""
    assert note(trained(tmp_path / "moved", data="own.json", cwd=str(tmp_path)), tiny_db) == ""
    moved = trained(tmp_path / "other", data="own.json", data_dir=".", cwd=str(tmp_path))
    assert "the databases of own.json alone" in note(moved, shop)
    assert f"the databases of {tmp_path / 'own.json'} alone, and any name.sqlite is none of them" in note(own, shop)
    assert note("qwen2.5-3b", tiny_db) == note(str(little_policy_folder(tiny_db)), tiny_db) == ""


@pytest.mark.parametrize("given, of_run, lenient", [
    (None, None, False), (None, True, True), (False, True, False), (True, False, True)])
def test_answers_are_read_as_in_training(tmp_path, tiny_db, asker, given, of_run, lenient):
    model = "qwen2.5-3b" if of_run is None else trained(tmp_path / "run", model="qwen2.5-3b", lenient_format=of_run)
    flags = [] if given is None else ["--lenient-format" if given else "--no-lenient-format"]
    _, config, _ = ask.parse_arguments(["--model", model, "--database", str(tiny_db), "--workers", "1", *flags])
    with Asker(config, PromptConfig(), policy=asker.policy) as other:
        assert other.exam.answer_format == AnswerFormat(lenient=lenient)


def test_questions_are_asked_and_read_in_the_style_of_the_run(tmp_path, monkeypatch):
    model = trained(tmp_path / "run", model="qwen2.5-3b", style="omnisql", answer_style="fence")
    monkeypatch.setattr(sys, "argv", ["ask.py", "--model", model, "--database", "x.sqlite", "--max-value-hints", "2"])
    _, _, prompts = ask.parse_arguments()
    assert (prompts.style, prompts.answer_style, prompts.max_value_hints) == ("omnisql", "fence", 2)


def test_the_command_says_that_a_policy_does_not_know_the_database(tmp_path, tiny_db):
    run = Path(trained(tmp_path / "demo")).parent
    shutil.rmtree(run / "best")
    shutil.copytree(little_policy_folder(tiny_db), run / "best")
    done = run_here("--model", run / "best", "--database", tiny_db, "--threads", 1, "-n", 2, "Who is the oldest singer?")
    assert done.stdout.startswith("note: ") and "music.sqlite is none of them" in done.stdout.splitlines()[0]
    assert done.stderr == ""


# --------------------------------------------------------------------------------------------- printing

def test_tables():
    rows = [("Ana", 30, None), ("日本", 5, b"\1\2"), ("x" * 99, -1.5, "a\nb\x1b[2J")]
    lines = table_lines(["name", "n", "what"], rows, 80)
    assert lines[0] == "name" + " " * 38 + "   n  what"
    assert lines[2] == "Ana" + " " * 39 + "  30  NULL"
    assert lines[3] == "日本" + " " * 38 + "   5  x'0102'"
    assert lines[4] == "x" * 39 + "…" + "  -1.5  a\\nb\\x1b[2J"
    assert table_lines(["a", "b"], [], 80) == ["a  b", "-  -"]
    assert table_lines([f"c{i}" for i in range(500)], [], 20)[-1] == "... and 495 more columns"
    assert table_lines(["wide" * 30, "b"], [], 20)[1:] == ["-" * 40, "... and 1 more columns"]


def test_nothing_steers_the_terminal():
    assert printable("a\x1b]0;title\x07\u202eb") == "a\\x1b]0;title\\x07\\u202eb"
    assert printable("a\nb\r", keep="\n") == "a\nb\\r"
    assert cell_text(bytes(range(40))).endswith("0f' (40 bytes)") and cell_text(1e300) == "1e+300"


# --------------------------------------------------------------------------------------------- a session

def converse(asker, monkeypatch, capsys, *lines):
    """What a session prints; a line that is an exception is raised at the prompt."""
    script = iter([*lines, EOFError()])

    def answer(prompt):
        line = next(script)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    Session(asker).loop()
    return capsys.readouterr().out


def test_session(asker, monkeypatch, capsys, tmp_path):
    file = tmp_path / "r.csv"
    printed = converse(
        asker, monkeypatch, capsys, "", ".help", ".sql", ".export x.csv", ".votes", "Who?", ".votes", ".sql",
        ".schema", ".schema SINGER", ".schema nope", ".nope", ".think", "Who?",
        ".sql SELECT name, HomeTown FROM singer", f".export {file}", f".export {file}", ".export",
        ".export /nowhere/r.csv", ".quit", "never read")
    for words in ("music.sqlite: 2 tables", ".export FILE.csv", "there is no query to edit",
                  "no result to export", "no terminal to edit on", "nothing was asked yet",
                  "   3 x  2 rows: SELECT name", "   1 x  error",
                  "CREATE TABLE concert", "no table nope", "no command .nope", "the reasoning is shown",
                  "reasoning: a thought", "Lyon", "3 rows written to", "is already there", "say where to",
                  "cannot write /nowhere/r.csv"):
        assert words in printed, words
    assert file.read_text() == "name,HomeTown\nAna,Lyon\nBo,Lima\nCy,\n"


def test_the_end_of_input_leaves_a_query_as_it_was(asker, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ask, "HISTORY", tmp_path / "history")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    printed = converse(asker, monkeypatch, capsys, ".sql SELECT 7", ".sql", EOFError(), ".export /nowhere/r.csv", ".exit", "no")
    assert printed.count("7\n(1 row)\n") == 1 and "cannot write /nowhere/r.csv" in printed


def test_tab_completes_commands(asker):
    session = Session(asker)
    assert session.completenames(".s") == [".schema", ".sql"] and ".votes" in session.completenames(".")
    assert session.completenames("") == session.completenames("s") == []
    assert session.parseline("which .sql is it? ") == ("", ".sql is it?", "which .sql is it?")


def test_session_survives_hostile_input(asker, monkeypatch, capsys, tiny_db):
    before = tiny_db.read_bytes()
    attacks = ["DROP TABLE singer", "DELETE FROM singer", "ATTACH 'x.db' AS x", "PRAGMA user_version = 7",
               "SELECT 1; DROP TABLE singer", "VACUUM INTO 'copy.db'", "SELECT load_extension('x')", "\0",
               "(" * 5000,
               "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT max(n) FROM r"]
    asker.script = [(sql, -1.0) for sql in attacks]
    printed = converse(asker, monkeypatch, capsys, "'; DROP TABLE singer; --", "\x1b[2J\0 ???", "é" * 3000,
                       *(f".sql {sql}" for sql in attacks[:3]), KeyboardInterrupt(), "and again?")
    assert printed.count("None of the 10 candidates runs") == 3  # the third question is too long to ask
    assert "interrupted (.quit leaves)" in printed and "longer than 2048 tokens" in printed
    assert printed.count("\nrefused: ") == 3 and "\x1b" not in printed
    assert tiny_db.read_bytes() == before
    assert [path.name for path in tiny_db.parent.iterdir()] == ["music.sqlite"]


# ---------------------------------------------------------------------------------------- command line

def run_cli(*arguments, text="", **environment):
    """Runs ask.py; arguments and text may be bytes, the output is read as UTF-8."""
    arguments = [one if isinstance(one, bytes) else str(one) for one in arguments]
    text = text if isinstance(text, bytes) else text.encode()
    done = subprocess.run([sys.executable, "ask.py", *arguments], cwd=ROOT, input=text, capture_output=True, check=False,
                          env=os.environ | environment)
    return SimpleNamespace(returncode=done.returncode, stdout=done.stdout.decode(), stderr=done.stderr.decode())


def run_here(*arguments):
    """The same in this process."""
    return SimpleNamespace(**dict(zip(("returncode", "stdout", "stderr"), run_in_process(ask, *arguments), strict=True)))


def test_text_that_is_no_text(asker):
    asker.config = AskConfig(database=asker.config.database, evidence="old \udcff")
    asker.ask("Who is \ud800 from\udcff France?")
    prompt = "".join(map(chr, asker.prompts[0]))
    assert "question : Who is \N{REPLACEMENT CHARACTER} from\N{REPLACEMENT CHARACTER} France ?" in prompt
    assert "evidence : old \N{REPLACEMENT CHARACTER}" in prompt
    assert asker.run("SELECT '\ud800'").rows == [("\N{REPLACEMENT CHARACTER}",)]


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0",
                                                                       "PYTHONCOERCECLOCALE": "0"}])
def test_bytes_that_are_not_utf8_and_an_output_that_is_not(tiny_db, environment):
    with sqlite3.connect(tiny_db) as connection:
        connection.execute("UPDATE singer SET country = 'Perú 日本' WHERE name = 'Bo'")
    policy = policy_flags(tiny_db)
    session = run_cli(*policy, "-n", 2, text=b"Which country has Bo?\n.sql SELECT country FROM singer\n\xff\xfe who\n"
                                             b".nope \xff\n.sql SELECT '\xff'\n", **environment)
    assert session.returncode == 0 and session.stderr == "", session.stderr
    assert "(3 rows)" in session.stdout and "no command .nope" in session.stdout
    if "LC_ALL" in environment:
        once = run_cli(*policy, "-n", 2, b"Who is \xff\xfe the oldest?", b"--evidence", b"\xe9", **environment)
        assert once.returncode in (0, 1) and once.stderr == "", once.stderr


def policy_flags(tiny_db):
    return ["--model", little_policy_folder(tiny_db), "--database", tiny_db, "--threads", 1,
            "--max-completion-tokens", 60, "--prompt-style", "compact"]


def test_command_line(tiny_db):
    session = run_cli(*policy_flags(tiny_db), text=b"How many singers are there?\nList the years of concerts.\n\xff\xfe who\n"
                                                   b".nope \xff\n")
    assert session.returncode == 0 and session.stderr == "", session.stderr
    assert "COUNT(*)" in session.stdout and "2014" in session.stdout and "no command .nope" in session.stdout
    once = run_here(*policy_flags(tiny_db), "Who is the oldest singer?", "--think", "-n", 5)
    assert once.returncode == 0 and "reasoning: sort singer by age" in once.stdout and "\nBo\n(1 row)\n" in once.stdout


def test_the_folder_of_a_run_is_no_model(tmp_path, tiny_db):
    run = Path(trained(tmp_path / "x")).parent
    (run / "checkpoints" / "step-0").mkdir(parents=True)
    done = run_here("--model", run, "--database", tiny_db, "Who?")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"use {run / 'best'}" in done.stderr


@pytest.fixture
def odd_files(tmp_path):
    (tmp_path / "text.sqlite").write_text("hello")
    (tmp_path / "empty.sqlite").write_text("")
    columns = ", ".join(f"column_{i} INT" for i in range(500))
    for name, sql in (("bare", "CREATE TABLE t (a); DROP TABLE t"),
                      ("wide", f"CREATE TABLE big ({columns}); INSERT INTO big (column_7) VALUES (3)")):
        connection = sqlite3.connect(tmp_path / f"{name}.sqlite")
        connection.executescript(sql)
        connection.close()
    return tmp_path


@pytest.mark.parametrize("file, words", [
    ("missing.sqlite", "No such file"), ("text.sqlite", "not a SQLite database"), (".", "Is a directory"),
    ("empty.sqlite", "is an empty file"), ("bare.sqlite", "has no tables")])
def test_files_that_cannot_be_asked(odd_files, file, words):
    with pytest.raises(UserError) as error:
        Asker(AskConfig(database=str(odd_files / file)), PromptConfig())
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_table_of_500_columns(odd_files, asker, capsys):
    config = AskConfig(database=str(odd_files / "wide.sqlite"), workers=1)
    with Asker(config, PromptConfig(), policy=asker.policy) as wide:
        asker.script = [("SELECT * FROM big", -1.0)]
        print_reply(wide.ask("What is column_7?"), config, think=False)
        prompt = "".join(map(chr, asker.prompts[-1]))
    assert "column_7" in prompt and "column_8 " not in prompt  # shortened to what the question mentions
    printed = capsys.readouterr().out
    assert "more columns" in printed and max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("arguments, words", [
    (["q"], "--database FILE.sqlite"), (["--database", "x.sqlite", "-n", 0], "--samples is 0; it must be at least 1"),
    (["--database", "x.sqlite", "--timeout", "nan"], "--timeout is nan; it must be a finite number"),
    (["--database", "x.sqlite", "--rows", -1], "--rows is -1; it must be at least 1"),
    (["--database", "x.sqlite", "--threads", -3], "--threads is -3; it must be at least 0"),
    (["--database", "x.sqlite", "--temperature", 0], "--temperature is 0.0; it must be above 0"),
    (["--database", "x.sqlite", "--seed", 10**20], "--seed is 1000"),
    (["--database", "x.sqlite", " ?"], "the question is empty"),
    (["--database", "x.sqlite", "q", "--serve"], "leave out the question or --serve"),
    (["--database", "x.sqlite", "--timeout", 1e7], "--timeout is 10000000.0; it must be at most 1000000.0"),
    (["--database", "x.sqlite", "q"], "cannot read the database x.sqlite")])
def test_bad_command_lines(arguments, words):
    done = run_here(*arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_a_process_that_is_refused_exits_with_status_2():
    done = run_cli("--database", "x.sqlite", "q")
    assert done.returncode == 2 and "cannot read the database x.sqlite" in done.stderr and "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------- the page

@pytest.fixture
def server(asker):
    server = Server(asker, 0)
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)  # seconds it takes to stop
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def request(server, method="POST", path="/ask", body='{"question": "Who?"}', **headers):
    """(status, headers, body) of a request as the page would send it, but for the given headers."""
    sent = {"Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): text for name, text in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, body if method == "POST" else None, sent)
    response = connection.getresponse()
    try:
        return response.status, response.headers, response.read().decode()
    finally:
        connection.close()


def test_page_and_answer(server, asker):
    status, headers, page = request(server, "GET", "/")
    assert status == 200 and "Ask music.sqlite" in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    asker.script = [("SELECT name, NULL, x'01', 9007199254740993 FROM singer", -1.0)] * 2
    status, _, body = request(server)
    answer = json.loads(body)
    assert status == 200 and answer["rows"][0] == ["Ana", None, "x'01'", "9007199254740993"]
    assert answer["count"] == "3 rows" and answer["verdict"].startswith("2 of 2 candidates return this")
    asker.script = [("WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r LIMIT 999) "
                     "SELECT n FROM r", -1.0)]
    answer = json.loads(request(server)[2])
    assert len(answer["rows"]) == 200 and answer["count"] == "999 rows, the first 200 shown"


@pytest.mark.parametrize("changed, status", [
    ({"Host": "evil.example"}, 403), ({"Host": "evil.example", "method": "GET", "path": "/"}, 403),
    ({"Host": "127.0.0.1"}, 403), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Content_Type": "text/plain"}, 400), ({"Content_Type": "application/x-www-form-urlencoded"}, 400),
    ({"path": "/other"}, 400), ({"body": "no JSON"}, 400), ({"body": "[" * 15000}, 400),
    ({"body": '{"question": 7}'}, 400), ({"body": '{"question": " "}'}, 400), ({"body": " " * 30000}, 400),
    ({"method": "GET", "path": "/../ask.py"}, 404), ({"method": "OPTIONS"}, 501), ({"method": "PUT"}, 501)])
def test_requests_from_elsewhere_are_refused(server, asker, changed, status):
    assert request(server, **changed)[0] == status and not asker.prompts


def test_its_own_origin_is_welcome(server):
    assert request(server, Origin=f"http://localhost:{server.server_port}")[0] == 200
    assert server.server_address[0] == "127.0.0.1"


def test_on_port_80_a_browser_leaves_the_port_out(server):
    assert request(server, Host="localhost")[0] == 403
    reached = SimpleNamespace(server_port=server.server_port)
    server.server_port = 80  # as it would be with --serve 80, which not everyone may open
    for name in ("127.0.0.1", "localhost", "LOCALHOST", "127.0.0.1:80"):
        assert request(reached, Host=name, Origin="http://localhost")[0] == 200
        assert request(reached, "GET", "/", Host=name)[0] == 200
    for changed in ({"Host": "evil.example"}, {"Host": ""}, {"Host": "localhost", "Origin": "http://evil.example"},
                    {"Host": "localhost", "Origin": "localhost"}, {"Host": "127.0.0.1:81"}):
        assert request(reached, **changed)[0] == 403


def test_a_client_that_leaves_is_no_error(server, asker, monkeypatch, capfd):
    arrived, left = threading.Event(), threading.Event()
    answer = asker.ask

    def slow(question):
        arrived.set()
        assert left.wait(10)
        return answer(question)

    monkeypatch.setattr(asker, "ask", slow)
    body = b'{"question": "Who?"}'
    head = (f"POST /ask HTTP/1.1\r\nHost: localhost:{server.server_port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode()
    client = socket.create_connection(("127.0.0.1", server.server_port))
    client.sendall(head + body)
    assert arrived.wait(10)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets, as a closed tab may
    client.close()
    left.set()
    assert request(server)[0] == 200  # the next one is served
    assert capfd.readouterr().err == ""

    def broken(question):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(asker, "ask", broken)
    with pytest.raises(http.client.RemoteDisconnected):
        request(server)
    assert "a fault of ours" in capfd.readouterr().err  # which is not hidden


def test_lone_surrogates_and_broken_utf8_in_a_request(server, asker):
    assert request(server, body='{"question": "Who \\ud800 ?"}')[0] == 200
    assert "question : Who \N{REPLACEMENT CHARACTER} ?" in "".join(map(chr, asker.prompts[0]))
    assert request(server, body=b'{"question": "\xff"}')[0] == 400


def test_the_page_says_that_the_policy_does_not_know_the_database(server, asker):
    asker.note, asker.path = "not <known>", Path("@NOTE@ \udcff.sqlite")
    page = request(server, "GET", "/")[2]
    assert '<p class="error">not &lt;known&gt;</p>' in page and "<h1>Ask @NOTE@ ‹U+DCFF›.sqlite</h1>" in page


def test_questions_that_cannot_be_asked(server):
    answer = json.loads(request(server, body=json.dumps({"question": "é" * 3000}))[2])
    assert "longer than 2048 tokens" in answer["error"]


def browse(url, tmp_path):
    """The page after its scripts ran, in a headless Chromium; skips where there is none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
               f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_in_a_real_browser(server, asker, tmp_path):
    evil = "<img src=x onerror=\"document.title='hacked'\">"
    quoted = evil.replace("'", "''")
    asker.script = [(f"SELECT '{quoted}' AS \"<b>head</b>\", name FROM singer", -1.0)] * 3
    asker.script += [("SELECT 1", -1.0), ("SELECT oops", -1.0)]
    page = browse(f"http://127.0.0.1:{server.server_port}/#Who%20%3Cb%3E%3F", tmp_path)
    assert "".join(map(chr, asker.prompts[0])).endswith("question : Who <b> ?\nanswer :\n")
    cells = re.findall(r"<td.*?>(.*?)</td>", page)
    assert [html.unescape(cell) for cell in cells] == [evil, "Ana", evil, "Bo", evil, "Cy"]
    assert "<img" not in page and "<b>" not in page and "<title>Ask music.sqlite</title>" in page
    assert "3 of 5 candidates return this; 1 other result, 1 error" in page and "few agree" not in page
    assert "<summary>Reasoning</summary>" in page
    for hash, question in (("100%", "100%"), ("%E9", "%E9"), ("%20%", "%20%"), ("100%25", "100%")):
        page = browse(f"http://127.0.0.1:{server.server_port}/#{hash}", tmp_path)
        assert "3 of 5 candidates return this" in page, hash
        assert f"question : {question}\n" in "".join(map(chr, asker.prompts[-1]))
    asker.script = [("SELECT <oops>", -1.0)]
    page = browse(f"http://127.0.0.1:{server.server_port}/#again", tmp_path)
    assert 'class="error">No candidate runs; the likeliest of 1 gives error' in page


def test_serving_from_the_command_line(tiny_db):
    command = [sys.executable, "ask.py", *policy_flags(tiny_db), "--serve", 0]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # tests in the background
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])
        target = SimpleNamespace(server_port=port)
        answer = json.loads(request(target, body='{"question": "How many singers are there?"}')[2])
        assert answer["rows"] == [["3"]]
        with pytest.raises(UserError, match=f"cannot listen on port {port}"):
            serve(None, port)
    finally:
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        assert process.wait(timeout=20) == 130 and time.monotonic() - begun < 10
        process.stdout.close()
        process.stderr.close()
