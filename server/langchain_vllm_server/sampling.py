"""From a request's sampling fields to the engine's parameters: defaults, ranges, limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langchain_vllm_server.errors import BadRequestError, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from langchain_vllm_server.protocol import GenerationRequest, RepetitionDetection
    from langchain_vllm_server.served_model import ServedModel
    from langchain_vllm_server.tokenizer import Tokenizer

MAX_N = 16384
MAX_SALT = 128  # characters
MAX_PATTERN = 1024  # tokens; the engine compares every token with so many before it
MIN_TEMPERATURE = 0.01  # vLLM raises smaller ones: dividing logits by less overflows

# A generation_config.json may set these; a request's own value wins.
_DEFAULTS: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}

_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("n", lambda v: v >= 1, "must be at least 1"),
    ("n", lambda v: v <= MAX_N, f"must be at most {MAX_N}"),
    ("presence_penalty", lambda v: -2 <= v <= 2, "must be in [-2, 2]"),
    ("frequency_penalty", lambda v: -2 <= v <= 2, "must be in [-2, 2]"),
    ("repetition_penalty", lambda v: v > 0, "must be greater than zero"),
    ("temperature", lambda v: 0 <= v <= 2, "must be in [0, 2]"),
    ("top_p", lambda v: 0 < v <= 1, "must be in (0, 1]"),
    ("top_k", lambda v: v >= -1, "must be 0 (disable), or at least 1"),
    ("min_p", lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    ("seed", lambda v: -(2**63) <= v < 2**63, "must be a 64-bit integer"),
    ("max_tokens", lambda v: v >= 1, "must be at least 1"),
    ("max_completion_tokens", lambda v: v >= 1, "must be at least 1"),
    ("min_tokens", lambda v: v >= 0, "must be greater than or equal to 0"),
    ("prompt_logprobs", lambda v: v >= -1, "must be a positive value or -1"),
    ("truncate_prompt_tokens", lambda v: v >= -1, "must be greater than or equal to -1"),
    ("stream_interval", lambda v: v >= 1, "must be at least 1"),
    ("priority", lambda v: -(2**63) <= v < 2**63, "must be a 64-bit integer"),
    ("length_penalty", math.isfinite, "must be a finite number"),
)


@dataclass(slots=True)
class Sampling:
    """The engine's SamplingParams, field by field, without importing the engine."""

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: list[tuple[int, float]] = field(default_factory=list)
    seed: int = 0
    num_logprobs: int = -1
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: list[int] = field(default_factory=list)
    allowed_token_ids: list[int] = field(default_factory=list)
    bad_words: list[list[int]] = field(default_factory=list)
    logprob_token_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = -1
    repetition_detection: tuple[int, int, int] = (0, 1, 2)
    priority: int = 0
    cache_salt: str = ""
    pooling: str = ""  # "last" or "mean": a vector in place of an answer


MAX_ENTRIES = {"stop": 64, "stop_token_ids": 1024, "logit_bias": 1024, "bad_words": 1024, "logprob_token_ids": 128}
"""What every token of every sequence is compared with, so one request must not bring any amount of it."""


