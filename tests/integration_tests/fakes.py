"""What the tests of the launcher share."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_vllm import VLLMServer

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM = ["-m", "langchain_vllm_server"]
FAKE = Path(__file__).with_name("fake_server.py")

_command = VLLMServer._command


def fake_command(self: VLLMServer, announce_fd: int, parent_fd: int) -> list[str]:
    """The launcher's own command line, for another program."""
    command = _command(self, announce_fd, parent_fd)
    assert command[:3] == [sys.executable, *PROGRAM]
    return [sys.executable, str(FAKE), *command[3:]]


def use_fake_server() -> None:
    VLLMServer._command = fake_command  # type: ignore[method-assign]


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
