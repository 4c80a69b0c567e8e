"""From the engine's events to text: the one path of chat and completions, streamed or not."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from langchain_vllm_server.beam_search import BeamStream
from langchain_vllm_server.detokenizer import Detokenizer
from langchain_vllm_server.errors import BadRequestError, EngineError
from langchain_vllm_server.sampling import max_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_vllm_server._engine import Event
    from langchain_vllm_server.async_engine import AsyncEngine, EventStream
    from langchain_vllm_server.constraint import Constraint
    from langchain_vllm_server.metrics import Metrics
    from langchain_vllm_server.protocol import GenerationRequest
    from langchain_vllm_server.sampling import Sampling
    from langchain_vllm_server.served_model import ServedModel

# Of one token: (token, logprob, rank) of the chosen one, then of the most likely ones, best first.
TokenLogprobs = list[tuple[int, float, int]]


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes work with."""

    model: ServedModel
    engine: AsyncEngine
    metrics: Metrics


@dataclass(slots=True)
class Delta:
    """What is new of a choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of all prompt tokens but the first
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string, or the stop token of the request

    def followed_by(self, other: Delta) -> Delta:
        """Both as one."""
        return Delta(
            self.text + other.text,
            self.token_ids + other.token_ids,
            self.logprobs + other.logprobs,
            self.prompt_logprobs + other.prompt_logprobs,
            other.finish_reason,
            other.stop_reason,
        )


class StopStrings:
    """Cuts a growing text at the first stop string. What may be the beginning of one is held back.

    The result does not depend on how the text is split: the stop string that is complete first wins, the longest of
    those that are complete at the same character.
    """

    def __init__(self, strings: Sequence[str], *, include: bool) -> None:
        self._strings = strings
        self._include = include  # the stop string itself is part of the text
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that ends it, if one does."""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._strings if (at := text.find(stop)) >= 0]
        if found:
            end, start, stop = min(found)
            self._held = ""
            return text[: end if self._include else start], stop
        hold = self._begun(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    def finish(self) -> str:
        """What was held back: no stop string followed."""
        text, self._held = self._held, ""
        return text

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._strings):
                return length
        return 0


class Clock:
    """When things happened to a choice, in seconds of time.monotonic(); None: not yet."""

    def __init__(self) -> None:
        self.arrival = time.monotonic()
        self.scheduled: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None


class Choice:
    """One answer as it grows."""

    def __init__(self, request: GenerationRequest, model: ServedModel, index: int, prompt: Sequence[int]) -> None:
        self.index = index
        self.num_prompt_tokens = len(prompt)
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.num_reasoning_tokens: int | None = None  # None: the model does not reason, or not yet counted
        self.finish_reason: str | None = None
        self.clock = Clock()
        self._detokenizer = Detokenizer(model.tokenizer, prompt, request.skip_special_tokens)
        self._stop = StopStrings(request.stop_strings, include=request.include_stop_str_in_output)
        self._include_stop = request.include_stop_str_in_output
        self._min_tokens = request.min_tokens
        self._stop_token_ids = frozenset(request.stop_token_ids)

    def push(self, event: Event, delta: Delta) -> None:
        """Add an event's tokens to `delta`. Tokens that come after a stop string are dropped."""
        if self.finish_reason is not None:
            return
        self._tick(event)
        if scored := event.prompt_logprobs:
            delta.prompt_logprobs = scored
        logprobs = event.logprobs
        stop_token = event.tokens[-1] if event.finish == "stop" else None
        for position, token in enumerate(event.tokens):
            self.num_tokens += 1
            delta.token_ids.append(token)
            if logprobs:
                delta.logprobs.append(logprobs[position])
            is_end = stop_token is not None and position == len(event.tokens) - 1
            if (not is_end or self._include_stop) and self._add(self._detokenizer.push([token]), delta):
                return
        if event.finish:
            self._finish(event, stop_token, delta)

    def _add(self, text: str, delta: Delta) -> bool:
        """Show text, and say whether a stop string ended it. Before min_tokens nothing stops it."""
        if self.num_tokens <= self._min_tokens:
            delta.text += text
            return False
        text, stop = self._stop.push(text)
        delta.text += text
        if stop is not None:
            self.finish_reason = delta.finish_reason = "stop"
            delta.stop_reason = stop
        return stop is not None

    def _finish(self, event: Event, stop_token: int | None, delta: Delta) -> None:
        if self._add(self._detokenizer.finish(), delta):
            return
        delta.text += self._stop.finish()
        self.finish_reason = delta.finish_reason = event.finish
        if stop_token in self._stop_token_ids:
            delta.stop_reason = stop_token
        elif event.finish == "repetition":
            delta.stop_reason = "repetition_detected"  # vLLM's word

    def _tick(self, event: Event) -> None:
        clock = self.clock
        if clock.scheduled is None:
            clock.scheduled = event.scheduled_time
            self.num_cached_tokens = event.num_cached_tokens
        if event.tokens:
            if clock.first_token is None:
                clock.first_token = event.time
            clock.last_token = event.time


