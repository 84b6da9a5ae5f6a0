# SPDX-License-Identifier: Apache-2.0
"""Text from decoders of blocks: the API, streaming, drafts, and what is refused before loading."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_sdar
from compiled import at_most

import dlm_jax
from dlm_jax import convert, mesh, sample
from dlm_jax.data import tokenizers
from dlm_jax.errors import InputError
from dlm_jax.text import decoder, load, requests
from dlm_jax.text.decoder import TextDecoder
from dlm_jax.text.follow import Follow

PROMPTS = ["Janet has", "a", ""]
NEW = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sdar")
  tiny_sdar.write(folder / "target")
  tiny_sdar.write(folder / "draft", noise=0.15)
  return folder


@pytest.fixture(scope="module")
def pipe(folder):
  return dlm_jax.load(folder / "target", draft=folder / "draft")


@pytest.fixture(scope="module")
def alone(pipe):
  return pipe.generate(PROMPTS, max_new_tokens=NEW, stop=(), verify="none")


@pytest.mark.slow
def test_it_is_the_decoder_of_the_library(pipe, alone):
  """Ids and passes are those of `sample.decode` on the prompts' ids; nothing is added to them."""
  rule = sample.BlockRule(block_length=4, mask_id=tiny_sdar.MASK)
  model, params, _ = convert.load(pipe.source, dtype="float32")
  prompts = [
    list(map(pipe.tokenizer._backend.token_to_id, words.replace(" ", "Ġ"))) for words in PROMPTS
  ]
  padded, lengths = sample.pad_prompts(prompts)
  decoder = sample.block_decoder(model, rule, 24)
  options = sample.RowOptions.make(3, temperature=0.0, limit=lengths + NEW)
  run = jax.jit(
    lambda p: sample.decode(decoder, p, padded, jax.random.key(0), lengths=lengths, options=options)
  )
  tokens, info = run(params)
  for row, prompt, ids in zip(np.asarray(tokens), prompts, alone.tokens, strict=True):
    assert row[len(prompt) : len(prompt) + NEW].tolist() == ids
  assert alone.target_passes == int(info.passes_B.sum()) and alone.draft_passes == 0
  assert alone.count == 3 * NEW and alone.mode == "no draft: exact, the network's own decode"
  known = [[i for i in row if i < tiny_sdar.MASK] for row in alone.tokens]
  assert alone.texts == [pipe.tokenizer.decode(row) for row in known]


def test_streamed_pieces_add_up(pipe, alone):
  told = []
  streamed = pipe.generate(
    PROMPTS, max_new_tokens=NEW, stop=(), verify="none", on_text=lambda *piece: told.append(piece)
  )
  assert streamed.tokens == alone.tokens
  for number, whole in enumerate(alone.texts):
    mine = [(piece, ended) for where, piece, ended in told if where == number]
    assert "".join(piece for piece, _ in mine) == whole
    assert [ended for _, ended in mine] == [False] * (len(mine) - 1) + [True]
  assert len(told) > len(PROMPTS)


def _info(count):
  """Return what is known about one row of so many tokens without a prompt."""
  known = {"step_BL": np.zeros((1, count)), "log_prob_BL": np.ones((1, count))}
  numbers = {"lengths_B": count, "prompt_B": 0, "passes_B": count, "reason_B": 2}
  return sample.Info(**known, **{name: np.asarray([one]) for name, one in numbers.items()})


def test_unfinished_characters_wait(pipe):
  """Two bytes of one character come in two rounds: nothing is told before the second."""
  plan, told = pipe.plan("", max_new_tokens=3, stop=()), []
  follow = Follow(pipe._text, plan, lambda *piece: told.append(piece))
  rows = np.asarray([[*pipe.tokenizer.encode("é"), *pipe.tokenizer.encode("x")]])
  for length in (1, 2, 3):
    follow(rows, np.asarray([length]))
  follow.finish(rows.tolist(), _info(3))
  assert told == [(0, "é", False), (0, "x", True)]


