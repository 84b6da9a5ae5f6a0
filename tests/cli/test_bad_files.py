# SPDX-License-Identifier: Apache-2.0
"""Files of JSON that are damaged, hostile or of another shape: one line that names the field."""

import json
import os
import pathlib
import shutil

import pytest
import tiny_runs
import tiny_sdar

from dlm_jax import json_file
from dlm_jax.cli.main import main
from dlm_jax.convert import files, tensors, torch_file
from dlm_jax.data import builder, loader, tokenizers
from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier
from dlm_jax.quickstart import comparison, distil
from dlm_jax.text import prompts
from dlm_jax.train import checkpoint

DEEP = "[" * 200_000
INFINITY = float("inf")


@pytest.fixture(scope="module")
def tiny():
  return tiny_runs.make()


@pytest.fixture(scope="module")
def denoiser(tiny, tmp_path_factory):
  folder = tmp_path_factory.mktemp("denoiser") / "network"
  return pathlib.Path(shutil.copytree(tiny.teacher / "final", folder))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
  return tiny_sdar.write(tmp_path_factory.mktemp("decoder") / "network", layers=1)


@pytest.fixture
def line(capsys):
  """Return a function that runs a command, checks that it fails in one line, and returns that."""

  def run(*arguments):
    code = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, (code, out, err)
    assert len(err) < 700, err
    return err

  return run


def _said(message, error):
  """Tell whether an error holds one of the messages between bars."""
  return any(one in error for one in message.split("|"))


def _with(content, changes):
  """Return parsed JSON with fields changed; "a.b" is a field of a field."""
  content = json.loads(json.dumps(content))
  for name, value in changes.items():
    *groups, leaf = name.split(".")
    node = content
    for group in groups:
      node = node[group]
    node[leaf] = value
  return content


# --- config.json: sizes and shapes ----------------------------------------------------------------

_DENOISER = [
  ("n_blocks", float("nan"), "NaN is no number of JSON"),
  ("n_blocks", INFINITY, "Infinity is no number of JSON"),
  ("n_blocks", 2.5, "n_blocks=2.5 is not a whole number of at least 1"),
  ("n_blocks", 10**30, "must be at most 8192"),
  ("n_blocks", 10**9, "n_blocks=1000000000 must be at most 8192"),
  ("n_blocks", 0, "n_blocks=0 must be at least 1"),
  ("n_blocks", -1, "n_blocks=-1 must be at least 1"),
  ("n_blocks", "1", "n_blocks='1' is not a whole number"),
  ("n_blocks", None, "n_blocks=None is not a whole number"),
  ("n_blocks", True, "n_blocks=True is not a whole number"),
  ("n_blocks", [1], "n_blocks=[1] is not a whole number"),
  ("n_blocks", 8192, "is missing"),
  ("hidden_dim", 10**12, "hidden_dim=1000000000000 must be at most 1048576"),
  ("hidden_dim", 1e30, "hidden_dim=1000000000000000019884624838656 must be at most"),
  ("hidden_dim", 7, "model.heads=2 must divide model.dim=7"),
  ("n_heads", 0, "n_heads=0 must be at least 1"),
  ("n_heads", {}, "n_heads={} is not a whole number"),
  ("model_length", 10**9, "model_length=1000000000 must be at most 16777216"),
  ("vocab_size", -3, "vocab_size=-3 must be at least 1"),
  ("vocab_size", 10**9, "vocab_size=1000000000 must be at most 16777216"),
  ("vocab_size", 10**6, "the tokenizer has 300 tokens|tensor"),
  ("cond_dim", 0.5, "cond_dim=0.5 is not a whole number"),
  ("mlp_ratio", "4", "mlp_ratio='4' is not a whole number"),
  ("mlp_ratio", 10**9, "mlp_ratio=1000000000 must be at most 1024"),
  ("dropout", "x", "dropout='x' is not a finite number"),
  ("dropout", 1, "dropout=1 must be in [0, 1)"),
  ("time_conditioning", 1, "time_conditioning=1 is neither true nor false"),
  ("model_type", 5, "model_type=5 is not a text"),
  ("model_type", ["mdlm"], "is not a text"),
  ("dlm_jax", None, "dlm_jax must be an object, got null"),
  ("dlm_jax", 5, "dlm_jax must be an object, got a number"),
  ("dlm_jax", [], "dlm_jax must be an object, got a list"),
  ("dlm_jax", "x", "dlm_jax must be an object, got a text"),
  ("dlm_jax.writes", ["grid"], "writes=['grid'] is not a text"),
  ("dlm_jax.writes", "blocks", "is not how this network writes"),
  ("dlm_jax.buckets", 5, "buckets=5 is not a list"),
  ("dlm_jax.buckets", ["a"], "buckets[0]='a' is not a whole number"),
  ("dlm_jax.process", 5, "process 5 is unknown; known: absorbing"),
  ("dlm_jax.process.name", ["absorbing"], "is unknown; known: absorbing"),
  ("dlm_jax.process.mask_id", 2.5, "mask_id=2.5 is not a whole number"),
  ("dlm_jax.process.mask_id", 10**9, "mask_id=1000000000 must be at most 300"),
  ("dlm_jax.process.mask_id", None, "mask_id=None is not a whole number"),
  ("dlm_jax.process.blocked", 5, "blocked=5 is not a list"),
  ("dlm_jax.process.schedule", None, "schedule must be an object, got null"),
  ("dlm_jax.process.schedule", "cosine", "schedule must be an object, got a text"),
  ("dlm_jax.process.schedule.name", ["cosine"], "is not a text"),
  ("dlm_jax.process.schedule.eps", "x", "eps='x' is not a finite number"),
  ("dlm_jax.process.schedule.eps", 2, "eps=2.0 must be in [0, 1)"),
  ("dlm_jax.process.schedule.epsilon", 0, "has no option 'epsilon'; it has eps"),
]


