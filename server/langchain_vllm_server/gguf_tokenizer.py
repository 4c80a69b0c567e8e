"""The tokenizer that GGUF metadata describes, built as a `tokenizers` one.

Two kinds: `gpt2` (byte-level BPE: vocabulary, merges, and the name of a pre-tokenizer) and `llama` (SentencePiece BPE:
vocabulary and scores). Meaning of the keys: ggml-org/ggml docs/gguf.md; what a name in `tokenizer.ggml.pre` stands for:
the tokenizer.json of the models it was made for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from langchain_vllm_server.tokenizer import set_template

if TYPE_CHECKING:
    from langchain_vllm_server.fields import Fields

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# Names of the special tokens → metadata keys.
_SPECIAL_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _GPT4.replace("DIGITS", r"\p{N}{1,3}")
_QWEN2 = _GPT4.replace("DIGITS", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Pre:
    """How a byte-level vocabulary's text is cut before the merges: by each pattern in turn."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges make of it
    add_bos: bool = False  # where the file does not say


_DIGITS = _Pre((r"\p{N}", _GPT2))
_PRE: dict[str, _Pre] = {
    # What a file without a name, or with this one, gets: llama.cpp's pattern from before names were given.
    "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "granite-docling"), _Pre((_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _Pre((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Pre((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"), _Pre((_QWEN2,))),
    "tekken": _Pre((_TEKKEN,), ignore_merges=True, add_bos=True),
}


def build_tokenizer(metadata: Fields) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer and its named special tokens.

    Raises:
        CheckpointError: The kind or the pre-tokenizer is not supported, or the vocabulary contradicts itself.
    """
    kind = metadata.text("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise metadata.error("tokenizer.ggml.model", f"{kind!r} is not supported; supported: {', '.join(_KINDS)}")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) != len(tokens):
        again = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise metadata.error("tokenizer.ggml.tokens", f"{again!r} is there more than once")
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens), [_NORMAL] * len(tokens))
    special = _special_tokens(metadata, tokens)
    backend, add_bos = _KINDS[kind](metadata, vocab, types, special)
    _add_tokens(backend, tokens, types)
    ends = [
        _end(metadata, special, "bos_token", metadata.flag("tokenizer.ggml.add_bos_token", add_bos)),
        _end(metadata, special, "eos_token", metadata.flag("tokenizer.ggml.add_eos_token", default=False)),
    ]
    if any(ends):
        set_template(backend, *ends)
    return backend, special


def _byte_level(
    metadata: Fields, vocab: dict[str, int], types: list[int], special: dict[str, str]
) -> tuple[tokenizers.Tokenizer, bool]:
    del types, special
    name = metadata.text("tokenizer.ggml.pre", "default")
    if name not in _PRE:
        raise metadata.error("tokenizer.ggml.pre", f"{name!r} is not supported; supported: {', '.join(_PRE)}")
    pre = _PRE[name]
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(metadata, "tokenizer.ggml.merges")]
    backend = _bpe(metadata, vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges)
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", default=False)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(
    metadata: Fields, vocab: dict[str, int], types: list[int], special: dict[str, str]
) -> tuple[tokenizers.Tokenizer, bool]:
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(vocab), None)
    normal = {token: scores[i] for token, i in vocab.items() if types[i] == _NORMAL}
    unknown = special.get("unk_token")
    backend = _bpe(
        metadata, vocab=vocab, merges=_merges(vocab, normal), unk_token=unknown, byte_fallback=True, fuse_unk=True
    )
    underscores = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.flag("tokenizer.ggml.add_space_prefix", default=True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), underscores])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = underscores
    backend.decoder = decoders.Sequence(steps)
    return backend, True


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose piece scores best: all pairs that make a piece, best piece first."""
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, vocab[left], vocab[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _bpe(metadata: Fields, **options: Any) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(**options))
    except Exception as error:  # the type that `tokenizers` raises is Exception itself
        raise metadata.error("tokenizer.ggml.merges", str(error)) from None


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens found whole in a text before it is cut: control tokens, which are special, and the user's own."""
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]
    backend.add_tokens(added)


def _special_tokens(metadata: Fields, tokens: list[str]) -> dict[str, str]:
    special = {}
    for name, key in _SPECIAL_KEYS.items():
        if key in metadata:
            special[name] = tokens[metadata.count(key, minimum=0, maximum=len(tokens) - 1)]
    return special


def _end(metadata: Fields, special: dict[str, str], name: str, add: bool) -> str | None:
    if add and name not in special:
        raise metadata.error(_SPECIAL_KEYS[name], f"missing, though the tokenizer adds a {name}")
    return special[name] if add else None


def _strings(metadata: Fields, key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or {*map(type, values)} != {str}:
        raise metadata.error(key, "expected a list of strings")
    return values


def _numbers(metadata: Fields, key: str, length: int, default: list[int] | None) -> Any:
    values = metadata.get(key) if default is None else metadata.get(key, default)
    if not isinstance(values, list) or len(values) != length or not {*map(type, values)} <= {int, float}:
        raise metadata.error(key, f"expected a list of {length} numbers, one for each token")
    return values
