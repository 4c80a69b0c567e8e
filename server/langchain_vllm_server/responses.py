"""Responses: JSON, server-sent events, and work that ends when its client is gone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from starlette.types import Receive, Scope, Send

    from langchain_vllm_server.errors import RequestError

T = TypeVar("T")

encode_json = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON body."""
    return Response(encode_json(content), status, headers, "application/json")


def error_response(error: RequestError) -> Response:
    """An error in the envelope."""
    return json_response(error.envelope(), error.status, error.headers)


def sse(data: bytes) -> bytes:
    """One event. `data` has no line break, as JSON has none."""
    return b"data: %b\n\n" % data


class ClientDisconnect(Exception):  # noqa: N818
    """The client closed the connection before it had its answer."""


class Closable(Protocol):
    """What is released when a response ends, however it ends."""

    def close(self) -> None: ...  # noqa: D102


class EventStreamResponse(Response):
    """Sends chunks as they come, at the client's pace; closes `source` at the end, or when the client is gone."""

    media_type = "text/event-stream"

    def __init__(self, source: Closable, chunks: AsyncIterator[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self._source = source
        self._chunks = chunks
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        try:
            await until_disconnect(receive, self._send(send))
        except ClientDisconnect:
            pass
        finally:
            self._source.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._chunks:
            # The streams that a step wakes write one after the other, each when all have their text: a client that
            # reads several is woken once.
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client is gone. Raises ClientDisconnect then.

    The request's body must have been read: what `receive` gives next is the end of the connection.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
