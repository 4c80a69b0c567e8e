"""GET /metrics: vLLM's metric names, labels and buckets in Prometheus' text format.."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from langchain_vllm_server.http_metrics import HttpMetrics
from langchain_vllm_server.process_metrics import process_lines
from langchain_vllm_server.prometheus import Histogram, labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from langchain_vllm_server._engine import Stats
    from langchain_vllm_server.generation import Choice, Clock

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
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_FINISHED = ("stop", "length", "abort", "error", "repetition")


class Ended(Protocol):
    """A sequence that has ended, as it is counted."""

    finish_reason: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    clock: Clock


class Metrics:
    """Counts requests as they start, step and finish.

    Args:
        model_name: The label.
        max_model_len: Upper end of the buckets that count tokens.
    """

    def __init__(self, model_name: str, max_model_len: int) -> None:
        self._labels = labels({"engine": "0", "model_name": model_name})
        self._success: Counter[str] = Counter(dict.fromkeys(_FINISHED, 0))
        tokens = _one_two_five(max_model_len)
        self.prompt_tokens = Histogram(tokens)
        self.generation_tokens = Histogram(tokens)
        self.params_max_tokens = Histogram(tokens)
        self.longest_generation = Histogram(tokens)
        self.http = HttpMetrics()
        self._max_model_len = max_model_len
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

    def render(self, stats: Stats, rejections: Mapping[str, int]) -> str:
        """The page, with the engine's own counters as they stand, and requests refused, by the limit they met."""
        counters = (*self._counters(stats), *self._rejections(rejections))
        ours = (*self._gauges(stats), *counters, *self._histograms(stats))
        return "\n".join((*ours, *self.http.lines(), *process_lines(), ""))

    def _gauges(self, stats: Stats) -> Iterator[str]:
        used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        for name, value, text in (
            ("num_requests_running", stats.num_running, "Sequences that are being computed."),
            ("num_requests_waiting", stats.num_waiting, "Sequences that wait to be computed."),
            ("kv_cache_usage_perc", used, "Part of the KV cache that is in use. 1 means 100 percent."),
        ):
            yield from self._header(name, "gauge", text)
            yield f"vllm:{name}{{{self._labels}}} {float(value)}"
        yield from self._header("num_requests_waiting_by_reason", "gauge", "Sequences that wait, by what for.")
        for reason, count in (("capacity", stats.num_waiting), ("deferred", 0)):
            yield f'vllm:num_requests_waiting_by_reason{{reason="{reason}",{self._labels}}} {float(count)}'
        size = stats.num_blocks * stats.block_size
        cache = {
            "block_size": stats.block_size,
            "kv_cache_max_concurrency": round(size / self._max_model_len, 2),
            "kv_cache_size_tokens": size,
            "num_gpu_blocks": stats.num_blocks,  # vLLM's name, on a CPU as well
        }
        yield from self._header("cache_config_info", "gauge", "Size of the KV cache.")
        yield f"vllm:cache_config_info{{{labels(cache)},{self._labels}}} 1.0"

    def _counters(self, stats: Stats) -> Iterator[str]:
        for name, value, text in (
            ("prefix_cache_queries", stats.prefix_cache_queries, "Prompt tokens looked up in the prefix cache."),
            ("prefix_cache_hits", stats.prefix_cache_hits, "Prompt tokens found in the prefix cache."),
            ("num_preemptions", stats.num_preemptions, "Sequences that gave up their cache and were recomputed."),
            ("prompt_tokens", stats.prompt_tokens, "Prompt tokens processed."),
            ("prompt_tokens_cached", stats.prefix_cache_hits, "Prompt tokens that need not be computed."),
            ("generation_tokens", stats.generation_tokens, "Tokens generated."),
        ):
            yield from self._header(f"{name}_total", "counter", text)
            yield f"vllm:{name}_total{{{self._labels}}} {float(value)}"
        yield from self._header("request_success_total", "counter", "Requests by how they ended.")
        for reason, count in self._success.items():
            yield f'vllm:request_success_total{{finished_reason="{reason}",{self._labels}}} {float(count)}'

    def _rejections(self, rejections: Mapping[str, int]) -> Iterator[str]:
        yield from self._header("admission_rejections_total", "counter", "Requests refused because the queue was full.")
        for reason, count in rejections.items():
            yield f'vllm:admission_rejections_total{{reason="{reason}",{self._labels}}} {float(count)}'

    def _histograms(self, stats: Stats) -> Iterator[str]:
        steps = Histogram.of_powers(_STEP_TOKENS, stats.steps_by_size, stats.step_tokens)
        for name, histogram, text in (
            ("iteration_tokens_total", steps, "Tokens per step of the engine."),
            ("request_prompt_tokens", self.prompt_tokens, "Prompt tokens per request."),
            ("request_generation_tokens", self.generation_tokens, "Generated tokens per request."),
            ("request_max_num_generation_tokens", self.longest_generation, "Of the longest of a prompt's answers."),
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
