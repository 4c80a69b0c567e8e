"""The life of the server process: listen at once, load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from langchain_vllm_server.errors import StartError
from langchain_vllm_server.gate import Gate, Progress
from langchain_vllm_server.http_protocol import Http
from langchain_vllm_server.listen import address
from langchain_vllm_server.logs import set_up_logging
from langchain_vllm_server.middleware import wrap
from langchain_vllm_server.owners import Owners

if TYPE_CHECKING:
    import socket

    from langchain_vllm_server.async_engine import AsyncEngine
    from langchain_vllm_server.load import Loaded
    from langchain_vllm_server.settings import Settings

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 2  # for the last bytes, after the engine was stopped


def serve(settings: Settings, listener: socket.socket) -> int:
    """Serve until a signal or the last owner's end; the exit code.

    Raises:
        CheckpointError, ValueError, MemoryError, OSError: The model could not be loaded.
    """
    set_up_logging(settings)
    _allow_connections()
    started = time.monotonic()
    process = ServerProcess(settings, listener)
    try:
        with asyncio.Runner(loop_factory=process.http.config.get_loop_factory()) as runner:
            runner.run(process.run(started))
    finally:
        gc.unfreeze()  # from here on there is
        if settings.uds is not None:
            Path(settings.uds).unlink(missing_ok=True)
    if process.is_loading:
        # Asked to stop while a thread loads in native code: it cannot be interrupted, and there is nothing to save.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(0)
    return process.exit_code


def _allow_connections() -> None:
    """Have as many descriptors as the system grants: every connection takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class HttpServer(uvicorn.Server):
    """Uvicorn without its signal handlers: those are the process's."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Take no signals."""
        return nullcontext()


class ServerProcess:
    """One server: the HTTP side from the start, the engine as soon as it is loaded."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings = settings
        self._listener = listener
        self._progress = Progress()
        self._gate = Gate(self._progress)
        self._engine: AsyncEngine | None = None
        self._thread: threading.Thread | None = None
        self._owners: Owners | None = None
        self._stopping = False
        self.exit_code = 0
        self.http = HttpServer(
            uvicorn.Config(
                wrap(self._gate, settings),
                http=Http,
                log_config=None,
                access_log=not settings.disable_uvicorn_access_log,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
                ssl_keyfile=settings.ssl_keyfile,
                ssl_certfile=settings.ssl_certfile,
                ssl_ca_certs=settings.ssl_ca_certs,
                ssl_cert_reqs=settings.ssl_cert_reqs,
            )
        )

        try:
            self.http.config.load()
        except OSError as error:  # as it is of ssl, too
            raise StartError(f"cannot serve TLS with {settings.ssl_certfile}: {error}") from None

    @property
    def is_loading(self) -> bool:
        """Whether the loading thread still runs."""
        return self._thread is not None and self._thread.is_alive()

    async def run(self, started: float) -> None:
        """Serve until asked to stop. `started` is when the process was, for the log."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        if self._settings.owners_fd is not None:
            about = {**address(self._listener, self._settings), "pid": os.getpid(), "model": self._settings.model}
            about |= {"engine": "bundled", "started": time.time()}
            self._owners = Owners(self._settings.owners_fd, about, stop=self.stop, abandon=self.abandon)
        where = " ".join(address(self._listener, self._settings).values())
        logger.info("listening on %s, loading %s", where, self._settings.model)
        serving = asyncio.create_task(self.http.serve(sockets=[self._listener]))
        loading = self._load()
        progress = asyncio.create_task(self._show_progress())
        try:
            await asyncio.wait((serving, loading), return_when=asyncio.FIRST_COMPLETED)
            progress.cancel()
            if loading.done():
                self._open(loading.result(), started)
            await serving
        finally:
            progress.cancel()
            self._stop_engine()
            self._end()
            await serving

    def stop(self) -> None:
        """Take no more requests, give the open ones the settings' time, then end; a second call ends at once."""
        if self._owners is not None:
            self._owners.end()
        if self._stopping:
            self.http.force_exit = True
            self._stop_engine()
            self._end()
        elif self._engine is None:
            self._end()
        else:
            asyncio.get_running_loop().call_later(self._settings.shutdown_timeout, self._cut)
            self._gate.drain(self._end)
        self._stopping = True

    def _cut(self) -> None:
        """The time is over: what still runs ends with an error."""
        self._stop_engine()
        self._end()

    def _end(self) -> None:
        """Close what is idle, and return from `run` as soon as nothing is left."""
        self.http.should_exit = True

    def abandon(self) -> None:
        """The last owner is gone, and with it every client: end at once."""
        self.http.should_exit = self.http.force_exit = True

    def _load(self) -> asyncio.Future[Loaded]:
        """Load in a thread that nobody waits for at exit."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Loaded] = loop.create_future()

        def settle(result: Loaded | None, error: BaseException | None) -> None:
            if result is not None:
                future.set_result(result)
            elif error is not None:
                future.set_exception(error)

        def work() -> None:
            result, error = None, None
            try:
                from langchain_vllm_server.load import load

                result = load(self._settings, self._progress)
            except BaseException as caught:
                error = caught
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, result, error)

        self._thread = threading.Thread(target=work, name="load", daemon=True)
        self._thread.start()
        return future

    def _open(self, loaded: Loaded, started: float) -> None:
        """Let requests through to the model."""
        from langchain_vllm_server._engine import SamplingParams
        from langchain_vllm_server.app import create_app
        from langchain_vllm_server.async_engine import AsyncEngine, QueueLimits
        from langchain_vllm_server.generation import Service
        from langchain_vllm_server.metrics import Metrics

        model, engine = loaded.model, loaded.engine
        limits = QueueLimits(self._settings.max_num_queued_reqs, self._settings.max_num_queued_tokens)
        self._engine = AsyncEngine(engine, SamplingParams, limits, self._died)
        metrics = Metrics(model.names[0], model.max_model_len)
        self._gate.app = create_app(Service(model, self._engine, metrics), docs=not self._settings.disable_fastapi_docs)
        gc.freeze()  # nor will there be any in it: a look at it all would hold requests up
        gc.enable()
        if self._settings.gpu_memory_utilization and not engine.device_name.startswith("cuda"):
            logger.warning("--gpu-memory-utilization has no effect on %s: --memory has", engine.device_name)
        logger.info(
            "ready in %.1f s: %s on %s, %d MiB of weights, context of %d tokens",
            time.monotonic() - started,
            model.names[0],
            engine.device_name,
            engine.weight_bytes >> 20,
            model.max_model_len,
        )

    def _died(self, why: str) -> None:
        """The engine has ended: owners start another server, whoever else is there reads it from /health."""
        logger.error("the engine has failed: %s", why)
        if self._owners is not None and not self._stopping:
            self.exit_code = 1
            self.stop()

    def _stop_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.stop()

    async def _show_progress(self) -> None:
        """One line on a terminal while the weights load."""
        if not sys.stderr.isatty():
            return
        try:
            while True:
                await asyncio.sleep(0.1)
                if fraction := self._progress.fraction:
                    print(f"\r{self._progress.phase} {fraction:4.0%} ", end="", file=sys.stderr, flush=True)  # noqa: T201
        finally:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # noqa: T201
