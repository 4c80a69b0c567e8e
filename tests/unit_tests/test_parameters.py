"""The arguments of ChatVLLM and of its calls: typed fields, other names, and names that nothing would come of."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from pydantic import ValidationError

from langchain_vllm._parameters import ChatParameters
from tests.unit_tests.mock_server import MockServer


@pytest.fixture
def server() -> MockServer:
    return MockServer()


VALUES: dict[str, Any] = {"bool": True, "int": 3, "float": 0.5, "str": "x"}


def value_for(annotation: str) -> Any:
    if "Literal" in annotation:
        return "left"
    if "dict[str, int]" in annotation:
        return {"min_count": 2}
    if "list[dict" in annotation:
        return [{"text": "x"}]
    if "dict" in annotation:
        return {"regex": "a"}
    if "list[int]" in annotation:
        return [1]
    if "list[str]" in annotation:
        return ["x"]
    return next(value for name, value in VALUES.items() if name in annotation)


@pytest.mark.parametrize("name", ChatParameters.model_fields)
def test_every_field_is_sent_from_the_object_and_from_the_call(server: MockServer, name: str) -> None:
    value = value_for(str(ChatParameters.model_fields[name].annotation))
    server.chat(**{name: value}).invoke("Hello")
    assert server.body[name] == value
    server.chat().invoke("Hello", **{name: value})
    assert server.body[name] == value
    server.chat(model_kwargs={name: value}).invoke("Hello")
    assert server.body[name] == value
    server.chat(**{name: value}).invoke("Hello", **{name: None})
    assert name not in server.body


@pytest.mark.parametrize("alias", ["max_new_tokens", "num_predict", "max_completion_tokens"])
def test_aliases(server: MockServer, alias: str) -> None:
    server.chat(**{alias: 7}).invoke("Hello")
    assert server.body["max_tokens"] == 7
    server.chat(max_tokens=9).invoke("Hello", **{alias: 7})
    assert server.body["max_tokens"] == 7
    with pytest.raises(ValidationError, match="contradict each other"):
        server.chat(**{alias: 7}, max_tokens=8)


GUIDED: dict[str, Any] = {"guided_regex": "a+", "guided_decoding_backend": "xgrammar"}


@pytest.mark.parametrize(
    ("options", "call"),
    [(GUIDED, {}), ({}, GUIDED), ({"extra_body": GUIDED}, {}), ({}, {"extra_body": GUIDED})],
    ids=["constructor", "call", "extra_body", "call's extra_body"],
)
@pytest.mark.filterwarnings("default")
def test_removed_fields_are_translated(server: MockServer, options: dict[str, Any], call: dict[str, Any]) -> None:
    with pytest.warns(DeprecationWarning, match="vLLM has no guided_regex"):
        server.chat(**options).invoke("Hello", **call)
    assert server.body["structured_outputs"] == {"regex": "a+"}
    assert not any(name.startswith("guided") for name in server.body)


@pytest.mark.parametrize(
    ("name", "hint"), [("tempreature", "did you mean temperature"), ("xyzzy", "goes into extra_body")]
)
def test_unknown_names_are_refused(server: MockServer, name: str, hint: str) -> None:
    with pytest.raises(ValidationError, match=f"ChatVLLM has no parameter {name}: .*{hint}"):
        server.chat(**{name: 1})
    with pytest.raises(ValueError, match=f"has no parameter {name}: .*{hint}"):
        server.chat().invoke("Hello", **{name: 1})
    assert server.requests == []


def test_openai_fields_without_a_field_of_their_own(server: MockServer) -> None:
    server.chat(parallel_tool_calls=False, user="me").invoke("Hello", request_id="r")
    assert server.body["parallel_tool_calls"] is False
    assert (server.body["user"], server.body["request_id"]) == ("me", "r")


def test_a_tool_choice_that_is_no_tool(server: MockServer) -> None:
    tool = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    with pytest.raises(ValueError, match=r"tool_choice='g' is none of the tools \['f'\]"):
        server.chat().bind_tools([tool], tool_choice="g")
    server.chat().bind_tools([tool], tool_choice="any").invoke("Hello")
    assert server.body["tool_choice"] == "required"


def test_no_tools_at_all(server: MockServer) -> None:
    server.chat().bind_tools([], tool_choice="any", parallel_tool_calls=False).invoke("Hello")
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & server.body.keys()


def test_media(server: MockServer) -> None:
    blocks: list[Any] = [
        {"type": "text", "text": "What is it?"},
        {"type": "video", "url": "http://v"},
        {"type": "video", "base64": "AAAA", "mime_type": "video/webm"},
        {"type": "audio", "url": "http://a"},
        {"type": "image", "url": "http://i", "extras": {"uuid": "u"}},
        {"type": "image", "base64": "AAAA", "mime_type": "image/png"},
        {"type": "video_url", "video_url": {"url": "http://raw"}},
    ]
    message = HumanMessage(blocks)
    server.chat().invoke([message, ToolMessage("x", tool_call_id="1")])
    assert server.body["messages"][0]["content"] == [
        {"type": "text", "text": "What is it?"},
        {"type": "video_url", "video_url": {"url": "http://v"}},
        {"type": "video_url", "video_url": {"url": "data:video/webm;base64,AAAA"}},
        {"type": "audio_url", "audio_url": {"url": "http://a"}},
        {"type": "image_url", "image_url": {"url": "http://i"}, "uuid": "u"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "video_url", "video_url": {"url": "http://raw"}},
    ]
    assert message.content == blocks
