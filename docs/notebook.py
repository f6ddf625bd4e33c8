"""Makes walkthrough.ipynb from walkthrough.md: text becomes Markdown cells, examples become code cells with outputs.

    python docs/readme.py

The outputs are those that the page shows. The tests run the cells and compare.
"""

import ast
import doctest
import json
import re
from pathlib import Path

PAGE = Path(__file__).resolve().with_name("walkthrough.md")
NOTEBOOK = PAGE.with_suffix(".ipynb")
SETUP = '''# Generated from walkthrough.md by docs/readme.py: change the page, not this file.
import sys

sys.path.insert(0, "..")  # grpo.py is one folder up
'''


def notebook(page: str) -> str:
    """A page as a Jupyter notebook (nbformat 4.4, JSON)."""
    parts = re.split(r"^```python\n(.*?)^```\n", page, flags=re.DOTALL | re.MULTILINE)  # text, code, text, …
    cells = [cell for n, part in enumerate(parts) for cell in (code_cells(part) if n % 2 else markdown_cells(part))]
    cells.insert(1, code_cell(SETUP))
    for number, cell in enumerate((cell for cell in cells if cell["cell_type"] == "code"), 1):
        for counted in (cell, *cell["outputs"]):
            if "execution_count" in counted:
                counted["execution_count"] = number
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
               "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def markdown_cells(text: str) -> list[dict]:
    """Text as cells, one per section, so that a reader can fold them."""
    sections = filter(str.strip, re.split(r"^(?=## )", text, flags=re.MULTILINE))
    return [{"cell_type": "markdown", "metadata": {}, "source": lines(section)} for section in sections]


def code_cells(block: str) -> list[dict]:
    """Examples as cells, each of which ends where there is an output, because a cell shows its last value only."""
    cells, source = [], ""
    for example in doctest.DocTestParser().get_examples(block):
        source += example.source
        if example.want:
            cells.append(code_cell(source, output(example)))
            source = ""
    return [*cells, code_cell(source)] if source else cells


def code_cell(source: str, *outputs: dict) -> dict:
    """A code cell that has run."""
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": list(outputs),
            "source": lines(source)}


def output(example: doctest.Example) -> dict:
    """What an example prints, or the value of its expression."""
    if isinstance(ast.parse(example.source).body[0], ast.Expr) and not example.source.startswith("print("):
        return {"data": {"text/plain": lines(example.want)}, "execution_count": None, "metadata": {},
                "output_type": "execute_result"}
    return {"name": "stdout", "output_type": "stream", "text": example.want.splitlines(keepends=True)}


def lines(text: str) -> list[str]:
    """Text as notebooks store it: a list of lines, without blank ones at its ends."""
    return text.strip("\n").splitlines(keepends=True)


def write() -> None:
    """Brings walkthrough.ipynb up to date."""
    NOTEBOOK.write_text(notebook(PAGE.read_text()))