@pytest.mark.parametrize(("field", "value", "message"), _DENOISER)
def test_config_of_a_denoiser(line, denoiser, tmp_path, tiny, field, value, message):
  config = json.loads((tiny.teacher / "final" / "config.json").read_text())
  (denoiser / "config.json").write_text(json.dumps(_with(config, {field: value})))
  error = line("sample", f"--checkpoint={denoiser}", "--steps=1")
  assert _said(message, error)
  if field != "dlm_jax.buckets":
    assert _said(message, line("convert", f"--checkpoint={denoiser}", f"--out={tmp_path / 'out'}"))
  assert not (tmp_path / "out").exists()


_DECODER = [
  ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000 must be at most 8192"),
  ("num_hidden_layers", 1.5, "num_hidden_layers=1.5 is not a whole number"),
  ("hidden_size", INFINITY, "Infinity is no number of JSON"),
  ("rms_norm_eps", "x", "rms_norm_eps='x' is not a finite number"),
  ("rms_norm_eps", 0, "rms_norm_eps=0 must be in (0, ∞)"),
  ("rope_theta", -1, "rope_theta=-1 must be in (0, ∞)"),
  ("rope_scaling", "yarn", "rope_scaling must be an object, got a text"),
  ("rope_parameters", [1], "rope_parameters must be an object, got a list"),
  ("rope_scaling", {"rope_type": ["a"]}, "of type ['a'] are not supported"),
  ("block_size", 10**9, "block_size=1000000000 must be at most"),
  ("block_size", 0, "block_size=0 must be at least 1"),
  ("block_size", "4", "block_size='4' is not a whole number"),
  ("mask_token_id", 10**12, "mask_token_id=1000000000000 must be at most"),
  ("mask_token_id", [5], "mask_token_id=[5] is not a whole number"),
]


@pytest.mark.parametrize(("field", "value", "message"), _DECODER)
def test_config_of_a_decoder(line, decoder, field, value, message):
  kept = (decoder / "config.json").read_text()
  try:
    (decoder / "config.json").write_text(json.dumps(_with(json.loads(kept), {field: value})))
    assert message in line("sample", f"--checkpoint={decoder}", "--prompt=a", "--max_new_tokens=4")
  finally:
    (decoder / "config.json").write_text(kept)


