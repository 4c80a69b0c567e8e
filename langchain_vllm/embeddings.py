"""`VLLMEmbeddings`: vectors of texts from a vLLM server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from langchain_core.embeddings import Embeddings
from pydantic import Field

from langchain_vllm._connected import ConnectedModel, batches

if TYPE_CHECKING:
    from collections.abc import Sequence


class VLLMEmbeddings(ConnectedModel, Embeddings):
    """Embedding model served by vLLM, or by this package's own engine.

    Texts are sent as they are, and the server's tokenizer makes tokens of them: `OpenAIEmbeddings` would cut them up
    with OpenAI's.

    Setup:
        With a server that runs somewhere, `vllm serve MODEL` or `langchain-vllm serve MODEL`:

        ```python
        embeddings = VLLMEmbeddings(base_url="http://localhost:8000/v1")
        ```

        Without one, `pip install "langchain-vllm[server]"`; the first call starts a local server, which every object
        with the same `model` and `server_options` shares, `ChatVLLM` included:

        ```python
        embeddings = VLLMEmbeddings(model="SmolLM2-135M-Instruct")
        ```

    Key init args:
        model: Name of the model; with `base_url` it may be left out if the server has only one.
        base_url, api_key, timeout, max_retries, server_options: As for `ChatVLLM`.
        dimensions: Length of the vectors, for models that can shorten them.
        query_prefix, document_prefix: Put before queries and documents, as some models want it ("query: ").
        batch_size: Texts in one request.

    Use:
        ```python
        embeddings.embed_query("What is a cat?")
        embeddings.embed_documents(["A cat is an animal.", "A car has wheels."])
        await embeddings.aembed_query("What is a cat?")
        ```
    """

    dimensions: int | None = None
    """Length of the vectors; None for all that the model has."""
    query_prefix: str = ""
    """Put before a query."""
    document_prefix: str = ""
    """Put before every document."""
    truncate_prompt_tokens: int | None = None
    """Keep so many tokens of a longer text; -1 for as many as the model takes. None: a longer text is an error."""
    truncation_side: Literal["left", "right"] | None = None
    """Where `truncate_prompt_tokens` cuts."""
    batch_size: int = Field(default=64, ge=1)
    """Texts in one request."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text, in order."""
        return [
            vector
            for batch in batches(texts, self.batch_size)
            for vector in _vectors(self._post("/embeddings", self._request(batch, self.document_prefix)))
        ]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text, in order."""
        return [
            vector
            for batch in batches(texts, self.batch_size)
            for vector in _vectors(await self._apost("/embeddings", self._request(batch, self.document_prefix)))
        ]

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        return _vectors(self._post("/embeddings", self._request([text], self.query_prefix)))[0]

    async def aembed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        return _vectors(await self._apost("/embeddings", self._request([text], self.query_prefix)))[0]

    def _request(self, texts: Sequence[str], prefix: str) -> dict[str, Any]:
        return {
            "input": [prefix + text for text in texts],
            "encoding_format": "float",
            "dimensions": self.dimensions,
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "truncation_side": self.truncation_side,
        }


def _vectors(answer: dict[str, Any]) -> list[list[float]]:
    return [entry["embedding"] for entry in sorted(answer["data"], key=lambda entry: entry["index"])]
