"""Grammars: what an answer may be, as text, and the constraints that llguidance compiles from it.

A grammar is either JSON Schema, a regular expression or Lark (llguidance's dialect, with `%json {…}` inside; its
syntax: guidance-ai/llguidance docs/syntax.md). llguidance refuses what it cannot enforce, and what it accepts holds for
every answer that ends by itself.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from langchain_vllm_server.constraint import Constraint, ConstraintError
from langchain_vllm_server.errors import BadRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llguidance import LLMatcher, LLTokenizer

    from langchain_vllm_server.served_model import ServedModel

__all__ = ["Constraint", "ConstraintError", "Grammar", "GrammarCompiler", "compile"]

MAX_GRAMMAR_BYTES = 1 << 18
COMPILE_SECONDS = 10.0
_CACHED_GRAMMARS = 64
_MAX_LEXER_STATES = 100_000  # of a grammar, 1 to 2 kB each; they are found as answers need them
_MAX_MESSAGE = 500  # characters of llguidance's explanation that an answer repeats
_NO_TEXT = "no text satisfies it"
_DEAD_ENDS = frozenset({"NoExtension", "NoExtensionBias"})  # llguidance's stop reasons

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Grammar:
    """The source of a constraint.

    Attributes:
        source: JSON text of llguidance's list of grammars, the first of which is where an answer starts.
        narrower: One that allows less of the same, and is taken where any text satisfies it.
        locate: Says which part of the source an error of llguidance is about.
    """

    source: str
    narrower: str | None = None
    locate: Callable[[str], str] | None = field(default=None, compare=False)

    @classmethod
    def from_lark(cls, text: str) -> Grammar:
        """A grammar in llguidance's Lark; it begins at the rule `start`."""
        return cls(_grammars({"lark_grammar": text}))

    @classmethod
    def from_json_schema(
        cls,
        schema: dict[str, Any],
        narrower: dict[str, Any] | None = None,
        locate: Callable[[str], str] | None = None,
    ) -> Grammar:
        """JSON that is valid under a schema; `x-guidance` in it says how it is spelled (see json_schema.py)."""
        narrow = None if narrower is None else _grammars({"json_schema": narrower})
        return cls(_grammars({"json_schema": schema}), narrow, locate)

    @classmethod
    def from_regex(cls, pattern: str) -> Grammar:
        """A text that a regular expression matches from its beginning to its end (Rust's syntax, no look-around)."""
        return cls.from_lark("start: " + lark_regex(pattern))

    @classmethod
    def from_choice(cls, choices: Sequence[str]) -> Grammar:
        """One of some texts."""
        # A terminal, not a rule: the lexer takes thousands of alternatives, the parser a limited number.
        return cls.from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(lark_string, choices)))

    def within(self, lark: str) -> Grammar:
        """A grammar in Lark in which `@answer` stands for this one: what comes before and after it."""
        outer = {"lark_grammar": lark}
        narrower = self.narrower and _grammars(outer, *_named(self.narrower))
        return Grammar(_grammars(outer, *_named(self.source)), narrower, self.locate)


def lark_string(text: str) -> str:
    """A text as Lark spells it."""
    return _text(text)


def lark_regex(pattern: str) -> str:
    """A regular expression as Lark spells it."""
    escaped = re.sub(r"\\(.)|(/)", lambda found: found[0] if found[1] else r"\/", pattern, flags=re.DOTALL)
    return f"/{escaped}/".replace("\n", r"\n")


async def compile(grammar: Grammar, model: ServedModel, param: str) -> Constraint:  # noqa: A001
    """The constraint of a grammar, at its beginning; kept for the next request that asks for the same.

    Args:
        grammar: What an answer may be.
        model: Whose tokens.
        param: The field that an error names.

    Raises:
        BadRequestError: The grammar is wrong, cannot be enforced, or is too large.
    """
    return await model.compiler.compile(grammar, model, param)


