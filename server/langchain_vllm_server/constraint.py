"""Constraints: which tokens may come next in an answer, worked out while the engine computes.

The engine asks before each step what its constrained rows need to know (`csrc/engine/masks.h`); one thread answers. It
waits with the GIL released, and so does the work of a grammar, so neither the engine nor the event loop waits for it.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_vllm_server._engine import Engine

logger = logging.getLogger(__name__)


class ConstraintError(Exception):
    """A constraint cannot go on; the message says why. It ends its own request, nobody else's."""


class Constraint(Protocol):
    """What one answer may say. Used by one thread at a time; any exception ends the request with an error."""

    def consume(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that were appended to the answer."""

    def forced(self) -> list[int]:
        """Tokens that must come next, whatever the model wants; often none. An end-of-sequence token ends all."""

    def fill_mask(self, address: int) -> None:
        """Set the bit of each token that may come next, at least one: bit i % 32 of the uint32 at i // 32.

        There are (vocab_size + 31) // 32 words, all 0. Asked only when nothing is forced.
        """

    def fork(self) -> Constraint:
        """One in the same state that goes its own way."""


class MaskThread:
    """Answers the engine about the constraints of its requests. Runs from the first one on, until the engine stops."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._constraints: dict[int, Constraint] = {}
        self._thread: threading.Thread | None = None

    def add(self, request_id: int, constraint: Constraint) -> None:
        """Tell of a request before it is submitted."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="masks", daemon=True)
            self._thread.start()
        self._constraints[request_id] = constraint

    def remove(self, request_id: int) -> None:
        """Forget a request; one that nobody knows is no error."""
        self._constraints.pop(request_id, None)

    def _run(self) -> None:
        while (demands := self._engine.wait_masks()) is not None:
            self._engine.answer_masks([self._answer(*demand) for demand in demands])

    def _answer(self, request_id: int, tokens: list[int], address: int) -> tuple[list[int], str]:
        """The tokens that are forced, or why the request cannot go on, or neither and a mask."""
        try:
            constraint = self._constraints[request_id]
        except KeyError:
            return [], "the request was cancelled"
        try:
            if tokens:
                constraint.consume(tokens)
            forced = constraint.forced()
            if not forced:
                constraint.fill_mask(address)
        except ConstraintError as error:
            return [], str(error)
        except BaseException as error:  # whatever it is, the engine waits for an answer
            logger.exception("a constraint failed")
            return [], f"the constraint failed: {type(error).__name__}: {error}"
        else:
            return forced, ""
