"""Structured output: what is asked for, and what is made of whole, partial and cut off answers."""

from __future__ import annotations

import enum
import json
import re
from typing import Any, Literal, TypedDict

import pydantic
import pydantic.v1
import pytest
from langchain_core.exceptions import OutputParserException

from tests.unit_tests.mock_server import MockServer, completion, sse


class Joke(pydantic.BaseModel):
    """A joke."""

    setup: str = pydantic.Field(description="The question.")
    punchline: str


class OldJoke(pydantic.v1.BaseModel):
    setup: str
    punchline: str


class TypedJoke(TypedDict):
    """A joke."""

    setup: str
    punchline: str


SCHEMA: dict[str, Any] = {
    "title": "joke",
    "type": "object",
    "properties": {"setup": {"type": "string"}, "punchline": {"type": "string"}},
    "required": ["setup", "punchline"],
}
VALUE = {"setup": "Why?", "punchline": "Because."}
TEXT = json.dumps(VALUE)
PATH = "/v1/chat/completions"


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


@pytest.fixture
def server() -> MockServer:
    return answering(TEXT)


def answering(text: str, finish_reason: str = "stop") -> MockServer:
    body = completion(content=text)
    body["choices"][0]["finish_reason"] = finish_reason
    return MockServer({PATH: (200, body)})


@pytest.mark.parametrize(
    ("schema", "expected"),
    [(Joke, Joke(**VALUE)), (OldJoke, OldJoke(**VALUE)), (TypedJoke, VALUE), (SCHEMA, VALUE)],
    ids=["pydantic", "pydantic.v1", "TypedDict", "dict"],
)
async def test_json_schema(server: MockServer, schema: Any, expected: Any) -> None:
    llm = server.chat().with_structured_output(schema)
    assert llm.invoke("A joke?") == expected
    assert await llm.ainvoke("A joke?") == expected
    asked = server.body["response_format"]
    assert asked["type"] == "json_schema"
    assert set(asked["json_schema"]["schema"]["properties"]) == {"setup", "punchline"}
    assert asked["json_schema"]["schema"]["required"] == ["setup", "punchline"]


def test_a_response_format_dictionary_passes_as_it_is(server: MockServer) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "joke", "schema": SCHEMA, "strict": True}}
    assert server.chat().with_structured_output(format_).invoke("A joke?") == VALUE
    assert server.body["response_format"] == format_
    server.chat().invoke("A joke?", response_format=Joke)
    assert server.body["response_format"]["json_schema"]["name"] == "Joke"
    server.chat(response_format={"type": "json_object"}).invoke("A joke?")
    assert server.body["response_format"] == {"type": "json_object"}


def test_strict_is_passed_on(server: MockServer) -> None:
    server.chat().with_structured_output(Joke, strict=True).invoke("A joke?")
    assert server.body["response_format"]["json_schema"]["strict"] is True


def test_json_mode(server: MockServer) -> None:
    assert server.chat().with_structured_output(method="json_mode").invoke("A joke in JSON?") == VALUE
    assert server.body["response_format"] == {"type": "json_object"}
    assert server.chat().with_structured_output(Joke, method="json_mode").invoke("A joke in JSON?") == Joke(**VALUE)


def test_function_calling() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "Joke", "arguments": TEXT}}
    server = MockServer({PATH: (200, completion(content=None, tool_calls=[call]))})
    assert server.chat().with_structured_output(Joke, method="function_calling").invoke("A joke?") == Joke(**VALUE)
    assert server.body["tool_choice"] == {"type": "function", "function": {"name": "Joke"}}


@pytest.mark.parametrize("options", [Colour, Literal["red", "green"], ["red", "green"]])
def test_choice(options: Any) -> None:
    server = answering("green")
    chosen = server.chat().with_structured_output(options).invoke("Which?")
    assert chosen == (Colour.GREEN if options is Colour else "green")
    assert server.body["structured_outputs"] == {"choice": ["red", "green"]}


def test_choices_keep_their_types() -> None:
    assert answering("2").chat().with_structured_output(Literal[1, 2]).invoke("Which?") == 2


def test_regex_and_grammar() -> None:
    server = answering("42")
    assert server.chat().with_structured_output(re.compile(r"\d+")).invoke("How many?") == "42"
    assert server.body["structured_outputs"] == {"regex": r"\d+"}
    server.chat().with_structured_output(r"\d+", method="regex").invoke("How many?")
    assert server.body["structured_outputs"] == {"regex": r"\d+"}
    server.chat().with_structured_output('root ::= "a"', method="grammar").invoke("How many?")
    assert server.body["structured_outputs"] == {"grammar": 'root ::= "a"'}


