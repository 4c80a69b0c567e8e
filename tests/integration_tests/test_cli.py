"""The command line on the real server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import urlopen

from tests.integration_tests.conftest import MODEL
from tests.integration_tests.fakes import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_vllm import VLLMServer

COMMAND = [sys.executable, "-m", "langchain_vllm.cli"]


def is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/health") as answer:
            return bool(answer.status == 200)
    except HTTPError:
        return False


def test_chat_starts_a_server_and_takes_piped_lines() -> None:
    command = [*COMMAND, "chat", "--temperature", "0", "--max-tokens", "8", "--system", "Be brief."]
    run = subprocess.run(command, input="Hello\nAnd again\n", capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) >= 2
    assert run.stderr == ""


def test_chat_survives_a_stray_byte(server: VLLMServer) -> None:
    command = [*COMMAND, "chat", "--base-url", server.base_url, MODEL, "--temperature", "0", "--max-tokens", "4"]
    run = subprocess.run(command, input=b"caf\xe9\nHello\n", capture_output=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, b"")
    assert len(run.stdout.splitlines()) >= 2


def aborted_requests(server: VLLMServer) -> float:
    with urlopen(server.base_url.replace("/v1", "/metrics")) as answer:
        text = answer.read().decode()
    found = re.search(r'^vllm:request_success_total\{finished_reason="abort".*\} (\S+)$', text, re.MULTILINE)
    assert found
    return float(found[1])


def heed_interrupts() -> None:
    """What a shell runs in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_stops_the_answer_and_not_the_program(server: VLLMServer) -> None:
    before = aborted_requests(server)
    command = [*COMMAND, "chat", "--base-url", server.base_url, MODEL, "--temperature", "0", "--max-tokens", "1900"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("Write a very long story about a lighthouse.\n")
        chat.stdin.flush()
        assert os.read(chat.stdout.fileno(), 1)
        chat.send_signal(signal.SIGINT)
        chat.communicate("/exit\n", timeout=60)
    assert chat.returncode == 0
    assert eventually(lambda: aborted_requests(server) > before, seconds=10)


def test_serve_says_where_it_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [*COMMAND, "serve", MODEL, "--port", "0", "--max-model-len", "256"]
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            assert eventually(lambda: "listening on " in log.read_text(), seconds=60)
            (url,) = re.findall(r"listening on (\S+), loading", log.read_text())
            assert eventually(lambda: is_ready(url), seconds=60)
            with urlopen(f"{url}/version") as answer:
                assert json.load(answer)["version"]
        finally:
            process.terminate()
        assert process.wait(30) == 0
