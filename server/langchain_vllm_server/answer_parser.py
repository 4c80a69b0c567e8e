"""From the text of an answer to what it consists of: content, reasoning and tool calls.

One state machine for every family of models and for streams and whole answers alike: what it tells does not depend on
how the text is cut into pieces.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_vllm_server.reasoning import ReasoningFormat
    from langchain_vllm_server.tool_parsers import ToolFormat
    from langchain_vllm_server.tool_parsers.arguments import Scanner

Kind = Literal["content", "reasoning", "name", "arguments"]
Piece = tuple[Kind, str]
"""What is new: text, or the name of a call that begins here, or JSON text of the arguments of the last such call."""


class AnswerParser:
    """Reads one answer.

    Args:
        reasoning: How the model marks its reasoning; None if it has none.
        tools: How it spells calls; None if it cannot call.
        functions: The functions that it knows, with the JSON schema of their arguments.
        thinking: Whether the prompt ended within reasoning.
    """

    def __init__(
        self,
        reasoning: ReasoningFormat | None,
        tools: ToolFormat | None,
        functions: Mapping[str, Any] | None = None,
        *,
        thinking: bool = False,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._functions = functions or {}
        self._text = ""  # not understood yet
        self._step = self._reason if thinking else self._content
        self._shown = False  # whether content, not only white space, has been told
        self._after_call = False
        self._thought = thinking
        self._scanner: Scanner | None = None
        self._name = ""
        self._head_text = ""  # of the call that is read
        self._held = ""  # arguments that are told when they are whole
        self._any_arguments = False
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """What `text` adds, as far as it is certain."""
        self._text += text
        while self._step(final=False):
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        """What was held back: nothing follows."""
        while self._text and self._step(final=True):
            pass
        if self._held:
            self._tell("content", self._head_text + self._held)
            self._held = ""
        self._tell("content", self._text)
        self._text = ""
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _tell(self, kind: Kind, text: str) -> None:
        if not text:
            return
        if kind == "content":
            if self._after_call or (self._thought and not self._shown):  # white space around calls and reasoning
                text = text.lstrip()
                if not text:
                    return
            self._after_call = False
            self._shown = self._shown or not text.isspace()
        if self._pieces and self._pieces[-1][0] == kind and kind != "name":
            text = self._pieces.pop()[1] + text
        self._pieces.append((kind, text))

    # Each step takes something from the front of the text; false: more has to come first.

    def _reason(self, *, final: bool) -> bool:
        assert self._reasoning is not None
        at, mark = _first(self._text, self._reasoning.closes)
        if mark:
            self._tell("reasoning", self._text[:at])
            self._text = self._text[at + len(mark) :]
            self._step = self._content
            return True
        certain = len(self._text) - (0 if final else _begun(self._text, self._reasoning.closes))
        self._tell("reasoning", self._text[:certain])
        self._text = self._text[certain:]
        return False

    def _content(self, *, final: bool) -> bool:
        at, mark = _first(self._text, self._marks())
        certain = len(self._text) - (0 if final else _begun(self._text, self._marks()))
        if not mark or certain <= at:  # none, or one that begins no later may still come
            self._tell("content", self._text[:certain])
            self._text = self._text[certain:]
            return False
        self._tell("content", self._text[:at])
        self._text = self._text[at:]
        if mark not in self._marks():  # content has just been shown, so that it can't begin here any more
            return True
        if self._tools is not None and mark in self._tools.triggers:
            return self._call(self._tools.head, final=final, otherwise=len(mark))
        self._text = self._text[len(mark) :]
        if self._reasoning is not None and mark in self._reasoning.opens:
            self._thought = True
            self._step = self._reason
        return True

    def _marks(self) -> tuple[str, ...]:
        """What means something at this place."""
        marks: tuple[str, ...] = ()
        if self._reasoning is not None:
            marks += self._reasoning.drops
            if self._reasoning.anywhere or not self._shown:
                marks += self._reasoning.opens
        if self._tools is not None and (not self._tools.leading or not self._shown):
            marks += self._tools.triggers
        if self._tools is not None and self._after_call:
            marks += self._tools.closers
        return marks

    def _call(self, head: str, *, final: bool, otherwise: int) -> bool:
        """Begin a call if `head` matches; else pass `otherwise` characters on as content."""
        found = _pattern(head).match(self._text, partial=not final)
        if found is not None and found.partial:
            return False
        if found is None or not self._knows(found["name"].strip()):
            self._tell("content", self._text[:otherwise])
            self._text = self._text[otherwise:]
            return True
        self._begin(found["name"].strip(), found.end())
        return True

    def _knows(self, name: str) -> bool:
        """A text that happens to look like a call is one only if it names a function; a marked call always is."""
        return self._tools is not None and (not self._tools.leading or name in self._functions)

    def _begin(self, name: str, end: int) -> None:
        assert self._tools is not None
        self._name, self._head_text = name, self._text[:end]
        self._text = self._text[end:]
        self._scanner = self._tools.arguments.scanner()
        self._held, self._any_arguments = "", False
        self._step = self._arguments
        if self._tools.arguments.streams:
            self._tell("name", name)

    def _arguments(self, *, final: bool) -> bool:
        assert self._tools is not None
        assert self._scanner is not None
        if not self._any_arguments:
            self._text = self._text.lstrip()
        if not self._text:
            return False
        end = self._scanner.feed(self._text)
        text, self._text = (self._text, "") if end is None else (self._text[:end], self._text[end:])
        self._any_arguments = True
        if self._tools.arguments.streams:
            self._tell("arguments", text or "{}")
        else:
            self._held += text
        if end is None:
            return False
        if not self._tools.arguments.streams:
            self._tell_whole_call()
        self._after_call = True
        self._step = self._tail
        return True

    def _tell_whole_call(self) -> None:
        assert self._tools is not None
        schema = self._functions.get(self._name)
        properties = schema.get("properties") if isinstance(schema, dict) else None
        arguments = self._tools.arguments.to_json(self._held, properties if isinstance(properties, dict) else {})
        if arguments is None:
            self._tell("content", self._head_text + self._held)
        else:
            self._tell("name", self._name)
            self._tell("arguments", arguments)
        self._held = ""

    def _tail(self, *, final: bool) -> bool:
        """After arguments: the next call of the list, or its end."""
        assert self._tools is not None
        for pattern in filter(None, (self._tools.more, self._tools.tail)):
            found = _pattern(pattern).match(self._text, partial=not final)
            if found is None:
                continue
            if found.partial:
                return False
            if pattern is self._tools.more:
                if not self._knows(found["name"].strip()):
                    continue
                self._begin(found["name"].strip(), found.end())
            else:
                self._text = self._text[found.end() :]
                self._step = self._content
            return True
        self._step = self._content
        return True


def _first(text: str, marks: tuple[str, ...]) -> tuple[int, str]:
    """Where the first mark begins, and which; of those at one place the longest. (-1, "") for none."""
    found = [(at, -len(mark), mark) for mark in marks if (at := text.find(mark)) >= 0]
    if not found:
        return -1, ""
    at, _, mark = min(found)
    return at, mark


def _begun(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which a mark begins, but does not end."""
    longest = max(map(len, marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        end = text[-length:]
        if any(len(mark) > length and mark.startswith(end) for mark in marks):
            return length
    return 0


@cache
def _pattern(source: str) -> Any:
    """Compiled by a library that can tell that a text may still come to match."""
    import regex

    return regex.compile(source)
