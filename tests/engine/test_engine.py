"""The engine whole: a tiny random model, the real loop and device; many requests on a cache too small for them."""

from __future__ import annotations

import os
import random
import select
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

from langchain_vllm_server import _engine
from langchain_vllm_server.checkpoint import load_checkpoint
from langchain_vllm_server.engine_config import to_engine
from tests.engines import Result, running_engine
from tests.parity.test_tiny_models import MIXTRAL, VOCAB, make_llama, make_mistral, make_mixtral

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {"max_num_batched_tokens": 64, "max_num_seqs": 16, "max_model_len": 128, "memory_bytes": 600 << 10}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_llama(folder)
    return folder


def random_request(rng: random.Random) -> tuple[list[int], dict[str, Any]]:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 80))]
    if rng.random() < 0.4:  # a common beginning, for the prefix cache
        prompt = [7] * 40 + prompt[:40]
    params = {
        "max_tokens": rng.randint(1, 128 - len(prompt)),
        "temperature": rng.choice([0, 0.7, 1.3]),
        "top_p": rng.choice([1.0, 0.9]),
        "top_k": rng.choice([0, 20]),
        "repetition_penalty": rng.choice([1.0, 1.2]),
        "frequency_penalty": rng.choice([0.0, 0.5]),
        "seed": rng.getrandbits(32),
        "stop_token_ids": rng.sample(range(VOCAB), 2),
        "num_logprobs": rng.choice([-1, 3]),
        "num_prompt_logprobs": rng.choice([-1, -1, 2]),
    }
    return prompt, params


def test_two_hundred_at_once_on_a_small_cache(model: Path) -> None:
    """All finish, cancelled ones at once, and every result is the one that the request gives alone."""
    rng = random.Random(1)
    requests = [random_request(rng) for _ in range(200)]
    for i in rng.sample(range(200), 40):
        requests[i] = requests[i][0], {"max_tokens": 0, "pooling": rng.choice(["last", "mean"])}
    with running_engine(model, **SMALL, enable_prefix_caching=False) as client:
        alone = [client.generate(prompt, **params) for prompt, params in requests]
        assert client.engine.stats().num_preemptions == 0
    with running_engine(model, **SMALL) as client:
        ids = [client.submit(prompt, **params) for prompt, params in requests]
        cancelled = set(rng.sample(ids, 40))
        for request_id in cancelled:
            client.poll(0.005)
            client.engine.cancel(request_id)
        crowd = client.wait(*ids)
        stats = client.engine.stats()
    assert stats.num_preemptions > 0, "the cache was meant to be too small"
    assert stats.prefix_cache_hits > 0
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_blocks == stats.num_blocks
    for request_id, one, among in zip(ids, alone, crowd, strict=True):
        if among.finish == "abort":
            assert request_id in cancelled
            assert one.tokens[: len(among.tokens)] == among.tokens
        else:
            assert (among.tokens, among.logprobs, among.finish) == (one.tokens, one.logprobs, one.finish)
            assert (among.prompt_logprobs, among.embedding) == (one.prompt_logprobs, one.embedding)


@pytest.mark.parametrize("quantised", ["", "INT8", "INT4"])
def test_experts_in_a_crowd(quantised: str, tmp_path: Path) -> None:
    """Every result is the one that the request gives alone."""
    make_mixtral(tmp_path)
    rng = random.Random(2)
    requests = [random_request(rng) for _ in range(40)]
    options = {**SMALL, "memory_bytes": 1500 << 10, "weight_format": quantised, "exact": False}
    with running_engine(tmp_path, **options, enable_prefix_caching=False) as client:
        alone = [client.generate(prompt, **params) for prompt, params in requests]
    with running_engine(tmp_path, **options) as client:
        crowd = client.wait(*(client.submit(prompt, **params) for prompt, params in requests))
    assert [(r.tokens, r.logprobs, r.finish) for r in crowd] == [(r.tokens, r.logprobs, r.finish) for r in alone]


