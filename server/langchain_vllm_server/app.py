"""The ASGI application: routes, and errors in OpenAI's envelope. What stands around it is in middleware.py."""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect as BodyDisconnect
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from langchain_vllm_server.errors import BadRequestError, RequestError
from langchain_vllm_server.http_metrics import CountedRequests
from langchain_vllm_server.load_report import load_report
from langchain_vllm_server.protocol import GenerationRequest, decode
from langchain_vllm_server.responses import ClientDisconnect, error_response, json_response, until_disconnect
from langchain_vllm_server.routes import DOCS, OPERATIONS, PAGES, Page

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import msgspec
    from starlette.types import ASGIApp

    from langchain_vllm_server.generation import Service
    from langchain_vllm_server.routes import Operation

    Endpoint = Callable[[Request], Awaitable[Response]]

logger = logging.getLogger(__name__)

_REASONS = {404: "NotFoundError", 405: "MethodNotAllowedError"}

R = TypeVar("R", bound="msgspec.Struct")


def create_app(service: Service, *, docs: bool = True) -> ASGIApp:
    """The application that serves one model, with the pages that describe it unless `docs` is false."""
    routes = _routes(service, [page for page in PAGES if docs or page.path not in DOCS])
    app = Starlette(
        routes=routes,
        exception_handlers={RequestError: _request_error, HTTPException: _http_error, Exception: _server_error},
    )
    return CountedRequests(app, {route.endpoint: route.path for route in routes}, service.metrics.http)


def _routes(service: Service, pages: Sequence[Page]) -> list[Route]:
    got = [Route(page.path, _get(service, page), methods=list(page.methods)) for page in pages]
    return got + [Route(operation.path, _post(service, operation), methods=["POST"]) for operation in OPERATIONS]


def _get(service: Service, page: Page) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        return await page.answer(service, request)

    return endpoint


def _post(service: Service, operation: Operation) -> Endpoint:
    """The endpoint that decodes a request, answers it, and gives up when the client does."""

    async def endpoint(request: Request) -> Response:
        try:
            body = await _read_body(request)
            wanted = operation.of(body)
            decoded = _with_headers(decode(body, wanted.request), request)
            load = load_report(request.headers, service.engine.stats())
            answer = wanted.answer(service, decoded, _request_id(request, decoded))
            result = await until_disconnect(request.receive, answer)
        except (ClientDisconnect, BodyDisconnect):
            return Response(status_code=499)  # nobody reads it
        response = result if isinstance(result, Response) else json_response(result)
        response.headers.update(load)
        return response

    return endpoint


def _with_headers(body: R, request: Request) -> R:
    """The body with what a header says in its place: `X-Vllm-Priority`."""
    given = request.headers.get("x-vllm-priority")
    if given is not None and isinstance(body, GenerationRequest):
        try:
            body.priority = int(given)
        except ValueError:
            raise BadRequestError(f"X-Vllm-Priority must be a whole number, got {given!r}.", "priority") from None
    return body


async def _read_body(request: Request) -> bytes:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RequestError(
            400, "Bad Request", f"Unsupported Media Type: only 'application/json' is allowed, got {media_type!r}"
        )
    return await request.body()


def _request_id(request: Request, body: msgspec.Struct) -> str:
    given = request.headers.get("x-request-id") or getattr(body, "request_id", None)
    return given or uuid.uuid4().hex


async def _request_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    named = RequestError(error.status_code, _REASONS.get(error.status_code, "BadRequestError"), message)
    named.headers = dict(error.headers or {})
    return error_response(named)


async def _server_error(_request: Request, _error: Exception) -> Response:
    """Starlette raises the error again after this answer, so that it is logged; its text stays inside."""
    return error_response(RequestError(500, "InternalServerError", "Internal server error; see the server's log."))
