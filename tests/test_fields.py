# SPDX-License-Identifier: Apache-2.0
"""Declared fields, and wrong calls from Python: one line that names the argument."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
import wrong_calls

from dlm_jax import fields
from dlm_jax.errors import InputError


@pytest.fixture(scope="module")
def told():
  """Return what every wrong call raises, in a process whose annotations are not checked."""
  script = pathlib.Path(wrong_calls.__file__)
  answer = subprocess.run(
    [sys.executable, str(script)],
    capture_output=True,
    text=True,
    check=False,
    env=tiny_runs.environment(),
  )
  assert answer.returncode == 0, answer.stderr
  return json.loads(answer.stdout)


@pytest.mark.parametrize("name", list(wrong_calls.CALLS))
def test_wrong_call(told, name):
  kind, text = told[name]
  assert kind == "InputError", (kind, text)
  assert any(one in text for one in wrong_calls.CALLS[name][1].split("|")), text
  assert "\n" not in text and len(text) < 500


@pytest.mark.parametrize(
  ("kind", "value", "want"),
  [
    (fields.Whole(), np.int64(3), 3),
    (fields.Whole(), jnp.int32(3), 3),
    (fields.Whole(-2), -2, -2),
    (fields.Number(), np.float32(0.5), 0.5),
    (fields.Number("(0, 1]"), 1, 1.0),
    (fields.Number("[0, ∞)"), jnp.float32(2), 2.0),
    (fields.Switch(), np.True_, True),
    (fields.Items(fields.Whole()), [1, 2], (1, 2)),
    (fields.Optional(fields.Text()), None, None),
    (fields.Either((fields.Number(), fields.Text())), "cap", "cap"),
  ],
)
def test_what_is_taken(kind, value, want):
  got = kind.check("x", value)
  assert got == want and type(got) is type(want)


@pytest.mark.parametrize(
  ("kind", "value", "message"),
  [
    (fields.Whole(), True, "x=True is not a whole number of at least 0."),
    (fields.Whole(), 2.0, "x=2.0 is not a whole number of at least 0."),
    (fields.Whole(1, 5), 6, "x=6 must be at most 5."),
    (fields.Whole(1, 5), 0, "x=0 must be at least 1."),
    (fields.Whole(1, 5), 10**400, "x=10^400 must be at most 5."),
    (fields.Number(), float("nan"), "x=nan is not a finite number."),
    (fields.Number(), 10**400, "x=10^400 is not a finite number."),
    (fields.Number(), np.True_, "x=np.True_ is not a finite number."),
    (fields.Number("(0, 1]"), 0, "x=0 must be in (0, 1]."),
    (fields.Number("[0, 1)"), 1, "x=1 must be in [0, 1)."),
    (fields.Items(fields.Whole(), 2), (1,), "x=(1,) is not a list of 2."),
    (fields.Items(fields.Whole()), "ab", "x='ab' is not a list."),
    (fields.Text(), 5, "x=5 is not a text."),
    (fields.Text(("a", "b")), "c", "x='c' is unknown; use one of a, b"),
    (fields.Object(), None, "x must be an object, got null."),
    (fields.Either((fields.Number(), fields.Text())), [1], "x=[1] is not a finite number or a"),
  ],
)
def test_what_is_refused(kind, value, message):
  with pytest.raises(InputError) as caught:
    kind.check("x", value)
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_long_and_many_lines_are_cut():
  assert len(fields.shown("a" * 10_000)) < 70
  assert "\n" not in fields.shown(np.ones((20, 20)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
  count: int
  rate: float | None = None
  names: tuple[str, ...] = ()
  pair: tuple[int, int] = (1, 2)


def test_a_dataclass_is_its_own_declaration():
  made = fields.make(_Options, {"count": np.int32(2), "names": ["a"], "rate": 1})
  assert made == _Options(count=2, rate=1.0, names=("a",)) and type(made.rate) is float
  for given, message in (
    ({"count": 1.0}, "o.count=1.0 is not a whole number"),
    ({"count": 2**40}, "o.count=1099511627776 must be at most 1000"),
    ({"count": 1, "rate": "x"}, "o.rate='x' is not a finite number"),
    ({"count": 1, "names": "ab"}, "o.names='ab' is not a list"),
    ({"count": 1, "names": (5,)}, "o.names[0]=5 is not a text"),
    ({"count": 1, "pair": (1, 2, 3)}, "o.pair=(1, 2, 3) is not a list of 2"),
  ):
    with pytest.raises(InputError) as caught:
      fields.make(_Options, given, "o.", most=1000)
    assert message in str(caught.value)


def test_objects_of_json():
  kinds = {"a": fields.Whole(1), "b": fields.Text()}
  assert fields.read("f", {"a": 2.0, "b": "x", "c": 5}, kinds) == {"a": 2, "b": "x"}
  assert fields.read("f", {"a": 1}, kinds, {"b": None}) == {"a": 1, "b": None}
  for content, message in (
    ([], "f must be an object, got a list"),
    ({"a": 1}, "f lacks 'b'"),
    ({"a": 2.5, "b": "x"}, "f: a=2.5 is not a whole number of at least 1"),
  ):
    with pytest.raises(InputError, match=message):
      fields.read("f", content, kinds)
  assert fields.build(_Options, "f", {"count": 3.0, "pair": [4, 5]}) == _Options(
    count=3, pair=(4, 5)
  )
  for content, message in (
    ({"count": 3, "colour": 1}, "f has the unknown field 'colour'"),
    ({}, "f lacks 'count'"),
    (None, "f must be an object, got null"),
  ):
    with pytest.raises(InputError, match=message):
      fields.build(_Options, "f", content)
