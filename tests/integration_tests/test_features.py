"""ChatVLLM's own features, and LangChain's around it, on our own server with a real model."""

from __future__ import annotations

import enum
import re
from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, trim_messages
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel, Field

from langchain_vllm import ChatVLLM
from tests.integration_tests.conftest import MODEL


class City(BaseModel):
    """A city."""

    name: str = Field(description="the name of the city", max_length=20)
    population: int = Field(ge=0, le=50_000_000)


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


ASK = "Tell me about Paris, the capital of France."


class TestStructuredOutput:
    async def test_a_class(self, llm: ChatVLLM) -> None:
        city = llm.with_structured_output(City)
        answer = city.invoke(ASK, max_tokens=80)
        assert isinstance(answer, City)
        assert answer == await city.ainvoke(ASK, max_tokens=80)
        assert list(city.stream(ASK, max_tokens=80))[-1] == answer

    def test_partial_json(self, llm: ChatVLLM) -> None:
        parts = list(llm.with_structured_output(City.model_json_schema()).stream(ASK, max_tokens=80))
        assert len(parts) > 3
        assert "population" not in parts[2]
        assert set(parts[-1]) == {"name", "population"}

    @pytest.mark.parametrize("options", [Mood, Literal["good", "bad"], ["good", "bad"]])
    def test_choice(self, llm: ChatVLLM, options: Any) -> None:
        answer = llm.with_structured_output(options).invoke("I won the lottery! Is that good or bad?")
        assert (answer.value if isinstance(answer, Mood) else answer) in {"good", "bad"}

    def test_regex_and_grammar(self, llm: ChatVLLM) -> None:
        date = llm.with_structured_output(re.compile(r"\d{4}-\d{2}-\d{2}"))
        answer = date.invoke("When was the French revolution?")
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", answer)
        assert "".join(date.stream("When was the French revolution?")) == answer
        sums = llm.with_structured_output('root ::= "1 + " [0-9] " = " [0-9]', method="grammar")
        assert re.fullmatch(r"1 \+ \d = \d", sums.invoke("Write a sum."))

    def test_function_calling(self, llm: ChatVLLM) -> None:
        city = llm.with_structured_output(City, method="function_calling")
        assert isinstance(city.invoke(ASK, max_tokens=80), City)

    def test_json_mode(self, llm: ChatVLLM) -> None:
        answer = llm.with_structured_output(method="json_mode").invoke(f"{ASK} Answer in JSON.", max_tokens=200)
        assert isinstance(answer, dict)

    def test_a_cut_off_answer(self, llm: ChatVLLM) -> None:
        result = llm.with_structured_output(City, include_raw=True, max_tokens=4).invoke(ASK)
        assert result["parsed"] is None
        assert "cut off" in str(result["parsing_error"])
        assert result["raw"].response_metadata["finish_reason"] == "length"

    def test_format_instructions(self, llm: ChatVLLM) -> None:
        city = llm.with_structured_output(City, include_format_instructions=True)
        assert isinstance(city.invoke(ASK, max_tokens=80), City)

    def test_an_agent_uses_the_servers_constraint(self, llm: ChatVLLM) -> None:
        agent = create_agent(llm.model_copy(update={"max_tokens": 80}), response_format=City)
        state = agent.invoke({"messages": [("human", ASK)]})
        assert isinstance(state["structured_response"], City)
        assert len(state["messages"]) == 2  # no tool stood in for the schema


