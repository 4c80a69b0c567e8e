"""The `VLLMServer` objects of a process's model objects: one for each model and settings."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

from langchain_vllm.launcher import VLLMServer

KEEP_ALIVE_SECONDS = 10.0
"""How long a server nobody refers to stays: model objects come and go, and a start costs more than a wait."""

_NOT_IDENTITY = {"startup_timeout", "show_progress"}

_lock = threading.Lock()
_servers: weakref.WeakValueDictionary[str, VLLMServer] = weakref.WeakValueDictionary()


def shared_server(model: str, **options: Any) -> VLLMServer:
    """The server of this process for `model` with `options`; call `start()` before use, from any thread.

    Whoever holds it keeps it. Differing options make a different one.

    Args:
        model: As for `VLLMServer`.
        options: Those of `VLLMServer`; `keep_alive` is `KEEP_ALIVE_SECONDS` by default.
    """
    options = {"keep_alive": KEEP_ALIVE_SECONDS, **options}
    key = repr((model, sorted((name, value) for name, value in options.items() if name not in _NOT_IDENTITY)))
    with _lock:
        server = _servers.get(key)
        if server is None:
            server = _servers[key] = VLLMServer(model, **options)
        return server


def _forget_after_fork() -> None:
    """In a forked child: a lock that another thread held would stay held for ever."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
