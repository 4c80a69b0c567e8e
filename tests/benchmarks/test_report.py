"""From records to tables: medians, ratios, targets, what is missing."""
# ruff: noqa: RUF001 - as in the report

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import report
from benchmarks.compare import QUANTISED, ROWS, Limit, limits, ratios
from benchmarks.engines import Engine, Setup, find_engines, select
from benchmarks.records import Journal, Results, read

if TYPE_CHECKING:
    from pathlib import Path


MACHINE = {
    "kind": "machine",
    "date": "2026-01-01",
    "cpu": "C",
    "family": "f",
    "flags": [],
    "cores": 2,
    "threads": 2,
    "memory_gib": 1,
    "kernel": "6",
    "python": "3",
    "load_average": 0.0,
    "peaks": {},
    "forced_isa": "",
    "quick": False,
    "command": "bench --models /some/where/models",
}


def measurement(engine: str, workload: str, setup: str = "", **figures: float) -> dict[str, Any]:
    fields = {"engine": engine, "workload": workload, "setup": setup, "repeat": 0, "figures": figures}
    return {"kind": "measurement", **fields}


def cells(text: str, work: str) -> list[str]:
    """Of the first row whose title begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {work}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_with_a_target_met_one_missed_and_a_peer_that_is_not_there() -> None:
    results = Results(
        [
            measurement("ours:Q4_0", "decode", decode_per_s=250),
            measurement("llama.cpp:Q4_0", "decode", decode_per_s=100),
            measurement("ours:int8", "decode", decode_per_s=200),
            measurement("vllm:int8", "decode", decode_per_s=100),
        ]
    )
    row = cells(report.ratio_table(results, QUANTISED), "decode")
    assert row[1:] == ["2.5× (≥ 2)", "–", "–", "–", "**2×** ✗ (≥ 2.5)", "–", "–"]
    assert report.misses(results) == ["decode decode_per_s, ours:int8 against vllm:int8: 2× (target 2.5×)"]


def test_of_times_and_memory_less_is_better_and_a_loss_is_said_to_be_one() -> None:
    results = Results(
        [
            measurement("ours:Q4_0", "serve_8", ttft_p50=100, ttft_p99=200, itl_p99=50, tokens_per_s=100),
            measurement("llama.cpp:Q4_0", "serve_8", ttft_p50=400, ttft_p99=300, itl_p99=40, tokens_per_s=10),
        ]
    )
    row = cells(report.ratio_table(results, QUANTISED), "8 at once")
    assert row[1] == "4×, 1.5×, **0.8×** ✗ (≥ 1)"
    (miss,) = report.misses(results)
    assert "itl_p99" in miss
    assert "we lose" in miss


def test_the_median_of_the_repeats_and_the_best_of_the_setups_count() -> None:
    slow = [measurement("llama.cpp:Q4_0", "decode", "-fa on", decode_per_s=v) for v in (60, 70, 500)]
    fast = [measurement("llama.cpp:Q4_0", "decode", "-fa off", decode_per_s=v) for v in (90, 100, 110)]
    results = Results(
        [*slow, *fast, *(measurement("llama.cpp:Q4_0", "start", s, memory=m) for s, m in [("a", 9), ("b", 8)])]
    )
    cell = results.cell("llama.cpp:Q4_0", "decode", "decode_per_s")
    assert cell is not None
    assert (cell.median, cell.low, cell.high, cell.setup) == (100, 90, 110, "-fa off")
    assert results.median("llama.cpp:Q4_0", "start", "memory") == 8


def test_llama_cpp_is_to_be_beaten_by_more_where_it_does_not_repack() -> None:
    prefill = next(row for row in ROWS if row.workload == "prefill_512")
    assert [prefill.target(f"llama.cpp:{name}") for name in ("Q4_0", "Q4_1", "Q8_0")] == [3.5, 4.5, 4.5]
    assert prefill.target("openvino:int8") == 1.8


def test_the_exact_comparison_has_its_own_target() -> None:
    results = Results(
        [measurement(name, "serve_8", tokens_per_s=v) for name, v in [("ours:bf16", 16), ("vllm:bf16", 10)]]
    )
    row = next(row for row in ROWS if row.title == "HTTP, 8 at once")
    comparison = next(c for c in report.EXACT if c.peer == "vllm:bf16")
    (ratio,) = ratios(results, row, comparison, exact=True) or []
    assert (ratio.value, ratio.target, ratio.missed) == (1.6, 1.5, False)


def test_how_near_ours_comes_to_the_machine() -> None:
    work = {"requests": 10, "prompt_tokens": 2560, "cached_tokens": 0, "tokens": 1280, "prefill_per_s": 1}
    prefix = {"computed_ms": 510, "cached_ms": 15, "without_ms": 10}
    results = Results(
        [
            {"kind": "machine", "peaks": {"dot_gmacs": 500, "read_gbs": 20}},
            {"kind": "growth", "study": "prefix_cost", "engine": "ours:int8", "rows": [prefix]},
            measurement("ours:int8", "load", weight_bytes=150e6),
            measurement("ours:int8", "decode", decode_per_s=100),
            measurement("ours:int8", "busy", decode_per_s=40),
            measurement("ours:int8", "serve_32", seconds=2, tokens_per_s=640, peak_memory=500, **work),
            measurement("ours:int8", "inprocess_32", tokens_per_s=800),
        ]
    )
    found = {(row.workload, limit.what): limit for row in ROWS for limit in limits(results, "ours:int8", row)}
    macs = (2560 + 1280 - 10) * 106.2e6 + 1280 * 28.3e6
    memory = 500 - (150e6 + 32 * 384 * 23040) / 2**20
    expected = {
        ("decode", "of memory bandwidth"): (100 * 150e6 / 20e9, False),
        ("busy", "of its idle speed"): (0.4, True),
        ("serve_32", "of in-process"): (0.8, True),
        ("serve_32", "of the int8 dot-product peak"): (macs / 2 / 500e9, True),
        ("prefix_8", "of computing it for a cached prefix"): (0.01, False),
        ("serve_32", "MiB more than weights and the KV of 32 requests"): (memory, False),
    }
    assert {key: (pytest.approx(limit.value), limit.missed) for key, limit in found.items()} == expected
    assert [limit for row in ROWS for limit in limits(Results([]), "ours:int8", row)] == []


def test_a_limit_can_be_missed_on_either_side() -> None:
    assert [Limit(v, "", at_least=2).missed for v in (1, 2, 3)] == [True, False, False]
    assert [Limit(v, "", at_most=2).missed for v in (1, 2, 3)] == [False, False, True]


def test_the_whole_report_of_little(tmp_path: Path) -> None:
    commands = {"": "/usr/bin/llama-server -m /some/where/model.gguf"}
    records = [
        MACHINE,
        {"kind": "engine", "engine": "llama.cpp:Q4_0", "missing": "", "commands": commands, "version": "1 (abc)"},
        {"kind": "engine", "engine": "vllm:bf16", "missing": "there is no /some/where/bf16", "commands": {}},
        {"kind": "failure", "engine": "llama.cpp:Q4_0", "setup": "", "why": "TimeoutError: no answer"},
        measurement("llama.cpp:Q4_0", "decode", "1 slot, -fa on", decode_per_s=100.4),
        measurement("llama.cpp:Q4_0", "serve_1", tokens_per_s=50, ttft_p50=1, ttft_p99=2, itl_p50=3, itl_p99=4),
    ]
    report.write(Results(records), tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert cells(text, "llama.cpp:Q4_0")[1] == "100 (100–100, -fa on)"
    assert cells(text, "1 | llama.cpp:Q4_0")[2] == "50 (50–50)"
    assert "vllm:bf16: not measured, there is no bf16" in text
    assert "failed: llama.cpp:Q4_0: TimeoutError" in text
    assert "/some/where" not in text
    assert "llama-server -m model.gguf" in text


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1234"), (99.96, "100"), (12.345, "12.3"), (0.01234, "0.0123"), (None, "–")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert report.number(value) == text


def test_nothing_is_lost_when_a_run_is_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "out" / "measurements.jsonl"
    journal = Journal(path)
    journal.add("measurement", engine="a", workload="decode", repeat=0)
    journal.add("measurement", engine="a", workload="decode", repeat=1)
    with path.open("a") as file:
        file.write('{"kind": "measu')
    assert len(read(path)) == 2
    resumed = Journal(path)
    assert resumed.has("measurement", engine="a", repeat=1)
    assert not resumed.has("measurement", engine="a", repeat=2)
    resumed.add("measurement", engine="a", workload="decode", repeat=2)
    assert [record["repeat"] for record in read(path)] == [0, 1, 2]


def test_eager_vllm_is_there_for_its_start_alone(tmp_path: Path) -> None:
    engine = find_engines(tmp_path, 2)["vllm:int8-eager"]
    assert [(setup.workloads, setup.start, setup.command[-1]) for setup in engine.setups] == [
        ((), "start", "--enforce-eager")
    ]
    results = Results(
        [measurement("ours:int8", "start", first_token_s=0.5), measurement(engine.name, "start", first_token_s=20)]
    )
    assert cells(report.ratio_table(results, QUANTISED), "cold start")[6] == "40× (≥ 30)"


def test_engines_are_selected_by_family_or_name(tmp_path: Path) -> None:
    names = ["ours:Q4_0", "ours:int8", "llama.cpp:Q4_0", "llama.cpp:Q8_0"]
    engines = {name: Engine(name, tmp_path, (Setup("", (), ()),), str) for name in names}
    assert [e.name for e in select(engines, "llama.cpp:Q8_0, ours")] == ["ours:Q4_0", "ours:int8", "llama.cpp:Q8_0"]
    assert [e.name for e in select(engines, "")] == names
    with pytest.raises(ValueError, match="no engine gguf"):
        select(engines, "ours,gguf")
