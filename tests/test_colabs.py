# SPDX-License-Identifier: Apache-2.0
"""Every notebook of colabs/ runs from top to bottom with a small budget, and is kept reviewable."""

import functools
import os
import pathlib
import re

import nbformat
import pytest
import tiny_runs
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
# What the cell tagged "parameters" is replaced by.
BUDGETS = {
  "few_step_sampling": {
    "STEPS": (1, 2),
    "NFES": (1, 2),
    "SAMPLES": 2,
    "REAL_TEXTS": 2,
    "LENGTH": 48,
  },
}
_ASSIGNED = re.compile(r"^([A-Z_]+) = ", flags=re.MULTILINE)


def _read(path):
  return nbformat.read(path, as_version=4)


def _tagged(notebook, tag):
  return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def _run(path, folder):
  """Execute a notebook in a folder with its budget; return it with its outputs."""
  notebook = _read(path)
  (parameters,) = _tagged(notebook, "parameters")
  parameters.source = "\n".join(f"{k} = {v!r}" for k, v in BUDGETS[path.stem].items())
  skipped = _tagged(notebook, "skip-test")
  notebook.cells = [cell for cell in notebook.cells if cell not in skipped]
  with pytest.MonkeyPatch.context() as patch:  # the kernel inherits it
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
      patch.setenv(name, tiny_runs.environment(devices=1)[name])
    client = NotebookClient(
      notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def test_every_notebook_has_a_budget():
  assert {path.stem for path in NOTEBOOKS} == set(BUDGETS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_reviewable(path):
  """No outputs are kept, and the budget overrides every parameter by its name."""
  notebook = _read(path)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
  assert notebook.cells[0].source.startswith("# ")
  (parameters,) = _tagged(notebook, "parameters")
  assert set(_ASSIGNED.findall(parameters.source)) == set(BUDGETS[path.stem])
  assert [cell for cell in _tagged(notebook, "skip-test") if "pip install" in cell.source]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
  """Return a function from a notebook, which runs once, to its folder and all that it showed."""

  @functools.cache
  def execute(path):
    folder = tmp_path_factory.mktemp(path.stem)
    done = _run(path, folder)
    return folder, [output for cell in done.cells for output in cell.get("outputs", ())]

  return execute


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(executed, path):
  """Every cell runs; nbclient raises what a cell raises."""
  assert executed(path)[1]


def test_few_step_sampling(executed):
  folder, outputs = executed(ROOT / "colabs" / "few_step_sampling.ipynb")
  shown = [output.data for output in outputs if "data" in output]
  pages = [data["text/html"] for data in shown if "text/html" in data]
  (side_by_side,) = (page for page in pages if page.startswith("<table"))
  assert [int(steps) for steps in re.findall(r"<th>(\d+)</th>", side_by_side)] == [1, 2]
  moving = [page for page in pages if "dlm-denoising" in page]
  assert [page.count("<pre ") for page in moving] == [9, 33, 17], "a start, and the steps"
  assert [data for data in shown if "image/png" in data]
  printed = "".join(output.text for output in outputs if output.output_type == "stream")
  assert printed.count("| teacher") == printed.count("| student") == 2
  assert printed.count("It was a dark and stormy night, and") == 3
  assert (folder / "frontier" / "frontier.png").exists()
