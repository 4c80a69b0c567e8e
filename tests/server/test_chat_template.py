from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from langchain_vllm_server.chat_template import ChatTemplate
from langchain_vllm_server.gguf_file import read_gguf
from tests.server.checkpoint_fixtures import SMOLLM2

if TYPE_CHECKING:
    from collections.abc import Callable

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

LLAMA3 = """{{- bos_token }}
{%- set ns = namespace(tool_text='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
<|start_header_id|>system<|end_header_id|>

{% if tools is not none %}
Environment: ipython
{% for t in tools %}
{{ t | tojson(indent=4) }}

{% endfor %}
{% endif %}
{{ system }}<|eot_id|>
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- for call in message.tool_calls %}
            {{- '<|python_tag|>' + call.function.name + '(' }}
            {%- for key, value in call.function.arguments | items %}
                {{- key + '=' + (value | tojson) }}
                {%- if not loop.last %}{{ ', ' }}{% endif %}
            {%- endfor %}
            {{- ')<|eom_id|>' }}
        {%- endfor %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {% endif %}
  {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
  {% elif message['role'] == 'assistant' %}
{% generation %}{% set inner = 'x' %}{{ message['content'] + eos_token }}{% endgeneration %}{{ inner is defined }}
  {% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}
  {% endif %}
{% endfor %}"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages[::-1] %}{% if message.role == 'user' %}{% break %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}
        {%- for block in message.content or [] %}{% set content = content + block.text %}{{ block.text }}{% endfor %}
    {%- endif %}
    {%- if message.role == 'system' and tools %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content %}
        {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
    {{- content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' }}{{- call.function | tojson }}{{- '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

DOCUMENTS = """{% for d in documents or [] %}[{{ d.title }}: {{ d.text | upper }}]
{% endfor %}{{ dict(a=1) }} {{ messages | length }} {{ messages[0] | tojson(sort_keys=true, separators=(',', ':')) }}
{{ unk_token }}{{ pad_token }}{{ cls_token }}{{ strftime_now('%Y') }} {{ range(3) | list }} {{ 'a<b&c' | e }}"""

TEMPLATES = {
    "smollm2": read_gguf(SMOLLM2).metadata["tokenizer.chat_template"],
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "documents": DOCUMENTS,
}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Le temps <qu\'il> fait & "tout" 日本',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}

CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hello"}],
    "system": [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "  1 < 2 & 'x' "}],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello 👋🏽\n", "reasoning": "a greeting"},
        {"role": "user", "content": "{{ bos_token }} {% raise %}"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "20°C", "tool_call_id": "1"},
    ],
    "reasoning": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "\nsum\n", "name": None},
    ],
    "thinking": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "thinking": "sum"}],
}


def reference(template: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(SPECIAL.values())}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **SPECIAL)


def attempt(render: Callable[[], str], kind: type[Exception] = Exception) -> tuple[str | None, str]:
    """What it renders, or the message it fails with."""
    try:
        return render(), ""
    except kind as error:
        return None, str(error) or "no message"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"tools": [TOOL]},
        {"tools": []},
        {"enable_thinking": False, "bos_token": "<other>"},
        {"documents": [{"title": "T", "text": "straße"}]},
    ],
    ids=str,
)
def test_renders_as_transformers_does(template: str, chat: str, options: dict[str, Any]) -> None:
    options = {"add_generation_prompt": True, **options}
    source, messages = TEMPLATES[template], CHATS[chat]
    before = json.dumps(messages)
    expected, problem = attempt(lambda: reference(source).apply_chat_template(messages, tokenize=False, **options))
    found, our_problem = attempt(lambda: ChatTemplate(source, SPECIAL).render(messages, **options), ValueError)
    assert found == expected
    assert problem in our_problem
    assert json.dumps(messages) == before


CONTINUED: dict[str, list[dict[str, Any]]] = {
    "plain": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon"}],
    "trailing space": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon  "}],
    "repeated": [{"role": "user", "content": "Once upon"}, {"role": "assistant", "content": "Once upon"}],
    "blocks": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]},
    ],
}


@pytest.mark.parametrize("template", ["smollm2", "llama3", "mistral", "qwen"])
@pytest.mark.parametrize("chat", CONTINUED)
def test_continues_the_final_message_as_transformers_does(template: str, chat: str) -> None:
    source, messages = TEMPLATES[template], CONTINUED[chat]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    before = json.dumps(messages)
    expected, _ = attempt(lambda: reference(source).apply_chat_template(messages, tokenize=False, **options))
    found, _ = attempt(lambda: ChatTemplate(source, SPECIAL).render(messages, **options), ValueError)
    assert found == expected
    assert json.dumps(messages) == before


def test_what_cannot_be_continued_is_named() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}{{ m.content | upper }}{% endfor %}", SPECIAL)
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(ValueError, match="leaves out or changes the final message"):
        template.render([{"role": "user", "content": "a"}], **options)
    with pytest.raises(ValueError, match="no text to continue"):
        template.render([{"role": "assistant", "tool_calls": []}], **options)
    with pytest.raises(ValueError, match="exclude each other"):
        template.render([{"role": "user", "content": "a"}], continue_final_message=True)


def test_the_templates_own_message_comes_through() -> None:
    template = ChatTemplate(MISTRAL, SPECIAL)
    with pytest.raises(ValueError, match=r"^Conversation roles must alternate user/assistant/user/assistant/\.\.\.$"):
        template.render([{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    ],
)
def test_a_template_that_fails_is_a_value_error(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, SPECIAL).render([{"role": "user", "content": "x"}])


def test_a_template_that_is_no_template_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="the chat template is not valid: "):
        ChatTemplate("{% for %}", SPECIAL)


def test_an_empty_chat_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="at least one message"):
        ChatTemplate(QWEN, SPECIAL).render([])


def test_today() -> None:
    template = ChatTemplate("{{ strftime_now('%d %B %Y') }}", SPECIAL)
    before, text, after = datetime.now(), template.render([{"role": "user"}]), datetime.now()
    assert text in {day.strftime("%d %B %Y") for day in (before, after)}


def test_a_variable_may_have_any_name() -> None:
    assert ChatTemplate("{{ mood }}", {}).render([{"role": "user"}], self=1, mood="fine") == "fine"
