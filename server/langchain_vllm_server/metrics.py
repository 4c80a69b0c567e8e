"""GET /metrics: vLLM's metric names, labels and buckets in Prometheus' text format.

The format is small enough to write by hand (https://prometheus.io/docs/instrumenting/exposition_formats/), and
importing prometheus_client takes as long as importing the rest of the server.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from langchain_vllm_server._engine import Stats
    from langchain_vllm_server.generation import Choice, Clock

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TIME_TO_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
_FINISHED = ("stop", "length", "abort", "error", "repetition")


class Ended(Protocol):
    """A sequence that has ended, as it is counted."""

    finish_reason: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    clock: Clock


class Histogram:
    """Counts of observations up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """The samples."""
        total = 0
        for bound, count in zip((*map(float, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}",{labels}}} {float(total)}'
        yield f"{name}_count{{{labels}}} {float(total)}"
        yield f"{name}_sum{{{labels}}} {self._sum}"


class Metrics:
    """Counts requests as they start, step and finish.

    Args:
        model_name: The label.
        max_model_len: Upper end of the buckets that count tokens.
    """

    def __init__(self, model_name: str, max_model_len: int) -> None:
        escaped = model_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        self._labels = f'engine="0",model_name="{escaped}"'
        self._success: Counter[str] = Counter(dict.fromkeys(_FINISHED, 0))
        tokens = _one_two_five(max_model_len)
        self.prompt_tokens = Histogram(tokens)
        self.generation_tokens = Histogram(tokens)
        self.params_max_tokens = Histogram(tokens)
        self.prefill_tokens = Histogram(tokens)
        self.params_n = Histogram((1, 2, 5, 10, 20))
        self.time_to_first_token = Histogram(_TIME_TO_FIRST_TOKEN)
        self.inter_token = Histogram(_PER_TOKEN)
        self.time_per_output_token = Histogram(_PER_TOKEN)
        self.e2e = Histogram(_REQUEST)
        self.queue = Histogram(_REQUEST)
        self.inference = Histogram(_REQUEST)
        self.prefill = Histogram(_REQUEST)
        self.decode = Histogram(_REQUEST)

    def started(self, n: int, max_tokens: Sequence[int]) -> None:
        """A request was submitted: n choices of prompts with these limits."""
        for limit in max_tokens:
            self.params_n.observe(n)
            self.params_max_tokens.observe(limit)

    def stepped(self, choice: Choice, previous: float | None) -> None:
        """A choice got tokens; `previous` is when it got the ones before."""
        clock = choice.clock
        if clock.last_token is None or clock.first_token is None:
            return
        if previous is None:
            self.time_to_first_token.observe(clock.first_token - clock.arrival)
        else:
            self.inter_token.observe(clock.last_token - previous)

    def finished(self, choice: Ended) -> None:
        """A choice has ended, for its `finish_reason`."""
        self._success[choice.finish_reason or "abort"] += 1
        clock = choice.clock
        self.prompt_tokens.observe(choice.num_prompt_tokens)
        self.generation_tokens.observe(choice.num_tokens)
        self.e2e.observe((clock.last_token or time.monotonic()) - clock.arrival)
        if clock.scheduled is None or clock.first_token is None or clock.last_token is None:
            return
        self.prefill_tokens.observe(choice.num_prompt_tokens - choice.num_cached_tokens)
        self.queue.observe(clock.scheduled - clock.arrival)
        self.prefill.observe(clock.first_token - clock.scheduled)
        self.decode.observe(clock.last_token - clock.first_token)
        self.inference.observe(clock.last_token - clock.scheduled)
        if choice.num_tokens > 1:
            self.time_per_output_token.observe((clock.last_token - clock.first_token) / (choice.num_tokens - 1))

    def render(self, stats: Stats) -> str:
        """The page, with the engine's own counters as they stand."""
        return "\n".join((*self._gauges(stats), *self._counters(stats), *self._histograms(), ""))

    def _gauges(self, stats: Stats) -> Iterator[str]:
        used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        for name, value, text in (
            ("num_requests_running", stats.num_running, "Sequences that are being computed."),
            ("num_requests_waiting", stats.num_waiting, "Sequences that wait to be computed."),
            ("kv_cache_usage_perc", used, "Part of the KV cache that is in use. 1 means 100 percent."),
        ):
            yield from self._header(name, "gauge", text)
            yield f"vllm:{name}{{{self._labels}}} {float(value)}"

    def _counters(self, stats: Stats) -> Iterator[str]:
        for name, value, text in (
            ("prefix_cache_queries", stats.prefix_cache_queries, "Prompt tokens looked up in the prefix cache."),
            ("prefix_cache_hits", stats.prefix_cache_hits, "Prompt tokens found in the prefix cache."),
            ("num_preemptions", stats.num_preemptions, "Sequences that gave up their cache and were recomputed."),
            ("prompt_tokens", stats.prompt_tokens, "Prompt tokens processed."),
            ("generation_tokens", stats.generation_tokens, "Tokens generated."),
        ):
            yield from self._header(f"{name}_total", "counter", text)
            yield f"vllm:{name}_total{{{self._labels}}} {float(value)}"
        yield from self._header("request_success_total", "counter", "Requests by how they ended.")
        for reason, count in self._success.items():
            yield f'vllm:request_success_total{{finished_reason="{reason}",{self._labels}}} {float(count)}'

    def _histograms(self) -> Iterator[str]:
        for name, histogram, text in (
            ("request_prompt_tokens", self.prompt_tokens, "Prompt tokens per request."),
            ("request_generation_tokens", self.generation_tokens, "Generated tokens per request."),
            ("request_params_max_tokens", self.params_max_tokens, "max_tokens per request."),
            ("request_prefill_kv_computed_tokens", self.prefill_tokens, "Prompt tokens not found in the prefix cache."),
            ("request_params_n", self.params_n, "n per request."),
            ("time_to_first_token_seconds", self.time_to_first_token, "Time to the first token."),
            ("inter_token_latency_seconds", self.inter_token, "Time between two steps of a request."),
            (
                "request_time_per_output_token_seconds",
                self.time_per_output_token,
                "Mean time per token after the first.",
            ),
            ("e2e_request_latency_seconds", self.e2e, "Time from arrival to the last token."),
            ("request_queue_time_seconds", self.queue, "Time spent waiting to be scheduled."),
            ("request_inference_time_seconds", self.inference, "Time from being scheduled to the last token."),
            ("request_prefill_time_seconds", self.prefill, "Time from being scheduled to the first token."),
            ("request_decode_time_seconds", self.decode, "Time from the first token to the last."),
        ):
            yield from self._header(name, "histogram", text)
            yield from histogram.lines(f"vllm:{name}", self._labels)

    @staticmethod
    def _header(name: str, kind: str, text: str) -> tuple[str, str]:
        return f"# HELP vllm:{name} {text}", f"# TYPE vllm:{name} {kind}"


def _one_two_five(maximum: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 … up to `maximum`."""
    steps = (mantissa * 10**power for power in range(len(str(maximum))) for mantissa in (1, 2, 5))
    return [step for step in steps if step <= maximum]
