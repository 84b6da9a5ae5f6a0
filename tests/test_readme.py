# SPDX-License-Identifier: Apache-2.0
"""What README and docs tell people to type works: Python runs, commands parse, links exist."""

import pathlib
import re
import shlex

import pytest

from dlm_jax.cli import main as cli
from dlm_jax.experiment.config import list_configs, load_config

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
  """Return every dlm-jax command line of README and docs, continuation lines joined."""
  pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))]
  found = re.findall(r"```(?:sh|bash)\n(.*?)```", "\n".join([README, *pages]), flags=re.DOTALL)
  lines = "\n".join(found).replace("\\\n", " ").splitlines()
  lines = [line.split(" && ")[-1].split("#")[0].strip() for line in lines]
  return [line for line in lines if line.startswith("dlm-jax ")]


def test_python_blocks_run():
  """The block that needs no trained model runs; the other one only names a public function."""
  ran = 0
  for block in blocks("python"):
    if "runs/" in block:
      compile(block, "README.md", "exec")
      continue
    scope = {}
    exec(block, scope)
    assert scope["tokens"].shape == (4, 32)
    ran += 1
  assert ran == 1


@pytest.mark.parametrize("command", commands())
def test_commands_name_what_exists(command):
  """Verbs, configs and config fields exist. Running them all takes hours."""
  verb, *arguments = shlex.split(command)[1:]
  assert verb in cli.VERBS
  overrides, name = {}, None
  for argument in arguments:
    if argument.startswith("--config."):
      field, _, value = argument.removeprefix("--config.").partition("=")
      overrides[field] = value
    elif argument.startswith("--config="):
      name = argument.partition("=")[2]
  if name:
    load_config(name, overrides)


def test_there_are_commands():
  assert len(commands()) >= 6


def test_links_exist():
  for target in re.findall(r"\]\(([^)#]+)\)", README):
    if not target.startswith("http"):
      assert (ROOT / target).exists(), target


def test_ci_runs_the_readmes_test_command():
  script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
  assert "pytest -n 2" in README and "\npytest -n 2\n" in script
  assert "pytest -n 2 -m slow" in README and "\npytest -n 2 -m slow\n" in script
  assert "set -euo pipefail" in script, "either failure is one of the script"
  assert "-e '.[test]'" in README and "-e '.[test]'" in script
  assert "ruff check\n" in script and "ruff format --check\n" in script


def test_configs_that_the_readme_names_exist():
  known = set(list_configs())
  named = set(re.findall(r"`((?:novels|owt|quickstart)_\w+)`", README))
  assert named and named <= known
