"""The arithmetic of the table of qualities, and the finding of llama.cpp's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.llama_logits import Setting, _Block
from benchmarks.quality import TEXTS, Row, measure, windows
from langchain_vllm_server.checkpoint import load_checkpoint
from tests.server.checkpoint_fixtures import SMOLLM2

if TYPE_CHECKING:
    from numpy.typing import NDArray

# llama_context_params of two releases: n_ctx, n_batch, n_ubatch, n_seq_max, …, n_threads, n_threads_batch, …
RELEASES = {
    "b5000": [512, 2048, 512, 1, 4, 4, -1, -1, -1, -1, *([0] * 8), 0, 0, 0, 0, 1, 1, 0, 0],
    "b11434": [512, 2048, 512, 1, 0, 0, 1, 4, 4, 0, -1, -1, -1, -1, *([0] * 8), 0, 0, 0, 0, 1, 1, 0, 0],
}


def block(words: list[int]) -> _Block:
    return _Block(tuple(words + [0] * (128 - len(words))))


@pytest.mark.parametrize("words", RELEASES.values(), ids=RELEASES.keys())
def test_settings_are_found_wherever_they_are(words: list[int]) -> None:
    applied = list(Setting(threads=7, context=100, flash=True, kv="q8_0").applied(block(words)).words)
    threads, kinds, cache = words.index(4), words.index(-1), words.index(1, words.index(-1))
    assert applied[:4] == [100, 512, 512, 1]
    assert applied[threads : threads + 2] == [7, 7]
    assert applied[kinds : kinds + 4] == [-1, -1, -1, 1]
    assert applied[cache : cache + 2] == [8, 8]
    changed = {0, 1, threads, threads + 1, kinds + 3, cache, cache + 1}
    assert all(applied[i] == word for i, word in enumerate(words) if i not in changed)


@pytest.mark.parametrize("words", [[0] * 40, [512, 2048, 512, 1] + [0] * 40, [4096, 2048, 512, 1, 4, 4]])
def test_another_layout_is_refused(words: list[int]) -> None:
    with pytest.raises(SystemExit, match="llama_context_params"):
        Setting(threads=2, context=100).applied(block(words))


class Fixed:
    """An engine whose logits are known."""

    def __init__(self, logits: list[list[float]]) -> None:
        self._logits = np.array(logits, np.float32)

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        return self._logits[: len(tokens)]


def test_divergence_and_agreement() -> None:
    skewed = [np.log(2).item(), 0, 0]  # 1/2, 1/4, 1/4
    uniform, other = Row("a", Fixed([[0, 0, 0], skewed])), Row("b", Fixed([[0, 1, 0], [0, 0, 9]]))
    measure([1, 2], Fixed([skewed, skewed]), [uniform, other])
    expected = 0.5 * np.log(1.5) + 0.5 * np.log(0.75)
    assert uniform.divergence == pytest.approx([expected, 0], abs=1e-7)
    error = expected / 2 / 2**0.5
    assert uniform.cells()[:3] == ["a", f"{expected / 2:.5f} ± {error:.5f}", f"{expected:.5f}"]
    assert uniform.cells()[4:] == [f"{0.99 * expected:.4f}", "100.00 %"]
    assert other.cells()[-1] == "0.00 %"


def test_there_is_text_enough() -> None:
    checkpoint = load_checkpoint(SMOLLM2)
    found = windows(checkpoint, 8192)
    assert [len(window) for window in found] == [1024] * 8
    start = (TEXTS / "sampled.txt").read_text(encoding="utf-8")[:40]
    assert checkpoint.tokenizer.decode(found[4]).startswith(start)
    with pytest.raises(SystemExit, match="fewer than half"):
        windows(checkpoint, 100_000)
