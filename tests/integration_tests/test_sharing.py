"""One server for several programs: whoever of them is killed, it goes on for the others, and nothing stays of it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from langchain_vllm import VLLMServer, _process
from langchain_vllm._identity import identity
from langchain_vllm._process import ServerProcess, socket_name
from tests.integration_tests.fakes import (
    Program,
    alive,
    descriptors,
    eventually,
    fake_command,
    servers,
    sockets,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(VLLMServer, "_command", fake_command)
    names = {
        identity(VLLMServer(model)._command(0), os.environ) for model in ("good", "slow", "stuck", "crash-loading")
    }
    before = servers(), descriptors(), threading.active_count(), set(os.listdir("/tmp"))
    yield
    gc.collect()  # errors hold frames, and those a server
    assert eventually(lambda: servers() == before[0])
    assert eventually(lambda: not sockets() & names)
    assert eventually(lambda: descriptors() <= before[1])
    assert eventually(lambda: threading.active_count() <= before[2])
    left = set(os.listdir("/tmp")) - before[3]
    assert not [name for name in left if "langchain-vllm" in name]


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    """Three that begin at the same time."""
    with ExitStack() as stack:
        yield [stack.enter_context(Program(model="slow")) for _ in range(3)]


def test_racing_programs_have_one_server(programs: list[Program]) -> None:
    pids = {int(program.read()) for program in programs}
    assert len(pids) == 1
    assert pids <= servers()


def test_the_server_goes_on_for_who_is_left(programs: list[Program]) -> None:
    server = int(programs[0].read())
    for program in programs[1:]:
        assert int(program.read()) == server
    programs[0].kill()
    assert programs[1].ask("stop") == "stopped"
    assert not eventually(lambda: not alive(server), seconds=0.5)
    assert int(programs[2].ask("start")) == server
    programs[2].kill()
    assert eventually(lambda: not alive(server))


def test_the_starter_is_killed_while_it_starts() -> None:
    with Program(model="stuck") as starter:
        assert eventually(lambda: bool(servers()))
        starter.kill()
        assert eventually(lambda: not servers())


def test_a_killed_server_is_started_again_once(programs: list[Program]) -> None:
    first = {int(program.read()) for program in programs}
    name = identity(VLLMServer("slow")._command(0), os.environ)
    assert name in sockets()
    os.kill(first.pop(), signal.SIGKILL)
    # Its sockets stay open until the last of its threads has ended, a moment after the process has.
    assert eventually(lambda: not servers() and name not in sockets())
    assert len({int(program.ask("start")) for program in programs}) == 1


def test_all_are_killed_at_once(programs: list[Program]) -> None:
    server = int(programs[0].read())
    os.kill(server, signal.SIGSTOP)  # it has no chance to do anything
    for program in programs:
        program.kill()
    os.kill(server, signal.SIGKILL)
    assert eventually(lambda: not servers())


def test_who_does_not_share_has_a_server_of_its_own() -> None:
    with Program("alone") as first, Program("alone") as second, Program() as third, Program() as fourth:
        pids = [int(program.read()) for program in (first, second, third, fourth)]
    assert len(set(pids[:3])) == 3
    assert pids[2] == pids[3]


def test_objects_of_a_program_share_too() -> None:
    with VLLMServer("good") as first:
        with VLLMServer("good", show_progress=False) as second, VLLMServer("good", seed=1) as third:
            assert first.pid == second.pid != third.pid
            assert "fake server" in second.log_tail()
        assert not second.is_running
        assert first.health().ready


def test_a_server_that_is_about_to_end_is_not_joined() -> None:
    with VLLMServer("good") as first:
        assert first.pid is not None
        with VLLMServer("good") as second:
            os.kill(first.pid, signal.SIGSTOP)
            stop = threading.Thread(target=first.stop)
            stop.start()
            os.kill(first.pid, signal.SIGCONT)
            stop.join()
            assert second.health().ready


def test_fifty_starts_and_stops() -> None:
    pids = set()
    for _ in range(50):
        with VLLMServer("good") as server:
            pids.add(server.pid)
    assert len(pids) == 50


def test_many_threads_come_and_go() -> None:
    def come_and_go(i: int) -> None:
        for _ in range(5):
            with VLLMServer("good", keep_alive=0.02 * (i % 3)) as server:
                assert server.is_ready

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))
    assert eventually(lambda: not servers())
    _process._sweep()


def test_many_join_a_start_that_fails() -> None:
    failures: list[str] = []

    def fail() -> None:
        try:
            VLLMServer("crash-loading").start()
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=fail) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 4
    for failure in failures:
        assert failure.startswith("VLLMServerError")
        assert "out of memory" in failure


as_nobody = pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
AS_NOBODY = "import os, socket; os.setuid(65534); s = socket.socket(socket.AF_UNIX); "


@as_nobody
def test_a_name_that_another_user_has_taken() -> None:
    code = f"{AS_NOBODY} s.bind({socket_name('taken')!r}); s.listen(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(PermissionError, match="another user's process"):
            ServerProcess("taken", lambda fd: [], {})
        other.communicate(b"\n")


@as_nobody
def test_another_user_is_no_owner() -> None:
    with VLLMServer("good") as server:
        name = identity(server._command(0), os.environ)
        assert name in sockets()
        code = f"{AS_NOBODY} s.connect({socket_name(name)!r}); print(s.recv(9))"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert said.stdout == "b''\n"
        assert server.is_ready


class TestIdentity:
    def test_it_depends_on_all_that_answers_depend_on(self, tmp_path: Path) -> None:
        checkpoint = tmp_path / "weights.bin"
        checkpoint.write_text("1")
        command, env = ["python", "-m", "server", str(tmp_path), "--seed", "1"], {"VLLM_API_KEY": "a", "HOME": "/"}
        names = [identity(command, env)]
        assert identity(list(command), {**env, "TERM": "xterm"}) == names[0]
        names.append(identity([*command[:-1], "2"], env))
        names.append(identity(command, {**env, "VLLM_API_KEY": "b"}))
        names.append(identity(command, env, "secret"))
        checkpoint.write_text("22")
        names.append(identity(command, env))
        assert len(set(names)) == 5

    def test_a_relative_path_is_another_one_elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        names = []
        for folder in ("a", "b"):
            (tmp_path / folder / "model").mkdir(parents=True)
            monkeypatch.chdir(tmp_path / folder)
            names.append(identity(["server", "model"], {}))
        assert names[0] != names[1]
