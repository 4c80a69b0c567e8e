from __future__ import annotations

import os
import re
import subprocess
import time

from langchain_vllm_server.metrics import Metrics
from langchain_vllm_server.prometheus import Histogram
from tests.server.fakes import Server, running

# Names that vLLM 0.32 exports and that make sense for one engine on a CPU.
NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "num_requests_waiting_by_reason",
    "cache_config_info",
    "prompt_tokens_cached_total",
    "iteration_tokens_total",
    "request_max_num_generation_tokens",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "admission_rejections_total",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_max_tokens",
    "request_prefill_kv_computed_tokens",
    "request_params_n",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
]

LINE = re.compile(r'(# (HELP|TYPE) \S+ .+|[\w:]+(\{(\w+="[^"\n]*",?)+\})? -?[0-9.e+-]+)')


async def page(server: Server) -> str:
    response = await server.client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return response.text


def value(page: str, name: str, **labels: str) -> float:
    wanted = {f'{key}="{text}"' for key, text in labels.items()}
    for line in page.splitlines():
        match = re.fullmatch(r"vllm:(\w+)\{(.*)\} (\S+)", line)
        if match and match[1] == name and wanted <= set(match[2].split(",")):
            return float(match[3])
    raise AssertionError(f"no {name} {labels}")


async def test_vllms_names_and_the_text_format(server: Server) -> None:
    text = await page(server)
    assert text.endswith("\n")
    for line in text.splitlines():
        assert LINE.fullmatch(line), line
    types = re.findall(r"# TYPE vllm:(\S+)", text)
    assert sorted(types) == sorted(NAMES)


async def test_counts_are_exact(server: Server) -> None:
    await server.complete("Hi", max_tokens=3)
    await server.complete("Hi", stop="w")
    await server.chat(stream=True)
    text = await page(server)
    label = {"model_name": "tiny", "engine": "0"}
    assert value(text, "request_success_total", finished_reason="length", **label) == 1
    assert value(text, "request_success_total", finished_reason="stop", **label) == 2
    assert value(text, "request_success_total", finished_reason="abort", **label) == 0
    assert value(text, "request_generation_tokens_sum", **label) == 3 + 7 + 12
    assert value(text, "request_generation_tokens_count", **label) == 3
    assert value(text, "time_to_first_token_seconds_count", **label) == 3
    assert value(text, "inter_token_latency_seconds_count", **label) == 2 + 6 + 11
    assert value(text, "request_params_max_tokens_bucket", le="5.0", **label) == 1
    assert value(text, "request_params_max_tokens_bucket", le="+Inf", **label) == 3
    assert value(text, "request_max_num_generation_tokens_sum", **label) == 3 + 7 + 12
    assert value(text, "prompt_tokens_cached_total", **label) == 16
    assert value(text, "num_requests_waiting_by_reason", reason="capacity", **label) == 0
    config = {"block_size": "16", "num_gpu_blocks": "100", "kv_cache_size_tokens": "1600"}
    assert value(text, "cache_config_info", kv_cache_max_concurrency="6.25", **config, **label) == 1
    assert value(text, "kv_cache_usage_perc", **label) == 0.25
    assert value(text, "prefix_cache_hits_total", **label) == 16


def test_histogram_bounds_are_inclusive() -> None:
    histogram = Histogram((1, 2))
    for x in (0.5, 1, 1.5, 2, 3):
        histogram.observe(x)
    assert list(histogram.lines("h", 'a="b"')) == [
        'h_bucket{le="1.0",a="b"} 2.0',
        'h_bucket{le="2.0",a="b"} 4.0',
        'h_bucket{le="+Inf",a="b"} 5.0',
        'h_count{a="b"} 5.0',
        'h_sum{a="b"} 8.0',
    ]


async def test_token_buckets_go_up_to_the_context() -> None:
    async with running(max_model_len=700) as server:
        bounds = re.findall(r'request_prompt_tokens_bucket\{le="([^"]+)"', await page(server))
    assert bounds == ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "200.0", "500.0", "+Inf"]


async def test_labels_are_escaped(server: Server) -> None:
    text = Metrics('a"b\\c', 16).render(server.engine.stats(), {})
    assert 'model_name="a\\"b\\\\c"' in text


async def test_steps_are_counted_by_their_tokens(server: Server) -> None:
    text = await page(server)  # steps of 1, 1, 8 and 32 tokens or a little less
    counts = [value(text, "iteration_tokens_total_bucket", le=le) for le in ("1.0", "8.0", "16.0", "32.0", "+Inf")]
    assert counts == [2, 3, 3, 4, 4]
    assert (value(text, "iteration_tokens_total_count"), value(text, "iteration_tokens_total_sum")) == (4, 45)


async def test_of_several_answers_the_longest_is_counted_once() -> None:
    async with running(lambda _prompt, _params: [65] * 300) as server:
        await server.complete(["a", "b"], n=2, max_tokens=5)
        text = await page(server)
    assert value(text, "request_max_num_generation_tokens_count") == 2
    assert value(text, "request_max_num_generation_tokens_sum") == 10


def sample(text: str, name: str) -> float:
    return float(next(line for line in text.splitlines() if line.startswith(name + " ")).rpartition(" ")[2])


async def test_http_requests_by_handler(server: Server) -> None:
    await server.complete("Hi", max_tokens=3)
    await server.complete("Hi", max_tokens=-3)
    await server.chat(stream=True, max_tokens=3)
    await server.client.get("/v1/models/tiny")
    await server.client.get("/nowhere")
    await server.client.get("/health")
    text = await page(server)
    requests = set(re.findall(r'^http_requests_total\{handler="(.+)",method="(.+)",status="(.+)"\} (.+)$', text, re.M))
    assert requests == {
        ("/v1/completions", "POST", "2xx", "1.0"),
        ("/v1/completions", "POST", "4xx", "1.0"),
        ("/v1/chat/completions", "POST", "2xx", "1.0"),
        ("/v1/models/{name:path}", "GET", "2xx", "1.0"),
        ("none", "GET", "4xx", "1.0"),
    }
    assert sample(text, "http_request_duration_highr_seconds_count") == 5
    assert sample(text, 'http_request_size_bytes_count{handler="/v1/completions"}') == 2
    assert sample(text, 'http_request_size_bytes_sum{handler="/v1/completions"}') > 20
    assert sample(text, 'http_response_size_bytes_sum{handler="/v1/chat/completions"}') > 100


async def test_the_process_is_told(server: Server) -> None:
    text = await page(server)
    assert sample(text, "process_resident_memory_bytes") > 10 * 2**20
    assert 0 < sample(text, "process_open_fds") < sample(text, "process_max_fds")
    assert abs(time.time() - sample(text, "process_start_time_seconds") - process_age()) < 5
    assert sample(text, "process_cpu_seconds_total") > 0


def process_age() -> float:
    return float(subprocess.check_output(["ps", "-o", "etimes=", "-p", str(os.getpid())]))
