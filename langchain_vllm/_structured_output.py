"""Structured output: what to ask the server for, and how to read the answer."""

from __future__ import annotations

import enum
import json
import re
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, is_typeddict

import pydantic
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, SystemMessage
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration
from langchain_core.runnables import RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_openai_function
from langchain_core.utils.json import parse_json_markdown
from langchain_core.utils.pydantic import is_basemodel_subclass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_core.messages import BaseMessage
    from langchain_core.outputs import Generation
    from langchain_core.runnables import Runnable

Method = Literal["json_schema", "function_calling", "json_mode", "regex", "choice", "grammar"]

_FORMAT_INSTRUCTIONS = "Answer with one JSON value and nothing else. It must fit this JSON schema:\n{schema}"
_JSON_INSTRUCTIONS = "Answer with one JSON object and nothing else."


def json_schema(schema: Any) -> tuple[str, dict[str, Any]]:
    """A name and the JSON schema of a pydantic class (1 or 2), a TypedDict, a function, or a JSON schema.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        if issubclass(schema, pydantic.BaseModel):
            return schema.__name__, schema.model_json_schema()
        return schema.__name__, schema.schema()  # type: ignore[attr-defined]
    if isinstance(schema, dict):
        if schema.get("type") == "json_schema" and "json_schema" in schema:
            schema = schema["json_schema"]
        if isinstance(schema.get("schema"), dict) and "name" in schema:
            return str(schema["name"]), schema["schema"]
        if isinstance(schema.get("parameters"), dict) and "name" in schema:
            return str(schema["name"]), schema["parameters"]
        name = re.sub(r"\W+", "_", str(schema.get("title") or "answer"))
        return name, schema
    if is_typeddict(schema) or callable(schema):
        function = convert_to_openai_function(schema)
        return function["name"], function["parameters"]
    raise TypeError(
        f"with_structured_output takes a pydantic class, a TypedDict, or a JSON schema as a dictionary, not {schema!r}."
    )


def response_format(schema: Any, *, strict: bool | None = None) -> dict[str, Any]:
    """The request's `response_format`, of a schema or of what is one already."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind in {"text", "json_object", "structural_tag"} or (kind == "json_schema" and "json_schema" in schema):
        return dict(schema)
    name, fields = json_schema(schema)
    described = {"name": name, "schema": fields}
    if description := fields.get("description"):
        described["description"] = description
    return {"type": "json_schema", "json_schema": {**described, **({} if strict is None else {"strict": strict})}}


def method_for(schema: Any) -> Method:
    """What a schema is held to by if nobody says."""
    if isinstance(schema, re.Pattern):
        return "regex"
    if isinstance(schema, list) or get_origin(schema) is Literal:
        return "choice"
    return "choice" if isinstance(schema, enum.EnumMeta) else "json_schema"


class AnswerParser(BaseCumulativeTransformOutputParser[Any]):
    """Reads an answer, and what there is of it in a stream. One that was cut off is an error, not half an answer."""

    read: Any
    """Makes the result of the text. Raises ValueError."""
    read_part: Any = None
    """Makes what there is of the result of the beginning of the text; None: wait for all of it."""

    @property
    def _type(self) -> str:
        return "vllm_answer"

    def _diff(self, prev: str | None, next: str) -> str:  # noqa: A002
        """What a stream of text has more (with `diff`); of JSON it tells all there is every time."""
        return next[len(prev or "") :]

    def parse(self, text: str) -> Any:
        """The result of a text."""
        try:
            return self.read(text)
        except ValueError as error:
            raise OutputParserException(f"The answer does not fit: {error}\n{text}", llm_output=text) from error

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """The result of an answer; None for one that calls tools."""
        first = result[0]
        message = first.message if isinstance(first, ChatGeneration) else None
        finish = message.response_metadata.get("finish_reason") if message else None
        if finish == "length":
            raise OutputParserException(
                f"The answer was cut off at max_tokens or the end of the context. It is:\n{first.text}",
                llm_output=first.text,
            )
        if isinstance(message, AIMessage) and message.tool_calls and not first.text.strip():
            return None
        if not partial or finish:
            return self.parse(first.text)
        try:
            return None if self.read_part is None else self.read_part(first.text)
        except ValueError:
            return None


def _from_json(text: str, build: Callable[[Any], Any] | None, loads: Callable[[str], Any] | None) -> Any:
    value = parse_json_markdown(text.strip(), parser=loads) if loads else parse_json_markdown(text.strip())
    return build(value) if build else value


