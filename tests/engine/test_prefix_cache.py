"""What the scheduler finds again of prompts that it has seen."""

from __future__ import annotations

import pytest
from langchain_vllm_server._engine_test import KV_BLOCK_SIZE as BLOCK

from tests.engine.fake_model import FakeEngine, assert_all_as_alone, random_tokens


@pytest.mark.parametrize(("length", "cached"), [(15, 0), (16, 0), (17, 16), (32, 16), (33, 32), (40, 32)])
def test_whole_blocks_of_a_prompt_are_found_again_but_never_all_tokens(length: int, cached: int) -> None:
    engine = FakeEngine(num_blocks=10)
    first, second = (engine.generate(random_tokens(length), max_tokens=2) for _ in range(2))
    assert [event.num_cached_tokens for event in first.events] == [0, 0]
    assert [event.num_cached_tokens for event in second.events] == [cached, cached]
    assert first.output == second.output
    stats = engine.scheduler.stats()
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"]) == (2 * length, cached)


def test_generated_tokens_are_cached_too() -> None:
    engine = FakeEngine(num_blocks=10)
    first = engine.generate(random_tokens(10), max_tokens=30)
    # The last token was never run, so 39 are in the cache: two full blocks.
    conversation = first.prompt + first.output + random_tokens(10, seed=2)
    assert engine.generate(conversation, max_tokens=1).events[0].num_cached_tokens == 32


def test_a_prompt_is_shared_within_one_step() -> None:
    engine = FakeEngine(num_blocks=10)
    for _ in range(3):
        engine.submit(random_tokens(40), max_tokens=5)
    step = engine.step()
    assert [(s.num_computed, s.num_tokens) for s in step] == [(0, 40), (32, 8), (32, 8)]
    assert len({tuple(s.blocks[:2]) for s in step}) == 1
    assert engine.scheduler.stats()["num_free_blocks"] == 10 - 2 - 3
    engine.run()
    assert_all_as_alone(engine)


def test_the_same_tokens_after_another_prefix_are_not_shared() -> None:
    engine = FakeEngine(num_blocks=10)
    one, other, tail = (random_tokens(BLOCK + 1, seed=seed) for seed in range(3))
    engine.generate(one[:BLOCK] + tail, max_tokens=1)
    engine.generate(other, max_tokens=1)
    assert engine.generate(other[:BLOCK] + tail, max_tokens=1).events[0].num_cached_tokens == BLOCK


def test_without_prefix_caching_nothing_is_found_or_counted() -> None:
    engine = FakeEngine(num_blocks=10, enable_prefix_caching=False)
    for _ in range(2):
        assert engine.generate(random_tokens(40), max_tokens=2).events[0].num_cached_tokens == 0
    assert engine.scheduler.stats()["prefix_cache_queries"] == 0


def test_eviction_takes_the_least_recently_used_prefix_tail_first() -> None:
    engine = FakeEngine(num_blocks=6)
    old, new = random_tokens(2 * BLOCK + 1, seed=1), random_tokens(2 * BLOCK + 1, seed=2)
    for prompt in (old, new, old):  # each leaves two full blocks; `old` was used last
        engine.generate(prompt, max_tokens=1)
    engine.generate(random_tokens(3 * BLOCK - 1, seed=3), max_tokens=1)  # two private blocks were free: it evicts one
    assert cached_tokens(engine, old) == 2 * BLOCK
    assert cached_tokens(engine, new) == BLOCK


def cached_tokens(engine: FakeEngine, prompt: list[int]) -> int:
    """Of the prompt, without changing which blocks are cached: the request is cancelled as soon as it ran."""
    request_id = engine.submit(prompt, max_tokens=2)
    engine.step()
    event = engine.cancel(request_id)
    assert event is not None
    return event.num_cached_tokens


def test_a_salt_has_a_cache_of_its_own() -> None:
    engine = FakeEngine(num_blocks=20)
    prompt = random_tokens(40)
    cached = [engine.generate(prompt, cache_salt=salt, max_tokens=1).events[0].num_cached_tokens for salt in "abab"]
    assert cached == [0, 0, 32, 32]
    assert engine.generate(prompt, max_tokens=1).events[0].num_cached_tokens == 0


def test_salts_are_forgotten_when_there_are_more_than_blocks() -> None:
    engine = FakeEngine(num_blocks=5)
    for salt in "abcdea":
        assert engine.generate(random_tokens(20), cache_salt=salt, max_tokens=1).events[0].num_cached_tokens in (0, 16)
    engine.generate(random_tokens(20), cache_salt="f", max_tokens=1)
    assert engine.generate(random_tokens(20), cache_salt="a", max_tokens=1).events[0].num_cached_tokens == 0


def test_scored_prompts_are_computed_whole_and_cached_for_others() -> None:
    engine = FakeEngine(num_blocks=10, max_num_batched_tokens=16)
    prompt = random_tokens(40)
    for scored in (False, True, False):
        live = engine.generate(prompt, num_prompt_logprobs=0 if scored else -1, max_tokens=2)
        assert live.events[0].num_cached_tokens == (32 if live is not engine.requests[0] and not scored else 0)


def test_forgotten_prefixes_are_computed_again_and_live_ones_kept() -> None:
    engine = FakeEngine(num_blocks=10)
    prompt = random_tokens(40)
    engine.generate(prompt, max_tokens=1)
    engine.scheduler.forget_prefixes()
    assert engine.generate(prompt, max_tokens=1).events[0].num_cached_tokens == 0
    running = engine.submit(prompt, max_tokens=3)
    engine.step()
    engine.scheduler.forget_prefixes()
    engine.scheduler.check_integrity()
    engine.run()
    assert engine.requests[running].finish == "length"
