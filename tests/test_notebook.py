"""docs/walkthrough.ipynb is the walkthrough, and its cells give what they show. Jupyter is not needed."""

import ast
import contextlib
import io
import json
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
sys.path.insert(0, str(DOCS))
import notebook  # noqa: E402

PAGE = notebook.PAGE.read_text()
CELLS = json.loads(notebook.NOTEBOOK.read_text())["cells"]


def test_the_notebook_is_up_to_date():
    assert notebook.NOTEBOOK.read_text() == notebook.notebook(PAGE), "run: python docs/readme.py"


def test_all_that_the_page_says_and_shows_is_in_the_notebook():
    shown = [line.removeprefix(">>> ").removeprefix("... ") for line in PAGE.splitlines()
             if line.strip() and not line.startswith("```")]
    cells = [[*cell["source"], *(line for output in cell.get("outputs", ())
                                 for line in output.get("text") or output["data"]["text/plain"])] for cell in CELLS]
    del cells[1]  # the setup
    assert [line.rstrip("\n") for cell in cells for line in cell if line.strip()] == shown


def run(source, namespace):
    """Runs a cell as Jupyter does. -> (what it prints, repr of its last expression or '')"""
    *body, last = ast.parse(source).body
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if not isinstance(last, ast.Expr):
            body.append(last)
        exec(compile(ast.Module(body, []), "cell", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
    return printed.getvalue(), "" if value is None else repr(value)


def test_the_cells_run_from_top_to_bottom_and_give_what_they_show(monkeypatch):
    monkeypatch.chdir(DOCS)  # where Jupyter starts them
    monkeypatch.setattr(sys, "path", sys.path[:])
    namespace, cells = {}, [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(cells) >= 12
    for cell in cells:
        shown = {"stream": "", "execute_result": ""}
        for output in cell["outputs"]:
            shown[output["output_type"]] += "".join(output.get("text") or output["data"]["text/plain"])
        assert run("".join(cell["source"]), namespace) == tuple(shown.values()), "".join(cell["source"])


def test_a_cell_ends_at_each_output():
    cells = notebook.code_cells(">>> x = 1\n>>> x\n1\n>>> print(x)\n1\n>>> y = 2\n")
    assert ["".join(cell["source"]) for cell in cells] == ["x = 1\nx", "print(x)", "y = 2"]
    assert [[output["output_type"] for output in cell["outputs"]] for cell in cells] == [["execute_result"], ["stream"], []]


def test_every_cell_has_the_fields_that_nbformat_asks_for():
    fields = {"code": {"cell_type", "execution_count", "metadata", "outputs", "source"},
              "markdown": {"cell_type", "metadata", "source"},
              "stream": {"name", "output_type", "text"},
              "execute_result": {"data", "execution_count", "metadata", "output_type"}}
    for cell in CELLS:
        assert set(cell) == fields[cell["cell_type"]] and cell["source"]
        assert all(set(output) == fields[output["output_type"]] for output in cell.get("outputs", ()))
