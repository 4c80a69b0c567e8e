"""LangChain's own unit tests for chat models."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.load import dumpd, load
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_vllm import ChatVLLM

pytestmark = pytest.mark.filterwarnings("ignore:The function `load` is in beta")


class TestChatVLLM(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatVLLM]:
        return ChatVLLM

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "m", "base_url": "http://vllm.test:8000/v1"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        environment = {"VLLM_API_KEY": "secret", "VLLM_BASE_URL": "http://vllm.test:9/v1"}
        return environment, {"model": "m"}, {"openai_api_key": "secret", "openai_api_base": "http://vllm.test:9/v1"}

    @pytest.mark.xfail(
        raises=ValueError,
        reason="core's load(allowed_objects='all') knows LangChain's own packages only; see test_serdes_ours",
    )
    def test_serdes(self, model: Any, snapshot: Any) -> None:
        super().test_serdes(model, snapshot)


def test_serdes_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    model = ChatVLLM(model="m", base_url="http://vllm.test:8000/v1", api_key="secret", top_k=5)
    dumped = dumpd(model)
    assert dumped["kwargs"]["openai_api_key"] == {"lc": 1, "type": "secret", "id": ["VLLM_API_KEY"]}
    loaded = load(dumped, allowed_objects=[ChatVLLM], valid_namespaces=["langchain_vllm"], secrets_from_env=True)
    assert isinstance(loaded, ChatVLLM)
    assert loaded.model_dump() == model.model_dump()
    assert loaded.openai_api_key is not None
    assert loaded.openai_api_key.get_secret_value() == "secret"
