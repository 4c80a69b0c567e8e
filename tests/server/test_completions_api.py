from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.server.fakes import Server, byte_tokenizer, running, sse_data


async def test_whole_answer_has_vllms_shape(server: Server) -> None:
    answer = (await server.complete("Hi", request_id="abc")).json()
    assert answer.pop("metrics")["queue_time_ms"] >= 0
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "id": "cmpl-abc",
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": "Hello world",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "routed_experts": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": "langchain-vllm-1.2.3",
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 12,
            "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 16, "multimodal_tokens": None},
            "completion_tokens_details": None,
        },
        "kv_transfer_params": None,
        "ec_transfer_params": None,
    }


@pytest.mark.parametrize("max_tokens", [{}, {"max_tokens": None}])
async def test_max_tokens_defaults_to_16(max_tokens: dict[str, Any]) -> None:
    async with running("x" * 40) as server:
        await server.complete(**max_tokens)
    # null is "leave it to the server", and the server's own default is 16
    assert server.fake.submitted[0].params.max_tokens == 16


async def test_prompts_may_be_texts_or_token_ids_or_lists_of_them(server: Server) -> None:
    ids = byte_tokenizer().encode("Hi")
    for prompt, expected in (("Hi", [ids]), (ids, [ids]), (["Hi", "Hi"], [ids, ids]), ([ids, [1]], [ids, [1]])):
        server.fake.submitted.clear()
        answer = (await server.complete(prompt)).json()
        assert [request.prompt for request in server.fake.submitted] == expected
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_n_of_several_prompts_are_numbered_prompt_by_prompt(server: Server) -> None:
    answer = (await server.complete(["A", "B"], n=2)).json()
    assert len(answer["choices"]) == 4
    assert [request.prompt for request in server.fake.submitted] == [byte_tokenizer().encode(p) for p in "AABB"]
    assert answer["usage"]["prompt_tokens"] == 2


async def test_stream(server: Server) -> None:
    response = await server.complete(stream=True, stream_options={"include_usage": True})
    *events, done = sse_data(response.text)
    chunks = [json.loads(event) for event in events]
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "Hello world"
    assert chunks[0]["object"] == "text_completion"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 12


async def test_logprobs(server: Server) -> None:
    logprobs = (await server.complete(logprobs=2, max_tokens=3)).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "text_offset": [0, 1, 2],
        "tokens": ["H", "e", "l"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"H": -0.5, "I": -1.5}, {"e": -0.5, "f": -1.5}, {"l": -0.5, "m": -1.5}],
    }


async def test_streamed_offsets_go_on(server: Server) -> None:
    events = sse_data((await server.complete(logprobs=0, max_tokens=5, stream=True)).text)
    offsets = [o for event in events[:-1] for o in json.loads(event)["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [[1], []]])
async def test_empty_prompts_are_refused(server: Server, prompt: Any) -> None:
    response = await server.complete(prompt)
    assert response.status_code == 400
    assert "Either prompt or prompt_embeds must be provided and non-empty." in response.json()["error"]["message"]


@pytest.mark.parametrize("prompt", [[1, "a"], [-1], [10_000], [[10_000]], [1.5], 7, {"a": 1}, [1, [2]]])
async def test_bad_prompts_are_refused(server: Server, prompt: Any) -> None:
    response = await server.complete(prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("prompt")
    assert server.fake.submitted == []


async def test_too_many_sequences_are_refused(server: Server) -> None:
    error = (await server.complete(["a"] * 129, n=128)).json()["error"]
    assert (error["code"], error["param"]) == (400, "n")
    assert server.fake.submitted == []


async def test_prompt_longer_than_the_context(server: Server) -> None:
    for length in (256, 1000):
        error = (await server.complete("x" * length)).json()["error"]
        assert error["message"].startswith(
            f"This model's maximum context length is 256 tokens. However, your prompt contains {length} input tokens."
        )
        assert (error["param"], error["code"]) == ("input_tokens", 400)
    assert (await server.complete("x" * 255)).json()["choices"][0]["text"] == "H"


async def test_text_that_cannot_fit_is_refused_unread(server: Server) -> None:
    limit = 256 * len("<|endoftext|>")
    error = (await server.complete("x" * (limit + 1))).json()["error"]
    assert f"256 tokens. However, your prompt contains {limit + 1} characters (more than {limit}" in error["message"]
    assert (error["param"], error["code"]) == ("input_text", 400)
    assert f"{limit} input tokens" in (await server.complete("x" * limit)).json()["error"]["message"]


async def test_a_short_text_does_not_wait_for_a_look_at_all_tokens(server: Server) -> None:
    looked_at = vars(server.model.tokenizer)
    looked_at.pop("longest_token", None)
    for length, looked in ((256, False), (257, True)):
        await server.complete("x" * length)
        assert ("longest_token" in looked_at) == looked


@pytest.mark.parametrize("prompt", ["long words " * 100_000, ["a few words " * 300] * 300])
async def test_nobody_waits_for_the_encoding_of_a_long_text(prompt: Any) -> None:
    async with running(max_model_len=2_000_000) as server:
        server.model.tokenizer.longest_token  # noqa: B018 (told once)
        request = asyncio.ensure_future(server.complete(prompt, max_tokens=1, n=1))
        turns = 0
        while not (server.fake.submitted or request.done()):
            await asyncio.sleep(0)
            turns += 1
        assert (await request).status_code == 200
        assert turns >= 100  # a few would do for a request that is encoded in one go


async def test_long_texts_are_encoded_all_the_same() -> None:
    async with running(max_model_len=50_000) as server:
        assert (await server.complete("x" * 30_000)).json()["usage"]["prompt_tokens"] == 30_000
