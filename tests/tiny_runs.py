# SPDX-License-Identifier: Apache-2.0
"""A corpus, a teacher and a judge small enough for tests of whole runs; made once per process."""

import argparse
import dataclasses
import functools
import inspect
import json
import os
import pathlib
import re
import tempfile
import textwrap

import jax
import numpy as np

from dlm_jax.data import builder
from dlm_jax.experiment import build, plan, run
from dlm_jax.experiment.config import load_config

_FOLDER = tempfile.TemporaryDirectory(prefix="dlm_jax_tiny_")
SHAPE = {
  "data.length": "16",
  "model.dim": "8",
  "model.layers": "1",
  "model.heads": "2",
  "model.dtype": "float32",
  "loader.batch_size": "8",
}
TRAINING = {
  "optim.lr": "1e-2",
  "optim.warmup": "2",
  "optim.schedule": "constant",
  "objective.ema_decay": "0.9",
  "train.steps": "6",
  "train.log_every": "1",
  "train.checkpoint_every": "2",
  "evaluate.every": "0",
  "evaluate.samples": "8",
  "evaluate.batch_size": "8",
}
CONFIGS = {"teacher": "quickstart_teacher", "judge": "quickstart_judge", "idlm": "quickstart_idlm"}


@dataclasses.dataclass(frozen=True)
class Tiny:
  """Paths of what every test may read and none may change."""

  folder: pathlib.Path
  corpus: pathlib.Path
  data: pathlib.Path
  teacher: pathlib.Path
  judge: pathlib.Path

  def overrides(self, kind: str, **changes: str) -> dict[str, str]:
    """Return config fields of a tiny run; `optim__lr="1"` changes optim.lr."""
    fields = {
      **SHAPE,
      **TRAINING,
      "data.directory": str(self.data),
      "data.source": f"files:{self.corpus}",
      "data.tokenizer": "bpe:300",
    }
    if kind != "judge":
      fields["model.cond_dim"] = "4"
    if kind == "idlm":
      fields |= {
        "teacher.path": str(self.teacher),
        "evaluate.judge": str(self.judge),
        "evaluate.nfes": "2",
      }
    return fields | {name.replace("__", "."): str(value) for name, value in changes.items()}

  def config(self, kind: str, **changes: str):
    """Return the locked config of a tiny run."""
    return load_config(CONFIGS[kind], self.overrides(kind, **changes))

  def flags(self, kind: str, **changes: str) -> list[str]:
    """Return the same as command-line flags."""
    fields = self.overrides(kind, **changes).items()
    return [f"--config={CONFIGS[kind]}", *(f"--config.{k}={v}" for k, v in fields)]


def documents() -> list[str]:
  """Return short pieces of real source text."""
  lines = (inspect.getsource(argparse) + inspect.getsource(textwrap)).splitlines(keepends=True)
  return ["".join(lines[i : i + 30]) for i in range(0, len(lines), 30)]


def environment(devices: int = 8) -> dict[str, str]:
  """Return the environment of a subprocess that compiles as we do, for so many devices."""
  flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
  return {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "XLA_FLAGS": flags}


@functools.cache
def make() -> Tiny:
  """Write the corpus, pack it, and export two networks with random parameters."""
  folder = pathlib.Path(_FOLDER.name)
  tiny = Tiny(
    folder=folder,
    corpus=folder / "corpus.jsonl",
    data=folder / "data",
    teacher=folder / "teacher",
    judge=folder / "judge",
  )
  tiny.corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
  config = tiny.config("teacher")
  with config.unlocked():
    config.data.options.tests = None  # an option of the standard library; our corpus is a file
  build.prepare(plan.read_data(config), progress=False)
  for kind, directory in (("teacher", tiny.teacher), ("judge", tiny.judge)):
    export(tiny.config(kind), directory / "final")
  return tiny


def export(config, directory: pathlib.Path, seed: int = 0) -> None:
  """Write a network with random parameters, as training would."""
  tokenizer = builder.open_dataset(config.data.directory).tokenizer()
  built = build.experiment(plan.read(config), tokenizer.vocab_size, devices=jax.devices()[:1])
  rng = np.random.default_rng(seed)
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), built.shapes)
  tree = built.objective.output
  params = jax.tree.map(
    lambda x: (rng.normal(size=x.shape) * 0.3 + (x.ndim == 1)).astype(np.float32),
    state.trees[tree],
  )
  state = state.replace(trees={**state.trees, tree: params}, ema={tree: params})
  run.export(directory, built, state, 0, tokenizer)


def metrics(workdir: pathlib.Path) -> list[dict]:
  """Return the lines of metrics.jsonl without what depends on the machine's speed."""
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
