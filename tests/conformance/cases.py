"""The requests that `compare.py` sends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Request:
    """One request; a body of bytes is sent as it is."""

    name: str
    method: str
    path: str
    body: dict[str, Any] | bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


def _post(name: str, path: str, **body: Any) -> Request:
    return Request(f"{path} {name}", "POST", path, {"model": "smollm2", **body})


def _chat(name: str, **body: Any) -> Request:
    """Greedy and of a fixed length, unless the body says otherwise."""
    fixed = {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0, "max_tokens": 6}
    return _post(name, CHAT, **(fixed | {"ignore_eos": True} | body))


def _text(name: str, **body: Any) -> Request:
    fixed = {"prompt": "One two three", "temperature": 0, "max_tokens": 6}
    return _post(name, TEXT, **(fixed | {"ignore_eos": True} | body))


def _both(name: str, **body: Any) -> list[Request]:
    """Whole and streamed, of chats and of texts."""
    return [
        make(f"{name}{', streamed' if stream else ''}", **body, **({"stream": True} if stream else {}))
        for make in (_chat, _text)
        for stream in (False, True)
    ]


_WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
_TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": _WEATHER}}]
_NAMED = {"type": "function", "function": {"name": "weather"}}
_USAGE = {"stream_options": {"include_usage": True}}
_CONTINUOUS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "w", "schema": _WEATHER}}
_ENDS = {"ignore_eos": False, "max_tokens": 60}

_PAGES = [
    Request(f"{method} {path}", method, path)
    for method, path in [
        ("GET", "/health"), ("GET", "/ping"), ("POST", "/ping"), ("GET", "/version"), ("GET", "/load"),
        ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/tokenizer_info"), ("GET", "/nowhere"),
        ("PUT", "/v1/models"), ("GET", CHAT), ("HEAD", "/health"),
    ]
]  # fmt: skip

_ANSWERS = [
    *_both("plain"),
    *_both("usage", **_USAGE),
    *_both("two answers", n=2, temperature=0.5, seed=1),
    *_both("a stop string", stop=["o"], include_stop_str_in_output=True, max_tokens=40),
    *_both("a stop token", stop_token_ids=[*range(3, 1000), 19556], max_tokens=4),
    *_both("echo", echo=True),
    *_both("ids", return_token_ids=True),
    *_both("choice", structured_outputs={"choice": ["yes", "no"]}, ignore_eos=False),
    *_both("schema", response_format=_SCHEMA, **_ENDS),
    _chat("continuous usage, streamed", stream=True, **_CONTINUOUS),
    _chat("usage not wanted, streamed", stream=True, stream_options={"include_usage": False}),
    _chat("logprobs", logprobs=True, top_logprobs=2),
    _chat("logprobs, streamed", logprobs=True, top_logprobs=2, stream=True),
    _chat("logprobs of none but the chosen", logprobs=True),
    _chat("prompt_logprobs", prompt_logprobs=1),
    _chat("tokens as ids", logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True),
    _chat("tools, required", tools=_TOOLS, tool_choice="required", parallel_tool_calls=False, **_ENDS),
    _chat("tools, required, streamed", tools=_TOOLS, tool_choice="required", stream=True,
          parallel_tool_calls=False, **_ENDS),
    _chat("tools, named", tools=_TOOLS, tool_choice=_NAMED, **_ENDS),
    _chat("tools, named, streamed", tools=_TOOLS, tool_choice=_NAMED, stream=True, **_ENDS),
    _chat("tools, none", tools=_TOOLS, tool_choice="none"),
    _chat("tools, auto, no call", tools=_TOOLS, max_tokens=2),
    _chat("tools, auto, no call, streamed", tools=_TOOLS, max_tokens=2, stream=True),
    _chat("tools, cut", tools=_TOOLS, tool_choice="required", max_tokens=1),
    _chat("a user's request id", request_id="mine"),
    _chat("an unknown field", nobody_knows=1),
    _chat("no model", model=None),
    _chat("parts", messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
    _chat("continued", messages=[{"role": "assistant", "content": "Once"}], add_generation_prompt=False,
          continue_final_message=True),
    _chat("min_tokens, bad_words, logit_bias", min_tokens=2, bad_words=["hello"], logit_bias={"12": 1}),
    _text("logprobs", logprobs=2),
    _text("logprobs, streamed", logprobs=2, stream=True),
    _text("logprobs 0", logprobs=0),
    _text("echo and logprobs", logprobs=1, echo=True),
    _text("echo and logprobs, streamed", logprobs=1, echo=True, stream=True),
    _text("only scores", logprobs=1, echo=True, max_tokens=0),
    _text("prompt_logprobs", prompt_logprobs=0),
    _text("two prompts", prompt=["One", "Two"]),
    _text("two prompts, streamed", prompt=["One", "Two"], stream=True, **_USAGE),
    _text("token ids", prompt=[1, 2, 3]),
    _text("lists of token ids", prompt=[[1, 2], [3]]),
    _text("beam search", use_beam_search=True, n=2),
    _post("conversations", f"{CHAT}/batch", messages=[[{"role": "user", "content": "Hi"}]] * 2, max_tokens=3),
    _post("a chat", "/invocations", messages=[{"role": "user", "content": "Hi"}], max_tokens=3),
    _post("a text", "/invocations", prompt="Hi", max_tokens=3),
    _post("nothing", "/invocations"),
    _post("text", "/tokenize", prompt="Hello world"),
    _post("text, spelled", "/tokenize", prompt="Hello world", return_token_strs=True),
    _post("messages", "/tokenize", messages=[{"role": "user", "content": "Hi"}]),
    _post("neither", "/tokenize"),
    _post("ids", "/detokenize", tokens=[1, 2, 3]),
    _post("no token", "/detokenize", tokens=[999999]),
    _post("a text", "/v1/embeddings", input="Hi"),
    _post("a text", "/v1/score", text_1="a", text_2="b"),
    _post("documents", "/v1/rerank", query="a", documents=["b"]),
    _post("a text", "/classify", input="a"),
]  # fmt: skip

_REFUSED = [
    _chat("no such model", model="nope"),
    _text("no such model", model="nope"),
    _post("no such model", "/tokenize", model="nope", prompt="a"),
    Request(f"{CHAT} no JSON", "POST", CHAT, b"{"),
    Request(f"{CHAT} no object", "POST", CHAT, b"[1]"),
    Request(f"{CHAT} empty", "POST", CHAT, b""),
    Request(f"{CHAT} a form", "POST", CHAT, b"a=b", {"content-type": "application/x-www-form-urlencoded"}),
    Request(f"{CHAT} no messages", "POST", CHAT, {"model": "smollm2"}),
    _chat("messages that are none", messages="Hi"),
    _chat("no message", messages=[]),
    _chat("a message without a role", messages=[{"content": "Hi"}]),
    _chat("an unknown role", messages=[{"role": "nobody", "content": "Hi"}], max_tokens=1),
    _chat("a picture", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]),
    _chat("a type that does not fit", temperature="hot"),
    *[
        make(f"{name}={value}", **{name: value})
        for make in (_chat, _text)
        for name, value in [
            ("temperature", -1), ("temperature", 2.5), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", 2),
            ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0), ("n", 0), ("n", 99999),
            ("n", 2), ("stop", [""]), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 99999), ("min_tokens", 99),
            ("logit_bias", {"999999": 1}), ("logit_bias", {"a": 1}), ("allowed_token_ids", []),
            ("allowed_token_ids", [999999]), ("bad_words", [""]), ("stop_token_ids", [-1]), ("seed", 2**70),
            ("prompt_logprobs", -2), ("prompt_logprobs", 21), ("truncate_prompt_tokens", -2), ("cache_salt", ""),
            ("stream_options", {"include_usage": True}), ("priority", 1), ("response_format", {"type": "json_schema"}),
            ("response_format", {"type": "nope"}), ("structured_outputs", {"regex": "("}),
            ("structured_outputs", {"choice": []}), ("structured_outputs", {"json": {}, "regex": "a"}),
            ("structured_outputs", {}), ("structured_outputs", {"json": {"type": "nope"}}),
            ("structured_outputs", {"grammar": "nope ::="}),
        ]
    ],
    _chat("prompt_logprobs of a stream", prompt_logprobs=1, stream=True),
    _chat("top_logprobs without logprobs", top_logprobs=2),
    _chat("too many top_logprobs", top_logprobs=21, logprobs=True),
    _chat("tools=[]", tools=[]),
    _chat("tool_choice without tools", tool_choice="auto"),
    _chat("required without tools", tool_choice="required"),
    _chat("a tool that is not there", tools=_TOOLS, tool_choice={"type": "function", "function": {"name": "nope"}}),
    _chat("an empty tool_choice", tools=_TOOLS, tool_choice={}),
    _chat("a tool_choice that is none", tools=_TOOLS, tool_choice="nope"),
    _chat("a template of its own", chat_template="{{ 1 }}"),
    _chat("both ends", add_generation_prompt=True, continue_final_message=True),
    _chat("too long", messages=[{"role": "user", "content": "word " * 3000}]),
    _text("too long", prompt="word " * 3000),
    _text("too many logprobs", logprobs=21),
    _text("no prompt", prompt=""),
    _text("an empty list", prompt=[]),
    _text("a token that is none", prompt=[999999]),
    _text("a negative token", prompt=[-1]),
    _text("a mixed prompt", prompt=["a", 1]),
    _text("suffix", suffix="end"),
    _text("beam search, streamed", use_beam_search=True, stream=True),
    _text("max_tokens 0 without echo", max_tokens=0),
]  # fmt: skip

GENERATING = [*_PAGES, *_ANSWERS, *_REFUSED]

POOLING = [
    *[Request(f"{method} {path}", method, path) for method, path in [("GET", "/health"), ("GET", "/v1/models")]],
    _post("a text", "/v1/embeddings", input="Hello"),
    _post("texts", "/v1/embeddings", input=["Hello", "world"]),
    _post("ids", "/v1/embeddings", input=[1, 2, 3]),
    _post("lists of ids", "/v1/embeddings", input=[[1, 2], [3]]),
    _post("messages", "/v1/embeddings", messages=[{"role": "user", "content": "Hi"}]),
    _post("base64", "/v1/embeddings", input="Hello", encoding_format="base64"),
    _post("bytes", "/v1/embeddings", input="Hello", encoding_format="bytes"),
    _post("dimensions", "/v1/embeddings", input="Hello", dimensions=8),
    _post("nothing", "/v1/embeddings", input=""),
    _post("no texts", "/v1/embeddings", input=[]),
    _post("no input", "/v1/embeddings"),
    _post("a wrong encoding", "/v1/embeddings", input="a", encoding_format="nope"),
    _post("no such model", "/v1/embeddings", model="nope", input="a"),
    _post("too long", "/v1/embeddings", input="word " * 3000),
    _post("too long, cut", "/v1/embeddings", input="word " * 3000, truncate_prompt_tokens=10),
    _post("cut to too much", "/v1/embeddings", input="word", truncate_prompt_tokens=99999),
    _post("no token", "/v1/embeddings", input=[999999]),
    _post("normalize", "/v1/embeddings", input="a", normalize=True),
    _post("a text", "/pooling", input="Hello"),
    _post("texts", "/pooling", input=["Hello", "world"]),
    _post("a wrong task", "/pooling", input="Hello", task="nope"),
    _post("token_embed", "/pooling", input="Hello", task="token_embed"),
    *[
        request
        for path in ("/score", "/v1/score")
        for request in [
            _post("two texts", path, text_1="a", text_2="b"),
            _post("one to many", path, text_1="a", text_2=["b", "c"]),
            _post("pairs", path, text_1=["a", "b"], text_2=["c", "d"]),
            _post("pairs that do not match", path, text_1=["a", "b"], text_2=["c", "d", "e"]),
            _post("queries and documents", path, queries="a", documents=["b"]),
            _post("only one", path, text_1="a"),
        ]
    ],
    *[
        request
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
        for request in [
            _post("documents", path, query="a", documents=["b", "c"]),
            _post("the first", path, query="a", documents=["b", "c"], top_n=1),
        ]
    ],
    _post("no documents", "/rerank", query="a", documents=[]),
    _post("no query", "/rerank", documents=["a"]),
    _post("a text", "/classify", input="a"),
    _chat("a chat"),
    _post("an embedding", "/invocations", input="a"),
]
