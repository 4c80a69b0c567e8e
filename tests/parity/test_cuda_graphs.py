"""Decode steps as CUDA graphs: recorded once, replayed with other numbers, bit for bit what a whole prompt gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from langchain_vllm_server import _engine, _model_test
from langchain_vllm_server.gate import Progress
from langchain_vllm_server.load import load
from langchain_vllm_server.settings import parse_settings
from tests.emulated_gpu import emulated, machine, make_model
from tests.engines import Client
from tests.parity.models import num_blocks, our_model, run
from tests.parity.test_tiny_models import CASES, random_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LENGTHS = [150, 90, 75, 40, 40, 33, 200]  # tokens of each sequence; the first has two partitions of keys


class Sequences:
    """Sequences that are computed piece by piece, each logit compared with those of its whole."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model = our_model(folder, device="cuda", num_blocks=112, **options)
        self.tokens = [random_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
        self.blocks = [[16 * i + j for j in range(num_blocks(length))] for i, length in enumerate(LENGTHS)]
        self.computed = [0] * len(LENGTHS)
        wholes = our_model(folder, device="cuda", num_blocks=112, **options)
        self.expected: list[NDArray[Any]] = [
            wholes.forward([run(tokens, 0, blocks)]) for tokens, blocks in zip(self.tokens, self.blocks, strict=True)
        ]
        assert wholes.graphs == (0, 0)

    def step(self, counts: dict[int, int]) -> bool:
        """The next tokens of some sequences, in this order. Whether it was a replay."""
        before = self.model.graphs[0]
        ends = {i: self.computed[i] + count for i, count in counts.items()}
        logits = self.model.forward(
            [run(self.tokens[i][self.computed[i] : end], self.computed[i], self.blocks[i]) for i, end in ends.items()]
        )
        wanted = np.concatenate([self.expected[i][self.computed[i] : end] for i, end in ends.items()])
        np.testing.assert_array_equal(logits, wanted)
        for i, end in ends.items():
            self.computed[i] = end
        return bool(self.model.graphs[0] > before)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-gqa", {}),
        ("llama-gqa", {"exact": False, "weight_format": "INT8", "kv_format": "INT8"}),
        ("mistral-sliding_window", {"kv_format": "BF16"}),
        ("mpt-alibi", {}),
        ("mixtral-two_of_five", {}),
        ("mixtral-all_five", {"exact": False, "weight_format": "INT8"}),
    ],
)
def test_replays_on_cuda_are_exact(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    CASES[name](tmp_path)
    sequences = Sequences(tmp_path, **options)
    assert not sequences.step({0: 122, 1: 17, 2: 15, 3: 1, 4: 5, 5: 2})
    assert [sequences.step(dict.fromkeys(range(5), 1)) for _ in range(9)] == [False] + [True] * 8
    # One more, in another order: the shape is the same, for five were filled up to eight as well.
    assert sequences.step(dict.fromkeys((5, 0, 4, 2, 3, 1), 1))
    assert [sequences.step(dict.fromkeys((4, 2, 0, 3), 1)) for _ in range(3)] == [False, True, True]
    assert [sequences.step(dict.fromkeys((3, 4, 0), 1)) for _ in range(3)][1:] == [True, True]
    # Prompts beside them and between them, at last a larger one than any before: scratch moves.
    assert not sequences.step({2: 1, 5: 20, 0: 1})
    assert not sequences.step({6: 190})
    assert [sequences.step(dict.fromkeys((0, 3, 4, 2), 1)) for _ in range(3)] == [False, True, True]
    assert [sequences.step({3: 1}) for _ in range(3)] == [False, True, True]


def test_steps_that_are_no_decode_are_no_graphs_on_cuda(tmp_path: Path) -> None:
    CASES["llama-gqa"](tmp_path)
    sequences = Sequences(tmp_path)
    for _ in range(4):
        assert not sequences.step({0: 2, 1: 1})
    assert sequences.model.graphs == (0, 0)


@emulated
def test_an_eager_engine_records_no_graphs_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--enforce-eager` changes how steps are launched, and no token."""
    monkeypatch.setattr(_engine, "Engine", _model_test.Engine)

    def generate(*flags: str) -> tuple[list[int], int]:
        settings = parse_settings([str(tmp_path), "--device", "cuda", "--memory", "8MiB", *flags])
        before = _model_test.cuda_graphs_recorded()
        engine = load(settings, Progress()).engine
        try:
            tokens = Client(engine).generate([1, 2, 3], max_tokens=6).tokens
        finally:
            engine.stop()
        return tokens, _model_test.cuda_graphs_recorded() - before

    make_model(tmp_path)
    with machine():
        (tokens, recorded), (eager_tokens, eager_recorded) = generate(), generate("--enforce-eager")
    assert (recorded > 0, eager_recorded) == (True, 0)
    assert eager_tokens == tokens
