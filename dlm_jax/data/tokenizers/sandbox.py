# SPDX-License-Identifier: Apache-2.0
"""Renders chat templates in a process of its own: a program, not imported by the package.

A template is a program from whoever wrote the checkpoint. Jinja's sandbox keeps it from everything
but its arguments; this process bounds its time and memory, which the sandbox does not. It reads a
request per line, JSON, and answers with a line: {"text": …}, {"refused": …} or {"broken": …}.
"""

import contextlib
import datetime
import json
import sys
import time

import jinja2
import jinja2.ext
import jinja2.sandbox

try:
  import resource
except ImportError:  # not on Windows: there the caller's clock is the only bound
  resource = None

SECONDS, MEMORY = 5, 1 << 30  # of a processor per request; bytes
LONGEST = 1 << 24  # characters of a conversation


class Refusal(Exception):
  """What a template itself says against a conversation."""


class Generation(jinja2.ext.Extension):
  """Reads the tag that marks an assistant's words for training, and leaves what it holds."""

  tags = frozenset(("generation",))

  def parse(self, parser):
    """Return the statements between the tag and its end."""
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message):
  """Raise what a template has to say."""
  raise Refusal(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  """Return plain JSON: jinja's own filter would escape it for HTML."""
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def environment():
  """Return the sandbox with the functions and white space that templates count on."""
  made = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  made.filters["tojson"] = to_json
  made.globals["raise_exception"] = refuse
  made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return made


def bound():
  """Bound the memory of this process, and the processor time that the next request may take."""
  if resource is None:
    return
  with contextlib.suppress(OSError, ValueError):  # not on every system
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
  until = int(time.process_time()) + 1 + SECONDS
  resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))


def answer(compiled, request):
  """Return what a request gives; `compiled` keeps templates by their source."""
  source = request["source"]
  try:
    if source not in compiled:
      compiled[source] = environment().from_string(source)
    text = compiled[source].render(**request["context"])
  except Refusal as error:
    return {"refused": str(error)}
  except Exception as error:  # whatever a template can do wrong, memory and recursion included
    return {"broken": f"{type(error).__name__}: {error}"}
  if len(text) > LONGEST:
    return {"broken": f"it wrote {len(text)} characters, more than {LONGEST}"}
  return {"text": text}


def main():
  """Answer requests until there are no more."""
  compiled = {}
  for line in sys.stdin:
    bound()
    sys.stdout.write(json.dumps(answer(compiled, json.loads(line))) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
  main()
