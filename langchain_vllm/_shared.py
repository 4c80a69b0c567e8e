"""Servers shared by the objects of a process: the first to need one starts it, the last to go stops it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Any

from langchain_vllm.launcher import VLLMServer

KEEP_ALIVE_SECONDS = 10.0
"""How long a server nobody refers to stays: model objects come and go, and a start costs more than a wait."""

_NOT_IDENTITY = {"startup_timeout", "show_progress"}


class _Entry:
    def __init__(self, server: VLLMServer) -> None:
        self.server = server
        self.references = 0
        self.idle_since = 0.0


# Reentrant: a reference may be garbage-collected, and so released, while this very thread holds the lock.
_lock = threading.RLock()
_entries: dict[str, _Entry] = {}


class SharedServer:
    """A reference to a server that others may refer to as well; dropping it is enough."""

    def __init__(self, server: VLLMServer) -> None:
        self.server = server


def shared_server(model: str, **options: Any) -> SharedServer:
    """Refer to this process's server for `model` with `options`; call `.server.start()` before use, from any thread.

    Args:
        model: As for `VLLMServer`.
        options: Those of `VLLMServer`. Differing ones make a different server.
    """
    key = repr((model, sorted((name, value) for name, value in options.items() if name not in _NOT_IDENTITY)))
    with _lock:
        if key not in _entries:
            _entries[key] = _Entry(VLLMServer(model, **options))
        entry = _entries[key]
        entry.references += 1
        reference = SharedServer(entry.server)
        # Not at exit: VLLMServer stops itself then.
        weakref.finalize(reference, _release, key, entry, os.getpid()).atexit = False
    return reference


def _release(key: str, entry: _Entry, pid: int) -> None:
    if pid != os.getpid():
        return
    with _lock:
        entry.references -= 1
        if entry.references:
            return
        entry.idle_since = time.monotonic()
    timer = threading.Timer(KEEP_ALIVE_SECONDS, _stop_if_idle, (key, entry))
    timer.daemon = True
    timer.start()


def _stop_if_idle(key: str, entry: _Entry) -> None:
    with _lock:
        idle = time.monotonic() - entry.idle_since >= KEEP_ALIVE_SECONDS
        if entry.references or not idle or _entries.get(key) is not entry:
            return
        del _entries[key]
    entry.server.stop()


def _forget_after_fork() -> None:
    """A forked child has no servers of its own yet, and a lock that another thread held would stay held for ever."""
    global _lock
    _lock = threading.RLock()
    _entries.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
