"""`python -m langchain_vllm_server.supervise`: a server of another engine, such as vLLM, that ends with its last owner.

Such a server knows of no owners, and has processes of its own. This one has the owners; it starts the server, and ends
it with all that it has started. It imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_vllm_server.errors import StartError
from langchain_vllm_server.owners import Owners

if TYPE_CHECKING:
    from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_GRACE_SECONDS = 7.0  # less than the launcher has with us
_KILL_SECONDS = 1.0


def main(argv: Sequence[str]) -> int:
    """Supervise a server; its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--owners-fd", type=int, required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", required=True, help="where the server will be")
    parser.add_argument("command", nargs="+", help="starts the server")
    args = parser.parse_args(argv)
    # Whoever loses its parent below us becomes our child, so that we can end it.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        return asyncio.run(_supervise(args))
    except (StartError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1


async def _supervise(args: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    about = {"url": args.url, "pid": os.getpid(), "model": args.model, "engine": args.engine, "started": time.time()}
    owners = Owners(args.owners_fd, about, stop=over.set, abandon=over.set)
    # Linux ties the signal to the thread that forks: it is the main one, which lives as long as this process.
    server = await asyncio.create_subprocess_exec(*args.command, start_new_session=True, preexec_fn=_end_with_parent)
    ended = asyncio.create_task(server.wait())
    asked = asyncio.create_task(over.wait())
    await asyncio.wait((ended, asked), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    owners.end()
    if not ended.done():
        server.terminate()
        await asyncio.wait((ended,), timeout=_GRACE_SECONDS)
    _end_descendants()
    return await ended


def _end_with_parent() -> None:
    """In the child: have the kernel end it, should the supervisor be killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _end_descendants() -> None:
    """Kill whatever is left below this process, in sessions of their own too."""
    deadline = time.monotonic() + _KILL_SECONDS
    while (children := _descendants(os.getpid())) and time.monotonic() < deadline:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def _descendants(pid: int) -> set[int]:
    """All below a process that have not ended."""
    parents: dict[int, int] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            state, parent, *_ = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            if state != "Z":
                parents[int(entry)] = int(parent)
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
