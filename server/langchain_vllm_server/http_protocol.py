"""HTTP/1.1 as uvicorn speaks it, with bounds on what comes before a request's body."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio

HEAD_SECONDS = 30.0  # from the connection, or the first byte of a further request, to the end of the head
HEAD_BYTES = 64 * 2**10
_ANSWER = b"connection: close\r\ncontent-length: 0\r\n\r\n"


class Http(HttpToolsProtocol):
    """Closes connections whose head is too long (431) or does not arrive: each would hold memory and a descriptor."""

    _head: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._have_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request. A part of the body that comes with the end of the head does not count long."""
        if self._head is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head is not None and self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(STATUS_LINE[431] + _ANSWER)
            self.transport.close()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        if self._head is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._have_head()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _have_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None
