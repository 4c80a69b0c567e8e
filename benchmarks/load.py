"""Closed-loop streamed load: a number of requests kept in flight, and what a client sees of them.

The client shares the machine with the engine that it measures, so it does as little as it can while the load runs: it
notes when bytes came, and reads them afterwards.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httptools

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

MODEL = "bench"  # the name that every server is told to serve under


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it.

    Attributes:
        start: When it was sent.
        stamps: When each piece of text came, of one token or several.
        tokens: Of the answer, as the engine counts them.
        prompt_tokens: As the engine counts them.
        cached_tokens: Of the prompt, found in the engine's prefix cache.
    """

    start: float
    stamps: list[float]
    tokens: int
    prompt_tokens: int
    cached_tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.stamps[0] - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece of text and the next."""
        return [b - a for a, b in itertools.pairwise(self.stamps)]

    @property
    def per_token(self) -> float:
        """Seconds per token after the first; nan for an answer of one."""
        return (self.stamps[-1] - self.stamps[0]) / (self.tokens - 1) if self.tokens > 1 else math.nan


@dataclass(frozen=True)
class Load:
    """The answers to one load, and how long it took.

    Attributes:
        client_seconds: CPU time of the client, which the engine did not get.
    """

    answers: list[Answer]
    seconds: float
    client_seconds: float = 0.0


class LoadError(RuntimeError):
    """A request was not answered as a benchmark needs it."""


async def closed_loop(
    send: Callable[[str], Awaitable[Answer]], prompts: Sequence[str], concurrency: int
) -> list[Answer]:
    """Send all prompts, `concurrency` at a time: who gets an answer sends the next."""
    waiting = iter(prompts)
    answers: list[Answer] = []

    async def client() -> None:
        for prompt in waiting:
            answers.append(await send(prompt))

    async with asyncio.TaskGroup() as clients:
        for _ in range(min(concurrency, len(prompts))):
            clients.create_task(client())
    return answers


async def http_load(port: int, prompts: Sequence[str], concurrency: int, max_tokens: int, limit: float) -> Load:
    """A load on the server at 127.0.0.1:`port`. Raises LoadError, or TimeoutError after `limit` seconds."""
    exchanges: list[_Exchange] = []

    async def send(prompt: str) -> Answer:
        exchange = await _exchange(port, request_body(prompt, max_tokens))
        exchanges.append(exchange)
        return Answer(exchange.start, [], 0, 0)  # read below, when no engine is waiting for the processor

    begin, cpu = time.perf_counter(), time.process_time()
    async with asyncio.timeout(limit):
        await closed_loop(send, prompts, concurrency)
    seconds, client_seconds = time.perf_counter() - begin, time.process_time() - cpu
    return Load([read_answer(e.start, e.status, e.pieces) for e in exchanges], seconds, client_seconds)


def request_body(prompt: str, max_tokens: int) -> dict[str, Any]:
    """A greedy completion of exactly `max_tokens` tokens, in fields that each server knows or passes over."""
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "min_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def read_answer(start: float, status: int, pieces: Iterable[tuple[float, bytes]]) -> Answer:
    """The answer in a stream of server-sent events. Raises LoadError for an error or an empty answer."""
    pieces = list(pieces)
    if status != 200:
        raise LoadError(f"HTTP {status}: {b''.join(piece for _, piece in pieces)[:300]!r}")
    stamps: list[float] = []
    usage: dict[str, Any] = {}
    for moment, event in _events(pieces):
        if "error" in event:
            raise LoadError(str(event["error"])[:300])
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            if choice.get("text") or (choice.get("finish_reason") and not stamps):  # a lone token may have no text
                stamps.append(moment)
    if not stamps:
        raise LoadError("an answer without text or end")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(start, stamps, usage.get("completion_tokens", len(stamps)), usage.get("prompt_tokens", 0), cached)


def _events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    pending = b""
    for moment, piece in pieces:
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield moment, json.loads(line[6:])


class _Exchange(asyncio.Protocol):
    """One request on a connection of its own, and the moments at which parts of the body came."""

    def __init__(self, head_and_body: bytes) -> None:
        self.start = time.perf_counter()
        self.pieces: list[tuple[float, bytes]] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = head_and_body
        self._now = 0.0
        self._parser = httptools.HttpResponseParser(self)

    @property
    def status(self) -> int:
        return int(self._parser.get_status_code())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(LoadError(f"the connection broke: {error}"))


async def _exchange(port: int, body: dict[str, Any]) -> _Exchange:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    transport, exchange = await loop.create_connection(lambda: _Exchange(head.encode() + content), "127.0.0.1", port)
    try:
        await exchange.done
    finally:
        transport.close()
    return exchange


def quantile(values: Iterable[float], q: float) -> float:
    """The q-quantile (0 to 1), interpolated between neighbours; nan of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    position = (len(ordered) - 1) * q
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summarise(load: Load) -> dict[str, float]:
    """What is reported of a load; times in milliseconds."""
    answers = load.answers
    firsts = [1000 * answer.first for answer in answers]
    gaps = [1000 * gap for answer in answers for gap in answer.gaps]
    per_token = statistics.median(answer.per_token for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    return {
        "requests": len(answers),
        "seconds": load.seconds,
        "client_share": load.client_seconds / load.seconds,
        "tokens": tokens,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "cached_tokens": sum(answer.cached_tokens for answer in answers),
        "pieces_per_token": sum(len(answer.stamps) for answer in answers) / tokens,
        "tokens_per_s": tokens / load.seconds,
        "ttft_p50": quantile(firsts, 0.5),
        "ttft_p99": quantile(firsts, 0.99),
        "itl_p50": quantile(gaps, 0.5),
        "itl_p99": quantile(gaps, 0.99),
        "decode_per_s": 1 / per_token if per_token else math.nan,
        "prefill_per_s": statistics.median(answer.prompt_tokens / answer.first for answer in answers),
    }
