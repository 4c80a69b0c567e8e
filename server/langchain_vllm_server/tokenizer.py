"""Text to token ids and back: a `tokenizers` tokenizer, with what the server needs to know of it beside it."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import orjson
import tokenizers
from tokenizers import processors

from langchain_vllm_server.errors import CheckpointError
from langchain_vllm_server.fields import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from langchain_vllm_server.fields import Fields

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()


@dataclass(frozen=True)
class Decoding:
    """How tokens become bytes.

    Attributes:
        byte_level: Each character of a token is a byte in GPT-2's spelling; otherwise "▁" is a space.
        byte_fallback: Tokens "<0x00>" to "<0xFF>" are bytes.
        strip_left: Spaces that the whole text loses at its start.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    strip_left: int = 0

    @property
    def errors(self) -> str:
        """What stands for bytes that are not UTF-8: U+FFFD for each, or (byte level) for each broken character."""
        return "replace" if self.byte_level else _EACH_BYTE

    def token_bytes(self, token: str) -> bytes:
        """The bytes that a token contributes to the text."""
        if self.byte_level:
            try:
                return bytes([_BYTES[char] for char in token])
            except KeyError:  # an added token, spelled as it is
                return token.encode()
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes.fromhex(token[3:5])
            except ValueError:
                pass
        return token.replace("▁", " ").encode()


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


# SentencePiece and `tokenizers` write one U+FFFD per byte; Python's own "replace" one per broken character.
_EACH_BYTE = "langchain_vllm_server.each_byte"
codecs.register_error(_EACH_BYTE, _replace_each_byte)


