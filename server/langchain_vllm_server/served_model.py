"""The model as the routes see it: names, limits, tokenizer, template and sampling defaults."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langchain_vllm_server.errors import BadRequestError, NotFoundError
from langchain_vllm_server.json_schema import Spelling
from langchain_vllm_server.structured import GrammarCompiler
from langchain_vllm_server.tool_parsers import GENERIC

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_vllm_server.chat_template import ChatTemplate
    from langchain_vllm_server.reasoning import ReasoningFormat
    from langchain_vllm_server.tokenizer import Tokenizer
    from langchain_vllm_server.tool_parsers import ToolFormat

_LONG_TEXT = 4_000  # characters; encoding more than that takes long enough to be worth a thread


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What does not change while the server runs."""

    names: tuple[str, ...]  # the first one is the model's own for answers to requests that name none
    root: str
    version: str  # of the server
    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    chat_template: ChatTemplate | None = None
    content_format: str = "string"  # what the template takes as a message's content: "string" or "openai" (parts)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # where a request says nothing
    spelling: Spelling = field(default_factory=Spelling)  # of JSON, likewise
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    max_logprobs: int = 20
    return_tokens_as_token_ids: bool = False
    priority_scheduling: bool = False
    trust_request_chat_template: bool = False
    force_include_usage: bool = False
    stream_interval: int = 1  # tokens from chunk to chunk
    cache_block_size: int = 0  # tokens of a block of the prefix cache; 0: there is none
    tool_format: ToolFormat = GENERIC  # how the model spells tool calls
    reasoning_format: ReasoningFormat | None = None  # how it marks its reasoning
    hides_unused_tools: bool = False  # keep tools that must not be called out of the prompt
    reasoning_content: bool = False  # tell reasoning under this older name, too
    own_fingerprint: str | None = ""  # in the place of that of the version; None: none
    response_role: str = "assistant"
    hidden_size: int = 0  # numbers in a vector
    pooling: str = "mean"  # what vectors are made of: the "mean" of all tokens' states, or the "last" one
    tokenizer_info: Mapping[str, Any] | None = None  # for /tokenizer_info; None: it is not told
    seeds: random.Random = field(default_factory=random.Random)  # for requests that give no seed
    compiler: GrammarCompiler = field(default_factory=GrammarCompiler)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str | None:
        """`system_fingerprint` of answers."""
        return f"langchain-vllm-{self.version}" if self.own_fingerprint == "" else self.own_fingerprint

    def check_name(self, name: str | None) -> str:
        """The name to answer under. Raises NotFoundError for one that is not served."""
        if not name:
            return self.names[0]
        if name not in self.names:
            aliases = ", ".join(f"`{alias}`" for alias in self.names)
            raise NotFoundError(f"The model `{name}` does not exist. Valid aliases: {aliases}.", "model")
        return name

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; a long one is encoded in a thread. Raises BadRequestError for half a surrogate pair."""
        try:
            if len(text) < _LONG_TEXT:
                await asyncio.sleep(0)  # of many short texts, too, nobody waits for all
                return self.tokenizer.encode(text, add_special_tokens)
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
        except ValueError as error:
            raise BadRequestError(str(error), "prompt") from None

    async def encode_prompt(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """`encode` of a text that has to fit into the context.

        Raises:
            BadRequestError: It cannot fit even if every token were the longest one; encoding it would cost about a
                hundred times its memory.
        """
        # A short text fits even if every token were one character: it need not wait until all tokens are looked at.
        if len(text) > self.max_model_len and len(text) > (limit := self.max_model_len * self.tokenizer.longest_token):
            raise BadRequestError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{len(text)} characters (more than {limit} characters, which is the upper bound for that many "
                "tokens). Please reduce the length of the input prompt.",
                "input_text",
            )
        return await self.encode(text, add_special_tokens=add_special_tokens)

    def check_tokens(self, tokens: list[int], param: str) -> None:
        """Raise BadRequestError for an id outside the vocabulary."""
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise BadRequestError(f"Token id {token} is out of vocabulary (size {self.vocab_size}).", param)
