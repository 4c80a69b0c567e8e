"""Flags that hold JSON, from the command line to what an answer is made of: the real model, no HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest

from langchain_vllm_server import load
from langchain_vllm_server.app import create_app
from langchain_vllm_server.chat_messages import render_chat
from langchain_vllm_server.checkpoint import load_checkpoint
from langchain_vllm_server.json_schema import Spelling
from langchain_vllm_server.protocol import ChatCompletionRequest, decode
from langchain_vllm_server.response_format import requested_grammar
from langchain_vllm_server.settings import parse_settings
from tests.server.checkpoint_fixtures import SMOLLM2
from tests.server.fakes import Server, running

if TYPE_CHECKING:
    from langchain_vllm_server.served_model import ServedModel

TEMPLATE = "{{ color }} {{ enable_thinking }} {% for m in messages %}{{ m['content'] }}{% endfor %}"


def served(*argv: str) -> ServedModel:
    settings, checkpoint = parse_settings(["m", *argv]), load_checkpoint(SMOLLM2)
    return load.served_model(settings, checkpoint, load.read_text(settings, checkpoint), 512)


def chat(**fields: Any) -> ChatCompletionRequest:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return decode(msgspec.json.encode(body), ChatCompletionRequest)


def test_template_kwargs_of_the_server_yield_to_the_requests() -> None:
    kwargs = '{"color": "red", "enable_thinking": false}'
    model = served("--chat-template", TEMPLATE, "--default-chat-template-kwargs", kwargs)
    assert render_chat(chat(), model) == "red False Hi"
    assert render_chat(chat(reasoning_effort="low"), model) == "red True Hi"
    assert render_chat(chat(chat_template_kwargs={"color": "blue"}), model) == "blue False Hi"
    with pytest.raises(ValueError, match="--default-chat-template-kwargs: messages is what requests say"):
        served("--default-chat-template-kwargs", '{"messages": []}')


def test_content_format() -> None:
    model = served("--chat-template", TEMPLATE, "--chat-template-content-format", "openai")
    assert render_chat(chat(), model).endswith("[{'type': 'text', 'text': 'Hi'}]")


def test_spelling_of_json_where_a_request_says_nothing() -> None:
    model = served("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": false}')
    assert model.spelling == Spelling(disable_any_whitespace=False)
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}},
        {"structured_outputs": {"json": {"type": "object"}}},
    ):
        flexible = requested_grammar(chat(**fields), model.spelling)
        compact = requested_grammar(chat(**fields), Spelling())
        assert flexible is not None
        assert '"whitespace_flexible":true' in flexible[0].source
        assert compact is not None
        assert '"whitespace_flexible":false' in compact[0].source
    own = {"structured_outputs": {"json": {"type": "object"}, "disable_any_whitespace": True}}
    assert (found := requested_grammar(chat(**own), model.spelling))
    assert 'flexible":false' in found[0].source


def test_marks_of_reasoning() -> None:
    config = '{"reasoning_start_str": "<r>", "reasoning_end_str": "</r>"}'
    marks = served("--reasoning-config", config).reasoning_format
    assert marks is not None
    assert (marks.opens, marks.closes) == (("<r>",), ("</r>",))
    by_other_name = served("--structured-outputs-config.reasoning_parser", "qwen3").reasoning_format
    assert by_other_name == served("--reasoning-parser", "qwen3").reasoning_format is not None


def test_what_vectors_are_made_of() -> None:
    assert served().pooling == "mean"
    assert served("--pooler-config", '{"pooling_type": "LAST"}').pooling == "last"
    assert served("--pooler-config.seq_pooling_type", "LAST").pooling == "last"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--pooler-config", '{"pooling_type": "CLS"}'], "Invalid enum value 'CLS'"),
        (["--pooler-config", '{"dimensions": 3}'], "unknown field `dimensions`; it takes pooling_type"),
        (["--reasoning-config", '{"reasoning_start_str": "a"}'], "missing required field `reasoning_end_str`"),
        (["--reasoning-config", '{"reasoning_start_str": "a", "reasoning_end_str": ""}'], "must not be empty"),
        (
            ["--reasoning-parser=qwen3", '--reasoning-config={"reasoning_start_str": "a", "reasoning_end_str": "b"}'],
            "give one of them",
        ),
        (
            [
                "--structured-outputs-config.reasoning_parser=qwen3",
                '--reasoning-config={"reasoning_start_str": "a", "reasoning_end_str": "b"}',
            ],
            "give one of them",
        ),
        (["--structured-outputs-config", '{"enable_in_reasoning": true}'], "enable_in_reasoning"),
        (["--structured-outputs-config", "{"], "--structured-outputs-config"),
    ],
)
def test_bad_values_are_named(argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(["m", *argv])
    assert complaint in capsys.readouterr().err


async def test_pages_that_describe_can_be_left_out(server: Server) -> None:
    assert (await server.client.get("/docs")).status_code == 200
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(server.service, docs=False)), base_url="http://s"
    ) as client:
        assert [(await client.get(path)).status_code for path in ("/docs", "/openapi.json", "/health")] == [
            404,
            404,
            200,
        ]
    async with running() as other:
        assert (await other.client.get("/openapi.json")).status_code == 200
    assert parse_settings(["m", "--disable-fastapi-docs"]).disable_fastapi_docs
