"""The server process under load, behind proxies, and with clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.test_serve import ENDLESS, Process, server

PATH = "/v1/completions"


def head(body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {size}\r\n\r\n"
    ).encode() + body


def connect(process: Process) -> socket.socket:
    url = httpx.URL(process.about["url"])
    assert url.port is not None
    return socket.create_connection((url.host, url.port), timeout=10)


def resident(process: Process) -> int:
    pages = Path(f"/proc/{process.popen.pid}/statm").read_text().split()[1]
    return int(pages) * 4096


def log_of(process: Process) -> str:
    process.popen.terminate()
    code, errors = process.end()
    assert (code, "Traceback" in errors) == (0, False), errors
    return errors


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", key, "-out", cert]
    subprocess.run(
        [*command, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True
    )
    return key, cert


def test_tls(certificate: tuple[str, str]) -> None:
    key, cert = certificate
    with server("load=0", "--port", "0", "--ssl-keyfile", key, "--ssl-certfile", cert) as process:
        assert process.about["url"].startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=cert)
        with httpx.Client(base_url=process.about["url"], verify=context) as client:
            while client.get("/health").status_code != 200:
                time.sleep(0.01)
            assert client.post(PATH, json={"prompt": "Hi", "max_tokens": 2}).json()["choices"][0]["text"] == "xx"


def test_a_bad_certificate_is_one_line(tmp_path: Path) -> None:
    with server("load=0", "--port", "0", "--ssl-certfile", str(tmp_path / "none.pem")) as process:
        code, errors = process.end()
    assert (code, len(errors.splitlines())) == (1, 1)
    assert "cannot serve TLS with" in errors


def test_keys_guard_every_route_but_health() -> None:
    with server("load=0", "--port", "0", "--api-key", "one", "two", "--root-path", "/llm") as process:
        process.wait_ready()
        get = process.client.get
        for path in ("/v1/models", "/metrics", "/version", "/nowhere", "/health/", "/llm/v1/models"):
            answer = get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, 401), path
        for path in ("/health", "/ping", "/llm/health"):
            assert get(path).status_code == 200
        for key in ("one", "two"):
            assert get("/llm/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert get("/v1/models", headers={"authorization": "Bearer three"}).status_code == 401


def test_cors_request_ids_and_middlewares() -> None:
    flags = ["--allowed-origins", '["https://a.example"]', "--allow-credentials", "--enable-request-id-headers"]
    flags += [
        "--middleware",
        "tests.server.middlewares.Tag",
        "--middleware",
        "tests.server.middlewares.tag",
        "--api-key",
        "k",
    ]
    with server("load=0", "--port", "0", *flags) as process:
        process.wait_ready()
        ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
        preflight = process.client.options(PATH, headers=ask)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        assert preflight.headers["access-control-allow-credentials"] == "true"
        other = process.client.options(PATH, headers={**ask, "origin": "https://b.example"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
        refused = process.client.get("/v1/models", headers={**ask, "x-request-id": "mine"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
        assert refused.headers["x-request-id"] == "mine"
        answer = process.client.get("/v1/models", headers={"authorization": "Bearer k"})
        assert len(answer.headers["x-request-id"]) == 32
        assert (answer.headers["x-class"], answer.headers["x-function"]) == ("yes", "yes")


def test_a_middleware_that_is_not_there_is_one_line() -> None:
    with server("load=0", "--port", "0", "--middleware", "tests.server.middlewares.Nobody") as process:
        code, errors = process.end()
    assert (code, len(errors.splitlines())) == (1, 1)
    assert "--middleware tests.server.middlewares.Nobody" in errors


def test_a_full_queue_refuses_and_says_how_long_it_is() -> None:
    with server("step=0.01,length=4000", "--port", "0", "--max-num-queued-reqs", "2") as process:
        process.wait_ready()
        with (
            process.client.stream("POST", PATH, json=ENDLESS) as first,
            process.client.stream("POST", PATH, json=ENDLESS) as second,
        ):
            lines = [first.iter_lines(), second.iter_lines()]  # one that is let go hangs up
            assert all(next(line) for line in lines)
            refused = process.client.post(PATH, json={"prompt": "Hi"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert "2 sequences are in flight" in refused.json()["error"]["message"]
        page = process.client.get("/metrics").text
        assert 'admission_rejections_total{reason="queued_reqs",engine="0",model_name="tiny"} 1.0' in page
        while process.client.post(PATH, json={"prompt": "Hi", "max_tokens": 1}).status_code != 200:
            time.sleep(0.01)


def test_waiting_prompts_fill_the_queue() -> None:
    with server("step=0.5,length=4000", "--port", "0", "--max-num-queued-tokens", "10") as process:
        process.wait_ready()
        with process.client.stream("POST", PATH, json={**ENDLESS, "prompt": "x" * 20}) as stream:
            refused = process.client.post(PATH, json={"prompt": "Hi"})
            assert refused.status_code == 503
            assert "20 prompt tokens" in refused.json()["error"]["message"]
            next(stream.iter_lines())
            with process.client.stream("POST", PATH, json=ENDLESS) as admitted:
                assert admitted.status_code == 200


def test_silent_streams_are_kept_alive() -> None:
    with server("step=0.3,length=4", "--port", "0", "--sse-keep-alive-interval", "0.05") as process:
        process.wait_ready()
        text = process.client.post(PATH, json={**ENDLESS, "max_tokens": 2}).text
        events = text.removesuffix("\n\n").split("\n\n")
        assert events.count(": keep-alive") > 2
        assert events[0] == ": keep-alive"
        assert events[-1] == "data: [DONE]"
        data = [json.loads(event[6:]) for event in events[:-1] if event != ": keep-alive"]
        assert "".join(chunk["choices"][0]["text"] for chunk in data if chunk["choices"]) == "xx"
        plain = process.client.post(PATH, json={"prompt": "Hi", "max_tokens": 2})
        assert b"keep-alive" not in plain.content


def test_a_draining_server_finishes_streams_and_takes_no_more() -> None:
    with server("step=0.02,length=4000", "--port", "0", "--shutdown-timeout", "30") as process:
        process.wait_ready()
        with process.client.stream("POST", PATH, json={**ENDLESS, "max_tokens": 100}) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.popen.terminate()
            while (health := process.client.get("/health")).status_code == 200:
                time.sleep(0.01)
            assert health.json() == {"status": "draining", "open_requests": 1}
            refused = process.client.post(PATH, json={"prompt": "Hi"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        code, errors = process.end()
        assert (code, "Traceback" in errors) == (0, False), errors


def test_a_second_signal_ends_at_once() -> None:
    with server("step=0.02,length=4000", "--port", "0", "--shutdown-timeout", "300") as process:
        process.wait_ready()
        with process.client.stream("POST", PATH, json=ENDLESS) as stream:
            lines = stream.iter_lines()  # let go, it would hang up
            next(lines)
            process.popen.terminate()
            while process.client.get("/health").status_code == 200:
                time.sleep(0.01)
            process.popen.terminate()
            code, errors = process.end(10)
        assert (code, "Traceback" in errors) == (0, False), errors


def test_a_stalled_reader_costs_no_memory_and_holds_up_nobody() -> None:
    with server("step=0.0005,length=4000", "--port", "0") as process:
        process.wait_ready()
        process.client.post(PATH, json={"prompt": "Hi", "max_tokens": 1000, "stream": True})
        before = resident(process)
        body = json.dumps({**ENDLESS, "max_tokens": 3500, "logprobs": 20}).encode()
        stalled = []
        for _ in range(8):
            connection = connect(process)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head(body))
            stalled.append(connection)
        for _ in range(5):
            answer = process.client.post(PATH, json={"prompt": "Hi", "max_tokens": 20}).json()
            assert answer["usage"]["completion_tokens"] == 20
        while "vllm:num_requests_running{" in (page := process.client.get("/metrics").text) and (
            'num_requests_running{engine="0",model_name="tiny"} 0.0' not in page
        ):
            time.sleep(0.05)
        # Formatted, the eight answers are tens of megabytes; as tokens that wait they are far less.
        assert resident(process) - before < 100 * 2**20
        for connection in stalled:
            connection.close()
        assert process.client.get("/health").status_code == 200


async def test_five_hundred_connections_at_the_same_time() -> None:
    with server("step=0.01,length=100", "--port", "0") as process:
        process.wait_ready()
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=process.about["url"], limits=limits, timeout=60) as client:
            body = {"prompt": "Hi", "max_tokens": 5, "stream": True}
            answers = await asyncio.gather(*(client.post(PATH, json=body) for _ in range(500)))
        assert {answer.status_code for answer in answers} == {200}
        assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
        log_of(process)


def test_bodies_that_stall_or_are_too_long() -> None:
    flags = ["--request-body-timeout", "0.2", "--max-request-body-size", "1000"]
    with server("load=0", "--port", "0", *flags) as process:
        process.wait_ready()
        with connect(process) as slow:
            slow.sendall(head(b'{"prompt":', 100))
            answer = slow.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 408")
            assert b'"RequestTimeoutError"' in answer
        long = process.client.post(PATH, json={"prompt": "x" * 1000})
        assert (long.status_code, long.json()["error"]["type"]) == (413, "RequestTooLargeError")
        with connect(process) as half:
            half.sendall(head(b'{"prompt":', 100))
            half.shutdown(socket.SHUT_WR)
            half.makefile("rb").read()
        assert process.client.post(PATH, json={"prompt": "Hi"}).status_code == 200
        log_of(process)


@pytest.mark.parametrize("junk", [b"", b"\x00" * 4000, b"GET", b"POST / HTTP/9.9\r\n\r\n", b"\xff\xfe\r\n\r\n"])
def test_bytes_that_are_no_request(junk: bytes) -> None:
    with server("load=0", "--port", "0") as process:
        process.wait_ready()
        with connect(process) as connection:
            connection.sendall(junk)
            connection.shutdown(socket.SHUT_WR)
        assert process.client.post(PATH, json={"prompt": "Hi"}).status_code == 200
        log_of(process)


def json_lines(errors: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in errors.splitlines()]


def test_json_logs_of_requests_and_answers() -> None:
    flags = ["--log-format", "json", "--enable-log-requests", "--enable-log-outputs", "--max-log-len", "60"]
    with server("load=0", "--port", "0", *flags, "--disable-access-log-for-endpoints", "/health,/metrics") as process:
        process.wait_ready()
        process.client.get("/metrics")
        ask = {"prompt": "first\nsecond" + "x" * 100, "max_tokens": 1}
        process.client.post(PATH, json=ask, headers={"x-request-id": "mine"})
        messages = [line["message"] for line in json_lines(log_of(process))]
    logged = [message for message in messages if "mine" in message]
    assert logged[0].startswith(f"request mine: POST {PATH} " + '{"prompt":"first\\nsecond')
    assert len(logged[0]) == len(f"request mine: POST {PATH} ") + 60
    assert logged[1].startswith("answer mine: 200 {")
    assert any(f"POST {PATH} HTTP/1.1" in message for message in messages)
    assert not any("/health" in message or "/metrics" in message for message in messages)


def test_nothing_is_logged_while_nothing_happens() -> None:
    with server("load=0", "--port", "0", "--disable-uvicorn-access-log") as process:
        process.wait_ready()
        process.client.post(PATH, json={"prompt": "secret"})
        errors = log_of(process)
    assert len(errors.splitlines()) == 2, errors  # listening, ready
    assert "secret" not in errors


def test_a_head_without_end_is_refused() -> None:
    with server("load=0", "--port", "0") as process:
        process.wait_ready()
        with connect(process) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nx: " + b"y" * 70_000)
            assert connection.makefile("rb").read().startswith(b"HTTP/1.1 431")
        with connect(process) as connection:  # a long body in the same packet as the head is none
            connection.sendall(head(json.dumps({"prompt": "x" * 3000, "max_tokens": 1}).encode()))
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
