"""The engine as asyncio sees it: requests go in, events come out of a file descriptor, at most one wake-up a step."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from langchain_vllm_server.constraint import MaskThread
from langchain_vllm_server.errors import BadRequestError, EngineError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_vllm_server._engine import Engine, Event, SamplingParams, Stats
    from langchain_vllm_server.constraint import Constraint
    from langchain_vllm_server.sampling import Sampling

# Longer than any one step takes: a full step of a 7B model on two slow cores is a few minutes.
STALL_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What may be in flight; 0: any number."""

    requests: int = 0  # sequences, running or waiting
    tokens: int = 0  # of prompts of sequences without any answer yet


class EventStream:
    """The events of one HTTP request's sequences, in the order of `index`.

    Iterating yields a list of (index, event) of all that happened since the last time: a reader that falls behind finds
    more in one list, and no queue grows, for a sequence has no more events than tokens. Closing cancels the rest.
    """

    def __init__(self, engine: AsyncEngine, *, eager: bool) -> None:
        self._engine = engine
        self.eager = eager  # otherwise wake only when all sequences have finished
        self._pending: list[tuple[int, Event]] = []
        self._open: dict[int, int] = {}  # index → request id
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> list[tuple[int, Event]]:
        while not self._ready():
            self._waiter = self._engine.loop.create_future()
            await self._waiter
        if self._pending:
            pending, self._pending = self._pending, []
            return pending
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def cancel(self, index: int) -> None:
        """End one sequence; its events stop coming. No effect on one that has finished."""
        request_id = self._open.pop(index, None)
        if request_id is not None:
            self._engine.cancel(request_id)

    def close(self) -> None:
        """Cancel all that still runs."""
        running, self._open = self._open, {}
        for request_id in running.values():
            self._engine.cancel(request_id)

    def add(self, index: int, request_id: int) -> None:
        """Expect events of `index` under this id."""
        self._open[index] = request_id

    def push(self, index: int, event: Event, *, ended: bool) -> None:
        """Called by the engine's drain; `ended` with a sequence's last event."""
        self._pending.append((index, event))
        if ended:
            self._open.pop(index, None)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Raise `error` in the reader, after what is pending."""
        self._error = error
        self.close()
        self._wake()

    def _ready(self) -> bool:
        return not self._open or (self.eager and bool(self._pending))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and self._ready():
            self._waiter.set_result(None)


class AsyncEngine:
    """Submits to an Engine and routes its events to EventStreams. Lives on the event loop that creates it.

    Args:
        engine: `_engine.Engine`, or what behaves like it.
        new_params: `_engine.SamplingParams`.
        limits: Beyond them requests are refused.
        died: Called once with the reason when the engine has ended by itself; requests are answered before.
    """

    def __init__(
        self,
        engine: Engine,
        new_params: Callable[[], SamplingParams],
        limits: QueueLimits = QueueLimits(),
        died: Callable[[str], None] | None = None,
    ) -> None:
        self.rejections = Counter(dict.fromkeys(("queued_reqs", "queued_tokens"), 0))
        self._limits = limits
        self._prefilling: dict[int, int] = {}  # request id → tokens of its prompt, until its first event
        self._engine = engine
        self._new_params = new_params
        self._ids = itertools.count(1)
        self._masks = MaskThread(engine)
        self._routes: dict[int, tuple[EventStream, int]] = {}
        self._busy_since = 0.0
        self._died = died
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(engine.fileno(), self._drain)

    def admit(self, count: int) -> None:
        """Let a request of `count` sequences in. Raises UnavailableError when too many are in flight already."""
        limits, requests, tokens = self._limits, len(self._routes), sum(self._prefilling.values())
        if limits.requests and requests + count > limits.requests:
            self.rejections["queued_reqs"] += 1
            raise UnavailableError(
                f"The queue is full: {requests} sequences are in flight, {count} more would exceed the limit of "
                f"{limits.requests}. Try again later."
            )
        if limits.tokens and tokens >= limits.tokens:
            self.rejections["queued_tokens"] += 1
            raise UnavailableError(
                f"The queue is full: {tokens} prompt tokens of {requests} sequences in flight wait, the limit is "
                f"{limits.tokens}. Try again later."
            )

    def submit(
        self,
        requests: Sequence[tuple[Sequence[int], Sampling]],
        *,
        eager: bool = True,
        constraint: Constraint | None = None,
    ) -> EventStream:
        """Start sequences, numbered in this order. Those with the same prompt share its cache blocks.

        Args:
            requests: Prompts and how to sample each.
            eager: Wake the reader with every step; otherwise when all sequences have finished.
            constraint: What every answer may say; each sequence gets a fork of it.

        Raises:
            BadRequestError: The engine can never serve one of them.
            EngineError: The engine has stopped.
        """
        stream = EventStream(self, eager=eager)
        try:
            for index, (prompt, sampling) in enumerate(requests):
                self._submit(stream, index, prompt, sampling, constraint)
        except ValueError as error:
            stream.close()
            raise BadRequestError(str(error)) from None
        except RuntimeError as error:
            stream.close()
            self._tell_if_dead()
            raise EngineError(str(error)) from None
        return stream

    def cancel(self, request_id: int) -> None:
        """Forget a request and free what it holds, within a step."""
        self._prefilling.pop(request_id, None)
        if self._routes.pop(request_id, None) is not None:
            self._engine.cancel(request_id)
            self._masks.remove(request_id)

    @property
    def device(self) -> str:
        """The kind of the device that the model runs on: "cpu" or "cuda"."""
        return self._engine.device_name.partition(" ")[0]

    def stats(self) -> Stats:
        """The engine's counters."""
        return self._engine.stats()

    @property
    def num_requests(self) -> int:
        """HTTP requests that wait for the engine."""
        return len({id(stream) for stream, _ in self._routes.values()})

    def forget_prefixes(self) -> bool:
        """Empty the prefix cache. False, and nothing is done, while requests run: they use it."""
        if self._routes:
            return False
        self._engine.forget_prefixes()
        return True

    def problem(self) -> str | None:
        """Why the engine cannot serve; None when it can."""
        stats = self._engine.stats()
        if not stats.alive:
            return stats.error or "the engine has stopped"
        waited = time.monotonic() - max(stats.last_step_time, self._busy_since)
        if self._routes and waited > STALL_SECONDS:
            return f"the engine has not finished a step for {waited:.0f} s"
        return None

    def stop(self) -> None:
        """Stop the engine's thread; requests that are still open end with an error."""
        for stream, _ in list(self._routes.values()):
            stream.fail(UnavailableError("The server is shutting down."))
        self.loop.remove_reader(self._engine.fileno())
        self._engine.stop()

    def _submit(
        self,
        stream: EventStream,
        index: int,
        prompt: Sequence[int],
        sampling: Sampling,
        constraint: Constraint | None,
    ) -> None:
        params = self._new_params()
        for name in sampling.__slots__:
            setattr(params, name, getattr(sampling, name))
        params.eager = stream.eager
        request_id = next(self._ids)
        if constraint is not None:
            params.constrained = True
            self._masks.add(request_id, constraint.fork())
        try:
            self._engine.submit(request_id, prompt, params)
        except BaseException:
            self._masks.remove(request_id)
            raise
        if not self._routes:
            self._busy_since = time.monotonic()
        self._routes[request_id] = (stream, index)
        self._prefilling[request_id] = len(prompt)
        stream.add(index, request_id)

    def _drain(self) -> None:
        self._route(self._engine.drain())

    def _tell_if_dead(self) -> None:
        stats, died = self._engine.stats(), self._died
        if died is not None and not stats.alive:
            self._died = None
            self.loop.call_soon(died, stats.error)

    def _route(self, events: Sequence[Event]) -> None:
        failed = False
        for event in events:
            request_id, finish = event.request_id, event.finish  # each look at an event makes an object
            route = self._routes.get(request_id)
            self._prefilling.pop(request_id, None)
            failed = failed or finish == "error"
            if route is None:
                continue  # cancelled meanwhile
            if finish:
                del self._routes[request_id]
                self._masks.remove(request_id)
            stream, index = route
            stream.push(index, event, ended=bool(finish))
        if failed:
            self._tell_if_dead()
