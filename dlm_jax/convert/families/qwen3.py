# SPDX-License-Identifier: Apache-2.0
"""`Decoder`: Qwen3 and what has its tensors, SDAR and I-DLM, dense or of experts.

All share the names of Qwen3's tensors; `model_type` tells them apart. SDAR and I-DLM have a mask
token; their process is an absorbing one that says which.
"""

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dlm_jax import models, process
from dlm_jax.convert import files, layout
from dlm_jax.convert.family import Family
from dlm_jax.convert.layout import Entry
from dlm_jax.errors import InputError
from dlm_jax.fields import Items, Number, Object, Objects, Optional, Switch, Text, Whole, shown
from dlm_jax.fields import read as read_fields
from dlm_jax.models.dit import SIZES
from dlm_jax.process import Process

# (public name, our path, transposed).
_OUTER = (
  ("model.embed_tokens.weight", "embed/embedding", False),
  ("model.norm.weight", "norm/scale", False),
)
_HEAD = ("lm_head.weight", "project/kernel", True)
_LAYER = (
  ("input_layernorm", "norm1/scale", False),
  *(
    (f"self_attn.{theirs}_proj", f"attention/{ours}/kernel", True)
    for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
  ),
  *((f"self_attn.{name}", f"attention/{name}/scale", False) for name in ("q_norm", "k_norm")),
  ("post_attention_layernorm", "norm2/scale", False),
)
_PARTS = ("gate", "up", "down")
_MASK, _ID = "<|MASK|>", "mask_token_id"
_POSITIVE = Number("(0, ∞)")
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
_ROTARY = ("rope_parameters", "rope_scaling")
_WEIGHTS = ("mscale", "mscale_all_dim")  # of two factors of attention, one over the other
_YARN = {  # public key -> ours, "": read apart
  "factor": "factor",
  "original_max_position_embeddings": "",
  "beta_fast": "beta_fast",
  "beta_slow": "beta_slow",
  "attention_factor": "attention",
  **dict.fromkeys((*_WEIGHTS, "truncate", "rope_type", "type", "rope_theta"), ""),
}
_DENSE = ("hidden_act", "attention_bias", "use_sliding_window")
# Variants of the architecture that would change the numbers; absent means the value given here.
_REQUIRED = {
  "hidden_act": "silu",
  "attention_bias": False,
  "use_sliding_window": False,
  "decoder_sparse_step": 1,
  "mlp_only_layers": [],
}


def read(
  source: pathlib.Path, config: dict[str, Any], overrides: dict[str, Any]
) -> tuple[models.Decoder, process.Absorbing | None]:
  """Build the network that a config describes, and an absorbing process that names its mask.

  Training flags (fuse_cross_entropy, attn_implementation, …) are ignored. A network without a mask
  has no process; how blocks are denoised is the sampler's.

  Raises:
    InputError: a size is missing or impossible, the config asks for another architecture, or an
      SDAR names no mask, or one outside the vocabulary.
  """
  if source.is_file():
    raise InputError(f"{source} is a file; give the directory that holds config.json.")
  model = _read_model(source, config, overrides)
  return model, _read_process(source, config, model)


def _read_model(source, config, overrides):
  where = source / "config.json"
  for key, value in _REQUIRED.items():
    if config.get(key, value) not in (value, None):
      given = shown(config[key])
      raise InputError(f"{where}: {key}={given} is not supported; it must be {value!r}.")
  keys = dict(_FIELDS)
  if config["model_type"].lower().endswith("_moe"):
    keys |= _EXPERTS
  kinds = {public: Whole(1, SIZES[ours].most) for public, ours in keys.items()}
  kinds |= {"rms_norm_eps": _POSITIVE, "tie_word_embeddings": Switch()}
  if "num_experts" in keys:
    kinds["norm_topk_prob"] = Switch()
  given = {key: value for key, value in config.items() if value is not None}  # null: not said
  found = read_fields(where, given, kinds, {"tie_word_embeddings": False})
  keys |= {"rms_norm_eps": "eps", "tie_word_embeddings": "tied", "norm_topk_prob": "normalize_gate"}
  options = {keys[public]: value for public, value in found.items()}
  options["rope_theta"], yarn = _rotary(where, config)
  if yarn is not None:
    options |= {"yarn": yarn, "length": max(options["length"], yarn.length)}
  try:
    return models.Decoder(models.DecoderConfig(**options, **overrides))
  except ValueError as error:
    raise InputError(f"{where}: {error}") from None


