# SPDX-License-Identifier: Apache-2.0
"""Two processes act as hosts: slices, an interruption that one of them sees, resume, export."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file

from dlm_jax.experiment.run import train

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPT = ROOT / "launch" / "local_multihost.sh"
# Parameters are split over the hosts; Adam's ε hides no rounding of tiny gradients.
RUN = {"mesh__data": "-1", "mesh__fsdp": "4", "optim__eps": "1e-2", "evaluate__every": "6"}


def _free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
  """Return (workdir, what each host saw, what they printed) of two hosts with two devices each."""
  folder = tmp_path_factory.mktemp("hosts")
  command = folder / "bin" / "dlm-jax"
  command.parent.mkdir()
  program = pathlib.Path(__file__).with_name("one_host.py")
  command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n')
  command.chmod(0o755)
  environment = tiny_runs.environment(devices=2) | {
    "PATH": f"{command.parent}:{os.environ['PATH']}",
    "PORT": _free_port(),
    "SEEN": str(folder),
  }
  workdir = folder / "run"
  flags = tiny_runs.make().flags("teacher", **RUN)
  answer = subprocess.run(
    ["bash", SCRIPT, "2", "train", *flags, f"--workdir={workdir}"],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=240,
    check=False,
  )
  assert answer.returncode == 0, answer.stdout
  seen = [json.loads((folder / f"{host}.json").read_text()) for host in range(2)]
  return workdir, seen, answer.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """Return (workdir, rows read) of the same run by one process without an interruption."""
  workdir, rows = tmp_path_factory.mktemp("alone"), []
  with pytest.MonkeyPatch.context() as patch:
    from dlm_jax.data import loader

    following = loader.Loader.__next__
    patch.setattr(loader.Loader, "__next__", lambda s: rows.append(following(s)) or rows[-1])
    train(tiny_runs.make().config("teacher", **RUN), workdir)
  return workdir, [record["tokens"] for record in rows]


@pytest.mark.slow
def test_each_host_reads_its_slice(hosts, alone):
  _, seen, _ = hosts
  assert [host["slices"] for host in seen] == [[[0, 2]] * 2, [[1, 2]] * 2]
  assert [host["hosts"] for host in seen] == [2, 2]
  together = [np.concatenate(rows) for rows in zip(*(h["rows"] for h in seen), strict=True)]
  np.testing.assert_array_equal(together, alone[1])


@pytest.mark.slow
def test_a_signal_to_one_host_stops_all(hosts):
  _, seen, text = hosts
  assert text.count("interrupted at step 3; run the same command to resume.") == 2
  assert text.count("finished at step 6") == 2 and "Traceback" not in text
  assert [host["any"] for host in seen] == [[True, True, False]] * 2
  assert [host["first"] for host in seen] == [[7, 0]] * 2


@pytest.mark.slow
def test_hosts_change_nothing(hosts, alone):
  """Metrics and the exported network, gathered from both hosts, are those of one process."""
  ours, theirs = (tiny_runs.metrics(workdir) for workdir in (hosts[0], alone[0]))
  assert [row["step"] for row in ours] == list(range(1, 7))
  for row, wanted in zip(ours, theirs, strict=True):
    assert row.keys() == wanted.keys()
    for name, value in wanted.items():
      np.testing.assert_allclose(row[name], value, rtol=1e-3, err_msg=f"{row['step']}: {name}")
  ours, theirs = (load_file(path / "final" / "model.safetensors") for path in (hosts[0], alone[0]))
  assert ours.keys() == theirs.keys()
  for name, wanted in theirs.items():
    np.testing.assert_allclose(ours[name], wanted, rtol=1e-3, atol=1e-4, err_msg=name)
