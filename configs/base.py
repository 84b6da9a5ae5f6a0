# SPDX-License-Identifier: Apache-2.0
"""Every field of an experiment, with its default, and what a recipe or an experiment may add.

A corpus among the recipes starts from `base`; other recipes, then the experiment, set more of it.
Fields of one method only, such as `objective.time_coupling`, stand in that method's recipe.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference


def base() -> ConfigDict:
  """Return all fields. Override any from the command line: --config.optim.lr=3e-5.

  Their groups take no others, but for `objective`, `data.options` and groups of `optim` by tree.
  """
  c = ConfigDict()
  c.seed = 0  # of parameters, data order, noise and times; 64 bits, negative or not
  _data(c)
  _network(c)
  _training(c)
  return c


def optional(kind: type, value: Any = None) -> FieldReference:
  """Return the value of a field that --config.GROUP.FIELD=none unsets.

  Args:
    kind: what the field holds if it is set, e.g. int.
    value: of that kind; by default the field is unset.
  """
  return FieldReference(value, field_type=kind)


def _data(c: ConfigDict) -> None:
  c.data = ConfigDict()
  c.data.directory = ""  # packed dataset: written by `dlm-jax prepare`, read by `dlm-jax train`
  c.data.source = "stdlib"  # stdlib, files:, fasta:, chat:GLOB or tfds:NAME/SPLIT:FEATURE
  c.data.options = ConfigDict()  # of the source: field, document_separator, validation, …
  c.data.tokenizer = "bpe:2048"  # bpe:SIZE (trained on the corpus), bytes, esm, or a path
  c.data.length = 128  # tokens per sequence, or of the longest one
  c.data.packing = "concatenate"  # concatenate; documents: a padded row each; conversations
  c.data.buckets = ()  # of documents: lengths to pad to, rising to data.length; (): that one
  c.data.block_length = 0  # of conversations: rows shared in blocks of so many tokens; 0: not

  c.loader = ConfigDict()
  c.loader.batch_size = 64  # sequences per update, over all devices and micro-batches


def _network(c: ConfigDict) -> None:
  c.model = ConfigDict()
  c.model.name = "dit"  # dit (denoiser), causal (autoregressive) or decoder (either, by its mask)
  c.model.vocab_size = 0  # 0: what the data needs; a denoiser's and a decoder's includes the mask
  c.model.dim = 768
  c.model.cond_dim = 128  # dit only
  c.model.layers = 12
  c.model.heads = 12
  c.model.mlp_ratio = 4
  c.model.kv_heads = 0  # decoder only, as all below to expert_dim; 0: as many as heads
  c.model.head_dim = 0  # channels of a head; 0: dim / heads
  c.model.mlp_dim = 0  # width of the gated feed-forward layer; 0: mlp_ratio x dim
  c.model.rope_theta = 1e4  # rotary base
  c.model.tied = False  # the head is the embedding
  c.model.experts = 0  # per layer; 0: one feed-forward layer
  c.model.experts_per_token = 0
  c.model.expert_dim = 0  # width of one expert
  c.model.dropout = 0.1
  c.model.time_conditioning = False  # dit only; False: one constant modulation
  c.model.dtype = "bfloat16"  # of matrix products
  c.model.attention = "auto"  # auto, xla, cudnn or splash
  c.model.embedding_gradient = "auto"  # dit only: auto, scatter, matmul or segment
  c.model.mask_noise = 0  # dit only: width of the Gaussian noise of an idlm student's masks
  c.model.remat = "none"  # none, dots or full
  c.model.unroll = 1  # layers per turn of the layer loop; all of them train a quarter faster

  c.process = ConfigDict()
  c.process.name = "absorbing"  # absorbing, absorbing_score (SEDD), uniform; none: next tokens
  c.process.mask_id = -1  # decoder only: the row of the mask; -1: the last
  c.process.schedule = "log_linear"  # log_linear, cosine or polynomial
  c.process.power = 2.0  # of the polynomial schedule
  c.process.eps = 1e-3  # share of tokens that survive to t = 1


def _training(c: ConfigDict) -> None:
  c.objective = ConfigDict()
  c.objective.name = "mdlm"  # a file of dlm_jax/objectives, or my_package.my_file
  c.objective.accumulate = 1  # micro-batches per update
  c.objective.ema_decay = 0.9999  # of the parameters that are sampled from

  c.teacher = ConfigDict()
  c.teacher.path = ""  # workdir or model directory that a distillation starts from

  c.start = ConfigDict()
  c.start.path = ""  # workdir or model directory whose parameters a training continues from

  c.optim = ConfigDict()
  c.optim.lr = 3e-4  # peak
  c.optim.warmup = 2500  # updates
  c.optim.schedule = "constant"  # constant, cosine or linear
  c.optim.final = 0.1  # last learning rate over the peak
  c.optim.b1 = 0.9
  c.optim.b2 = 0.999
  c.optim.eps = 1e-8
  c.optim.weight_decay = 0.0  # matrices only
  c.optim.clip = 1.0  # largest gradient norm; 0: none

  c.train = ConfigDict()
  c.train.steps = 100_000
  c.train.log_every = 50  # steps
  c.train.checkpoint_every = 1000  # steps
  c.train.keep = 2  # checkpoints
  c.train.max_seconds = 0.0  # stop early after this wall-clock time; 0: never

  c.evaluate = ConfigDict()
  c.evaluate.every = 0  # steps between evaluations during training; 0: none
  c.evaluate.measure = ()  # samples, likelihood or both, the first decides what is the best
  # network; (): samples where a teacher is distilled, else likelihood
  c.evaluate.judge = ""  # workdir or model directory of an autoregressive judge
  c.evaluate.nfes = (8,)  # network evaluations per sample
  c.evaluate.noise_removal = "ancestral"  # last evaluation: ancestral, greedy or none
  c.evaluate.order = ""  # reveal order of samples; "": the sampler's own, under masks spaced
  c.evaluate.samples = 64
  c.evaluate.batch_size = 64
  c.evaluate.select = "matched"  # the best has the lowest GenPPL relative to the teacher's at equal
  # entropy, by temperature (matched), or the lowest GenPPL (genppl)
  c.evaluate.temperatures = (0.7, 0.8, 0.9, 1.0, 1.1)  # of the teacher, measured once, for matched
  c.evaluate.max_entropy_drop = 0.25  # nats below the teacher that the best student may be
  c.evaluate.patience = 3  # evaluations beyond that before training stops

  c.mesh = ConfigDict()  # sizes; one may be -1: what is left
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
