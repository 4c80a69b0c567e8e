from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from langchain_vllm_server.gate import Gate, Progress
from tests.server.fakes import MAX_BODY_BYTES, Server, running, sse_data, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def check_envelope(response: Any, status: int, type_: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert type_ is None or error["type"] == type_
    return error


# Path, fields, the parameter that is named, part of the message.
REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    *(
        (path, fields, param, text)
        for path in (CHAT, TEXT)
        for fields, param, text in (
            ({"temperature": -1}, "temperature", "must be in [0, 2], got -1"),
            ({"temperature": 2.1}, "temperature", "must be in [0, 2], got 2.1"),
            ({"top_p": 0}, "top_p", "must be in (0, 1], got 0"),
            ({"top_p": 1.1}, "top_p", "must be in (0, 1], got 1.1"),
            ({"top_k": -2}, "top_k", "must be 0 (disable), or at least 1, got -2"),
            ({"min_p": -0.1}, "min_p", "must be in [0, 1]"),
            ({"min_p": 1.1}, "min_p", "must be in [0, 1]"),
            ({"presence_penalty": 2.1}, "presence_penalty", "must be in [-2, 2]"),
            ({"frequency_penalty": -2.1}, "frequency_penalty", "must be in [-2, 2]"),
            ({"repetition_penalty": 0}, "repetition_penalty", "must be greater than zero"),
            ({"n": 0}, "n", "must be at least 1"),
            ({"n": 16385}, "n", "must be at most 16384"),
            ({"n": 2, "temperature": 0}, "n", "n must be 1 when using greedy sampling, got 2."),
            ({"stop": ""}, "stop", "stop cannot contain an empty string."),
            ({"stop": ["a", ""]}, "stop", "stop cannot contain an empty string."),
            ({"stop_token_ids": [10**6]}, "stop_token_ids", "out-of-vocab"),
            ({"max_tokens": 0}, "max_tokens", "must be at least 1"),
            ({"max_tokens": -1}, "max_tokens", "must be at least 1"),
            ({"max_tokens": 257}, "max_tokens", "maximum context length of 256"),
            ({"max_tokens": 10**30}, "max_tokens", "maximum context length of 256"),
            ({"min_tokens": -1}, "min_tokens", "must be greater than or equal to 0"),
            ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "less than or equal to max_tokens=8"),
            ({"seed": 2**63}, "seed", "64-bit"),
            ({"logit_bias": {"x": 1, "1": 1, "y": 1}}, "logit_bias", "token ids, got x, y"),
            ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
            ({"stop": ["a"] * 65}, "stop", "at most 64"),
            ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "at most 1024"),
            ({"logit_bias": {"1000000": 1}}, "logit_bias", "out-of-vocab"),
            ({"stream_options": {"include_usage": True}}, "stream_options", "`stream=True`"),
            # types
            ({"temperature": "hot"}, "temperature", "Expected `float"),
            ({"n": 1.5}, "n", "Expected `int`"),
            ({"stop": [1]}, "stop[0]", "Expected `str`"),
            ({"stream": "maybe"}, "stream", "Expected `bool`"),
            ({"stream_options": 3, "stream": True}, "stream_options", "Expected `object"),
            ({"logit_bias": {"1": "a"}}, "logit_bias", "Expected `float`"),
            # what this version does not build is refused, not ignored
            ({"best_of": 2}, "best_of", "ask for `n` answers"),
            ({"watermarking": True}, "watermarking", "leave it out"),
            # what is to be sampled
            ({"bad_words": ["a", " "]}, "bad_words", "cannot contain an empty string"),
            ({"bad_words": ["a"] * 1025}, "bad_words", "at most 1024"),
            ({"allowed_token_ids": []}, "allowed_token_ids", "at least one token id"),
            ({"allowed_token_ids": [-1]}, "allowed_token_ids", "out-of-vocab"),
            ({"repetition_detection": {"max_pattern_size": 5}}, "repetition_detection", "min_count must be at least 2"),
            ({"repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 3}}, "repetition_detection", "<="),
            ({"repetition_detection": {"max_pattern_size": 1025, "min_count": 2}}, "repetition_detection", "1024"),
            ({"prompt_logprobs": -2}, "prompt_logprobs", "must be a positive value or -1"),
            ({"prompt_logprobs": 21}, "prompt_logprobs", "Requested prompt logprobs of 21, which is greater than max"),
            ({"prompt_logprobs": -1}, "prompt_logprobs", "--max-logprobs"),
            ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "not available when `stream=True`"),
            ({"logprob_token_ids": [1]}, "logprob_token_ids", "`logprobs` must be set"),
            ({"logprob_token_ids": [1] * 129}, "logprob_token_ids", "at most 128"),
            ({"use_beam_search": True, "n": 65}, "n", "at most 64"),
            ({"use_beam_search": True, "logit_bias": {"1": 2}}, "logit_bias", "no effect on beam search"),
            ({"use_beam_search": True, "length_penalty": "x"}, "length_penalty", "Expected `float"),
            # what surrounds it
            ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
            ({"truncate_prompt_tokens": 257}, "truncate_prompt_tokens", "greater than max_model_len"),
            ({"truncation_side": "middle"}, "truncation_side", "Invalid enum value 'middle'"),
            ({"stream_interval": 0}, "stream_interval", "at least 1"),
            ({"cache_salt": ""}, "cache_salt", "1 to 128 characters"),
            ({"cache_salt": "a" * 129}, "cache_salt", "1 to 128 characters"),
            ({"cache_salt": "a/b"}, "cache_salt", "none of them @, /"),
            ({"priority": 1}, "priority", "--scheduling-policy priority"),
            ({"priority": 2**63}, "priority", "64-bit"),
        )
    ),
    (TEXT, {"suffix": "x"}, "suffix", "cannot fill in the middle"),
    (TEXT, {"prompt_embeds": "x"}, "prompt_embeds", "text or token ids"),
    (TEXT, {"prompt": None, "prompt_embeds": []}, "prompt", "must be provided and non-empty."),
    (TEXT, {"prompt": ""}, "prompt", "Either prompt or prompt_embeds must be provided and non-empty."),
    (TEXT, {"prompt": [10**6]}, "prompt", "out of vocabulary"),
    (TEXT, {"prompt": "Hi", "truncate_prompt_tokens": 0}, "prompt", "non-empty"),
    (TEXT, {"echo": True, "max_tokens": 0, "logprobs": 1, "logprob_token_ids": [1]}, "logprob_token_ids", "no output"),
    (TEXT, {"use_beam_search": True, "stream": True}, "stream", "Beam search cannot be streamed"),
    (TEXT, {"use_beam_search": True, "echo": True, "logprobs": 1}, "echo", "not supported with beam search"),
    (TEXT, {"use_beam_search": True, "echo": True, "max_tokens": 0}, "echo", "not supported with beam search"),
    (TEXT, {"logprobs": 21}, "logprobs", "Requested sample logprobs of 21, which is greater than max allowed: 20"),
    (TEXT, {"logprobs": -1}, "logprobs", "--max-logprobs"),
    (TEXT, {"logprobs": -2}, "logprobs", "must be a positive value or -1"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "greater than max allowed: 20"),
    (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs", "--max-logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": -2}, "top_logprobs", "must be a positive value or -1"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "`logprobs` must be set to true"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "must be at least 1"),
    (CHAT, {"tools": []}, "tools", "empty"),
    (CHAT, {"tool_choice": "auto"}, "tool_choice", "`tools` must be set"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools", "needs a `function`"),
    (CHAT, {"tools": [{"type": "function"}], "tool_choice": "required"}, "tools", "needs a `function`"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions", "not supported"),
    (CHAT, {"chat_template": "{{ 1 }}"}, "chat_template", "--trust-request-chat-template is not set"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "field of the request"),
    (CHAT, {"continue_final_message": True}, "continue_final_message", "Cannot set both"),
    (CHAT, {"messages": []}, "messages", "empty"),
    (CHAT, {"messages": None}, "messages", "required"),
    (CHAT, {"messages": "Hi"}, "messages", "Expected `array`"),
    (CHAT, {"messages": [{"content": "Hi"}]}, "messages[0].role", "required"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "Expected"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'image_url'"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages", "only text"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "without its text"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages", "`function`"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}, "input_tokens", "maximum context length is 256"),
]


@pytest.mark.parametrize(("path", "fields", "param", "text"), REFUSED)
async def test_bad_requests_are_named_and_the_next_is_served(
    server: Server, path: str, fields: dict[str, Any], param: str | None, text: str
) -> None:
    good: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    error = check_envelope(await server.post(path, **{**good, **fields}), 400)
    assert text in error["message"]
    assert error["param"] == param
    assert server.fake.submitted == []
    assert (await server.post(path, **good)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_refuses_is_a_400_before_the_stream_begins(stream: bool) -> None:
    def refuse(_prompt: Any, _params: Any) -> list[int]:
        raise ValueError("max_tokens: the cache has room for 10 tokens")

    async with running(refuse) as server:
        error = check_envelope(await server.chat(stream=stream), 400, "BadRequestError")
    assert "room for 10" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}, "echo": False, "bad_words": [], "priority": 0, "best_of": 1},
        {"user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "parallel_tool_calls": True},
        {"temperature": None, "stop": None, "n": None, "logit_bias": None, "tools": None, "structured_outputs": None},
        {"temperature": 1, "top_p": 1, "seed": 3, "frequency_penalty": 0, "max_tokens": 5.0, "min_p": 0, "stop": []},
        {"tool_choice": "none"},
    ],
)
async def test_values_that_ask_for_nothing_are_fine(
    server: Server, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert (await server.chat(**fields)).status_code == 200
    assert caplog.records == []


async def test_unknown_fields_are_accepted_with_a_warning(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert (await server.chat(temprature=0.5)).status_code == 200
    assert "temprature" in caplog.text


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": "a", "n": NaN}'])
async def test_bodies_that_are_not_json_objects(server: Server, body: bytes) -> None:
    response = await server.client.post(TEXT, content=body, headers={"content-type": "application/json"})
    check_envelope(response, 400, "Bad Request")


async def test_lone_surrogates_are_refused(server: Server) -> None:
    headers = {"content-type": "application/json"}
    response = await server.client.post(TEXT, content=b'{"prompt": "a\\ud800b"}', headers=headers)
    check_envelope(response, 400)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_other_content_types_are_refused(server: Server, content_type: str) -> None:
    response = await server.client.post(TEXT, content=b'{"prompt": "a"}', headers={"content-type": content_type})
    assert "application/json" in check_envelope(response, 400)["message"]


async def test_bodies_have_a_limit(server: Server) -> None:
    check_envelope(await server.complete("x" * MAX_BODY_BYTES), 413, "RequestTooLargeError")


async def test_unknown_models_and_routes(server: Server) -> None:
    error = check_envelope(await server.chat(model="gpt-5"), 404, "NotFoundError")
    assert error["message"] == "The model `gpt-5` does not exist. Valid aliases: `tiny`, `alias`."
    assert error["param"] == "model"
    check_envelope(await server.complete(model="gpt-5"), 404)
    check_envelope(await server.client.get("/v1/nothing"), 404, "NotFoundError")
    response = await server.client.get(CHAT)
    check_envelope(response, 405)
    assert response.headers["allow"] == "POST"


async def test_models(server: Server) -> None:
    answer = (await server.client.get("/v1/models")).json()
    assert answer["object"] == "list"
    assert [card["id"] for card in answer["data"]] == ["tiny", "alias"]
    card = answer["data"][0]
    assert (card["object"], card["owned_by"], card["root"], card["max_model_len"]) == (
        "model",
        "vllm",
        "/models/tiny",
        256,
    )
    assert card["permission"][0]["id"].startswith("modelperm-")
    assert (await server.client.get("/v1/models/alias")).json()["id"] == "alias"
    check_envelope(await server.client.get("/v1/models/org/other"), 404)


async def test_version_and_health(server: Server) -> None:
    assert (await server.client.get("/version")).json() == {"version": "1.2.3"}
    for response in (await server.client.get("/health"), await server.client.post("/ping")):
        assert (response.status_code, response.content, response.headers["x-device"]) == (200, b"", "fake")


async def test_api_keys_guard_all_but_health() -> None:
    async with running(api_keys=["first", "second"]) as server:
        get = server.client.get
        assert (await get("/health")).status_code == (await get("/ping")).status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/nothing", "/tokenize"):
            check_envelope(await get(path), 401, "AuthenticationError")
        for bad in (
            "",
            "first",
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            "Basic first",
            "Bearer firstsecond",
            "Bearer \xff",
        ):
            headers = [(b"authorization", bad.encode("latin-1"))]
            check_envelope(await get("/v1/models", headers=headers), 401)
        for good in ("Bearer first", "bearer second", "Bearer  first "):
            assert (await get("/v1/models", headers={"authorization": good})).status_code == 200


async def test_internal_errors_stay_inside(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any) -> None:
        raise AssertionError("secret detail")

    monkeypatch.setattr(server.fake, "stats", explode)
    response = await server.client.get("/metrics")
    assert "secret" not in response.text
    check_envelope(response, 500, "InternalServerError")


async def test_a_dead_engine_fails_open_requests_and_health() -> None:
    async with running("x" * 1000, max_model_len=4096, step_seconds=0.001) as server:
        whole = asyncio.create_task(server.chat())
        stream = asyncio.create_task(server.chat(stream=True))
        await until(lambda: len(server.fake.submitted) == 2 and all(r.output for r in server.fake.submitted))
        server.fake.die("cosmic ray")
        assert "cosmic ray" in check_envelope(await whole, 500, "InternalServerError")["message"]
        *_, error, done = sse_data((await stream).text)
        assert "cosmic ray" in json.loads(error)["error"]["message"]
        assert (done, (await stream).status_code) == ("[DONE]", 200)
        health = await server.client.get("/health")
        assert (health.status_code, health.json()["error"]) == (503, "cosmic ray")
        check_envelope(await server.chat(), 500)


class Connection:
    """A client that may hang up, on the bare ASGI interface."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self.hung_up = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.may_send = asyncio.Event()
        self.may_send.set()

    async def receive(self) -> dict[str, Any]:
        if self._incoming:
            return self._incoming.pop()
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self.may_send.wait()
        self.sent.append(message)

    async def run(self, app: Any, path: str) -> None:
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        await app({**scope, "headers": [(b"content-type", b"application/json")]}, self.receive, self.send)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 2])
async def test_hanging_up_cancels_in_the_engine(stream: bool, n: int) -> None:
    async with running("x" * 1000, max_model_len=4096, step_seconds=0.001) as server:
        connection = Connection({"prompt": "Hi", "stream": stream, "max_tokens": 1000, "n": n})
        request = asyncio.create_task(connection.run(server.app, TEXT))
        await until(lambda: len(server.fake.submitted) == n and all(r.output for r in server.fake.submitted))
        connection.hung_up.set()
        async with asyncio.timeout(1):
            await request
        assert server.fake.cancelled == [r.id for r in server.fake.submitted]
        assert all(len(r.output) < 1000 for r in server.fake.submitted)
        assert f'finished_reason="abort",engine="0",model_name="tiny"}} {float(n)}' in server.service.metrics.render(
            server.engine.stats(), server.engine.rejections
        )


async def test_hanging_up_before_the_first_byte_cancels() -> None:
    async with running("x" * 1000, max_model_len=4096, step_seconds=0.001) as server:
        connection = Connection({"prompt": "Hi", "stream": True, "max_tokens": 1000})
        connection.may_send.clear()
        request = asyncio.create_task(connection.run(server.app, TEXT))
        await until(lambda: bool(server.fake.submitted))
        connection.hung_up.set()
        async with asyncio.timeout(1):
            await request
        assert server.fake.cancelled == [1]


async def test_a_slow_reader_finds_everything_in_one_piece() -> None:
    async with running("word " * 20) as server:
        connection = Connection({"prompt": "Hi", "stream": True, "max_tokens": 100, "logprobs": 0})
        connection.may_send.clear()
        request = asyncio.create_task(connection.run(server.app, TEXT))
        await until(lambda: bool(server.fake.submitted) and len(server.fake.submitted[0].output) == 100)
        connection.may_send.set()
        await request
    chunks = [json.loads(e) for e in sse_data(b"".join(m.get("body", b"") for m in connection.sent).decode())[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "word " * 20
    assert len(chunks) < 10
    assert [t for chunk in chunks for t in chunk["choices"][0]["logprobs"]["tokens"]] == list("word " * 20)


async def test_while_loading_health_tells_and_all_else_says_come_back() -> None:
    class Weights:
        bytes_done, bytes_total = 30, 120

    progress = Progress()
    gate = Gate(progress)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://server") as client:
        progress.enter("loading weights", Weights())
        health = await client.get("/health")
        assert health.status_code == 503
        assert health.json() == {"status": "loading", "phase": "loading weights", "progress": 0.25}
        other = await client.post(CHAT, json={})
        check_envelope(other, 503)
        assert other.headers["retry-after"] == "1"
        async with running() as server:
            gate.app = server.app
            assert (await client.get("/health")).status_code == 200
