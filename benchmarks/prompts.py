"""Prompts of an exact number of tokens, of words that the model's own tokenizer knows."""

from __future__ import annotations

import itertools
import random
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_WORD = re.compile("[Ġ▁]([a-z]{3,9})")  # a vocabulary's spelling of a space and a word


class Prompts:
    """Makes texts of random words; other seeds give other texts, so no cache answers from the last repeat.

    Args:
        vocabulary: The tokenizer's tokens; words are taken from them, because each is then one token.
        count_tokens: How many tokens a text has, counted as a server will count it.
    """

    def __init__(self, vocabulary: Iterable[str], count_tokens: Callable[[str], int]) -> None:
        self._words = sorted({match[1] for token in vocabulary if (match := _WORD.fullmatch(token))})
        self._count_tokens = count_tokens

    @classmethod
    def of_model(cls, model: str) -> Prompts:
        """With the tokenizer of a checkpoint folder or GGUF file."""
        from langchain_vllm_server.checkpoint import load_checkpoint
        from langchain_vllm_server.hub import resolve_model

        tokenizer = load_checkpoint(resolve_model(model)).tokenizer
        return cls(map(tokenizer.token, range(tokenizer.vocab_size)), lambda text: len(tokenizer.encode(text)))

    def make(self, count: int, length: int, seed: str, prefix: int = 0) -> list[str]:
        """`count` texts of `length` tokens with no common beginning, or behind a common one of `prefix` more."""
        head = self._exact(prefix, f"{seed}/prefix") if prefix else ""
        return [self._exact(prefix + length, f"{seed}/{i}", head) for i in range(count)]

    def _exact(self, length: int, seed: str, head: str = "") -> str:
        """`head`, and words up to `length` tokens."""
        words = self._random_words(seed)
        chosen = [head] if head else []
        chosen += itertools.islice(words, length - (self._count_tokens(head) if head else 0))
        for _ in range(20):
            text = " ".join(chosen)
            excess = self._count_tokens(text) - length
            if excess == 0:
                return text
            if excess > 0:  # a word was more than one token
                del chosen[-excess:]
            else:
                chosen += itertools.islice(words, -excess)
        raise ValueError(f"found no text of {length} tokens")

    def _random_words(self, seed: str) -> Iterator[str]:
        choose = random.Random(seed).choice
        while True:
            yield choose(self._words)
