"""validate(): a request that cannot be served is refused with the parameter's name, its value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_vllm_server._engine_test import validate

from tests.engine.fake_model import sampling

NAN, INFINITY = float("nan"), float("inf")


def check(prompt: tuple[int, ...] = (1, 2, 3), cache_tokens: int = 1000, **params: Any) -> None:
    validate(list(prompt), sampling(**params), vocab_size=50, max_model_len=100, cache_tokens=cache_tokens)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 100.0},
        {"top_p": 1e-6},
        {"top_p": 1.0},
        {"top_k": 10**9},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"repetition_penalty": 0.01},
        {"logit_bias": [(0, -100.0), (49, 100.0)]},
        {"num_logprobs": -1},
        {"num_logprobs": 50},
        {"max_tokens": 97},
        {"max_tokens": 0},
        {"repetition_detection": (1024, 1024, 2)},
        {"num_prompt_logprobs": 50},
        {"max_tokens": 5, "min_tokens": 5},
        {"stop_token_ids": [0, 49]},
        {"seed": 2**64 - 1},
    ],
    ids=str,
)
def test_the_ends_of_each_range_are_allowed(params: dict[str, Any]) -> None:
    check(**params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, r"^temperature must be a finite number of at least 0, got -0\.1$"),
        ({"temperature": NAN}, r"^temperature .* got nan"),
        ({"temperature": INFINITY}, r"^temperature .* got inf"),
        ({"top_p": 0.0}, r"^top_p must be above 0 and at most 1, got 0$"),
        ({"top_p": 1.5}, r"^top_p .* got 1\.5$"),
        ({"top_p": NAN}, r"^top_p .* got nan$"),
        ({"top_k": -1}, r"^top_k must be .* at least 0, got -1$"),
        ({"min_p": -0.5}, r"^min_p must be between 0 and 1, got -0\.5$"),
        ({"min_p": NAN}, r"^min_p .* got nan$"),
        ({"presence_penalty": 2.5}, r"^presence_penalty must be between -2 and 2, got 2\.5$"),
        ({"frequency_penalty": -3.0}, r"^frequency_penalty must be between -2 and 2, got -3$"),
        ({"repetition_penalty": 0.0}, r"^repetition_penalty must be a finite number above 0, got 0$"),
        ({"repetition_penalty": INFINITY}, r"^repetition_penalty .* got inf$"),
        ({"logit_bias": [(50, 1.0)]}, r"^logit_bias keys must be token ids between 0 and 49, got 50$"),
        (
            {"logit_bias": [(7, 1.0), (3, 2.0), (7, 0.0)]},
            r"^logit_bias must name each token once, got 7 more than once$",
        ),
        ({"logprob_token_ids": [4, 0, 4]}, r"^logprob_token_ids must name each token once, got 4 more than once$"),
        ({"logit_bias": [(1, 1.0), (3, NAN)]}, r"^logit_bias of token 3 must be finite, got nan$"),
        ({"num_logprobs": 51}, r"^num_logprobs must be between -1 and 50, got 51$"),
        ({"max_tokens": -1}, r"^max_tokens must be at least 0, got -1$"),
        ({"num_prompt_logprobs": 51}, r"^num_prompt_logprobs must be between -1 and 50, got 51$"),
        ({"allowed_token_ids": [50]}, r"^allowed_token_ids must be token ids between 0 and 49, got 50$"),
        ({"logprob_token_ids": [-1]}, r"^logprob_token_ids must be .* got -1$"),
        ({"bad_words": [[1], []]}, r"^bad_words must hold at least one token each$"),
        ({"bad_words": [[1, 50]]}, r"^bad_words must be token ids between 0 and 49, got 50$"),
        ({"repetition_detection": (2000, 1, 2)}, r"^repetition_detection.max_pattern_size must be between 1 and 1024"),
        ({"repetition_detection": (2, 3, 2)}, r"^repetition_detection.min_pattern_size must be between 1 and 2, got 3"),
        ({"repetition_detection": (2, 1, 1)}, r"^repetition_detection.min_count must be between 2 and .* got 1$"),
        ({"max_tokens": 5, "min_tokens": 6}, r"^min_tokens must be between 0 and 5, got 6$"),
        ({"min_tokens": -1}, r"^min_tokens must be between 0 and 16, got -1$"),
        ({"stop_token_ids": [1, -1]}, r"^stop_token_ids must be token ids between 0 and 49, got -1$"),
        ({"pooling": "mean", "max_tokens": 1}, r"^max_tokens must be 0 with pooling, got 1$"),
        (
            {"pooling": "last", "max_tokens": 0, "num_prompt_logprobs": 0},
            r"^num_prompt_logprobs must be -1 with pooling, got 0$",
        ),
        ({"pooling": "last", "max_tokens": 0, "constrained": True}, r"^constrained must be false with pooling$"),
        ({"prompt": ()}, r"^prompt must hold at least one token$"),
        ({"prompt": (1, 50)}, r"^prompt must be token ids between 0 and 49, got 50$"),
        ({"prompt": (-1,)}, r"^prompt .* got -1$"),
        (
            {"max_tokens": 98},
            r"^prompt and max_tokens .* at most max_model_len = 100 tokens, got 3 \+ 98$",
        ),
        ({"max_tokens": 2**31 - 1}, r"at most max_model_len = 100 tokens, got 3 \+ 2147483647$"),
        (
            {"max_tokens": 80, "cache_tokens": 64},
            r"fit in the .* cache of 64 tokens, got 3 \+ 80; give .* memory$",
        ),
    ],
    ids=str,
)
def test_out_of_range_is_refused_by_name(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(**params)
