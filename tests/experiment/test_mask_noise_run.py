# SPDX-License-Identifier: Apache-2.0
"""A run whose student's masks carry noise: from a teacher without, to samples of what it wrote."""

import numpy as np
import pytest
import tiny_runs

import dlm_jax
from dlm_jax.errors import InputError
from dlm_jax.experiment.run import train

RUN = {"model__mask_noise": "4", "train__steps": "2"}


@pytest.mark.slow
def test_run(tmp_path):
  tiny = tiny_runs.make()
  train(tiny.config("idlm", **RUN), tmp_path / "student")
  logged = tiny_runs.metrics(tmp_path / "student")
  assert np.isfinite([row["student/anchor"] for row in logged if "student/anchor" in row]).all()
  pipe = dlm_jax.load(tmp_path / "student")
  assert pipe.denoiser.mask_noise == 4
  assert np.asarray(pipe.denoiser.params["mask_noise"]).any()
  texts = pipe(steps=2, num=2, seed=0)
  assert len(texts) == 2 and pipe(steps=2, num=1, seed=0)[0] == texts[0]
  again = tiny.config("idlm", **RUN, teacher__path=str(tmp_path / "student"))
  with pytest.raises(InputError, match="masks carry noise"):
    train(again, tmp_path / "again")
