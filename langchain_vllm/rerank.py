"""`VLLMRerank`: documents in the order of their use for a query, by a vLLM server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import Field

from langchain_vllm._connected import ConnectedModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.callbacks import Callbacks


class VLLMRerank(ConnectedModel, BaseDocumentCompressor):
    """Ranks documents with a scoring model served by vLLM, or with this package's own engine.

    Setup:
        `vllm serve BAAI/bge-reranker-v2-m3`, then:

        ```python
        rerank = VLLMRerank(base_url="http://localhost:8000/v1", top_n=3)
        ```

        Without `base_url`, the first call starts a local server for `model`, as with `ChatVLLM`.

    Key init args:
        model, base_url, api_key, timeout, max_retries, server_options: As for `ChatVLLM`.
        top_n: How many documents to keep; None for all of them.

    In a retriever:
        ```python
        from langchain_classic.retrievers import ContextualCompressionRetriever

        ContextualCompressionRetriever(base_compressor=rerank, base_retriever=store.as_retriever())
        ```

    Alone:
        ```python
        rerank.compress_documents(documents, "What is a cat?")  # each with metadata["relevance_score"]
        rerank.rerank(["A car has wheels.", "A cat purrs."], "What is a cat?")  # [(1, 0.98), (0, 0.01)]
        rerank.score("What is a cat?", ["A car has wheels.", "A cat purrs."])  # [0.01, 0.98]
        ```
    """

    top_n: int | None = Field(default=None, ge=1)
    """How many documents to keep; None for all of them."""
    truncate_prompt_tokens: int | None = None
    """Keep so many tokens of a longer pair of query and document; -1 for as many as the model takes."""

    def rerank(self, documents: Sequence[str], query: str, *, top_n: int | None = None) -> list[tuple[int, float]]:
        """The places of `documents` and their scores, best first.

        Args:
            documents: Texts.
            query: What they should be of use for.
            top_n: Other than the object's.
        """
        if not documents:
            return []
        return _ranks(self._post("/rerank", self._request(documents, query, top_n)))

    async def arerank(
        self, documents: Sequence[str], query: str, *, top_n: int | None = None
    ) -> list[tuple[int, float]]:
        """The places of `documents` and their scores, best first."""
        if not documents:
            return []
        return _ranks(await self._apost("/rerank", self._request(documents, query, top_n)))

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The best documents, best first, each a copy with its score in `metadata["relevance_score"]`."""
        return _best(documents, self.rerank([document.page_content for document in documents], query))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The best documents, best first, each a copy with its score in `metadata["relevance_score"]`."""
        return _best(documents, await self.arerank([document.page_content for document in documents], query))

    def score(self, query: str, texts: Sequence[str]) -> list[float]:
        """The score of each text, in order."""
        return _scores(self._post("/score", self._pairs(query, texts))) if texts else []

    async def ascore(self, query: str, texts: Sequence[str]) -> list[float]:
        """The score of each text, in order."""
        return _scores(await self._apost("/score", self._pairs(query, texts))) if texts else []

    def _request(self, documents: Sequence[str], query: str, top_n: int | None) -> dict[str, Any]:
        return {
            "query": query,
            "documents": list(documents),
            "top_n": top_n or self.top_n,
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
        }

    def _pairs(self, query: str, texts: Sequence[str]) -> dict[str, Any]:
        return {"text_1": query, "text_2": list(texts), "truncate_prompt_tokens": self.truncate_prompt_tokens}


def _ranks(answer: dict[str, Any]) -> list[tuple[int, float]]:
    return [(result["index"], result["relevance_score"]) for result in answer["results"]]


def _scores(answer: dict[str, Any]) -> list[float]:
    return [entry["score"] for entry in sorted(answer["data"], key=lambda entry: entry["index"])]


def _best(documents: Sequence[Document], ranks: list[tuple[int, float]]) -> list[Document]:
    return [
        documents[place].model_copy(update={"metadata": {**documents[place].metadata, "relevance_score": score}})
        for place, score in ranks
    ]
