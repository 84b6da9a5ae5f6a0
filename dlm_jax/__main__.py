# SPDX-License-Identifier: Apache-2.0
"""`python -m dlm_jax` is `dlm-jax`."""

from dlm_jax.cli.main import run

if __name__ == "__main__":
  run()
