from __future__ import annotations

import asyncio
import base64
import math
import struct
from typing import Any

import pytest

from tests.server.fakes import Server, byte_tokenizer, running, until

IDS = byte_tokenizer().encode("abc")


def unit(*values: float) -> list[float]:
    """In f32, as vectors are told."""
    length = math.hypot(*values)
    return list(struct.unpack(f"{len(values)}f", struct.pack(f"{len(values)}f", *(v / length for v in values))))


async def vectors(server: Server, path: str = "/v1/embeddings", **body: Any) -> list[Any]:
    response = await server.post(path, **body)
    assert response.status_code == 200, response.text
    return [entry["data" if path == "/pooling" else "embedding"] for entry in response.json()["data"]]


async def test_the_answer_has_vllms_shape(server: Server) -> None:
    response = await server.post("/v1/embeddings", input=["aab", "c"], model="alias", request_id="abc")
    answer = response.json()
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "id": "embd-abc",
        "object": "list",
        "model": "alias",
        "data": [
            {"index": 0, "object": "embedding", "embedding": unit(2, 1, 0, 0, 0, 0, 0, 0)},
            {"index": 1, "object": "embedding", "embedding": unit(0, 0, 1, 0, 0, 0, 0, 0)},
        ],
        "usage": {
            "prompt_tokens": 4,
            "total_tokens": 4,
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": 32},
            "completion_tokens_details": None,
        },
    }
    params = server.fake.submitted[0].params
    assert (params.pooling, params.max_tokens) == ("mean", 0)


@pytest.mark.parametrize("given", ["abc", ["abc"], IDS, [IDS], [[float(token) for token in IDS]]])
async def test_texts_and_token_ids(server: Server, given: Any) -> None:
    assert await vectors(server, input=given) == [unit(1, 1, 1, 0, 0, 0, 0, 0)]


async def test_texts_and_token_ids_in_one_list(server: Server) -> None:
    assert len(await vectors(server, input=["abc", IDS])) == 2


async def test_conversations_are_rendered_as_a_chat(server: Server) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    rendered = "<|im_start|>user\nHi<|im_end|>\n"
    assert len(await vectors(server, messages=messages)) == 1
    assert len(await vectors(server, messages=[messages, messages], add_generation_prompt=True)) == 2
    texts = [byte_tokenizer().decode(one.prompt, skip_special_tokens=False) for one in server.fake.submitted]
    assert texts == [rendered] + [rendered + "<|im_start|>assistant\n"] * 2


async def test_base64_is_the_same_in_f32(server: Server) -> None:
    (plain,) = await vectors(server, input="aab")
    for endianness, code in (("little", "<8f"), ("big", ">8f")):
        (encoded,) = await vectors(server, input="aab", encoding_format="base64", endianness=endianness)
        assert list(struct.unpack(code, base64.b64decode(encoded))) == plain


async def test_dimensions_and_no_activation(server: Server) -> None:
    assert await vectors(server, input="aabc", dimensions=2) == [unit(2, 1)]
    assert await vectors(server, input="aabc", dimensions=3, use_activation=False) == [[2.0, 1.0, 1.0]]
    assert await vectors(server, input="xyz") == [[0.0] * 8], "a vector of length 0 has no direction"


@pytest.mark.parametrize(
    ("fields", "kept"), [({}, "ab"), ({"truncation_side": "left"}, "cd"), ({"truncate_prompt_tokens": -1}, "abcd")]
)
async def test_truncation(server: Server, fields: dict[str, Any], kept: str) -> None:
    await vectors(server, input="abcd", **{"truncate_prompt_tokens": 2, **fields})
    assert server.fake.submitted[0].prompt == byte_tokenizer().encode(kept)


async def test_pooling_is_the_same_in_another_form(server: Server) -> None:
    assert await vectors(server, "/pooling", input="abc", task="embed") == await vectors(server, input="abc")
    answer = (await server.post("/pooling", input="abc", request_id="x")).json()
    assert (answer["id"], answer["data"][0]["object"]) == ("pool-x", "pooling")


