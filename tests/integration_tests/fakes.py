"""What the tests of the launcher share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from langchain_vllm import VLLMServer

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM = ["-m", "langchain_vllm_server"]
ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_server.py")

_command = VLLMServer._command


def fake_command(self: VLLMServer, owners_fd: int) -> list[str]:
    """The launcher's own command line, for another program."""
    command = _command(self, owners_fd)
    assert command[:3] == [sys.executable, *PROGRAM]
    return [sys.executable, str(FAKE), *command[3:]]


def use_fake_server() -> None:
    VLLMServer._command = fake_command  # type: ignore[method-assign]


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1  # its last thread closes what it has open
    except OSError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def reapers() -> int:
    """Threads that wait for servers to end."""
    return [thread.name for thread in threading.enumerate()].count("langchain-vllm-reaper")


class Program:
    """A program that owns a server, see `owner.py`. It is killed at the end of the block."""

    def __init__(self, what: str = "wait", model: str = "good") -> None:
        command = [sys.executable, "-m", "tests.integration_tests.owner", what, model]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.popen.kill()
        self.popen.communicate()

    def read(self) -> str:
        """Its next line."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def ask(self, command: str) -> str:
        assert self.popen.stdin is not None
        self.popen.stdin.write(command + "\n")
        self.popen.stdin.flush()
        return self.read()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


def sockets() -> set[str]:
    """The names of this user's servers."""
    prefix = f"@langchain-vllm/{os.getuid()}/"
    names = (line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines())
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def servers() -> set[int]:
    """The processes of fake servers."""
    return {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if alive(pid) and is_fake(pid)}


def is_fake(pid: int) -> bool:
    try:
        return str(FAKE).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
