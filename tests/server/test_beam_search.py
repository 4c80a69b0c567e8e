"""Beam search on a language model small enough to try every answer."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from typing import TYPE_CHECKING, Any

import pytest

from langchain_vllm_server.beam_search import Search
from langchain_vllm_server.protocol import CompletionRequest
from langchain_vllm_server.sampling import Sampling
from tests.server.fakes import Server, running, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VOCAB, END, PROMPT = 5, 4, [0, 1]


def distribution(tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of the next token: any, but always the same ones."""
    rng = random.Random(str(list(tokens)))
    weights = [rng.random() ** 3 + 1e-3 for _ in range(VOCAB)]
    return [math.log(weight / sum(weights)) for weight in weights]


def answer(tokens: Sequence[int], count: int) -> list[tuple[int, float, int]]:
    """What the engine says of the next token."""
    logprobs = distribution(tokens)
    best = sorted(range(VOCAB), key=lambda token: -logprobs[token])[:count]
    return [(best[0], logprobs[best[0]], 1), *((token, logprobs[token], rank + 1) for rank, token in enumerate(best))]


def search(n: int, max_tokens: int, prompt: Sequence[int] = PROMPT, **fields: Any) -> Search:
    sampling = Sampling(max_tokens=max_tokens, stop_token_ids=[END], min_tokens=fields.pop("min_tokens", 0))
    one = Search(prompt, sampling, CompletionRequest(n=n, use_beam_search=True, **fields), VOCAB)
    while not one.over:
        asked = one.ask()
        assert all(params.max_tokens == 1 and params.stop_token_ids == [] for _, params in asked)
        one.step([answer(tokens, params.num_logprobs) for tokens, params in asked])
    return one


def every_answer(max_tokens: int, min_tokens: int) -> Iterator[tuple[list[int], float]]:
    for length in range(1, max_tokens + 1):
        for tokens in itertools.product(range(VOCAB), repeat=length):
            ends = tokens[-1] == END
            if END in tokens[:-1] or (not ends and length < max_tokens) or (ends and length <= min_tokens):
                continue
            total = sum(distribution([*PROMPT, *tokens[:i]])[token] for i, token in enumerate(tokens))
            yield [*tokens], total


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("min_tokens", [0, 2])
def test_a_wide_beam_finds_the_best_of_all_answers(length_penalty: float, min_tokens: int) -> None:
    """As wide as there are beginnings, the search is exhaustive, and to end it early changes nothing."""
    n, max_tokens = 64, 4

    def score(one: tuple[list[int], float]) -> float:
        tokens, total = one
        return total / (len(PROMPT) + len(tokens) - (tokens[-1] == END)) ** length_penalty

    expected = sorted(every_answer(max_tokens, min_tokens), key=score, reverse=True)[:n]
    found = search(n, max_tokens, length_penalty=length_penalty, min_tokens=min_tokens).best()
    assert [beam.tokens[len(PROMPT) :] for beam in found] == [tokens for tokens, _ in expected]
    assert [beam.total for beam in found] == pytest.approx([total for _, total in expected])
    for beam in found:
        assert [entry[0][0] for entry in beam.logprobs] == beam.tokens[len(PROMPT) :]


@pytest.mark.parametrize("seed", range(40))
def test_to_end_early_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    options: dict[str, Any] = {"length_penalty": rng.choice([0.0, 1.0, 3.0, -2.0]), "min_tokens": rng.randint(0, 2)}
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 4))]
    early = search(3, 12, prompt=prompt, **options)
    monkeypatch.setattr(Search, "_is_decided", lambda _self: False)
    assert early.best() == search(3, 12, prompt=prompt, **options).best()


def test_one_beam_that_nothing_ends_is_greedy() -> None:
    tokens = [*PROMPT]
    for _ in range(8):
        tokens.append(max(range(VOCAB), key=distribution(tokens).__getitem__))
    one = Search(PROMPT, Sampling(max_tokens=8), CompletionRequest(use_beam_search=True), VOCAB)
    while not one.over:
        one.step([answer(asked, params.num_logprobs) for asked, params in one.ask()])
    assert [beam.tokens for beam in one.best()] == [tokens]


async def test_the_answer_over_http(server: Server) -> None:
    body = {"use_beam_search": True, "n": 2, "max_tokens": 3, "temperature": 0, "logprobs": 1}
    response = await server.complete(["Hi", "Ho"], **body)
    assert response.status_code == 200, response.text
    answer = response.json()
    # The fake engine's most likely token is always H, and the next one the token after it.
    assert [choice["text"] for choice in answer["choices"]] == ["HHH", "HHI"] * 2
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 4
    assert answer["choices"][1]["logprobs"]["token_logprobs"] == [-0.5, -0.5, -1.5]
    assert answer["choices"][1]["logprobs"]["top_logprobs"][2] == {"I": -1.5, "H": -0.5}
    assert answer["usage"]["completion_tokens"] == 12
    assert {request.params.max_tokens for request in server.fake.submitted} == {1}
    assert len(server.fake.submitted) == 2 * (1 + 2 + 2)


async def test_echo_goes_before_every_beam(server: Server) -> None:
    answer = (await server.complete("Hi", use_beam_search=True, n=2, max_tokens=1, echo=True)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["HiH", "HiI"]


async def test_chat_streams_the_best_when_it_is_found(server: Server) -> None:
    response = await server.chat(use_beam_search=True, max_tokens=2, stream=True)
    assert '"content":"HH"' in response.text
    assert response.text.endswith("data: [DONE]\n\n")


async def test_a_search_that_nobody_waits_for_is_ended() -> None:
    async with running(step_seconds=0.02) as server:
        request = asyncio.ensure_future(server.complete(use_beam_search=True, n=3, max_tokens=200))
        await until(lambda: len(server.fake.submitted) > 4)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await until(lambda: server.fake.stats().num_running == 0)
        count = len(server.fake.submitted)
        await asyncio.sleep(0.1)
        assert len(server.fake.submitted) == count
        assert server.fake.cancelled


async def test_an_engine_that_gives_up_is_a_500() -> None:
    async with running() as server:
        submit = server.fake.submit

        def failing(request_id: int, prompt: Any, params: Any) -> None:
            submit(request_id, prompt, params)
            if len(server.fake.submitted) > 2:
                server.fake.die("out of order")

        server.fake.submit = failing  # type: ignore[method-assign]
        response = await server.complete(use_beam_search=True, n=2, max_tokens=5)
        assert response.status_code == 500
        assert "out of order" in response.json()["error"]["message"]


def test_ties_are_kept_in_order() -> None:
    one = Search([0], Sampling(max_tokens=2), CompletionRequest(n=2, use_beam_search=True), VOCAB)
    same = [(0, -1.0, 1), *((token, -1.0, 1) for token in range(4))]
    one.step([same])
    one.step([same, same])
    assert [beam.tokens for beam in one.best()] == [[0, 0, 0], [0, 0, 1]]
    assert one.over
