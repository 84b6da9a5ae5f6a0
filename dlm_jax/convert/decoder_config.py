# SPDX-License-Identifier: Apache-2.0
"""What the config.json of a decoder says: its network, its mask token and its block length."""

import pathlib
from typing import Any

from dlm_jax import models, process
from dlm_jax.convert import files
from dlm_jax.errors import InputError

MODEL_TYPES = ("qwen3", "sdar", "qwen3_moe", "sdar_moe")  # I-DLM calls itself sdar
MASK = "<|MASK|>"
_FIELDS = {  # public key -> ours
  "vocab_size": "vocab_size",
  "hidden_size": "dim",
  "num_hidden_layers": "layers",
  "num_attention_heads": "heads",
  "num_key_value_heads": "kv_heads",
  "head_dim": "head_dim",
  "intermediate_size": "mlp_dim",
  "max_position_embeddings": "length",
}
_EXPERTS = {
  "num_experts": "experts",
  "num_experts_per_tok": "experts_per_token",
  "moe_intermediate_size": "expert_dim",
}
# Variants of the architecture that would change the numbers; absent means the value given here.
_REQUIRED = {
  "hidden_act": "silu",
  "attention_bias": False,
  "use_sliding_window": False,
  "decoder_sparse_step": 1,
  "mlp_only_layers": [],
}


def make_model(
  source: pathlib.Path, config: dict[str, Any], overrides: dict[str, Any]
) -> models.Decoder:
  """Build the network that a config describes.

  Training flags (fuse_cross_entropy, attn_implementation, …) are ignored.

  Raises:
    InputError: a size is missing or impossible, or the config asks for another architecture.
  """
  where = source / "config.json"
  for key, value in _REQUIRED.items():
    if config.get(key, value) not in (value, None):
      raise InputError(f"{where}: {key}={config[key]!r} is not supported; it must be {value!r}.")
  keys = dict(_FIELDS)
  if config["model_type"].lower().endswith("_moe"):
    keys |= _EXPERTS
  fields = {ours: _number(where, config, public) for public, ours in keys.items()}
  fields["eps"] = _number(where, config, "rms_norm_eps", float)
  fields["rope_theta"] = _rotary_base(where, config)
  fields["tied"] = _switch(where, config, "tie_word_embeddings", False)
  if "experts" in fields:
    fields["normalize_gate"] = _switch(where, config, "norm_topk_prob", None)
  try:
    return models.Decoder(models.DecoderConfig(**fields, **overrides))
  except ValueError as error:
    raise InputError(f"{where}: {error}") from None


def _number(where, config, key, kind=int):
  value = config.get(key)
  if value is None:
    raise InputError(f"{where} lacks {key!r}.")
  if isinstance(value, bool) or not isinstance(value, int | float) or value != kind(value):
    raise InputError(f"{where}: {key}={value!r} is not {'a whole' if kind is int else 'a'} number.")
  if value <= 0:
    raise InputError(f"{where}: {key}={value!r} must be above 0.")
  return kind(value)


def _switch(where, config, key, default):
  value = config.get(key, default)
  if not isinstance(value, bool):
    raise InputError(f"{where}: {key}={value!r} is neither true nor false.")
  return value


def _rotary_base(where, config):
  """Return θ, which newer files keep among `rope_parameters`; stretched positions are refused."""
  nested = config.get("rope_parameters") or {}
  scaling = config.get("rope_scaling") or nested
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind != "default":
    raise InputError(f"{where}: rotary positions of type {kind!r} are not supported.")
  return _number(where, {**nested, **config}, "rope_theta", float)


def make_process(
  source: pathlib.Path, config: dict[str, Any], model: models.Decoder
) -> process.Absorbing | None:
  """Return the absorbing process of a network with a mask token, None for one without.

  Raises:
    InputError: an SDAR names no mask, or one outside the vocabulary.
  """
  if config["model_type"].lower().startswith("qwen3") and config.get("mask_token_id") is None:
    return None
  try:
    return process.Absorbing(vocab_size=model.config.vocab_size, mask_id=mask_id(source, config))
  except ValueError as error:
    raise InputError(f"{source}/config.json: {error}") from None


def mask_id(source: pathlib.Path | str, config: dict[str, Any]) -> int:
  """Return the mask token: config.json's mask_token_id, else the tokenizer's <|MASK|>.

  Args:
    source: the model directory.
    config: its parsed config.json.

  Raises:
    InputError: neither is there.
  """
  source = pathlib.Path(source)
  given = config.get("mask_token_id")
  if given is not None:
    if isinstance(given, bool) or not isinstance(given, int):
      raise InputError(f"{source}/config.json: mask_token_id={given!r} is not a whole number.")
    return given
  for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json"):
    if (source / name).is_file() and (found := _added(files.read_json(source / name))) is not None:
      return found
  raise InputError(
    f"{source} names no mask: config.json has no mask_token_id and the tokenizer beside it no "
    f"{MASK}; put the id into config.json."
  )


def _added(content):
  """Return the id of the mask in any of the three ways in which files list added tokens."""
  for number, token in (content.get("added_tokens_decoder") or {}).items():
    if token.get("content") == MASK:
      return int(number)
  listed = content.get("added_tokens") or []
  for token in listed if isinstance(listed, list) else []:
    if token.get("content") == MASK:
      return int(token["id"])
  return content.get(MASK)


def describe(model: models.Decoder, proc: Any, block_length: int | None) -> dict[str, Any]:
  """Return the config.json of a network.

  Raises:
    InputError: the process has no mask.
  """
  cfg = model.config
  if proc is not None and not isinstance(proc, process.Absorbing):
    raise InputError(f"a decoder cannot be saved with the process {type(proc).__name__}.")
  kind = ("qwen3" if proc is None else "sdar") + ("_moe" if cfg.experts else "")
  names = {
    "qwen3": "Qwen3ForCausalLM",
    "sdar": "SDARForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "sdar_moe": "SDARMoeForCausalLM",
  }
  config = {"architectures": [names[kind]], "model_type": kind}
  config |= {public: getattr(cfg, ours) for public, ours in _FIELDS.items()}
  if cfg.experts:
    config |= {public: getattr(cfg, ours) for public, ours in _EXPERTS.items()}
    config["norm_topk_prob"] = cfg.normalize_gate
  config |= {key: value for key, value in _REQUIRED.items() if cfg.experts or key in _DENSE}
  config |= {
    "rms_norm_eps": cfg.eps,
    "rope_theta": cfg.rope_theta,
    "rope_scaling": None,
    "tie_word_embeddings": cfg.tied,
  }
  if proc is not None:
    config["mask_token_id"] = proc.mask_id
  if block_length is not None:
    config["block_size"] = block_length
  return config


_DENSE = ("hidden_act", "attention_bias", "use_sliding_window")
