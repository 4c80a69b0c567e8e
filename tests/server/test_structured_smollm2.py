"""Structured outputs of the default model over HTTP, as the openai client asks for them."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import openai
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from tests.server.test_serve import Process, server

if TYPE_CHECKING:
    from collections.abc import Iterator


class Person(BaseModel):
    name: str
    age: int
    city: Literal["Rome", "Paris", "Berlin"]


ASK: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Anna is 31 and lives in Rome. Describe her as JSON: name, age, city."}],
    "temperature": 0,
    "max_tokens": 100,
}
SCHEMA = Person.model_json_schema()
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    options = ("--port", "0", "--memory", "1GiB", "--max-model-len", "1k", "--served-model-name", "smollm2")
    with server(*options, module="langchain_vllm_server") as running:
        running.wait_ready()
        yield running
        running.popen.terminate()
        code, errors = running.end()
        assert (code, "Traceback" in errors, "leaked" in errors) == (0, False, False), errors


@pytest.fixture(scope="module")
def client(process: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{process.about['url']}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_typed_client_parses(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(**ASK, response_format=Person)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.parsed == Person(name="Anna", age=31, city="Rome")
    with client.chat.completions.stream(**ASK, response_format=Person) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed


def test_the_same_alone_among_others_and_token_by_token(client: openai.OpenAI) -> None:
    """Eight at once, streamed or not, with forced tokens at once or (logprobs) a forward for each: one text."""

    def ask(number: int) -> str:
        more: dict[str, Any] = {"logprobs": True} if number % 4 == 3 else {}
        if number % 2 == 0:
            answer = client.chat.completions.create(**ASK, response_format=FORMAT)
            return answer.choices[0].message.content or ""
        stream = client.chat.completions.create(**ASK, response_format=FORMAT, stream=True, **more)
        choices = [chunk.choices[0] for chunk in stream]
        assert choices[-1].finish_reason == "stop"
        return "".join(choice.delta.content or "" for choice in choices)

    alone = ask(0)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {alone}
    assert Draft202012Validator(SCHEMA).is_valid(json.loads(alone))


def test_every_sample_is_valid(client: openai.OpenAI) -> None:
    hot = {**ASK, "temperature": 2, "seed": 7, "n": 8, "max_tokens": 300}
    answers = client.chat.completions.create(**hot, response_format=FORMAT).choices
    finished = [json.loads(c.message.content or "") for c in answers if c.finish_reason == "stop"]
    assert finished
    assert all(Draft202012Validator(SCHEMA).is_valid(one) for one in finished)
    assert len({json.dumps(one) for one in finished}) > 1


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"choice": ["positive", "negative", "neutral"]}, "positive|negative|neutral"),
        ({"regex": r"\d{4}-\d{2}-\d{2}"}, r"\d{4}-\d{2}-\d{2}"),
        ({"grammar": 'root ::= "<" [a-z]+ ">" ("yes" | "no")'}, r"<[a-z]+>(yes|no)"),
        ({"grammar": 'start: "SELECT " NAME " FROM " NAME\nNAME: /[a-z]{1,8}/'}, r"SELECT [a-z]{1,8} FROM [a-z]{1,8}"),
        ({"json_object": True}, r"\{.*"),
    ],
)
def test_other_kinds(client: openai.OpenAI, outputs: dict[str, Any], pattern: str) -> None:
    answer = client.chat.completions.create(**ASK, extra_body={"structured_outputs": outputs}).choices[0]
    if "json_object" not in outputs:
        assert answer.finish_reason == "stop"
    assert re.fullmatch(pattern, answer.message.content or "", re.DOTALL), answer
    text = client.completions.create(
        model="smollm2", prompt="Say:", max_tokens=100, temperature=0, extra_body={"structured_outputs": outputs}
    ).choices[0]
    assert re.fullmatch(pattern, text.text, re.DOTALL), text


def test_a_reader_that_goes_away_is_no_trouble(client: openai.OpenAI) -> None:
    for _ in range(5):
        long: dict[str, Any] = {**ASK, "max_tokens": 900, "response_format": {"type": "json_object"}}
        stream = client.chat.completions.create(**long, stream=True)
        next(iter(stream))
        stream.close()
    answer = client.chat.completions.create(**ASK, response_format=FORMAT)
    assert answer.choices[0].finish_reason == "stop"
