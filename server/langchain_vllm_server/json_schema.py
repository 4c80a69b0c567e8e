"""JSON Schema as a grammar: what can be enforced, what is refused, and how the JSON is spelled.

What llguidance would ignore is refused here, by path. What it refuses itself is found again by path.

An answer is narrower than its schema where that costs no meaning and small models go astray otherwise:

* One fixed spelling, `{"a": 1, "b": [1, 2]}`, as `json.dumps` has it: free white space is where small models loop. Most
  JSON that models were trained on has these single spaces: with them SmolLM2-135M gets more fields right (56 of 200 in
  an extraction of people, 41 without spaces).
* Numbers end: 16 digits before the point and 9 behind it.
* Objects have the properties that they list, no others, unless `additionalProperties` says so, as in OpenAI's strict
  mode and vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.structured import Grammar

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_DEPTH = 64
_LARGEST = 2**53 - 1  # the largest whole number that every JSON reader keeps
_SMALLEST_STEP = 1e-9
_BOUNDED_SPACE = r"[ \t\n\r]{1,40}"  # room for indented lines

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = ("items", "additionalItems", "additionalProperties")

# Keywords that cannot be enforced, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "$dynamicRef": (),
    "$recursiveRef": (),
    "contains": (),
    "contentSchema": (),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "disallow": (),
    "divisibleBy": (),
    "else": (),
    "extends": (),
    "if": (),
    "maxContains": (),
    "minContains": (),
    "not": (False,),
    "propertyNames": (True, {}),
    "then": (),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "uniqueItems": (False,),
}

# What pydantic says of a Decimal, with a look-ahead for at least one digit.
_WITHOUT_LOOK_AHEAD = {r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(\d+\.?\d*|\.\d+)$"}

_QUOTED = ("$ref", "format", "pattern")  # keywords whose value llguidance repeats in its errors

# Those that llguidance enforces, and those that name how a text is shown or stored: nothing to enforce.
_FORMATS = frozenset({"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"})
_SHOWN = frozenset({"binary", "directory-path", "file-path", "password", "path"})


@dataclass(frozen=True, slots=True)
class Spelling:
    """How JSON is written: vLLM's switches. None: our own choice."""

    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The same in llguidance's words."""
        if self.whitespace_pattern is not None:
            return {"whitespace_flexible": True, "whitespace_pattern": self.whitespace_pattern}
        if self.disable_any_whitespace is False:
            return {"whitespace_flexible": True, "whitespace_pattern": _BOUNDED_SPACE}
        return {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar(schema: Any, param: str, spelling: Spelling | None = None) -> Grammar:
    """The grammar of a schema: an object, a boolean, or the JSON text of one.

    Raises:
        BadRequestError: It is no schema, or has something that cannot be enforced: the message names the path.
    """
    wide = checked(schema, param)
    spelling = spelling or Spelling()
    options = {"x-guidance": spelling.options}
    narrow = narrowed(wide, closed=spelling.disable_additional_properties)
    return Grammar.from_json_schema({**wide, **options}, {**narrow, **options}, partial(blame, wide))


def lark(schema: Any, param: str) -> str:
    """The same as a part of a rule in Lark. Raises BadRequestError."""
    narrow = narrowed(checked(schema, param))
    return "%json " + msgspec.json.encode({**narrow, "x-guidance": Spelling().options}).decode()


# Any JSON object, of the kinds of values that end.
_ANY: dict[str, Any] = {
    "anyOf": [
        {"type": "object", "additionalProperties": {"$ref": "#/$defs/any"}},
        {"type": "array", "items": {"$ref": "#/$defs/any"}},
        {"type": ["string", "number", "boolean", "null"]},
    ]
}
ANY_OBJECT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"$ref": "#/$defs/any"},
    "$defs": {"any": _ANY},
}


def checked(schema: Any, param: str) -> dict[str, Any]:
    """The schema as an object without what asks for nothing. Raises BadRequestError."""
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise BadRequestError(f"{param}: not valid JSON: {error}", param) from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise BadRequestError(f"{param}: a JSON schema must be an object, got {_shown(schema)}.", param)
    if _depth(schema) > MAX_DEPTH:
        raise BadRequestError(f"{param}: the schema is nested deeper than {MAX_DEPTH} levels.", param)
    own_names = any("$id" in part for _, part in subschemas(schema))
    if not own_names:
        schema = _rewritten(schema, partial(_with_listed_names, schema))
    for path, part in subschemas(schema):
        _check(path, part, param, own_names=own_names)
    if not own_names and (endless := _endless(schema)):
        raise BadRequestError(f"{param}: {endless}: no finite value satisfies it: it always contains itself.", param)
    schema = _rewritten(schema, _without_neutral)
    return schema if own_names else _rewritten(schema, partial(_with_alternatives, schema))


