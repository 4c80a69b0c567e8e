from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from langchain_vllm_server import reasoning, tool_parsers
from tests.server.fakes import Server, byte_tokenizer, prompt_text, running, spell, sse_data

HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


async def test_whole_answer_has_vllms_shape(server: Server) -> None:
    response = await server.chat(request_id="abc")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    timing, created = answer.pop("metrics"), answer.pop("created")
    assert isinstance(created, int)
    num_prompt = len(byte_tokenizer().encode(HI))
    assert answer == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello world",
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "reasoning": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
                "routed_experts": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": "langchain-vllm-1.2.3",
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": 12,
            "total_tokens": num_prompt + 12,
            "prompt_tokens_details": {"cached_tokens": 16, "multimodal_tokens": None},
            "completion_tokens_details": None,
        },
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
    }
    assert set(timing) == {
        "time_to_first_token_ms",
        "generation_time_ms",
        "queue_time_ms",
        "mean_itl_ms",
        "tokens_per_second",
        "speculative_decoding",
    }
    assert timing["tokens_per_second"] > 0


async def test_stream_is_role_then_text_then_reason_then_usage(server: Server) -> None:
    response = await server.chat(stream=True, stream_options={"include_usage": True}, model="alias", request_id="abc")
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done = sse_data(response.text)
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    first, *middle, last, usage = chunks
    common = {"id": "chatcmpl-abc", "object": "chat.completion.chunk", "created": first["created"], "model": "alias"}
    assert first == {
        **common,
        "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        ],
        "prompt_token_ids": None,
        "prompt_text": None,
    }
    for chunk in middle:
        (choice,) = chunk["choices"]
        assert chunk == {**common, "choices": [choice]}
        assert choice == {
            "index": 0,
            "delta": {"content": choice["delta"]["content"]},
            "logprobs": None,
            "token_ids": None,
            "finish_reason": None,
        }
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "Hello world"
    assert last == {
        **common,
        "choices": [
            {
                "index": 0,
                "delta": {},
                "logprobs": None,
                "token_ids": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
    }
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert usage["metrics"]["tokens_per_second"] > 0
    assert usage["system_fingerprint"] == "langchain-vllm-1.2.3"
    assert set(usage) == {*common, "choices", "usage", "metrics", "system_fingerprint"}


async def test_no_usage_chunk_unless_asked_for(server: Server) -> None:
    events = sse_data((await server.chat(stream=True)).text)
    told = [json.loads(event).get("system_fingerprint") for event in events[:-1]]
    assert told == [None] * (len(told) - 1) + ["langchain-vllm-1.2.3"]
    assert not any("usage" in event for event in events)
    assert events[-1] == "[DONE]"


async def test_continuous_usage_counts_up(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = sse_data((await server.chat(stream=True, stream_options=options)).text)
    counts = [json.loads(event)["usage"]["completion_tokens"] for event in events[:-1]]
    *counts, last, of_usage_chunk = counts
    assert counts[0] == 0, "the role is not a token"
    assert all(before < after for before, after in pairwise([*counts, last]))
    assert last == of_usage_chunk == 12


async def test_continuous_usage_is_part_of_the_usage(server: Server) -> None:
    options = {"include_usage": False, "continuous_usage_stats": True}
    assert "usage" not in (await server.chat(stream=True, stream_options=options)).text


async def test_prompt_is_the_rendered_template_without_further_special_tokens(server: Server) -> None:
    await server.chat()
    assert prompt_text(server) == HI


async def test_max_tokens_defaults_to_the_rest_of_the_context(server: Server) -> None:
    await server.chat()
    request = server.fake.submitted[0]
    assert request.params.max_tokens == 256 - len(request.prompt)


@pytest.mark.parametrize(
    "body", [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}]
)
async def test_length_limit(server: Server, body: dict[str, Any]) -> None:
    answer = (await server.chat(**body)).json()
    assert answer["choices"][0]["message"]["content"] == "Hel"
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_max_tokens_beyond_the_remaining_context_is_clamped(server: Server) -> None:
    assert (await server.chat(max_tokens=250)).status_code == 200
    request = server.fake.submitted[0]
    assert request.params.max_tokens == 256 - len(request.prompt) < 250


async def test_generation_config_gives_the_defaults_and_requests_override_them() -> None:
    defaults = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 4}
    defaults |= {"presence_penalty": 0.3, "frequency_penalty": 0.4}
    async with running(sampling_defaults=defaults) as server:
        assert (await server.chat()).json()["choices"][0]["message"]["content"] == "Hell"
        await server.chat(temperature=0, top_k=-1, max_tokens=2, presence_penalty=0)
        assert (await server.chat(max_tokens=9)).json()["usage"]["completion_tokens"] == 4, (
            "max_new_tokens is a limit too"
        )
    given, overridden, _ = (request.params for request in server.fake.submitted)
    assert (given.temperature, given.top_k, given.top_p, given.repetition_penalty) == (0.5, 7, 0.9, 1.1)
    assert (given.presence_penalty, given.frequency_penalty) == (0.3, 0.4)
    assert (overridden.temperature, overridden.top_k, overridden.max_tokens) == (0, 0, 2)
    assert (overridden.presence_penalty, overridden.frequency_penalty) == (0, 0.4)


async def test_every_sampling_field_reaches_the_engine() -> None:
    body = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 9,
        "min_p": 0.05,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.2,
        "repetition_penalty": 1.3,
        "logit_bias": {"5": 300, "6": -1},
        "seed": 42,
        "max_tokens": 8,
        "min_tokens": 2,
        "stop_token_ids": [3],
        "allowed_token_ids": [1, 2, 1],
        "bad_words": [" no"],
        "repetition_detection": {"max_pattern_size": 5, "min_count": 3},
        "cache_salt": "mine",
        "priority": -7,
        "prompt_logprobs": 1,
        "logprob_token_ids": [8, 9],
        "logprobs": True,
        "top_logprobs": 2,
    }
    async with running(priority_scheduling=True) as server:
        response = await server.chat(**body)
    assert response.status_code == 200, response.text
    params = vars(server.fake.submitted[0].params)
    eos = server.model.eos_token_ids[0]
    expected = {k: v for k, v in body.items() if k not in ("logprobs", "top_logprobs", "prompt_logprobs")}
    assert params.pop("pooling") == ""
    assert params.pop("eager") is False  # the answer is not streamed
    assert params == {
        **expected,
        "allowed_token_ids": [1, 2],
        "bad_words": [byte_tokenizer().encode(word) for word in ("no", " no")],
        "num_prompt_logprobs": 1,
        "repetition_detection": (5, 1, 3),
        "logit_bias": [(5, 100.0), (6, -1.0)],
        "num_logprobs": 2,
        "stop_token_ids": [3, eos],
    }


