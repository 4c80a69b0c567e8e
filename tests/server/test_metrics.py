from __future__ import annotations

import re

from langchain_vllm_server.metrics import Histogram, Metrics
from tests.server.fakes import Server, running

# Names that vLLM 0.32 exports and that make sense for one engine on a CPU.
NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
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

LINE = re.compile(r'(# (HELP|TYPE) \S+ .+|vllm:\w+\{(\w+="[^"\n]*",?)+\} -?[0-9.e+-]+)')


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
    text = Metrics('a"b\\c', 16).render(server.engine.stats())
    assert 'model_name="a\\"b\\\\c"' in text
