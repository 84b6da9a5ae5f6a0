# SPDX-License-Identifier: Apache-2.0
"""Values of flags, options, fields and config files: told in one line, before anything is done."""

import importlib.util

import pytest
import tiny_runs

from dlm_jax.cli.main import main

BIG, HUGE = str(10**9), str(10**30)


@pytest.fixture(scope="module")
def tiny():
  return tiny_runs.make()


@pytest.fixture
def fails(capsys):
  """Return a function that runs a command, checks that it fails in one line, and returns that."""

  def run(verb, *arguments):
    try:
      code = main([verb, *map(str, arguments)])
    except SystemExit as end:  # the flag parser
      code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, (code, out, err)
    assert err.startswith("dlm-jax"), err
    return err

  return run


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--option=temperature=nan", "temperature='nan' is not a finite number"),
    ("--option=temperature=1e999", "temperature=inf is not a finite number"),
    ("--option=nucleus=x", "nucleus='x' is not a finite number"),
    ("--option=nucleus=2", "nucleus=2 in (0, 1]|nucleus=2.0 in (0, 1]"),
    ("--option=grid=5", "grid=5 is not a text"),
    ("--option=noise_removal=5", "--option noise_removal=…: write --noise_removal"),
    ("--option=batch=3", "batch is no option of a model with its tokenizer; ask for num texts"),
    ("--option=frozen=(1,)", "frozen is no option"),
    ("--option=steps=2", "--option steps=…: write --steps"),
    ("--option=prompt=5", "--option prompt=…: write --prompt"),
    ("--option=seed=1", "--option seed=…: write --seed"),
    ("--option=return_trace=1", "--option return_trace=…"),
    ("--option=kappa=0.5", "has no option 'kappa'"),
    ("--option=x={[]: 1}", "has no option 'x'"),
    ("--option=x=" + "(" * 3000, "has no option 'x'"),
    ("--temperature=nan", "'nan' is not a finite number"),
    ("--temperature=inf", "'inf' is not a finite number"),
    ("--nucleus=nan", "'nan' is not a finite number"),
    ("--seed=" + str(2**63), "must be at most 9223372036854775807"),
    ("--seed=" + str(2**70), "must be at most 9223372036854775807"),
    ("--seed=1.5", "--seed"),
    ("--num=" + BIG, "GiB at least"),
    ("--num=" + HUGE, f"num={HUGE} must be at most 2147483647"),
    ("--steps=" + BIG, "GiB at least|the most that one call keeps"),
    ("--steps=" + HUGE, f"steps={HUGE} must be at most"),
    ("--length=" + BIG, "GiB at least"),
    ("--length=" + HUGE, f"length={HUGE} must be at most"),
    ("--prompt=a\udcff", "the byte 0xff at character 2, which is not UTF-8"),
  ],
)
def test_sample(fails, tiny, flag, message):
  error = fails("sample", f"--checkpoint={tiny.teacher}", flag)
  assert any(one in error for one in message.split("|")), error


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ("kappa=(1, 2)", "kappa=(1, 2) is not a finite number or a text"),
    ("kappa=nan", "kappa='nan' is unknown"),
    ("kappa=1e999", "kappa=inf is not a finite number or a text"),
    ("kappa=2", "kappa=2.0 must be in [0, 1]"),
    ("eta=nan", "eta='nan' is not a finite number"),
    ("eta=-1", "eta=-1.0 must be in [0, 1]"),
    ("window=5", "window=5 is not a list of 2"),
    ("window=(0.5, 'x')", "window[1]='x' is not a finite number"),
    ("hold=none", "hold=None is not a finite number"),
  ],
)
def test_options_of_psi(fails, tiny, option, message):
  arguments = (f"--checkpoint={tiny.teacher}", "--sampler=psi", f"--option={option}")
  assert message in fails("sample", *arguments)


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--temperature=nan", "'nan' is not a finite number"),
    ("--num=1000000000000", "num=1000000000000 must be at most 2147483647"),
    ("--num=" + BIG, "GiB at least"),
    ("--seed=" + str(2**64), "must be at most 9223372036854775807"),
    ("--prompt=\udcff", "the byte 0xff at character 1"),
    ("--top_k=-1", "top_k=-1"),
  ],
)
def test_sample_of_a_judge(fails, tiny, flag, message):
  assert message in fails("sample", f"--checkpoint={tiny.judge}", flag)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tiny, tmp_path, capsys):
  (tmp_path / "with.txt").write_text("\ufeffdef ", encoding="utf-8")
  (tmp_path / "without.txt").write_text("def ", encoding="utf-8")
  texts = []
  for name in ("with", "without"):
    flags = (f"--checkpoint={tiny.teacher}", f"--prompt=@{tmp_path / name}.txt", "--steps=1")
    assert main(["sample", *flags, "--json"]) == 0
    texts.append(capsys.readouterr().out)
  assert texts[0] == texts[1] and "def " in texts[0]