def test_streams_of_text_are_pieces() -> None:
    server = MockServer({PATH: (200, sse({"content": "4"}, {"content": "2"}))})
    assert list(server.chat().with_structured_output(re.compile(r"\d+")).stream("How many?")) == ["4", "2"]


async def test_streams_of_json_grow() -> None:
    server = MockServer({PATH: (200, sse(*({"content": piece} for piece in (TEXT[:14], TEXT[14:30], TEXT[30:]))))})
    llm = server.chat().with_structured_output(SCHEMA)
    parts = list(llm.stream("A joke?"))
    assert parts[-1] == VALUE
    assert parts[0] == {"setup": "Why"}
    assert [part async for part in llm.astream("A joke?")] == parts
    assert list(server.chat().with_structured_output(Joke).stream("A joke?"))[-1] == Joke(**VALUE)


@pytest.mark.parametrize("schema", [Joke, SCHEMA])
def test_a_cut_off_answer_is_an_error(schema: Any) -> None:
    server = answering(TEXT[:-4], "length")
    with pytest.raises(OutputParserException, match="cut off at max_tokens"):
        server.chat().with_structured_output(schema).invoke("A joke?")
    result = server.chat().with_structured_output(schema, include_raw=True).invoke("A joke?")
    assert result["raw"].content == TEXT[:-4]
    assert result["parsed"] is None
    assert "cut off" in str(result["parsing_error"])


def test_include_raw(server: MockServer) -> None:
    result = server.chat().with_structured_output(Joke, include_raw=True).invoke("A joke?")
    assert (result["parsed"], result["parsing_error"]) == (Joke(**VALUE), None)


def test_an_answer_that_does_not_fit() -> None:
    with pytest.raises(OutputParserException, match=r"(?s)does not fit: .*punchline"):
        answering('{"setup": "Why?"}').chat().with_structured_output(Joke).invoke("A joke?")


def test_format_instructions(server: MockServer) -> None:
    llm = server.chat().with_structured_output(Joke, include_format_instructions=True)
    assert llm.invoke("A joke?") == Joke(**VALUE)
    system, user = server.body["messages"]
    assert "The question." in system["content"]
    assert user["content"] == "A joke?"
    llm.invoke([("system", "Be funny."), ("human", "A joke?")])
    assert server.body["messages"][0]["content"].startswith("Be funny.\n\n")
    assert len(server.body["messages"]) == 2


def test_reasoning_streams_beside_json() -> None:
    server = MockServer({PATH: (200, sse({"reasoning": "Cats "}, {"reasoning": "then."}, {"content": TEXT}))})
    chunks = list(server.chat().bind(response_format=Joke).stream("A joke?"))
    reasons = [chunk.additional_kwargs.get("reasoning_content") for chunk in chunks]
    assert reasons[:3] == ["Cats ", "then.", None]


def test_tools_beside_a_schema() -> None:
    def weather(city: str) -> str:
        """The weather."""
        return city

    server = answering(TEXT)
    llm = server.chat().with_structured_output(Joke, tools=[weather])
    assert llm.invoke("A joke?") == Joke(**VALUE)
    assert server.body["tools"][0]["function"]["name"] == "weather"
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    server.answers[PATH] = (200, completion(content=None, tool_calls=[call]))
    assert llm.invoke("The weather?") is None
    server.chat().bind_tools([weather], response_format=Joke, strict=False).invoke("A joke?")
    assert server.body["response_format"]["json_schema"]["name"] == "Joke"
    assert server.body["tools"][0]["function"]["strict"] is False


@pytest.mark.parametrize(
    ("schema", "options", "message"),
    [
        (None, {}, "needs a schema"),
        (Joke, {"method": "yaml"}, "Unknown method 'yaml'"),
        (Joke, {"method": "regex"}, "takes a string"),
        (3, {"method": "choice"}, "takes an Enum"),
        ([], {}, "nothing to choose"),
        ("a", {"method": "regex", "include_format_instructions": True}, "is for JSON"),
        (Joke, {"method": "function_calling", "include_format_instructions": True}, "not for function_calling"),
    ],
)
def test_contradictions(server: MockServer, schema: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        server.chat().with_structured_output(schema, **options)
