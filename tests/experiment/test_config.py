# SPDX-License-Identifier: Apache-2.0
"""Configs by name, variant or file, what their errors say, and fields that can be unset."""

import json

import jax
import pytest

from dlm_jax.errors import InputError
from dlm_jax.experiment import build, plan
from dlm_jax.experiment.config import list_configs, load_config

_START = "from dlm_jax.configs.base import base, optional\n\n\n"
_VARIED = (
  'VARIANTS = {"small": 8, "large": 64}\n\n\ndef get_config(size):\n  c = base()\n'
  "  c.model.dim = VARIANTS[size]\n  return c\n"
)


@pytest.fixture
def write(tmp_path):
  """Return a function that writes a config file and returns its path."""

  def file(body, start=_START):
    path = tmp_path / "mine.py"
    path.write_text(start + body)
    return str(path)

  return file


def _fails(name, message, **overrides):
  fields = {key.replace("__", "."): value for key, value in overrides.items()}
  with pytest.raises(InputError) as error:
    load_config(name, fields)
  assert message in str(error.value), error.value
  assert len(str(error.value).splitlines()) == 1


# --- variants -------------------------------------------------------------------------------------


def test_a_variant_is_a_shape():
  small, large = load_config("sdar:1b7"), load_config("sdar:30b_a3b", {"optim.lr": "1"})
  assert (small.model.dim, small.model.experts) == (2048, 0)
  assert (large.model.layers, large.model.experts, large.optim.lr) == (48, 128, 1.0)
  assert small.start.path == small.data.tokenizer == "models/SDAR-1.7B-Chat"


def test_a_variant_may_have_a_default():
  assert load_config("quickstart_teacher").loader.batch_size == 512
  assert load_config("quickstart_teacher:cpu").loader.batch_size == 64
  assert {"quickstart_teacher", "quickstart_teacher:cpu"} < set(list_configs())


def test_unknown_variants_answer_with_the_list():
  listed = "choose one of sdar:1b7, sdar:4b, sdar:8b, sdar:30b_a3b"
  _fails("sdar:9b", "--config=sdar:9b is no variant of sdar (did you mean 'sdar:")
  _fails("sdar:2b", listed)
  _fails("sdar:30b", "is no variant of sdar (did you mean '30b_a3b'?); " + listed)
  _fails("sdar", "--config=sdar needs a variant; " + listed)
  _fails("sdar:", "--config=sdar: needs a variant; " + listed)
  _fails("sadr:8b", "is unknown (did you mean 'sdar:8b'?)")
  _fails("novels_didi:8b", "novels_didi has no variants; use --config=novels_didi")


def test_files_of_the_user_have_variants(write):
  path = write(_VARIED)
  assert load_config(f"{path}:small").model.dim == 8
  assert load_config(f"{path}:large", {"model.dim": "16"}).model.dim == 16
  _fails(f"{path}:smal", f"(did you mean 'small'?); choose one of {path}:small, {path}:large")
  _fails(path, f"needs a variant; choose one of {path}:small")
  free = write("def get_config(dim='8'):\n  c = base()\n  c.model.dim = int(dim)\n  return c\n")
  assert (load_config(free).model.dim, load_config(f"{free}:24").model.dim) == (8, 24)


# --- errors of a file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("def get_config():\n  return bse()\n", ":5: NameError: name 'bse' is not defined"),
    ("x = 1 +\n", ":4: SyntaxError: invalid syntax"),
    ("import no_such_module\n", ":4: ModuleNotFoundError: No module named 'no_such_module'"),
    ("def get_config():\n  c = base()\n  c.optim.lr *= c.optim.rate\n  return c\n", ":6: Attribu"),
    ("def get_config():\n  c = base()\n  c.train.steps = 'many'\n  return c\n", ":6: TypeError"),
    ("def get_config():\n  return base(1)\n", ":5: "),
  ],
)
def test_errors_name_file_and_line(write, body, message):
  path = write(body)
  _fails(path, path + message)