# --- fields of a config ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("process.eps", "2.0", "process.eps=2.0 must be in [0, 1)"),
    ("process.eps", "1", "process.eps=1.0 must be in [0, 1)"),
    ("process.eps", "-1", "process.eps=-1.0 must be in [0, 1)"),
    ("process.eps", "1e999", "process.eps=inf is not a finite number"),
    ("process.mask_id", HUGE, "process.mask_id="),
    ("optim.b1", "2.0", "optim.b1=2.0 must be in [0, 1)"),
    ("optim.b2", "1.0", "optim.b2=1.0 must be in [0, 1)"),
    ("optim.eps", "-1.0", "optim.eps=-1.0 must be in (0, ∞)"),
    ("optim.final", "-1.0", "optim.final=-1.0 must be in [0, 1]"),
    ("optim.lr", "1e999", "optim.lr=inf is not a finite number"),
    ("objective.ema_decay", "1e999", "objective.ema_decay=inf is not a finite number"),
    ("optim.lr", "nan", "expected float"),
    ("optim.lr", "0", "optim.lr=0.0 must be in (0, ∞)"),
    ("optim.clip", "-1", "optim.clip=-1.0 must be in [0, ∞)"),
    ("optim.warmup", "-1", "optim.warmup=-1 must be at least 0"),
    ("optim.warmup", str(2**40), "optim.warmup=1099511627776 must be at most 2147483647"),
    ("train.max_seconds", "-1.0", "train.max_seconds=-1.0 must be in [0, ∞)"),
    ("train.steps", HUGE, f"train.steps={HUGE} must be at most"),
    ("train.steps", "2.0", "expected int"),
    ("seed", str(2**63), "seed=9223372036854775808 must be at most 9223372036854775807"),
    ("seed", str(-(2**63) - 1), "must be at least -9223372036854775808"),
    ("data.length", HUGE, f"data.length={HUGE} must be at most 2147483647"),
    ("data.length", BIG, "data.length=1000000000 must be at most 16777216"),
    ("data.block_length", "-1", "data.block_length=-1 must be at least 0"),
    ("data.buckets", "(8, 'x')", "data.buckets[1]='x' is not a whole number"),
    ("data.tokenizer", "bpe:²", "write bpe:SIZE"),
    ("data.tokenizer", "bpe:" + "9" * 5000, "a BPE has at most 1048576 tokens"),
    ("data.tokenizer", "bpe:999999999", "a BPE has at most 1048576 tokens"),
    ("model.dim", BIG, "model.dim=1000000000 must be at most 1048576"),
    ("model.dim", str(2**20), "GiB at least"),
    ("model.layers", BIG, "model.layers=1000000000 must be at most 8192"),
    ("model.vocab_size", BIG, "model.vocab_size=1000000000"),
    ("model.dropout", "1", "model.dropout=1.0 must be in [0, 1)"),
    ("loader.batch_size", BIG, "loader.batch_size=1000000000 × data.length=16 are more than"),
    ("loader.batch_size", HUGE, "must be at most 2147483647"),
    ("loader.batch_size", "128000000", "GiB at least"),
    ("evaluate.noise_removal", "foo", "evaluate.noise_removal='foo' is unknown; use one of"),
    ("evaluate.batch_size", BIG, "evaluate.batch_size=1000000000 × data.length=16 are more"),
    ("evaluate.nfes", "(4, 'x')", "evaluate.nfes[1]='x' is not a whole number"),
    ("evaluate.nfes", "2.5", "evaluate.nfes[0]=2.5 is not a whole number"),
    ("evaluate.measure", "5", "evaluate.measure[0]=5 is not a text"),
    ("evaluate.every", "-1", "evaluate.every=-1 must be at least 0"),
    ("objective.name", "os.path", "'os.path' is no training method: it has no make and TRAINED"),
    ("objective.name", ".x", "objective.name='.x' cannot be imported"),
    ("objective.name", "a..b", "objective.name='a..b' cannot be imported"),
    ("objective.ema_decay", "2.0", "objective.ema_decay=2.0 must be in [0, 1)"),
    ("objective.accumulate", HUGE, "objective.accumulate="),
    ("mesh.data", HUGE, "does not fit 8 device(s)|mesh.data="),
  ],
)
def test_field(fails, tiny, tmp_path, field, value, message):
  changes = {field.replace(".", "__"): value, "evaluate__every": "1"} | (
    {"evaluate__every": value} if field == "evaluate.every" else {}
  )
  if field == "model.dim":  # the widest network takes its own teacher
    changes["teacher__path"] = ""
  error = fails("train", *tiny.flags("idlm", **changes), f"--workdir={tmp_path / 'run'}")
  assert any(one in error for one in message.split("|")), error
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("source", "option", "message"),
  [
    ("files", "validation_fraction=half", "validation_fraction='half' is not a finite number"),
    ("files", "validation_fraction=nan", "validation_fraction='nan' is not a finite number"),
    ("files", "validation_fraction=1e999", "validation_fraction=inf is not a finite number"),
    ("files", "validation_fraction=1", "validation_fraction=1.0 is outside (0, 1)"),
    ("files", "document_separator=5", "document_separator=5 is not a text"),
    ("files", "validation=5", "validation=5 is not a text"),
    ("files", "field=(1,)", "field=(1,) is not a text"),
    ("files", "items=1", "has no option items|data.options.items"),
    ("stdlib", "root=5", "root=5 is not a text"),
    ("stdlib", "tests=5", "tests=5 is neither true nor false"),
    ("fasta", "min_length=x", "min_length='x' is not a whole number"),
    ("fasta", "max_length=1.5", "max_length=1.5 is not a whole number"),
    ("chat", "prompt=5", "prompt=5 is not a text"),
    ("tfds", "data_dir=5", "data_dir=5 is not a text"),
  ],
)
def test_option_of_a_corpus(fails, tmp_path, source, option, message):
  (tmp_path / "a.txt").write_text("text " * 400)
  spec = {"stdlib": "stdlib", "tfds": "tfds:a/b:c"}.get(source, f"{source}:{tmp_path}/a.txt")
  (tmp_path / "config.py").write_text("from dlm_jax.configs.base import base as get_config\n")
  error = fails(
    "prepare",
    f"--config={tmp_path / 'config.py'}",
    f"--config.data.source={spec}",
    "--config.data.tokenizer=bytes",
    f"--config.data.directory={tmp_path / 'out'}",
    f"--config.data.options.{option}",
  )
  assert any(one in error for one in message.split("|")), error
  assert not (tmp_path / "out").exists()


