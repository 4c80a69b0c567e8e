"""How the arguments of a call are spelled: where their text ends, and the JSON that it stands for."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping


class Arguments(Protocol):
    """A spelling of arguments."""

    streams: bool
    """Whether the text is JSON already, so that it can be told as it comes."""

    def scanner(self) -> Scanner:
        """Finds the end of one text."""

    def to_json(self, text: str, properties: Mapping[str, Any]) -> str | None:
        """The arguments as a JSON object; None for a text that is none. `properties`: those of the schema."""


class Scanner(Protocol):
    """Reads a text in any pieces."""

    def feed(self, text: str) -> int | None:
        """How much of `text` belongs to the arguments, if they end in it."""


class Balanced:
    """Finds where the bracket that a text begins with is closed; brackets in strings do not count."""

    def __init__(self, quotes: str = '"') -> None:
        self._quotes = quotes
        self._depth = 0
        self._quote = ""
        self._escaped = False
        self._begun = False

    def feed(self, text: str) -> int | None:
        """See `Scanner`."""
        for position, char in enumerate(text):
            if self._quote:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == self._quote:
                    self._quote = ""
            elif char in self._quotes:
                self._quote = char
            elif char in "{[(":
                self._depth += 1
                self._begun = True
            elif char in "}])":
                self._depth -= 1
            if not self._begun and not char.isspace():
                return position  # no bracket: no arguments
            if self._begun and self._depth <= 0:
                return position + 1
        return None


class UntilMark:
    """Finds the end of a text that a mark closes; the mark belongs to it."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._tail = ""

    def feed(self, text: str) -> int | None:
        """See `Scanner`."""
        seen = self._tail + text
        at = seen.find(self._mark)
        if at >= 0:
            return at + len(self._mark) - len(self._tail)
        self._tail = seen[max(0, len(seen) - len(self._mark) + 1) :]
        return None


class JsonArguments:
    """A JSON object."""

    streams = True

    def scanner(self) -> Scanner:
        """See `Arguments`."""
        return Balanced()

    def to_json(self, text: str, properties: Mapping[str, Any]) -> str | None:
        """See `Arguments`."""
        return text


class PythonArguments:
    """A Python argument list, `(city="Paris", days=3)`."""

    streams = False

    def scanner(self) -> Scanner:
        """See `Arguments`."""
        return Balanced(quotes="\"'")

    def to_json(self, text: str, properties: Mapping[str, Any]) -> str | None:
        """See `Arguments`."""
        try:
            call = ast.parse("f" + text.strip(), mode="eval").body
            assert isinstance(call, ast.Call)
            if call.args or any(keyword.arg is None for keyword in call.keywords):
                return None
            return _dump({str(keyword.arg): _literal(keyword.value) for keyword in call.keywords})
        except (SyntaxError, ValueError, AssertionError, RecursionError, MemoryError, TypeError):
            return None


class XmlArguments:
    """`<parameter=city>Paris</parameter>` one after the other, up to `</function>`; values by the schema's type."""

    streams = False
    _PARAMETER = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)

    def scanner(self) -> Scanner:
        """See `Arguments`."""
        return UntilMark("</function>")

    def to_json(self, text: str, properties: Mapping[str, Any]) -> str | None:
        """See `Arguments`."""
        found = self._PARAMETER.findall(text)
        return _dump({name.strip(): typed(value, properties.get(name.strip())) for name, value in found})


class GemmaArguments:
    """`{city:<escape>Paris<escape>,days:3}`: keys bare, texts between marks."""

    streams = False

    def __init__(self, quote: str, end: str) -> None:
        self._quote = re.escape(quote)
        self._end = end

    def scanner(self) -> Scanner:
        """See `Arguments`."""
        return UntilMark(self._end)

    def to_json(self, text: str, properties: Mapping[str, Any]) -> str | None:
        """See `Arguments`."""
        body = text.strip().removesuffix(self._end).strip()
        parts = re.split(f"({self._quote}.*?{self._quote})", body, flags=re.DOTALL)
        spelled = []
        for part in parts:
            quoted = re.fullmatch(f"{self._quote}(.*?){self._quote}", part, re.DOTALL)
            bare = re.sub(r"([{,]\s*)([A-Za-z_][\w.-]*)(\s*:)", r'\1"\2"\3', part)
            spelled.append(_dump(quoted[1]) if quoted else bare)
        value = _load("".join(spelled))
        return _dump(value) if isinstance(value, dict) else None


def typed(text: str, schema: Any) -> Any:
    """A value that was written without quotes: a text where the schema says so, else what JSON makes of it."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string":
        return text
    value = _load(text.strip())
    if value is _NOTHING and text.strip() in ("True", "False", "None"):
        value = {"True": True, "False": False, "None": None}[text.strip()]
    return text if value is _NOTHING else value


_NOTHING: Any = object()


def _load(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return _NOTHING


def _dump(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


def _literal(node: ast.expr) -> Any:
    """A literal; `true`, `false` and `null` too, which models mix in."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {str(ast.literal_eval(key)): _literal(value) for key, value in _items(node)}
    return ast.literal_eval(node)


def _items(node: ast.Dict) -> list[tuple[ast.expr, ast.expr]]:
    if any(key is None for key in node.keys):
        raise ValueError("unpacking is no literal")
    return [(key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]
