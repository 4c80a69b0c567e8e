"""`ChatVLLM`: a LangChain chat model on a vLLM server, its own or any other."""

from __future__ import annotations

import os
import warnings
from contextlib import aclosing
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from langchain_core.messages import AIMessage
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_openai.chat_models.base import BaseChatOpenAI
from pydantic import Field, PrivateAttr, SecretStr, model_validator

from langchain_vllm import __version__, _request, _structured_output, _translator
from langchain_vllm._answers import StreamState, keep_reasoning, metadata, other_choice, take_calls_without_object
from langchain_vllm._connected import Connected, wide
from langchain_vllm._connection import NO_KEY, Connection, base_url_from_env
from langchain_vllm._parameters import ChatParameters
from langchain_vllm._profile import LiveProfile
from langchain_vllm._translator import PROVIDER

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence

    import openai
    from langchain_core.language_models import LangSmithParams, LanguageModelInput
    from langchain_core.language_models.model_profile import ModelProfile
    from langchain_core.messages import BaseMessage
    from langchain_core.outputs import ChatGenerationChunk, ChatResult
    from langchain_core.runnables import Runnable
    from langchain_core.tools import BaseTool


_translator.register()


class ChatVLLM(Connected, ChatParameters, BaseChatOpenAI):
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
        engine, server_options: Arguments for the managed server, see `VLLMServer`; `engine="vllm"` is vLLM itself.

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

    Tool calling:
        ```python
        llm.bind_tools([get_weather], tool_choice="any").invoke("The weather in Rome?").tool_calls
        ```

    Structured output, held to token by token:
        ```python
        llm.with_structured_output(Person).invoke("Ada is 36.")  # pydantic class, TypedDict or JSON schema
        llm.with_structured_output(Literal["good", "bad"]).invoke("I won!")  # or an Enum, or a list
        llm.with_structured_output(re.compile("[0-9]{4}")).invoke("When was the revolution?")
        ```

    Reasoning:
        ```python
        message = llm.invoke("How many r's are in strawberry?", enable_thinking=True)
        message.content_blocks  # reasoning, text; also message.additional_kwargs["reasoning_content"]
        ```

    Response metadata:
        `finish_reason`, `stop_reason`, `logprobs`, and where asked for, `token_ids` and `prompt_logprobs`.
        In a stream of `n` > 1, the choices after the first are in `additional_kwargs["choices"]`.

    Server:
        `available_models()`, `server_version()`, `server_metrics()`, `render_prompt(messages)`, `profile`.

    Errors (`langchain_vllm.errors`) are both the OpenAI SDK's and LangChain's, and say what to do.
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

    enable_thinking: bool | None = None
    """Whether a model that can do either reasons first: the template variables `enable_thinking` and `thinking`."""
    replay_reasoning: bool = False
    """Send the reasoning of earlier answers back with the conversation, for models whose template wants it."""
    reasoning_tags: tuple[str, str] | None = ("<think>", "</think>")
    """What encloses reasoning in the text of a server without a reasoning parser; None leaves it in the text."""
    engine: Literal["bundled", "vllm"] | None = None
    """The managed server's, see `VLLMServer`; "bundled" by default."""
    server_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments for the managed server, see `VLLMServer`; only without `base_url`."""

    _connection: Connection = PrivateAttr()
    _stream_state: StreamState | None = PrivateAttr(default=None)

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

    # The next three replace validators of the base class, by having their names.

    @model_validator(mode="before")
    @classmethod
    def build_extra(cls, values: dict[str, Any]) -> Any:
        """Refuse unknown arguments; the base class would send them, and the SDK then refuse the call."""
        return _request.constructor_arguments(cls, values)

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
        self._set_connection()
        return self

    def _set_connection(self) -> None:
        self._connection = Connection(
            base_url=self.openai_api_base,
            model=self.model_name,
            api_key=self.openai_api_key.get_secret_value() if self.openai_api_key else NO_KEY,
            server_options=self.server_options,
            engine=self.engine,
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
        if self.profile is None:
            self.profile = cast("ModelProfile", LiveProfile(self._connection.max_model_len))

    @model_validator(mode="after")
    def _set_vllm_version(self) -> Self:
        self._add_version("langchain-vllm", __version__)
        return self

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

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The request. vLLM's fields travel in `extra_body`; a call's override the object's one by one, None unsets."""
        call = _request.call_arguments(kwargs)
        extra = _request.extra_body(self, call)
        messages = self._convert_input(input_).to_messages()
        if instructions := call.pop("format_instructions", None):
            messages = _structured_output.instructed(messages, instructions)
        plain = {name: value for name, value in call.items() if name not in _request.EXTRA}
        payload: dict[str, Any] = super()._get_request_payload(_request.with_media(messages), stop=stop, **plain)
        _request.move_extra(payload, extra)
        if self.replay_reasoning:
            _request.replay_reasoning(messages, payload["messages"])
        if self._stream_state and self._stream_state.options:
            payload["stream_options"] = {**payload.get("stream_options", {}), **self._stream_state.options}
        payload["model"] = payload["model"] or self._connection.served_model
        return payload

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        with self._connect().explained():
            return super()._generate(*args, **kwargs)

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        async with (await self._aconnect()).aexplained():
            return await super()._agenerate(*args, **kwargs)

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        connection = self._connect()
        with connection.explained():
            yield from super(ChatVLLM, self._for_stream(kwargs))._stream(*args, **kwargs)

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        connection = await self._aconnect()
        stream = super(ChatVLLM, self._for_stream(kwargs))._astream(*args, **kwargs)
        # Closed with this generator, and not when it is garbage-collected: that is what cancels the request.
        async with connection.aexplained(), aclosing(cast("AsyncGenerator[ChatGenerationChunk]", stream)) as chunks:
            async for chunk in chunks:
                yield chunk

    def _for_stream(self, kwargs: dict[str, Any]) -> Self:
        """The model with the state of one stream, for the methods that the base class calls for every chunk."""
        one = self.model_copy()
        options = {**self.model_kwargs.get("stream_options", {}), **(kwargs.get("stream_options") or {})}
        one._stream_state = StreamState(self.reasoning_tags, options)
        return one

    def _create_chat_result(
        self, response: dict[str, Any] | openai.BaseModel, generation_info: dict[str, Any] | None = None
    ) -> ChatResult:
        answer = deepcopy(response) if isinstance(response, dict) else response.model_dump(warnings=False)
        invalid = [take_calls_without_object(choice["message"]) for choice in answer.get("choices") or ()]
        result = super()._create_chat_result(answer if any(invalid) else response, dict(generation_info or {}))
        for generation, choice, calls in zip(result.generations, answer["choices"], invalid, strict=True):
            if isinstance(generation.message, AIMessage):
                generation.message.invalid_tool_calls += calls
            keep_reasoning(generation.message, choice["message"], self.reasoning_tags)
            # The base class shares one dictionary among all choices.
            told = {name: choice.get(name) for name in ("finish_reason", "logprobs") if name in choice}
            generation.generation_info = {**(generation_info or {}), **told, **metadata(answer, choice)}
            generation.message.response_metadata["model_provider"] = PROVIDER
        result.llm_output = {**(result.llm_output or {}), "model_provider": PROVIDER}
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        state = self._stream_state or StreamState(self.reasoning_tags)
        choices = [state.normalized(choice) for choice in chunk.get("choices") or []]
        nothing: dict[str, Any] = {"index": 0, "delta": {}}
        first = next((choice for choice in choices if choice["index"] == 0), nothing)
        # A server may repeat the usage so far in every chunk; what counts is the last chunk, without choices.
        plain = {**chunk, "choices": [first], "usage": None} if choices else chunk
        generation = super()._convert_chunk_to_generation_chunk(plain, default_chunk_class, base_generation_info)
        if generation is None:
            return None
        message = generation.message
        message.response_metadata["model_provider"] = PROVIDER
        if reasoning := first["delta"].get("reasoning"):
            message.additional_kwargs["reasoning_content"] = reasoning
        if others := [other_choice(choice) for choice in choices if choice["index"]]:
            message.additional_kwargs["choices"] = others
        generation.generation_info = {**(generation.generation_info or {}), **metadata(chunk, first)} or None
        return generation

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        response_format: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Offer tools to the model.

        Args:
            tools: Functions, `@tool`s, pydantic classes, TypedDicts, or OpenAI's dictionaries.
            tool_choice: "auto", "none", "any" or "required" or True (at least one call), or the name of a tool.
            response_format: What an answer without a call has to fit: a schema, or OpenAI's `response_format`.
            kwargs: `strict`, `parallel_tool_calls`, and arguments for the calls.

        Raises:
            ValueError: `tool_choice` names no tool.
        """
        if response_format is not None:
            kwargs["response_format"] = _structured_output.response_format(response_format)
        _request.check_tool_choice(tools, tool_choice)
        return super().bind_tools(tools, tool_choice=tool_choice, **kwargs)

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: _structured_output.Method | None = None,
        include_raw: bool = False,
        strict: bool | None = None,
        include_format_instructions: bool = False,
        tools: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Hold answers to a schema; the server keeps every token to it.

        Args:
            schema: A pydantic class (1 or 2), a TypedDict or a JSON schema; an Enum, a Literal or a list of strings to
                choose from; a regular expression; a grammar (text).
            method: "json_schema" (the default for classes and dictionaries), "function_calling", "json_mode" (any JSON
                object), "choice" (the default for Enum, Literal and lists), "regex" (the default for compiled ones),
                or "grammar".
            include_raw: Give a dictionary of `raw` (the message), `parsed` and `parsing_error`, and raise no error
                about an answer that does not fit, for example one cut off at `max_tokens`.
            strict: As in OpenAI's API; of JSON schema and function calling.
            include_format_instructions: Tell the model the JSON schema in the system message. Otherwise it does not see
                the descriptions in it, but is only kept from answering anything else.
            tools: Tools to offer besides, with "json_schema"; an answer that calls them is None here.
            kwargs: Arguments for the calls.

        Raises:
            ValueError, TypeError: The schema and the method don't go together.
        """
        method = method or _structured_output.method_for(schema)
        if method == "function_calling":
            if include_format_instructions:
                raise ValueError("include_format_instructions is not for function_calling: templates show the tools.")
            return super().with_structured_output(
                schema,
                method=method,
                include_raw=include_raw,
                strict=strict,
                tools=list(tools) if tools else None,
                **kwargs,
            )
        asked, parser = _structured_output.request(method, schema, strict)
        if tools:
            asked["tools"] = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        if include_format_instructions:
            asked["format_instructions"] = _structured_output.format_instructions(method, schema)
        llm: Runnable[Any, Any] = self.bind(**asked, **kwargs)
        return _structured_output.parsed(llm, parser, include_raw)

    def get_token_ids(self, text: str) -> list[int]:
        """The token ids of `text` alone, from the server."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        tokens: list[int] = self._connection.post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]
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
        return int(self._connection.post("/tokenize", **self._prompt(list(messages), tools))["count"])

    def render_prompt(self, messages: LanguageModelInput, tools: Sequence[Any] | None = None) -> str:
        """The text that the chat template makes of `messages` and `tools`: what the model is given to read."""
        tokens = self._connection.post("/tokenize", **self._prompt(messages, tools))["tokens"]
        return str(self._connection.post("/detokenize", tokens=tokens)["prompt"])

    def _prompt(self, messages: LanguageModelInput, tools: Sequence[Any] | None) -> dict[str, Any]:
        payload = self._get_request_payload(messages)
        body = {"messages": payload["messages"]}
        if tools:
            body["tools"] = [convert_to_openai_tool(tool) for tool in tools]
        extra = payload.get("extra_body", {})
        return body | {name: extra[name] for name in _request.OF_PROMPT if name in extra}

    def batch(self, inputs: list[Any], config: Any = None, **kwargs: Any) -> list[Any]:
        """As of every runnable. All requests are under way at once: to order them is the server's part."""
        return super().batch(inputs, wide(config, len(inputs)), **kwargs)

    def __call__(self, messages: LanguageModelInput, stop: list[str] | None = None, **kwargs: Any) -> AIMessage:
        """What LangChain's models did before `invoke`, for code of that time."""
        warnings.warn("Calling the model is deprecated: use llm.invoke(messages).", DeprecationWarning, stacklevel=2)
        return self.invoke(messages, stop=stop, **kwargs)
