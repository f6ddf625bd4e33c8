"""The page of `ask.py --serve`: type a question, see the SQL, the rows and the vote.

A standard-library server for one user on one machine. It listens only on 127.0.0.1. A foreign web page cannot use it:
requests must name this host (which prevents DNS rebinding), questions must be JSON from the page itself, and the page
shows every value as text, never as HTML.
"""

import json
import re
import secrets
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from common.errors import UserError
from common.wording import html_text

LARGEST_REQUEST = 20_000  # bytes

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Ask @NAME@</title>
<style nonce="@NONCE@">
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
form { display: flex; gap: .5rem } input { flex: 1; font: inherit; padding: .5rem } button { font: inherit }
pre { background: #f4f4f4; padding: .8rem; white-space: pre-wrap } td.null, .quiet { color: #777 }
table { border-collapse: collapse }
td, th { border-bottom: 1px solid #ddd; padding: .2rem .8rem; text-align: left }
.scroll { overflow-x: auto } .error { color: #a00 }
</style></head><body>
<h1>Ask @NAME@</h1>
@NOTE@
<form id="form"><input id="question" aria-label="question" placeholder="Your question" autofocus
maxlength="2000"><button>Ask</button></form>
<main id="reply" aria-live="polite"></main>
<script nonce="@NONCE@">
const reply = document.getElementById("reply"), field = document.getElementById("question");
function add(parent, tag, text, style) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;  // as text: nothing in a cell is ever HTML
  if (style) element.className = style;
  return parent.appendChild(element);
}
function show(answer) {
  reply.replaceChildren();
  if (answer.error) add(reply, "p", answer.error, "error");
  if (answer.first_try) {
    const box = add(reply, "details");
    add(box, "summary", "First try");
    add(box, "pre", answer.first_try);
    add(box, "p", answer.observation);
  }
  if (answer.thought) {
    const box = add(reply, "details");
    add(box, "summary", "Reasoning");
    add(box, "p", answer.thought);
  }
  if (answer.sql) add(reply, "pre", answer.sql);
  if (answer.columns) {
    const table = add(add(reply, "div", undefined, "scroll"), "table"), head = add(table, "tr");
    answer.columns.forEach(name => add(head, "th", name));
    answer.rows.forEach(row => {
      const line = add(table, "tr");
      row.forEach(cell => cell === null ? add(line, "td", "NULL", "null") : add(line, "td", cell));
    });
    add(reply, "p", answer.count, "quiet");
  }
  if (answer.verdict) add(reply, "p", answer.verdict, "verdict");
  if (answer.votes && answer.votes.length > 1) {
    const list = add(reply, "ul", undefined, "quiet");
    answer.votes.forEach(vote => add(list, "li", vote));
  }
}
async function ask() {
  show({verdict: "Thinking ..."});
  try {
    const response = await fetch("/ask", {method: "POST", headers: {"Content-Type": "application/json"},
                                          body: JSON.stringify({question: field.value})});
    show(await response.json());
  } catch (error) { show({error: "No answer: " + error.message}); }
}
document.getElementById("form").addEventListener("submit", event => { event.preventDefault(); ask(); });
function questionOf(hash) {
  try { return decodeURIComponent(hash); } catch { return hash; }  // "100%" is no valid escape, but a question
}
if (location.hash.length > 1) { field.value = questionOf(location.hash.slice(1)); ask(); }
</script></body></html>
"""


def serve(asker, port: int) -> None:
    """Answers questions until Ctrl-C. `asker` is an `ask.Asker`."""
    try:
        server = Server(asker, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on port {port}: {reason}") from error
    with server:
        print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C stops)", flush=True)
        server.serve_forever()


class Server(ThreadingHTTPServer):
    """Serves one Asker on 127.0.0.1, one question at a time; port 0 means any free port."""

    daemon_threads = True

    def __init__(self, asker, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.asker, self.lock = asker, threading.Lock()

    @property
    def names(self) -> list[str]:
        """The hosts by which a browser addresses this server; a browser omits port 80."""
        ends = [f":{self.server_port}", *([""] if self.server_port == 80 else [])]
        return [host + end for host in ("127.0.0.1", "localhost") for end in ends]

    def handle_error(self, request, client_address) -> None:
        """Ignores a client that leaves before its answer; shows every other error with its traceback."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, POST /ask takes {"question": ...}; everything else is refused."""

    timeout = 30  # seconds for a request to arrive
    server_version, sys_version = "ask", ""

    def do_GET(self) -> None:
        """The page."""
        if not self.is_ours():
            return
        if self.path.partition("?")[0] != "/":
            self.send(404, "text/plain", "not found")
            return
        nonce = secrets.token_urlsafe(16)
        asker = self.server.asker
        note = f'<p class="error">{html_text(asker.note)}</p>' if asker.note else ""
        values = {"NONCE": nonce, "NAME": html_text(asker.path.name), "NOTE": note}
        page = re.sub("@(NONCE|NAME|NOTE)@", lambda name: values[name[1]], PAGE)  # one pass: a name may contain @NOTE@
        self.send(200, "text/html", page, nonce)

    def do_POST(self) -> None:
        """A question; the answer is JSON."""
        if not self.is_ours():
            return
        question, problem = self.question()
        if problem:
            self.send(400, "application/json", json.dumps({"error": problem}))
            return
        try:
            with self.server.lock:  # one model, one question at a time
                content = self.server.asker.ask(question).as_json()
        except UserError as error:
            content = {"error": str(error)}
        self.send(200, "application/json", json.dumps(content))

    def is_ours(self) -> bool:
        """Whether a request addresses this machine and comes from no other origin; refuses it if not."""
        host, origin = self.headers.get("Host", "").lower(), self.headers.get("Origin")
        if host in self.server.names and (origin is None or origin in [f"http://{name}" for name in self.server.names]):
            return True
        self.send(403, "text/plain", "this server answers only its own machine")
        return False

    def question(self) -> tuple[str, str]:
        """The question, or what is wrong with the request."""
        length = self.headers.get("Content-Length", "")
        if self.path != "/ask" or self.headers.get_content_type() != "application/json":
            return "", "send JSON to /ask"
        if not length.isdecimal() or int(length) > LARGEST_REQUEST:
            return "", f"a request has a length, of at most {LARGEST_REQUEST} bytes"
        try:
            content = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return "", "this is not JSON"
        question = content.get("question") if isinstance(content, dict) else None
        if not isinstance(question, str) or not question.strip():
            return "", "the question is empty"
        return question, ""

    def send(self, status: int, kind: str, text: str, nonce: str = "") -> None:
        """Sends a response that no other page can frame, sniff or run scripts in."""
        body = text.encode()
        policy = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        if nonce:
            policy += f"; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)),
                   "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff",
                   "Referrer-Policy": "no-referrer", "Cache-Control": "no-store", "Connection": "close"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Requests are not logged."""
