# SPDX-License-Identifier: Apache-2.0
"""Every notebook of colabs/ runs from top to bottom with a small budget, and is kept reviewable."""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import tomllib

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


def _check_clean(outputs):
  """No errors, nothing in red, no bar drawn over and over, no path of this machine."""
  assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
  for output in outputs:
    if output.output_type == "stream":
      assert output.name == "stdout", output.text
      assert output.text.count("NFE ") <= 1 or "| model" in output.text, "a bar, once"
      assert not re.search(r"\r|/home/|/tmp/|Warning", output.text), output.text


def test_every_notebook_has_a_budget():
  assert {path.stem for path in NOTEBOOKS} == set(BUDGETS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_reviewable(path):
  """What is kept is small and of one run, and the budget overrides every parameter by its name."""
  notebook = _read(path)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
  assert path.stat().st_size < 400_000
  assert all("execution" not in cell.metadata for cell in code), "no times: they differ every run"
  shown = [output for cell in code for output in cell.outputs]
  _check_clean(shown)
  kinds = {kind for output in shown for kind in output.get("data", ())}
  assert {"image/png", "text/html"} <= kinds, "a figure, and texts"
  assert "accelerator" in notebook.metadata and "colab" in notebook.metadata
  assert "```sh" not in notebook.cells[-1].source, "a reader of a notebook may have no shell"
  assert notebook.cells[0].source.startswith("# ")
  (parameters,) = _tagged(notebook, "parameters")
  assert set(_ASSIGNED.findall(parameters.source)) == set(BUDGETS[path.stem])
  assert [cell for cell in _tagged(notebook, "skip-test") if "pip install" in cell.source]


def _install(path):
  """Return the source of the cell that installs, up to where it uses jax."""
  (cell,) = (cell for cell in _read(path).cells if "pip install" in cell.source)
  return cell.source.partition("import jax")[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_keeps_the_jax_that_is_there(path, tmp_path, monkeypatch):
  """As on Colab: jax is there, dlm_jax is not, and an address was written into the cell."""
  find, seen = importlib.util.find_spec, []

  def run(command, check):
    assert check and command[1:4] == ["-m", "pip", "install"]
    held = command[command.index("--constraint") + 1]
    seen.append((command[-1], pathlib.Path(held).read_text().splitlines()))

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "dlm_jax" else find(n))
  monkeypatch.setattr(subprocess, "run", run)
  source = _install(path)
  with pytest.raises(SystemExit, match="Write the repository's address"):
    exec(source, {})
  exec(source.replace('SOURCE = ""', 'SOURCE = "git+https://place"'), {})
  jax, jaxlib = (importlib.metadata.version(name) for name in ("jax", "jaxlib"))
  assert seen == [("git+https://place", [f"jax=={jax}", f"jaxlib=={jaxlib}"])]
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_address_is_that_of_the_project(path):
  """Once pyproject.toml names the repository, the notebook installs from there and is one click."""
  urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
  address, notebook = urls.get("Repository", ""), _read(path)
  place = address.removeprefix("https://")
  badge = (
    f"https://colab.research.google.com/{place.replace('.com', '', 1)}/blob/main/colabs/{path.name}"
  )
  for text in (notebook.cells[0].source, (ROOT / "README.md").read_text(encoding="utf-8")):
    assert (badge in text) if address else ("colab.research.google.com" not in text)
  assert f'SOURCE = "{"git+" + address if address else ""}"' in _install(path)


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


@pytest.mark.slow
def test_few_step_sampling(executed):
  folder, outputs = executed(ROOT / "colabs" / "few_step_sampling.ipynb")
  assert not [output.text for output in outputs if output.get("name") == "stderr"]
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
