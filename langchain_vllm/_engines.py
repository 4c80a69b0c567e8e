"""The engines of a managed server, and how each is started."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Engine = Literal["bundled", "vllm"]

_SERVER_PACKAGES = ("starlette", "uvicorn", "tokenizers", "jinja2", "msgspec", "orjson", "regex", "llguidance")
_BUNDLED_ONLY = {
    "device": 'env={"CUDA_VISIBLE_DEVICES": …}',
    "threads": 'env={"VLLM_CPU_OMP_THREADS_BIND": …}, on a CPU',
    "memory": 'gpu_memory_utilization=…, or env={"VLLM_CPU_KVCACHE_SPACE": …} on a CPU',
}
_HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


def check_options(engine: str, flags: Mapping[str, Any], options: Mapping[str, Any], python: str | None) -> None:
    """See that an engine takes what it is given.

    Raises:
        TypeError: An option is not known.
        ValueError: It is known, and not of this engine.
    """
    if engine not in ("bundled", "vllm"):
        raise ValueError(f'engine={engine!r} must be "bundled" or "vllm".')
    if engine == "bundled" and options:
        raise TypeError(
            f"VLLMServer has no {', '.join(sorted(options))}: the bundled engine takes further flags with extra_args=, "
            'and engine="vllm" takes any as keyword arguments.'
        )
    if engine == "bundled" and python is not None:
        raise ValueError('python= is for engine="vllm": the bundled engine runs in this interpreter.')
    for name in _BUNDLED_ONLY.keys() & flags.keys():
        if engine == "vllm" and flags[name] is not None:
            raise ValueError(f'{name}= is of the bundled engine; with engine="vllm" pass {_BUNDLED_ONLY[name]}.')


def bundled_command(model: str, flags: Mapping[str, Any], extra_args: Sequence[str], owners_fd: int) -> list[str]:
    """The command line of our own server."""
    # Whoever stops a server of their own is not waiting for its answers: three seconds are enough.
    own = ["--shutdown-timeout", "3", "--disable-access-log", "--owners-fd", str(owners_fd)]
    return [sys.executable, "-m", "langchain_vllm_server", model, *as_arguments(flags), *own, *extra_args]


def vllm_command(
    model: str, flags: Mapping[str, Any], extra_args: Sequence[str], owners_fd: int, launch: Sequence[str]
) -> list[str]:
    """The command line of a supervised vLLM.

    Args:
        model: The model.
        flags: Those of vLLM; `port` 0 is replaced with a free one, for vLLM would not tell which it took.
        extra_args: Further arguments of vLLM.
        owners_fd: The listening socket for owners; 0 for the sake of the server's identity.
        launch: See `vllm_launch`.
    """
    host, port = str(flags["host"]), int(flags["port"])
    if owners_fd and not port:
        port = _free_port(host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    supervise = ["-m", "langchain_vllm_server.supervise", "--owners-fd", str(owners_fd), "--engine", "vllm"]
    command = [*launch, "--model", model, *as_arguments({**flags, "port": port}), "--disable-uvicorn-access-log"]
    return [sys.executable, *supervise, "--model", model, "--url", url, "--", *command, *extra_args]


def vllm_launch(python: str | None, env: Mapping[str, str]) -> list[str]:
    """What starts vLLM: the given interpreter, this one, or the program `vllm` on the PATH.

    Raises:
        ImportError: None of them has vLLM.
    """
    for interpreter in [python] if python else [sys.executable]:
        try:
            if subprocess.run([interpreter, "-c", _HAS_VLLM], env=dict(env), check=False).returncode == 0:
                return [interpreter, "-m", "vllm.entrypoints.openai.api_server"]
        except OSError as error:
            raise ImportError(f"python={python!r} can't be run: {error.strerror}.") from None
    if python is None and (program := shutil.which("vllm", path=env.get("PATH"))):
        return [program, "serve"]
    where = python or f"{sys.executable}, and no program `vllm` on the PATH"
    raise ImportError(
        f'engine="vllm" needs vLLM, which is not installed for {where}: pip install vllm, pass python= (an interpreter '
        'that has it), or leave engine="vllm" out for the engine of this package.'
    )


def require_server_packages() -> None:
    """Raise ImportError if our own server lacks a package."""
    missing = [name for name in _SERVER_PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'A local server needs {", ".join(missing)}: pip install "langchain-vllm[server]". '
            "To use a server that runs elsewhere, pass base_url= or set VLLM_BASE_URL."
        )


def as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Flags as arguments: True is `--flag`, False `--no-flag`, a list several values, a mapping JSON, None nothing."""
    arguments: list[str] = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            arguments += [f"--{flag}", json.dumps(value)]
        elif isinstance(value, (list, tuple)):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments


def _free_port(host: str) -> int:
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as free:
        free.bind(address)
        return int(free.getsockname()[1])
