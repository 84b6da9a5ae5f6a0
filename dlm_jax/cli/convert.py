# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax convert`: a network of a run, or a public one → the Hugging Face layout."""

import os
import pathlib

from etils import epath

from dlm_jax import convert, disk, remote
from dlm_jax.cli import flags
from dlm_jax.convert import places
from dlm_jax.errors import InputError
from dlm_jax.experiment.run import make_workdir
from dlm_jax.text import denoiser


def main(argv: list[str]) -> None:
  """Parse flags, load strictly, write config.json, model.safetensors and the tokenizer."""
  parser = flags.Parser(
    "convert",
    "Write a network as config.json + model.safetensors + tokenizer. Loading is strict.",
    """
dlm-jax convert --checkpoint=runs/novels_idlm --out=models/novels_idlm
dlm-jax convert --checkpoint=data/mdlm-owt --tokenizer=data/gpt2 --out=models/mdlm-owt
dlm-jax convert --checkpoint=data/idlm/last.ckpt --tokenizer=data/gpt2 --out=models/idlm
""",
  )
  parser.add_argument("--checkpoint", required=True, help="workdir, model directory or *.ckpt")
  parser.add_argument("--out", required=True, help="directory to write; must be new or empty")
  parser.add_argument("--tokenizer", default="", help="default: the one beside the network")
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--weights", default="", help="of a Lightning *.ckpt: ema (default) or raw")
  namespace = parser.parse(argv)
  out = epath.Path(namespace.out)
  _check_out(out)
  source = places.find_network(namespace.checkpoint)
  family = convert.open_network(source).family
  kept = namespace.dtype if namespace.dtype in family.dtypes else None
  network = convert.open_network(source, weights=namespace.weights or None, params_dtype=kept)
  tokenizer = denoiser.load_tokenizer(source, namespace.tokenizer)
  if family.spare_rows:
    _check_rows(source, tokenizer, network.model)
  elif network.process is not None:
    denoiser.check_vocabulary(source, tokenizer, network.process)
  extra = {key: value for key, value in network.facts.items() if key != "process"}
  extra["tokenizer_fingerprint"] = tokenizer.fingerprint
  convert.save(
    namespace.out,
    network.model,
    network.params,
    network.process,
    dtype=namespace.dtype,
    extra=extra,
    block_length=network.block_length,
    tokenizer=tokenizer,
  )
  size = sum(file.stat().length for file in out.glob("*.safetensors")) / 1e6
  print(f"{out}: {size:.1f} MB, {namespace.dtype}")


def _check_out(out: epath.Path) -> None:
  """Refuse a place that is not new or cannot be written, before anything is read."""
  if remote.is_remote(out):
    if out.exists() and any(out.iterdir()):
      raise InputError(f"--out={out} is not empty; choose a new directory.")
    make_workdir(out)
    return
  folder = pathlib.Path(os.path.abspath(out))
  if folder == pathlib.Path.cwd():
    raise InputError("--out is this folder itself; name a new one in it, e.g. --out=models/mine.")
  disk.check_folder(folder)
  with disk.writing(folder), disk.fresh(folder):
    if folder.exists() and any(folder.iterdir()):
      raise InputError(f"--out={out} is not empty; choose a new directory.")


def _check_rows(source, tokenizer, model):
  """Refuse a tokenizer with more ids than a decoder has rows; fewer are usual."""
  ids, rows = max(tokenizer.vocab_size, tokenizer.mask_id), model.config.vocab_size
  if ids > rows:
    raise InputError(f"{source}: the tokenizer has {ids} tokens and the network {rows} rows.")
