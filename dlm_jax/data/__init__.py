# SPDX-License-Identifier: Apache-2.0
"""From text to batches: tokenizers → sources → builder (packed TFDS records) → loader (grain).

Import the modules one by one: `dlm_jax.data.tokenizers` needs neither TFDS nor grain.
"""