def test_a_draft_changes_nothing_when_stacked(pipe, alone):
  stacked = pipe.generate(PROMPTS, max_new_tokens=NEW, stop=())
  assert stacked.tokens == alone.tokens and "exact" in stacked.mode and "not" not in stacked.mode
  assert stacked.draft_passes > 0 and stacked.target_passes <= alone.target_passes


@pytest.mark.slow
def test_stop_texts_end_rows_of_drafts(pipe, alone):
  """The host sees the same prefixes, whoever decided them."""
  ids = [i for i in alone.tokens[0] if i < tiny_sdar.MASK]
  stop = pipe._text(ids[3:5], ())
  ask = {"max_new_tokens": NEW, "stop": stop}
  told = []
  drafted = pipe.generate(PROMPTS[0], **ask, on_text=lambda *piece: told.append(piece))
  plain = pipe.generate(PROMPTS[0], **ask, verify="none")
  assert drafted.tokens == plain.tokens and drafted.texts == plain.texts
  assert stop in pipe._text(plain.tokens[0], ()) and len(plain.tokens[0]) < NEW
  assert "".join(piece for _, piece, _ in told) == plain.texts[0] and stop not in plain.texts[0]


@pytest.mark.slow
def test_simsd_says_that_it_is_not_exact(pipe):
  simsd = pipe.generate(PROMPTS, max_new_tokens=NEW, stop=(), verify="simsd", layout="published")
  assert "layout=published: not exact" in simsd.mode
  assert [len(row) for row in simsd.tokens] == [NEW] * 3 and simsd.draft_passes > 0
  drawn = pipe.plan("a", verify="simsd", temperature=0.7)
  assert drawn.options.draws_B.tolist() == [True]


@pytest.mark.slow
def test_a_prompt_does_not_depend_on_its_batch(pipe, alone):
  """Nor on the padding of its program."""
  one = pipe.generate(PROMPTS[0], max_new_tokens=NEW, stop=(), verify="none")
  assert one.tokens == alone.tokens[:1] and one.texts == alone.texts[:1]


@pytest.mark.slow
def test_stop_tokens_end_a_text_and_are_not_shown(pipe, alone):
  ids = alone.tokens[0]
  at = next(i for i in range(1, NEW) if ids[i] not in ids[:i] and ids[i] < tiny_sdar.MASK)
  one = pipe.generate(PROMPTS[0], max_new_tokens=NEW, stop=[ids[at]], verify="none")
  assert one.tokens == [ids[: at + 1]]
  assert one.texts == [pipe.tokenizer.decode([i for i in ids[:at] if i < tiny_sdar.MASK])]
  assert pipe.plan("a").stop_ids == ((258, 256),)
  assert pipe.plan("a", stop=["<|im_end|>", "x", 7]).stop_ids[0][::2] == (258, 7)
  assert pipe.plan("a").options.stop_BS.tolist() == [[258, 256, -1, -1]]


def test_chat_frames_the_prompt(pipe):
  plan = pipe.plan("hi", chat=True)
  wanted = pipe.tokenizer.encode_chat([{"role": "user", "content": "hi"}])
  assert np.asarray(plan.prompt_BP)[0, : len(wanted)].tolist() == wanted
  assert plan.lengths_B.tolist() == [len(wanted)]


def test_prompts_share_programs(pipe):
  """A window and a width per power of two; the rule's defaults."""
  plans = [pipe.plan("a" * length, max_new_tokens=10) for length in (1, 20, 32, 33)]
  assert [plan.window for plan in plans] == [42, 42, 42, 74]
  assert [plan.prompt_BP.shape[1] for plan in plans] == [32, 32, 32, 64]
  assert plans[1].limits_B.tolist() == [30]
  rule, options = plans[0].rule, plans[0].options
  assert (rule.block_length, rule.mask_id) == (4, tiny_sdar.MASK)
  assert options.temperature_B.tolist() == [0.0] and options.threshold_B.tolist() == [
    pytest.approx(0.9)
  ]


def test_a_prompt_and_its_text_just_fit(pipe):
  plan = pipe.plan("a" * 246, max_new_tokens=10)
  assert plan.limits_B.tolist() == [256] and plan.window == 256


