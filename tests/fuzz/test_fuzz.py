# SPDX-License-Identifier: Apache-2.0
"""Thousands of damaged files and strange flags: exit code 2 and one line, or nothing was wrong.

DLM_JAX_FUZZ_CASES sets how many there are in all, DLM_JAX_FUZZ_SEED draws others. What fails is
made smaller, and told with the steps and bytes that show it again.
"""

import os

import bases
import cases
import mutations
import pytest
import strange_flags
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("DLM_JAX_FUZZ_CASES", "500"))
MORE = max(CASES, 3000)
SEED = int(os.environ.get("DLM_JAX_FUZZ_SEED", "0"))
SHARES = {"networks": 0.5, "data": 0.25, "flags": 0.25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def child(folder):
  made = cases.Child(folder)
  yield made
  made.close()


@pytest.fixture(scope="module")
def tried(folder, child):
  """Return, by part, what is drawn and how it is tried."""
  networks, data = bases.networks(folder), bases.data(folder)
  commands = strange_flags.commands(folder, folder / "decoder")
  assert not strange_flags.verbs_without(commands)
  for base in (*networks, *data):
    verdict = child.run(base.argv, base.folder)
    assert verdict["code"] == 0, (base.name, verdict)  # else damage to it would try nothing
  of_flags = st.sampled_from(commands).flatmap(
    lambda one: st.tuples(one.strange(), st.just(one.writes))
  )
  return {
    "networks": (cases.damaged(networks), cases.try_damage),
    "data": (cases.damaged(data), cases.try_damage),
    "flags": (of_flags, cases.try_flags),
  }


def _fuzz(count, child, drawn, trial):
  """Try so many cases."""

  @seed(SEED)
  @settings(
    max_examples=count,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    print_blob=False,
  )
  @given(case=drawn)
  def every_case(case):
    wrong, shown = trial(child, *case)
    assert not wrong, f"{wrong}\n{shown}"

  every_case()


@pytest.mark.parametrize("part", SHARES)
def test_fuzz(child, tried, part):
  _fuzz(round(CASES * SHARES[part]), child, *tried[part])


@pytest.mark.slow
@pytest.mark.parametrize("part", SHARES)
def test_fuzz_longer(child, tried, part):
  _fuzz(round(MORE * SHARES[part]), child, *tried[part])


# --- what tries can fail --------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "wrong"),
  [
    ({}, ""),
    ({"code": 0, "out": "a\nb"}, ""),
    ({"code": 1, "err": "Traceback"}, "ended with 1"),
    ({"code": "SIGSEGV"}, "ended with SIGSEGV"),
    ({"out": "x"}, "failed and wrote to stdout"),
    ({"err": ""}, "failed in 0 lines of 0 characters"),
    ({"err": "dlm-jax: a\nb\n"}, "failed in 2 lines of 13 characters"),
    ({"err": "a\n"}, "failed in 1 lines of 2 characters"),
    ({"err": "dlm-jax: \x1b[2J\n"}, "failed in a line that is not printable"),
    ({"left": ["out"]}, "failed and left ['out']"),
  ],
)
def test_what_is_a_complaint(changes, wrong):
  verdict = {"code": 2, "out": "", "err": "dlm-jax sample: a.\n", "left": []}
  assert cases.complaint(verdict | changes) == wrong


@pytest.mark.slow
def test_every_step_changes_something(folder):
  """Steps of a form, by name, on a file of that form."""
  json_ = b'{"a": 1, "b": [2, {"c": 3}]}'
  for step, wanted in (
    (("put", [0], mutations.Raw("nan")), b'{"a": NaN, "b": [2, {"c": 3}]}'),
    (("drop", [1, 0]), b'{"a": 1, "b": [{"c": 3}]}'),
    (("twice", [0], "x"), b'{"a": "x", "a": 1, "b": [2, {"c": 3}]}'),
    (("rename", [1, 1, 0], "d"), b'{"a": 1, "b": [2, {"d": 3}]}'),
    (("add", [], "z", None), b'{"a": 1, "b": [2, {"c": 3}], "z": null}'),
    (("copy", [0], [1, 1]), b'{"a": {"c": 3}, "b": [2, {"c": 3}]}'),
    (("wrap", [0], 2), b'{"a": [[1]], "b": [2, {"c": 3}]}'),
    (("end", 5), b'{"a":'),
    (("insert", 0, b"\xef\xbb\xbf"), b"\xef\xbb\xbf" + json_),
  ):
    assert mutations.apply("json", json_, [step]) == wanted, step


@pytest.mark.slow
def test_bounds_of_the_child(child):
  """A command that crosses one ends its process, and the next command is answered all the same."""
  for argv, code in ((["spin"], "SIGPROF"), (["fill"], 1), (["crash"], "SIGSEGV")):
    assert child.run(argv)["code"] == code, argv
    assert child.run(["models", "methods"])["code"] == 0
