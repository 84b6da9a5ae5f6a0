# SPDX-License-Identifier: Apache-2.0
"""What is damaged: sound files of every kind that is read, each with the command that reads it."""

import dataclasses
import gzip
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import tiny_runs
import tiny_sdar
import torch_files
from safetensors.flax import load_file, save_file

from dlm_jax import convert
from dlm_jax.convert import mdlm_layout
from dlm_jax.experiment import plan
from dlm_jax.train.checkpoint import Checkpoints

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
_TEMPLATE = (
  "{% for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Base:
  """A folder of sound files and a command that reads it.

  Attributes:
    name: for messages.
    folder: copied to ../it of the place where the command runs.
    argv: the command.
    files: name → form of a mutation.
    writes: the command may leave files even if it fails: a workdir that it began.
    summed: dataset.json and checksums.json tell sizes and sums of the files.
  """

  name: str
  folder: pathlib.Path
  argv: tuple[str, ...]
  files: dict[str, str]
  writes: bool = False
  summed: bool = False


def form_of(name: str) -> str:
  """Return how a file is mutated, by its name."""
  kinds = {".json": "json", ".jsonl": "jsonl", ".safetensors": "safetensors"}
  kinds |= dict.fromkeys((".bin", ".ckpt"), "torch")
  return kinds.get(pathlib.PurePath(name).suffix, "bytes")


def _base(name, folder, *argv, only=None, writes=False):
  files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
  files = [f for f in files if only is None or f in only]
  return Base(name, folder, argv, {f: form_of(f) for f in files}, writes)


_SAMPLE = ("sample", "--checkpoint=../it")
_CONVERT = ("convert", "--checkpoint=../it", "--out=out")


def networks(root: pathlib.Path) -> list[Base]:
  """Write checkpoints of every layout; return them, most with `sample` and with `convert`."""
  tiny = tiny_runs.make()
  made = [_base(kind, getattr(tiny, kind) / "final", *_SAMPLE) for kind in ("teacher", "judge")]
  decoder = tiny_sdar.write(root / "decoder", layers=1)
  _beside(decoder)
  write = ("--prompt=a", "--max_new_tokens=4")
  made.append(_base("decoder", decoder, *_SAMPLE, *write))
  made.append(_base("chat", decoder, *_SAMPLE, *write, "--chat", only=_WORDS))
  made += [_base(f"convert {b.name}", b.folder, *_CONVERT) for b in made[:3]]
  made.append(_sharded(root, decoder))
  made.append(_base("index", made[-1].folder, *_CONVERT, only=("model.safetensors.index.json",)))
  made.append(_adapter(root, decoder))
  made += _public(root)
  return made


_WORDS = (
  *("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"),
  *("generation_config.json", "special_tokens_map.json", "chat_template.jinja"),
)


def _beside(folder):
  """Write the files that a public chat model has beside its vocabulary."""
  config = json.loads((folder / "tokenizer_config.json").read_text())
  added = {one["content"]: int(i) for i, one in config["added_tokens_decoder"].items()}
  (folder / "added_tokens.json").write_text(json.dumps(added))
  named = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]}
  (folder / "special_tokens_map.json").write_text(json.dumps(named))
  ids = {"eos_token_id": [added["<|im_end|>"], added["<|endoftext|>"]]}
  (folder / "generation_config.json").write_text(json.dumps(ids))
  (folder / "chat_template.jinja").write_text(_TEMPLATE)


def _copy(source, folder, *names):
  folder.mkdir(parents=True)
  for name in names or [file.name for file in source.iterdir()]:
    shutil.copyfile(source / name, folder / name)
  return folder


def _sharded(root, decoder):
  """Return the decoder in shards, with their index."""
  folder, network = root / "sharded", convert.open_network(decoder)
  given = {"block_length": 4, "shard_bytes": 20_000}
  convert.save(folder, network.model, network.params, network.process, **given)
  for name in _WORDS:
    shutil.copyfile(decoder / name, folder / name)
  return _base("sharded", folder, *_CONVERT)


