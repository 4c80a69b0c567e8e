"""What answers while the model loads, and while the server drains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from langchain_vllm_server.errors import UnavailableError
from langchain_vllm_server.middleware import route_path
from langchain_vllm_server.responses import error_response, json_response

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    class Weights(Protocol):
        """`_engine.Loading`."""

        @property
        def bytes_done(self) -> int: ...  # noqa: D102
        @property
        def bytes_total(self) -> int: ...  # noqa: D102


class Progress:
    """How far loading is; written by the loading thread, read by the event loop."""

    def __init__(self) -> None:
        self.phase = "starting"
        self._weights: Weights | None = None

    def enter(self, phase: str, weights: Weights | None = None) -> None:
        """Begin a phase; that of the weights can tell how far it is."""
        self.phase, self._weights = phase, weights

    @property
    def fraction(self) -> float:
        """How much of the phase is done, 0 to 1."""
        weights = self._weights
        if weights is None or not weights.bytes_total:
            return 0.0
        return min(weights.bytes_done / weights.bytes_total, 1.0)


class Gate:
    """The ASGI application from the first moment to the last: 503 until `app` is there, then that, then 503 again."""

    def __init__(self, progress: Progress) -> None:
        self.app: ASGIApp | None = None
        self._progress = progress
        self._open = 0  # requests
        self._drained: Callable[[], None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        app = self._refusal(route_path(scope)) if self._drained is not None else self.app
        if app is None:
            app = self._refusal(route_path(scope))
        self._open += 1
        try:
            await app(scope, receive, send)
        finally:
            self._open -= 1
            self._tell()

    def drain(self, drained: Callable[[], None]) -> None:
        """Let no more requests in, and call `drained` when the open ones have ended."""
        self._drained = drained
        self._tell()

    def _tell(self) -> None:
        if self._drained is not None and not self._open:
            self._drained()

    def _refusal(self, path: str) -> Response:
        """What is answered in place of the application."""
        phase, fraction = self._progress.phase, self._progress.fraction
        error = UnavailableError(f"The model is still loading ({phase}).")
        health: dict[str, Any] = {"status": "loading", "phase": phase, "progress": round(fraction, 4)}
        if self._drained is not None:
            error = UnavailableError("The server is shutting down.")
            health = {"status": "draining", "open_requests": self._open}
        if path in ("/health", "/ping"):
            return json_response(health, 503, error.headers)
        return error_response(error)
