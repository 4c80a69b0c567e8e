"""What a chat's answer consists of: how its text is read, and what constrains it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from langchain_vllm_server import structured
from langchain_vllm_server.answer_parser import AnswerParser
from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.reasoning import Thinking
from langchain_vllm_server.response_format import requested_grammar
from langchain_vllm_server.tools import call_id

if TYPE_CHECKING:
    from langchain_vllm_server.constraint import Constraint
    from langchain_vllm_server.generation import Choice, Delta
    from langchain_vllm_server.protocol import ChatCompletionRequest
    from langchain_vllm_server.served_model import ServedModel
    from langchain_vllm_server.tools import ToolUse


class AnswerForm:
    """The form of the answers to one request.

    Args:
        request: What was asked for. Special tokens are shown in its text where they mark reasoning or calls.
        model: Its marks.
        use: The tools, if any.
        prompt: The text that the answer continues.
    """

    def __init__(self, request: ChatCompletionRequest, model: ServedModel, use: ToolUse | None, prompt: str) -> None:
        self._request = request
        self._model = model
        self._use = use
        self._reasoning = model.reasoning_format
        self._thinking = self._reasoning is not None and self._reasoning.thinks(prompt)
        self.plain = use is None and self._reasoning is None
        self.forced = use is not None and use.choice != "auto"  # into calls
        if any(self._is_special(mark) for mark in self._marks):
            request.skip_special_tokens = False

    @cached_property
    def _marks(self) -> tuple[str, ...]:
        marks: tuple[str, ...] = ()
        if self._use is not None:
            marks += self._use.format.triggers + self._use.format.closers
        if self._reasoning is not None:
            marks += self._reasoning.opens + self._reasoning.closes
        return marks

    def _is_special(self, mark: str) -> bool:
        tokenizer = self._model.tokenizer
        ids = tokenizer.encode(mark, add_special_tokens=False)
        return any(tokenizer.is_special(token) for token in ids)

    def reader(self, choice: Choice) -> AnswerReader:
        """For one choice, from its beginning."""
        tools = self._use.format if self._use else None
        schemas = self._use.schemas if self._use else None
        parser = AnswerParser(self._reasoning, tools, schemas, thinking=self._thinking)
        return AnswerReader(parser, choice, self._request, self._model, self._use, thinking=self._thinking)

    async def constraint(self) -> Constraint | None:
        """What the answer is held to: its format or calls, after reasoning. Raises BadRequestError."""
        constraint = await self._compiled()
        budget = self._request.thinking_token_budget
        if budget is not None and budget < -1:
            name = "thinking_token_budget"
            raise BadRequestError(f"`{name}` must be at least 0, or -1 for any number, got {budget}.", name)
        budget = None if budget == -1 else budget
        if budget is not None and self._reasoning is None:
            raise BadRequestError(
                "`thinking_token_budget` needs a model that reasons: its chat template shows no reasoning; name its "
                "marks with --reasoning-parser.",
                "thinking_token_budget",
            )
        if (constraint is not None or budget is not None) and self._request.use_beam_search:
            wanted = requested_grammar(self._request, self._model.spelling)
            param = wanted[1] if wanted else "tools" if self._use else "thinking_token_budget"
            raise BadRequestError(f"`{param}` does not go together with `use_beam_search`; leave one out.", param)
        if self._reasoning is None or (constraint is None and budget is None):
            return constraint
        return Thinking(self._model, self._reasoning, thinking=self._thinking, budget=budget, after=constraint)

    async def _compiled(self) -> Constraint | None:
        wanted = requested_grammar(self._request, self._model.spelling)
        if self._use is None:
            return None if wanted is None else await structured.compile(*wanted[:1], self._model, wanted[1])
        text = wanted[0] if wanted else None
        try:
            grammar = self._use.grammar(self._model, text)
            return None if grammar is None else await structured.compile(grammar, self._model, "tools")
        except BadRequestError:
            if self._use.strict:
                raise
            grammar = self._use.relaxed().grammar(self._model, text)
            return None if grammar is None else await structured.compile(grammar, self._model, "tools")


class AnswerReader:
    """One choice as it grows: what is new in it, as the API tells it."""

    def __init__(
        self,
        parser: AnswerParser,
        choice: Choice,
        request: ChatCompletionRequest,
        model: ServedModel,
        use: ToolUse | None,
        *,
        thinking: bool,
    ) -> None:
        self.finish_reason: str | None = None
        self._parser = parser
        self._choice = choice
        self._shows_reasoning = request.include_reasoning
        self._both_names = model.reasoning_content
        self._model = model
        self._use = use
        self._thinking = thinking
        self._num_calls = 0
        self._tokens: list[int] = []

    def push(self, delta: Delta) -> dict[str, Any]:
        """The fields of the message that grow: content, reasoning, tool_calls; without those that do not."""
        pieces = self._parser.push(delta.text)
        reasons = self._model.reasoning_format
        if reasons is not None:
            self._tokens += delta.token_ids
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
            if reasons is not None:
                count = reasons.count(self._tokens, self._model.tokenizer, thinking=self._thinking)
                self._choice.num_reasoning_tokens = count
        news = self._told(pieces)
        called = self._num_calls > 0 and self._use is not None
        self.finish_reason = (
            self._use.finish_reason(delta.finish_reason) if called and self._use else delta.finish_reason
        )
        return news

    def _told(self, pieces: list[tuple[Any, str]]) -> dict[str, Any]:
        news: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for kind, text in pieces:
            if kind == "content":
                news["content"] = news.get("content", "") + text
            elif kind == "reasoning":
                news["reasoning"] = news.get("reasoning", "") + text
            elif kind == "name":
                self._num_calls += 1
                function = {"name": text, "arguments": ""}
                call = {"index": self._num_calls - 1, "id": call_id(), "type": "function", "function": function}
                calls.append(call)
            else:
                if not calls or calls[-1]["index"] != self._num_calls - 1:
                    calls.append({"index": self._num_calls - 1, "function": {"arguments": ""}})
                calls[-1]["function"]["arguments"] += text
        if self._use is not None and self._use.choice != "auto" and self._num_calls:
            news.pop("content", None)  # a list that was cut short ends in half a call
        if not self._shows_reasoning:
            news.pop("reasoning", None)
        elif self._both_names and "reasoning" in news:
            news["reasoning_content"] = news["reasoning"]
        single = self._use is not None and self._use.single
        if calls := [call for call in calls if call["index"] == 0 or not single]:
            news["tool_calls"] = calls
        return news
