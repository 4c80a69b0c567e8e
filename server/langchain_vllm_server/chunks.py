"""Streams of completion chunks: what chat and text completions have in common."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from langchain_vllm_server.errors import RequestError
from langchain_vllm_server.generation import Spacing
from langchain_vllm_server.responses import DONE, EventStreamResponse, encode_json, sse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from langchain_vllm_server.generation import Choice, Delta, Generation
    from langchain_vllm_server.protocol import GenerationRequest
    from langchain_vllm_server.served_model import ServedModel

    # The JSON of entries of `choices` for what is new; several where a delta needs several chunks.
    Entries = Callable[[Choice, Delta], list[bytes]]


class ChunkStream:
    """One streamed answer. All that its chunks share is formatted once.

    Args:
        head: The answer's fields before `choices`: id, object, created, model.
        model: For its fingerprint, told with the usage, or else in chunks that finish a choice; how often to tell what.
        entries: Formats what is new of a choice.
        first: Further fields of the first chunk.
    """

    def __init__(
        self,
        generation: Generation,
        request: GenerationRequest,
        head: dict[str, Any],
        model: ServedModel,
        entries: Entries,
        first: dict[str, Any] | None = None,
    ) -> None:
        self._generation = generation
        self._entries = entries
        self._first = b"," + encode_json(first)[1:-1] if first else b""
        self._head = encode_json(head)[:-1] + b',"choices":['
        self._fingerprint = b',"system_fingerprint":' + encode_json(model.fingerprint)
        options = request.stream_options
        forced = model.force_include_usage
        self._include_usage = forced or (options is not None and options.include_usage)
        continuous = options is not None and options.include_usage and options.continuous_usage_stats
        self._continuous_usage = forced or continuous
        interval = request.stream_interval or model.stream_interval
        self._spacing = Spacing(interval) if interval > 1 else None

    def response(self) -> EventStreamResponse:
        """The HTTP response."""
        return EventStreamResponse(self._generation, self._chunks())

    async def _chunks(self) -> AsyncIterator[bytes]:
        last = b""
        try:
            async for events in self._generation.stream:
                news = self._generation.news(events)
                if self._spacing is not None:
                    news = self._spacing.due(news)
                chunk = b"".join([self._events(choice, delta) for choice, delta in news])
                if chunk:
                    yield chunk
            if self._include_usage:
                usage = b',"usage":' + encode_json(self._generation.usage())
                last = sse(self._head + b"]" + self._fingerprint + usage + self._timing() + b"}")
        except RequestError as error:
            last = sse(encode_json(error.envelope()))
        yield last + DONE

    def _events(self, choice: Choice, delta: Delta) -> bytes:
        """The chunks of a delta; its end and its tokens are told with the last of them."""
        entries = self._entries(choice, delta)
        events = []
        for left, entry in zip(range(len(entries) - 1, -1, -1), entries, strict=True):
            end = b"]" + self._first
            self._first = b""
            if delta.finish_reason is not None and not left and not self._include_usage:
                end += self._fingerprint
            if self._continuous_usage:
                untold = len(delta.token_ids) if left else 0
                end += b',"usage":' + encode_json(self._generation.counts(untold))
            events.append(sse(self._head + entry + end + b"}"))
        return b"".join(events)

    def _timing(self) -> bytes:
        timing = self._generation.timing()
        return b"" if timing is None else b',"metrics":' + encode_json(timing)


def now() -> int:
    """`created` of an answer."""
    return int(time.time())
