"""Texts to vectors, of the states that the served model ends with: what embeddings, scores and ranks are made of."""

from __future__ import annotations

import asyncio
import math
from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import msgspec

from langchain_vllm_server import sampling
from langchain_vllm_server.errors import BadRequestError, EngineError
from langchain_vllm_server.generation import Clock
from langchain_vllm_server.prompts import text_prompt, token_prompt
from langchain_vllm_server.protocol import CompletionRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_vllm_server._engine import Event
    from langchain_vllm_server.generation import Service

MAX_TEXTS = 16384


class PoolingFields(msgspec.Struct, kw_only=True):
    """The fields that all requests for vectors share."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None  # -1: what fits
    truncation_side: Literal["left", "right"] = "right"
    use_activation: bool = True  # scale vectors to length 1
    normalize: bool | None = None  # the former name, refused as in vLLM
    padding: Literal["do_not_pad", "max_length"] = "do_not_pad"
    priority: int = 0
    cache_salt: str | None = None
    request_id: str | None = None

    def carrier(self) -> CompletionRequest:
        """A request that reads its prompts and says nothing: whoever checks and cuts those serves this one, too."""
        if self.normalize is not None:
            raise BadRequestError("`normalize` is no longer part of vLLM's API; give `use_activation`.", "normalize")
        if self.padding != "do_not_pad":
            raise BadRequestError(
                "`padding` is not supported: this model reads texts of any length as they are; leave it out.", "padding"
            )
        return CompletionRequest(
            max_tokens=0,
            echo=True,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
            priority=self.priority,
            cache_salt=self.cache_salt,
        )


@dataclass(slots=True)
class Pooled:
    """A prompt on its way to its vector; to the metrics, a request that generates nothing."""

    num_prompt_tokens: int
    clock: Clock
    vector: Sequence[float] = ()
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None

    def finish(self, event: Event) -> None:
        """Take the only event."""
        self.finish_reason = event.finish
        self.num_cached_tokens = event.num_cached_tokens
        self.vector = event.embedding
        self.clock.scheduled = event.scheduled_time
        self.clock.last_token = event.time


async def token_ids(service: Service, fields: PoolingFields, given: str | list[int], param: str) -> list[int]:
    """The tokens of a text, cut as the request says. Raises BadRequestError for what is empty, too long or no token."""
    carrier, model = fields.carrier(), service.model
    if isinstance(given, str):
        prompt = await text_prompt(carrier, model, given, 0, add_special_tokens=True)
    else:
        prompt = token_prompt(carrier, model, given, 0, param)
    if not prompt.token_ids:
        raise BadRequestError(f"{param} must not be empty: it has no tokens.", param)
    sampling.max_tokens(0, None, 0, len(prompt.token_ids), model.max_model_len)
    return prompt.token_ids


async def pool(service: Service, fields: PoolingFields, prompts: Sequence[list[int]]) -> list[Pooled]:
    """A vector of each prompt: of length 1, unless `use_activation` is false.

    Raises:
        BadRequestError: A field is out of range, or there are too many prompts.
        EngineError: The engine failed.
    """
    if len(prompts) > MAX_TEXTS:
        raise BadRequestError(f"{len(prompts)} texts in one request are more than {MAX_TEXTS}.", "input")
    wanted = replace(
        sampling.parameters(fields.carrier(), service.model, None), max_tokens=0, pooling=service.model.pooling
    )
    pooled = [Pooled(len(prompt), Clock()) for prompt in prompts]
    service.engine.admit(len(prompts))
    stream = service.engine.submit([(prompt, wanted) for prompt in prompts], eager=False)
    try:
        async for events in stream:
            for index, event in events:
                pooled[index].finish(event)
    finally:
        stream.close()
        for one in pooled:
            service.metrics.finished(one)
    if any(one.finish_reason != "stop" for one in pooled):
        raise EngineError(f"Pooling failed: {service.engine.problem() or 'the engine gave this request up'}")
    if fields.use_activation:
        for one in pooled:
            await asyncio.sleep(0)  # of many texts, nobody waits for all
            one.vector = normalised(one.vector)
    return pooled


def normalised(vector: Sequence[float]) -> Sequence[float]:
    """The vector scaled to length 1, in f32; one of length 0 stays."""
    length = math.hypot(*vector)
    return array("f", (value / length for value in vector)) if length else vector


def usage(pooled: Sequence[Pooled]) -> dict[str, object]:
    """`usage` of a request that generates nothing."""
    tokens = sum(one.num_prompt_tokens for one in pooled)
    return {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": sum(one.num_cached_tokens for one in pooled)},
        "completion_tokens_details": None,
    }
