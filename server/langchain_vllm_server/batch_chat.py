"""POST /v1/chat/completions/batch: several conversations, answered at the same time as one completion."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from langchain_vllm_server.chat import create_chat_completion
from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.protocol import ChatCompletionRequest, Message
from langchain_vllm_server.sampling import MAX_N

if TYPE_CHECKING:
    from langchain_vllm_server.generation import Service


class BatchChatRequest(ChatCompletionRequest, kw_only=True):
    """A chat completion of a list of conversations."""

    messages: list[list[Message]]  # type: ignore[assignment]


async def create_batch_chat(service: Service, request: BatchChatRequest, request_id: str) -> dict[str, Any]:
    """A choice for each conversation, in their order. Raises what the first one that fails raises."""
    for name, given in (
        ("stream", request.stream),
        ("tools", request.tools),
        ("tool_choice", request.tool_choice not in (None, "none")),
        ("n", request.n != 1),
        ("use_beam_search", request.use_beam_search),
    ):
        if given:
            raise BadRequestError(f"`{name}` is not supported for batches of conversations; leave it out.", name)
    if not 1 <= len(request.messages) <= MAX_N:
        raise BadRequestError(f"messages must hold 1 to {MAX_N} conversations.", "messages")
    shared = {name: getattr(request, name) for name in ChatCompletionRequest.__struct_fields__}
    tasks = [
        asyncio.ensure_future(
            create_chat_completion(service, ChatCompletionRequest(**{**shared, "messages": messages}), request_id)
        )
        for messages in request.messages
    ]
    try:
        answers = [await task for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return _merged([answer for answer in answers if isinstance(answer, dict)])


def _merged(answers: list[dict[str, Any]]) -> dict[str, Any]:
    choices = [{**answer["choices"][0], "index": index} for index, answer in enumerate(answers)]
    return {**answers[0], "choices": choices, "usage": _sum([answer["usage"] for answer in answers]), "metrics": None}


def _sum(usages: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for usage in usages:
        for name, value in usage.items():
            if isinstance(value, dict):
                total[name] = _sum([total.get(name) or {}, value])
            elif value is not None:
                total[name] = total.get(name, 0) + value
    return total
