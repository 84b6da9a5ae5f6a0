# SPDX-License-Identifier: Apache-2.0
"""Run a configured experiment: data, state, loop, evaluation, export."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dlm_jax import convert, experiment, models, sample
from dlm_jax.data import builder, loader, tokenizers
from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier, generative, likelihood
from dlm_jax.experiment import Experiment
from dlm_jax.objectives import TrainState, output_params
from dlm_jax.train import loop
from dlm_jax.train.checkpoint import Checkpoints
from dlm_jax.train.selection import Selection
from dlm_jax.train.writers import Writer


def train(config, workdir: str | os.PathLike, *, label: str = "", wandb: str = "") -> loop.Result:
  """Train what a config describes; called again on the same workdir it resumes.

  Writes to `workdir`: config.json, metrics.jsonl, tensorboard/, checkpoints/, `final/` (the trained
  network with its tokenizer, in the Hugging Face layout) and, with evaluation, `best/`.

  Args:
    config: locked `ConfigDict`.
    workdir: created if needed.
    label: shown in the progress line; default: the objective's name.
    wandb: project to log to.

  Raises:
    InputError: anything the user can fix; nothing is left half-written.
  """
  workdir = pathlib.Path(workdir)
  dataset = open_data(config)
  tokenizer = dataset.tokenizer()
  built = experiment.build(config, tokenizer.vocab_size)
  teacher = load_teacher(config, built, tokenizer)
  judge = load_judge(config, tokenizer) if config.evaluate.every else None
  make_workdir(workdir)
  stream = loader.make(
    config.data.directory, "train", batch_size=config.loader.batch_size, seed=config.seed,
    host=jax.process_index(), hosts=jax.process_count(),
  )  # fmt: skip
  evaluator = None
  if judge is not None:
    evaluator = Evaluator(built=built, judge=judge, tokenizer=tokenizer, workdir=workdir)
  resolved = json.loads(config.to_json())
  _check_same_run(workdir, resolved)
  with Checkpoints(workdir / "checkpoints", keep=config.train.keep, config=resolved) as checkpoints:
    state = _start(built, teacher, checkpoints, stream, evaluator)
    step = int(state.step)
    with Writer(workdir, resume_from=step, wandb_project=wandb) as writer:
      result = loop.run(
        built.objective, state, stream, config=experiment.loop_config(config), mesh=built.mesh,
        shardings=built.shardings, checkpoints=checkpoints, writer=writer, evaluator=evaluator,
        label=label or config.objective.name,
      )  # fmt: skip
  if result.reason != "interrupted":
    export(workdir / "final", built, result.state, tokenizer, result.step)
  return result


def open_data(config) -> builder.Dataset:
  """Open the packed dataset of a config; tells how to make it if it is not there."""
  directory = pathlib.Path(config.data.directory)
  if not config.data.directory or not directory.exists():
    raise InputError(
      f"data.directory={config.data.directory!r} does not exist; write it first with "
      "`dlm-jax prepare` and the same --config."
    )
  dataset = builder.open_dataset(directory)
  if dataset.info.length != config.data.length:
    raise InputError(
      f"data.length={config.data.length}, but {directory} holds sequences of "
      f"{dataset.info.length} tokens; use that or prepare another directory."
    )
  return dataset


def make_workdir(workdir: pathlib.Path) -> None:
  """Create a workdir and check that files can be written there."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / ".write_test"
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise InputError(f"workdir {workdir} cannot be written: {error.strerror}.") from None


def load_teacher(config, built: Experiment, tokenizer: tokenizers.Tokenizer) -> Any:
  """Return the teacher's parameters, or None if the config names none.

  Raises:
    InputError: its network or its tokenizer is not the one of this run.
  """
  if not config.teacher.path:
    return None
  directory = experiment.network_directory(config.teacher.path)
  model, params, _ = convert.load(directory)
  check_tokenizer(directory, tokenizer, model.config.vocab_size - 1)
  fields = ("vocab_size", "dim", "layers", "heads", "cond_dim", "mlp_ratio", "time_conditioning")
  for field in fields:
    ours, theirs = getattr(built.model.config, field), getattr(model.config, field, None)
    if ours != theirs:
      raise InputError(f"model.{field}={ours}, but the teacher {directory} has {theirs}.")
  return params


