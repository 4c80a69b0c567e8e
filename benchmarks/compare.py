"""Ours against the peers and the machine: ratios, targets, and what is missed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from benchmarks.machine import HEAD_MACS, KV_BYTES, LAYER_MACS
from benchmarks.records import LOWER_IS_BETTER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.records import Results

LATENCY = ("ttft_p50", "ttft_p99", "itl_p99")


@dataclass(frozen=True)
class Comparison:
    """A column: one of ours against a peer."""

    title: str
    ours: str
    peer: str


@dataclass(frozen=True)
class Row:
    """Figures of a workload, and by how much ours is to be better than each peer, named by engine or family."""

    title: str
    workload: str
    figures: tuple[str, ...]
    targets: Mapping[str, float] = field(default_factory=dict)

    def target(self, peer: str) -> float | None:
        return self.targets.get(peer, self.targets.get(peer.partition(":")[0]))


@dataclass(frozen=True)
class Ratio:
    """How many times better ours is, and ought to be."""

    value: float
    target: float | None = None

    @property
    def missed(self) -> bool:
        return self.target is not None and self.value < self.target


QUANTISED = (
    Comparison("llama.cpp Q4_0", "ours:Q4_0", "llama.cpp:Q4_0"),
    Comparison("llama.cpp Q4_1", "ours:Q4_1", "llama.cpp:Q4_1"),
    Comparison("llama.cpp Q8_0", "ours:Q8_0", "llama.cpp:Q8_0"),
    Comparison("vLLM bf16", "ours:int8", "vllm:bf16"),
    Comparison("vLLM int8", "ours:int8", "vllm:int8"),
    Comparison("vLLM int8, eager", "ours:int8", "vllm:int8-eager"),
    Comparison("OpenVINO int8", "ours:int8", "openvino:int8"),
)
GGUF_AGAINST_INT8 = (
    Comparison("vLLM int8", "ours:Q8_0", "vllm:int8"),
    Comparison("OpenVINO int8", "ours:Q8_0", "openvino:int8"),
)
EXACT = (
    Comparison("llama.cpp BF16", "ours:bf16", "llama.cpp:BF16"),
    Comparison("vLLM bf16", "ours:bf16", "vllm:bf16"),
)
EXACT_TARGET = 1.5


def _targets(llama_cpp: float, bf16: float, int8: float, openvino: float | None, **others: float) -> dict[str, float]:
    targets = {"llama.cpp": llama_cpp, "vllm:bf16": bf16, "vllm:int8": int8}
    if openvino is not None:
        targets["openvino"] = openvino
    return targets | {f"llama.cpp:{name}": target for name, target in others.items()}


_BETTER = _targets(1, 1, 1, 1)
_START = _targets(1, 80, 80, 1) | {"vllm:int8-eager": 30}
ROWS = (
    Row("decode, batch 1, 128 in", "decode", ("decode_per_s",), _targets(2, 4, 2.5, 2.5)),
    Row("prefill, 512 tokens", "prefill_512", ("prefill_per_s",), _targets(4.5, 4, 1.4, 1.8, Q4_0=3.5)),
    Row("prefill, 2048 tokens", "prefill_2048", ("prefill_per_s",), _targets(4.5, 4, 2, 2.5, Q4_0=3.5)),
    Row("HTTP, 1 at once, output tokens/s", "serve_1", ("tokens_per_s",), _targets(2.5, 5, 3, 2.5)),
    Row("HTTP, 8 at once", "serve_8", ("tokens_per_s",), _targets(5, 5, 2.5, 2.2)),
    Row("HTTP, 32 at once", "serve_32", ("tokens_per_s",), _targets(5, 5, 2.2, 2.2)),
    Row("HTTP, 256 at once", "serve_256", ("tokens_per_s",)),
    Row("HTTP, 8 at once, shared 1024-token prefix", "prefix_8", ("tokens_per_s",), _targets(7, 3, 2, None)),
    Row("1 at once: first token p50, p99, inter-token p99", "serve_1", LATENCY, _BETTER),
    Row("8 at once: first token p50, p99, inter-token p99", "serve_8", LATENCY, _BETTER),
    Row("32 at once: first token p50, p99, inter-token p99", "serve_32", LATENCY, _BETTER),
    Row("cold start: exec to first token", "start", ("first_token_s",), _START),
    Row("batch 1 beside one busy process, share of speed kept", "busy", ("kept",)),
    Row("memory under load, 32 at once", "serve_32", ("peak_memory",), _targets(2, 6, 6, 2)),
)


def is_of_gpu(results: Results) -> bool:
    """For a GPU there are no targets yet, and processes' memory is not what counts."""
    return any("gpu" in record for record in results.of_kind("machine"))


def rows_of(results: Results) -> list[Row]:
    """Those of which something was measured."""
    return [row for row in ROWS if any(figure(results, e, row.workload, row.figures[0]) for e in results.engines())]


def figure(results: Results, engine: str, workload: str, name: str) -> float | None:
    """A measured median, or a share that follows from several."""
    if name == "kept":
        return kept(results, engine)
    return results.median(engine, workload, name)


def kept(results: Results, engine: str) -> float | None:
    """Of the decode speed, beside a busy process, in the same setup."""
    busy = results.cell(engine, "busy", "decode_per_s")
    idle = busy and results.cell(engine, "decode", "decode_per_s", busy.setup)
    return busy.median / idle.median if busy and idle else None


