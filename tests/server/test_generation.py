from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from langchain_vllm_server.generation import Choice, Delta, StopStrings
from langchain_vllm_server.protocol import GenerationRequest
from langchain_vllm_server.responses import EventStreamResponse
from tests.server.fakes import byte_tokenizer, running, sse_data

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from starlette.types import Message

TOKENIZER = byte_tokenizer()
# Few letters, so that stop strings overlap each other and themselves.
texts = st.text(alphabet="abé🎉", max_size=30)
stops = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3)


def reference(text: str, strings: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The definition: read character by character, and end where a stop string is complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in strings if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def pieces(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


@given(texts, stops, st.booleans(), st.lists(st.integers(min_value=0), max_size=8))
def test_stop_strings_do_not_depend_on_the_split(text: str, strings: list[str], include: bool, cuts: list[int]) -> None:
    matcher = StopStrings(strings, include=include)
    shown, matched = "", None
    for piece in pieces(text, cuts):
        new, matched = matcher.push(piece)
        shown += new
        assert matched or reference(text, strings, include)[0].startswith(shown)
        if matched:
            break
    if matched is None:
        shown += matcher.finish()
    assert (shown, matched) == reference(text, strings, include)


@given(texts, stops)
def test_text_that_begins_no_stop_string_is_not_held_back(text: str, strings: list[str]) -> None:
    matcher = StopStrings(strings, include=False)
    shown, matched = matcher.push(text)
    held = text.removeprefix(shown)
    assert matched or held == "" or any(stop.startswith(held) for stop in strings)


@given(texts, stops, st.integers(0, 12), st.lists(st.integers(min_value=1, max_value=5), min_size=1))
def test_a_choice_does_not_depend_on_how_tokens_come(
    text: str, strings: list[str], min_tokens: int, sizes: list[int]
) -> None:
    request = GenerationRequest(stop=strings, min_tokens=min_tokens)
    model = SimpleNamespace(tokenizer=TOKENIZER)
    tokens = TOKENIZER.encode(text) or TOKENIZER.encode("a")

    def run(sizes: list[int]) -> tuple[str, str | None, int, object]:
        choice, delta = Choice(request, model, 0, [1]), Delta()  # type: ignore[arg-type]
        rest = list(tokens)
        while rest:
            size = sizes[len(rest) % len(sizes)]
            now, rest = rest[:size], rest[size:]
            finish = "" if rest else "length"
            event = SimpleNamespace(
                tokens=now,
                logprobs=[],
                prompt_logprobs=[],
                finish=finish,
                num_cached_tokens=0,
                scheduled_time=0.0,
                time=1.0,
            )
            choice.push(event, delta)  # type: ignore[arg-type]
        return delta.text, delta.finish_reason, choice.num_tokens, delta.stop_reason

    assert run(sizes) == run([1]) == run([len(tokens)])


@given(text=texts.filter(bool), strings=stops, include=st.booleans(), skip=st.booleans())
async def test_streaming_gives_what_not_streaming_gives(
    text: str, strings: list[str], include: bool, skip: bool
) -> None:
    body = {"stop": strings, "include_stop_str_in_output": include, "skip_special_tokens": skip, "max_tokens": 100}
    async with running(text) as server:
        whole = (await server.complete(**body)).json()["choices"][0]
        events = [json.loads(event) for event in sse_data((await server.complete(stream=True, **body)).text)[:-1]]
    streamed = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in streamed) == whole["text"]
    assert streamed[-1]["finish_reason"] == whole["finish_reason"]
    assert streamed[-1]["stop_reason"] == whole["stop_reason"]
    for stop in strings:
        assert include or stop not in whole["text"]


async def test_the_engine_wakes_the_server_for_every_token_of_streams_and_stop_strings_only() -> None:
    async with running("Hello world") as server:
        for body in ({}, {"stream": True}, {"stop": "x"}):
            await server.complete(**body)
    assert [request.params.eager for request in server.fake.submitted] == [False, True, True]


async def test_streams_that_a_step_wakes_write_in_a_row() -> None:
    step = asyncio.get_running_loop().create_future()
    order: list[str] = []

    def response(name: str) -> EventStreamResponse:
        async def chunks() -> AsyncIterator[bytes]:
            await step
            order.append(f"{name} has its text")
            yield b"data: {}\n\n"

        return EventStreamResponse(SimpleNamespace(close=lambda: None), chunks())

    async def serve(name: str) -> None:
        async def send(message: Message) -> None:
            if message.get("body"):
                order.append(f"{name} writes")

        await response(name)({}, asyncio.Event().wait, send)  # type: ignore[arg-type]

    async with asyncio.TaskGroup() as streams:
        for name in "ab":
            streams.create_task(serve(name))
        await asyncio.sleep(0.01)
        step.set_result(None)
    assert order == ["a has its text", "b has its text", "a writes", "b writes"]
