"""The benchmark on a GPU: what it runs, what it refuses, how it reports."""
# ruff: noqa: RUF001 - as in the report

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import bench, machine, report
from benchmarks.compare import ROWS, limits
from benchmarks.engines import find_engines
from benchmarks.records import Results
from benchmarks.workloads import WORKLOADS
from langchain_vllm_server import _engine, _kernels_test
from langchain_vllm_server.settings import parse_settings
from tests.benchmarks.test_report import MACHINE, cells, measurement

if TYPE_CHECKING:
    from pathlib import Path


def test_a_machine_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_engine, "cuda_problem", lambda: "no GPU is visible here: look at nvidia-smi")
    out = tmp_path / "measurements.jsonl"
    assert bench.main(["--device", "cuda", "--out", str(out), "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("--device cuda: no GPU is visible here: look at nvidia-smi\n")
    assert not out.exists()


@pytest.mark.skipif(not _kernels_test.cuda_is_emulated, reason="CUDA is not emulated, it runs on a GPU")
def test_an_emulator_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "cuda_problem", lambda: "")
    assert machine.gpu_problem() == "the test modules were built without CUDA: build them with ENGINE_CUDA=ON"


def test_every_engine_is_told_to_use_the_gpu(tmp_path: Path) -> None:
    engines = find_engines(tmp_path, 2, "cuda")
    assert {engine.family for engine in engines.values()} == {"ours", "llama.cpp", "vllm"}
    workloads = set()
    for engine in engines.values():
        for setup in engine.setups:
            workloads |= {*setup.workloads}
            if engine.family == "ours":
                flags = setup.command[setup.command.index("--device") :]
                assert parse_settings(["m", *(flag for flag in flags if flag != "{port}")]).device == "cuda"
            if engine.family == "llama.cpp":
                assert "-ngl 99" in setup.shown()
            if engine.family == "vllm":
                assert not any("CPU" in name for name in setup.env)
    assert workloads == {"decode", "prefill_512", "prefill_2048"} | {
        f"{where}_{level}" for where in ("serve", "inprocess") for level in (1, 32, 256)
    }
    assert workloads <= {*WORKLOADS}
    assert {*bench.parse(["--device", "cuda"]).workloads} >= workloads
    on_cpu = find_engines(tmp_path, 2)["ours:int8"].setups[0].shown()
    assert "--device cpu --quantization int8 --kv-cache-dtype int8" in on_cpu


def test_the_report_gives_shares_of_the_gpu_and_no_targets(tmp_path: Path) -> None:
    peaks = {"read_gbs": 3000, "bf16_gmacs": 300e3, "dot_gmacs": 600e3}
    records = [
        {**MACHINE, "gpu": "NVIDIA H100, 81559 MiB, 700.00 W, 580.65", "peaks": peaks},
        measurement("ours:bf16", "load", weight_bytes=270e6, load_seconds=1),
        measurement("ours:bf16", "decode", decode_per_s=1000),
        measurement("ours:bf16", "prefill_512", prefill_per_s=100e3),
        measurement("ours:bf16", "serve_256", tokens_per_s=9000, peak_memory=10**6),
        measurement("ours:bf16", "inprocess_256", tokens_per_s=10000),
        measurement("vllm:bf16", "serve_256", tokens_per_s=18000),
    ]
    results = Results(records)
    found = {(row.workload, limit.what): limit.value for row in ROWS for limit in limits(results, "ours:bf16", row)}
    assert found == {
        ("decode", "of memory bandwidth"): pytest.approx(0.09),
        ("prefill_512", "of the bf16 tensor-core peak"): pytest.approx(100e3 * 106.2e6 / 300e12),
        ("serve_256", "of in-process"): pytest.approx(0.9),
    }
    report.write(results, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert cells(text[text.index("On the bf16 checkpoint") :], "HTTP, 256 at once")[1:] == ["–", "0.5×"]
    assert cells(text, "256 | ours:bf16")[2] == "9000 (9000–9000)"
    assert "GPU: NVIDIA H100" in text
    assert "300000 GMAC/s of bf16, 3000 GB/s read" in text
    assert "✗" not in text.replace(report.INTRODUCTION, "")


def test_the_floors_do_the_work_that_they_count() -> None:
    """Emulated, the rates say nothing; that every byte is read and every product summed is checked on both."""
    small = {"bytes": 1 << 20, "rounds": 3} if _kernels_test.cuda_is_emulated else {}
    peaks = _kernels_test.bench_cuda_peaks(**small)
    assert set(peaks) == {"read_gbs", "bf16_gmacs", "dot_gmacs"}
    assert min(peaks.values()) > 0


@pytest.mark.parametrize(("given", "error"), [({"bytes": 24}, "multiple of 16"), ({"rounds": 1 << 20}, "1 to 524288")])
def test_floors_that_would_be_wrong_are_refused(given: dict[str, int], error: str) -> None:
    with pytest.raises(RuntimeError, match=error):
        _kernels_test.bench_cuda_peaks(**given)
