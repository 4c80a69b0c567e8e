"""How the arguments of a model and of a call become the request."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

from langchain_core.utils import get_pydantic_field_names
from langchain_core.utils.function_calling import convert_to_openai_tool
from openai.resources.chat.completions import Completions

from langchain_vllm._parameters import PER_CALL, ChatParameters, check_names, translate
from langchain_vllm._profile import LiveProfile
from langchain_vllm._structured_output import response_format

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.messages import BaseMessage

    from langchain_vllm.chat_models import ChatVLLM

EXTRA = frozenset(ChatParameters.model_fields) | PER_CALL | {"enable_thinking", "response_format"}
"""Names that the SDK does not have, or that must not pass through it: they travel in its `extra_body`.

The SDK answers a `response_format` of its own with an exception if the answer was cut off, and rewrites streams.
"""

OF_PROMPT = ("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
"""Fields that change how long a conversation is in tokens."""


@cache
def _sdk_names() -> frozenset[str]:
    return frozenset(inspect.signature(Completions.create).parameters) - {"self"}


def constructor_arguments(cls: type[ChatVLLM], values: dict[str, Any]) -> dict[str, Any]:
    """The fields among `values`; OpenAI's request fields without a field here go into `model_kwargs`.

    Raises:
        ValueError: An unknown name.
    """
    values = translate(values)
    if isinstance(values.get("profile"), LiveProfile):
        del values["profile"]  # a copy makes its own; to validate this one would ask the server
    fields = get_pydantic_field_names(cls)
    more = {name: values.pop(name) for name in _sdk_names() & values.keys() - fields}
    more |= {name: values.pop(name) for name in {"response_format"} & values.keys()}
    check_names(values, fields | _sdk_names(), cls.__name__)
    return {**values, "model_kwargs": {**(values.get("model_kwargs") or {}), **more}} if more else values


def call_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call under today's names.

    Raises:
        ValueError: An unknown name.
    """
    call = translate(kwargs)
    call.pop("stream_usage", None)  # of streams, and read by then
    check_names(call, _sdk_names() | EXTRA | {"format_instructions"}, "A call of ChatVLLM")
    return call


def extra_body(model: ChatVLLM, call: dict[str, Any]) -> dict[str, Any]:
    """VLLM's fields, from the weakest source to the strongest; None where a stronger one unsets a weaker."""
    fields = {name: value for name in ChatParameters.model_fields if (value := getattr(model, name)) is not None}
    given = {name: value for name, value in call.items() if name in EXTRA}
    thinking = given.pop("enable_thinking", model.enable_thinking)
    in_model = translate(model.extra_body or {})
    in_call = translate(call.get("extra_body") or {})
    merged = {**fields, **in_model, **{n: v for n, v in model.model_kwargs.items() if n in EXTRA}, **given, **in_call}
    if thinking is not None:
        switch = {"enable_thinking": thinking, "thinking": thinking}
        merged["chat_template_kwargs"] = {**switch, **(merged.get("chat_template_kwargs") or {})}
    if (format_ := merged.get("response_format")) is not None:
        merged["response_format"] = response_format(format_)
    return merged


def move_extra(payload: dict[str, Any], extra: dict[str, Any]) -> None:
    """Leave to the SDK only what it knows. An agent without tools binds an empty list of them, which servers refuse."""
    if "tools" in payload and not payload["tools"]:
        for name in {"tools", "tool_choice", "parallel_tool_calls"} & payload.keys():
            del payload[name]
    for name in EXTRA & payload.keys():
        del payload[name]
    payload.pop("extra_body", None)
    if given := {name: value for name, value in extra.items() if value is not None}:
        payload["extra_body"] = given


def check_tool_choice(tools: Sequence[Any], tool_choice: Any) -> None:
    """Refuse the name of a tool that is not offered."""
    if not isinstance(tool_choice, str) or tool_choice in {"auto", "none", "any", "required"}:
        return
    names = [convert_to_openai_tool(tool).get("function", {}).get("name") for tool in tools]
    if tool_choice not in names:
        raise ValueError(f'tool_choice={tool_choice!r} is none of the tools {names}, nor "auto", "none" or "any".')


def reasoning_of(message: BaseMessage) -> str:
    """The reasoning that came with an answer."""
    if reasoning := message.additional_kwargs.get("reasoning_content"):
        return str(reasoning)
    blocks = [block for block in message.content if isinstance(block, dict)]
    return "".join(str(block.get("reasoning", "")) for block in blocks if block.get("type") == "reasoning")


def replay_reasoning(messages: Sequence[BaseMessage], sent: list[dict[str, Any]]) -> None:
    """Put the reasoning of earlier answers into the messages that are sent; every vLLM knows this name for it."""
    for message, entry in zip(messages, sent, strict=True):
        if message.type in {"ai", "AIMessageChunk"} and (reasoning := reasoning_of(message)):
            entry["reasoning_content"] = reasoning


def with_media(messages: Sequence[BaseMessage]) -> list[BaseMessage]:
    """The messages with standard blocks of video, and of audio by address, in vLLM's form: OpenAI's has none."""
    return [
        message.model_copy(update={"content": [_media(block) for block in message.content]})
        if isinstance(message.content, list) and message.type != "ai"
        else message
        for message in messages
    ]


def _media(block: Any) -> Any:
    if not isinstance(block, dict) or (kind := block.get("type")) not in {"image", "audio", "video"}:
        return block
    url = block.get("url")
    if not url and kind == "video" and (data := block.get("base64") or block.get("data")):
        url = f"data:{block.get('mime_type') or 'video/mp4'};base64,{data}"
    if not url:
        return block
    uuid = (block.get("extras") or {}).get("uuid")  # vLLM's name for media that it has seen before
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}, **({"uuid": uuid} if uuid else {})}
