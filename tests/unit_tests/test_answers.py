"""What is made of answers beyond their text: content blocks, reasoning, choices, metadata."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage

from langchain_vllm._answers import Splitter
from tests.unit_tests.mock_server import USAGE, MockServer, completion, sse

PATH = "/v1/chat/completions"
CALL = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "add", "arguments": '{"a": '}}
REST = {"index": 0, "function": {"arguments": "1}"}}


def events(*chunks: dict[str, Any]) -> MockServer:
    base = {"id": "c", "object": "chat.completion.chunk", "model": "m"}
    text = "".join(f"data: {json.dumps({**base, **chunk})}\n\n" for chunk in chunks)
    return MockServer({PATH: (200, text + "data: [DONE]\n\n")})


def choice(index: int = 0, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish_reason}


def total(chunks: Any) -> AIMessageChunk:
    first, *rest = chunks
    message = sum(rest, start=first)
    assert isinstance(message, AIMessageChunk)
    return message


class TestContentBlocks:
    @pytest.mark.parametrize("version", ["v0", "v1"])
    @pytest.mark.parametrize("before", [[], [{"content": "Let me see."}], [{"reasoning": "Add."}]])
    async def test_calls_after_text_or_reasoning(self, version: str, before: list[dict[str, Any]]) -> None:
        second = {**CALL, "index": 1, "id": "call-2"}
        deltas = [*before, {"tool_calls": [CALL]}, {"tool_calls": [REST]}]
        deltas += [{"tool_calls": [second]}, {"tool_calls": [{**REST, "index": 1}]}]
        server = MockServer({PATH: (200, sse(*deltas))})
        chat = server.chat(output_version=version)
        kinds = [*("reasoning" if "reasoning" in delta else "text" for delta in before), "tool_call", "tool_call"]
        for message in (total(chat.stream("1?")), total([chunk async for chunk in chat.astream("1?")])):
            assert [block["type"] for block in message.content_blocks] == kinds
            assert [call["args"] for call in message.tool_calls] == [{"a": 1}, {"a": 1}]

    @pytest.mark.parametrize("version", ["v0", "v1"])
    @pytest.mark.parametrize("arguments", ["{", "[1, 2]", '"Paris"', "7", "null"])
    def test_whole_messages(self, version: str, arguments: str) -> None:
        call = {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        bad = {"id": "call-2", "type": "function", "function": {"name": "add", "arguments": arguments}}
        body = completion(content="Let me see.", reasoning="Add.", tool_calls=[call, bad])
        message = MockServer({PATH: (200, body)}).chat(output_version=version).invoke("1?")
        kinds = [block["type"] for block in message.content_blocks]
        assert kinds == ["reasoning", "text", "tool_call", "invalid_tool_call"]
        assert message.invalid_tool_calls[0]["args"] == arguments


class TestReasoning:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("<think>Why.</think>\n\nSo.", ("Why.", "So.")),
            ("\n<think>\nWhy.</think>So.", ("Why.", "So.")),
            ("So <think>.", ("", "So <think>.")),
            ("<thinly>", ("", "<thinly>")),
            ("<think>Never </ends", ("Never </ends", "")),
            ("<th", ("", "<th")),
            ("<think></think>", ("", "")),
            ("", ("", "")),
        ],
    )
    def test_tags_in_pieces_of_any_size(self, text: str, expected: tuple[str, str]) -> None:
        for size in range(1, len(text) + 2):
            splitter = Splitter(("<think>", "</think>"))
            parts = [splitter.feed(text[i : i + size]) for i in range(0, len(text), size)]
            parts.append(splitter.finish())
            assert tuple("".join(part) for part in zip(*parts, strict=True)) == expected

    async def test_tags_of_a_server_without_a_parser(self) -> None:
        text = "<think>Why.</think>\n\nSo."
        chat = MockServer({PATH: (200, completion(content=text))}).chat()
        stream = MockServer({PATH: (200, sse(*({"content": piece} for piece in text)))}).chat()
        messages = [chat.invoke("?"), total(stream.stream("?")), total([chunk async for chunk in stream.astream("?")])]
        for message in messages:
            assert message.content == "So."
            assert message.additional_kwargs["reasoning_content"] == "Why."

    def test_tags_can_be_left_alone(self) -> None:
        text = "<think>Why.</think>So."
        server = MockServer({PATH: (200, completion(content=text))})
        chat = server.chat().model_copy(update={"reasoning_tags": None})
        assert chat.invoke("?").content == text

    def test_replay(self) -> None:
        server = MockServer()
        earlier = AIMessage("So.", additional_kwargs={"reasoning_content": "Why."})
        blocks = AIMessage([{"type": "reasoning", "reasoning": "Why."}, {"type": "text", "text": "So."}])
        conversation = [HumanMessage("?"), earlier, HumanMessage("?"), blocks, HumanMessage("?")]
        server.chat(replay_reasoning=True).invoke(conversation)
        assert [m.get("reasoning_content") for m in server.body["messages"]] == [None, "Why.", None, "Why.", None]
        server.chat().invoke(conversation)
        assert not any("reasoning_content" in message for message in server.body["messages"])

    def test_thinking_switch(self) -> None:
        server = MockServer()
        chat = server.chat(enable_thinking=False, thinking_token_budget=9, chat_template_kwargs={"a": 1})
        chat.invoke("?")
        expected = {"enable_thinking": False, "thinking": False, "a": 1}
        assert server.body["chat_template_kwargs"] == expected
        assert server.body["thinking_token_budget"] == 9
        chat.invoke("?", enable_thinking=True)
        assert server.body["chat_template_kwargs"]["enable_thinking"] is True


class TestChoices:
    async def test_choices_of_a_stream_stay_apart(self) -> None:
        server = events(
            {"choices": [choice(0, role="assistant", content="A")]},
            {"choices": [choice(1, role="assistant", content="B", reasoning="b")]},
            {"choices": [choice(1, content="2"), choice(0, content="1")]},
            {"choices": [choice(1, finish_reason="length")]},
            {"choices": [choice(0, finish_reason="stop")]},
            {"choices": [], "usage": USAGE},
        )
        chat = server.chat()
        for message in (total(chat.stream("?", n=2)), total([chunk async for chunk in chat.astream("?", n=2)])):
            assert message.content == "A1"
            assert message.response_metadata["finish_reason"] == "stop"
            other = {"index": 1, "content": "B2", "reasoning": "b", "finish_reason": "length"}
            assert message.additional_kwargs["choices"] == [other]

    def test_every_choice_has_its_own_metadata(self) -> None:
        body = completion()
        body["choices"] = [
            {**body["choices"][0], "index": i, "finish_reason": reason, "stop_reason": why, "token_ids": [i]}
            for i, reason, why in [(0, "stop", "."), (1, "length", None)]
        ]
        generations = MockServer({PATH: (200, body)}).chat(n=2).generate([[HumanMessage("?")]]).generations[0]
        told = [generation.generation_info or {} for generation in generations]
        assert [info["finish_reason"] for info in told] == ["stop", "length"]
        assert [info.get("stop_reason") for info in told] == [".", None]
        assert [info["token_ids"] for info in told] == [[0], [1]]


class TestMetadata:
    def test_whole_answers(self) -> None:
        more = {
            "prompt_logprobs": [None],
            "prompt_token_ids": [1, 2],
            "kv_transfer_params": {"a": 1},
            "metrics": {"t": 1},
        }
        body = {**completion(), **more}
        body["choices"][0] |= {"stop_reason": 7, "token_ids": [3, 4], "logprobs": {"content": []}}
        body["usage"] = {**USAGE, "prompt_tokens_details": {"cached_tokens": 4}}
        message = MockServer({PATH: (200, body)}).chat().invoke("?")
        assert more.items() <= message.response_metadata.items()
        assert message.response_metadata["stop_reason"] == 7
        assert message.response_metadata["token_ids"] == [3, 4]
        assert message.usage_metadata is not None
        assert message.usage_metadata["input_token_details"] == {"cache_read": 4}

    def test_streams(self) -> None:
        logprobs = [{"content": [{"token": token, "logprob": -1.0}]} for token in "AB"]
        first = {**choice(content="A"), "logprobs": logprobs[0], "token_ids": [3]}
        last = {
            **choice(content="B", finish_reason="stop"),
            "stop_reason": "x",
            "logprobs": logprobs[1],
            "token_ids": [4],
        }
        server = events(
            {"choices": [first], "prompt_token_ids": [1, 2], "usage": USAGE},
            {"choices": [last], "usage": USAGE},
            {"choices": [], "usage": USAGE, "metrics": {"t": 1}},
        )
        options = {"continuous_usage_stats": True}
        message = total(server.chat(model_kwargs={"stream_options": options}).stream("?"))
        assert server.body["stream_options"] == {"include_usage": True, **options}
        assert message.usage_metadata is not None
        assert message.usage_metadata["total_tokens"] == USAGE["total_tokens"]
        told = message.response_metadata
        assert (told["prompt_token_ids"], told["token_ids"], told["stop_reason"]) == ([1, 2], [3, 4], "x")
        assert [entry["token"] for entry in told["logprobs"]["content"]] == ["A", "B"]
        assert told["metrics"] == {"t": 1}
        list(server.chat().stream("?", stream_options={"include_usage": False}))
        assert server.body.get("stream_options", {}).get("include_usage") is not True