def test_experts_that_would_take_minutes_to_list(line, decoder):
  kept = (decoder / "config.json").read_text()
  moe = {"model_type": "sdar_moe", "num_experts": 8192, "num_experts_per_tok": 1}
  moe |= {"moe_intermediate_size": 4, "norm_topk_prob": True, "num_hidden_layers": 8192}
  try:
    (decoder / "config.json").write_text(json.dumps(_with(json.loads(kept), moe)))
    assert "are more than 262144" in line("sample", f"--checkpoint={decoder}")
  finally:
    (decoder / "config.json").write_text(kept)


def test_config_of_gpt2(line, tmp_path):
  for change, message in (
    ({"n_layer": 10**9}, "n_layer=1000000000 must be at most 8192"),
    ({"n_embd": "x"}, "n_embd='x' is not a whole number"),
    ({"n_head": 0}, "n_head=0 must be at least 1"),
    ({"n_inner": [1]}, "n_inner=[1] is not a whole number"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon=0.0 must be in (0, ∞)"),
    ({"activation_function": ["a"]}, "is not a text"),
  ):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **change}))
    assert message in line("sample", f"--checkpoint={tmp_path}")


# --- what no file of JSON may be ------------------------------------------------------------------

_TEXTS = {
  "deep": (DEEP, "nested more than 100 deep"),
  "deep_objects": ('{"a":' * 150 + "1" + "}" * 150, "nested more than 100 deep"),
  "twice": ('{"model_type": "mdlm", "model_type": "gpt2"}', "'model_type' twice"),
  "nan": ('{"model_type": NaN}', "NaN is no number of JSON"),
  "latin": (b'{"caf\xe9": 1}', "can't decode byte 0xe9"),
  "long": ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
  "list": ("[1]", "an object, got a list|holds a list, not an object|is not ours|names no model"),
  "empty": ("", "Expecting value"),
}


def _write(file, text):
  file.write_bytes(text if isinstance(text, bytes) else text.encode())


def _problem(reader, *arguments):
  with pytest.raises(InputError) as caught:
    reader(*arguments)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
  return str(caught.value)


@pytest.mark.parametrize("kind", list(_TEXTS))
def test_every_reader(kind, tiny, tmp_path):
  """Each file that is read somewhere, by the function that reads it."""
  text, wanted = _TEXTS[kind]
  data = pathlib.Path(shutil.copytree(tiny.data, tmp_path / "data"))
  network = pathlib.Path(shutil.copytree(tiny.teacher / "final", tmp_path / "network"))
  readers = [
    (network / "tokenizer.json", tokenizers.load, network),
    (network / "tokenizer_config.json", tokenizers.load, network),
    (network / "model.safetensors.index.json", files.read_json, None),
    (data / "dataset.json", builder.open_dataset, data),
    (tmp_path / "config.json", checkpoint.read_config, tmp_path),
    (tmp_path / "seconds.json", comparison.Clock, None),
    (tmp_path / "done.json", distil._finished, None),
  ]
  for file, reader, argument in readers:
    _write(file, text)
    problem = _problem(reader, file if argument is None else argument)
    assert _said(wanted, problem) or "lacks" in problem, (file, problem)
    original = tiny.teacher / "final" / file.name
    if file.parent == network:
      shutil.copy(original, file) if original.exists() else file.unlink()
  if kind != "list":
    data = pathlib.Path(shutil.copytree(tiny.data, tmp_path / "again"))
    features = data / "packed_tokens" / "1.0.0" / "features.json"
    content = json.loads((data / "dataset.json").read_text())
    _write(features, text)
    content["files"]["packed_tokens/1.0.0/features.json"] = features.stat().st_size
    (data / "dataset.json").write_text(json.dumps(content))
    assert "cannot be opened by TFDS" in _problem(builder.open_dataset, data)


