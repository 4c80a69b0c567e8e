"""LangChain's own integration tests for chat models, on our server."""

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
        return {"model": MODEL, "temperature": 0, "max_tokens": 256}

    @property
    def model_override_value(self) -> str:
        return ALIAS

    # The server has forced tool calls; most of these tests let the model decide.

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"presence_penalty": 1.0}  # a greedy 135M model repeats one clause of its joke for ever
