"""Writes a run as one page, runs/NAME/report.html: its curves, and every group with its completions.

    python report.py runs/demo      # also during a run; train.py does it at the end

The page is a single file that loads nothing from anywhere. From top to bottom:
  (1) settings, and held-out accuracy before and after where result.json has it;
  (2) curves of metrics.jsonl, as SVG that follows the reader's light or dark colours (running/plot.py);
  (3) the group inspector over rollouts.jsonl: question, schema and gold beside the completions, each with
      its rewards, advantage, SQL, result or error, the atomic operations it matched, missed or added, the
      nearest traces in memory, and in one group per step how much the update changed each token.

Rollouts of a long run are large, so each step is a compressed block that the page unpacks on demand. If all
steps would take more than PAGE_BYTES, the page contains evenly spaced steps and reports that.

Model output is untrusted. It is stored as compressed base64, so no text can end a script block; the page's
script inserts it by textContent only; unprintable characters (NUL, direction marks) are written out as
‹U+202E›; and a content security policy allows only the page's own style and script.
"""

import base64
import hashlib
import json
import math
import os
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError, run_main, visible
from common.options import Parser
from common.wording import duration, exact_text, html_text, percent, plural, short_number, signed
from data import read_schema, schema_columns
from history import training_questions
from prompts.builder import full_schema
from rewards import COMPONENTS, atomic_operations
from running.plot import Plot, nice_ticks, svg_points
from running.run_folder import RolloutLog, parse_record
from scoring.verdicts import of_the_same
from sql_exec import Gold, GoldAnswer, SQLExecutor

TEMPLATE = Path(__file__).parent / "running" / "report_template.html"
PAGE_BYTES = 18_000_000  # of rollouts in a page
PROBED_STEPS = 8         # steps packed to estimate how many fit
GOLD_SECONDS = 20.0      # for gold queries whose results the run has not cached
ROWS_SHOWN = 5           # per result
CELL_CHARS = 80          # per value in it
KEY_SETTINGS = ("model", "data", "split", "rewards", "loss", "group_size", "prompts_per_step", "lr",
                "kl_coef", "temperature", "seed")


def write_report(folder: Path) -> Path:
    """Writes folder/report.html from what the run has logged so far; a reader never sees half a page.

    Raises:
        UserError: the folder holds no finished step yet, or the page cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of a run")
    by_step = {record["step"]: record for record in read_records(folder / "metrics.jsonl")}
    if not by_step:
        raise UserError(f"{folder} has no metrics.jsonl with a finished step, so nothing to report yet")
    metrics = [by_step[step] for step in sorted(by_step)]
    config, result = read_object(folder / "config.json"), read_object(folder / "result.json")
    with RunDatabases(config, folder) as databases:
        blocks, note = pack_rollouts(RolloutLog(folder / "rollouts.jsonl"), databases)
    blocks["metrics"] = pack({"step": column(metrics, "step")} | {
        curve.key: curve.values for chart in CHARTS for curve in curves_of(chart, metrics)})
    page = fill_template({
        "title": html_text(folder.resolve().name),
        "tiles": tiles(config, metrics, result),
        "settings": settings_list(config),
        "result": result_tables(result, str(config.get("match", "bird"))),
        "charts": charts(metrics),
        "note": html_text(note),
        "blocks": "\n".join(f'<script type="application/octet-stream" id="{name}">{data}</script>'
                            for name, data in blocks.items()),
    })
    scratch = folder / ".new-report.html"
    try:
        scratch.write_text(page, encoding="utf-8")
        os.replace(scratch, folder / "report.html")
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}") from error
    return folder / "report.html"


# --------------------------------------------------------------------------------------------- reading a run

def read_object(file: Path) -> dict:
    """The JSON object of a file; empty if the file is absent or broken, because the rest can still be shown."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_records(file: Path) -> Iterator[dict]:
    """The records of a .jsonl log; a line that a running trainer has half written is skipped."""
    if file.is_file():
        with open(file, "rb") as lines:
            yield from filter(None, map(parse_record, lines))


