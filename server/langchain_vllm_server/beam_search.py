"""Beam search on the engine: sequences of one token each, whose common beginnings the prefix cache computes once.

As vLLM does it: every beam is continued with its 2 n most likely tokens; what ends is put aside, the n best of the
others go on. Of all that ended, and of what is left at max_tokens, the n best by

    cumulative log-probability / (tokens, prompt included and the end-of-sequence token not) ** length_penalty

are the answer. Unlike vLLM, the search is over as soon as no beam can still become one of the n best.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from langchain_vllm_server.errors import BadRequestError, EngineError
from langchain_vllm_server.protocol import CompletionRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_vllm_server.async_engine import AsyncEngine, EventStream
    from langchain_vllm_server.generation import TokenLogprobs
    from langchain_vllm_server.protocol import GenerationRequest
    from langchain_vllm_server.sampling import Sampling

MAX_BEAMS = 64

# What changes the distribution that tokens are drawn from, or has no place in a search, with what asks for nothing.
# Beams are ranked by the model's own probabilities.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": ([],),
    "repetition_detection": (None,),
    "logprob_token_ids": (None,),
    "prompt_logprobs": (None,),
}


def check(request: GenerationRequest) -> None:
    """Raise BadRequestError for what does not go together with beam search."""
    for name, neutral in _WITHOUT_EFFECT.items():
        if getattr(request, name) not in neutral:
            raise BadRequestError(f"`{name}` has no effect on beam search; leave one of them out.", name)
    if request.n > MAX_BEAMS:
        raise BadRequestError(f"n must be at most {MAX_BEAMS} with `use_beam_search`, got {request.n}.", "n")
    if (
        isinstance(request, CompletionRequest)
        and request.echo
        and (request.only_scores or request.logprobs is not None)
    ):
        raise BadRequestError(
            "Scores of the prompt (`echo` with `logprobs` or max_tokens=0) are not supported with beam search; leave "
            "`use_beam_search` out.",
            "echo",
        )


@dataclass(frozen=True, slots=True)
class FinalEvent:
    """What the engine's Event says of a sequence, of a hypothesis as a whole."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish: str
    num_cached_tokens: int
    scheduled_time: float
    time: float
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True, slots=True)
class Beam:
    """One hypothesis."""

    tokens: list[int]  # the prompt's too
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the tokens after the prompt
    total: float = 0.0  # of the log-probabilities
    ended: bool = False  # by its last token

    def score(self, length_penalty: float) -> float:
        """What hypotheses are ranked by."""
        length: int = max(len(self.tokens) - self.ended, 1)
        return float(self.total / length**length_penalty)


