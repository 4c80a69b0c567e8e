"""What may go wrong with a managed server, with the real one: each fault is told, and leaves nothing behind."""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from langchain_vllm import ChatVLLM, VLLMServer
from langchain_vllm.errors import VLLMServerCrashedError
from langchain_vllm.launcher import VLLMServerError
from tests.integration_tests.conftest import MODEL
from tests.integration_tests.fakes import ROOT, alive, descriptors, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTIONS = {"max_model_len": 512, "keep_alive": 0}


def children() -> set[int]:
    """The processes that this one has started and that have not ended."""
    found = set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == os.getpid() and alive(pid):
            found.add(pid)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()
    processes, before = children(), descriptors()
    yield
    gc.collect()
    assert eventually(lambda: children() <= processes)
    assert eventually(lambda: descriptors() <= before + 2)  # the clients' pools keep idle connections


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(VLLMServerError, match=f"127.0.0.1:{port} is in use by another program"):
            VLLMServer(MODEL, port=port).start()


def test_corrupt_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"GGUF" + os.urandom(4096))
    with pytest.raises(VLLMServerError, match=r"ended before it was ready[^\0]*model\.gguf"):
        VLLMServer(weights).start()


def test_a_full_disk_during_a_download(tmp_path: Path) -> None:
    """The hub's library in the place of which this one stands writes to the disk, and passes its errors on."""
    hub = tmp_path / "huggingface_hub"
    hub.mkdir()
    (hub / "__init__.py").write_text(
        f"def snapshot_download(*args, **options):\n    raise OSError({errno.ENOSPC}, 'No space left on device')\n"
    )
    (hub / "constants.py").write_text(f"HF_HUB_CACHE = {str(tmp_path)!r}\n")
    path = os.pathsep.join((str(tmp_path), str(ROOT / "server"), str(ROOT)))
    with pytest.raises(VLLMServerError, match=rf"no space is left in {re.escape(str(tmp_path))}.*--download-dir"):
        VLLMServer("org/model", env={"PYTHONPATH": path}).start()


def test_a_crash_during_an_answer() -> None:
    chat = ChatVLLM(model=MODEL, server_options=OPTIONS, max_tokens=400, temperature=0)
    answer = chat.stream("Count to a thousand.")
    next(answer)
    assert chat.server is not None
    first = chat.server.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    with pytest.raises(VLLMServerCrashedError, match="has ended"):
        list(answer)
    assert chat.invoke("Hello", max_tokens=4).content
    assert chat.server.pid != first


PROGRAM = f"""
import asyncio, sys
from langchain_vllm import ChatVLLM
chat = ChatVLLM(model={MODEL!r}, server_options={{"max_model_len": 512}}, max_tokens=4)
print(asyncio.run(chat.ainvoke("Hello")).content.splitlines()[:0], chat.server.pid, flush=True)
input()
"""


def test_programs_share_it_and_exit_without_close() -> None:
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    programs = [subprocess.Popen([sys.executable, "-c", PROGRAM], **options) for _ in range(3)]  # type: ignore[call-overload]
    try:
        pids = {int(program.stdout.readline().split()[-1]) for program in programs}
        assert len(pids) == 1
        for program in programs[1:]:
            program.communicate("\n", timeout=60)
            assert program.returncode == 0
        assert all(map(alive, pids))
        programs[0].communicate("\n", timeout=60)
        assert not any(map(alive, pids))
    finally:
        for program in programs:
            program.kill()
            program.communicate()
