"""What makes two servers the same: all that their answers may depend on."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_HEEDED = re.compile(
    r"(?!VLLM_BASE_URL|VLLM_API_BASE)(VLLM|LANGCHAIN_VLLM|HF|HUGGINGFACE|TRANSFORMERS|TORCH|CUDA|OMP|NCCL|RAY)_.*"
    r"|PYTHONPATH|PYTHONHOME|LD_LIBRARY_PATH|LD_PRELOAD"
)
"""The environment variables that servers heed."""


def identity(command: Sequence[str], env: Mapping[str, str], secret: str = "") -> str:
    """A name for the server that `command` starts with `env`.

    It depends on the version of this package, on the files and folders that the command names (a checkpoint that was
    written anew is another one) and on the file system that the paths are of, too.

    Args:
        command: The command line.
        env: The child's whole environment, of which only what servers heed counts.
        secret: For a server that is not shared: what nobody else has.
    """
    from langchain_vllm import __version__

    heeded = sorted(item for item in env.items() if _HEEDED.fullmatch(item[0]))
    facts = (__version__, _mounts(), list(command), [_file(arg) for arg in command], heeded, secret)
    return hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()


def _mounts() -> str:
    """The mount namespace: in another container the same path is another file."""
    try:
        return os.readlink("/proc/self/ns/mnt")
    except OSError:
        return ""


def _file(argument: str) -> object:
    path = Path(argument).expanduser()
    try:
        if not path.is_dir():
            return _signature(path.absolute(), path.stat())
        inside = sorted(os.scandir(path), key=lambda entry: entry.name)
        return [str(path.absolute()), *(_signature(Path(entry.name), entry.stat()) for entry in inside)]
    except (OSError, ValueError):
        return None


def _signature(path: Path, status: os.stat_result) -> tuple[str, int, int, int]:
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns
