from __future__ import annotations

import builtins
import json
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from langchain_vllm_server.errors import CheckpointError
from langchain_vllm_server.fields import Fields
from langchain_vllm_server.gguf_file import read_gguf
from langchain_vllm_server.tokenizer import Tokenizer
from tests.server.checkpoint_fixtures import NASTY, SMOLLM2, spm_metadata, spm_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

METADATA = read_gguf(SMOLLM2).metadata


def from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(Fields(metadata, "test.gguf"))


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return from_gguf(METADATA)


@pytest.fixture(scope="module")
def reference() -> Any:
    """SmolLM2's tokenizer as transformers reads it from the GGUF, with the digits apart as in SmolLM2's tokenizer.json.

    (transformers does not know `tokenizer.ggml.pre = smollm` and leaves digits together.)
    """
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.mark.parametrize("text", NASTY)
def test_smollm2_gives_the_reference_ids(text: str, smollm2: Tokenizer, reference: Any) -> None:
    ids = smollm2.encode(text)
    assert ids == reference.encode(text)
    for skip in (True, False):
        assert smollm2.decode(ids, skip) == reference.backend_tokenizer.decode(ids, skip_special_tokens=skip)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_smollm2_gives_the_reference_ids_for_any_text(text: str) -> None:
    ours, theirs = _pair()
    assert ours.encode(text) == theirs.encode(text).ids


@given(st.lists(st.integers(0, 49151), max_size=30))
@settings(max_examples=300, deadline=None)
def test_smollm2_decodes_any_ids_as_the_reference_does(ids: list[int]) -> None:
    ours, theirs = _pair()
    assert ours.decode(ids) == theirs.decode(ids)


def _pair(cache: list[Any] = []) -> Any:  # noqa: B006 (hypothesis takes no module fixtures)
    if not cache:
        ours = from_gguf(METADATA)
        vocab = {t: i for i, t in enumerate(METADATA["tokenizer.ggml.tokens"])}
        merges = [tuple(m.split(" ")) for m in METADATA["tokenizer.ggml.merges"]]
        theirs = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
        theirs.add_special_tokens(METADATA["tokenizer.ggml.tokens"][:17])
        theirs.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        theirs.decoder = decoders.ByteLevel()
        cache.append((ours, theirs))
    return cache[0]


def test_smollm2_known_ids(smollm2: Tokenizer) -> None:
    assert smollm2.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert smollm2.encode("<|im_start|>user\n") == [1, 4093, 198]
    assert (smollm2.bos_token, smollm2.eos_token, smollm2.eos_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    assert (smollm2.pad_token, smollm2.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert smollm2.vocab_size == 49152
    assert smollm2.special_ids == frozenset(range(17))
    assert smollm2.is_special(0)
    assert not smollm2.is_special(17)
    assert smollm2.token(905) == "Ġworld"
    assert smollm2.token_bytes(905) == b" world"
    assert smollm2.token_bytes(1) == b"<|im_start|>"


@pytest.mark.parametrize("token_id", [-1, 49152, 1 << 32, 1 << 70])
def test_ids_that_are_no_token(token_id: int, smollm2: Tokenizer) -> None:
    assert smollm2.token(token_id) == ""
    assert smollm2.token_bytes(token_id) == b""
    assert smollm2.decode([19556, token_id, 905]) == "Hello world"


def test_a_lone_surrogate_is_named(smollm2: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        smollm2.encode("a\ud83d")


PRE = {
    "gpt-2": ["I", "'m", " 1234", "!", "\n\n  ", " x"],
    "smollm": ["I", "'m", " ", "1", "2", "3", "4", "!", "\n\n  ", " x"],
    "llama-bpe": ["I", "'m", " ", "123", "4", "!\n\n", "  ", " x"],
    "qwen2": ["I", "'m", " ", "1", "2", "3", "4", "!\n\n", "  ", " x"],
    "default": ["I", "'", "m", " ", "123", "4", "!", "\n\n  ", " x"],
}


@pytest.mark.parametrize("name", PRE)
def test_pre_tokenizers_cut_as_their_models_do(name: str) -> None:
    tokenizer = from_gguf({**METADATA, "tokenizer.ggml.pre": name})
    pieces = tokenizer._backend.pre_tokenizer.pre_tokenize_str("I'm 1234!\n\n   x")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces] == PRE[name]


def test_llama_bpe_takes_a_word_that_is_a_token_whole() -> None:
    tokens = [*METADATA["tokenizer.ggml.tokens"], "zqxjk"]
    types = [*METADATA["tokenizer.ggml.token_type"], 1]
    metadata = {**METADATA, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    assert len(from_gguf(metadata).encode("zqxjk")) > 1
    assert from_gguf({**metadata, "tokenizer.ggml.pre": "llama-bpe"}).encode("zqxjk") == [49152]


def test_bos_and_eos_are_added_where_the_file_says_so() -> None:
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = from_gguf({**METADATA, **both})
    assert tokenizer.encode("Hello") == [1, 19556, 2]
    assert tokenizer.encode("Hello", add_special_tokens=False) == [19556]
    silent = {k: v for k, v in METADATA.items() if k != "tokenizer.ggml.add_bos_token"}
    assert from_gguf(silent).encode("Hello") == [19556]
    assert from_gguf({**silent, "tokenizer.ggml.pre": "llama-bpe"}).encode("Hello") == [1, 19556]
    with pytest.raises(CheckpointError, match="bos_token_id: missing"):
        from_gguf({**{k: v for k, v in METADATA.items() if "bos_token_id" not in k}, **both})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "bert", "'bert' is not supported; supported: gpt2, llama"),
        ("model", None, r"tokenizer\.ggml\.model: missing"),
        ("pre", "neverheardof", "'neverheardof' is not supported; supported: default, gpt-2"),
        ("tokens", [1, 2], "expected a list of strings"),
        ("tokens", [], "expected a list of strings"),
        ("tokens", ["a", "a"], "'a' is there more than once"),
        ("merges", ["no such pair"], "merges"),
        ("merges", ["x"], "merges"),
        ("token_type", [1], "expected a list of 49152 numbers"),
        ("token_type", ["1"] * 49152, "expected a list of 49152 numbers"),
        ("eos_token_id", 49152, "expected a whole number from 0 to 49151, found 49152"),
        ("add_bos_token", 1, "expected true or false"),
    ],
)
def test_bad_metadata_is_named(key: str, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        from_gguf({**METADATA, f"tokenizer.ggml.{key}": value})
    assert str(error.value).startswith(f"test.gguf: tokenizer.ggml.{key}")


def sentencepiece_encode(text: str, add_space_prefix: bool = True) -> list[str]:
    """SentencePiece's own procedure, slowly: of all neighbours that make a piece join those that make the best one."""
    tokens, scores, types = spm_vocabulary()
    score = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == 1}
    symbols = [*(("▁" if add_space_prefix and text else "") + text.replace(" ", "▁"))]
    while True:
        joined = [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in score]
        if not joined:
            break
        _, i = min(joined)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [p for s in symbols for p in ([s] if s in score else [f"<0x{byte:02X}>" for byte in s.encode()])]


@pytest.fixture(scope="module")
def spm() -> Tokenizer:
    return from_gguf(spm_metadata())


@pytest.mark.parametrize("text", [t for t in NASTY if "<" not in t])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_sentencepiece_ids(text: str, prefix: bool) -> None:
    tokenizer = from_gguf(spm_metadata(add_space_prefix=prefix, add_bos_token=False))
    assert [tokenizer.token(i) for i in tokenizer.encode(text)] == sentencepiece_encode(text, prefix)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@given(st.text(alphabet="▁ heloworldTHandingéb日本1234\n", max_size=40))
@settings(max_examples=300, deadline=None)
def test_sentencepiece_gives_sentencepiece_ids_for_any_text(text: str) -> None:
    tokenizer = from_gguf(spm_metadata(add_bos_token=False))
    assert [tokenizer.token(i) for i in tokenizer.encode(text)] == sentencepiece_encode(text)


def test_sentencepiece_special_tokens(spm: Tokenizer) -> None:
    assert spm.encode("Hello world")[0] == 1  # BOS, unless the file says otherwise
    assert [spm.token(i) for i in spm.encode("Hello</s>Hello", add_special_tokens=False)] == [
        "▁Hello",
        "</s>",
        "▁Hello",
    ]
    assert spm.special_ids == frozenset({0, 1, 2})
    tool = spm.token_id("<|tool|>")
    assert tool is not None
    assert tool in spm.encode("a<|tool|>b")
    assert not spm.is_special(tool)
    assert spm.decode(spm.encode("a<|tool|>b")) == "a<|tool|> b"
    assert spm.token_bytes(3 + 0xE2) == b"\xe2"
    assert spm.token_bytes(spm.encode("Hello", add_special_tokens=False)[0]) == b" Hello"


