"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_vllm_server.chat_messages import render_chat
from langchain_vllm_server.errors import BadRequestError

if TYPE_CHECKING:
    from langchain_vllm_server.generation import Service
    from langchain_vllm_server.protocol import DetokenizeRequest, TokenizeRequest


async def tokenize(service: Service, request: TokenizeRequest, _request_id: str) -> dict[str, Any]:
    """The token ids of a prompt, or of messages as a chat completion would see them."""
    model = service.model
    model.check_name(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise BadRequestError("Give either `prompt` or `messages`.", "prompt")
    text = request.prompt if request.prompt is not None else render_chat(request, model)
    special = request.messages is None if request.add_special_tokens is None else request.add_special_tokens
    tokens = await model.encode(text, add_special_tokens=special)
    return {
        "count": len(tokens),
        "max_model_len": model.max_model_len,
        "tokens": tokens,
        "token_strs": [model.tokenizer.token(token) for token in tokens] if request.return_token_strs else None,
    }


async def detokenize(service: Service, request: DetokenizeRequest, _request_id: str) -> dict[str, Any]:
    """The text of token ids, special tokens included."""
    model = service.model
    model.check_name(request.model)
    model.check_tokens(request.tokens, "tokens")
    return {"prompt": model.tokenizer.decode(request.tokens, skip_special_tokens=False)}
