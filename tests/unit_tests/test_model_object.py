"""ChatVLLM as an object: copies, caches, profile, addresses, LangChain's registry."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache

import langchain_vllm
from langchain_vllm import ChatVLLM, _http
from tests.unit_tests.mock_server import URL, MockServer, completion

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CARD = {"id": "m", "object": "model", "max_model_len": 2048}


@pytest.fixture
def server() -> MockServer:
    server = MockServer()
    server.answers["/v1/models"] = (200, {"object": "list", "data": [{"id": "n", "object": "model"}, CARD]})
    return server


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda chat: pickle.loads(pickle.dumps(chat))])
def test_copies(duplicate: Any) -> None:
    chat = ChatVLLM(model="m", base_url=URL, api_key="k", top_k=5, stop=["x"])
    other = duplicate(chat)
    assert other == chat.model_copy() or other.model_dump() == chat.model_dump()
    assert other.root_client.api_key == "k"
    assert str(other.root_client.base_url).rstrip("/") == URL
    assert other.stop is not chat.stop
    assert other.profile["tool_calling"] is True


def test_a_deep_copy_shares_the_callers_http_client(server: MockServer) -> None:
    chat = copy.deepcopy(server.chat(temperature=0.5))
    assert chat.invoke("Hello").content == "Ciao"
    assert chat.temperature == 0.5


def test_a_managed_model_can_be_copied() -> None:
    chat = pickle.loads(pickle.dumps(ChatVLLM(model="m", server_options={"max_model_len": 512})))
    assert chat.server is None
    assert chat.server_options == {"max_model_len": 512}


def test_the_cache_knows_the_server(server: MockServer) -> None:
    set_llm_cache(InMemoryCache())
    try:
        server.chat().invoke("Hello")
        server.chat().invoke("Hello")
        assert len(server.requests) == 1
        server.chat(base_url="http://other.test/v1").invoke("Hello")
        server.chat(top_k=5).invoke("Hello")
        server.chat().invoke("Hello", top_k=7)
        assert len(server.requests) == 4
    finally:
        set_llm_cache(None)


def test_profile(server: MockServer) -> None:
    chat = server.chat()
    assert chat.profile is not None
    assert chat.profile.get("structured_output") is True
    assert server.requests == []
    assert chat.profile["max_input_tokens"] == 2048
    assert "max_output_tokens" in chat.profile
    assert len(server.requests) == 1
    assert server.chat(profile={"max_input_tokens": 7}).profile == {"max_input_tokens": 7}


async def test_available_models(server: MockServer) -> None:
    assert server.chat().available_models() == ["n", "m"]
    assert await server.chat().aavailable_models() == ["n", "m"]


@pytest.mark.parametrize(
    ("base_url", "address", "path"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1", None),
        ("http://localhost:8000/", "http://localhost:8000/v1", None),
        ("https://host/prefix/v1/", "https://host/prefix/v1", None),
        ("unix:///run/vllm.sock", "http://localhost/v1", "/run/vllm.sock"),
        ("unix:/run/vllm.sock", "http://localhost/v1", "/run/vllm.sock"),
        ("http+unix://%2Frun%2Fvllm.sock/v1", "http://localhost/v1", "/run/vllm.sock"),
    ],
)
def test_addresses(base_url: str, address: str, path: str | None) -> None:
    assert _http.endpoint(base_url) == (address, path)


@pytest.mark.parametrize("base_url", ["localhost:8000/v1", "ftp://host/v1", "http://", "unix:"])
def test_bad_addresses(base_url: str) -> None:
    with pytest.raises(ValueError, match="must begin with http://HOST, https://HOST or unix:///PATH"):
        ChatVLLM(model="m", base_url=base_url)


class UnixServer(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


class Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        import json

        body = json.dumps(completion(content=self.path)).encode()
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def unix_socket(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "vllm.sock")
    with UnixServer(path, Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"unix://{path}"
        server.shutdown()
        thread.join()


def test_a_unix_socket(unix_socket: str) -> None:
    chat = ChatVLLM(model="m", base_url=unix_socket)
    assert chat.invoke("Hello").content == "/v1/chat/completions"
    for _ in range(2):  # a loop of its own each time
        assert asyncio.run(chat.ainvoke("Hello")).content == "/v1/chat/completions"


def test_register() -> None:
    from langchain.chat_models import init_chat_model

    langchain_vllm.register()
    langchain_vllm.register()
    chat = init_chat_model("vllm:some/model", base_url=URL, top_k=3)
    assert isinstance(chat, ChatVLLM)
    assert (chat.model_name, chat.top_k) == ("some/model", 3)


def test_a_batch_is_under_way_all_at_once() -> None:
    size = 40
    barrier = threading.Barrier(size, timeout=20)
    server = MockServer()
    handle = server.handle

    def wait_for_all(request: Any) -> Any:
        barrier.wait()
        return handle(request)

    server.handle = wait_for_all  # type: ignore[method-assign]
    assert len(server.chat().batch(["Hello"] * size)) == size
    assert barrier.n_waiting == 0


def test_a_batch_keeps_a_limit_that_is_given(server: MockServer) -> None:
    running, most = 0, 0
    lock = threading.Lock()
    handle = server.handle

    def count(request: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)  # long enough for another to come, if there is one
        answer = handle(request)
        with lock:
            running -= 1
        return answer

    server.handle = count  # type: ignore[method-assign]
    server.chat().batch(["Hello"] * 10, {"max_concurrency": 1})
    assert most == 1


def test_operations(server: MockServer) -> None:
    server.answers["/version"] = (200, {"version": "0.32.0"})
    text = '# HELP x y\nrunning{model_name="m"} 2.0\nrunning{model_name="n"} 1\nt_bucket{le="1"} 3\nup 1\n'
    server.answers["/metrics"] = (200, text)
    server.answers["/tokenize"] = (200, {"tokens": [1, 2], "count": 2})
    server.answers["/detokenize"] = (200, {"prompt": "<user>Hello"})
    chat = server.chat()
    assert chat.server_version() == "0.32.0"
    assert chat.server_metrics() == {"running": 3.0, "up": 1.0}
    assert chat.render_prompt("Hello") == "<user>Hello"
    assert server.body == {"model": "m", "tokens": [1, 2]}
