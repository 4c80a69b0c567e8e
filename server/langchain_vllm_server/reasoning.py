"""Reasoning in the text of an answer: how models mark it, and how it is bounded. Names: vLLM's --reasoning-parser."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

from langchain_vllm_server.constraint import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_vllm_server.constraint import Constraint
    from langchain_vllm_server.served_model import ServedModel
    from langchain_vllm_server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a family marks its reasoning.

    Attributes:
        names: vLLM's names of it, the first one ours.
        marks: Texts, one of which a chat template of this family has.
        opens: What begins reasoning.
        closes: What ends it.
        drops: Marks without a meaning of their own.
        assumed: Whether an answer begins within reasoning although neither it nor the prompt says so.
        anywhere: Whether reasoning may begin again later in an answer.
    """

    names: tuple[str, ...]
    marks: tuple[str, ...]
    opens: tuple[str, ...]
    closes: tuple[str, ...]
    drops: tuple[str, ...] = ()
    assumed: bool = False
    anywhere: bool = False

    def thinks(self, prompt: str) -> bool:
        """Whether an answer to this prompt begins within reasoning."""
        end = prompt.rstrip()
        return end.endswith(self.opens) or (self.assumed and not end.endswith(self.closes))

    def count(self, tokens: Sequence[int], tokenizer: Tokenizer, *, thinking: bool) -> int:
        """How many tokens of an answer are reasoning; of the opening mark the last one, the closing one whole."""
        text, inside = b"", thinking
        opens, closes = ([mark.encode() for mark in marks] for marks in (self.opens, self.closes))
        total = 0
        for token in tokens:
            text += tokenizer.token_bytes(token)
            begun = not inside and any(mark in text for mark in opens) and (self.anywhere or total == 0)
            if begun:
                inside, text = True, b""
            total += inside
            if inside and any(mark in text for mark in closes):
                inside, text = False, b""
        return total


THINK = ReasoningFormat(
    ("qwen3", "think", "glm45", "holo2", "hunyuan_a13b", "ernie45", "step3", "olmo3", "minimax_m2", "nemotron_v3"),
    ("<think>",),
    opens=("<think>",),
    closes=("</think>",),
)
DEEPSEEK_R1 = ReasoningFormat(
    ("deepseek_r1", "deepseek_v3", "deepseek_v4"), (), opens=("<think>",), closes=("</think>",), assumed=True
)
MISTRAL = ReasoningFormat(("mistral",), ("[THINK]",), opens=("[THINK]",), closes=("[/THINK]",))
GRANITE = ReasoningFormat(
    ("granite",),
    ("Here is my thought process:",),
    opens=("Here is my thought process:", "Here's my thought process:"),
    closes=("Here is my response:", "Here's my response:"),
)
GEMMA4 = ReasoningFormat(("gemma4", "gemma"), ("<|channel>",), opens=("<|channel>thought\n",), closes=("<channel|>",))
GPT_OSS = ReasoningFormat(
    ("openai_gptoss",),
    ("<|channel|>",),
    opens=("<|channel|>analysis<|message|>",),
    closes=("<|end|>",),
    drops=(
        *("<|channel|>final<|message|>", "<|channel|>commentary<|message|>"),
        *("<|start|>assistant", "<|end|>", "<|return|>"),
    ),
    anywhere=True,
)
FORMATS = (GPT_OSS, GEMMA4, MISTRAL, GRANITE, THINK, DEEPSEEK_R1)
BY_NAME = {name: each for each in reversed(FORMATS) for name in each.names}


def of_template(source: str | None) -> ReasoningFormat | None:
    """The format that a chat template shows; None for one without reasoning."""
    if source is None:
        return None
    return next((each for each in FORMATS if any(mark in source for mark in each.marks)), None)


