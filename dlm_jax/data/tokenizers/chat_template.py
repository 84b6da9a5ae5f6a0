# SPDX-License-Identifier: Apache-2.0
"""The chat template of a checkpoint, rendered in a process that it cannot leave."""

import atexit
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from dlm_jax import json_file
from dlm_jax.data.tokenizers import qwen3
from dlm_jax.errors import InputError

_PROGRAM = pathlib.Path(__file__).with_name("sandbox.py")
_PATIENCE = 60.0  # seconds of the clock; `sandbox` bounds those of the processor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
  """How a checkpoint writes a conversation: Jinja sources, and the tokens that they may name.

  Attributes:
    sources: name and text of each; without tools "default" is taken, with tools "tool_use" if there
      is one.
    tokens: name and text of bos_token, eos_token and others.
    origin: where it comes from, for messages.
  """

  sources: tuple[tuple[str, str], ...]
  tokens: tuple[tuple[str, str], ...] = ()
  origin: str = dataclasses.field(default="this tokenizer", compare=False)

  def names(self, word: str) -> bool:
    """Tell whether a source holds a word."""
    return any(word in text for _, text in self.sources)

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    start: bool = True,
    thinking: bool | None = None,
    tools: Sequence[Any] | None = None,
  ) -> str:
    """Return a conversation as text; arguments as for `qwen3.render`.

    Raises:
      InputError: the template refuses the conversation, is broken, or takes more than five seconds
        of a processor or a gibibyte; it has no thoughts to switch; or jinja2 is not installed.
    """
    if thinking is not None and not self.names("enable_thinking"):
      raise InputError(
        f"thinking={thinking}, but the chat template of {self.origin} has no thoughts to switch; "
        "leave it out."
      )
    source = self._source(tools)
    if qwen3.is_template(source):
      return qwen3.render(messages, start=start, thinking=thinking, tools=tools)
    if importlib.util.find_spec("jinja2") is None:
      raise InputError(
        f"the chat template of {self.origin} needs jinja2: pip install 'dlm_jax[chat]'."
      )
    switch = {} if thinking is None else {"enable_thinking": thinking}
    context = {**dict(self.tokens), **switch, "messages": list(messages), "documents": None}
    context |= {"tools": list(tools) if tools else None, "add_generation_prompt": start}
    found = _worker().ask({"source": source, "context": context})
    if found is None:
      raise InputError(
        f"the chat template of {self.origin} takes too long or too much memory; it is not one to "
        "use."
      )
    if "text" in found:
      return found["text"]
    (how, message), *_ = found.items()
    how = "refuses this conversation" if how == "refused" else "is broken"
    raise InputError(f"the chat template of {self.origin} {how}: {' '.join(message.split())[:300]}")

  def _source(self, tools):
    named = dict(self.sources)
    wanted = "tool_use" if tools and "tool_use" in named else "default"
    if wanted not in named and len(named) > 1:
      raise InputError(
        f"none of the chat templates of {self.origin} is the default; it has {', '.join(named)}."
      )
    return named.get(wanted, self.sources[0][1])


class _Worker:
  """The process that renders; one request at a time. It is started when first needed, and again
  after a template that it did not survive."""

  def __init__(self):
    self._process, self._lock, self._owner = None, threading.Lock(), None
    atexit.register(self._end)

  def ask(self, request) -> dict[str, Any] | None:
    """Return the answer; None: there was none within the bounds."""
    line = json.dumps(request)
    with self._lock:
      if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
        self._start()
      timer = threading.Timer(_PATIENCE, self._process.kill)
      timer.start()
      try:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
      except BrokenPipeError:
        answer = ""
      finally:
        timer.cancel()
      if answer.endswith("\n"):
        return json_file.parse(answer, finite=False)
      self._end()
      return None

  def _start(self):
    # -P: the folder of the program, whose files have names of their own, is no place of modules.
    self._process = subprocess.Popen(
      [sys.executable, "-P", str(_PROGRAM)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      encoding="utf-8",
    )
    self._owner = os.getpid()

  def _end(self):
    if self._process is not None and self._owner == os.getpid():
      self._process.kill()
      self._process.communicate()
    self._process = None


@functools.cache
def _worker() -> _Worker:
  return _Worker()
