# SPDX-License-Identifier: Apache-2.0
"""How Qwen3, SDAR and I-DLM write a conversation.

For directories without a chat template, and for those that ship Qwen3's: it gives the same text, in
this process and without another package.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dlm_jax.errors import InputError

START, END = "<|im_start|>", "<|im_end|>"
_THINK, _THOUGHT = "<think>", "</think>"
_RESULT, _RESULT_END = "<tool_response>", "</tool_response>"
_TEMPLATES = ("87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5",)
_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def is_template(source: str) -> bool:
  """Tell whether a chat template is the one that `render` follows."""
  return hashlib.sha256(source.encode()).hexdigest() in _TEMPLATES


def render(
  messages: Sequence[Mapping[str, Any]],
  *,
  start: bool = True,
  thinking: bool | None = None,
  tools: Sequence[Any] | None = None,
) -> str:
  """Return a conversation as the text that chat models of this family were trained on.

  Thoughts of the assistant (<think> … </think>) are left out of turns before the last question; the
  result of a tool is no question.

  Args:
    messages: {"role": "system", "user", "assistant" or "tool", "content": text} in order; of the
      assistant also reasoning_content, its thought, and tool_calls.
    start: open the turn of the assistant.
    thinking: False: open it with an empty thought.
    tools: JSON schemas of functions that may be called.

  Raises:
    InputError: a call names no function.

  Example:
    >>> print(render([{"role": "user", "content": "2+2?"}]))
    <|im_start|>user
    2+2?<|im_end|>
    <|im_start|>assistant
    <BLANKLINE>
  """
  text = "".join(f"{START}{turn}{END}\n" for turn in _turns(messages, tools))
  opening = f"{_THINK}\n\n{_THOUGHT}\n\n" if thinking is False else ""
  return text + (f"{START}assistant\n{opening}" if start else "")


def _turns(messages, tools) -> Iterator[str]:
  """Yield what stands between the frames of each turn."""
  if tools:
    signatures = _TOOLS.format("\n".join(map(_json, tools)))
    given = messages[0]["role"] == "system"
    yield "system\n" + (f"{messages[0]['content']}\n\n" if given else "") + signatures
  last, results = _last_question(messages), []
  for number, message in enumerate(messages):
    role, content = message["role"], message["content"]
    if role == "tool":
      results.append(f"\n{_RESULT}\n{content}\n{_RESULT_END}")
      if number + 1 == len(messages) or messages[number + 1]["role"] != "tool":
        yield "user" + "".join(results)
        results = []
    elif role == "assistant":
      yield f"{role}\n" + _answer(message, number > last, number + 1 == len(messages))
    elif not (tools and number == 0 and role == "system"):
      yield f"{role}\n{content}"


def _last_question(messages) -> int:
  """Return where the last thing that a user asked is; results of tools are no questions."""
  for number in reversed(range(len(messages))):
    content = messages[number]["content"]
    result = content.startswith(_RESULT) and content.endswith(_RESULT_END)
    if messages[number]["role"] == "user" and not result:
      return number
  return len(messages) - 1


def _answer(message, after_question: bool, final: bool) -> str:
  """Return an assistant's turn with its thought, or without where it is history, and its calls."""
  content, thought = message["content"], message.get("reasoning_content")
  if thought is None:
    thought = ""
    if _THOUGHT in content:
      thought = content.split(_THOUGHT)[0].rstrip("\n").split(_THINK)[-1].lstrip("\n")
      content = content.split(_THOUGHT)[-1].lstrip("\n")
  text = content
  if after_question and (final or thought):
    text = f"{_THINK}\n{thought.strip(chr(10))}\n{_THOUGHT}\n\n" + content.lstrip("\n")
  for number, call in enumerate(message.get("tool_calls") or []):
    text += ("\n" if content or number else "") + _call(call)
  return text


def _call(call) -> str:
  function = (call.get("function") or call) if isinstance(call, Mapping) else None
  if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
    raise InputError(
      f'tool_calls holds {call!r}; a call is {{"function": {{"name": …, "arguments": …}}}}.'
    )
  arguments = function.get("arguments", {})
  written = arguments if isinstance(arguments, str) else _json(arguments)
  return f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {written}}}\n</tool_call>'


def _json(value) -> str:
  return json.dumps(value, ensure_ascii=False)
