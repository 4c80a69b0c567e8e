from __future__ import annotations

import asyncio
import ctypes
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from langchain_vllm_server import async_engine
from langchain_vllm_server.async_engine import AsyncEngine
from langchain_vllm_server.constraint import ConstraintError
from langchain_vllm_server.errors import BadRequestError, EngineError, UnavailableError
from langchain_vllm_server.sampling import Sampling
from tests.server.fakes import FakeEngine, until

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNT = range(1000)


def engine_that_counts(step_seconds: float = 0.0) -> tuple[FakeEngine, AsyncEngine]:
    fake = FakeEngine(lambda prompt, _params: [prompt[0] + i for i in COUNT], step_seconds)
    return fake, AsyncEngine(fake, SimpleNamespace)  # type: ignore[arg-type]


def tokens_of(batches: Sequence[Sequence[tuple[int, Any]]], index: int) -> list[int]:
    return [t for batch in batches for i, event in batch if i == index for t in event.tokens]


async def test_events_go_to_their_own_streams() -> None:
    _, engine = engine_that_counts()
    first = engine.submit([([100], Sampling(max_tokens=5)), ([200], Sampling(max_tokens=3))])
    second = engine.submit([([300], Sampling(max_tokens=2))])
    batches, other = [batch async for batch in first], [batch async for batch in second]
    assert tokens_of(batches, 0) == [100, 101, 102, 103, 104]
    assert tokens_of(batches, 1) == [200, 201, 202]
    assert tokens_of(other, 0) == [300, 301]
    engine.stop()


async def test_an_uneager_stream_wakes_once() -> None:
    _, engine = engine_that_counts()
    stream = engine.submit([([0], Sampling(max_tokens=50)), ([0], Sampling(max_tokens=5))], eager=False)
    batches = [batch async for batch in stream]
    assert len(batches) == 1
    assert tokens_of(batches, 0) == list(range(50))
    engine.stop()


async def test_a_late_reader_finds_one_batch() -> None:
    fake, engine = engine_that_counts()
    stream = engine.submit([([0], Sampling(max_tokens=50))])
    await until(lambda: fake.stats().num_running == 0)
    await asyncio.sleep(0.001)
    assert len([batch async for batch in stream]) == 1
    engine.stop()


async def test_cancelling_one_sequence_leaves_the_others() -> None:
    fake, engine = engine_that_counts(0.001)
    stream = engine.submit([([0], Sampling(max_tokens=500)), ([0], Sampling(max_tokens=10))])
    await anext(stream)
    stream.cancel(0)
    rest = [batch async for batch in stream]
    assert len(tokens_of(rest, 1)) >= 9
    assert fake.cancelled == [1]
    stream.cancel(1)
    stream.close()
    assert fake.cancelled == [1]
    engine.stop()


async def test_closing_cancels_what_still_runs() -> None:
    fake, engine = engine_that_counts(0.001)
    stream = engine.submit([([0], Sampling(max_tokens=500)), ([0], Sampling(max_tokens=1))])
    while fake.stats().num_running == 2:
        await anext(stream)
    stream.close()
    assert fake.cancelled == [1]
    async with asyncio.timeout(1):
        assert len([batch async for batch in stream]) <= 1
    engine.stop()


async def test_a_refused_request_cancels_those_submitted_with_it() -> None:
    fake, engine = engine_that_counts()

    def refuse_second(prompt: Sequence[int], _params: Any) -> list[int]:
        if prompt == [2]:
            raise ValueError("too long")
        return list(COUNT)

    fake.script = refuse_second
    with pytest.raises(BadRequestError, match="too long"):
        engine.submit([([1], Sampling()), ([2], Sampling())])
    assert fake.cancelled == [1]
    engine.stop()


async def test_a_dead_engine_is_told_at_submit() -> None:
    fake, engine = engine_that_counts()
    fake.die("cosmic ray")
    assert engine.problem() == "cosmic ray"
    with pytest.raises(EngineError, match="cosmic ray"):
        engine.submit([([1], Sampling())])
    engine.stop()


async def test_stopping_ends_open_streams_with_an_error() -> None:
    fake, engine = engine_that_counts(0.001)
    stream = engine.submit([([0], Sampling(max_tokens=500))])
    await anext(stream)
    engine.stop()
    assert fake.stopped
    with pytest.raises(UnavailableError, match="shutting down"):
        async for _ in stream:
            pass


async def test_an_engine_that_makes_no_step_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, engine = engine_that_counts(0.001)
    stuck = SimpleNamespace(**{**vars(fake.stats()), "last_step_time": 0.0})
    monkeypatch.setattr(fake, "stats", lambda: stuck)
    monkeypatch.setattr(async_engine, "STALL_SECONDS", 0.005)
    assert engine.problem() is None  # nothing to do
    stream = engine.submit([([0], Sampling(max_tokens=500))])
    assert engine.problem() is None  # only just begun
    await asyncio.sleep(0.01)
    assert "not finished a step" in (engine.problem() or "")
    stream.close()
    assert engine.problem() is None
    engine.stop()


class Even:
    """A constraint: even tokens, and 40 behind 20."""

    forks = 0

    def __init__(self) -> None:
        self.last = 0

    def consume(self, tokens: Sequence[int]) -> None:
        self.last = tokens[-1]

    def forced(self) -> list[int]:
        if self.last == 8:
            raise ConstraintError("eight is enough")
        return [40] if self.last == 20 else []

    def fill_mask(self, address: int) -> None:
        mask = (ctypes.c_uint32 * 2).from_address(address)
        mask[0] = mask[1] = 0x55555555

    def fork(self) -> Even:
        Even.forks += 1
        return Even()


async def test_a_constraint_is_forked_for_every_sequence_and_forgotten_with_it() -> None:
    fake, engine = engine_that_counts()
    request = [([2], Sampling(max_tokens=4)), ([20], Sampling(max_tokens=3))]
    batches = [batch async for batch in engine.submit(request, constraint=Even())]
    assert [tokens_of(batches, index) for index in range(2)] == [[2, 0, 0, 0], [20, 40, 0]]
    assert Even.forks == 2
    stream = engine.submit([([2], Sampling(max_tokens=900))], constraint=Even())
    stream.close()
    fake.error = "broken"
    with pytest.raises(EngineError):
        engine.submit([([2], Sampling())], constraint=Even())
    assert not engine._masks._constraints
    engine.stop()


async def test_a_failing_constraint_ends_its_own_sequence() -> None:
    _, engine = engine_that_counts()
    request = [([8], Sampling()), ([10], Sampling(max_tokens=2))]
    batches = [batch async for batch in engine.submit(request, constraint=Even())]
    events = {index: event for batch in batches for index, event in batch}
    assert (events[0].finish, events[0].error) == ("error", "eight is enough")
    assert (events[1].finish, events[1].error) == ("length", "")
    engine.stop()
