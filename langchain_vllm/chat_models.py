"""`ChatVLLM`: a LangChain chat model on a vLLM server, its own or any other."""

from __future__ import annotations

import os
import warnings
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self, cast

from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_openai.chat_models.base import BaseChatOpenAI
from pydantic import Field, PrivateAttr, SecretStr, model_validator

from langchain_vllm import __version__
from langchain_vllm._connection import NO_KEY, Connection, base_url_from_env

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence

    import openai
    from langchain_core.language_models import LangSmithParams, LanguageModelInput
    from langchain_core.language_models.model_profile import ModelProfile
    from langchain_core.messages import AIMessage, BaseMessage
    from langchain_core.outputs import ChatGenerationChunk, ChatResult
    from langchain_core.tools import BaseTool

    from langchain_vllm.launcher import VLLMServer

PROVIDER = "vllm"

_SAMPLING_FIELDS = (
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "chat_template_kwargs",
)


class ChatVLLM(BaseChatOpenAI):
    """Chat model served by vLLM, or by this package's own engine.

    Setup:
        With a server that runs somewhere:

        ```python
        llm = ChatVLLM(base_url="http://localhost:8000/v1")
        ```

        Without one, `pip install "langchain-vllm[server]"`; the first call starts a local server. Every model object
        with the same `model` and `server_options` shares it, and it stops soon after the last of them is gone:

        ```python
        llm = ChatVLLM(model="SmolLM2-135M-Instruct")
        ```

    Key init args — completion params:
        model: Name of the model; with `base_url` it may be left out if the server has only one.
        temperature, max_tokens, top_p, seed, stop, n, logprobs, logit_bias, …: As in OpenAI's API.
        top_k, min_p, repetition_penalty, min_tokens, ignore_eos, …: vLLM's own; each is also a call's argument.
        extra_body: Any further field of the request.

    Key init args — client params:
        base_url: The server's address up to `/v1`; else VLLM_BASE_URL or VLLM_API_BASE; else a managed server.
        api_key: Else VLLM_API_KEY; else none is sent. No OPENAI_* variable is read.
        timeout: Seconds for a request; by default an answer may take any time.
        max_retries: Retries of a request that failed before its answer began.
        server_options: Arguments for the managed server, see `VLLMServer`.

    Invoke:
        ```python
        llm.invoke([("system", "Translate English to Italian."), ("human", "I love programming.")])
        ```

    Stream:
        ```python
        for chunk in llm.stream("Why is the sky blue?"):
            print(chunk.text, end="", flush=True)
        ```

    Async:
        ```python
        await llm.ainvoke("Why is the sky blue?")
        ```

    Token usage:
        ```python
        llm.invoke("Hello").usage_metadata  # in streams too, on the last chunk
        ```

    Errors are both the OpenAI SDK's and LangChain's: `VLLMConnectionError`, `VLLMContextOverflowError`, and those of
    `langchain_openai`.
    """

    # The base class's fields, with defaults that leave OpenAI's environment and models alone.
    model_name: str = Field(default="", alias="model")
    openai_api_key: SecretStr | None = Field(default=None, alias="api_key")
    openai_proxy: str | None = None
    stream_usage: bool | None = True
    use_responses_api: bool | None = False
    stream_chunk_timeout: float | None = Field(default=None, exclude=True)
    client: Any = Field(default=None, exclude=True, repr=False)
    async_client: Any = Field(default=None, exclude=True, repr=False)
    root_client: Any = Field(default=None, exclude=True, repr=False)
    root_async_client: Any = Field(default=None, exclude=True, repr=False)

    top_k: int | None = None
    """Sample among the `top_k` likeliest tokens; 0 or -1 for all."""
    min_p: float | None = None
    """Leave out tokens less likely than `min_p` times the likeliest, 0 to 1."""
    repetition_penalty: float | None = None
    """Divides the logits of tokens seen in prompt and answer; above 1 discourages repetition."""
    min_tokens: int | None = None
    """Neither an end token nor a stop token before this many tokens."""
    ignore_eos: bool | None = None
    """Go on after the end token until `max_tokens`."""
    stop_token_ids: list[int] | None = None
    """End the answer at any of these tokens."""
    include_stop_str_in_output: bool | None = None
    """Keep the stop string in the answer."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text; the server's default is true."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, such as `{"enable_thinking": False}`."""
    server_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments for the managed server, see `VLLMServer`; only without `base_url`."""

    _connection: Connection = PrivateAttr()

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Where a deserialised object takes its key from."""
        return {"openai_api_key": "VLLM_API_KEY"}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Yes; load with `load(…, allowed_objects=[ChatVLLM], valid_namespaces=["langchain_vllm"])`."""
        return True

    @property
    def _llm_type(self) -> str:
        return "vllm-chat"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = PROVIDER
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        return None  # the base class would look the name up among OpenAI's models

    # The next two replace validators of the base class, by having their names.

    @model_validator(mode="before")
    @classmethod
    def validate_temperature(cls, values: dict[str, Any]) -> Any:
        """Leave the temperature alone: the base class changes it for names that begin like OpenAI's models."""
        return values

    @model_validator(mode="after")
    def validate_environment(self) -> Self:
        """Find the server. The base class would read OPENAI_* and might send requests to a gateway."""
        if self.n is not None and self.n < 1:
            raise ValueError("n must be at least 1.")
        if self.n is not None and self.n > 1 and self.streaming:
            raise ValueError("n must be 1 when streaming.")
        self.openai_api_base = self.openai_api_base or base_url_from_env()
        if self.openai_api_key is None and (key := os.environ.get("VLLM_API_KEY")):
            self.openai_api_key = SecretStr(key)
        self._connection = Connection(
            base_url=self.openai_api_base,
            model=self.model_name,
            api_key=self.openai_api_key.get_secret_value() if self.openai_api_key else NO_KEY,
            server_options=self.server_options,
            timeout=self.request_timeout,
            max_retries=self.max_retries,
            default_headers=self.default_headers,
            default_query=self.default_query,
            organization=self.openai_organization,
            proxy=self.openai_proxy,
            socket_options=self.http_socket_options,
            http_client=self.http_client,
            http_async_client=self.http_async_client,
        )
        self._use_clients()
        return self

    @model_validator(mode="after")
    def _set_vllm_version(self) -> Self:
        self._add_version("langchain-vllm", __version__)
        return self

    @property
    def server(self) -> VLLMServer | None:
        """The managed server, from the first call on; None before it, and with `base_url`."""
        return self._connection.server

    def _connect(self) -> Connection:
        self._connection.open()
        return self._use_clients()

    async def _aconnect(self) -> Connection:
        await self._connection.aopen()
        return self._use_clients()

    def _use_clients(self) -> Connection:
        """Put the connection's clients where the base class looks for them."""
        connection = self._connection
        if connection.client is not None and connection.client is not self.root_client:
            self.root_client, self.root_async_client = connection.client, connection.async_client
            self.client = connection.client.chat.completions
            self.async_client = connection.async_client.chat.completions
        return connection

    @property
    def _default_params(self) -> dict[str, Any]:
        params = super()._default_params
        fields = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if extra := {**fields, **(self.extra_body or {})}:
            params["extra_body"] = extra
        return params

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The request. vLLM's fields travel in `extra_body`; a call's override the object's one by one, None unsets."""
        fields = {name: kwargs.pop(name) for name in _SAMPLING_FIELDS if name in kwargs}
        extra = kwargs.pop("extra_body", None) or {}
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        merged = {**payload.pop("extra_body", {}), **fields, **extra}
        if given := {name: value for name, value in merged.items() if value is not None}:
            payload["extra_body"] = given
        payload["model"] = payload["model"] or self._connection.served_model
        return payload

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        with self._connect().explained():
            return super()._generate(*args, **kwargs)

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        with (await self._aconnect()).explained():
            return await super()._agenerate(*args, **kwargs)

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        with self._connect().explained():
            yield from super()._stream(*args, **kwargs)

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        connection = await self._aconnect()
        # Closed with this generator, and not when it is garbage-collected: that is what cancels the request.
        stream = cast("AsyncGenerator[ChatGenerationChunk]", super()._astream(*args, **kwargs))
        with connection.explained():
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    yield chunk

    def _create_chat_result(
        self, response: dict[str, Any] | openai.BaseModel, generation_info: dict[str, Any] | None = None
    ) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        answer = response if isinstance(response, dict) else response.model_dump(include={"choices"}, warnings=False)
        for generation, choice in zip(result.generations, answer["choices"], strict=True):
            _keep_reasoning(generation.message, choice["message"])
        result.llm_output = {**(result.llm_output or {}), "model_provider": PROVIDER}
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        generation = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        if generation is not None and (choices := chunk.get("choices")):
            _keep_reasoning(generation.message, choices[0]["delta"])
            generation.message.response_metadata["model_provider"] = PROVIDER
        return generation

    def get_token_ids(self, text: str) -> list[int]:
        """The token ids of `text` alone, from the server."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        tokens: list[int] = self._connection.tokenize(prompt=text, add_special_tokens=False)["tokens"]
        return tokens

    def get_num_tokens_from_messages(
        self,
        messages: Sequence[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
        *,
        allow_fetching_images: bool = True,
    ) -> int:
        """The length in tokens of the prompt that `messages` make, from the server: with chat template and tools.

        Args:
            messages: The conversation.
            tools: The tools that the request will offer.
            allow_fetching_images: The base class's. Here the server sees to images, so it can only be true.
        """
        if not allow_fetching_images:
            raise ValueError("allow_fetching_images=False: the server counts the tokens, so it fetches what it needs.")
        payload = self._get_request_payload(list(messages))
        body = {"messages": payload["messages"]}
        if tools:
            body["tools"] = [convert_to_openai_tool(tool) for tool in tools]
        if template := payload.get("extra_body", {}).get("chat_template_kwargs"):
            body["chat_template_kwargs"] = template
        return int(self._connection.tokenize(**body)["count"])

    def __call__(self, messages: LanguageModelInput, stop: list[str] | None = None, **kwargs: Any) -> AIMessage:
        """What LangChain's models did before `invoke`, for code of that time."""
        warnings.warn("Calling the model is deprecated: use llm.invoke(messages).", DeprecationWarning, stacklevel=2)
        return self.invoke(messages, stop=stop, **kwargs)


def _keep_reasoning(message: BaseMessage, answer: Mapping[str, Any] | None) -> None:
    """Keep what LangChain makes reasoning blocks of: vLLM's `reasoning`, which older vLLM calls `reasoning_content`."""
    answer = answer or {}
    if reasoning := answer.get("reasoning") or answer.get("reasoning_content"):
        message.additional_kwargs["reasoning_content"] = reasoning
