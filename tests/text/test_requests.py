# SPDX-License-Identifier: Apache-2.0
"""What may be asked of a decoder: prompts of every form, stop texts, numbers, seeds."""

import json

import jax
import numpy as np
import pytest
import tiny_sdar

from dlm_jax.errors import InputError
from dlm_jax.text import load, prompts, requests, stops
from dlm_jax.text.follow import Follow

ASK = {"role": "user", "content": "2+2?"}
TALK = [{"role": "system", "content": "Be kind."}, ASK, {"role": "assistant", "content": "4"}, ASK]
END, TEXT = 258, 256


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sdar") / "target"
  return load.open_decoder(tiny_sdar.write(folder, layers=1, length=1024))


def _rows(plan):
  return [
    np.asarray(row)[:length].tolist()
    for row, length in zip(plan.prompt_BP, plan.lengths_B, strict=True)
  ]


# --- prompts --------------------------------------------------------------------------------------


def test_forms_of_prompts(pipe):
  """One or several of: a text, ids, a conversation; arrays are ids."""
  encode, chat = pipe.tokenizer.encode, pipe.tokenizer.encode_chat
  ids = encode("hi")
  for given, rows in (
    ("hi", [ids]),
    (["hi", "a"], [ids, encode("a")]),
    (ids, [ids]),
    (tuple(ids), [ids]),
    (np.asarray(ids), [ids]),
    ([ids, [], "a"], [ids, [], encode("a")]),
    (np.asarray([ids, ids]), [ids, ids]),
    ([np.asarray(ids, np.int64)], [ids]),
    (TALK, [chat(TALK)]),
    ([TALK, [ASK], "a"], [chat(TALK), chat([ASK]), encode("a")]),
  ):
    assert _rows(pipe.plan(given)) == rows, given
  called = {"role": "assistant", "tool_calls": [{"name": "add"}]}
  assert "add" in pipe.tokenizer.decode(_rows(pipe.plan([ASK, called]))[0])


def test_conversations(pipe):
  """A text with chat=True is a user's; the system and switched thoughts go into all."""
  chat = pipe.tokenizer.encode_chat
  assert _rows(pipe.plan("2+2?", chat=True)) == [chat([ASK])]
  kind = {"role": "system", "content": "Be kind."}
  plan = pipe.plan(["2+2?", [ASK]], chat=True, system="Be kind.", thinking=False)
  assert _rows(plan) == [chat([kind, ASK], thinking=False)] * 2
  assert _rows(pipe.plan([ASK], thinking=True)) == _rows(pipe.plan([ASK]))
  asked = {"tools": [{"name": "add"}]}
  assert _rows(pipe.plan([ASK], **asked)) == [chat([ASK], **asked)]
  result = {"role": "tool", "content": "4"}
  assert pipe.tokenizer.decode(_rows(pipe.plan([ASK, result]))[0]).count("<tool_response>") == 1


def test_answers_to_conversations(pipe):
  """Whole: the same as from the ids; equal ones of one seed differ as texts do."""
  ids = pipe.tokenizer.encode_chat(TALK)
  options = {"max_new_tokens": 4, "stop": ()}
  one = pipe.generate(TALK, **options)
  assert one.tokens == pipe.generate([ids], **options).tokens and len(one.texts) == 1
  assert pipe.generate([TALK, [ASK]], **options).tokens[0] == one.tokens[0]
  assert pipe(prompt=TALK, num=2, **options) == one.texts * 2


