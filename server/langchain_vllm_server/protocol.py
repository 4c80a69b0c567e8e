"""The bodies of requests: their types, and how bytes become them.

A field that is null counts as absent. A field that nobody knows is accepted with a warning, as vLLM does; one that
vLLM's API has, that would change the answer and that this version does not build is refused.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Literal, TypeVar

import msgspec

from langchain_vllm_server.errors import BadRequestError, RequestError
from langchain_vllm_server.response_format import ResponseFormat, StructuredOutputs

logger = logging.getLogger(__name__)

# Fields that this version does not build, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "ec_transfer_params": (),
    "function_call": ("none",),
    "functions": (),
    "kv_transfer_params": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prompt_embeds": ([],),
    "suffix": ("",),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}

# What to do instead, where leaving the field out is not all there is to say.
_REMEDIES = {
    "best_of": "`best_of` is no longer part of vLLM's API; ask for `n` answers.",
    "prompt_embeds": "`prompt_embeds` is not supported; give the prompt as text or token ids.",
    "suffix": "`suffix` is not supported: the model cannot fill in the middle; leave it out.",
    "watermarking": "`watermarking` is not supported: this server has no watermark to put into texts; leave it out.",
}

# What vLLM's API has lost, or never had but llama.cpp's and SGLang's have: vLLM drops it silently, and the answer is
# not what was asked for. Where it went in `structured_outputs`; None: nothing to choose any more.
_TRANSLATED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
    "guided_decoding_backend": None,
    "structured_outputs_backend": None,
    "grammar": "grammar",
    "ebnf": "grammar",
    "json_schema": "json",
    "regex": "regex",
}

# Known fields that cannot change the answer of a server that keeps nothing and runs first come, first served.
_HARMLESS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
    }
    | {"prompt_cache_retention", "safety_identifier", "service_tier", "session_id", "store", "prediction"}
    | {"mm_payload", "return_mm_kwargs", "routed_experts_prompt_start"}  # of pictures and experts that are not there
    | {"spaces_between_special_tokens", "user"}  # tokens are spelled as they are: nothing between them to leave out
)


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream tells beside the text."""

    include_usage: bool = False  # a last chunk with the usage
    continuous_usage_stats: bool = False  # the usage in every chunk


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One turn of a conversation."""

    role: str
    content: str | list[str | dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class RepetitionDetection(msgspec.Struct, kw_only=True):
    """When to give up on an answer that repeats itself: a pattern of so many tokens, so many times in a row."""

    max_pattern_size: int = 0  # 0: never
    min_pattern_size: int = 0  # 0: 1
    min_count: int = 0


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields that chat and text completions share. None: take the model's default."""

    model: str | None = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    repetition_detection: RepetitionDetection | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    skip_special_tokens: bool = True
    echo: bool = False
    prompt_logprobs: int | None = None  # -1: of the whole vocabulary
    logprob_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None  # -1: what fits
    truncation_side: Literal["left", "right"] = "left"
    return_tokens_as_token_ids: bool | None = None  # None: as the server was started
    return_token_ids: bool = False
    return_token_offsets: bool = False
    return_prompt_text: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: int | None = None  # tokens from chunk to chunk; None: the server's
    priority: int = 0
    cache_salt: str | None = None
    request_id: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def only_scores(self) -> bool:
        """Whether the prompt is to be read and nothing to be generated."""
        return False


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None  # in place of the model's own
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    thinking_token_budget: int | None = None  # -1: any number


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]] = ""
    max_tokens: int | None = 16
    logprobs: int | None = None  # -1: of the whole vocabulary
    add_special_tokens: bool = True

    @property
    def only_scores(self) -> bool:
        """Whether the prompt is to be read and nothing to be generated."""
        return self.echo and self.max_tokens == 0


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt, or messages as a chat would render them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None  # None: true for a prompt, false for messages
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


T = TypeVar("T", bound=msgspec.Struct)


_MAX_DEPTH = 64  # of a body's objects and lists, as vLLM's


def decode(body: bytes, type: type[T]) -> T:  # noqa: A002
    """Decode and check the types of a JSON body. Raises RequestError (400) that names the field."""
    raw = decode_object(body)
    _refuse_unsupported(raw)
    _translate(raw)
    _warn_unknown(raw, type)
    try:
        return msgspec.convert(raw, type, strict=False)  # like pydantic: "5" and 5.0 are an int
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        path = path.removesuffix("`").removesuffix("[...]")
        if missing := re.search(r"missing required field `(\w+)`", message):
            path += f".{missing[1]}"
        raise _invalid(message, path.removeprefix(".") or None) from None


def decode_object(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object that are not null. Raises RequestError (400)."""
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise _invalid("the body must be a JSON object")
    if _is_deep(raw):
        raise _invalid(f"the body is nested more than {_MAX_DEPTH} levels deep")
    return {name: value for name, value in raw.items() if value is not None}


def _is_deep(value: Any) -> bool:
    """What walks schemas and messages recurses: a deep body must not use up the stack."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        parts = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _invalid(message: str, param: str | None = None) -> RequestError:
    where = f"{param}: " if param else ""
    return RequestError(400, "Bad Request", f"1 validation error: {where}{message}", param)


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    for name in raw.keys() & _UNSUPPORTED.keys():
        if raw[name] not in _UNSUPPORTED[name]:
            default = f"`{name}` is not supported by this version of the server; leave it out."
            raise BadRequestError(_REMEDIES.get(name, default), name)


def _translate(raw: dict[str, Any]) -> None:
    for name in sorted(raw.keys() & _TRANSLATED.keys()):
        value, new = raw.pop(name), _TRANSLATED[name]
        if new is None:
            logger.warning("ignored `%s`: it is not part of vLLM's API, and there is one backend", name)
            continue
        logger.warning("`%s` is not part of vLLM's API: took it as `structured_outputs.%s`", name, new)
        outputs = raw.setdefault("structured_outputs", {})
        if not isinstance(outputs, dict) or new in outputs:
            raise BadRequestError(f"`{name}` and `structured_outputs` contradict each other; give one of them.", name)
        outputs[new] = value


def _warn_unknown(raw: dict[str, Any], type: type[msgspec.Struct]) -> None:  # noqa: A002
    unknown = raw.keys() - set(type.__struct_fields__) - _HARMLESS - _UNSUPPORTED.keys()
    if unknown:
        logger.warning("ignored unknown fields of a request: %s", ", ".join(sorted(unknown))[:500])
