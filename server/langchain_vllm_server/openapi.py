"""GET /openapi.json and /docs: the routes described, from the table that serves them and the types that decode bodies.

Format: the OpenAPI Specification 3.1, https://spec.openapis.org/oas/v3.1.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from langchain_vllm_server import routes

if TYPE_CHECKING:
    from langchain_vllm_server.routes import Operation, Page


class Error(msgspec.Struct):
    """What went wrong, and what to change."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(msgspec.Struct):
    """The envelope of every error."""

    error: Error


def describe(version: str, root_path: str = "") -> dict[str, Any]:
    """The description of all routes, below `root_path`."""
    types = list(dict.fromkeys([operation.request for operation in routes.OPERATIONS]))
    _, components = msgspec.json.schema_components([*types, ErrorResponse], ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for page in routes.PAGES:
        paths[_plain(page.path)] = {method.lower(): _page(page) for method in page.methods}
    for operation in routes.OPERATIONS:
        paths[operation.path] = {"post": _operation(operation)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "langchain-vllm", "version": version, "description": "OpenAI's API as vLLM serves it."},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _plain(path: str) -> str:
    """A path as OpenAPI writes it, without converters."""
    return path.replace(":path}", "}")


def _page(page: Page) -> dict[str, Any]:
    content = {page.media_type: {"schema": {} if page.media_type == "application/json" else {"type": "string"}}}
    described: dict[str, Any] = {"summary": page.summary, "responses": _responses(content)}
    if "{name" in page.path:
        described["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return described


def _operation(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    reference = {"$ref": f"#/components/schemas/{operation.request.__name__}"}
    return {
        "summary": operation.summary,
        "security": [{}, {"key": []}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}},
        "responses": _responses(content),
    }


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    return {
        "200": {"description": "The answer.", "content": content},
        "default": {"description": "An error in the envelope.", "content": error},
    }
