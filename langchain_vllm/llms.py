"""`VLLM`: text completions, without a chat template, from a vLLM server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import Field

from langchain_vllm._answers import metadata
from langchain_vllm._connected import ConnectedModel, batches
from langchain_vllm._parameters import PER_CALL, SamplingParameters, check_names, translate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models import LangSmithParams


class TextParameters(SamplingParameters):
    """What text completions have besides. None leaves a field out: the server's default applies."""

    max_tokens: int | None = 512
    """At most so many tokens; the server's own default is 16."""
    temperature: float | None = None
    """0 always takes the likeliest token."""
    top_p: float | None = None
    """Sample among the likeliest tokens that have this probability together."""
    n: int | None = None
    """Answers to each prompt."""
    stop: list[str] | None = None
    """End the answer before any of these texts."""
    seed: int | None = None
    """Makes sampling repeatable."""
    presence_penalty: float | None = None
    """Discourages tokens that the answer has already, -2 to 2."""
    frequency_penalty: float | None = None
    """Discourages tokens by how often the answer has them, -2 to 2."""
    logit_bias: dict[str, float] | None = None
    """Added to the logits of tokens, by their ids, -100 to 100."""
    logprobs: int | None = None
    """Tell the log probabilities of the tokens and of so many alternatives."""
    echo: bool | None = None
    """Begin the answer with the prompt."""
    suffix: str | None = None
    """What comes after the answer, for models that can fill in."""
    add_special_tokens: bool | None = None
    """Begin the prompt with the model's first token; the server's default is true."""
    response_format: dict[str, Any] | None = None
    """Hold the answer to JSON or to a JSON schema, as in OpenAI's API."""


class VLLM(TextParameters, ConnectedModel, BaseLLM):
    """Text completion model served by vLLM, or by this package's own engine.

    It continues the prompt as it is. For conversations use `ChatVLLM`, which applies the model's chat template.

    Setup:
        ```python
        llm = VLLM(base_url="http://localhost:8000/v1")
        ```

        Without `base_url`, the first call starts a local server for `model`, as with `ChatVLLM`.

    Key init args:
        model, base_url, api_key, timeout, max_retries, server_options: As for `ChatVLLM`.
        max_tokens, temperature, top_k, stop, seed, n, logprobs, …: See the fields; each is a call's argument too.
        extra_body: Any further field of the request.
        batch_size: Prompts in one request.

    Use:
        ```python
        llm.invoke("The capital of Italy is")
        llm.batch(["The capital of Italy is", "The capital of France is"])  # one request
        for piece in llm.stream("Once upon a time"):
            print(piece, end="", flush=True)
        ```
    """

    batch_size: int = Field(default=128, ge=1)
    """Prompts in one request."""

    @property
    def _llm_type(self) -> str:
        return "vllm"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """What answers depend on, for caches; the port of a managed server is not part of it."""
        return {
            "model": self.model,
            "base_url": self.base_url,
            "engine": self.engine,
            "server_options": self.server_options,
            **self._fields({}),
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "vllm"
        params["ls_model_name"] = kwargs.get("model") or self._connection.served_model
        return params

    def _fields(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The request's fields; a call's override the object's one by one, None unsets."""
        call = translate(call)
        body = call.pop("extra_body", None) or {}
        check_names(call, {*TextParameters.model_fields, *PER_CALL, "model"}, "A call of VLLM")
        own = {name: getattr(self, name) for name in TextParameters.model_fields}
        merged = {**own, **translate(self.extra_body), **call, **translate(body)}
        return {name: value for name, value in merged.items() if value is not None}

    def _request(self, prompt: str | Sequence[str], stop: list[str] | None, call: Mapping[str, Any]) -> dict[str, Any]:
        fields = self._fields({**call, **({} if stop is None else {"stop": stop})})
        model = fields.pop("model", None) or self._connection.served_model
        return {"model": model, "prompt": prompt, "extra_body": fields}

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        self._connection.open()
        with self._connection.explained():
            answers = [
                (len(batch), self._connection.client.completions.create(**self._request(batch, stop, kwargs)))
                for batch in batches(prompts, self.batch_size)
            ]
        return _result(answers)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        await self._connection.aopen()
        create = self._connection.async_client.completions.create
        async with self._connection.aexplained():
            answers = [
                (len(batch), await create(**self._request(batch, stop, kwargs)))
                for batch in batches(prompts, self.batch_size)
            ]
        return _result(answers)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        self._connection.open()
        with self._connection.explained():
            create = self._connection.client.completions.create
            with create(**self._request(prompt, stop, kwargs), **_STREAMED) as chunks:
                for chunk in chunks:
                    if (generation := _piece(chunk.model_dump())) is not None:
                        if run_manager:
                            run_manager.on_llm_new_token(generation.text, chunk=generation)
                        yield generation

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        await self._connection.aopen()
        async with self._connection.aexplained():
            create = self._connection.async_client.completions.create
            async with await create(**self._request(prompt, stop, kwargs), **_STREAMED) as stream:
                async for chunk in stream:
                    if (generation := _piece(chunk.model_dump())) is not None:
                        if run_manager:
                            await run_manager.on_llm_new_token(generation.text, chunk=generation)
                        yield generation

    def get_token_ids(self, text: str) -> list[int]:
        """The token ids of `text`, from the server."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        tokens: list[int] = self._connection.post("/tokenize", prompt=text)["tokens"]
        return tokens


_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


def _told(answer: Mapping[str, Any], choice: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a choice beside its text."""
    own = {name: choice[name] for name in ("finish_reason", "logprobs") if choice.get(name) is not None}
    return {**own, **metadata(answer, choice)}


def _piece(chunk: Mapping[str, Any]) -> GenerationChunk | None:
    """A piece of the first choice, or the usage at the end of a stream; None for another choice's."""
    if not chunk.get("choices"):
        usage = {"token_usage": chunk["usage"]} if chunk.get("usage") else None
        return GenerationChunk(text="", generation_info=usage)
    choice = next((choice for choice in chunk["choices"] if choice["index"] == 0), None)
    return (
        None if choice is None else GenerationChunk(text=choice["text"], generation_info=_told(chunk, choice) or None)
    )


def _result(answers: Sequence[tuple[int, Any]]) -> LLMResult:
    generations: list[list[Generation]] = []
    usage: dict[str, int] = {}
    name = ""
    for prompts, answer in answers:
        told = answer.model_dump()
        name = told.get("model") or name
        choices = sorted(told["choices"], key=lambda choice: choice["index"])
        made = [Generation(text=choice["text"], generation_info=_told(told, choice)) for choice in choices]
        each = max(len(made) // prompts, 1)
        generations += [made[start : start + each] for start in range(0, len(made), each)]
        for key, value in (told.get("usage") or {}).items():
            if isinstance(value, int):
                usage[key] = usage.get(key, 0) + value
    return LLMResult(generations=list(generations), llm_output={"token_usage": usage, "model_name": name})
