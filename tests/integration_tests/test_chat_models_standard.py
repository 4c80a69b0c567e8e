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
        return {"model": MODEL, "temperature": 0, "max_tokens": 256, "parallel_tool_calls": False}

    @property
    def model_override_value(self) -> str:
        return ALIAS

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"presence_penalty": 1.0}  # a greedy 135M model repeats one clause of its joke for ever

    @property
    def supports_json_mode(self) -> bool:
        return True

    # The requests are well-formed and answered, but not as the tests want, by a greedy 135M model in 256 tokens.

    @pytest.mark.xfail(reason="without a schema, the model repeats one clause of its joke for ever")
    def test_json_mode(self, model: Any) -> None:
        super().test_json_mode(model)

    @pytest.mark.xfail(reason="the model does not decide to call the tool")
    def test_agent_loop(self, model: Any) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(reason="the model does not come to the end of the forced call's arguments")
    def test_unicode_tool_call_integration(self, model: Any, **options: Any) -> None:
        super().test_unicode_tool_call_integration(model)
