# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax prepare`: corpus → packed token records."""

from dlm_jax.cli import flags
from dlm_jax.data import tokenizers
from dlm_jax.experiment import build, plan


def main(argv: list[str]) -> None:
  """Parse flags and pack the corpus."""
  parser = flags.Parser(
    "prepare",
    "Tokenise a corpus and pack it: text end to end, proteins one by one, prompts with answers.",
    """
dlm-jax prepare --config=quickstart_teacher
dlm-jax prepare --config=novels_teacher --config.data.source='files:books/*.txt'
dlm-jax prepare --config=novels_idlm --config.data.directory=gs://bucket/novels
""",
  )
  flags.add_config(parser)
  config = flags.load_config(parser.parse(argv))
  if config is None:
    return
  prepared = build.prepare(plan.read_data(config))
  print(prepared.message)
  rows = tokenizers.load(prepared.directory)
  for name, split in prepared.info.splits.items():
    sizes = zip(prepared.info.buckets, split.bucket_records, strict=True)  # of documents
    padded = ", ".join(f"{records:,} padded to {length}" for length, records in sizes)
    held = f"{split.tokens:,} tokens, {split.bytes_per_token:.2f} bytes per token"
    if rows.framed:
      residues = split.tokens - 2 * split.records  # less the frame
      held = f"{residues:,} residues, {residues / split.records:.1f} per protein"
    print(f"  {name}: {split.records:,} records, {held}" + (f"; {padded}" if padded else ""))
  print(f"  tokenizer: {rows.vocab_size:,} tokens, fingerprint {rows.fingerprint[:12]}")
