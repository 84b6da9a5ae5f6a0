# SPDX-License-Identifier: Apache-2.0
"""`generate`: samples on a fixed grid, in one traceable function."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from dlm_jax.arrays import IntBL, RngKey
from dlm_jax.errors import InputError, check_choice, hint
from dlm_jax.fields import Switch, Whole, make
from dlm_jax.mesh import batch_axes, by_compiler, split_batch, varying_like
from dlm_jax.process import Absorbing, Process, Uniform, has_mask
from dlm_jax.sample import _checks, _rgas
from dlm_jax.sample._analytic import Analytic
from dlm_jax.sample._ancestral import Ancestral, FirstHitting
from dlm_jax.sample._legacy import Legacy
from dlm_jax.sample._psi import Psi, UniformPsi
from dlm_jax.sample._request import Request, Sampler
from dlm_jax.sample._uniform import UniformAncestral

# By process: the classes of samplers, whose fields are their options.
SAMPLERS: dict[type, dict[str, type[Sampler]]] = {
  Absorbing: {
    "ancestral": Ancestral,
    "first_hitting": FirstHitting,
    "psi": Psi,
    "analytic": Analytic,
    "rgas": _rgas.Rgas,
  },
  Uniform: {"ancestral": UniformAncestral, "psi": UniformPsi},
}
PRECISIONS = ("exact", "legacy")


def generate(
  denoiser,
  proc: Absorbing | Uniform,
  rng: RngKey,
  *,
  batch: int,
  length: int,
  steps: int = 16,
  sampler: str | Callable = "ancestral",
  prompt: Int[Array, "..."] | None = None,
  frozen: Bool[Array, "..."] | None = None,
  return_trace: bool = False,
  **sampler_options,
) -> IntBL | tuple[IntBL, Int[Array, "K B L"]]:
  """Generate token sequences with a few network evaluations.

  Pure and unjitted: always call it inside your own `jit` (static: proc, batch, length, steps and
  options other than temperature and nucleus), or its loops are compiled at every call. `vmap`,
  `scan`, `shard_map` and `jax.export` compose with it. Sequence i uses `fold_in(rng, i)` only, so
  batch size, order and sharding never change it (in float32; in bfloat16 other kernels may round a
  near tie the other way).

  Where a mesh is in force (`jax.set_mesh`) the batch is split over its axes "data" and "fsdp", or,
  if it has neither, over all but "tensor", as far as they divide it: see `mesh.batch_axes`.

  Args:
    denoiser: a `models.Denoiser`, `from_logits` of any function, or any object with
      `trunk(tokens_BL, sigma_B) -> hidden_BLD` and `head(hidden_BKD, sigma_B) -> logits_BKV`;
      "analytic" and precision="legacy" also call it, (tokens_BL, sigma_B) -> logits_BLV. One whose
      `mask_noise` is N > 0 gets fresh noise in every evaluation: `trunk(…, noise_BLN)`.
    proc: the forward process that the denoiser was trained on.
    rng: one typed key.
    batch: number of sequences.
    length: tokens per sequence.
    steps: grid steps. At most steps + 1 evaluations happen: the last one removes what noise the
      grid leaves. A step that reveals no mask makes none, where such steps are to be expected: with
      a prompt, or with few tokens per step. See `evaluations`.
    sampler: one of
      "ancestral": the reverse process, step by step.
      "first_hitting": absorbing only; one token per evaluation, exact for infinitely many steps.
      "psi": ancestral steps that also noise tokens again and so correct them; options kappa, eta,
        window, hold: see `Psi`.
      "analytic": absorbing only; the sampler of score networks, whose ratios set the pace too.
      "rgas": absorbing only; ancestral steps that a discriminator guides; options critic (needed),
        h, candidates, ratio, reward: see `Rgas`.
      Or your own: a function (request, **sampler_options) -> states after every step, int32
        [steps, B, L]; see `Request`.
    prompt: int32 [P], [L] or [B, L]: given tokens; a prefix if shorter than `length`. Where it
      holds the mask id, text is generated.
    frozen: bool, shape of prompt: given positions. Default: wherever the prompt is not the mask;
      all of it under a uniform process, which has no mask.
    return_trace: also return the state after every step.
    **sampler_options: of every sampler: grid ("uniform", "cosine", "rising"), noise_removal
      ("ancestral", "greedy", "none"), and temperature, nucleus and top_k, which act on the
      prediction of the clean token; see `GridOptions` and `Truncation`. Of "ancestral" under an
      absorbing process also order, which positions a step reveals ("spaced", by default; "random",
      adaptive ones, or your own: see `orders`), guidance (w of predictions sharpened against that
      for masks alone), and precision="legacy": the public float32 race, see `Legacy`.
      "first_hitting" takes guidance, and as "psi" and "rgas" the orders "random", by default, and
      "spaced".

  Returns:
    int32 [batch, length]; with `return_trace` also the state after every step, int32
    [steps + 1, batch, length] (one less with noise_removal="none"). Where logits were NaN or +inf a
    token is −1, `draw.NONE`.

  Raises:
    InputError: steps < 1, a prompt longer than `length`, an option unknown or out of range, a
      sampler that the process does not have, or a network whose arrays have other shapes.

  Reference: absorbing: MDLM, arXiv 2406.07524, equation 7; first hitting: arXiv 2409.02908;
  uniform: Duo, arXiv 2506.10892; psi: ReMDM, arXiv 2503.00307; analytic: SEDD, arXiv 2310.16834;
  rgas: DiDi-Instruct, arXiv 2509.25035.

  Example:
    >>> import jax
    >>> from dlm_jax import models, process, sample
    >>> model = models.DiT(models.DiTConfig(vocab_size=9, dim=8, heads=2, layers=1))
    >>> params = model.init(jax.random.key(0), jax.numpy.zeros((1, 4), int), jax.numpy.zeros(1))
    >>> denoiser = models.Denoiser(model, params["params"])
    >>> proc = process.Absorbing(vocab_size=9, mask_id=8)
    >>> sample.generate(denoiser, proc, jax.random.key(1), batch=2, length=4, steps=2).shape
    (2, 4)
  """
  batch, length, steps = _checks.sizes(batch, length, steps)
  _checks.arguments(denoiser, proc, rng)
  return_trace = Switch().check("return_trace", return_trace)
  _checks.given(prompt, frozen, proc.vocab_size)
  chosen = _choose(sampler, proc, sampler_options)
  if _noisy(denoiser) and not callable(sampler):
    _check_noise(sampler, chosen.__self__)

  def draw(denoiser, rng, prompt, frozen, options):
    run = _choose(sampler, proc, options)
    rng_B = split_batch(jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(batch)))
    rng_prior_B, rng_B = _split_each(rng_B)
    rng_B, noise_B = _split_each(rng_B) if _noisy(denoiser) else (rng_B, None)
    x_BL, frozen_BL = map(split_batch, _start(proc, rng_prior_B, length, prompt, frozen))
    x_BL = varying_like(x_BL, (denoiser, rng, prompt, frozen, options))
    align = getattr(denoiser, "aligned", lambda: denoiser)  # once, in front of all loops
    network = _checks.Shaped(align(), proc.vocab_size)
    given = {"rng_B": rng_B, "noise_B": noise_B, "x_BL": x_BL, "frozen_BL": frozen_BL}
    given["prompted"] = prompt is not None
    return run(Request(denoiser=network, process=proc, steps=steps, **given))

  rows = PartitionSpec(None, batch_axes(batch) or None)
  trace_KBL = by_compiler(draw, rows)(denoiser, rng, prompt, frozen, sampler_options)
  return (trace_KBL[-1], trace_KBL) if return_trace else trace_KBL[-1]


def _noisy(denoiser):
  """Return whether a denoiser's masks take noise: `Denoiser.mask_noise`."""
  return bool(getattr(denoiser, "mask_noise", 0))


