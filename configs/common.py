# SPDX-License-Identifier: Apache-2.0
"""Every field of an experiment, with its default; the other files change a few of them."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
  """Return all fields. Override any from the command line: --config.optim.lr=3e-5."""
  c = ConfigDict()
  c.seed = 0  # of parameters, data order, noise and times
  _data(c)
  _network(c)
  _training(c)
  return c


def _data(c: ConfigDict) -> None:
  c.data = ConfigDict()
  c.data.directory = ""  # packed dataset: written by `dlm-jax prepare`, read by `dlm-jax train`
  c.data.source = "stdlib"  # stdlib, files:GLOB or tfds:NAME/SPLIT:FEATURE
  c.data.options = ConfigDict()  # of the source: field, document_separator, validation, …
  c.data.tokenizer = "bpe:2048"  # bpe:SIZE (trained on the corpus), bytes, or a path
  c.data.length = 128  # tokens per sequence

  c.loader = ConfigDict()
  c.loader.batch_size = 64  # sequences per update, over all devices and micro-batches


def _network(c: ConfigDict) -> None:
  c.model = ConfigDict()
  c.model.name = "dit"  # dit (denoiser) or causal (autoregressive)
  c.model.vocab_size = 0  # 0: what the data needs; a denoiser's includes the mask
  c.model.dim = 768
  c.model.cond_dim = 128  # dit only
  c.model.layers = 12
  c.model.heads = 12
  c.model.mlp_ratio = 4
  c.model.dropout = 0.1
  c.model.time_conditioning = False  # dit only; False: one constant modulation
  c.model.dtype = "bfloat16"  # of matrix products
  c.model.attention = "auto"  # auto, xla, cudnn or splash
  c.model.embedding_gradient = "auto"  # dit only: auto, scatter, matmul or segment
  c.model.remat = "none"  # none, dots or full
  c.model.unroll = 1  # layers per turn of the layer loop

  c.process = ConfigDict()
  c.process.name = "absorbing"
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
  c.evaluate.judge = ""  # workdir or model directory of an autoregressive judge
  c.evaluate.nfes = (8,)  # network evaluations per sample
  c.evaluate.samples = 64
  c.evaluate.batch_size = 64
  c.evaluate.max_entropy_drop = 0.25  # nats below the teacher that the best student may be
  c.evaluate.patience = 3  # evaluations beyond that before training stops

  c.mesh = ConfigDict()  # sizes; one may be -1: what is left
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1


def distill(c: ConfigDict, teacher: str, judge: str = "") -> ConfigDict:
  """Turn a config into IDLM distillation with the paper's optimiser.

  AdamW without decay, clipping or learning-rate decay.

  Reference: IDLM, arXiv 2602.19066, appendix; released scripts.
  """
  c.objective.name = "idlm"
  c.objective.time_coupling = "same_order"  # same_order or permuted
  c.objective.chunk = 0  # positions per chunk of logits; 0: all
  c.teacher.path = teacher
  c.evaluate.judge = judge
  c.optim.lr = 1e-6
  c.optim.warmup = 2500
  c.optim.clip = 0.0
  return c
