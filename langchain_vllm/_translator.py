"""LangChain's standard content blocks of vLLM's messages.

Core's translator for OpenAI knows no reasoning. And with `output_version="v1"` core numbers the text and reasoning
blocks of a stream 0, 1, …, while a server numbers its tool calls 0, 1, … as well: blocks with equal numbers are merged,
and a call after text or reasoning is lost. So the calls have numbers of their own kind here, `lc_tc_0`, which core
merges just as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from langchain_core.messages.block_translators import register_translator

if TYPE_CHECKING:
    from langchain_core.messages import AIMessage, AIMessageChunk
    from langchain_core.messages.content import ContentBlock

PROVIDER = "vllm"
"""What LangSmith's `ls_provider` and a message's `model_provider` say; core compares the two."""


def _spoken(message: AIMessage) -> list[dict[str, Any]]:
    """Reasoning and text, which come before any tool call."""
    blocks: list[dict[str, Any]] = []
    content = [message.content] if isinstance(message.content, str) else message.content
    if not any(isinstance(block, dict) and block.get("type") == "reasoning" for block in content) and (
        reasoning := message.additional_kwargs.get("reasoning_content")
    ):
        blocks.append({"type": "reasoning", "reasoning": reasoning})
    for block in content:
        if isinstance(block, dict):
            if block.get("type") not in {"tool_call", "tool_call_chunk"}:
                blocks.append(block)
        elif block:
            blocks.append({"type": "text", "text": block})
    return blocks


def translate_content(message: AIMessage) -> list[ContentBlock]:
    """The blocks of a whole message."""
    blocks = _spoken(message)
    for call in message.tool_calls:
        blocks.append({"type": "tool_call", "name": call["name"], "args": call["args"], "id": call.get("id")})
    for invalid in message.invalid_tool_calls:
        blocks.append({**invalid, "type": "invalid_tool_call"})
    return cast("list[ContentBlock]", blocks)


def translate_content_chunk(message: AIMessageChunk) -> list[ContentBlock]:
    """The blocks of a piece of a message, or of the sum of all pieces."""
    if message.chunk_position == "last":
        return translate_content(message)
    blocks = _spoken(message)
    for chunk in message.tool_call_chunks:
        block: dict[str, Any] = {"type": "tool_call_chunk", **{key: chunk.get(key) for key in ("id", "name", "args")}}
        if (index := chunk.get("index")) is not None:
            block["index"] = index if isinstance(index, str) else f"lc_tc_{index}"
        blocks.append(block)
    return cast("list[ContentBlock]", blocks)


def register() -> None:
    """Tell core that the messages of this provider are translated here."""
    register_translator(PROVIDER, translate_content, translate_content_chunk)
