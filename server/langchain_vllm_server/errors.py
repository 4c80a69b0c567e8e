"""What can go wrong, by whose fault it is.

Exception
├── ValueError
│   └── CheckpointError     the checkpoint's: told at load, on one line
├── StartError              the command line's or the machine's (a port in use): told at start, on one line
└── RequestError            answered over HTTP, in the envelope `{"error": {"message", "type", "param", "code"}}`
    ├── BadRequestError     400, the request's: names the parameter
    ├── NotFoundError       404
    ├── UnavailableError    503: full, loading or shutting down; says when to try again
    └── EngineError         500, ours: the engine failed or died
"""

from __future__ import annotations

from typing import Any


class CheckpointError(ValueError):
    """The checkpoint's fault: a file that is missing, damaged, contradicts itself or asks for what is not supported."""


class StartError(Exception):
    """The server cannot start; the message names the cause and the remedy."""


class RequestError(Exception):
    """An error answered over HTTP with `status`, in OpenAI's envelope."""

    def __init__(self, status: int, type: str, message: str, param: str | None = None) -> None:  # noqa: A002
        super().__init__(message)
        self.status = status
        self.type = type
        self.message = message
        self.param = param
        self.headers: dict[str, str] | None = None  # further ones of the answer

    def envelope(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.status}}


class BadRequestError(RequestError):
    """400: the request can never be served as it is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(400, "BadRequestError", message, param)


class NotFoundError(RequestError):
    """404: no such model or route."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(404, "NotFoundError", message, param)


class UnavailableError(RequestError):
    """503: not now; the answer says after how many seconds to try again."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(503, "ServiceUnavailableError", message)
        self.headers = {"retry-after": str(retry_after)}


class EngineError(RequestError):
    """500: the engine failed this request, or has stopped."""

    def __init__(self, message: str) -> None:
        super().__init__(500, "InternalServerError", message)