@pytest.mark.parametrize(
  "prompt, message",
  [
    (b"abc", "is a bytes; give a text, token ids, a conversation"),
    (None, "is a NoneType; give a text"),
    (1.5, "is a float"),
    (7, "is a int; give a text"),
    ({"role": "user", "content": "a"}, "is one message; a conversation is a list of messages"),
    ({"a", "b"}, "is a set"),
    ([], "prompts is empty"),
    ([None], "prompt 1, None, is a NoneType"),
    (["a", b"abc"], "prompt 2, b'abc', is a bytes"),
    ([1, "a"], "prompt 1, 1, is a int"),
    ([[1.7]], "prompt 1 holds 1.7, a float; a list is of token ids"),
    ([[1], [True]], "prompt 2 holds True, a bool"),
    ([[1, None]], "prompt 1 holds None"),
    (np.asarray([1.0]), "prompt 1, 1.0, is a float"),
    ([[ASK, "a"]], "prompt 1 holds messages and other things"),
    ([[1, ASK]], "prompt 1 holds {'role': 'user', 'content': '2"),
    ([[{"role": "robot", "content": "a"}]], "prompt 1: message 0 has the role 'robot'"),
    ("a\ud800b", r"prompt 1 holds \\ud800 at character 2, half a surrogate pair"),
    (["a", "\udcff"], "prompt 2 holds the byte 0xff at character 1, which is not UTF-8"),
    ([[{"role": "user", "content": "\ud800"}]], r"prompt 1: message 0 holds \\ud800"),
    ([[{"role": "user", "content": "a <|MASK|>"}]], "prompt 1 contains the mask"),
  ],
)
def test_no_prompts(pipe, prompt, message):
  with pytest.raises(InputError, match=message) as error:
    pipe.plan(prompt)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "asked, message",
  [
    ({"chat": 1}, "chat=1 is a int; give True or False"),
    ({"thinking": "no"}, "thinking='no' is a str; give True or False"),
    ({"system": 5}, "system=5 is a int; give a text"),
    ({"tools": "add"}, "tools='add' is a str; give a list"),
    ({"system": "a"}, "system is for conversations, and prompt 1 is none; add chat=True"),
    ({"thinking": False}, "thinking is for conversations"),
    ({"prompts": ["a", [1]], "chat": True, "system": "a"}, "and prompt 2 is none"),
    ({"prompts": TALK, "system": "a"}, "prompt 1 has a system message of its own"),
    ({"system": "\ud800", "chat": True}, r"system holds \\ud800"),
  ],
)
def test_no_conversations(pipe, asked, message):
  with pytest.raises(InputError, match=message):
    pipe.plan(**{"prompts": "a", **asked})


def test_conversations_need_a_chat_model(pipe, tmp_path):
  tiny_sdar.write(tmp_path, layers=1)
  plain = load.open_decoder(tmp_path, "bytes")
  for asked in ({"prompts": [ASK]}, {"prompts": "a", "chat": True}):
    with pytest.raises(InputError, match="has no tokenizer of a chat model"):
      plain.plan(**asked)


def test_files_of_prompts(tmp_path):
  """A byte-order mark is no text; conversations come alone, several, or with tools."""
  file = tmp_path / "q"
  file.write_bytes(b"\xef\xbb\xbfHello\n")
  assert prompts.read_text(str(file), "--prompt=@q") == "Hello\n"
  for content, found in (
    (TALK, ([TALK], None)),
    ([TALK, [ASK]], ([TALK, [ASK]], None)),
    ({"messages": TALK, "tools": [{}]}, ([TALK], [{}])),
  ):
    file.write_text(json.dumps(content), encoding="utf-8-sig")
    assert prompts.read_messages(str(file), "--messages=q") == found
  for content in ("[]", "5", '["a"]', "[[1]]", '{"a": []}', f"[{json.dumps(TALK)}, 1]"):
    file.write_text(content)
    with pytest.raises(InputError, match="--messages=q holds no conversation; write"):
      prompts.read_messages(str(file), "--messages=q")
  for content, message in (("[" * 99_999, "q is not JSON"), ("{", "q is not JSON: Expecting")):
    file.write_text(content)
    with pytest.raises(InputError, match=message):
      prompts.read_messages(str(file), "--messages=q")


# --- what ends a text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  "stop, ids, texts",
  [
    (None, (END, TEXT), ()),
    ((), (), ()),
    ("<|im_end|>", (END,), ()),  # not its letters
    ("hi", (), ("hi",)),
    ("1", (pytest.approx(16),), ("1",)),  # also where it is a part of a token
    (1, (1,), ()),
    (["\n\n", "<|im_end|>", 7, 7], (END, 7), ("\n\n",)),
    ([["a b"]], (), ("a b",)),
    (np.asarray([3, 4]), (3, 4), ()),
  ],
)
def test_forms_of_stops(pipe, stop, ids, texts):
  plan = pipe.plan("a", stop=stop)
  assert plan.stop_ids == (ids,) and plan.stop_texts == (texts,)
  assert plan.watched == any(len(text) > 1 for text in texts)


def test_stops_beside_the_network(pipe, tmp_path):
  """Its tokenizer lies elsewhere; what generation_config.json says there counts, too."""
  tiny_sdar.write(tmp_path / "network", layers=1)
  (tmp_path / "network" / "generation_config.json").write_text('{"eos_token_id": [258, 65]}')
  opened = load.open_decoder(tmp_path / "network", pipe.source)
  assert opened.plan("a").stop_ids == ((END, TEXT, 65),)
  assert opened.tokenizer.fingerprint == pipe.tokenizer.fingerprint
  (tmp_path / "network" / "generation_config.json").write_text('{"eos_token_id": 999}')
  with pytest.raises(InputError, match="names the eos_token_id 999"):
    load.open_decoder(tmp_path / "network", pipe.source)


