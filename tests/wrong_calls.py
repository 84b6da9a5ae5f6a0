# SPDX-License-Identifier: Apache-2.0
"""Calls from Python that no one should make, and what their line says; run in a process of its own.

There the annotations are not checked, as in a user's process: in the tests' they are.
"""

import functools
import json
import types

NAN = float("nan")


@functools.cache
def made():
  """Return a tiny denoiser and what it is called with."""
  import jax
  import jax.numpy as jnp

  from dlm_jax import models, process
  from dlm_jax.data import tokenizers
  from dlm_jax.text.denoiser import Pipeline

  config = models.DiTConfig(
    vocab_size=258, dim=8, heads=2, layers=1, cond_dim=4, length=16, dtype="float32"
  )
  model = models.DiT(config)
  params = model.init(jax.random.key(0), jnp.zeros((1, 4), int), jnp.zeros(1))["params"]
  denoiser = models.Denoiser(model, params)
  absorbing = process.Absorbing(vocab_size=258, mask_id=257)
  pipe = Pipeline(denoiser=denoiser, process=absorbing, tokenizer=tokenizers.Bytes(), length=16)
  broken = models.Denoiser(model, jax.tree.map(lambda x: x * NAN, params))
  return types.SimpleNamespace(**locals())


def _generate(denoiser="denoiser", proc="absorbing", rng="key", **options):
  """Call `sample.generate`; names stand for what is made."""
  import jax

  from dlm_jax import sample

  known = {**vars(made()), "key": jax.random.key(0), "keys": jax.random.split(jax.random.key(0))}
  known["pair"] = (made().model, made().params)
  given = [known.get(x, x) if isinstance(x, str) else x for x in (denoiser, proc, rng)]
  return sample.generate(*given, **{"batch": 1, "length": 4, "steps": 2, **options})


def _array(*shape):
  import numpy as np

  return np.ones(shape)


def _pipe(*arguments, **options):
  return made().pipe(*arguments, **options)


def _load(*arguments, **options):
  import dlm_jax

  return dlm_jax.load(*arguments, **options)


def _convert(*arguments, **options):
  from dlm_jax import convert

  return convert.load(*arguments, **options)


def _make(room, name, **options):
  import importlib

  return getattr(importlib.import_module(f"dlm_jax.{room}"), name)(**options)


def _after_a_wrong_one(call, wrong, right):
  """Make a right call behind a wrong one that is equal to it, and tell that it works."""
  from dlm_jax.errors import InputError

  try:
    call(**wrong)
  except InputError:
    call(**right)
    raise InputError("the right call works") from None


