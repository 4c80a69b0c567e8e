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
    """The server ends and says why; the next call starts it again, on a GPU: the choice was made."""
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
    for _ in range(2):
        with pytest.raises(VLLMServerError, match="error: no GPU is visible here: look at nvidia-smi") as failed:
            llm.invoke("b")
        assert 'to go on without it, ask for device="cpu"' in str(failed.value)
    asked = VLLM(model=llm.model, max_tokens=8, server_options={**options, "device": "cpu"})
    assert asked.invoke("b")
    gone.unlink()
    assert llm.invoke("b")
    assert " on cuda (CUDA on CPU" in server.log_tail()


@emulated
@pytest.mark.parametrize("spelled", [{"device": "auto"}, {}, {"extra_args": ["--device", "auto"]}], ids=str)
def test_auto_chooses_once(spelled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each object: one whose model was on a GPU has no share in a server that another has on the CPU."""
    monkeypatch.setattr(VLLMServer, "_command", emulated_command)
    gone = tmp_path / "gone"
    options: dict[str, Any] = {"memory": "8MiB", "env": {GONE: str(gone)}, **spelled}
    first, second = (VLLMServer(make_model(tmp_path / "model"), **options) for _ in range(2))
    first.start()
    assert first.health().device == "cuda"
    first.stop()
    gone.touch()
    with second:
        assert second.health().device == "cpu"
        with pytest.raises(VLLMServerError, match=r'runs on the CPU, .* ask for device="cpu"'):
            first.start()
        assert not first.is_running
    with pytest.raises(VLLMServerError, match=r"no GPU is visible here"):
        first.start()
    gone.unlink()
    with first, second:
        assert (first.pid, first.health().device) == (second.pid, "cuda"), "a CPU was no wish"
