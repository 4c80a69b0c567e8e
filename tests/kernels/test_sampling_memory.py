"""What a GPU sets apart for sampling is what the requests of any step take at most."""

from __future__ import annotations

from typing import Any

import numpy as np

from langchain_vllm_server import _kernels_test

VOCAB = 25_000
PIECE = 1 << 18  # bytes of rows that go to the GPU together, before the last of them
EDIT, TOP = 12, 8  # bytes that a row sends for an edit, and gets for a logit
DRAW, LOGPROBS = 56, 32  # bytes that it sends beside, and of one whose log-probabilities are wanted
CONFIG = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
TOKENS = list(range(VOCAB))
EVERYTHING: dict[str, Any] = {
    "bad_words": [[token] for token in TOKENS] * 2,
    "stop_token_ids": TOKENS * 2,
    "min_tokens": VOCAB + 1,
    "logit_bias": [(token, 0.5) for token in TOKENS],
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "allowed_token_ids": TOKENS,
}


def memory_taken(*requests: dict[str, Any]) -> int:
    """By rows that are one piece; the last has every token in its output, and a constraint."""
    device = _kernels_test.Device("cuda", 1)
    device.reserve_scratch(CONFIG | {"vocab_size": VOCAB}, 1, 1)
    before = device.memory_available()
    *others, last = requests
    rows = [*((other, [0], 1, 1) for other in others), (last, [0, *TOKENS], 1, VOCAB + 1)]
    mask = [2**32 - 1] * ((VOCAB + 31) // 32)
    device.sample(np.zeros((len(rows), VOCAB), np.float32), rows, [*[None] * len(others), mask])
    return int(before - device.memory_available())


def test_the_most_that_is_sent_has_room_on_cuda() -> None:
    biases = (PIECE - DRAW - 1) // EDIT  # the most that leave room for a row behind them
    first = {"logit_bias": [(token, 0.5) for token in TOKENS[:biases]]}
    assert memory_taken(first, EVERYTHING | {"num_logprobs": 0, "logprob_token_ids": TOKENS}) == 0


def test_the_most_that_comes_back_has_room_on_cuda() -> None:
    rest = (PIECE - 2 * (DRAW + LOGPROBS) - 1) // TOP - VOCAB  # of logits, likewise
    assert (
        memory_taken(*({"num_logprobs": count} for count in (VOCAB, rest)), EVERYTHING | {"num_logprobs": VOCAB}) == 0
    )