def json_parser(schema: Any) -> AnswerParser:
    """For answers in JSON: objects of a pydantic class if `schema` is one, else what JSON makes of it."""
    build = None
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        build = schema.model_validate if issubclass(schema, pydantic.BaseModel) else schema.parse_obj  # type: ignore[attr-defined]
    return AnswerParser(
        read=partial(_from_json, build=build, loads=partial(json.loads, strict=False)),
        read_part=partial(_from_json, build=build, loads=None),
    )


def _identity(text: str) -> str:
    return text


def _choose(text: str, options: dict[str, Any]) -> Any:
    if text.strip() not in options:
        raise ValueError(f"not one of {list(options)}")
    return options[text.strip()]


def constraint(method: Method, schema: Any) -> tuple[dict[str, Any], AnswerParser]:
    """The request's `structured_outputs` for a method other than JSON's, and the parser of the answer.

    Raises:
        TypeError: The schema does not go with the method.
    """
    if method == "choice":
        if isinstance(schema, enum.EnumMeta):
            members: Any = list(schema)
            options = {str(member.value): member for member in members}
        elif get_origin(schema) is Literal or isinstance(schema, list | tuple):
            options = {str(value): value for value in (get_args(schema) or schema)}
        else:
            raise TypeError(f'method="choice" takes an Enum, a Literal or a list of strings, not {schema!r}.')
        if not options:
            raise TypeError("There is nothing to choose from.")
        return {"choice": list(options)}, AnswerParser(read=partial(_choose, options=options))
    text = schema.pattern if isinstance(schema, re.Pattern) else schema
    if not isinstance(text, str):
        raise TypeError(f"method={method!r} takes a string, not {schema!r}.")
    return {method: text}, AnswerParser(read=_identity, read_part=_identity, diff=True)


def format_instructions(method: Method, schema: Any) -> str:
    """What tells the model the schema: a grammar alone keeps it to the form, but shows it no description.

    Raises:
        ValueError: The method is none of JSON's.
    """
    if method not in {"json_schema", "json_mode"}:
        raise ValueError(f"include_format_instructions is for JSON, not for method={method!r}.")
    if schema is None:
        return _JSON_INSTRUCTIONS
    return _FORMAT_INSTRUCTIONS.format(schema=json.dumps(json_schema(schema)[1], ensure_ascii=False))


def instructed(messages: Sequence[BaseMessage], instructions: str) -> list[BaseMessage]:
    """The messages, with the instructions at the end of the system message."""
    if messages and isinstance(first := messages[0], SystemMessage) and isinstance(first.content, str):
        return [first.model_copy(update={"content": f"{first.content}\n\n{instructions}"}), *messages[1:]]
    return [SystemMessage(content=instructions), *messages]


def parsed(llm: Runnable[Any, Any], parser: AnswerParser, include_raw: bool) -> Runnable[Any, Any]:
    """`llm` and its answer's parser; with `include_raw`, a dictionary of `raw`, `parsed` and `parsing_error`."""
    if not include_raw:
        return llm | parser
    right = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    wrong = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=llm) | right.with_fallbacks([wrong], exception_key="parsing_error")


def request(method: Method, schema: Any, strict: bool | None) -> tuple[dict[str, Any], AnswerParser]:
    """The arguments of a call that hold its answer to the schema, and the parser of the answer.

    Raises:
        TypeError, ValueError: The schema does not go with the method.
    """
    traced = schema
    if method == "json_schema":
        if schema is None:
            raise ValueError('method="json_schema" needs a schema; "json_mode" does without.')
        asked: dict[str, Any] = {"response_format": response_format(schema, strict=strict)}
        parser = json_parser(schema)
        if isinstance(schema, dict):
            name, fields = json_schema(schema)
            traced = {"title": name, **fields}
    elif method == "json_mode":
        asked, parser = {"response_format": {"type": "json_object"}}, json_parser(schema)
    elif method in {"regex", "choice", "grammar"}:
        outputs, parser = constraint(method, schema)
        asked, traced = {"structured_outputs": outputs}, {"title": method, "type": "string"}
    else:
        raise ValueError(f"Unknown method {method!r}: it is one of {list(get_args(Method))}.")
    told = {"kwargs": {"method": method, "strict": strict}, "schema": traced}
    return {**asked, "ls_structured_output_format": told}, parser
