from __future__ import annotations

import time
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_vllm_server.detokenizer import Detokenizer
from langchain_vllm_server.fields import Fields
from langchain_vllm_server.gguf_file import read_gguf
from langchain_vllm_server.tokenizer import Tokenizer
from tests.server.checkpoint_fixtures import NASTY, SMOLLM2, spm_metadata

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = ["byte level", "SentencePiece"]


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    metadata = read_gguf(SMOLLM2).metadata if kind == "byte level" else spm_metadata()
    return Tokenizer.from_gguf(Fields(metadata, "test.gguf"))


def pieces(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push([i]) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", NASTY)
def test_text_comes_back_with_no_half_characters(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = pieces(tokenizer, [], ids, skip=False)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert "".join(found) == whole
    assert found[-1] == "" or "\ufffd" in whole
    assert all("\ufffd" not in piece for piece in found) or "\ufffd" in whole


tokens = st.integers(0, 400) | st.integers(0, 49200)


@pytest.mark.parametrize("kind", KINDS)
@given(ids=st.lists(tokens, max_size=25), skip=st.booleans())
@settings(max_examples=400, deadline=None)
def test_pieces_make_what_decoding_all_makes(kind: str, ids: list[int], skip: bool) -> None:
    tokenizer = tokenizer_of(kind)
    assert "".join(pieces(tokenizer, [], ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", KINDS)
@given(ids=st.lists(tokens, max_size=12), prompt=st.lists(tokens, max_size=12), skip=st.booleans())
@settings(max_examples=400, deadline=None)
def test_pieces_go_on_where_the_prompt_ends(kind: str, ids: list[int], prompt: list[int], skip: bool) -> None:
    tokenizer = tokenizer_of(kind)
    # What of the prompt's own text is certain, from a detokenizer that is not asked to finish.
    detokenizer = Detokenizer(tokenizer, [], skip)
    certain = detokenizer.push(prompt)
    assert certain + "".join(pieces(tokenizer, prompt, ids, skip)) == tokenizer.decode([*prompt, *ids], skip)


@pytest.mark.parametrize("kind", KINDS)
@given(ids=st.lists(tokens, max_size=30), cuts=st.lists(st.integers(0, 30), max_size=5))
@settings(max_examples=200, deadline=None)
def test_tokens_may_come_several_at_once(kind: str, ids: list[int], cuts: list[int]) -> None:
    tokenizer = tokenizer_of(kind)
    detokenizer = Detokenizer(tokenizer, [])
    edges = [0, *sorted(cuts), len(ids)]
    found = "".join(detokenizer.push(ids[a:b]) for a, b in pairwise(edges))
    assert found + detokenizer.finish() == tokenizer.decode(ids)


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = tokenizer_of("SentencePiece")
    ids = [3 + byte for byte in "é👍".encode()]
    assert pieces(tokenizer, [], ids) == ["", "é", "", "", "", "👍", ""]
    assert pieces(tokenizer, [], ids[:5]) == ["", "é", "", "", "", "\ufffd\ufffd\ufffd"]


def test_a_space_at_the_start_is_dropped_but_not_one_after_a_prompt() -> None:
    tokenizer = tokenizer_of("SentencePiece")
    world = tokenizer.encode("world", add_special_tokens=False)
    assert "".join(pieces(tokenizer, [], world)) == "world"
    assert "".join(pieces(tokenizer, [1], world)) == "world"  # a skipped BOS is no text
    assert "".join(pieces(tokenizer, [1], world, skip=False)) == " world"
    assert "".join(pieces(tokenizer, tokenizer.encode("Hello"), world)) == " world"
    assert pieces(tokenizer, [], [1, 2, *world])[:3] == ["", "", "world"]


def test_work_does_not_grow_with_the_text() -> None:
    tokenizer = tokenizer_of("byte level")
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 400)

    def seconds(detokenizer: Detokenizer, part: list[int]) -> float:
        start = time.perf_counter()
        for token in part:
            detokenizer.push([token])
        return time.perf_counter() - start

    detokenizer = Detokenizer(tokenizer, [])
    first = min(seconds(Detokenizer(tokenizer, []), ids[:1000]) for _ in range(3))
    for _ in range(20):
        seconds(detokenizer, ids)
    last = min(seconds(detokenizer, ids[:1000]) for _ in range(3))
    assert last < 5 * first  # with work that grows by the token it would be 80 times
