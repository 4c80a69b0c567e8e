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
from typing import TYPE_CHECKING

import nbformat
import pytest
from nbclient import NotebookClient

from langchain_vllm import ChatVLLM, VLLMServer, _engines, _process, _shared
from langchain_vllm._progress import ProgressReport
from langchain_vllm.errors import VLLMConnectionError, VLLMServerCrashedError
from langchain_vllm.launcher import Health, VLLMServerError
from langchain_vllm_server.owners import LOG_BYTES, trim_log
from tests.integration_tests.fakes import ROOT, Program, alive, descriptors, eventually, fake_command

if TYPE_CHECKING:
    from collections.abc import Iterator


def reapers() -> int:
    return [thread.name for thread in threading.enumerate()].count("langchain-vllm-reaper")


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(VLLMServer, "_command", fake_command)
    monkeypatch.setattr(_shared, "KEEP_ALIVE_SECONDS", 0.1)
    for name in ("VLLM_BASE_URL", "VLLM_API_BASE", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    gc.collect()
    before = reapers()
    yield
    gc.collect()
    assert eventually(lambda: reapers() <= before), "a server was left"


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
            "threads": 1,
            "memory": "1GiB",
        }
        with VLLMServer("good", **options, served_model_name=["a", "b"], extra_args=["--revision", "main"]) as server:  # type: ignore[arg-type]
            assert eventually(lambda: bool(server.log_tail()))
            command = server.log_tail()
        flags = "--max-model-len 512 --max-num-seqs 4 --quantization int8 --seed 7 --threads 1 --memory 1GiB"
        assert flags in command
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


