"""POST /v1/embeddings and /pooling."""

from __future__ import annotations

import base64
import sys
from array import array
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from langchain_vllm_server.chat_messages import render_chat
from langchain_vllm_server.chunks import now
from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.pooling import PoolingFields, normalised, pool, token_ids, usage
from langchain_vllm_server.protocol import Message, TokenizeRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_vllm_server.generation import Service


class EmbeddingRequest(PoolingFields, kw_only=True):
    """POST /v1/embeddings: texts, token ids, or conversations as a chat would render them."""

    input: str | list[str | int | list[int]] | None = None
    messages: list[Message | list[Message]] | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    encoding_format: Literal["float", "base64"] = "float"
    endianness: Literal["native", "little", "big"] = "native"  # of base64
    embed_dtype: Literal["float32"] = "float32"
    dimensions: int | None = None  # the first so many numbers, scaled anew


class PoolingRequest(EmbeddingRequest, kw_only=True):
    """POST /pooling."""

    task: str | None = None  # "embed" is all there is


async def create_embedding(service: Service, request: EmbeddingRequest, request_id: str) -> dict[str, Any]:
    """A vector for every input."""
    return await _answer(service, request, f"embd-{request_id}", "embedding", "embedding")


async def create_pooling(service: Service, request: PoolingRequest, request_id: str) -> dict[str, Any]:
    """The same in the form of vLLM's pooling API."""
    if request.task not in (None, "embed"):
        raise BadRequestError(f"Unsupported task: {request.task[:100]!r}. This server can only 'embed'.", "task")
    return await _answer(service, request, f"pool-{request_id}", "pooling", "data")


async def _answer(service: Service, request: EmbeddingRequest, name: str, kind: str, key: str) -> dict[str, Any]:
    model = service.model.check_name(request.model)
    size = service.model.hidden_size
    if request.dimensions is not None and not 1 <= request.dimensions <= size:
        raise BadRequestError(f"dimensions must be between 1 and {size}, got {request.dimensions}.", "dimensions")
    prompts = [await token_ids(service, request, given, "input") for given in _inputs(service, request)]
    pooled = await pool(service, request, prompts)
    return {
        "id": name,
        "object": "list",
        "created": now(),
        "model": model,
        "data": [
            {"index": index, "object": kind, key: _encoded(request, one.vector)} for index, one in enumerate(pooled)
        ],
        "usage": usage(pooled),
    }


def _inputs(service: Service, request: EmbeddingRequest) -> list[str | list[int]]:
    """Texts and lists of token ids. Raises BadRequestError for none, or a mixed list."""
    if (request.input is None) == (request.messages is None):
        raise BadRequestError("Give either `input` or `messages`.", "input")
    if request.messages is not None:
        messages = request.messages
        if all(isinstance(one, Message) for one in messages):
            messages = [messages]  # type: ignore[list-item]
        if any(isinstance(one, Message) for one in messages):
            raise BadRequestError("messages must not mix messages with conversations.", "messages")
        return [_rendered(service, request, conversation) for conversation in messages]  # type: ignore[arg-type]
    given = request.input
    if isinstance(given, str):
        return [given]
    if given and all(type(item) is int for item in given):
        return [given]  # type: ignore[list-item]
    if not given or any(type(item) is int for item in given):
        raise BadRequestError("input must be a text, a list of texts, token ids, or lists of them.", "input")
    return given  # type: ignore[return-value]


def _rendered(service: Service, request: EmbeddingRequest, conversation: list[Message]) -> str:
    chat = TokenizeRequest(
        messages=conversation,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        chat_template=request.chat_template,
        chat_template_kwargs=request.chat_template_kwargs,
    )
    return render_chat(chat, service.model)


def _encoded(request: EmbeddingRequest, vector: Sequence[float]) -> list[float] | str:
    if request.dimensions is not None:
        vector = vector[: request.dimensions]
        if request.use_activation:
            vector = normalised(vector)
    if request.encoding_format == "float":
        return list(vector)
    numbers = array("f", vector)
    if request.endianness not in ("native", sys.byteorder):
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
