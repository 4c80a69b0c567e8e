"""The command `langchain-vllm`: serve a model, talk with one, look after managed servers."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from io import TextIOWrapper
from typing import TYPE_CHECKING

from langchain_vllm._running import running_servers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.messages import BaseMessage

    from langchain_vllm import ChatVLLM
    from langchain_vllm._running import RunningServer

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:  # with a parser of its own, which knows vLLM's flags
        return _serve(arguments[1:])
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"langchain-vllm: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:  # while a server starts
        return 130


def _parser() -> argparse.ArgumentParser:
    from langchain_vllm import __version__

    parser = argparse.ArgumentParser(prog="langchain-vllm", description="Serve language models, and talk with them.")
    parser.add_argument("--version", action="version", version=f"langchain-vllm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("serve", add_help=False, help="serve a model over HTTP (see langchain-vllm serve --help)")
    chat = commands.add_parser(
        "chat",
        help="talk with a model in the terminal",
        description="Talk with a model. Ctrl-C stops an answer, /clear begins anew, Ctrl-D or /exit ends the program.",
    )
    chat.add_argument("model", nargs="?", metavar="MODEL", help=f"as for serve; default {DEFAULT_MODEL}")
    chat.add_argument(
        "--base-url", metavar="URL", help="talk with the server there, and start none; also VLLM_BASE_URL"
    )
    chat.add_argument("--system", metavar="TEXT", help="a system message")
    chat.add_argument("--temperature", type=float, help="default: the server's")
    chat.add_argument("--max-tokens", type=int, help="longest answer, in tokens")
    chat.set_defaults(run=_chat)
    _add_server_commands(commands)
    return parser


def _add_server_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    ps = commands.add_parser("ps", help="list your managed servers")
    ps.set_defaults(run=_ps)
    logs = commands.add_parser("logs", help="show what a managed server wrote", description="Show the end of a log.")
    logs.add_argument("which", nargs="?", metavar="MODEL|PID", help="which server; by default all")
    logs.add_argument("-n", "--lines", type=int, default=100, help="how many lines, default 100")
    logs.set_defaults(run=_logs)
    stop = commands.add_parser(
        "stop",
        help="stop managed servers",
        description="Stop managed servers, also such as are in use: the next call of a program starts one again.",
    )
    stop.add_argument("which", nargs="?", metavar="MODEL|PID", help="the model's servers, or the one with that pid")
    stop.add_argument("--all", action="store_true", help="all of them")
    stop.set_defaults(run=_stop)


def _ps(_args: argparse.Namespace) -> int:
    row = "{:<32} {:>8} {:<28} {:>6} {:>9} {:<8} {}".format
    print(row("MODEL", "PID", "ADDRESS", "AGE", "MEMORY", "ENGINE", "OWNERS"))  # noqa: T201
    for server in running_servers():
        age = f"{time.time() - server.started:.0f} s"
        owners = ",".join(map(str, server.owners)) or "-"
        memory = f"{server.memory() >> 20} MiB"
        print(row(server.model, server.pid, server.url, age, memory, server.engine, owners))  # noqa: T201
    return 0


def _logs(args: argparse.Namespace) -> int:
    found = 0
    for server in running_servers():
        if _is_meant(server, args.which):
            found += 1
            print(f"==> {server.model}, pid {server.pid}", file=sys.stderr)  # noqa: T201
            print(server.log_tail(args.lines))  # noqa: T201
    return _unless_none(found, args.which)


def _stop(args: argparse.Namespace) -> int:
    if (args.which is None) != args.all:
        print("langchain-vllm stop: name a model or a pid (see langchain-vllm ps), or say --all", file=sys.stderr)  # noqa: T201
        return 2
    found = 0
    for server in running_servers():
        if _is_meant(server, args.which):
            found += 1
            ended = "stopped" if server.stop() else "could not stop"
            print(f"{ended} {server.model}, pid {server.pid}")  # noqa: T201
    return 0 if args.all else _unless_none(found, args.which)


def _is_meant(server: RunningServer, which: str | None) -> bool:
    return which in (None, server.model, str(server.pid))


def _unless_none(found: int, which: str | None) -> int:
    if found:
        return 0
    what = "No managed server runs." if which is None else f"No managed server of yours has the model or pid {which!r}."
    print(what, file=sys.stderr)  # noqa: T201
    return 1


def _serve(arguments: list[str]) -> int:
    try:
        from langchain_vllm_server.__main__ import main as serve
    except ModuleNotFoundError as error:
        print(f'langchain-vllm serve needs {error.name}: pip install "langchain-vllm[server]"', file=sys.stderr)  # noqa: T201
        return 1
    return int(serve(arguments) or 0)


def _chat(args: argparse.Namespace) -> int:
    from langchain_vllm import ChatVLLM, VLLMServer
    from langchain_vllm._connection import base_url_from_env

    with ExitStack() as stack:
        base_url = args.base_url or base_url_from_env()
        model = args.model or ("" if base_url else DEFAULT_MODEL)
        if base_url is None:
            base_url = stack.enter_context(VLLMServer(model)).base_url
        llm = ChatVLLM(base_url=base_url, model=model, temperature=args.temperature, max_tokens=args.max_tokens)
        _converse(llm, args.system)
    return 0


def _converse(llm: ChatVLLM, system: str | None) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage

    beginning: list[BaseMessage] = [SystemMessage(system)] if system else []
    history = list(beginning)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte must not end the conversation
    while (text := _read()) is not None and text != "/exit":
        if text == "/clear":
            history = list(beginning)
        elif text:
            question = HumanMessage(text)
            answer = _answer(llm, [*history, question])
            history += [question, answer] if answer else []


def _read() -> str | None:
    """A line from the user without surrounding blanks; None at the end."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends the conversation)")  # noqa: T201


def _answer(llm: ChatVLLM, messages: list[BaseMessage]) -> BaseMessage | None:
    """Print the answer as it comes; None if there is none. One that Ctrl-C stopped counts as far as it got."""
    import openai

    answer: BaseMessage | None = None
    try:
        for chunk in llm.stream(messages):
            print(chunk.text, end="", flush=True)  # noqa: T201
            answer = chunk if answer is None else answer + chunk  # type: ignore[assignment]
    except KeyboardInterrupt:
        pass
    except openai.OpenAIError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return None
    print()  # noqa: T201
    return answer


if __name__ == "__main__":
    sys.exit(main())
