# SPDX-License-Identifier: Apache-2.0
"""A method of one's own, outside of the package: what CONTRIBUTING shows trains and is checked."""

import importlib
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_objective_contract as contract
import tiny
import tiny_runs

from dlm_jax.cli.main import main
from dlm_jax.objectives import mdlm

PAGE = (pathlib.Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
NAME = "my_package.focal"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Write the page's two files where nothing of ours lies."""
  method, config = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
  folder = tmp_path_factory.mktemp("own")
  (folder / "my_package").mkdir()
  (folder / "my_package" / "focal.py").write_text(method, encoding="utf-8")
  (folder / "focal.py").write_text(config, encoding="utf-8")
  sys.path.insert(0, str(folder))
  importlib.invalidate_caches()
  others = {name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)}
  yield folder
  sys.path.remove(str(folder))
  for name in filter(_ours, list(sys.modules)):
    del sys.modules[name]
  sys.modules.update(others)


def _ours(name):
  return name.split(".")[0] == "my_package"


@pytest.mark.usefixtures("folder")
def test_the_contract_of_methods_checks_it():
  contract.test_facts_and_options(NAME)
  contract.test_documentation_names_a_source(NAME)
  contract.test_types_and_shapes_are_kept(NAME)
  contract.test_every_buffer_is_its_own(NAME)
  contract.test_start_without_a_teacher(NAME)
  contract.test_three_steps(NAME)


def test_the_command_line_trains_it(folder, capsys):
  flags = tiny_runs.make().flags("teacher", train__steps=2, objective__gamma=3.0)
  flags[0] = f"--config={folder / 'focal.py'}"
  assert main(["train", *flags, f"--workdir={folder / 'run'}"]) == 0, capsys.readouterr().err
  metrics = (folder / "run" / "metrics.jsonl").read_text().splitlines()
  losses = [row["model/loss"] for row in map(json.loads, metrics) if "model/loss" in row]
  assert len(losses) == 2 and np.all(np.isfinite(losses))
  assert list((folder / "run").rglob("model.safetensors"))


def test_a_weight_of_tokens():
  """It multiplies every token's nats, and reads the probability that they are the nats of."""
  model, params = tiny.network(dropout=0.0)
  given = {"model": model, "process": tiny.PROCESS}
  batch = tiny.batch()

  @jax.jit
  def losses(params, batch):
    weights = (
      None,
      jnp.ones_like,
      lambda p: 3 * jnp.ones_like(p),
      lambda p: 1 / jnp.minimum(p, -1e-9),
    )
    return [mdlm.loss(params, batch, **given, weight=weight)[0] for weight in weights]

  plain, same, thrice, counted = losses(params, batch)
  np.testing.assert_allclose([same, thrice], [plain, 3 * plain], rtol=1e-6)
  # −log p / log p: what is left is −1/t of every mask
  noisy = jax.vmap(tiny.PROCESS.corrupt)(
    jax.vmap(lambda k: jax.random.split(k)[0])(batch["rng"]), batch["tokens"], batch["t"]
  )
  masks = np.asarray(noisy) == tiny.MASK
  weight_B = np.asarray(jax.vmap(tiny.PROCESS.schedule.weight)(batch["t"]))
  np.testing.assert_allclose(counted, -np.mean(weight_B[:, None] * masks), rtol=1e-5)