class Spacing:
    """Puts news together: after its first token, a choice has some every `interval` tokens and at its end."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._told: dict[int, int] = {}  # choice → tokens at its last news
        self._held: dict[int, Delta] = {}

    def due(self, news: list[tuple[Choice, Delta]]) -> list[tuple[Choice, Delta]]:
        """What is to be told now."""
        due = []
        for choice, delta in news:
            whole = self._held.pop(choice.index).followed_by(delta) if choice.index in self._held else delta
            before = self._told.get(choice.index, 0)
            if whole.finish_reason is None and before and choice.num_tokens - before < self._interval:
                self._held[choice.index] = whole
                continue
            self._told[choice.index] = choice.num_tokens
            due.append((choice, whole))
        return due


class Generation:
    """An HTTP request in flight: the events of its stream, turned into deltas of its choices."""

    def __init__(
        self, service: Service, stream: EventStream | BeamStream, choices: list[Choice], num_per_prompt: int
    ) -> None:
        self.stream = stream
        self.choices = choices
        self._num_per_prompt = num_per_prompt
        self._leaders = choices[::num_per_prompt]  # one per prompt
        self._service = service

    def close(self) -> None:
        """Cancel what still runs, and count it as aborted."""
        self.stream.close()
        for choice in self.choices:
            if choice.finish_reason is None:
                choice.finish_reason = "abort"
                self._count(choice)

    def news(self, events: Sequence[tuple[int, Event]]) -> list[tuple[Choice, Delta]]:
        """What events of `stream` add to its choices. Raises EngineError when the engine fails."""
        deltas: dict[int, Delta] = {}
        for index, event in events:
            if index not in deltas:
                deltas[index] = Delta()
            self._push(self.choices[index], event, deltas[index])
        return [(self.choices[index], delta) for index, delta in deltas.items()]

    async def collect(self) -> list[Delta]:
        """All of every choice."""
        whole = [Delta() for _ in self.choices]
        async for events in self.stream:
            for index, event in events:
                self._push(self.choices[index], event, whole[index])
        return whole

    async def whole(self, form: Callable[[Generation, list[Delta]], dict[str, Any]]) -> dict[str, Any]:
        """The answer that `form` makes of all of every choice; of scores, which are many, in a thread."""
        deltas = await self.collect()
        if any(delta.prompt_logprobs for delta in deltas):
            return await asyncio.to_thread(form, self, deltas)
        return form(self, deltas)

    def counts(self, untold: int = 0) -> dict[str, Any]:
        """Tokens so far, but for the last `untold` ones. A prompt counts once, however many choices it has."""
        prompt = sum(choice.num_prompt_tokens for choice in self._leaders)
        completion = sum(choice.num_tokens for choice in self.choices) - untold
        return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}

    def usage(self, *, nulls: bool = False) -> dict[str, Any]:
        """All tokens, in detail; with what vLLM has and this server has not, as null."""
        details: dict[str, int | None] = {"cached_tokens": sum(choice.num_cached_tokens for choice in self._leaders)}
        if block := self._service.model.cache_block_size:
            details["created_cache_tokens"] = sum(
                max(choice.num_prompt_tokens // block * block - choice.num_cached_tokens, 0) for choice in self._leaders
            )
        usage = {**self.counts(), "prompt_tokens_details": details}
        if nulls:
            details["multimodal_tokens"] = None
            usage["completion_tokens_details"] = None
        reasoning = [choice.num_reasoning_tokens for choice in self.choices if choice.num_reasoning_tokens is not None]
        if reasoning:
            usage["completion_tokens_details"] = {"reasoning_tokens": sum(reasoning)}
        return usage

    def timing(self, *, nulls: bool = False) -> dict[str, float | None] | None:
        """The per-request metrics of vLLM, for a request of a single choice. Only the queue time includes waiting."""
        if len(self.choices) > 1:
            return None
        choice = self.choices[0]
        clock, count = choice.clock, choice.num_tokens
        if clock.scheduled is None or clock.first_token is None or clock.last_token is None:
            return None
        decoding, running = clock.last_token - clock.first_token, clock.last_token - clock.scheduled
        timing = {
            "time_to_first_token_ms": _ms(clock.first_token - clock.scheduled),
            "generation_time_ms": _ms(decoding),
            "queue_time_ms": _ms(clock.scheduled - clock.arrival),
            "mean_itl_ms": _ms(decoding / (count - 1)) if count > 1 else None,
            "tokens_per_second": round(count / running, 3) if running > 0 else None,
        }
        return timing | {"speculative_decoding": None} if nulls else timing

    def _push(self, choice: Choice, event: Event, delta: Delta) -> None:
        if choice.finish_reason is not None:
            return
        if event.finish in ("error", "abort"):
            choice.finish_reason = "error"
            self._count(choice)
            reason = event.error or self._service.engine.problem() or "the engine gave this request up"
            raise EngineError(f"Generation failed: {reason}")
        before = choice.clock.last_token
        choice.push(event, delta)
        self._service.metrics.stepped(choice, before)
        if choice.finish_reason is not None:
            self._count(choice)
            if not event.finish:  # a stop string: the engine does not know of it
                self.stream.cancel(choice.index)

    def _count(self, choice: Choice) -> None:
        """Tell the metrics that a choice has ended, and with the last one of a prompt that the prompt has."""
        self._service.metrics.finished(choice)
        siblings = self.choices[choice.index - choice.index % self._num_per_prompt :][: self._num_per_prompt]
        if all(one.finish_reason is not None for one in siblings):
            self._service.metrics.longest_generation.observe(max(one.num_tokens for one in siblings))


def start(
    service: Service,
    request: GenerationRequest,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]],
    limit: int | None,
    constraint: Constraint | None = None,
) -> Generation:
    """Submit `n` sequences per prompt.

    Args:
        service: The server.
        request: For n, seed, stops and whether it streams.
        sampling: What `sampling.resolve` made of the request.
        prompts: Token ids, each at least one.
        limit: The request's max_tokens.
        constraint: What every answer may say.

    Raises:
        BadRequestError: A prompt or a parameter can never be served.
        EngineError: The engine has stopped.
    """
    model = service.model
    # Where a constraint allows nothing but the end, the answer is complete, and no request can want it otherwise.
    ignore_eos = request.ignore_eos and constraint is None
    sampling.stop_token_ids = [*request.stop_token_ids, *(() if ignore_eos else model.eos_token_ids)]
    default = model.sampling_defaults.get("max_new_tokens")
    requests = []
    for prompt in prompts:
        length = max_tokens(limit, default, request.min_tokens, len(prompt), model.max_model_len)
        if request.ignore_eos and constraint is not None:
            sampling.min_tokens = length  # no end-of-sequence token while the constraint allows others
        requests += [(prompt, replace(sampling, seed=seed, max_tokens=length)) for seed in _seeds(request, model)]
    if not request.stream:  # otherwise each choice tells its own, whichever is first
        for index, (_, one) in enumerate(requests):
            one.num_prompt_logprobs = -1 if index % request.n else sampling.num_prompt_logprobs
    choices = [Choice(request, model, index, prompt) for index, (prompt, _) in enumerate(requests)]
    service.engine.admit(len(requests))
    stream: EventStream | BeamStream
    if request.use_beam_search:
        if constraint is not None:
            raise BadRequestError(
                "`use_beam_search` does not go together with constrained answers; leave one of them out.",
                "use_beam_search",
            )
        stream = BeamStream(service.engine, requests, request, model.vocab_size)
    else:
        eager = request.stream or bool(request.stop_strings)
        stream = service.engine.submit(requests, eager=eager, constraint=constraint)
    service.metrics.started(request.n, [one.max_tokens for _, one in requests])
    return Generation(service, stream, choices, request.n)


def _seeds(request: GenerationRequest, model: ServedModel) -> list[int]:
    """One per choice: the request's and the numbers after it, or random ones. vLLM takes -1 for none."""
    if request.seed is None or request.seed == -1:
        return [model.seeds.getrandbits(64) for _ in range(request.n)]
    return [(request.seed + i) % 2**64 for i in range(request.n)]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
