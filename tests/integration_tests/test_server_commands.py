"""`langchain-vllm ps`, `logs` and `stop`, with servers of the fake kind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from langchain_vllm.cli import main
from tests.integration_tests.fakes import Program, alive, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        out, errors = capsys.readouterr()
        return status, out, errors

    return run


@pytest.fixture
def owner() -> Iterator[Program]:
    with Program("alone") as owner:
        yield owner


def test_ps(run: Callable[..., tuple[int, str, str]], owner: Program) -> None:
    server = owner.read()
    status, out, _ = run("ps")
    assert status == 0
    (line,) = (line.split() for line in out.splitlines() if f" {server} " in line)
    assert line[0] == "good"
    assert line[2].startswith("http://127.0.0.1:")
    assert int(line[5]) > 5  # MiB
    assert line[-2:] == ["bundled", str(owner.popen.pid)]
    assert alive(int(server))


def test_looking_does_not_keep_a_server(run: Callable[..., tuple[int, str, str]], owner: Program) -> None:
    server = int(owner.read())
    for _ in range(5):
        run("ps")
    assert owner.ask("stop") == "stopped"
    assert eventually(lambda: not alive(server))


def test_logs(run: Callable[..., tuple[int, str, str]], owner: Program) -> None:
    server = owner.read()
    status, out, errors = run("logs", server)
    assert (status, errors) == (0, f"==> good, pid {server}\n")
    assert out.startswith("fake server: good")
    assert run("logs", server, "--lines", "0")[1] == "\n"


@pytest.mark.parametrize("model", ["good", "deaf"])
def test_stop(run: Callable[..., tuple[int, str, str]], model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langchain_vllm._running.STOP_GRACE_SECONDS", 2.0)
    with Program("alone", model) as owner:
        server = owner.read()
        assert run("stop", server) == (0, f"stopped {model}, pid {server}\n", "")
        assert not alive(int(server))
        assert int(owner.ask("start")) != int(server)


def test_what_is_not_there(run: Callable[..., tuple[int, str, str]]) -> None:
    pid = str(os.getpid())
    for command in ("logs", "stop"):
        assert run(command, pid) == (1, "", f"No managed server of yours has the model or pid {pid!r}.\n")
    status, _, errors = run("stop")
    assert status == 2
    assert "name a model or a pid" in errors


def test_nothing_runs(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langchain_vllm._running.socket_name", lambda name: f"\0langchain-vllm-test/{name}")
    assert len(run("ps")[1].splitlines()) == 1
    assert run("logs") == (1, "", "No managed server runs.\n")
    assert run("stop", "--all") == (0, "", "")
