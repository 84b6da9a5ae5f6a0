# SPDX-License-Identifier: Apache-2.0
"""A forward process ↔ what config.json stores of it under "dlm_jax"."""

import dataclasses
from typing import Any

from dlm_jax import fields, process, schedules
from dlm_jax.errors import InputError
from dlm_jax.process import Process


def read(where: str, stored: Any, vocab_size: int) -> Process:
  """Build the process that a config.json stores.

  Args:
    where: the file, for messages.
    stored: its name, its schedule and its fields.
    vocab_size: of the network.

  Raises:
    InputError: it is unknown, incomplete or impossible.
  """
  name, before = name_of(where, stored), f"{where}: process"
  known = {field.name for field in dataclasses.fields(process.NAMES[name])} - {"vocab_size"}
  given = {key: value for key, value in stored.items() if key != "name"}
  optional = {"blocked"}  # written where there are any
  lacking = known - optional - set(given)
  for problem, names in (("lacks", lacking), ("has unknown", set(given) - known)):
    if names:
      raise InputError(f"{where}: the process {name} {problem} {', '.join(sorted(names))}.")
  token = fields.Whole(0, vocab_size - 1)
  kinds = {"schedule": fields.Object({"name": fields.Text()}), "mask_id": token}
  kinds |= {"blocked": fields.Items(token)}
  given = fields.read(before, given, {key: kinds[key] for key in given})
  try:
    given["schedule"] = schedules.make(**given["schedule"])
    return process.NAMES[name](vocab_size=vocab_size, **given)
  except ValueError as error:
    raise InputError(f"{before}: {error}") from None


def name_of(where: str, stored: Any) -> str:
  """Return the name of a stored process.

  Raises:
    InputError: it has none, or it is unknown.
  """
  name = stored.get("name") if isinstance(stored, dict) else None
  if not isinstance(name, str) or name not in process.NAMES:
    raise InputError(
      f"{where}: process {fields.shown(stored)} is unknown; known: {', '.join(process.NAMES)}."
    )
  return name


def describe(proc: Process | None) -> dict[str, Any] | None:
  """Return what config.json stores of a process; None for none.

  Raises:
    InputError: the process or its schedule has no name.
  """
  if proc is None:
    return None
  name = {cls: name for name, cls in process.NAMES.items()}.get(type(proc))
  schedule = {cls: name for name, cls in schedules.NAMES.items()}.get(type(proc.schedule))
  if name is None:
    raise InputError(f"a {type(proc).__name__} process cannot be saved.")
  if schedule is None:
    raise InputError("a user-supplied schedule cannot be saved; use a named one.")
  stored = {"name": name, **({"mask_id": proc.mask_id} if process.has_mask(proc) else {})}
  if getattr(proc, "blocked", ()):
    stored["blocked"] = list(proc.blocked)
  return {**stored, "schedule": {"name": schedule, **dataclasses.asdict(proc.schedule)}}