@given(st.lists(st.integers(0, 340), max_size=20))
@settings(max_examples=500, deadline=None)
def test_sentencepiece_decodes_whole_characters_as_the_reference_does(ids: list[int]) -> None:
    tokenizer = from_gguf(spm_metadata())
    theirs = tokenizer._backend.decode(ids, skip_special_tokens=True)
    ours = tokenizer.decode(ids)
    if "\ufffd" not in theirs:
        assert ours == theirs
    else:  # `tokenizers` gives up on a whole run of byte tokens, SentencePiece and we only on the bytes that are wrong
        assert "\ufffd" in ours
        assert ours.count("\ufffd") <= theirs.count("\ufffd")


def save_folder(folder: Path, tokenizer: Tokenizer, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {"eos_token": "<|im_end|>"}))
    return folder


@pytest.mark.parametrize("text", NASTY)
def test_a_folder_gives_the_same_ids(text: str, smollm2: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "smollm2-tokenizer"
    if not folder.exists():
        save_folder(folder, smollm2)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode(text) == smollm2.encode(text)
    assert tokenizer.special_ids == smollm2.special_ids


def test_a_folder_says_which_tokens_are_special_and_where_they_go(spm: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1, "</s>": 2}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.enable_truncation(1)
    backend.enable_padding(length=9)
    for post, config, expected in (
        (None, {}, [0, 0]),
        (None, {"bos_token": "<s>", "add_bos_token": True}, [1, 0, 0]),
        (None, {"bos_token": {"content": "<s>"}, "add_bos_token": True}, [1, 0, 0]),
        (None, {"eos_token": "</s>", "add_eos_token": True}, [0, 0, 2]),
        (("<s> $A", [("<s>", 1)]), {"bos_token": "<s>"}, [1, 0, 0]),
        (("<s> $A", [("<s>", 1)]), {"bos_token": "<s>", "add_eos_token": False}, [1, 0, 0]),
        (("<s> $A", [("<s>", 1)]), {"bos_token": "<s>", "add_bos_token": False}, [0, 0]),
        (("<s> $A", [("<s>", 1)]), {"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True}, [1, 0, 0, 2]),
    ):
        if post is not None:
            backend.post_processor = processors.TemplateProcessing(single=post[0], special_tokens=post[1])
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.encode("aa") == expected
        assert tokenizer.special_ids == {tokenizer.token_id(t) for t in tokenizer.special_tokens.values()}


def test_special_tokens_map_fills_in(smollm2: Tokenizer, tmp_path: Path) -> None:
    save_folder(tmp_path, smollm2, {"eos_token": "<|im_end|>"})
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}')
    assert Tokenizer.from_folder(tmp_path).special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, "no tokenizer; looked for tokenizer.json, tokenizer.model and vocab.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"), "tokenizer.json"),
    ],
)
def test_a_bad_folder_is_named(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_what_transformers_cannot_convert_is_told_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"^[^\n]*cannot convert the tokenizer[^\n]*$"):
        Tokenizer.from_folder(tmp_path)


def test_a_decoder_that_we_do_not_know_is_named(smollm2: Tokenizer, tmp_path: Path) -> None:
    save_folder(tmp_path, smollm2)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**raw, "decoder": {"type": "CTC", "pad_token": "<pad>",
        "word_delimiter_token": "|", "cleanup": True}}))  # fmt: skip
    with pytest.raises(CheckpointError, match="decoder CTC is not supported"):
        Tokenizer.from_folder(tmp_path)


def old_folder(tmp_path: Path) -> Path:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    return tmp_path


def test_an_old_tokenizer_is_converted_by_transformers(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(old_folder(tmp_path))
    assert tokenizer.encode("abab") == [2, 2]
    assert tokenizer.eos_token == "<|endoftext|>"


def test_an_old_tokenizer_without_transformers_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*pip install 'langchain-vllm\[torch\]'"):
        Tokenizer.from_folder(old_folder(tmp_path))


def test_llama_folder_decodes_like_its_tokenizer_json(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"▁a": 0, "b": 1, "▁": 2, "a": 3}, merges=[("▁", "a")]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in ("a", " a", "  a ba", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == backend.decode(backend.encode(text).ids) == text
