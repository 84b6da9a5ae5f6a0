# SPDX-License-Identifier: Apache-2.0
"""The discriminator: recorded scores and spectral norms, where its gradient stops, its trunk."""

import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.models import Critic, Discriminator, DiT, DiTConfig, discriminator

CONFIG = DiTConfig(
  vocab_size=11, dim=16, cond_dim=8, layers=3, heads=2, length=6, dtype="float32", dropout=0.2
)
TOKENS, SIGMA = jnp.arange(12).reshape(2, 6) % 11, jnp.array([0.2, 3.0])


@pytest.fixture(scope="module")
def network():
  model = Discriminator(CONFIG, trained_layers=2)
  variables = jax.jit(model.init)(jax.random.key(0), TOKENS, SIGMA)
  leaves, tree = jax.tree.flatten(variables["params"])
  keys = jax.random.split(jax.random.key(1), len(leaves))
  moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return model, tree.unflatten(moved), variables["spectral"]


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_golden_scores(golden, variant):
  vectors, config = golden(f"didi_rgas__{variant}")
  critic = golden_networks.critic(vectors, config)
  x, sigma = jnp.asarray(vectors["x"], jnp.int32), jnp.asarray(vectors["sigma"])
  wanted = vectors["discriminator_scores_tokens"][..., 0]
  tolerance = 2e-5 * np.abs(wanted).max()
  np.testing.assert_allclose(critic(x, sigma), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_golden_power_step(golden, variant):
  """One training forward pass: u, v and the output are those of the published hook."""
  vectors, _ = golden(f"didi_rgas__{variant}")
  read = lambda when, name: vectors[f"spectral_norm_step/{when}/main.{name}"]  # noqa: E731
  params, state, after = {}, {}, {}
  for number, name in ((0, "expand"), (2, "contract")):
    params[name] = {
      "kernel": jnp.asarray(read("before", f"{number}.weight_orig").T),
      "bias": jnp.asarray(read("before", f"{number}.bias")),
    }
    state[name], after[name] = (
      {key: jnp.asarray(read(when, f"{number}.weight_{key}")) for key in "uv"}
      for when in ("before", "after")
    )
  head = discriminator.SpectralHead()
  output, changed = head.apply(
    {"params": params, "spectral": state},
    jnp.asarray(vectors["spectral_norm_step/input"])[None],
    True,
    mutable=["spectral"],
  )
  np.testing.assert_allclose(output[0], vectors["spectral_norm_step/output"][:, 0], rtol=2e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), changed["spectral"], after
  )
  for number, name in ((0, "expand"), (2, "contract")):
    u, v, kernel = after[name]["u"], after[name]["v"], params[name]["kernel"]
    effective = kernel / (v @ kernel @ u)
    wanted = vectors[f"spectral_norm_step/effective_weight{number}_after"]
    np.testing.assert_allclose(effective.T, wanted, rtol=2e-5, atol=1e-7)


@pytest.mark.slow
def test_a_fresh_head_is_normalised():
  """Without a single power step the largest singular values are about 1: the start iterates."""
  model = Discriminator(CONFIG, trained_layers=1)
  variables = jax.jit(model.init)(jax.random.key(3), TOKENS, SIGMA)
  for name in ("expand", "contract"):
    kernel = variables["params"]["head"][name]["kernel"]
    u, v = (variables["spectral"]["head"][name][key] for key in "uv")
    largest = np.linalg.svd(np.asarray(kernel), compute_uv=False)[0]
    np.testing.assert_allclose(v @ kernel @ u, largest, rtol=0.1)


def test_evaluation_changes_no_state_and_a_step_only_the_spectral_one(network):
  model, params, spectral = network
  variables = {"params": params, "spectral": spectral}
  plain, kept = model.apply(variables, TOKENS, SIGMA, mutable=["spectral"])
  jax.tree.map(np.testing.assert_array_equal, kept["spectral"], spectral)
  _, moved = model.apply(variables, TOKENS, SIGMA, advance=True, mutable=["spectral"])
  assert not np.array_equal(
    moved["spectral"]["head"]["expand"]["u"], spectral["head"]["expand"]["u"]
  )
  np.testing.assert_array_equal(plain, model.apply(variables, TOKENS, SIGMA))


@pytest.mark.slow
def test_training_gradient_stops_below_the_trained_blocks(network):
  model, params, spectral = network

  def total(params, frozen):
    return jnp.sum(
      model.apply({"params": params, "spectral": spectral}, TOKENS, SIGMA, frozen=frozen) ** 2
    )

  whole, part = (
    jax.jit(jax.grad(total), static_argnums=1)(params, frozen) for frozen in (False, True)
  )
  for name in discriminator.FROZEN:
    assert all(np.all(x == 0) for x in jax.tree.leaves(part[name])), name
    assert any(np.any(x != 0) for x in jax.tree.leaves(whole[name])), name
  for name in discriminator.TRAINED:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), part[name], whole[name]
    )


@pytest.mark.slow
def test_soft_tokens_and_the_time_are_read(network):
  model, params, spectral = network
  critic = Critic(model=model, params=params, spectral=spectral)
  hard = critic(TOKENS, SIGMA)
  np.testing.assert_allclose(critic(1e9 * jax.nn.one_hot(TOKENS, 11), SIGMA), hard, rtol=1e-5)
  assert np.abs(critic(TOKENS, SIGMA + 0.5) - hard).max() > 1e-4


@pytest.mark.slow
def test_the_trunk_is_that_of_the_denoiser(network):
  model, params, spectral = network
  denoiser = DiT(CONFIG)
  teacher = denoiser.init(jax.random.key(5), TOKENS, SIGMA)["params"]
  tree = discriminator.from_trunk(model, teacher, params["head"])
  assert jax.tree.structure(tree) == jax.tree.structure(params)
  trunk = discriminator.to_trunk(model, tree)
  jax.tree.map(np.testing.assert_array_equal, trunk, {k: teacher[k] for k in trunk})
  back = discriminator.split(model, discriminator.join(model, tree, spectral))
  jax.tree.map(np.testing.assert_array_equal, back, (tree, spectral))


def test_more_trained_blocks_than_there_are():
  with pytest.raises(ValueError, match="must be in 1"):
    Discriminator(CONFIG, trained_layers=4).init(jax.random.key(0), TOKENS, SIGMA)
