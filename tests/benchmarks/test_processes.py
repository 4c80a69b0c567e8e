"""Children of a benchmark: started, looked at, stopped; loads without HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.inprocess import run_load
from benchmarks.load import Answer
from benchmarks.processes import Child, PeakMemory, busy_neighbour

if TYPE_CHECKING:
    from pathlib import Path

# Starts a child of its own, takes memory, and says what it has.
FAMILY = """
import subprocess, sys, time
memory = "import time; data = bytes(range(256)) * (20 << 12); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", memory])
print(child.pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_child_is_measured_and_stopped_with_its_descendants(tmp_path: Path) -> None:
    child = Child([sys.executable, "-c", FAMILY], {}, tmp_path / "log", stdout=subprocess.PIPE)
    grandchild = int(child.stdout.readline())
    try:
        deadline = time.monotonic() + 30
        with PeakMemory(child, interval=0.01) as peak:
            while child.memory() < 20 and time.monotonic() < deadline:
                time.sleep(0.01)
        assert peak.mib >= 20, "the grandchild's 20 MiB count"
        child.check()
    finally:
        child.stop()
    deadline = time.monotonic() + 30
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(grandchild)


def test_a_child_that_ends_too_soon_tells_why(tmp_path: Path) -> None:
    child = Child([sys.executable, "-c", "raise SystemExit('no such model')"], {"A": "b"}, tmp_path / "log")
    deadline = time.monotonic() + 30
    while alive(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=r"ended with code 1: .*no such model"):
        child.check()
    child.stop()


def test_a_child_may_keep_its_byte_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    say = "import sys; print(sys.dont_write_bytecode, flush=True)"
    child = Child([sys.executable, "-c", say], {}, tmp_path / "log", stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"False\n"
    child.stop()


def test_the_busy_neighbour_goes() -> None:
    before = _children()
    with busy_neighbour():
        (neighbour,) = _children() - before
        assert alive(neighbour)
    assert not alive(neighbour)


def _children() -> set[int]:
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return {int(pid) for pid in file.read().split()}


class FakeBackend:
    """Gives every open request a token at each poll."""

    weight_bytes = 0
    version = ""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.most_open = 0
        self.seen: list[int] = []

    def encode(self, text: str) -> Any:
        return text.split()

    def length(self, prompt: Any) -> int:
        return len(prompt)

    def submit(self, number: int, _prompt: Any, max_tokens: int) -> None:
        self.seen.append(number)
        self.left[number] = max_tokens
        self.most_open = max(self.most_open, len(self.left))

    def poll(self) -> list[tuple[int, int, int]]:
        news = [(number, 1, 16) for number in self.left]
        self.left = {number: left - 1 for number, left in self.left.items() if left > 1}
        return news


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (3, 3), (50, 7)])
def test_loads_without_http_keep_as_many_in_flight(concurrency: int, most: int) -> None:
    backend = FakeBackend()
    reply = run_load(backend, 5, ["two words"] * 7, concurrency, 4)
    assert backend.most_open == most
    assert backend.seen == list(range(5, 12))
    answers = [Answer(*answer) for answer in reply["answers"]]
    assert [(a.tokens, len(a.stamps), a.prompt_tokens, a.cached_tokens) for a in answers] == [(4, 4, 2, 16)] * 7
    assert all(a.first >= 0 for a in answers)