def _check_noise(name, sampler):
  """Raise InputError where a sampler gives masks no noise."""
  given = isinstance(sampler, Ancestral | Psi | _rgas.Rgas)
  if not given or isinstance(sampler, UniformAncestral):
    raise InputError(
      f"sampler={name!r} gives masks no noise, which this network needs (model.mask_noise); use "
      "'ancestral', 'first_hitting', 'psi' or 'rgas' with precision='exact'."
    )


def _split_each(rng_B):
  keys = jax.vmap(jax.random.split)(rng_B)
  return keys[:, 0], keys[:, 1]


def check_options(sampler: str | Callable, proc: Process, options: Mapping[str, Any]) -> None:
  """Check options as `generate` does, before anything is traced; of one's own sampler any will do.

  Raises:
    InputError: an option is unknown or out of range, or the process has no such sampler.
  """
  _choose(sampler, proc, options)


def _choose(sampler, proc, options):
  """Return a function of a request: the sampler with its options, which are checked here."""
  if callable(sampler):
    return functools.partial(sampler, **options)
  options = dict(options)
  made = _sampler(sampler, proc, options.pop("precision", "exact"))
  fields = sorted(field.name for field in dataclasses.fields(made))
  for name in options:
    if name not in fields:
      raise InputError(
        f"sampler={sampler!r} has no option {name!r}{hint(name, fields)}; it has {fields}."
      )
  return make(made, options).run


