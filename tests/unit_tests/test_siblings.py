"""VLLM, VLLMEmbeddings and VLLMRerank: what they send, and what they make of the answers."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.exceptions import ModelConnectionError, ModelNotFoundError
from langchain_tests.unit_tests import EmbeddingsUnitTests
from pydantic import ValidationError

from langchain_vllm import VLLM, VLLMEmbeddings, VLLMRerank
from langchain_vllm._http import httpx
from tests.unit_tests.mock_server import URL, USAGE, MockServer


class Server(MockServer):
    """Answers each route by what it was asked."""

    def handle(self, request: Any) -> Any:
        self.requests.append(request)
        if isinstance(answer := self.answers.get(request.url.path), Exception):
            raise answer
        if answer is not None:
            return httpx.Response(answer[0], json=answer[1])
        return httpx.Response(200, json=getattr(self, request.url.path.rpartition("/")[2])(json.loads(request.content)))

    def embeddings(self, body: Any) -> Any:
        data = [{"index": i, "embedding": [float(len(text)), 0.5]} for i, text in enumerate(body["input"])]
        return {"object": "list", "data": data[::-1], "model": "m", "usage": USAGE}

    def rerank(self, body: Any) -> Any:
        ranks = sorted(range(len(body["documents"])), key=lambda i: -len(body["documents"][i]))
        results = [{"index": i, "relevance_score": float(len(body["documents"][i]))} for i in ranks]
        return {"id": "r", "model": "m", "results": results[: body.get("top_n")]}

    def score(self, body: Any) -> Any:
        return {"data": [{"index": i, "score": float(len(text))} for i, text in enumerate(body["text_2"])][::-1]}

    def tokenize(self, body: Any) -> Any:
        return {"tokens": [1, 2, 3], "count": 3}

    def completions(self, body: Any) -> Any:
        prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
        texts = [f"{prompt}!{i}" for prompt in prompts for i in range(body.get("n", 1))]
        choices = [
            {"index": i, "text": text, "finish_reason": "stop", "stop_reason": 7, "logprobs": None}
            for i, text in enumerate(texts)
        ]
        return {"id": "c", "object": "text_completion", "model": "m", "choices": choices, "usage": USAGE}

    def make(self, cls: Any, **options: Any) -> Any:
        sync, asynchronous = httpx.MockTransport(self.handle), httpx.MockTransport(self.ahandle)
        clients = {
            "http_client": httpx.Client(transport=sync),
            "http_async_client": httpx.AsyncClient(transport=asynchronous),
        }
        return cls(**{"model": "m", "base_url": URL, "max_retries": 0, **clients, **options})


@pytest.fixture
def server() -> Server:
    return Server({})


class TestStandard(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[VLLMEmbeddings]:
        return VLLMEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "m", "base_url": URL}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        environment = {"VLLM_API_KEY": "secret", "VLLM_BASE_URL": URL}
        return environment, {"model": "m"}, {"api_key": "secret", "base_url": URL}


class TestEmbeddings:
    async def test_texts_go_as_they_are_in_batches(self, server: Server) -> None:
        embeddings = server.make(VLLMEmbeddings, batch_size=2, dimensions=2)
        expected = [[1.0, 0.5], [2.0, 0.5], [3.0, 0.5]]
        assert embeddings.embed_documents(["a", "bb", "ccc"]) == expected
        assert await embeddings.aembed_documents(["a", "bb", "ccc"]) == expected
        assert len(server.requests) == 4
        assert server.body == {"model": "m", "input": ["ccc"], "encoding_format": "float", "dimensions": 2}
        assert embeddings.embed_documents([]) == []
        assert len(server.requests) == 4

    async def test_queries_and_prefixes(self, server: Server) -> None:
        embeddings = server.make(VLLMEmbeddings, query_prefix="query: ", document_prefix="passage: ")
        assert embeddings.embed_query("cat") == await embeddings.aembed_query("cat") == [10.0, 0.5]
        assert server.body["input"] == ["query: cat"]
        embeddings.embed_documents(["cat"])
        assert server.body["input"] == ["passage: cat"]

    def test_a_model_of_another_kind(self, server: Server) -> None:
        server.answers = {
            "/v1/embeddings": (404, {"error": {"message": "Not Found"}}),
            "/v1/models": (200, {"object": "list", "data": [{"id": "chatty", "object": "model"}]}),
        }
        with pytest.raises(ModelNotFoundError, match=r"has no /v1/embeddings: its model \(chatty\) is of another kind"):
            server.make(VLLMEmbeddings).embed_query("cat")


class TestRerank:
    async def test_documents(self, server: Server) -> None:
        documents = [Document("a", metadata={"x": 1}), Document("ccc"), Document("bb")]
        rerank = server.make(VLLMRerank, top_n=2)
        best = rerank.compress_documents(documents, "q")
        assert [document.page_content for document in best] == ["ccc", "bb"]
        assert best == await rerank.acompress_documents(documents, "q")
        assert best[0].metadata == {"relevance_score": 3.0}
        assert documents[0].metadata == {"x": 1}
        assert server.body == {"model": "m", "query": "q", "documents": ["a", "ccc", "bb"], "top_n": 2}

    async def test_texts(self, server: Server) -> None:
        rerank = server.make(VLLMRerank)
        assert rerank.rerank(["a", "bb"], "q") == await rerank.arerank(["a", "bb"], "q") == [(1, 2.0), (0, 1.0)]
        assert rerank.rerank(["a", "bb"], "q", top_n=1) == [(1, 2.0)]
        assert rerank.score("q", ["a", "bb"]) == await rerank.ascore("q", ["a", "bb"]) == [1.0, 2.0]
        assert rerank.rerank([], "q") == rerank.score("q", []) == rerank.compress_documents([], "q") == []


class TestTexts:
    async def test_one_request_for_a_batch(self, server: Server) -> None:
        llm = server.make(VLLM, temperature=0, top_k=5, stop=["x"])
        assert llm.batch(["a", "b"]) == await llm.abatch(["a", "b"]) == ["a!0", "b!0"]
        assert len(server.requests) == 2
        expected = {
            "model": "m",
            "prompt": ["a", "b"],
            "max_tokens": 512,
            "temperature": 0.0,
            "top_k": 5,
            "stop": ["x"],
        }
        assert server.body == expected

    def test_calls_override_fields(self, server: Server) -> None:
        llm = server.make(VLLM, top_k=5, min_p=0.1, extra_body={"priority": 1})
        llm.invoke("a", top_k=None, max_new_tokens=7, stop=["y"], extra_body={"cache_salt": "s"})
        body = server.body
        assert "top_k" not in body
        assert (body["min_p"], body["max_tokens"], body["stop"]) == (0.1, 7, ["y"])
        assert (body["priority"], body["cache_salt"]) == (1, "s")

    def test_every_answer_of_every_prompt(self, server: Server) -> None:
        result = server.make(VLLM, n=2, batch_size=1).generate(["a", "b"])
        assert [[g.text for g in group] for group in result.generations] == [["a!0", "a!1"], ["b!0", "b!1"]]
        assert result.generations[0][0].generation_info == {"finish_reason": "stop", "stop_reason": 7}
        assert result.llm_output == {"token_usage": {name: 2 * n for name, n in USAGE.items()}, "model_name": "m"}

    async def test_streams(self) -> None:
        chunks = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in "ab"]
        text = "".join(f"data: {json.dumps({'id': 'c', 'model': 'm', **c})}\n\n" for c in [*chunks, {"choices": []}])
        mock = MockServer({"/v1/completions": (200, text + "data: [DONE]\n\n")})
        llm = Server.make(mock, VLLM)  # type: ignore[arg-type]
        assert "".join(llm.stream("x")) == "ab"
        assert "".join([piece async for piece in llm.astream("x")]) == "ab"
        assert mock.body["stream_options"] == {"include_usage": True}
        assert mock.body["prompt"] == "x"

    def test_the_cache_knows_server_and_fields(self, server: Server) -> None:
        cache = InMemoryCache()
        for options in ({}, {}, {"top_k": 3}, {"base_url": "http://other.test/v1"}):
            server.make(VLLM, cache=cache, **options).invoke("a")
        assert len(server.requests) == 3

    def test_tokens_and_tracing(self, server: Server) -> None:
        llm = server.make(VLLM)
        assert llm.get_num_tokens("abc") == 3
        assert llm._get_ls_params()["ls_provider"] == "vllm"
        assert llm._get_ls_params()["ls_model_name"] == "m"

    def test_unknown_names(self, server: Server) -> None:
        with pytest.raises(ValidationError, match="VLLM has no parameter topk: did you mean top_k"):
            VLLM(model="m", topk=3)
        with pytest.raises(ValueError, match="has no parameter topk: did you mean top_k"):
            server.make(VLLM).invoke("a", topk=3)


@pytest.mark.parametrize("cls", [VLLM, VLLMEmbeddings, VLLMRerank])
def test_connections(cls: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", URL)
    model = cls(model="m", openai_api_key="k")
    assert model.base_url == URL
    assert "'k'" not in repr(model)
    assert pickle.loads(pickle.dumps(model)).api_key.get_secret_value() == "k"
    assert copy.deepcopy(server.make(cls)).model == "m"
    monkeypatch.delenv("VLLM_BASE_URL")
    with pytest.raises(ValidationError, match="Pass model="):
        cls()
    server.answers = dict.fromkeys(("/v1/completions", "/v1/embeddings", "/v1/rerank"), httpx.ConnectError("refused"))
    call = {VLLM: "invoke", VLLMEmbeddings: "embed_query"}.get(cls)
    made = server.make(cls)
    with pytest.raises(ModelConnectionError, match="langchain-vllm serve MODEL"):
        getattr(made, call)("a") if call else made.rerank(["a"], "q")