def test_experts_are_counted_at_what_they_take(tmp_path: Path) -> None:
    make_mixtral(tmp_path)
    experts, hidden, inner = MIXTRAL["num_local_experts"], MIXTRAL["hidden_size"], MIXTRAL["intermediate_size"]
    router = -(-experts // 16) * 16 * hidden * 4  # in whole panels of f32
    in_whole_tiles = -(-inner // 64) * 64
    mlps = experts * (2 * inner * (hidden + 4) + hidden * (in_whole_tiles + 4))  # in bytes, and a scale for each row
    attention = (64 + 2 * 32) * (64 + 4) + 64 * (64 + 4)
    words = 2 * -(-VOCAB // 16) * 16 * (hidden + 4)
    with running_engine(tmp_path, **{**SMALL, "memory_bytes": 1200 << 10}, weight_format="INT8") as client:
        assert client.engine.weight_bytes == words + 2 * (router + mlps + attention)


def test_prompt_logprobs_do_not_depend_on_chunks_or_the_cache(model: Path) -> None:
    """Nor on the room for logits; they are those that the same tokens have as answers."""
    prompt = random.Random(4).choices(range(VOCAB), k=100)
    results = []
    for steps in ({}, {"max_num_batched_tokens": 7, "max_num_seqs": 3}, {"enable_prefix_caching": False}):
        with running_engine(model, **{**SMALL, **steps}) as client:
            for max_tokens in (5, 0):
                results.append(client.generate(prompt, max_tokens=max_tokens, num_prompt_logprobs=VOCAB))
                assert results[-1].num_cached_tokens == 0
            assert len(client.generate(prompt, max_tokens=0).prompt_logprobs) == 0
            likeliest = [max(row[1:], key=lambda entry: entry[1]) for row in results[0].prompt_logprobs]
            answers = client.generate(prompt[:40], max_tokens=1, num_logprobs=0)
            assert answers.logprobs[0][0] == likeliest[39]
    assert all(result.prompt_logprobs == results[0].prompt_logprobs for result in results)
    assert [row[0][0] for row in results[0].prompt_logprobs] == prompt[1:]


def test_vectors_do_not_depend_on_chunks_the_cache_or_neighbours(model: Path) -> None:
    rng = random.Random(6)
    prompts = [rng.choices(range(VOCAB), k=100), rng.choices(range(VOCAB), k=1)]
    vectors: list[list[list[float]]] = []
    for steps in ({}, {"max_num_batched_tokens": 7, "max_num_seqs": 3}, {"enable_prefix_caching": False}):
        with running_engine(model, **{**SMALL, **steps}) as client:
            for busy in (False, True):
                if busy:
                    client.submit([3, 4, 5], max_tokens=60)
                ids = [client.submit(p, max_tokens=0, pooling=kind) for p in prompts for kind in ("last", "mean")]
                results = client.wait(*ids)
                assert [(r.finish, r.tokens) for r in results] == [("stop", [])] * 4
                assert results[1].num_cached_tokens == 0
                vectors.append([result.embedding for result in results])
    assert all(one == vectors[0] for one in vectors)
    last, mean, *single = vectors[0]
    assert single[0] == single[1] != last != mean


def test_vectors_are_the_model_s(tmp_path: Path) -> None:
    """As near to the float64 truth as f32 states are, their mean included."""
    reference = make_llama(tmp_path)
    prompt = random.Random(5).choices(range(VOCAB), k=90)
    with running_engine(tmp_path, **SMALL) as client:
        last, mean = (client.generate(prompt, max_tokens=0, pooling=kind).embedding for kind in ("last", "mean"))
    single, truth = (reference.states(prompt, dtype) for dtype in (torch.float32, torch.float64))
    # As assert_as_exact: four times the reference's own error, or four roundings of the largest number.
    bound = 4 * max(float((single - truth).abs().max()), float(truth.abs().max()) * 2**-21)
    assert float((torch.tensor(last, dtype=torch.float64) - truth[-1]).abs().max()) <= bound
    assert float((torch.tensor(mean, dtype=torch.float64) - truth.mean(0)).abs().max()) <= bound


def test_prompt_logprobs_are_the_model_s(tmp_path: Path) -> None:
    """As near to the float64 truth as f32 logits are, the sum over the vocabulary included."""
    reference = make_llama(tmp_path)
    prompt = random.Random(5).choices(range(VOCAB), k=90)
    with running_engine(tmp_path, **SMALL) as client:
        scored = client.generate(prompt, max_tokens=0, num_prompt_logprobs=3).prompt_logprobs
    logits = torch.from_numpy(reference.logits(prompt, torch.float64))
    single = torch.from_numpy(reference.logits(prompt))
    truth = torch.log_softmax(logits, -1)
    # Twice what assert_as_exact allows a logit: a log-probability is the difference of two numbers of that size.
    bound = 8 * max(float((single - logits).abs().max()), float(logits.abs().max()) * 2**-21)
    for position, (chosen, *top) in enumerate(scored):
        row = truth[position]
        assert [token for token, _, _ in top] == torch.topk(row, 3).indices.tolist()
        for token, logprob, rank in (chosen, *top):
            assert abs(logprob - float(row[token])) <= bound
            assert rank == 1 + int((row > row[token]).sum())


def test_memory_is_flat(model: Path) -> None:
    """Rounds of the same load leave the process as large as the second round found it."""
    rng = random.Random(2)
    requests = [random_request(rng) for _ in range(60)]
    sizes = []
    with running_engine(model, **SMALL) as client:
        for _ in range(6):
            client.wait(*[client.submit(prompt, **params) for prompt, params in requests])
            sizes.append(resident_bytes())
    assert max(sizes[2:]) - sizes[1] < 2 << 20, sizes


def resident_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def test_same_alone_cold_and_cached(model: Path) -> None:
    prompt = [i % VOCAB for i in range(70)]
    with running_engine(model, **SMALL) as client:
        cold = client.generate(prompt, max_tokens=20, temperature=1, seed=5, num_logprobs=VOCAB)
        cached = client.generate(prompt, max_tokens=20, temperature=1, seed=5, num_logprobs=VOCAB)
    assert cold.num_cached_tokens == 0
    assert cached.num_cached_tokens == 64
    assert (cold.tokens, cold.logprobs) == (cached.tokens, cached.logprobs)


@pytest.mark.parametrize("kv_format", ["F32", "F16", "BF16", "INT8"])
@pytest.mark.parametrize("window", [False, True])
def test_same_alone_and_among_32_others(kv_format: str, window: bool, tmp_path: Path) -> None:
    """One seed, cold and cached, alone and in a crowd that preempts and evicts: the same tokens and log-probabilities.

    The window ends inside blocks and is shorter than the shared prefix.
    """
    (make_mistral if window else make_llama)(tmp_path)
    prompt = [i * 7 % VOCAB for i in range(70)]
    one = {"max_tokens": 30, "temperature": 1, "seed": 5, "num_logprobs": 3}
    rng = random.Random(3)
    others = [random_request(rng) for _ in range(32)]
    with running_engine(tmp_path, **SMALL, kv_format=kv_format) as client:
        alone, cached = client.generate(prompt, **one), client.generate(prompt, **one)
        ids = [client.submit(tokens, **params) for tokens, params in others[:16]]
        among = client.submit(prompt, **one)
        ids += [client.submit(tokens, **params) for tokens, params in others[16:]]
        crowd = client.wait(among, *ids)[0]
    assert (alone.num_cached_tokens, cached.num_cached_tokens) == (0, 64)
    assert cached.tokens == alone.tokens
    assert cached.logprobs == alone.logprobs
    assert (crowd.tokens, crowd.logprobs) == (alone.tokens, alone.logprobs)


def test_siblings_share_the_prompt(model: Path) -> None:
    """n > 1 is n requests: those behind the first find its blocks in the very step that computes them."""
    prompt = [i % VOCAB for i in range(60)]
    with running_engine(model, max_model_len=128, memory_bytes=64 << 20) as client:
        results = client.wait(*[client.submit(prompt, max_tokens=8, temperature=1, seed=i) for i in range(4)])
        hits = client.engine.stats().prefix_cache_hits
    assert hits == 3 * 48
    assert len({tuple(r.tokens) for r in results}) > 1


def test_stop_and_min_tokens(model: Path) -> None:
    with running_engine(model, **SMALL) as client:
        free = client.generate([1, 2, 3], max_tokens=10)
        stopped = client.generate([1, 2, 3], max_tokens=10, stop_token_ids=[free.tokens[4]])
        cut = free.tokens.index(free.tokens[4]) + 1
        assert (stopped.tokens, stopped.finish) == (free.tokens[:cut], "stop")
        later = client.generate([1, 2, 3], max_tokens=10, stop_token_ids=[free.tokens[4]], min_tokens=8)
        assert len(later.tokens) >= 8
        assert free.tokens[4] not in later.tokens[:8]
        assert free.finish == "length"


def test_logprobs_are_of_the_raw_model(model: Path) -> None:
    with running_engine(model, **SMALL) as client:
        plain = client.generate([5, 6], max_tokens=1, num_logprobs=VOCAB)
        bent = client.generate([5, 6], max_tokens=1, num_logprobs=2, temperature=0.1, logit_bias=[(9, 100.0)])
    assert bent.tokens == [9]
    chosen, *top = bent.logprobs[0]
    every = {token: logprob for token, logprob, _ in plain.logprobs[0]}
    assert chosen == (9, pytest.approx(every[9]), chosen[2])
    assert top == plain.logprobs[0][1:3]
    assert [rank for _, _, rank in top] == [1, 2]


@pytest.mark.parametrize(
    ("prompt", "params", "named"),
    [
        ([], {}, "prompt"),
        ([VOCAB], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1] * 128, {"max_tokens": 1}, "max_model_len"),
        ([1], {"max_tokens": 128}, "max_model_len"),
        ([1], {"max_tokens": -1}, "max_tokens"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_p": 1.5}, "top_p"),
        ([1], {"min_p": -0.1}, "min_p"),
        ([1], {"top_k": -1}, "top_k"),
        ([1], {"presence_penalty": 3.0}, "presence_penalty"),
        ([1], {"frequency_penalty": -3.0}, "frequency_penalty"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([1], {"logit_bias": [(VOCAB, 1.0)]}, "logit_bias"),
        ([1], {"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ([1], {"min_tokens": 17}, "min_tokens"),
        ([1], {"num_logprobs": VOCAB + 1}, "logprobs"),
    ],
)
def test_refusals_name_the_parameter(model: Path, prompt: list[int], params: dict[str, Any], named: str) -> None:
    with running_engine(model, **SMALL) as client:
        with pytest.raises(ValueError, match=named):
            client.submit(prompt, **params)
        assert client.generate([1], max_tokens=2).finish == "length", "the next request is served"


def test_ids_only_grow(model: Path) -> None:
    with running_engine(model, **SMALL) as client:
        client.generate([1], max_tokens=1)
        with pytest.raises(ValueError, match="request_id"):
            client.engine.submit(0, [1], _engine.SamplingParams())


def test_cancel_within_a_step(model: Path) -> None:
    with running_engine(model, **{**SMALL, "max_model_len": 120}) as client:
        request_id = client.submit([1, 2, 3], max_tokens=100)
        client.engine.cancel(request_id)
        client.engine.cancel(12345)  # unknown: ignored
        assert client.wait(request_id)[0].finish in ("abort", "length")
        assert client.generate([1], max_tokens=2).finish == "length"


def test_stopping_answers_everyone(model: Path) -> None:
    with running_engine(model, **SMALL) as client:
        ids = [client.submit([1, 2, 3], max_tokens=100) for _ in range(50)]
        client.engine.stop()
        results = client.wait(*ids, seconds=5)
        assert {r.finish for r in results} <= {"error", "length"}
        assert not client.engine.stats().alive
        with pytest.raises(RuntimeError, match="stopped"):
            client.engine.submit(999, [1], _engine.SamplingParams())


def test_options_that_cannot_work(model: Path) -> None:
    for options, named in [
        ({"memory_bytes": 1 << 16}, "memory"),
        ({**SMALL, "memory_bytes": 400 << 10}, "weights"),
        ({**SMALL, "memory_bytes": 530 << 10}, "key/value cache"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"device": "abacus"}, "abacus"),
        ({"device": "cuda"}, "take --device cpu"),  # built without CUDA, or there is no GPU
        ({"weight_format": "Q4_0"}, "weight_format"),
        ({"memory_bytes": -1}, "memory_bytes"),
        ({"memory_bytes": 1 << 60}, r"are available on cpu \(.*\): lower --memory"),
        ({"max_num_batched_tokens": 2**31 - 1}, "activations"),
    ]:
        with pytest.raises(ValueError, match=named), running_engine(model, **options):
            pass


def test_memory_is_counted_after_conversion(tmp_path: Path) -> None:
    """Weights that are widened at load take twice what the file holds: refused before they are loaded, not after."""
    make_llama(tmp_path, torch.bfloat16)
    narrow = {"max_num_batched_tokens": 8, "max_num_seqs": 8, "max_model_len": 16, "memory_bytes": 280 << 10}
    with running_engine(tmp_path, **narrow) as client:
        assert client.engine.weight_bytes < 170 << 10
    with pytest.raises(ValueError, match=r"the weights .* do not fit"):
        running_engine(tmp_path, **narrow, weight_format="F32").__enter__()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 0),
        ("head_dim", 0),
        ("num_key_value_heads", 3),
        ("vocab_size", 2**31 - 1),
        ("intermediate_size", 2**30),
        ("num_attention_heads", 2**24),
        ("head_dim", 2**24),
        ("rope_inv_freq", [1.0] * 9),
        ("rope_inv_freq", [float("nan")]),
        ("rope_attention_factor", float("inf")),
        ("alibi_slopes", [1.0]),
        ("alibi_slopes", [float("inf")] * 4),
        ("sliding_window", [0]),
        ("sliding_window", [-1, 0]),
        ("attention_scale", 0.0),
        ("logit_scale", float("nan")),
        ("norm_eps", -1.0),
        ("clip_qkv", -1.0),
        ("num_experts", -1),
        ("num_experts", 1 << 13),
        ("num_experts_per_tok", 1),
    ],
)
def test_impossible_configs_name_the_field(model: Path, name: str, value: Any) -> None:
    config, tensors = to_engine(load_checkpoint(model))
    setattr(config, name, value)
    options = _engine.EngineOptions()
    options.max_position = 128
    with pytest.raises(ValueError, match=f"config: .*{name}"):
        _engine.Engine(config, tensors, options, _engine.Loading())


@pytest.mark.parametrize(
    ("name", "value"), [("vocab_size", 130), ("hidden_size", 32), ("intermediate_size", 95), ("num_hidden_layers", 3)]
)
def test_a_config_that_contradicts_the_tensors_names_one(model: Path, name: str, value: int) -> None:
    config, tensors = to_engine(load_checkpoint(model))
    config.sliding_window = []
    setattr(config, name, value)
    options = _engine.EngineOptions()
    options.max_position = 128
    with pytest.raises(ValueError, match=r"tensor (model\.|for layers\.2)"):
        _engine.Engine(config, tensors, options, _engine.Loading())


def test_experts_that_contradict_the_config_are_refused(tmp_path: Path) -> None:
    make_mixtral(tmp_path)
    options = _engine.EngineOptions()
    options.max_position = 128
    config, tensors = to_engine(load_checkpoint(tmp_path))
    first = tensors["layers.1.mlp_out"][0]
    whole = _engine.TensorInfo("of all", first.format, [5 * 64, 96], first.file, first.offset)
    for changed, named in [
        (
            {"layers.1.mlp_out": [whole]},
            r"tensor of all has shape \(320, 96\), expected a part of one expert's 64 rows",
        ),
        (
            {"layers.1.mlp_in": tensors["layers.1.mlp_in"][:-1]},
            r"experts\.4\.w1.* has shape \(864, 64\), expected \(960, 64\)",
        ),
        ({"layers.1.router": [first]}, r"w2\.weight has shape \(64, 96\), expected 64 columns"),
    ]:
        with pytest.raises(ValueError, match=named):
            _engine.Engine(config, {**tensors, **changed}, options, _engine.Loading())


def test_a_file_cut_since_its_header_was_read(tmp_path: Path) -> None:
    make_llama(tmp_path)
    config, tensors = to_engine(load_checkpoint(tmp_path))
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    options = _engine.EngineOptions()
    options.max_position = 128
    with pytest.raises(ValueError, match=r"ends past the end of .*model\.safetensors: the file is truncated"):
        _engine.Engine(config, tensors, options, _engine.Loading())


def test_stopped_by_many_at_once(model: Path) -> None:
    with running_engine(model, **SMALL) as client:
        client.submit([1, 2, 3], max_tokens=100)
        with ThreadPoolExecutor(8) as pool:
            for stopped in [pool.submit(client.engine.stop) for _ in range(8)]:
                stopped.result(10)


def test_wakes_at_most_once_a_drain(model: Path) -> None:
    with running_engine(model, **SMALL) as client:
        client.submit([1], max_tokens=50)
        time.sleep(0.3)
        assert select.select([client.engine.fileno()], [], [], 0)[0]
        client.poll(0)
        assert not select.select([client.engine.fileno()], [], [], 0)[0]
        assert client.results[0] == Result(client.results[0].tokens, [], "length", 0)