class Thinking:
    """Reasoning first, of at most `budget` tokens, then what another constraint allows.

    Args:
        model: Whose tokens.
        reasoning: Its marks.
        thinking: Whether the prompt ended within reasoning; otherwise the answer may begin with an opening mark.
        budget: Tokens after which the reasoning is closed; None for any number.
        after: What holds from its end on; None for nothing.
    """

    def __init__(
        self,
        model: ServedModel,
        reasoning: ReasoningFormat,
        *,
        thinking: bool,
        budget: int | None,
        after: Constraint | None,
    ) -> None:
        self._model = model
        self._open = model.tokenizer.encode(reasoning.opens[0], False)
        self._close = model.tokenizer.encode(reasoning.closes[0], False)
        self._close_marks = [mark.encode() for mark in reasoning.closes]
        self._left = budget  # reasoning tokens
        self._after = after
        self._expected: list[int] = []  # of a closing mark that has begun: its rest
        self._at_start = not thinking  # the answer may still turn out to begin with an opening mark,
        self._num_opened = 0  # of which it has so many tokens,
        self._instead: Constraint | None = None  # or else is this far in what `after` allows; None: cannot be
        self._thinking = thinking
        self._tail = b""  # the end of the reasoning

    def consume(self, tokens: Sequence[int]) -> None:
        """See `Constraint`."""
        for position, token in enumerate(tokens):
            if not self._at_start and not self._thinking:
                if self._after is not None:
                    self._after.consume(tokens[position:])
                return
            self._take(token)

    def _take(self, token: int) -> None:
        if self._expected:
            self._expected.pop(0)
            self._thinking = bool(self._expected)
        elif self._at_start:
            self._begin(token)
        else:
            self._reason(token)

    def _begin(self, token: int) -> None:
        """An opening mark of several tokens and what is allowed in its place may begin alike: `<`."""
        if token != self._open[self._num_opened]:
            self._at_start = False
            self._after = self._instead if self._num_opened else self._after
            if self._after is not None:
                self._after.consume([token])
            return
        self._num_opened += 1
        if self._num_opened == len(self._open):
            self._at_start, self._thinking, self._instead = False, True, None
            return
        if self._num_opened == 1 and self._after is not None:
            self._instead = self._after.fork()
        if self._instead is not None:
            try:
                self._instead.consume([token])
            except ConstraintError:
                self._instead = None

    def _reason(self, token: int) -> None:
        if self._left is not None:
            if self._left == 0:  # the first token of the closing mark that `forced` asked for
                self._expected = self._close[1:]
                self._thinking = bool(self._expected)
                return
            self._left -= 1
        self._tail = (self._tail + self._model.tokenizer.token_bytes(token))[-64:]
        if any(mark in self._tail for mark in self._close_marks):
            self._thinking = False

    def forced(self) -> list[int]:
        """See `Constraint`."""
        if self._expected:
            return list(self._expected)
        if self._thinking:
            return list(self._close) if self._left == 0 else []
        if self._after is None:
            return []
        if self._at_start:
            return self._open[self._num_opened :] if self._num_opened and self._instead is None else []
        return self._after.forced()

    def fill_mask(self, address: int) -> None:
        """See `Constraint`."""
        words = (self._model.vocab_size + 31) // 32
        if self._thinking or self._after is None:
            ctypes.memset(address, 0xFF, words * 4)
            return
        if not self._at_start:
            self._after.fill_mask(address)
            return
        instead = self._instead or self._after
        forced = instead.forced()[:1]
        if not forced:
            instead.fill_mask(address)
        mask = (ctypes.c_uint32 * words).from_address(address)
        for token in (self._open[self._num_opened], *forced):
            mask[token // 32] |= 1 << token % 32

    def fork(self) -> Thinking:
        """See `Constraint`."""
        copy = object.__new__(Thinking)
        copy.__dict__.update(self.__dict__)
        copy._expected = list(self._expected)
        copy._after = None if self._after is None else self._after.fork()
        copy._instead = None if self._instead is None else self._instead.fork()
        return copy
