"""The socket. It comes first, so it imports nothing heavy."""

from __future__ import annotations

import errno
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_vllm_server.errors import StartError

if TYPE_CHECKING:
    from langchain_vllm_server.settings import Settings

_BACKLOG = 2048


def listen(settings: Settings) -> socket.socket:
    """A listening socket. Raises StartError that names the address and the remedy."""
    if settings.uds is not None:
        return _listen_unix(settings.uds)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"{where} is in use by another program: stop it, or choose another --port (0 takes a free one)"
            ) from None
        raise StartError(f"cannot listen on {where}: {error.strerror or error}") from None
    return listener


def address(listener: socket.socket, settings: Settings) -> dict[str, str]:
    """Where to reach a listening socket: `url`, and for a Unix socket `uds`."""
    name = listener.getsockname()
    scheme = "http" if settings.ssl_certfile is None else "https"
    if listener.family == socket.AF_UNIX:
        return {"url": f"{scheme}://localhost", "uds": str(name)}
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name[0], name[0])
    return {"url": f"{scheme}://[{host}]:{name[1]}" if ":" in host else f"{scheme}://{host}:{name[1]}"}


def _listen_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(f"{path} is in use by another program: stop it, or choose another --uds") from None
        raise StartError(f"cannot listen on {path}: {error.strerror or error}") from None
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket that a dead server left. One that answers stays, and so does a file of any other kind."""
    if not Path(path).exists() or not stat.S_ISSOCK(Path(path).stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
