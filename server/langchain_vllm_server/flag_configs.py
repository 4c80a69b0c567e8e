"""What vLLM's JSON flags may say here. An unknown key is refused by its name. Source: vLLM's `config` package."""

from __future__ import annotations

import argparse
from typing import Literal, TypeVar

import msgspec

C = TypeVar("C", bound=msgspec.Struct)


class StructuredOutputsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`--structured-outputs-config`: how JSON is spelled where a request does not say it.

    Attributes:
        backend: Each is served by llguidance.
        reasoning_parser: The same as `--reasoning-parser`.
        enable_in_reasoning: A constraint holds from the end of the reasoning on; the other way is not served.
    """

    backend: Literal["auto", "guidance", "xgrammar", "outlines", "lm-format-enforcer"] = "auto"
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    reasoning_parser: str | None = None
    enable_in_reasoning: Literal[False] = False


class ReasoningConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`--reasoning-config`: what begins and ends reasoning, for models that no `--reasoning-parser` knows."""

    reasoning_start_str: str
    reasoning_end_str: str

    def __post_init__(self) -> None:
        if not self.reasoning_start_str or not self.reasoning_end_str:
            raise ValueError("the texts must not be empty")


class PoolerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`--pooler-config`: what the vector of a text is made of, its last token's state or the mean of all."""

    pooling_type: Literal["LAST", "MEAN"] | None = None
    seq_pooling_type: Literal["LAST", "MEAN"] | None = None

    @property
    def pooling(self) -> str:
        """In the engine's words."""
        return (self.seq_pooling_type or self.pooling_type or "MEAN").lower()


def decode(of: type[C], text: str) -> C:
    """One of these from JSON. Raises argparse.ArgumentTypeError."""
    try:
        return msgspec.json.decode(text, type=of)
    except msgspec.MsgspecError as error:
        raise argparse.ArgumentTypeError(f"{error}; it takes {', '.join(of.__struct_fields__)}") from None
