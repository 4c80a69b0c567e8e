"""What stands between the socket and the routes, outermost first: see `wrap`. Each is an ASGI application."""

from __future__ import annotations

import asyncio
import hmac
import importlib
import inspect
import uuid
from typing import TYPE_CHECKING, Any

from langchain_vllm_server.errors import RequestError, StartError
from langchain_vllm_server.responses import error_response

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from langchain_vllm_server.settings import Settings

_CLOSE = {"connection": "close"}  # the rest of the body is not worth reading


def wrap(app: ASGIApp, settings: Settings) -> ASGIApp:
    """The application with all that the settings ask for around it. Raises StartError for a bad --middleware."""
    if settings.sse_keep_alive_interval:
        app = KeepAlive(app, settings.sse_keep_alive_interval)
    app = BodyLimits(app, settings.max_request_body_size, settings.request_body_timeout)
    if settings.enable_log_requests:
        from langchain_vllm_server.logs import RequestLog

        app = RequestLog(app, settings.max_log_len, outputs=settings.enable_log_outputs)
    for path in settings.middleware:
        app = imported(path)(app)
    if settings.api_key:
        app = ApiKeys(app, settings.api_key)
    if settings.allowed_origins:
        app = _cors(app, settings)
    if settings.enable_request_id_headers:
        app = RequestIds(app)
    return RootPath(app, settings.root_path) if settings.root_path else app


def route_path(scope: Scope) -> str:
    """A request's path without the prefix that a proxy shows."""
    prefix, path = scope.get("root_path", ""), str(scope["path"])
    return path[len(prefix) :] if prefix and path.startswith(prefix + "/") else path


def imported(path: str) -> Callable[[ASGIApp], ASGIApp]:
    """The middleware `package.module.name`: an ASGI class, or a coroutine function of request and call_next."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise StartError(f"--middleware {path}: {error}") from None
    if inspect.isclass(found):
        return lambda app: found(app)  # type: ignore[call-arg, return-value]
    if inspect.iscoroutinefunction(found):
        from starlette.middleware.base import BaseHTTPMiddleware

        return lambda app: BaseHTTPMiddleware(app, found)
    raise StartError(f"--middleware {path}: neither a class nor a coroutine function")


class RootPath:
    """Serves under a prefix, too: whether the proxy in front strips it does not matter."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        await self._app({**scope, "root_path": self._prefix}, receive, send)


class RequestIds:
    """Answers with the request's `X-Request-Id`, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given or uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKeys:
    """Lets requests with one of the keys through, and those that ask for the server's health."""

    _OPEN = frozenset({"/health", "/ping"})

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._expected = [f"Bearer {key}".encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http" or route_path(scope) in self._OPEN or self._allows(scope):
            await self._app(scope, receive, send)
            return
        error = RequestError(401, "AuthenticationError", "A valid API key is needed: `Authorization: Bearer <key>`.")
        error.headers = {"www-authenticate": "Bearer"}
        await error_response(error)(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        given = scheme.capitalize() + b" " + key.strip()
        # Every key is compared, so that the time does not tell which one was nearly right.
        return sum(hmac.compare_digest(given, expected) for expected in self._expected) > 0


class BodyLimits:
    """Bounds a request's body in bytes, and in seconds from the request's head to the body's end."""

    def __init__(self, app: ASGIApp, size: int, seconds: float) -> None:
        self._app = app
        self._size = size
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        size, deadline, ended = 0, asyncio.get_running_loop().time() + self._seconds, False

        async def receive_bounded() -> Message:
            nonlocal size, ended
            if ended:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                text = f"The request's body did not arrive within {self._seconds:g} s."
                raise _with(RequestError(408, "RequestTimeoutError", text), _CLOSE) from None
            size += len(message.get("body", b""))
            ended = message["type"] != "http.request" or not message.get("more_body", False)
            if size > self._size:
                text = f"The request's body is larger than {self._size} bytes."
                raise _with(RequestError(413, "RequestTooLargeError", text), _CLOSE)
            return message

        await self._app(scope, receive_bounded, send)


class KeepAlive:
    """Sends a comment, which clients skip, on an event stream that has been silent: proxies cut silent connections."""

    def __init__(self, app: ASGIApp, interval: float) -> None:
        self._app = app
        self._interval = interval

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        loop = asyncio.get_running_loop()
        sending = asyncio.Lock()
        last = loop.time()
        beating: asyncio.Task[None] | None = None

        async def beat() -> None:
            while True:
                await asyncio.sleep(last + self._interval - loop.time())
                if loop.time() >= last + self._interval:
                    await send_chunk({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})

        async def send_chunk(message: Message) -> None:
            nonlocal last, beating
            if beating is not None and message["type"] == "http.response.body" and not message.get("more_body"):
                beating.cancel()
            async with sending:
                await send(message)
            last = loop.time()
            if message["type"] == "http.response.start" and _is_event_stream(message):
                beating = asyncio.create_task(beat())

        try:
            await self._app(scope, receive, send_chunk)
        finally:
            if beating is not None:
                beating.cancel()


def _is_event_stream(start: Message) -> bool:
    return any(
        name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start.get("headers", ())
    )


def _with(error: RequestError, headers: dict[str, str]) -> RequestError:
    error.headers = headers
    return error


def _cors(app: ASGIApp, settings: Settings) -> ASGIApp:
    from starlette.middleware.cors import CORSMiddleware

    options: dict[str, Any] = {
        "allow_origins": settings.allowed_origins,
        "allow_methods": settings.allowed_methods,
        "allow_headers": settings.allowed_headers,
        "allow_credentials": settings.allow_credentials,
    }
    return CORSMiddleware(app, **options)
