"""A real engine on a checkpoint, driven without a server: submit, wait, collect."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import select
import time
from typing import TYPE_CHECKING, Any

from langchain_vllm_server import _engine
from langchain_vllm_server.checkpoint import load_checkpoint
from langchain_vllm_server.constraint import MaskThread
from langchain_vllm_server.engine_config import to_engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from langchain_vllm_server.constraint import Constraint


@dataclasses.dataclass
class Result:
    """What came back for one request."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[list[tuple[int, float, int]]] = dataclasses.field(default_factory=list)
    finish: str = ""
    num_cached_tokens: int = 0
    prompt_logprobs: list[list[tuple[int, float, int]]] = dataclasses.field(default_factory=list)
    error: str = ""
    embedding: list[float] = dataclasses.field(default_factory=list)


def sampling(**values: Any) -> _engine.SamplingParams:
    """SamplingParams, greedy unless said otherwise; an unknown name is an error."""
    params = _engine.SamplingParams()
    params.temperature = 0
    for name, value in values.items():
        if not hasattr(params, name):
            raise AttributeError(name)
        setattr(params, name, value)
    return params


class Client:
    """Talks to an engine from one thread."""

    def __init__(self, engine: _engine.Engine) -> None:
        self.engine = engine
        self.results: dict[int, Result] = {}
        self._masks = MaskThread(engine)
        self._ids = itertools.count()

    def submit(self, prompt: Sequence[int], constraint: Constraint | None = None, **values: Any) -> int:
        request_id = next(self._ids)
        if constraint is not None:
            self._masks.add(request_id, constraint)
        params = sampling(constrained=constraint is not None, **values)
        self.engine.submit(request_id, list(prompt), params)
        self.results[request_id] = Result()
        return request_id

    def poll(self, timeout: float) -> None:
        """Take in what has arrived, waiting for something at most `timeout` seconds."""
        select.select([self.engine.fileno()], [], [], timeout)
        for event in self.engine.drain():
            result = self.results[event.request_id]
            assert not result.finish, "nothing comes after the last event"
            result.tokens += event.tokens
            result.logprobs += event.logprobs
            result.prompt_logprobs += event.prompt_logprobs
            result.finish = event.finish
            result.error = event.error
            result.embedding = event.embedding
            result.num_cached_tokens = event.num_cached_tokens

    def wait(self, *request_ids: int, seconds: float = 120) -> list[Result]:
        """Wait until the named requests (all, if none is named) have finished."""
        wanted = request_ids or tuple(self.results)
        deadline = time.monotonic() + seconds
        while not all(self.results[i].finish for i in wanted):
            assert time.monotonic() < deadline, "the engine hangs"
            self.poll(1)
        return [self.results[i] for i in wanted]

    def generate(self, prompt: Sequence[int], constraint: Constraint | None = None, **values: Any) -> Result:
        return self.wait(self.submit(prompt, constraint, **values))[0]


@contextlib.contextmanager
def running_engine(path: Path, **options: Any) -> Iterator[Client]:
    """An engine on a checkpoint, stopped at the end, when it checks its own books (Scheduler::check_integrity)."""
    checkpoint = load_checkpoint(path)
    config, tensors = to_engine(checkpoint)
    engine_options = _engine.EngineOptions()
    engine_options.max_position = checkpoint.max_position
    engine_options.kv_format = "F32"
    engine_options.exact = True
    for name, value in options.items():
        assert hasattr(engine_options, name), name
        setattr(engine_options, name, value)
    engine = _engine.Engine(config, tensors, engine_options, _engine.Loading())
    try:
        yield Client(engine)
    finally:
        engine.stop()
        assert engine.stats().error == "", "the loop ended well and its blocks add up"
