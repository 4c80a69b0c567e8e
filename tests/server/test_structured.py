"""Grammars alone: what llguidance takes for the model's tokens, and what structural tags admit."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_vllm_server import structural_tag, structured
from langchain_vllm_server.checkpoint import load_checkpoint
from langchain_vllm_server.constraint import ConstraintError
from langchain_vllm_server.errors import RequestError
from langchain_vllm_server.fields import Fields
from langchain_vllm_server.json_schema import Spelling
from langchain_vllm_server.protocol import ChatCompletionRequest, decode
from langchain_vllm_server.response_format import requested_grammar
from langchain_vllm_server.structured import Grammar, GrammarCompiler, lark_regex
from langchain_vllm_server.tokenizer import Tokenizer
from tests.server.checkpoint_fixtures import SMOLLM2, spm_metadata
from tests.server.fakes import EOS, byte_tokenizer

PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def model_of(tokenizer: Tokenizer, end: int, vocab_size: int | None = None) -> Any:
    return SimpleNamespace(
        compiler=GrammarCompiler(),
        tokenizer=tokenizer,
        vocab_size=vocab_size or tokenizer.vocab_size,
        eos_token_ids=(end,),
    )


@pytest.fixture(scope="module")
def model() -> Any:
    tokenizer = byte_tokenizer()
    return model_of(tokenizer, tokenizer.token_id(EOS) or 0)


async def admits(model: Any, grammar: Grammar, text: str) -> bool:
    """Whether the text may be an answer, whole."""
    constraint = await structured.compile(grammar, model, "grammar")
    matcher = constraint._matcher  # type: ignore[attr-defined]
    tokens = model.tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def smollm2() -> Tokenizer:
    return load_checkpoint(SMOLLM2).tokenizer


def sentencepiece() -> Tokenizer:
    return Tokenizer.from_gguf(Fields(spm_metadata(), "test.gguf"))


@pytest.mark.parametrize("make", [smollm2, sentencepiece, byte_tokenizer])
def test_tokens_are_the_bytes_that_answers_show(make: Any) -> None:
    """A grammar judges by bytes, the detokenizer shows bytes: they must be the same ones.

    But for 0xff: no text has that byte, and llguidance marks special tokens with it.
    """
    tokenizer = make()
    tokens = structured._tokenizer(model_of(tokenizer, 2, tokenizer.vocab_size + 5))
    assert tokens.vocab_size == tokenizer.vocab_size + 5
    for token in range(tokenizer.vocab_size):
        if not tokenizer.is_special(token) and tokenizer.token_bytes(token) != b"\xff":
            assert tokens.decode_bytes([token]) == tokenizer.token_bytes(token), token


@pytest.mark.parametrize("pattern", ["a/b", r"a\/b", r"a\\", "a\nb", r"\d+\.\d", "[/]", r"(?i)Yes"])
async def test_patterns_pass_through_lark_unchanged(model: Any, pattern: str) -> None:
    sample = {"a/b": "a/b", r"a\/b": "a/b", r"a\\": "a\\", "a\nb": "a\nb", r"\d+\.\d": "12.3", "[/]": "/"}
    assert await admits(model, Grammar.from_regex(pattern), sample.get(pattern, "yEs"))
    assert not await admits(model, Grammar.from_regex(pattern), "no")
    assert "\n" not in lark_regex(pattern)


async def test_within(model: Any) -> None:
    """An answer behind free reasoning."""
    grammar = Grammar.from_choice(["yes", "no"]).within("start: thought @answer\nthought[lazy]: /(.|\\n)*<end>/")
    assert await admits(model, grammar, "hm, no... <end>yes")
    assert not await admits(model, grammar, "hm, yes")
    assert not await admits(model, grammar, "<end>maybe")


LEGACY = {"triggers": ["<f="], "structures": [{"begin": "<f=a>", "schema": PERSON, "end": "</f>"}]}
TAG = {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": PERSON}, "end": "</a>"}
OTHER = {"type": "tag", "begin": "<b>", "content": {"type": "regex", "pattern": "[0-9]{2}"}, "end": "</b>"}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<"], "tags": [TAG, OTHER]}
SEPARATED = {"type": "tags_with_separator", "tags": [TAG, OTHER], "separator": ", "}
THOUGHT = {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"}
JSON = '{"age": 3}'


@pytest.mark.parametrize(
    ("tag", "good", "bad"),
    [
        (LEGACY, ["", "free", f"so <f=a>{JSON}</f> and <f=a>{JSON}</f> done", "a < b"], ["<f=b>", "so <f=a>{}</f>"]),
        ({"format": {"type": "const_string", "value": 'a"b\n'}}, ['a"b\n'], ["a"]),
        ({"format": {"type": "any_text"}}, ["", "any\ntext"], []),
        ({"format": {"type": "or", "elements": [TAG, OTHER]}}, [f"<a>{JSON}</a>", "<b>12</b>"], ["<b>1</b>", ""]),
        ({"format": {"type": "sequence", "elements": [THOUGHT, TAG]}}, [f"<think>x < y</think><a>{JSON}</a>"], [JSON]),
        ({"format": TRIGGERED}, ["", "free", f"so <b>12</b> or <a>{JSON}</a>!"], ["a <b>", "<c>", "<a>12</a>"]),
        ({"format": {**TRIGGERED, "at_least_one": True}}, ["so <b>12</b>!"], ["free", ""]),
        ({"format": {**TRIGGERED, "stop_after_first": True}}, ["free", "so <b>12</b>"], ["<b>12</b> more"]),
        (
            {"format": {**TRIGGERED, "stop_after_first": True, "at_least_one": True}},
            ["so <b>12</b>"],
            ["<b>12</b> more", "free"],
        ),
        ({"format": SEPARATED}, ["", "<b>12</b>", f"<b>12</b>, <a>{JSON}</a>"], ["<b>12</b><b>12</b>", "x"]),
        ({"format": {**SEPARATED, "at_least_one": True}}, ["<b>12</b>"], [""]),
        ({"format": {**SEPARATED, "stop_after_first": True}}, ["<b>12</b>"], ["<b>12</b>, <b>12</b>"]),
    ],
)
async def test_structural_tags(model: Any, tag: Any, good: list[str], bad: list[str]) -> None:
    grammar = structural_tag.grammar(tag, "tag")
    assert [await admits(model, grammar, text) for text in good] == [True] * len(good)
    assert [await admits(model, grammar, text) for text in bad] == [False] * len(bad)


async def test_a_dead_end_is_an_error(model: Any) -> None:
    constraint = await structured.compile(Grammar.from_regex("ab"), model, "regex")
    with pytest.raises(ConstraintError):
        constraint.consume(model.tokenizer.encode("x"))


FUZZED = model_of(byte_tokenizer(), byte_tokenizer().token_id(EOS) or 0)
KEYS = ["type", "elements", "tags", "triggers", "begin", "end", "content", "value", "pattern"]
KEYS += ["json_schema", "separator", "schema", "properties", "items", "anyOf", "oneOf", "required"]
KEYS += ["$ref", "$defs", "minItems", "enum"]
KINDS = sorted(structural_tag.KINDS)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.text(max_size=3)
    | st.sampled_from([*structural_tag.KINDS, "$ref"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["type", "format", "json_schema", "structures", "triggers"]), JSON_VALUES))
@settings(deadline=None, max_examples=300)
def test_any_response_format_is_compiled_or_refused(fields: dict[str, Any]) -> None:
    """Nothing but a RequestError, whatever the JSON."""
    for name in ("response_format", "structured_outputs"):
        value = fields if name == "response_format" else {"structural_tag": json.dumps(fields)}
        body = json.dumps({"messages": [], name: value}).encode()
        with suppress(RequestError):
            found = requested_grammar(decode(body, ChatCompletionRequest), Spelling())
            if found is not None:
                asyncio.run(structured.compile(found[0], FUZZED, found[1]))
