# SPDX-License-Identifier: Apache-2.0
"""Documented examples are true: every `>>>` of the package runs, but for those that say +SKIP."""

import doctest
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = {
  ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): text
  for path in sorted((ROOT / "dlm_jax").rglob("*.py"))
  if ">>> " in (text := path.read_text(encoding="utf-8"))
}


def _examples(module):
  finder = doctest.DocTestFinder(exclude_empty=True)
  return [test for test in finder.find(importlib.import_module(module), module) if test.examples]


@pytest.mark.parametrize("module", TEXTS)
def test_examples(module, tmp_path, monkeypatch):
  """In an empty directory; each docstring with the names of its module."""
  monkeypatch.chdir(tmp_path)
  tests = _examples(module)
  assert sum(len(test.examples) for test in tests) == TEXTS[module].count(">>> ")
  for test in tests:
    said = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


def test_there_are_examples_that_run():
  options = [e.options for name in TEXTS for test in _examples(name) for e in test.examples]
  assert sum(not any(option.values()) for option in options) > 20


def test_a_false_example_is_noticed():
  test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "false", None, 0)
  said = []
  doctest.DocTestRunner(verbose=False).run(test, out=said.append)
  assert "Expected:\n    3\nGot:\n    2\n" in "".join(said)
