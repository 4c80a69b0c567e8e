"""VLLM, VLLMEmbeddings and VLLMRerank on our own server with a real model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests

from langchain_vllm import VLLM, VLLMEmbeddings, VLLMRerank
from tests.integration_tests.conftest import MODEL

if TYPE_CHECKING:
    from langchain_vllm import VLLMServer


class TestEmbeddings(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def address(self, server: VLLMServer, monkeypatch: pytest.MonkeyPatch, no_settings: None) -> None:
        monkeypatch.setenv("VLLM_BASE_URL", server.base_url)

    @property
    def embeddings_class(self) -> type[VLLMEmbeddings]:
        return VLLMEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": MODEL}


TEXTS = ["A cat is a small animal that purrs.", "The stock market fell today.", "Dogs and cats are pets."]


def test_retrieval(server: VLLMServer) -> None:
    embeddings = VLLMEmbeddings(base_url=server.base_url, model=MODEL, batch_size=2)
    vectors = embeddings.embed_documents(TEXTS)
    assert vectors[0] == pytest.approx(embeddings.embed_query(TEXTS[0]), abs=1e-5)
    assert math.fsum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-3)
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    assert store.similarity_search(TEXTS[1], k=1)[0].page_content == TEXTS[1]


async def test_rerank(server: VLLMServer) -> None:
    rerank = VLLMRerank(base_url=server.base_url, model=MODEL, top_n=2)
    documents = [Document(text) for text in TEXTS]
    best = rerank.compress_documents(documents, TEXTS[1])
    assert best[0].page_content == TEXTS[1]
    assert best[0].metadata["relevance_score"] >= best[1].metadata["relevance_score"]
    assert best == await rerank.acompress_documents(documents, TEXTS[1])
    scores = dict(enumerate(rerank.score(TEXTS[1], TEXTS)))
    assert dict(rerank.rerank(TEXTS, TEXTS[1], top_n=3)) == pytest.approx(scores, abs=1e-5)


async def test_texts(server: VLLMServer) -> None:
    llm = VLLM(base_url=server.base_url, model=MODEL, temperature=0, max_tokens=12)
    prompts = ["The capital of France is", "One, two, three,"]
    answers = llm.batch(prompts)
    assert "Paris" in answers[0]
    assert answers == [llm.invoke(prompt) for prompt in prompts] == await llm.abatch(prompts)
    assert "".join(llm.stream(prompts[0])) == answers[0]
    assert "".join([piece async for piece in llm.astream(prompts[0])]) == answers[0]
    assert answers[0].startswith(llm.invoke(prompts[0], stop=["."]))
    assert llm.invoke("Yes or no?", structured_outputs={"choice": ["yes", "no"]}) in {"yes", "no"}
    assert llm.get_num_tokens(prompts[0]) > 3
