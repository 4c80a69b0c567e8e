"""vLLM's request fields beyond OpenAI's, as fields of the models, and the names that they may go by."""

from __future__ import annotations

import difflib
import warnings
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class SamplingParameters(BaseModel):
    """What vLLM's chat and text completions have in common. None leaves a field out: the server's default applies."""

    top_k: int | None = None
    """Sample among the `top_k` likeliest tokens; 0 or -1 for all."""
    min_p: float | None = None
    """Leave out tokens less likely than `min_p` times the likeliest, 0 to 1."""
    repetition_penalty: float | None = None
    """Divides the logits of tokens seen in prompt and answer; above 1 discourages repetition."""
    use_beam_search: bool | None = None
    """Search for the likeliest answers, `n` beams wide, in place of sampling."""
    length_penalty: float | None = None
    """Of beam search: above 1 favours long answers."""
    min_tokens: int | None = None
    """Neither an end token nor a stop token before this many tokens."""
    ignore_eos: bool | None = None
    """Go on after the end token until `max_tokens`."""
    stop_token_ids: list[int] | None = None
    """End the answer at any of these tokens."""
    include_stop_str_in_output: bool | None = None
    """Keep the stop string in the answer."""
    bad_words: list[str] | None = None
    """Words that must not be in the answer."""
    allowed_token_ids: list[int] | None = None
    """The only tokens that an answer may have."""
    logprob_token_ids: list[int] | None = None
    """Tell the log probabilities of these tokens as well, at most 128; needs `logprobs`."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text; the server's default is true."""
    spaces_between_special_tokens: bool | None = None
    """Put spaces between special tokens that are shown; the server's default is true."""
    truncate_prompt_tokens: int | None = None
    """Keep so many tokens of a longer prompt; -1 for as many as the model can take."""
    truncation_side: Literal["left", "right"] | None = None
    """Where `truncate_prompt_tokens` cuts."""
    prompt_logprobs: int | None = None
    """Tell the log probabilities of the prompt's tokens, and of so many alternatives; -1 for all."""
    return_token_ids: bool | None = None
    """Tell the ids of the prompt's and the answer's tokens."""
    return_tokens_as_token_ids: bool | None = None
    """Name tokens in `logprobs` by `token_id:7` and not by their text."""
    return_token_offsets: bool | None = None
    """Tell where in the text each token begins."""
    return_prompt_text: bool | None = None
    """Tell the text that the chat template made."""
    structured_outputs: dict[str, Any] | None = None
    """Hold the answer to one of `json`, `regex`, `choice`, `grammar`, `json_object` or `structural_tag`."""
    repetition_detection: dict[str, int] | None = None
    """Give up on an answer that repeats itself: `max_pattern_size`, `min_pattern_size` and `min_count`."""
    watermarking: bool | None = None
    """Mark the answer's tokens, where the server is set up for it."""
    priority: int | None = None
    """Lower goes first; for servers with `--scheduling-policy priority`."""
    cache_salt: str | None = None
    """Share cached prompts only with requests of the same salt."""
    session_id: str | None = None
    """Names the conversation, for servers that route by it."""
    stream_interval: int | None = None
    """Send a piece of a stream every so many tokens."""
    kv_transfer_params: dict[str, Any] | None = None
    """For disaggregated serving: where the prompt's keys and values come from or go to."""
    vllm_xargs: dict[str, Any] | None = None
    """Arguments for extensions of the server."""


class ChatParameters(SamplingParameters):
    """What vLLM's chat completions have besides."""

    chat_template: str | None = None
    """A Jinja template in place of the model's; servers take it with `--trust-request-chat-template`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template."""
    add_generation_prompt: bool | None = None
    """End the prompt with the beginning of an answer; the server's default is true."""
    continue_final_message: bool | None = None
    """Go on with the last message in place of answering it; needs `add_generation_prompt=False`."""
    add_special_tokens: bool | None = None
    """Put special tokens before the text that the chat template made."""
    echo: bool | None = None
    """Repeat the last message before its continuation."""
    documents: list[dict[str, Any]] | None = None
    """Documents for chat templates that know of them."""
    include_reasoning: bool | None = None
    """False leaves the reasoning out of the answer."""
    thinking_token_budget: int | None = None
    """At most so many tokens of reasoning; -1 for no limit."""
    mm_processor_kwargs: dict[str, Any] | None = None
    """Arguments for the processor of images, audio and video."""
    media_io_kwargs: dict[str, Any] | None = None
    """How media are read, such as `{"video": {"num_frames": 8}}`."""


PER_CALL = frozenset({"request_id"})
"""vLLM's fields that only make sense for one request."""

_ALIASES = {"max_new_tokens": "max_tokens", "num_predict": "max_tokens", "max_completion_tokens": "max_tokens"}
"""Names of other LangChain classes, and what they are called here."""

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
    "guided_decoding_backend": None,
}
"""Fields that vLLM dropped for `structured_outputs`. It ignores them silently, and the answer is not constrained."""


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the names that the server knows today.

    Raises:
        ValueError: Two names of one thing.
    """
    translated = dict(values)
    for alias in _ALIASES.keys() & translated.keys():
        name, value = _ALIASES[alias], translated.pop(alias)
        if translated.setdefault(name, value) != value:
            raise ValueError(f"{alias} and {name} are the same and contradict each other: give one of them.")
    if guided := {name: translated.pop(name) for name in _GUIDED if name in translated}:
        warnings.warn(
            f"vLLM has no {', '.join(guided)} any more: pass structured_outputs={{…}}, or use with_structured_output.",
            DeprecationWarning,
            stacklevel=2,
        )
        structured = {new: value for old, value in guided.items() if (new := _GUIDED[old]) and value is not None}
        if structured:
            translated["structured_outputs"] = {**(translated.get("structured_outputs") or {}), **structured}
    return translated


def check_names(names: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Refuse a name that nothing would come of.

    Raises:
        ValueError: Which, and what it may have been meant to be.
    """
    candidates = {*known, *_ALIASES}
    for name in names:
        if name not in candidates:
            close = difflib.get_close_matches(name, candidates, n=1)
            hint = f"did you mean {close[0]}?" if close else "a field of the request goes into extra_body={…}."
            raise ValueError(f"{owner} has no parameter {name}: {hint}")
