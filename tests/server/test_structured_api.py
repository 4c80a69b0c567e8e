"""Structured outputs over HTTP: the scripted engine wants to say something else, and may not."""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Any

import pytest

from langchain_vllm_server import structured
from langchain_vllm_server.constraint import ConstraintError
from langchain_vllm_server.reasoning import THINK
from tests.server.fakes import EOS, byte_tokenizer, running, sse_data

if TYPE_CHECKING:
    from collections.abc import Sequence

PERSON = {"type": "object", "properties": {"name": {"enum": ["Anna"]}, "age": {"const": 31}}, "required": ["name"]}
EMPTY = {"type": "object", "additionalProperties": False}
ROUTES = ["/v1/chat/completions", "/v1/completions"]
LARK = 'start: "a" ("b" | "c")'
GBNF = 'root ::= "a" tail\ntail ::= "b" | "c"'


def body(route: str, **fields: Any) -> dict[str, Any]:
    prompt = {"prompt": "Hi"} if route == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    return {**prompt, "temperature": 0, "max_tokens": 120, **fields}


def text_of(answer: dict[str, Any], index: int = 0) -> str:
    choice = answer["choices"][index]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def schema_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (schema_format(PERSON), '{"name": "Anna", "age": 31}'),
        ({"structured_outputs": {"json": PERSON}}, '{"name": "Anna", "age": 31}'),
        ({"structured_outputs": {"json": json.dumps(PERSON)}}, '{"name": "Anna", "age": 31}'),
        ({"structured_outputs": {"json": EMPTY, "whitespace_pattern": "XX"}}, "{XX}"),
        ({"structured_outputs": {"choice": ["yes", "I'd say so"]}}, "I'd say so"),
        ({"structured_outputs": {"choice": ['"', "\\n/\n"]}}, '"'),
        ({"structured_outputs": {"regex": "I[0-9]{3}/x"}}, "I000/x"),
        ({"structured_outputs": {"grammar": LARK}}, "ab"),
        ({"structured_outputs": {"grammar": GBNF}}, "ab"),
        ({"guided_choice": ["no"]}, "no"),
        ({"guided_regex": "no"}, "no"),
        ({"guided_grammar": LARK}, "ab"),
        ({"guided_json": {"const": 1}, "guided_decoding_backend": "xgrammar"}, "1"),
        ({"grammar": GBNF}, "ab"),
        ({"ebnf": GBNF}, "ab"),
        ({"regex": "no"}, "no"),
        ({"json_schema": json.dumps({"const": 1})}, "1"),
        ({"response_format": {"type": "json_object", "schema": {"const": 1}}}, "1"),
        ({"response_format": {"type": "text"}}, "I do not want JSON"),
        ({"response_format": None, "structured_outputs": None}, "I do not want JSON"),
    ],
)
async def test_answers_are_what_was_asked_for(route: str, fields: dict[str, Any], expected: str) -> None:
    """The same whether streamed, with ignore_eos and with min_tokens; finish_reason is "stop" when it is complete."""
    async with running("I do not want JSON") as server:
        answer = (await server.post(route, **body(route, **fields))).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert text_of(answer) == expected
        if fields.get("response_format", 1) in (None, {"type": "text"}):
            return
        for more in ({"stream": True}, {"ignore_eos": True}, {"min_tokens": 60}):
            response = await server.post(route, **body(route, **fields, **more))
            if "stream" in more:
                *chunks, done = sse_data(response.text)
                assert done == "[DONE]"
                entries = [json.loads(chunk)["choices"][0] for chunk in chunks]
                text = "".join(e["delta"].get("content", "") if "delta" in e else e["text"] for e in entries)
                assert (text, entries[-1]["finish_reason"]) == (expected, "stop")
            else:
                assert response.json()["choices"][0]["finish_reason"] == "stop"
                assert text_of(response.json()) == expected


async def test_any_json_object_is_one() -> None:
    async with running('{"a": [1, 2.5, {"b": null}], "c": true}, and more') as server:
        answer = (await server.chat(temperature=0, response_format={"type": "json_object"})).json()
        assert json.loads(text_of(answer)) == {"a": [1, 2.5, {"b": None}], "c": True}


