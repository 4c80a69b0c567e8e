from __future__ import annotations

from typing import Any

import pytest

from tests.server.fakes import Server, byte_tokenizer


async def test_prompt(server: Server) -> None:
    answer = (await server.post("/tokenize", prompt="Hi ü", return_token_strs=True)).json()
    ids = byte_tokenizer().encode("Hi ü")
    assert answer == {
        "count": 5,
        "max_model_len": 256,
        "tokens": ids,
        "token_strs": [byte_tokenizer().token(token) for token in ids],
    }
    assert (await server.post("/tokenize", prompt="Hi")).json()["token_strs"] is None


async def test_messages_count_as_a_chat_would(server: Server) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tokens = (await server.post("/tokenize", messages=messages)).json()["tokens"]
    await server.chat("Hi")
    assert tokens == server.fake.submitted[0].prompt


async def test_detokenize_is_the_inverse(server: Server) -> None:
    tokens = (await server.post("/tokenize", prompt="<|im_start|>日本")).json()["tokens"]
    assert (await server.post("/detokenize", tokens=tokens)).json() == {"prompt": "<|im_start|>日本"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"prompt": 5}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": ["a"]}),
    ],
)
async def test_bad_requests(server: Server, path: str, body: dict[str, Any]) -> None:
    response = await server.post(path, **body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == 400


async def test_unknown_model(server: Server) -> None:
    assert (await server.post("/tokenize", prompt="a", model="nope")).status_code == 404
