"""What the settings become in the engine's words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from langchain_vllm_server.errors import CheckpointError
from langchain_vllm_server.load import engine_options, sampling_defaults
from langchain_vllm_server.settings import parse_settings


@pytest.mark.parametrize(
    ("flags", "weights", "cache"),
    [
        ([], "", "F16"),
        (["--dtype", "float32"], "F32", "F32"),
        (["--dtype", "float"], "F32", "F32"),
        (["--dtype", "bfloat16"], "BF16", "F16"),
        (["--dtype", "float32", "--kv-cache-dtype", "float16"], "F32", "F16"),
        (["--kv-cache-dtype", "bfloat16"], "", "BF16"),
    ],
)
def test_number_formats(flags: list[str], weights: str, cache: str) -> None:
    checkpoint: Any = SimpleNamespace(max_position=100)
    options = engine_options(parse_settings(["model", *flags]), checkpoint)
    assert (options.weight_format, options.kv_format) == (weights, cache)


def test_an_override_of_nothing_is_an_error() -> None:
    settings = parse_settings(["model", "--override-generation-config", '{"temperature": 0.5, "warmth": 1}'])
    with pytest.raises(CheckpointError, match="warmth"):
        sampling_defaults(settings, {})
