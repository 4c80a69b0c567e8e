"""The sampler against a slow definition of itself, its distribution, and its corners."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from langchain_vllm_server import _kernels_test
from tests.kernels.weights import DEVICES, ISAS, few

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

F32 = NDArray[np.float32]
ON: dict[str, _kernels_test.Device] = {}
Result = tuple[int, list[tuple[int, float, int]]]


def f32(values: Sequence[float]) -> F32:
    return np.array(values, np.float32)


@pytest.fixture(scope="module", autouse=True)
def devices() -> Iterator[None]:
    ON.update({device: _kernels_test.Device(device, 2) for device in DEVICES})
    yield
    ON.clear()


@pytest.fixture(params=[ISAS[0], "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Of each sampler one, where instruction sets make no difference."""
    name: str = request.param
    return name


def sample(
    logits: F32,
    params: dict[str, Any],
    tokens: list[int],
    num_prompt: int,
    device: str,
    mask: list[int] | None = None,
) -> Result:
    request = (params, tokens, num_prompt, len(tokens))
    result: Result = ON[device].sample(logits.reshape(1, -1).copy(), [request], [mask])[0]
    return result


def processed(logits: F32, params: dict[str, Any], tokens: list[int], num_prompt: int) -> F32:
    """Masks, bias, min_tokens and penalties, in f32 as the sampler does them."""
    x = np.where(np.isnan(logits), -np.inf, logits).astype(np.float32)
    if allowed := params.get("allowed_token_ids"):
        x[[token for token in range(len(x)) if token not in allowed]] = -np.inf
    for *before, last in params.get("bad_words", []):
        if before == tokens[max(num_prompt, len(tokens) - len(before)) :]:
            x[last] = -np.inf
    for token, bias in params.get("logit_bias", []):
        x[token] += np.float32(bias)
    output = tokens[num_prompt:]
    if len(output) < params.get("min_tokens", 0):
        x[params["stop_token_ids"]] = -np.inf
    repetition = np.float32(params.get("repetition_penalty", 1))
    for token in set(tokens):
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in set(output):
        x[token] -= np.float32(params.get("frequency_penalty", 0)) * np.float32(output.count(token))
        x[token] -= np.float32(params.get("presence_penalty", 0))
    return x


def drawn(x: F32, params: dict[str, Any], u: float, slack: float) -> int:
    """The token that u chooses, with min_p and top_p moved by the factor 1 + slack and u by slack."""
    temperature = np.float64(np.float32(params["temperature"]))
    if temperature == 0 or np.all(np.isneginf(x)):
        return (
            params["allowed_token_ids"][0]
            if np.isneginf(x).all() and params.get("allowed_token_ids")
            else int(np.argmax(x))
        )
    weights = np.exp((x.astype(np.float64) - float(x.max())) / temperature)
    kept = np.lexsort((np.arange(len(x)), -x))
    kept = kept[weights[kept] >= min(1.0, float(np.float32(params.get("min_p", 0))) * (1 + slack))]
    if params.get("top_k", 0) > 0:
        kept = kept[: params["top_k"]]
    if params.get("top_p", 1) < 1:
        before = np.cumsum(weights[kept]) - weights[kept]
        mass = weights[kept].sum() * float(np.float32(params["top_p"])) * (1 + slack)
        kept = kept[(before < mass) | (kept == kept[0])]
    kept = np.sort(kept)
    cumulative = np.cumsum(weights[kept])
    index = int(np.searchsorted(cumulative, (u + slack) * cumulative[-1], side="right"))
    return int(kept[min(index, len(kept) - 1)])


SLACK = 1e-5  # relative error of a weight: an f32 exponential of an f32 product of up to some 20

