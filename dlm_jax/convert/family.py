# SPDX-License-Identifier: Apache-2.0
"""What a file of `convert/families/` exports: an architecture of checkpoints, facts and functions.

The folder is the registry: a new architecture is one file with a `FAMILY`, and nothing else.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dlm_jax.convert.layout import Entry
from dlm_jax.errors import InputError, hint
from dlm_jax.process import MASKED, NAMES, Process

# How a network writes. Callers ask this, and never for a class.
WRITES = (
  "grid",  # denoises all positions over a grid of times: `sample.generate`
  "blocks",  # block after block over a cache, each denoised: `sample.block_decoder`
  "next",  # one token after the other
  "introspective",  # as "blocks", and checks in the same pass what it wrote
  "whole",  # denoises one window of masks, surest positions first
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """One architecture of checkpoints: its config.json and its tensors, both ways.

  Attributes:
    model_types: what config.json may call it.
    network: class whose networks are written so. A class has one such file; another one that reads
      it under names of its own says None.
    read: (path of the directory or of the weights, config.json, overrides) -> (network, process).
    describe: (network, process) -> config.json, the process included.
    entries: network -> where every public tensor lies among our parameters.
    match: (network, tensors by stored name, where they come from) -> tensors by public name;
      refuses what is missing, unknown or misshapen, and leaves out what it can explain.
    average: (network, list of a Lightning checkpoint, where it comes from) -> tensors by public
      name; None: such lists are of other architectures.
    writes: the ways in which it may write, see `WRITES`. Of a network with a process that says no
      other, the first is meant; one without a process predicts the "next" token.
    processes: names of the processes that a config may give it, see `process.NAMES`; "none": it
      may be trained without.
    dtypes: what its parameters may be kept in.
    spare_rows: its vocabulary may have more rows than the tokenizer has tokens, the mask be any.
    own_tokenizer: it is fixed to a tokenizer of its own; texts of others are translated for it.
    pad_row: without a mask its vocabulary may have one row more, as public ones have for padding.
    several: a row may hold several documents, which it keeps apart.
    name: what `model.name` of a config calls it; None: it is read from files only.
    options: what a config builds the network from, a dataclass of sizes and policies.
    complete: (fields of a config's `model`) -> arguments of `options`; sizes left at 0 follow from
      others.
  """

  model_types: tuple[str, ...]
  network: type | None
  read: Callable[[pathlib.Path, dict[str, Any], dict[str, Any]], tuple[Any, Process | None]]
  describe: Callable[[Any, Process | None], dict[str, Any]]
  entries: Callable[[Any], Iterator[Entry]]
  match: Callable[[Any, Mapping[str, Any], pathlib.Path | str], Mapping[str, Any]]
  average: Callable[[Any, list[Any], pathlib.Path | str], Mapping[str, Any]] | None = None
  writes: tuple[str, ...] = ()
  processes: tuple[str, ...] = ()
  dtypes: tuple[str, ...] = ("float32",)
  spare_rows: bool = False
  own_tokenizer: bool = False
  pad_row: bool = False
  several: bool = False
  name: str | None = None
  options: type | None = None
  complete: Callable[[dict[str, Any]], dict[str, Any]] = dict

  def has_mask_row(self, name: str) -> bool:
    """Tell whether its vocabulary has a row for the mask, under a process of that name.

    One that may have a mask later has the row from the start: it stays the same network.
    """
    masks = any(known in MASKED for known in self.processes)
    return masks and (name in MASKED or name not in NAMES)

  def fits(self, rows: int, tokens: int, masked: bool) -> bool:
    """Tell whether so many rows are a vocabulary of so many tokens, the mask not among them."""
    more = rows - tokens - masked
    padded = self.pad_row and not masked and more == 1
    return more == 0 or padded or (self.spare_rows and more > 0)

  def way(self, process: Process | None, stored: str | None = None, where: Any = "") -> str:
    """Return how a network of this family writes.

    Args:
      process: of the network.
      stored: what its config.json says under "dlm_jax"; None: nothing.
      where: the file that says it, for the message.

    Raises:
      InputError: the family does not write so.
    """
    known = self.writes if process is not None else ("next",)
    if stored is None:
      return known[0]
    if stored not in known:
      raise InputError(
        f"{where}: writes={stored!r} is not how this network writes; it writes "
        f"{' or '.join(known)}{hint(str(stored), known)}."
      )
    return stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
  """A network that lies beside another one, in a file named as the file here that exports this.

  Attributes:
    network: its class.
    save: (directory of the other network, network with its parameters).
    load: (directory or weights of the other, its config.json, overrides) -> network with its
      parameters; None if there is none.
    facts: what config.json of the other keeps of it, under "dlm_jax" and its name.
  """

  network: type
  save: Callable[[pathlib.Path, Any], None]
  load: Callable[[pathlib.Path, dict[str, Any], dict[str, Any]], Any]
  facts: Callable[[Any], dict[str, Any]]
