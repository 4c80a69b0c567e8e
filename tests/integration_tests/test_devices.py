"""Managed servers and the device that they run on: the one that was asked for, or an error."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from langchain_vllm import VLLM, VLLMServer
from langchain_vllm.launcher import VLLMServerError
from langchain_vllm_server import _engine
from tests.emulated_gpu import GONE, emulated, make_model
from tests.integration_tests.conftest import MODEL
from tests.integration_tests.fakes import PROGRAM, eventually

if TYPE_CHECKING:
    from pathlib import Path

_command = VLLMServer._command


def emulated_command(self: VLLMServer, owners_fd: int) -> list[str]:
    """The launcher's own command line, for the same server on an emulated GPU."""
    command = _command(self, owners_fd)
    assert command[:3] == [sys.executable, *PROGRAM]
    return [sys.executable, "-m", "tests.emulated_gpu", *command[3:]]


@pytest.mark.skipif(_engine.cuda_problem() == "", reason="there is a GPU here")
def test_no_gpu_is_an_error_only_where_one_was_asked_for() -> None:
    with pytest.raises(VLLMServerError, match="ended before it was ready") as raised:
        VLLMServer(MODEL, device="cuda").start()
    assert f"error: {_engine.cuda_problem()}" in str(raised.value)
    with VLLMServer(MODEL, device="auto", max_model_len=256) as server:
        log = server.log_tail()
    assert f"the model runs on the CPU: {_engine.cuda_problem()}" in log
    assert " on cpu (" in log


def test_a_device_that_is_not_known() -> None:
    with pytest.raises(VLLMServerError, match=r"--device.*abacus"):
        VLLMServer(MODEL, device="abacus").start()


@emulated
@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_gpu_that_is_lost(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends and says why; the next call starts it again, on the CPU if the user left the choice."""
    monkeypatch.setattr(VLLMServer, "_command", emulated_command)
    gone = tmp_path / "gone"
    options: dict[str, Any] = {"device": device, "memory": "8MiB", "env": {GONE: str(gone)}}
    llm = VLLM(model=str(make_model(tmp_path / "model")), max_tokens=8, server_options=options)
    assert llm.invoke("a")
    server = llm.server
    assert server is not None
    assert server.pid is not None
    assert " on cuda (CUDA on CPU" in server.log_tail()
    gone.touch()
    os.kill(server.pid, signal.SIGUSR1)
    with pytest.raises(Exception, match=r"CUDA: .*start the server again") as raised:
        llm.invoke("b")
    assert eventually(lambda: not server.is_running)
    assert server.health().status == "stopped"
    assert "the engine has failed: CUDA: " in server.log_tail()
    assert "Traceback" not in server.log_tail() + str(raised.value)
    if device == "auto":
        assert llm.invoke("b")
        assert "the model runs on the CPU: no GPU is visible here" in server.log_tail()
    else:
        with pytest.raises(VLLMServerError, match="error: no GPU is visible here: look at nvidia-smi"):
            llm.invoke("b")