def test_a_relative_path_stays_as_it_was_given(write, tmp_path, monkeypatch):
  write("x = 1\ny = z\n")
  monkeypatch.chdir(tmp_path)
  _fails("mine.py", "mine.py:5: NameError: name 'z' is not defined")
  write("x = (\n")
  _fails("./mine.py", "./mine.py:4: SyntaxError: ")
  write("def get_config(size):\n  return base(size)\n")
  _fails("mine.py:7", "mine.py:5: ")


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("c.optim.lrr = 1.0", "there is no field 'optim.lrr' (did you mean 'lr'?)"),
    ("c.model.width = 8", "there is no field 'model.width'"),
    ("c.optm = base().optim", "there is no group 'optm' (did you mean 'optim'?)"),
    ("del c.train.keep", "the field 'train.keep' is missing"),
    ("del c.mesh", "the group 'mesh' is missing"),
    ("c = c.to_dict()", "get_config() returned dict; return what base() gave"),
  ],
)
def test_fields_are_those_of_the_base(write, line, message):
  path = write(f"def get_config():\n  c = base()\n  {line}\n  return c\n")
  _fails(path, message)


def test_a_method_has_fields_of_its_own(write):
  path = write("def get_config():\n  c = base()\n  c.objective.strength = 2.0\n  return c\n")
  assert load_config(path, {"objective.strength": "3"}).objective.strength == 3.0


# --- fields that can be unset ---------------------------------------------------------------------

_OPTIONAL = (
  "def get_config():\n  c = base()\n"
  "  c.objective.layers = optional(int, 4)\n  c.objective.rate = optional(float)\n"
  "  c.objective.lengths = optional(tuple)\n  c.objective.anything = None\n"
  "  c.objective.flag = optional(bool, True)\n  c.objective.word = optional(str)\n  return c\n"
)


@pytest.mark.parametrize(
  ("field", "text", "value"),
  [
    ("layers", "none", None),
    ("layers", "None", None),
    ("layers", "2", 2),
    ("rate", "none", None),
    ("rate", "1", 1.0),
    ("lengths", "none", None),
    ("lengths", "4", (4,)),
    ("lengths", "[4, 8]", (4, 8)),
    ("lengths", "", ()),
    ("anything", "none", None),
    ("anything", "2.5", 2.5),
    ("flag", "none", None),
    ("flag", "false", False),
    ("word", "none", None),
    ("word", "7", "7"),
  ],
)
def test_what_may_be_unset(write, field, text, value):
  found = load_config(write(_OPTIONAL), {f"objective.{field}": text}).objective[field]
  assert found == value and type(found) is type(value)


def test_set_again_after_it_was_unset(write):
  config = load_config(write(_OPTIONAL), {"objective.layers": "none"})
  config.objective.layers = 3
  assert config.objective.layers == 3
  assert json.loads(config.to_json())["objective"]["rate"] is None


def test_what_may_not_be_unset(write):
  path = write(_OPTIONAL)
  _fails(path, "expected int like 4 or none, got str", objective__layers="few")
  _fails(path, "expected float or none, got str", objective__rate="fast")
  _fails(path, "expected int like 100000, got NoneType", train__steps="none")
  _fails(path, "expected bool like False, got NoneType", model__tied="none")
  assert load_config(path, {"teacher.path": "none"}).teacher.path == "none", "a path is text"


def test_tuples_of_the_base_are_emptied():
  for text in ("none", "()", "", "[]"):
    assert load_config("novels_idlm", {"data.buckets": text}).data.buckets == ()
  _fails("novels_idlm", "expected tuple like (4, 8), got str", evaluate__nfes="few")


def test_an_unset_field_reaches_the_method():
  """DiDi-Instruct's discriminator then trains four blocks, or all of a network with fewer."""
  small = {"model.layers": "3", "objective.trained_layers": "none", "objective.chunk": "none"}
  small |= {"model.dim": "8", "model.heads": "2", "model.cond_dim": "4", "data.length": "8"}
  config = load_config("quickstart_didi", small)
  read = plan.read(config)
  model = build.make_model(read, 40)
  objective = build.make_objective(read, model, build.make_process(read, model))
  params = jax.eval_shape(model.init, jax.random.key(0), *build.model_inputs(model))["params"]
  state = jax.eval_shape(objective.init, jax.random.key(0), params)
  beside = objective.export(state)["beside"]
  assert beside["discriminator"].model.trained_layers == 3
  _fails("quickstart_didi", "expected int like 2 or none", objective__trained_layers="top")
