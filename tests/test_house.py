# SPDX-License-Identifier: Apache-2.0
"""The rules of the house, read from the syntax tree: who may import whom, sizes, names, words.

A module imports only from lower floors or from its own folder. The table below is the layout.
"""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "dlm_jax"

FLOORS = {
  "arrays": 0,
  "disk": 0,
  "errors": 0,
  "fields": 0,
  "json_file": 0,
  "mesh": 0,
  "remote": 0,
  "schedules": 0,
  "draw": 0,
  "process": 1,
  "models": 2,
  "objectives": 3,
  "decode": 3,
  "data": 3,
  "assets": 3,
  "sample": 4,
  "train": 4,
  "convert": 4,
  "configs": 4,  # shared by the command line and `experiment`; imports ml_collections only
  "evaluate": 5,
  "experiment": 6,
  "text": 6,
  "bench": 7,
  "quickstart": 7,
  "cli": 8,
  "__main__": 9,
}
OPEN_FLOORS = (0,)  # single files that may lean on each other
# Which rooms may import these, as path prefixes below dlm_jax/ ("configs" is the top folder).
RESERVED = {
  "flax.linen": ("models/",),
  "orbax": ("train/checkpoint.py",),
  "absl.flags": ("cli/",),
  "ml_collections": (
    "configs/",
    "cli/",
    *(f"experiment/{n}.py" for n in ("config", "plan", "run")),
  ),
}
HEAVY = ("tensorflow", "tensorflow_datasets", "matplotlib", "orbax", "grain")
MAX_FILE, MAX_FUNCTION, MIN_DOCUMENTED = 400, 60, 0.95


def _package_files():
  """Return (path, name below dlm_jax/) of every shipped python file, configs included."""
  files = [(path, path.relative_to(PACKAGE).as_posix()) for path in PACKAGE.rglob("*.py")]
  files += [(path, path.relative_to(ROOT).as_posix()) for path in (ROOT / "configs").rglob("*.py")]
  return sorted(files)


def _python_files():
  """Return every python file of the repository that is written by hand."""
  folders = ("dlm_jax", "configs", "tests", "launch", "colabs", "docs", "benchmarks", ".ci")
  found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
  return sorted(found + list(ROOT.glob("*.py")))


def _tree(path):
  return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imports(tree, package):
  """Yield every absolute module name that a file imports, also inside functions.

  `from a import b` yields both "a" and "a.b": b may be a module.
  """
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, node.lineno
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = package.split(".")[: len(package.split(".")) - (node.level - 1)]
        base = ".".join([*parents, base] if base else parents)
      yield base, node.lineno
      for alias in node.names:
        yield f"{base}.{alias.name}", node.lineno


def _package_of(name):
  """Return the dotted package that a file below dlm_jax/ lives in."""
  return ".".join(["dlm_jax", *pathlib.PurePosixPath(name).parts[:-1]])


def _room(name):
  return pathlib.PurePosixPath(name).parts[0].removesuffix(".py")


def _within(module, prefix):
  return module == prefix or module.startswith(prefix + ".")


def _floor_offences(name, tree):
  """Return the imports of one file that climb to a higher floor or sideways to another room."""
  room, offences = _room(name), []
  for module, line in _imports(tree, _package_of(name)):
    parts = module.split(".")
    if parts[0] != "dlm_jax" or len(parts) < 2:
      continue
    here, there = FLOORS[room], FLOORS.get(parts[1], -1)
    sideways = there == here and here not in OPEN_FLOORS
    if parts[1] != room and (there > here or sideways):
      offences.append(f"{name}:{line} imports {module} (floor {there}, from floor {here})")
  return offences


def test_every_room_has_a_floor():
  rooms = {_room(name) for _, name in _package_files()} - {"__init__"}
  assert rooms <= set(FLOORS), f"not in the floors table: {sorted(rooms - set(FLOORS))}"


def test_imports_go_down():
  offences = []
  for path, name in _package_files():
    if name != "__init__.py":
      offences += _floor_offences(name, _tree(path))
  assert not offences, "\n".join(sorted(set(offences)))