def check_ranges(request: GenerationRequest) -> None:
    """Raise BadRequestError for the first field out of its range."""
    for name, valid, rule in _RANGES:
        value = getattr(request, name, None)
        if name == "max_tokens" and request.only_scores:
            continue
        if value is not None and not valid(value):
            raise BadRequestError(f"{name} {rule}, got {value}.", name)
    if any(not stop for stop in request.stop_strings) or request.stop == "":
        raise BadRequestError("stop cannot contain an empty string.", "stop")
    for name, entries in (
        ("stop", request.stop_strings),
        ("stop_token_ids", request.stop_token_ids),
        ("logit_bias", request.logit_bias or {}),
        ("bad_words", request.bad_words),
        ("logprob_token_ids", request.logprob_token_ids or []),
    ):
        if len(entries) > MAX_ENTRIES[name]:
            raise BadRequestError(f"{name} must have at most {MAX_ENTRIES[name]} entries, got {len(entries)}.", name)
    if request.stream_options is not None and not request.stream:
        raise BadRequestError("Stream options can only be defined when `stream=True`.", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise BadRequestError("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    _check_texts(request)


def _check_texts(request: GenerationRequest) -> None:
    if any(not word.strip() for word in request.bad_words):
        raise BadRequestError("bad_words cannot contain an empty string.", "bad_words")
    salt = request.cache_salt
    if salt is not None and (not 1 <= len(salt) <= MAX_SALT or any(char in salt for char in "@/\\\0")):
        raise BadRequestError(
            f"cache_salt must have 1 to {MAX_SALT} characters, none of them @, /, \\ or NUL.", "cache_salt"
        )


def parameters(
    request: GenerationRequest, model: ServedModel, num_logprobs: int | None, param: str = "logprobs"
) -> Sampling:
    """What the engine needs to know of a request for this model; seed, max_tokens and stop tokens are left.

    Args:
        request: Chat or text completion.
        model: For the vocabulary, the tokenizer, the defaults and the limits.
        num_logprobs: Of the most likely tokens, -1 of all, None: no log-probabilities.
        param: The field that says so.

    Raises:
        BadRequestError: a value is out of range, contradicts another, or the server was started without it.
    """
    sampling = resolve(request, model.sampling_defaults, vocab_size=model.vocab_size)
    if request.priority and not model.priority_scheduling:
        raise BadRequestError(
            f"priority {request.priority} needs a server that schedules by priority: start it with "
            "--scheduling-policy priority, or leave the field out.",
            "priority",
        )
    sampling.num_logprobs = _count_logprobs(num_logprobs, model, param)
    sampling.num_prompt_logprobs = _count_logprobs(request.prompt_logprobs, model, "prompt_logprobs")
    if request.logprob_token_ids is not None and num_logprobs is None:
        raise BadRequestError("when using `logprob_token_ids`, `logprobs` must be set.", "logprob_token_ids")
    if request.logprob_token_ids and request.only_scores:
        raise BadRequestError(
            "`logprob_token_ids` are of the answer's tokens, and with max_tokens=0 no output tokens are generated.",
            "logprob_token_ids",
        )
    sampling.bad_words = [ids for word in request.bad_words for ids in _spellings(word, model.tokenizer)]
    return sampling


def _count_logprobs(requested: int | None, model: ServedModel, param: str) -> int:
    """-1 for none; what is asked for, of the vocabulary."""
    if requested is None:
        return -1
    count = model.vocab_size if requested == -1 else requested
    check_logprobs(count, model.max_logprobs, param)
    return min(count, model.vocab_size)


def _spellings(word: str, tokenizer: Tokenizer) -> list[list[int]]:
    """A bad word at the start of a text and after a space: vLLM forbids both, whichever is given."""
    try:
        spelled = [tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False) for prefix in ("", " ")]
    except ValueError as error:
        raise BadRequestError(f"bad_words: {error}", "bad_words") from None
    if not all(spelled):
        raise BadRequestError(f"bad_words must tokenize to at least one token, {word[:100]!r} has none.", "bad_words")
    return [ids for i, ids in enumerate(spelled) if ids not in spelled[:i]]


def resolve(
    request: GenerationRequest, defaults: Mapping[str, Any], *, vocab_size: int, num_logprobs: int = -1
) -> Sampling:
    """Merge the request, the model's generation_config and vLLM's defaults; seed, max_tokens and stop tokens are left.

    Raises:
        BadRequestError: a value is out of range or contradicts another.
    """
    check_ranges(request)
    chosen = {name: _first(getattr(request, name), defaults.get(name), neutral) for name, neutral in _DEFAULTS.items()}
    temperature = chosen["temperature"]
    if request.n > 1 and temperature == 0 and not request.use_beam_search:
        raise BadRequestError(f"n must be 1 when using greedy sampling, got {request.n}.", "n")
    if request.allowed_token_ids == []:
        raise BadRequestError(
            "allowed_token_ids must hold at least one token id; leave it out to allow all.", "allowed_token_ids"
        )
    named = {"stop_token_ids": request.stop_token_ids, "allowed_token_ids": request.allowed_token_ids or []}
    named["logprob_token_ids"] = request.logprob_token_ids or []
    for name, tokens in named.items():
        _check_vocabulary(tokens, vocab_size, name)
    return Sampling(
        temperature=max(temperature, MIN_TEMPERATURE) if temperature else 0.0,
        top_p=chosen["top_p"],
        min_p=chosen["min_p"],
        top_k=min(max(int(chosen["top_k"]), 0), vocab_size),
        presence_penalty=chosen["presence_penalty"],
        frequency_penalty=chosen["frequency_penalty"],
        repetition_penalty=chosen["repetition_penalty"],
        logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
        num_logprobs=num_logprobs,
        min_tokens=request.min_tokens,
        allowed_token_ids=list(dict.fromkeys(request.allowed_token_ids or [])),
        logprob_token_ids=list(dict.fromkeys(request.logprob_token_ids or [])),
        repetition_detection=_repetition(request.repetition_detection),
        priority=request.priority,
        cache_salt=request.cache_salt or "",
    )


def _repetition(wanted: RepetitionDetection | None) -> tuple[int, int, int]:
    """The engine's triple. Raises BadRequestError for one that detects nothing or looks back too far."""
    if wanted is None or wanted.max_pattern_size == 0:
        return (0, 1, 2)
    longest, shortest = wanted.max_pattern_size, wanted.min_pattern_size
    if not 0 <= shortest <= longest <= MAX_PATTERN:
        raise BadRequestError(
            f"repetition_detection: 0 <= min_pattern_size <= max_pattern_size <= {MAX_PATTERN} must hold, got "
            f"{shortest} and {longest}.",
            "repetition_detection",
        )
    if not 2 <= wanted.min_count < 2**31:
        raise BadRequestError(
            f"repetition_detection: min_count must be at least 2, got {wanted.min_count}.", "repetition_detection"
        )
    return (longest, shortest or 1, wanted.min_count)


def model_defaults(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The sampling defaults in a generation_config.json. Raises CheckpointError, naming `source`, for a bad one."""
    defaults = {name: config[name] for name in (*_DEFAULTS, "max_new_tokens") if config.get(name) is not None}
    for name, value in defaults.items():
        field_name = "max_tokens" if name == "max_new_tokens" else name
        rules = [(valid, rule) for ranged, valid, rule in _RANGES if ranged == field_name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"{source}: {name} must be a number, got {value!r}")
        for valid, rule in rules:
            if not valid(value):
                raise CheckpointError(f"{source}: {name} {rule}, got {value}")
    return defaults


def max_tokens(
    requested: int | None, default: int | None, min_tokens: int, num_prompt_tokens: int, max_model_len: int
) -> int:
    """How many tokens may be generated: what was asked for, at most what the context has left.

    `default`, the generation_config's max_new_tokens, is a limit to all requests as well: vLLM documents it so.

    Raises:
        BadRequestError: the prompt leaves no room, more was asked for than the whole context, or min_tokens do not fit.
    """
    if num_prompt_tokens + (requested != 0) > max_model_len:
        raise BadRequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
            f"{num_prompt_tokens} input tokens. Please reduce the length of the input prompt.",
            "input_tokens",
        )
    if requested is not None and requested > max_model_len:
        raise BadRequestError(
            f"max_tokens={requested} is greater than this model's maximum context length of {max_model_len} tokens.",
            "max_tokens",
        )
    room = max_model_len - num_prompt_tokens
    length = min(int(_first(requested, room)), int(_first(default, room)), room)
    if min_tokens > length:
        raise BadRequestError(
            f"min_tokens must be less than or equal to max_tokens={length}, got {min_tokens}.", "min_tokens"
        )
    return length


def check_logprobs(requested: int, limit: int, param: str) -> None:
    """Raise BadRequestError when more logprobs are asked for than the server gives (`limit` -1: no limit)."""
    if requested < 0:
        raise BadRequestError(f"`{param}` must be a positive value or -1.", param)
    if 0 <= limit < requested:
        kind = "prompt" if param == "prompt_logprobs" else "sample"
        raise BadRequestError(
            f"Requested {kind} logprobs of {requested}, which is greater than max allowed: {limit}; "
            "--max-logprobs raises the limit.",
            param,
        )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _logit_bias(bias: Mapping[str, float], vocab_size: int) -> list[tuple[int, float]]:
    wrong = [key for key in bias if len(key) > 20 or not key.removeprefix("-").isdecimal()]
    if wrong:
        raise BadRequestError(
            f"logit_bias: the keys must be token ids, got {', '.join(wrong[:10])[:500]}.", "logit_bias"
        )
    pairs = [(int(token), min(max(value, -100.0), 100.0)) for token, value in bias.items()]
    _check_vocabulary([token for token, _ in pairs], vocab_size, "logit_bias")
    return pairs


def _check_vocabulary(tokens: list[int], vocab_size: int, param: str) -> None:
    outside = [token for token in tokens if not 0 <= token < vocab_size]
    if outside:
        raise BadRequestError(
            f"token_id(s) {outside[:10]} in {param} contain out-of-vocab token ids. Vocabulary size: {vocab_size}",
            param,
        )
