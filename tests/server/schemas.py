"""Schemas of the kinds that JSON-Schema-Test-Suite has and that applications send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INTEGER, NUMBER, BOOLEAN, NULL = ({"type": name} for name in ("integer", "number", "boolean", "null"))
LETTERS = {"type": "string", "pattern": "^[a-z]{1,3}$"}


def array(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def record(required: bool = True, **properties: Any) -> dict[str, Any]:
    more = {"required": list(properties)} if required else {}
    return {"type": "object", "properties": properties, **more}


def accepted() -> list[Any]:
    """Those that every finished answer must satisfy, a line each."""
    lines = Path(__file__).with_name("accepted_schemas.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# With the path that the refusal names.
REFUSED: list[tuple[Any, str]] = [
    ({"not": {"type": "integer"}}, "$.not"),
    (record(a={"not": {}}), "$.properties.a.not"),
    (array(INTEGER, uniqueItems=True), "$.uniqueItems"),
    (array({"contains": INTEGER}), "$.items.contains"),
    ({"type": "object", "propertyNames": {"minLength": 3}}, "$.propertyNames"),
    ({"type": "object", "propertyNames": LETTERS, "properties": {"a": True}}, "$.propertyNames"),
    (record(a={"type": "string", "pattern": r"^(?!\d)"}), "$.properties.a.pattern"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "$.dependentRequired"),
    ({"type": "object", "dependentSchemas": {"a": {}}}, "$.dependentSchemas"),
    ({"type": "object", "dependencies": {"a": ["b"]}}, "$.dependencies"),
    ({"type": "object", "unevaluatedProperties": False}, "$.unevaluatedProperties"),
    ({"type": "array", "unevaluatedItems": False}, "$.unevaluatedItems"),
    ({"if": INTEGER, "then": {"minimum": 3}}, "$.if"),
    ({"$dynamicRef": "#a"}, "$.$dynamicRef"),
    ({"$ref": "http://x.y/z"}, "$.$ref"),
    ({"$ref": "other.json"}, "$.$ref"),
    (record(a={"$ref": "#/$defs/missing"}), "$.properties.a.$ref"),
    ({"oneOf": [INTEGER, NUMBER]}, "$.oneOf"),
    ({"oneOf": [record(False, a=INTEGER), record(False, b=INTEGER)]}, "$.oneOf"),
    (record(a={"type": "string", "format": "phone"}), "$.properties.a.format"),
    ({"type": "string", "pattern": "^(?!a)"}, "$.pattern"),
    ({"type": "string", "pattern": "("}, "$.pattern"),
    ({"anyOf": [BOOLEAN, {"type": "txt"}]}, "$.anyOf[1].type"),
    ({"type": "string", "minLength": "1"}, "$.minLength"),
    ({"enum": []}, "$"),
    ({**record(False, a=NULL, b=NULL, c=NULL), "minProperties": 2, "additionalProperties": False}, "$.minProperties"),
    ({"type": "integer", "minimum": 10**20}, "$"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "$"),
    ({"allOf": [INTEGER, BOOLEAN]}, "$"),
    ({"$ref": "#"}, "$"),
    (record(a={"$ref": "#"}), "$: no finite value"),
    ({**record(False, a={"$ref": "#/$defs/x"}), "$defs": {"x": {"$ref": "#/$defs/x"}}}, "$.properties.a"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "$: no finite value"),
    ({"type": "object", "minProperties": 2, "additionalProperties": INTEGER}, "$.minProperties"),
    (record(a=record(b="text")), "$.properties.a.properties.b: a JSON schema must be an object"),
    ({"anyOf": [BOOLEAN, 5]}, "$.anyOf[1]: a JSON schema must be an object"),
    ({"type": "array", "items": "text"}, "$.items: a JSON schema must be an object"),
    (False, "must be an object, got false"),
    ([], "must be an object, got []"),
]