def test_the_floor_test_can_fail():
  climbing = "def f():\n  from dlm_jax.sample import generate\n"
  assert _floor_offences("models/dit.py", ast.parse(climbing))
  assert _floor_offences("objectives/idlm.py", ast.parse("from dlm_jax import sample"))
  assert _floor_offences("models/dit.py", ast.parse("from ..train import loop"))
  assert not _floor_offences("models/dit.py", ast.parse("from . import layers"))
  assert not _floor_offences("sample/_ancestral.py", ast.parse("from dlm_jax.models import DiT"))


@pytest.mark.parametrize("library", list(RESERVED))
def test_reserved_libraries(library):
  offences = []
  for path, name in _package_files():
    if not name.startswith(RESERVED[library]):
      offences += [
        f"{name}:{line} imports {module}"
        for module, line in _imports(_tree(path), _package_of(name))
        if _within(module, library)
      ]
  assert not offences, "\n".join(sorted(set(offences)))


@pytest.mark.parametrize("library", ["tensorflow", "torch", "transformers"])
def test_never_imported(library):
  offences = [
    f"{name}:{line}"
    for path, name in _package_files()
    for module, line in _imports(_tree(path), _package_of(name))
    if _within(module, library)
  ]
  assert not offences, "\n".join(offences)


def test_the_top_imports_nothing_heavy_eagerly():
  """`import dlm_jax` may name submodules lazily, but runs nothing beyond the standard library."""
  for node in _tree(PACKAGE / "__init__.py").body:
    if isinstance(node, ast.Import | ast.ImportFrom):
      for module, line in _imports(ast.Module([node], []), "dlm_jax"):
        top = module.split(".")[0]
        allowed = top in sys.stdlib_module_names or module.startswith("dlm_jax.errors")
        assert allowed or module == "dlm_jax", f"__init__.py:{line} imports {module}"


# --- words and sizes ------------------------------------------------------------------------------


def test_every_draw_is_exact():
  """`jax.random.categorical` cannot draw rare tokens in its default mode; use `dlm_jax.draw`."""
  offences = []
  for path, name in _package_files():
    tree = _tree(path)
    imported = {module for module, _ in _imports(tree, _package_of(name))}
    if "jax.random.categorical" in imported:
      offences.append(f"{name} imports it by name")
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and ast.unparse(node).endswith("random.categorical"):
        offences.append(f"{name}:{node.lineno}")
  assert not offences, "\n".join(offences)


def test_json_has_one_reader():
  """Of depth, doubles, pipes and wrong shapes one file knows: `json_file`."""
  offences = [
    f"{name}:{node.lineno}"
    for path, name in _package_files()
    for node in ast.walk(_tree(path))
    if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads")
  ]
  sandbox = "data/tokenizers/sandbox.py:"  # the other process, which imports nothing of ours
  readers = ("json_file.py:", sandbox)
  assert offences and all(place.startswith(readers) for place in offences), offences


def test_wrong_values_are_input_errors():
  """Plain ValueErrors are those of readers, which know the fault and not the file."""
  readers = (
    "convert/stored.py",
    "convert/torch_file.py",
    "data/dataset.py",
    "json_file.py",
    "train/checkpoint.py",
  )
  found = {
    name: node.lineno
    for path, name in _package_files()
    for node in ast.walk(_tree(path))
    if isinstance(node, ast.Raise)
    and node.exc is not None
    and re.match(r"ValueError\b", ast.unparse(node.exc))
  }
  assert sorted(found) == sorted(readers), found


def test_no_bare_assert_and_no_not_implemented():
  offences = []
  for path, name in _package_files():
    for node in ast.walk(_tree(path)):
      if isinstance(node, ast.Assert):
        offences.append(f"{name}:{node.lineno} assert")
      if isinstance(node, ast.Name) and node.id in ("NotImplementedError", "NotImplemented"):
        offences.append(f"{name}:{node.lineno} {node.id}")
  assert not offences, "\n".join(offences)


def test_no_unfinished_business():
  marks = re.compile(
    r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]) + r")\b"
  )
  offences = [
    f"{path.relative_to(ROOT)}:{number}"
    for path in _python_files()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    if marks.search(line)
  ]
  assert not offences, "\n".join(offences)


def test_names():
  offences = []
  for path, name in _package_files():
    if path.stem in ("utils", "util", "helpers", "helper", "misc", "common_utils"):
      offences.append(f"{name}: name the thing that the file holds")
    for node in ast.walk(_tree(path)):
      if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not node.name.startswith("get_"):
        continue
      # ml_collections finds a config file's function by this name.
      if not (name.startswith("configs/") and node.name == "get_config"):
        offences.append(f"{name}:{node.lineno} {node.name}")
  assert not offences, "\n".join(offences)