def _sampler(name, proc, precision):
  """Return the class of this name under the process; None is an absorbing one."""
  kind = Absorbing if proc is None else type(proc)
  known = next((k for process, k in SAMPLERS.items() if issubclass(kind, process)), {})
  everywhere = dict.fromkeys(name for names in SAMPLERS.values() for name in names)
  check_choice("sampler", name, tuple(everywhere))
  if name not in known:
    raise InputError(
      f"sampler={name!r} needs an absorbing process, and this one is {kind.__name__.lower()}; use "
      f"{' or '.join(map(repr, known))}."
    )
  check_choice("precision", precision, PRECISIONS)
  if precision == "exact":
    return known[name]
  if known[name] is not Ancestral:
    raise InputError(
      "precision='legacy' exists for sampler='ancestral' of an absorbing process only; use 'exact'."
    )
  return Legacy


def _start(proc, rng_B, length, prompt, frozen):
  """Return the state at t = 1 with the prompt in place, and the positions that stay."""
  batch = rng_B.shape[0]
  x_BL = jax.vmap(lambda rng: proc.prior(rng, length))(rng_B)
  if prompt is None:
    if frozen is not None:
      raise InputError("frozen is given without a prompt; pass the tokens to keep as prompt.")
    return x_BL, jnp.zeros((batch, length), bool)
  prompt = jnp.asarray(prompt, jnp.int32)
  given = prompt.shape[-1]
  if given > length:
    raise InputError(f"the prompt has {given} tokens and length={length}; shorten it.")
  if frozen is None:
    frozen = prompt != proc.mask_id if has_mask(proc) else jnp.ones_like(prompt, bool)
  frozen = jnp.asarray(frozen, bool)
  if frozen.shape != prompt.shape or prompt.shape[:-1] not in ((), (batch,)):
    raise InputError(
      f"prompt {prompt.shape} and frozen {frozen.shape} must both be [P] or [batch={batch}, P]."
    )
  prompt_BP = jnp.broadcast_to(prompt, (batch, given))
  frozen_BP = jnp.broadcast_to(frozen, (batch, given))
  x_BP = jnp.where(frozen_BP, prompt_BP, x_BL[:, :given])
  rest = ((0, 0), (0, length - given))
  x_BL = jnp.concatenate([x_BP, x_BL[:, given:]], axis=1)
  return x_BL, jnp.pad(frozen_BP, rest)


def evaluations(
  sampler: str | Callable = "ancestral",
  *,
  steps: int,
  proc: Absorbing | Uniform | None = None,
  length: int | None = None,
  **sampler_options,
) -> dict[str, int]:
  """Return network evaluations per sample, by kind of network: those made, not the nominal K.

  A step is one evaluation of the denoiser. Removing noise is one more where it is always made:
  under a uniform process, by "analytic" and by precision="legacy". Other samplers of masks make it
  for the expected 1e-5 of them that outlive the grid only, which is not counted.

  Args:
    sampler: name, as in `generate`; one of your own is taken to evaluate once a step.
    steps: grid steps.
    proc: the forward process; None: absorbing.
    length: tokens to draw per sample. A sample is revealed in at most so many steps of "ancestral",
      and in exactly so many of "first_hitting"; in other steps a batch runs for its other samples.
    **sampler_options: as in `generate`.

  Raises:
    InputError: "first_hitting" without a length, or a name that the process does not have.

  Example:
    >>> evaluations("rgas", steps=8, candidates=4)
    {'student': 8, 'discriminator_forward': 16, 'discriminator_backward': 4}
    >>> evaluations(steps=8, proc=Uniform(vocab_size=9))["student"]
    9
  """
  steps = Whole(1).check("steps", steps)
  alone = {"student": steps, "discriminator_forward": 0, "discriminator_backward": 0}
  if callable(sampler):
    return alone
  made = _sampler(sampler, proc, sampler_options.get("precision", "exact"))
  if made is _rgas.Rgas:
    known = ("h", "candidates", "ratio", "reward")
    given = {key: sampler_options[key] for key in known if key in sampler_options}
    return _rgas.cost(steps, **given)
  if made is FirstHitting and length is None:
    raise InputError("sampler='first_hitting' evaluates once per token drawn; give length.")
  if made is FirstHitting or (made is Ancestral and length is not None):
    steps = length if made is FirstHitting else min(steps, length)
  removes = made.removes_always and sampler_options.get("noise_removal", "ancestral") != "none"
  return {**alone, "student": steps + removes}
