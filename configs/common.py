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
  c.evaluate.judge = ""  # workdir or model directory of an autoregressive judge
  c.evaluate.nfes = (8,)  # network evaluations per sample
  c.evaluate.noise_removal = "ancestral"  # last evaluation: ancestral, greedy or none
  c.evaluate.samples = 64
  c.evaluate.batch_size = 64
  c.evaluate.max_entropy_drop = 0.25  # nats below the teacher that the best student may be
  c.evaluate.patience = 3  # evaluations beyond that before training stops

  c.mesh = ConfigDict()  # sizes; one may be -1: what is left
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1


def uniform(c: ConfigDict) -> ConfigDict:
  """Turn a config to the uniform process: no mask, a network that is told the time."""
  c.process.name = "uniform"
  c.model.time_conditioning = True
  return c


def decoder(c: ConfigDict, dim: int, layers: int, heads: int, kv_heads: int) -> ConfigDict:
  """Turn a config to a decoder of the Qwen3 family with heads of 64 channels."""
  c.model = base().model
  c.model.name = "decoder"
  c.model.dim = dim
  c.model.layers = layers
  c.model.unroll = layers
  c.model.heads = heads
  c.model.kv_heads = kv_heads
  c.model.head_dim = 64
  c.model.mlp_dim = 3 * dim
  return c


def next_token(c: ConfigDict) -> ConfigDict:
  """Turn a config into next-token training."""
  c.objective.name = "ar"
  c.process.name = "none"
  return c


def block_diffusion(c: ConfigDict) -> ConfigDict:
  """Turn a config into BD3-LM's training; the switches of `sdar` are SDAR's.

  Reference: BD3-LM, arXiv 2503.09573, section 5.
  """
  c.process.name = "absorbing"
  c.process.eps = 0.0  # the mask probability is the time itself
  c.objective.name = "block_diffusion"
  c.objective.block_length = 4  # tokens
  c.objective.earlier_lengths = ()  # a curriculum: block lengths before that one
  c.objective.earlier_steps = ()  # the step at which each of them ends
  c.objective.levels = "block"  # what shares a noise level: block or document
  c.objective.interval = (1e-3, 1.0)  # smallest and largest time
  c.objective.weight = "nelbo"  # of a masked token: nelbo (1 over its mask probability) or one
  c.objective.at_least_one = False  # a sequence without a mask is drawn again
  c.objective.subs = True  # the mask is no possible token; False: one like the others
  c.objective.first_given = True  # the first token of a document is not scored
  c.objective.separator = -1  # the id that documents start with; -1: a sequence is one document
  c.objective.search_every = 0  # steps between searches for the quietest interval; 0: never
  c.objective.search_widths = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the intervals that are tried
  c.objective.chunk = 0  # positions per chunk of logits; 0: chosen by size
  return c


def sdar(c: ConfigDict, start: str) -> ConfigDict:
  """Turn a config into SDAR's training, continued from a next-token network.

  Reference: SDAR, arXiv 2510.06303; released code.
  """
  c = block_diffusion(c)
  c.objective.levels = "document"
  c.objective.at_least_one = True
  c.objective.subs = False
  c.start.path = start
  return c


def sdar_shape(dim: int, layers: int, heads: int, kv_heads: int, mlp_dim: int) -> ConfigDict:
  """Return continued training of a public SDAR network on your own text, as its authors tune it.

  Reference: SDAR, arXiv 2510.06303; released code.
  """
  c = sdar(base(), start="")
  c.model.name = "decoder"
  c.model.vocab_size = 151_936
  c.model.dim = dim
  c.model.layers = layers
  c.model.heads = heads
  c.model.kv_heads = kv_heads
  c.model.head_dim = 128
  c.model.mlp_dim = mlp_dim
  c.model.rope_theta = 1e6
  c.model.remat = "full"
  c.process.mask_id = 151_669  # <|MASK|>
  c.objective.first_given = False
  c.data.directory = "data/sdar_packed"
  c.data.source = "files:data/text/*.txt*"
  c.data.length = 2048
  c.loader.batch_size = 64
  c.objective.accumulate = 8
  c.objective.ema_decay = 0.0
  c.optim.lr = 1e-5
  c.optim.warmup = 300
  c.optim.weight_decay = 0.0
  c.train.steps = 10_000
  c.mesh.data = 1
  c.mesh.fsdp = -1
  return c


