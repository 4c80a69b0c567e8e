"""Forced tool calls of the default model over HTTP, as the openai client asks for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.server.test_serve import server

if TYPE_CHECKING:
    from collections.abc import Iterator

WEATHER = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER | {"additionalProperties": False}}},
    {"type": "function", "function": {"name": "now"}},
]
ASK: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "temperature": 0,
    "max_tokens": 100,
    "tools": TOOLS,
}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    options = ("--port", "0", "--memory", "1GiB", "--max-model-len", "1k", "--served-model-name", "smollm2")
    with server(*options, module="langchain_vllm_server") as running:
        running.wait_ready()
        with openai.OpenAI(base_url=f"{running.where['url']}/v1", api_key="none", max_retries=0) as made:
            yield made


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
def test_forced_calls_streamed_or_not(client: openai.OpenAI, choice: Any, reason: str) -> None:
    answer = client.chat.completions.create(**ASK, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert answer.finish_reason == reason
    assert not answer.message.content
    (call,) = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.id.startswith("chatcmpl-tool-")
    assert set(json.loads(call.function.arguments)) == ({"city"} if call.function.name == "weather" else set())
    chunks = client.chat.completions.create(**ASK, tool_choice=choice, parallel_tool_calls=False, stream=True)
    *_, last = [chunk.choices[0] for chunk in chunks]
    (told,) = last.delta.tool_calls or []
    assert told.function is not None
    assert (told.index, told.function.name, told.function.arguments, last.finish_reason) == (
        0,
        call.function.name,
        call.function.arguments,
        reason,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "auto"}, "does not let the model decide"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "not among `tools`"),
        ({"tool_choice": "required", "tools": [{"type": "function"}]}, "needs a `function`"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "does not go together"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**(ASK | fields))
