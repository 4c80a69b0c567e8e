"""From a flag's text to its value. Each raises argparse.ArgumentTypeError with what is wrong and what is expected."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

QUANTIZATIONS = ("int8", "int4")


def integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """A whole number from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        value = int(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"must be between {minimum} and {maximum}, got {value}")
        return value

    return parse


def number(minimum: float, maximum: float) -> Callable[[str], float]:
    """A number from `minimum` to `maximum`, which no NaN is."""

    def parse(text: str) -> float:
        value = float(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"must be between {minimum} and {maximum}, got {text}")
        return value

    return parse


def share(text: str) -> float:
    """A part of a whole: above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def model_len(text: str) -> int:
    """As vLLM does: k, m, g are powers of 1000 and take decimals, K, M, G are powers of 1024."""
    if text.lower() in ("auto", "-1", "0"):
        return 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", text)
    if match is None or ("." in match[1] and not match[2].islower()):
        raise argparse.ArgumentTypeError(f"expected a number of tokens such as 4096, 32k or auto, got {text!r}")
    base = 1000 if match[2].islower() else 1024
    value = int(float(match[1]) * base ** " kmg".index(match[2].lower() or " "))
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be between 1 and {2**31 - 1}, got {text}")
    return value


def quantization(text: str) -> str:
    """Other methods of vLLM's flag read a checkpoint that was quantised before."""
    if text not in QUANTIZATIONS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not supported; supported: {', '.join(QUANTIZATIONS)}, of a float checkpoint while it loads "
            "(a GGUF file is served as it is quantised, without this flag)"
        )
    return text


def memory(text: str) -> int:
    """4GiB, 4G, 512MiB are powers of 1024; 4GB, 512MB powers of 1000; a bare number is bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 4GiB or 512MB, got {text!r}")
    base = 1000 if match[3] == "b" else 1024
    value = int(float(match[1]) * base ** " kmgt".index(match[2] or " "))
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is more than any machine has")
    return value


def template(text: str) -> str:
    """A template itself (it has braces or line breaks), or else the file that holds it."""
    if any(mark in text for mark in "{}\n"):
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"neither a Jinja template nor a readable file: {text} ({error})") from None


def json_object(text: str) -> dict[str, Any]:
    """An object as JSON."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value


def config(name: str) -> Callable[[str], Any]:
    """An object as JSON, of the type of that name in flag_configs.py, which only those who use it have to import."""

    def parse(text: str) -> Any:
        from langchain_vllm_server import flag_configs

        return flag_configs.decode(getattr(flag_configs, name), text)

    return parse


def json_strings(text: str) -> tuple[str, ...]:
    """A list of strings as JSON, or one string as it is."""
    if not text.lstrip().startswith("["):
        return (text,)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"expected a JSON list of strings, got {text}")
    return tuple(value)


def module_path(text: str) -> str:
    """`package.module.name`; it is imported when the server starts."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", text):
        raise argparse.ArgumentTypeError(
            f"expected the path of a class or function such as package.module.Name, got {text!r}"
        )
    return text


def path_prefix(text: str) -> str:
    """The path under which a proxy shows the server, without a slash at its end."""
    if text and not text.startswith("/"):
        raise argparse.ArgumentTypeError(f"must begin with a slash, got {text!r}")
    return text.rstrip("/")
