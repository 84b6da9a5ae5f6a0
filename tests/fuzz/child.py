# SPDX-License-Identifier: Apache-2.0
"""Runs commands in a process that cannot harm its parent; a program, started by `cases.Child`.

It imports the package once and forks; the fork answers one request after the other, each within
bounds of time and memory, until it dies of one or has answered enough, then the next fork goes on.
Commands stop where the network would run: what is read before that is what is tried here.
"""

import importlib
import io
import json
import os
import resource
import signal
import sys
import traceback

SECONDS, CLOCK, MEMORY = 30, 120, 3 << 30  # of a processor, of the clock; bytes, per command
ANSWERS = 250  # of one fork: what it has cached would hide what a user meets
_SHOWN = 4000  # characters of an output
_AGAIN = 3  # exit code of a fork that has answered enough


class Reached(BaseException):
  """The network would run now."""


def _reach(*_args, **_kwargs):
  raise Reached


def _prepare():
  """Import what verbs use, and end every way into a long computation."""
  from dlm_jax.bench import decode as bench_decode
  from dlm_jax.bench import limits
  from dlm_jax.cli import main as cli
  from dlm_jax.evaluate import blocks, frontier, likelihood
  from dlm_jax.experiment import dry_run
  from dlm_jax.quickstart import comparison
  from dlm_jax.text import decoder, denoiser, next_token
  from dlm_jax.train import loop

  for verb in cli.VERBS:
    importlib.import_module(f"dlm_jax.cli.{verb}")
  ends = [(denoiser, "_generate"), (decoder, "_program"), (next_token, "_write"), (loop, "start")]
  ends += [(likelihood, "ar_perplexity"), (likelihood, "elbo"), (blocks, "block_elbo")]
  ends += [(frontier, "draw_samples"), (limits, "measure"), (bench_decode, "bench_decode")]
  ends += [(dry_run, "_memory"), (comparison.Clock, "measure")]
  for module, name in ends:
    if not hasattr(module, name):
      raise SystemExit(f"{module.__name__} has no {name}; correct the list of ends")
    setattr(module, name, _reach)
  return cli


def _harm(argv) -> int:
  """Cross a bound: for the test of the bounds."""
  while argv[0] == "spin":
    pass
  if argv[0] == "fill":
    bytearray(2 * MEMORY)
  os.kill(os.getpid(), signal.SIGSEGV)
  return 0


_HARMS = ("spin", "fill", "crash")


def _size() -> int:
  """Return the bytes of memory that are mapped now."""
  with open("/proc/self/statm") as file:
    return int(file.read().split()[0]) * resource.getpagesize()


def _bound(on: bool, seconds: float = SECONDS) -> None:
  """Begin or end the bounds of one command; the system ends a process that crosses one of time."""
  signal.setitimer(signal.ITIMER_PROF, seconds if on else 0)
  signal.setitimer(signal.ITIMER_REAL, CLOCK if on else 0)
  most = _size() + MEMORY if on else resource.RLIM_INFINITY
  resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def _run(cli, argv, folder) -> dict:
  """Run a command in a folder; return its exit code and what it printed."""
  os.chdir(folder)
  streams = [os.open(f"../{name}", os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in ("out", "err")]
  for number, stream in enumerate(streams, start=1):
    os.dup2(stream, number)
  sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8")
  sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace")
  try:
    _bound(True, 1 if argv[0] in _HARMS else SECONDS)
    code = _harm(argv) if argv[0] in _HARMS else cli.main(argv)
  except SystemExit as error:  # of the parser of flags
    code = error.code
  except Reached:
    code = 0
  except BaseException:  # a traceback is what a user would see
    code = 1
    traceback.print_exc()
  finally:
    _bound(False)
  texts = []
  for stream, written in zip(streams, (sys.stdout, sys.stderr), strict=True):
    written.flush()
    size = os.lseek(stream, 0, os.SEEK_END)
    text = os.pread(stream, size, 0).decode("utf-8", "replace")
    texts.append(text if size < _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}")
    os.close(stream)
  return {"code": code, "out": texts[0], "err": texts[1]}


def _serve(cli, requests, answer) -> int:
  for _ in range(ANSWERS):
    line = requests.readline()
    if not line:
      return 0
    request = json.loads(line)
    answer(_run(cli, request["argv"], request["folder"]))
  return _AGAIN


def main() -> None:
  """Fork until the parent has no more requests."""
  requests, answers = os.fdopen(int(sys.argv[1]), "rb"), int(sys.argv[2])
  cli = _prepare()

  def answer(content):
    os.write(answers, json.dumps(content).encode() + b"\n")

  while True:
    if (fork := os.fork()) == 0:
      os._exit(_serve(cli, requests, answer))
    _, status = os.waitpid(fork, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
      return
    if code != _AGAIN:
      name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
      answer({"code": name, "out": "", "err": ""})


if __name__ == "__main__":
  main()
