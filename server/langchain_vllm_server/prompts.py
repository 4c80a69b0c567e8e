"""Prompts as a request gives them: texts or token ids, cut to what was asked for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from langchain_vllm_server.errors import BadRequestError

if TYPE_CHECKING:
    from langchain_vllm_server.protocol import GenerationRequest
    from langchain_vllm_server.served_model import ServedModel

T = TypeVar("T")

# Tokens near the place where a text is cut may differ from those of the whole text; so many at least are thrown away.
_MARGIN = 64


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        token_ids: What the model reads.
        text: The same as text, for those who asked for it.
        offsets: Where each token begins and ends in the text, in characters; None where the prompt was given as token
            ids, or nobody asked.
    """

    token_ids: list[int]
    text: str
    offsets: list[tuple[int, int]] | None = None


async def text_prompt(
    request: GenerationRequest, model: ServedModel, text: str, limit: int | None, *, add_special_tokens: bool
) -> Prompt:
    """The prompt of a text.

    Args:
        request: For what to cut and what to tell of the prompt.
        model: For its tokenizer and its context.
        text: The whole text.
        limit: The request's max_tokens.
        add_special_tokens: Whether the model's own beginning and end are put around the text.

    Raises:
        BadRequestError: The text is too long, or no text (half a surrogate pair).
    """
    keep = num_kept(request, model, limit)
    if keep is None:
        ids = await model.encode_prompt(text, add_special_tokens=add_special_tokens)
    else:
        longest = (keep + _MARGIN) * model.tokenizer.longest_token  # characters that hold all tokens to be kept
        cut = text[-longest:] if request.truncation_side == "left" else text[:longest]
        ids = await model.encode(cut, add_special_tokens=add_special_tokens)
    offsets = None
    if request.return_token_offsets:
        offsets = await asyncio.to_thread(model.tokenizer.offsets, text, add_special_tokens)
    kept = truncate(ids, request, keep)
    if len(kept) != len(ids) and (request.echo or request.return_prompt_text):
        text = model.tokenizer.decode(kept, skip_special_tokens=False)
    return Prompt(kept, text, None if offsets is None else truncate(offsets, request, keep))


def token_prompt(
    request: GenerationRequest, model: ServedModel, ids: list[int], limit: int | None, param: str = "prompt"
) -> Prompt:
    """The prompt of token ids. Raises BadRequestError, which names `param`, for an id that is no token."""
    model.check_tokens(ids, param)
    kept = truncate(ids, request, num_kept(request, model, limit))
    shown = request.echo or request.return_prompt_text
    return Prompt(kept, model.tokenizer.decode(kept, skip_special_tokens=False) if shown else "")


def num_kept(request: GenerationRequest, model: ServedModel, limit: int | None) -> int | None:
    """Tokens that truncate_prompt_tokens leaves of a prompt; None: all. Raises BadRequestError for too many."""
    keep = request.truncate_prompt_tokens
    if keep is None:
        return None
    if keep > model.max_model_len:
        raise BadRequestError(
            "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size.",
            "truncate_prompt_tokens",
        )
    room = 0 if request.only_scores else limit or 1  # for the answer
    return keep if keep >= 0 else max(model.max_model_len - room, 1)


def truncate(items: list[T], request: GenerationRequest, keep: int | None) -> list[T]:
    """The last `keep` items, or the first ones, by the request's truncation_side."""
    if keep is None or len(items) <= keep:
        return items
    return items[len(items) - keep :] if request.truncation_side == "left" else items[:keep]


def told_of_prompt(request: GenerationRequest, prompt: Prompt) -> dict[str, object]:
    """What an answer says of its prompt, if it was asked to."""
    told: dict[str, object] = {}
    if request.return_token_ids:
        told["prompt_token_ids"] = prompt.token_ids
    if request.return_prompt_text:
        told["prompt_text"] = prompt.text
    if request.return_token_offsets:
        told["prompt_token_offsets"] = prompt.offsets
    return told
