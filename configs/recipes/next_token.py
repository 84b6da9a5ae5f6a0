# SPDX-License-Identifier: Apache-2.0
"""Next-token networks: a judge of samples, or what block diffusion starts from."""


def judge(c):
  """Train an autoregressive network of the kind of GPT-2."""
  c.model.name = "causal"
  c.objective.name = "ar"


def decoder(c, dim, layers, heads, kv_heads):
  """Take a decoder of the Qwen3 family with heads of 64 channels."""
  c.model.name = "decoder"
  c.model.dim = dim
  c.model.layers = layers
  c.model.unroll = layers
  c.model.heads = heads
  c.model.kv_heads = kv_heads
  c.model.head_dim = 64
  c.model.mlp_dim = 3 * dim


def training(c):
  """Train that decoder on next tokens."""
  c.objective.name = "ar"
  c.process.name = "none"
