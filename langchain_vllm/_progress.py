"""How far a start is, told to the user: on a terminal, in a notebook, or in a log."""

from __future__ import annotations

import importlib
import sys
import time
import uuid
from typing import Any, TextIO

_BAR = 20  # characters
_NOTEBOOK_DELAY = 0.2  # seconds: a cell keeps what was shown, and a quick start is not worth a line


class ProgressReport:
    """One line redrawn on a terminal or in a notebook; elsewhere a line per phase on stderr.

    Args:
        model: What is loaded.
        wanted: Whether to show anything; None: on a terminal and in a notebook.
        stream: In place of stderr.
    """

    def __init__(self, model: str, wanted: bool | None, stream: TextIO | None = None) -> None:
        self._model = model
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._notebook = None if stream or self._terminal else _notebook()
        self._wanted = self._terminal or self._notebook is not None if wanted is None else wanted
        self._phase: str | None = None
        self._begin = time.monotonic()
        self._display_id = ""

    def show(self, phase: str, progress: float) -> None:
        """Tell what is being done, and how much of that is done, 0 to 1."""
        if not self._wanted:
            return
        if self._terminal:
            self._write(f"\r\x1b[K{self._line(phase, progress)}")
        elif self._notebook is not None:
            if time.monotonic() - self._begin > _NOTEBOOK_DELAY:
                self._display(self._line(phase, progress))
        elif phase != self._phase:
            self._write(f"{self._model}: {phase}\n")
        self._phase = phase

    def close(self, ready: bool = False) -> None:
        """End with a clean line on a terminal, with the outcome in a notebook."""
        if self._terminal and self._phase is not None:
            self._write("\r\x1b[K")
        elif ready and self._display_id:
            self._display(f"{self._model}: ready in {time.monotonic() - self._begin:.1f} s")

    def _line(self, phase: str, progress: float) -> str:
        if not progress:
            return f"{self._model}: {phase}"
        done = round(progress * _BAR)
        return f"{self._model}: {phase} {progress:4.0%} {'█' * done}{'░' * (_BAR - done)}"

    def _display(self, text: str) -> None:
        update, self._display_id = bool(self._display_id), self._display_id or uuid.uuid4().hex
        show: Any = self._notebook
        show.display({"text/plain": text}, raw=True, display_id=self._display_id, update=update)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _notebook() -> Any:
    """IPython's display module, if this process is the kernel of a notebook; None otherwise."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return importlib.import_module("IPython.display") if getattr(shell, "kernel", None) is not None else None
