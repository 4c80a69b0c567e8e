"""The routes, as data: what is served where, in which form, and what for.

The application (app.py) and its description (openapi.py) are both made of this table. A further API is further rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
from starlette.responses import Response

from langchain_vllm_server.batch_chat import BatchChatRequest, create_batch_chat
from langchain_vllm_server.chat import create_chat_completion
from langchain_vllm_server.completions import create_completion
from langchain_vllm_server.embeddings import EmbeddingRequest, PoolingRequest, create_embedding, create_pooling
from langchain_vllm_server.errors import BadRequestError, NotFoundError
from langchain_vllm_server.models_api import model_card, model_list
from langchain_vllm_server.prometheus import CONTENT_TYPE
from langchain_vllm_server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    decode_object,
)
from langchain_vllm_server.responses import json_response
from langchain_vllm_server.scoring import (
    ClassifyRequest,
    RerankRequest,
    ScoreRequest,
    classify,
    create_rerank,
    create_score,
)
from langchain_vllm_server.tokenize import detokenize, tokenize

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from starlette.requests import Request

    from langchain_vllm_server.generation import Service

    Asked = Callable[[Service, Request], Awaitable[Response]]
    Answered = Callable[[Service, Any, str], Coroutine[Any, Any, Response | dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Operation:
    """A route whose body is a JSON object."""

    path: str
    request: type[msgspec.Struct]
    answer: Answered  # service, request, request id → a response, or the object to send
    summary: str
    streams: bool = False  # where the request asks for it

    def of(self, _body: bytes) -> Operation:
        """What is to be done with a body."""
        return self


@dataclass(frozen=True, slots=True)
class Page:
    """A route without a body."""

    path: str
    answer: Asked
    summary: str
    methods: tuple[str, ...] = ("GET",)
    media_type: str = "application/json"


async def _health(service: Service, _request: Request) -> Response:
    if problem := service.engine.problem():
        return json_response({"status": "unhealthy", "error": problem}, 503)
    return Response(status_code=200, headers={"x-device": service.engine.device})  # without a body, as vLLM's


async def _version(service: Service, _request: Request) -> Response:
    return json_response({"version": service.model.version})


async def _load(service: Service, _request: Request) -> Response:
    return json_response({"server_load": service.engine.num_requests})


async def _prometheus(service: Service, _request: Request) -> Response:
    text = service.metrics.render(service.engine.stats(), service.engine.rejections)
    return Response(text, headers={"content-type": CONTENT_TYPE})


async def _models(service: Service, _request: Request) -> Response:
    return json_response(model_list(service.model))


async def _one_model(service: Service, request: Request) -> Response:
    return json_response(model_card(service.model, service.model.check_name(request.path_params["name"])))


async def _tokenizer_info(service: Service, _request: Request) -> Response:
    if service.model.tokenizer_info is None:
        raise NotFoundError("The tokenizer is not told: start the server with --enable-tokenizer-info-endpoint.")
    return json_response(service.model.tokenizer_info)


async def _reset_prefix_cache(service: Service, _request: Request) -> Response:
    return json_response({"success": service.engine.forget_prefixes()})


async def _openapi(service: Service, request: Request) -> Response:
    from langchain_vllm_server.openapi import describe

    return json_response(describe(service.model.version, request.scope.get("root_path", "")))


async def _docs(_service: Service, _request: Request) -> Response:
    from langchain_vllm_server.docs_page import PAGE

    return Response(PAGE, media_type="text/html")


PAGES = (
    Page("/health", _health, "Whether the engine can serve: 200 with x-device, where it runs, or 503 with the reason."),
    Page("/ping", _health, "The same.", ("GET", "POST")),
    Page("/version", _version, "The server's version."),
    Page("/load", _load, "How many requests wait for the engine."),
    Page("/metrics", _prometheus, "Counters in Prometheus' text format.", media_type="text/plain"),
    Page("/v1/models", _models, "The model, once per name."),
    Page("/v1/models/{name:path}", _one_model, "The model under one of its names."),
    Page("/tokenizer_info", _tokenizer_info, "The tokenizer's settings and chat template, if the server tells them."),
    Page("/openapi.json", _openapi, "This description."),
    Page("/docs", _docs, "The same for people.", media_type="text/html"),
    Page("/reset_prefix_cache", _reset_prefix_cache, "Forget cached prompts, unless requests run.", ("POST",)),
)

DOCS = frozenset({"/openapi.json", "/docs"})


class Invocation(msgspec.Struct):
    """POST /invocations: the body of one of the other routes."""


class Invocations(Operation):
    """SageMaker's one route for everything."""

    _SHAPES = (
        ("/v1/chat/completions", {"messages"}),
        ("/v1/completions", {"prompt"}),
        ("/v1/embeddings", {"input"}),
        ("/rerank", {"query", "documents"}),
        ("/score", {"queries"}),
        ("/score", {"text_1"}),
        ("/score", {"data_1"}),
    )

    def of(self, body: bytes) -> Operation:
        """The first operation whose fields the body has. Raises BadRequestError if it is none."""
        given = decode_object(body).keys()
        for path, fields in self._SHAPES:
            if fields <= given:
                return next(operation for operation in OPERATIONS if operation.path == path)
        wanted = ", or ".join(" and ".join(sorted(fields)) for _, fields in self._SHAPES)
        raise BadRequestError(f"This is the body of no route: it must have {wanted}.")


async def _never(_service: Service, _request: Invocation, _request_id: str) -> NoReturn:
    raise AssertionError("an invocation is always another operation")


_SCORE = ScoreRequest, create_score, "How near texts are to each other: the cosine of their vectors."
_RERANK = RerankRequest, create_rerank, "Documents, nearest to the query first."

OPERATIONS = (
    Operation("/v1/chat/completions", ChatCompletionRequest, create_chat_completion, "Answer a chat.", streams=True),
    Operation("/v1/chat/completions/batch", BatchChatRequest, create_batch_chat, "Answer several chats."),
    Operation("/v1/completions", CompletionRequest, create_completion, "Continue texts or token ids.", streams=True),
    Operation("/v1/embeddings", EmbeddingRequest, create_embedding, "A vector for every text."),
    Operation("/pooling", PoolingRequest, create_pooling, "The same in the form of vLLM's pooling API."),
    Operation("/score", *_SCORE),
    Operation("/v1/score", *_SCORE),
    Operation("/rerank", *_RERANK),
    Operation("/v1/rerank", *_RERANK),
    Operation("/v2/rerank", *_RERANK),
    Operation("/classify", ClassifyRequest, classify, "Refused: the model has no classes."),
    Operation("/tokenize", TokenizeRequest, tokenize, "The token ids of a prompt or a conversation."),
    Operation("/detokenize", DetokenizeRequest, detokenize, "The text of token ids."),
    Invocations("/invocations", Invocation, _never, "Whichever of the other routes has such a body.", streams=True),
)