penalty = st.sampled_from([0.0, 0.5, -1.0, 2.0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[F32, dict[str, Any], list[int], int]:
    vocab = draw(st.integers(1, 120))
    quarters = draw(st.lists(st.integers(-40, 40), min_size=vocab, max_size=vocab))  # of 1/4, so that many tie
    token = st.integers(0, vocab - 1)
    tokens = draw(st.lists(token, min_size=1, max_size=12))
    bad_words = st.lists(st.tuples(st.integers(1, 3), token), max_size=3)  # most of them are one token from complete
    params = {
        "temperature": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9])),
        "top_p": draw(st.sampled_from([0.01, 0.3, 0.77, 0.95, 1.0, 1.0])),
        "min_p": draw(st.sampled_from([0.0, 0.0, 0.03, 0.4, 1.0])),
        "top_k": draw(st.sampled_from([0, 0, 1, 2, 5, 50, 500])),
        "presence_penalty": draw(penalty),
        "frequency_penalty": draw(penalty),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3, 0.6])),
        "logit_bias": draw(st.dictionaries(token, st.floats(-5, 5, width=16), max_size=4).map(lambda d: [*d.items()])),
        "stop_token_ids": draw(st.lists(token, max_size=3)),
        "min_tokens": draw(st.integers(0, 4)),
        "allowed_token_ids": draw(st.just([]) | st.lists(token, min_size=1, max_size=6)),
        "bad_words": [[*tokens[-n:], t] for n, t in draw(bad_words)]
        + draw(st.lists(st.lists(token, min_size=1, max_size=3), max_size=2)),
        "seed": draw(st.integers(0, 2**64 - 1)),
    }
    return f32([q / 4 for q in quarters]), params, tokens, draw(st.integers(1, len(tokens)))


