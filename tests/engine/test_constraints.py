"""Constrained requests: what the scheduler does with forced tokens, and the engine whole with masks beside steps."""

from __future__ import annotations

import ctypes
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
from langchain_vllm_server._engine_test import Scheduler

from langchain_vllm_server.constraint import ConstraintError
from tests.engine.fake_model import sampling
from tests.engine.test_engine import SMALL, random_request
from tests.engines import running_engine
from tests.parity.test_tiny_models import VOCAB, make_llama

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WORDS = (VOCAB + 31) // 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_llama(folder)
    return folder


def allow(address: int, tokens: Sequence[int]) -> None:
    mask = (ctypes.c_uint32 * WORDS).from_address(address)
    assert not any(mask)
    for token in tokens:
        mask[token // 32] |= 1 << (token % 32)


class Maze:
    """A constraint that depends on the whole answer: now and then only one way on, else a few tokens."""

    def __init__(self, seed: int, answer: tuple[int, ...] = ()) -> None:
        self.seed = seed
        self.answer = answer

    def _random(self) -> random.Random:
        return random.Random(hash((self.seed, self.answer)))

    def consume(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            forced = self.forced()
            assert token in (forced[:1] or self.allowed()), "the engine says what it may not"
            self.answer += (token,)

    def forced(self) -> list[int]:
        """Runs are forced whole: behind any of their tokens come the rest."""
        length = len(self.answer)
        start = length - length % 8
        rng = random.Random(hash((self.seed, self.answer[:start])))
        run = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 3, 7]))]
        return run[length - start :]

    def allowed(self) -> list[int]:
        rng = self._random()
        return rng.sample(range(VOCAB), rng.choice([1, 2, 20]))

    def fill_mask(self, address: int) -> None:
        allow(address, self.allowed())

    def fork(self) -> Maze:
        return Maze(self.seed, self.answer)


