# SPDX-License-Identifier: Apache-2.0
"""Denoising shown as text."""

import re
import xml.dom.minidom

import numpy as np
import pytest

from dlm_jax.data import tokenizers
from dlm_jax.text import viz

BYTES = tokenizers.Bytes()
M = BYTES.mask_id


def _ids(text):
  return [M if c == "_" else ord(c) for c in text]


def test_one_paragraph_per_step():
  trace = np.asarray([_ids("__c_"), _ids("a_c_"), _ids("abcd")])
  assert viz.terminal(trace, BYTES, colour=False) == (
    "step 1: 1 of 4 tokens\n··c·\n\nstep 2: 2 of 4 tokens\na·c·\n\nstep 3: 4 of 4 tokens\nabcd"
  )


def test_new_tokens_are_coloured_and_old_ones_are_not():
  trace = np.asarray([_ids("a___"), _ids("ab_d")])
  first, second = viz.terminal(trace, BYTES, mask="?").split("\n\n")
  new, reset = "\x1b[1;32m", "\x1b[0m"
  assert first.endswith(f"{new}a{reset}???")
  assert second.endswith(f"\na{new}b{reset}?{new}d{reset}")


def test_characters_of_several_tokens_stay_whole():
  """The two bytes of é are revealed together: decoded as one run."""
  trace = np.asarray([[M, *"é".encode(), M]])
  assert viz.terminal(trace, BYTES, colour=False).endswith("·é·")


def _heads(shown):
  return [paragraph.partition("\n")[0] for paragraph in shown.split("\n\n")]


def test_as_many_steps_are_shown_as_were_asked_for():
  """A last state without change is no step; one with a change is named for what it is."""
  trace = np.asarray([_ids("a__"), _ids("ab_"), _ids("abc"), _ids("abc")])
  shown = viz.terminal(trace, BYTES, colour=False, steps=3)
  assert _heads(shown) == [f"step {k}: {k} of 3 tokens" for k in (1, 2, 3)]
  shown = viz.terminal(trace[1:3], BYTES, colour=False, steps=1)
  assert _heads(shown) == ["step 1: 2 of 3 tokens", "noise removed: 3 of 3 tokens"]
  idle = np.asarray([_ids("ab_"), _ids("ab_")])
  assert len(_heads(viz.terminal(idle, BYTES, colour=False, steps=2))) == 2, "a step that drew none"
  frames, shown = _frames(viz.animation(trace[1:3], BYTES, steps=1))
  assert list(frames) == [
    "step 0 of 1: 0 of 3 tokens",
    "step 1 of 1: 2 of 3 tokens",
    "noise removed: 3 of 3 tokens",
  ]


@pytest.mark.parametrize("given", [2, np.array([True, True, False, False])])
def test_a_prompt_is_not_revealed(given):
  trace = np.asarray([_ids("ab__"), _ids("abc_")])
  first, second = viz.terminal(trace, BYTES, given=given, steps=2).split("\n\n")
  new, dim, reset = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
  assert first == f"{dim}step 1: 0 of 2 tokens{reset}\nab··"
  assert second == f"{dim}step 2: 1 of 2 tokens{reset}\nab{new}c{reset}·"
  frames, _ = _frames(viz.animation(trace, BYTES, given=given, steps=2))
  assert list(frames)[-1] == "step 2 of 2: 1 of 2 tokens"


def test_separators_are_marks():
  end = BYTES.eos_text
  trace = np.asarray([[BYTES.eos_id, *b"ab"]])
  assert viz.terminal(trace, BYTES, colour=False).endswith("\n⏹ab")
  assert viz.plain(f"{end}a{end}b{end}", BYTES) == "a⏹b"


def test_blocks_are_decoded_one_after_the_other():
  """A prompt of three tokens, blocks of two: what shares a block and a step appears together."""
  trace = viz.block_trace(np.arange(7), np.array([-1, -1, -1, 2, 1, 0, 0]), 2, M)
  assert trace.tolist() == [
    [0, 1, 2, 3, M, M, M],
    [0, 1, 2, 3, M, 5, M],
    [0, 1, 2, 3, 4, 5, M],
    [0, 1, 2, 3, 4, 5, 6],
  ]
  assert viz.block_trace(np.arange(2), np.full(2, -1), 2, M).tolist() == [[0, 1]]


def test_a_page_is_whole_and_escaped():
  page = viz.page(viz.animation(np.asarray([_ids("ab")]), BYTES), "<a> & b")
  assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
  assert "<title>&lt;a&gt; &amp; b</title>" in page and 'charset="utf-8"' in page


def _frames(page):
  """Return every frame's markup by its caption, and the caption that is shown without scripts."""
  found = re.findall(r'<pre title="([^"]*)"( hidden)?>(.*?)</pre>', page, flags=re.DOTALL)
  (shown,) = (note for note, hidden, _ in found if not hidden)
  return {note: text for note, _, text in found}, shown


def test_animation_keeps_every_frame_as_wide_as_the_last():
  trace = np.asarray([_ids("__c_"), _ids("a_c_"), _ids("abcd")])
  frames, shown = _frames(viz.animation(trace, BYTES))
  assert frames == {
    "step 0 of 3: 0 of 4 tokens": "<i>abcd</i>",
    "step 1 of 3: 1 of 4 tokens": "<i>ab</i><b>c</b><i>d</i>",
    "step 2 of 3: 2 of 4 tokens": "<b>a</b><i>b</i>c<i>d</i>",
    "step 3 of 3: 4 of 4 tokens": "a<b>b</b>c<b>d</b>",
  }
  assert shown == "step 3 of 3: 4 of 4 tokens"


def test_animation_of_a_prompt_and_of_a_last_step_without_noise():
  trace = np.asarray([_ids("ab_"), _ids("abc"), _ids("abc")])
  frames, _ = _frames(viz.animation(trace, BYTES, given=2))
  assert list(frames.values()) == ["ab<i>c</i>", "ab<i>c</i>", "ab<b>c</b>"]


def test_animation_of_tokens_that_change():
  """A uniform process has no mask, and corrects what it drew: every frame shows its own tokens."""
  frames, _ = _frames(viz.animation(np.asarray([_ids("abcd"), _ids("axcd")]), BYTES))
  assert list(frames.values())[1:] == ["<b>abcd</b>", "a<b>x</b>cd"]


def test_animation_is_one_escaped_element():
  """Text cannot break out of it, characters of several tokens stay whole, no address is fetched."""
  row = [*b"<b>&", *"é".encode(), BYTES.eos_id]
  page = viz.animation(np.asarray([[*row[:5], M, M], row]), BYTES, seconds=2.5)
  frames, _ = _frames(page)
  first, second = list(frames.values())[1:]
  assert first == "<b>&lt;b&gt;&amp;</b><i>é⏹</i>" and second == "&lt;b&gt;&amp;<b>é⏹</b>"
  assert "http" not in page and " src=" not in page and 'data-seconds="2.5"' in page
  box = page[page.index("<div class") : page.index("<script>")]
  box = box.replace(" hidden>", ">").replace('aria-label="step">', 'aria-label="step"/>')
  assert xml.dom.minidom.parseString(box).documentElement.tagName == "div"
