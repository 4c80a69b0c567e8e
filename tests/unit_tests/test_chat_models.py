"""What ChatVLLM sends, and what it makes of the answers."""

from __future__ import annotations

import pickle
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError, ModelConnectionError
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.runnables import ConfigurableField
from pydantic import ValidationError

from langchain_vllm import ChatVLLM, _connection
from langchain_vllm._http import httpx
from langchain_vllm.errors import VLLMConnectionError, VLLMContextOverflowError
from tests.unit_tests.mock_server import URL, MockServer, completion, sse

MESSAGES = [
    SystemMessage(content="You are a helpful assistant that translates English to Italian."),
    HumanMessage(content="Translate the following sentence from English to Italian: I love programming."),
]


@pytest.fixture
def server() -> MockServer:
    return MockServer()


class TestOldPage:
    """The constructor and the call of the page that this package grew from."""

    def test_constructor(self, server: MockServer) -> None:
        chat = server.chat(
            base_url=None,
            model="mosaicml/mpt-7b",
            openai_api_key="EMPTY",
            openai_api_base="http://localhost:8000/v1",
            max_tokens=5,
            temperature=0,
        )
        assert chat.invoke(MESSAGES).content == "Ciao"
        assert str(server.requests[-1].url) == "http://localhost:8000/v1/chat/completions"
        assert server.headers["authorization"] == "Bearer EMPTY"
        assert server.body == {
            "model": "mosaicml/mpt-7b",
            "max_tokens": 5,
            "temperature": 0.0,
            "stream": False,
            "messages": [
                {"role": "system", "content": MESSAGES[0].content},
                {"role": "user", "content": MESSAGES[1].content},
            ],
        }

    def test_call(self, server: MockServer) -> None:
        with pytest.warns(DeprecationWarning, match=r"invoke\(messages\)"):
            message = server.chat()(MESSAGES)
        assert message.content == "Ciao"


class TestEnvironment:
    def test_base_url_and_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_API_BASE", "http://second/v1")
        assert ChatVLLM().openai_api_base == "http://second/v1"
        monkeypatch.setenv("VLLM_BASE_URL", "http://first/v1")
        monkeypatch.setenv("VLLM_API_KEY", "ours")
        chat = ChatVLLM()
        assert chat.openai_api_base == "http://first/v1"
        assert chat.openai_api_key is not None
        assert chat.openai_api_key.get_secret_value() == chat.root_client.api_key == "ours"
        assert ChatVLLM(base_url="http://argument/v1").openai_api_base == "http://argument/v1"

    @pytest.fixture
    def openai_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "ORGANIZATION", "PROJECT_ID"):
            monkeypatch.setenv(f"OPENAI_{name}", "theirs")
        for name in ("API_BASE", "BASE_URL", "PROXY"):
            monkeypatch.setenv(f"OPENAI_{name}", "http://theirs:1/v1")
        monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: theirs\nX-Theirs: theirs")
        # The LangSmith gateway, which the base class lets redirect even an explicit base_url.
        monkeypatch.setenv("LANGSMITH_GATEWAY", "true")
        monkeypatch.setenv("LANGSMITH_API_KEY", "lsv2_theirs")

    @pytest.mark.usefixtures("openai_user")
    def test_nothing_of_openai_reaches_the_server(self, server: MockServer) -> None:
        server.chat(default_headers={"X-Ours": "1"}).invoke("Hello")
        assert "theirs" not in str(list(server.headers.items()))
        assert server.headers["authorization"] == "Bearer EMPTY"
        assert server.headers["x-ours"] == "1"
        assert server.requests[-1].url.host == "vllm.test"

    @pytest.mark.usefixtures("openai_user")
    async def test_nothing_of_openai_reaches_the_server_async(self, server: MockServer) -> None:
        await server.chat().ainvoke("Hello")
        assert "theirs" not in str(list(server.headers.items()))

    def test_an_organization_given_is_sent(self, server: MockServer) -> None:
        server.chat(organization="ours").invoke("Hello")
        assert server.headers["openai-organization"] == "ours"

    def test_the_key_is_not_shown(self) -> None:
        chat = ChatVLLM(model="m", base_url=URL, api_key="hidden-key")
        assert "hidden-key" not in repr(chat) + str(chat) + str(chat.model_dump())

    def test_openai_model_names_are_nothing_special(self, server: MockServer) -> None:
        for model in ("o1-mini", "gpt-5", "codex", "gpt-6"):
            server.chat(model=model, temperature=0.3).invoke("Hello")
            assert server.requests[-1].url.path == "/v1/chat/completions"
            assert server.body["temperature"] == 0.3
        server.chat(model="o1").invoke("Hello")
        assert "temperature" not in server.body


