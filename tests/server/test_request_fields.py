"""What requests may ask for beside sampling: echo and scores, ids, texts and offsets of prompts, cuts, intervals."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_vllm_server.prompts import truncate
from langchain_vllm_server.protocol import CompletionRequest
from tests.server.fakes import CHATML, Server, byte_tokenizer, running, sse_data

TOKENIZER = byte_tokenizer()
HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


async def chunks(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    *events, done = sse_data(response.text)
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


# Echo and scores.


@pytest.mark.parametrize("prompt", ["Hey", [ids("Hey")]])
async def test_echo_puts_the_prompt_before_the_text(server: Server, prompt: Any) -> None:
    choice = (await server.complete(prompt, echo=True)).json()["choices"][0]
    assert (choice["text"], choice["logprobs"], choice["prompt_logprobs"]) == ("HeyHello world", None, None)


async def test_a_prompt_is_scored_without_generating(server: Server) -> None:
    """As lm-eval asks: token ids, echo, one top logprob, nothing to generate."""
    answer = (await server.complete([ids("Hey"), ids("a")], echo=True, max_tokens=0, logprobs=1)).json()
    first, second = answer["choices"]
    assert (first["text"], first["finish_reason"]) == ("Hey", "length")
    assert first["logprobs"] == {
        "text_offset": [0, 1, 2],
        "tokens": ["H", "e", "y"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"e": -0.5}, {"y": -0.5}],
    }
    assert second["logprobs"]["token_logprobs"] == [None]
    assert answer["usage"] == {**answer["usage"], "prompt_tokens": 4, "completion_tokens": 0}
    assert {request.params.max_tokens for request in server.fake.submitted} == {0}


async def test_a_prompt_that_fills_the_context_can_be_scored(server: Server) -> None:
    body = {"echo": True, "logprobs": 0}
    assert (await server.complete("x" * 256, max_tokens=0, **body)).status_code == 200
    assert (await server.complete("x" * 257, max_tokens=0, **body)).status_code == 400
    assert (await server.complete("x" * 256, max_tokens=1, **body)).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_logprobs_go_on_into_the_answer(server: Server, stream: bool) -> None:
    body = {"echo": True, "logprobs": 0, "max_tokens": 2, "n": 2, "seed": 1}
    if stream:
        choices: list[dict[str, Any]] = [{"text": "", "logprobs": []}, {"text": "", "logprobs": []}]
        for chunk in await chunks(await server.complete("ab", stream=True, **body)):
            (choice,) = chunk["choices"]
            choices[choice["index"]]["text"] += choice["text"]
            choices[choice["index"]]["logprobs"].append(choice["logprobs"])
        logprobs = [
            {key: [value for part in choice["logprobs"] for value in part[key]] for key in choice["logprobs"][0]}
            for choice in choices
        ]
    else:
        choices = (await server.complete("ab", **body)).json()["choices"]
        logprobs = [choice["logprobs"] for choice in choices]
    assert [choice["text"] for choice in choices] == ["abHe"] * 2
    for one in logprobs:
        assert one["tokens"] == ["a", "b", "H", "e"]
        assert one["text_offset"] == [0, 1, 2, 3]
        assert one["token_logprobs"] == [None, -0.5, -0.5, -0.5]


async def test_only_one_of_n_choices_scores_the_prompt(server: Server) -> None:
    choices = (await server.complete("ab", prompt_logprobs=2, n=2)).json()["choices"]
    assert [request.params.num_prompt_logprobs for request in server.fake.submitted] == [2, -1]
    b, c = ids("b")[0], ids("c")[0]
    expected = [
        None,
        {
            str(b): {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
            str(c): {"logprob": -1.5, "rank": 2, "decoded_token": "c"},
        },
    ]
    assert [choice["prompt_logprobs"] for choice in choices] == [expected] * 2


async def test_chat_prompt_logprobs(server: Server) -> None:
    answer = (await server.chat(prompt_logprobs=0)).json()
    first, *others = answer["prompt_logprobs"]
    assert first is None
    assert [list(one) for one in others] == [[str(token)] for token in ids(HI)[1:]]


async def test_all_of_the_vocabulary(server: Server) -> None:
    async with running(max_logprobs=-1) as server:
        await server.complete(logprobs=-1, prompt_logprobs=-1)
        await server.chat(logprobs=True, top_logprobs=-1)
        await server.complete(logprobs=10_000)
    counts = [request.params.num_logprobs for request in server.fake.submitted]
    assert counts == [TOKENIZER.vocab_size] * 3
    assert server.fake.submitted[0].params.num_prompt_logprobs == TOKENIZER.vocab_size


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_echo_begins_with_the_message_to_continue(server: Server, stream: bool) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True, "echo": True}
    response = await server.post("/v1/chat/completions", stream=stream, **body)
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in await chunks(response)]
        assert deltas[:2] == [{"role": "assistant", "content": ""}, {"content": "Well, "}]
        assert "".join(delta.get("content", "") for delta in deltas) == "Well, Hello world"
    else:
        assert response.json()["choices"][0]["message"]["content"] == "Well, Hello world"


async def test_chat_echo_of_another_role_is_nothing(server: Server) -> None:
    assert (await server.chat(echo=True)).json()["choices"][0]["message"]["content"] == "Hello world"


# What is told of prompts and tokens.


async def test_ids_texts_and_offsets_of_the_prompt(server: Server) -> None:
    body = {"return_token_ids": True, "return_prompt_text": True, "return_token_offsets": True, "max_tokens": 2}
    chat = (await server.chat("é", **body)).json()
    text = HI.replace("Hi", "é")
    assert (chat["prompt_token_ids"], chat["prompt_text"]) == (ids(text), text)
    assert chat["choices"][0]["token_ids"] == ids("He")
    pieces = [text[begin:end] for begin, end in chat["prompt_token_offsets"]]
    assert pieces[:2] == ["<|im_start|>", "u"]
    assert pieces.count("é") == 2, "each of its bytes is a token that stands where the character does"
    for choice, prompt in zip(
        (await server.complete(["Hi", "you"], **body)).json()["choices"], ("Hi", "you"), strict=True
    ):
        assert choice["prompt_token_ids"] == ids(prompt)
        assert choice["prompt_text"] == prompt
        assert choice["prompt_token_offsets"] == [[i, i + 1] for i in range(len(prompt))]
        assert choice["token_ids"] == ids("He")
    given = (await server.complete([ids("Hi")], **body)).json()["choices"][0]
    assert (given["prompt_text"], given["prompt_token_offsets"]) == ("Hi", None)


async def test_streams_tell_of_the_prompt_once(server: Server) -> None:
    body = {"return_token_ids": True, "return_prompt_text": True, "stream": True}
    first, *others = await chunks(await server.chat(**body))
    assert (first["prompt_token_ids"], first["prompt_text"]) == (ids(HI), HI)
    assert not any("prompt_token_ids" in chunk for chunk in others)
    told = [token for chunk in others for token in chunk["choices"][0]["token_ids"] or []]
    assert told == [*ids("Hello world"), server.model.eos_token_ids[0]]
    first, *others = await chunks(await server.complete(**body))
    assert first["choices"][0]["prompt_token_ids"] == ids("Hi")
    assert not any(chunk["choices"][0]["prompt_token_ids"] for chunk in others)
    told = [token for chunk in (first, *others) for token in chunk["choices"][0]["token_ids"]]
    assert told == [*ids("Hello world"), server.model.eos_token_ids[0]]


async def test_tokens_are_named_by_their_ids_as_the_server_or_the_request_says() -> None:
    async with running(return_tokens_as_token_ids=True) as server:
        by_server = (await server.complete(logprobs=0, max_tokens=1)).json()["choices"][0]["logprobs"]["tokens"]
        body = {"return_tokens_as_token_ids": False}
        by_request = (await server.complete(logprobs=0, max_tokens=1, **body)).json()["choices"][0]["logprobs"][
            "tokens"
        ]
    assert (by_server, by_request) == ([f"token_id:{ids('H')[0]}"], ["H"])


# Cuts.


@given(st.lists(st.integers(), max_size=9), st.integers(0, 12), st.sampled_from(["left", "right"]))
def test_truncation_keeps_an_end(items: list[int], keep: int, side: Any) -> None:
    kept = truncate(items, CompletionRequest(truncation_side=side), keep)
    assert len(kept) == min(keep, len(items))
    assert kept == (items[len(items) - len(kept) :] if side == "left" else items[: len(kept)])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"truncate_prompt_tokens": 3}, "hij"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "abc"),
        ({"truncate_prompt_tokens": 10}, "abcdefghij"),
        ({"truncate_prompt_tokens": -1}, "abcdefghij"),
    ],
)
@pytest.mark.parametrize("as_ids", [False, True])
async def test_truncated_prompts(server: Server, body: dict[str, Any], expected: str, as_ids: bool) -> None:
    prompt = ids("abcdefghij") if as_ids else "abcdefghij"
    fields = {"return_token_offsets": True, "return_prompt_text": True}
    choice = (await server.complete(prompt, **body, **fields)).json()["choices"][0]
    assert server.fake.submitted[0].prompt == ids(expected)
    assert choice["prompt_text"] == expected
    if not as_ids:
        assert choice["prompt_token_offsets"][0][0] == "abcdefghij".index(expected[0])


async def test_what_fits_leaves_room_for_the_answer(server: Server) -> None:
    text = "".join(chr(97 + i % 26) for i in range(100_000))
    assert (await server.complete(text, truncate_prompt_tokens=-1, max_tokens=6)).status_code == 200
    assert server.fake.submitted[0].prompt == ids(text[-250:])
    assert (await server.chat(text, truncate_prompt_tokens=-1)).status_code == 200
    assert len(server.fake.submitted[1].prompt) == 255


# Streams, headers, templates.


@pytest.mark.parametrize("interval", [1, 2, 5, 100])
@pytest.mark.parametrize("by_request", [True, False])
async def test_stream_interval(interval: int, by_request: bool) -> None:
    async with running("x" * 11, stream_interval=1 if by_request else interval) as server:
        body = {"stream_interval": interval} if by_request else {}
        texts = [
            c["choices"][0]["text"] for c in await chunks(await server.complete(stream=True, max_tokens=12, **body))
        ]
    assert "".join(texts) == "x" * 11
    # The engine may be ahead of the stream, so there may be more in a chunk, but only the first and the last have less.
    sizes = [len(text) for text in texts]
    assert all(size >= interval for size in sizes[1:-1])
    assert len(sizes) <= 2 + 11 // interval


async def test_usage_can_be_forced_on_all_streams() -> None:
    async with running(force_include_usage=True) as server:
        told = await chunks(await server.chat(stream=True))
    assert all("usage" in chunk for chunk in told)
    assert told[-1]["choices"] == []


async def test_usage_tells_what_the_cache_gained() -> None:
    async with running(cache_block_size=16) as server:
        details = (await server.complete("x" * 40)).json()["usage"]["prompt_tokens_details"]
    assert details == {"cached_tokens": 16, "created_cache_tokens": 16, "multimodal_tokens": None}


async def test_priority_of_the_body_and_of_the_header() -> None:
    async with running(priority_scheduling=True) as server:
        await server.complete(priority=3)
        await server.client.post("/v1/completions", json={"prompt": "a"}, headers={"X-Vllm-Priority": "-4"})
        bad = await server.client.post("/v1/completions", json={"prompt": "a"}, headers={"X-Vllm-Priority": "high"})
    assert [request.params.priority for request in server.fake.submitted] == [3, -4]
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "priority")


async def test_request_ids_of_header_and_body(server: Server) -> None:
    headers = {"X-Request-Id": "from-header"}
    answer = await server.client.post("/v1/completions", json={"prompt": "a", "request_id": "b"}, headers=headers)
    assert answer.json()["id"] == "cmpl-from-header"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_a_template_in_the_request(path: str) -> None:
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    body = {"messages": [{"role": "user", "content": "Hi"}], "chat_template": template}
    async with running(trust_request_chat_template=True) as server:
        answer = (await server.post(path, return_token_ids=True, **body)).json()
        broken = await server.post(path, **{**body, "chat_template": "{% if"})
    assert answer.get("tokens", answer.get("prompt_token_ids")) == ids("[Hi]")
    assert (broken.status_code, broken.json()["error"]["param"]) == (400, "chat_template")
    async with running(template=CHATML) as server:
        assert (await server.post(path, **body)).status_code == 400


async def test_repetition_is_a_reason_to_finish(server: Server) -> None:
    server.fake.finish_reasons = {"length": "repetition"}
    choice = (await server.complete(max_tokens=3)).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("repetition", "repetition_detected")
    assert 'finished_reason="repetition"' in (await server.client.get("/metrics")).text


NEWER: dict[str, Any] = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "fast",
    "safety_identifier": "x",
    "prompt_cache_key": "y",
    "prompt_cache_retention": "24h",
    "verbosity": "low",
    "prediction": {"type": "content", "content": "Hello"},
    "modalities": ["text"],
    "web_search_options": {},
    "session_id": "s",
    "spaces_between_special_tokens": False,
    "moderation": {},
    "routed_experts_prompt_start": 0,
}


async def test_newer_fields_of_the_openai_client_are_taken(server: Server) -> None:
    response = await server.chat(**NEWER)
    assert response.status_code == 200, response.text


async def test_the_openai_client_finds_its_types(server: Server) -> None:
    client = openai.AsyncOpenAI(
        api_key="x", base_url="http://server/v1", http_client=server.client, _strict_response_validation=True
    )
    extra = {"return_token_ids": True, "prompt_logprobs": 1, "cache_salt": "me", "repetition_detection": {}}
    messages: Any = [{"role": "user", "content": "Hi"}]
    chat = await client.chat.completions.create(
        model="tiny", messages=messages, logprobs=True, top_logprobs=2, extra_body=extra
    )
    assert chat.choices[0].message.content == "Hello world"
    assert chat.choices[0].logprobs is not None
    text = await client.completions.create(model="tiny", prompt=["a", "b"], echo=True, max_tokens=0)
    assert [choice.text for choice in text.choices] == ["a", "b"]
    stream = await client.chat.completions.create(
        model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    usages = [chunk.usage async for chunk in stream]
    assert usages[-1] is not None
    assert usages[-1].prompt_tokens_details is not None
