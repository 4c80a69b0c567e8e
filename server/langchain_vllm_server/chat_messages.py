"""From the messages of a chat to the prompt's text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.tool_parsers import GENERIC
from langchain_vllm_server.tool_prompt import alternating, with_tools, without_system

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_vllm_server.chat_template import ChatTemplate
    from langchain_vllm_server.protocol import ChatCompletionRequest, Message, TokenizeRequest
    from langchain_vllm_server.served_model import ServedModel

# What a template gets from elsewhere in the request.
RESERVED_KWARGS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
)


def render_chat(request: ChatCompletionRequest | TokenizeRequest, model: ServedModel) -> str:
    """Apply the model's chat template. Raises BadRequestError where there is none, or it refuses the messages."""
    template, parts = _template(request, model)
    if template is None:
        raise BadRequestError(
            f"The model `{model.names[0]}` has no chat template, so it cannot chat. Use /v1/completions, or start the "
            "server with --chat-template and the template that the model was trained with.",
            "messages",
        )
    turns = [_as_dict(message, number, parts=parts) for number, message in enumerate(_checked(request))]
    tools = request.tools
    if request.tool_choice == "none" and model.hides_unused_tools:
        tools = None
    if model.tool_format is GENERIC and not template.shows_tools:
        turns, tools = with_tools(turns, None if request.tool_choice == "none" else tools), None
    options = {
        "tools": tools,
        "documents": request.documents,
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
        **_template_kwargs(model, request),
    }
    problem = ""
    for tolerated in (turns, alternating(turns), without_system(alternating(turns))):
        try:
            return template.render(tolerated, **options)
        except ValueError as error:
            problem = problem or str(error)
    raise BadRequestError(f"The chat template refused the messages: {problem}", "messages")


def _template(request: ChatCompletionRequest | TokenizeRequest, model: ServedModel) -> tuple[ChatTemplate | None, bool]:
    """The template to use, and whether it takes contents as lists of parts."""
    source = request.chat_template
    if source is None:
        return model.chat_template, model.content_format == "openai"
    if not model.trust_request_chat_template:
        raise BadRequestError(
            "Chat template is passed with request, but --trust-request-chat-template is not set: start the server with "
            "that flag, or leave `chat_template` out.",
            "chat_template",
        )
    from langchain_vllm_server.chat_template import ChatTemplate

    try:
        return ChatTemplate(source, model.tokenizer.special_tokens), content_format(source) == "openai"
    except ValueError as error:
        raise BadRequestError(str(error), "chat_template") from None


def content_format(source: str) -> str:
    """Whether a template takes contents as lists of parts ("openai"): it loops over them. Otherwise "string"."""
    import jinja2
    import jinja2.ext
    from jinja2 import nodes

    try:
        tree = jinja2.Environment(extensions=[jinja2.ext.loopcontrols]).parse(source)
    except jinja2.TemplateError:
        return "string"  # rendering will say what is wrong with it
    aliases = {
        node.target.name
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and _is_content(node.node)
    }
    for loop in tree.find_all(nodes.For):
        if _is_content(loop.iter) or (isinstance(loop.iter, nodes.Name) and loop.iter.name in aliases):
            return "openai"
    return "string"


def _is_content(node: Any) -> bool:
    """`message.content` or `message["content"]`, of whatever the message is called."""
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


def _checked(request: ChatCompletionRequest | TokenizeRequest) -> list[Message]:
    if not request.messages:
        raise BadRequestError("messages must not be empty.", "messages")
    if request.continue_final_message and request.add_generation_prompt:
        raise BadRequestError(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.", "continue_final_message"
        )
    return request.messages


def _template_kwargs(model: ServedModel, request: ChatCompletionRequest | TokenizeRequest) -> dict[str, Any]:
    given = request.chat_template_kwargs
    taken = sorted(given.keys() & RESERVED_KWARGS)
    if taken:
        raise BadRequestError(
            f"`{taken[0]}` is a field of the request, not of chat_template_kwargs.", "chat_template_kwargs"
        )
    effort = request.reasoning_effort
    if effort is None:
        return {**model.chat_template_kwargs, **given}
    by_effort = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    return {**model.chat_template_kwargs, **by_effort, **given}


def _as_dict(message: Message, number: int, *, parts: bool) -> dict[str, Any]:
    """A message as templates expect it."""
    turn: dict[str, Any] = msgspec.to_builtins(message)
    texts = list(_texts(message.content, number))
    if parts:
        turn["content"] = [{"type": "text", "text": text} for text in texts]
    else:
        turn["content"] = "\n".join(texts)
    if (reasoning := turn.pop("reasoning_content", None)) is not None:
        turn.setdefault("reasoning", reasoning)
    if "reasoning" in turn:
        turn["reasoning_content"] = turn["reasoning"]  # templates know it under either name
    if message.tool_calls:
        turn["tool_calls"] = [_tool_call(call, number) for call in message.tool_calls]
    return turn


def _texts(content: str | list[str | dict[str, Any]] | None, number: int) -> Iterator[str]:
    if isinstance(content, str):
        yield content
        return
    for part in content or ():
        if isinstance(part, str):
            yield part
            continue
        kind = part.get("type", "text")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise BadRequestError(
                f"This model takes only text, but messages[{number}] has a part of type {kind!r}.", "messages"
            )
        if not isinstance(text, str):
            raise BadRequestError(f"messages[{number}] has a part of type {kind!r} without its text.", "messages")
        yield text


def _tool_call(call: dict[str, Any], number: int) -> dict[str, Any]:
    """A call of the conversation so far; templates take its arguments as an object, the API as JSON text."""
    function = call.get("function")
    if not isinstance(function, dict):
        raise BadRequestError(f"messages[{number}] has a tool call without `function`.", "messages")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except msgspec.DecodeError as error:
            raise BadRequestError(
                f"messages[{number}]: tool call arguments are not JSON: {error}", "messages"
            ) from None
    return {**call, "function": {**function, "arguments": arguments}}
