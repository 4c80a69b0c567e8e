"""`VLLMServer`: a local server for the time it is needed."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
import weakref
from contextlib import closing
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Self
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

from langchain_vllm._engines import bundled_command, check_options, require_server_packages, vllm_command, vllm_launch
from langchain_vllm._identity import identity
from langchain_vllm._process import ServerProcess
from langchain_vllm._progress import ProgressReport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_vllm._engines import Engine

POLL_SECONDS = 0.05
ERROR_LOG_LINES = 30

_servers: weakref.WeakSet[VLLMServer] = weakref.WeakSet()


class VLLMServerError(RuntimeError):
    """A server could not be started; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Health:
    """What a server says of itself.

    Attributes:
        status: "ok", "loading", "stopped" (no process), "unreachable" (no answer), or another word of the server's.
        phase: What it is doing while loading, such as "weights".
        progress: How much of that is done, 0 to 1.
        device: Where the model runs, "cpu" or "cuda"; "" while it does not, and where the server does not tell.
    """

    status: str
    phase: str = ""
    progress: float = 0.0
    device: str = ""

    @property
    def ready(self) -> bool:
        """Whether requests will be served."""
        return self.status == "ok"


class VLLMServer:
    """A server for one model in a process of its own, which programs with the same wishes share.

    ```python
    with VLLMServer("SmolLM2-135M-Instruct") as server:
        llm = ChatVLLM(base_url=server.base_url)
    ```

    `async with`, `astart()` and `astop()` do the same without blocking an event loop.

    `start()` joins the server of this user that another object or program has started with the same model, settings,
    version and files; only if there is none, it starts one. `stop()`, the end of the `with` block, garbage collection,
    interpreter exit and the end of this process, even by SIGKILL, give this object's share up, and with the last share
    the server ends. A forked child may use the server, but neither stops it nor keeps it alive, unless it calls
    `start()`. Thread-safe.

    Args:
        model: A checkpoint folder, a `.gguf` file, a hub id, or the default model's name `SmolLM2-135M-Instruct`.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key: Key that requests must carry. It travels in the environment, not on the command line.
        served_model_name: Name or names that requests use for the model; by default `model` as given.
        max_model_len: Longest sequence in tokens; by default the model's own.
        max_num_seqs: Sequences computed together at most.
        dtype: "float32", "bfloat16", "float16" or "auto".
        quantization: "int8" or "int4" rounds float weights so while they load.
        seed: Seed for requests that have none.
        device: "cuda": a GPU, and an error where none can be used; "cpu"; or "auto", the default: a GPU if one can be
            used, else the CPU. That is chosen once: this object's server is started again where it was, so that a lost
            GPU is an error, and no slow answers.
        threads: CPU threads; by default one per core.
        memory: Limit for weights and KV cache, such as "4GiB".
        extra_args: Further command line arguments of `langchain-vllm serve`.
        env: Environment variables added to this process's own.
        shared: Share the server; False: start one that nobody else finds.
        keep_alive: Seconds that the server stays when nobody needs it any more, as long as this process lives.
        startup_timeout: Seconds that a start may stand still before it fails; with progress it may take any time, and
            a line in the log is progress.
        show_progress: Report loading; by default on a terminal and in a notebook.
        engine: "bundled" is this package's; "vllm" is vLLM itself, which must be installed: for several GPUs, and
            with `distributed_executor_backend="ray"` for many machines.
        python: With "vllm": the interpreter that has it; by default this one, or else the program `vllm` on the PATH.
        options: With "vllm": any further flags of `vllm serve`, such as `tensor_parallel_size=2`,
            `enable_prefix_caching=False` or `speculative_config={...}`.

    Raises:
        TypeError: An option is not known.
        ValueError: An option is of the other engine.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        served_model_name: str | Sequence[str] | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        seed: int | None = None,
        device: str | None = None,
        threads: int | None = None,
        memory: str | None = None,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        shared: bool = True,
        keep_alive: float = 0.0,
        startup_timeout: float = 120.0,
        show_progress: bool | None = None,
        engine: Engine = "bundled",
        python: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        self.model = os.fspath(model)
        self.startup_timeout = startup_timeout
        self.startup_seconds: float | None = None
        """How long the last start took; None before it."""
        self.engine = engine
        self._flags: dict[str, Any] = {
            "host": host,
            "port": port,
            "served_model_name": served_model_name,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "dtype": dtype,
            "quantization": quantization,
            "seed": seed,
            "device": device,
            "threads": threads,
            "memory": memory,
        }
        self._python = os.fspath(python) if python is not None else None
        self._vllm: list[str] = []
        check_options(engine, self._flags, options, self._python)
        self._flags |= options
        self._extra_args = list(extra_args)
        self._env = {**(env or {}), **({"VLLM_API_KEY": api_key} if api_key else {})}
        self._show_progress = show_progress
        self._secret = "" if shared else token_hex(16)
        self._keep_alive = keep_alive if shared else 0.0
        self._starting = threading.Lock()
        self._process: ServerProcess | None = None
        self._finalizer: weakref.finalize[[], VLLMServer] | None = None
        self._url: str | None = None
        self._ready = False
        self._device = ""  # that the model has run on
        _servers.add(self)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await self.astart()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.astop()

    def __repr__(self) -> str:
        where = f"at {self._url}, pid {self.pid}" if self.is_running else "not running"
        return f"<VLLMServer {self.model!r} {where}>"

    @property
    def base_url(self) -> str:
        """The API's address, such as `http://127.0.0.1:34567/v1`. Raises `VLLMServerError` if it was not started."""
        if self._url is None:
            raise VLLMServerError(f"The server for {self.model!r} is not started: use `with server:` or `start()`.")
        return f"{self._url}/v1"

    @property
    def is_running(self) -> bool:
        """Whether the process is there, ready or not, and this object has a share in it."""
        return self._process is not None and self._process.running

    @property
    def is_ready(self) -> bool:
        """Whether a start has completed and the process takes requests; a look at a connection, not a request."""
        return self._ready and self.is_running and self._process is not None and not self._process.ending

    @property
    def pid(self) -> int | None:
        """The server's process id, if it was started."""
        return self._process.pid if self._process else None

    def log_tail(self, lines: int = ERROR_LOG_LINES) -> str:
        """The last lines that the server wrote; also of one that has ended."""
        return self._process.log_tail(lines) if self._process else ""

    def start(self) -> None:
        """Join or start the server and wait until it is ready; start it anew if it has died. Nothing if it is ready.

        Raises:
            VLLMServerError: It ended, or stood still for `startup_timeout` seconds; the message has the end of its log.
            ImportError: The server's packages, or vLLM, are not installed.
        """
        with self._starting:
            if self.is_ready and self._process is not None and self._process.owned_here:
                return
            _require_linux()
            if self.engine == "vllm":
                self._vllm = vllm_launch(self._python, {**os.environ, **self._env})
            else:
                require_server_packages()
            self.stop()
            begin = time.monotonic()
            try:
                while True:
                    self._url = self._join_or_start()
                    try:
                        self.wait_ready()
                        break
                    except VLLMServerError:
                        if not self._lost_a_race():
                            raise
            except BaseException:
                self.stop()
                raise
            self.startup_seconds = time.monotonic() - begin

    def _join_or_start(self) -> str:
        """The server's URL."""
        env = {**os.environ, **self._env}
        name = identity(self._command(0), env, self._secret)
        while True:
            process = ServerProcess(name, self._command, env)
            self._process = process
            self._finalizer = weakref.finalize(self, process.leave, self._keep_alive)
            self._finalizer.atexit = False  # the process takes its leave itself
            try:
                about = process.greeting(self.startup_timeout)
            except TimeoutError:
                raise self._failure(f"did not listen within {self.startup_timeout:g} s") from None
            if about is not None:
                return str(about["url"])
            if not self._lost_a_race():
                raise self._failure("ended before it listened")

    def _lost_a_race(self) -> bool:
        """Whether the server ended that somebody else had started, and not because this object was told to stop."""
        process, finalizer = self._process, self._finalizer
        if process is None or finalizer is None or process.started_here or process.running or not finalizer.alive:
            return False
        finalizer()
        return True

    def wait_ready(self) -> None:
        """Wait until the started server serves requests.

        Raises:
            VLLMServerError: See `start`.
        """
        last, deadline = (Health(""), 0), 0.0
        with closing(ProgressReport(self.model, self._show_progress)) as report:
            while not (health := self.health()).ready:
                if not self.is_running:
                    raise self._failure("ended before it was ready")
                now = health, self._process.log_size() if self._process else 0
                if now != last:
                    last, deadline = now, time.monotonic() + self.startup_timeout
                    report.show(health.phase or "starting", health.progress)
                elif time.monotonic() > deadline:
                    doing = health.phase or health.status
                    raise self._failure(f"made no progress for {self.startup_timeout:g} s (phase: {doing})")
                time.sleep(POLL_SECONDS)
            report.close(ready=True)
        if self._device == "cuda" and health.device == "cpu":  # somebody else has started it
            raise self._failure("runs on the CPU")
        self._device = self._device or health.device
        self._ready = True

    def health(self) -> Health:
        """Ask the server how it is."""
        if not self.is_running or self._url is None:
            return Health("stopped")
        opener = build_opener(ProxyHandler({}))  # a proxy in the environment is not for this machine
        try:
            with opener.open(f"{self._url}/health", timeout=5.0) as answer:
                return Health("ok", device=answer.headers.get("x-device", ""))
        except HTTPError as error:
            with error:
                return _parse_health(error.read())
        except OSError:
            return Health("unreachable")

    def stop(self) -> None:
        """Give this object's share in the server up. If it was the last, wait for the end, forced after ten seconds."""
        self._ready, self._url = False, None
        if self._finalizer is not None:
            self._finalizer()

    async def astart(self) -> None:
        """`start` without blocking the event loop. Cancelling it stops the server.

        Raises:
            VLLMServerError, ImportError: See `start`.
        """
        starting = asyncio.ensure_future(asyncio.to_thread(self.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(lambda future: future.cancelled() or future.exception())  # nobody else asks
            while not starting.done():  # more than once: the thread may be just about to start the process
                await self.astop()
                await asyncio.wait([starting], timeout=POLL_SECONDS)
            await self.astop()
            raise

    async def astop(self) -> None:
        """`stop` without blocking the event loop."""
        await asyncio.to_thread(self.stop)

    def _command(self, owners_fd: int) -> list[str]:
        if self.engine == "vllm":
            return vllm_command(self.model, self._flags, self._extra_args, owners_fd, self._vllm)
        command = bundled_command(self.model, self._flags, self._extra_args, owners_fd)
        if owners_fd and self._device:  # no part of its identity: those who have not started it yet may join it
            command += ["--device", self._device]
        return command

    def _failure(self, what: str) -> VLLMServerError:
        log = self.log_tail() or "(it wrote nothing)"
        if self._device == "cuda":
            what += ', and its model was on a GPU before: to go on without it, ask for device="cpu"'
        return VLLMServerError(f"The server for {self.model!r} {what}. The end of its log:\n{log}")


def _renew_locks() -> None:
    """In a forked child: a lock that another thread held would stay held for ever."""
    for server in tuple(_servers):
        server._starting = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


def _parse_health(body: bytes) -> Health:
    try:
        answer = json.loads(body)
        return Health(str(answer["status"]), str(answer.get("phase", "")), float(answer.get("progress", 0.0)))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Health("unreachable")


def _require_linux() -> None:
    if sys.platform != "linux":
        raise VLLMServerError(
            f"A managed server needs Linux, and this is {sys.platform}: start one with `langchain-vllm serve` or "
            "`vllm serve`, and pass base_url=."
        )
