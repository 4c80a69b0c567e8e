"""A started engine: awaited, put under load, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import subprocess
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from benchmarks.load import Answer, Load, LoadError, http_load, request_body, summarise
from benchmarks.processes import Child, PeakMemory, busy_neighbour, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.engines import Setup
    from benchmarks.prompts import Prompts
    from benchmarks.workloads import Workload

START_SECONDS = 400.0
LOAD_SECONDS = 900.0
FIRST_PROMPT = "Hello"


class Server:
    """An engine behind HTTP."""

    def __init__(self, setup: Setup, log: Path) -> None:
        self._port = free_port()
        self.hello: dict[str, Any] = {}
        self.child = Child(setup.with_port(self._port), setup.env, log)

    def wait(self) -> None:
        """Until it has answered with a token."""
        begin = time.monotonic()
        while not self._answers():
            self.child.check()
            waited = time.monotonic() - begin
            if waited > START_SECONDS:
                raise TimeoutError(f"no answer after {START_SECONDS:.0f} s")
            time.sleep(min(0.01 + waited / 100, 0.1))  # who takes long to start is asked less often

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        body = {name: value for name, value in request_body(FIRST_PROMPT, 1).items() if "stream" not in name}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        if response.status not in (200, 503):  # 503: it is loading
            raise LoadError(f"HTTP {response.status}: {content[:300]!r}")
        return response.status == 200

    def load(self, prompts: list[str], concurrency: int, max_tokens: int) -> Load:
        return asyncio.run(http_load(self._port, prompts, concurrency, max_tokens, LOAD_SECONDS))


class InProcess:
    """An engine in a child that runs `inprocess.py`."""

    def __init__(self, setup: Setup, log: Path) -> None:
        self.hello: dict[str, Any] = {}
        self.child = Child(setup.command, setup.env, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def wait(self) -> None:
        """Until it has answered with a token."""
        self.hello = self._read(START_SECONDS)
        self.load([FIRST_PROMPT], 1, 1)

    def load(self, prompts: list[str], concurrency: int, max_tokens: int) -> Load:
        request = {"prompts": prompts, "concurrency": concurrency, "max_tokens": max_tokens}
        self.child.stdin.write(json.dumps(request).encode() + b"\n")
        self.child.stdin.flush()
        reply = self._read(LOAD_SECONDS)
        return Load([Answer(*answer) for answer in reply["answers"]], reply["seconds"])

    def _read(self, seconds: float) -> dict[str, Any]:
        watchdog = threading.Timer(seconds, self.child.stop)  # which ends the line that is being waited for
        watchdog.start()
        try:
            line = self.child.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            time.sleep(0.1)
            self.child.check()
            raise TimeoutError(f"no answer after {seconds:.0f} s")
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextlib.contextmanager
def started(setup: Setup, log: Path) -> Iterator[tuple[Server | InProcess, dict[str, Any]]]:
    """Start, wait for the first token, and stop at the end; gives what the start cost as well."""
    begin = time.perf_counter()
    engine: Server | InProcess = (Server if setup.http else InProcess)(setup, log)
    try:
        engine.wait()
        seconds = time.perf_counter() - begin
        yield engine, {"first_token_s": seconds, "memory": engine.child.memory(), **engine.hello}
    finally:
        engine.child.stop()


def measure(engine: Server | InProcess, workload: Workload, prompts: Prompts, seed: str) -> dict[str, Any]:
    """Run one workload."""
    texts = prompts.make(workload.count, workload.prompt_tokens, f"{workload.name}/{seed}", workload.prefix)
    neighbour: AbstractContextManager[Any] = busy_neighbour() if workload.beside_busy else nullcontext()
    with neighbour, PeakMemory(engine.child) as peak:
        load = engine.load(texts, workload.concurrency, workload.max_tokens)
    figures = {**summarise(load), "peak_memory": peak.mib}
    check(figures, workload)
    return {name: round(value, 4) if math.isfinite(value) else None for name, value in figures.items()}


def check(figures: dict[str, float], workload: Workload) -> None:
    """Raise LoadError where another load was measured than was asked for."""
    expected = {
        "tokens": workload.count * workload.max_tokens,
        "prompt_tokens": workload.count * (workload.prefix + workload.prompt_tokens),
    }
    for name, value in expected.items():
        if figures[name] != value:
            raise LoadError(f"{figures[name]:.0f} {name} where {value} were asked for")
