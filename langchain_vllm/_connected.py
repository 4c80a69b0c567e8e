"""What the models beside `ChatVLLM` share: where their server is."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal, Self

from langchain_core.utils import get_pydantic_field_names
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from langchain_vllm._connection import NO_KEY, Connection, base_url_from_env
from langchain_vllm._parameters import check_names, translate
from langchain_vllm._profile import LiveProfile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from langchain_vllm.launcher import VLLMServer

MAX_THREADS = 128
"""Of a batch: each waits for one answer."""

_OTHER_NAMES = {
    "model_name": "model",
    "openai_api_base": "base_url",
    "openai_api_key": "api_key",
    "request_timeout": "timeout",
}
"""What langchain-openai's classes call the same."""


_TRANSIENT = frozenset(("client", "async_client", "root_client", "root_async_client", "profile"))
"""What a copy makes anew: SDK clients hold locks and sockets, a live profile holds the connection."""


class Connected:
    """A pydantic model with a `_connection`: what can be asked of its server, and how it is copied."""

    if TYPE_CHECKING:
        http_client: Any
        http_async_client: Any
        _connection: Connection

    def _set_connection(self) -> None:
        raise NotImplementedError

    @property
    def server(self) -> VLLMServer | None:
        """The managed server, from the first call on; None before it, and with `base_url`."""
        return self._connection.server

    def available_models(self) -> list[str]:
        """The names of the models that the server has."""
        return [str(card["id"]) for card in self._connection.cards()]

    async def aavailable_models(self) -> list[str]:
        """The names of the models that the server has."""
        return [str(card["id"]) for card in await self._connection.acards()]

    def server_version(self) -> str:
        """The version of vLLM's API that the server speaks."""
        return str(json.loads(self._connection.get("/version"))["version"])

    def server_metrics(self) -> dict[str, float]:
        """What the server counts, by name, such as `vllm:num_requests_running`; histograms as their `_sum`, `_count`.

        Values that differ in their labels only are added.
        """
        values: dict[str, float] = {}
        for line in self._connection.get("/metrics").splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                if not name.endswith("_bucket"):
                    values[name] = values.get(name, 0.0) + float(value)
        return values

    def __getstate__(self) -> dict[Any, Any]:
        """Everything but clients and connection; the copy makes its own."""
        state: dict[Any, Any] = super().__getstate__()  # type: ignore[assignment]
        values = {**state["__dict__"]}
        for name in _TRANSIENT & values.keys():
            if name != "profile" or isinstance(values[name], LiveProfile):
                values[name] = None
        return {**state, "__dict__": values, "__pydantic_private__": None}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.model_post_init(None)  # type: ignore[attr-defined]
        self._set_connection()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        for client in (self.http_client, self.http_async_client):
            memo[id(client)] = client
        copied = type(self).__new__(type(self))
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        return copied


class ConnectedModel(Connected, BaseModel):
    """A model on the server at `base_url`, or on a managed server that the first call starts."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: str = ""
    """Name of the model; with `base_url` it may be left out if the server has only one."""
    base_url: str | None = None
    """The server's address up to `/v1`; else VLLM_BASE_URL or VLLM_API_BASE; else a managed server."""
    api_key: SecretStr | None = None
    """Else VLLM_API_KEY; else none is sent. No OPENAI_* variable is read."""
    timeout: Any = None
    """Seconds for a request; by default an answer may take any time."""
    max_retries: int | None = None
    """Retries of a request that failed before its answer began; the SDK's default is 2."""
    default_headers: dict[str, str] | None = None
    default_query: dict[str, object] | None = None
    engine: Literal["bundled", "vllm"] | None = None
    """The managed server's, see `VLLMServer`; "bundled" by default."""
    server_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments for the managed server, see `VLLMServer`; only without `base_url`."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Any further fields of the requests."""
    http_client: Any = Field(default=None, exclude=True, repr=False)
    http_async_client: Any = Field(default=None, exclude=True, repr=False)

    _connection: Connection = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = translate({_OTHER_NAMES.get(name, name): value for name, value in values.items()})
        check_names(values, get_pydantic_field_names(cls), cls.__name__)
        return values

    @model_validator(mode="after")
    def _find_server(self) -> Self:
        self.base_url = self.base_url or base_url_from_env()
        if self.api_key is None and (key := os.environ.get("VLLM_API_KEY")):
            self.api_key = SecretStr(key)
        self._set_connection()
        return self

    def _set_connection(self) -> None:
        self._connection = Connection(
            base_url=self.base_url,
            model=self.model,
            api_key=self.api_key.get_secret_value() if self.api_key else NO_KEY,
            server_options=self.server_options,
            engine=self.engine,
            timeout=self.timeout,
            max_retries=self.max_retries,
            default_headers=self.default_headers,
            default_query=self.default_query,
            http_client=self.http_client,
            http_async_client=self.http_async_client,
        )

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of a route below `/v1`; fields that are None are left out."""
        self._connection.open()
        with self._connection.explained():
            answer: Any = self._connection.client.post(path, cast_to=object, body=self._body(body))
        return dict(answer)

    async def _apost(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        await self._connection.aopen()
        async with self._connection.aexplained():
            answer: Any = await self._connection.async_client.post(path, cast_to=object, body=self._body(body))
        return dict(answer)

    def _body(self, body: dict[str, Any]) -> dict[str, Any]:
        full = {"model": self._connection.served_model, **body, **self.extra_body}
        return {name: value for name, value in full.items() if value is not None}


def batches(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    """`texts` in lists of `size`, the last one shorter."""
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])


def wide(config: Any, size: int) -> Any:
    """The config of a batch with room for all of it, unless it has a `max_concurrency`.

    LangChain's default is a few threads more than the machine has cores, which are the client's and not the server's.
    """
    room = min(max(size, 1), MAX_THREADS)
    if isinstance(config, list):
        return [{"max_concurrency": room, **one} for one in config]
    return {"max_concurrency": room, **(config or {})}
