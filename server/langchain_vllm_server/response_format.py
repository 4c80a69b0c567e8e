"""What a request says its answer must be: `response_format` (OpenAI's) and `structured_outputs` (vLLM's)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from langchain_vllm_server import json_schema, structural_tag, structured
from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.json_schema import Spelling
from langchain_vllm_server.structured import Grammar

if TYPE_CHECKING:
    from langchain_vllm_server.protocol import GenerationRequest
    from langchain_vllm_server.served_model import ServedModel
    from langchain_vllm_server.structured import Constraint

MAX_CHOICES = 10_000


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """`json_schema` of a response_format. It is enforced whatever `strict` says."""

    name: str | None = None
    description: str | None = None
    schema: Any = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """OpenAI's response_format, and vLLM's structural tags in both of their shapes."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    schema: Any = None  # of a json_object, as llama.cpp has it
    format: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's structured_outputs: one of the first six, and how JSON is spelled."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


async def compile_format(request: GenerationRequest, model: ServedModel) -> Constraint | None:
    """The constraint that the request asks for; None for free text. Raises BadRequestError that names the field."""
    found = requested_grammar(request, model.spelling)
    if found is None:
        return None
    grammar, param = found
    if request.use_beam_search:
        raise BadRequestError(f"`{param}` does not go together with `use_beam_search`; leave one of them out.", param)
    return await structured.compile(grammar, model, param)


def requested_grammar(request: GenerationRequest, spelling: Spelling) -> tuple[Grammar, str] | None:
    """What the answer must be, and the field that says so; None for free text. Raises BadRequestError."""
    by_format = _of_response_format(request.response_format, spelling)
    by_outputs = _of_structured_outputs(_with_spelling(request.structured_outputs, spelling))
    if by_format and by_outputs:
        raise BadRequestError(
            f"`{by_format[1]}` and `{by_outputs[1]}` both say what the answer must be; give one of them.",
            "structured_outputs",
        )
    return by_format or by_outputs


def _of_response_format(wanted: ResponseFormat | None, spelling: Spelling) -> tuple[Grammar, str] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object" and wanted.schema is not None:
        return json_schema.grammar(wanted.schema, "response_format.schema", spelling), "response_format.schema"
    if wanted.type == "json_object":
        return json_schema.grammar(json_schema.ANY_OBJECT, "response_format", spelling), "response_format"
    if wanted.type == "structural_tag":
        tag = {name: getattr(wanted, name) for name in ("format", "structures", "triggers")}
        return structural_tag.grammar(tag, "response_format"), "response_format"
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise BadRequestError(
            "When response_format type is 'json_schema', the 'json_schema' field must be provided, with a `schema`.",
            "response_format",
        )
    param = "response_format.json_schema.schema"
    return json_schema.grammar(wanted.json_schema.schema, param, spelling), param


def _of_structured_outputs(wanted: StructuredOutputs | None) -> tuple[Grammar, str] | None:
    if wanted is None:
        return None
    given = [n for n in _KINDS if getattr(wanted, n) is not None and getattr(wanted, n) is not False]
    if len(given) > 1:
        raise BadRequestError(
            "You can only use one kind of constraints for structured outputs ('json', 'regex', 'choice', 'grammar', "
            f"'json_object' or 'structural_tag'), got {', '.join(given)}.",
            "structured_outputs",
        )
    if not given:
        raise BadRequestError(
            "structured_outputs must have one of 'json', 'regex', 'choice', 'grammar', 'json_object' and "
            "'structural_tag'.",
            "structured_outputs",
        )
    param = f"structured_outputs.{given[0]}"
    return _KINDS[given[0]](wanted, param), param


def _with_spelling(wanted: StructuredOutputs | None, spelling: Spelling) -> StructuredOutputs | None:
    """The same, with the server's switches where the request says nothing."""
    if wanted is None:
        return None
    open_ = {name: getattr(spelling, name) for name in spelling.__slots__ if getattr(wanted, name) is None}
    return msgspec.structs.replace(wanted, **open_)


def _json(wanted: StructuredOutputs, param: str) -> Grammar:
    return json_schema.grammar(wanted.json, param, _spelling(wanted, param))


def _json_object(wanted: StructuredOutputs, param: str) -> Grammar:
    return json_schema.grammar(json_schema.ANY_OBJECT, param, _spelling(wanted, param))


def _spelling(wanted: StructuredOutputs, param: str) -> Spelling:
    if wanted.whitespace_pattern is not None:
        _check_regex(wanted.whitespace_pattern, f"{param.partition('.')[0]}.whitespace_pattern")
    return Spelling(wanted.disable_any_whitespace, wanted.disable_additional_properties, wanted.whitespace_pattern)


def _regex(wanted: StructuredOutputs, param: str) -> Grammar:
    assert wanted.regex is not None
    _check_regex(wanted.regex, param)
    return Grammar.from_regex(wanted.regex)


def _check_regex(pattern: str, param: str) -> None:
    if not pattern:
        raise BadRequestError(f"{param} must not be empty.", param)


def _choice(wanted: StructuredOutputs, param: str) -> Grammar:
    choices = wanted.choice or []
    if not choices or not all(choices):
        raise BadRequestError(f"{param} must be a list of texts, none of them empty.", param)
    if len(choices) > MAX_CHOICES:
        raise BadRequestError(f"{param} must have at most {MAX_CHOICES} entries, got {len(choices)}.", param)
    return Grammar.from_choice(choices)


def _grammar(wanted: StructuredOutputs, param: str) -> Grammar:
    """Lark, or llama.cpp's GBNF (EBNF with `::=`), which is translated."""
    text = wanted.grammar or ""
    if not text.strip():
        raise BadRequestError(f"{param} must not be empty.", param)
    if "::=" not in text or re.search(r"(?m)^\s*(start\s*:|%llguidance\b)", text):
        return Grammar.from_lark(text)
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return Grammar.from_lark(gbnf_to_lark(text))
    except RecursionError:
        raise BadRequestError(f"{param}: the grammar is nested too deeply.", param) from None
    except Exception as error:  # what the translation raises is Exception itself, IndexError, …
        raise BadRequestError(f"{param}: not a grammar in EBNF: {error}", param) from None


def _structural_tag(wanted: StructuredOutputs, param: str) -> Grammar:
    try:
        tag = msgspec.json.decode(wanted.structural_tag or "")
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadRequestError(f"{param}: not valid JSON: {error}", param) from None
    return structural_tag.grammar(tag, param)


_KINDS = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _json_object,
    "structural_tag": _structural_tag,
}
