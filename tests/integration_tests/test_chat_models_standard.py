"""LangChain's own integration tests for chat models, on our server: what it has so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests

from langchain_vllm import ChatVLLM
from tests.integration_tests.conftest import ALIAS, MODEL

if TYPE_CHECKING:
    from langchain_vllm import VLLMServer


class TestChatVLLM(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def address(self, server: VLLMServer, monkeypatch: pytest.MonkeyPatch, no_settings: None) -> None:
        monkeypatch.setenv("VLLM_BASE_URL", server.base_url)

    @property
    def chat_model_class(self) -> type[ChatVLLM]:
        return ChatVLLM

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "temperature": 0, "max_tokens": 32}

    @property
    def model_override_value(self) -> str:
        return ALIAS

    # The server has neither tools nor constrained decoding yet.

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False
