"""The process, under the names that every Prometheus client uses. From /proc, where there is one (man 5 proc)."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_vllm_server.prometheus import header, labels

if TYPE_CHECKING:
    from collections.abc import Iterator


def process_lines() -> Iterator[str]:
    """The samples."""
    major, minor, patch = platform.python_version_tuple()
    version = {"implementation": platform.python_implementation(), "major": major, "minor": minor, "patchlevel": patch}
    yield from header("python_info", "gauge", "The Python that runs the server.")
    yield f"python_info{{{labels({**version, 'version': platform.python_version()})}}} 1.0"
    for name, kind, value, text in _values():
        yield from header(name, kind, text)
        yield f"{name} {float(value)}"


def _values() -> Iterator[tuple[str, str, float, str]]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    yield "process_cpu_seconds_total", "counter", used.ru_utime + used.ru_stime, "CPU time, user's and system's."
    yield "process_max_fds", "gauge", resource.getrlimit(resource.RLIMIT_NOFILE)[0], "Files that may be open."
    try:
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
        open_files = len(list(Path("/proc/self/fd").iterdir()))
    except (OSError, StopIteration):
        return
    ticks, size, pages = int(stat[19]), int(stat[20]), int(stat[21])  # fields 22 to 24
    started = int(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    yield "process_open_fds", "gauge", open_files, "Files that are open."
    yield "process_start_time_seconds", "gauge", started, "When it started, since 1970."
    yield "process_virtual_memory_bytes", "gauge", size, "Address space."
    yield "process_resident_memory_bytes", "gauge", pages * os.sysconf("SC_PAGE_SIZE"), "Memory."
