# SPDX-License-Identifier: Apache-2.0
"""Every packaged experiment: it says how to run it, builds, and takes two tiny steps."""

import ast
import importlib
import inspect
import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dlm_jax.configs.base import base
from dlm_jax.configs.recipes import block_diffusion
from ml_collections import ConfigDict

from dlm_jax import mesh
from dlm_jax.experiment import build, plan
from dlm_jax.experiment.config import list_configs, load_config
from dlm_jax.train import loop

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
FILES = sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem not in ("base", "__init__"))


def _module(name):
  return importlib.import_module(f"dlm_jax.configs.{name.partition(':')[0]}")


def _names():
  """Return every experiment as --config takes it; without its variant where there is a default."""
  for file in FILES:
    module = _module(file)
    variants = getattr(module, "VARIANTS", ())
    parameters = inspect.signature(module.get_config).parameters.values()
    if all(parameter.default is not parameter.empty for parameter in parameters):
      yield file
    yield from (f"{file}:{variant}" for variant in variants)


NAMES = sorted(_names())
# Parameters, in millions, of networks that others have or that results are told of; a config of any
# other name need only build.
_MILLIONS = {
  169.63: "owt_dcd owt_didi owt_duo owt_idlm owt_idlm_dcd owt_idlm_duo owt_sdtt owt_teacher",
  36.29: "novels_dcd novels_didi novels_duo novels_idlm novels_idlm_dcd novels_idlm_duo "
  "novels_idlm_sedd novels_sdtt novels_sedd novels_teacher",
  38.81: "novels_ar_target novels_sdar_target",
  30.44: "novels_judge",
  8.39: "novels_ar_draft novels_sdar_draft",
  7.48: "novels_small_idlm novels_small_teacher",
  3.45: "novels_small_judge",
  18.28: "proteins_didi proteins_idlm proteins_teacher",
  14.96: "proteins_judge",
  3.12: "quickstart_didi quickstart_idlm quickstart_teacher quickstart_teacher:cpu",
  2.61: "quickstart_judge quickstart_judge:cpu",
  6.43: "own_text own_text:didi own_text:student own_text:teacher",
  5.25: "own_text:judge",
  2031.74: "sdar:1b7",
  4411.42: "sdar:4b",
  8190.74: "sdar:8b",
  30532.12: "sdar:30b_a3b",
}
_SIZES = {name: size for size, names in _MILLIONS.items() for name in names.split()}


def _tiny(name):
  config = load_config(name)
  small = {"data.length": 8, "model.dim": 8, "model.layers": 1, "model.heads": 2}
  if config.model.name == "decoder":
    small |= {"model.kv_heads": 1, "model.head_dim": 4, "model.mlp_dim": 12, "process.mask_id": -1}
  if config.model.experts:
    small |= {"model.experts": 4, "model.experts_per_token": 2, "model.expert_dim": 8}
  if config.model.name == "dit":
    small["model.cond_dim"] = 4
  small |= {"model.vocab_size": 0, "loader.batch_size": 8, "train.steps": 2}
  small |= {"optim.warmup": 0, "optim.lr": 1e-2}  # or float32 hides the first updates
  small |= {"mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": 1}
  if config.objective.get("chunk"):
    small["objective.chunk"] = 4
  if config.objective.get("warmup"):
    small["objective.warmup"] = 1
  if config.objective.get("group_size"):
    small["objective.group_size"] = 2  # a micro-batch holds whole groups
  if config.objective.get("trained_layers"):
    small["objective.trained_layers"] = 1
  if config.objective.get("steps"):
    small["objective.interval"] = (1e-3, 1.0)  # or of eight positions none is hidden at first
  if config.objective.get("curriculum_end"):
    small["objective.curriculum_end"] = 1  # one step on soft inputs, one on hard tokens
  return load_config(name, {field: str(value) for field, value in small.items()})