@pytest.mark.slow
def test_each_prompt_asks_for_its_own(pipe, alone, monkeypatch):
  """Temperatures, limits, stops, seeds per prompt: the texts of separate requests, one program."""
  monkeypatch.setattr(sample, "decode", at_most(sample.decode))  # other values compile nothing
  decoder._program.cache_clear()
  each = {
    "temperature": [0.0, 1.0, 1.3],
    "top_k": [0, 5, 0],
    "max_new_tokens": [NEW, 3, 6],
    "stop": [(), [alone.tokens[0][0]], None],
    "min_new_tokens": [0, 2, 1],
  }
  together = pipe.generate(PROMPTS, seed=[5, 6, 7], verify="none", **each)
  assert together.tokens[0] == alone.tokens[0] and len(together.tokens[1]) <= 3
  again = pipe.generate(PROMPTS, seed=[5, 8, 7], verify="none", **each | {"top_p": 0.9})
  assert again.tokens[0] == together.tokens[0]
  monkeypatch.undo()  # one row is another program
  decoder._program.cache_clear()
  mine = {name: values[1] for name, values in each.items()}
  one = pipe.generate(PROMPTS[1], seed=6, verify="none", **mine)
  assert one.tokens == together.tokens[1:2]
  with pytest.raises(InputError, match="seed has 2 numbers; give one, or one for each of 3"):
    pipe.generate(PROMPTS, seed=[1, 2], verify="none")


def test_other_prompts_and_stops_compile_nothing(pipe, monkeypatch):
  """Prompts up to a power of two and few stop ids have common shapes, and so one program."""
  monkeypatch.setattr(sample, "decode", at_most(sample.decode))
  decoder._program.cache_clear()
  for prompt, stop in (("a", ()), ("Janet has", [3]), ("a" * 32, [3, 4])):
    assert pipe.generate(prompt, max_new_tokens=4, stop=stop, verify="none").texts
  with pytest.raises(AssertionError, match="traced > 1 times"):
    pipe.generate("a" * 33, max_new_tokens=4, stop=(), verify="none")
  decoder._program.cache_clear()


@pytest.mark.slow
def test_fused_storage_decodes_the_same(folder, alone):
  fused = load.open_decoder(folder / "target", storage="fused")
  assert fused.generate(PROMPTS, max_new_tokens=NEW, stop=()).tokens == alone.tokens


# --- refused --------------------------------------------------------------------------------------

_LONG = "a" * 250
_REQUESTS = [
  ({"block_length": 8}, "block_length=8, but .* was trained with 4"),
  ({"stop": [300]}, "stop=300 is no token"),
  ({"stop": [tiny_sdar.MASK]}, "is no token"),
  ({"stop": ["a<|im_end|>"]}, "joins a token that is not shown, id 258, to text"),
  ({"verify": "stackd"}, "did you mean 'stacked'"),
  ({"layout": "published"}, "layout='published' is of verify='simsd'"),
  ({"prompts": "a <|MASK|> b"}, r"prompt 1 contains the mask \(<|MASK|>\)"),
  ({"prompts": ["a", [3, tiny_sdar.MASK]]}, "prompt 2 contains the mask"),
  ({"prompts": [[999]]}, "has the id 999"),
  ({"prompts": _LONG}, "has 250 tokens, .* cache of 256 positions.* use at most 6 new tokens"),
  ({"prompts": _LONG * 2}, "shorten the prompt"),
  ({"prompts": "a" * 247, "max_new_tokens": 10}, "has 247 tokens, .* at most 9 new tokens"),
  ({"max_new_tokens": 0}, "max_new_tokens=0"),
  ({"max_new_tokens": [1, 2]}, "max_new_tokens has 2 numbers; give one, or one for each of 1"),
  ({"min_new_tokens": 200}, "min_new_tokens=200 must be at most max_new_tokens=128"),
  ({"temperature": [0.0, 1.0]}, "temperature has shape .2,.; give one number, or one for each"),
  ({"temperature": -1.0}, "temperature=-1.0 must be 0 or more"),
  ({"stop": [["a"], [5]]}, "stop has 2 lists; give one, or one for each of 1 prompts"),
  ({"tresh": 0.5}, "did you mean 'threshold'"),
  ({"strategy": "best"}, "strategy='best' is unknown"),
  ({"steps": 9}, "steps=9 must be in 1"),
]


