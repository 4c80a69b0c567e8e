"""Every failure is LangChain's kind of error as well as the SDK's, and says what to do."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from langchain_core import exceptions as core

from langchain_vllm._http import httpx
from tests.unit_tests.mock_server import MockServer

PATH = "/v1/chat/completions"
MODELS = (200, {"object": "list", "data": [{"id": "served", "object": "model"}]})


def failing(status: int, message: str, **answers: Any) -> MockServer:
    return MockServer(
        {PATH: (status, {"error": {"message": message, "code": status}}), "/v1/models": MODELS, **answers}
    )


Errors = type[Exception]

CASES: list[tuple[int, str, Errors, Errors, str]] = [
    (400, "top_k must be at least -1", core.ModelInvalidRequestError, openai.BadRequestError, "top_k"),
    (
        400,
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
        core.ModelInvalidRequestError,
        openai.BadRequestError,
        'To change that, start vLLM with .*or bind the tools with tool_choice="any"',
    ),
    (
        401,
        "Unauthorized",
        core.ModelAuthenticationError,
        openai.AuthenticationError,
        "pass api_key=, or set VLLM_API_KEY",
    ),
    (403, "No", core.ModelPermissionDeniedError, openai.PermissionDeniedError, "No"),
    (
        404,
        "The model `m` does not exist.",
        core.ModelNotFoundError,
        openai.NotFoundError,
        r"The model `m` does not exist\. .* has \['served'\]: choose one with model=",
    ),
    (404, "Not Found", core.ModelNotFoundError, openai.NotFoundError, "has no /v1/chat/completions: its model"),
    (429, "Slow down", core.ModelRateLimitError, openai.RateLimitError, "full or still loading: try again later"),
    (500, "Broken", core.ModelAPIError, openai.InternalServerError, "Broken"),
    (503, "Loading", core.ModelAPIError, openai.InternalServerError, "full or still loading: try again later"),
]


@pytest.mark.parametrize(("status", "message", "kind", "sdk", "remedy"), CASES, ids=[case[1][:20] for case in CASES])
async def test_statuses(status: int, message: str, kind: Errors, sdk: Errors, remedy: str) -> None:
    chat = failing(status, message).chat()
    with pytest.raises(kind, match=remedy) as raised:
        chat.invoke("Hello")
    assert isinstance(raised.value, sdk)
    with pytest.raises(kind, match=remedy):
        list(chat.stream("Hello"))
    with pytest.raises(kind, match=remedy):
        await chat.ainvoke("Hello")
    with pytest.raises(kind, match=remedy):
        _ = [chunk async for chunk in chat.astream("Hello")]


def test_a_wrong_key() -> None:
    with pytest.raises(core.ModelAuthenticationError, match="takes another key than the one given"):
        failing(401, "Unauthorized").chat(api_key="k").invoke("Hello")


def test_a_wrong_address() -> None:
    server = MockServer(dict.fromkeys((PATH, "/v1/models"), (404, {"detail": "Not Found"})))
    with pytest.raises(core.ModelNotFoundError, match="base_url is the address up to /v1"):
        server.chat().invoke("Hello")


def test_timeouts() -> None:
    server = MockServer({PATH: httpx.ReadTimeout("slow")})
    with pytest.raises(core.ModelTimeoutError, match=r"within timeout=3\.0: raise it") as raised:
        server.chat(timeout=3).invoke("Hello")
    assert isinstance(raised.value, openai.APITimeoutError)


def test_a_failure_in_a_stream() -> None:
    chunk = {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": []}
    text = f"data: {json.dumps(chunk)}\n\ndata: {json.dumps({'error': {'message': 'Engine died', 'code': 500}})}\n\n"
    with pytest.raises(core.ModelAPIError, match="failed during its answer: Engine died") as raised:
        list(MockServer({PATH: (200, text)}).chat().stream("Hello"))
    assert isinstance(raised.value, openai.APIError)
    assert raised.value.is_retryable


def test_of_other_routes() -> None:
    server = MockServer({"/tokenize": (401, {"error": {"message": "Unauthorized"}})})
    with pytest.raises(core.ModelAuthenticationError, match="VLLM_API_KEY"):
        server.chat().get_num_tokens("Hello")
