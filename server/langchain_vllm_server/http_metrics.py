"""Requests as HTTP sees them, under the names of prometheus-fastapi-instrumentator, which vLLM uses."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

from langchain_vllm_server.prometheus import Histogram, header, labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Asked again and again by machines: counting them would hide the others.
_IGNORED = frozenset({"/health", "/ping", "/metrics", "/load", "/version"})
_SECONDS = (0.1, 0.5, 1.0)
_FINE_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0),
    *(30.0, 60.0),
)


class HttpMetrics:
    """Counts answered requests. A handler is a route's path as the table has it, "none" where no route fits."""

    def __init__(self) -> None:
        self._requests: defaultdict[tuple[str, str, str], int] = defaultdict(int)  # handler, method, status
        self._sizes: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])  # name, handler
        self._seconds: defaultdict[tuple[str, str], Histogram] = defaultdict(lambda: Histogram(_SECONDS))
        self._fine_seconds = Histogram(_FINE_SECONDS)

    def answered(self, handler: str, method: str, status: int, seconds: float, asked: int, told: int) -> None:
        """Count one request: how long it took, and bytes of its body and its answer."""
        self._requests[handler, method, f"{status // 100}xx"] += 1
        for name, size in (("http_request_size_bytes", asked), ("http_response_size_bytes", told)):
            sizes = self._sizes[name, handler]
            sizes[0] += 1
            sizes[1] += size
        self._seconds[handler, method].observe(seconds)
        self._fine_seconds.observe(seconds)

    def lines(self) -> Iterator[str]:
        """The samples."""
        yield from header("http_requests_total", "counter", "Requests by handler, method and status.")
        for (handler, method, status), count in self._requests.items():
            names = labels({"handler": handler, "method": method, "status": status})
            yield f"http_requests_total{{{names}}} {float(count)}"
        for name, text in (("http_request_size_bytes", "Of bodies."), ("http_response_size_bytes", "Of answers.")):
            yield from header(name, "summary", text)
            for (sized, handler), (count, total) in self._sizes.items():
                if sized == name:
                    yield f"{name}_count{{{labels({'handler': handler})}}} {float(count)}"
                    yield f"{name}_sum{{{labels({'handler': handler})}}} {float(total)}"
        yield from header("http_request_duration_highr_seconds", "histogram", "Seconds until the end of the answer.")
        yield from self._fine_seconds.lines("http_request_duration_highr_seconds", "")
        yield from header("http_request_duration_seconds", "histogram", "The same by handler and method.")
        for (handler, method), seconds in self._seconds.items():
            names = labels({"handler": handler, "method": method})
            yield from seconds.lines("http_request_duration_seconds", names)


class CountedRequests:
    """The ASGI application whose requests are counted.

    Args:
        app: Leaves in the scope which endpoint it led a request to, as Starlette does.
        paths: The path of each endpoint.
        counts: Where to count.
    """

    def __init__(self, app: ASGIApp, paths: Mapping[object, str], counts: HttpMetrics) -> None:
        self._app = app
        self._paths = paths
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, asked, told = time.monotonic(), 500, 0, 0

        async def counted_receive() -> Message:
            nonlocal asked
            message = await receive()
            asked += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, told
            if message["type"] == "http.response.start":
                status = message["status"]
            told += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            handler = self._paths.get(scope.get("endpoint"), "none")
            if handler not in _IGNORED:
                self._counts.answered(handler, scope["method"], status, time.monotonic() - began, asked, told)
