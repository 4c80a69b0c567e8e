"""`ChatVLLM.profile`: what the model can do. What only the server knows is asked for when somebody wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_KNOWN = {
    "text_inputs": True,
    "text_outputs": True,
    "tool_calling": True,
    "tool_choice": True,
    "tool_call_streaming": True,
    "structured_output": True,
    "temperature": True,
}
"""What vLLM gives to every model: the last but one makes `create_agent` use `response_format`, not an extra tool."""

_SERVERS = frozenset({"max_input_tokens", "max_output_tokens"})


class LiveProfile(dict[str, Any]):
    """A `ModelProfile` whose context length comes from the server, when it is first looked up."""

    def __init__(self, max_model_len: Callable[[], int | None]) -> None:
        super().__init__(_KNOWN)
        self._max_model_len: Callable[[], int | None] | None = max_model_len

    def _ask(self, key: object) -> None:
        if key in _SERVERS and self._max_model_len is not None:
            length = self._max_model_len()
            self._max_model_len = None
            if length is not None:
                self.update(dict.fromkeys(_SERVERS, length))

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dictionary."""
        self._ask(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._ask(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._ask(key)
        return super().__contains__(key)