async def test_free_whitespace_is_bounded_unless_asked_for() -> None:
    """A model that loops on whitespace gets none of it; where it is free, not more than a line and its indentation."""
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    async with running("{" + "\n" * 100) as server:
        fixed = await server.chat(structured_outputs={"json": schema}, temperature=0)
        free = await server.chat(
            structured_outputs={"json": schema, "disable_any_whitespace": False}, temperature=0, max_tokens=200
        )
        spelled = await server.chat(structured_outputs={"json": schema, "disable_any_whitespace": True}, temperature=0)
    assert text_of(fixed.json()) == text_of(spelled.json()) == '{"a": 1}'
    assert text_of(free.json()).startswith("{" + "\n" * 40 + '"')
    assert json.loads(text_of(free.json())) == {"a": 1}


async def test_numbers_end() -> None:
    async with running("0." + "3" * 200) as server:
        answer = (await server.chat(temperature=0, structured_outputs={"json": {"type": "number"}})).json()
        assert (text_of(answer), answer["choices"][0]["finish_reason"]) == ("0.333333333", "stop")
    async with running("9" * 200) as server:
        answer = (await server.chat(temperature=0, structured_outputs={"json": {"type": "integer"}})).json()
        assert len(text_of(answer)) <= 16
        assert answer["choices"][0]["finish_reason"] == "stop"


async def test_objects_have_what_they_list() -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}}
    async with running('{"b": 2}' + " " * 50) as server:
        closed = (await server.chat(temperature=0, structured_outputs={"json": schema})).json()
        opened = (
            await server.chat(temperature=0, structured_outputs={"json": {**schema, "additionalProperties": True}})
        ).json()
        switched = (
            await server.chat(
                temperature=0, structured_outputs={"json": schema, "disable_additional_properties": False}
            )
        ).json()
    assert json.loads(text_of(closed)) == {"a": 1}
    assert json.loads(text_of(opened)) == json.loads(text_of(switched)) == {"b": 2}


async def test_every_choice_goes_its_own_way() -> None:
    eos = byte_tokenizer().token_id(EOS)
    words = iter(["no", "yes"])

    def script(_prompt: Sequence[int], _params: Any) -> list[int]:
        return [*byte_tokenizer().encode(next(words)), eos or 0] * 50

    async with running(script) as server:
        fields = {"n": 2, "temperature": 1, "structured_outputs": {"choice": ["yes", "no"]}}
        answer = (await server.chat(**fields)).json()
    assert [text_of(answer, i) for i in range(2)] == ["no", "yes"]


async def test_cut_at_max_tokens() -> None:
    async with running("x") as server:
        answer = (await server.chat(max_tokens=3, **schema_format(PERSON))).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert text_of(answer) == '{"n'


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "Invalid enum value 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "'json_schema' field must be provided"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "'json_schema' field must be provided",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "must have one of"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs", "unknown field `jsn`"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "only use one kind"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "give one of them",
        ),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "b"}, "guided_regex", "contradict each other"),
        ({"guided_choice": ["a"], "guided_json": {}}, "structured_outputs", "only use one kind"),
        ({"response_format": {"type": "json_object", "schema": 1}}, "response_format.schema", "schema"),
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex", "unclosed group"),
        (
            {"structured_outputs": {"regex": "a"}, "use_beam_search": True},
            "structured_outputs.regex",
            "use_beam_search",
        ),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "must not be empty"),
        ({"structured_outputs": {"regex": "(?=a)a"}}, "structured_outputs.regex", "look-around"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "must be a list of texts"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice", "none of them empty"),
        ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs.grammar", "Expected token ':'"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar", "not a grammar in EBNF"),
        ({"structured_outputs": {"grammar": "start: x\nx: x"}}, "structured_outputs.grammar", "no text satisfies"),
        ({"structured_outputs": {"grammar": "a" * 300_000}}, "structured_outputs.grammar", "at most 262144"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "must be an object, got 5"),
        ({"structured_outputs": {"structural_tag": "{"}}, "structured_outputs.structural_tag", "not valid JSON"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "`format`, or `structures`"),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "magic"}}},
            "response_format",
            "format.type: `magic` is none of",
        ),
        (
            {"response_format": {"type": "structural_tag", "triggers": ["<a"], "structures": [{"begin": "<b"}]}},
            "response_format",
            r"structures\[0\]",
        ),
        (schema_format({"type": "foo"}), "response_format.json_schema.schema", r"\$\.type: Invalid type"),
    ],
)
async def test_refusals(fields: dict[str, Any], param: str, message: str) -> None:
    async with running("x") as server:
        response = await server.chat(**fields)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == param
        assert re.search(message, error["message"])
        assert (await server.chat()).status_code == 200, "the next request is served"
        streamed = await server.chat(**fields, stream=True)
        assert streamed.status_code == 400