async def test_the_server_says_what_vectors_are_made_of() -> None:
    async with running(pooling="last") as server:
        await vectors(server, input="abc", cache_salt="mine")
        params = server.fake.submitted[0].params
        assert (params.pooling, params.cache_salt) == ("last", "mine")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "Give either"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "input", "Give either"),
        ({"input": ""}, "input", "must not be empty"),
        ({"input": []}, "input", "list of texts"),
        ({"input": ["a", 1]}, "input", "list of texts"),
        ({"input": [[]]}, "input", "must not be empty"),
        ({"input": [["a"]]}, "input[0][0]", "validation error"),
        ({"input": [10**6]}, "input", "out of vocabulary"),
        ({"input": "a" * 300}, "input_tokens", "maximum context length is 256"),
        ({"input": "a" * 30_000}, "input_text", "maximum context length is 256"),
        ({"input": "a", "dimensions": 9}, "dimensions", "between 1 and 8, got 9"),
        ({"input": "a", "dimensions": 0}, "dimensions", "between 1 and 8, got 0"),
        ({"input": "a", "encoding_format": "bytes"}, "encoding_format", "validation error"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype", "validation error"),
        ({"input": "a", "normalize": True}, "normalize", "use_activation"),
        ({"input": "a", "padding": "max_length"}, "padding", "leave it out"),
        ({"input": "a", "padding": "longest"}, "padding", "validation error"),
        ({"input": "a", "truncate_prompt_tokens": 999}, "truncate_prompt_tokens", "greater than max_model_len"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
        ({"input": "a", "priority": 1}, "priority", "--scheduling-policy priority"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": [[]]}, "messages", "must not be empty"),
        ({"messages": [{"role": "user", "content": "a"}, []]}, "messages", "must not mix"),
    ],
)
async def test_bad_requests(server: Server, body: dict[str, Any], param: str, message: str) -> None:
    response = await server.post("/v1/embeddings", **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
    assert not server.fake.submitted
    assert len(await vectors(server, input="a")) == 1, "the next request is served"


async def test_unknown_model_and_task(server: Server) -> None:
    assert (await server.post("/v1/embeddings", input="a", model="nope")).status_code == 404
    assert (await server.post("/pooling", input="a", task="token_embed")).json()["error"]["param"] == "task"
    response = await server.post("/classify", input="a")
    assert response.status_code == 400
    assert "no classification head" in response.json()["error"]["message"]


async def test_who_goes_away_is_forgotten_and_a_dead_engine_told() -> None:
    async with running(step_seconds=60) as server:
        task = asyncio.ensure_future(server.post("/v1/embeddings", input=["abc"] * 3))
        await until(lambda: len(server.fake.submitted) == 3)
        assert (await server.client.get("/load")).json() == {"server_load": 1}
        task.cancel()
        await until(lambda: len(server.fake.cancelled) == 3)
        task = asyncio.ensure_future(server.post("/v1/embeddings", input="abc"))
        await until(lambda: len(server.fake.submitted) == 4)
        server.fake.die("broken")
        assert (await task).status_code == 500


@pytest.mark.parametrize(
    ("first", "second"), [("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2")]
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
async def test_scores_are_cosines(server: Server, path: str, first: str, second: str) -> None:
    answer = (await server.post(path, request_id="x", **{first: "aab", second: ["aab", "c", "a"]})).json()
    assert (answer["id"], answer["object"], answer["usage"]["prompt_tokens"]) == ("score-x", "list", 8)
    assert [(entry["index"], entry["object"]) for entry in answer["data"]] == [(i, "score") for i in range(3)]
    assert [entry["score"] for entry in answer["data"]] == pytest.approx([1, 0, 2 / math.sqrt(5)], abs=1e-6)
    pairs = (await server.post(path, **{first: ["a", "b"], second: ["ab", "b"]})).json()["data"]
    assert [entry["score"] for entry in pairs] == pytest.approx([math.sqrt(0.5), 1], abs=1e-6)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_rerank_sorts_and_keeps_the_best(server: Server, path: str) -> None:
    documents = ["c", "ab", "a", "cc"]
    answer = (await server.post(path, query="a", documents=documents, request_id="x")).json()
    assert (answer["id"], answer["model"]) == ("rerank-x", "tiny")
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [entry["index"] for entry in answer["results"]] == [2, 1, 0, 3]
    best = (await server.post(path, query="a", documents=documents, top_n=1)).json()["results"]
    assert best == [
        {"index": 2, "document": {"text": "a", "multi_modal": None}, "relevance_score": pytest.approx(1, abs=1e-6)}
    ]


async def test_texts_can_be_cut_each_on_its_side(server: Server) -> None:
    await server.post("/score", queries="abc", documents="abcd", max_tokens_per_query=1, max_tokens_per_doc=2)
    assert [one.prompt for one in server.fake.submitted] == [IDS[:1], IDS[:2]]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/score", {}, "Give one of the pairs"),
        ("/score", {"queries": "a", "text_2": "b"}, "Give one of the pairs"),
        ("/score", {"queries": "a", "documents": "b", "text_1": "c"}, "Give one of the pairs"),
        ("/score", {"queries": ["a", "b"], "documents": ["a"]}, "1:1, 1:N or N:N, got 2 queries and 1 documents"),
        ("/score", {"queries": [], "documents": []}, "1:1, 1:N or N:N"),
        ("/score", {"queries": "", "documents": "a"}, "queries must not be empty"),
        ("/score", {"queries": [{"content": []}], "documents": "a"}, "validation error"),
        ("/score", {"queries": "a", "documents": "b", "max_tokens_per_doc": -1}, "at least 0"),
        ("/score", {"queries": "a", "documents": "b", "use_activation": False}, "cosines"),
        ("/rerank", {"query": "a", "documents": []}, "1:1, 1:N"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n must be at least 0"),
        ("/rerank", {"query": "a", "documents": ["b"], "instruction": "Find"}, "not trained to rank"),
    ],
)
async def test_bad_comparisons(server: Server, path: str, body: dict[str, Any], message: str) -> None:
    response = await server.post(path, **body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert not server.fake.submitted


async def test_what_fits_is_the_whole_context(server: Server) -> None:
    answer = await server.post("/v1/embeddings", input="a" * 300, truncate_prompt_tokens=-1)
    assert answer.json()["usage"]["prompt_tokens"] == server.model.max_model_len


async def test_a_task_of_another_model_is_named(server: Server) -> None:
    error = (await server.post("/pooling", input="a", task="classify")).json()["error"]
    assert (error["type"], error["param"]) == ("BadRequestError", "task")
    assert error["message"].startswith("Unsupported task: 'classify'")
    assert (await server.post("/pooling", input="a", task="embed", padding="do_not_pad")).status_code == 200
