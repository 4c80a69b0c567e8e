"""Vectors over HTTP on SmolLM2 against transformers on the same weights, and whether they are of use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.parity.models import from_gguf

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

TEXTS = ["The capital of France is Paris.", "a", "Ich weiß nicht, was soll es bedeuten, " * 8]
SAME = [
    ("A man is playing a guitar.", "Someone plays a guitar."),
    ("A dog runs on the beach.", "A puppy is running by the sea."),
    ("The stock market fell today.", "Shares dropped on Monday."),
    ("She is cooking dinner.", "A woman prepares a meal."),
    ("The train was late.", "The train arrived behind schedule."),
    ("I love this film.", "This movie is wonderful."),
]


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_embeddings_are_the_model_s(client: httpx.AsyncClient, gguf: Path) -> None:
    prompts = [(await post(client, "/tokenize", prompt=text))["tokens"] for text in TEXTS]
    answer = await post(client, "/v1/embeddings", input=TEXTS)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    model = from_gguf(gguf)
    with torch.no_grad():
        single = [model.model(torch.tensor([ids])).last_hidden_state[0].double() for ids in prompts]
        model = model.double()
        truth = [model.model(torch.tensor([ids])).last_hidden_state[0] for ids in prompts]
    for entry, states, rounded in zip(answer["data"], truth, single, strict=True):
        mean = states.mean(0)
        # What a state may be off, as in the engine's own test. Scaled to length 1, a number is off by that and by its
        # share of the length's error, at most sqrt(size) times as much; then it is rounded to f32.
        error = 4 * max(float((rounded - states).abs().max()), float(states.abs().max()) * 2**-21)
        bound = error * (1 + len(mean) ** 0.5) / float(mean.norm()) + 2**-24
        ours = torch.tensor(entry["embedding"], dtype=torch.float64)
        assert float((ours - mean / mean.norm()).abs().max()) <= bound
        assert bound < 0.01, "the bound says something"
        assert float(ours.norm()) == pytest.approx(1, abs=1e-6)


async def test_an_embedding_does_not_depend_on_who_else_asks(client: httpx.AsyncClient) -> None:
    together = [entry["embedding"] for entry in (await post(client, "/v1/embeddings", input=TEXTS))["data"]]
    for text, embedding in zip(TEXTS, together, strict=True):
        assert (await post(client, "/v1/embeddings", input=text))["data"][0]["embedding"] == embedding


async def test_what_means_the_same_is_nearer_than_anything_else(client: httpx.AsyncClient) -> None:
    documents = [document for _, document in SAME]
    for query, document in SAME:
        ranked = await post(client, "/rerank", query=query, documents=documents)
        assert ranked["results"][0]["document"]["text"] == document
