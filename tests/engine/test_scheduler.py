"""The scheduler against a fake model: on caches far too small, everybody finishes with the text that they get alone."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from langchain_vllm_server._engine_test import KV_BLOCK_SIZE as BLOCK
from langchain_vllm_server._engine_test import InvariantError, Scheduler

from tests.engine.fake_model import VOCAB, FakeEngine, assert_all_as_alone, num_blocks_for, random_tokens, sampling

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from langchain_vllm_server._engine_test import ScheduledSequence


def submit_random(engine: FakeEngine, rng: random.Random) -> None:
    """One request, or several with the same prompt; prompts begin with blocks that many have, in any order."""
    capacity = engine.num_blocks * BLOCK
    length = rng.randint(1, capacity - 1)
    shared = [
        token for _ in range(rng.randint(0, engine.num_blocks)) for token in random_tokens(BLOCK, rng.randint(0, 1))
    ]
    prompt = (shared + random_tokens(length, seed=rng.getrandbits(32)))[:length]
    for _ in range(rng.choice([1, 1, 1, 4])):
        if rng.random() < 0.2:
            engine.submit(prompt, max_tokens=0, pooling=rng.choice(["last", "mean"]), cache_salt=rng.choice(["", "a"]))
            continue
        max_tokens = rng.randint(0, capacity - length)
        engine.submit(
            prompt,
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, max_tokens) if rng.random() < 0.3 else 0,
            stop_token_ids=rng.sample(range(VOCAB), rng.choice([0, 0, 1, 3])),
            num_prompt_logprobs=rng.choice([-1, -1, 0]),
            cache_salt=rng.choice(["", "", "a", "b"]),
            repetition_detection=rng.choice([(0, 1, 2), (3, 1, 2)]),
        )


@pytest.mark.parametrize("seed", range(60))
def test_random_operations_on_a_small_cache(seed: int) -> None:
    rng = random.Random(seed)
    engine = FakeEngine(
        num_blocks=rng.randint(1, 16),
        max_num_seqs=rng.randint(1, 8),
        max_num_batched_tokens=rng.choice([1, 7, 16, 33, 64, 256]),
        enable_prefix_caching=rng.random() < 0.8,
    )
    for _ in range(30):
        submit_random(engine, rng)
        for _ in range(rng.randint(0, 6)):
            if engine.scheduler.busy:
                engine.step()
        if engine.live and rng.random() < 0.3:
            engine.cancel(rng.choice(engine.live))
    engine.run()
    assert_all_as_alone(engine)


def test_hundred_requests_that_keep_preempting_each_other() -> None:
    rng = random.Random(1)
    engine = FakeEngine(num_blocks=12, max_num_seqs=8, max_num_batched_tokens=64)
    for _ in range(100):
        engine.submit(random_tokens(rng.randint(1, 40), seed=rng.getrandbits(32)), max_tokens=rng.randint(20, 120))
    engine.run()
    assert_all_as_alone(engine)
    assert engine.scheduler.stats()["num_preemptions"] > 50


def test_prefill_in_chunks_then_one_token_per_step() -> None:
    engine = FakeEngine(num_blocks=10, max_num_batched_tokens=32)
    engine.submit(random_tokens(100), max_tokens=3)
    assert [[(s.num_computed, s.num_tokens) for s in step] for step in engine.run()] == [
        [(0, 32)],
        [(32, 32)],
        [(64, 32)],
        [(96, 4)],
        [(100, 1)],
        [(101, 1)],
    ]


def test_running_sequences_come_before_waiting_prompts() -> None:
    engine = FakeEngine(num_blocks=20, max_num_batched_tokens=16)
    engine.submit(random_tokens(8, seed=1), max_tokens=10)
    engine.submit(random_tokens(100, seed=2), max_tokens=10)
    engine.submit(random_tokens(4, seed=3), max_tokens=10)
    assert [(s.id, s.num_tokens) for s in engine.step()] == [(0, 8), (1, 8)]
    assert [(s.id, s.num_tokens) for s in engine.step()] == [(0, 1), (1, 15)]


def test_a_long_prompt_does_not_hold_up_answers() -> None:
    """Prompts share 64 tokens of a step while few answers run, eight for each answer while many do, all otherwise."""
    engine = FakeEngine(num_blocks=200, max_num_batched_tokens=256)
    for i in range(12):
        engine.submit(random_tokens(8, seed=i), max_tokens=3 if i < 11 else 20)
    engine.step()
    for seed in (90, 91):
        engine.submit(random_tokens(300, seed=seed), max_tokens=5)
    read = [sum(s.num_tokens for s in step if s.num_tokens > 1) for step in engine.run()]
    assert read[:2] == [96, 96], "beside twelve answers"
    assert read[2:8] == [64] * 6, "beside the last of them, then beside the first prompt's"
    assert sum(read) == 600
    assert_all_as_alone(engine)


def test_a_burst_is_read_before_the_few_go_on() -> None:
    """Of more than eight prompts, as far as they can be admitted, whole steps while more wait than answer."""

    def read_beside_an_answer(num_prompts: int, **options: Any) -> list[int]:
        engine = FakeEngine(num_blocks=200, max_num_batched_tokens=256, **options)
        engine.submit(random_tokens(8, seed=0), max_tokens=80)
        engine.step()
        for seed in range(num_prompts):
            engine.submit(random_tokens(100, seed=seed + 1), max_tokens=80)
        read = [sum(s.num_tokens for s in step if s.num_tokens > 1) for step in engine.run()]
        assert_all_as_alone(engine)
        return read

    assert read_beside_an_answer(12)[:3] == [255, 253, 64], "beside one answer, three, six"
    assert read_beside_an_answer(20)[:4] == [255, 253, 250, 248], "the last beside eight"
    assert read_beside_an_answer(8)[:3] == [64] * 3
    assert read_beside_an_answer(12, max_num_seqs=9)[:3] == [64] * 3


def test_no_more_than_max_num_seqs_run() -> None:
    engine = FakeEngine(num_blocks=100, max_num_seqs=2)
    for length in (2, 4, 2):
        engine.submit(random_tokens(length, seed=length), max_tokens=length)
    assert [[s.id for s in step] for step in engine.run()] == [[0, 1], [0, 1], [1, 2], [1, 2]]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    engine = FakeEngine(num_blocks=4)
    engine.submit(random_tokens(BLOCK, seed=1), max_tokens=40)
    engine.submit(random_tokens(BLOCK, seed=2), max_tokens=40)
    steps = [[s.id for s in step] for step in engine.run()]
    assert_all_as_alone(engine)
    assert engine.scheduler.stats()["num_preemptions"] == 1
    first_alone = steps.index([0])
    # Both grow to two blocks; the third block of the first takes the second's.
    assert first_alone == 1 + BLOCK
    # The first ends with 55 computed tokens; only then are the second's 32 + 1 free again.
    assert steps[first_alone:].index([1]) == 40 - first_alone


def test_a_preempted_sequence_finds_what_was_not_evicted() -> None:
    engine = FakeEngine(num_blocks=6)
    engine.submit(random_tokens(BLOCK, seed=1), max_tokens=30)
    engine.submit(random_tokens(3 * BLOCK, seed=2), max_tokens=30)
    steps = engine.run()
    assert_all_as_alone(engine)
    assert engine.scheduler.stats()["num_preemptions"] == 1
    readmitted = [s for step in steps for s in step if s.id == 1 and s.num_tokens > 1][1]
    assert readmitted.num_computed == 3 * BLOCK, "of four full blocks the first sequence needed one, the last"
    assert engine.requests[1].events[-1].num_cached_tokens == 0, "counted at the first admission"


def test_admission_leaves_room_for_those_who_run() -> None:
    engine = FakeEngine(num_blocks=4)
    engine.submit(random_tokens(2 * BLOCK - 1, seed=1), max_tokens=12)
    engine.submit(random_tokens(2 * BLOCK, seed=2), max_tokens=2)
    assert [len(step) for step in engine.run()] == [1] * 12 + [1, 1]
    assert engine.scheduler.stats()["num_preemptions"] == 0


def test_cached_free_blocks_count_as_taken_at_admission() -> None:
    """A prompt whose blocks are cached and free needs them from the free list all the same."""
    engine = FakeEngine(num_blocks=4)
    cached = random_tokens(2 * BLOCK + 1, seed=1)
    engine.generate(cached, max_tokens=1)
    engine.submit(random_tokens(BLOCK - 2, seed=2), max_tokens=2)  # takes one of the four
    engine.submit(cached, max_tokens=1)  # three, two of them cached, and one of room: one too many
    assert [[s.id for s in step] for step in engine.run()] == [[1], [1], [2]]
    assert engine.requests[2].events[0].num_cached_tokens == 2 * BLOCK


@pytest.mark.parametrize(
    ("values", "count", "finish"),
    [
        ({"max_tokens": 10}, 10, "length"),
        ({"max_tokens": 10, "stop_token_ids": [3]}, None, "stop"),
        ({"max_tokens": 1000}, 1000, "length"),
    ],
)
def test_why_a_sequence_ends(values: dict[str, object], count: int | None, finish: str) -> None:
    prompt = next(p for p in map(random_tokens, range(1, 100)) if 3 in outputs(p)[2:9] and 3 not in outputs(p)[:2])
    request = FakeEngine(num_blocks=80).generate(prompt, **values)
    expected = outputs(prompt, 1000)
    assert request.output == expected[: count or expected.index(3) + 1]
    assert request.finish == finish


def outputs(prompt: list[int], count: int = 10) -> list[int]:
    return FakeEngine(num_blocks=80).generate(prompt, max_tokens=count).output


def test_a_stop_token_before_min_tokens_does_not_end() -> None:
    scheduler = Scheduler(num_blocks=4)
    scheduler.submit(1, [1], sampling(max_tokens=9, min_tokens=2, stop_token_ids=[5]))
    finishes = []
    while scheduler.busy:
        scheduler.schedule()
        finishes += [event.finish for event in scheduler.commit([5])]
    assert finishes == ["", "", "stop"]


@pytest.mark.parametrize(("eager", "wakes"), [(True, [True] * 4), (False, [True, False, False, True])])
def test_which_tokens_wake_who_reads(eager: bool, wakes: list[bool]) -> None:
    request = FakeEngine(num_blocks=4).generate(random_tokens(3), max_tokens=4, eager=eager)
    assert [event.wakes for event in request.events] == wakes


def test_events_tell_when_and_what() -> None:
    engine = FakeEngine(num_blocks=10, max_num_batched_tokens=32)
    request = engine.generate(random_tokens(40), max_tokens=2)
    assert [(e.scheduled_time, e.time) for e in request.events] == [(1.0, 2.5), (1.0, 3.5)]
    assert [(len(e.tokens), e.num_logprobs) for e in request.events] == [(1, 1), (1, 1)]
    assert engine.scheduler.stats()["num_steps"] == 3
    assert engine.scheduler.stats()["last_step_time"] == 3.5


STEPS_TO = {"waiting": 0, "prefilling": 1, "prefilled": 2, "decoding": 4, "preempted": 20}


@pytest.mark.parametrize("state", STEPS_TO)
def test_cancel_in_every_state(state: str) -> None:
    engine = FakeEngine(num_blocks=5, max_num_batched_tokens=40)
    engine.submit(random_tokens(BLOCK, seed=1), max_tokens=60)
    victim = engine.submit(random_tokens(BLOCK + 9, seed=2), max_tokens=50)
    waiting = engine.submit(random_tokens(4 * BLOCK, seed=3), max_tokens=3)
    for _ in range(STEPS_TO[state]):
        engine.step()
    assert engine.scheduler.stats()["num_preemptions"] == (state == "preempted")
    event = engine.cancel(victim)
    assert event is not None
    assert (event.request_id, event.tokens, event.finish) == (victim, [], "abort")
    engine.run()
    assert_all_as_alone(engine)
    assert engine.requests[waiting].finish == "length"


def test_cancel_of_the_unknown_and_the_finished_is_nothing() -> None:
    engine = FakeEngine(num_blocks=4)
    engine.generate([1, 2, 3], max_tokens=1)
    assert engine.cancel(0) is None
    assert engine.scheduler.cancel(77) is None


def test_fail_all_ends_everything_even_within_a_step() -> None:
    scheduler = Scheduler(num_blocks=4, max_num_seqs=2)
    for request_id in range(4):
        scheduler.submit(request_id, [1] * 20, sampling(max_tokens=3))
    scheduler.schedule()
    assert [(e.request_id, e.finish) for e in scheduler.fail_all()] == [(i, "error") for i in range(4)]
    scheduler.check_integrity()
    assert not scheduler.busy
    assert scheduler.stats()["num_free_blocks"] == 4


def test_broken_promises_of_the_caller_are_named() -> None:
    scheduler = Scheduler(num_blocks=2)
    scheduler.submit(1, [1], sampling(max_tokens=2))
    with pytest.raises(InvariantError, match="request id 1 is in use"):
        scheduler.submit(1, [1], sampling(max_tokens=2))
    with pytest.raises(InvariantError, match="the whole cache cannot hold"):
        scheduler.submit(2, [1] * (2 * BLOCK), sampling(max_tokens=1))
    with pytest.raises(InvariantError, match="empty prompt"):
        scheduler.submit(2, [], sampling(max_tokens=1))
    scheduler.schedule()
    with pytest.raises(InvariantError, match="fewer tokens sampled"):
        scheduler.commit([])


def test_the_largest_request_that_fits_runs() -> None:
    engine = FakeEngine(num_blocks=3)
    for _ in range(2):
        engine.generate(random_tokens(BLOCK), max_tokens=2 * BLOCK)
    assert num_blocks_for(3 * BLOCK) == 3
    assert_all_as_alone(engine)


@pytest.mark.parametrize(("pooling", "num_cached"), [("last", 32), ("mean", 0)])
def test_a_mean_needs_every_token_and_the_last_one_only_itself(pooling: str, num_cached: int) -> None:
    engine = FakeEngine(num_blocks=10, max_num_batched_tokens=16)
    prompt = random_tokens(40)
    for expected in (0, num_cached):
        (event,) = engine.generate(prompt, max_tokens=0, pooling=pooling).events
        assert (event.finish, event.num_cached_tokens) == ("stop", expected)
    assert engine.generate(prompt, max_tokens=1).events[0].num_cached_tokens == 32


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_a_mean_goes_on_where_it_was_preempted(enable_prefix_caching: bool) -> None:
    engine = FakeEngine(num_blocks=12, max_num_batched_tokens=4, enable_prefix_caching=enable_prefix_caching)
    engine.submit(random_tokens(16), max_tokens=60)
    engine.submit(random_tokens(140, seed=1), max_tokens=0, pooling="mean")  # the fake engine checks what it pools
    engine.run()
    assert engine.scheduler.stats()["num_preemptions"] > 0


def test_without_tokens_to_generate_a_prompt_is_read_and_no_more() -> None:
    engine = FakeEngine(num_blocks=4)
    live = engine.generate(random_tokens(4 * BLOCK), num_prompt_logprobs=0, max_tokens=0)
    assert (live.output, live.finish, len(live.events)) == ([], "length", 1)


@pytest.mark.parametrize(("detection", "length"), [((4, 1, 3), 12), ((3, 1, 3), 50), ((8, 5, 2), 16), ((0, 1, 2), 50)])
def test_repetition_ends_a_sequence(detection: tuple[int, int, int], length: int) -> None:
    scheduler = Scheduler(num_blocks=10)
    scheduler.submit(1, [1, 2, 3, 4], sampling(max_tokens=50, repetition_detection=detection))
    tokens, finish = 0, ""
    while not finish:
        scheduler.schedule()
        (event,) = scheduler.commit([1 + tokens % 4])
        tokens, finish = tokens + 1, event.finish
    assert (tokens, finish) == (length, "repetition" if length < 50 else "length")


def run_ids(scheduler: Scheduler) -> list[int]:
    step = scheduler.schedule()
    ids = [s.id for s in step]
    scheduler.commit([0] * sum(s.catches_up for s in step))
    scheduler.check_integrity()
    return ids


def test_lower_priority_numbers_are_admitted_first_and_ties_in_order_of_arrival() -> None:
    scheduler = Scheduler(num_blocks=20, max_num_seqs=1)
    for request_id, priority in enumerate([0, 5, -1, 5, 0, -(2**63)]):
        scheduler.submit(request_id, [1], sampling(max_tokens=2, priority=priority))
    order = []
    while scheduler.busy:
        order += run_ids(scheduler)
    assert order == [5, 5, 2, 2, 0, 0, 4, 4, 1, 1, 3, 3]


class UrgentFirst(FakeEngine):
    """Without the promises about the order of arrival: here, whoever is more urgent comes first."""

    def _check_step(self, step: Sequence[ScheduledSequence], _answers: int) -> None:
        assert 0 < sum(s.num_tokens for s in step) <= self.budget
        assert len({s.id for s in step}) == len(step)


@pytest.mark.parametrize("seed", range(30))
def test_random_priorities_on_a_small_cache(seed: int) -> None:
    rng = random.Random(seed)
    engine = UrgentFirst(num_blocks=rng.randint(2, 12), max_num_seqs=rng.randint(1, 6), max_num_batched_tokens=48)
    for _ in range(60):
        length = rng.randint(1, engine.num_blocks * BLOCK - 1)
        engine.submit(
            random_tokens(length, seed=rng.randint(0, 3)),
            max_tokens=rng.randint(0, engine.num_blocks * BLOCK - length),
            priority=rng.randint(-2, 2),
            num_prompt_logprobs=rng.choice([-1, 0]),
        )
        for _ in range(rng.randint(0, 4)):
            if engine.scheduler.busy:
                engine.step()
        if engine.live and rng.random() < 0.2:
            engine.cancel(rng.choice(engine.live))
    engine.run()
    assert_all_as_alone(engine)


def test_the_last_by_priority_is_preempted_whenever_it_came() -> None:
    scheduler = Scheduler(num_blocks=4)
    scheduler.submit(0, [1] * 24, sampling(max_tokens=30, priority=1))
    run_ids(scheduler)
    scheduler.submit(1, [2] * 15, sampling(max_tokens=40, priority=0))
    ran = [run_ids(scheduler) for _ in range(20)]
    assert ran[0] == [0, 1]
    assert ran[1] == [1, 0], "from then on the more urgent one comes first"
    assert ran[-1] == [1], "it takes what the other one had"
    assert scheduler.stats()["num_preemptions"] == 1
    while scheduler.busy:
        last = run_ids(scheduler)
    assert last == [0]
