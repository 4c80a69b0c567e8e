"""POST /v1/completions."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from langchain_vllm_server import sampling
from langchain_vllm_server.chunks import ChunkStream, now
from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.generation import start
from langchain_vllm_server.logprobs import LogprobFormat
from langchain_vllm_server.prompts import text_prompt, token_prompt, told_of_prompt
from langchain_vllm_server.response_format import compile_format
from langchain_vllm_server.responses import encode_json
from langchain_vllm_server.sampling import MAX_N

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.responses import Response

    from langchain_vllm_server.generation import Choice, Delta, Generation, Service, TokenLogprobs
    from langchain_vllm_server.prompts import Prompt
    from langchain_vllm_server.protocol import CompletionRequest
    from langchain_vllm_server.served_model import ServedModel


async def create_completion(service: Service, request: CompletionRequest, request_id: str) -> Response | dict[str, Any]:
    """Continue one prompt or several: a stream of chunks, or a whole completion as its JSON object."""
    model = service.model
    model.check_name(request.model)
    if request.stream and request.use_beam_search:
        raise BadRequestError("Beam search cannot be streamed; leave `stream` or `use_beam_search` out.", "stream")
    parameters = sampling.parameters(request, model, request.logprobs)
    if request.echo and request.prompt_logprobs is None:
        parameters.num_prompt_logprobs = parameters.num_logprobs
    prompts = await _prompts(request, model)
    constraint = await compile_format(request, model)
    token_ids = [prompt.token_ids for prompt in prompts]
    generation = start(service, request, parameters, token_ids, request.max_tokens, constraint)
    answer = TextAnswer(service, request, request_id, prompts)
    if request.stream:
        head = {"id": answer.id, "object": "text_completion", "created": answer.created, "model": answer.model}
        return ChunkStream(generation, request, head, model, answer.chunk_entries).response()
    with closing(generation):
        return await generation.whole(answer.whole)


class TextAnswer:
    """Formats one answer."""

    def __init__(
        self, service: Service, request: CompletionRequest, request_id: str, prompts: Sequence[Prompt]
    ) -> None:
        self.id = f"cmpl-{request_id}"
        self.created = now()
        self.model = service.model.check_name(request.model)
        self._fingerprint = service.model.fingerprint
        self._request = request
        self._prompts = prompts
        self._wants_logprobs = request.logprobs is not None
        self._logprobs = LogprobFormat(service.model, request)
        self._offsets: dict[int, int] = {}  # choice → characters of the tokens told so far
        self._begun: set[int] = set()

    def chunk_entries(self, choice: Choice, delta: Delta) -> list[bytes]:
        """What is new; nothing while all text is held back."""
        begins = choice.index not in self._begun
        if begins:
            self._begun.add(choice.index)
        prompt = self._prompt(choice.index)
        text = prompt.text + delta.text if begins and self._request.echo else delta.text
        ids = self._request.return_token_ids
        if not text and not delta.logprobs and delta.finish_reason is None and not (ids and delta.token_ids):
            return []
        extra: dict[str, object] = {"prompt_token_ids": None, "token_ids": delta.token_ids if ids else None}
        if begins:
            extra |= told_of_prompt(self._request, prompt)
        return [
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b,"stop_reason":%b,%b}'
            % (
                choice.index,
                encode_json(text),
                encode_json(self._format_logprobs(choice.index, delta, begins=begins)),
                encode_json(delta.finish_reason),
                encode_json(delta.stop_reason),
                encode_json(extra)[1:-1],
            )
        ]

    def whole(self, generation: Generation, deltas: list[Delta]) -> dict[str, Any]:
        """The completion object, with vLLM's nulls."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                self._choice(index, delta, deltas[index - index % self._request.n].prompt_logprobs)
                for index, delta in enumerate(deltas)
            ],
            "service_tier": None,
            "system_fingerprint": self._fingerprint,
            "usage": generation.usage(nulls=True),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": generation.timing(nulls=True),
        }

    def _choice(self, index: int, delta: Delta, scored: list[TokenLogprobs]) -> dict[str, Any]:
        """One choice; `scored` is what its prompt's first choice was told of the prompt."""
        request, prompt = self._request, self._prompt(index)
        delta.prompt_logprobs = scored
        scores = request.prompt_logprobs is not None or (request.echo and self._wants_logprobs)
        return {
            "index": index,
            "text": prompt.text + delta.text if request.echo else delta.text,
            "logprobs": self._format_logprobs(index, delta, begins=True),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "token_ids": delta.token_ids if request.return_token_ids else None,
            "prompt_logprobs": self._logprobs.prompt(scored) if scores else None,
            "prompt_token_ids": None,
            "routed_experts": None,
        } | told_of_prompt(request, prompt)

    def _prompt(self, index: int) -> Prompt:
        return self._prompts[index // self._request.n]

    def _format_logprobs(self, index: int, delta: Delta, *, begins: bool) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        offset = self._offsets.get(index, 0)
        tokens: list[TokenLogprobs | int] = [*delta.logprobs]
        if begins and self._request.echo:
            tokens = [self._prompt(index).token_ids[0], *delta.prompt_logprobs, *delta.logprobs]
        logprobs = self._logprobs.completion(tokens, offset)
        self._offsets[index] = offset + sum(map(len, logprobs["tokens"]))
        return logprobs


async def _prompts(request: CompletionRequest, model: ServedModel) -> list[Prompt]:
    """Every prompt. Raises BadRequestError for an empty one, a mixed list, or an id that is no token."""
    given = request.prompt
    if isinstance(given, list) and given and all(type(item) is int for item in given):
        given = [given]  # type: ignore[list-item]
    if not isinstance(given, str) and len(given) * request.n > MAX_N:
        raise BadRequestError(f"{len(given)} prompts with n={request.n} are more than {MAX_N} sequences.", "n")
    prompts: list[Prompt] = []
    special, limit = request.add_special_tokens, request.max_tokens
    for item in [given] if isinstance(given, str) else given:
        if isinstance(item, str):
            prompts.append(await text_prompt(request, model, item, limit, add_special_tokens=special))
        elif isinstance(item, list):
            prompts.append(token_prompt(request, model, item, limit))
        else:
            raise BadRequestError("prompt must not mix token ids with texts or lists.", "prompt")
    if not prompts or not all(prompt.token_ids for prompt in prompts) or request.prompt == "":
        raise BadRequestError("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    return prompts
