"""A checkpoint's own settings (config.json, GGUF metadata), read with their types checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from langchain_vllm_server.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_REQUIRED: Any = object()
_MAX_FLOAT = 3.4028234663852886e38


class Fields:
    """Typed look-ups in a mapping. A field that is null counts as absent.

    Each getter returns the default for an absent field, and raises CheckpointError, naming source and field, for one
    that is required and absent or has the wrong type or range.
    """

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.values = values
        self.source = source
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def error(self, name: str, problem: str) -> CheckpointError:
        """A CheckpointError about one field."""
        return CheckpointError(f"{self.source}: {self._prefix}{name}: {problem}")

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field, of any type."""
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.error(name, "missing")
        return default

    def count(self, name: str, default: Any = _REQUIRED, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        """A whole number in a range."""
        value = self.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(name, f"expected a whole number from {minimum} to {maximum}, found {_shown(value)}")
        return value

    def number(self, name: str, default: Any = _REQUIRED, *, positive: bool = False) -> float:
        """A finite number that a 32-bit float can hold."""
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= _MAX_FLOAT:
            raise self.error(name, f"expected a finite number, found {_shown(value)}")
        if positive and value <= 0:
            raise self.error(name, f"expected a positive number, found {_shown(value)}")
        return float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """A boolean."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, found {_shown(value)}")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"expected a string, found {_shown(value)}")
        return value

    def section(self, name: str) -> Fields:
        """A nested object; empty when absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, f"expected an object, found {_shown(value)}")
        return Fields(value, self.source, f"{self._prefix}{name}.")

    def refuse(self, name: str, *neutral: Any) -> None:
        """Raise unless the field is absent or has one of the values that change nothing."""
        value = self.get(name, None)
        if value is None or any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral):
            return
        allowed = f" (only {' or '.join(_shown(n) for n in neutral)})" if neutral else ""
        raise self.error(name, f"{_shown(value)} is not supported{allowed}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when it is missing, not JSON, or not an object."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        value = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
