"""Tools for models that were never trained with any: told in the system message, and told back as ordinary turns."""

from __future__ import annotations

from typing import Any

import msgspec

Turn = dict[str, Any]

_PROMPT = """You can use these tools:
{tools}
To use a tool, answer with only a JSON object: {{"name": "tool name", "arguments": {{...}}}}
If no tool helps, answer in words."""


def with_tools(turns: list[Turn], tools: list[dict[str, Any]] | None) -> list[Turn]:
    """The conversation as a template without tools takes it: calls and results as text, the tools in the first turn."""
    told = [_plain(turn) for turn in turns]
    if not tools:
        return told
    prompt = _PROMPT.format(tools="\n".join(map(_described, tools)))
    if told and told[0]["role"] in ("system", "developer"):
        return [{**told[0], "content": _joined(told[0]["content"], prompt)}, *told[1:]]
    return [{"role": "system", "content": prompt}, *told]


def alternating(turns: list[Turn]) -> list[Turn]:
    """The same for templates that insist on user and assistant taking turns: neighbours of one role become one."""
    merged: list[Turn] = []
    for turn in turns:
        role = {"developer": "system", "tool": "user"}.get(turn["role"], turn["role"])
        if merged and merged[-1]["role"] == role and not turn.get("tool_calls") and not merged[-1].get("tool_calls"):
            merged[-1] = {**merged[-1], "content": _joined(merged[-1]["content"], turn["content"])}
        else:
            merged.append({**turn, "role": role})
    return merged


def without_system(turns: list[Turn]) -> list[Turn]:
    """The same for templates that know no system message: it begins the user's first turn."""
    if len(turns) < 2 or turns[0]["role"] != "system":
        return turns
    return alternating([{**turns[0], "role": "user"}, *turns[1:]])


def _described(tool: dict[str, Any]) -> str:
    function = tool["function"] if isinstance(tool.get("function"), dict) else tool
    shown = {key: function[key] for key in ("name", "description", "parameters") if function.get(key)}
    return _json(shown)


def _plain(turn: Turn) -> Turn:
    if turn["role"] == "tool":
        return {"role": "user", "content": _joined("The tool answered:", turn["content"])}
    if not turn.get("tool_calls"):
        return turn
    calls = [call["function"] for call in turn["tool_calls"]]
    text = "\n".join(_json({"name": call.get("name"), "arguments": call.get("arguments")}) for call in calls)
    rest = {key: value for key, value in turn.items() if key != "tool_calls"}
    return {**rest, "content": _joined(turn["content"], text) if turn["content"] else _like(turn["content"], text)}


def _joined(first: Any, second: Any) -> Any:
    """Contents one after the other, as texts or as lists of parts."""
    if isinstance(first, list) or isinstance(second, list):
        return [*_like([], first), *_like([], second)]
    return f"{first}\n\n{second}" if first else second


def _like(shape: Any, content: Any) -> Any:
    if isinstance(shape, list) and not isinstance(content, list):
        return [{"type": "text", "text": content}]
    return content


def _json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()