class GrammarCompiler:
    """Compiles grammars for the tokens of one model, beside the event loop, and keeps the last ones."""

    def __init__(self) -> None:
        self._tokenizer: LLTokenizer | None = None
        self._cache: OrderedDict[Grammar, MatcherConstraint] = OrderedDict()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    async def compile(self, grammar: Grammar, model: ServedModel, param: str) -> Constraint:
        """See `compile`."""
        found = self._cache.get(grammar)
        if found is None:
            found = await self._compile(grammar, model, param)
            self._cache[grammar] = found
            if len(self._cache) > _CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(grammar)
        return found.fork()

    async def _compile(self, grammar: Grammar, model: ServedModel, param: str) -> MatcherConstraint:
        if len(grammar.source) > MAX_GRAMMAR_BYTES:
            raise BadRequestError(
                f"{param}: the grammar has {len(grammar.source)} bytes; at most {MAX_GRAMMAR_BYTES} are compiled.",
                param,
            )
        loop = asyncio.get_running_loop()
        try:
            tokenizer = await loop.run_in_executor(self._executor, self._read_tokens, model)
            async with asyncio.timeout(COMPILE_SECONDS):
                return await loop.run_in_executor(self._executor, _build, tokenizer, grammar)
        except TimeoutError:
            raise BadRequestError(
                f"{param}: the grammar takes longer than {COMPILE_SECONDS:.0f} s to compile; make it smaller.", param
            ) from None
        except ConstraintError as error:
            where = "" if grammar.locate is None else grammar.locate(str(error)) + ": "
            raise BadRequestError(f"{param}: {where}{error}", param) from None

    def _read_tokens(self, model: ServedModel) -> LLTokenizer:
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(model)
        return self._tokenizer


def _build(tokenizer: LLTokenizer, grammar: Grammar) -> MatcherConstraint:
    whole = MatcherConstraint.start(tokenizer, grammar.source)
    if grammar.narrower is None:
        return whole
    try:
        return MatcherConstraint.start(tokenizer, grammar.narrower)
    except ConstraintError:
        return whole


class MatcherConstraint:
    """A grammar and how far an answer has come in it."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer

    @classmethod
    def start(cls, tokenizer: LLTokenizer, source: str) -> MatcherConstraint:
        """At the beginning. Raises ConstraintError for a grammar that is wrong or that no text satisfies."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
        constraint = cls(matcher, tokenizer)
        constraint._check()
        if warnings := matcher.get_grammar_warnings():
            raise ConstraintError("; ".join(warnings)[:_MAX_MESSAGE])
        trial = constraint.fork()
        trial._matcher.compute_bitmask()  # what it finds out about the grammar's beginning is shared by all forks
        trial._check()
        trial.forced()
        return constraint

    def consume(self, tokens: Sequence[int]) -> None:
        if not self._matcher.consume_tokens(list(tokens)):
            self._check()

    def forced(self) -> list[int]:
        if self._matcher.is_stopped():
            self._check()
            if not self._matcher.is_accepting():
                raise ConstraintError(_NO_TEXT)
            return [self._tokenizer.eos_token]
        return self._matcher.compute_ff_tokens()

    def fill_mask(self, address: int) -> None:
        self._matcher.unsafe_compute_mask_ptr(address, (self._tokenizer.vocab_size + 31) // 32 * 4)
        self._check()

    def fork(self) -> MatcherConstraint:
        return MatcherConstraint(self._matcher.deep_copy(), self._tokenizer)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("<state>")[0].removesuffix("<non-verbose/>").strip()
            raise ConstraintError(_NO_TEXT if reason in _DEAD_ENDS else reason[:_MAX_MESSAGE])


def _tokenizer(model: ServedModel) -> LLTokenizer:
    """The model's tokens as llguidance sees them; takes about a second for a large vocabulary."""
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise ConstraintError("structured outputs need llguidance: pip install 'langchain-vllm[server]'") from None
    if not model.eos_token_ids:
        raise ConstraintError("the model has no end-of-sequence token, so nothing could end a constrained answer")
    try:
        return LLTokenizer(model.tokenizer.to_json(), n_vocab=model.vocab_size, eos_token=list(model.eos_token_ids))
    except ValueError as error:
        raise ConstraintError(f"structured outputs do not work with this model's tokenizer: {error}") from None


def _grammars(*grammars: dict[str, Any]) -> str:
    return _text({"grammars": grammars})


def _named(source: str) -> list[dict[str, Any]]:
    first, *rest = msgspec.json.decode(source)["grammars"]
    return [{**first, "name": "answer"}, *rest]


def _text(value: Any) -> str:
    return _encode(value).decode()
