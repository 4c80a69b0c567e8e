"""The managed servers of this user on this machine: found by the names of their sockets, asked for the rest."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from langchain_vllm._process import STOP_GRACE_SECONDS, read_tail, receive_greeting, socket_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_ANSWER_SECONDS = 2.0
_NAMES = Path("/proc/net/unix")


@dataclass
class RunningServer:
    """A server as it was when it was asked. Looking at it does not keep it; call `close` in the end.

    Attributes:
        model: Its model, as it was asked for.
        engine: "bundled" or "vllm".
        url: Its address.
        pid: Its process.
        owners: The processes that need it.
        started: When it began, in seconds since 1970.
    """

    model: str
    engine: str
    url: str
    pid: int
    owners: list[int]
    started: float
    _connection: socket.socket
    _log: int

    @classmethod
    def ask(cls, name: str) -> Self | None:
        """The server of that name; None if it is gone or does not answer yet."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_ANSWER_SECONDS)
        try:
            connection.connect(socket_name(name))
            about, log = receive_greeting(connection)
            connection.sendall(b"leave 0\n")
        except (OSError, ValueError, IndexError):
            connection.close()
            return None
        known = {key: about[key] for key in ("model", "engine", "url", "pid", "owners", "started")}
        return cls(**known, _connection=connection, _log=log)

    def memory(self) -> int:
        """What it and its children have in memory, in bytes."""
        return sum(_resident(pid) for pid in _family(self.pid))

    def log_tail(self, lines: int) -> str:
        """The last lines that it wrote."""
        return read_tail(self._log, lines)

    def stop(self) -> bool:
        """Stop it, whoever needs it; by force after a grace. Whether it was still there."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)
            deadline = time.monotonic() + STOP_GRACE_SECONDS
            while time.monotonic() < deadline:
                if not _runs(self.pid):
                    return True
                time.sleep(0.02)
        return False

    def close(self) -> None:
        """Let go of it."""
        self._connection.close()
        os.close(self._log)


def running_servers() -> Iterator[RunningServer]:
    """Every server of this user that runs; each is closed when the next is asked for."""
    prefix = socket_name("").replace("\0", "@")
    names = {line.rpartition(" ")[2] for line in _NAMES.read_text().splitlines()} if _NAMES.exists() else set()
    for name in sorted(name for name in names if name.startswith(prefix)):
        server = RunningServer.ask(name.removeprefix(prefix))
        if server is not None:
            try:
                yield server
            finally:
                server.close()


def _runs(pid: int) -> bool:
    """Whether the process or one of its threads is there: the last one to end closes its connections."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def _family(pid: int) -> set[int]:
    """A process and all below it."""
    parents: dict[int, int] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
    family = {pid}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return family


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
