"""Chat templates: messages to the text that the model was trained on.

A template is Jinja source from the checkpoint. It is rendered as transformers' `apply_chat_template` renders it, with
the same sandbox, extensions and globals, so that every model sees the prompt it expects.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2.parser import Parser

Message = dict[str, Any]

# Names under which a message's reasoning comes; a template reads one of the first two.
_REASONING = ("reasoning_content", "thinking", "reasoning")

# Put after the message to be continued, to find its end in the text. Its last space shows whether the template trims.
_END_MARK = "CONTINUE_THE_FINAL_MESSAGE_HERE "


class ChatTemplate:
    """A compiled template.

    Args:
        source: The Jinja source.
        special_tokens: What the template may name: "bos_token" → "<s>", ….

    Raises:
        ValueError: The source is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.shows_tools = "tools" in source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid: {error}") from None

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: At least one; each with a role and, as a rule, content. Keys whose value is None count as absent.
            tools: JSON schemas of the functions that the model may call.
            documents: Texts to answer from, for templates that know them.
            add_generation_prompt: End with the beginning of an answer.
            continue_final_message: End inside the final message, for the model to go on with it.
            **kwargs: Further variables of the template.

        Raises:
            ValueError: The template refuses the conversation (with the template's own message) or fails on it.
        """
        if not messages:
            raise ValueError("a chat needs at least one message")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        chat = [_with_reasoning({k: v for k, v in message.items() if v is not None}) for message in messages]
        end = _mark_end(chat) if continue_final_message else None
        variables = {
            **self._special_tokens,
            **kwargs,
            "messages": chat,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._render(variables)
        return text if end is None else _cut_at_mark(text, end)

    def _render(self, variables: dict[str, Any]) -> str:
        try:
            return self._template.render(variables)
        except jinja2.TemplateError as error:
            raise ValueError(str(error)) from error
        except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, MemoryError) as error:
            raise ValueError(f"the chat template fails on this conversation: {error}") from error


class _Generation(Extension):
    """The tag that marks what an assistant wrote, for training; here it renders its body.

    What is set inside does not reach the outside, as in transformers, where the body is a call block.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2's own attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _with_reasoning(message: Message) -> Message:
    """Under whatever name the reasoning comes, the template finds it under the one that it reads."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_end(chat: list[Message]) -> str:
    """Mark where the final message ends, in place, and return its text."""
    message = chat[-1]
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END_MARK
        return content
    blocks = content if isinstance(content, list) else []
    for index in range(len(blocks) - 1, -1, -1):
        if isinstance(blocks[index], dict) and isinstance(text := blocks[index].get("text"), str):
            message["content"] = [*blocks[:index], {**blocks[index], "text": text + _END_MARK}, *blocks[index + 1 :]]
            return text
    raise ValueError("continue_final_message: the final message has no text to continue")


def _cut_at_mark(rendered: str, end: str) -> str:
    position = rendered.rfind(_END_MARK.rstrip())
    if position < 0 or end.strip() not in rendered:
        raise ValueError("continue_final_message: the chat template leaves out or changes the final message")
    text = rendered[:position]
    return text if rendered.startswith(_END_MARK, position) else text.rstrip()
