# SPDX-License-Identifier: Apache-2.0
"""Stand in for `dlm-jax` as one of two hosts: the second one is interrupted, then both resume."""

import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np

from dlm_jax import mesh
from dlm_jax.cli import main as cli
from dlm_jax.experiment import run

STOP = 3  # host 1 gets the signal while it fetches the batch of this step
HOST = int(os.environ["JAX_PROCESS_ID"])
seen = {"slices": [], "rows": []}


class Watched:
  """A loader that notes what it delivers."""

  def __init__(self, stream, stop):
    self._stream, self._stop = stream, stop

  def __next__(self):
    record = next(self._stream)
    seen["rows"].append(record["tokens"].tolist())
    if self._stop and len(seen["rows"]) == STOP and HOST == 1:
      signal.raise_signal(signal.SIGTERM)
    return record

  def __getattr__(self, name):
    return getattr(self._stream, name)


def watched(*args, **kwargs):
  """Return the loader that the run asked for."""
  first = not seen["slices"]
  seen["slices"].append([kwargs["host"], kwargs["hosts"]])
  return Watched(make(*args, **kwargs), stop=first)


make, run.loader.make = run.loader.make, watched
arguments = sys.argv[1:]
ends = [cli.main(arguments), cli.main([a for a in arguments if a != "--distributed"])]
seen |= {
  "ends": ends,
  "hosts": jax.process_count(),
  "first": mesh.from_first_host(np.array([HOST + 7, HOST])).tolist(),
  "any": [mesh.any_host(HOST == 1), mesh.any_host(HOST == 0), mesh.any_host(False)],
}
pathlib.Path(os.environ["SEEN"], f"{HOST}.json").write_text(json.dumps(seen))