class TestSharing:
    def test_objects_share_a_server_and_the_last_one_stops_it(self) -> None:
        first, second = ChatVLLM(model="good"), ChatVLLM(model="good", temperature=0.5)
        pid = int(str(first.invoke("Hello").content).split()[0])
        assert str(second.invoke("Hello").content).startswith(f"{pid} ")
        assert first.server is second.server
        del first
        gc.collect()
        assert not eventually(lambda: not alive(pid), seconds=0.4)
        del second
        gc.collect()
        assert eventually(lambda: not alive(pid))

    def test_the_keep_alive_bridges_a_gap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_shared, "KEEP_ALIVE_SECONDS", 0.5)
        pids = {str(ChatVLLM(model="good").invoke("Hello").content).split()[0] for _ in range(3)}
        chat = ChatVLLM(model="good")
        pids.add(str(chat.invoke("Hello").content).split()[0])
        assert len(pids) == 1
        assert not eventually(lambda: not alive(int(*pids)), seconds=0.8)  # the gaps before count no more

    def test_other_settings_are_other_servers(self) -> None:
        chats = [
            ChatVLLM(model="good", server_options=options) for options in ({}, {"seed": 1}, {"show_progress": False})
        ]
        pids = [str(chat.invoke("Hello").content).split()[0] for chat in chats]
        assert pids[0] != pids[1]
        assert pids[0] == pids[2]

    def test_simultaneous_first_calls_start_one_server(self) -> None:
        chats = [ChatVLLM(model="slow") for _ in range(4)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: chats[i % 4].invoke("Hello").content, range(8)))
        assert len({str(answer).split()[0] for answer in answers}) == 1

    async def test_the_event_loop_runs_on_while_a_server_starts(self) -> None:
        chat = ChatVLLM(model="slow")
        longest = 0.0

        async def watch() -> None:
            nonlocal longest
            while True:
                before = asyncio.get_running_loop().time()
                await asyncio.sleep(0.01)
                longest = max(longest, asyncio.get_running_loop().time() - before)

        watcher = asyncio.create_task(watch())
        answers = await asyncio.gather(*(chat.ainvoke("Hello") for _ in range(4)))
        watcher.cancel()
        assert len({str(answer.content).split()[0] for answer in answers}) == 1
        assert longest < 0.3  # the start takes more than 0.5 s

    def test_copies_hold_the_server(self) -> None:
        chat = ChatVLLM(model="good")
        pid = int(str(chat.invoke("Hello").content).split()[0])
        copy = chat.model_copy(update={"temperature": 0.5})
        del chat
        gc.collect()
        assert not eventually(lambda: not alive(pid), seconds=0.4)
        assert str(copy.invoke("Hello").content).startswith(f"{pid} ")

    def test_the_address_is_no_part_of_the_object(self) -> None:
        chat = ChatVLLM(model="good")
        before = chat._get_llm_string(), repr(chat)
        chat.invoke("Hello")
        assert (chat._get_llm_string(), repr(chat)) == before

    def test_a_key_is_passed_on(self) -> None:
        chat = ChatVLLM(model="good", api_key="hidden-key")
        chat.invoke("Hello")
        assert chat.server is not None
        assert "VLLM_API_KEY=hidden-key" in Path(f"/proc/{chat.server.pid}/environ").read_text()

    def test_a_server_that_dies_is_reported_and_started_again(self) -> None:
        chat = ChatVLLM(model="die")
        with pytest.raises(
            VLLMServerCrashedError, match=r"has ended \(the next call starts it again\)[^\0]*segmentation fault"
        ) as raised:
            chat.invoke("Hello")
        assert raised.value.is_retryable
        assert chat.server is not None
        first = chat.server.pid
        with pytest.raises(VLLMServerCrashedError):
            chat.invoke("Hello")
        assert chat.server.pid != first

    async def test_a_server_that_dies_during_an_answer(self) -> None:
        chat = ChatVLLM(model="die")
        stream, astream = chat.stream("Hello"), chat.astream("Hello")
        assert next(stream).content == "Once"
        with pytest.raises(VLLMServerCrashedError):
            next(stream)
        assert (await anext(astream)).content == "Once"
        with pytest.raises(VLLMServerCrashedError):
            await anext(astream)

    @pytest.mark.parametrize("asynchronously", [False, True])
    async def test_nothing_is_sent_twice(self, asynchronously: bool) -> None:
        chat = ChatVLLM(model="drop", max_retries=3)
        with pytest.raises(VLLMConnectionError, match="runs, but did not answer") as raised:
            await (chat.ainvoke("Hello") if asynchronously else asyncio.to_thread(chat.invoke, "Hello"))
        assert not isinstance(raised.value, VLLMServerCrashedError)
        assert chat.server is not None
        assert chat.server.log_tail().count("a request") == 1

    def test_an_object_follows_a_server_that_another_has_started_again(self) -> None:
        first, second = ChatVLLM(model="good"), ChatVLLM(model="good")
        pids = [int(str(chat.invoke("Hello").content).split()[0]) for chat in (first, second)]
        assert pids[0] == pids[1]
        os.kill(pids[0], signal.SIGKILL)
        assert first.server is not None
        assert eventually(lambda: not first.server.is_ready)  # type: ignore[union-attr]
        pids = [int(str(chat.invoke("Hello").content).split()[0]) for chat in (first, second)]
        assert pids[0] == pids[1]

    def test_a_failed_start_fails_every_caller(self) -> None:
        chat = ChatVLLM(model="crash")
        for _ in range(2):
            with pytest.raises(VLLMServerError, match="no such model"):
                chat.invoke("Hello")


class TestLoops:
    def test_one_model_object_in_many_event_loops(self) -> None:
        with VLLMServer("good") as server:
            chat = ChatVLLM(base_url=server.base_url, model="good")
            for _ in range(3):
                assert asyncio.run(chat.ainvoke("Hello")).content

            def in_a_loop_of_its_own(i: int) -> str:
                return str(asyncio.run(chat.ainvoke(str(i))).content).split()[1]

            with ThreadPoolExecutor(6) as pool:
                assert list(pool.map(in_a_loop_of_its_own, range(12))) == [str(i) for i in range(12)]
            transport = chat.root_async_client._client._transport
            assert not transport._pools, "connections of a closed loop were kept"
