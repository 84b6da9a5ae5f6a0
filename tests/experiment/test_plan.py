# SPDX-License-Identifier: Apache-2.0
"""A config is read once: a plan is frozen, whole, and says at once what is wrong by itself."""

import dataclasses
import json

import pytest
from ml_collections import ConfigDict, FieldReference

from dlm_jax import objectives, schedules
from dlm_jax.errors import InputError
from dlm_jax.experiment import plan
from dlm_jax.experiment.config import list_configs, load_config
from dlm_jax.train import checkpoint


def _values(node):
  """Yield everything that a plan holds, whatever it is nested in."""
  yield node
  if dataclasses.is_dataclass(node) and not isinstance(node, type):
    node = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
  for value in node.values() if isinstance(node, dict) else ():
    yield from _values(value)


@pytest.mark.parametrize("name", list_configs())
def test_every_config_is_a_plan(name):
  config = load_config(name)
  read = plan.read(config)
  assert not any(isinstance(v, ConfigDict | FieldReference) for v in _values(read))
  assert read.stored == json.loads(config.to_json()) and json.dumps(read.stored)
  assert read.data == plan.read_data(config)
  assert (read.objective.name, read.model.name) == (config.objective.name, config.model.name)
  assert set(read.model.fields) < set(config.model) and read.evaluate.measure


def test_values_arrive():
  """Every field of the groups that are parts, under its own name."""
  changes = {"train.steps": "7", "evaluate.every": "3", "seed": "5", "evaluate.nfes": "2,4"}
  config = load_config("quickstart_idlm", changes)
  with config.unlocked():
    config.optim.fake = ConfigDict({"lr": 0.5})
  read = plan.read(config)
  for group, leave in (("data", {"options"}), ("evaluate", {"measure"})):
    for field in set(config[group]) - leave:
      assert getattr(getattr(read, group), field) == config[group][field], f"{group}.{field}"
  assert (read.loop.steps, read.loop.evaluate_every, read.loop.seed, read.seed) == (7, 3, 5, 5)
  assert read.loop.log_every == config.train.log_every and read.keep == config.train.keep
  assert read.batch_size == config.loader.batch_size and read.teacher == config.teacher.path
  assert read.optim["fake"]["lr"] == 0.5 and read.mesh == config.mesh.to_dict()
  assert read.process.schedule == schedules.make(config.process.schedule, eps=config.process.eps)
  assert read.objective.module is objectives.idlm and "name" not in read.objective.options


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1, -1, -(2**63)])
def test_seeds_of_64_bits(seed, tmp_path):
  """What a checkpoint keeps tells a seed from another with the same lower half."""
  config = load_config("quickstart_idlm", {"seed": str(seed)})
  read = plan.read(config)
  assert (read.seed, read.loop.seed, read.stored["seed"]) == (seed, seed, seed)
  folder = tmp_path / "checkpoints"
  (folder / "5").mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(read.stored))
  checkpoint.check_same(tmp_path, read.stored)
  other = load_config("quickstart_idlm", {"seed": str(seed & 0xFFFFFFFF)})
  with pytest.raises(InputError, match=r"holds a run with another config \(seed\)"):
    checkpoint.check_same(tmp_path, plan.read(other).stored)


def test_a_plan_does_not_follow_its_config():
  config = load_config("quickstart_idlm")
  read = plan.read(config)
  config.objective.ema_decay = config.data.length = 0
  assert read.data.length and read.objective.options["ema_decay"]
  with pytest.raises(dataclasses.FrozenInstanceError):
    read.seed = 1


def test_a_start_is_measured():
  """Where a run starts from another network, that one is what later scores are compared with."""
  assert plan.read(load_config("quickstart_idlm")).loop.evaluate_start
  assert not plan.read(load_config("quickstart_teacher")).loop.evaluate_start
  assert plan.read(load_config("quickstart_teacher", {"start.path": "x"})).loop.evaluate_start


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("quickstart_idlm", {"objective.name": "idml"}, r"'idml' is not a file .*mean 'idlm'"),
    ("quickstart_idlm", {"objective.name": "no.module"}, "'no.module' cannot be imported"),
    ("quickstart_idlm", {"process.name": "uniforn"}, r"'uniforn' is unknown .*mean 'uniform'"),
    ("quickstart_idlm", {"process.name": "none"}, "process.name='none' is unknown"),
    ("quickstart_idlm", {"process.schedule": "linear"}, "process.schedule='linear' is unknown"),
    ("quickstart_idlm", {"train.keep": "0"}, "train.keep=0 must be at least 1"),
    ("quickstart_idlm", {"evaluate.every": "-1"}, "evaluate.every=-1 must be at least 0"),
    ("quickstart_idlm", {"evaluate.patience": "0"}, "evaluate.patience=0 must be at least 1"),
    ("quickstart_idlm", {"objective.accumulate": "0"}, "objective.accumulate=0 must be at least"),
  ],
)
def test_what_is_wrong_by_itself_is_said_at_once(name, changes, message):
  with pytest.raises(InputError, match=message) as error:
    plan.read(load_config(name, changes))
  assert len(str(error.value).splitlines()) == 1


def test_networks_without_a_process():
  before = plan.read(load_config("novels_sdar_draft", {"process.name": "none"}))
  assert before.process.name == "none" and before.process.schedule is None
  assert plan.read(load_config("quickstart_judge")).process.schedule is None
  wanted = schedules.LogLinear(eps=0.0)
  assert plan.read(load_config("novels_sdar_draft")).process.schedule == wanted
