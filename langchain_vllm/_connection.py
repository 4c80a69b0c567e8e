"""The way from a LangChain object to its server: an address or a managed server, SDK clients, errors with a remedy."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import openai

from langchain_vllm import _http
from langchain_vllm._shared import shared_server
from langchain_vllm.errors import VLLMConnectionError, VLLMServerCrashedError, VLLMTimeoutError, explain
from langchain_vllm.launcher import VLLMServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

NO_KEY = "EMPTY"
"""What vLLM's documentation passes for a key where none is wanted; the OpenAI SDK insists on one."""

_FAILURES = (openai.APIError, _http.TransportError)
_ASK_SECONDS = 5.0  # for the list of models, when a request has just failed

_SERVER_OPTIONS = frozenset(inspect.signature(VLLMServer).parameters) - {"model", "options"}


def base_url_from_env() -> str | None:
    """The server's address in VLLM_BASE_URL or VLLM_API_BASE."""
    return os.environ.get("VLLM_BASE_URL") or os.environ.get("VLLM_API_BASE") or None


@dataclass
class Connection:
    """A connection to the server at `base_url`, or, if that is None, to a managed one that `open` starts or joins.

    Raises:
        ValueError: The arguments contradict one another.
    """

    base_url: str | None
    model: str
    api_key: str
    server_options: Mapping[str, Any]
    engine: str | None = None
    timeout: Any = None
    max_retries: int | None = None
    default_headers: Mapping[str, str] | None = None
    default_query: Mapping[str, object] | None = None
    organization: str | None = None
    proxy: str | None = None
    socket_options: Sequence[_http.SocketOption] | None = None
    http_client: Any = None
    http_async_client: Any = None

    client: Any = field(init=False, default=None)
    """An `openai.OpenAI`, or None before a managed server runs."""
    async_client: Any = field(init=False, default=None)
    _url: str | None = field(init=False, default=None)
    _pid: int = field(init=False, default=0)
    _served_model: str | None = field(init=False, default=None)
    server: VLLMServer | None = field(init=False, default=None)
    """The managed server, from the first `open` on."""

    def __post_init__(self) -> None:
        if self.base_url is None:
            self._check_managed()
        elif self.server_options or self.engine is not None:
            raise ValueError(
                f"engine and server_options are for a managed server, but this one is at {self.base_url}: "
                "leave them out, or leave out base_url (and VLLM_BASE_URL)."
            )
        else:
            self._point_to(self.base_url)

    def _check_managed(self) -> None:
        if not self.model:
            raise ValueError("Pass model= (for a managed local server), or base_url= or VLLM_BASE_URL (for another).")
        if self.engine is not None and self.server_options.get("engine", self.engine) != self.engine:
            raise ValueError(f"engine={self.engine!r}, but server_options has {self.server_options['engine']!r}.")
        if "vllm" in (self.engine, self.server_options.get("engine")):  # which has flags of its own
            return
        if unknown := set(self.server_options) - _SERVER_OPTIONS:
            raise ValueError(f"Unknown server_options {sorted(unknown)}; VLLMServer has {sorted(_SERVER_OPTIONS)}.")

    @property
    def served_model(self) -> str:
        """The model that requests name: the given one, or else the only one that the server has."""
        return self.model or self._served_model or ""

    @property
    def is_open(self) -> bool:
        """Whether `open` has nothing to do."""
        if self.client is None or self._pid != os.getpid() or not self.served_model:
            return False
        return self.server is None or (self.server.is_ready and self.server.base_url == self._url)

    def open(self) -> None:
        """Make sure that there is a server and a model. A managed server that has ended is started again.

        Raises:
            VLLMServerError: The managed server did not start.
            ValueError: No model was given and the server has none or several.
        """
        if self.is_open:
            return
        self._point_to(self.base_url or self._managed_url())
        if not self.model:
            self._served_model = self._only_served_model()

    def _managed_url(self) -> str:
        if self.server is None:
            key = {} if self.api_key == NO_KEY else {"api_key": self.api_key}
            engine = {} if self.engine is None else {"engine": self.engine}
            self.server = shared_server(self.model, **{**key, **engine, **self.server_options})
        self.server.start()
        return self.server.base_url

    async def aopen(self) -> None:
        """`open` without blocking the event loop."""
        if not self.is_open:
            await asyncio.to_thread(self.open)

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        """The answer of a route that stands beside `/v1` and not in it, such as `/tokenize`."""
        self.open()
        with self.explained():
            answer = self.client.post(self._beside(route), cast_to=object, body={"model": self.served_model, **body})
        return dict(answer)

    def get(self, route: str) -> str:
        """The text of a route beside `/v1`, such as `/metrics`."""
        self.open()
        with self.explained():
            return str(self.client.get(self._beside(route), cast_to=str))

    def _beside(self, route: str) -> str:
        return str(self.client.base_url).rstrip("/").removesuffix("/v1") + route

    def cards(self) -> list[dict[str, Any]]:
        """What the server tells of its models."""
        self.open()
        with self.explained():
            return [dict(card) for card in self.client.models.list()]

    async def acards(self) -> list[dict[str, Any]]:
        """`cards` without blocking the event loop."""
        await self.aopen()
        async with self.aexplained():
            return [dict(card) async for card in self.async_client.models.list()]

    def max_model_len(self) -> int | None:
        """The longest context that the served model takes, in tokens; None if the server does not tell."""
        cards = self.cards()
        card = next((card for card in cards if card["id"] == self.served_model), {})
        return card.get("max_model_len")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise LangChain's kind of error, with a remedy."""
        try:
            yield
        except _FAILURES as error:
            raise self._explanation(error, self._served(error)) from error

    @asynccontextmanager
    async def aexplained(self) -> AsyncIterator[None]:
        """`explained` without blocking the event loop."""
        try:
            yield
        except _FAILURES as error:
            raise self._explanation(error, await self._aserved(error)) from error

    def _served(self, error: Exception) -> list[str] | None:
        if not isinstance(error, openai.NotFoundError):
            return None
        try:
            return [str(card.id) for card in self.client.with_options(timeout=_ASK_SECONDS).models.list()]
        except _FAILURES:
            return None

    async def _aserved(self, error: Exception) -> list[str] | None:
        if not isinstance(error, openai.NotFoundError):
            return None
        try:
            return [str(card.id) async for card in self.async_client.with_options(timeout=_ASK_SECONDS).models.list()]
        except _FAILURES:
            return None

    def _explanation(self, error: Exception, served: list[str] | None) -> Exception:
        if isinstance(error, openai.APITimeoutError):
            slow = VLLMTimeoutError(error.request)
            slow.message = (
                f"No answer from {self._url} within timeout={self.timeout}: raise it, or leave it out to wait."
            )
            slow.args = (slow.message,)
            return slow
        if isinstance(error, openai.APIError) and not isinstance(error, openai.APIConnectionError):
            return explain(error, str(self._url), has_key=self.api_key != NO_KEY, served=served)
        request: Any = error.request  # type: ignore[attr-defined]
        cause = _first_cause(error)
        if self.server is None:
            message = (
                f"No answer from the vLLM server at {self._url} ({cause}). Start one with `langchain-vllm serve MODEL` "
                "or `vllm serve MODEL`, or leave out base_url, and ChatVLLM starts its own."
            )
            return VLLMConnectionError(message=message, request=request)
        log = f"The end of its log:\n{self.server.log_tail()}"
        if not _ends(self.server):
            message = f"The managed server runs, but did not answer: {cause}. {log}"
            return VLLMConnectionError(message=message, request=request)
        message = f"The managed server has ended (the next call starts it again): {cause}. {log}"
        return VLLMServerCrashedError(message=message, request=request)

    def _only_served_model(self) -> str:
        with self.explained():
            served = [str(model.id) for model in self.client.models.list()]
        if len(served) != 1:
            raise ValueError(f"The server at {self._url} has the models {served}: choose one with model=.")
        return served[0]

    def _point_to(self, url: str) -> None:
        if (url, os.getpid()) == (self._url, self._pid):
            return
        address, unix_socket = _http.endpoint(url)
        proxy = None if unix_socket else self.proxy or _http.environment_proxy(address)
        sockets = _http.KEEP_ALIVE if self.socket_options is None else tuple(self.socket_options)
        options: dict[str, Any] = {
            "api_key": self.api_key,
            "base_url": address,
            "timeout": _http.timeout(self.timeout),
            "default_query": self.default_query,
        }
        if self.max_retries is not None:
            options["max_retries"] = self.max_retries
        # What a managed server may have begun is sent again by none but the caller, who learns that it crashed.
        once = self.base_url is None
        http_client = self.http_client or _http.sync_client(proxy, sockets, unix_socket, once)
        http_async_client = self.http_async_client or _http.async_client(proxy, sockets, unix_socket, once)
        client = openai.OpenAI(http_client=http_client, **options)
        async_client = openai.AsyncOpenAI(http_client=http_async_client, **options)
        for made in (client, async_client):
            # The SDK has just filled these from OPENAI_ORG_ID, OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS.
            made.organization, made.project = self.organization, None
            made._custom_headers = dict(self.default_headers or {})
        self.client, self.async_client, self._url, self._pid = client, async_client, url, os.getpid()


def _ends(server: VLLMServer) -> bool:
    """Whether the process is gone; a connection breaks a moment before that."""
    deadline = time.monotonic() + 0.2
    while server.is_running and time.monotonic() < deadline:
        time.sleep(0.01)
    return not server.is_running


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
