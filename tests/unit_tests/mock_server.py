"""A vLLM server as an httpx transport: answers from a table and remembers what it was asked."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from langchain_vllm import ChatVLLM
from langchain_vllm._http import httpx

URL = "http://vllm.test:8000/v1"

USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def completion(**message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Ciao", **message}, "finish_reason": "stop"}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": USAGE}


def sse(*deltas: dict[str, Any]) -> str:
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m"}
    chunks = [{**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    chunks.append({**base, "choices": [], "usage": USAGE})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


@dataclass
class MockServer:
    """`answers` maps a path to (status, JSON or event stream) or to an exception to raise."""

    answers: dict[str, Any] = field(default_factory=lambda: {"/v1/chat/completions": (200, completion())})
    requests: list[Any] = field(default_factory=list)

    def handle(self, request: Any) -> Any:
        self.requests.append(request)
        answer = self.answers[request.url.path]
        if isinstance(answer, Exception):
            raise answer
        status, body = answer
        if isinstance(body, str):
            return httpx.Response(status, text=body, headers={"content-type": "text/event-stream"})
        return httpx.Response(status, json=body)

    async def ahandle(self, request: Any) -> Any:
        return self.handle(request)

    def chat(self, **options: Any) -> ChatVLLM:
        """A model object that talks to this server."""
        values: dict[str, Any] = {
            "model": "m",
            "base_url": URL,
            "max_retries": 0,
            "http_client": httpx.Client(transport=httpx.MockTransport(self.handle)),
            "http_async_client": httpx.AsyncClient(transport=httpx.MockTransport(self.ahandle)),
            **options,
        }
        return ChatVLLM(**{name: value for name, value in values.items() if value is not None})

    @property
    def body(self) -> dict[str, Any]:
        """The last request's JSON."""
        body: dict[str, Any] = json.loads(self.requests[-1].content)
        return body

    @property
    def headers(self) -> Any:
        return self.requests[-1].headers
