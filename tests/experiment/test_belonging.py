# SPDX-License-Identifier: Apache-2.0
"""A field that would do nothing is refused, with the fields that belong."""

import pytest

from dlm_jax.convert import families
from dlm_jax.errors import InputError
from dlm_jax.experiment import build, plan
from dlm_jax.experiment.config import load_config


def _build(name, **overrides):
  config = load_config(name, {key.replace("__", "."): text for key, text in overrides.items()})
  read = plan.read(config)
  model = build.make_model(read, 4095 if name.startswith("sdar") else 2048)
  return model, build.make_process(read, model)


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    (
      "quickstart_idlm",
      {"model__experts": "8"},
      "model.experts=8 does nothing with model.name='dit'",
    ),
    (
      "quickstart_idlm",
      {"model__tied": "true"},
      "leave it at False; fields that belong to it: name",
    ),
    (
      "novels_ar_draft",
      {"model__dropout": "0.5"},
      "model.dropout=0.5 does nothing with model.name",
    ),
    ("novels_ar_draft", {"model__attention": "splash"}, "model.name='decoder'; leave it at 'auto'"),
    ("quickstart_judge", {"model__cond_dim": "4"}, "does nothing with model.name='causal'"),
    ("quickstart_judge", {"process__name": "uniform"}, "does nothing with model.name='causal'"),
    ("quickstart_judge", {"process__power": "3.0"}, "does nothing with model.name='causal'"),
    (
      "quickstart_idlm",
      {"process__power": "3.0"},
      "='log_linear'; leave it at 2.0; ",
    ),
    (
      "novels_idlm_duo",
      {"process__mask_id": "7"},
      "mask_id=7 does nothing with process.name=",
    ),
  ],
)
def test_what_does_nothing_is_refused(name, changes, message):
  with pytest.raises(InputError) as error:
    _build(name, **changes)
  assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("quickstart_idlm", {"model__experts": "0", "process__power": "2.0"}),  # what the base has
    ("quickstart_idlm", {"process__schedule": "polynomial", "process__power": "3.0"}),
    ("quickstart_judge", {"process__name": "none", "model__dropout": "0.2"}),
    ("novels_ar_draft", {"process__mask_id": "7", "model__mlp_dim": "0", "model__mlp_ratio": "2"}),
    ("novels_sdar_draft", {"process__name": "none"}),
  ],
)
def test_what_does_something_is_taken(name, changes):
  _build(name, **changes)


def test_the_width_of_a_decoder_follows_its_ratio():
  model, _ = _build("novels_ar_draft", model__mlp_dim="0", model__mlp_ratio="2")
  assert model.config.mlp_dim == 512


def test_fields_of_the_networks():
  dit = plan.network_fields(families.named("dit"))
  assert {"cond_dim", "dropout", "attention"} < set(dit) and "experts" not in dit
  assert "cond_dim" not in plan.network_fields(families.named("causal"))
  assert {"mlp_ratio", "experts"} < set(plan.network_fields(families.named("decoder")))