def duo(c: ConfigDict) -> ConfigDict:
  """Turn a config into training of a uniform-state teacher as the released scripts do.

  Reference: Duo, arXiv 2506.10892, section 4.
  """
  c = uniform(c)
  c.objective.name = "duo"
  c.objective.curriculum_start = 0  # step from which the temperature falls
  c.objective.curriculum_end = 500_000  # first step on hard tokens; 0: UDLM from the start
  c.objective.gamma_min = -3.55  # window of the soft inputs
  c.objective.gamma_max = -1.85
  c.objective.tau_log10_start = -3.0  # log10 of the softmax temperature
  c.objective.tau_log10_end = -3.0
  c.objective.chunk = 0  # positions per chunk of dense arrays; 0: chosen by size
  return c


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


def distill_uniform(c: ConfigDict, teacher: str, judge: str = "") -> ConfigDict:
  """Turn a config into IDLM distillation of a uniform-state teacher.

  Reference: IDLM, arXiv 2602.19066, appendix; released scripts.
  """
  c = distill(uniform(c), teacher, judge)
  c.objective.gamma_min = -3.55  # window of the Gaussian states
  c.objective.gamma_max = -1.85
  c.objective.tau = 1e-3  # temperature of the soft inputs
  c.objective.path_gradient = True  # False: the ablation without gradient through the state
  c.evaluate.noise_removal = "greedy"
  return c


def dcd(c: ConfigDict, teacher: str, judge: str = "") -> ConfigDict:
  """Turn a config into discrete consistency distillation with the released hyper-parameters.

  Reference: Duo, arXiv 2506.10892, section 5.
  """
  c = uniform(c)
  c.objective.name = "dcd"
  c.objective.num_steps = 512  # the first round's time step is 1 over this
  c.objective.update_teacher_every = 10_000  # steps per round; each doubles the time step
  c.objective.gamma_min = -4.0
  c.objective.gamma_max = -1.0
  c.objective.divergence = "kl-bwd"  # kl-bwd or kl-fwd
  c.objective.chunk = 0  # positions per chunk of dense arrays; 0: chosen by size
  c.objective.ema_decay = 0.999
  c.loader.batch_size = 128
  c.teacher.path = teacher
  c.evaluate.judge = judge
  c.evaluate.noise_removal = "greedy"
  c.optim.lr = 6e-5
  c.optim.warmup = 500
  c.optim.clip = 1.0
  c.train.steps = 50_000
  return c


def brief(c: ConfigDict, steps: int) -> ConfigDict:
  """Turn a distillation into one of minutes: few steps at a constant learning rate, watched."""
  c.model.unroll = 1  # compiles in seconds
  c.objective.ema_decay = 0.98
  c.loader.batch_size = 128
  c.optim.warmup = 20
  c.optim.schedule = "constant"
  c.optim.weight_decay = 0.0
  c.train.steps = steps
  c.train.log_every = 10
  c.train.checkpoint_every = 100
  c.evaluate.samples = 128
  c.evaluate.batch_size = 128
  return c


def brief_idlm(c: ConfigDict, steps: int) -> ConfigDict:
  """Turn an IDLM distillation of a small teacher into one of minutes."""
  c = brief(c, steps)
  c.optim.lr = 3e-6
  c.optim.b2 = 0.99
  return c


def brief_didi(c: ConfigDict) -> ConfigDict:
  """Turn a DiDi-Instruct distillation of a small teacher into one of minutes."""
  c = brief(c, steps=600)
  c.objective.shared_time = True  # rewards of one noise level are compared, see `DiDiOptions`
  c.objective.group_size = 8
  c.objective.warmup = 50
  c.objective.accumulate = 4  # in one piece 128 × 512 tokens took 48 GiB at 17 M parameters
  c.optim.lr = 1e-5
  c.optim.discriminator.lr = 5e-5
  c.evaluate.every = 50
  c.evaluate.nfes = (8, 16)
  c.evaluate.max_entropy_drop = 0.25
  return c


