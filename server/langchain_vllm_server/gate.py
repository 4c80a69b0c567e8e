"""What answers while the model loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from langchain_vllm_server.errors import RequestError
from langchain_vllm_server.responses import json_response

if TYPE_CHECKING:
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
    """The ASGI application from the first moment on: 503 until `app` is there, then that."""

    def __init__(self, progress: Progress) -> None:
        self.app: ASGIApp | None = None
        self._progress = progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._loading(scope, receive, send)

    async def _loading(self, scope: Scope, receive: Receive, send: Send) -> None:
        phase, fraction = self._progress.phase, self._progress.fraction
        headers = {"retry-after": "1"}
        if scope["path"] in ("/health", "/ping"):
            response = json_response(
                {"status": "loading", "phase": phase, "progress": round(fraction, 4)}, 503, headers
            )
        else:
            error = RequestError(503, "ServiceUnavailableError", f"The model is still loading ({phase}).")
            response = json_response(error.envelope(), 503, headers)
        await response(scope, receive, send)
