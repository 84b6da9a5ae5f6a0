# SPDX-License-Identifier: Apache-2.0
"""One id per byte."""

import dataclasses

from dlm_jax.data.tokenizers.base import EOS, Base, canonical

CONTENT = {"eos_id": 256, "format": "dlm_jax.bytes", "vocab_size": 257}


@dataclasses.dataclass(frozen=True)
class Bytes(Base):
  """One id per UTF-8 byte, and 256 as the separator. Reversible for any text."""

  vocab_size: int = dataclasses.field(default=257, init=False)
  eos_id: int = dataclasses.field(default=256, init=False)
  eos_text: str = dataclasses.field(default=EOS, init=False)
  serialised: str = dataclasses.field(default=canonical(CONTENT), init=False, repr=False)

  def _ids(self, texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]

  def _text(self, ids: list[int]) -> str:
    data = b"".join(EOS.encode() if i == self.eos_id else bytes((i,)) for i in ids)
    return data.decode(errors="replace")
