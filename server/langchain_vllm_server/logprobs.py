"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_vllm_server.generation import TokenLogprobs
    from langchain_vllm_server.protocol import GenerationRequest
    from langchain_vllm_server.served_model import ServedModel

_FLOOR = -9999.0  # JSON has no -inf


class LogprobFormat:
    """Spells tokens out: as text, or as `token_id:N` where the text of a token does not tell it apart from others."""

    def __init__(self, model: ServedModel, request: GenerationRequest) -> None:
        given = request.return_tokens_as_token_ids
        self._tokenizer = model.tokenizer
        self._as_token_ids = model.return_tokens_as_token_ids if given is None else given

    def chat(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """`logprobs` of a chat choice."""
        return {
            "content": [
                {**self._entry(*chosen), "top_logprobs": [self._entry(*entry) for entry in top]}
                for chosen, *top in tokens
            ]
        }

    def prompt(self, tokens: Sequence[TokenLogprobs]) -> list[dict[str, Any] | None]:
        """`prompt_logprobs`, of the first token on, which has none."""
        return [None, *({str(t): self._ranked(t, value, rank) for t, value, rank in entries} for entries in tokens)]

    def completion(self, tokens: Sequence[TokenLogprobs | int], offset: int) -> dict[str, Any]:
        """`logprobs` of a text choice whose first token here begins at character `offset`.

        A token that nothing stands before has no log-probability; it is given by its id alone.
        """
        names = [self._name(entries if isinstance(entries, int) else entries[0][0]) for entries in tokens]
        offsets = []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        return {
            "text_offset": offsets,
            "token_logprobs": [None if isinstance(e, int) else max(e[0][1], _FLOOR) for e in tokens],
            "tokens": names,
            "top_logprobs": [
                None if isinstance(e, int) else {self._name(token): max(value, _FLOOR) for token, value, _ in e}
                for e in tokens
            ],
        }

    def _ranked(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(logprob, _FLOOR), "rank": rank, "decoded_token": self._name(token)}

    def _entry(self, token: int, logprob: float, _rank: int) -> dict[str, Any]:
        name = self._name(token)
        raw = name.encode() if self._as_token_ids else self._bytes(token)
        return {"token": name, "logprob": max(logprob, _FLOOR), "bytes": list(raw)}

    def _name(self, token: int) -> str:
        if self._as_token_ids:
            return f"token_id:{token}"
        return self._bytes(token).decode("utf-8", "replace")

    def _bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)