def _number(where, config, key, kind=float):
  wanted = _POSITIVE if kind is float else Whole(1)
  return read_fields(where, config, {key: wanted})[key]


def _switch(where, config, key, default):
  return read_fields(where, config, {key: Switch()}, {key: default})[key]


def _rotary(where, config):
  """Return θ and how positions are stretched; newer files keep both among `rope_parameters`."""
  given = read_fields(
    where, config, dict.fromkeys(_ROTARY, Optional(Object())), dict.fromkeys(_ROTARY)
  )
  nested, scaling = (given[key] or {} for key in _ROTARY)
  scaling = scaling or nested
  base = _number(where, {**nested, **config}, "rope_theta", float)
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind == "default":
    return base, None
  if kind != "yarn":
    raise InputError(
      f"{where}: rotary positions of type {kind!r} are not supported; default and yarn are."
    )
  return base, _yarn(where, config, scaling)


def _yarn(where, config, scaling):
  """Return how YaRN stretches positions; what is null is as if it were not there."""
  given = {key: value for key, value in scaling.items() if value is not None}
  if strange := sorted(set(given) - set(_YARN)):
    raise InputError(f"{where}: {strange[0]!r} is unknown to yarn; known: {', '.join(_YARN)}.")
  original = "original_max_position_embeddings"
  trained = next((x for x in (given, config) if x.get(original) is not None), None)
  if trained is None:
    trained, original = config, "max_position_embeddings"
  numbers = {
    ours: _number(where, given, key, float) for key, ours in _YARN.items() if ours and key in given
  }
  weights = [_number(where, given, key, float) for key in _WEIGHTS if key in given]
  if "factor" not in numbers:
    raise InputError(f"{where} lacks 'factor' of yarn, how many times the length is stretched.")
  if len(weights) == 2 and "attention" not in numbers:
    over, under = (0.1 * weight * math.log(max(numbers["factor"], 1)) + 1 for weight in weights)
    numbers["attention"] = over / under
  numbers["original_length"] = _number(where, trained, original, int)
  try:
    return models.Yarn(**numbers, truncate=_switch(where, given, "truncate", True))
  except ValueError as error:
    raise InputError(f"{where}: {error}") from None


def _read_process(source, config, model):
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
  kind = Optional(Whole())
  given = read_fields(f"{source}/config.json", config, {_ID: kind}, {_ID: None})[_ID]
  if given is not None:
    return given
  for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json"):
    file = source / name
    if file.is_file() and (found := _added(file, files.read_json(file))) is not None:
      return found
  raise InputError(
    f"{source} names no mask: config.json has no mask_token_id and the tokenizer beside it no "
    f"{_MASK}; put the id into config.json."
  )


def _added(file, content):
  """Return the id of the mask in any of the three ways in which files list added tokens."""
  token = Object({"content": Text()})
  kinds = {
    "added_tokens_decoder": Optional(Objects(token)),
    "added_tokens": Optional(Items(token)),
    _MASK: Optional(Whole()),
  }
  given = read_fields(file, content, kinds, dict.fromkeys(kinds))
  for number, one in (given["added_tokens_decoder"] or {}).items():
    if one["content"] == _MASK:
      if not number.isdecimal():
        raise InputError(f"{file}: added_tokens_decoder has {number!r}, which is not an id.")
      return int(number)
  for one in given["added_tokens"] or ():
    if one["content"] == _MASK:
      return read_fields(file, one, {"id": Whole()})["id"]
  return given[_MASK]


