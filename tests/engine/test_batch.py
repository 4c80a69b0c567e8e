"""make_batch: the arrays that a device gets for one step."""

from __future__ import annotations

import random

from langchain_vllm_server._engine_test import KV_BLOCK_SIZE as BLOCK
from langchain_vllm_server._engine_test import Scheduler

from tests.engine.fake_model import num_blocks_for, sampling


def test_a_decode_and_a_chunk() -> None:
    scheduler = Scheduler(num_blocks=20, max_num_batched_tokens=24)
    scheduler.submit(1, list(range(100, 120)), sampling(max_tokens=5, seed=11))
    scheduler.schedule()
    assert scheduler.make_batch() == {
        "tokens": list(range(100, 120)),
        "positions": list(range(20)),
        "sequences": [(0, 20, 0, 0)],
        "block_tables": [0, 1],
        "logit_rows": [19],
        "sampling": [(list(range(100, 120)), 20, 20, 11)],
        "scoring_rows": [],
        "scoring": [],
        "pooling_rows": [],
    }
    scheduler.commit([7])
    scheduler.submit(2, list(range(200, 250)), sampling(max_tokens=5, seed=22))
    scheduler.schedule()
    assert scheduler.make_batch() == {
        "tokens": [7, *range(200, 223)],
        "positions": [20, *range(23)],
        "sequences": [(0, 1, 20, 0), (1, 23, 0, 2)],  # the second has blocks for all its tokens, and needs two so far
        "block_tables": [0, 1, 2, 3],
        "logit_rows": [0],  # a chunk that does not reach the end samples nothing
        "sampling": [([*range(100, 120), 7], 20, 21, 11)],
        "scoring_rows": [],
        "scoring": [],
        "pooling_rows": [],
    }
    scheduler.commit([8])
    step = scheduler.schedule()
    assert scheduler.make_batch()["sequences"] == [(0, 1, 21, 0), (1, 23, 23, 2)]
    assert scheduler.make_batch()["block_tables"] == [0, 1, *step[1].blocks[:3]]
    assert scheduler.make_batch()["positions"] == [21, *range(23, 46)]


def test_prompt_tokens_are_scored_behind_those_before_them() -> None:
    scheduler = Scheduler(num_blocks=20, max_num_batched_tokens=12)
    scheduler.submit(1, [1], sampling(max_tokens=5))
    scheduler.submit(2, list(range(100, 120)), sampling(max_tokens=5, num_prompt_logprobs=3))
    scheduler.schedule()
    assert scheduler.make_batch()["scoring_rows"] == list(range(1, 12))
    assert scheduler.make_batch()["scoring"] == [(token, 3) for token in range(101, 112)]
    scheduler.commit([7])
    scheduler.schedule()
    batch = scheduler.make_batch()
    assert batch["tokens"] == [7, *range(111, 120)]
    assert batch["scoring"] == [(token, 3) for token in range(112, 120)], "nothing follows the last token yet"
    assert (batch["scoring_rows"], batch["logit_rows"]) == (list(range(1, 9)), [0, 9])
    assert [event.prompt_logprobs for event in scheduler.commit([8, 9])] == [[], list(range(101, 120))]


def test_states_are_pooled_of_every_token_or_the_last_one_and_nothing_is_sampled() -> None:
    scheduler = Scheduler(num_blocks=20, max_num_batched_tokens=12)
    scheduler.submit(1, [1], sampling(max_tokens=5))
    scheduler.submit(2, list(range(14)), sampling(max_tokens=0, pooling="mean"))
    scheduler.submit(3, list(range(5)), sampling(max_tokens=0, pooling="last"))
    scheduler.schedule()
    assert scheduler.make_batch()["pooling_rows"] == list(range(1, 12))
    assert scheduler.commit([7])[0].finish == ""
    scheduler.schedule()
    batch = scheduler.make_batch()
    assert [num for _, num, _, _ in batch["sequences"]] == [1, 3, 5]
    assert (batch["pooling_rows"], batch["logit_rows"]) == ([1, 2, 3, 8], [0])
    assert [(event.request_id, event.finish) for event in scheduler.commit([7])] == [(1, ""), (2, "stop"), (3, "stop")]


def test_a_full_block_is_the_last_one_named() -> None:
    scheduler = Scheduler(num_blocks=20)
    scheduler.submit(1, [1] * BLOCK, sampling(max_tokens=2))
    scheduler.schedule()
    assert len(scheduler.make_batch()["block_tables"]) == 1
    scheduler.commit([1])
    scheduler.schedule()
    assert len(scheduler.make_batch()["block_tables"]) == 2


def test_random_steps_agree_with_what_was_scheduled() -> None:
    rng = random.Random(0)
    scheduler = Scheduler(num_blocks=30, max_num_seqs=6, max_num_batched_tokens=50)
    for request_id in range(60):
        prompt = rng.choices(range(50), k=rng.randint(1, 150))
        scheduler.submit(request_id, prompt, sampling(max_tokens=rng.randint(1, 40), seed=request_id))
    while scheduler.busy:
        step = scheduler.schedule()
        batch = scheduler.make_batch()
        assert len(batch["sequences"]) == len(step)
        for scheduled, (first_token, num_tokens, num_computed, first_block) in zip(
            step, batch["sequences"], strict=True
        ):
            end = num_computed + num_tokens
            rows = slice(first_token, first_token + num_tokens)
            assert (num_computed, num_tokens) == (scheduled.num_computed, scheduled.num_tokens)
            assert batch["tokens"][rows] == scheduled.tokens[num_computed:end]
            assert batch["positions"][rows] == list(range(num_computed, end))
            num_blocks = num_blocks_for(end)
            assert batch["block_tables"][first_block : first_block + num_blocks] == scheduled.blocks[:num_blocks]
        ends = [first + count - 1 for first, count, _, _ in batch["sequences"]]
        assert batch["logit_rows"] == [row for s, row in zip(step, ends, strict=True) if s.catches_up]
        assert [row[0] for row in batch["sampling"]] == [s.tokens for s in step if s.catches_up]
        assert [row[2:] for row in batch["sampling"]] == [(len(s.tokens), s.id) for s in step if s.catches_up]
        assert len(batch["tokens"]) == sum(s.num_tokens for s in step)
        assert len(batch["block_tables"]) == sum(num_blocks_for(s.num_computed + s.num_tokens) for s in step)
        scheduler.commit([rng.randrange(50) for _ in batch["logit_rows"]])