def check_tokenizer(
  directory: pathlib.Path, tokenizer: tokenizers.Tokenizer, vocab_size: int
) -> None:
  """Check that a network was trained on the tokens of this tokenizer."""
  stored = convert.read_config(directory).get("dlm_jax", {}).get("tokenizer_fingerprint")
  if vocab_size != tokenizer.vocab_size or stored not in (None, tokenizer.fingerprint):
    raise InputError(
      f"{directory} has a vocabulary of {vocab_size} tokens and the data one of "
      f"{tokenizer.vocab_size}{'' if vocab_size != tokenizer.vocab_size else ' others'}; prepare "
      f"the data with --config.data.tokenizer={directory}."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeWithTokens:
  """A judge and, if it has a tokenizer of its own, how to translate to its tokens."""

  judge: likelihood.Judge
  eos_id: int
  retokenise: Any = None
  name: str = ""


def load_judge(config, tokenizer: tokenizers.Tokenizer) -> JudgeWithTokens:
  """Load `config.evaluate.judge`: one of our runs, or a GPT-2 directory with its BPE files."""
  path = config.evaluate.judge
  if not path:
    raise InputError("evaluate.judge is empty; name the workdir of an autoregressive run.")
  directory = experiment.network_directory(path)
  kind = convert.read_config(directory)["model_type"]
  if kind == "gpt2":
    model, params, _ = convert.load(directory)
    theirs = tokenizers.load(directory)
    return JudgeWithTokens(
      judge=likelihood.Judge(model, params),
      eos_id=theirs.eos_id,
      name=path,
      retokenise=lambda tokens_BL: generative.retokenise(
        np.where(tokens_BL == tokenizer.mask_id, tokenizer.eos_id, tokens_BL),
        lambda text: theirs.encode(text, specials=True),
        decode=tokenizer.decode,
        eos_id=theirs.eos_id,
      ),
    )
  if kind != "dlm_jax_causal":
    raise InputError(f"evaluate.judge={path} is a {kind} network; a judge is autoregressive.")
  dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  model, params, _ = convert.load(directory, dtype=dtype)
  check_tokenizer(directory, tokenizer, model.config.vocab_size)
  return JudgeWithTokens(judge=likelihood.Judge(model, params), eos_id=tokenizer.eos_id, name=path)


def _check_same_run(workdir, resolved):
  """Refuse to resume a run under a config that would make it another run."""
  path = workdir / "checkpoints" / "config.json"
  if not path.exists():
    return
  before = json.loads(path.read_text())
  for group in ("model", "process", "objective", "data", "loader", "teacher", "optim", "seed"):
    if before.get(group) != resolved.get(group):
      raise InputError(
        f"{workdir} holds a run with another config ({group}); resume it with the same one or "
        "choose another --workdir."
      )


def _start(built, teacher, checkpoints, stream, evaluator) -> TrainState:
  """Return the state to train from: the newest checkpoint, or a fresh one."""
  if checkpoints.latest is not None:
    like = jax.tree.map(
      lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
      built.shapes,
      built.shardings,
    )
    state, extra = checkpoints.restore(like)
    stream.seek(extra["loader"])
    if evaluator is not None:
      evaluator.from_json(extra.get("evaluator", {}))
    return state
  initialise = jax.jit(built.objective.init, out_shardings=built.shardings)
  return initialise(jax.random.key(built.config.seed), teacher)


def export(
  directory: pathlib.Path, built: Experiment, state: TrainState,
  tokenizer: tokenizers.Tokenizer, step: int,
) -> None:  # fmt: skip
  """Write the network to sample from, with its tokenizer, in the Hugging Face layout."""
  params = output_params(state, built.objective)
  if jax.process_count() > 1:
    params = multihost_utils.process_allgather(params, tiled=True)
  if jax.process_index() == 0:
    extra = {
      "tokenizer_fingerprint": tokenizer.fingerprint,
      "objective": built.config.objective.name,
      "step": step,
    }
    convert.save(directory, built.model, jax.device_get(params), built.process, extra=extra)
    tokenizer.save(directory)


class Evaluator:
  """Measure samples during training; keep the best network in workdir/best, see `Selection`."""

  def __init__(self, *, built: Experiment, judge: JudgeWithTokens, tokenizer, workdir):
    options = built.config.evaluate
    if isinstance(built.model, models.Causal):
      raise InputError("evaluate.every: an autoregressive run has no few-step samples to evaluate.")
    frontier.checked_nfes(options.nfes)
    self._built, self._judge, self._tokenizer = built, judge, tokenizer
    self._best = pathlib.Path(workdir) / "best"
    self._selection = Selection(
      max_entropy_drop=options.max_entropy_drop, patience=options.patience
    )
    self._reference: dict[str, float] = {}  # the teacher's entropy by NFE
    batch = min(options.batch_size, options.samples)
    self._rounds = -(-options.samples // batch)

    def draw(denoiser, rng, nfe):
      length = built.config.data.length
      return sample.generate(denoiser, built.process, rng, batch=batch, length=length, steps=nfe)

    self._draw = jax.jit(draw, static_argnums=2)  # compiled once per NFE, not per evaluation

  def to_json(self) -> dict:
    """Return what a checkpoint must keep."""
    return {"selection": self._selection.to_json(), "reference": self._reference}

  def from_json(self, state: dict) -> None:
    """Take back what `to_json` returned."""
    if state:
      self._selection.from_json(state["selection"])
      self._reference = state["reference"]

  def __call__(self, step: int, state: TrainState) -> tuple[dict[str, float], bool]:
    """Return scores, and whether the entropy has collapsed."""
    params = output_params(state, self._built.objective)
    measured = self._measure(params)
    if not self._reference:
      self._reference = {"none": 0.0}
      if "teacher" in state.trees:
        teacher = self._measure(state.trees["teacher"])
        self._reference = {nfe: quality.entropy for nfe, quality in teacher.items()}
    genppl = math.exp(np.mean([math.log(q.genppl) for q in measured.values()]))
    drop = max(self._reference.get(nfe, 0.0) - q.entropy for nfe, q in measured.items())
    if self._selection.update(step, genppl, drop):
      export(self._best, self._built, state, self._tokenizer, step)
    scores = {"entropy_drop": drop}
    for nfe, quality in measured.items():
      scores |= {f"nfe{nfe}/genppl": quality.genppl, f"nfe{nfe}/entropy": quality.entropy}
    return scores, self._selection.stop

  def _measure(self, params) -> dict[str, generative.Quality]:
    options = self._built.config.evaluate
    denoiser = models.Denoiser(self._built.model, params)
    measured = {}
    for nfe in options.nfes:
      rngs = [jax.random.fold_in(jax.random.key(nfe), i) for i in range(self._rounds)]
      drawn = [np.asarray(self._draw(denoiser, rng, nfe)) for rng in rngs]
      tokens_BL = np.concatenate(drawn)[: options.samples]
      translated = self._judge.retokenise(tokens_BL) if self._judge.retokenise else None
      measured[str(nfe)] = generative.quality(
        self._judge.judge, tokens_BL, eos_id=self._judge.eos_id,
        batch_size=options.batch_size, retokenised=translated,
      )  # fmt: skip
    return measured
