"""Structural tags: text in which a beginning obliges to what follows. Both of vLLM's shapes, as Lark.

* `{"triggers": […], "structures": [{"begin", "schema", "end"}]}`: free text; behind a trigger one of the structures
  that begin with it must follow, as often as the model likes.
* `{"format": {…}}`: a tree of formats (xgrammar docs/tutorials/structural_tag.md).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from langchain_vllm_server import json_schema
from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.structured import Grammar, lark_regex, lark_string

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ANY_TEXT = r"(.|\n)*"
_MAX_DEPTH = 64


def grammar(tag: Any, param: str) -> Grammar:
    """The grammar of a structural tag. Raises BadRequestError, naming the path."""
    writer = _Writer(param)
    if not isinstance(tag, dict):
        raise BadRequestError(f"{param}: a structural tag must be an object.", param)
    start = writer.legacy(tag) if tag.get("format") is None else writer.write(tag["format"], "format", 0)
    return Grammar.from_lark("\n".join([f"start: {start}", *writer.rules]))


class _Writer:
    """Writes formats as expressions of Lark, with the rules they need."""

    def __init__(self, param: str) -> None:
        self.rules: list[str] = []
        self._param = param

    def legacy(self, tag: dict[str, Any]) -> str:
        structures, triggers = tag.get("structures"), tag.get("triggers")
        if not isinstance(structures, list) or not isinstance(triggers, list) or not structures or not triggers:
            raise self._error("$", "a structural tag has `format`, or `structures` and `triggers`, none of them empty")
        tags = []
        for i, structure in enumerate(structures):
            path = f"structures[{i}]"
            begin, end = (self._text(structure, key, path) for key in ("begin", "end"))
            content = {"type": "json_schema", "json_schema": structure.get("schema", {})}
            tags.append({"begin": begin, "content": content, "end": end})
        return self._triggered({"triggers": triggers, "tags": tags}, "structures", 0)

    def write(self, node: Any, path: str, depth: int) -> str:
        if depth > _MAX_DEPTH:
            raise self._error(path, f"nested deeper than {_MAX_DEPTH} levels")
        if not isinstance(node, dict):
            raise self._error(path, "a format must be an object")
        kind = node.get("type")
        writer = KINDS.get(kind) if isinstance(kind, str) else None
        if writer is None:
            raise self._error(f"{path}.type", f"`{str(kind)[:60]}` is none of {', '.join(sorted(KINDS))}")
        return writer(self, node, path, depth)

    def _literal(self, node: dict[str, Any], path: str, _depth: int) -> str:
        return lark_string(self._text(node, "value", path))

    def _schema(self, node: dict[str, Any], path: str, _depth: int) -> str:
        return json_schema.lark(node.get("json_schema"), f"{self._param}.{path}.json_schema")

    def _regex(self, node: dict[str, Any], path: str, _depth: int) -> str:
        return self._terminal(lark_regex(self._text(node, "pattern", path)))

    def _any_text(self, _node: dict[str, Any], _path: str, _depth: int) -> str:
        return self._terminal(f"/{_ANY_TEXT}/")

    def _sequence(self, node: dict[str, Any], path: str, depth: int) -> str:
        return self._join(self._elements(node, path), f"{path}.elements", depth)

    def _or(self, node: dict[str, Any], path: str, depth: int) -> str:
        parts = [
            self.write(part, f"{path}.elements[{i}]", depth + 1) for i, part in enumerate(self._elements(node, path))
        ]
        return self._rule(" | ".join(parts))

    def _tag(self, node: dict[str, Any], path: str, depth: int) -> str:
        begin, end = (self._text(node, key, path) for key in ("begin", "end"))
        return self._join([_const(begin), node.get("content"), _const(end)], path, depth)

    def _triggered(self, node: dict[str, Any], path: str, depth: int) -> str:
        """Free text; each trigger in it is followed by the rest of a tag that begins with it."""
        tags, triggers = self._list(node, "tags", path), self._list(node, "triggers", path)
        bodies: dict[str, list[str]] = {}
        for i, tag in enumerate(tags):
            where = f"{path}[{i}]" if path == "structures" else f"{path}.tags[{i}]"
            begin, end = (self._text(tag, key, where) for key in ("begin", "end"))
            trigger = next((t for t in triggers if isinstance(t, str) and t and begin.startswith(t)), None)
            if trigger is None:
                raise self._error(f"{where}.begin", f"{begin[:60]!r} begins with none of the triggers")
            rest = [_const(begin[len(trigger) :]), tag.get("content"), _const(end)]
            bodies.setdefault(trigger, []).append(self._join(rest, where, depth))
        calls = [f"{self._lazy(trigger)} ({' | '.join(alternatives)})" for trigger, alternatives in bodies.items()]
        call = self._rule(" | ".join(calls))
        if node.get("stop_after_first"):
            return call if node.get("at_least_one") else f"({call} | {self._any_text({}, path, depth)})"
        return f"{call}{'+' if node.get('at_least_one') else '*'} {self._any_text({}, path, depth)}"

    def _separated(self, node: dict[str, Any], path: str, depth: int) -> str:
        tags = self._list(node, "tags", path)
        separator = lark_string(self._text(node, "separator", path))
        one = self._rule(" | ".join(self._tag(tag, f"{path}.tags[{i}]", depth + 1) for i, tag in enumerate(tags)))
        many = one if node.get("stop_after_first") else f"{one} ({separator} {one})*"
        return f"({many})" if node.get("at_least_one") else f"({many})?"

    def _join(self, elements: Sequence[Any], path: str, depth: int) -> str:
        """One after the other. Free text ends at the first occurrence of the constant behind it."""
        parts = []
        rest = list(enumerate(elements))
        while rest:
            i, element = rest.pop(0)
            end = _constant(rest[0][1]) if rest else None
            if end and isinstance(element, dict) and element.get("type") == "any_text":
                parts.append(self._lazy(end))
                rest.pop(0)
            elif _constant(element) != "":
                parts.append(self.write(element, f"{path}[{i}]", depth + 1))
        return "(" + " ".join(parts) + ")" if parts else '""'

    def _lazy(self, end: str) -> str:
        name = f"until_{len(self.rules)}"
        self.rules.append(f"{name}[lazy]: {lark_regex(_ANY_TEXT + re.escape(end))}")
        return name

    def _rule(self, body: str) -> str:
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        name = f"TEXT_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _elements(self, node: dict[str, Any], path: str) -> list[Any]:
        return self._list(node, "elements", path)

    def _list(self, node: dict[str, Any], key: str, path: str) -> list[Any]:
        found = node.get(key)
        if not isinstance(found, list) or not found:
            raise self._error(f"{path}.{key}", "must be a list with something in it")
        if key == "tags" and not all(isinstance(tag, dict) for tag in found):
            raise self._error(f"{path}.{key}", "must be a list of objects")
        return found

    def _text(self, node: Any, key: str, path: str) -> str:
        found = node.get(key) if isinstance(node, dict) else None
        if isinstance(found, list) and len(found) == 1:
            found = found[0]
        if not isinstance(found, str):
            raise self._error(f"{path}.{key}", "must be a string")
        return found

    def _error(self, path: str, problem: str) -> BadRequestError:
        return BadRequestError(f"{self._param}: {path}: {problem}.", self._param)


def _const(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def _constant(node: Any) -> str | None:
    if not isinstance(node, dict) or node.get("type") != "const_string":
        return None
    value = node.get("value")
    return value if isinstance(value, str) else None


KINDS: dict[str, Callable[[_Writer, dict[str, Any], str, int], str]] = {
    "any_text": _Writer._any_text,
    "const_string": _Writer._literal,
    "json_schema": _Writer._schema,
    "or": _Writer._or,
    "regex": _Writer._regex,
    "sequence": _Writer._sequence,
    "tag": _Writer._tag,
    "tags_with_separator": _Writer._separated,
    "triggered_tags": _Writer._triggered,
}