class Only:
    """Allows some tokens, always the same ones."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def consume(self, tokens: Sequence[int]) -> None: ...

    def forced(self) -> list[int]:
        return []

    def fill_mask(self, address: int) -> None:
        allow(address, self.tokens)

    def fork(self) -> Only:
        return self


def test_forced_tokens_are_appended_at_once() -> None:
    """They need no step each, and the next step computes them together."""
    scheduler = Scheduler(num_blocks=8)
    scheduler.submit(1, [1, 2, 3], sampling(max_tokens=10, constrained=True))
    scheduler.schedule()
    scheduler.force(1, [7, 8, 9])
    (event,) = scheduler.commit([5])
    assert event.tokens == [7, 8, 9]
    (scheduled,) = scheduler.schedule()
    assert (scheduled.num_computed, scheduled.num_tokens) == (3, 3)
    (event,) = scheduler.commit([5])
    assert event.tokens == [5]
    assert scheduler.stats()["generation_tokens"] == 4
    scheduler.check_integrity()


@pytest.mark.parametrize(
    ("values", "finish"),
    [
        ({"max_tokens": 2}, "length"),
        ({"stop_token_ids": [8]}, "stop"),
        ({"stop_token_ids": [8], "min_tokens": 9}, "stop"),  # the constraint knows no other end
    ],
)
def test_forced_tokens_are_cut_where_the_answer_ends(values: dict[str, Any], finish: str) -> None:
    scheduler = Scheduler(num_blocks=8)
    scheduler.submit(1, [1, 2, 3], sampling(**{"max_tokens": 10, **values}, constrained=True))
    scheduler.schedule()
    scheduler.force(1, [7, 8, 9])
    (event,) = scheduler.commit([5])
    assert (event.tokens, event.finish) == ([7, 8], finish)
    assert not scheduler.busy


def test_forced_tokens_with_logprobs_come_one_by_one() -> None:
    scheduler = Scheduler(num_blocks=8)
    scheduler.submit(1, [1, 2, 3], sampling(max_tokens=10, constrained=True, num_logprobs=0))
    scheduler.schedule()
    scheduler.force(1, [7, 8])
    events = []
    for token in (7, 8, 5):
        events += scheduler.commit([token])
        scheduler.schedule()
    assert [(event.tokens, event.num_logprobs) for event in events] == [([7], 1), ([8], 1), ([5], 1)]


def test_a_failed_constraint_ends_its_sequence_alone() -> None:
    scheduler = Scheduler(num_blocks=8)
    scheduler.submit(1, [1, 2, 3], sampling(constrained=True))
    scheduler.submit(2, [1, 2, 3], sampling())
    scheduler.schedule()
    scheduler.force(1, [], "no way on")
    failed, other = scheduler.commit([5, 6])
    assert (failed.tokens, failed.finish, failed.error) == ([], "error", "no way on")
    assert (other.tokens, other.finish) == ([6], "")
    scheduler.check_integrity()


def test_same_alone_and_in_a_crowd_that_preempts(model: Path) -> None:
    """Each constrained request says the same alone and among others that preempt it, with and without logprobs."""
    rng = random.Random(1)
    requests = [random_request(rng) for _ in range(60)]
    with running_engine(model, **SMALL, enable_prefix_caching=False) as client:
        alone = [client.generate(p, Maze(i), **params) for i, (p, params) in enumerate(requests)]
        assert client.engine.stats().num_preemptions == 0
    with running_engine(model, **SMALL) as client:
        ids = [client.submit(p, Maze(i) if i % 3 else None, **params) for i, (p, params) in enumerate(requests)]
        crowd = client.wait(*ids)
        assert client.engine.stats().num_preemptions > 0
        assert client.engine.stats().prefix_cache_hits > 0
    assert all(result.finish in ("stop", "length") for result in crowd)
    for i, (one, among) in enumerate(zip(alone, crowd, strict=True)):
        Maze(i).consume(one.tokens)  # which checks them
        if i % 3:
            assert (among.tokens, among.logprobs, among.finish) == (one.tokens, one.logprobs, one.finish)
    with running_engine(model, **SMALL) as client:  # logprobs: a forward for each forced token
        for i, (prompt, params) in enumerate(requests[:20]):
            slow = client.generate(prompt, Maze(i), **{**params, "num_logprobs": 1})
            assert (slow.tokens, slow.finish) == (alone[i].tokens, alone[i].finish)
            assert len(slow.logprobs) == len(slow.tokens)


def test_forced_tokens_save_steps(model: Path) -> None:
    class Recital(Only):
        def forced(self) -> list[int]:
            return list(range(40))

    with running_engine(model, **SMALL) as client:
        result = client.generate([1, 2], Recital(), max_tokens=30)
        steps = client.engine.stats().num_steps
    assert result.tokens == list(range(30))
    assert steps == 1


def test_the_mask_wins_over_everything(model: Path) -> None:
    """Bias, penalties, greed and min_tokens choose among what the constraint allows."""
    loud = [(token, 100.0) for token in range(VOCAB) if token not in (5, 130)]
    with running_engine(model, **SMALL) as client:
        for values in (
            {"logit_bias": loud},
            {"temperature": 1.5, "seed": 3, "top_k": 1, "logit_bias": loud},
            {"repetition_penalty": 1.9, "frequency_penalty": 2.0},
            {"num_logprobs": 2},
        ):
            result = client.generate([1, 2], Only(5, 130), max_tokens=20, **values)
            assert set(result.tokens) <= {5, 130}
        held = client.generate([1, 2], Only(5, 130), max_tokens=9, stop_token_ids=[5], min_tokens=6)
        assert held.tokens[:6] == [130] * 6
        ended = client.generate([1, 2], Only(5), max_tokens=9, stop_token_ids=[5], min_tokens=6)
    assert (ended.tokens, ended.finish) == ([5], "stop")


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (type("Raises", (Only,), {"forced": lambda _: 1 // 0}), "ZeroDivisionError"),
        (type("Gives up", (Only,), {"consume": lambda *_: _give_up()}), "cannot go on"),
        (type("Allows nothing", (Only,), {"fill_mask": lambda *_: None}), "allows no token"),
        (type("Forces nonsense", (Only,), {"forced": lambda _: [1, VOCAB]}), "not in the vocabulary"),
    ],
)
def test_a_bad_constraint_ends_its_request_alone(model: Path, constraint: type[Only], reason: str) -> None:
    with running_engine(model, **SMALL) as client:
        bad = client.submit([1, 2], constraint(7), max_tokens=20)
        good = client.submit([1, 2], Only(7), max_tokens=20)
        failed, served = client.wait(bad, good)
        assert failed.finish == "error"
        assert reason in failed.error
        assert (served.tokens, served.finish, served.error) == ([7] * 20, "length", "")
        assert client.generate([1, 2], max_tokens=2).finish == "length"


def _give_up() -> None:
    raise ConstraintError("cannot go on")


def test_stopping_waits_for_no_constraint(model: Path) -> None:
    """The engine stops, and answers, while a constraint is still thinking; and the thread that answers ends."""
    entered, leave = threading.Event(), threading.Event()

    class Slow(Only):
        def forced(self) -> list[int]:
            entered.set()
            leave.wait(30)
            return []

    with running_engine(model, **SMALL) as client:
        request_id = client.submit([1, 2], Slow(7), max_tokens=20)
        assert entered.wait(30)
        client.engine.stop()
        assert client.wait(request_id, seconds=5)[0].finish == "error"
        assert client.engine.wait_masks() is None
        leave.set()


def test_cancelled_while_its_constraint_thinks(model: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(Only):
        def forced(self) -> list[int]:
            entered.set()
            leave.wait(30)
            return []

    with running_engine(model, **SMALL) as client:
        request_id = client.submit([1, 2], Slow(7), max_tokens=20)
        assert entered.wait(30)
        client.engine.cancel(request_id)
        leave.set()
        assert client.wait(request_id)[0].finish == "abort"
        assert client.generate([1, 2], Only(7), max_tokens=2).tokens == [7, 7]


def test_answers_that_fit_no_demand_are_refused(model: Path) -> None:
    with running_engine(model, **SMALL) as client, pytest.raises(ValueError, match="1 answers to 0 demands"):
        client.engine.answer_masks([([], "")])