class RunDatabases:
    """The run's databases, as far as they can still be read: schemas, and results of gold queries."""

    def __init__(self, config: dict, folder: Path):
        self.files = find_databases(config)
        self.executor = SQLExecutor(self.files, workers=config.get("sql_workers", 1),
                                    timeout=config.get("sql_timeout", 5.0), cache=folder / "gold_cache")
        self.seconds_left = GOLD_SECONDS
        self._schemas: dict[str, tuple[str, dict]] = {}
        self._operations: dict[tuple[str, str], frozenset[str]] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.executor.close()

    def schema(self, db_id: str) -> tuple[str, dict]:
        """CREATE TABLE statements, and {table: [column, ...]}; empty if the database is gone."""
        if db_id not in self._schemas:
            try:
                schema = read_schema(self.files[db_id])
                self._schemas[db_id] = full_schema(schema, 3), schema_columns(schema)
            except (KeyError, UserError):
                self._schemas[db_id] = "", {}
        return self._schemas[db_id]

    def operations(self, db_id: str, sql: str) -> frozenset[str]:
        """The atomic operations of a query; groups repeat queries, so each is parsed once."""
        if (db_id, sql) not in self._operations:
            self._operations[db_id, sql] = atomic_operations(sql, self.schema(db_id)[1] or None)
        return self._operations[db_id, sql]

    def gold_results(self, groups: list[dict]) -> list[dict | None]:
        """The result of each group's first gold: status, columns, first rows, number of rows, error."""
        if self.seconds_left <= 0 or not self.files:
            return [None] * len(groups)
        start = time.perf_counter()
        golds = self.executor.run_gold([(group.get("db_id", ""), first_gold(group)) for group in groups])
        self.seconds_left -= time.perf_counter() - start
        results = [{"status": gold.status, "columns": gold.columns, "rows": preview(gold.rows),
                    "count": len(gold.rows), "error": gold.error} for gold in golds]
        return [result if group.get("db_id") in self.files else None
                for group, result in zip(groups, results, strict=True)]


