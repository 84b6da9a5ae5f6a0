# SPDX-License-Identifier: Apache-2.0
"""Changed copies of checkpoints."""

import json
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file


def write(source, directory, tensors=None, config=None):
  """Copy a checkpoint's folder; `tensors` and `config` change what is stored, in place."""
  shutil.copytree(source, directory, copy_function=shutil.copyfile)
  if tensors is not None:
    stored = load_file(directory / "model.safetensors")
    tensors(stored)
    stored = {name: np.ascontiguousarray(x) for name, x in stored.items()}
    save_file(stored, directory / "model.safetensors")
  if config is not None:
    stored = json.loads((directory / "config.json").read_text())
    config(stored)
    (directory / "config.json").write_text(json.dumps(stored))
  return directory
