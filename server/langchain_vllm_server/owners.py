"""Who needs this server: every connection to its Unix socket is an owner, and with the last of them it ends.

The kernel closes the connections of a process however that ends, so there are no counts or files to go stale. What is
said is a line each: the server greets with JSON (and passes its log on), an owner takes leave with `leave SECONDS`, the
server answers that it `stays`, for others or for that time, and tells everybody when it `ends`.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import math
import os
import socket
import struct
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from langchain_vllm_server.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LOG_BYTES = 1 << 20
_TRIM_SECONDS = 10.0
_KEEP_SIZE_AND_PUNCH_HOLE = 0x01 | 0x02
_STDERR = 2


class Owners:
    """The owners of this process.

    Args:
        fd: A listening Unix socket; the launcher is connected to it before this process begins, so that there is an
            owner from the start.
        about: What owners are told of the server: `url`, `pid`, `model` and others.
        stop: Called once when the last owner has taken its leave, or its time is over.
        abandon: Called in place of `stop` when the last owner is gone without a word.

    Raises:
        StartError: `fd` is no listening socket.
    """

    def __init__(
        self, fd: int, about: Mapping[str, object], *, stop: Callable[[], None], abandon: Callable[[], None]
    ) -> None:
        self._about = dict(about)
        self._stop = stop
        self._abandon = abandon
        self._until: dict[socket.socket, float] = {}  # the loop's time up to which an owner needs the server
        self._ending = False
        self._loop = asyncio.get_running_loop()
        try:
            self._listener = socket.socket(fileno=fd)
            self._listener.setblocking(False)
            self._loop.add_reader(self._listener, self._accept)
        except OSError as error:
            raise StartError(f"cannot accept owners on --owners-fd {fd}: {error.strerror}") from None
        self._trim()

    def end(self) -> None:
        """Take no more owners, and tell those there are that the server is about to end."""
        if self._ending:
            return
        self._ending = True
        self._loop.remove_reader(self._listener)
        self._listener.close()  # from here on its name is free for another server
        for owner in self._until:
            _say(owner, b"ends\n")

    def _accept(self) -> None:
        try:
            owner, _ = self._listener.accept()
        except OSError:  # it is gone already
            return
        owner.setblocking(False)
        if _peer(owner)[1] != os.getuid():  # names of sockets are everybody's
            owner.close()
            return
        owners = [_peer(other)[0] for other, until in self._until.items() if until == math.inf]
        self._until[owner] = math.inf
        self._loop.add_reader(owner, self._read, owner)
        with suppress(OSError):
            socket.send_fds(owner, [json.dumps({**self._about, "owners": owners}).encode() + b"\n"], [_STDERR])

    def _read(self, owner: socket.socket) -> None:
        try:
            said = owner.recv(256).split()
        except BlockingIOError:
            return
        except OSError:
            said = []
        if self._ending:
            self._loop.remove_reader(owner)  # it learns of the end by that of the connection
        elif said[:1] == [b"leave"]:
            self._take_leave(owner, float(said[1]))
        else:
            self._forget(owner)
            self._end_if_alone(self._abandon)

    def _take_leave(self, owner: socket.socket, seconds: float) -> None:
        self._until[owner] = self._loop.time() + seconds
        self._end_if_alone(self._stop)
        if not self._ending:
            _say(owner, b"stays\n")
            self._loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        if self._ending:
            return
        self._end_if_alone(self._stop)
        if not self._ending:
            for owner in [owner for owner in self._until if not self._is_needed_by(owner)]:
                self._forget(owner)

    def _is_needed_by(self, owner: socket.socket) -> bool:
        return self._until[owner] > self._loop.time() + 0.01  # a timer may come a little early

    def _end_if_alone(self, then: Callable[[], None]) -> None:
        if not any(map(self._is_needed_by, self._until)):
            self.end()
            then()

    def _forget(self, owner: socket.socket) -> None:
        self._loop.remove_reader(owner)
        del self._until[owner]
        owner.close()

    def _trim(self) -> None:
        trim_log(_STDERR)
        self._loop.call_later(_TRIM_SECONDS, self._trim)


def trim_log(fd: int, keep: int = LOG_BYTES) -> None:
    """Give the memory of all but a log's last `keep` bytes back. Only of a file without a name, as the launcher makes.

    A hole takes the place of the beginning: writers and readers go on undisturbed.
    """
    status = os.fstat(fd)
    if status.st_nlink == 0 and status.st_size > keep and sys.platform == "linux":
        length = ctypes.c_int64(status.st_size - keep)
        ctypes.CDLL(None).fallocate(fd, _KEEP_SIZE_AND_PUNCH_HOLE, ctypes.c_int64(0), length)


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _say(owner: socket.socket, line: bytes) -> None:
    with suppress(OSError):  # it is gone, which is read from the connection
        owner.send(line)
