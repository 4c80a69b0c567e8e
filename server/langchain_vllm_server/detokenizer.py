"""Text from tokens as they come: each piece is final when it is handed out."""

from __future__ import annotations

import codecs
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from langchain_vllm_server.tokenizer import Tokenizer

_MAX_PENDING = 3  # bytes of a character that can be there before its last one


class Detokenizer:
    """The text of one growing sequence of tokens.

    The pieces of all `push` calls and of `finish`, put together, are what `Tokenizer.decode` makes of the generated
    tokens where they stand, after the prompt: a space at the start of the whole text is dropped where the tokenizer
    says so, one after a prompt is not, and a character that the prompt's last tokens began is completed. The work per
    token and the memory are constant.

    Args:
        tokenizer: The model's.
        prompt_ids: The tokens before the generated ones; their text is not part of the pieces.
        skip_special_tokens: Leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(tokenizer.decoding.errors)
        # The last tokens with any bytes: enough to know where in a character the prompt ends.
        last = list(islice(filter(None, map(self._bytes, reversed(prompt_ids))), _MAX_PENDING))
        self._decoder.decode(b"".join(reversed(last)))
        self._strip_left = 0 if last else tokenizer.decoding.strip_left

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens make certain, perhaps none; an unfinished character waits for its last byte."""
        return self._stripped(self._decoder.decode(b"".join(map(self._bytes, token_ids))))

    def finish(self) -> str:
        """The rest: U+FFFD for a character that was never finished."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if text.startswith(" "):
                text = text[1:]
                self._strip_left -= 1
            else:
                self._strip_left = 0
        return text
