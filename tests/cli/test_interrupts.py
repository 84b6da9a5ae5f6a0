# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in verbs that do not resume: one line, exit code 130, nothing half written."""

import signal
import subprocess
import sys
import time

import pytest
import tiny_runs

# A shell that started the tests in the background has its children ignore SIGINT.
_RUN = """
import importlib, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
module, name, marker, *arguments = sys.argv[1:]
def wait(*_, **__):
  pathlib.Path(marker).touch()
  time.sleep(120)
if name:
  setattr(importlib.import_module(module), name, wait)
from dlm_jax.cli.main import main
sys.exit(main(arguments))
"""


def _interrupted(begun, *arguments, held=("", "", "")):
  """Run a verb, press Ctrl-C once it has begun; return what it said on stderr, whole lines.

  It waits in the function held[1] of module held[0], where it makes the file held[2].
  """
  process = subprocess.Popen(
    [sys.executable, "-c", _RUN, *map(str, [*held, *arguments])],
    env=tiny_runs.environment(devices=1),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  end = time.monotonic() + 120
  while not begun() and process.poll() is None and time.monotonic() < end:
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 130, err
  assert not out
  return [line for line in err.splitlines() if line]


def test_sample(tmp_path):
  """While it samples: the page that it was to write is not there, not even in part."""
  tiny = tiny_runs.make()
  page, places = tmp_path / "page.html", lambda: list(tmp_path.iterdir())
  flags = [f"--checkpoint={tiny.teacher}", f"--html={page}", "--num=100000", "--steps=1000"]
  assert _interrupted(places, "sample", *flags) == ["dlm-jax sample: interrupted."]
  assert not places()


@pytest.mark.slow
def test_prepare(tmp_path):
  tiny, corpus = tiny_runs.make(), tmp_path / "corpus.txt"
  corpus.write_text("".join(tiny_runs.documents()) * 200)
  out = tmp_path / "out" / "data"
  fields = {"data__directory": out, "data__source": f"files:{corpus}", "data__tokenizer": "bytes"}
  flags = tiny.flags("teacher", **fields)
  begun = lambda: out.parent.exists() and list(out.parent.iterdir())  # noqa: E731
  said = _interrupted(begun, "prepare", *flags, "--config.data.options.tests=none")
  assert said[-1:] == ["dlm-jax prepare: interrupted."] and len(said) == 1
  assert not out.parent.exists()  # the folder that was made for it goes, too


@pytest.mark.slow
def test_convert(tmp_path):
  """Everything is written, and waits to get its name."""
  marker, folder = tmp_path / "marker", tmp_path / "models"
  held = ("dlm_jax.disk", "replace", marker)
  flags = [f"--checkpoint={tiny_runs.make().teacher}", f"--out={folder / 'out'}"]
  said = _interrupted(marker.exists, "convert", *flags, held=held)
  assert said == ["dlm-jax convert: interrupted."] and not folder.exists()


@pytest.mark.slow
def test_evaluate(tmp_path):
  tiny, marker = tiny_runs.make(), tmp_path / "marker"
  held = ("dlm_jax.evaluate.likelihood", "elbo", marker)
  flags = [f"--checkpoint={tiny.teacher}", f"--data={tiny.data}", "--sequences=4"]
  said = _interrupted(marker.exists, "evaluate", *flags, held=held)
  assert said == ["dlm-jax evaluate: interrupted."]
