"""POST /v1/chat/completions."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from langchain_vllm_server import sampling
from langchain_vllm_server.answer_form import AnswerForm
from langchain_vllm_server.chat_messages import render_chat
from langchain_vllm_server.chunks import ChunkStream, now
from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.generation import start
from langchain_vllm_server.logprobs import LogprobFormat
from langchain_vllm_server.prompts import text_prompt, told_of_prompt
from langchain_vllm_server.responses import encode_json
from langchain_vllm_server.tools import tool_use

if TYPE_CHECKING:
    from starlette.responses import Response

    from langchain_vllm_server.answer_form import AnswerReader
    from langchain_vllm_server.generation import Choice, Delta, Generation, Service
    from langchain_vllm_server.protocol import ChatCompletionRequest


async def create_chat_completion(
    service: Service, request: ChatCompletionRequest, request_id: str
) -> Response | dict[str, Any]:
    """Answer a conversation: a stream of chunks, or a whole completion as its JSON object."""
    model = service.model
    use = tool_use(request, model)
    parameters = sampling.parameters(request, model, _num_logprobs(request), "top_logprobs")
    text = render_chat(request, model)
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    prompt = await text_prompt(request, model, text, limit, add_special_tokens=request.add_special_tokens)
    if not prompt.token_ids:
        raise BadRequestError("The chat template made an empty prompt of the messages.", "messages")
    form = AnswerForm(request, model, use, text)
    answer = ChatAnswer(service, request, request_id, form)
    generation = start(service, request, parameters, [prompt.token_ids], limit, await form.constraint())
    told = {"prompt_token_ids": None, "prompt_text": None} | told_of_prompt(request, prompt)
    if request.stream:
        head = {"id": answer.id, "object": "chat.completion.chunk", "created": answer.created, "model": answer.model}
        return ChunkStream(generation, request, head, model, answer.chunk_entries, told).response()
    with closing(generation):
        return await generation.whole(answer.whole) | told


class ChatAnswer:
    """Formats one answer."""

    def __init__(self, service: Service, request: ChatCompletionRequest, request_id: str, form: AnswerForm) -> None:
        self.id = f"chatcmpl-{request_id}"
        self.created = now()
        self.model = service.model.check_name(request.model)
        self._fingerprint = service.model.fingerprint
        continues = not request.add_generation_prompt and request.messages
        self._role = request.messages[-1].role if continues else service.model.response_role
        self._wants_logprobs = request.logprobs
        self._scores_prompt = request.prompt_logprobs is not None
        self._logprobs = LogprobFormat(service.model, request)
        self._returns_ids = request.return_token_ids
        self._echo = _echoed(request, self._role) if request.echo else ""
        self._begun = False
        self._num_choices = request.n
        self._form = form
        self._readers: dict[int, AnswerReader] = {}  # of choices whose text is more than content

    def chunk_entries(self, choice: Choice, delta: Delta) -> list[bytes]:
        """First the role of every choice; what is new; at last why it ended. Nothing while all text is held back."""
        entries = []
        if not self._begun:
            self._begun = True
            begin = [{"role": self._role, "content": ""}, *([{"content": self._echo}] if self._echo else [])]
            entries = [
                encode_json({"index": index, "delta": told, "logprobs": None, "finish_reason": None})
                for told in begin
                for index in range(self._num_choices)
            ]
        news, finish_reason = self._news(choice, delta)
        if news or delta.logprobs or delta.finish_reason is not None or (self._returns_ids and delta.token_ids):
            entries.append(self._entry(choice, delta, news or b"{}", finish_reason))
        return entries

    def _entry(self, choice: Choice, delta: Delta, news: bytes, finish_reason: str | None) -> bytes:
        logprobs = (
            encode_json(self._logprobs.chat(delta.logprobs)) if self._wants_logprobs and delta.logprobs else b"null"
        )
        token_ids = encode_json(delta.token_ids) if self._returns_ids else b"null"
        head = b'{"index":%d,"delta":%b,"logprobs":%b,"token_ids":%b,"finish_reason":' % (
            choice.index,
            news,
            logprobs,
            token_ids,
        )
        if delta.finish_reason is None:
            return head + b"null}"
        return head + b'%b,"stop_reason":%b}' % (encode_json(finish_reason), encode_json(delta.stop_reason))

    def _news(self, choice: Choice, delta: Delta) -> tuple[bytes, str | None]:
        """The `delta` of a chunk, empty for nothing, and why the choice ended."""
        if self._form.plain:
            return b'{"content":%b}' % encode_json(delta.text) if delta.text else b"", delta.finish_reason
        reader = self._reader(choice)
        news = reader.push(delta)
        return encode_json(news) if news else b"", reader.finish_reason

    def _reader(self, choice: Choice) -> AnswerReader:
        if choice.index not in self._readers:
            self._readers[choice.index] = self._form.reader(choice)
        return self._readers[choice.index]

    def whole(self, generation: Generation, deltas: list[Delta]) -> dict[str, Any]:
        """The completion object, with vLLM's nulls."""
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(*each) for each in zip(generation.choices, deltas, strict=True)],
            "service_tier": None,
            "system_fingerprint": self._fingerprint,
            "usage": generation.usage(nulls=True),
            "prompt_logprobs": self._logprobs.prompt(deltas[0].prompt_logprobs) if self._scores_prompt else None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": generation.timing(nulls=True),
        }

    def _choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        told: dict[str, Any] = {"content": delta.text}
        finish_reason = delta.finish_reason
        if not self._form.plain:
            reader = self._reader(choice)
            told = reader.push(delta)
            finish_reason = reader.finish_reason
        calls = [{key: value for key, value in call.items() if key != "index"} for call in told.get("tool_calls", ())]
        content = self._echo + told.get("content", "")
        message: dict[str, Any] = {
            "role": self._role,
            "content": content if content or self._form.forced or not calls else None,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": told.get("reasoning"),
        }
        if "reasoning_content" in told:
            message["reasoning_content"] = told["reasoning_content"]
        if calls:
            message["tool_calls"] = calls
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs.chat(delta.logprobs) if self._wants_logprobs else None,
            "finish_reason": finish_reason,
            "stop_reason": delta.stop_reason,
            "token_ids": delta.token_ids if self._returns_ids else None,
            "routed_experts": None,
        }


def _num_logprobs(request: ChatCompletionRequest) -> int | None:
    """-1: of all tokens; None: of none. Raises BadRequestError for top_logprobs without logprobs."""
    if request.top_logprobs < -1:
        raise BadRequestError("`top_logprobs` must be a positive value or -1.", "top_logprobs")
    if request.top_logprobs and not request.logprobs:
        raise BadRequestError("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    return request.top_logprobs if request.logprobs else None


def _echoed(request: ChatCompletionRequest, role: str) -> str:
    """The text of the last message, if the answer speaks in its role."""
    last = request.messages[-1] if request.messages else None
    if last is None or last.role != role or last.content is None:
        return ""
    if isinstance(last.content, str):
        return last.content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in last.content)
