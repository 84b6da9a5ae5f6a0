# SPDX-License-Identifier: Apache-2.0
"""Discriminators in the public layout: recorded scores, round trip, Lightning trees, refusals."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlm_jax import convert
from dlm_jax.convert.families import discriminator as public
from dlm_jax.errors import InputError
from dlm_jax.models import Discriminator

PUBLIC = pathlib.Path(__file__).parents[1] / "golden/checkpoints/didi_instruct"
FILE = "discriminator.safetensors"


@pytest.fixture
def directory(tmp_path):
  """Return a copy of the public directory to damage."""
  target = tmp_path / "copy"
  target.mkdir()
  for file in PUBLIC.iterdir():
    shutil.copyfile(file, target / file.name)  # not the mode: the original may be read-only
  return target


def test_public_directory_gives_the_recorded_scores():
  critic = convert.load_beside(PUBLIC, "discriminator", dtype="float32")
  example = load_file(PUBLIC / "example_io.safetensors")
  tokens = jnp.asarray(example["input_ids"], jnp.int32)
  ours = jax.jit(lambda c, *args: c(*args))(critic, tokens, jnp.asarray(example["sigma"]))
  wanted = example["discriminator_scores"][..., 0]
  np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_round_trip(directory):
  critic = convert.load_beside(directory, "discriminator")
  (directory / FILE).unlink()
  convert.save_beside(directory, "discriminator", critic)
  again, public = load_file(directory / FILE), load_file(PUBLIC / FILE)
  assert set(again) == set(public) - {"rotary_emb.inv_freq"}
  for name, value in again.items():
    np.testing.assert_array_equal(value, public[name])
  back = convert.load_beside(directory, "discriminator")
  assert back.model == critic.model
  jax.tree.map(np.testing.assert_array_equal, back, critic)


def test_another_number_of_trained_layers_is_the_same_function(directory):
  critic = convert.load_beside(directory, "discriminator", dtype="float32")
  tokens, sigma = jnp.arange(48).reshape(2, 24) % 48, jnp.array([0.1, 2.0])
  config = convert.read_config(directory) | {"dlm_jax": {"discriminator": {"trained_layers": 1}}}
  other = public.load(directory, config, {"dtype": "float32"})
  assert isinstance(other.model, Discriminator) and other.model.trained_layers == 1
  np.testing.assert_allclose(other(tokens, sigma), critic(tokens, sigma), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("output_layer.main.2.weight_u"), "output_layer.main.2.weight_u is missing"),
    (lambda t: t.update(extra=np.zeros(3, np.float32)), "unknown tensor extra"),
    (
      lambda t: t.update({"output_layer.main.2.weight_orig": np.zeros((32, 1), np.float32)}),
      "is it transposed",
    ),
    (lambda t: t.update({"blocks.1.norm1.weight": np.zeros(31, np.float32)}), "expected"),
  ],
)
def test_refusals_name_the_tensor(directory, change, message):
  tensors = load_file(directory / FILE)
  change(tensors)
  save_file(tensors, directory / FILE)
  with pytest.raises(InputError, match=message):
    convert.load_beside(directory, "discriminator")


def test_none_beside_another_student(directory):
  (directory / FILE).unlink()
  assert convert.load_beside(directory, "discriminator") is None


def _lightning(directory):
  """Rewrite a directory's weights as one file with the trees of a Lightning checkpoint."""
  student, critic = load_file(directory / "model.safetensors"), load_file(directory / FILE)
  trees = {f"backbone.{name}": value for name, value in student.items()}
  trees |= {f"student_ema.{name}": value for name, value in student.items()}
  trees |= {f"discriminator.{name}": value for name, value in critic.items()}
  trees["reward_baseline"] = np.zeros((), np.float32)
  return trees


def test_a_student_with_its_discriminator_in_one_file(directory):
  """The student loads, and the discriminator is checked, not skipped."""
  trees = _lightning(directory)
  save_file(trees, directory / "model.safetensors")
  want = convert.load(PUBLIC)[1]
  jax.tree.map(np.testing.assert_array_equal, convert.load(directory)[1], want)
  (directory / FILE).unlink()
  jax.tree.map(
    np.testing.assert_array_equal,
    convert.load_beside(directory, "discriminator"),
    convert.load_beside(PUBLIC, "discriminator"),
  )
  trees.pop("discriminator.output_layer.main.0.weight_v")
  save_file(trees, directory / "model.safetensors")
  with pytest.raises(InputError, match=r"discriminator\.output_layer\.main\.0\.weight_v is miss"):
    convert.load(directory)


def test_the_fingerprint_counts_the_discriminator(directory):
  before = convert.fingerprint(directory)
  tensors = load_file(directory / FILE)
  tensors["output_layer.main.2.bias"] += 1
  save_file(tensors, directory / FILE)
  assert convert.fingerprint(directory) != before
  (directory / FILE).unlink()
  assert convert.fingerprint(directory) != before


@pytest.mark.parametrize(
  "layers, message",
  [(0, "must be at least 1"), (3, "must be at most 2"), ("x", "='x' is not a whole number")],
)
def test_a_stored_number_of_layers_is_checked(directory, layers, message):
  config = convert.read_config(directory) | {
    "dlm_jax": {"discriminator": {"trained_layers": layers}}
  }
  with pytest.raises(InputError, match="trained_layers.*" + message):
    public.load(directory, config, {})
