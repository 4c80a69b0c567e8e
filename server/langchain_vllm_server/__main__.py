"""`python -m langchain_vllm_server`: what `langchain-vllm serve` runs."""

from __future__ import annotations

import gc
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType


def main(argv: Sequence[str]) -> int:
    """Serve a model; the process's exit code. Errors are one line on stderr."""
    gc.disable()  # until the server is ready (serve.py): what is made before stays, so there is no garbage to find
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    from langchain_vllm_server.errors import StartError
    from langchain_vllm_server.listen import listen
    from langchain_vllm_server.settings import parse_settings

    settings = parse_settings(argv)
    try:
        listener = listen(settings)
        from langchain_vllm_server.serve import serve

        return serve(settings, listener)
    except (StartError, ValueError, MemoryError, OSError) as error:
        print(f"error: {error or 'out of memory'}", file=sys.stderr)  # noqa: T201
        return 1


def _leave(number: int, _frame: FrameType | None) -> None:
    """Until the event loop takes over: there is nothing to clean up."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
