"""A scheduler on a model that can be checked to the last slot: keys and values are hashes of everything before them."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

from langchain_vllm_server._engine_test import KV_BLOCK_SIZE, Event, SamplingParams, ScheduledSequence, Scheduler

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

VOCAB = 50


def extend(state: int, token: int) -> int:
    """The state after one more token; equal states mean equal prefixes, but for collisions of 64 bits."""
    return hash((state, token))


def sample(state: int) -> int:
    return state % VOCAB


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // KV_BLOCK_SIZE)


def sampling(**values: Any) -> SamplingParams:
    params = SamplingParams()
    for name, value in values.items():
        if not hasattr(params, name):
            raise AttributeError(name)
        setattr(params, name, value)
    return params


def repeats(tokens: Sequence[int], longest: int, shortest: int, count: int) -> bool:
    """Whether the tokens end with one pattern `count` times in a row."""
    sizes = range(shortest, longest + 1)
    return any(len(tokens) >= n * count and [*tokens[-n:]] * count == [*tokens[-n * count :]] for n in sizes)


@dataclasses.dataclass
class Live:
    """A request as its sender sees it."""

    prompt: list[int]
    params: SamplingParams
    output: list[int] = dataclasses.field(default_factory=list)
    events: list[Event] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def finish(self) -> str:
        return self.events[-1].finish if self.events else ""

    def alone(self) -> tuple[list[int], str]:
        """What the model says with nobody else there, and why it stops."""
        state = 0
        for token in self.prompt:
            state = extend(state, token)
        output: list[int] = []
        if self.params.max_tokens == 0:
            return output, "stop" if self.params.pooling else "length"
        while True:
            output.append(sample(state))
            state = extend(state, output[-1])
            if output[-1] in self.params.stop_token_ids and len(output) > self.params.min_tokens:
                return output, "stop"
            if len(output) == self.params.max_tokens:
                return output, "length"
            if len(output) > self.params.min_tokens and repeats(output, *self.params.repetition_detection):
                return output, "repetition"


@dataclasses.dataclass(frozen=True)
class Ran:
    """One sequence's part in a step."""

    id: int
    num_computed: int
    num_tokens: int
    blocks: list[int]