class TestMetadata:
    def test_of_tokens(self, llm: ChatVLLM) -> None:
        fields: dict[str, Any] = {"return_token_ids": True, "prompt_logprobs": 1, "logprobs": True, "max_tokens": 4}
        told = llm.invoke("Hello", **fields).response_metadata
        assert len(told["token_ids"]) == len(told["logprobs"]["content"]) == 4
        assert len(told["prompt_logprobs"]) == len(told["prompt_token_ids"])
        chunks = list(llm.stream("Hello", return_token_ids=True, logprobs=True, max_tokens=4))
        total = sum(chunks[1:], start=chunks[0])
        assert isinstance(total, AIMessageChunk)
        assert total.response_metadata["token_ids"] == told["token_ids"]
        assert total.response_metadata["prompt_token_ids"] == told["prompt_token_ids"]
        assert len(total.response_metadata["logprobs"]["content"]) == 4

    def test_stop_reason(self, llm: ChatVLLM) -> None:
        answer = str(llm.invoke(ASK).content)
        word = answer.split()[2]
        assert llm.invoke(ASK, stop=[word]).response_metadata["stop_reason"] == word

    def test_choices_of_a_stream_stay_apart(self, llm: ChatVLLM) -> None:
        options: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 8}
        generations = llm.generate([[HumanMessage(ASK)]], **options).generations[0]
        chunks = list(llm.stream(ASK, **options))
        total = sum(chunks[1:], start=chunks[0])
        apart = [total.content, *(choice["content"] for choice in total.additional_kwargs["choices"])]
        assert apart == [generation.text for generation in generations]

    def test_profile_and_operations(self, llm: ChatVLLM) -> None:
        assert llm.profile is not None
        assert llm.profile["max_input_tokens"] == 2048
        assert MODEL in llm.available_models()
        assert llm.server_version()
        assert llm.server_metrics()["vllm:prompt_tokens_total"] > 0
        prompt = llm.render_prompt([SystemMessage("Be kind."), HumanMessage("Hello")])
        assert "Be kind." in prompt
        assert prompt.rstrip().endswith("assistant")


class TestLangChain:
    def test_a_batch_of_100(self, llm: ChatVLLM) -> None:
        answers = llm.batch([f"Say {i}." for i in range(100)], max_tokens=2)
        assert all(answer.content for answer in answers)

    def test_fallbacks(self, llm: ChatVLLM) -> None:
        broken = ChatVLLM(base_url="http://127.0.0.1:9/v1", model=MODEL, max_retries=0)
        assert broken.with_fallbacks([llm]).invoke(ASK).content == llm.invoke(ASK).content

    def test_retries(self, llm: ChatVLLM) -> None:
        tried: list[int] = []

        def once(value: Any) -> Any:
            tried.append(1)
            if len(tried) == 1:
                raise ConnectionError
            return value

        assert (RunnableLambda(once).with_retry(wait_exponential_jitter=False) | llm).invoke(ASK).content

    def test_cache_and_callbacks(self, llm: ChatVLLM) -> None:
        class Seen(BaseCallbackHandler):
            starts = 0
            tokens = 0

            def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
                self.starts += 1
                assert kwargs["metadata"]["ls_provider"] == "vllm"

            def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
                self.tokens += 1

        seen = Seen()
        cached = llm.model_copy(update={"cache": InMemoryCache()})
        config: Any = {"callbacks": [seen]}
        first = cached.invoke(ASK, config)
        prompts = llm.server_metrics()["vllm:prompt_tokens_total"]
        assert cached.invoke(ASK, config).content == first.content
        assert llm.server_metrics()["vllm:prompt_tokens_total"] == prompts
        list(llm.stream(ASK, config))
        assert seen.starts == 3
        assert seen.tokens > 5

    def test_history(self, llm: ChatVLLM) -> None:
        agent = create_agent(llm, checkpointer=InMemorySaver())
        config: Any = {"configurable": {"thread_id": "1"}}
        agent.invoke({"messages": [("human", "My name is Ada.")]}, config)
        _, first, _, second = agent.invoke({"messages": [("human", "What is my name?")]}, config)["messages"]
        assert second.usage_metadata["input_tokens"] > first.usage_metadata["input_tokens"]

    def test_trimming_with_the_servers_tokens(self, llm: ChatVLLM) -> None:
        messages = [HumanMessage("word " * 50), AIMessage("word " * 50), HumanMessage("Hello")]
        kept = trim_messages(messages, max_tokens=60, token_counter=llm, strategy="last")
        assert kept == messages[-1:]