def test_the_listing_is_the_folder():
  assert list_configs() == NAMES and {"owt_idlm", "sdar:8b"} < set(NAMES)
  assert "sdar" not in NAMES, "it has no shape of its own"


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_how_to_run_it(name):
  text = _module(name).__doc__
  file, _, variant = name.partition(":")
  assert f"--config={file}" in text and variant in text and "dlm-jax train" in text
  config = load_config(name)
  if config.teacher.path:
    assert re.search(r"Reference: (.*arXiv \d{4}\.\d{5}|own work)", text)
  assert len(text.splitlines()[0]) > 20


@pytest.mark.parametrize("name", NAMES)
def test_values_have_the_types_of_the_base(name):
  every, config = base(), load_config(name)
  assert config.is_locked
  for group in every:
    if group in ("data", "objective", "seed"):
      continue
    fields = {k for k, v in config[group].items() if not isinstance(v, ConfigDict)}
    assert fields == set(every[group]), group
    for part in set(config[group]) - fields:  # of one tree's optimiser
      trained = plan.read(config).objective.module.TRAINED
      assert part in trained and set(config[group][part]) <= fields
    for field in every[group]:
      assert type(config[group][field]) is type(every[group][field]), f"{group}.{field}"
  plan.read(config)


@pytest.mark.parametrize("name", NAMES)
def test_full_size_network_builds(name):
  config = load_config(name)
  kind, _, size = config.data.tokenizer.partition(":")
  vocab = int(size) if kind == "bpe" else max(2048, config.model.vocab_size - 1)  # the mask's row
  model = build.make_model(plan.read(config), vocab)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *build.model_inputs(model))["params"]
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  assert count > 0 and round(count / 1e6, 2) == _SIZES.get(name, round(count / 1e6, 2))


def _choices(group):
  """Return what of a group chooses code: names and switches, and which numbers are not zero."""
  return [(k, v if isinstance(v, str | bool) else bool(v)) for k, v in sorted(group.items())]


def _first_of_a_kind():
  """Yield configs, of those that differ in numbers alone one; slow where a method had its turn.

  Students but IDLM's are slow too: the contract of methods takes steps with them.
  """
  seen, methods = set(), {"dcd", "didi_instruct", "duo", "sdtt"}
  for name in NAMES:
    config = _tiny(name)
    of_model = {k: v for k, v in config.model.items() if k != "dtype"}
    parts = (of_model, config.process, config.objective)
    kind, method = str([_choices(part) for part in parts]), config.objective.name
    if kind not in seen:
      yield pytest.param(name, marks=pytest.mark.slow) if method in methods else name
    seen.add(kind)
    methods.add(method)


@pytest.mark.parametrize("name", list(_first_of_a_kind()))
def test_two_tiny_steps(name):
  built = build.experiment(plan.read(_tiny(name)), 40, devices=jax.devices()[:1])
  objective = built.objective
  rng = np.random.default_rng(0)
  shapes = built.shapes.trees[objective.output]
  teacher = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), shapes)
  state = jax.device_put(objective.init(jax.random.key(0), teacher), built.shardings)
  trained, given = set(built.plan.objective.module.TRAINED), {"teacher"} & set(state.trees)
  assert set(state.trees) == trained | given and bool(given) == bool(built.plan.teacher)
  assert objective.output in state.opt
  assert (objective.output in state.ema) == (built.plan.objective.options["ema_decay"] > 0)
  before = jax.device_get(state.trees)
  run = loop.jit_step(objective, built.mesh, built.shardings, built.plan.seed)
  for seed in range(2):
    tokens = np.random.default_rng(seed).integers(0, 40, size=(objective.batches, 8, 8))
    tokens = jax.device_put(jnp.asarray(tokens, jnp.int32), mesh.batch_sharding(built.mesh, 1))
    state, metrics = run(state, {"tokens": tokens})
    assert all(np.isfinite(float(value)) for value in metrics.values())
  assert int(state.step) == 2
  for tree, old in before.items():
    same = [np.array_equal(*p) for p in zip(*map(jax.tree.leaves, (old, state.trees[tree])))]  # noqa: B905
    assert all(same) == (tree not in trained), tree


# --- where a value stands -------------------------------------------------------------------------