def _adapter(root, decoder):
  """Return a low-rank adapter in the directory of its base."""
  folder, module = _copy(decoder, root / "adapter"), "model.layers.0.self_attn.q_proj"
  shape = load_file(decoder / "model.safetensors")[f"{module}.weight"].shape
  sizes = {"A": (2, shape[1]), "B": (shape[0], 2)}
  tensors = {f"base_model.model.{module}.lora_{x}.weight": jnp.ones(s) for x, s in sizes.items()}
  save_file(tensors, folder / "adapter_model.safetensors")
  config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": False, "bias": "none"}
  config |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "base_model_name_or_path": "x/y"}
  (folder / "adapter_config.json").write_text(json.dumps(config))
  only = ("adapter_config.json", "adapter_model.safetensors")
  return _base("adapter", folder, *_SAMPLE, "--prompt=a", only=only)


def _public(root):
  """Return files as others publish them: torch's, of eight bits, GPT-2, with a discriminator."""
  mdlm, made, bare = GOLDEN / "checkpoints" / "mdlm", [], _CONVERT
  tensors = {n: np.asarray(x) for n, x in load_file(mdlm / "model.safetensors").items()}
  folder = _copy(mdlm, root / "bin", "config.json")
  torch_files.write(folder / "pytorch_model.bin", tensors)
  made.append(_base("bin", folder, *bare))
  folder, model = _copy(mdlm, root / "lightning", "config.json"), convert.load(mdlm)[0]
  names = [entry.name for entry in mdlm_layout.denoiser_entries(model)]
  content = {"epoch": 3, "state_dict": tensors, "hyper_parameters": {"lr": 3e-4, "betas": (0.9, 1)}}
  content["ema"] = {"decay": 1, "shadow_params": [tensors[name] for name in names]}
  torch_files.write(folder / "last.ckpt", content)
  made.append(_base("lightning", folder, *bare))
  folder, small = _copy(mdlm, root / "eight bits", "config.json"), {}
  for name, value in tensors.items():
    matrix = value.ndim == 2
    small[name] = jnp.asarray(value, jnp.float8_e4m3fn if matrix else jnp.float32)
    if matrix:
      small[f"{name}_scale"] = jnp.ones((value.shape[0], 1))
  save_file(small, folder / "model.safetensors")
  made.append(_base("eight bits", folder, *bare))
  folder = _copy(GOLDEN / "gpt2_tiny", root / "gpt2", "config.json", "model.safetensors")
  made.append(_base("gpt2", folder, *_SAMPLE))
  names = ("config.json", "model.safetensors", "discriminator.safetensors")
  folder = _copy(GOLDEN / "checkpoints" / "didi_instruct", root / "didi", *names)
  made.append(_base("didi", folder, *_SAMPLE, "--sampler=rgas"))
  for name in ("duo", "bd3lm", "qwen3_bf16"):
    folder = _copy(GOLDEN / "checkpoints" / name, root / name, *names[:2])
    made.append(_base(name, folder, *bare, only=("config.json",)))
  for base in made:
    _small_words(base.folder / "tokenizer.json")
  return made


def _small_words(file):
  """Write a tokenizer of letters and a separator: public files of ours have 48 rows."""
  import tokenizers as library

  vocab = {
    letter: i for i, letter in enumerate(sorted(library.pre_tokenizers.ByteLevel.alphabet()))
  }
  words = library.Tokenizer(library.models.BPE(dict(list(vocab.items())[:46]), []))
  words.add_special_tokens(["<|endoftext|>"])
  words.save(str(file))


def data(root: pathlib.Path) -> list[Base]:
  """Write datasets, corpora and what lies in workdirs; return each with a verb that reads it."""
  tiny = tiny_runs.make()
  network = f"--checkpoint={tiny.teacher}"
  made = [_base("dataset", tiny.data, "evaluate", network, "--data=../it", "--sequences=8")]
  made.append(dataclasses.replace(made[0], name="dataset with its sums", summed=True))
  made += [_frontier(root, tiny), _workdir(root, tiny), _messages(root)]
  return made + _corpora(root)


