"""Bodies that no client means: each gets a 4xx in the envelope, and the next request is served."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from langchain_vllm_server.routes import OPERATIONS
from tests.server.fakes import running

if TYPE_CHECKING:
    import httpx

    from tests.server.fakes import Server

JUNK: list[Any] = [
    "x",
    "",
    -1,
    1.5,
    1e300,
    -(2**70),
    True,
    [],
    [[]],
    [None],
    {},
    {"a": {"b": []}},
    ["\ud800"],
    {"": None},
]
JSON = {"content-type": "application/json"}
VALID: dict[str, Any] = {
    "prompt": "Hi", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}], "input": "Hi", "tokens": [1],
    "query": "a", "documents": ["b"], "text_1": "a", "text_2": "b",
}  # fmt: skip


def check(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.json()["error"]["code"] == response.status_code
        assert "Traceback" not in response.text


async def check_alive(server: Server) -> None:
    assert (await server.complete(max_tokens=1)).status_code == 200
    assert (await server.client.get("/health")).status_code == 200


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
async def test_every_field_of_every_request_with_every_wrong_type(operation: Any) -> None:
    fields = msgspec.structs.fields(operation.request)
    names = {field.encode_name for field in fields}
    base = {name: value for name, value in VALID.items() if name in names}
    async with running() as server:
        for field in fields:
            for junk in JUNK:
                body = json.dumps({**base, field.encode_name: junk}).encode()
                check(await server.client.post(operation.path, content=body, headers=JSON))
        await check_alive(server)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
async def test_bodies_that_are_cut_or_scrambled(operation: Any) -> None:
    rng = random.Random(0)
    whole = json.dumps(VALID).encode()
    bodies = [whole[:end] for end in range(0, len(whole), 7)]
    bodies += [rng.randbytes(rng.randrange(200)) for _ in range(50)]
    for _ in range(100):
        scrambled = bytearray(whole)
        for _ in range(3):
            scrambled[rng.randrange(len(scrambled))] = rng.randrange(256)
        bodies.append(bytes(scrambled))
    bodies += [b"[" * 50_000, b'{"a":' * 5_000, b'{"prompt":"' + b"\\ud800" + b'"}', b"nul", b"\xef\xbb\xbf{}"]
    async with running() as server:
        for body in bodies:
            check(await server.client.post(operation.path, content=body, headers=JSON))
        await check_alive(server)


async def test_nesting_has_a_limit() -> None:
    async with running() as server:
        deep: Any = 1
        for _ in range(70):
            deep = [deep]
        response = await server.complete(documents=deep)
        assert response.status_code == 400
        assert "64 levels" in response.json()["error"]["message"]
