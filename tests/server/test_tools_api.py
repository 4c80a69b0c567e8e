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
        with openai.OpenAI(base_url=f"{running.about['url']}/v1", api_key="none", max_retries=0) as made:
            yield made


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
def test_forced_calls_streamed_or_not(client: openai.OpenAI, choice: Any, reason: str) -> None:
    answer = client.chat.completions.create(**ASK, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert answer.finish_reason == reason
    assert answer.message.content == ""  # as vLLM; null where the model decided
    (call,) = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.id.startswith("chatcmpl-tool-")
    assert set(json.loads(call.function.arguments)) == ({"city"} if call.function.name == "weather" else set())
    chunks = client.chat.completions.create(**ASK, tool_choice=choice, parallel_tool_calls=False, stream=True)
    told = [chunk.choices[0] for chunk in chunks]
    news = [part for choice in told for part in choice.delta.tool_calls or [] if part.function is not None]
    assert {part.index for part in news} == {0}
    assert [part.function.name for part in news if part.function] == [call.function.name] + [None] * (len(news) - 1)
    assert "".join(part.function.arguments or "" for part in news if part.function) == call.function.arguments
    assert told[-1].finish_reason == reason


@pytest.mark.parametrize("max_tokens", [4, 40, 400])
def test_a_list_ends_and_keeps_its_whole_calls_when_cut(client: openai.OpenAI, max_tokens: int) -> None:
    choice = client.chat.completions.create(**(ASK | {"max_tokens": max_tokens}), tool_choice="required").choices[0]
    assert choice.finish_reason == ("length" if max_tokens == 4 else "tool_calls")
    assert len(choice.message.tool_calls or []) in ({0} if max_tokens == 4 else range(1, 9))


def test_several_choices_and_schemas_with_definitions(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/digit"}},
        "required": ["n"],
        "additionalProperties": False,
        "$defs": {"digit": {"type": "integer", "minimum": 3, "maximum": 5}},
    }
    tools: Any = [{"type": "function", "function": {"name": "näh", "parameters": schema}}]
    ask = ASK | {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "n": 2, "temperature": 1}
    for choice in client.chat.completions.create(**ask).choices:
        (call,) = choice.message.tool_calls or []
        assert call.function.name == "näh"
        assert json.loads(call.function.arguments)["n"] in {3, 4, 5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "not among `tools`"),
        ({"tool_choice": "required", "tools": [{"type": "function"}]}, "needs a `function`"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "does not go together"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**(ASK | fields))


def test_the_model_decides(client: openai.OpenAI) -> None:
    """It answers in words, or with calls that the schema allows; a small model rarely calls by itself."""
    choice = client.chat.completions.create(**ASK).choices[0]
    assert choice.finish_reason in ("stop", "length", "tool_calls")
    assert bool(choice.message.content) != bool(choice.message.tool_calls)


def test_results_of_tools_are_part_of_the_conversation(client: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    history: Any = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "It is sunny in Paris."}]},
    ]
    choice = client.chat.completions.create(**(ASK | {"messages": history})).choices[0]
    assert "sunny" in (choice.message.content or "")


def test_reasoning_within_a_budget_then_json() -> None:
    """The template opens the reasoning; a model without any training for it is made to close it in time."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n<think>\n{# </think> #}"
    )
    options = ("--port", "0", "--memory", "1GiB", "--max-model-len", "1k", "--chat-template", template)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    body: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": "How much is 2 + 2?"}],
        "temperature": 0,
        "max_tokens": 80,
        "extra_body": {"thinking_token_budget": 7},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    }
    with server(*options, module="langchain_vllm_server") as running:
        running.wait_ready()
        with openai.OpenAI(base_url=f"{running.about['url']}/v1", api_key="none", max_retries=0) as made:
            whole = made.chat.completions.create(**body)
            chunks = list(made.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    message: Any = whole.choices[0].message
    assert message.reasoning
    assert isinstance(json.loads(message.content)["n"], int)
    details = whole.usage and whole.usage.completion_tokens_details
    assert details
    assert 7 <= (details.reasoning_tokens or 0) <= 7 + len("</think>")
    news: Any = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning", "") or "" for delta in news) == message.reasoning
    assert "".join(delta.content or "" for delta in news) == message.content
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens_details == details
