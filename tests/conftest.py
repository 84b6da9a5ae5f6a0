# SPDX-License-Identifier: Apache-2.0
"""Eight fake CPU devices, strict rank promotion, programs compiled once, golden vectors."""

import gc
import importlib.metadata
import json
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  ).strip()
# Compiling takes most of the time, and two thirds of it were the newer emitters of loops.
if importlib.metadata.version("jaxlib").split(".")[:2] in (["0", "10"], ["0", "11"]):
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Workers and subprocesses inherit this folder and share it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  COMPILED = tempfile.TemporaryDirectory(prefix="dlm_jax_compiled_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # tiny programs run a few times

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden"
MOST_MAPS = 12_000


def pytest_addoption(parser):
  parser.addoption("--method", help="of the contract of methods: check my_package.my_file alone")


def pytest_configure(config):
  if config.getoption("--method"):
    os.environ["DLM_JAX_METHOD"] = config.getoption("--method")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
  """Mark all but the first case of a test that bears `first_case` as slow; the longest goes first.

  A file runs in one process: one that begins last would run alone at the end.
  """
  items.sort(key=lambda item: item.path.name != "test_readme_followed.py")
  seen = set()
  for item in items:
    if item.get_closest_marker("first_case") and not item.get_closest_marker("slow"):
      name = (item.path, item.originalname)
      if name in seen:
        item.add_marker(pytest.mark.slow)
      seen.add(name)


@pytest.fixture
def optimised():
  """Compile with every optimisation: for programs whose running takes longer than compiling."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def forget():
  """Drop compiled programs after a file once a process maps many of them.

  Each takes several mappings of memory; Linux allows 65,530 of them, then XLA crashes.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def golden():
  """Return a loader: golden("dit_mdlm__a") -> (dict of numpy arrays, config dict)."""
  from safetensors import safe_open

  def load(name):
    with safe_open(GOLDEN / f"{name}.safetensors", framework="numpy") as file:
      config = json.loads(file.metadata()["config"])
      return {key: file.get_tensor(key) for key in file.keys()}, config  # noqa: SIM118

  return load


@pytest.fixture(scope="session")
def golden_dit(golden):
  """Return a loader: name -> (arrays, config, float32 DiT, its recorded parameters)."""
  import golden_networks

  def load(name):
    vectors, config = golden(name)
    return vectors, config, *golden_networks.dit(vectors, config, "params")

  return load