def test_a_mark_and_equal_doubles_are_no_obstacle(tmp_path):
  file = tmp_path / "a.json"
  file.write_text('\ufeff{"a": 1, "a": 1, "b": 1.5}', encoding="utf-8")
  assert json_file.read(file) == {"a": 1, "b": 1.5}
  assert json_file.parse("[" * 100 + "]" * 100)
  assert json_file.parse("[NaN]", finite=False)[0] != 0


def test_a_pipe_does_not_hang(line, denoiser, tmp_path):
  network = pathlib.Path(shutil.copytree(denoiser, tmp_path / "network"))
  (network / "config.json").unlink()
  os.mkfifo(network / "config.json")
  assert "a pipe or a device" in line("sample", f"--checkpoint={network}")
  (network / "config.json").unlink()
  (network / "config.json").mkdir()
  assert "a directory" in line("sample", f"--checkpoint={network}")


@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path, what):
  """A pipe that nobody writes to would wait for ever, a device has no end."""
  file = tmp_path / "file"
  if what == "device":
    file.symlink_to("/dev/zero")
  else:
    os.mkfifo(file) if what == "pipe" else file.mkdir()
  said = "directory" if what == "folder" else "a pipe or a device, not a file"
  assert said in _problem(lambda: tensors.Tensors([file]))
  assert said in _problem(torch_file.read, file)
  assert said in _problem(frontier._Finished, file)
  said = {"pipe": "nobody writes to", "device": "more than 67108864 bytes"}.get(what, "directory")
  assert said in _problem(prompts.read_text, str(file), "--prompt=@file")
  assert said in _problem(prompts.read_messages, str(file), "--messages=file")


def test_a_pipe_of_a_shell_is_read():
  ours, theirs = os.pipe()
  os.write(theirs, "\ufeffa\r\nb".encode())
  os.close(theirs)
  assert prompts.read_text(f"/dev/fd/{ours}", "--prompt=@…") == "a\nb"
  os.close(ours)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"vocab_size": "x"}, "vocab_size='x' is not a whole number"),
    ({"vocab_size": None}, "vocab_size=None is not a whole number"),
    ({"source": 3}, "source must be an object, got a number"),
    ({"files": 5}, "files must be an object, got a number"),
    ({"files": {"tokenizer.json": "x"}}, "tokenizer.json='x' is not a whole number"),
    ({"splits": []}, "splits must be an object, got a list"),
    ({"splits.train": 5}, "splits.train must be an object, got a number"),
    ({"splits.train.records": 1.5}, "records=1.5 is not a whole number"),
    ({"buckets": 5}, "buckets=5 is not a list"),
    ({"wrap": "yes"}, "wrap='yes' is neither true nor false"),
    ({"given_ids": 5}, "unknown field 'given_ids'"),
    ({"format": ["a"]}, "its format is not"),
    ({"length": -16}, "length=-16 must be at least 1"),
    ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
    ({"eos_id": 300}, "eos_id=300 must be at most 299"),
    ({"pad_id": -1}, "pad_id=-1 must be at least 0"),
    ({"packing": "docs"}, "packing='docs' is unknown; use one of concatenate"),
    ({"buckets": [0]}, "buckets[0]=0 must be at least 1"),
    ({"block_length": -4}, "block_length=-4 must be at least 0"),
    ({"features": ["x"]}, "features[0]='x' is unknown; use one of tokens"),
    ({"splits.train.records": -1}, "splits.train.records=-1 must be at least 0"),
    ({"packing": 5}, "packing=5 is not a text"),
  ],
)
def test_dataset_json(tiny, tmp_path, changes, message):
  data = pathlib.Path(shutil.copytree(tiny.data, tmp_path / "data"))
  content = json.loads((data / "dataset.json").read_text())
  (data / "dataset.json").write_text(json.dumps(_with(content, changes)))
  assert message in _problem(builder.open_dataset, data)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"length": 16000}, "a record holds 16 tokens where dataset.json says 16000"),
    ({"length": 8}, "a record holds 16 tokens where dataset.json says 8"),
    ({"features": ["tokens", "valid"]}, "records hold 'valid', and record 0 does not"),
  ],
)
def test_dataset_json_of_other_records(tiny, tmp_path, changes, message):
  data = pathlib.Path(shutil.copytree(tiny.data, tmp_path / "data"))
  content = json.loads((data / "dataset.json").read_text())
  (data / "dataset.json").write_text(json.dumps(_with(content, changes)))
  assert message in _problem(loader.evaluation_groups, data, "validation", 2)


