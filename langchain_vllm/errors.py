"""Errors of a request, each both the OpenAI SDK's and LangChain's, so that code that catches either keeps working."""

from __future__ import annotations

from typing import TYPE_CHECKING

import openai
from langchain_core.exceptions import (
    ContextOverflowError,
    ModelAPIError,
    ModelAuthenticationError,
    ModelConnectionError,
    ModelInvalidRequestError,
    ModelNotFoundError,
    ModelPermissionDeniedError,
    ModelRateLimitError,
    ModelTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


class VLLMConnectionError(openai.APIConnectionError, ModelConnectionError):
    """The server can't be reached, or went away during the answer."""


class VLLMServerCrashedError(VLLMConnectionError):
    """The managed server ended while it had the request. That was not sent again; the next call restarts the server."""


class VLLMTimeoutError(openai.APITimeoutError, ModelTimeoutError):
    """The answer took longer than `timeout`."""


class VLLMContextOverflowError(openai.BadRequestError, ContextOverflowError):
    """The prompt and the tokens asked for don't fit into the model's context."""


class VLLMInvalidRequestError(openai.BadRequestError, ModelInvalidRequestError):
    """The server refuses the request as it is (400)."""


class VLLMAuthenticationError(openai.AuthenticationError, ModelAuthenticationError):
    """The server wants another key (401)."""


class VLLMPermissionDeniedError(openai.PermissionDeniedError, ModelPermissionDeniedError):
    """The server refuses the request to this key (403)."""


class VLLMNotFoundError(openai.NotFoundError, ModelNotFoundError):
    """The server has no such model, or no such route (404)."""


class VLLMRateLimitError(openai.RateLimitError, ModelRateLimitError):
    """The server has too many requests already (429)."""


class VLLMServerBusyError(openai.InternalServerError, ModelAPIError):
    """The server failed, is full, or is still loading its model (5xx)."""


class VLLMStreamError(openai.APIError, ModelAPIError):
    """The server failed after its answer had begun."""


_CLASSES: tuple[type[openai.APIStatusError], ...] = (
    VLLMInvalidRequestError,
    VLLMAuthenticationError,
    VLLMPermissionDeniedError,
    VLLMNotFoundError,
    VLLMRateLimitError,
    VLLMServerBusyError,
)

_TOOL_PARSER = (
    'start vLLM with `--enable-auto-tool-choice --tool-call-parser …` ("hermes" for Qwen, "llama3_json" for Llama 3, '
    'others in its documentation on tool calling), or bind the tools with tool_choice="any", which needs no parser.'
)

_REMEDIES = (  # words of a 400, and what to do about it
    ("--enable-auto-tool-choice", _TOOL_PARSER),
    ("--tool-call-parser", _TOOL_PARSER),
    ("chat template", "start the server with `--chat-template FILE`, or use `VLLM`, which needs none."),
    ("--reasoning-config", "start vLLM with `--reasoning-parser …` and `--reasoning-config …`."),
    ("--enable-lora", "start the server with `--enable-lora --lora-modules NAME=PATH`."),
)


def is_context_overflow(error: openai.BadRequestError) -> bool:
    """Whether a 400 says that the request is too long, in the words of vLLM or in OpenAI's error code."""
    return error.code == "context_length_exceeded" or "maximum context length" in error.message


def explain(error: openai.APIError, url: str, *, has_key: bool, served: Sequence[str] | None) -> openai.APIError:
    """LangChain's kind of the error, with a remedy.

    Args:
        error: The SDK's error; none about the connection itself.
        url: The server's address.
        has_key: Whether a key was sent.
        served: The models that the server has; None if it would not say. Only of a 404.
    """
    if not isinstance(error, openai.APIStatusError):
        return VLLMStreamError(f"The server failed during its answer: {error.message}", error.request, body=error.body)
    if isinstance(error, openai.BadRequestError) and is_context_overflow(error):
        return VLLMContextOverflowError(_said(error), response=error.response, body=error.body)
    kind = next((cls for cls in _CLASSES if isinstance(error, cls.__mro__[1])), None)
    if kind is None:
        return error
    remedy = _remedy(error, url, has_key, served)
    said = _said(error)
    message = f"{said.rstrip('.')}. {remedy}" if remedy else said
    return kind(message, response=error.response, body=error.body)


def _said(error: openai.APIStatusError) -> str:
    """The server's own words: some versions of the SDK wrap the whole body around them."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    return said if isinstance(said, str) else error.message


def _remedy(error: openai.APIStatusError, url: str, has_key: bool, served: Sequence[str] | None) -> str:
    if isinstance(error, openai.AuthenticationError):
        if has_key:
            return f"The server at {url} takes another key than the one given with api_key= or VLLM_API_KEY."
        return f"The server at {url} wants a key: pass api_key=, or set VLLM_API_KEY."
    if isinstance(error, openai.NotFoundError):
        path = error.request.url.path
        if served is None:
            return f"Nothing is at {path}: base_url is the address up to /v1, such as http://localhost:8000/v1."
        if "model" in error.message:
            return (
                f"The server at {url} has {list(served)}: choose one with model=, or leave model out for the only one."
            )
        return (
            f"The server at {url} has no {path}: its model ({', '.join(served)}) is of another kind, or it is too old."
        )
    if isinstance(error, openai.BadRequestError):
        return next((f"To change that, {remedy}" for words, remedy in _REMEDIES if words in error.message), "")
    if isinstance(error, openai.RateLimitError) or error.status_code == 503:
        return f"The server at {url} is full or still loading: try again later, or raise max_retries=."
    return ""