class FakeEngine:
    """The engine's loop on a fake model, with every promise of the scheduler asserted at every step."""

    def __init__(self, num_blocks: int, max_num_seqs: int = 256, max_num_batched_tokens: int = 2048, **options: Any):
        self.scheduler = Scheduler(num_blocks, max_num_seqs, max_num_batched_tokens, **options)
        self.num_blocks = num_blocks
        self.max_num_seqs = max_num_seqs
        self.budget = max_num_batched_tokens
        self.computed: dict[int, int] = {}  # tokens in the cache, of those that run
        self.requests: dict[int, Live] = {}
        self.live: list[int] = []  # in order of arrival
        self.cache: dict[tuple[int, int], int] = {}  # (block, slot) → state
        self.states: dict[int, list[int]] = {}  # per request, of each of its tokens
        self.pooled: dict[int, list[int]] = {}  # per request, positions whose states went into its vector
        self.now = 0.0

    def submit(self, prompt: Sequence[int], **params: Any) -> int:
        request_id = len(self.requests)
        live = self.requests[request_id] = Live(list(prompt), sampling(**params))
        self.scheduler.submit(request_id, live.prompt, live.params)
        self.live.append(request_id)
        return request_id

    def cancel(self, request_id: int) -> Event | None:
        event = self.scheduler.cancel(request_id)
        assert (event is not None) == (request_id in self.live)
        if event is not None:
            self._receive([event])
        self.scheduler.check_integrity()
        return event

    def step(self) -> list[Ran]:
        self.now += 1
        allowed = self._allowed_for_prompts()
        step = self.scheduler.schedule(self.now)
        ran = [Ran(s.id, s.num_computed, s.num_tokens, s.blocks) for s in step]
        self._check_step(step, allowed)
        for scheduled in step:
            self._forward(scheduled)
        for scheduled in step:
            self._check_cache(scheduled)
        ran_tokens = [(s.id, s.num_computed + i) for s in step for i in range(s.num_tokens)]
        for row in self.scheduler.make_batch()["pooling_rows"]:
            request_id, position = ran_tokens[row]
            self.pooled.setdefault(request_id, []).append(position)
        tokens = [sample(self.states[s.id][-1]) for s in step if s.samples]
        self._receive(self.scheduler.commit(tokens, self.now + 0.5))
        self.scheduler.check_integrity()
        return ran

    def run(self) -> list[list[Ran]]:
        steps = []
        while self.scheduler.busy:
            steps.append(self.step())
            assert len(steps) < 100_000
        assert not self.live
        return steps

    def generate(self, prompt: Sequence[int], **params: Any) -> Live:
        request_id = self.submit(prompt, **params)
        self.run()
        return self.requests[request_id]

    def _allowed_for_prompts(self) -> int:
        running = self.live[: self.scheduler.stats()["num_running"]]
        answers = sum(self.requests[i].size - self.computed.get(i, 0) == 1 for i in running)
        prompts = min(len(self.live), self.max_num_seqs) - answers
        share = self.budget if not answers or prompts > max(answers, 8) else max(64, 8 * answers)
        return max(1, min(share, self.budget - answers))

    def _check_step(self, step: Sequence[ScheduledSequence], allowed: int) -> None:
        stats = self.scheduler.stats()
        ids = [s.id for s in step]
        used = sum(s.num_tokens for s in step)
        assert ids, "an empty step"
        assert ids == [i for i in self.live if i in ids], "in order of arrival"
        assert used <= self.budget
        assert stats["num_running"] <= self.max_num_seqs
        assert all(s.num_tokens > 0 for s in step)
        readers = [s for s in step if len(s.tokens) - s.num_computed > 1]
        read = sum(s.num_tokens for s in readers)
        assert read <= allowed
        assert all(s.catches_up for s in readers[:-1]), "first come, first served"
        if used == self.budget or read == allowed:
            return
        assert ids == self.live[: stats["num_running"]], "one was left out"
        waiting = self.live[stats["num_running"] :]
        if waiting and stats["num_running"] < self.max_num_seqs:
            needed = num_blocks_for(self.requests[waiting[0]].size) + stats["num_running"]
            assert needed > stats["num_free_blocks"], "one waits that could have been admitted"

    def _forward(self, scheduled: ScheduledSequence) -> None:
        """Each token's state follows from its predecessor's, read from the cache: wrong blocks give wrong text."""
        tokens, blocks = scheduled.tokens, scheduled.blocks
        live = self.requests[scheduled.id]
        assert tokens == live.prompt + live.output
        end = scheduled.num_computed + scheduled.num_tokens
        assert end <= len(tokens) <= len(blocks) * KV_BLOCK_SIZE
        assert scheduled.catches_up == (end == len(tokens))
        for position in range(scheduled.num_computed, end):
            previous = 0 if position == 0 else self.cache[slot(blocks, position - 1)]
            self.cache[slot(blocks, position)] = extend(previous, tokens[position])
        self.computed[scheduled.id] = end

    def _check_cache(self, scheduled: ScheduledSequence) -> None:
        """After everybody wrote, each block table holds exactly its own sequence's prefix."""
        states = self.states.setdefault(scheduled.id, [])
        for token in scheduled.tokens[len(states) :]:
            states.append(extend(states[-1] if states else 0, token))
        end = scheduled.num_computed + scheduled.num_tokens
        assert [self.cache[slot(scheduled.blocks, p)] for p in range(end)] == states[:end]

    def _receive(self, events: Iterable[Event]) -> None:
        for event in events:
            live = self.requests[event.request_id]
            assert live.finish == "", "an event after the last one"
            wanted = live.params.num_prompt_logprobs >= 0 and not live.events and event.finish != "abort"
            assert event.prompt_logprobs == (live.prompt[1:] if wanted else [])
            live.output += event.tokens
            live.events.append(event)
            if live.params.pooling and event.finish == "stop":
                positions = list(range(len(live.prompt)))
                wanted_positions = positions if live.params.pooling == "mean" else positions[-1:]
                assert self.pooled[event.request_id] == wanted_positions, "once each, in order"
            if event.finish:
                self.live.remove(event.request_id)


def slot(blocks: Sequence[int], position: int) -> tuple[int, int]:
    return blocks[position // KV_BLOCK_SIZE], position % KV_BLOCK_SIZE


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=count)


def assert_all_as_alone(engine: FakeEngine) -> None:
    finished = [request for request in engine.requests.values() if request.finish != "abort"]
    assert [(r.output, r.finish) for r in finished] == [r.alone() for r in finished]
    for request in engine.requests.values():
        assert request.output == request.alone()[0][: len(request.output)]
    stats = engine.scheduler.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"]
    assert stats["num_running"] == stats["num_waiting"] == 0
    assert stats["generation_tokens"] == sum(len(r.output) for r in engine.requests.values())
    assert stats["prompt_tokens"] == sum(
        len(r.prompt) for r in engine.requests.values() if r.output or r.finish in ("length", "stop")
    )
    assert stats["prefix_cache_hits"] == sum(r.events[0].num_cached_tokens for r in engine.requests.values())