def _with_listed_names(root: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """PropertyNames that lists names or has a pattern, said by other keywords, as long as those are free."""
    names = _resolved(root, part.get("propertyNames"))
    if not isinstance(names, dict) or part.keys() & {"properties", "patternProperties"}:
        return part
    rest = {key: value for key, value in part.items() if key != "propertyNames"}
    values = part.get("additionalProperties", True)
    says = names.keys() - {"type", "title", "description"}
    if says == {"enum"} and all(isinstance(name, str) for name in _list(names["enum"])):
        return {**rest, "properties": dict.fromkeys(_list(names["enum"]), values), "additionalProperties": False}
    if says == {"pattern"}:
        return {**rest, "patternProperties": {names["pattern"]: values}, "additionalProperties": False}
    return part


def _with_alternatives(root: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The alternatives of a oneOf in place of references: llguidance has to see that they exclude each other."""
    if not isinstance(part.get("oneOf"), list):
        return part
    return {**part, "oneOf": [_resolved(root, alternative) for alternative in part["oneOf"]]}


def _resolved(root: dict[str, Any], part: Any) -> Any:
    """What a part that is a reference and no more refers to; the part itself where that leads nowhere."""
    target = _target(root, part["$ref"]) if isinstance(part, dict) and part.keys() == {"$ref"} else None
    return part if target is None else target


def _target(root: dict[str, Any], ref: Any) -> dict[str, Any] | None:
    """The part that a reference names by its path."""
    target: Any = root
    if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
        return None
    for name in ref.split("/")[1:]:
        target = target.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
    return target if isinstance(target, dict) else None


def _check(path: str, part: dict[str, Any], param: str, *, own_names: bool) -> None:
    for key, value in part.items():
        for where, inner in _parts(key, value):
            if not isinstance(inner, (dict, bool)):
                problem = f"{param}: {path}.{key}{where}: a JSON schema must be an object, got {_shown(inner)}."
                raise BadRequestError(problem, param)
    for keyword, neutral in _UNSUPPORTED.items():
        if keyword in part and not any(part[keyword] is n or part[keyword] == n for n in neutral):
            raise BadRequestError(
                f"{param}: {path}.{keyword}: the keyword `{keyword}` cannot be enforced; leave it out.", param
            )
    least, required = part.get("minProperties"), _list(part.get("required"))
    if isinstance(least, int) and least > len(set(map(str, required))) + 1:
        raise BadRequestError(
            f"{param}: {path}.minProperties: of the properties that are not `required`, one can be enforced, not "
            f"{least - len(required)}, for JSON may repeat a name; list them under `required`.",
            param,
        )
    found = part.get("format")
    if isinstance(found, str) and found not in _FORMATS | _SHOWN and _may_be_text(part):
        known = ", ".join(sorted(_FORMATS))
        raise BadRequestError(
            f"{param}: {path}.format: the format `{found[:60]}` cannot be enforced, only {known}; leave it out or say "
            "it as a `pattern`.",
            param,
        )
    ref = part.get("$ref")
    if isinstance(ref, str) and not ref.startswith("#") and not own_names:
        raise BadRequestError(
            f"{param}: {path}.$ref: `{ref[:100]}` is not in the schema, and nothing is fetched; put it under `$defs`.",
            param,
        )


def _endless(schema: dict[str, Any]) -> str:
    """The path of a part that only an infinite value satisfies; "" if there is none."""
    parts = list(subschemas(schema))
    unknown = {id(part) for _, part in parts}
    while new := {id(part) for _, part in parts if id(part) in unknown and _is_finite(schema, part, unknown)}:
        unknown -= new
    return next((path for path, part in parts if id(part) in unknown), "")


def _is_finite(root: dict[str, Any], part: dict[str, Any], unknown: set[int]) -> bool:
    """Whether a finite value satisfies a part, as far as is known of the parts it needs."""

    def known(needed: Any) -> bool:
        return id(needed) not in unknown

    needed = [_target(root, part["$ref"]) if "$ref" in part else None, *_list(part.get("allOf"))]
    if part.get("type") == "object" and isinstance(part.get("properties"), dict):
        needed += [part["properties"].get(name) for name in _list(part.get("required")) if isinstance(name, str)]
    if part.get("type") == "array" and isinstance(least := part.get("minItems"), int) and least > 0:
        first = _list(part.get("prefixItems"))[:least]
        needed += first if len(first) == least else [*first, part.get("items")]
    alternatives = [found for key in ("anyOf", "oneOf") if (found := _list(part.get(key)))]
    return all(map(known, needed)) and all(any(map(known, choice)) for choice in alternatives)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _without_neutral(part: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in part.items() if key not in _UNSUPPORTED}
    if not _may_be_text(part) or part.get("format") in _SHOWN:
        kept.pop("format", None)
    if isinstance(pattern := part.get("pattern"), str):
        kept["pattern"] = _WITHOUT_LOOK_AHEAD.get(pattern, pattern)
    return kept


def narrowed(schema: dict[str, Any], *, closed: bool | None = None) -> dict[str, Any]:
    """The same schema for answers that end: see the top of this file.

    Args:
        schema: What `checked` returned.
        closed: Whether objects without `additionalProperties` have only the properties that they list. None: they do
            where nothing else says what an object has.
    """
    if closed is None:
        closed = not any("allOf" in part for _, part in subschemas(schema))

    # Two steps that meet in one number make an automaton of their least common multiple.
    stepped = any("multipleOf" in part for _, part in subschemas(schema))

    def narrow(part: dict[str, Any]) -> dict[str, Any]:
        part = _bounded(part, None if stepped else _SMALLEST_STEP)
        return {**part, "additionalProperties": False} if closed and _lists_all(part) else part

    return _rewritten(schema, narrow)


def _lists_all(part: dict[str, Any]) -> bool:
    properties, patterns = part.get("properties") or {}, part.get("patternProperties") or {}
    others = ("additionalProperties", "minProperties", "$ref", "allOf", "anyOf", "oneOf")
    return (
        bool(properties or patterns)
        and not any(key in part for key in others)
        and all(name in properties for name in part.get("required", ()))
    )


def _bounded(part: dict[str, Any], step: float | None) -> dict[str, Any]:
    types = _types(part)
    if not types & {"integer", "number"} or part.keys() & {"enum", "const"}:
        return part
    bounds: dict[str, Any] = {}
    if part.keys().isdisjoint(("minimum", "exclusiveMinimum")):
        bounds["minimum"] = -_LARGEST
    if part.keys().isdisjoint(("maximum", "exclusiveMaximum")):
        bounds["maximum"] = _LARGEST
    if "number" in types and step is not None:
        bounds["multipleOf"] = step
    return {**part, **bounds}


def blame(schema: dict[str, Any], message: str) -> str:
    """The path of what an error of llguidance is about, as far as its message tells; else "$"."""
    for path, part in subschemas(schema):
        if message.startswith("min/maxProperties") and part.keys() & {"minProperties", "maxProperties"}:
            return f"{path}.{min(part.keys() & {'minProperties', 'maxProperties'})}"
        for keyword, value in part.items():
            if keyword in _QUOTED and isinstance(value, str) and _repeats(message, value.strip("#")):
                return f"{path}.{keyword}"
            if keyword == "type" and message == f"Invalid type: {value}":
                return f"{path}.{keyword}"
            if f'"{keyword}"' in message or f"'{keyword}'" in message or message.startswith(f"{keyword} "):
                return f"{path}.{keyword}"
    return "$"


def _repeats(message: str, value: str) -> bool:
    return bool(value) and (value in message or value.replace(r"\d", "[0-9]") in message)


def subschemas(schema: dict[str, Any], path: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """The schema and every schema in it, with their paths."""
    yield path, schema
    for key, value in schema.items():
        for where, part in _parts(key, value):
            if isinstance(part, dict):
                yield from subschemas(part, f"{path}.{key}{where}")


def _parts(key: str, value: Any) -> list[tuple[str, Any]]:
    """What must be schemas in the value of a keyword, and where in it they are."""
    if key in _MAPS and isinstance(value, dict):
        return [(f".{name}", part) for name, part in value.items()]
    if key in _LISTS and isinstance(value, list):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    return [("", value)] if key in _SINGLE else []


def _rewritten(schema: dict[str, Any], change: Any) -> dict[str, Any]:
    """The schema with every schema in it, and at last itself, changed."""
    new = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            value = {n: _rewritten(v, change) if isinstance(v, dict) else v for n, v in value.items()}
        elif key in _LISTS and isinstance(value, list):
            value = [_rewritten(v, change) if isinstance(v, dict) else v for v in value]
        elif key in _SINGLE and isinstance(value, dict):
            value = _rewritten(value, change)
        new[key] = value
    changed: dict[str, Any] = change(new)
    return changed


def _types(part: dict[str, Any]) -> set[Any]:
    types = part.get("type")
    return (
        set(filter(lambda t: isinstance(t, str), types))
        if isinstance(types, list)
        else {types}
        if isinstance(types, str)
        else set()
    )


def _may_be_text(part: dict[str, Any]) -> bool:
    types = _types(part)
    return not types or "string" in types


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