def find_databases(config: dict) -> dict[str, Path]:
    """{db_id: file} of the run's training data; empty if the data have been moved."""
    try:
        return training_questions(config).databases
    except (UserError, OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def preview(rows: list) -> list:
    """The first rows of a result. A cell is a text (cut if it is long), a number as a list of its digits, or None.

    JavaScript cannot represent 2^53 + 1, nor JSON infinity, so numbers are stored as texts.
    """
    return [[shown(cell) for cell in row] for row in rows[:ROWS_SHOWN]]


def shown(cell):
    """A cell in the form of `preview`."""
    if isinstance(cell, int | float):
        return [exact_text(cell)]
    text = None if cell is None else exact_text(cell)
    return text[:CELL_CHARS] + "…" if text and len(text) > CELL_CHARS else text


def first_gold(group: dict) -> Gold:
    """The official gold SQL of a group, or the answer that is known instead."""
    if group.get("answer") is not None:
        return GoldAnswer(tuple(map(tuple, group["answer"])))
    return next(iter(group.get("gold_sqls") or []), "")


# ------------------------------------------------------------------------------------- the inspector's blocks

def pack_rollouts(log: RolloutLog, databases: RunDatabases) -> tuple[dict[str, str], str]:
    """Blocks "step-N" of the steps shown, "index" and "schemas", and a note on what was left out."""
    steps = choose_steps(log, databases)
    index = {"steps": [], "groups": [], "tiers": [], "scales": {}}
    blocks, db_ids = {}, set()
    for step in steps:
        groups = step_view(log.read(step), databases)
        if groups:
            blocks[f"step-{step}"] = pack(groups)
            db_ids |= {group["db_id"] for group in groups}
            add_to_index(index, step, groups)
    # A component that is always 0 is switched off and gets no bar.
    index["scales"] = {name: value for name, value in index["scales"].items() if value}
    blocks["index"] = pack(index)
    blocks["schemas"] = pack({db_id: databases.schema(db_id)[0] for db_id in sorted(db_ids)})
    note = ""
    if len(steps) < len(log.steps):
        note = (f"{len(steps)} of the {len(log.steps)} logged steps are in this page, evenly spaced, to keep "
                "it small; rollouts.jsonl has them all.")
    return blocks, note


def choose_steps(log: RolloutLog, databases: RunDatabases) -> list[int]:
    """All steps if they fit into PAGE_BYTES, else as many as do, evenly spaced, and the last."""
    probes = evenly(log.steps, PROBED_STEPS)
    total = sum(len(pack(step_view(log.read(step), databases))) for step in probes)
    fitting = PAGE_BYTES * len(probes) // max(total, 1)
    return sorted({*evenly(log.steps, max(fitting, 1)), *log.steps[-1:]})


def evenly(items: list, count: int) -> list:
    """At most `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def step_view(groups: list[dict], databases: RunDatabases) -> list[dict]:
    """The groups of a step as the page shows them."""
    golds = databases.gold_results(groups)
    return [{"id": group.get("id"), "db_id": group.get("db_id", ""), "question": group.get("question"),
             "evidence": group.get("evidence"), "difficulty": group.get("difficulty") or "",
             "gold_sqls": group.get("gold_sqls") or [], "gold": gold,
             "completions": [completion_view(one, group, databases) for one in group["completions"]]}
            for group, gold in zip(groups, golds, strict=True) if group.get("completions")]


def completion_view(completion: dict, group: dict, databases: RunDatabases) -> dict:
    """A completion with its atomic operations matched, missed and extra; its text only if unparsed."""
    view = dict(completion)
    if completion.get("sql"):
        view.pop("text", None)  # thought and SQL contain all of it
    if completion.get("sql") and group.get("answer") is None:
        view |= compare_operations(completion["sql"], group, databases)
    if view.get("rows"):
        view["rows"] = preview(view["rows"])
    if "row_count" in view:
        view["count"] = view.pop("row_count")
    return view


def compare_operations(sql: str, group: dict, databases: RunDatabases) -> dict[str, list[str]]:
    """The operations that the query shares with the nearest gold, lacks and adds."""
    db_id = group.get("db_id", "")
    found = databases.operations(db_id, sql)
    golds = [databases.operations(db_id, gold) for gold in group.get("gold_sqls") or [""]]
    gold = max(golds, key=lambda gold: len(found & gold) / max(len(found | gold), 1))
    return {"matched": sorted(found & gold), "missed": sorted(gold - found), "extra": sorted(found - gold)}


def add_to_index(index: dict, step: int, groups: list[dict]) -> None:
    """Adds what the filters need per group, [right, completions, flat, tier, has ratios], and the reward scales."""
    rows = []
    for group in groups:
        completions, tier = group["completions"], group["difficulty"]
        if tier not in index["tiers"]:
            index["tiers"].append(tier)
        rewards = [completion.get("rewards", {}) for completion in completions]
        for name, value in (item for reward in rewards for item in reward.items()):
            index["scales"][name] = max(abs(value), index["scales"].get(name, 0))
        sampled = [completion for completion in completions if not completion.get("from_trace")]
        rows.append([sum(bool(completion.get("correct")) for completion in sampled), len(sampled),
                     all(completion.get("advantage") == 0 for completion in completions), index["tiers"].index(tier),
                     any(completion.get("ratios") for completion in completions)])
    index["steps"].append(step)
    index["groups"].append(rows)


def pack(value) -> str:
    """A value as compressed, base64-coded JSON."""
    text = json.dumps(presentable(value), separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii")


def presentable(value):
    """The value with `visible` texts, 4-digit numbers, and None for what JSON cannot represent."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {visible(str(key)): presentable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [presentable(item) for item in value]
    return value


# ----------------------------------------------------------------------------------------------- the page

def fill_template(contents: dict[str, str]) -> str:
    """The template with {{name}} replaced, and a security policy that allows exactly its own style and script."""
    template = TEMPLATE.read_text(encoding="utf-8")

    def digest(tag):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"

    policy = (f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; "
              "base-uri 'none'; form-action 'none'")
    return re.sub(r"\{\{(\w+)\}\}", lambda name: (contents | {"policy": policy})[name[1]], template)


def tiles(config: dict, metrics: list[dict], result: dict) -> str:
    """The few numbers a reader wants first."""
    match, shown = str(config.get("match", "bird")), []
    for name, after in result.get("after", {}).items():
        old, new = accuracy(result.get("before", {}).get(name), match), accuracy(after, match)
        if of_the_same(result.get("before", {}).get(name), after):
            shown.append((f"held-out accuracy, {name}", f"{percent(old)} → {percent(new)} %",
                          f"{signed(100 * (new - old))} points on {after['n']} questions"))
    tenth = max(1, len(metrics) // 10)
    right = column(metrics, "execution_accuracy")
    if (first := mean_of_known(right[:tenth])) is not None and (last := mean_of_known(right[-tenth:])) is not None:
        shown.append(("samples that are right", f"{percent(first)} → {percent(last)} %",
                      f"first and last {plural(tenth, 'step')}"))
    steps, planned = metrics[-1]["step"], config.get("steps")
    state = "finished" if steps == planned else f"of {planned} planned" if planned else ""
    shown.append(("steps", str(steps), state))
    phases = matching("seconds/*", metrics)
    seconds = sum(filter(None, (value for key in phases for value in column(metrics, key))))
    shown.append(("time in steps", duration(seconds), f"{seconds / len(metrics):.2f} s a step"))
    return "".join(f'<div class="tile"><dt>{html_text(label)}</dt><dd>{html_text(value)}'
                   f"<small>{html_text(more)}</small></dd></div>" for label, value, more in shown)


def settings_list(config: dict) -> str:
    """The key settings in a line, all of them in a fold-out below."""
    def pairs(names):
        return "".join(f"<div><dt>{html_text(name)}</dt><dd>{html_text(config[name])}</dd></div>" for name in names)

    if not config:
        return "<p>There is no readable config.json.</p>"
    others = ("cwd", "began_with", "questions", "data_hash")  # not settings
    config = {name: value for name, value in config.items() if name not in others}
    return (f'<dl class="settings">{pairs([name for name in KEY_SETTINGS if name in config])}</dl>'
            f"<details><summary>All {len(config)} settings</summary>"
            f'<dl class="settings all">{pairs(sorted(config))}</dl></details>')


def result_tables(result: dict, match: str) -> str:
    """Held-out accuracy before and after, a table per comparison; the run's own comparison is open."""
    after = result.get("after", {})
    matches = sorted({name for summary in after.values() for name in summary.get("execution_accuracy", {})},
                     key=lambda name: name != match)
    tables = [f"<details{' open' if name == match else ''}><summary>Held-out execution accuracy by the "
              f"{html_text(name)} comparison</summary>{result_table(result, name)}</details>"
              for name in matches]
    return f'<section aria-label="Held-out accuracy">{"".join(tables)}</section>' if tables else ""


def result_table(result: dict, match: str) -> str:
    """A line for each question set and each of its tiers."""
    lines = []
    for name, after in result["after"].items():
        before = result.get("before", {}).get(name, {})
        tiers, old_tiers = after.get("by_difficulty", {}), before.get("by_difficulty", {})
        for tier in tiers if len(tiers) > 1 else ():
            lines.append(result_line(f"{name}: {tier}", "tier", old_tiers.get(tier), tiers[tier], match))
        lines.append(result_line(f"{name}: all", "total", before, after, match))
        if match in after.get("interval_over_databases", {}):
            bounds = [part.get("interval_over_databases", {}).get(match) for part in (before, after)]
            cells = "".join(f"<td>{bounds_cell(pair) if pair else '–'}</td>" for pair in bounds)
            lines.append(f'<tr class="tier"><th scope="row">over {after["databases"]} databases</th><td></td>{cells}'
                         '<td></td><td class="wide"></td></tr>')
    headings = "".join(f'<th scope="col">{text}</th>'
                       for text in ("questions", "n", "before, %", "after, %", "gain"))
    return (f'<div class="scroll"><table class="result"><thead><tr>{headings}'
            '<th scope="col" class="wide">0 to 100 %, with 95 % intervals</th></tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>")


def result_line(label: str, kind: str, before: dict | None, after: dict, match: str) -> str:
    """One line of the table; its picture has a hollow dot for before and a solid one for after."""
    gain = signed(100 * (accuracy(after, match) - accuracy(before, match))) if of_the_same(before, after) else "–"
    cells = [after["n"], interval_cell(before, match), interval_cell(after, match), gain]
    return (f'<tr class="{kind}"><th scope="row">{html_text(label)}</th>'
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}"
            f'<td class="wide">{dumbbell(before, after, match)}</td></tr>')


def interval_cell(summary: dict | None, match: str) -> str:
    """`41.2 [38.0, 44.5]`"""
    if not math.isfinite(accuracy(summary, match)):
        return "–"
    return f"<b>{percent(accuracy(summary, match))}</b> {bounds_cell(summary['interval'][match])}"


def bounds_cell(interval: Sequence[float]) -> str:
    """`[38.0, 44.5]`"""
    low, high = interval
    return f"<small>[{percent(low)}, {percent(high)}]</small>"


def dumbbell(before: dict | None, after: dict, match: str) -> str:
    """A small picture of two accuracies with their intervals."""
    marks = []
    for summary, y, name in ((before, 5, "before"), (after, 13, "after")):
        if math.isfinite(accuracy(summary, match)):
            low, high = summary["interval"][match]
            left, middle, right = (4 + 192 * share for share in (low, accuracy(summary, match), high))
            marks.append(f'<line class="{name}" x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>'
                         f'<circle class="{name}" cx="{middle:.1f}" cy="{y}" r="3"/>')
    return ('<svg class="dumbbell" viewBox="0 0 200 18" aria-hidden="true">'
            f'<line class="axis" x1="4" x2="196" y1="9" y2="9"/>{"".join(marks)}</svg>')


def accuracy(summary: dict | None, match: str) -> float:
    """Execution accuracy of a summary; NaN if there is none, or if it is null because no database could be read."""
    value = (summary or {}).get("execution_accuracy", {}).get(match)
    return math.nan if value is None else value


# ----------------------------------------------------------------------------------------------- curves

@dataclass(frozen=True)
class Chart:
    """A plot of some keys of metrics.jsonl; "status/*" stands for all keys with that prefix."""
    title: str
    keys: tuple[str, ...]
    labels: tuple[str, ...] = ()
    share: bool = False           # values are shares, shown in per cent
    stacked: bool = False         # parts of a whole: a part missing from a step is 0 there
    known: tuple[str, ...] = ()   # what * stands for; each name has the same colour in every run


@dataclass(frozen=True)
class Curve:
    """One key of a chart: its label, its colour, and a value per step, None if there is none."""
    key: str
    label: str
    colour: int
    values: list[float | None]

    @property
    def style(self) -> str:
        """The CSS class that sets its colour."""
        return f"s{self.colour % COLOUR_CLASSES}"


COLOUR_CLASSES = 8  # of the template: classes s0 to s7
SQL_FATES = ("ok", "error", "format", "timeout", "refused", "too_large", "unavailable")
CHARTS = (
    Chart("Reward", ("reward", "reward_std"), ("mean", "spread within a group")),
    Chart("Reward components", ("reward/*",), known=COMPONENTS),
    Chart("Execution accuracy", ("execution_accuracy", "dev_accuracy", "dev_samples", "dev_pass_at_n"),
          ("samples", "dev, greedy", "dev, samples", "dev, one of the samples"), share=True),
    Chart("Joined tables", ("dev_joins",), ("per greedy answer to dev",)),
    Chart("Uniform groups", ("flat_groups", "all_wrong_groups", "all_right_groups"),
          ("flat: no gradient", "all wrong", "all right"), share=True),
    Chart("What became of the SQL", ("status/*",), share=True, stacked=True, known=SQL_FATES),
    Chart("KL to the reference", ("kl",), ("nats a token",)),
    Chart("Entropy", ("entropy",), ("nats a token",)),
    Chart("Clip fractions", ("clip_fraction_low", "clip_fraction_high"), ("low", "high"), share=True),
    Chart("Completion length", ("completion_length", "completion_length_max"), ("mean", "longest")),
    Chart("Truncated completions", ("truncated",), ("truncated",), share=True),
    Chart("Second tries", ("second_tries",), ("of completions",), share=True),
    Chart("Seconds by phase", ("seconds/*",), stacked=True, known=("rollout", "rewards", "reference", "update")),
    Chart("Seconds by reward", ("seconds/rewards/*",), stacked=True, known=COMPONENTS),
    Chart("Speed", ("tokens_per_second",), ("tokens a second",)),
    Chart("Gradient norm", ("grad_norm",), ("before clipping",)),
    Chart("Learning rate", ("lr",), ("learning rate",)),
    Chart("Off-policy drift", ("approx_kl", "sampler_gap"), ("KL to the old policy", "sampler gap")),
    Chart("Memory of traces", ("memory_size",), ("traces",)),
)
WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 42, 350, 8, 158  # the plot inside it
MAX_POINTS = RIGHT - LEFT                   # a longer run is averaged to a point per pixel


def curves_of(chart: Chart, metrics: list[dict]) -> list[Curve]:
    """The logged curves of a chart, in the order of the colours; a key that is always 0 is left out."""
    curves = []
    for colour, (key, label) in enumerate(labels_of(chart, metrics).items()):
        values = column(metrics, key)
        if any(values):
            curves.append(Curve(key, label, colour, [value or 0.0 for value in values] if chart.stacked else values))
    return curves


def labels_of(chart: Chart, metrics: list[dict]) -> dict[str, str]:
    """{key: label} of a chart, in the order of the colours; unknown names come last."""
    if chart.labels:
        return dict(zip(chart.keys, chart.labels, strict=True))
    prefix = chart.keys[0].removesuffix("*")
    unknown = {key.removeprefix(prefix) for key in matching(chart.keys[0], metrics)} - set(chart.known)
    return {prefix + name: name for name in (*chart.known, *sorted(unknown))}


def matching(pattern: str, metrics: list[dict]) -> list[str]:
    """The keys that match a pattern, in the order they were logged; "a/*" does not match "a/b/c"."""
    if not pattern.endswith("*"):
        return [pattern]
    keys = {key: None for record in metrics for key in record}
    return [key for key in keys if key.startswith(pattern[:-1]) and "/" not in key[len(pattern) - 1:]]


def charts(metrics: list[dict]) -> str:
    """All charts with logged values, and a sentence on those that stayed at zero."""
    shown, silent = [], []
    for chart in CHARTS:
        curves = curves_of(chart, metrics)
        if curves:
            shown.append(figure(chart, curves, metrics))
        elif any(key in record for record in metrics for key in chart.keys):
            silent.append(chart.title.lower())
    note = f"<p>At zero in every step: {html_text(', '.join(silent))}.</p>" if silent else ""
    return f'<div class="charts">{"".join(shown)}</div>{note}'


def figure(chart: Chart, curves: list[Curve], metrics: list[dict]) -> str:
    """A chart with title and legend; the page's script adds the values under the cursor to the legend."""
    first, last = metrics[0]["step"], metrics[-1]["step"]
    legend = "".join(f'<li class="{curve.style}"><i></i>{html_text(curve.label)} '
                     f'<output data-key="{html_text(curve.key)}"></output></li>' for curve in curves)
    ends = [(curve.label, [value for value in curve.values if value is not None]) for curve in curves]
    spoken = "; ".join(f"{label} from {short_number(values[0], chart.share)} to {short_number(values[-1], chart.share)}"
                       for label, values in ends)
    steps, curves = downsample([record["step"] for record in metrics], curves)
    draw = stacked_areas if chart.stacked else line_plot
    return (f'<figure tabindex="0" data-share="{int(chart.share)}">'
            f'<figcaption>{html_text(chart.title)}</figcaption><ul class="legend">{legend}</ul>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-first="{first}" data-last="{last}" '
            f'data-left="{LEFT}" data-right="{RIGHT}" '
            f'aria-label="{html_text(f"{chart.title}, steps {first} to {last}: {spoken}")}">'
            f'{draw(steps, curves, chart.share)}'
            f'<line class="guide" y1="{TOP}" y2="{BOTTOM}" x1="-9" x2="-9"/></svg></figure>')


def plot_of(steps: Sequence[int], low: float, high: float) -> Plot:
    """A plot over these steps."""
    return Plot(LEFT, RIGHT, TOP, BOTTOM, (steps[0], steps[-1]), (low, high), label_drop=3.5, label_below=15)


def line_plot(steps: Sequence[int], curves: list[Curve], share: bool) -> str:
    """Per curve, the values as a faint line and their running mean as a strong one; sparse values as joined dots."""
    known = [value for curve in curves for value in curve.values if value is not None]
    plot = plot_of(steps, min(0.0, *known), max(known))
    drawn = [axes(plot, steps, share)]
    for curve in curves:
        points = plot.points(steps, curve.values)
        window = len(steps) // 40
        if len(points) < len(steps) / 2 or len(points) == 1:
            dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in points)
            drawn.append(f'<g class="{curve.style}"><polyline class="line" points="{svg_points(points)}"/>{dots}</g>')
        else:
            faint = f'<polyline class="faint" points="{svg_points(points)}"/>' if window > 1 else ""
            strong = svg_points(plot.points(steps, running_mean(curve.values, window)))
            drawn.append(f'<g class="{curve.style}">{faint}<polyline class="line" points="{strong}"/></g>')
    return "".join(drawn)


def stacked_areas(steps: Sequence[int], curves: list[Curve], share: bool) -> str:
    """Areas on top of each other, lightly smoothed."""
    window = len(steps) // 40
    layers = [running_mean(curve.values, window) for curve in curves]
    plot = plot_of(steps, 0.0, 1.0 if share else max(sum(values) for values in zip(*layers, strict=True)))
    floor, drawn = [0.0] * len(steps), []
    for curve, layer in zip(curves, layers, strict=True):
        ceiling = [low + value for low, value in zip(floor, layer, strict=True)]
        outline = plot.points(steps, ceiling) + plot.points(steps, floor)[::-1]
        if len(steps) == 1:  # one step is a bar, not a line without width
            outline = [(x, outline[i][1]) for i, x in ((0, LEFT), (0, RIGHT), (1, RIGHT), (1, LEFT))]
        drawn.append(f'<g class="{curve.style}"><polygon class="area" points="{svg_points(outline)}"/></g>')
        floor = ceiling
    return "".join(drawn) + axes(plot, steps, share)


def axes(plot: Plot, steps: Sequence[int], share: bool) -> str:
    """Grid lines with their values, and step numbers below."""
    drawn = [plot.grid_line(value, short_number(value, share), 'class="grid"')
             for value in nice_ticks(*plot.y_range, 4)]
    for step in sorted({steps[0], *map(int, nice_ticks(steps[0], steps[-1], 4)), steps[-1]}):
        near = min((abs(step - end) for end in (steps[0], steps[-1]) if step != end), default=0)
        if step in (steps[0], steps[-1]) or near > (steps[-1] - steps[0]) / 12:
            drawn.append(plot.x_label(step, "middle" if step != steps[-1] or len(steps) == 1 else "end"))
    return "".join(drawn)


def downsample(steps: list[int], curves: list[Curve]) -> tuple[list[int], list[Curve]]:
    """Averages a run with more steps than the plot has pixels over equal stretches."""
    size = math.ceil(len(steps) / MAX_POINTS)
    if size <= 1:
        return steps, curves
    starts = range(0, len(steps), size)
    middles = [steps[min(start + size // 2, len(steps) - 1)] for start in starts]
    return ([steps[0], *middles[1:-1], steps[-1]],  # the ends of the axis stay where they are
            [replace(curve, values=[mean_of_known(curve.values[start:start + size]) for start in starts])
             for curve in curves])


def running_mean(values: Sequence, window: int) -> list:
    """The mean of each value with up to `window` neighbours on both sides; None stays None."""
    return [None if value is None else mean_of_known(values[max(0, i - window):i + window + 1])
            for i, value in enumerate(values)]


# ------------------------------------------------------------------------------------------- logged numbers

def column(metrics: list[dict], key: str) -> list[float | None]:
    """The values of a key, one per step; None if it is absent or not finite."""
    return [finite(record.get(key)) for record in metrics]


def finite(value) -> float | None:
    """The value if it is a finite number, else None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def mean_of_known(values: Sequence) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


# ------------------------------------------------------------------------------------------------ main

def main() -> None:
    """Write the report of the run in a folder."""
    parser = Parser(description="Write a run's report.html.")
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/demo")
    path = write_report(parser.parse_args().run)
    print(f"{path}  ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_main(main)