@pytest.mark.parametrize(
  ("file", "change", "message"),
  [
    ("tokenizer.json", {"added_tokens": 5}, "added_tokens=5 is not a list"),
    ("tokenizer.json", {"added_tokens": ["a"]}, "added_tokens[0] must be an object, got a text"),
    ("tokenizer.json", {"added_tokens": [{}]}, "added_tokens[0] lacks 'content'"),
    ("tokenizer.json", {"model": None}, "missing from the vocabulary"),
    ("tokenizer_config.json", {"added_tokens_decoder": []}, "must be an object, got a list"),
    (
      "tokenizer_config.json",
      {"added_tokens_decoder": {"1": "a"}},
      "must be an object, got a text",
    ),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, "lacks 'content'"),
    ("tokenizer_config.json", {"eos_token": 5}, "eos_token=5 is not a text or an object"),
  ],
)
def test_tokenizer_files(tiny, tmp_path, file, change, message):
  folder = pathlib.Path(shutil.copytree(tiny.teacher / "final", tmp_path / "network"))
  content = json.loads((folder / file).read_text())
  (folder / file).write_text(json.dumps({**content, **change}))
  assert _said(message, _problem(tokenizers.load, folder))


def test_vocabulary_of_texts(tmp_path):
  (tmp_path / "vocab.json").write_text('{"a": "x", "<|endoftext|>": 1}')
  (tmp_path / "merges.txt").write_text("#version\n")
  assert "a='x' is not a whole number" in _problem(tokenizers.load, tmp_path)


def test_lines_of_a_corpus(line, tmp_path):
  config = tmp_path / "config.py"
  config.write_text(
    "from dlm_jax.configs.base import base\n\n\ndef get_config():\n  return base()\n"
  )
  for text, message in (
    ('{"text": "a"}\n' + DEEP, "corpus.jsonl:2 is not JSON: it is nested more than"),
    ('{"text": "a", "text": "b"}', "corpus.jsonl:1 is not JSON: it has the field 'text' twice"),
    ('{"text": ' + "9" * 5000 + "}", "corpus.jsonl:1 is not JSON"),
    ('{"text": 5}', "corpus.jsonl:1 has no text in field 'text'"),
  ):
    (tmp_path / "corpus.jsonl").write_text(text)
    error = line(
      "prepare",
      f"--config={config}",
      f"--config.data.source=files:{tmp_path}/corpus.jsonl",
      "--config.data.tokenizer=bytes",
      f"--config.data.directory={tmp_path / 'out'}",
    )
    assert message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [DEEP, "5", "[1]", '{"name": "a"}', "null"])
def test_lines_of_a_frontier(tmp_path, text):
  (tmp_path / "frontier.jsonl").write_text(f"{text}\n{{}}\n")
  assert "line 1 of" in _problem(frontier._Finished, tmp_path / "frontier.jsonl")


def test_parts_of_a_quick_start(tmp_path):
  for name, reader, content, message in (
    ("seconds.json", comparison.Clock, {"data": "x"}, "it.data='x' is not a finite number"),
    ("seconds.json", comparison.Clock, {"data": -1}, "must be in [0, ∞)"),
    ("done.json", distil._finished, {"config": 5, "reason": "x"}, "config must be an object"),
    ("done.json", distil._finished, {"config": {}}, "lacks 'reason'"),
  ):
    (tmp_path / name).write_text(json.dumps(content))
    assert message in _problem(reader, tmp_path / name)
