from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_vllm_server.errors import BadRequestError, CheckpointError, RequestError
from langchain_vllm_server.protocol import ChatCompletionRequest, CompletionRequest, decode
from langchain_vllm_server.sampling import MAX_N, model_defaults, parameters, resolve
from langchain_vllm_server.served_model import ServedModel
from tests.server.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()
MODEL = ServedModel(
    names=("tiny",), root="", version="1", tokenizer=TOKENIZER, vocab_size=TOKENIZER.vocab_size, max_model_len=256
)
FIELDS = list(CompletionRequest.__struct_fields__)


def request(**fields: Any) -> CompletionRequest:
    return decode(json.dumps({"prompt": "x", **fields}).encode(), CompletionRequest)


def test_null_is_absent() -> None:
    assert request(**dict.fromkeys(set(FIELDS) - {"prompt"})) == request()


def test_numbers_may_be_spelled_as_pydantic_takes_them() -> None:
    decoded = request(n=2.0, max_tokens="7", temperature="0.5", stop="7")
    assert (decoded.n, decoded.max_tokens, decoded.temperature, decoded.stop) == (2, 7, 0.5, "7")


def test_requests_do_not_share_defaults() -> None:
    first, second = request(), request()
    assert isinstance(first.stop, list)
    first.stop.append("x")
    assert second.stop == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*FIELDS, *ChatCompletionRequest.__struct_fields__, "zzz"]), json_values))
def test_any_json_is_decoded_or_refused(body: dict[str, Any]) -> None:
    for type_ in (CompletionRequest, ChatCompletionRequest):
        with suppress(RequestError):
            request = decode(json.dumps(body).encode(), type_)
            assert parameters(request, MODEL, request.prompt_logprobs).top_k <= MODEL.vocab_size


@given(st.binary(max_size=50))
def test_any_bytes_are_decoded_or_refused(body: bytes) -> None:
    with suppress(RequestError):
        decode(body, CompletionRequest)


def test_request_overrides_model_overrides_vllm() -> None:
    defaults = {"temperature": 0.6, "top_k": 20}
    resolved = resolve(request(temperature=1.5), defaults, vocab_size=100)
    assert (resolved.temperature, resolved.top_k, resolved.top_p) == (1.5, 20, 1.0)


def test_greedy_by_default_of_the_model_also_forbids_n() -> None:
    with pytest.raises(BadRequestError, match="greedy"):
        resolve(request(n=2), {"temperature": 0}, vocab_size=100)
    resolve(request(n=MAX_N), {}, vocab_size=100)


def test_model_defaults_take_the_sampling_fields_only() -> None:
    config = {"temperature": 0.6, "top_k": 50, "do_sample": True, "eos_token_id": [1, 2], "top_p": None}
    assert model_defaults(config, "x") == {"temperature": 0.6, "top_k": 50}


@pytest.mark.parametrize("config", [{"temperature": -1}, {"top_p": "high"}, {"max_new_tokens": 0}, {"min_p": True}])
def test_bad_model_defaults_name_their_file(config: dict[str, Any]) -> None:
    (name,) = config
    with pytest.raises(CheckpointError, match=rf"model/generation_config.json: {name} must"):
        model_defaults(config, "model/generation_config.json")
