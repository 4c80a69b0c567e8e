"""An engine without HTTP: a child process that reads loads on stdin and writes timings on stdout, a JSON line each.

    python benchmarks/inprocess.py {ours|openvino} MODEL THREADS [SERVER_FLAG ...]

A script of its own, with no import of this package: OpenVINO lives in another environment. Prompts become token ids
before the clock starts. The first line that it writes tells how long loading took.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import Any, Protocol, TextIO


class Backend(Protocol):
    """An engine that is driven step by step."""

    weight_bytes: int
    version: str

    def encode(self, text: str) -> Any: ...
    def length(self, prompt: Any) -> int: ...
    def submit(self, number: int, prompt: Any, max_tokens: int) -> None: ...
    def poll(self) -> list[tuple[int, int, int]]:
        """What is new, waiting for something: (number, tokens, cached tokens of the prompt)."""
        ...


class Ours:
    """The engine as the server sets it up."""

    def __init__(self, model: str, threads: int, flags: list[str]) -> None:
        from langchain_vllm_server import _engine
        from langchain_vllm_server.gate import Progress
        from langchain_vllm_server.load import load
        from langchain_vllm_server.settings import parse_settings

        loaded = load(parse_settings([model, "--threads", str(threads), *flags]), Progress())
        self._engine, self._tokenizer, self._new_params = loaded.engine, loaded.model.tokenizer, _engine.SamplingParams
        self.weight_bytes, self.version = loaded.engine.weight_bytes, _engine.__version__

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def length(self, prompt: list[int]) -> int:
        return len(prompt)

    def submit(self, number: int, prompt: list[int], max_tokens: int) -> None:
        params = self._new_params()
        params.temperature = 0
        params.min_tokens = params.max_tokens = max_tokens
        self._engine.submit(number, prompt, params)

    def poll(self) -> list[tuple[int, int, int]]:
        select.select([self._engine.fileno()], [], [], 60)
        events = self._engine.drain()
        if not events and not self._engine.stats().alive:
            raise RuntimeError(self._engine.stats().error)
        return [(e.request_id, len(e.tokens), e.num_cached_tokens) for e in events]


class OpenVino:
    """OpenVINO GenAI's continuous batching."""

    weight_bytes = 0

    def __init__(self, model: str, threads: int, _flags: list[str]) -> None:
        import openvino_genai as ov

        scheduler = ov.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = ov.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._new_config = ov.GenerationConfig
        self._open: dict[int, tuple[Any, int]] = {}  # number → its handle, and how many tokens are to come
        self.version = str(ov.__version__)

    def encode(self, text: str) -> Any:
        return self._tokenizer.encode(text, add_special_tokens=True).input_ids

    def length(self, prompt: Any) -> int:
        return int(prompt.shape[1])

    def submit(self, number: int, prompt: Any, max_tokens: int) -> None:
        config = self._new_config()
        config.max_new_tokens = config.min_new_tokens = max_tokens
        config.ignore_eos, config.do_sample = True, False
        self._open[number] = self._pipeline.add_request(number, prompt, config), max_tokens

    def poll(self) -> list[tuple[int, int, int]]:
        self._pipeline.step()
        news = []
        for number, (handle, _) in self._open.items():
            while handle.can_read():
                news += [(number, len(output.generated_ids), 0) for output in handle.read().values()]
        for number, count, _ in news:
            handle, left = self._open.pop(number)
            if left > count:
                self._open[number] = handle, left - count
        return news


def run_load(backend: Backend, first: int, prompts: list[str], concurrency: int, max_tokens: int) -> dict[str, Any]:
    """Keep `concurrency` prompts in flight until all are answered; answers as `load.Answer` has them.

    Args:
        backend: The engine.
        first: The number of the first request; an engine sees each number once, and they only grow.
        prompts: Texts.
        concurrency: Requests in flight.
        max_tokens: Of each answer, exactly.
    """
    encoded = [backend.encode(prompt) for prompt in prompts]
    starts: list[float] = []
    stamps: list[list[float]] = [[] for _ in prompts]
    tokens, cached = [0] * len(prompts), [0] * len(prompts)
    begin = time.perf_counter()
    running = 0
    while running or len(starts) < len(prompts):
        while running < concurrency and len(starts) < len(prompts):
            starts.append(time.perf_counter())
            backend.submit(first + len(starts) - 1, encoded[len(starts) - 1], max_tokens)
            running += 1
        news = backend.poll()
        now = time.perf_counter()
        for number, count, num_cached in news:
            index = number - first
            if count:
                stamps[index].append(now)
            tokens[index] += count
            cached[index] = max(cached[index], num_cached)
            running -= count > 0 and tokens[index] >= max_tokens
    seconds = time.perf_counter() - begin
    answers = zip(starts, stamps, tokens, map(backend.length, encoded), cached, strict=True)
    return {"seconds": seconds, "answers": list(answers)}


def serve(backend: Backend, output: TextIO, load_seconds: float) -> None:
    """Answer lines of stdin until it ends."""
    hello = {"load_seconds": load_seconds, "weight_bytes": backend.weight_bytes, "version": backend.version}
    print(json.dumps(hello), file=output, flush=True)
    first = 1
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run_load(backend, first, **request)), file=output, flush=True)
        first += len(request["prompts"])


def main() -> None:
    engine, model, threads, *flags = sys.argv[1:]
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    begin = time.perf_counter()
    backend: Backend = (Ours if engine == "ours" else OpenVino)(model, int(threads), flags)
    serve(backend, output, time.perf_counter() - begin)
    os._exit(0)  # nothing to tidy up, and the engine's thread need not be asked


if __name__ == "__main__":
    main()
