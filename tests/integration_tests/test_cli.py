"""The command line on the real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import urlopen

from tests.integration_tests.conftest import MODEL
from tests.integration_tests.fakes import eventually

if TYPE_CHECKING:
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


def test_ctrl_c_stops_the_answer_and_not_the_program(server: VLLMServer) -> None:
    command = [*COMMAND, "chat", "--base-url", server.base_url, MODEL, "--temperature", "0", "--max-tokens", "300"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("Write a very long story about a lighthouse.\n")
        chat.stdin.flush()
        assert os.read(chat.stdout.fileno(), 1)
        chat.send_signal(signal.SIGINT)
        rest, _ = chat.communicate("/exit\n", timeout=60)
    assert chat.returncode == 0
    assert len(rest) < 300  # 300 tokens are more than twice as many characters


def test_serve_says_where_it_is() -> None:
    read, write = os.pipe()
    command = [*COMMAND, "serve", MODEL, "--port", "0", "--max-model-len", "256", "--announce-fd", str(write)]
    with subprocess.Popen(command, pass_fds=(write,), stderr=subprocess.DEVNULL) as process:
        os.close(write)
        with open(read) as announcement:
            url = json.loads(announcement.readline())["url"]
        try:
            assert eventually(lambda: is_ready(url), seconds=60)
            with urlopen(f"{url}/version") as answer:
                assert json.load(answer)["version"]
        finally:
            process.terminate()
        assert process.wait(30) == 0