class TestRequest:
    def test_vllm_fields_are_sent_as_they_are(self, server: MockServer) -> None:
        fields: dict[str, Any] = {
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "min_tokens": 3,
            "ignore_eos": True,
            "stop_token_ids": [1, 2],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        server.chat(**fields, extra_body={"priority": 1}).invoke("Hello")
        assert fields.items() <= server.body.items()
        assert server.body["priority"] == 1

    def test_fields_left_out_are_not_sent(self, server: MockServer) -> None:
        server.chat().invoke("Hello")
        assert set(server.body) == {"model", "messages", "stream"}

    def test_a_call_overrides_fields_one_by_one(self, server: MockServer) -> None:
        chat = server.chat(top_k=5, min_p=0.1, extra_body={"priority": 1, "cache_salt": "a"})
        chat.invoke("Hello", top_k=7, extra_body={"priority": 2})
        assert (server.body["top_k"], server.body["min_p"]) == (7, 0.1)
        assert (server.body["priority"], server.body["cache_salt"]) == (2, "a")
        chat.bind(min_p=0.5).invoke("Hello")
        assert (server.body["top_k"], server.body["min_p"]) == (5, 0.5)
        assert chat.extra_body == {"priority": 1, "cache_salt": "a"}

    def test_a_field_none_in_a_call_is_the_servers_default(self, server: MockServer) -> None:
        server.chat(top_k=5).invoke("Hello", top_k=None)
        assert "top_k" not in server.body

    def test_streams_ask_for_usage(self, server: MockServer) -> None:
        server.answers["/v1/chat/completions"] = (200, sse({"role": "assistant", "content": "Ciao"}))
        list(server.chat().stream("Hello"))
        assert server.body["stream_options"] == {"include_usage": True}

    @pytest.mark.parametrize(
        ("options", "message"), [({"n": 0}, "at least 1"), ({"n": 2, "streaming": True}, "must be 1")]
    )
    def test_bad_n(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            ChatVLLM(model="m", base_url=URL, **options)

    def test_configurable_fields(self, server: MockServer) -> None:
        chat = server.chat().configurable_fields(top_k=ConfigurableField(id="top_k"))
        chat.invoke("Hello", config={"configurable": {"top_k": 9}})
        assert server.body["top_k"] == 9


class TestAnswer:
    def test_usage_and_metadata(self, server: MockServer) -> None:
        message = server.chat().invoke("Hello")
        assert message.usage_metadata is not None
        assert message.usage_metadata["total_tokens"] == 7
        assert message.response_metadata["model_provider"] == "vllm"
        assert message.response_metadata["model_name"] == "m"
        assert message.response_metadata["finish_reason"] == "stop"
        assert server.chat()._get_ls_params()["ls_provider"] == "vllm"
        assert server.chat()._llm_type == "vllm-chat"

    async def test_stream(self, server: MockServer) -> None:
        deltas = [{"role": "assistant", "content": ""}, {"content": "Ci"}, {"content": "ao"}]
        server.answers["/v1/chat/completions"] = (200, sse(*deltas))
        chat = server.chat()
        for chunks in (list(chat.stream("Hello")), [chunk async for chunk in chat.astream("Hello")]):
            message = sum(chunks[1:], start=chunks[0])
            assert isinstance(message, AIMessageChunk)
            assert message.content == "Ciao"
            assert message.usage_metadata is not None
            assert message.usage_metadata["output_tokens"] == 2
            assert message.response_metadata["model_provider"] == "vllm"
            assert message.response_metadata["finish_reason"] == "stop"

    @pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
    async def test_reasoning(self, server: MockServer, name: str) -> None:
        server.answers["/v1/chat/completions"] = (200, completion(**{name: "Greeting."}))
        for message in (server.chat().invoke("Hello"), await server.chat().ainvoke("Hello")):
            assert message.additional_kwargs["reasoning_content"] == "Greeting."
            assert [block["type"] for block in message.content_blocks] == ["reasoning", "text"]

    @pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
    async def test_reasoning_in_streams(self, server: MockServer, name: str) -> None:
        deltas = [{"role": "assistant", name: "Gree"}, {name: "ting."}, {"content": "Ciao"}]
        server.answers["/v1/chat/completions"] = (200, sse(*deltas))
        chat = server.chat()
        for chunks in (list(chat.stream("Hello")), [chunk async for chunk in chat.astream("Hello")]):
            message = sum(chunks[1:], start=chunks[0])
            assert message.additional_kwargs["reasoning_content"] == "Greeting."
            assert message.content == "Ciao"

    def test_reasoning_of_every_choice(self, server: MockServer) -> None:
        body = completion(reasoning="one")
        body["choices"].append({**completion(reasoning="two")["choices"][0], "index": 1})
        server.answers["/v1/chat/completions"] = (200, body)
        generations = server.chat(n=2).generate([MESSAGES]).generations[0]
        assert [g.message.additional_kwargs["reasoning_content"] for g in generations] == ["one", "two"]  # type: ignore[union-attr]


class TestErrors:
    @pytest.fixture
    def too_long(self, server: MockServer) -> MockServer:
        message = "This model's maximum context length is 2048 tokens. However, you requested 3000 tokens."
        error = {"message": message, "type": "BadRequestError", "param": "input_tokens", "code": 400}
        server.answers["/v1/chat/completions"] = (400, {"error": error})
        return server

    async def test_context_overflow(self, too_long: MockServer) -> None:
        chat = too_long.chat()
        with pytest.raises(ContextOverflowError, match="maximum context length is 2048") as raised:
            chat.invoke("Hello")
        assert isinstance(raised.value, openai.BadRequestError)
        with pytest.raises(VLLMContextOverflowError):
            list(chat.stream("Hello"))
        with pytest.raises(VLLMContextOverflowError):
            await chat.ainvoke("Hello")
        with pytest.raises(VLLMContextOverflowError):
            _ = [chunk async for chunk in chat.astream("Hello")]

    def test_other_bad_requests_stay_what_they_are(self, server: MockServer) -> None:
        server.answers["/v1/chat/completions"] = (400, {"error": {"message": "top_k must be at least -1", "code": 400}})
        with pytest.raises(openai.BadRequestError, match="top_k") as raised:
            server.chat().invoke("Hello")
        assert not isinstance(raised.value, ContextOverflowError)

    def test_connection_refused_says_how_to_start_a_server(self, server: MockServer) -> None:
        server.answers["/v1/chat/completions"] = httpx.ConnectError("Connection refused")
        with pytest.raises(VLLMConnectionError, match="langchain-vllm serve MODEL") as raised:
            server.chat().invoke("Hello")
        assert "vllm.test:8000" in str(raised.value)
        assert "Connection refused" in str(raised.value)
        assert isinstance(raised.value, openai.APIConnectionError | ModelConnectionError)

    def test_timeouts_are_not_connection_errors(self, server: MockServer) -> None:
        server.answers["/v1/chat/completions"] = httpx.ReadTimeout("slow")
        with pytest.raises(openai.APITimeoutError):
            server.chat().invoke("Hello")


class TestModelDiscovery:
    def models(self, *names: str) -> tuple[int, dict[str, Any]]:
        return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}

    async def test_the_only_model_is_taken_and_asked_for_once(self, server: MockServer) -> None:
        server.answers["/v1/models"] = self.models("served")
        chat = server.chat(model=None)
        assert server.requests == []
        chat.invoke("Hello")
        assert server.body["model"] == "served"
        await chat.ainvoke("Hello")
        assert [request.url.path for request in server.requests].count("/v1/models") == 1

    def test_several_models_need_a_choice(self, server: MockServer) -> None:
        server.answers["/v1/models"] = self.models("one", "two")
        with pytest.raises(ValueError, match=r"\['one', 'two'\]: choose one with model="):
            server.chat(model=None).invoke("Hello")


class TestTokenCounting:
    @pytest.fixture
    def tokenizer(self, server: MockServer) -> MockServer:
        server.answers["/tokenize"] = (200, {"count": 3, "max_model_len": 2048, "tokens": [1, 2, 3]})
        return server

    def test_text(self, tokenizer: MockServer) -> None:
        assert tokenizer.chat().get_num_tokens("I love programming.") == 3
        assert tokenizer.body == {"model": "m", "prompt": "I love programming.", "add_special_tokens": False}

    def test_messages_with_tools(self, tokenizer: MockServer) -> None:
        tool = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
        assert tokenizer.chat().get_num_tokens_from_messages(MESSAGES, tools=[tool]) == 3
        assert [message["role"] for message in tokenizer.body["messages"]] == ["system", "user"]
        assert tokenizer.body["tools"][0]["function"]["name"] == "f"

    def test_the_templates_variables_count(self, tokenizer: MockServer) -> None:
        tokenizer.chat(chat_template_kwargs={"enable_thinking": False}).get_num_tokens_from_messages(MESSAGES)
        assert tokenizer.body["chat_template_kwargs"] == {"enable_thinking": False}

    def test_own_tokenizer(self, tokenizer: MockServer) -> None:
        assert tokenizer.chat(custom_get_token_ids=lambda text: [7] * len(text)).get_num_tokens("four") == 4
        assert tokenizer.requests == []


class TestManagedServer:
    """Nothing but a call may start a server."""

    @pytest.fixture(autouse=True)
    def no_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise AssertionError("a server was started")

        monkeypatch.setattr(_connection, "shared_server", fail)

    def test_everything_but_a_call_is_idle(self) -> None:
        chat = ChatVLLM(model="m", server_options={"max_model_len": 512}, max_tokens=5)
        assert chat.server is None
        assert "Connection" not in repr(chat)
        copy = chat.model_copy(update={"temperature": 0.5})
        assert copy.temperature == 0.5
        assert chat.bind(top_k=3)
        assert chat.model_dump()["server_options"] == {"max_model_len": 512}
        assert (
            chat._get_llm_string()
            == ChatVLLM(model="m", server_options={"max_model_len": 512}, max_tokens=5)._get_llm_string()
        )
        assert chat._get_ls_params()["ls_model_name"] == "m"

    async def test_every_kind_of_call_starts_it(self) -> None:
        chat = ChatVLLM(model="m")
        with pytest.raises(AssertionError, match="started"):
            chat.invoke("Hello")
        with pytest.raises(AssertionError, match="started"):
            next(chat.stream("Hello"))
        with pytest.raises(AssertionError, match="started"):
            await chat.ainvoke("Hello")
        with pytest.raises(AssertionError, match="started"):
            await anext(chat.astream("Hello"))
        with pytest.raises(AssertionError, match="started"):
            chat.get_num_tokens("Hello")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, r"Pass model= .* base_url= or VLLM_BASE_URL"),
            ({"model": "m", "server_options": {"max_len": 5}}, r"Unknown server_options \['max_len'\]; VLLMServer has"),
            ({"model": "m", "base_url": URL, "server_options": {"seed": 1}}, "server_options are for a managed server"),
        ],
    )
    def test_contradictions_are_told_at_once(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            ChatVLLM(**options)


def test_messages_can_be_pickled(server: MockServer) -> None:
    message = server.chat().invoke("Hello")
    assert pickle.loads(pickle.dumps(message)) == message
