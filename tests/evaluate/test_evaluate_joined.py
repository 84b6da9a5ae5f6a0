# SPDX-License-Identifier: Apache-2.0
"""Frontiers measured apart and drawn together: what is one model, and what does not belong."""

import json
import math

import pytest

from dlm_jax.cli.main import main
from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier, joined


def _row(name, nfe, **changes):
  measured = {"genppl": 100.0 / nfe, "genppl_se": 2.0, "entropy": 4.5, "entropy_se": math.nan}
  context = {"judge": "j", "weights": {name: f"of {name}"}}
  fixed = {"samples": 64, "tokens": 9, "seconds": 1.5, "seed": 0, "options": {}, "context": context}
  row = {"name": name, "nfe": nfe, "evaluations": nfe, **measured, "correlation": 0.5, **fixed}
  row["distinct_4"] = 0.99
  return row | changes


def _sweep(folder, rows, reference=None):
  """Write a finished sweep; the picture is not what is tested."""
  folder.mkdir()
  frontier.write_json(rows, folder / "frontier.json", reference)
  (folder / "frontier.jsonl").write_text("")
  return str(folder)


def _two(tmp_path, first=(), second=(), **reference):
  real = frontier.Reference(**reference) if reference else None
  return [_sweep(tmp_path / "a", first), _sweep(tmp_path / "b", second, real)]


def test_rows_come_model_by_model(tmp_path):
  first = [_row("t", 8), _row("s", 1), _row("t", 1)]
  second = [_row("t", 16), _row("t", 8), _row("u", 4)]
  rows, reference = joined.join(_two(tmp_path, first, second, genppl=20.0, label="16 texts"))
  places = [(row["name"], row["nfe"]) for row in rows]
  assert places == [("t", 1), ("t", 8), ("t", 16), ("s", 1), ("u", 4)]
  assert tuple(rows[0]) == frontier.COLUMNS and math.isnan(rows[0]["entropy_se"])
  assert rows[1] | {"entropy_se": 0} == first[0] | {"entropy_se": 0}
  assert reference == frontier.Reference(genppl=20.0, label="16 texts")
  assert joined.join([str(tmp_path / "a")])[1] is None


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"context": {"judge": "other"}}, "b: the judge is another than before"),
    ({"options": {"nucleus": 0.9}}, "b: the model t is another than before"),
    ({"context": {"judge": "j", "weights": {"t": "x"}}}, "b: the model t is another than before"),
    ({"genppl": 3.0}, "t at 8 NFE was measured before, otherwise"),
    ({"nfe": 0}, "nfe=0 must be at least 1"),
    ({"genppl": "x"}, "genppl='x'"),
  ],
)
def test_what_does_not_belong_together(tmp_path, change, said):
  with pytest.raises(InputError, match=said) as caught:
    joined.join(_two(tmp_path, [_row("t", 8)], [_row("t", 8) | change]))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (None, "frontier.json cannot be joined: No such file or directory; name workdirs of finished"),
    ("[]", "cannot be joined: it holds a list, not an object"),
    ("{", "cannot be joined"),
    ('{"rows": []}', "lacks 'reference'"),
    ('{"rows": [{"name": "a"}], "reference": null}', "lacks 'nfe'"),
    ('{"rows": [], "reference": {"genppl": "x"}}', "genppl='x'"),
  ],
)
def test_no_finished_sweep(tmp_path, content, said):
  if content is not None:
    (tmp_path / "frontier.json").write_text(content)
  with pytest.raises(InputError, match=said):
    joined.join([tmp_path])


def test_command(tmp_path, capsys):
  folders = _two(tmp_path, [_row("t", 1), _row("t", 8)], [_row("s", 1), _row("s", 8)], genppl=20.0)
  out = tmp_path / "out"
  arguments = ["frontier", f"--join={','.join(folders)}", f"--workdir={out}", "--x=nfe,seconds"]
  assert main(arguments) == 0 and main(arguments) == 0
  said = capsys.readouterr().out
  assert said.count("| t ") == said.count("| s ") == 4
  names = {path.name for path in out.iterdir()}
  assert names == {"frontier.csv", "frontier.json", "frontier.png", "frontier_seconds.png"}
  content = json.loads((out / "frontier.json").read_text())
  assert [row["name"] for row in content["rows"]] == ["t", "t", "s", "s"]
  assert content["reference"]["genppl"] == 20.0


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--judge=x"], "--join measures nothing: leave out --judge"),
    (["--samples=3"], "--join measures nothing: leave out --samples"),
    (["--model=a=x"], "--join measures nothing: leave out --model"),
    (["--join=,"], "write --join=DIR,DIR"),
    (["--workdir={a}"], "holds a sweep of its own; join into another --workdir"),
    (["--join={a},/none"], "/none/frontier.json cannot be joined"),
  ],
)
def test_flags_that_do_not_go_with_it(tmp_path, capsys, flags, said):
  a, b = _two(tmp_path, [_row("t", 1)], [_row("s", 1)])
  out = tmp_path / "out"
  given = ["frontier", f"--join={a},{b}", f"--workdir={out}", *(f.format(a=a) for f in flags)]
  assert main(given) == 2
  line = capsys.readouterr().err
  assert said in line and len(line.splitlines()) == 1 and not out.exists()


def test_a_sweep_still_needs_models_and_a_judge(tmp_path, capsys):
  for given, lacking in (
    ([], "--model, --judge"),
    (["--judge=x"], "--model"),
    (["--model=a=b"], "--judge"),
  ):
    assert main(["frontier", f"--workdir={tmp_path / 'out'}", *given]) == 2
    assert f"the following arguments are required: {lacking};" in capsys.readouterr().err


def _warm(name, nfe, temperature, genppl):
  """Entropy falls by a nat per unit of temperature, log GenPPL by three."""
  warmth = temperature - 1
  measured = {"genppl": genppl * math.exp(3 * warmth), "entropy": 4.5 + warmth, "entropy_se": 0.001}
  return _row(name, nfe, **measured, genppl_se=0.01, options={"temperature": temperature})


def test_at_matched_entropy(tmp_path, capsys):
  teacher = {1: 400.0, 4: 200.0, 16: 100.0}
  sweeps = (("t", teacher), ("s", {2: 200.0}))
  folders = []
  for name, genppl in sweeps:
    folders.append(_sweep(tmp_path / name, [_row(name, nfe) for nfe in genppl]))
    warm = [_warm(name, nfe, t, value) for nfe, value in genppl.items() for t in (0.8, 1.0)]
    frontier.write_json(warm, tmp_path / name / joined.SWEPT, None)
  main(["frontier", f"--join={','.join(folders)}", "--baseline=t", f"--workdir={tmp_path / 'all'}"])
  said = capsys.readouterr().out
  assert "for which t needs 4: 2.0 times fewer evaluations" in said
  assert (tmp_path / "all/matched.png").exists()
  given = ["frontier", f"--join={','.join(folders)}", f"--workdir={tmp_path / 'other'}"]
  assert main([*given, "--baseline=u"]) == 2 and "--baseline='u'" in capsys.readouterr().err


def test_a_sweep_at_one_temperature_has_no_matched_entropy(tmp_path):
  folder = _sweep(tmp_path / "a", [_row("t", 8)])
  with pytest.raises(InputError, match=r"temperatures.json cannot.*runs with --temperatures"):
    joined.join([folder], joined.SWEPT)
