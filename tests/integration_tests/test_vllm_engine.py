"""`engine="vllm"`, with a package of that name that stands for vLLM."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from langchain_vllm import ChatVLLM, VLLMServer, _shared
from langchain_vllm.launcher import VLLMServerError
from tests.integration_tests.fakes import ROOT, Program, alive, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

PATH = os.pathsep.join((str(Path(__file__).with_name("fake_vllm")), str(ROOT), str(ROOT / "server")))
WORKER = str(Path(__file__).with_name("fake_vllm") / "vllm/entrypoints/openai/api_server.py")


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", PATH)
    monkeypatch.setattr(_shared, "KEEP_ALIVE_SECONDS", 0.1)
    yield
    gc.collect()
    assert eventually(lambda: not workers())


def workers() -> list[int]:
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_worker(pid)]


def is_worker(pid: int) -> bool:
    try:
        return alive(pid) and WORKER in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return False


def processes(server: VLLMServer) -> list[int]:
    """Supervisor, server and worker."""
    found = dict(re.findall(r"^(server|worker) (\d+)$", server.log_tail(), re.MULTILINE))
    assert server.pid is not None
    return [server.pid, int(found["server"]), int(found["worker"])]


def test_options_become_flags_and_nothing_is_left() -> None:
    options: dict[str, Any] = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "ray",
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "speculative_config": {"num_speculative_tokens": 3},
    }
    with VLLMServer("org/model", engine="vllm", max_model_len=512, **options, extra_args=["-O0"]) as server:
        log = server.log_tail()
        ours = processes(server)
        assert all(map(alive, ours))
        assert str(ChatVLLM(base_url=server.base_url).invoke("Hello").content).endswith("Hello")
    assert "fake vllm: --model org/model --host 127.0.0.1 --port " in log
    assert "--max-model-len 512 --tensor-parallel-size 2 --distributed-executor-backend ray" in log
    assert '--no-enable-prefix-caching --enforce-eager --speculative-config {"num_speculative_tokens": 3}' in log
    assert log.splitlines()[0].endswith("-O0")
    assert not any(map(alive, ours))


def test_it_is_shared() -> None:
    with VLLMServer("m", engine="vllm") as first:
        with VLLMServer("m", engine="vllm") as second:
            assert first.base_url == second.base_url
        assert first.health().ready


@pytest.mark.parametrize("victim", [0, 1])
def test_whoever_is_killed_nothing_is_left(victim: int) -> None:
    with VLLMServer("m", engine="vllm") as server:
        ours = processes(server)
        os.kill(ours[victim], signal.SIGKILL)
        if victim == 0:  # vLLM ends its workers itself, when it is told to; this one does not
            assert eventually(lambda: not alive(ours[1]))
            os.kill(ours[2], signal.SIGKILL)
        assert eventually(lambda: not any(map(alive, ours)))
        assert eventually(lambda: not server.is_running)


def test_the_owner_is_killed() -> None:
    with Program("vllm") as owner:
        server = int(owner.read())
        owner.kill()
        assert eventually(lambda: not alive(server))


def test_a_server_that_does_not_end() -> None:
    with VLLMServer("deaf", engine="vllm") as server:
        ours = processes(server)
    assert not any(map(alive, ours))


def test_a_failed_start_says_why() -> None:
    with pytest.raises(VLLMServerError, match=r"ended before it was ready[^\0]*ValueError: no such model"):
        VLLMServer("crash", engine="vllm").start()


def test_its_log_is_progress() -> None:
    with VLLMServer("slow", engine="vllm", startup_timeout=2.0) as server:
        assert server.is_ready


def test_chat() -> None:
    chat = ChatVLLM(model="m", engine="vllm", server_options={"tensor_parallel_size": 2})
    assert str(chat.invoke("Hello").content).endswith("Hello")
    assert chat.server is not None
    assert "--tensor-parallel-size 2" in chat.server.log_tail()
    os.kill(processes(chat.server)[1], signal.SIGKILL)
    assert eventually(lambda: chat.server is not None and not chat.server.is_running)
    assert str(chat.invoke("Hello").content).endswith("Hello")


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ImportError, match=r"needs vLLM, which is not installed for .*: pip install vllm, pass python="):
        VLLMServer("m", engine="vllm").start()
    with pytest.raises(ImportError, match="'/no/python' can't be run"):
        VLLMServer("m", engine="vllm", python="/no/python").start()


def test_the_program_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text(
        f'#!/bin/sh\nshift\nPYTHONPATH={PATH} exec {sys.executable} -m vllm.entrypoints.openai.api_server "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with VLLMServer("m", engine="vllm") as server:
        assert "fake vllm" in server.log_tail()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "tgi"}, ValueError, "engine='tgi' must be"),
        ({"tensor_parallel_size": 2}, TypeError, "VLLMServer has no tensor_parallel_size"),
        ({"engine": "vllm", "threads": 2}, ValueError, "threads= is of the bundled engine"),
        (
            {"engine": "vllm", "device": "cuda"},
            ValueError,
            "device= is of the bundled .*CUDA_VISIBLE_DEVICES",
        ),
        ({"engine": "vllm", "memory": "1GiB"}, ValueError, "gpu_memory_utilization"),
        ({"python": sys.executable}, ValueError, 'python= is for engine="vllm"'),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VLLMServer("m", **options)
