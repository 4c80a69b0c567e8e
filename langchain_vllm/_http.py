"""HTTP clients shared by all model objects of a process, and safe in every event loop.

A client costs tens of milliseconds (its TLS context) and LangChain re-creates model objects often, so clients are
cached. They are built from whichever `httpx` the installed OpenAI SDK stands on: openai 3 moved to `httpx2`.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import socket
import sys
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import openai

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, Iterator

    import httpx
else:
    httpx = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]

SocketOption = tuple[int, int, int]

KEEP_ALIVE: tuple[SocketOption, ...] = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),)


def is_loopback(url: str) -> bool:
    """Whether `url` points at this machine."""
    host = urlsplit(url).hostname or ""
    return host in {"localhost", "::1"} or host.startswith("127.")


def endpoint(base_url: str) -> tuple[str, str | None]:
    """The address to send requests to, and the Unix socket to send them through, if any.

    Args:
        base_url: `http://host:port/v1`, where `/v1` may be left out; `unix:///path/to.sock` or
            `http+unix://%2Fpath%2Fto.sock/v1`.

    Raises:
        ValueError: It is none of these.
    """
    scheme, _, rest = base_url.partition(":")
    if scheme == "unix" and rest:
        return "http://localhost/v1", "/" + rest.lstrip("/")
    parts = urlsplit(base_url)
    path = parts.path.rstrip("/") or "/v1"
    if scheme == "http+unix" and parts.netloc:
        return f"http://localhost{path}", unquote(parts.netloc)
    if scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"base_url={base_url!r} must begin with http://HOST, https://HOST or unix:///PATH.")
    return parts._replace(path=path).geturl(), None


def environment_proxy(url: str) -> str | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY name for `url`; none for this machine."""
    parts = urlsplit(url)
    if is_loopback(url) or proxy_bypass(parts.hostname or ""):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


@contextmanager
def _unrepeated(request: httpx.Request, once: bool) -> Iterator[None]:
    """With `once`: make a broken connection an error of the SDK, which repeats a request after httpx's errors only."""
    try:
        yield
    except httpx.TransportError as error:
        if not once or isinstance(error, httpx.TimeoutException):
            raise
        raise openai.APIConnectionError(request=cast("Any", request)) from error


class Transport(httpx.HTTPTransport):
    """A synchronous transport; with `once`, a request that may have reached the server is not sent again."""

    def __init__(self, *, once: bool, **options: Any) -> None:
        self._once = once
        super().__init__(**options)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`."""
        with _unrepeated(request, self._once):
            return super().handle_request(request)


class LoopAwareTransport(httpx.AsyncBaseTransport):
    """An asynchronous transport with a connection pool for each event loop.

    A connection belongs to the loop that opened it. A cached client is used from many: every `asyncio.run` makes one,
    and so do threads. Each pool is closed when its loop shuts its asynchronous generators down, as `asyncio.run` does
    at its end.
    """

    def __init__(self, *, once: bool, **options: Any) -> None:
        self._once = once
        self._options = options
        self._pools: dict[asyncio.AbstractEventLoop, tuple[httpx.AsyncHTTPTransport, AsyncGenerator[None]]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` over a connection of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            await self._open(loop)
        with _unrepeated(request, self._once):
            return await self._pools[loop][0].handle_async_request(request)

    async def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        for other in tuple(self._pools):
            if other.is_closed():
                self._pools.pop(other, None)
        pool = httpx.AsyncHTTPTransport(**self._options)
        lifetime = self._lifetime(loop, pool)
        self._pools[loop] = (pool, lifetime)
        await anext(lifetime)

    async def _lifetime(self, loop: asyncio.AbstractEventLoop, pool: httpx.AsyncHTTPTransport) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            self._pools.pop(loop, None)
            await pool.aclose()


@cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _transport_options(
    proxy: str | None, socket_options: tuple[SocketOption, ...], unix_socket: str | None
) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=2.5)  # servers wait 5 s
    sockets = {"socket_options": list(socket_options)} if unix_socket is None else {"uds": unix_socket}
    return {"verify": _ssl_context(), "proxy": proxy, "limits": limits, **sockets}


@lru_cache(maxsize=16)
def _sync_client(
    proxy: str | None, sockets: tuple[SocketOption, ...], unix_socket: str | None, once: bool, pid: int
) -> Any:
    transport: Any = Transport(once=once, **_transport_options(proxy, sockets, unix_socket))
    client: Any = openai.DefaultHttpxClient(transport=transport)
    atexit.register(client.close)
    return client


@lru_cache(maxsize=16)
def _async_client(
    proxy: str | None, sockets: tuple[SocketOption, ...], unix_socket: str | None, once: bool, pid: int
) -> Any:
    transport: Any = LoopAwareTransport(once=once, **_transport_options(proxy, sockets, unix_socket))
    return openai.DefaultAsyncHttpxClient(transport=transport)


def sync_client(
    proxy: str | None, sockets: tuple[SocketOption, ...], unix_socket: str | None = None, once: bool = False
) -> Any:
    """The process's synchronous client for `proxy`; a forked child gets its own, for it must not share sockets."""
    return _sync_client(proxy, sockets, unix_socket, once, os.getpid())


def async_client(
    proxy: str | None, sockets: tuple[SocketOption, ...], unix_socket: str | None = None, once: bool = False
) -> Any:
    """The process's asynchronous client for `proxy`, for use in any event loop."""
    return _async_client(proxy, sockets, unix_socket, once, os.getpid())


def timeout(value: Any) -> Any:
    """`value`, or by default: no limit on an answer (a CPU may think for long), 10 s to connect."""
    return httpx.Timeout(None, connect=10.0) if value is None else value


TransportError = httpx.TransportError