def _frontier(root, tiny):
  folder = root / "frontier"
  folder.mkdir()
  row = {"name": "a", "nfe": 1, "evaluations": 1, "genppl": 2.5, "genppl_se": 0.1, "entropy": 1.5}
  row |= {
    "entropy_se": 0.1,
    "correlation": 0.0,
    "distinct_4": 0.9,
    "samples": 2,
    "tokens": 32,
    "seconds": 0.5,
  }
  row |= {"seed": 0, "options": {"sampler": "psi"}, "context": {"judge": "x", "weights": {}}}
  (folder / "frontier.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | {'nfe': 2})}\n")
  argv = ("frontier", f"--model=a={tiny.teacher}", f"--judge={tiny.judge}", "--workdir=../it")
  return _base("frontier", folder, *argv, "--nfes=1,2", "--samples=2", writes=True)


def _workdir(root, tiny):
  """Return a workdir with a checkpoint that is only begun: its config is read before it."""
  folder = root / "workdir"
  config = tiny.config("teacher")
  with Checkpoints(folder / "checkpoints", config=plan.read(config).stored):
    (folder / "checkpoints" / "2").mkdir()
  (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.5}\n')
  argv = ("train", *tiny.flags("teacher"), "--workdir=../it")
  return _base("workdir", folder, *argv, only=("checkpoints/config.json",), writes=True)


def _messages(root):
  """Return a conversation for a chat model."""
  folder = root / "messages"
  folder.mkdir()
  call = {"function": {"name": "add", "arguments": {"a": 1}}}
  talk = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "so", "tool_calls": [call]},
    {"role": "tool", "content": "4"},
  ]
  (folder / "messages.json").write_text(json.dumps(talk))
  argv = ("sample", f"--checkpoint={root / 'decoder'}", "--messages=../it/messages.json")
  return _base("messages", folder, *argv)


def _corpora(root):
  """Return texts, proteins and conversations with the command that packs them."""
  folder = root / "corpus"
  folder.mkdir()
  texts = [json.dumps({"text": text}) for text in tiny_runs.documents()[:30]]
  (folder / "a.jsonl").write_text("\n".join(texts) + "\n")
  (folder / "b.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode(), mtime=0))
  proteins = "".join(f">p{i}\nMKTAYIAKQR\nQISFV{'A' * i}\n" for i in range(40))
  (folder / "c.fasta").write_text(proteins)
  talks = [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(40)]
  turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  lines = [*map(json.dumps, talks), json.dumps({"messages": turns})]
  (folder / "d.jsonl").write_text("\n".join(lines[:40]) + "\n")
  (folder / "e.jsonl").write_text(f"{lines[40]}\n" * 20)
  argv = ("prepare", "--config=quickstart_teacher", "--config.data.options.tests=none")
  argv += ("--config.data.directory=out", "--config.data.length=16")
  decoder = f"--config.data.tokenizer={root / 'decoder'}"
  talk = (decoder, "--config.data.packing=conversations", "--config.data.length=64")
  named = [f"--config.data.options.{name}={name}" for name in ("prompt", "answer")]
  blank = "--config.data.options.document_separator=\n"
  ways = {
    "a.jsonl": ("files:../it/a.jsonl", "--config.data.tokenizer=bytes"),
    "b.txt.gz": ("files:../it/b.txt.gz", "--config.data.tokenizer=bpe:300", blank),
    "c.fasta": (
      "fasta:../it/c.fasta",
      "--config.data.tokenizer=esm",
      "--config.data.packing=documents",
      "--config.data.length=64",
      "--config.data.options.min_length=3",
    ),
    "d.jsonl": ("chat:../it/d.jsonl", *talk, *named),
    "e.jsonl": ("chat:../it/e.jsonl", *talk),
  }
  return [
    _base(f"corpus {name}", folder, *argv, f"--config.data.source={source}", *more, only=(name,))
    for name, (source, *more) in ways.items()
  ]
