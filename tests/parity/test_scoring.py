"""Echo scoring over HTTP on SmolLM2, as evaluation harnesses ask for it, against transformers on the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.parity.models import from_gguf

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

# A question and its possible ends: the harness asks for the log-likelihood of each.
QUESTION = "Q: Natalia sold 48 clips in April and half as many in May. How many clips did she sell?\nA:"
ENDS = [" 72", " 96", " 24", " She sold 48 + 24 = 72 clips."]


@pytest.fixture(scope="module")
def prompts(gguf: Path) -> tuple[list[int], list[list[int]]]:
    """Token ids of the question, and of the question with each end."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    question: list[int] = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    return question, [question + tokenizer(end, add_special_tokens=False)["input_ids"] for end in ENDS]


@pytest.fixture(scope="module")
def truth(gguf: Path, prompts: tuple[list[int], list[list[int]]]) -> tuple[list[torch.Tensor], float]:
    """Log-probabilities in float64 behind every token of each prompt, and how far ours may be from them.

    The bound is the one of the engine's own test: eight times the reference's f32 error of a logit, or eight roundings
    of the largest; a log-probability is the difference of two numbers of that size.
    """
    model = from_gguf(gguf)
    with torch.no_grad():
        single = [model(torch.tensor([ids])).logits[0].double() for ids in prompts[1]]
        model = model.double()
        logits = [model(torch.tensor([ids])).logits[0] for ids in prompts[1]]
    error = max(float((a - b).abs().max()) for a, b in zip(single, logits, strict=True))
    largest = max(float(row.abs().max()) for row in logits)
    return [torch.log_softmax(row, -1) for row in logits], 8 * max(error, largest * 2**-21)


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_loglikelihoods(
    client: httpx.AsyncClient,
    prompts: tuple[list[int], list[list[int]]],
    truth: tuple[list[torch.Tensor], float],
    max_tokens: int,
) -> None:
    """With nothing or, as older harnesses do, one token to generate."""
    question, whole = prompts
    answer = await complete(client, prompt=whole, echo=True, max_tokens=max_tokens, logprobs=1, temperature=0)
    rows, bound = truth
    likelihoods = []
    for choice, ids, row in zip(answer["choices"], whole, rows, strict=True):
        logprobs = choice["logprobs"]
        assert {len(logprobs[key]) for key in logprobs} == {len(ids) + max_tokens}
        assert choice["text"].startswith(QUESTION)
        given = logprobs["token_logprobs"]
        assert given[0] is None
        expected = row[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert torch.all((torch.tensor(given[1 : len(ids)], dtype=torch.float64) - expected).abs() <= bound)
        end = slice(len(question), len(ids))
        likelihoods.append(sum(given[end]))
        # "Would greedy decoding have said so?" is asked by comparing with the most likely token.
        for position in range(len(question), len(ids)):
            best = max(logprobs["top_logprobs"][position].values())
            assert abs(best - float(row[position - 1].max())) <= bound
    exact = [
        float(row[torch.arange(len(q) - 1), torch.tensor(q[1:])][len(question) - 1 :].sum())
        for row, q in zip(rows, whole, strict=True)
    ]
    assert likelihoods == pytest.approx(exact, abs=bound * max(map(len, whole)))


async def test_scores_do_not_depend_on_who_else_asks(
    client: httpx.AsyncClient, prompts: tuple[list[int], list[list[int]]]
) -> None:
    body = {"echo": True, "max_tokens": 0, "logprobs": 2}
    together = (await complete(client, prompt=prompts[1], **body))["choices"]
    for ids, choice in zip(prompts[1], together, strict=True):
        (alone,) = (await complete(client, prompt=[ids], **body))["choices"]
        assert alone["logprobs"] == choice["logprobs"]


async def test_all_of_the_vocabulary_sums_to_one(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt="Hello there", prompt_logprobs=-1, logprobs=-1, max_tokens=1)
    (choice,) = answer["choices"]
    first, *rows = choice["prompt_logprobs"]
    assert first is None
    for row in rows:
        values = torch.tensor([entry["logprob"] for entry in row.values()], dtype=torch.float64)
        assert len(values) == 49152
        assert float(torch.logsumexp(values, 0)) == pytest.approx(0, abs=1e-4)


async def test_a_beam_is_at_least_as_likely_as_greedy(client: httpx.AsyncClient) -> None:
    body = {"prompt": QUESTION, "max_tokens": 8, "logprobs": 1, "ignore_eos": True}
    greedy = (await complete(client, temperature=0, **body))["choices"][0]
    beams = (await complete(client, use_beam_search=True, n=3, **body))["choices"]
    totals = [sum(choice["logprobs"]["token_logprobs"]) for choice in beams]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] >= sum(greedy["logprobs"]["token_logprobs"]) - 1e-3
    assert len({choice["text"] for choice in beams}) == 3
