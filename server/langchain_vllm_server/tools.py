"""What a request wants of tools: which functions, who decides to call them, and the grammar that holds calls to it."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from langchain_vllm_server import json_schema
from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.structured import Grammar, lark_string
from langchain_vllm_server.tool_parsers import GENERIC

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_vllm_server.protocol import ChatCompletionRequest
    from langchain_vllm_server.served_model import ServedModel
    from langchain_vllm_server.tool_parsers import ToolFormat
    from langchain_vllm_server.tool_parsers.formats import Written

MAX_CALLS = 8  # in one answer that must call: a small model would repeat itself until its tokens are used up
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_MARK = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")  # what may be a special token


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The calls that an answer may or must make.

    Attributes:
        schemas: Function name → JSON schema of its arguments, of those that may be called.
        params: Function name → where in the request that schema stands.
        choice: "auto": the model decides; "required"; "named": the one function of `schemas`, once.
        single: Whether there must be no second call.
        strict: Whether arguments are held to the schemas even if the model decides.
        format: How calls are spelled.
    """

    schemas: dict[str, Any]
    params: dict[str, str]
    choice: Literal["auto", "required", "named"]
    single: bool
    strict: bool
    format: ToolFormat

    def grammar(self, model: ServedModel, text: Grammar | None) -> Grammar | None:
        """What the answer may be: calls, or where the model decides, `text`. None where anything goes."""
        written = self.format.written
        if self.choice == "auto" and self.format is not GENERIC and not self.strict and text is None:
            return None
        assert written is not None
        calls = self._calls(model, written)
        if self.choice != "auto":
            return Grammar.from_lark("\n".join(["start: calls", *calls]))
        if text is not None:
            return text.within("\n".join(["start: calls | @answer", *calls]))
        if self.format is GENERIC:  # the first character decides
            return Grammar.from_lark("\n".join(["start: calls | TEXT", r"TEXT: /[^{\s](.|\n)*/", *calls]))
        trigger = re.escape(written.open or self.format.triggers[0])
        rest = [*calls, f"until[lazy]: /(.|\\n)*{trigger.replace('/', chr(92) + '/')}/", r"TEXT: /(.|\n)*/"]
        return Grammar.from_lark("\n".join(["start: (until rest)* TEXT", *rest]))

    def relaxed(self) -> ToolUse:
        """The same with any object as arguments: for schemas that can't be enforced and need not be."""
        return replace(self, schemas=dict.fromkeys(self.schemas, json_schema.ANY_OBJECT))

    def _calls(self, model: ServedModel, written: Written) -> list[str]:
        """Rules of Lark, of which `calls` is one or several calls, and `rest` the same without its trigger."""
        names = list(self.schemas)
        between = _spelled(written.between, model)
        more = "" if self.single else f" ({between} call){{0,{MAX_CALLS - 1}}}"
        lines = [
            f"calls: {_spelled(written.open, model)} call{more} {_spelled(written.close, model)}",
            "call: " + " | ".join(f"call_{i}" for i in range(len(names))),
        ]
        trigger = written.open or self.format.triggers[0]
        rests = []
        for number, name in enumerate(names):
            quoted = msgspec.json.encode(name).decode()
            begin, end = written.begin.replace("NAME", quoted).replace("BARE", name), _spelled(written.end, model)
            lines += [f"call_{number}: {_spelled(begin, model)} arguments_{number} {end}"]
            lines += [f"arguments_{number}: {json_schema.lark(self.schemas[name], self.params[name])}"]
            if not written.open:
                rests.append(f"{_spelled(begin.removeprefix(trigger), model)} arguments_{number} {end}")
        rest = " | ".join(rests) if rests else f"call{more} {_spelled(written.close, model)}"
        if self.strict and self.choice == "auto":
            lines.append(f"rest: {rest}")
        return lines

    def finish_reason(self, reason: str | None) -> str | None:
        """Why an answer with calls ended: vLLM says "stop" of a named one."""
        return "tool_calls" if reason == "stop" and self.choice != "named" else reason


