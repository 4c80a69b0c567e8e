"""The load generator: what it keeps in flight, and what it makes of a stream."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.load import Answer, Load, LoadError, http_load, quantile, read_answer, summarise
from benchmarks.prompts import Prompts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class FakeServer:
    """Answers completions in chunks, each a step later, and counts how many it has open."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.bodies: list[dict[str, Any]] = []
        self.open = self.most_open = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length is not None
        body = json.loads(await reader.readexactly(int(length[1])))
        self.bodies.append(body)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        writer.write(b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\n" % self.status)
        for event in stream(body["max_tokens"]):
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
            await asyncio.sleep(0.001)
        self.open -= 1
        writer.write(b"0\r\n\r\n")
        writer.close()


def stream(tokens: int) -> list[bytes]:
    events: list[dict[str, Any]] = [{"choices": [{"text": "x", "finish_reason": None}]} for _ in range(tokens)]
    events.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}})
    return [*(b"data: %b\n\n" % json.dumps(event).encode() for event in events), b"data: [DONE]\n\n"]


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[FakeServer], Any]]:
    servers = []

    async def start(fake: FakeServer) -> int:
        server = await asyncio.start_server(fake, "127.0.0.1", 0)
        servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (3, 3), (50, 20)])
async def test_as_many_as_asked_for_are_in_flight_and_never_more(serve: Any, concurrency: int, most: int) -> None:
    server = FakeServer()
    prompts = [f"prompt {i}" for i in range(20)]
    load = await http_load(await serve(server), prompts, concurrency, 5, 60)
    assert server.most_open == most
    assert sorted(body["prompt"] for body in server.bodies) == sorted(prompts)
    assert [(a.tokens, a.prompt_tokens, len(a.stamps)) for a in load.answers] == [(5, 7, 5)] * 20
    assert all(a.first > 0 and all(gap >= 0 for gap in a.gaps) for a in load.answers)


async def test_an_error_ends_the_load(serve: Any) -> None:
    with pytest.raises(LoadError, match="HTTP 500"):
        await http_load(await serve(FakeServer(500)), ["a", "b"], 2, 1, 60)


def test_a_stream_is_read_however_its_bytes_are_cut() -> None:
    whole = b"".join(stream(3))
    for size in (1, 7, len(whole)):
        pieces = [(float(i), whole[i : i + size]) for i in range(0, len(whole), size)]
        answer = read_answer(-1.0, 200, pieces)
        assert (answer.tokens, answer.prompt_tokens, len(answer.stamps)) == (3, 7, 3)
        # An event has come when its line has: with the piece in which that ends.
        assert answer.stamps[0] == (whole.index(b"\n") // size) * size


def test_what_came_without_usage_is_counted() -> None:
    event = b'data: {"choices": [{"text": "a"}]}\n'
    assert read_answer(0.0, 200, [(1.0, event), (2.0, event)]).tokens == 2


def test_a_lone_token_without_text_has_a_moment_too() -> None:
    end = b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n'
    assert read_answer(0.0, 200, [(1.5, end)]).first == 1.5


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"data: [DONE]\n", "an answer without text"), (b'data: {"error": {"message": "too long"}}\n', "too long")],
)
def test_no_answer_is_an_error(content: bytes, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        read_answer(0.0, 200, [(1.0, content)])


def test_figures() -> None:
    answers = [Answer(10.0, [10.5, 10.6, 10.8], 3, 100), Answer(10.0, [11.0, 11.1, 11.4], 3, 100, cached_tokens=64)]
    figures = summarise(Load(answers, seconds=2.0, client_seconds=0.1))
    expected = {
        "tokens": 6,
        "prompt_tokens": 200,
        "cached_tokens": 64,
        "tokens_per_s": 3,
        "ttft_p50": 750,
        "ttft_p99": 995,
        "itl_p50": 150,
        "decode_per_s": 1 / 0.175,
        "prefill_per_s": 150,
        "client_share": 0.05,
        "pieces_per_token": 1,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert math.isnan(summarise(Load([Answer(0.0, [1.0], 1, 512)], 1.0))["itl_p99"]), "one token has no gap"


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([3, 1, 2], 0.5, 2), ([1, 2], 0.5, 1.5), ([5], 0.99, 5), (range(101), 0.99, 99), ([1, 2], 1.0, 2)],
)
def test_quantiles(values: list[float], q: float, expected: float) -> None:
    assert quantile(values, q) == pytest.approx(expected)


def test_prompts_are_exactly_as_long_as_asked_for() -> None:
    prompts = Prompts(VOCABULARY, count_tokens)
    for length in (1, 2, 17, 64):
        texts = prompts.make(4, length, "seed", prefix=0)
        assert [count_tokens(text) for text in texts] == [length] * 4
    behind = prompts.make(3, 5, "seed", prefix=40)
    assert [count_tokens(text) for text in behind] == [45] * 3
    common = prompts.make(1, 40, "seed/prefix")
    assert count_tokens(common[0]) == 40
    heads = {tuple(text.split()[:20]) for text in behind}
    assert len(heads) == 1
    assert len(set(behind)) == 3


def test_other_seeds_give_other_prompts_and_the_same_seed_the_same() -> None:
    prompts = Prompts(VOCABULARY, count_tokens)
    first = prompts.make(5, 20, "0")
    assert first == prompts.make(5, 20, "0")
    assert not {*first} & {*prompts.make(5, 20, "1")}


VOCABULARY = [f"Ġ{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "lmnrst"] + ["Ġx", "the", "Ġ12", "<s>"]


def count_tokens(text: str) -> int:
    """A tokenizer that takes some words for two tokens."""
    return sum(1 + word.startswith("b") for word in text.split())
