"""Errors of a request, each both the OpenAI SDK's and LangChain's, so that code that catches either keeps working."""

from __future__ import annotations

import openai
from langchain_core.exceptions import ContextOverflowError, ModelConnectionError


class VLLMConnectionError(openai.APIConnectionError, ModelConnectionError):
    """The server can't be reached, or went away during the answer."""


class VLLMContextOverflowError(openai.BadRequestError, ContextOverflowError):
    """The prompt and the tokens asked for don't fit into the model's context."""


def is_context_overflow(error: openai.BadRequestError) -> bool:
    """Whether a 400 says that the request is too long, in the words of vLLM or in OpenAI's error code."""
    return error.code == "context_length_exceeded" or "maximum context length" in error.message
