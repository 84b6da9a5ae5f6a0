# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax convert`: a network of a run, or a public one → the Hugging Face layout."""

import pathlib

from dlm_jax import convert, pipeline, training
from dlm_jax.cli import flags
from dlm_jax.errors import InputError


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
  out = pathlib.Path(namespace.out)
  if out.exists() and any(out.iterdir()):
    raise InputError(f"--out={out} is not empty; choose a new directory.")
  source = pipeline.find_network(namespace.checkpoint)
  model, params, proc = convert.load(source, weights=namespace.weights or None)
  if not hasattr(model.config, "dim"):
    raise InputError(f"{source} is a GPT-2 network; it is already in the Hugging Face layout.")
  tokenizer = pipeline.load_tokenizer(source, namespace.tokenizer)
  if proc is not None:
    pipeline.check_vocabulary(source, tokenizer, proc)
  extra = convert.read_config(source).get("dlm_jax", {})
  extra = {key: value for key, value in extra.items() if key != "process"}
  extra["tokenizer_fingerprint"] = tokenizer.fingerprint
  training.make_workdir(out)
  convert.save(out, model, params, proc, dtype=namespace.dtype, extra=extra)
  tokenizer.save(out)
  size = (out / "model.safetensors").stat().st_size / 1e6
  print(f"{out}: {size:.1f} MB, {namespace.dtype}")
