# SPDX-License-Identifier: Apache-2.0
"""The wheel: what is in it, and that it samples where nothing of the source tree is."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
import tiny_runs

ROOT = pathlib.Path(__file__).parent.parent


def _pip(*arguments, cwd):
  command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet"]
  answer = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
  assert answer.returncode == 0, answer.stderr
  return answer


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Build from a copy, so that the tree is left without build folders."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  source.mkdir()
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source / name)
  ignore = shutil.ignore_patterns("__pycache__")
  for name in ("dlm_jax", "configs"):
    shutil.copytree(ROOT / name, source / name, ignore=ignore)
  options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder / "out"]
  _pip("wheel", *options, source, cwd=folder)
  (path,) = (folder / "out").glob("*.whl")
  return path


def test_contents(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  for path in (ROOT / "dlm_jax").rglob("*.py"):
    assert path.relative_to(ROOT).as_posix() in names
  for path in (ROOT / "configs").glob("*.py"):
    assert f"dlm_jax/configs/{path.name}" in names
  for network in ("teacher", "judge", "novels-teacher", "novels-student", "novels-judge"):
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
      assert f"dlm_jax/assets/{network}/{file}" in names
  assert {"dlm_jax/assets/sha256.json", "dlm_jax/assets/novels-judge/held_out.txt"} <= names
  tops = {name.split("/")[0] for name in names}
  assert {top for top in tops if not top.endswith(".dist-info")} == {"dlm_jax"}
  assert not [name for name in names if "test" in name.split("/")[-1] or "__pycache__" in name]
  assert wheel.stat().st_size < 53e6


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
  where = subprocess.run(
    [sys.executable, "-c", "import dlm_jax; print(dlm_jax.__file__)"],
    cwd=elsewhere,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  assert pathlib.Path(where.stdout.strip()).is_relative_to(target)
