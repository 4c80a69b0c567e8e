"""A mixture of experts' operations on every instruction set: shares against float64, products against linear()'s.

The order of the choices is the device's own, so what is seen is what goes in and what comes out again: combine().
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from langchain_vllm_server import _kernels_test
from tests.kernels.weights import BLOCKS, DEVICES, FORMATS, ISAS, PLAIN, random_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

U = 2.0**-24
COLS = 256

every_isa = pytest.mark.parametrize("isa", DEVICES)


def sources(parts: list[tuple[str, NDArray[np.uint8]]]) -> list[tuple[str, int, int, NDArray[np.uint8]]]:
    """What the kernels take for rows in a format."""
    return [(name, len(data), data.shape[1] // BLOCKS[name][1] * BLOCKS[name][0], data.ravel()) for name, data in parts]


def run(experts: Any, scores: Floats, x: Floats) -> Floats:
    """(n, rows): each row of x through the experts that its scores (n, num_experts) choose."""
    experts.route(scores)
    return experts.combine(experts.multiply(experts.dispatch(x)))  # type: ignore[no-any-return]


def shares_of(isa: str, scores: Floats, per_token: int, *, norm: bool = True, threads: int = 1) -> Floats:
    """(n, num_experts): each expert answers 1 in a column of its own."""
    num_experts = scores.shape[1]
    ones = np.eye(num_experts, dtype=np.float32)[:, :, None]
    parts = [("F32", one.view(np.uint8)) for one in ones]
    experts = _kernels_test.Experts(isa, threads, num_experts, per_token, norm, sources(parts), max_tokens=len(scores))
    return run(experts, scores, np.ones((len(scores), 1), np.float32))


def chosen(scores: Floats, per_token: int) -> NDArray[np.int64]:
    """(n, per_token): largest first, of equal ones the lower number."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :per_token]


def random_scores(rng: np.random.Generator, n: int, num_experts: int) -> Floats:
    return (3 * rng.normal(size=(n, num_experts))).astype(np.float32)


@every_isa
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("num_experts", "per_token"), [(1, 1), (3, 1), (8, 2), (5, 5), (64, 6), (257, 8)])
def test_shares(isa: str, num_experts: int, per_token: int, norm: bool) -> None:
    scores = random_scores(np.random.default_rng(1), 37, num_experts)
    exponentials = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    among = np.zeros_like(exponentials)
    np.put_along_axis(among, chosen(scores, per_token), 1, axis=1)
    summed = exponentials * among if norm else exponentials
    expected = exponentials * among / summed.sum(axis=1, keepdims=True)
    # A difference of scores is rounded, an exponential is right to 1.01 units in the last place (test_pointwise), at
    # most 2.02 U; they are added up and divided. 1 U covers the products of these errors.
    relative = (2 * (np.ptp(scores, axis=1, keepdims=True) + 2.02) + num_experts + 1 + 1) * U
    got = shares_of(isa, scores, per_token, norm=norm)
    assert np.all(np.abs(got - expected) <= relative * expected)


@every_isa
def test_of_equal_scores_the_lower_number_goes_first(isa: str) -> None:
    """In the sum, too: there, what is not first in turn is lost beside 2^30."""
    scores = np.array([[1, 1, 1, 1, 1], [0, 2, 1, 2, 1], [-1, -1, 5, -1, -1]], np.float32)
    assert [set(np.flatnonzero(row)) for row in shares_of(isa, scores, 3)] == [{0, 1, 2}, {1, 2, 3}, {0, 1, 2}]
    values = np.array([2**30, -(2**30), 1, 0, 0], np.float32)
    experts = _kernels_test.Experts(
        isa, 1, 5, 3, True, sources([("F32", value.reshape(1, 1).view(np.uint8)) for value in values])
    )
    third = np.float32(1) / np.float32(3)
    assert run(experts, np.zeros((1, 5), np.float32), np.ones((1, 1), np.float32)) == third
    assert run(experts, -np.arange(5, dtype=np.float32)[None] * 1e-9, np.ones((1, 1), np.float32)) == third
    assert run(experts, np.array([[0, 0, 0.5, 0, 0]], np.float32), np.ones((1, 1), np.float32)) == 0


@every_isa
@pytest.mark.parametrize("per_token", [1, 3])
def test_every_choice_gets_its_row(isa: str, per_token: int) -> None:
    rng = np.random.default_rng(2)
    experts = _kernels_test.Experts(isa, 2, 4, per_token, True, sources([("F32", np.zeros((4, 4), np.uint8))]))
    experts.route(random_scores(rng, 29, 4))
    x = rng.normal(size=(29, 83)).astype(np.float32)
    given = experts.dispatch(x)
    assert given.shape == (29 * per_token, 83)
    assert np.array_equal(np.sort(given[:, 0]), np.sort(np.repeat(x[:, 0], per_token)))
    assert {row.tobytes() for row in given} == {row.tobytes() for row in x}


class Mixture:
    """Random experts, each of two parts of an odd number of rows, and what linear() makes of each one alone."""

    def __init__(
        self, rng: np.random.Generator, isa: str, names: tuple[str, str], *, exact: bool = True, target: str = ""
    ) -> None:
        self.isa = isa
        self.form: dict[str, Any] = {"exact": exact, "target": target}
        self.parts = [[(name, random_rows(rng, name, 19, COLS)) for name in names] for _ in range(6)]

    def pack(self, per_token: int, threads: int = 1) -> Any:
        parts = [part for expert in self.parts for part in expert]
        return _kernels_test.Experts(
            self.isa, threads, len(self.parts), per_token, True, sources(parts), **self.form, max_tokens=256
        )

    def alone(self, x: Floats) -> Floats:
        """(experts, n, rows)."""
        weights = (_kernels_test.Linear(self.isa, 1, sources(parts), **self.form) for parts in self.parts)
        return np.stack([weight.multiply(x) for weight in weights])