def call_id() -> str:
    """A new call's."""
    return f"chatcmpl-tool-{uuid.uuid4().hex[:16]}"


def tool_use(request: ChatCompletionRequest, model: ServedModel) -> ToolUse | None:
    """What a request wants; None where it has no tools or forbids them. Raises BadRequestError."""
    choice, tools = request.tool_choice, request.tools
    if tools is not None and not tools:
        raise BadRequestError("`tools` must not be an empty list; leave it out instead.", "tools")
    if tools is None:
        if choice not in (None, "none"):
            raise BadRequestError("When using `tool_choice`, `tools` must be set.", "tool_choice")
        return None
    schemas, params, strict = _functions(tools)
    if choice == "none":
        return None
    single = request.parallel_tool_calls is False
    form = model.tool_format
    if choice in (None, "auto"):
        if strict and not _can_hold(form, model):
            raise BadRequestError(
                f"The arguments of a `strict` tool cannot be enforced in this model's own spelling of calls "
                f'({form.names[0]}) while the model decides; set `tool_choice` to "required" or to the function.',
                "tools",
            )
        return ToolUse(schemas, params, "auto", single, strict, form)
    _check_forced(request)
    form = form if form.written is not None else GENERIC
    if choice == "required":
        return ToolUse(schemas, params, "required", single, True, form)
    name = _named(choice, schemas)
    return ToolUse({name: schemas[name]}, params, "named", True, True, form)


def _check_forced(request: ChatCompletionRequest) -> None:
    if request.response_format is not None and request.response_format.type != "text":
        other = "response_format"
    elif request.structured_outputs is not None:
        other = "structured_outputs"
    elif request.use_beam_search:
        other = "use_beam_search"
    else:
        return
    raise BadRequestError(f"`{other}` does not go together with a forced tool call; leave one out.", other)


def _functions(tools: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str], bool]:
    schemas: dict[str, Any] = {}
    params: dict[str, str] = {}
    strict = False
    for number, tool in enumerate(tools):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise BadRequestError(f"tools[{number}] needs a `function` with a `name`.", "tools")
        if name in schemas:
            raise BadRequestError(f"tools[{number}]: there is another function `{name}`.", "tools")
        schemas[name] = _arguments(function.get("parameters"))
        params[name] = f"tools[{number}].function.parameters (of `{name[:60]}`)"
        strict = strict or function.get("strict") is True
    return schemas, params, strict


def _arguments(schema: Any) -> Any:
    """The schema of a function's arguments. One that lists no property, and says nothing of others, has none."""
    if not schema or (isinstance(schema, dict) and schema.keys() <= {"type", "properties", "title", "description"}):
        return schema if schema and schema.get("properties") else _NO_PARAMETERS
    return schema


def _named(choice: str | dict[str, Any] | None, schemas: Mapping[str, Any]) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise BadRequestError(
            '`tool_choice` must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}.',
            "tool_choice",
        )
    if name not in schemas:
        raise BadRequestError(f"`tool_choice` names `{name}`, which is not among `tools`.", "tool_choice")
    return name


def _can_hold(form: ToolFormat, model: ServedModel) -> bool:
    """Whether a grammar can hold calls amid free text: their arguments are JSON, and no special token begins them."""
    if form.written is None:
        return False
    trigger = form.written.open or form.triggers[0]
    tokens = [model.tokenizer.token_id(mark[0]) for mark in _MARK.finditer(trigger)]
    return not any(token is not None and model.tokenizer.is_special(token) for token in tokens)


def _spelled(text: str, model: ServedModel) -> str:
    """A text in Lark. A special token is one symbol of its own there, not the characters of its name."""
    parts, end = [], 0
    for mark in _MARK.finditer(text):
        token = model.tokenizer.token_id(mark[0])
        if token is not None and model.tokenizer.is_special(token):
            parts += [lark_string(text[end : mark.start()]), f"<[{token}]>"]
            end = mark.end()
    return " ".join([*(part for part in parts if part != '""'), lark_string(text[end:])])
