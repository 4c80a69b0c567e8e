"""Child processes of a benchmark: starting and stopping them, their memory, and a busy neighbour."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# Where this forbids it, a source tree is compiled anew at each start, which an installed package never is.
_BYTE_CODE = "PYTHONDONTWRITEBYTECODE"
_SPIN = "import time; end = time.monotonic() + {}\nwhile time.monotonic() < end: pass"


class Child:
    """A process in a session of its own, with its descendants. It finds byte code as an installed program does."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path, **streams: Any) -> None:
        self._log = log
        with log.open("ab") as errors:
            errors.write(f"\n$ {' '.join(command)}\n".encode())
            errors.flush()
            self._process = subprocess.Popen(
                command,
                env={**os.environ, _BYTE_CODE: "", **env},
                start_new_session=True,
                stderr=errors,
                **{"stdin": subprocess.DEVNULL, "stdout": errors, **streams},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def check(self) -> None:
        """Raise RuntimeError, with the end of its log, if it has ended."""
        code = self._process.poll()
        if code is not None:
            last = " | ".join(self._log.read_text(errors="replace").strip().splitlines()[-3:])
            raise RuntimeError(f"it ended with code {code}: {last}")

    def memory(self) -> float:
        """MiB of it and its descendants, shared pages counted once (the sum of their Pss)."""
        return sum(map(_pss, _tree(self._process.pid))) / 1024

    def stop(self) -> None:
        """Ask it to end, then make it and what it has left behind."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session is its own
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                yield from _tree(int(child))


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)


class PeakMemory:
    """Largest memory of a child within a `with` block, looked at now and then."""

    def __init__(self, child: Child, interval: float = 2.0) -> None:  # a look costs milliseconds per GB
        self._child = child
        self._interval = interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.mib = 0.0

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.mib = max(self.mib, self._child.memory())

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            self.mib = max(self.mib, self._child.memory())


@contextlib.contextmanager
def busy_neighbour(seconds: float = 300) -> Iterator[None]:
    """One process that never waits; it ends by itself should this one be killed."""
    process = subprocess.Popen([sys.executable, "-S", "-c", _SPIN.format(seconds)])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