# (stored format, whether it is multiplied exactly, what it becomes while it is packed)
FORMS = [
    *((name, True, "") for name in FORMATS),
    *((name, False, "") for name in FORMATS if name not in PLAIN),
    *(("F32", exact, "INT8") for exact in (True, False)),
]


@every_isa
@pytest.mark.parametrize(("name", "exact", "target"), FORMS)
@pytest.mark.parametrize("threads", [1, 3])
def test_each_row_is_multiplied_by_its_expert(isa: str, name: str, exact: bool, target: str, threads: int) -> None:
    """Bit for bit as linear() does it: from few rows to an expert up to all, among them experts that get none."""
    rng = np.random.default_rng(3)
    mixture = Mixture(rng, isa, (name, "Q6_K" if name == "Q4_K" else name), exact=exact, target=target)
    x = rng.normal(size=(70, COLS)).astype(np.float32)
    alone, experts = mixture.alone(x), mixture.pack(per_token=1, threads=threads)
    to_one = np.zeros((70, 6), np.float32)
    to_one[:, 4] = 1
    for scores in (random_scores(rng, 70, 6), to_one, random_scores(rng, 1, 6), random_scores(rng, 5, 6)):
        n = len(scores)
        assert np.array_equal(run(experts, scores, x[:n]), alone[scores.argmax(axis=1), np.arange(n)])


@every_isa
@pytest.mark.parametrize("per_token", [2, 6])
def test_choices_add_up(isa: str, per_token: int) -> None:
    rng = np.random.default_rng(4)
    mixture = Mixture(rng, isa, ("F32", "BF16"))
    x, scores = rng.normal(size=(41, COLS)).astype(np.float32), random_scores(rng, 41, 6)
    terms = shares_of(isa, scores, per_token).T[:, :, None] * mixture.alone(x).astype(np.float64)
    bound = 2 * per_token * U * np.abs(terms).sum(axis=0)  # a product and a sum each are rounded
    assert np.all(np.abs(run(mixture.pack(per_token), scores, x) - terms.sum(axis=0)) <= bound)


@every_isa
@pytest.mark.parametrize(("name", "exact"), [("F32", True), ("Q4_1", True), ("Q4_1", False)])
def test_a_row_does_not_depend_on_the_others(isa: str, name: str, exact: bool) -> None:
    rng = np.random.default_rng(5)
    mixture = Mixture(rng, isa, (name, name), exact=exact)
    x, scores = rng.normal(size=(200, COLS)).astype(np.float32), random_scores(rng, 200, 6)
    scores[50:150, 2] = 99
    whole = run(mixture.pack(2), scores, x)
    for threads in (2, 5):
        assert np.array_equal(run(mixture.pack(2, threads), scores, x), whole)
    experts = mixture.pack(2)
    for first, last in ((0, 1), (7, 8), (30, 80), (99, 200)):
        assert np.array_equal(run(experts, scores[first:last], x[first:last]), whole[first:last])
    order = rng.permutation(200)
    assert np.array_equal(run(experts, scores[order], x[order]), whole[order])


@every_isa
def test_a_broken_row_spoils_no_other(isa: str) -> None:
    rng = np.random.default_rng(6)
    experts = Mixture(rng, isa, ("Q8_0", "Q8_0"), exact=False).pack(3)
    x, scores = rng.normal(size=(20, COLS)).astype(np.float32), random_scores(rng, 20, 6)
    expected = run(experts, scores, x)
    x[3], scores[3], x[11, 7], scores[13] = np.nan, np.nan, np.inf, -np.inf
    got = run(experts, scores, x)
    assert np.isnan(got[[3, 11, 13]]).all()
    whole = np.delete(np.arange(20), [3, 11, 13])
    assert np.array_equal(got[whole], expected[whole])


@every_isa
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_scores_that_are_no_numbers_choose_experts_that_are_there(isa: str, bits: int) -> None:
    """Where all are chosen as well: 0x7FFFFFFF, what a GPU calculates, is beyond all numbers in order."""
    scores = np.full((3, 6), bits, np.uint32).view(np.float32)
    scores[1, 1:] = 0
    experts = Mixture(np.random.default_rng(8), isa, ("F32", "F32")).pack(6)
    got = run(experts, scores, np.ones((3, COLS), np.float32))
    assert np.isnan(got[[0, 2]]).all()


@pytest.mark.parametrize("rows", [4, 6])
def test_no_source_belongs_to_two_experts(rows: int) -> None:
    data = random_rows(np.random.default_rng(7), "F32", rows, 8)
    experts = _kernels_test.Experts(ISAS[0], 1, 2, 2, True, sources([("F32", data[:-1]), ("F32", data[-1:])]))
    with pytest.raises(RuntimeError, match="no source belongs to two experts"):
        run(experts, np.zeros((1, 2), np.float32), np.zeros((1, 8), np.float32))


def test_more_rows_than_there_is_room_for_are_refused() -> None:
    experts = _kernels_test.Experts(
        ISAS[0], 1, 2, 1, True, sources([("F32", np.zeros((2, 4), np.uint8))] * 2), max_tokens=3
    )
    experts.route(np.zeros((3, 2), np.float32))
    with pytest.raises(RuntimeError, match="the rows fit the routing"):
        experts.route(np.zeros((4, 2), np.float32))