CALLS = {
  # sample.generate
  "an id above V": (
    lambda: _generate(prompt=[10**6]),
    "has the id 1000000; ids are 0 … 257",
  ),
  "an id below 0": (lambda: _generate(prompt=[-1]), "prompt has the id -1; ids are 0 … 257"),
  "floats as ids": (lambda: _generate(prompt=[1.5]), "must be an array of ids, got float64"),
  "ragged ids": (lambda: _generate(prompt=[[1], [1, 2]]), "must be an array of ids"),
  "a text as ids": (lambda: _generate(prompt="ab"), "must be an array of ids"),
  "three axes": (lambda: _generate(prompt=[[[1]]]), "must both be [P] or [batch=1, P]"),
  "frozen of numbers": (lambda: _generate(prompt=[1], frozen=[2]), "an array of true or false"),
  "frozen alone": (lambda: _generate(frozen=[True]), "frozen is given without a prompt"),
  "parameters of nan": (lambda: _generate("broken"), "parameters that are not finite"),
  "no denoiser": (lambda: _generate(None), "denoiser is a NoneType; give models.Denoiser"),
  "a pair": (lambda: _generate("pair"), "denoiser is a tuple; give models.Denoiser"),
  "a bare model": (lambda: _generate("model"), "denoiser is a DiT; give models.Denoiser"),
  "no process": (lambda: _generate(proc=None), "proc is a NoneType; give the process"),
  "a name as process": (lambda: _generate(proc="uniform"), "proc is a str; give the process"),
  "a seed as key": (lambda: _generate(rng=0), "rng=0 is not one key; give jax.random.key(seed)"),
  "several keys": (lambda: _generate(rng="keys"), "is not one key"),
  "half a batch": (lambda: _generate(batch=1.5), "batch=1.5 is not a whole number"),
  "true as batch": (lambda: _generate(batch=True), "batch=True is not a whole number"),
  "length 2.0": (lambda: _generate(length=2.0), "length=2.0 is not a whole number"),
  "steps as text": (lambda: _generate(steps="2"), "steps='2' is not a whole number"),
  "endless steps": (lambda: _generate(steps=10**30), "must be at most 2147483647"),
  "too many tokens": (lambda: _generate(batch=10**6, length=10**6), "the most that one call keeps"),
  "a trace of words": (lambda: _generate(return_trace="yes"), "neither true nor false"),
  "a number as sampler": (lambda: _generate(sampler=5), "sampler=5 is unknown; use one of"),
  "a list as sampler": (lambda: _generate(sampler=["psi"]), "is unknown; use one of"),
  "an array as grid": (lambda: _generate(grid=_array(3)), "is not a text"),
  "temperature nan": (lambda: _generate(temperature=NAN), "temperature=nan is not a finite number"),
  "temperature as text": (lambda: _generate(temperature="1"), "is not a finite number"),
  "an array of temperatures": (lambda: _generate(temperature=_array(2)), "is not a finite number"),
  "a list as nucleus": (lambda: _generate(nucleus=[0.9]), "nucleus=[0.9] is not a finite number"),
  "half a top_k": (lambda: _generate(top_k=2.5), "top_k=2.5 is not a whole number"),
  "two kappas": (
    lambda: _generate(sampler="psi", kappa=(1, 2)),
    "is not a finite number or a text",
  ),
  "eta nan": (lambda: _generate(sampler="psi", eta=NAN), "eta=nan is not a finite number"),
  "three times": (lambda: _generate(sampler="psi", window=(0.5, 0.4, 0.3)), "is not a list of 2"),
  "a number as critic": (lambda: _generate(sampler="rgas", critic=5), "critic is a int"),
  "evaluations of half steps": (
    lambda: _make("sample", "evaluations", steps=2.5),
    "steps=2.5 is not a whole number",
  ),
  # pipelines
  "2.0 steps": (lambda: _pipe(steps=2.0), "steps=2.0 is not a whole number"),
  "2 steps behind 2.0": (
    lambda: _after_a_wrong_one(_pipe, {"steps": 2.0}, {"steps": 2}),
    "the right call works",
  ),
  "1.5 texts": (lambda: _pipe(num=1.5), "num=1.5 is not a whole number"),
  "too many texts": (lambda: _pipe(num=10**9), "GiB at least, and there are"),
  "too long a text": (lambda: _pipe(length=10**9), "GiB at least, and there are"),
  "an endless text": (lambda: _pipe(length=10**30), "must be at most 2147483647"),
  "half a token": (lambda: _pipe(length=2.5), "length=2.5 is not a whole number"),
  "a seed of 70 bits": (lambda: _pipe(seed=2**70), "must be at most 9223372036854775807"),
  "a seed of 65 bits": (lambda: _pipe(seed=-(2**63) - 1), "must be at least -9223372036854775808"),
  "a text as seed": (lambda: _pipe(seed="a"), "seed='a' is not a whole number"),
  "half a seed": (lambda: _pipe(seed=1.5), "seed=1.5 is not a whole number"),
  "no seed": (lambda: _pipe(seed=None), "seed=None is not a whole number"),
  "two prompts": (lambda: _pipe(prompt=["a", "b"]), "prompt=['a', 'b'] is not a text"),
  "bytes as prompt": (lambda: _pipe(prompt=b"abc"), "prompt=b'abc' is not a text"),
  "no prompt": (lambda: _pipe(prompt=None), "prompt=None is not a text"),
  "half a surrogate": (
    lambda: _pipe(prompt="a\ud800"),
    "holds \\ud800 at character 2, half a surrogate pair",
  ),
  "a trace as texts": (lambda: _pipe(return_trace=True), "ask `tokens` for them"),
  "an array as option": (lambda: _pipe(grid=_array(3)), "is not a text"),
  "frozen of a pipeline": (lambda: _pipe(frozen=_array(3)), "frozen is no option"),
  "batch of a pipeline": (lambda: _pipe(batch=3), "ask for num texts"),
  "nan in a pipeline": (lambda: _pipe(temperature=NAN), "temperature=nan is not a finite number"),
  "a misspelt option": (lambda: _pipe(tempreture=1.0), "did you mean 'temperature'"),
  "an unhashable function": (
    lambda: _pipe(sampler=_make("text.denoiser", "Pipeline", **_parts())),
    "is unknown; use one of|must be hashable",
  ),
  # loading, and what networks are made of
  "no path": (lambda: _load(None), "path=None is not a path"),
  "a number as path": (lambda: _convert(5), "path=5 is not a path"),
  "dtype int8": (lambda: _load("shipped:teacher", dtype="int8"), "model.dtype='int8' is unknown"),
  "a class as dtype": (lambda: _load("shipped:teacher", dtype=float), "is not a text"),
  "weights 5": (lambda: _load("shipped:teacher", weights=5), "weights=5 is unknown"),
  "a draft of none": (lambda: _load("shipped:teacher", draft=5), "so it takes no draft"),
  "10.0 tokens": (
    lambda: _make("models", "DiTConfig", vocab_size=10.0),
    "model.vocab_size=10.0 is not a whole number",
  ),
  "a mask of 1.5": (
    lambda: _make("process", "Absorbing", vocab_size=9, mask_id=1.5),
    "mask_id=1.5 is not a whole number",
  ),
  "eps 2": (lambda: _make("schedules", "LogLinear", eps=2), "eps=2.0 must be in [0, 1)"),
  "power nan": (lambda: _make("schedules", "Polynomial", power=NAN), "power=nan is not a finite"),
}


def _parts():
  names = ("denoiser", "tokenizer", "length")
  return {name: getattr(made().pipe, name) for name in names} | {"process": made().absorbing}


def main() -> None:
  """Print what each call raises: the type and the text."""
  told = {}
  for name, (call, _) in CALLS.items():
    try:
      told[name] = ["nothing", repr(call())[:80]]
    except Exception as error:
      told[name] = [type(error).__name__, str(error)]
  print(json.dumps(told))


if __name__ == "__main__":
  main()
