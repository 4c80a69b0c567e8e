"""The command line, without servers."""

from __future__ import annotations

import builtins
import sys
from types import ModuleType
from typing import Any

import pytest

import langchain_vllm
from langchain_vllm import cli
from langchain_vllm._http import httpx
from tests.unit_tests.mock_server import MockServer, sse


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the user type these lines; an exception is raised in place of a line."""

    def say(*lines: str | BaseException) -> None:
        script = iter([*lines, EOFError()])

        def read(prompt: str = "") -> str:
            line = next(script)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)

    return say


@pytest.fixture
def server() -> MockServer:
    return MockServer({"/v1/chat/completions": (200, sse({"content": "Ci"}, {"content": "ao"}))})


def roles(server: MockServer) -> list[str]:
    return [message["role"] for message in server.body["messages"]]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"langchain-vllm {langchain_vllm.__version__}\n"


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert {"serve", "chat"} <= set(capsys.readouterr().out.split())


def test_serve_hands_everything_over(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    module = ModuleType("langchain_vllm_server.__main__")
    module.main = lambda argv: given.append(argv) or 3  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "langchain_vllm_server.__main__", module)
    assert cli.main(["serve", "m", "--port", "0", "--help"]) == 3
    assert given == [["m", "--port", "0", "--help"]]


def test_serve_without_its_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("langchain_vllm_server"):
            raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    assert cli.main(["serve"]) == 1
    assert 'needs uvicorn: pip install "langchain-vllm[server]"' in capsys.readouterr().err


def test_a_conversation(server: MockServer, say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    say("Hello", "  ", "Again", "/clear", "Anew", "/exit", "never said")
    cli._converse(server.chat(), "Be brief.")
    assert capsys.readouterr().out == "Ciao\n" * 3
    assert len(server.requests) == 3
    assert roles(server) == ["system", "user"]
    server.requests.pop()
    assert roles(server) == ["system", "user", "assistant", "user"]
    assert server.body["messages"][2]["content"] == "Ciao"


def test_interrupts_stop_the_answer_and_not_the_program(
    server: MockServer, say: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = server.chat()
    stream = type(chat).stream

    def interrupted(self: Any, messages: Any) -> Any:
        chunks = stream(self, messages)
        yield next(chunk for chunk in chunks if chunk.text)
        if len(server.requests) == 1:
            raise KeyboardInterrupt
        yield from chunks

    monkeypatch.setattr(type(chat), "stream", interrupted)
    say("Hello", KeyboardInterrupt(), "Again")
    cli._converse(chat, None)
    assert capsys.readouterr().out == "Ci\n\n(Ctrl-D or /exit ends the conversation)\nCiao\n"
    assert server.body["messages"][1] == {"role": "assistant", "content": "Ci"}


def test_an_error_ends_the_answer_only(server: MockServer, say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    say("Hello", "Again")
    answer = server.answers["/v1/chat/completions"]
    server.answers["/v1/chat/completions"] = httpx.ConnectError("Connection refused")
    chat = server.chat()
    assert cli._answer(chat, []) is None
    assert "langchain-vllm serve" in capsys.readouterr().err
    server.answers["/v1/chat/completions"] = answer
    cli._converse(chat, None)
    assert capsys.readouterr().out == "Ciao\nCiao\n"


def test_a_server_that_cannot_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(self: Any) -> None:
        raise langchain_vllm.launcher.VLLMServerError("no such model")  # type: ignore[attr-defined]

    monkeypatch.setattr(langchain_vllm.VLLMServer, "start", fail)
    assert cli.main(["chat", "nothing"]) == 1
    assert capsys.readouterr().err == "langchain-vllm: no such model\n"


def test_a_server_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, say: Any) -> None:
    say()
    monkeypatch.setenv("VLLM_BASE_URL", "http://vllm.test:8000/v1")
    monkeypatch.setattr(langchain_vllm.VLLMServer, "start", lambda self: pytest.fail("a server was started"))
    assert cli.main(["chat"]) == 0


def test_an_interrupted_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(langchain_vllm.VLLMServer, "start", interrupt)
    assert cli.main(["chat"]) == 130
