"""The logits that llama.cpp computes for token ids, through its C interface.

That interface takes its settings as structs by value, whose members move from release to release, and a library comes
without its header. So a struct is handled here as a block larger than any of them was (of an argument passed by value
the callee reads what it knows), members are found by their default values, and what was asked for is read back, from
the interface or the log. A library where that does not come out is refused.
"""

from __future__ import annotations

import ctypes
import dataclasses
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

GGML_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}
STEP = 512  # tokens of one llama_decode


class _Block(ctypes.Structure):
    _fields_ = [("words", c_int32 * 128)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, c_void_p]),
    "llama_model_default_params": (_Block, []),
    "llama_context_default_params": (_Block, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _Block]),
    "llama_init_from_model": (c_void_p, [c_void_p, _Block]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_threads": (c_int32, [c_void_p]),
    "llama_n_threads_batch": (c_int32, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, ctypes.c_bool]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_free": (None, [c_void_p]),
    "llama_model_free": (None, [c_void_p]),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How llama.cpp shall compute."""

    threads: int
    context: int
    flash: bool = False
    kv: str = "f16"  # a key of GGML_TYPES

    def applied(self, defaults: _Block) -> _Block:
        """The context parameters with this setting; members are found by the values that they have by default."""
        words = list(defaults.words)
        if words[:4] != [512, 2048, 512, 1]:  # n_ctx, n_batch, n_ubatch, n_seq_max
            raise SystemExit("this llama.cpp's llama_context_params do not begin as they used to")
        words[:3] = [self.context, STEP, STEP]
        threads = _find(words, [4, 4], 4)  # n_threads, n_threads_batch
        words[threads : threads + 2] = [self.threads] * 2
        kinds = _find(words, [-1, -1, -1, -1], threads)  # types of RoPE scaling, pooling, attention, flash attention
        words[kinds + 3] = int(self.flash)
        cache = _find(words, [1, 1], kinds)  # type_k, type_v
        words[cache : cache + 2] = [GGML_TYPES[self.kv]] * 2
        return _Block(tuple(words))


def _find(words: list[int], wanted: list[int], start: int) -> int:
    for i in range(start, 32):
        if words[i : i + len(wanted)] == wanted:
            return i
    raise SystemExit("this llama.cpp's llama_context_params are not as they used to be")


class LlamaCpp:
    """A model in llama.cpp."""

    def __init__(self, library: str, model: Path, setting: Setting) -> None:
        self._log: list[str] = []
        self._callback = _LOG(lambda _level, text, _data: self._log.append(text.decode(errors="replace")))
        self._lib = ctypes.CDLL(library)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments
        self._lib.llama_log_set(self._callback, None)
        if hasattr(self._lib, "ggml_backend_load_all"):
            self._lib.ggml_backend_load_all()  # builds that choose the CPU's variant at run time
        self._lib.llama_backend_init()
        parameters = self._lib.llama_model_default_params()
        self._model = self._checked(self._lib.llama_model_load_from_file(str(model).encode(), parameters))
        parameters = setting.applied(self._lib.llama_context_default_params())
        self._context = self._checked(self._lib.llama_init_from_model(self._model, parameters))
        self._read_back(setting)
        self._vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self._batch = self._lib.llama_batch_init(STEP, 0, 1)

    def _checked(self, pointer: int | None) -> int:
        if pointer is None:
            raise SystemExit("llama.cpp: " + "".join(self._log[-5:]))
        return pointer

    def _read_back(self, setting: Setting) -> None:
        """Ends the program unless the context is what was asked for."""
        lib, context = self._lib, self._context
        sizes = [lib.llama_n_batch(context), lib.llama_n_threads(context), lib.llama_n_threads_batch(context)]
        log = [" ".join(line.split()) for line in "".join(self._log).splitlines()]
        flash = f"flash_attn = {'enabled' if setting.flash else 'disabled'}"
        wanted = [flash, f"K ({setting.kv})", f"V ({setting.kv})"]
        missing = [text for text in wanted if not any(text in line for line in log)]
        if lib.llama_n_ctx(context) < setting.context or sizes != [STEP, setting.threads, setting.threads] or missing:
            raise SystemExit(f"llama.cpp has not taken over {setting}: {sizes}, not in its log: {missing}")

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Of every token of a text that starts anew: (tokens, vocabulary)."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        rows = [self._step(tokens, start) for start in range(0, len(tokens), STEP)]
        return np.concatenate(rows)

    def _step(self, tokens: list[int], start: int) -> NDArray[np.float32]:
        part, batch = tokens[start : start + STEP], self._batch
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if status := self._lib.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode says {status}: " + "".join(self._log[-5:]))
        out = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (len(part), self._vocabulary))
        return np.array(out)

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
