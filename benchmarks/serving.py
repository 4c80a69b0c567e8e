"""Serving side by side: streamed requests against our server and the peers that are installed, in turn, on one machine.

    python benchmarks/serving.py --model MODEL.gguf [--engines ours,llama.cpp] [--concurrency 1,8,32] [--repeats 3]

A closed loop keeps `concurrency` requests in flight: prompts of --prompt-tokens with no common prefix (or behind one of
--shared-prefix tokens), exactly --max-tokens out (greedy, end token ignored). Engines alternate within each repeat, so
that a machine whose speed drifts drifts for all. Prints medians over the repeats: output tokens a second, time to first
token, inter-token latency in ms, and each engine's start in seconds and largest resident memory in MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

THREADS = len(os.sched_getaffinity(0))
VOCABULARY = """time river stone garden bridge engine signal harbour winter window paper silver copper forest mountain
valley island ocean desert planet light shadow voice letter number table chair green yellow quick slow heavy early young
great little walk jump read write sing paint build carry throw catch listen speak answer follow lead teach learn grow
break close begin finish travel arrive return remember because although however therefore while before after until"""
WORDS = VOCABULARY.split()

LLAMA_CPP = """
import sys, time, xllamacpp as x
model, port, threads, slots, flash = sys.argv[1], *map(int, sys.argv[2:])
p = x.CommonParams()
p.model.path, p.hostnames, p.port = model, ["127.0.0.1"], port
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
p.n_parallel, p.n_ctx, p.cache_ram_mib, p.warmup = slots, 1536 * slots, 0, False
p.flash_attn_type = [x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED,
                     x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED][flash]
server = x.Server(p)
time.sleep(86400)
"""


@dataclasses.dataclass(frozen=True)
class Engine:
    """A server that can be started: its name and the command line for (model, port, largest concurrency)."""

    name: str
    command: Callable[[str, int, int], list[str]]


def ours(model: str, port: int, _slots: int) -> list[str]:
    serve = [sys.executable, "-m", "langchain_vllm_server", model, "--port", str(port)]
    return [*serve, "--threads", str(THREADS), "--disable-access-log"]


def llama_cpp(flash: bool) -> Callable[[str, int, int], list[str]]:
    python = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)  # an environment with the package xllamacpp

    def command(model: str, port: int, slots: int) -> list[str]:
        return [python, "-c", LLAMA_CPP, model, str(port), str(THREADS), str(slots), str(int(flash))]

    return command


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("ours", ours),
        Engine("llama.cpp", llama_cpp(flash=False)),
        Engine("llama.cpp-fa", llama_cpp(flash=True)),
    )
}


class Running:
    """A started engine, its address, how long it took, and how large it has become."""

    def __init__(self, engine: Engine, model: str, port: int, slots: int) -> None:
        begin = time.monotonic()
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            engine.command(model, port, slots), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() - begin > 300:
                self.stop()
                raise SystemExit(f"{engine.name} did not start; is it installed?")
            time.sleep(0.02)
        self.start_seconds = time.monotonic() - begin

    def _answers(self) -> bool:
        """Whether a first token came over HTTP."""
        body = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
        try:
            return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).status_code == 200
        except httpx.TransportError:
            return False

    def peak_mib(self) -> float:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def prompts(args: argparse.Namespace, seed: int) -> Iterator[str]:
    """Endless prompts of about the asked length (a word of the list is one token), new ones for every seed."""
    shared = " ".join(random.Random(f"shared {seed}").choices(WORDS, k=args.shared_prefix))
    for i in itertools.count():
        rng = random.Random(f"{seed}/{i}")
        yield f"{shared} {rng.randrange(10**6)} " + " ".join(rng.choices(WORDS, k=args.prompt_tokens - 5))


async def request(client: httpx.AsyncClient, url: str, prompt: str, max_tokens: int) -> list[float]:
    """One streamed completion; the moments at which text came, the start first."""
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "min_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    stamps = [time.perf_counter()]
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and any(c.get("text") for c in json.loads(line[6:]).get("choices", [])):
                stamps.append(time.perf_counter())
    return stamps


async def load(url: str, concurrency: int, count: int, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """`count` requests, `concurrency` at a time."""
    todo = itertools.islice(prompts(args, seed), count)
    results: list[list[float]] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:

        async def worker() -> None:
            for prompt in todo:
                results.append(await request(client, url, prompt, args.max_tokens))

        begin = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        wall = time.perf_counter() - begin
    first = [1000 * (stamps[1] - stamps[0]) for stamps in results]
    gaps = [1000 * (b - a) for stamps in results for a, b in itertools.pairwise(stamps[1:])] or [0.0]
    return {
        "tokens/s": count * args.max_tokens / wall,
        "ttft p50": statistics.median(first),
        "ttft p99": quantile(first, 0.99),
        "itl p50": statistics.median(gaps),
        "itl p99": quantile(gaps, 0.99),
    }


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def measure(args: argparse.Namespace) -> dict[tuple[str, int], list[dict[str, float]]]:
    levels = [int(c) for c in args.concurrency.split(",")]
    measured: dict[tuple[str, int], list[dict[str, float]]] = {}
    for repeat in range(args.repeats):
        for offset, name in enumerate(args.engines.split(",")):
            running = Running(ENGINES[name], args.model, 18100 + offset, max(levels))
            try:
                for level in levels:
                    count = max(args.requests, 2 * level)
                    figures = asyncio.run(load(running.url, level, count, args, seed=1000 * repeat + level))
                    figures |= {"start s": running.start_seconds, "peak MiB": running.peak_mib()}
                    measured.setdefault((name, level), []).append(figures)
                    print(f"repeat {repeat} {name} c={level}: {figures['tokens/s']:.1f} tokens/s", file=sys.stderr)
            finally:
                running.stop()
    return measured


def table(measured: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    lines = []
    for (name, level), runs in sorted(measured.items(), key=lambda item: (item[0][1], item[0][0])):
        medians: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        if not lines:
            lines = ["| at once | engine | " + " | ".join(medians) + " |", "|---" * (len(medians) + 2) + "|"]
        cells = " | ".join(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in medians.values())
        lines.append(f"| {level} | {name} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--engines", default="ours,llama.cpp")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--shared-prefix", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    print(table(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
