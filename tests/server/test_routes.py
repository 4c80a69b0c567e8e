"""The table of routes: all of it is served and described. And the routes that are too small for a file of their own."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from starlette.applications import Starlette

from langchain_vllm_server import routes
from tests.server.fakes import Server, running, until

HI = [{"role": "user", "content": "Hi"}]


async def test_every_route_is_described_with_its_methods(server: Server) -> None:
    description = (await server.client.get("/openapi.json")).json()
    app: Any = server.app
    while not isinstance(app, Starlette):
        app = app._app
    served = {
        (route.path.replace(":path}", "}"), method) for route in app.routes for method in route.methods - {"HEAD"}
    }
    described = {(path, method.upper()) for path, methods in description["paths"].items() for method in methods}
    assert described == served
    assert {"/v1/chat/completions", "/metrics", "/invocations", "/docs"} <= description["paths"].keys()


async def test_the_description_is_whole(server: Server) -> None:
    response = await server.client.get("/openapi.json")
    schemas = response.json()["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/(\w+)"', response.text):
        assert name in schemas
    chat = schemas["ChatCompletionRequest"]
    assert chat["required"] == ["messages"]
    assert {"temperature", "tools", "structured_outputs"} <= chat["properties"].keys()
    assert schemas["EmbeddingRequest"]["properties"]["encoding_format"]["enum"] == ["base64", "float"]


async def test_the_page_for_people_needs_nothing_from_elsewhere(server: Server) -> None:
    response = await server.client.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "://" not in response.text


async def test_load_and_prefix_cache() -> None:
    async with running(step_seconds=0.05) as server:
        assert (await server.client.post("/reset_prefix_cache")).json() == {"success": True}
        task = asyncio.ensure_future(server.complete(["a", "b"], max_tokens=3))
        await until(lambda: len(server.fake.submitted) == 2)
        assert (await server.client.get("/load")).json() == {"server_load": 1}
        assert (await server.client.post("/reset_prefix_cache")).json() == {"success": False}
        await task
        assert (await server.client.get("/load")).json() == {"server_load": 0}
        assert server.fake.forgotten == 1


async def test_tokenizer_info_is_told_by_those_who_say_so(server: Server) -> None:
    response = await server.client.get("/tokenizer_info")
    assert response.status_code == 404
    assert "--enable-tokenizer-info-endpoint" in response.json()["error"]["message"]
    async with running(tokenizer_info={"tokenizer_class": "X"}) as telling:
        assert (await telling.client.get("/tokenizer_info")).json() == {"tokenizer_class": "X"}


async def test_a_batch_of_conversations_is_one_answer(server: Server) -> None:
    single = (await server.chat("Hi", max_tokens=3)).json()
    batch = (await server.post("/v1/chat/completions/batch", messages=[HI, HI, HI], max_tokens=3)).json()
    assert [choice["index"] for choice in batch["choices"]] == [0, 1, 2]
    assert all({**choice, "index": 0} == single["choices"][0] for choice in batch["choices"])
    assert batch["usage"]["completion_tokens"] == 9
    assert batch["usage"]["prompt_tokens_details"]["cached_tokens"] == 48
    assert batch.keys() == single.keys()


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [HI], "stream": True},
        {"messages": [HI], "n": 2},
        {"messages": [HI], "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": []},
        {"messages": [[]]},
        {"messages": HI},
        {"messages": [HI, [{"role": "user", "content": 5}]]},
    ],
)
async def test_bad_batches(server: Server, body: dict[str, Any]) -> None:
    response = await server.post("/v1/chat/completions/batch", **body)
    assert response.status_code == 400, response.text
    assert not server.engine.num_requests


@pytest.mark.parametrize(
    ("body", "id_prefix"),
    [
        ({"messages": HI}, "chatcmpl-"),
        ({"prompt": "a"}, "cmpl-"),
        ({"input": "a"}, "embd-"),
        ({"query": "a", "documents": ["b"]}, "rerank-"),
        ({"queries": "a", "documents": ["b"]}, "score-"),
        ({"text_1": "a", "text_2": "b"}, "score-"),
    ],
)
async def test_an_invocation_is_what_its_body_is(server: Server, body: dict[str, Any], id_prefix: str) -> None:
    response = await server.post("/invocations", **body)
    assert response.status_code == 200, response.text
    assert response.json()["id"].startswith(id_prefix)


@pytest.mark.parametrize("body", [b"{}", b"[]", b"{", b'{"query": "a"}', b'{"messages": null}'])
async def test_bad_invocations(server: Server, body: bytes) -> None:
    response = await server.client.post("/invocations", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400


def test_paths_are_unique() -> None:
    paths = [row.path for row in (*routes.PAGES, *routes.OPERATIONS)]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ("TEXT", "TEXT named_metrics.kv_cache_usage_perc=0.25, named_metrics.num_requests_waiting=0.0"),
        ("json", 'JSON {"named_metrics":{"kv_cache_usage_perc":0.25,"num_requests_waiting":0.0}}'),
    ],
)
async def test_load_balancers_are_told_the_load(server: Server, wanted: str, told: str, stream: bool) -> None:
    body = {"messages": HI, "stream": stream}
    headers = {"endpoint-load-metrics-format": wanted}
    response = await server.client.post("/v1/chat/completions", json=body, headers=headers)
    assert response.headers["endpoint-load-metrics"] == told
    assert "endpoint-load-metrics" not in (await server.post("/v1/chat/completions", **body)).headers


async def test_a_load_report_has_two_formats(server: Server) -> None:
    headers = {"endpoint-load-metrics-format": "BIN"}
    response = await server.client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "endpoint-load-metrics-format")
