"""Takes the pictures of README.md and docs/runs.md from a finished run, with a headless Chromium: docs/*.png

    python docs/screenshots.py runs/demo
"""

import argparse
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests")]

from chromium import CHROMIUM, Browser  # noqa: E402

import report  # noqa: E402
from common.errors import UserError, run_main  # noqa: E402

SCALE = 0.85  # so that a picture has the width of a README
MOST_BYTES = 150_000  # of a picture; a larger one loses some of its foot
SHOTS = {  # file: (width, height, what is scrolled to the top)
    "curves.png": (1130, 600, "#curves"),
    "inspector.png": (1090, 860, "#group"),
}


def telling_group(log: report.RolloutLog) -> str:
    """The address of a short group with token ratios whose first two completions are the gold SQL and a wrong one."""
    found = []
    for step in log.steps[-200:]:
        for number, group in enumerate(log.read(step), 1):
            pair = group["completions"][:2]
            shaded = all(one.get("ratios") and one["sql"] for one in pair) and pair[0]["correct"] != pair[1]["correct"]
            if shaded and group["gold_sqls"][0] in [one["sql"] for one in pair]:
                found.append((len(str([(one["text"], one["rows"]) for one in pair])), f"step={step}&question={number}"))
    return min(found, default=(0, ""))[1]


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description="Take the README's pictures of a run.")
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/demo")
    given = parser.parse_args()
    if CHROMIUM is None:
        raise UserError("no Chromium on this machine")
    page = report.write_report(given.run).resolve()
    fragment = telling_group(report.RolloutLog(given.run / "rollouts.jsonl"))
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(profile)
        for name, (width, height, top) in SHOTS.items():
            browser.resize(width, height, scale=SCALE)
            browser.open(page, f"#{fragment}")
            browser.evaluate("document.querySelector('.places').style.position = 'static'")  # else it covers the top
            browser.evaluate(f"document.querySelector({top!r}).scrollIntoView(); scrollBy(0, -12)")
            browser.screenshot(DOCS / name)
            while (DOCS / name).stat().st_size >= MOST_BYTES:
                height -= 10
                browser.resize(width, height, scale=SCALE)
                browser.screenshot(DOCS / name)
            print(f"{DOCS / name}  ({(DOCS / name).stat().st_size / 1000:.0f} kB)")
        complaints = browser.complaints()
        browser.close()
    if complaints:
        raise UserError(f"the page complains: {complaints[0]}")


if __name__ == "__main__":
    run_main(main)
