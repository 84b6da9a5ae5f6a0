# SPDX-License-Identifier: Apache-2.0
"""README from its first shell line to its last, typed by a script into an empty folder.

`dlm-jax` is there as installed; long steps are shortened by flags that are added to what the page
says, and nothing else is. `pip` and `pytest` say only that they were called: this is their run.
"""

import json
import os
import pathlib
import re
import stat
import subprocess
import sys

import pytest
import tiny_runs

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = {
  "model.dim": 16,
  "model.layers": 1,
  "model.heads": 2,
  "model.dtype": "float32",
  "data.length": 16,
  "loader.batch_size": 8,
  "optim.warmup": 1,
  "train.steps": 4,
  "train.log_every": 1,
  "train.checkpoint_every": 2,
  "evaluate.every": 2,
  "evaluate.samples": 4,
  "evaluate.batch_size": 4,
}
MORE = {  # by variant of own_text
  "student": {"evaluate.nfes": "2", "evaluate.max_entropy_drop": 100},
  "didi": {
    "evaluate.nfes": "2",
    "evaluate.max_entropy_drop": 100,
    "objective.trained_layers": 1,
    "objective.warmup": 1,
  },
}
SHELL = """#!{python}
import json, sys
with open({log!r}, "a") as file:
  print(json.dumps(sys.argv[1:]), file=file)
more = json.loads({table!r})
verb, *rest = sys.argv[1:]
config = next((a.partition("=")[2] for a in rest if a.startswith("--config=")), "")
added = more["verbs"].get(" ".join([verb, *rest]), more["verbs"].get(verb, []))
if config.startswith("own_text"):
  added = added + more["configs"].get(config.partition(":")[2], more["configs"][""])
sys.argv = ["dlm-jax", verb, *rest, *added]
from dlm_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def _flags(fields):
  return [f"--config.{name}={value}" for name, value in fields.items()]


def _program(path, text):
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _blocks():
  return [
    block.replace("\\\n", " ")
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", README, flags=re.DOTALL)
  ]


def test_every_command_works(tmp_path):
  log, tools = tmp_path / "log.jsonl", tmp_path / "bin"
  tools.mkdir()
  few = {"evaluate.samples": 4, "evaluate.batch_size": 4, "evaluate.nfes": "2"}
  few |= {"train.steps": 2, "loader.batch_size": 4}  # of a network of the shipped size
  table = {
    "configs": {kind: _flags(TINY | MORE.get(kind, {})) for kind in ("", "judge", *MORE)},
    "verbs": {
      "quickstart": ["--nfes=1,2", "--samples=2", *_flags(few)],
      "quickstart --pretrained": ["--nfes=2", "--samples=2"],
      "frontier": ["--nfes=2", "--samples=4", "--batch_size=4"],
    },
  }
  table["configs"]["teacher"] = table["configs"][""]
  _program(
    tools / "dlm-jax",
    SHELL.format(python=sys.executable, log=str(log), table=json.dumps(table)),
  )
  for name in ("pip", "pytest"):
    _program(tools / name, f'#!/bin/sh\necho "[\\"{name}\\"]" >> {log}\n')
  folder = tmp_path / "clone"
  (folder / "text").mkdir(parents=True)
  prose = (ROOT / "dlm_jax" / "assets" / "novels-judge" / "held_out.txt").read_text()
  for number in range(3):
    part = prose[number * 20_000 : (number + 1) * 20_000]
    (folder / "text" / f"{number}.txt").write_text(part)
  environment = tiny_runs.environment(devices=1) | {"PATH": f"{tools}:{os.environ['PATH']}"}
  for block in _blocks():
    done = subprocess.run(
      ["bash", "-euo", "pipefail", "-c", block],
      cwd=folder,
      env=environment,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
  called = [json.loads(line) for line in log.read_text().splitlines()]
  typed = sum(
    len(re.findall(r"(?m)(?:^|&& )(?:dlm-jax|pip|pytest) ", block)) for block in _blocks()
  )
  assert len(called) == typed and ["pytest"] in called
  for network in ("judge", "teacher", "student", "didi"):
    assert (folder / "runs" / network / "final" / "model.safetensors").exists()
  assert (folder / "runs" / "frontier" / "frontier.png").exists()
