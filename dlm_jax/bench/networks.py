# SPDX-License-Identifier: Apache-2.0
"""What is decoded in a comparison: networks and prompts, of checkpoints or made up from configs."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from dlm_jax import models, sample
from dlm_jax.bench.decode import Network
from dlm_jax.bench.weights import random_params
from dlm_jax.convert import families
from dlm_jax.data import loader
from dlm_jax.errors import InputError
from dlm_jax.evaluate import likelihood
from dlm_jax.evaluate.judge import load_judge
from dlm_jax.experiment import build, plan
from dlm_jax.models.protocols import Cached
from dlm_jax.text import load, prompts


class Task(NamedTuple):
  """What to decode with what; the options are of one row: temperature and stop ids."""

  target: Network
  draft: Network | None
  prompts: list[list[int]]
  rule: sample.BlockRule
  options: sample.RowOptions
  judge: likelihood.Judge | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
  """Where prompts are.

  Attributes:
    count: the most prompts.
    file: text, a prompt per line.
    data: without a file: a packed dataset; prompts are the starts of its validation sequences.
    length: of those of a dataset, tokens.
  """

  count: int
  file: str = ""
  data: str = ""
  length: int = 0

  def read(self) -> list[str] | list[list[int]]:
    """Return texts, or ids.

    Raises:
      InputError: there are none.
    """
    prompts = _lines(self.file)[: self.count] if self.file else []
    if not self.file and self.data:
      rows_NL = loader.evaluation_groups(self.data, "validation", self.count)[0]["tokens"]
      prompts = [row_L[: self.length].tolist() for row_L in rows_NL]
    if not prompts:
      raise InputError(
        "there are no prompts: give --prompts=FILE, one per line, or --data=DIR, a packed dataset."
      )
    return prompts


def from_checkpoint(
  path: str,
  draft: str | None,
  prompts: Prompts,
  *,
  max_new_tokens: int,
  dtype: str | None = None,
  storage: str | None = None,
  judge: str = "",
  **request: Any,
) -> Task:
  """Return trained networks with prompts from a file or of a validation split.

  Args:
    path: workdir or model directory of the target.
    draft: the same of the draft, or None.
    prompts: where they are.
    max_new_tokens: that the network has to have room for.
    dtype: of products; None: what sampling takes.
    storage: of parameters, see `models.regroup`; None: what sampling takes.
    judge: workdir or model directory of a next-token network with the same tokenizer, or "".
    **request: of `TextDecoder.plan`: chat, block_length, temperature; those that are None are left
      out.

  Raises:
    InputError: there are no prompts, or see `text.load.open_decoder` and `TextDecoder.plan`.
  """
  pipe = load.open_decoder(path, draft=draft, dtype=dtype, storage=storage)
  asked = {name: value for name, value in request.items() if value is not None}
  plan = pipe.plan(prompts.read(), verify="none", max_new_tokens=max_new_tokens, **asked)
  lengths_B = np.asarray(plan.lengths_B)
  rows = [row[:n].tolist() for row, n in zip(np.asarray(plan.prompt_BP), lengths_B, strict=True)]
  reader = _judge(judge, pipe.tokenizer, int(lengths_B.max()) + max_new_tokens) if judge else None
  pipe.load_weights()
  drafting = None if pipe.draft is None else Network(*pipe.draft.loaded)
  options = sample.RowOptions.make(
    1, temperature=asked.get("temperature", 0.0), stop_ids=plan.stop_ids[0]
  )
  return Task(Network(*pipe.loaded), drafting, rows, plan.rule, options, reader)


def _judge(path, tokenizer, length):
  """Return a judge of texts of a tokenizer that reads so many tokens."""
  reader = load_judge(path, tokenizer)
  if reader.retokenise is not None:
    raise InputError(f"judge {path} has another tokenizer; take one trained on the same tokens.")
  most = reader.judge.model.config.length
  if length > most:
    raise InputError(
      f"judge {path} reads {most} tokens, and prompt and text can have {length}; lower "
      "--prompt_length or --max_new_tokens."
    )
  return reader.judge


def _lines(file):
  lines = prompts.read_text(file, f"--prompts={file}").splitlines()
  return [line for line in lines if line.strip()]


def from_config(
  config: plan.Plan,
  draft: plan.Plan | None,
  *,
  count: int,
  length: int,
  block_length: int | None = None,
  temperature: float = 0.0,
  dtype: str | None = None,
  storage: str | None = None,
) -> Task:
  """Return random networks and prompts: speeds mean something, texts and acceptance do not.

  Args:
    config: of the target, read.
    draft: of the draft, or None.
    count: prompts.
    length: of each, tokens.
    block_length: None: what the target's objective names.
    temperature: of both networks.
    dtype: of products and weights; None: the configs'.
    storage: of parameters, see `models.regroup`; None: what sampling takes.

  Raises:
    InputError: the model is no decoder, or no block length is known.
  """
  networks = [make_decoder(one) for one in (config, draft) if one is not None]
  size = block_length or config.objective.options.get("block_length")
  if not size:
    raise InputError("the config names no block length; give --block_length.")
  proc = build.make_process(config, networks[0])
  if proc is None:
    raise InputError(f"process.name={config.process.name!r} has no mask; take a config with one.")
  prompts_BP = np.random.default_rng(0).integers(0, proc.mask_id, (count, length))
  rule = sample.BlockRule(block_length=size, mask_id=proc.mask_id)
  options = sample.RowOptions.make(1, temperature=temperature)
  made = [_random(one, dtype, storage) for one in networks]
  return Task(made[0], made[1] if draft is not None else None, prompts_BP.tolist(), rule, options)


def _random(model, dtype, storage):
  storage = storage or models.default_storage()
  try:
    fields = dataclasses.replace(
      model.config, storage=storage, dtype=dtype or model.config.dtype, remat="none"
    )
  except ValueError as error:
    raise InputError(str(error)) from None
  model = model.clone(config=fields)
  return Network(model, random_params(model, fields.dtype))


def make_decoder(read: plan.Plan) -> Cached:
  """Build the decoder of a plan.

  Raises:
    InputError: the plan is of another network.
  """
  model = build.make_model(read, build.vocabulary(read))
  if "blocks" not in read.model.family.writes:
    known = " or ".join(
      repr(f.name) for f in families.found().values() if f.name and "blocks" in f.writes
    )
    raise InputError(f"model.name={read.model.name!r} is not {known}; choose such a config.")
  return model
