"""The machine that is measured on: what it is, and the floors under every engine's times."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

# SmolLM2-135M's work: multiply-accumulates of a token outside attention and the head, and of the head per sampled row.
LAYER_MACS = 106.2e6
HEAD_MACS = 28.3e6
KV_BYTES = 30 * 2 * 3 * 64 * 2  # a token's keys and values in half precision

_FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8")


def gpu_problem() -> str:
    """Why nothing can be measured on a GPU here, with the remedy; empty if it can."""
    try:
        from langchain_vllm_server import _engine, _kernels_test
    except ImportError as error:
        return f"the engine and its test modules are not built ({error.name}): see `make bench-cuda`"
    problem = _engine.cuda_problem()
    emulated = "the test modules were built without CUDA: build them with ENGINE_CUDA=ON"
    return problem or (emulated if _kernels_test.cuda_is_emulated else "")


def describe(threads: int, device: str = "cpu") -> dict[str, Any]:
    """For the report."""
    info = _fields("/proc/cpuinfo")
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name", platform.processor()),
        "family": f"family {info.get('cpu family')}, model {info.get('model')}",
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_gib": round(int(_fields("/proc/meminfo")["MemTotal"].split()[0]) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "command": " ".join(["python -m benchmarks.bench", *sys.argv[1:]]),
        "forced_isa": os.environ.get("LANGCHAIN_VLLM_ISA", ""),
        "load_average": os.getloadavg()[0],
        **({"gpu": _gpu(), "peaks": gpu_peaks()} if device == "cuda" else {"peaks": peaks(threads)}),
    }


def peaks(threads: int) -> dict[str, float]:
    """Measured: `dot_gmacs` and `fma_gmacs` of registers, `read_gbs` of memory. Empty without the test module."""
    try:
        from langchain_vllm_server import _kernels_test
    except ImportError:
        return {}
    measure = getattr(_kernels_test, "bench_peaks", None)
    if measure is None:
        return {}
    return {name: float(value) for name, value in measure(_kernels_test.selected_isa(), threads).items()}


def gpu_peaks() -> dict[str, float]:
    """Measured: `bf16_gmacs` and `dot_gmacs` of the tensor cores, `read_gbs` of the GPU's memory."""
    from langchain_vllm_server import _kernels_test

    return {name: float(value) for name, value in _kernels_test.bench_cuda_peaks().items()}


def _gpu() -> str:
    """Name, memory, power limit and driver of the first GPU."""
    query = "--query-gpu=name,memory.total,power.limit,driver_version"
    command = ["nvidia-smi", "--id=0", query, "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: nvidia-smi does not tell"


def _fields(path: str) -> dict[str, str]:
    """The first "name: value" of each name in a file of /proc."""
    fields: dict[str, str] = {}
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields
