"""The machine that is measured on: what it is, and the floors under every engine's times."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

# SmolLM2-135M's work: multiply-accumulates of a token outside attention and the head, and of the head per sampled row.
LAYER_MACS = 106.2e6
HEAD_MACS = 28.3e6
KV_BYTES = 30 * 2 * 3 * 64 * 2  # a token's keys and values in half precision

_FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8")


def describe(threads: int) -> dict[str, Any]:
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
        "peaks": peaks(threads),
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


def _fields(path: str) -> dict[str, str]:
    """The first "name: value" of each name in a file of /proc."""
    fields: dict[str, str] = {}
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields
