# SPDX-License-Identifier: Apache-2.0
"""Networks of golden files: their sizes, and the parameters stored below a prefix."""

from dlm_jax import convert
from dlm_jax.convert.families import discriminator as public
from dlm_jax.models import (
  BlockDiT,
  BlockDiTConfig,
  Decoder,
  DecoderConfig,
  Discriminator,
  DiT,
  DiTConfig,
)

_SIZES = {"vocab_size": "V", "dim": "H", "heads": "nh"}
_DIT = _SIZES | {"layers": "nb", "cond_dim": "cond", "length": "L"}
_DECODER = _SIZES | {
  "layers": "nl",
  "kv_heads": "nkv",
  "head_dim": "hd",
  "mlp_dim": "inter",
  "rope_theta": "theta",
}


def _fields(config, names):
  return {ours: config[theirs] for ours, theirs in names.items()} | {"dtype": "float32"}


def dit_config(config, **fields):
  """Return the sizes of a file's DiT, in float32."""
  return DiTConfig(**_fields(config, _DIT), **fields)


def under(vectors, prefix):
  """Return the tensors stored below a prefix."""
  prefix = f"{prefix}/"
  return {name.removeprefix(prefix): x for name, x in vectors.items() if name.startswith(prefix)}


def params(model, vectors, prefix="params"):
  """Return the parameters that are stored below a prefix."""
  return convert.from_tensors(model, under(vectors, prefix))


def dit(vectors, config, *prefixes, **fields):
  """Return a file's DiT and the parameters stored below each prefix."""
  model = DiT(dit_config(config, **fields))
  return model, *(params(model, vectors, prefix) for prefix in prefixes)


def block_dit(vectors, config):
  """Return a file's DiT of blocks and its parameters."""
  model = BlockDiT(BlockDiTConfig(**_fields(config, _DIT)))
  return model, params(model, vectors)


def decoder(vectors, config, prefix="params", **fields):
  """Return a file's decoder and its parameters."""
  fields |= {"eps": config["rms_norm_eps"]} if "rms_norm_eps" in config else {}
  model = Decoder(DecoderConfig(**_fields(config, _DECODER), **fields))
  return model, params(model, vectors, prefix)


def critic(vectors, config, trained_layers=1):
  """Return a file's discriminator with its parameters."""
  model = Discriminator(dit_config(config), trained_layers=trained_layers)
  return public.from_tensors(model, under(vectors, "discriminator"))
