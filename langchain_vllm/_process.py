"""A server as a child process that never outlives its owner."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future
from io import FileIO
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LOG_LINES = 200
STOP_GRACE_SECONDS = 10.0

_lifelines: weakref.WeakSet[FileIO] = weakref.WeakSet()


class _SpawnThread:
    """Starts processes from one thread that lives as long as this process.

    Linux ties a process's parent-death signal to the *thread* that forked it: a server started from a worker thread
    would be killed when that worker ends.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[subprocess.Popen[str]], Sequence[str], dict[str, Any]]]
        self._calls = queue.SimpleQueue()
        threading.Thread(target=self._run, name="langchain-vllm-spawn", daemon=True).start()

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        started: Future[subprocess.Popen[str]] = Future()
        self._calls.put((started, command, options))
        return started.result()

    def _run(self) -> None:
        while True:
            started, command, options = self._calls.get()
            try:
                started.set_result(subprocess.Popen(command, **options))
            except BaseException as error:
                started.set_exception(error)


_spawn_thread: _SpawnThread | None = None
_spawn_lock = threading.Lock()


def _spawn(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    global _spawn_thread
    with _spawn_lock:
        _spawn_thread = _spawn_thread or _SpawnThread()
        return _spawn_thread.popen(command, **options)


def _forget_after_fork() -> None:
    """A forked child owns no server: were it to keep the lifelines open, servers would outlive their owner."""
    global _spawn_thread, _spawn_lock
    _spawn_thread, _spawn_lock = None, threading.Lock()
    for lifeline in list(_lifelines):
        lifeline.close()


os.register_at_fork(after_in_child=_forget_after_fork)


class ServerProcess:
    """A running server, the pipe that tells it when its owner is gone, and the last lines that it wrote.

    Args:
        command: Makes the command line from the descriptors that the child inherits: `(announce_fd, parent_fd)`. The
            server writes one JSON line `{"url": …}` to the first when it listens, and exits when the second reaches its
            end.
        env: The child's whole environment.
    """

    def __init__(self, command: Callable[[int, int], Sequence[str]], env: Mapping[str, str]) -> None:
        self._owner = os.getpid()
        announce_read, announce_write = os.pipe()
        parent_read, parent_write = os.pipe()
        self._announcement = FileIO(announce_read)
        self._lifeline = FileIO(parent_write, "w")
        _lifelines.add(self._lifeline)
        try:
            # A session of its own: Ctrl-C in the terminal is for the owner, who then decides about the server.
            self._popen = _spawn(
                command(announce_write, parent_read),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=(announce_write, parent_read),
                start_new_session=True,
            )
        except BaseException:
            self._announcement.close()
            self._lifeline.close()
            raise
        finally:
            os.close(announce_write)
            os.close(parent_read)
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self._reader = threading.Thread(
            target=_collect, args=(self._popen.stdout, self._log), name="langchain-vllm-log", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """How it ended (negative: the signal that ended it); None while it runs."""
        return self._popen.poll()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        if os.getpid() == self._owner:
            return self._popen.poll() is None
        try:  # a forked child of the owner can't wait for a process that is not its own
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def address(self, timeout: float) -> str | None:
        """The URL that the server announced, waited for; None if it exited first.

        Raises:
            TimeoutError: It did neither within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._announcement, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            if poll.poll(100):
                if not (received := os.read(self._announcement.fileno(), 4096)):
                    return None
                line += received
            elif not self.running:
                return None
            elif time.monotonic() > deadline:
                raise TimeoutError
        return str(json.loads(line)["url"])

    def log_tail(self, lines: int) -> str:
        """The last `lines` lines of the server's output (at most `LOG_LINES` are kept)."""
        if not self.running:
            self._reader.join(timeout=1.0)
        return "\n".join(list(self._log)[-lines:])

    def terminate(self) -> None:
        """Ask the server to stop, make it stop after a grace, and reap it; nothing in a forked child of its owner."""
        if os.getpid() != self._owner:
            return
        try:
            self._popen.terminate()
            self._popen.wait(STOP_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self._popen.poll() is None:
                self._popen.kill()
                self._popen.wait()
            self._lifeline.close()
            self._announcement.close()
            self._reader.join(timeout=1.0)


def _collect(stream: IO[str], log: deque[str]) -> None:
    with stream:
        log.extend(line.rstrip("\n") for line in stream)
