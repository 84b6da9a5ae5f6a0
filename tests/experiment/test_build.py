# SPDX-License-Identifier: Apache-2.0
"""From configurations to objects: overrides, building, resolving paths, user's own modules."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import tiny_runs
from ml_collections import ConfigDict

from dlm_jax import convert, models, objectives, process
from dlm_jax.convert import places
from dlm_jax.errors import InputError
from dlm_jax.experiment import build, plan, run
from dlm_jax.experiment.config import load_config
from dlm_jax.train import optim


def _load(**overrides):
  fields = {name.replace("__", "."): text for name, text in overrides.items()}
  return load_config("quickstart_idlm", fields)


@pytest.mark.parametrize(
  "field, text, value",
  [
    ("optim__lr", "3e-5", 3e-5),
    ("optim__lr", "1", 1.0),
    ("train__steps", "12", 12),
    ("model__time_conditioning", "true", True),
    ("model__time_conditioning", "False", False),
    ("teacher__path", "runs/7", "runs/7"),
    ("teacher__path", "", ""),
    ("teacher__path", "7", "7"),
    ("evaluate__nfes", "4", (4,)),
    ("evaluate__nfes", "4,8", (4, 8)),
    ("evaluate__nfes", "[4, 8]", (4, 8)),
    ("data__options__tests", "true", True),
    ("data__options__root", "/lib", "/lib"),
    ("data__options__validation_fraction", "0.2", 0.2),
    ("seed", "3", 3),
  ],
)
def test_overrides(field, text, value):
  node = _load(**{field: text})
  for key in field.split("__"):
    node = node[key]
  assert node == value and type(node) is type(value)


@pytest.mark.parametrize(
  "field, text",
  [
    ("optim__lr", "true"),
    ("train__steps", "1.0"),
    ("train__steps", "many"),
    ("model__time_conditioning", "1"),
    ("evaluate__nfes", "few"),
    ("optim", "1"),
    ("optim__lr__peak", "1"),
    ("", "1"),
  ],
)
def test_bad_overrides(field, text):
  with pytest.raises(InputError):
    _load(**{field: text})


def test_a_config_is_locked():
  with pytest.raises((KeyError, AttributeError)):
    _load().optim.rate = 1.0


def test_a_file_of_the_user(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    "from dlm_jax.configs.base import base\n\n\ndef get_config():\n  c = base()\n"
    "  c.optim.lr = 0.5\n  return c\n"
  )
  assert load_config(str(path)).optim.lr == 0.5
  assert load_config(str(path), {"optim.lr": "0.25"}).optim.lr == 0.25


def test_an_objective_of_the_user(tmp_path, monkeypatch):
  """`my_package.my_file` needs `make` and `TRAINED`, nothing else."""
  package = tmp_path / "my_package"
  package.mkdir()
  (package / "__init__.py").write_text("")
  (package / "my_method.py").write_text(
    "from dlm_jax.objectives import mdlm\n\nTRAINED = mdlm.TRAINED\n\n\n"
    "def make(*, model, process, optimizers, accumulate=1, ema_decay=None):\n"
    "  return mdlm.make(model=model, process=process, optimizers=optimizers, ema_decay=ema_decay)\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  config = tiny_runs.make().config("teacher", objective__name="my_package.my_method")
  built = build.experiment(plan.read(config), 300, devices=jax.devices()[:1])
  assert isinstance(built.objective, objectives.Objective)


def test_build():
  built = build.experiment(plan.read(tiny_runs.make().config("idlm")), 300)
  assert built.model.config.vocab_size == 301, "the mask is ours"
  assert isinstance(built.process, process.Absorbing) and built.process.mask_id == 300
  assert built.mesh.size == 8 and built.objective.output == "student"
  assert set(built.shapes.trees) == {"teacher", "fake", "student"}
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(built.shapes))
  assert jax.tree.structure(built.shapes) == jax.tree.structure(built.shardings)


def test_build_a_judge():
  built = build.experiment(plan.read(tiny_runs.make().config("judge")), 300)
  assert isinstance(built.model, models.Causal) and built.process is None
  assert built.model.config.vocab_size == 300, "a judge knows no mask"


def test_the_folder_is_the_registry():
  assert {"ar", "mdlm", "idlm"} <= set(plan.list_objectives())
  assert "state" not in plan.list_objectives()


def test_network_directory_prefers_itself_then_best_then_final(tmp_path):
  for name in ("final", "best", "."):
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "config.json").write_text("{}")
    assert places.network_directory(str(tmp_path)) == tmp_path / name


def _with_group(tree, **fields):
  config = tiny_runs.make().config("idlm")
  with config.unlocked():
    config.optim[tree] = ConfigDict(fields)
  return config


def test_one_tree_has_an_optimiser_of_its_own():
  """A group of optim changes fields for the tree of its name; the others keep theirs."""
  configs = optim.per_tree(
    _with_group("fake", lr=0.5, clip=2.0).optim.to_dict(), ("fake", "student")
  )
  plain = optim.per_tree(tiny_runs.make().config("idlm").optim.to_dict(), ("fake", "student"))
  assert configs["student"] == plain["student"] == plain["fake"]
  assert (configs["fake"].lr, configs["fake"].clip) == (0.5, 2.0)
  assert configs["fake"].b2 == plain["fake"].b2


def test_the_fake_has_a_learning_rate_of_its_own():
  """From the command line; unset, it is that of all trees."""
  for text, rate in (("none", 0.25), ("2.5", 2.5)):
    config = load_config("novels_idlm", {"optim.lr": "0.25", "optim.fake.lr": text})
    read = plan.read(config)
    configs = optim.per_tree(read.optim, ("fake", "student"))
    assert (configs["fake"].lr, configs["student"].lr) == (rate, 0.25)
    assert dataclasses.replace(configs["fake"], lr=0.25) == configs["student"]


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (lambda: _with_group("fakes", lr=0.5), r"optim\.fakes names no trained tree .*'fake'"),
    (lambda: _with_group("fake", rate=0.5), r"optim\.fake\.rate is no field"),
    (lambda: _with_group("fake", lr=-1.0), r"optim\.fake\.lr=-1\.0 must be in \(0, ∞\)"),
    (lambda: _with_group("fake", lr=math.inf), r"optim\.fake\.lr=inf is not a finite number"),
    (lambda: _with_group("fake", warmup=-1), r"optim\.fake\.warmup=-1 must be at least 0"),
  ],
)
def test_groups_of_optim_are_checked(config, message):
  with pytest.raises(InputError, match=message):
    build.experiment(plan.read(config()), 300)


def test_groups_divide_the_batch():
  config = load_config("quickstart_didi", {"loader.batch_size": "12"})
  message = r"batch_size=12 is not divisible by objective\.group_size=8; use 8 or 16"
  with pytest.raises(InputError, match=message):
    build.experiment(plan.read(config), 2048, devices=jax.devices()[:1])


def _of_the_user(tmp_path, monkeypatch, name, body):
  folder = tmp_path / f"of_{name}"
  folder.mkdir()
  monkeypatch.syspath_prepend(str(tmp_path))
  (folder / f"{name}.py").write_text(
    f"TRAINED = ('model',)\n\n\ndef make(*, model, process, optimizers, {body}\n"
  )
  return tiny_runs.make().config("teacher", objective__name=f"{folder.name}.{name}")


def test_a_defect_of_the_users_method_keeps_its_traceback(tmp_path, monkeypatch):
  """A TypeError inside `make` is no wrong option."""
  config = _of_the_user(tmp_path, monkeypatch, "defect", "**options):\n  return 1 + 'a'")
  with pytest.raises(TypeError, match="unsupported operand") as caught:
    build.experiment(plan.read(config), 300, devices=jax.devices()[:1])
  assert caught.traceback[-1].path.name == "defect.py"


def test_options_that_a_method_does_not_take_are_one_line(tmp_path, monkeypatch):
  config = _of_the_user(tmp_path, monkeypatch, "few", "accumulate=1):\n  return None")
  with pytest.raises(InputError, match=r"objective 'of_few\.few': got an unexpected keyword"):
    build.experiment(plan.read(config), 300, devices=jax.devices()[:1])


def test_a_method_may_name_its_networks(tmp_path, monkeypatch):
  """NETWORK beside TRAINED is checked in one place, whatever `make` says of its model."""
  config = _of_the_user(tmp_path, monkeypatch, "judged", "**options):\n  return None")
  file = tmp_path / "of_judged" / "judged.py"
  file.write_text("from dlm_jax.models import Causal\n\nNETWORK = (Causal,)\n" + file.read_text())
  with pytest.raises(InputError, match=r"trains a Causal, but model\.name='dit'"):
    build.experiment(plan.read(config), 300, devices=jax.devices()[:1])


def test_a_teacher_is_read_where_it_goes():
  """Its parameters arrive in the shardings of the run; none is whole on one device."""
  config = tiny_runs.make().config("idlm", mesh__fsdp=2, mesh__data=4)
  tokenizer = run.open_data(plan.read_data(config)).tokenizer()
  built = build.experiment(plan.read(config), tokenizer.vocab_size)
  teacher = run.load_teacher(built, tokenizer)
  wanted = built.shardings.trees["teacher"]
  same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), teacher, wanted)
  assert all(jax.tree.leaves(same))
  assert any("fsdp" in str(s.spec) for s in jax.tree.leaves(wanted))


def test_what_a_method_says_of_its_network_is_exported(tmp_path):
  """The exporter writes what it is given and knows no method."""
  config = tiny_runs.make().config("teacher")
  built = build.experiment(plan.read(config), 300, devices=jax.devices()[:1])
  says = lambda state: {"extra": {"note": int(state.step)}}  # noqa: E731
  told = dataclasses.replace(built, objective=built.objective._replace(export=says))
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), built.shapes)
  tokenizer = run.open_data(plan.read_data(config)).tokenizer()
  run.export(tmp_path / "final", told, state, 3, tokenizer)
  facts = convert.open_network(tmp_path / "final").facts
  assert facts["note"] == 0 and facts["step"] == 3 and facts["objective"] == "mdlm"