def test_licence_line():
  missing = [
    str(path.relative_to(ROOT))
    for path in _python_files()
    if not path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n")
  ]
  assert not missing, "\n".join(missing)


def test_sizes():
  offences = []
  for path in _python_files():
    lines = path.read_text(encoding="utf-8").splitlines()
    name = path.relative_to(ROOT)
    # Tests are lists of cases: the limit on files is for what we ship.
    if len(lines) > MAX_FILE and "tests" not in name.parts:
      offences.append(f"{name}: {len(lines)} lines, at most {MAX_FILE}")
    for node in ast.walk(_tree(path)):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        length = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node):  # the docstring is for the reader's benefit: not counted
          length -= node.body[0].end_lineno - node.body[0].lineno + 1
        if length > MAX_FUNCTION:
          offences.append(f"{name}:{node.lineno} {node.name}: {length} lines of {MAX_FUNCTION}")
  assert not offences, "\n".join(offences)


def _public_functions():
  """Yield (place, node) of every public function, method and class of the package."""
  for path, name in _package_files():
    if name.startswith("configs/"):
      continue  # an experiment is described by its module's docstring
    pending = [(node, None) for node in _tree(path).body]
    while pending:
      node, parent = pending.pop()
      if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
        continue
      yield f"{name}:{node.lineno} {node.name}", node, parent
      if isinstance(node, ast.ClassDef):
        pending += [(child, node) for child in node.body]


def _explains_itself(node, parent):
  """Say whether a method needs no docstring of its own.

  That is Linen's `setup`, and a one-line method of a class (α, α', … of a schedule), whose
  meaning the module states once for the whole family.
  """
  return parent is not None and (node.name == "setup" or len(node.body) == 1)


def test_public_functions_have_docstrings():
  counted, missing = 0, []
  for place, node, parent in _public_functions():
    if _explains_itself(node, parent):
      continue
    counted += 1
    if not ast.get_docstring(node):
      missing.append(place)
  report = "\n".join(missing)
  assert counted > 0
  assert len(missing) <= (1 - MIN_DOCUMENTED) * counted, f"of {counted}, without:\n{report}"


def test_modules_have_docstrings():
  missing = [
    name
    for path, name in _package_files()
    if name != "__main__.py" and not ast.get_docstring(_tree(path))
  ]
  assert not missing, "\n".join(missing)


# --- imports of the running package -------------------------------------------------------------


def test_sampling_imports_quickly_and_lightly():
  """In a fresh process: under three seconds of processor time, nothing heavy comes along.

  Not wall-clock time: other tests run on the same cores.
  """
  code = (
    "import time, dlm_jax.sample, sys\n"
    "print(time.process_time())\n"
    f"print([name for name in {HEAVY!r} if name in sys.modules])"
  )
  times = []
  for _ in range(3):
    answer = subprocess.run(
      [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    seconds, loaded = answer.stdout.splitlines()
    assert loaded == "[]"
    times.append(float(seconds))
    if times[-1] < 3:
      break
  assert min(times) < 3, times


def test_no_device_query_at_import():
  """Importing the pure floors starts no back end: a user may still choose devices afterwards."""
  code = (
    "import dlm_jax, dlm_jax.process, dlm_jax.models, dlm_jax.objectives, dlm_jax.sample\n"
    "from jax._src import xla_bridge\n"
    "print(xla_bridge.backends_are_initialized())"
  )
  answer = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert answer.returncode == 0, answer.stderr
  assert answer.stdout.strip() == "False"


def _rooms_with_a_public_list():
  for path, name in _package_files():
    if path.name == "__init__.py" and "__all__" in path.read_text(encoding="utf-8"):
      yield "dlm_jax" if name == "__init__.py" else _package_of(name)


@pytest.mark.parametrize("module", sorted(_rooms_with_a_public_list()))
def test_public_names_resolve(module):
  room = importlib.import_module(module)
  for name in room.__all__:
    assert getattr(room, name) is not None, f"{module}.{name}"
  assert len(set(room.__all__)) == len(room.__all__)
