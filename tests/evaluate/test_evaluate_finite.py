# SPDX-License-Identifier: Apache-2.0
"""Numbers that are none: every measure refuses nats and logits that are NaN or infinite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder as tiny

from dlm_jax import evaluate, process, sample
from dlm_jax.decode.passes import Bound
from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier
from dlm_jax.evaluate.judge import JudgeWithTokens

V, L = 5, 4
PROC = process.Absorbing(vocab_size=V, mask_id=V - 1)
UNIFORM = process.Uniform(vocab_size=V)
TOKENS = np.zeros((3, L), np.int32)
KEY = jax.random.key(0)


def _broken(value):
  """Return a function of tokens and maybe noise, the second of whose rows of logits has a flaw."""
  row_L = jnp.arange(L) == 1

  def logits(tokens_BL, sigma_B=None):
    del sigma_B
    one = jnp.zeros((*tokens_BL.shape, V)).at[..., 0].set(jnp.where(row_L, value, 0.0)[None])
    return one

  return logits


@pytest.mark.parametrize("proc", [PROC, UNIFORM], ids=["absorbing", "uniform"])
@pytest.mark.parametrize("published", [False, True])
def test_a_bound(proc, published):
  denoiser = sample.from_logits(_broken(jnp.nan))
  with pytest.raises(InputError, match="the denoiser gives 3 of 3 sequences nan nats") as caught:
    options = {"samples_per_sequence": 8, "published": published}
    evaluate.elbo(denoiser, proc, TOKENS, KEY, **options)
  assert "\n" not in str(caught.value) and "NaN in its weights" in str(caught.value)


def test_a_bound_of_blocks():
  model, params = tiny.make(dataclasses.replace(tiny.DENSE, layers=1, length=L))
  params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), params)
  proc = process.Absorbing(vocab_size=tiny.V, mask_id=tiny.V - 1)
  with pytest.raises(InputError, match="the network gives 3 of 3 sequences nan nats"):
    evaluate.block_elbo(Bound(model, params), proc, TOKENS, KEY, block_length=2)


@pytest.mark.parametrize("value, said", [(jnp.nan, "nan"), (-jnp.inf, "inf")])
def test_next_tokens(value, said):
  judge = _broken(value)
  with pytest.raises(InputError, match=f"the network gives 3 of 3 sequences {said} nats"):
    evaluate.ar_perplexity(judge, TOKENS)
  for measure in (evaluate.genppl, evaluate.quality):
    with pytest.raises(InputError, match=f"the judge gives 3 of 3 sequences {said} nats"):
      measure(judge, TOKENS)
  # Where nothing is scored, nothing is wrong: padding may be read as anything.
  valid = np.tile(np.arange(L) != 2, (3, 1))
  assert np.isfinite(evaluate.ar_perplexity(judge, TOKENS, valid_NL=valid)["nll"])
  assert np.isfinite(evaluate.genppl(judge, TOKENS, valid_NL=valid)["genppl"])


def _late(x_BL, sigma_B, value):
  """Logits that are numbers at t = 1 alone."""
  late_B11 = sigma_B[:, None, None] < PROC.schedule.sigma(0.9)
  return jnp.zeros((*x_BL.shape, V)) + jnp.where(late_B11, value, 0.0)


@pytest.mark.first_case
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_samples(value):
  """Without this a frontier says "618.5 ± 0.0" of one token everywhere."""
  judge = JudgeWithTokens(judge=lambda tokens_BL: jnp.zeros((*tokens_BL.shape, V)))
  for proc in (PROC, UNIFORM):
    options = {"process": proc, "length": L}
    broken = frontier.Sampler(denoiser=sample.from_logits(_broken(value)), **options)
    with pytest.raises(InputError, match="logits hold NaN or infinity, so its samples mean noth"):
      frontier.sweep({"broken": broken}, [2], judge=judge, samples=2)
    late = sample.from_logits(lambda x_BL, sigma_B: _late(x_BL, sigma_B, value))
    with pytest.raises(InputError, match="logits hold NaN or infinity, so its samples mean noth"):
      frontier.sweep(
        {"late": frontier.Sampler(denoiser=late, **options)}, [4], judge=judge, samples=2
      )
  impossible = frontier.Sampler(denoiser=sample.from_logits(_broken(-jnp.inf)), **options)
  assert frontier.sweep({"fine": impossible}, [2], judge=judge, samples=2)
