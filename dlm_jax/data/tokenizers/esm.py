# SPDX-License-Identifier: Apache-2.0
"""The residues of proteins."""

import dataclasses

import numpy as np
from jaxtyping import Int

from dlm_jax.data.tokenizers.base import Base, canonical
from dlm_jax.errors import InputError

CONTENT = {
  "format": "dlm_jax.esm",
  "tokens": ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>"],
}


@dataclasses.dataclass(frozen=True)
class Esm(Base):
  """One id per residue, in the order of the public ESM-2 models, whose mask is 32 too.

  A record is `<cls>` + residues + `<eos>` + `<pad>` …; see `template`. `decode` leaves these three
  out, so a row of a model is a plain string of residues; `<unk>` and `<null_1>` stay visible.

  Reference: ESM-2, doi 10.1126/science.ade2574.
  """

  vocab_size: int = dataclasses.field(default=32, init=False)
  cls_id: int = dataclasses.field(default=0, init=False)
  pad_id: int = dataclasses.field(default=1, init=False)
  eos_id: int = dataclasses.field(default=2, init=False)
  given_ids: tuple[int, ...] = dataclasses.field(default=(0, 1, 2, 3, 29, 30, 31), init=False)
  cls_text: str = dataclasses.field(default="<cls>", init=False)
  eos_text: str = dataclasses.field(default="<eos>", init=False)
  serialised: str = dataclasses.field(default=canonical(CONTENT), init=False, repr=False)

  def template(self, residues: int, length: int) -> Int[np.ndarray, "L"]:
    """Return `<cls>`, as many masks as residues, `<eos>` and padding: what a sampler fills in.

    Raises:
      InputError: fewer than one residue, or it does not fit into `length`.
    """
    if not 1 <= residues <= length - 2:
      raise InputError(
        f"length={residues}: with its start and end a protein of {length} positions has 1 to "
        f"{length - 2} residues."
      )
    row_L = np.full(length, self.pad_id, np.int32)
    row_L[: residues + 2] = [self.cls_id, *[self.mask_id] * residues, self.eos_id]
    return row_L

  def _ids(self, texts: list[str]) -> list[list[int]]:
    try:
      return [[_RESIDUES[letter] for letter in text] for text in texts]
    except KeyError as error:
      letters = "".join(letter for letter in _RESIDUES if not letter.islower())
      raise InputError(f"{error.args[0]!r} is no residue; use the letters {letters}.") from None

  def _text(self, ids: list[int]) -> str:
    silent = (self.cls_id, self.pad_id, self.eos_id)
    return "".join(CONTENT["tokens"][i] for i in ids if i not in silent)


_RESIDUES = {token: i for i, token in enumerate(CONTENT["tokens"]) if len(token) == 1}
_RESIDUES |= {letter.lower(): i for letter, i in _RESIDUES.items()}