class Tokenizer:
    """A checkpoint's tokenizer. Made by `from_folder` or `from_gguf`; safe to use from several threads.

    Attributes:
        decoding: How tokens become bytes.
        special_tokens: The named ones ("bos_token" → "<s>", …), as chat templates see them.
        special_ids: Tokens that are no part of the text, such as end-of-text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> None:
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.decoding = _decoding(backend)
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and what tokenizer_config.json adds to it.

        Where there is only a tokenizer.model or vocab.json, transformers converts it, if it is installed.

        Raises:
            CheckpointError: There is no tokenizer, it is damaged, or transformers is needed and not installed.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            return _converted_by_transformers(folder)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the type that `tokenizers` raises is Exception itself
            raise CheckpointError(f"{file}: {error}") from None
        settings = {**_settings(folder / "special_tokens_map.json"), **_settings(folder / "tokenizer_config.json")}
        special = _named_tokens(settings)
        backend.no_truncation()
        backend.no_padding()
        _mark_special(backend, special.values())
        _set_ends(backend, special, settings)
        return cls(backend, special)

    @classmethod
    def from_gguf(cls, metadata: Fields) -> Tokenizer:
        """Build the tokenizer that GGUF metadata describes. Raises CheckpointError."""
        from langchain_vllm_server.gguf_tokenizer import build_tokenizer

        return cls(*build_tokenizer(metadata))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; special tokens spelled out in it become their ids.

        Args:
            text: Any text without lone surrogates.
            add_special_tokens: Whether the model's own beginning and end are put around it.

        Raises:
            ValueError: The text has a lone surrogate, which is no character.
        """
        try:
            # Unlike `encode`, this releases the GIL: a long text holds up nobody else.
            batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise ValueError(
                "the text has a lone surrogate (half of a UTF-16 pair), which is not a character"
            ) from None
        ids: list[int] = batch[0].ids
        return ids

    def offsets(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, int]]:
        """Begin and end of each of `encode`'s tokens in the text, in characters. Raises ValueError as `encode` does."""
        try:
            batch = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise ValueError(
                "the text has a lone surrogate (half of a UTF-16 pair), which is not a character"
            ) from None
        found: list[tuple[int, int]] = batch[0].offsets
        return found

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids. Bytes that are not UTF-8 become U+FFFD; ids that are no token are left out."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        raw = b"".join(self.token_bytes(i) for i in ids if i not in skipped)
        text = raw.decode(errors=self.decoding.errors)
        stripped = text[: self.decoding.strip_left].lstrip(" ")
        return stripped + text[self.decoding.strip_left :]

    def to_json(self) -> str:
        """The whole tokenizer in the format of tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it; "" for an id that is none."""
        if not 0 <= token_id < 1 << 32:
            return ""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token contributes to a text; b"" for an id that is none."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self.decoding.token_bytes(self.token(token_id))
            if found:
                self._bytes[token_id] = found
        return found

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def is_special(self, token_id: int) -> bool:
        """Whether the token is no part of the text."""
        return token_id in self.special_ids

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        size: int = self._backend.get_vocab_size()
        return size

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token as the vocabulary spells it: no token stands for more characters."""
        return max(len(self.token(i).encode()) for i in range(self.vocab_size))

    @property
    def bos_token(self) -> str | None:
        """Begins a text."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Ends a text."""
        return self.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        """Fills up a batch."""
        return self.special_tokens.get("pad_token")

    @property
    def unk_token(self) -> str | None:
        """Stands for what the vocabulary cannot spell."""
        return self.special_tokens.get("unk_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`."""
        return None if self.bos_token is None else self.token_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`."""
        return None if self.eos_token is None else self.token_id(self.eos_token)


def set_template(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Put a token before each text, and one after it, or neither."""
    single = " ".join((*([bos] if bos else []), "$A", *([eos] if eos else [])))
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def _decoding(backend: tokenizers.Tokenizer) -> Decoding:
    state: dict[str, Any] = orjson.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "None"}
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return Decoding(byte_level=True)
    underscores = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strips = [step for step in steps if step["type"] == "Strip" and step["content"] == " " and step["stop"] == 0]
    others = [k for s, k in zip(steps, kinds, strict=True) if s not in strips and k not in ("ByteFallback", "Fuse")]
    if others != ["Replace"] or underscores not in steps:
        raise CheckpointError(
            f"tokenizer: decoder {' + '.join(kinds)} is not supported, only byte-level and SentencePiece"
        )
    return Decoding(byte_fallback="ByteFallback" in kinds, strip_left=sum(step["start"] for step in strips))


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens; each is a string or an object with its `content`."""
    named = {}
    for name in SPECIAL_NAMES:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[name] = text
    return named


def _mark_special(backend: tokenizers.Tokenizer, named: Iterable[str]) -> None:
    """A named token of the vocabulary is special even where tokenizer.json does not say so."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [t for t in named if t not in known and backend.token_to_id(t) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in missing])


def _set_ends(backend: tokenizers.Tokenizer, special: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Follow add_bos_token and add_eos_token where they say other than tokenizer.json's own post-processor does."""
    now = backend.encode("").tokens
    wanted = []
    for name, flag, is_there in (
        ("bos_token", "add_bos_token", now[:1]),
        ("eos_token", "add_eos_token", now[-1:]),
    ):
        token = special.get(name)
        present = token is not None and is_there == [token]
        add = settings.get(flag) if isinstance(settings.get(flag), bool) else present
        wanted.append((token if add and backend.token_to_id(token or "") is not None else None, present))
    if any((token is not None) != present for token, present in wanted):
        set_template(backend, wanted[0][0], wanted[1][0])


def _converted_by_transformers(folder: Path) -> Tokenizer:
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")):
        raise CheckpointError(f"{folder}: no tokenizer; looked for tokenizer.json, tokenizer.model and vocab.json")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise CheckpointError(
            f"{folder}: no tokenizer.json; the tokenizer there needs transformers to be converted: "
            "pip install 'langchain-vllm[torch]'"
        ) from None
    try:
        slow = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = slow.backend_tokenizer
    except Exception as error:  # whatever transformers makes of a tokenizer that it cannot read
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: transformers cannot convert the tokenizer: {reason}") from error
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, {k: str(v) for k, v in slow.special_tokens_map.items() if k in SPECIAL_NAMES})
