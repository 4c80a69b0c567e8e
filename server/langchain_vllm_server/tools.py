"""Tool calls that a request insists on: `tool_choice` "required" or a named function, held to the tools' schemas.

The answer is JSON that nothing but a call satisfies, spelled as vLLM has it: for a named function its arguments alone,
for "required" a list of `{"name": …, "parameters": …}`.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from langchain_vllm_server import json_schema, structured
from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.response_format import requested_grammar
from langchain_vllm_server.structured import Grammar, lark_string

if TYPE_CHECKING:
    from langchain_vllm_server.protocol import ChatCompletionRequest
    from langchain_vllm_server.served_model import ServedModel
    from langchain_vllm_server.structured import Constraint

MAX_CALLS = 8  # in one answer: a small model would repeat itself until its tokens are used up
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ForcedCalls:
    """Calls that an answer must consist of.

    Attributes:
        schemas: Function name → JSON schema of its arguments, of those that may be called.
        params: Function name → where in the request that schema stands.
        named: The function that alone is called, once; None if any may be, several times unless `single`.
        single: Whether there must be no second call.
    """

    schemas: dict[str, Any]
    params: dict[str, str]
    named: str | None
    single: bool

    async def compile(self, request: ChatCompletionRequest, model: ServedModel) -> Constraint:
        """The constraint that allows these calls only. Raises BadRequestError that names the tool's schema."""
        other = requested_grammar(request)
        for param in [other[1]] if other else ["use_beam_search"] if request.use_beam_search else []:
            raise BadRequestError(f"`{param}` does not go together with a forced tool call; leave one out.", param)
        if self.named is not None:
            param = self.params[self.named]
            return await structured.compile(json_schema.grammar(self.schemas[self.named], param), model, param)
        return await structured.compile(self._list(), model, "tools")

    def _list(self) -> Grammar:
        more = "" if self.single else f' (", " call){{0,{MAX_CALLS - 1}}}'
        names = list(self.schemas)
        lines = [f'start: "[" call{more} "]"', "call: " + " | ".join(f"call_{i}" for i in range(len(names)))]
        for number, name in enumerate(names):
            begin = '{"name": ' + msgspec.json.encode(name).decode() + ', "parameters": '
            arguments = json_schema.lark(self.schemas[name], self.params[name])
            lines += [f'call_{number}: {lark_string(begin)} arguments_{number} "}}"']
            lines += [f"arguments_{number}: {arguments}"]
        return Grammar.from_lark("\n".join(lines))

    def calls(self, text: str) -> list[tuple[str, str]] | None:
        """Names and arguments (JSON text) of an answer; of a list that was cut short those that are whole, or None."""
        if self.named is not None:
            return [(self.named, text)]
        for end in (len(text), *(i + 1 for i in range(len(text) - 1, -1, -1) if text[i] == "}")):
            try:
                found = msgspec.json.decode(text[:end] + "]" * (end < len(text) or text[-1:] == "}"), type=list[_Call])
            except msgspec.DecodeError:
                continue
            return [(call.name, bytes(call.parameters).decode()) for call in found]
        return None


class _Call(msgspec.Struct):
    name: str
    parameters: msgspec.Raw


def call_object(name: str, arguments: str) -> dict[str, Any]:
    """A call as OpenAI's API spells it, with an id of its own."""
    identifier = f"chatcmpl-tool-{uuid.uuid4().hex[:16]}"
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def forced_calls(request: ChatCompletionRequest) -> ForcedCalls | None:
    """The calls that a request insists on; None where it forbids them or has no tools. Raises BadRequestError."""
    choice, tools = request.tool_choice, request.tools
    if tools is not None and not tools:
        raise BadRequestError("`tools` must not be an empty list; leave it out instead.", "tools")
    if choice == "none":
        return None
    if tools is None:
        if choice is not None:
            raise BadRequestError("When using `tool_choice`, `tools` must be set.", "tool_choice")
        return None
    if choice is None or choice == "auto":
        raise BadRequestError(
            "This version of the server does not let the model decide whether to call a tool: set `tool_choice` to "
            '"required", to a function of `tools`, or to "none".',
            "tool_choice",
        )
    schemas, params = _functions(tools)
    single = request.parallel_tool_calls is False
    if choice == "required":
        return ForcedCalls(schemas, params, None, single)
    return ForcedCalls(schemas, params, _named(choice, schemas), single=True)


def _functions(tools: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    schemas: dict[str, Any] = {}
    params: dict[str, str] = {}
    for number, tool in enumerate(tools):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise BadRequestError(f"tools[{number}] needs a `function` with a `name`.", "tools")
        if name in schemas:
            raise BadRequestError(f"tools[{number}]: there is another function `{name}`.", "tools")
        schemas[name] = function.get("parameters") or _NO_PARAMETERS
        params[name] = f"tools[{number}].function.parameters"
    return schemas, params


def _named(choice: str | dict[str, Any], schemas: dict[str, Any]) -> str:
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
