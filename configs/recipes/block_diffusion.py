# SPDX-License-Identifier: Apache-2.0
"""Diffusion within blocks, of a decoder: BD3-LM and SDAR."""

from dlm_jax.configs.base import optional


def bd3_lm(c):
  """Train as BD3-LM does, blocks with a noise level each.

  Reference: BD3-LM, arXiv 2503.09573, section 5.
  """
  _method(c, levels="block", at_least_one=False, subs=True, first_given=True)


def sdar(c, start, first_given=True):
  """Train as SDAR does, continued from the next-token network `start`.

  Reference: SDAR, arXiv 2510.06303; released code.
  """
  _method(c, levels="document", at_least_one=True, subs=False, first_given=first_given)
  c.start.path = start


def _method(c, *, levels, at_least_one, subs, first_given):
  c.process.name = "absorbing"
  c.process.eps = 0.0  # the mask probability is the time itself
  c.objective.name = "block_diffusion"
  c.objective.block_length = 4  # tokens
  c.objective.earlier_lengths = ()  # a curriculum: block lengths before that one
  c.objective.earlier_steps = ()  # the step at which each of them ends
  c.objective.levels = levels  # what shares a noise level: block or document
  c.objective.interval = (1e-3, 1.0)  # smallest and largest time
  c.objective.weight = "nelbo"  # of a masked token: nelbo (1 over its mask probability) or one
  c.objective.at_least_one = at_least_one  # a sequence without a mask is drawn again
  c.objective.subs = subs  # the mask is no possible token; False: one like the others
  c.objective.first_given = first_given  # the first token of a document is not scored
  c.objective.separator = -1  # the id that documents start with; -1: a sequence is one document
  c.objective.search_every = 0  # steps between searches for the quietest interval; 0: never
  c.objective.search_widths = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the intervals that are tried
  c.objective.chunk = optional(int, 0)  # positions per chunk of logits; 0: chosen by size