async def test_ignore_eos_leaves_only_the_requests_stop_tokens(server: Server) -> None:
    answer = (await server.chat(ignore_eos=True, max_tokens=20)).json()
    assert server.fake.submitted[0].params.stop_token_ids == []
    assert answer["choices"][0]["message"]["content"] == "Hello world" + "." * 8


async def test_tiny_temperatures_are_raised_as_vllm_does(server: Server) -> None:
    await server.chat(temperature=0.001)
    assert server.fake.submitted[0].params.temperature == 0.01


async def test_n_choices_have_the_seeds_after_the_first(server: Server) -> None:
    answer = (await server.chat(n=3, seed=-5)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [request.params.seed for request in server.fake.submitted] == [2**64 - 5, 2**64 - 4, 2**64 - 3]
    assert answer["usage"]["completion_tokens"] == 36
    assert answer["usage"]["prompt_tokens"] == len(server.fake.submitted[0].prompt)
    assert answer["metrics"] is None


async def test_requests_without_seed_differ(server: Server) -> None:
    await server.chat(n=2)
    await server.chat(seed=-1)
    assert len({request.params.seed for request in server.fake.submitted}) == 3


async def test_n_choices_stream_interleaved(server: Server) -> None:
    events = sse_data((await server.chat(n=2, stream=True)).text)
    assert all('"role"' in event for event in events[:2]), "all roles come first"
    texts, roles, reasons = ["", ""], [0, 0], []
    for event in events[:-1]:
        (choice,) = json.loads(event)["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles[choice["index"]] += "role" in choice["delta"]
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert (texts, roles, reasons) == (["Hello world"] * 2, [1, 1], ["stop", "stop"])


async def test_stop_string_ends_the_request_and_cancels_it_in_the_engine(server: Server) -> None:
    answer = (await server.chat(stop=["o w", "zzz"])).json()
    choice = answer["choices"][0]
    assert choice["message"]["content"] == "Hell"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "o w")
    assert answer["usage"]["completion_tokens"] == 7
    assert server.fake.cancelled == [server.fake.submitted[0].id]


async def test_stop_string_can_be_included(server: Server) -> None:
    answer = (await server.chat(stop="wor", include_stop_str_in_output=True)).json()
    assert answer["choices"][0]["message"]["content"] == "Hello wor"


async def test_min_tokens_hold_stop_strings_off(server: Server) -> None:
    answer = (await server.chat(stop="l", min_tokens=4)).json()
    assert answer["choices"][0]["message"]["content"] == "Hello wor"


async def test_stop_token_of_the_request_is_named_and_its_text_left_out(server: Server) -> None:
    token = byte_tokenizer().encode("w")[0]
    choice = (await server.chat(stop_token_ids=[token])).json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Hello ", token)
    choice = (await server.chat(stop_token_ids=[token], include_stop_str_in_output=True)).json()["choices"][0]
    assert choice["message"]["content"] == "Hello w"


async def test_logprobs_have_bytes_and_the_most_likely_tokens(server: Server) -> None:
    content = (await server.chat(logprobs=True, top_logprobs=2, max_tokens=2)).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert [entry["token"] for entry in content] == ["H", "e"]
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "I", "logprob": -1.5, "bytes": [73]},
        ],
    }


