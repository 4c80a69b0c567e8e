"""The HTTP clients that model objects share."""

from __future__ import annotations

import pytest

from langchain_vllm import ChatVLLM, _http
from tests.unit_tests.mock_server import URL


def test_clients_are_shared() -> None:
    first, second = ChatVLLM(model="a", base_url=URL), ChatVLLM(model="b", base_url=URL, api_key="k")
    assert first.root_client._client is second.root_client._client
    assert first.root_async_client._client is second.root_async_client._client


def test_other_proxies_and_processes_have_clients_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    client = _http.sync_client(None, ())
    assert _http.sync_client("http://proxy:3128", ()) is not client
    monkeypatch.setattr("os.getpid", lambda: 1)
    assert _http.sync_client(None, ()) is not client


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "http://127.0.0.1:8000/v1", "http://[::1]:8000/v1"])
def test_no_proxy_for_this_machine(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    assert _http.environment_proxy(url) is None


def test_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _http.environment_proxy(URL) is None
    monkeypatch.setenv("ALL_PROXY", "proxy:3128")
    assert _http.environment_proxy(URL) == "http://proxy:3128"
    monkeypatch.setenv("HTTPS_PROXY", "http://secure:3128")
    assert _http.environment_proxy("https://vllm.test/v1") == "http://secure:3128"
    monkeypatch.setenv("NO_PROXY", "vllm.test")
    assert _http.environment_proxy(URL) is None


def test_timeouts_suit_slow_machines() -> None:
    client = ChatVLLM(model="m", base_url=URL).root_client
    assert client.timeout.read is None
    assert client.timeout.connect == 10.0
    assert ChatVLLM(model="m", base_url=URL, timeout=3).root_client.timeout == 3
