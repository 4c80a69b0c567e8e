"""What vLLM's answers tell beyond OpenAI's: reasoning, every choice of a stream, tokens, reasons, timings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langchain_core.output_parsers.openai_tools import make_invalid_tool_call

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_core.messages import BaseMessage, InvalidToolCall

Tags = tuple[str, str]

_OF_CHOICE = ("stop_reason", "token_ids")
_OF_ANSWER = (
    "prompt_logprobs",
    "prompt_token_ids",
    "prompt_text",
    "kv_transfer_params",
    "ec_transfer_params",
    "metrics",
    "timings",
)


def metadata(answer: Mapping[str, Any], choice: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer, or a chunk of a stream, tells beside the message; older vLLM has `prompt_*` in the choice."""
    told = {name: choice[name] for name in _OF_CHOICE if choice.get(name) is not None}
    for name in _OF_ANSWER:
        if (value := answer.get(name)) is not None or (value := choice.get(name)) is not None:
            told[name] = value
    return told


@dataclass
class Splitter:
    """Parts reasoning in tags from the answer after it, for servers that run without a reasoning parser.

    Only an answer that begins with the tag has reasoning.
    """

    tags: Tags
    _state: str = "start"
    _held: str = ""
    _fresh: bool = False  # a section begins, without the line breaks after its tag

    def feed(self, text: str) -> tuple[str, str]:
        """The reasoning and the answer that are certain after another piece of text."""
        opening, closing = self.tags
        self._held += text
        reasoning = ""
        if self._state == "start":
            begun = self._held.lstrip()
            if opening.startswith(begun) and begun != opening:
                return "", ""
            self._fresh = begun.startswith(opening)
            self._state = "reasoning" if self._fresh else "answer"
            if self._fresh:
                self._held = begun[len(opening) :]
        if self._state == "reasoning":
            reasoning, found, after = self._held.partition(closing)
            if not found:
                certain = len(self._held) - _overlap(self._held, closing)
                reasoning, self._held = self._held[:certain], self._held[certain:]
                return self._trimmed(reasoning), ""
            reasoning = self._trimmed(reasoning)
            self._state, self._held, self._fresh = "answer", after, True
        answer, self._held = self._held, ""
        return reasoning, self._trimmed(answer)

    def finish(self) -> tuple[str, str]:
        """What was held back in case a tag went on."""
        rest, self._held = self._held, ""
        return (rest, "") if self._state == "reasoning" else ("", rest)

    def _trimmed(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        return text


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)


def keep_reasoning(message: BaseMessage, answer: Mapping[str, Any], tags: Tags | None) -> None:
    """Keep what LangChain makes reasoning blocks of: vLLM's `reasoning`, which older vLLM calls `reasoning_content`."""
    reasoning = answer.get("reasoning") or answer.get("reasoning_content")
    if not reasoning and tags and isinstance(message.content, str) and message.content:
        splitter = Splitter(tags)
        parts = (splitter.feed(message.content), splitter.finish())
        reasoning, message.content = ("".join(part) for part in zip(*parts, strict=True))
    if reasoning:
        message.additional_kwargs["reasoning_content"] = reasoning


def take_calls_without_object(message: dict[str, Any]) -> list[InvalidToolCall]:
    """Take the tool calls out of a raw message whose arguments are JSON, but no object: core would raise at them."""
    calls = message.get("tool_calls") or []
    message["tool_calls"] = [call for call in calls if not _is_without_object(call)]
    problem = "The arguments are not a JSON object."
    return [make_invalid_tool_call(call, problem) for call in calls if _is_without_object(call)]


def _is_without_object(call: Mapping[str, Any]) -> bool:
    try:
        return not isinstance(json.loads(call["function"]["arguments"]), dict)
    except (KeyError, TypeError, ValueError):  # core tells what is wrong with it
        return False


@dataclass
class StreamState:
    """What must be remembered from one chunk of a stream to the next."""

    tags: Tags | None
    options: dict[str, Any] = field(default_factory=dict)
    """The caller's `stream_options`, of which the base class would keep only what it sets itself."""
    _splitters: dict[int, Splitter] = field(default_factory=dict)

    def normalized(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """The choice with its delta's reasoning under one name, out of whatever the server does."""
        delta = dict(choice.get("delta") or {})
        reasoning = delta.pop("reasoning_content", None) or delta.pop("reasoning", None) or ""
        index = choice.get("index") or 0
        if self.tags and not reasoning:
            splitter = self._splitters.setdefault(index, Splitter(self.tags))
            reasoning, content = splitter.feed(delta.get("content") or "")
            if choice.get("finish_reason") or delta.get("tool_calls"):
                late = splitter.finish()
                reasoning, content = reasoning + late[0], content + late[1]
            delta["content"] = content
        delta["reasoning"] = reasoning
        return {**choice, "index": index, "delta": delta}


def other_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    """A piece of a choice after the first. Core adds the pieces of equal `index`, so that choices stay apart."""
    told = {**choice["delta"], **{name: choice.get(name) for name in ("finish_reason", "logprobs", *_OF_CHOICE)}}
    told.pop("role", None)
    return {"index": choice["index"], **{name: value for name, value in told.items() if value not in (None, "", [])}}
