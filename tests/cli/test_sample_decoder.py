# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax sample` with decoders of blocks: what is printed where, and what is refused."""

import json
import re
import shutil

import pytest
import tiny_runs
import tiny_sdar

from dlm_jax.cli import sample as cli
from dlm_jax.cli.main import main
from dlm_jax.text import load
from dlm_jax.text.decoder import TextDecoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sdar")
  tiny_sdar.write(folder / "target", layers=1)
  tiny_sdar.write(folder / "draft", layers=1, noise=0.1)
  return folder


@pytest.fixture
def run(capsys, folder):
  def run(*arguments, checkpoint=folder / "target"):
    code = main(["sample", f"--checkpoint={checkpoint}", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err.splitlines()

  return run


FEW = ("--max_new_tokens=6", "--stop=none")


@pytest.mark.slow
def test_text_goes_to_stdout_and_the_rest_to_stderr(run, folder):
  out, err = run("--prompt=It was", *FEW)
  texts = load.open_decoder(folder / "target").generate("It was", max_new_tokens=6, stop=()).texts
  assert out == texts[0] + "\n"
  assert err[0] == "no draft: exact, the network's own decode" and len(err) == 2
  assert err[1].startswith("6 tokens in ") and err[1].endswith(" target passes per token")


@pytest.mark.slow
def test_streaming_prints_the_same(run):
  """Two prompts, so that pieces of the second wait for the first."""
  prompts = ("--prompt=It was", "--prompt=a", *FEW)
  plain, _ = run(*prompts)
  streamed, _ = run(*prompts, "--stream")
  assert streamed == plain and plain.startswith("──── 1 ────\n") and "\n──── 2 ────\n" in plain


@pytest.mark.slow
def test_a_page_shows_how_blocks_were_written(run, tmp_path):
  page = tmp_path / "page.html"
  plain, _ = run("--prompt=It was", *FEW)
  out, err = run("--prompt=It was", *FEW, f"--html={page}")
  assert out == plain and f"page: {page}" in err
  frames = re.findall(r'<pre title="([^"]*)"', page.read_text())
  known, total = zip(
    *(map(int, re.findall(r"(\d+) of (\d+) tokens", f)[0]) for f in frames), strict=True
  )
  assert known == tuple(sorted(set(known))), "every moment sets something"
  assert known[0] == 0 and {known[-1]} == set(total) and len(frames) > 2


def test_pieces_of_later_prompts_wait(capsys):
  live = cli._Live(2)
  live(1, "late", False)
  live(0, "ear", False)
  assert capsys.readouterr().out == "──── 1 ────\near"
  live(0, "ly", True)
  assert capsys.readouterr().out == "ly\n──── 2 ────\nlate"
  live(1, "r", True)
  assert capsys.readouterr().out == "r\n"


@pytest.mark.slow
def test_drafts_say_whether_they_are_exact(run, folder):
  plain, _ = run("--prompt=It was", *FEW)
  out, err = run("--prompt=It was", *FEW, f"--draft={folder / 'draft'}")
  assert out == plain and err[0].startswith("verify=stacked: exact")
  assert " target and " in err[1] and err[1].endswith(" draft passes per token")
  simsd = ("--verify=simsd", "--layout=published", f"--draft={folder / 'draft'}")
  _, err = run("--prompt=It was", *FEW, *simsd)
  assert err[0].startswith("verify=simsd, layout=published: not exact")


def test_flags_reach_the_request(folder, monkeypatch, tmp_path, capsys):
  seen = {}

  def plan(self, prompts, **request):
    seen.update(request, prompts=prompts)
    raise KeyboardInterrupt

  monkeypatch.setattr(TextDecoder, "plan", plan)
  (tmp_path / "ask.txt").write_text("from a file", encoding="utf-8")
  main(
    [
      "sample",
      f"--checkpoint={folder / 'target'}",
      f"--prompt=@{tmp_path / 'ask.txt'}",
      "--prompt=text",
      "--chat",
      "--block_length=4",
      "--steps=2",
      "--strategy=sequential",
      "--confidence=untempered",
      "--threshold=0.5",
      "--temperature=0.7",
      "--top_k=0",
      "--top_p=0.9",
      "--max_new_tokens=7",
      "--stop=<|im_end|>",
      "--stop=5",
      "--verify=none",
      "--seed=0",
    ]
  )
  assert seen == {
    "prompts": ["from a file", "text"],
    "chat": True,
    "block_length": 4,
    "steps": 2,
    "strategy": "sequential",
    "confidence": "untempered",
    "threshold": 0.5,
    "temperature": 0.7,
    "top_k": 0,
    "top_p": 0.9,
    "max_new_tokens": 7,
    "stop": ["<|im_end|>", 5],
    "verify": "none",
  }


def test_conversations_reach_the_request(folder, monkeypatch, tmp_path):
  """Of a file, with tools; thoughts switched off; a text in quotes; the system from a file."""
  seen = {}

  def plan(self, prompts, **request):
    seen.update(request, prompts=prompts)
    raise KeyboardInterrupt

  monkeypatch.setattr(TextDecoder, "plan", plan)
  talk = [{"role": "user", "content": "é"}]
  (tmp_path / "talk.json").write_text(json.dumps({"messages": talk, "tools": [{}]}))
  (tmp_path / "kind.txt").write_bytes(b"\xef\xbb\xbfBe kind.")
  checkpoint = f"--checkpoint={folder / 'target'}"
  asked = [f"--messages={tmp_path / 'talk.json'}", f"--system=@{tmp_path / 'kind.txt'}"]
  main(
    ["sample", checkpoint, *asked, "--no_thinking", '--stop="1"', '--stop="\\n"', "--stop=two s"]
  )
  assert seen == {
    "prompts": [talk],
    "tools": [{}],
    "system": "Be kind.",
    "thinking": False,
    "stop": ["1", "\n", "two s"],
  }
  seen.clear()
  main(["sample", checkpoint, "--prompt=a", "--chat", "--thinking"])
  assert seen == {"prompts": ["a"], "chat": True, "thinking": True}


@pytest.mark.slow
def test_json(run):
  out, _ = run("--prompt=It was", "--prompt=", *FEW, "--json")
  assert len([json.loads(line) for line in out.splitlines()]) == 2


# --- refused --------------------------------------------------------------------------------------


@pytest.fixture
def fails(capsys, monkeypatch):
  """Return a function that checks how a command fails: before any weights are read."""

  def run(checkpoint, *arguments, weights=False):
    if not weights:
      monkeypatch.setattr(TextDecoder, "loaded", property(lambda _: pytest.fail("read")))
    assert main(["sample", f"--checkpoint={checkpoint}", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dlm-jax sample: ") and err.count("\n") == 1, err
    return err

  return run


_FLAGS = [
  (["--block_length=8"], "was trained with 4"),
  ([f"--prompt={'a' * 300}"], "cache of 256 positions"),
  (["--stop=300"], "stop=300 is no token"),
  (["--stop=a<|im_end|>"], "give the two as two stops"),
  (['--stop=""'], "stop='' ends every text"),
  (['--stop="\\x"'], "is no text in quotes"),
  (["--prompt=a <|MASK|> b"], "contains the mask"),
  (["--verify=simsd"], "--verify=simsd needs --draft"),
  (["--layout=unified"], "layout='unified' is of verify='simsd'"),
  (["--draft=/nowhere"], "/nowhere holds no network"),
  (["--num=2"], "--num does not apply"),
  (["--sampler=psi"], "--sampler does not apply"),
  (["--prompt=@/nowhere.txt"], "cannot be read: No such file"),
  (["--messages=/nowhere.json"], "cannot be read: No such file"),
  (["--messages=/dev/null"], "is not JSON"),
  (["--messages=a.json", "--prompt=b"], "holds whole conversations; leave --prompt and --chat out"),
  (["--thinking", "--no_thinking"], "both --thinking and --no_thinking given"),
  (["--system=a", "--prompt=b"], "system is for conversations, and prompt 1 is none"),
  (["--no_thinking", "--prompt=b"], "thinking is for conversations"),
  (["--prompt=\udcff"], "prompt 1 holds the byte 0xff at character 1, which is not UTF-8"),
  (["--temperature=nan"], "'nan' is not a finite number"),
  (["--threshold=nan"], "'nan' is not a finite number"),
  (["--seed=9223372036854775808"], "seed=9223372036854775808 must be at most 9223372036854775807"),
  (["--temperature=-1"], "temperature=-1.0 must be 0 or more"),
  (["--top_p=0"], "top_p=0.0"),
  (["--confidence=untempred"], "did you mean 'untempered'"),
  (["--strategy=low_confidence_statik"], "did you mean 'low_confidence_static'"),
]


@pytest.mark.parametrize("arguments, message", _FLAGS)
def test_flags(fails, folder, arguments, message):
  assert message in fails(folder / "target", *arguments)


@pytest.mark.slow
def test_drafts_of_other_kinds(fails, folder, tmp_path):
  teacher = tiny_runs.make().teacher
  line = fails(folder / "target", f"--draft={teacher}")
  assert "the draft" in line and "is a mdlm network, which does not decode blocks" in line
  assert "--draft does not apply" in fails(teacher, f"--draft={folder / 'draft'}")
  assert "--chat does not apply" in fails(teacher, "--chat")
  assert "several --prompt" in fails(teacher, "--prompt=a", "--prompt=b")
  other = tiny_sdar.write(tmp_path / "other", layers=1, vocab_size=300)
  assert "vocabulary of 300; the target's has 272" in fails(folder / "target", f"--draft={other}")
  shutil.copytree(folder / "draft", tmp_path / "words")
  config = json.loads((tmp_path / "words" / "vocab.json").read_text())
  config["a"], config["b"] = config["b"], config["a"]
  (tmp_path / "words" / "vocab.json").write_text(json.dumps(config))
  line = fails(folder / "target", f"--draft={tmp_path / 'words'}")
  assert "has another tokenizer than the target" in line


def test_masks_and_block_lengths_that_are_not_named(fails, tmp_path):
  plain = tiny_sdar.write(tmp_path / "plain", layers=1, mask=False)
  assert "without a mask token" in fails(plain)
  nameless = tiny_sdar.write(tmp_path / "nameless", layers=1, block_length=None)
  assert "does not say its block length" in fails(nameless)
  config = json.loads((nameless / "config.json").read_text())
  (nameless / "config.json").write_text(json.dumps({**config, "mask_token_id": None}))
  words = json.loads((nameless / "tokenizer_config.json").read_text())
  words["added_tokens_decoder"].pop(str(tiny_sdar.MASK))
  (nameless / "tokenizer_config.json").write_text(json.dumps(words))
  assert "names no mask" in fails(nameless)


@pytest.mark.slow
def test_a_corrupt_shard(fails, tmp_path):
  broken = tiny_sdar.write(tmp_path / "broken", layers=1, saved={"shard_bytes": 20_000})
  shard = max(broken.glob("model-00002-of-*.safetensors"))
  shard.write_bytes(shard.read_bytes()[:-100])
  line = fails(broken, weights=True)
  assert f"{shard} cannot be read" in line and "fetch it again" in line
  shard.unlink()
  assert "is missing; fetch the checkpoint again" in fails(broken, weights=True)
