"""POST /v1/completions."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from langchain_vllm_server import sampling
from langchain_vllm_server.chunks import ChunkStream, now
from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.generation import start
from langchain_vllm_server.logprobs import LogprobFormat
from langchain_vllm_server.responses import encode_json
from langchain_vllm_server.sampling import MAX_N

if TYPE_CHECKING:
    from starlette.responses import Response

    from langchain_vllm_server.generation import Choice, Delta, Generation, Service
    from langchain_vllm_server.protocol import CompletionRequest
    from langchain_vllm_server.served_model import ServedModel


async def create_completion(service: Service, request: CompletionRequest, request_id: str) -> Response | dict[str, Any]:
    """Continue one prompt or several: a stream of chunks, or a whole completion as its JSON object."""
    model = service.model
    answer = TextAnswer(service, request, request_id)
    if request.logprobs is not None:
        sampling.check_logprobs(request.logprobs, model.max_logprobs, "logprobs")
    num_logprobs = -1 if request.logprobs is None else request.logprobs
    parameters = sampling.resolve(
        request, model.sampling_defaults, vocab_size=model.vocab_size, num_logprobs=num_logprobs
    )
    prompts = await _prompts(request, model)
    generation = start(service, request, parameters, prompts, request.max_tokens)
    if request.stream:
        head = {"id": answer.id, "object": "text_completion", "created": answer.created, "model": answer.model}
        return ChunkStream(generation, request, head, model.fingerprint, answer.chunk_entries).response()
    with closing(generation):
        return answer.whole(generation, await generation.collect())


class TextAnswer:
    """Formats one answer."""

    def __init__(self, service: Service, request: CompletionRequest, request_id: str) -> None:
        self.id = f"cmpl-{request_id}"
        self.created = now()
        self.model = service.model.check_name(request.model)
        self._fingerprint = service.model.fingerprint
        self._wants_logprobs = request.logprobs is not None
        self._logprobs = LogprobFormat(service.model.tokenizer, as_token_ids=request.return_tokens_as_token_ids)
        self._offsets: dict[int, int] = {}  # choice → characters of the tokens told so far

    def chunk_entries(self, choice: Choice, delta: Delta) -> list[bytes]:
        """What is new; nothing while all text is held back."""
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return []
        return [
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b,"stop_reason":%b}'
            % (
                choice.index,
                encode_json(delta.text),
                encode_json(self._format_logprobs(choice.index, delta)),
                encode_json(delta.finish_reason),
                encode_json(delta.stop_reason),
            )
        ]

    def whole(self, generation: Generation, deltas: list[Delta]) -> dict[str, Any]:
        """The completion object, with vLLM's nulls."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(index, delta) for index, delta in enumerate(deltas)],
            "service_tier": None,
            "system_fingerprint": self._fingerprint,
            "usage": generation.usage(),
            "kv_transfer_params": None,
            "metrics": generation.timing(),
        }

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "text": delta.text,
            "logprobs": self._format_logprobs(index, delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
        }

    def _format_logprobs(self, index: int, delta: Delta) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        offset = self._offsets.get(index, 0)
        logprobs = self._logprobs.completion(delta.logprobs, offset)
        self._offsets[index] = offset + sum(map(len, logprobs["tokens"]))
        return logprobs


async def _prompts(request: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """Token ids of every prompt. Raises BadRequestError for an empty one, a mixed list, or an id that is no token."""
    given = request.prompt
    if isinstance(given, list) and given and all(type(item) is int for item in given):
        given = [given]  # type: ignore[list-item]
    if not isinstance(given, str) and len(given) * request.n > MAX_N:
        raise BadRequestError(f"{len(given)} prompts with n={request.n} are more than {MAX_N} sequences.", "n")
    prompts = []
    for item in [given] if isinstance(given, str) else given:
        if isinstance(item, str):
            prompts.append(await model.encode_prompt(item, add_special_tokens=request.add_special_tokens))
        elif isinstance(item, list):
            model.check_tokens(item, "prompt")
            prompts.append(item)
        else:
            raise BadRequestError("prompt must not mix token ids with texts or lists.", "prompt")
    if not prompts or not all(prompts) or request.prompt == "":
        raise BadRequestError("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    return prompts
