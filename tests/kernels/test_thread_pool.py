"""The pool under many short runs, errors, and more threads than cores."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from langchain_vllm_server import _kernels_test


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("tasks", [0, 1, 2, 7, 100])
def test_every_task_runs_once(threads: int, tasks: int) -> None:
    runs = 300 if threads <= 3 else 50
    assert _kernels_test.count_tasks(threads, runs, tasks) == [runs] * tasks


def test_many_runs() -> None:
    assert _kernels_test.count_tasks(2, 20000, 3) == [20000] * 3


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("task", [0, 5, 9])
def test_an_exception_reaches_the_caller(threads: int, task: int) -> None:
    assert _kernels_test.throw_in_task(threads, 200, 10, task) == 200


@pytest.mark.parametrize("threads", [2, 4])
def test_a_run_within_a_task_is_refused(threads: int) -> None:
    with pytest.raises(RuntimeError, match="ThreadPool::run called while it runs"):
        _kernels_test.run_in_task(threads)


def test_pools_beside_each_other() -> None:
    """Four pools of two threads, twice as many threads as a small machine has cores."""
    results: list[list[int]] = []
    callers = [threading.Thread(target=lambda: results.append(_kernels_test.count_tasks(2, 500, 8))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert results == [[500] * 8] * 4


def test_too_many_threads_for_the_system_is_an_error() -> None:
    """Those that did start end; before, the process did."""
    script = (
        "import resource; from langchain_vllm_server import _kernels_test\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"  # room for a hundred stacks
        "_kernels_test.Device('scalar', 1000)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1, result
    assert "cannot start 1000 threads, only" in result.stderr


def test_a_pool_ends_promptly() -> None:
    start = time.monotonic()
    for _ in range(100):
        _kernels_test.count_tasks(4, 1, 4)
    assert time.monotonic() - start < 60  # 50 ms each; a lost wake-up would hang
