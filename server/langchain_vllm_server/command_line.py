"""What vLLM lets a command line say in other ways: underscores, dotted keys, a file of flags."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def plain(argv: Sequence[str]) -> list[str]:
    """The same command line with dashes in names, dotted keys put together as JSON and `--config` files read.

    Raises ValueError with what is wrong. What the command line says goes before what a file says.
    """
    args = [_with_dashes(arg) for arg in argv]
    from_files, rest = _take_files(args)
    if rest and not rest[0].startswith("-"):
        from_files = [arg for arg in from_files if not arg.startswith("--model=")]
    return _with_objects([*from_files, *rest])


def _with_dashes(arg: str) -> str:
    """`--max_model_len=8` as `--max-model-len=8`; the keys after a dot stay as they are."""
    match = re.match(r"--[^=.]*", arg)
    return arg if match is None else match[0].replace("_", "-") + arg[match.end() :]


def _take_files(args: list[str]) -> tuple[list[str], list[str]]:
    from_files: list[str] = []
    rest: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        name, equals, value = arg.partition("=")
        if name != "--config":
            rest.append(arg)
            continue
        path = value if equals else next(remaining, None)
        if path is None:
            raise ValueError("argument --config: expected a file")
        from_files += _read(Path(path))
    return from_files, rest


def _read(path: Path) -> list[str]:
    """A flat mapping of flags, as YAML (JSON is YAML, too)."""
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"argument --config: cannot read {path}: {reason}") from None
    if content is None:
        return []
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"argument --config: {path} must hold a mapping of flags to values")
    return [arg for key, value in content.items() for arg in _arguments(key, value)]


def _arguments(key: str, value: Any) -> list[str]:
    name = _with_dashes("--" + key.lstrip("-"))
    if name == "--config":
        raise ValueError("argument --config: a file cannot name another one")
    if isinstance(value, bool):
        return [name if value else "--no-" + name[2:]]
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"{name}={json.dumps(value)}"]
    if isinstance(value, list):
        return [name, *map(str, value)] if value else []
    return [f"{name}={value}"]


def _with_objects(args: list[str]) -> list[str]:
    """`--cfg.a.b 1 --cfg.c x` as `--cfg={"a":{"b":1},"c":"x"}`; `--cfg.list+ x` adds to a list."""
    objects: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        match = re.fullmatch(r"(--[a-z][a-z0-9-]*|-O)\.([^=+]+)(\+?)(?:=(.*))?", arg, re.DOTALL)
        if match is None:
            rest.append(arg)
            continue
        name, keys, plus, value = match.groups()
        if value is None and (value := next(remaining, None)) is None:
            raise ValueError(f"argument {arg}: expected a value")
        _put(objects.setdefault(name, {}), keys.split("."), _value(value), add=bool(plus))
    for index, arg in enumerate(rest):
        name, equals, text = arg.partition("=")
        if name in objects and equals and text.startswith("{"):  # whole and in parts: the parts change the whole
            rest[index] = f"{name}={json.dumps(json.loads(text) | objects.pop(name))}"
    return [*rest, *(f"{name}={json.dumps(content)}" for name, content in objects.items())]


def _put(content: dict[str, Any], keys: list[str], value: Any, *, add: bool) -> None:
    for key in keys[:-1]:
        inner = content.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{'.'.join(keys)}: {key} has a value already")
        content = inner
    if add:
        content.setdefault(keys[-1], []).extend(value if isinstance(value, list) else [value])
    else:
        content[keys[-1]] = value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