# --- config files ---------------------------------------------------------------------------------

_BASE = "from dlm_jax.configs.base import base\n"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(:\n", ":1: SyntaxError: "),
    ("import nothing_of_the_kind\n", ":1: ModuleNotFoundError: No module named"),
    ("x = 1\nraise RuntimeError('two\\nlines')\n", ":2: RuntimeError: two lines"),
    ("import sys\nsys.exit('no')\n", ":2: SystemExit: no"),
    ("def get_config():\n  return None\n", "get_config() returned NoneType"),
    ("def get_config():\n  return 1 / 0\n", ":2: ZeroDivisionError: division by zero"),
    ("def get_config():\n  exit(3)\n", ":2: SystemExit: 3"),
    ("get_config = 5\n", "defines no get_config()"),
    ("", "defines no get_config()"),
    ("x = 1\0\n", "null bytes"),
    (_BASE + "def get_config():\n  c = base()\n  c.train.steps = 'x'\n", ":4: TypeError: "),
    (_BASE + "def get_config():\n  c = base()\n  c.tran = 1\n  return c\n", "no group 'tran'"),
    (
      _BASE + "def get_config():\n  c = base()\n  del c.train\n  c.train = 5\n  return c\n",
      "the field 'train.checkpoint_every' is missing",
    ),
    (
      _BASE + "def get_config():\n  c = base()\n  del c.train.steps\n  c.train.steps = 'x'\n"
      "  return c\n",
      "train.steps='x' is not a whole number",
    ),
    (
      _BASE + "def get_config():\n  c = base()\n  c.optim.lr = float('nan')\n  return c\n",
      "optim.lr=nan is not a finite number",
    ),
    (
      _BASE + "def get_config():\n  c = base()\n  c.data.length = 10**30\n  return c\n",
      f"data.length={HUGE} must be at most",
    ),
  ],
)
def test_config_file(fails, tmp_path, text, message):
  (tmp_path / "mine.py").write_text(text)
  error = fails("train", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}")
  assert message in error
  assert not (tmp_path / "run").exists()


def test_module_that_raises(fails, tiny, tmp_path, monkeypatch):
  (tmp_path / "broken").mkdir()
  (tmp_path / "broken" / "method.py").write_text("1 / 0\n")
  monkeypatch.syspath_prepend(tmp_path)
  flags = tiny.flags("teacher", objective__name="broken.method")
  error = fails("train", *flags, f"--workdir={tmp_path / 'run'}")
  assert "'broken.method' cannot be imported: ZeroDivisionError: division by zero." in error


