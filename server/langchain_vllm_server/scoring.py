"""POST /score and /rerank: how near texts are to each other, by the cosine of their vectors. And /classify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from langchain_vllm_server.chunks import now
from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.pooling import PoolingFields, pool, token_ids, usage

if TYPE_CHECKING:
    from langchain_vllm_server.generation import Service
    from langchain_vllm_server.pooling import Pooled

Texts = str | list[str]


class ComparisonFields(PoolingFields, kw_only=True):
    """What scores and ranks share."""

    max_tokens_per_query: int = 0  # 0: all
    max_tokens_per_doc: int = 0
    instruction: str | None = None


class ScoreRequest(ComparisonFields, kw_only=True):
    """POST /score: one text against others, or pairs, under any of vLLM's names."""

    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None


class RerankRequest(ComparisonFields, kw_only=True):
    """POST /rerank, as Jina and Cohere have it."""

    query: str
    documents: list[str]
    top_n: int = 0  # 0: all


class ClassifyRequest(msgspec.Struct, kw_only=True):
    """POST /classify."""

    model: str | None = None


@dataclass(slots=True)
class Compared:
    """Similarities of pairs, -1 to 1, in the order of the second ones."""

    scores: list[float]
    pooled: list[Pooled]


async def create_score(service: Service, request: ScoreRequest, request_id: str) -> dict[str, Any]:
    """The similarity of each pair."""
    model = service.model.check_name(request.model)
    compared = await _compare(service, request, *_sides(request))
    return {
        "id": f"score-{request_id}",
        "object": "list",
        "created": now(),
        "model": model,
        "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(compared.scores)],
        "usage": usage(compared.pooled),
    }


async def create_rerank(service: Service, request: RerankRequest, request_id: str) -> dict[str, Any]:
    """The documents, nearest to the query first; of equal ones the first given."""
    model = service.model.check_name(request.model)
    if request.top_n < 0:
        raise BadRequestError(f"top_n must be at least 0 (all), got {request.top_n}.", "top_n")
    compared = await _compare(service, request, ("query", [request.query]), ("documents", request.documents))
    order = sorted(range(len(compared.scores)), key=lambda i: -compared.scores[i])
    tokens = usage(compared.pooled)
    return {
        "id": f"rerank-{request_id}",
        "model": model,
        "usage": {"prompt_tokens": tokens["prompt_tokens"], "total_tokens": tokens["total_tokens"]},
        "results": [
            {
                "index": i,
                "document": {"text": request.documents[i], "multi_modal": None},
                "relevance_score": compared.scores[i],
            }
            for i in order[: request.top_n or None]
        ],
    }


async def classify(service: Service, request: ClassifyRequest, _request_id: str) -> NoReturn:
    """Refuse: generative models have no classes."""
    model = service.model.check_name(request.model)
    raise BadRequestError(
        f"The model `{model}` has no classification head. Ask a chat completion with structured_outputs.choice for one "
        "of your labels, or serve a classifier elsewhere.",
        "model",
    )


def _sides(request: ScoreRequest) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
    """Names and texts of both sides. Raises BadRequestError unless there is exactly one pair of names."""
    pairs = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))
    names = {name for pair in pairs for name in pair if getattr(request, name) is not None}
    for first, second in pairs:
        if names == {first, second}:
            return (first, _listed(getattr(request, first))), (second, _listed(getattr(request, second)))
    raise BadRequestError(
        "Give one of the pairs queries and documents, queries and items, text_1 and text_2, data_1 and data_2.",
        min(names, default="queries"),
    )


def _listed(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


async def _compare(
    service: Service, request: ComparisonFields, first: tuple[str, list[str]], second: tuple[str, list[str]]
) -> Compared:
    if request.instruction:
        raise BadRequestError(
            "`instruction` is not supported: this model was not trained to rank by one; leave it out.", "instruction"
        )
    if not request.use_activation:
        raise BadRequestError(
            "Scores are cosines: there is no activation to leave out; leave `use_activation` out.", "use_activation"
        )
    (one, queries), (other, documents) = first, second
    if not queries or not documents or len(queries) not in (1, len(documents)):
        raise BadRequestError(
            f"Input lengths must be either 1:1, 1:N or N:N, got {len(queries)} {one} and {len(documents)} {other}.", one
        )
    prompts = [(await token_ids(service, request, text, one), request.max_tokens_per_query) for text in queries]
    prompts += [(await token_ids(service, request, text, other), request.max_tokens_per_doc) for text in documents]
    if min(request.max_tokens_per_query, request.max_tokens_per_doc) < 0:
        raise BadRequestError(
            "max_tokens_per_query and max_tokens_per_doc must be at least 0 (all).", "max_tokens_per_doc"
        )
    pooled = await pool(service, request, [ids[:most] if most else ids for ids, most in prompts])
    left, right = pooled[: len(queries)], pooled[len(queries) :]
    if len(left) == 1:
        left = left * len(right)
    scores = [sum(x * y for x, y in zip(a.vector, b.vector, strict=True)) for a, b in zip(left, right, strict=True)]
    return Compared(scores, pooled)