async def test_removed_fields_are_translated_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    async with running("x") as server:
        with caplog.at_level(logging.WARNING):
            answer = (await server.chat(guided_choice=["yes"])).json()
    assert text_of(answer) == "yes"
    assert "took it as `structured_outputs.choice`" in caplog.text


async def test_a_failing_constraint_ends_its_request_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> list[int]:
        raise ConstraintError("the parser is worn out")

    async with running("x") as server:
        monkeypatch.setattr(structured.MatcherConstraint, "forced", fail)
        monkeypatch.setattr(structured.MatcherConstraint, "start", classmethod(lambda c, t, _: c(_Matcher(), t)))
        response = await server.chat(structured_outputs={"regex": "a"})
        assert response.status_code == 500
        assert "the parser is worn out" in response.json()["error"]["message"]
        streamed = await server.chat(structured_outputs={"regex": "a"}, stream=True)
        assert "the parser is worn out" in streamed.text
        assert (await server.chat()).status_code == 200


class _Matcher:
    def deep_copy(self) -> _Matcher:
        return self


async def test_a_slow_compilation_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 0.0)
    async with running("x") as server:
        response = await server.chat(structured_outputs={"regex": "a"})
        assert response.status_code == 400
        assert "takes longer than" in response.json()["error"]["message"]


async def test_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    start = structured.MatcherConstraint.start

    def count(tokenizer: Any, source: str) -> Any:
        compiled.append(source)
        return start(tokenizer, source)

    monkeypatch.setattr(structured.MatcherConstraint, "start", count)
    async with running("x") as server:
        for _ in range(3):
            assert text_of((await server.chat(structured_outputs={"choice": ["b"]})).json()) == "b"
    assert len(compiled) == 1


async def test_a_model_without_an_end_cannot_be_constrained() -> None:
    async with running("x", eos_token_ids=()) as server:
        response = await server.chat(structured_outputs={"choice": ["b"]})
    assert response.status_code == 400
    assert "no end-of-sequence token" in response.json()["error"]["message"]


async def test_thousands_of_choices_some_of_which_begin_others() -> None:
    choices = [f"choice {i}" for i in range(5000)]
    async with running("choice 41") as server:
        short = await server.chat(temperature=0, structured_outputs={"choice": choices})
    async with running("choice 4171, I think") as server:
        long = await server.chat(temperature=0, structured_outputs={"choice": choices})
    assert (text_of(short.json()), text_of(long.json())) == ("choice 41", "choice 4171")


@pytest.mark.parametrize(
    ("answer", "choices", "reasoning", "content"),
    [
        ("<think>hm</think>yes", ["yes"], "hm", "yes"),  # a mark of seven tokens here
        ("<think>hm</think><th", ["<th"], "hm", "<th"),
        ("<this>", ["<this>", "<that>"], None, "<this>"),  # begins as the mark does
        ("<that>", ["<this>", "<that>"], None, "<that>"),
        ("<th", ["<th"], None, "<th"),
        ("<think>hm</think>no", ["yes"], "hm", "yes"),
    ],
)
async def test_an_answer_may_begin_as_reasoning_does(
    answer: str, choices: list[str], reasoning: str | None, content: str
) -> None:
    async with running(answer, reasoning_format=THINK) as server:
        fields = {"structured_outputs": {"choice": choices}, "thinking_token_budget": 20}
        told = (await server.post(ROUTES[0], **body(ROUTES[0], **fields))).json()
    message = told["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (reasoning, content)