# --- other verbs ----------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="it is installed")
def test_wandb_that_is_not_installed(fails, tiny, tmp_path):
  flags = (*tiny.flags("teacher"), "--wandb_project=x", f"--workdir={tmp_path / 'run'}")
  assert "needs the package wandb" in fails("train", *flags)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    (f"--config.seed={-(2**63) - 1}", "must be at least -9223372036854775808"),
    (f"--config.seed={2**64}", "must be at most 9223372036854775807"),
    ("--config.model.dim=7", "model.heads"),
    ("--config.loader.batch_size=0", "loader.batch_size=0"),
    ("--config.evaluate.noise_removal=foo", "evaluate.noise_removal='foo' is unknown"),
    (f"--samples={HUGE}", f"samples={HUGE} must be at most"),
    (f"--nfes={HUGE}", "the largest NFE"),
  ],
)
def test_quickstart(fails, tmp_path, flag, message):
  assert message in fails("quickstart", f"--workdir={tmp_path / 'run'}", flag)
  assert not (tmp_path / "run").exists()


def test_frontier(fails, tiny, tmp_path):
  rest = (f"--judge={tiny.judge}", f"--workdir={tmp_path / 'run'}")
  model = f"--model=t={tiny.teacher}"
  for option, message in (
    ("steps=3", "steps is no option here"),
    ("batch=3", "batch is no option here"),
    ("return_trace=true", "return_trace is no option here"),
    ("temperature=nan", "temperature='nan' is not a finite number"),
    ("nucleus=0", "nucleus=0"),
  ):
    assert message in fails("frontier", f"{model},{option}", *rest)
  assert "is not a list like" in fails("frontier", model, *rest, "--temperatures=nan,1")
  assert "is not a finite number" in fails("frontier", model, *rest, "--entropy=nan")
  assert "at most 9223372036854775807" in fails("frontier", model, *rest, f"--seed={2**63}")
  assert "at most 2147483647" in fails("frontier", model, *rest, f"--nfes={HUGE}")
  assert "at most 2147483647" in fails("frontier", model, *rest, f"--samples={HUGE}")
  many = (f"--samples={BIG}", f"--batch_size={BIG}")
  assert f"batch_size={BIG} × length=16" in fails("frontier", model, *rest, *many)
  assert "is not a prepared dataset" in fails("frontier", model, *rest, "--data=/none")
  assert not (tmp_path / "run").exists()


def test_evaluate_says_it_before_it_measures(fails, tiny):
  both = (f"--checkpoint={tiny.teacher}", f"--data={tiny.data}", f"--judge={tiny.judge}")
  assert "temperature='nan'" in fails("evaluate", *both, "--option=temperature=nan")
  assert "has no option 'x'" in fails("evaluate", *both, "--option=x=1")
  assert "steps=0 must be at least 1" in fails("evaluate", *both, "--steps=0")
  assert "samples=0 must be at least 1" in fails("evaluate", *both, "--samples=0")
  many = (f"--samples={BIG}", f"--batch_size={BIG}")
  assert f"batch_size={BIG} × length=16" in fails("evaluate", *both, *many)
  assert "/none holds no network" in fails("evaluate", *both[:2], "--judge=/none")
  assert "at most 9223372036854775807" in fails("evaluate", *both, f"--seed={2**63}")


def test_bench(fails, tmp_path):
  assert "--json=/none/x cannot be written" in fails("bench", "trunk", "--json=/none/x")
  assert "it is a directory" in fails("bench", "trunk", f"--json={tmp_path}")
  assert "prompt_length=0 must be at least 1" in fails("bench", "decode", "--prompt_length=0")
  assert "steps=" in fails("bench", "sample", f"--steps={HUGE}")


# --- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--checkpoint", "--model", "--steps"])
def test_a_line_is_short_and_printable(fails, flag):
  """Whatever a flag holds: a terminal is not cleared, and a value of a page is not printed."""
  error = fails("sample", f"{flag}=\x1b[2J\u2028\x07")
  assert "\\x1b[2J" in error and error.removesuffix("\n").isprintable(), error
  error = fails("sample", f"{flag}={'x' * 5000}")
  assert " … " in error and len(error) < 2000, error


def test_convert_into_this_folder(fails, tiny, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for out in ("", ".", "x/.."):
    error = fails("convert", f"--checkpoint={tiny.teacher}", f"--out={out}")
    assert "--out is this folder itself" in error
  assert "no network" in fails("convert", "--checkpoint=none", "--out=x/y/z")
  assert not list(tmp_path.iterdir())
