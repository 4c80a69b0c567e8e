"""ChatVLLM on our own server with a real model."""

from __future__ import annotations

import asyncio
import gc
import re
from typing import TYPE_CHECKING
from urllib.request import urlopen

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate

from langchain_vllm import ChatVLLM, _shared
from langchain_vllm.launcher import VLLMServer, VLLMServerError
from tests.integration_tests.conftest import MODEL
from tests.integration_tests.fakes import alive, eventually

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_core.messages import BaseMessage

MESSAGES: list[BaseMessage] = [
    SystemMessage(content="You are a helpful assistant that translates English to Italian."),
    HumanMessage(content="Translate the following sentence from English to Italian: I love programming."),
]


def text(message: BaseMessage) -> str:
    assert isinstance(message.content, str)
    assert message.content
    return message.content


async def test_all_ways_to_ask_give_the_same_answer(llm: ChatVLLM) -> None:
    answer = text(llm.invoke(MESSAGES))
    assert "".join(chunk.text for chunk in llm.stream(MESSAGES)) == answer
    assert [text(message) for message in llm.batch([MESSAGES] * 3)] == [answer] * 3
    assert text(await llm.ainvoke(MESSAGES)) == answer
    assert "".join([chunk.text async for chunk in llm.astream(MESSAGES)]) == answer
    assert [text(message) for message in await llm.abatch([MESSAGES] * 3)] == [answer] * 3


def test_streams_come_in_pieces(llm: ChatVLLM) -> None:
    assert len([chunk for chunk in llm.stream(MESSAGES) if chunk.text]) > 5


def test_usage(llm: ChatVLLM) -> None:
    message = llm.invoke(MESSAGES)
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] <= 24
    assert message.usage_metadata["input_tokens"] == llm.get_num_tokens_from_messages(MESSAGES)
    assert message.response_metadata["model_provider"] == "vllm"
    assert message.response_metadata["model_name"] == MODEL
    streamed = [chunk.usage_metadata for chunk in llm.stream(MESSAGES) if chunk.usage_metadata]
    assert [usage["output_tokens"] for usage in streamed] == [message.usage_metadata["output_tokens"]]


def test_the_old_pages_constructor_and_call(server: VLLMServer) -> None:
    chat = ChatVLLM(
        model=MODEL,
        openai_api_key="EMPTY",
        openai_api_base=server.base_url,
        max_tokens=5,
        temperature=0,
    )
    with pytest.warns(DeprecationWarning, match="invoke"):
        message = chat(MESSAGES)
    assert isinstance(message, AIMessage)
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] == 5
    assert message.response_metadata["finish_reason"] == "length"


def test_a_chain(llm: ChatVLLM) -> None:
    prompt = ChatPromptTemplate.from_messages(
        [("system", "You translate {input_language} to {output_language}."), ("human", "{text}")]
    )
    values = {"input_language": "English", "output_language": "Italian", "text": "I love programming."}
    assert text((prompt | llm).invoke(values))


def test_the_model_is_found_out(llm: ChatVLLM) -> None:
    with VLLMServer(MODEL, max_model_len=256, threads=1) as server:
        chat = ChatVLLM(base_url=server.base_url, temperature=0, max_tokens=24)
        assert text(chat.invoke(MESSAGES)) == text(llm.invoke(MESSAGES))


def test_sampling_parameters_arrive(llm: ChatVLLM) -> None:
    greedy = text(llm.invoke(MESSAGES))
    assert text(llm.invoke(MESSAGES, temperature=1.5, top_k=1)) == greedy
    seeded = [text(llm.invoke(MESSAGES, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1]
    assert seeded[0] != seeded[2]
    forced = llm.invoke(MESSAGES, ignore_eos=True, max_tokens=64)
    assert forced.usage_metadata is not None
    assert forced.usage_metadata["output_tokens"] == 64


def test_stop(llm: ChatVLLM) -> None:
    answer = text(llm.invoke(MESSAGES))
    word = answer.split()[1]
    assert text(llm.invoke(MESSAGES, stop=[word])) == answer[: answer.index(word)]


def running(server: VLLMServer) -> float:
    with urlopen(server.base_url.replace("/v1", "/metrics")) as answer:
        found = re.search(r"^vllm:num_requests_running(?:\{.*?\})? (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found
    return float(found[1])


async def test_a_closed_stream_ends_the_request(llm: ChatVLLM, server: VLLMServer) -> None:
    endless = llm.bind(ignore_eos=True, max_tokens=1500)
    stream = endless.stream(MESSAGES)
    next(stream)
    assert running(server) == 1
    stream.close()  # type: ignore[attr-defined]
    assert eventually(lambda: running(server) == 0, seconds=2)
    astream = endless.astream(MESSAGES)
    await anext(astream)
    assert running(server) == 1
    await astream.aclose()  # type: ignore[attr-defined]
    assert await asyncio.to_thread(eventually, lambda: running(server) == 0, seconds=2)


def test_tokens(llm: ChatVLLM) -> None:
    sentence = "I love programming."
    tokens = llm.get_token_ids(sentence)
    assert llm.get_num_tokens(sentence) == len(tokens) > 3
    assert tokens == llm.get_token_ids(sentence)


def test_context_overflow(llm: ChatVLLM) -> None:
    with pytest.raises(ContextOverflowError, match="2048"):
        llm.invoke("word " * 3000)


def test_bad_parameters_are_named(llm: ChatVLLM) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p"):
        llm.invoke("Hello", top_p=2.0)
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        llm.invoke("Hello", model="no-such-model")


def test_a_managed_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shared, "KEEP_ALIVE_SECONDS", 0.1)
    chat = ChatVLLM(model=MODEL, temperature=0, max_tokens=8, server_options={"max_model_len": 512})
    assert chat.server is None
    assert text(chat.invoke("Hello"))
    assert chat.server is not None
    pid = chat.server.pid
    assert pid is not None
    assert alive(pid)
    del chat
    gc.collect()
    assert eventually(lambda: not alive(pid))


def test_a_managed_server_with_a_key() -> None:
    with VLLMServer(MODEL, api_key="right", max_model_len=256) as server:
        assert text(ChatVLLM(base_url=server.base_url, model=MODEL, api_key="right", max_tokens=4).invoke("Hello"))
        with pytest.raises(openai.AuthenticationError):
            ChatVLLM(base_url=server.base_url, model=MODEL, api_key="wrong").invoke("Hello")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(VLLMServerError, match=r"nothing\.gguf"):
        ChatVLLM(model=str(tmp_path / "nothing.gguf")).invoke("Hello")
