"""A server as a process that several programs own, and that never outlives the last of them.

A server has an abstract Unix socket (Linux) whose name says what it serves. To bind that name is to be the one that
starts it; a connection to it is a share in its ownership. The kernel does the rest, whoever is killed: the name is free
when the server is gone, a connection ends with its process. So there are no lock, socket, pid or log files to go stale.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

STOP_GRACE_SECONDS = 10.0
LOG_TAIL_BYTES = 1 << 16
_POLL_MILLISECONDS = 50
GREETING_BYTES = 1 << 16

_processes: weakref.WeakSet[ServerProcess] = weakref.WeakSet()
_idle: set[socket.socket] = set()  # a share each, given up for later: the server's last seconds need this process, too


def socket_name(name: str) -> str:
    """The abstract address of this user's server `name`."""
    return f"\0langchain-vllm/{os.getuid()}/{name}"


class ServerProcess:
    """A share in a server, held by this process, which it starts unless there is one of that name already.

    Args:
        name: What the server is known by.
        command: Makes the command line from a listening socket that the child inherits. The server greets each that
            connects to it with a line of JSON, and ends when the last of them is gone (see `owners.py` of the server).
        env: The child's whole environment.

    Raises:
        PermissionError: The name is taken by another user's process.
    """

    def __init__(self, name: str, command: Callable[[int], Sequence[str]], env: Mapping[str, str]) -> None:
        _sweep()
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None
        self._reaper: threading.Thread | None = None
        self._log: int | None = None
        self._about: dict[str, Any] | None = None
        self._ending = False
        self._connection: socket.socket | None = self._join(name) or self._start(name, command, env)
        while self._connection is None:  # somebody is about to start it, or it is about to end
            time.sleep(0.01)
            self._connection = self._join(name) or self._start(name, command, env)
        _processes.add(self)

    @property
    def started_here(self) -> bool:
        """Whether this object started it."""
        return self._popen is not None

    @property
    def owned_here(self) -> bool:
        """Whether the share is this process's own; that of a forked child's parent is not."""
        return os.getpid() == self._owner

    @property
    def pid(self) -> int | None:
        """The server's process id; None until one is known."""
        if self._about is not None:
            return int(self._about["pid"])
        return self._popen.pid if self._popen else None

    @property
    def running(self) -> bool:
        """Whether the process is there, and this one has a share in it."""
        if not self.owned_here:
            return self.pid is not None and _exists(self.pid)
        return self._listen()

    @property
    def ending(self) -> bool:
        """Whether it has said that it takes no more requests."""
        self._listen()
        return self._ending

    def greeting(self, timeout: float) -> dict[str, Any] | None:
        """What the server tells of itself, waited for; None if it ended first.

        Raises:
            TimeoutError: It did neither within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while self._listen():
            if self._about is not None:
                return self._about
            if time.monotonic() > deadline:
                raise TimeoutError
            with self._lock:
                descriptor = self._connection.fileno() if self._connection else -1
            if descriptor >= 0:
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                poll.poll(_POLL_MILLISECONDS)
        return None

    def log_size(self) -> int:
        """How much the server has written, in bytes."""
        return os.fstat(self._log).st_size if self._log is not None else 0

    def log_tail(self, lines: int) -> str:
        """The last `lines` lines that the server wrote; also when it has ended."""
        return read_tail(self._log, lines) if self._log is not None else ""

    def forget(self) -> None:
        """In a forked child: leave the share to the parent."""
        self._lock = threading.Lock()
        if self._connection is not None:
            self._connection.close()

    def leave(self, keep_alive: float = 0.0) -> None:
        """Give the share up. The last to do so waits for the server's end, and makes it end after a grace.

        Nothing happens in a forked child of the owner.

        Args:
            keep_alive: Seconds that the server stays, though nobody needs it, while this process lives.
        """
        if not self.owned_here:
            return
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._about is None:  # it has not begun: whoever else waits for it starts another
            keep_alive = 0.0
            if self._popen is not None:
                self._popen.terminate()
        stays = _take_leave(connection, keep_alive)
        if stays is None and self.pid is not None:  # it says nothing any more
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        if stays and keep_alive:
            connection.settimeout(None)
            _idle.add(connection)
        else:
            connection.close()
        if not stays:
            self._wait_until_gone()

    def _join(self, name: str) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(socket_name(name))
            if _peer_uid(connection) != os.getuid():
                raise PermissionError(f"another user's process has the name of this server, {name}")
        except ConnectionError:
            connection.close()
            return None
        except BaseException:
            connection.close()
            raise
        return connection

    def _start(
        self, name: str, command: Callable[[int], Sequence[str]], env: Mapping[str, str]
    ) -> socket.socket | None:
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(socket_name(name))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return None
            listener.listen()
            connection = self._join(name)  # before the server is there: it has an owner from its first moment on
            self._log = _make_log()
            weakref.finalize(self, os.close, self._log).atexit = False
            try:
                # A session of its own: Ctrl-C in the terminal is for the owner, who then decides about the server.
                self._popen = subprocess.Popen(
                    command(listener.fileno()),
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(listener.fileno(),),
                    start_new_session=True,
                )
            except BaseException:
                if connection is not None:
                    connection.close()
                raise
        # It may end long after this object, when others own it.
        self._reaper = threading.Thread(target=self._popen.wait, name="langchain-vllm-reaper", daemon=True)
        self._reaper.start()
        return connection

    def _listen(self) -> bool:
        """Take in what the server has said; whether it is there."""
        with self._lock:
            while self._connection is not None:
                try:
                    if self._about is None:
                        said = self._read_greeting(self._connection)
                    else:
                        said = self._connection.recv(64, socket.MSG_DONTWAIT)
                        self._ending |= said.startswith(b"ends")
                except BlockingIOError:
                    return True
                except OSError:
                    said = b""
                if not said:
                    return False
        return False

    def _read_greeting(self, connection: socket.socket) -> bytes:
        if not (line := connection.recv(GREETING_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)):
            return b""
        if b"\n" not in line:
            raise BlockingIOError
        about, log = receive_greeting(connection, line.index(b"\n") + 1)
        if self._log is None:
            self._log = log
            weakref.finalize(self, os.close, log).atexit = False
        else:
            os.close(log)
        self._about = about
        return line

    def _wait_until_gone(self) -> None:
        """Wait for the end of a process that is ending: its connections are closed a moment before."""
        if self._popen is not None and self._reaper is not None:
            self._reaper.join(STOP_GRACE_SECONDS)
            if self._reaper.is_alive():
                self._popen.kill()
            self._reaper.join()
            return
        deadline = time.monotonic() + 1.0
        while self.pid is not None and _exists(self.pid) and time.monotonic() < deadline:
            time.sleep(0.005)


def receive_greeting(connection: socket.socket, size: int = GREETING_BYTES) -> tuple[dict[str, Any], int]:
    """What a server tells of itself, and its log."""
    line, descriptors, _, _ = socket.recv_fds(connection, size, 1)
    return json.loads(line), descriptors[0]


def read_tail(log: int, lines: int) -> str:
    """The last `lines` lines of a log (of its last `LOG_TAIL_BYTES`)."""
    size = os.fstat(log).st_size
    begin = max(size - LOG_TAIL_BYTES, 0)
    text = os.pread(log, size - begin, begin)
    if begin:
        text = text.partition(b"\n")[2]
    return "\n".join(text.decode(errors="replace").splitlines()[-lines:] if lines > 0 else [])


def _take_leave(connection: socket.socket, keep_alive: float) -> bool | None:
    """Give up a share. Whether the server stays all the same; None if it does not say within the grace."""
    deadline = time.monotonic() + STOP_GRACE_SECONDS
    answer = b""
    try:
        connection.settimeout(STOP_GRACE_SECONDS)
        connection.sendall(b"leave %g\n" % keep_alive)
        while b"stays\n" not in answer:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            if not (said := connection.recv(256)):
                return False
            answer += said
    except TimeoutError:
        return None
    except OSError:
        return False
    return True


def _sweep() -> None:
    """Close connections that were kept for a server that has ended by now."""
    for connection in tuple(_idle):
        with suppress(OSError):  # nothing to read, or another thread has just closed it
            while connection.recv(256, socket.MSG_DONTWAIT):  # what it has said in the end
                pass
            _idle.discard(connection)
            connection.close()


def _make_log() -> int:
    """A file in memory, without a name: it is there as long as anybody holds it. The server keeps it short."""
    log = os.memfd_create("langchain-vllm-log")
    fcntl.fcntl(log, fcntl.F_SETFL, os.O_APPEND)
    return log


def _peer_uid(connection: socket.socket) -> int:
    return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _leave_all() -> None:
    """At exit: nothing stays for a program that is gone."""
    for process in tuple(_processes):
        process.leave()
    for connection in tuple(_idle):
        connection.close()


def _forget_after_fork() -> None:
    """A forked child has no share in a server until it asks for one: open connections in it would keep servers."""
    for process in tuple(_processes):
        process.forget()
    for connection in _idle:
        connection.close()
    _idle.clear()


atexit.register(_leave_all)
os.register_at_fork(after_in_child=_forget_after_fork)