@settings(max_examples=600, deadline=None)
@given(cases(), st.sampled_from(DEVICES))
def test_draws_what_the_definition_draws(case: tuple[F32, dict[str, Any], list[int], int], device: str) -> None:
    logits, params, tokens, num_prompt = case
    token, logprobs = sample(logits, params, tokens, num_prompt, device)
    assert logprobs == []
    x = processed(logits, params, tokens, num_prompt)
    u = _kernels_test.random_uniform(params["seed"], len(tokens))
    assert token in {drawn(x, params, u, slack) for slack in (0, -SLACK, SLACK)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.9}],
    ids=str,
)
def test_distribution(device: str, params: dict[str, Any]) -> None:
    """Pearson's test over many positions of one seed; the numbers are the same in every run."""
    logits = np.random.default_rng(3).standard_normal(20).astype(np.float32)
    temperature = params.get("temperature", 1.0)
    weights = np.exp(logits.astype(np.float64) / temperature)
    order = np.argsort(-weights)
    kept = order[: params.get("top_k", 20)]
    kept = kept[weights[kept] >= params.get("min_p", 0) * weights.max()]
    before = np.cumsum(weights[kept]) - weights[kept]
    kept = kept[before < params.get("top_p", 1.0) * weights[kept].sum()]
    expected = np.zeros(20)
    expected[kept] = weights[kept] / weights[kept].sum()

    (n,) = few(device, [20_000], [500])
    request = {"temperature": 1.0, "seed": 42} | params
    rows = ON[device].sample(np.tile(logits, (n, 1)), [(request, [0], 1, position) for position in range(n)])
    counts = np.bincount([token for token, _ in rows], minlength=20)
    assert np.all(counts[expected == 0] == 0)
    chi2 = (((counts - n * expected) ** 2)[kept] / (n * expected[kept])).sum()
    freedom = len(kept) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_a_row_is_a_pure_function(device: str) -> None:
    """Alone and among others, whatever thread it lands on: same logits, seed and position, same token."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((40, 5000)).astype(np.float32)
    base = {"top_p": 0.9, "temperature": 1.5}
    params = [base | {"seed": s % 3, "num_logprobs": 5000 if s % 2 else 2} for s in range(40)]  # too many for one piece
    requests = [(params[s], [1, 2], 1, s) for s in range(40)]
    together = ON[device].sample(logits.copy(), requests)
    alone = [ON[device].sample(logits[i : i + 1].copy(), [requests[i]])[0] for i in range(40)]
    assert together == alone
    chosen = [(token, params[i]["num_logprobs"]) for i, (token, _) in enumerate(together)]
    assert ON[device].score(logits.copy(), chosen) == together


@pytest.mark.parametrize("device", DEVICES)
def test_large_vocabulary(device: str) -> None:
    """Sizes at which no test above could follow by hand; top_k and top_p walk their fast paths."""
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal(128_256) * 3).astype(np.float32)
    for seed in range(5):
        for more in ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 1000, "top_p": 0.5}, {"min_p": 0.05}):
            params = {"temperature": 0.8, "seed": seed} | more
            u = _kernels_test.random_uniform(seed, 1)
            allowed = {drawn(logits, params, u, slack) for slack in (0, -SLACK, SLACK)}
            assert sample(logits, params, [0], 1, device)[0] in allowed


def test_a_crowd_of_unlikely_tokens_is_drawn() -> None:
    """Each weighs 2^-31, all together 2^-14. An integer of 2^-42 is less than 2^-11 of such a weight off."""
    logits = np.full(2**17, -21.5, np.float32)
    logits[0] = 0
    weight = math.exp(-21.5)
    total = 1 + weight * (len(logits) - 1)
    position = next(p for p in range(10**6) if _kernels_test.random_uniform(7, p) > 1 - weight * 2**16)
    request = ({"seed": 7}, [0], 1, position)
    token, other = (ON[device].sample(logits[None].copy(), [request])[0][0] for device in (ISAS[0], "cuda"))
    assert token == other
    expected = (_kernels_test.random_uniform(7, position) * total - 1) / weight
    assert abs(token - expected) <= len(logits) * (2**-11 + SLACK)


def bound(logits: F32, values: F32) -> F32:
    """How far log-probabilities may be apart whose n weights were added up in different orders.

    Either sum is off by less than n units of f64, its logarithm by one, and the result is rounded to f32.
    """
    log_sum = float(np.abs(logits).max()) + math.log(len(logits))
    return np.spacing(np.abs(values)) + f32([(len(logits) + 2 * log_sum) * 2.0**-52])


@given(cases(), st.integers(-1, 130), st.lists(st.integers(0, 119), max_size=4), st.integers(0, 3))
def test_every_device_draws_the_same(
    case: tuple[F32, dict[str, Any], list[int], int], k: int, named: list[int], kind: int
) -> None:
    logits, params, tokens, num_prompt = case
    rng = np.random.default_rng(params["seed"])
    if kind % 2:  # weights that fill their mantissas
        logits = (logits + rng.standard_normal(len(logits))).astype(np.float32)
    mask = [*rng.integers(0, 2**32, (len(logits) + 31) // 32).tolist()] if kind // 2 else None
    params |= {"num_logprobs": k, "logprob_token_ids": [token for token in named if token < len(logits)]}
    expected = sample(logits, params, tokens, num_prompt, ISAS[0], mask)
    token, logprobs = sample(logits, params, tokens, num_prompt, "cuda", mask)
    assert token == expected[0]
    assert [(t, rank) for t, _, rank in logprobs] == [(t, rank) for t, _, rank in expected[1]]
    values, others = f32([v for _, v, _ in logprobs]), f32([v for _, v, _ in expected[1]])
    finite = np.isfinite(others)
    assert np.all(finite == np.isfinite(values))
    assert np.all(np.abs(values[finite] - others[finite]) <= bound(logits, others[finite]))


def test_every_device_draws_the_same_of_many_tokens() -> None:
    """Sizes at which a warp has several tokens, and a row of tied ones in three: cuts of every kind."""
    rng = np.random.default_rng(7)
    cuts: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 3000, "top_p": 0.95}, {"min_p": 0.01}]
    for vocab in (31, 512, 513, 32_000):
        logits = (rng.standard_normal((15, vocab)) * 4).astype(np.float32)
        logits[::3] = np.round(logits[::3])
        params = [
            {"temperature": 0.5 + row / 8, "seed": row, "num_logprobs": 3} | cuts[row % len(cuts)] for row in range(15)
        ]
        rows = [(params[row], [row], 1, row) for row in range(15)]
        expected = ON[ISAS[0]].sample(logits.copy(), rows)
        found = ON["cuda"].sample(logits.copy(), rows)
        assert [token for token, _ in found] == [token for token, _ in expected]
        assert [[t for t, _, _ in ps] for _, ps in found] == [[t for t, _, _ in ps] for _, ps in expected]


@pytest.mark.parametrize("order", ["ascending", "descending", "equal"])
def test_top_k_of_sorted_logits(order: str, device: str) -> None:
    logits = np.zeros(10_000, np.float32)
    if order != "equal":
        logits = np.linspace(-5, 5, 10_000, dtype=np.float32)[:: 1 if order == "ascending" else -1]
    token, logprobs = sample(logits, {"temperature": 0.0, "num_logprobs": 20}, [0], 1, device)
    best = sorted(range(10_000), key=lambda i: (-logits[i], i))[:20]
    assert token == best[0]
    assert [t for t, _, _ in logprobs[1:]] == best
    assert [r for _, _, r in logprobs[1:]] == ([1] * 20 if order == "equal" else [*range(1, 21)])


def test_greedy_takes_the_first_of_equals(device: str) -> None:
    logits = f32([1, 3, 2, 3, 3])
    assert sample(logits, {"temperature": 0.0}, [0], 1, device)[0] == 1
    assert sample(logits, {"temperature": 1e-6, "seed": 5}, [0], 1, device)[0] == 1


def test_zeros_of_either_sign_are_equal(device: str) -> None:
    logits = f32([-1, -0.0, 0.0, -0.0])
    token, logprobs = sample(logits, {"temperature": 0.0, "num_logprobs": 2}, [0], 1, device)
    assert (token, [(t, rank) for t, _, rank in logprobs]) == (1, [(1, 1), (1, 1), (2, 1)])
    assert {sample(logits, {"top_k": 1, "seed": seed}, [0], 1, device)[0] for seed in range(20)} == {1}


def test_top_k_keeps_the_first_of_equals(device: str) -> None:
    logits = f32([0, 1, 1, 1])
    tokens = {sample(logits, {"temperature": 1.0, "top_k": 2, "seed": seed}, [0], 1, device)[0] for seed in range(50)}
    assert tokens == {1, 2}


def test_top_p_keeps_the_token_that_crosses(device: str) -> None:
    logits = np.log(f32([0.5, 0.3, 0.2]))
    for top_p, kept in ((0.4, {0}), (0.55, {0, 1}), (0.79, {0, 1}), (0.85, {0, 1, 2})):
        params = {"temperature": 1.0, "top_p": top_p}
        assert {sample(logits, params | {"seed": s}, [0], 1, device)[0] for s in range(100)} == kept


def test_top_p_keeps_the_first_of_equals(device: str) -> None:
    logits = np.log(f32([0.2, 0.2, 0.2, 0.4]))
    requests = [({"top_p": 0.7, "seed": seed}, [0], 1, 1) for seed in range(60)]
    assert {token for token, _ in ON[device].sample(np.tile(logits, (60, 1)), requests)} == {0, 1, 3}


def test_rules_of_a_row_are_its_own(device: str) -> None:
    """The last token that those of one touch is the first that those of the next do; each names tokens of its own."""
    params: list[dict[str, Any]] = [
        {"logit_bias": [(3, 1.0), (5, 2.0)], "logprob_token_ids": [1, 2]},
        {"logit_bias": [(5, 1.0), (6, 0.5)], "logprob_token_ids": [4]},
    ]
    requests = [({"temperature": 0.0, "num_logprobs": 1} | more, [0], 1, 1) for more in params]
    logits = np.arange(16, dtype=np.float32).reshape(2, 8) / 64
    rows = ON[device].sample(logits.copy(), requests)
    assert [(token, [t for t, _, _ in logprobs]) for token, logprobs in rows] == [(5, [5, 5, 1, 2]), (5, [5, 5, 4])]
    assert rows == [ON[device].sample(logits[i : i + 1].copy(), [requests[i]])[0] for i in range(2)]


def test_penalties(device: str) -> None:
    greedy = {"temperature": 0.0}
    logits = f32([2.0, 1.9, -1.0, -1.1])
    assert sample(logits, greedy | {"repetition_penalty": 1.1}, [0], 1, device)[0] == 1  # a prompt token: 2 / 1.1 < 1.9
    assert sample(logits, greedy | {"presence_penalty": 0.2}, [0, 1], 2, device)[0] == 0  # no prompt counts here
    assert sample(logits, greedy | {"presence_penalty": 0.2}, [1, 0], 1, device)[0] == 1
    assert sample(logits, greedy | {"frequency_penalty": 0.06}, [1, 0], 1, device)[0] == 0
    assert sample(logits, greedy | {"frequency_penalty": 0.06}, [1, 0, 0], 1, device)[0] == 1
    negative = f32([-1.0, -1.1])
    assert sample(negative, greedy | {"repetition_penalty": 1.2}, [0], 1, device)[0] == 1  # -1 · 1.2 < -1.1


def test_min_tokens_hides_the_end(device: str) -> None:
    params = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": [0, 2]}
    logits = f32([3, 1, 2])
    assert [sample(logits, params, [1] * n, 1, device)[0] for n in (1, 2, 3, 4)] == [1, 1, 0, 0]


def test_logprobs_are_of_the_raw_logits(device: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(300).astype(np.float32)
    params = {"temperature": 0.7, "logit_bias": [(7, 100.0)], "num_logprobs": 5, "top_k": 3}
    token, logprobs = sample(logits, params, [0], 1, device)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    order = sorted(range(300), key=lambda i: (-logits[i], i))
    assert token == 7
    assert [t for t, _, _ in logprobs] == [7, *order[:5]]
    assert [r for _, _, r in logprobs] == [order.index(7) + 1, 1, 2, 3, 4, 5]
    assert np.allclose([p for _, p, _ in logprobs], exact[[7, *order[:5]]], atol=2e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_top_logprobs_are_the_greatest(k: int, device: str) -> None:
    """Of many random rows, half of them with ties: none of the k greatest is lost on the way."""
    for seed in range(40):
        logits = np.random.default_rng(seed).standard_normal(2000).astype(np.float32)
        if seed % 2:
            logits = np.round(logits * 4)
        logprobs = sample(logits, {"temperature": 0.0, "num_logprobs": k}, [0], 1, device)[1]
        assert [t for t, _, _ in logprobs[1:]] == list(np.lexsort((np.arange(2000), -logits))[:k])


@given(cases(), st.sampled_from(DEVICES), st.integers(0, 130))
def test_scores_are_the_logprobs_that_sampling_gives(
    case: tuple[F32, dict[str, Any], list[int], int], device: str, k: int
) -> None:
    logits, _, tokens, _ = case
    token, sampled = sample(logits, {"temperature": 0.0, "num_logprobs": k}, [0], 1, device)
    (scored,) = ON[device].score(logits.reshape(1, -1).copy(), [(token, k)])
    assert scored == (token, sampled)
    (other,) = ON[device].score(logits.reshape(1, -1).copy(), [(tokens[0], k)])
    exact = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    assert other[1][1:] == sampled[1:]
    assert other[1][0][:2] == (tokens[0], pytest.approx(exact[tokens[0]], abs=1e-5))
    assert other[1][0][2] == 1 + (logits > logits[tokens[0]]).sum()


def test_logprobs_of_named_tokens_take_the_place_of_the_greatest(device: str) -> None:
    logits = f32([3, 1, 2, 0])
    params = {"temperature": 0.0, "num_logprobs": 2, "logprob_token_ids": [3, 0, 1]}
    _, logprobs = sample(logits, params, [0], 1, device)
    _, everything = sample(logits, {"temperature": 0.0, "num_logprobs": 4}, [0], 1, device)
    by_token = {token: value for token, value, _ in everything}
    assert [(token, value) for token, value, _ in logprobs] == [(t, by_token[t]) for t in (0, 3, 0, 1)]
    _, logprobs = sample(logits, params | {"logprob_token_ids": [2]}, [0], 1, device)
    assert [token for token, _, _ in logprobs] == [0, 0, 2], "the chosen one is among them"


def test_bad_words_look_at_the_output_alone(device: str) -> None:
    logits = f32([0, 5, 4])
    params = {"temperature": 0.0, "bad_words": [[2, 1]]}
    assert sample(logits, params, [0, 2], 2, device)[0] == 1, "the prompt's last token begins no bad word"
    assert sample(logits, params, [0, 2], 1, device)[0] == 2
    assert sample(logits, {"temperature": 0.0, "bad_words": [[1], [2]]}, [0], 1, device)[0] == 0


def test_number_of_logprobs(device: str) -> None:
    logits = f32([1, 2, 3])
    assert sample(logits, {"temperature": 0.0}, [0], 1, device)[1] == []
    assert [t for t, _, _ in sample(logits, {"temperature": 0.0, "num_logprobs": 0}, [0], 1, device)[1]] == [2]
    assert [t for t, _, _ in sample(logits, {"temperature": 0.0, "num_logprobs": 9}, [0], 1, device)[1]] == [2, 2, 1, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-4])
@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([np.nan, 1, np.nan], {1}),
        ([-np.inf, -np.inf, 0], {2}),
        ([np.nan, np.nan], {0}),
        ([-np.inf, -np.inf], {0}),
        ([0, np.inf, np.nan, -np.inf], {1}),
        ([3e38, -3e38, 3.1e38], {0, 2}),
    ],
    ids=str,
)
def test_odd_logits(device: str, temperature: float, logits: list[float], expected: set[int]) -> None:
    params = {"temperature": temperature, "num_logprobs": 3, "top_p": 0.9, "repetition_penalty": 0.5}
    token, logprobs = sample(f32(logits), params, [0], 1, device)
    assert token in expected
    assert len(logprobs) == 1 + min(3, len(logits))
    assert not any(math.isnan(p) or p > 0 for _, p, _ in logprobs)


def test_tokens_outside_the_vocabulary_are_refused(device: str) -> None:
    logits = np.zeros(4, np.float32)
    with pytest.raises(RuntimeError, match="logit_bias"):
        sample(logits, {"logit_bias": [(4, 1.0)]}, [0], 1, device)
    with pytest.raises(RuntimeError, match="stop_token_ids"):
        sample(logits, {"min_tokens": 1, "stop_token_ids": [-1]}, [0], 1, device)
    with pytest.raises(RuntimeError, match="in the vocabulary"):
        sample(logits, {"presence_penalty": 1.0}, [9], 1, device)