@pytest.mark.parametrize("request_, message", _REQUESTS)
def test_refused_requests(pipe, request_, message):
  with pytest.raises(InputError, match=message) as error:
    pipe.plan(**{"prompts": "a", **request_})
  assert "\n" not in str(error.value)


def test_texts_that_no_memory_holds(pipe, monkeypatch):
  """Before a list of them is made."""
  with pytest.raises(InputError, match=r"num=1000000000 texts of 1 prompts need .* GiB at least"):
    pipe(prompt="a", num=10**9)
  monkeypatch.setattr(mesh, "memory", lambda: 10**5)
  with pytest.raises(InputError, match=r"9 texts in a cache of .* positions need"):
    pipe.plan(["a"] * 9, max_new_tokens=16)


def test_refused_networks(folder, tmp_path):
  """Before any weights are read: there are none that could be."""
  plain = tiny_sdar.write(tmp_path / "plain", mask=False)
  with pytest.raises(InputError, match="qwen3 network without a mask token"):
    dlm_jax.load(plain)
  silent = tiny_sdar.write(tmp_path / "silent", block_length=None)
  with pytest.raises(InputError, match="does not say its block length"):
    load.open_decoder(silent).plan("a")
  assert load.open_decoder(silent).plan("a", block_length=8).rule.block_length == 8
  named = tiny_sdar.write(tmp_path / "SDAR-tiny-b16", block_length=None)
  assert load.open_decoder(named).block_length == 16
  with pytest.raises(InputError, match="verify='simsd' needs a draft"):
    load.open_decoder(silent).plan("a", block_length=8, verify="simsd")


def test_networks_trained_here(tmp_path):
  """A text follows the separator, which also ends it; another tokenizer is refused."""
  words = tokenizers.Bytes()
  ours = tiny_sdar.write(tmp_path, saved={"extra": {"tokenizer_fingerprint": words.fingerprint}})
  with pytest.raises(InputError, match="was trained with another tokenizer"):
    load.open_decoder(ours)
  pipe = load.open_decoder(ours, "bytes")
  plan = pipe.plan(["a", ""])
  assert np.asarray(plan.prompt_BP)[0, :2].tolist() == [256, 97]
  assert plan.lengths_B.tolist() == [2, 1] and plan.stop_ids == ((256,), (256,))
  assert pipe.plan("a", stop=["<|endoftext|>", "z"]).stop_ids == ((256, 122),)
  with pytest.raises(InputError, match="has no tokenizer of a chat model"):
    pipe.plan("a", chat=True)


@pytest.mark.parametrize(
  "changes, message",
  [({"vocab_size": 300}, "vocabulary of 300"), ({"block_length": 8}, "blocks of 8 tokens")],
)
def test_drafts_must_fit(folder, tmp_path, changes, message):
  other = tiny_sdar.write(tmp_path / "other", **changes)
  with pytest.raises(InputError, match=message):
    load.open_decoder(folder / "target", draft=other)


def test_drafts_must_have_the_same_tokens(pipe):
  words = pipe.tokenizer
  swapped = type(words)(words.serialised.replace('"special":false', '"special": false'))
  assert swapped.fingerprint != words.fingerprint
  with pytest.raises(InputError, match="has another tokenizer"):
    dataclasses.replace(pipe, draft=dataclasses.replace(pipe.draft, tokenizer=swapped))


def test_public_names():
  assert TextDecoder.generate and requests.VERIFY == ("stacked", "simsd", "none")


def test_logits_that_overflow_are_said(pipe):
  """Finite weights do not make finite logits; no text is made of those."""
  model, params = pipe.loaded
  huge = jax.tree.map(lambda x: x * 1e10, params)
  broken = dataclasses.replace(pipe, weights=convert.Weights(lambda: (model, huge)), draft=None)
  with pytest.raises(InputError, match=r"of text . are NaN or infinite, though its weights"):
    broken.generate(PROMPTS, max_new_tokens=2, stop=())
