# SPDX-License-Identifier: Apache-2.0
"""Benches of decoders: the model of speed-ups, bytes, random weights, passes, arms, commands."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder as tiny
import tiny_sdar

from dlm_jax import models, sample
from dlm_jax.bench import decode, limits, networks, passes, speedup, weights
from dlm_jax.cli.main import main
from dlm_jax.errors import InputError

SMALL = dataclasses.replace(tiny.DENSE, layers=2, dim=16, mlp_dim=24)

# --- the model ------------------------------------------------------------------------------------

# acceptance, block, rounds, draft passes, then tokens per second: alone folded and not, drafted
# folded and not. Passes of 3.15 ms and 0.72 ms; computed apart from this code.
_PUBLISHED = [
  (0.8, 4, 1.60, 5.2, 317, 254, 456, 316),
  (0.8, 8, 2.40, 13.6, 317, 282, 462, 378),
  (0.8955, 4, 1.31, 4.6, 317, 254, 536, 353),
  (0.8955, 16, 2.57, 28.5, 317, 298, 560, 493),
  (0.95, 8, 1.35, 9.4, 317, 282, 728, 538),
  (1.0, 8, 1.00, 8.0, 317, 282, 900, 627),
]


@pytest.mark.parametrize("row", _PUBLISHED)
def test_predictions(row):
  acceptance, size, rounds, steps, *rates = row
  found = [
    speedup.predict(acceptance, size, target=3.15e-3, verify=3.15e-3, draft=0.72e-3, folded=fold)
    for fold in (True, False)
  ]
  assert found[0].rounds == pytest.approx(rounds, abs=0.006)
  assert found[0].steps == pytest.approx(steps, abs=0.06)
  alone, drafted = [x.alone for x in found], [x.drafted for x in found]
  np.testing.assert_allclose([*alone, *drafted], rates, rtol=0.008)
  assert found[0].ratio == pytest.approx(drafted[0] / alone[0])


def test_expected_rounds_by_hand():
  """Of two tokens the second round is needed where the first fails; full acceptance needs one."""
  verify = lambda acceptance, size: speedup.predict(  # noqa: E731
    acceptance, size, target=1.0, verify=1.0, draft=0.0, folded=True
  )
  assert verify(0.5, 2).rounds == 1.5 and verify(1.0, 8).rounds == 1.0
  assert verify(0.0, 4).rounds == 4.0 and verify(0.3, 1).rounds == 1.0


def test_draft_passes_by_simulation():
  rng, acceptance, size, total, count = np.random.default_rng(0), 0.7, 4, 0, 4000
  for _ in range(count):
    left = size
    while left:
      total += left
      kept = next((i for i in range(left) if rng.random() > acceptance), left)
      left -= min(kept + 1, left)
  assert total / count == pytest.approx(speedup.draft_steps(size, acceptance), rel=0.02)


# --- bytes ----------------------------------------------------------------------------------------

_PUBLIC = {  # bytes of a bfloat16 pass without the embedding table, from the published shapes
  "1b7": ({"dim": 2048, "layers": 28, "heads": 16, "mlp_dim": 6144}, 3.44e9),
  "4b": ({"dim": 2560, "layers": 36, "heads": 32, "mlp_dim": 9728}, 8.04e9),
  "8b": ({"dim": 4096, "layers": 36, "heads": 32, "mlp_dim": 12288}, 15.14e9),
}


@pytest.mark.parametrize("name", _PUBLIC)
def test_bytes_of_a_pass(name):
  sizes, wanted = _PUBLIC[name]
  config = models.DecoderConfig(vocab_size=151936, kv_heads=8, head_dim=128, **sizes)
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(models.Decoder(config).init, jax.random.key(0), tokens)["params"]
  stored = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
  found = weights.weight_bytes(config, stored, 4)
  assert found == pytest.approx(wanted, rel=0.002)
  table = 2 * config.vocab_size * config.dim
  assert weights.weight_bytes(dataclasses.replace(config, tied=True), stored, 4) == found + table
  assert weights.cache_bytes(config, 1000) == 2 * config.layers * 1000 * 8 * 128 * 2


def test_bytes_of_experts_are_of_those_visited():
  config = dataclasses.replace(SMALL, **tiny.EXPERTS)
  params = tiny.make(config)[1]
  everything = weights.weight_bytes(config, params, 99)
  experts = sum(params["blocks"]["experts"][part].nbytes for part in ("gate", "up", "down"))
  assert weights.weight_bytes(config, params, 1) == round(everything - experts * 3 / 5)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["stacked", "fused"])
def test_random_weights_exist_in_one_type_only(storage, monkeypatch):
  """Nothing as large as a weight is made in float32, and the logits are not all alike."""
  config = dataclasses.replace(SMALL, storage=storage, dtype="bfloat16", dim=64)
  model, made = models.Decoder(config), []
  original = weights.uniform
  monkeypatch.setattr(weights, "uniform", lambda *a: made.append(a[2]) or original(*a))
  params = weights.random_params(model, "bfloat16")
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  assert set(made) == {jnp.dtype("bfloat16")} and len(made) >= 6
  large = config.dim * config.mlp_dim
  for shape in {x.shape for x in jax.tree.leaves(params) if x.size >= large}:
    jaxpr = str(
      jax.make_jaxpr(lambda r, s=shape: original(r, s, jnp.dtype("bfloat16"), 1.0))(
        jax.random.key(0, impl="rbg")
      )
    )
    assert "f32[" + ",".join(map(str, shape)) + "]" not in jaxpr.replace("bf16[", "")
  logits = tiny.logits(model, params, tiny.tokens(1, 3))
  assert float(logits.std()) > 0.05


# --- passes ---------------------------------------------------------------------------------------


def _passes(**changes):
  networks = {"target": models.Decoder(SMALL), "draft": models.Decoder(SMALL)}
  options = {
    "queries": [1, 4],
    "cache_length": 8,
    "variants": list(passes.VARIANTS),
    "copy": 2e9,
    "read": 4e9,
    "repeats": 1,
  }
  return passes.bench_passes(networks, **options | changes)


@pytest.mark.slow
def test_passes_are_compared_with_reading(monkeypatch):
  """Every variant at every number of tokens, on its own storage; limits by hand."""
  seen = []

  def time(model, params, queries, cache_length, repeats):
    assert (model.config.storage == "stacked") == ("attention" in params["blocks"])
    seen.append((model.config.storage, model.config.unroll, queries, cache_length))
    return original(model, params, queries, cache_length, repeats)

  original = passes._time
  monkeypatch.setattr(passes, "_time", time)
  rows = _passes(variants=["scan", "unrolled", "fused"], queries=[2])
  assert seen == 2 * [("stacked", 1, 2, 8), ("stacked", 2, 2, 8), ("fused", 1, 2, 8)]
  params = tiny.make(SMALL)[1]
  read = sum(x.nbytes for x in jax.tree.leaves(params)) - params["embed"]["embedding"].nbytes
  for row in rows:
    assert row.weight_bytes == read and row.limit == read / 1e9 and row.read_limit == read / 4e9
    assert row.seconds > 0 and row.ratio == pytest.approx(row.seconds / row.limit)
  assert passes.table(rows).count("\n") == len(rows) + 1


def test_the_fastest_pass_that_is_large_enough_counts():
  row = passes.Pass(
    network="target",
    variant="scan",
    queries=4,
    seconds=3.0,
    spread=0.0,
    weight_bytes=1,
    cache_bytes=0,
    limit=1.0,
    read_limit=1.0,
    memory=None,
    compile_seconds=0.0,
  )
  rows = [
    row,
    dataclasses.replace(row, variant="fused", seconds=2.0),
    dataclasses.replace(row, queries=16, seconds=4.0),
    dataclasses.replace(row, network="draft", seconds=1.0),
  ]
  (found, separate) = passes.speedups(rows, [4, 8], acceptances=[1.0])
  assert found.block_length == 4 and found.folded and not separate.folded
  assert found.alone == pytest.approx(1 / 2) and found.drafted == pytest.approx(4 / (4 + 4))
  assert passes.speedups(rows[:3], [4]) == []


# --- arms -----------------------------------------------------------------------------------------

_RULE = sample.BlockRule(block_length=4, mask_id=39)
_STOPS = (3, 7, 11)
_ROW = sample.RowOptions.make(1, stop_ids=_STOPS)


@pytest.fixture(scope="module")
def arms():
  model, params = tiny.make(SMALL)
  other = tiny.make(SMALL, seed=1)[1]
  draft = jax.tree.map(lambda x, y: x + 0.2 * (y - x), params, other)
  prompts = [[1, 2, 3, 4, 5], [6, 7], [8]]
  return decode.bench_decode(
    decode.Network(model, params),
    decode.Network(model, draft),
    prompts,
    _RULE,
    _ROW,
    new_tokens=11,
    max_new_tokens=14,
    repeats=2,
  )


@pytest.mark.slow
def test_arms_are_compared_with_the_static_decode(arms):
  names = ["static", "dynamic 0.9", "SimSD published", "SimSD unified", "stacked"]
  assert [arm.name for arm in arms] == names
  assert [arm.exact for arm in arms] == [True, False, False, False, True]
  static, *_, stacked = arms
  assert static.genppl is None and static.entropy is None, "no judge"
  assert static.same == stacked.same == 1.0 and stacked.length == static.length
  assert all(arm.rate > arm.end_to_end > 0 and arm.compile_seconds > 0 for arm in arms)
  assert static.length < 14, "some text stops"


@pytest.mark.slow
def test_texts_are_cut_where_decoding_stops():
  assert decode.cut([5, 3, 7, 3], (3, 7)) == [5, 3] and decode.cut([5], ()) == [5]
  model, params = tiny.make(SMALL)
  found, prompt = [], jnp.asarray([[6, 7]])
  decoder = sample.block_decoder(model, _RULE, 20)
  run = jax.jit(lambda p, o: sample.decode(decoder, p, prompt, jax.random.key(0), options=o))
  for stops in (_STOPS, (-1, -1, -1)):
    tokens, info = run(params, sample.RowOptions.make(1, temperature=0.0, stop_ids=stops))
    found.append(np.asarray(tokens)[0, 2 : int(info.lengths_B[0])].tolist())
  assert decode.cut(found[1], _STOPS) == found[0] and len(found[0]) < len(found[1])


def test_texts_are_judged_given_their_prompts():
  """A judge that expects token + 1 with probability 1/2: only what follows the prompt counts."""
  size = 8

  def judge(tokens_BL):
    likely = jax.nn.one_hot((tokens_BL + 1) % size, size)
    return jnp.log(0.5 * likely + 0.5 * (1 - likely) / (size - 1))

  prompts, texts = [[1, 5, 3], [2]], [[4, 5], [3, 3, 3, 4]]
  genppl, error, entropy = decode.score(judge, prompts, texts)
  nats = [np.log(2)] * 4 + [np.log(14)] * 2  # 3 after 3, twice, is not expected
  assert genppl == pytest.approx(np.exp(np.mean(nats)), rel=1e-5) and 0 < error < genppl
  uneven = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
  assert entropy == pytest.approx((np.log(2) + uneven) / 2, rel=1e-6)


@pytest.mark.slow
def test_drawn_texts():
  """Above temperature 0 stacked is exact too, each prompt has its own noise, SimSD rejects."""
  model, params = tiny.make(SMALL)
  one = decode.Network(model, params)
  draft = decode.Network(model, tiny.make(SMALL, seed=1)[1])
  row = sample.RowOptions.make(1, temperature=1.0)
  judge = lambda tokens: jnp.zeros((*tokens.shape, model.config.vocab_size))  # noqa: E731
  found = decode.bench_decode(
    one, draft, [[5], [5]], _RULE, row, new_tokens=6, max_new_tokens=6, repeats=1, judge=judge
  )
  assert found[0].same == found[-1].same == 1.0
  assert found[0].genppl == pytest.approx(model.config.vocab_size, rel=1e-4)
  assert all(arm.genppl and arm.entropy for arm in found)


@pytest.mark.slow
def test_passes_and_acceptance(arms):
  static, dynamic, *drafted = arms
  # 11 tokens from positions 5, 2 and 1 fill 3, 4 and 3 blocks: 4 passes each, fewer in the first
  assert static.target_passes == pytest.approx((3 + 4 + 4 + 2 + 3 * 4 + 3 + 2 * 4) / 33)
  assert dynamic.target_passes <= static.target_passes and static.draft_passes == 0
  assert static.acceptance is None and dynamic.conditional is None
  for arm in drafted:
    assert 0 < arm.acceptance <= arm.conditional <= 1
    assert 0 < arm.target_passes < static.target_passes and arm.draft_passes > 0


@pytest.mark.slow
def test_what_is_timed_has_a_fixed_number_of_tokens(monkeypatch):
  """Nothing stops in a timed run, and repeats go through the arms in turn."""
  model, params = tiny.make(SMALL)
  order, original = [], decode._Runner.finish

  def finish(self, state):
    state = original(self, state)
    order.append((id(self), int(state.progress.length_B[0] - state.progress.prompt_B[0])))
    return state

  monkeypatch.setattr(decode._Runner, "finish", finish)
  decode.bench_decode(
    decode.Network(model, params),
    None,
    [[5]],
    _RULE,
    _ROW,
    new_tokens=9,
    max_new_tokens=9,
    repeats=2,
  )
  first, second = dict.fromkeys(name for name, _ in order[:2])
  assert [name for name, _ in order[:6]] == [first, second] * 3
  assert {count for _, count in order[:6]} == {9}


# --- commands -------------------------------------------------------------------------------------

_SHAPE = {
  "dim": 16,
  "layers": 1,
  "heads": 2,
  "kv_heads": 1,
  "head_dim": 8,
  "mlp_dim": 16,
  "vocab_size": 40,
  "dtype": "float32",
}


@pytest.fixture
def tiny_limits(monkeypatch):
  monkeypatch.setattr(limits, "measure", lambda *_: limits.Limits(matmul=1e11, copy=1e10))


def _bench(capsys, tmp_path, *arguments):
  file = tmp_path / "bench.json"
  assert main(["bench", *map(str, arguments), f"--json={file}"]) == 0
  return capsys.readouterr().out, json.loads(file.read_text())


def _fields(**changes):
  shape = [f"--config.model.{name}={value}" for name, value in (_SHAPE | changes).items()]
  return ["--config=sdar:8b", *shape, "--config.process.mask_id=39", "--config.data.length=64"]


@pytest.mark.slow
def test_passes_from_the_command_line(tiny_limits, capsys, tmp_path):
  text, content = _bench(
    capsys,
    tmp_path,
    "passes",
    *_fields(),
    "--queries=1,2",
    "--cache_length=4",
    "--repeats=1",
    "--variants=scan,layers",
  )
  assert len(content["rows"]) == 4 and content["limits"]["read"] > 0
  assert "| target  | layers" in text and content["speedups"] == []
  row = content["rows"][0]
  assert row["limit"] == pytest.approx(row["weight_bytes"] / 5e9)


@pytest.mark.slow
def test_random_networks_from_the_command_line(capsys, tmp_path):
  text, content = _bench(
    capsys,
    tmp_path,
    "decode",
    *_fields(),
    "--num_prompts=2",
    "--prompt_length=3",
    "--new_tokens=5",
    "--max_new_tokens=5",
    "--repeats=1",
  )
  assert "random weights" in text and content["rows"][0]["name"] == "static"
  assert content["block_length"] == 4 and content["rows"][0]["length"] == 5


@pytest.mark.slow
def test_checkpoints_from_the_command_line(capsys, tmp_path):
  target = tiny_sdar.write(tmp_path / "target", layers=1)
  draft = tiny_sdar.write(tmp_path / "draft", layers=1, noise=0.2)
  (tmp_path / "prompts.txt").write_text("one prompt\n\nanother\na third\n")
  text, content = _bench(
    capsys,
    tmp_path,
    "decode",
    f"--checkpoint={target}",
    f"--draft={draft}",
    "--new_tokens=6",
    f"--prompts={tmp_path / 'prompts.txt'}",
    "--num_prompts=2",
    "--max_new_tokens=6",
    "--repeats=1",
    "--temperature=0.5",
    "--dtype=float32",
  )
  assert "float32, temperature 0.5" in text and content["temperature"] == 0.5
  assert content["prompts"] == 2 and len(content["rows"]) == 5
  assert content["rows"][-1]["same"] == 1.0 and "| stacked" in text


@pytest.mark.parametrize(
  ("arguments", "word"),
  [
    (["passes", "--config=novels_teacher"], "model.name='dit' is not 'decoder'"),
    (["passes", *_fields(), "--variants=scan,rolled"], "'rolled' is unknown"),
    (["passes", *_fields(), "--queries=0"], "queries=[0] must be at least 1"),
    (["decode", *_fields(), "--num_prompts=0"], "prompts, 0, must be at least 1"),
    (["decode", *_fields(), "--storage=flat"], "storage='flat' is unknown"),
    (["decode", *_fields(), "--prompt_length=60"], "do not fit the network's 64 positions"),
    (["trunk", "--draft=sdar:1b7"], "--draft is of `bench decode`"),
    (["passes", "--checkpoint=x"], "--checkpoint is of `bench decode`"),
    (["trunk", "--dtype=float32"], "--dtype is of `bench decode`"),
    (["passes", *_fields(), "--temperature=1"], "--temperature is of `bench decode`"),
    (["decode", *_fields(), "--temperature=nan"], "temperature=nan must be 0 or more"),
    (["decode", *_fields(), "--judge=x"], "--judge is of `bench decode --checkpoint`"),
  ],
)
def test_bad_input(tiny_limits, capsys, arguments, word):
  assert main(["bench", *arguments]) == 2
  error = capsys.readouterr().err
  assert word in error and error.count("\n") == 1


def test_prompts_of_a_validation_split(monkeypatch, tmp_path):
  target = tiny_sdar.write(tmp_path / "target", layers=1)
  asked = []

  def groups(directory, split, limit):
    asked.append((directory, split, limit))
    return [{"tokens": np.arange(12).reshape(2, 6)}]

  monkeypatch.setattr(networks.loader, "evaluation_groups", groups)
  prompts = networks.Prompts(count=2, data="packed", length=4)
  task = networks.from_checkpoint(str(target), None, prompts, max_new_tokens=8)
  assert asked == [("packed", "validation", 2)]
  assert task.prompts == [[0, 1, 2, 3], [6, 7, 8, 9]] and task.draft is None
  assert task.options.stop_BS.tolist() == [[258, 256]]
  assert task.rule.mask_id == tiny_sdar.MASK and task.options.temperature_B.tolist() == [0.0]
  with pytest.raises(InputError, match="there are no prompts"):
    networks.from_checkpoint(str(target), None, networks.Prompts(count=2), max_new_tokens=8)