def ratios(results: Results, row: Row, comparison: Comparison, exact: bool = False) -> list[Ratio] | None:
    """For each of the row's figures; None where one of the two was not measured."""
    found = []
    target = EXACT_TARGET if exact and row.figures != ("kept",) else row.target(comparison.peer)
    if is_of_gpu(results):
        target = None
    for name in row.figures:
        mine = figure(results, comparison.ours, row.workload, name)
        theirs = figure(results, comparison.peer, row.workload, name)
        if not mine or not theirs:
            return None
        found.append(Ratio(theirs / mine if name.startswith(LOWER_IS_BETTER) else mine / theirs, target))
    return found


@dataclass(frozen=True)
class Limit:
    """How near ours comes to what the machine, or the engine without HTTP, can do."""

    value: float
    what: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def missed(self) -> bool:
        too_little = self.at_least is not None and self.value < self.at_least
        return too_little or (self.at_most is not None and self.value > self.at_most)


def limits(results: Results, engine: str, row: Row) -> list[Limit]:
    """Those that bear on a row; empty where nothing was measured."""
    of_row: dict[tuple[str, str], tuple[Callable[..., Limit | None], ...]] = {
        ("decode", "decode_per_s"): (_bandwidth,),
        ("prefill_512", "prefill_per_s"): (_prefill_compute,),
        ("prefill_2048", "prefill_per_s"): (_prefill_compute,),
        ("serve_1", "tokens_per_s"): (_without_http,),
        ("serve_8", "tokens_per_s"): (_without_http,),
        ("serve_32", "tokens_per_s"): (_without_http, _serving_compute),
        ("serve_256", "tokens_per_s"): (_without_http, _serving_compute),
        ("prefix_8", "tokens_per_s"): (_cached_prefix,),
        ("start", "first_token_s"): (_cold_start,),
        ("busy", "kept"): (_kept,),
        ("serve_32", "peak_memory"): (_memory,),
    }
    if is_of_gpu(results):
        del of_row["start", "first_token_s"], of_row["serve_32", "peak_memory"]
    found = [limit(results, engine, row.workload) for limit in of_row.get((row.workload, row.figures[0]), ())]
    known = [limit for limit in found if limit is not None]
    return [replace(limit, at_least=None, at_most=None) for limit in known] if is_of_gpu(results) else known


def _peak(results: Results, name: str) -> float | None:
    records = results.of_kind("machine")
    peak: float | None = records[-1]["peaks"].get(name) if records else None
    return peak


def _bandwidth(results: Results, engine: str, workload: str) -> Limit | None:
    speed = results.median(engine, workload, "decode_per_s")
    weights = results.median(engine, "load", "weight_bytes")
    peak = _peak(results, "read_gbs")
    if not speed or not weights or not peak:
        return None
    return Limit(speed * weights / 1e9 / peak, "of memory bandwidth", at_least=0.75)


def _prefill_compute(results: Results, engine: str, workload: str) -> Limit | None:
    speed = results.median(engine, workload, "prefill_per_s")
    return _compute(results, engine, speed * LAYER_MACS) if speed else None


def _serving_compute(results: Results, engine: str, workload: str) -> Limit | None:
    names = ("requests", "prompt_tokens", "cached_tokens", "tokens", "seconds")
    requests, prompt, cached, tokens, seconds = (results.median(engine, workload, name) or 0 for name in names)
    if not seconds:
        return None
    work = (prompt - cached + tokens - requests) * LAYER_MACS + tokens * HEAD_MACS
    return _compute(results, engine, work / seconds, at_least=0.5)


def _compute(results: Results, engine: str, macs_per_s: float, at_least: float | None = None) -> Limit | None:
    """What is not quantised is multiplied in f32 (on GPUs in bf16 parts of it, by some ISAs too), and has no target."""
    exact = engine == "ours:bf16"
    name, of_exact = ("bf16_gmacs", "bf16 tensor-core") if is_of_gpu(results) else ("fma_gmacs", "f32")
    peak = _peak(results, name if exact else "dot_gmacs")
    if not peak:
        return None
    what = f"of the {of_exact} peak" if exact else "of the int8 dot-product peak"
    return Limit(macs_per_s / 1e9 / peak, what, None if exact else at_least)


def _without_http(results: Results, engine: str, workload: str) -> Limit | None:
    over_http = results.median(engine, workload, "tokens_per_s")
    without = results.median(engine, workload.replace("serve", "inprocess"), "tokens_per_s")
    if not over_http or not without:
        return None
    return Limit(over_http / without, "of in-process", at_least=None if workload == "serve_1" else 0.9)


def _cached_prefix(results: Results, engine: str, _workload: str) -> Limit | None:
    rows = results.growth("prefix_cost", engine)
    if not rows:
        return None
    computed, cached, without = (
        statistics.median(row[name] for row in rows) for name in ("computed_ms", "cached_ms", "without_ms")
    )
    return Limit((cached - without) / (computed - without), "of computing it for a cached prefix", at_most=0.02)


def _cold_start(results: Results, engine: str, workload: str) -> Limit | None:
    seconds = results.median(engine, workload, "first_token_s")
    return Limit(seconds, "s", at_most=1.0 if engine == "ours:Q4_1" else None) if seconds else None


def _kept(results: Results, engine: str, _workload: str) -> Limit | None:
    share = kept(results, engine)
    return None if share is None else Limit(share, "of its idle speed", at_least=0.5)


def _memory(results: Results, engine: str, workload: str) -> Limit | None:
    peak = results.median(engine, workload, "peak_memory")
    weights = results.median(engine, "load", "weight_bytes")
    if not peak or not weights:
        return None
    in_use = (weights + 32 * (256 + 128) * KV_BYTES) / 2**20
    return Limit(peak - in_use, "MiB more than weights and the KV of 32 requests", at_most=150)
