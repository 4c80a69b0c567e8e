"""From the messages of a chat to its prompt."""

from __future__ import annotations

import pytest

from langchain_vllm_server.chat_messages import content_format
from tests.server.fakes import CHATML, Server, prompt_text, running


async def test_text_parts_are_joined_for_string_templates(server: Server) -> None:
    await server.chat([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])
    assert "one\ntwo<|im_end|>" in prompt_text(server)


async def test_templates_that_loop_over_contents_get_parts() -> None:
    template = "{% for m in messages %}{% for p in m['content'] %}[{{ p['text'] }}]{% endfor %}{% endfor %}"
    assert content_format(template) == "openai"
    async with running(template=template, content_format="openai") as server:
        await server.chat("Hi")
    assert prompt_text(server) == "[Hi]"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "string"),
        ("{% for m in messages %}{% set c = m.content %}{% for p in c %}{{ p }}{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{{ m.content }}{% for t in m.tool_calls %}{{ t }}{% endfor %}{% endfor %}", "string"),
        ("{% broken", "string"),
    ],
)
def test_content_format(template: str, expected: str) -> None:
    assert content_format(template) == expected


async def test_tool_history_reaches_the_template() -> None:
    template = (
        "{% for m in messages %}"
        "{% for c in m.tool_calls %}{{ c.function.name }}={{ c.function.arguments.x }};{% endfor %}"
        "{{ m.tool_call_id }}{{ m.content }}|{{ m.reasoning_content }}"
        "{% endfor %}{{ tools[0].function.name }}{{ mood }}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 3}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": "9"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    async with running(template=template) as server:
        body = {"messages": messages, "tools": tools, "tool_choice": "none", "chat_template_kwargs": {"mood": "!"}}
        response = await server.post("/v1/chat/completions", **body)
    assert response.status_code == 200, response.text
    assert prompt_text(server) == "f=3;|hm19|f!"


async def test_continue_final_message(server: Server) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    response = await server.post("/v1/chat/completions", **body)
    assert prompt_text(server).endswith("assistant\nWell")
    assert response.json()["choices"][0]["message"]["role"] == "assistant"


async def test_a_model_without_template_cannot_chat() -> None:
    async with running(template=None) as server:
        response = await server.chat()
    assert response.status_code == 400
    assert "--chat-template" in response.json()["error"]["message"]


async def test_the_templates_own_refusal_is_a_400() -> None:
    async with running(template="{{ raise_exception('roles must alternate') }}") as server:
        response = await server.chat()
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]


async def test_roles_need_not_alternate() -> None:
    """A template that insists on it gets neighbours of one role as one, and a system message with the first turn."""
    template = (
        "{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "[{{ m.role }}:{{ m.content }}]{% endfor %}"
    )
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "user", "assistant", "assistant")]
    async with running(template=template) as server:
        body = {"messages": messages, "max_tokens": 1, "return_prompt_text": True}
        response = await server.post("/v1/chat/completions", **body)
    assert response.json()["prompt_text"] == "[user:s\n\nu\n\nu][assistant:a\n\na]"
