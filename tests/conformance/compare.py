"""Send the same requests to two servers and tell where the shapes of their answers differ.

    python -m tests.conformance.compare http://127.0.0.1:8001 http://127.0.0.1:8000 [--pooling] [--only PART]

The first is vLLM, the second ours; both serve the same weights as `smollm2` (server/CONFORMANCE.md has the commands).
A shape is what stays of an answer without its data: status, media type, keys and types, and the values that belong to
the API (`object`, `type`, `role`, `finish_reason`, `code`, `param`). Of a stream it is the sequence of the chunks'
shapes, equal neighbours told once. Nothing is said of texts and numbers. The exit status is the number of differences.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

import httpx

from tests.conformance.cases import GENERATING, POOLING

if TYPE_CHECKING:
    from tests.conformance.cases import Request

# Keys whose values are the API's, not the model's.
_WORDS = frozenset({"object", "type", "role", "finish_reason", "code", "param", "owned_by", "stop_reason"})
# Of metrics, only which there are.
_TEXT_LINES = "text/plain"


def shape(value: Any, key: str = "") -> Any:
    """What stays of a JSON value without its data."""
    if isinstance(value, dict):
        if value and (all(name.lstrip("-").isdigit() for name in value) or key == "top_logprobs"):
            return {"*": _union([shape(each) for each in value.values()])}
        return {name: shape(each, name) for name, each in sorted(value.items())}
    if isinstance(value, list):
        return [_union([shape(each, key) for each in value])] if value else []
    if key in _WORDS and isinstance(value, str | int):
        return f"={value}"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "null" if value is None else "text"


def _union(shapes: list[Any]) -> Any:
    """One shape, or the different ones."""
    different = list({json.dumps(each, sort_keys=True): each for each in shapes}.values())
    if len(different) > 1 and all(isinstance(each, dict) for each in different):
        names = sorted({name for each in different for name in each})
        return {name: _union([each.get(name, "absent") for each in different]) for name in names}
    return different[0] if len(different) == 1 else {"one of": different}


def events(text: str) -> list[Any]:
    """The shapes of a stream's events, equal neighbours once."""
    told: list[Any] = []
    for event in text.strip().split("\n\n"):
        name, _, data = event.partition("data: ")
        one = data if data == "[DONE]" else shape(json.loads(data))
        one = {name.strip(): one} if name.strip() else one
        if not told or told[-1] != one:
            told.append(one)
    return told


def answer(client: httpx.Client, request: Request) -> tuple[dict[str, Any], str]:
    """The shape of an answer, and its beginning for the reader."""
    content = request.body if isinstance(request.body, bytes | None) else json.dumps(request.body).encode()
    headers = {"content-type": "application/json", **request.headers} if content is not None else request.headers
    response = client.request(request.method, request.path, content=content, headers=headers)
    media = response.headers.get("content-type", "").partition(";")[0]
    told: dict[str, Any] = {"status": response.status_code, "media type": media}
    if media == "text/event-stream":
        told["events"] = events(response.text)
    elif media == "application/json" and response.content:
        told["body"] = shape(response.json())
    elif media == _TEXT_LINES and response.content:
        names = {line.split()[2] for line in response.text.splitlines() if line.startswith("# TYPE vllm:")}
        told["body"] = sorted(names)
    return told, response.text


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two shapes differ, a line each."""
    if one == other:
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for name in sorted(one.keys() | other.keys())
            for line in differences(one.get(name, "absent"), other.get(name, "absent"), f"{path}.{name}")
        ]
    if isinstance(one, list) and isinstance(other, list) and path == ".body":  # names of metrics
        return [f"{path}: only one has {each}" for each in sorted({*map(str, one)} ^ {*map(str, other)})]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return [line for i, pair in enumerate(pairs) for line in differences(*pair, f"{path}[{i}]")]
    return [f"{path}: {json.dumps(one)} → {json.dumps(other)}"]


def compare(request: Request, theirs: httpx.Client, ours: httpx.Client, *, show: bool) -> int:
    """Print how the answers to one request differ, and return in how many places."""
    (one, one_text), (other, other_text) = answer(theirs, request), answer(ours, request)
    lines = differences(one, other)
    print("differs" if lines else "same   ", request.name, flush=True)
    for line in lines:
        print(f"           {line}")
    if show or (lines and "error" in other_text):
        print(f"           theirs: {one_text[:2000]}\n           ours:   {other_text[:2000]}")
    return len(lines)


def main() -> int:
    """Compare; returns the number of differences."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("theirs")
    parser.add_argument("ours")
    parser.add_argument("--pooling", action="store_true", help="the requests to a server of vectors")
    parser.add_argument("--only", default="", metavar="PART", help="requests with this in their name")
    parser.add_argument("--show", action="store_true", help="both answers, too")
    options = parser.parse_args()
    asked = [each for each in (POOLING if options.pooling else GENERATING) if options.only in each.name]
    with (
        httpx.Client(base_url=options.theirs, timeout=300) as theirs,
        httpx.Client(base_url=options.ours, timeout=300) as ours,
    ):
        count = sum(compare(request, theirs, ours, show=options.show) for request in asked)
    print(f"{len(asked)} requests, {count} differences")
    return count


if __name__ == "__main__":
    sys.exit(min(main(), 255))
