"""Reasoning and tool calls in the text of an answer: every family's spelling, whole and in any pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_vllm_server import reasoning, tool_parsers
from langchain_vllm_server.answer_parser import AnswerParser
from langchain_vllm_server.tool_parsers.formats import FORMATS

FUNCTIONS = {"f": {"properties": {"a": {"type": "string"}}}, "g": {}}
CALL_F, CALL_G = '{"name": "f", "arguments": {"a": "x}"}}', '{"name": "g", "arguments": {}}'
DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)

# Parser's name → an answer that calls f and then g, as the family's documentation has it.
ANSWERS = {
    "hermes": f"<tool_call>\n{CALL_F}\n</tool_call>\n<tool_call>\n{CALL_G}\n</tool_call>",
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\nx}\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=g>\n</function>\n</tool_call>",
    "llama3_json": '{"name": "f", "parameters": {"a": "x}"}}; {"name": "g", "parameters": {}}',
    "pythonic": '[f(a="x}"), g()]',
    "olmo3": '<function_calls>\nf(a="x}")\ng()\n</function_calls>',
    "lfm2": '<|tool_call_start|>[f(a="x}"), g()]<|tool_call_end|>',
    "mistral": f"[TOOL_CALLS] [{CALL_F}, {CALL_G}]",
    "granite": f"<|tool_call|>[{CALL_F}, {CALL_G}]",
    "phi4_mini_json": f"functools[{CALL_F}, {CALL_G}]",
    "functiongemma": "<start_function_call>call:f{a:<escape>x}<escape>}<end_function_call>"
    "<start_function_call>call:g{}<end_function_call>",
    "gemma4": '<|tool_call>call:f{a:<|"|>x}<|"|>}<tool_call|><|tool_call>call:g{}<tool_call|>',
    "deepseek_v3": '{0}{1}function{2}f\n```json\n{{"a": "x}}"}}\n```{3}\n'
    "{1}function{2}g\n```json\n{{}}\n```{3}{4}".format(*DEEPSEEK),
    "deepseek_v31": '{0}{1}f{2}{{"a": "x}}"}}{3}{1}g{2}{{}}{3}{4}'.format(*DEEPSEEK),
    "openai": '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": "x}"}<|call|>'
    "<|start|>assistant<|channel|>commentary to=functions.g <|constrain|>json<|message|>{}<|call|>",
    "generic": f"{CALL_F}\n{CALL_G}",
}
FRAGMENTS = [
    *("<think>", "</think>", "[THINK]", "[/THINK]", "x", " ", "\n", '{"name": "f", "arguments": ', '{"a": "}"}', "{"),
    *("}", "]", "[", "f(", "a=1", ")", ";", ",", "<", "|", "```", "<|channel|>analysis<|message|>", "<|end|>"),
    *(mark for each in FORMATS for mark in (*each.triggers, *each.closers)),
    *ANSWERS.values(),
]


def read(pieces: list[str], parser: AnswerParser) -> list[tuple[str, str]]:
    told: list[tuple[str, str]] = []
    for kind, text in [new for piece in pieces for new in parser.push(piece)] + parser.finish():
        if told and told[-1][0] == kind != "name":
            text = told.pop()[1] + text
        told.append((kind, text))
    return told


def test_every_family_has_an_example() -> None:
    assert set(ANSWERS) == {each.names[0] for each in FORMATS}


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_of_each_family(name: str) -> None:
    thinks = reasoning.GPT_OSS if name == "openai" else None
    parser = AnswerParser(thinks, tool_parsers.BY_NAME[name], FUNCTIONS)
    told = read([ANSWERS[name]], parser)
    assert [kind for kind, _ in told] == ["name", "arguments"] * 2
    assert [text for kind, text in told if kind == "name"] == ["f", "g"]
    assert [json.loads(text) for kind, text in told if kind == "arguments"] == [{"a": "x}"}, {}]


@given(st.data())
def test_a_stream_tells_what_the_whole_tells(data: st.DataObject) -> None:
    tools = data.draw(st.sampled_from([None, *FORMATS]))
    thinks = data.draw(st.sampled_from([None, *reasoning.FORMATS]))
    thinking = thinks is not None and data.draw(st.booleans())
    fragments = FRAGMENTS if tools is None else [*FRAGMENTS, *[ANSWERS[tools.names[0]]] * 20]
    text = "".join(data.draw(st.lists(st.sampled_from(fragments), max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read([text], AnswerParser(thinks, tools, FUNCTIONS, thinking=thinking))
    assert read(pieces, AnswerParser(thinks, tools, FUNCTIONS, thinking=thinking)) == whole
    assert read(list(text), AnswerParser(thinks, tools, FUNCTIONS, thinking=thinking)) == whole


@pytest.mark.parametrize(
    ("text", "thinking", "told"),
    [
        ("<think>a\n</think>\n\nb", False, [("reasoning", "a\n"), ("content", "b")]),
        ("a</think>b", True, [("reasoning", "a"), ("content", "b")]),
        ("a", True, [("reasoning", "a")]),
        ("a <think>b</think>", False, [("content", "a <think>b</think>")]),
        ("b", False, [("content", "b")]),
    ],
)
def test_reasoning(text: str, thinking: bool, told: list[Any]) -> None:
    assert read([text], AnswerParser(reasoning.THINK, None, thinking=thinking)) == told


def test_reasoning_before_a_call() -> None:
    text = f"<think>hm</think>\n<tool_call>\n{CALL_F}\n</tool_call>"
    told = read([text], AnswerParser(reasoning.THINK, tool_parsers.BY_NAME["hermes"], FUNCTIONS))
    assert told == [("reasoning", "hm"), ("name", "f"), ("arguments", '{"a": "x}"}')]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call> what?"),
        ("hermes", '<tool_call>{"name": 3}'),
        ("generic", '{"name": "unknown", "arguments": {}}'),
        ("generic", 'Here: {"name": "f", "arguments": {}}'),
        ("pythonic", "[1, 2]"),
        ("pythonic", "[f(x, y=]"),
    ],
)
def test_what_is_no_call_stays_text(name: str, text: str) -> None:
    assert read([text], AnswerParser(None, tool_parsers.BY_NAME[name], FUNCTIONS)) == [("content", text)]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "generic"),
        ("{{ messages }}", "generic"),
        ("{{ tools }} <tool_call>", "hermes"),
        ("{{ tools }} <tool_call><function=", "qwen3_coder"),
        ("{{ tools }} [TOOL_CALLS]", "mistral"),
        ("{{ tools }} <|tool_call|>", "granite"),
        ("{{ tools }} <|python_tag|>", "llama3_json"),
    ],
)
def test_the_template_says_which_family(template: str | None, name: str) -> None:
    assert tool_parsers.of_template(template).names[0] == name


def test_the_prompt_says_whether_the_answer_begins_with_reasoning() -> None:
    assert reasoning.THINK.thinks("…assistant\n<think>\n")
    assert not reasoning.THINK.thinks("…assistant\n<think>\n\n</think>\n\n")
    assert reasoning.DEEPSEEK_R1.thinks("…assistant\n")
