# SPDX-License-Identifier: Apache-2.0
"""Run notebooks from top to bottom and keep what they show, small enough for a repository.

python colabs/store_outputs.py colabs/few_step_sampling.ipynb
"""

import base64
import io
import pathlib
import re
import sys
import tempfile

import nbformat
from nbclient import NotebookClient
from PIL import Image

_COLOURS = 128  # of a stored figure


def store(path: pathlib.Path) -> None:
  """Execute a notebook in an empty folder; write it back with its outputs."""
  notebook = nbformat.read(path, as_version=4)
  with tempfile.TemporaryDirectory() as folder:
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()
  for cell in notebook.cells:
    cell.metadata.pop("execution", None)  # when it ran
    if cell.cell_type == "code":
      cell.outputs = _joined(cell.outputs)
    for output in cell.get("outputs", ()):
      _shrink(output)
  notebook.metadata["language_info"] = {"name": "python"}
  nbformat.write(notebook, path)


def _joined(outputs) -> list:
  """Return outputs with what was printed piece by piece in one piece."""
  joined = []
  for output in outputs:
    if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
      joined[-1].text += output.text
    else:
      joined.append(output)
  return joined


def _shrink(output) -> None:
  if output.output_type == "stream":
    output.text = re.sub(r"[^\n]*\r", "", output.text)  # what was drawn over
  elif "image/png" in output.get("data", {}):
    image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
    stream = io.BytesIO()
    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=_COLOURS).save(
      stream, "PNG", optimize=True
    )
    output.data["image/png"] = base64.b64encode(stream.getvalue()).decode()


if __name__ == "__main__":
  for argument in sys.argv[1:]:
    store(pathlib.Path(argument))