async def test_logprobs_alone_and_as_token_ids(server: Server) -> None:
    body = {"logprobs": True, "max_tokens": 1, "return_tokens_as_token_ids": True}
    (entry,) = (await server.chat(**body)).json()["choices"][0]["logprobs"]["content"]
    token = byte_tokenizer().encode("H")[0]
    assert (entry["token"], entry["top_logprobs"]) == (f"token_id:{token}", [])


async def test_streamed_logprobs_are_those_of_the_whole_answer(server: Server) -> None:
    body = {"logprobs": True, "top_logprobs": 1, "stop": "orl"}
    whole = (await server.chat(**body)).json()["choices"][0]["logprobs"]["content"]
    events = [json.loads(event) for event in sse_data((await server.chat(stream=True, **body)).text)[:-1]]
    streamed = [event["choices"][0]["logprobs"] for event in events]
    assert [entry for part in streamed if part for entry in part["content"]] == whole


@pytest.mark.parametrize("text", ["naïve — 日本語 🎉", "🎉" * 5])
async def test_streamed_text_never_splits_a_character(text: str) -> None:
    async with running(text) as server:
        events = sse_data((await server.chat(stream=True)).text)
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


async def test_unfinished_character_at_the_end_is_replaced() -> None:
    async with running("a🎉") as server:
        assert (await server.chat(max_tokens=3)).json()["choices"][0]["message"]["content"] == "a\ufffd"


async def test_answers_do_not_wait_for_each_other() -> None:
    def by_prompt(prompt: Any, _params: Any) -> list[int]:
        return spell("long " * 20 if len(prompt) > len(byte_tokenizer().encode(HI)) else "short")(prompt, None)

    async with running(by_prompt, max_model_len=1024) as server:
        long, short = await server.chat("Hello"), await server.chat("Hi")
    assert long.json()["choices"][0]["message"]["content"] == "long " * 20
    assert short.json()["choices"][0]["message"]["content"] == "short"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_and_calls_of_a_model_that_was_trained_for_them(stream: bool) -> None:
    answer = '<think>hm</think>\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    formats = {"tool_format": tool_parsers.BY_NAME["hermes"], "reasoning_format": reasoning.THINK}
    async with running(answer, **formats) as server:
        body = {"messages": [{"role": "user", "content": "q"}], "tools": [TOOL], "stream": stream, "max_tokens": 200}
        response = await server.post("/v1/chat/completions", **body)
    if stream:
        chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        reasoned = "".join(delta.get("reasoning", "") for delta in deltas)
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert [call.get("id") is not None for call in calls] == [True] + [False] * (len(calls) - 1)
        name, arguments = calls[0]["function"]["name"], "".join(call["function"]["arguments"] for call in calls)
        finish_reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        reasoned, finish_reason = choice["message"]["reasoning"], choice["finish_reason"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        assert choice["message"]["content"] is None
        count = response.json()["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert count == len(">hm</think>")  # a mark is open with its last token; here each letter is one
    assert (reasoned, name, json.loads(arguments), finish_reason) == ("hm", "f", {"a": 1}, "tool_calls")


async def test_reasoning_can_be_hidden_or_told_twice() -> None:
    body = {"messages": [{"role": "user", "content": "q"}]}
    async with running("<think>hm</think>x", reasoning_format=reasoning.THINK, reasoning_content=True) as server:
        shown = await server.post("/v1/chat/completions", **body)
        hidden = await server.post("/v1/chat/completions", **body, include_reasoning=False)
    message = shown.json()["choices"][0]["message"]
    assert (message["reasoning"], message["reasoning_content"], message["content"]) == ("hm", "hm", "x")
    message = hidden.json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (None, "x")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]}, "tools"),
    ],
)
async def test_what_this_model_cannot_do(fields: dict[str, Any], param: str) -> None:
    async with running("x", tool_format=tool_parsers.BY_NAME["pythonic"]) as server:
        response = await server.post("/v1/chat/completions", messages=[{"role": "user", "content": "q"}], **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
