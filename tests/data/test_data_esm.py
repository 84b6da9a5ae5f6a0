# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of proteins: ids of the public models, frames, round trips."""

import numpy as np
import pytest

from dlm_jax.data import templates, tokenizers
from dlm_jax.errors import InputError

ESM = tokenizers.Esm()


def test_ids_are_those_of_the_public_models():
  letters = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
  assert ESM.encode(letters) == list(range(4, 31)) and ESM.encode("lag") == [4, 5, 6]
  assert (ESM.cls_id, ESM.pad_id, ESM.eos_id, ESM.mask_id, ESM.vocab_size) == (0, 1, 2, 32, 32)
  assert ESM.given_ids == (0, 1, 2, 3, 29, 30, 31) and ESM.framed
  assert ESM.encode_batch(["MKT", ""]) == [[20, 15, 11], []]
  for text in (tokenizers.Bytes(), tokenizers.train_bpe(["abc"], 257)):
    assert text.given_ids == () and text.pad_id is None and not text.framed


def test_rows_decode_to_plain_residues():
  assert ESM.decode(np.array([0, 20, 15, 11, 2, 1, 1])) == "MKT"
  assert ESM.decode([0, 20, 32, 32, 2]) == "M▯▯"
  assert ESM.decode([3, 31]) == "<unk><null_1>"
  with pytest.raises(InputError, match="token id 33"):
    ESM.decode([33])


def test_other_characters_are_named():
  with pytest.raises(InputError, match=r"'J' is no residue; use the letters LAGVSER.*O\.-\."):
    ESM.encode("AJ")
  with pytest.raises(InputError, match="' ' is no residue"):
    ESM.encode("A C")


def test_saved_and_loaded(tmp_path):
  ESM.save(tmp_path)
  again = tokenizers.load(tmp_path)
  assert again == tokenizers.load("esm") == tokenizers.load(tmp_path / "tokenizer.json") == ESM
  assert again.fingerprint == ESM.fingerprint != tokenizers.Bytes().fingerprint
  assert '"bos_token": "<cls>"' in (tmp_path / "tokenizer_config.json").read_text()


def test_templates():
  assert ESM.template(3, 7).tolist() == [0, 32, 32, 32, 2, 1, 1]
  assert ESM.template(5, 7).tolist() == [0, 32, 32, 32, 32, 32, 2]
  for residues in (0, 6):
    with pytest.raises(InputError, match=f"length={residues}: .* has 1 to 5 residues"):
      ESM.template(residues, 7)
  assert [templates.bucket_of(n, (8, 16)) for n in (1, 6, 7, 14)] == [8, 8, 16, 16]
  with pytest.raises(InputError, match=r"length=15: the longest sequence .* has 14 residues"):
    templates.bucket_of(15, (8, 16))


def test_samples_come_back_in_order_and_every_bucket_has_one_shape():
  residues, shapes = (5, 12, 6, 3, 14, 5, 2), []

  def run(number, prompt_BL):
    shapes.append((number, prompt_BL.shape))
    return np.where(prompt_BL == ESM.mask_id, 4 + number, prompt_BL)

  drawn = templates.Templates(tokenizer=ESM, residues=residues, buckets=(8, 16), batch_size=2)
  rows = drawn.draw(run)
  assert shapes == [(0, (2, 8)), (1, (2, 8)), (2, (2, 8)), (3, (2, 16))]
  texts = [ESM.decode(row) for row in rows]
  assert [len(text) for text in texts] == list(residues)
  assert [text[0] for text in texts] == ["L", "V", "L", "A", "V", "A", "G"]
  assert rows.shape == (7, 16) and (rows[0, 7:] == ESM.pad_id).all()