def describe(model: models.Decoder, proc: Process | None) -> dict[str, Any]:
  """Return the config.json of a network: of an sdar if its process names a mask, else of a qwen3.

  Raises:
    InputError: the process has no mask.
  """
  cfg = model.config
  if proc is not None and not process.has_mask(proc):
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
    "rope_scaling": None if cfg.yarn is None else _stretched(cfg.yarn),
    "tie_word_embeddings": cfg.tied,
  }
  if proc is not None:
    config["mask_token_id"] = proc.mask_id
  return config


def _stretched(yarn):
  fields = {key: getattr(yarn, ours) for key, ours in _YARN.items() if ours}
  fields |= {"original_max_position_embeddings": yarn.original_length, "truncate": yarn.truncate}
  return {"rope_type": "yarn", **{key: x for key, x in fields.items() if x is not None}}


def entries(model: models.Decoder) -> Iterator[Entry]:
  """Yield where tensors lie, layer by layer.

  Raises:
    InputError: the network does not keep its parameters stacked.
  """
  config = model.config
  if config.storage != "stacked":
    raise InputError(
      f"model.storage={config.storage!r}: files are read and written as 'stacked'; regroup the "
      "parameters after loading, with `models.regroup`."
    )
  for name, ours, transposed in (*_OUTER, *(() if config.tied else (_HEAD,))):
    yield Entry(name, ours, (), transposed)
  for layer in range(config.layers):
    prefix = f"model.layers.{layer}."
    for name, ours, transposed in _LAYER:
      yield Entry(f"{prefix}{name}.weight", f"blocks/{ours}", (layer,), transposed)
    if not config.experts:
      for part in _PARTS:
        yield Entry(f"{prefix}mlp.{part}_proj.weight", f"blocks/mlp/{part}/kernel", (layer,), True)
      continue
    yield Entry(f"{prefix}mlp.gate.weight", "blocks/experts/router/kernel", (layer,), True)
    for expert in range(config.experts):
      for part in _PARTS:
        name = f"{prefix}mlp.experts.{expert}.{part}_proj.weight"
        yield Entry(name, f"blocks/experts/{part}", (layer, expert), True)


def match(
  model: models.Decoder, tensors: Mapping[str, Any], source: pathlib.Path | str
) -> Mapping[str, Any]:
  """Return the tensors by public name; a head beside a tied embedding must be it, and goes.

  Raises:
    InputError: a tensor is missing, unknown, misshapen or no float.
  """
  wanted = layout.public_shapes(entries(model), layout.param_shapes(model))
  names = {name: name for name in tensors}
  if model.config.tied and _HEAD[0] in names:
    names.pop(_HEAD[0])
    if not np.array_equal(tensors[_HEAD[0]], tensors[_OUTER[0][0]]):
      raise InputError(
        f"{source} contradicts itself: tie_word_embeddings is true, but {_HEAD[0]} is not the "
        "embedding."
      )
  shard = getattr(tensors, "source", lambda _: source)
  layout.check(lambda name: (name and shard(name)) or source, names, tensors, wanted)
  return tensors


def complete(fields: dict[str, Any]) -> dict[str, Any]:
  """Return the arguments of `DecoderConfig` from a config's fields, of which 0 follows others."""
  rest = {name: value for name, value in fields.items() if name != "mlp_ratio"}
  heads, dim = fields["heads"], fields["dim"]
  return rest | {
    "kv_heads": fields["kv_heads"] or heads,
    "head_dim": fields["head_dim"] or dim // max(heads, 1),
    "mlp_dim": fields["mlp_dim"] or fields["mlp_ratio"] * dim,
  }


FAMILY = Family(
  model_types=("qwen3", "sdar", "qwen3_moe", "sdar_moe"),  # I-DLM calls itself sdar
  network=models.Decoder,
  read=read,
  describe=describe,
  entries=entries,
  match=match,
  writes=("blocks", "introspective"),
  processes=("absorbing", "none"),
  dtypes=("float32", "bfloat16"),
  spare_rows=True,
  several=True,
  name="decoder",
  options=models.DecoderConfig,
  complete=complete,
)