class Search:
    """The beams of one prompt."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, request: GenerationRequest, vocab_size: int) -> None:
        self.num_prompt = len(prompt)
        self._sampling = sampling
        self._width = request.n
        self._penalty = request.length_penalty
        self._one_token = replace(
            sampling,
            temperature=0.0,
            max_tokens=1,
            min_tokens=0,
            stop_token_ids=[],
            num_logprobs=min(max(2 * request.n, sampling.num_logprobs), vocab_size),
        )
        self._stops = frozenset(sampling.stop_token_ids)
        self.beams = [Beam(list(prompt))]
        self._ended: list[Beam] = []

    def step(self, answers: Sequence[TokenLogprobs]) -> None:
        """Go on by a token.

        Args:
            answers: For each beam, what the engine says of its next token: a chosen one, then the most likely ones.
        """
        candidates = []
        for beam, (_chosen, *likeliest) in zip(self.beams, answers, strict=True):
            for entry in likeliest[: 2 * self._width]:
                end = entry[0] in self._stops
                if end and len(beam.tokens) - self.num_prompt < self._sampling.min_tokens:
                    continue
                told = [entry, *likeliest[: max(self._sampling.num_logprobs, 0)]]
                tokens, logprobs = [*beam.tokens, entry[0]], [*beam.logprobs, told]
                candidates.append(Beam(tokens, logprobs, beam.total + entry[1], end))
        self._ended += [beam for beam in candidates if beam.ended]
        self.beams = self._best([beam for beam in candidates if not beam.ended])
        if self._is_decided():
            self.beams = []

    def ask(self) -> list[tuple[list[int], Sampling]]:
        """What the engine is to be asked for the next step."""
        return [(beam.tokens, self._one_token) for beam in self.beams]

    @property
    def over(self) -> bool:
        """Whether nothing is left to compute."""
        return not self.beams or self._length() >= self._sampling.max_tokens

    def best(self) -> list[Beam]:
        """The answer, best first."""
        return self._best(self._ended + self.beams)

    def _best(self, beams: list[Beam]) -> list[Beam]:
        return sorted(beams, key=lambda beam: -beam.score(self._penalty))[: self._width]

    def _length(self) -> int:
        return len(self.beams[0].tokens) - self.num_prompt

    def _is_decided(self) -> bool:
        """No beam can become better than the n best that ended: a total only falls, and a length has its limits."""
        if not self.beams or len(self._ended) < self._width:
            return False
        worst = self._best(self._ended)[-1].score(self._penalty)
        longest = self.num_prompt + self._sampling.max_tokens
        lengths = (len(self.beams[0].tokens), longest)
        return all(beam.total / length**self._penalty <= worst for beam in self.beams for length in lengths)


class BeamStream:
    """An EventStream's twin: the events of the best hypotheses, all at the end.

    Args:
        engine: Runs the sequences.
        requests: A prompt and its sampling per hypothesis, n for each prompt.
        request: For n and length_penalty.
        vocab_size: Of the model.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        requests: Sequence[tuple[Sequence[int], Sampling]],
        request: GenerationRequest,
        vocab_size: int,
    ) -> None:
        check(request)
        self._engine = engine
        self._width = request.n
        self._searches = [Search(prompt, sampling, request, vocab_size) for prompt, sampling in requests[:: request.n]]
        self._running: EventStream | None = None
        self._cached = [0] * len(self._searches)
        self._scheduled = self._time = 0.0
        self._told = False

    def __aiter__(self) -> BeamStream:
        return self

    async def __anext__(self) -> list[tuple[int, Any]]:
        if self._told:
            raise StopAsyncIteration
        while searches := [search for search in self._searches if not search.over]:
            await self._step(searches)
        self._told = True
        return [
            (number * self._width + rank, self._event(search, beam, self._cached[number]))
            for number, search in enumerate(self._searches)
            for rank, beam in enumerate(search.best())
        ]

    def cancel(self, _index: int) -> None:
        """Nothing runs once there is an event."""

    def close(self) -> None:
        """End the search."""
        self._told = True
        if self._running is not None:
            self._running.close()

    async def _step(self, searches: Sequence[Search]) -> None:
        """One token for every beam of every search, all in the same batch."""
        asked = [one for search in searches for one in search.ask()]
        self._running = self._engine.submit(asked, eager=False)
        answers: list[TokenLogprobs] = [[] for _ in asked]
        events: dict[int, Any] = {}
        async for news in self._running:
            for index, event in news:
                if event.finish in ("error", "abort"):
                    raise EngineError(self._engine.problem() or "Beam search failed: the engine gave a sequence up.")
                answers[index] = event.logprobs[0]
                events[index] = event
        first = 0
        for search in searches:
            self._note(search, events[first])
            search.step(answers[first : (first := first + len(search.beams))])

    def _note(self, search: Search, event: Any) -> None:
        self._time = event.time
        if len(search.beams[0].tokens) == search.num_prompt:
            self._scheduled = self._scheduled or event.scheduled_time
            self._cached[self._searches.index(search)] = event.num_cached_tokens

    def _event(self, search: Search, beam: Beam, num_cached: int) -> FinalEvent:
        tokens = beam.tokens[search.num_prompt :]
        finish = "stop" if beam.ended else "length"
        return FinalEvent(tokens, beam.logprobs, finish, num_cached, self._scheduled, self._time)
