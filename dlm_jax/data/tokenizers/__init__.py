# SPDX-License-Identifier: Apache-2.0
"""Text ↔ token ids: plain bytes, byte-level BPE (trained here, GPT-2's, any tokenizer.json), or
the residues of proteins.

Conventions that the rest of the library relies on:

  vocab_size  counts the ordinary ids, the separator included and the diffusion mask excluded. The
              mask of an absorbing process is always the appended id `vocab_size`.
  eos_id      separates documents; it also opens every packed sequence (the role of BOS).
  encode      never turns text into a special token: a literal "<|endoftext|>" in a document is
              seven ordinary GPT-2 tokens, so a corpus cannot forge document boundaries. Hugging
              Face's GPT-2 tokenizer, with which OpenWebText is usually prepared, reads that
              literal as id 50256; `encode(text, specials=True)` does the same.
  decode      keeps the separator visible as its text and shows the mask as MASK_SYMBOL.
  fingerprint identifies what determines the ids: it tells whether a checkpoint fits a dataset.
  given_ids   are never noised, scored or drawn: they frame a sequence. Text has none.
"""

from dlm_jax.data.tokenizers.base import EOS, MASK_SYMBOL
from dlm_jax.data.tokenizers.bpe import BPE, train_bpe
from dlm_jax.data.tokenizers.bytes import Bytes
from dlm_jax.data.tokenizers.chat import ChatBPE
from dlm_jax.data.tokenizers.esm import Esm
from dlm_jax.data.tokenizers.load import Tokenizer, load

__all__ = [
  "BPE",
  "EOS",
  "MASK_SYMBOL",
  "Bytes",
  "ChatBPE",
  "Esm",
  "Tokenizer",
  "load",
  "train_bpe",
]
