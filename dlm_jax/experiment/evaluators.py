# SPDX-License-Identifier: Apache-2.0
"""What is measured during training: a student's samples, or a teacher's or judge's likelihood."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dlm_jax import convert, mesh, models, sample
from dlm_jax.data import loader, templates
from dlm_jax.data.dataset import Dataset
from dlm_jax.decode.passes import Bound
from dlm_jax.evaluate import blocks, curve, frontier, likelihood
from dlm_jax.evaluate.generative import Quality
from dlm_jax.evaluate.judge import load_judge
from dlm_jax.experiment import several
from dlm_jax.experiment.build import Experiment
from dlm_jax.objectives import TrainState, output_params
from dlm_jax.train.progress import Bar
from dlm_jax.train.selection import Selection

# Makes a key of a likelihood's noise that no step of training, seeded with 0, has.
_NOISE = 0x6E6F6973
Export = Callable[[epath.PathLike, Experiment, TrainState, int], None]


def chosen(
  built: Experiment, dataset: Dataset, export: Export, workdir: epath.PathLike
) -> "Samples | Likelihood | several.Several | None":
  """Return the evaluator that `config.evaluate.measure` names, several in one if it names more.

  Without names: samples if the run distils a teacher, else held-out likelihood.

  Args:
    built: the run.
    dataset: its data, opened.
    export: writes a network: (directory, run, state, step).
    workdir: the best network, by the first evaluator, goes to workdir/best.
  """
  names = built.plan.evaluate.measure
  if not built.plan.evaluate.every:
    return None
  made = {}
  for name in names:
    keep = several.export_nothing if made else export
    if name == "samples":
      made[name] = Samples(built, dataset, keep, workdir)
    else:
      made[name] = Likelihood(built, dataset, keep, workdir)
  return several.Several(made) if len(made) > 1 else made[names[0]]


class Samples:
  """Measure samples during training; keep the best network in workdir/best, see `Selection`."""

  def __init__(
    self,
    built: Experiment,
    dataset: Dataset,
    export: Export,
    workdir: epath.PathLike,
  ):
    options = built.plan.evaluate
    frontier.checked_nfes(options.nfes)
    given = built.plan.data.packing != "concatenate"
    self._judge = load_judge(options.judge, dataset.tokenizer(), given=given)
    self._built, self._export = built, export
    self._best = epath.Path(workdir) / "best"
    self._selection = Selection(
      select=options.select,
      max_entropy_drop=options.max_entropy_drop,
      patience=options.patience,
    )
    self._reference: dict[str, float] = {}  # the teacher's entropy by NFE
    self._curves: dict[str, list[dict[str, float]]] = {}  # its temperatures by NFE, see `curve`
    batch = min(options.batch_size, options.samples)
    self._rounds = -(-options.samples // batch)
    self._templates = None
    if given:
      self._templates = templates.like_validation(dataset, options.samples, batch)

    order = {"order": options.order} if options.order else {}
    given = {"noise_removal": options.noise_removal, **order}
    sample.check_options("ancestral", built.process, given)

    def draw(denoiser, rng, nfe, temperature, prompt=None, frozen=None):
      length = built.plan.data.length if prompt is None else prompt.shape[1]
      return sample.generate(
        denoiser,
        built.process,
        rng,
        batch=batch,
        length=length,
        steps=nfe,
        prompt=prompt,
        frozen=frozen,
        temperature=temperature,
        **given,
      )

    def fine(denoiser):
      return frontier.numbers(denoiser, built.process, built.plan.data.length)

    # Split over the mesh; compiled once per NFE, not per evaluation. Every host reads all tokens.
    everywhere = mesh.replicated(built.mesh)
    self._draw = jax.jit(mesh.over(built.mesh, draw), static_argnums=2, out_shardings=everywhere)
    self._fine = jax.jit(mesh.over(built.mesh, fine), out_shardings=everywhere)

  @property
  def stop(self) -> bool:
    """Whether the entropy has collapsed."""
    return self._selection.stop

  def to_json(self) -> dict:
    """Return what a checkpoint must keep."""
    kept = {"selection": self._selection.to_json(), "reference": self._reference}
    return {**kept, "curves": self._curves}

  def from_json(self, state: dict) -> None:
    """Take back what `to_json` returned."""
    if state:
      self._selection.from_json(state["selection"])
      self._reference, self._curves = state["reference"], state.get("curves", {})

  def __call__(self, step: int, state: TrainState) -> tuple[dict[str, float], bool]:
    """Return scores, and whether the entropy has collapsed."""
    params = output_params(state, self._built.objective)
    measured = self._measure(params)
    matching = self._selection.select == "matched"
    # But for noise in its masks the first student is the teacher.
    first = step == 0 and not getattr(self._built.model.config, "mask_noise", 0)
    if not self._reference or (matching and not self._curves):
      teacher = measured if first else self._measure(state.trees["teacher"])
      self._reference = {nfe: quality.entropy for nfe, quality in teacher.items()}
      if matching:
        self._curves = self._measure_curves(state.trees["teacher"], teacher)
    drop = max(self._reference[nfe] - q.entropy for nfe, q in measured.items())
    scores = {"entropy_drop": drop}
    for nfe, quality in measured.items():
      scores |= {f"nfe{nfe}/genppl": quality.genppl, f"nfe{nfe}/entropy": quality.entropy}
    if matching:
      above = {nfe: curve.above(self._curves[nfe], q) for nfe, q in measured.items()}
      # That is nothing above itself, also where a curve has no two entropies.
      score = 0.0 if first else np.mean([value for value, _ in above.values()])
      error = 0.0 if first else math.hypot(*(error for _, error in above.values())) / len(above)
      scores |= {f"nfe{nfe}/matched": value for nfe, (value, _) in above.items()}
      scores |= {"matched": score, "matched_se": error}
    else:
      score, error = math.exp(np.mean([math.log(q.genppl) for q in measured.values()])), 0.0
    # One host's rounding must not let it decide otherwise than the rest.
    decided = mesh.from_first_host(np.array([score, drop, error]))
    if self._selection.update(step, *map(float, decided)):
      self._export(self._best, self._built, state, step)
    if self._selection.best:
      scores["best_step"] = self._selection.best[0]
    return scores, self._selection.stop

  def _measure_curves(self, teacher, warm: dict[str, Quality]) -> dict[str, list[dict]]:
    """Return the teacher's curves, with what is known of temperature 1."""
    temperatures = self._built.plan.evaluate.temperatures
    label, silent = "teacher at other temperatures", jax.process_index() != 0
    found = {nfe: [curve.row(1.0, quality)] for nfe, quality in warm.items()}
    with Bar(label, len(set(temperatures) - {1.0}), silent=silent) as bar:
      for temperature in sorted(set(temperatures) - {1.0}):
        for nfe, quality in self._measure(teacher, temperature).items():
          found[nfe].append(curve.row(temperature, quality))
        bar.update()
    return found

  def _measure(self, params, temperature: float = 1.0) -> dict[str, Quality]:
    options = self._built.plan.evaluate
    denoiser = models.Denoiser(self._built.model.rolled(), params)
    frontier.refuse_unless(self._fine(denoiser))
    measured = {}
    for nfe in options.nfes:
      tokens_BL = self._samples(denoiser, nfe, temperature)
      given = {} if self._templates is None else {"valid_NL": self._templates.valid_NL}
      measured[str(nfe)] = self._judge.quality(tokens_BL, batch_size=options.batch_size, **given)
    return measured

  def _samples(self, denoiser, nfe: int, temperature: float) -> np.ndarray:
    """Draw all samples with so many evaluations; what validation records give is kept."""

    def draw(i, prompt_BL=None):
      rng = jax.random.fold_in(jax.random.key(nfe), i)
      frozen_BL = None if prompt_BL is None else prompt_BL != self._templates.tokenizer.mask_id
      warmth = jnp.float32(temperature)  # traced: one program for all
      return np.asarray(self._draw(denoiser, rng, nfe, warmth, prompt_BL, frozen_BL))

    if self._templates is not None:
      return self._templates.draw(draw)
    drawn = [draw(i) for i in range(self._rounds)]
    return np.concatenate(drawn)[: self._built.plan.evaluate.samples]