def _settings(name, monkeypatch):
  """Return who set every field of an experiment, in order: {(group, field): [file, ...]}."""
  seen = []
  put = ConfigDict.__setitem__

  def watched(self, key, value):
    frame = sys._getframe(1)
    while frame and CONFIGS not in pathlib.Path(frame.f_code.co_filename).parents:
      frame = frame.f_back
    if frame is not None:
      seen.append((self, key, pathlib.Path(frame.f_code.co_filename)))
    return put(self, key, value)

  file, _, variant = name.partition(":")
  with monkeypatch.context() as patch:
    patch.setattr(ConfigDict, "__setitem__", watched)
    config = _module(file).get_config(*([variant] if variant else []))
  groups = {id(config[group]): group for group in config if isinstance(config[group], ConfigDict)}
  groups[id(config.data.options)] = "data.options"
  places = {}
  for node, key, path in seen:
    if id(node) in groups and path.name != "base.py":
      places.setdefault((groups[id(node)], key), []).append(path)
  return places


@pytest.mark.parametrize("name", NAMES)
def test_a_value_stands_in_at_most_two_files_beside_the_base(name, monkeypatch):
  """One recipe sets a field, and after it the experiment may: so recipes have no order."""
  places = _settings(name, monkeypatch)
  assert ("data", "source") in places
  for field, paths in places.items():
    kinds = [path.parent.name for path in paths]
    assert kinds in (["recipes"], ["configs"], ["recipes", "configs"]), (field, paths)


def test_who_set_a_field_is_seen(monkeypatch):
  places = _settings("novels_didi", monkeypatch)
  assert [p.name for p in places["objective", "kl_beta"]] == ["didi.py", "novels_didi.py"]
  assert [p.name for p in places["optim", "lr"]] == ["brief.py"]
  sdar = _settings("sdar:8b", monkeypatch)
  assert [p.name for p in sdar["model", "kv_heads"]] == ["sdar.py"], "set by update"


def _imported(path, names=False):
  """Yield the modules of ours that a file imports from; of recipes each by name, if asked for."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and node.module.startswith("dlm_jax"):
      if names and node.module.endswith("recipes"):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
      else:
        yield node.module


def test_experiments_lean_on_recipes_only_and_those_on_the_base():
  for file in FILES:
    allowed = {"dlm_jax.configs.base", "dlm_jax.configs.recipes"}
    assert set(_imported(CONFIGS / f"{file}.py")) <= allowed, file
  for path in (CONFIGS / "recipes").glob("*.py"):
    lower = {f"dlm_jax.configs.recipes.{name}" for name in ("brief", "rounds")}  # shared trainings
    allowed = {"dlm_jax.configs.base"} | (lower if path.stem not in ("brief", "rounds") else set())
    assert set(_imported(path, names=True)) <= allowed, path


def test_bd3_lm_and_sdar_differ_in_their_switches():
  """BD3-LM has a recipe and no experiment."""
  ours, theirs = base(), base()
  block_diffusion.bd3_lm(ours)
  block_diffusion.sdar(theirs, start="somewhere")
  different = {k for k, v in ours.objective.items() if v != theirs.objective[k]}
  assert different == {"levels", "at_least_one", "subs"} and ours.objective.subs
  assert theirs.start.path == "somewhere" and not ours.start.path


# --- no field without a reader --------------------------------------------------------------------


def _fields():
  yield "", "seed"
  for name in NAMES:
    config = load_config(name)
    for group in config:
      if group not in ("seed", "data") or name == "quickstart_teacher":
        yield from ((group, field) for field in (config[group] if group != "seed" else ()))


def _names_in_the_package():
  """Return every attribute, keyword, parameter and dataclass field named in the package."""
  names = set()
  for path in (ROOT / "dlm_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Attribute):
        names.add(node.attr)
      elif isinstance(node, ast.arg):
        names.add(node.arg)
      elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        names.add(node.target.id)
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        names.add(node.value)
  return names


def test_every_field_is_read_somewhere():
  names = _names_in_the_package()
  unread = [f"{group}.{field}" for group, field in _fields() if field not in names]
  assert not unread
  assert "no_such_field" not in names
