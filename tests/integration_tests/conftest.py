"""The real server with the default model, one for the session; or fake ones."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from langchain_vllm import ChatVLLM, VLLMServer, _shared
from tests.integration_tests.fakes import eventually, fake_command, reapers

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "SmolLM2-135M-Instruct"
ALIAS = "another-name"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("VLLM_", "OPENAI_", "LANGSMITH_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def server() -> Iterator[VLLMServer | SimpleNamespace]:
    """Ours, or the one at TEST_SERVER_URL, such as a real vLLM with the same model, names and context."""
    if (url := os.environ.get("TEST_SERVER_URL")) is not None:
        yield SimpleNamespace(base_url=url, pid=0)
        return
    with VLLMServer(MODEL, served_model_name=[MODEL, ALIAS], max_model_len=2048) as server:
        yield server


@pytest.fixture
def llm(server: VLLMServer) -> ChatVLLM:
    return ChatVLLM(base_url=server.base_url, model=MODEL, temperature=0, max_tokens=24)


@pytest.fixture
def fake_servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `VLLMServer` starts is a fake, of which nothing may be left."""
    monkeypatch.setattr(VLLMServer, "_command", fake_command)
    monkeypatch.setattr(_shared, "KEEP_ALIVE_SECONDS", 0.1)
    gc.collect()
    before = reapers()
    yield
    gc.collect()
    assert eventually(lambda: reapers() <= before), "a server was left"