class Likelihood:
  """Measure held-out likelihood during training; keep the best network in workdir/best.

  A denoiser's is an estimate of the bound, of a decoder on blocks that at its block length; its
  standard error is reported with it. The noise drawn is always the same, so the best of many is a
  little below what fresh noise would give.
  """

  def __init__(self, built: Experiment, dataset: Dataset, export: Export, workdir: epath.PathLike):
    options = built.plan.evaluate
    size = min(options.batch_size, options.samples)
    groups = loader.evaluation_groups(dataset, "validation", options.samples)
    self._tokens, self._valid = loader.features(groups, "tokens", "valid")
    self._built, self._export, self._size = built, export, size
    self._directory = epath.Path(workdir) / "best"
    self._best = math.inf

  stop = False  # a likelihood never collapses

  def to_json(self) -> dict:
    """Return what a checkpoint must keep."""
    return {"best": self._best if math.isfinite(self._best) else None}

  def from_json(self, state: dict) -> None:
    """Take back what `to_json` returned."""
    best = state.get("best")
    self._best = math.inf if best is None else best

  def __call__(self, step: int, state: TrainState) -> tuple[dict[str, float], bool]:
    """Return the validation perplexity (a denoiser's bound); never asks to stop."""
    params = output_params(state, self._built.objective)
    model = self._built.model.rolled()
    scores = self._score(model, params)
    perplexity = float(mesh.from_first_host(np.array(scores["perplexity"])))
    if perplexity < self._best:
      self._best = perplexity
      self._export(self._directory, self._built, state, step)
    error = float(mesh.from_first_host(np.array(scores["perplexity_se"])))
    return {"validation/perplexity": perplexity, "validation/perplexity_se": error}, False

  def _score(self, model, params) -> dict[str, float]:
    proc, options = self._built.process, self._built.plan.objective.options
    shared = {"batch_size": self._size, "valid_NL": self._valid}
    if proc is None:
      return likelihood.ar_perplexity(likelihood.Judge(model, params), self._tokens, **shared)
    rng = jax.random.fold_in(jax.random.key(0), _NOISE)
    if convert.writes(model, proc) == "blocks":
      return blocks.block_elbo(
        Bound(model, params),
        proc,
        self._tokens,
        rng,
        block_length=options["block_length"],
        first_given=options.get("first_given", False),
        **shared,
      )
    return likelihood.elbo(models.Denoiser(model, params), proc, self._tokens, rng, **shared)
