# SPDX-License-Identifier: Apache-2.0
"""Eight fake CPU devices, strict rank promotion, golden vectors."""

import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  ).strip()

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def golden():
  """Return a loader: golden("dit_mdlm__a") -> (dict of numpy arrays, config dict)."""
  from safetensors import safe_open

  def load(name):
    with safe_open(GOLDEN / f"{name}.safetensors", framework="numpy") as file:
      config = json.loads(file.metadata()["config"])
      return {key: file.get_tensor(key) for key in file.keys()}, config  # noqa: SIM118

  return load
