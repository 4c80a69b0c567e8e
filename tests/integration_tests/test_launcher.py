"""The life of a managed server, with a fake one: a real process that keeps the contract."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import nbformat
import pytest
from nbclient import NotebookClient

from langchain_vllm import ChatVLLM, VLLMServer, _engines, _process
from langchain_vllm._progress import ProgressReport
from langchain_vllm.launcher import Health, VLLMServerError
from langchain_vllm_server.owners import LOG_BYTES, trim_log
from tests.integration_tests.fakes import ROOT, Program, alive, descriptors, eventually, reapers

pytestmark = pytest.mark.usefixtures("fake_servers")


class TestAsync:
    async def test_with_block(self) -> None:
        async with VLLMServer("slow") as server:
            pid = server.pid
            assert server.is_ready
            assert pid is not None
        assert not alive(pid)

    async def test_the_loop_turns_while_a_server_starts(self) -> None:
        server = VLLMServer("slow")
        starting = asyncio.create_task(server.astart())
        turns = 0
        while not starting.done():
            await asyncio.sleep(0.01)
            turns += not server.is_ready
        await server.astop()
        assert turns > 1

    async def test_a_failed_start_says_why(self) -> None:
        with pytest.raises(VLLMServerError, match="no such model"):
            await VLLMServer("crash").astart()

    @pytest.mark.parametrize("begun", [False, True])
    async def test_a_cancelled_start_leaves_nothing(self, begun: bool) -> None:
        server = VLLMServer("stuck")
        starting = asyncio.create_task(server.astart())
        await asyncio.sleep(0)
        if begun:
            assert await asyncio.to_thread(eventually, lambda: server.is_running)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not server.is_running


class TestStartAndStop:
    def test_with_block(self) -> None:
        with VLLMServer("good") as server:
            pid = server.pid
            assert pid is not None
            assert alive(pid)
            assert server.is_ready
            assert server.health() == Health("ok")
            assert server.base_url.startswith("http://127.0.0.1:")
            assert server.base_url.endswith("/v1")
            assert server.startup_seconds is not None
            assert 0 < server.startup_seconds < 60
            assert ChatVLLM(base_url=server.base_url).invoke("Hello").content == f"{pid} Hello"
        assert not Path(f"/proc/{pid}").exists()
        assert server.health() == Health("stopped")
        with pytest.raises(VLLMServerError, match="is not started"):
            server.base_url  # noqa: B018

    def test_stop_and_start_are_idempotent(self) -> None:
        server = VLLMServer("good")
        server.stop()
        server.start()
        pid = server.pid
        server.start()
        assert server.pid == pid
        server.stop()
        server.stop()
        assert not server.is_running

    def test_start_again(self) -> None:
        server = VLLMServer("good")
        with server:
            first = server.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            assert eventually(lambda: not server.is_ready)
            server.start()
            assert server.pid != first
            assert server.is_ready

    def test_nothing_is_left(self) -> None:
        with VLLMServer("good"):
            pass
        before = descriptors(), reapers()
        for _ in range(5):
            with VLLMServer("good"):
                pass
        assert (descriptors(), reapers()) == before

    def test_a_forgotten_server_stops(self) -> None:
        server = VLLMServer("good")
        server.start()
        pid = server.pid
        assert pid is not None
        del server
        gc.collect()
        assert not alive(pid)

    def test_a_server_that_ignores_the_request_is_killed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_process, "STOP_GRACE_SECONDS", 0.2)
        with VLLMServer("deaf") as server:
            pid = server.pid
        assert pid is not None
        assert not alive(pid)

    def test_options_become_flags(self) -> None:
        options = {
            "max_model_len": 512,
            "max_num_seqs": 4,
            "quantization": "int8",
            "seed": 7,
            "device": "cpu",
            "threads": 1,
            "memory": "1GiB",
        }
        with VLLMServer("good", **options, served_model_name=["a", "b"], extra_args=["--revision", "main"]) as server:  # type: ignore[arg-type]
            assert eventually(lambda: bool(server.log_tail()))
            command = server.log_tail()
        assert "--max-model-len 512 --max-num-seqs 4 --quantization int8 --seed 7" in command
        assert "--device cpu --threads 1 --memory 1GiB" in command
        assert "--served-model-name a b" in command
        assert command.endswith("--revision main")

    def test_a_key_is_not_on_the_command_line(self) -> None:
        with VLLMServer("good", api_key="hidden-key") as server:
            arguments = Path(f"/proc/{server.pid}/cmdline").read_text()
            environment = Path(f"/proc/{server.pid}/environ").read_text()
        assert "hidden-key" not in arguments
        assert "VLLM_API_KEY=hidden-key" in environment

    def test_ctrl_c_in_the_terminal_is_for_the_owner(self) -> None:
        with VLLMServer("good") as server:
            assert server.pid is not None
            assert os.getsid(server.pid) == server.pid != os.getsid(0)

    def test_a_proxy_of_the_environment_is_not_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        with VLLMServer("good", startup_timeout=2) as server:
            assert ChatVLLM(base_url=server.base_url, max_retries=0).invoke("Hello").content

    def test_stop_while_starting(self) -> None:
        server = VLLMServer("stuck")
        with ThreadPoolExecutor() as pool:
            start = pool.submit(server.start)
            assert eventually(lambda: server.health().status == "loading")
            server.stop()
            with pytest.raises(VLLMServerError, match="ended before it was ready"):
                start.result()
        assert not server.is_running


class TestFailures:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("crash", r"'crash' ended before it listened.*\n.*\nCheckpointError: no such model"),
            ("crash-loading", r"ended before it was ready.*\n.*\nout of memory"),
        ],
    )
    def test_a_crash_shows_the_end_of_the_log(self, model: str, message: str) -> None:
        server = VLLMServer(model)
        with pytest.raises(VLLMServerError, match=message):
            server.start()
        assert not server.is_running
        assert "fake server" in server.log_tail()

    @pytest.mark.parametrize(
        ("model", "message"),
        [("mute", "did not listen within 0.5 s"), ("stuck", r"made no progress for 0.5 s \(phase: weights\)")],
    )
    def test_a_server_that_stands_still(self, model: str, message: str) -> None:
        server = VLLMServer(model, startup_timeout=0.5)
        with pytest.raises(VLLMServerError, match=message):
            server.start()
        assert not server.is_running

    def test_progress_holds_the_timeout_off(self) -> None:
        with VLLMServer("steady", startup_timeout=2.0) as server:
            assert server.is_ready

    def test_a_port_in_use(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(VLLMServerError, match="Address already in use"):
                VLLMServer("good", port=taken.getsockname()[1]).start()

    def test_packages_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_engines, "find_spec", lambda name: None if name == "uvicorn" else object())
        with pytest.raises(ImportError, match=r'needs uvicorn: pip install "langchain-vllm\[server\]"'):
            VLLMServer("good").start()

    def test_a_long_log_keeps_its_end(self) -> None:
        log = _process._make_log()
        try:
            os.write(log, "".join(f"line {i}\n" for i in range(300_000)).encode())
            trim_log(log)
            os.write(log, b"the end")
            tail = _process.read_tail(log, 1000).splitlines()
            assert os.fstat(log).st_blocks * 512 <= 2 * LOG_BYTES
        finally:
            os.close(log)
        assert (len(tail), tail[0], tail[-2], tail[-1]) == (1000, "line 299001", "line 299999", "the end")


class TestProgress:
    def test_a_line_per_phase(self, capsys: pytest.CaptureFixture[str]) -> None:
        with VLLMServer("slow", show_progress=True):
            pass
        assert capsys.readouterr().err == "slow: weights\n"

    def test_silent_by_default_without_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        with VLLMServer("slow"):
            pass
        assert capsys.readouterr().err == ""

    def test_a_line_redrawn_on_a_terminal(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        terminal = Terminal()
        report = ProgressReport("m", None, terminal)
        report.show("weights", 0.5)
        assert terminal.getvalue() == "\r\x1b[Km: weights  50% " + "█" * 10 + "░" * 10
        report.close()
        assert terminal.getvalue().endswith("\r\x1b[K")

    @pytest.mark.filterwarnings("default::DeprecationWarning", "default::ResourceWarning")  # of the kernel's libraries
    def test_a_line_redrawn_in_a_notebook(self) -> None:
        code = """
            from langchain_vllm import VLLMServer, _progress
            from tests.integration_tests.fakes import use_fake_server
            use_fake_server()
            _progress._NOTEBOOK_DELAY = 0
            with VLLMServer("slow"):
                pass
        """
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(dedent(code))])
        NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(ROOT)}}).execute()
        (output,) = notebook.cells[0].outputs
        assert re.fullmatch(r"slow: ready in [\d.]+ s", output["data"]["text/plain"])


class TestOwner:
    """Whatever ends the owner ends the server."""

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_signals(self, number: signal.Signals) -> None:
        with Program() as owner:
            server = int(owner.read())
            assert alive(server)
            owner.popen.send_signal(number)
            owner.popen.wait()
            assert eventually(lambda: not alive(server))

    def test_exit_without_stop(self) -> None:
        with Program("exit") as owner:
            server = int(owner.read())
            assert owner.popen.wait() == 0
            assert not alive(server)

    def test_a_forked_child_does_not_keep_the_server(self) -> None:
        with Program("fork") as owner:
            server, child = int(owner.read()), int(owner.read())
            try:
                owner.kill()
                assert alive(child)
                assert eventually(lambda: not alive(server))
            finally:
                os.kill(child, signal.SIGKILL)

    def test_a_forked_child_that_starts_has_a_share_of_its_own(self) -> None:
        with Program("fork-and-start") as owner:
            server = int(owner.read())
            child = int(next(line for line in (owner.read(), owner.read()) if line != "started"))
            try:
                owner.kill()
                assert not eventually(lambda: not alive(server), seconds=0.5)
            finally:
                os.kill(child, signal.SIGKILL)
            assert eventually(lambda: not alive(server))

    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_a_forked_child_uses_the_server_and_does_not_stop_it(self) -> None:
        with VLLMServer("good") as server:
            child = os.fork()
            if child == 0:
                try:
                    ready = server.is_ready and server.health().ready
                    server.stop()
                    os._exit(0 if ready else 1)
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert server.is_ready
            assert server.health().ready

    def test_a_server_outlives_the_thread_that_started_it(self) -> None:
        server = VLLMServer("good")
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join()
        with server:
            assert server.health().ready