def test_stops_of_each_prompt(pipe):
  plan = pipe.plan(["a", "b", "c"], stop=[None, "so", [5, "no"]])
  assert plan.stop_ids == ((END, TEXT), (), (5,))
  assert plan.stop_texts == ((), ("so",), ("no",))


@pytest.mark.parametrize(
  "stop, message",
  [
    (True, "stop=True is a bool; give texts or ids"),
    (1.5, "stop=1.5 is a float"),
    (b"a", "is a bytes"),
    ([1.0], "stop=1.0 is a float; give texts, or ids as whole numbers"),
    ([[None]], "stop=None is a NoneType"),
    ("", "stop='' ends every text"),
    ("\ud800", "half a surrogate pair"),
    (-1, "stop=-1 is no token"),
    ("so<|endoftext|>", "joins a token that is not shown, id 256"),
    ("<|MASK|>", "is no token"),
  ],
)
def test_no_stops(pipe, stop, message):
  with pytest.raises(InputError, match=message) as error:
    pipe.plan("a", stop=stop)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "texts, fewest, kept",
  [
    ((), 0, None),
    (("zz",), 0, None),
    (("cd",), 0, (3, "ab")),  # inside one token, and of two
    (("de",), 0, (3, "abc")),
    (("abcdef", "c"), 0, (2, "ab")),  # the first that is whole
    (("c",), 2, None),
    (("e",), 2, (3, "abcd")),
    (("bc",), 1, (2, "a")),
    (("b",), 1, None),
    (("f", "e"), 0, (3, "abcd")),
  ],
)
def test_where_a_text_is_cut(texts, fewest, kept):
  """Tokens "ab", "c", "de", "f": the row ends with the token that makes a stop text whole."""
  tokens = ["ab", "c", "de", "f"]
  decode = lambda ids: "".join(tokens[i] for i in ids)  # noqa: E731
  assert stops.cut(decode, range(4), texts, fewest) == kept


def test_beginnings_of_stop_texts_wait(pipe):
  """Token by token: nothing of a stop text is told, and what only looked like one is."""
  plan, told = pipe.plan("", max_new_tokens=9, stop=["xyz", "b"]), []
  follow = Follow(pipe._text, plan, lambda *piece: told.append(piece))
  ids = np.asarray([pipe.tokenizer.encode("axyxyzc")])
  for length in range(1, 8):
    follow(ids[:, :length], np.asarray([length]))
  assert told == [(0, "a", False), (0, "xy", False), (0, "", True)]
  assert follow.done(lambda state: np.asarray([False]))(None).tolist() == [True]


@pytest.fixture(scope="module")
def free(pipe):
  """Texts without ends, and two neighbours in one of them that stand nowhere before."""
  options = {"max_new_tokens": 60, "temperature": 1.0, "seed": 3}
  free = pipe.generate(["a", "b"], stop=(), **options)
  ids = free.tokens[0]
  plain = [n for n in range(8, 50) if max(map(len, map(pipe._text, [ids[n : n + 2]], [()]))) == 2]
  for place in plain:
    stop = pipe._text(ids[place : place + 2], ())
    if stop.isascii() and pipe._text(ids, ()).find(stop) == len(pipe._text(ids[:place], ())):
      return options, free, place, stop
  pytest.fail("no such neighbours")


@pytest.mark.slow
def test_texts_of_several_tokens_end_rows(pipe, free):
  """Rows, texts and what is known about them are cut; other rows go on; streams tell no more."""
  options, whole, place, stop = free
  told = []
  for on_text in (None, lambda *piece: told.append(piece)):
    cut = pipe.generate(["a", "b"], stop=[stop, ()], on_text=on_text, **options)
    assert cut.tokens == [whole.tokens[0][: place + 2], whole.tokens[1]]
    assert cut.texts == [pipe._text(whole.tokens[0][:place], ()), whole.texts[1]]
    assert cut.info.lengths_B.tolist() == [1 + place + 2, 61]
    assert cut.info.reason_B.tolist() == [1, 2]
    assert (np.asarray(cut.info.step_BL)[0] >= 0).sum() == place + 2
    assert not np.asarray(cut.info.log_prob_BL)[0, place + 3 :].any()
  assert "".join(piece for number, piece, _ in told if number == 0) == cut.texts[0]
  alone = pipe.generate("a", stop=stop, **options)
  assert alone.tokens == cut.tokens[:1]
  assert alone.target_passes < pipe.generate("a", stop=(), **options).target_passes
  least = pipe.generate("a", stop=stop, min_new_tokens=place + 2, **options)
  assert stop in least.texts[0] or len(least.tokens[0]) > place + 2


