# SPDX-License-Identifier: Apache-2.0
"""`sample.generate` on meshes: inside `shard_map`, explicit axes, axes of any name."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dlm_jax import models, process, sample

L, KEY = 3, jax.random.key(7)
PROC = process.Absorbing(vocab_size=toy.VOCABULARY, mask_id=toy.MASK)
UNIFORM = process.Uniform(vocab_size=toy.VOCABULARY)
SLOW = pytest.mark.slow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taste:
  """A critic by formula that likes some tokens: its one leaf says how much."""

  strength: jax.Array

  def __call__(self, tokens, sigma_B):
    return self.body(self.embedded(tokens), sigma_B)

  def embedded(self, tokens):
    whole = jnp.issubdtype(tokens.dtype, jnp.integer)
    return jax.nn.one_hot(tokens, toy.VOCABULARY) if whole else jax.nn.softmax(tokens, axis=-1)

  def body(self, x_BLV, sigma_B):
    del sigma_B
    return self.strength * (x_BLV @ jnp.arange(toy.VOCABULARY, dtype=jnp.float32))


OPTIONS = {
  "ancestral": {},
  "random": {"order": "random"},
  "first_hitting": {"sampler": "first_hitting"},
  "psi": {"sampler": "psi", "kappa": 0.5},
  "analytic": {"sampler": "analytic"},
  "legacy": {"precision": "legacy"},
  "rgas": {"sampler": "rgas", "candidates": 2, "h": (1.0, 2.0)},
  "uniform": {"proc": UNIFORM},
  "uniform_greedy": {"proc": UNIFORM, "noise_removal": "greedy"},
  "uniform_psi": {"proc": UNIFORM, "sampler": "psi", "kappa": 0.5},
}


def every_sampler(*quick):
  """Take these samplers by default, the others in slow runs."""
  return pytest.mark.parametrize(
    "name", [n if n in quick else pytest.param(n, marks=SLOW) for n in OPTIONS]
  )


def _draw(name, denoiser, rng, *, taste=1.0, batch=8, **given):
  options = {"proc": PROC, **OPTIONS[name], **given}
  if name == "rgas":
    options["critic"] = Taste(jnp.asarray(taste))
  proc = options.pop("proc")
  return sample.generate(denoiser, proc, rng, batch=batch, length=L, steps=3, **options)


def _mesh(axes, kind):
  devices = jax.devices()[: math.prod(axes.values())]
  types = (kind,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)


# --- inside shard_map -----------------------------------------------------------------------------


def _on_every_device(one, names, *stacked):
  """Return what every device gets from its rows of the stacked arguments, under default checks."""
  mesh, spec = _mesh(names, AxisType.Auto), PartitionSpec(tuple(names))
  own = lambda *rows: one(*jax.tree.map(lambda x: x[0], rows))  # noqa: E731
  return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=spec, out_specs=spec))(*stacked)


def _rows(count):
  prompts = np.random.default_rng(0).integers(0, toy.VOCABULARY, size=(count, 2, L))
  return jnp.asarray(prompts, jnp.int32)


# What differs between devices: the tests' arguments of `_draw`, stacked.
DIFFERENT = {
  "keys": lambda: {"rng": jax.random.split(KEY, 4)},
  "networks": lambda: {
    "denoiser": jax.tree.map(lambda *x: jnp.stack(x), *(toy.make(L, seed=i) for i in range(4)))
  },
  "prompts": lambda: {"prompt": _rows(4)},
}


@pytest.mark.first_case
@every_sampler("ancestral", "psi", "analytic", "uniform")
@pytest.mark.parametrize(
  "axes, what",
  [
    ({"data": 2, "fsdp": 2}, "keys"),
    *(pytest.param({"data": 2, "fsdp": 2}, x, marks=SLOW) for x in list(DIFFERENT)[1:]),
    pytest.param({"x": 4}, "keys", marks=SLOW),
  ],
)
def test_inside_shard_map(name, axes, what):
  """Whatever differs between devices, a loop's carry has the type of it from the start."""
  stacked = DIFFERENT[what]()

  def one(given):
    return _draw(name, **{"denoiser": toy.make(L), "rng": KEY, "batch": 2, **given})

  tokens = _on_every_device(one, axes, stacked)
  alone = jax.jit(one)
  wanted = [alone(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(4)]
  np.testing.assert_array_equal(tokens, np.concatenate(wanted))


@pytest.mark.parametrize("name", ["ancestral", pytest.param("uniform", marks=SLOW)])
def test_temperatures_and_networks_differ_inside_shard_map(name):
  networks = DIFFERENT["networks"]()["denoiser"]
  heat = jnp.linspace(0.5, 1.5, 4)
  one = lambda net, heat: _draw(name, net, KEY, batch=2, temperature=heat)  # noqa: E731
  tokens = _on_every_device(one, {"x": 4}, networks, heat)
  wanted = [jax.jit(one)(jax.tree.map(lambda x, i=i: x[i], networks), heat[i]) for i in range(4)]
  np.testing.assert_array_equal(tokens, np.concatenate(wanted))


# --- a mesh in force ------------------------------------------------------------------------------

MESHES = [({"data": 4, "fsdp": 1}, 4), ({"data": 2, "fsdp": 2, "tensor": 2}, 4), ({"x": 8}, 8)]
MESHES += [({"data": 4}, 4), ({"batch": 2, "tensor": 2}, 2), ({"data": 3, "fsdp": 2}, 2)]


@functools.cache
def _alone(name):
  return jax.jit(functools.partial(_draw, name))(toy.make(L), KEY)


@pytest.mark.first_case
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("axes,ways", MESHES, ids=str)
def test_the_batch_is_split_over_whatever_mesh_is_in_force(axes, ways, kind):
  """Of 8 sequences; three devices do not divide them, and hold them all."""
  with jax.set_mesh(_mesh(axes, kind)):
    tokens = jax.jit(functools.partial(_draw, "ancestral"))(toy.make(L), KEY)
  pieces = {str(shard.index) for shard in tokens.addressable_shards}
  assert len(pieces) == ways and tokens.addressable_shards[0].data.shape == (8 // ways, L)
  np.testing.assert_array_equal(tokens, _alone("ancestral"))


@pytest.mark.slow
@every_sampler("rgas", "uniform")
def test_explicit_axes(name):
  """The default of `jax.make_mesh`: what lies where is part of an array's type."""
  with jax.set_mesh(_mesh({"data": 4, "fsdp": 1}, AxisType.Explicit)):
    tokens = jax.jit(functools.partial(_draw, name))(toy.make(L), KEY)
    assert jax.typeof(tokens).sharding.spec == PartitionSpec("data", None)
  np.testing.assert_array_equal(tokens, _alone(name))


@pytest.mark.slow
def test_explicit_axes_eagerly_with_a_split_prompt_and_a_trace():
  mesh = _mesh({"data": 2, "fsdp": 2}, AxisType.Explicit)
  prompt = _rows(4).reshape(8, L)
  wanted = _draw("ancestral", toy.make(L), KEY, prompt=prompt, return_trace=True)
  with jax.set_mesh(mesh):
    split = jax.device_put(prompt, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    found = _draw("ancestral", toy.make(L), KEY, prompt=split, return_trace=True)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  assert [x.sharding.spec[-2] for x in found] == [("data", "fsdp")] * 2


@SLOW
@pytest.mark.parametrize("axes", [{"data": 4, "fsdp": 1}, {"x": 4}], ids=str)
def test_a_network_and_its_gradient_under_explicit_axes(axes):
  """Of tokens that are split, and of some that are not."""
  sizes = {"vocab_size": 11, "dim": 8, "heads": 2, "layers": 2, "cond_dim": 4, "dtype": "float32"}
  model = models.DiT(models.DiTConfig(**sizes))
  params = model.init(jax.random.key(0), jnp.zeros((1, L), jnp.int32), jnp.zeros(1))["params"]
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: x + 0.3 * jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, size=(8, L)), jnp.int32)
  mesh = _mesh(axes, AxisType.Explicit)

  @jax.jit
  def loss(params, tokens):
    logits = models.Denoiser(model, params)(tokens, jnp.zeros(8))
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)

  gradient = jax.value_and_grad(loss)
  wanted = gradient(params, tokens)
  with jax.set_mesh(mesh):
    split = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(next(iter(axes)))))
    found = [gradient(params, given) for given in (tokens, split)]
  for one in found:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one, wanted)