def sdtt(c: ConfigDict, teacher: str, judge: str = "") -> ConfigDict:
  """Turn a config into self-distillation through time with the released hyper-parameters.

  Reference: SDTT, arXiv 2410.21035.
  """
  c.objective.name = "sdtt"
  c.objective.num_steps_original = 1024  # the first round's time step is 1 over this
  c.objective.min_num_steps = 8  # the time step never exceeds 1 over this
  c.objective.num_distill_steps = 2  # teacher steps that the student learns to take at once
  c.objective.update_teacher_every = 10_000  # steps per round; each doubles the time step
  c.objective.divergence = "kl-bwd"  # kl-bwd, kl-fwd, mse or tvd
  c.objective.published_times = False  # True: the released code's second teacher time
  c.objective.chunk = 0  # positions per chunk of dense arrays; 0: chosen by size
  c.objective.ema_decay = 0.9999
  c.loader.batch_size = 128
  c.teacher.path = teacher
  c.evaluate.judge = judge
  c.optim.lr = 6e-5
  c.optim.warmup = 500
  c.optim.clip = 1.0
  c.train.steps = 70_000
  return c


def didi(c: ConfigDict, teacher: str, judge: str = "") -> ConfigDict:
  """Turn a config into DiDi-Instruct distillation with the released hyper-parameters.

  Its regularisers are off: the paper's own ablation is better without them from 16 evaluations on.

  Reference: DiDi-Instruct, arXiv 2509.25035, section 4 and appendix.
  """
  c.objective.name = "didi_instruct"
  c.objective.ema_decay = 0.999
  c.objective.score_decomposition = True  # write in two steps; False: in one
  c.objective.coupled_time = True  # rewards at the intermediate state's noise level
  c.objective.omega = "elbo"  # elbo (-alpha'/(1 - alpha)) or constant
  c.objective.omega_clip = (0.1, 10.0)
  c.objective.time_beta = (1.0, 1.0)  # a, b of the Beta that times are drawn from
  c.objective.time_clip = (0.02, 0.98)
  c.objective.importance_weight = False  # divide by the Beta's density
  c.objective.shared_time = False  # one time per group
  c.objective.t0 = 1e-3  # time of the final state; 0: no mask is left
  c.objective.remask = 0.0  # share of the intermediate state's tokens
  c.objective.group_size = 4  # sequences whose rewards are normalised together
  c.objective.reward_clip = 8.0  # nats
  c.objective.advantage_clip = 3.0
  c.objective.kl_beta = 0.0  # weight of the teacher's divergence
  c.objective.kl_scales = (0.01, 0.01)  # its factors at the two steps
  c.objective.jeffreys = 0.0  # 0: KL(teacher || student), 1: the reverse
  c.objective.entropy_beta = 0.0  # weight of the entropy bonus
  c.objective.real = "data"  # the discriminator's other side: data or teacher
  c.objective.teacher_steps = 64  # evaluations per teacher sample
  c.objective.label_smoothing = 0.1
  c.objective.trained_layers = 4  # of the discriminator, from the top
  c.objective.warmup = 0  # steps in which the student waits
  c.objective.dropout = False  # in the student's rollout
  c.objective.chunk = 0  # positions per chunk of logits; 0: all
  c.loader.batch_size = 32
  c.teacher.path = teacher
  c.evaluate.judge = judge
  c.optim.lr = 1e-6
  c.optim.warmup = 0
  c.optim.schedule = "linear"
  c.optim.final = 0.0
  c.optim.weight_decay = 0.0
  c.optim.clip = 0.5
  c.optim.discriminator = ConfigDict({"lr": 1e-5, "clip": 1.0})  # its own; other fields as above
  c.train.steps = 10_000
  c.train.checkpoint_every = 200
  return c