def test_ends_are_not_shown(pipe):
  """Nor in the middle, where nothing ends the text; tokens keep them."""
  ids = [*pipe.tokenizer.encode("a"), END, *pipe.tokenizer.encode("b"), TEXT, 257, END]
  assert pipe._text(ids, ()) == "ab<|im_start|>"
  assert pipe._text(ids, (257,)) == "ab<|im_start|>" and pipe._text(ids[:-1], (257,)) == "ab"


# --- numbers --------------------------------------------------------------------------------------

_NAN, _INF = float("nan"), float("inf")


@pytest.mark.parametrize(
  "name, wrong",
  [
    ("max_new_tokens", [3.5, 3.0, True, "3", None, [3.5], 1e400]),
    ("min_new_tokens", [0.5, False, "1"]),
    ("temperature", ["0", None, _NAN, _INF, True, [None], 1e300, 1j, [[0.5]], {}]),
    ("top_k", [2.5, 2.0, "2", True, _NAN, [2.5], 2**40]),
    ("top_p", ["1", _NAN, True]),
    ("threshold", ["1", _NAN, _INF, True]),
    ("steps", [2.5, 2.0, True, "2", [2]]),
    ("block_length", [4.0, "4", True]),
    ("factor", [_NAN, "1"]),
    ("entropy_bound", [_NAN, _INF]),
    ("fold", [1, "no"]),
    ("strategy", [5, ["sequential"]]),
  ],
)
def test_no_numbers(pipe, name, wrong):
  for given in wrong:
    with pytest.raises(InputError, match=name) as error:
      pipe.plan("a", **{name: given})
    assert "\n" not in str(error.value) and "give" in str(error.value), given


def test_a_refused_number_spoils_nothing(pipe):
  """2.0 and 2 are one key of a cache; the first is refused before it gets there."""
  with pytest.raises(InputError, match=r"steps=2\.0 cannot be used"):
    pipe.generate("a", steps=2.0, max_new_tokens=2)
  assert pipe.generate("a", steps=2, max_new_tokens=2).texts


def test_numbers_of_arrays(pipe):
  """Numpy's and jax's numbers are numbers, and so are arrays with one for each prompt."""
  asked = {
    "max_new_tokens": np.int64(3),
    "temperature": jax.numpy.float32(0.5),
    "top_k": np.int8(2),
  }
  plan = pipe.plan(["a", "b"], **asked, threshold=np.asarray([0.5, 0.25]))
  assert plan.limits_B.tolist() == [4, 4] and plan.options.threshold_B.tolist() == [0.5, 0.25]
  assert pipe.plan(["a", "b"], max_new_tokens=np.asarray([1, 2])).limits_B.tolist() == [2, 3]
  assert pipe.plan(["a"], top_k=[jax.numpy.int32(2)]).options.top_k_B.tolist() == [2]


def test_seeds_of_64_bits():
  """Those of 32 have jax's keys; others are told apart, which jax alone does not."""
  key = lambda seed: tuple(jax.random.key_data(requests.keys(seed, 1))[0].tolist())  # noqa: E731
  for seed in (0, 5, 2**31, 2**32 - 1):
    first = jax.random.fold_in(jax.random.key(seed), 0)
    assert key(seed) == tuple(jax.random.key_data(first).tolist())
  seeds = [0, 5, 2**32, 2**32 + 5, 2**40, 2**63 - 1, -1, -(2**40), -(2**63)]
  assert len({key(seed) for seed in seeds}) == len(seeds)
  assert key(np.int64(5)) == key(5) == key([5])
  both = requests.keys([7, 5], 2)
  assert tuple(jax.random.key_data(both)[1].tolist()) == key(5)


@pytest.mark.parametrize("seed", [1.5, "a", None, True, 2**63, -(2**63) - 1, 2**70, [1.0], _NAN])
def test_no_seeds(seed):
  with pytest.raises(InputError, match="seed="):
    requests.keys(seed, 1)


@pytest.mark.parametrize("num", [1.5, True, "2", 0, None])
def test_no_numbers_of_texts(pipe, num):
  with pytest.raises(InputError, match="there must be at least 1 text, a whole number"):
    pipe.generate("a", num=num)


def test_no_ways_of_verifying(pipe):
  for asked in ({"verify": 5}, {"verify": ["none"]}, {"layout": 5}):
    with pytest.raises(InputError, match=next(iter(asked))):
      pipe.plan("a", **asked)
