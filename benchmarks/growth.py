"""How our own costs grow: with clients, with context, with waiting requests; and what a cached prefix saves."""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING, Any

from benchmarks.running import measure, started
from benchmarks.workloads import serving

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.engines import Engine
    from benchmarks.prompts import Prompts

    Rows = list[dict[str, Any]]

_PREFERRED = ("ours:int8", "ours:Q4_0", "ours:Q8_0", "ours:Q4_1", "ours:bf16")


def subject(engines: list[Engine]) -> Engine | None:
    """The engine whose growth is measured: one of ours that can be started."""
    ours = {engine.name: engine for engine in engines if not engine.missing}
    return next((ours[name] for name in _PREFERRED if name in ours), None)


def sweep(engine: Engine, prompts: Prompts, log: Path, quick: bool) -> Rows:
    """Throughput and latency from one client to 256."""
    rows = []
    with started(engine.setups[0], log) as (server, _):
        measure(server, serving(8, 8), prompts, "sweep warm-up")
        for concurrency in [2**i for i in range(4 if quick else 9)]:
            count = max(4, 2 * concurrency) if concurrency <= 64 else concurrency * 3 // 2
            workload = serving(concurrency, count).quick() if quick else serving(concurrency, count)
            rows.append({"concurrency": concurrency, **measure(server, workload, prompts, f"sweep {concurrency}")})
    return rows


def context(engine: Engine, prompts: Prompts, log: Path, quick: bool) -> Rows:
    """Decode time per token after prompts of 128 to 8192 tokens; a prompt is computed once, and then cached."""
    rows = []
    answer, times = 32, 3
    with started(engine.setups[-1], log) as (running, _):
        for length in [2**i for i in range(7, 10 if quick else 14)]:
            prompt = prompts.make(1, length - answer, f"context {length}")
            load = running.load(prompt * times, 1, answer)
            per_token = statistics.median(answer.per_token for answer in load.answers)
            rows.append({"context": length, "ms_per_token": 1000 * per_token})
    return rows


def prefix_cost(engine: Engine, prompts: Prompts, log: Path, quick: bool) -> Rows:
    """First tokens of prompts behind 1024 tokens, computed and cached, and without them."""
    rows = []
    own, prefix = 16, 1024
    with started(engine.setups[-1], log) as (running, _):
        for i in range(2 if quick else 5):
            texts = prompts.make(2, own, f"prefix {i}", prefix) + prompts.make(1, own, f"no prefix {i}")
            answers = running.load(texts, 1, 1).answers
            names = ("computed_ms", "cached_ms", "without_ms")
            rows.append({name: 1000 * answer.first for name, answer in zip(names, answers, strict=True)})
    return rows


def scheduler(_engine: Engine, _prompts: Prompts, _log: Path, quick: bool) -> Rows:
    """Time of the scheduler in a step, with requests running and as good as nobody or many waiting.

    An upper bound: turning its plan and its events into Python objects is counted in.
    """
    try:
        from langchain_vllm_server import _engine_test
    except ImportError:
        return []
    return [_scheduler_steps(_engine_test, waiting, 20 if quick else 200) for waiting in (0, 1000)]


def _scheduler_steps(module: Any, waiting: int, steps: int, running: int = 256, prompt: int = 256) -> dict[str, Any]:
    params = module.SamplingParams()
    params.max_tokens = running + steps  # those who come first decode while the prompts of the others are computed
    blocks = math.ceil((prompt + params.max_tokens) / module.KV_BLOCK_SIZE) * (running + 1)
    core = module.Scheduler(blocks, running, 512)
    for number in range(running + waiting):
        core.submit(number, [number] * prompt, params)
    while not _step(core):  # until all have computed their prompts
        pass
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        _step(core)
        seconds.append(time.perf_counter() - begin)
    return {"running": running, "waiting": waiting, "ms_per_step": 1000 * statistics.median(seconds)}


def _step(core: Any) -> bool:
    """One step, each sequence getting a token; whether all running ones only decode."""
    step = core.schedule()
    core.commit([1] * sum(sequence.catches_up for sequence in step))
    return len(step) == 256 and all(sequence.num_tokens == 1 for sequence in step)


STUDIES: dict[str, Callable[[Engine, Prompts, Path, bool], Rows]] = {
    "sweep": sweep,
    "context": context,
    "prefix_cost": prefix_cost,
    "scheduler": scheduler,
}
