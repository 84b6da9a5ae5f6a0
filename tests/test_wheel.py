# SPDX-License-Identifier: Apache-2.0
"""Wheel and sdist: what is in them, their version, and that they sample far from the sources."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser

import pytest
import tiny_runs

ROOT = pathlib.Path(__file__).parent.parent
FILES = (
  "setup.py",
  "pyproject.toml",
  "MANIFEST.in",
  "README.md",
  "LICENSE",
  "CHANGELOG.md",
  "CITATION.cff",
)


def _run(*command, cwd, **environment):
  answer = subprocess.run(
    [str(part) for part in command],
    cwd=cwd,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    check=False,
  )
  assert answer.returncode == 0, answer.stderr
  return answer.stdout


def _pip(*arguments, cwd):
  return _run(sys.executable, "-m", "pip", *arguments, "--quiet", cwd=cwd)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Copy the tree without git, as an archive has it; building leaves folders behind."""
  source = tmp_path_factory.mktemp("wheel") / "source"
  source.mkdir()
  for name in FILES:
    shutil.copy(ROOT / name, source / name)
  ignore = shutil.ignore_patterns("__pycache__")
  for name in ("dlm_jax", "configs"):
    shutil.copytree(ROOT / name, source / name, ignore=ignore)
  return source


@pytest.fixture(scope="module")
def sdist(source):
  """Build the sdist of the copy."""
  out = source.parent / "sdist"
  out.mkdir()
  code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
  _run(sys.executable, "-c", code, cwd=source)
  (path,) = out.glob("*.tar.gz")
  return path


@pytest.fixture(scope="module")
def wheel(sdist):
  """Build the wheel of the unpacked sdist: what a user without a wheel does."""
  folder = sdist.parent.parent
  with tarfile.open(sdist) as archive:
    archive.extractall(folder / "unpacked", filter="data")
  (source,) = (folder / "unpacked").iterdir()
  options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder / "out"]
  _pip("wheel", *options, source, cwd=folder)
  (path,) = (folder / "out").glob("*.whl")
  return path


@pytest.mark.slow
def test_contents(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  for path in (ROOT / "dlm_jax").rglob("*.py"):
    assert path.relative_to(ROOT).as_posix() in names
  for path in (ROOT / "configs").rglob("*.py"):
    assert f"dlm_jax/configs/{path.relative_to(ROOT / 'configs').as_posix()}" in names
  assert {"dlm_jax/py.typed", "dlm_jax/configs/recipes/idlm.py"} <= names
  for network in ("teacher", "judge", "novels-teacher", "novels-student", "novels-judge"):
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
      assert f"dlm_jax/assets/{network}/{file}" in names
  assert {"dlm_jax/assets/sha256.json", "dlm_jax/assets/novels-judge/held_out.txt"} <= names
  tops = {name.split("/")[0] for name in names}
  assert {top for top in tops if not top.endswith(".dist-info")} == {"dlm_jax"}
  assert not [name for name in names if "test" in name.split("/")[-1] or "__pycache__" in name]
  assert wheel.stat().st_size < 53e6


@pytest.mark.slow
def test_contents_of_the_sdist(sdist):
  with tarfile.open(sdist) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
  assert set(FILES) | {"configs/base.py", "configs/recipes/idlm.py", "dlm_jax/py.typed"} <= names
  assert not [name for name in names if name.split("/")[0] in ("tests", "docs", ".ci", "colabs")]
  assert sdist.stat().st_size < 53e6


@pytest.mark.slow
def test_metadata(wheel):
  archive = zipfile.ZipFile(wheel)
  (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
  told = HeaderParser().parsestr(archive.read(name).decode())
  assert told["Name"] == "dlm_jax" and told["License-Expression"] == "Apache-2.0"
  assert told["Version"] == "0.1.0", "the fallback: a copy has no tags"
  assert told["Requires-Python"] == ">=3.11"
  extras = {"test", "cuda13", "tpu", "eval", "notebooks", "hub", "serve", "chat"}
  assert set(told.get_all("Provides-Extra")) == extras
  needed = [line for line in told.get_all("Requires-Dist") if "extra ==" not in line]
  assert len(needed) == 17 and all(">=" in line and "<" not in line for line in needed)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_version_is_the_tag(tmp_path):
  """Of a tagged clone the tag; a shallow clone, which may see none, has a version as well."""
  tree = tmp_path / "tree"
  tree.mkdir()
  shutil.copy(ROOT / "pyproject.toml", tree)

  def git(*arguments, cwd=tree):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    _run("git", *identity, *arguments, cwd=cwd)

  def version(cwd):
    return _run(sys.executable, "-m", "setuptools_scm", cwd=cwd).strip().splitlines()[-1]

  git("init", "--quiet")
  git("add", ".")
  git("commit", "--quiet", "-m", "one")
  git("tag", "v9.8.7")
  assert version(tree) == "9.8.7"
  git("commit", "--quiet", "--allow-empty", "-m", "two")
  assert version(tree).startswith("9.8.8.dev1+g")
  git("clone", "--quiet", "--depth=1", "--no-tags", f"file://{tree}", tmp_path / "shallow")
  assert version(tmp_path / "shallow").startswith("0.1.")


def test_without_metadata_there_is_a_version(tmp_path):
  """A source tree on the path that was never installed."""
  shutil.copy(ROOT / "dlm_jax" / "__init__.py", tmp_path / "dlm_jax.py")
  code = (
    "import importlib.metadata as m\n"
    "def missing(name): raise m.PackageNotFoundError(name)\n"
    "m.version = missing\n"
    "import dlm_jax; print(dlm_jax.__version__)"
  )
  assert _run(sys.executable, "-c", code, cwd=tmp_path).strip() == "0+unknown"


@pytest.mark.slow
def test_installed_elsewhere_it_samples(wheel, tmp_path):
  target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
  elsewhere.mkdir()
  _pip("install", "--no-deps", "--target", target, wheel, cwd=elsewhere)
  environment = tiny_runs.environment(devices=1) | {"PYTHONPATH": str(target)}
  command = [sys.executable, "-m", "dlm_jax", "sample", "--model=novels-student"]
  answer = subprocess.run(
    [*command, "--steps=2", "--length=32"],
    cwd=elsewhere,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert answer.returncode == 0, answer.stderr
  assert answer.stdout.startswith("──── 1 ────\n") and len(answer.stdout) > 40
  code = (
    "import dlm_jax; from dlm_jax.experiment.config import list_configs, load_config\n"
    "print(dlm_jax.__file__, dlm_jax.__version__, load_config('sdar:8b').model.dim)\n"
    "print(*list_configs())"
  )
  where = subprocess.run(
    [sys.executable, "-c", code],
    cwd=elsewhere,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  first, names = where.stdout.splitlines()
  path, version, dim = first.rsplit(" ", 2)
  assert pathlib.Path(path).is_relative_to(target) and (version, dim) == ("0.1.0", "4096")
  assert {"novels_idlm", "quickstart_judge:cpu", "sdar:30b_a3b"} <= set(names.split())
