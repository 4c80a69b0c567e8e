"""The harness that runs CUDA kernels on the CPU: what is wrong on a GPU is an error, what is right is not."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import pytest

from langchain_vllm_server import _kernels_test

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not _kernels_test.cuda_is_emulated, reason="CUDA is not emulated, it runs on a GPU")
THREADS = 64
PIECE = 256  # bytes that an arena divides its memory into


@pytest.fixture(params=[1, 2], ids=["ascending", "descending"])
def order(request: pytest.FixtureRequest) -> Iterator[int]:
    _kernels_test.schedule_cuda_like(request.param)
    yield request.param
    _kernels_test.schedule_cuda_like(1)


@pytest.fixture
def machine() -> Iterator[None]:
    yield
    _kernels_test.set_cuda_machine()


@pytest.mark.usefixtures("order")
def test_threads_meet_at_barriers() -> None:
    assert _kernels_test.run_cuda("pass_on") == [(i + 1) % THREADS for i in range(THREADS)]
    assert _kernels_test.run_cuda("pass_on_in_warp") == [i // 32 * 32 + (i + 1) % 32 for i in range(THREADS)]
    assert _kernels_test.run_cuda("reuse") == [THREADS - 1 - i for i in range(THREADS)]
    assert _kernels_test.run_cuda("add_up") == [sum(range(THREADS))] * THREADS


@pytest.mark.usefixtures("order")
def test_lanes_see_each_other() -> None:
    odd = int("0xAAAAAAAA", 16) - 2**32
    expected = [odd + 5 + (i % 32 ^ 3) for i in range(THREADS)]
    assert _kernels_test.run_cuda("votes") == expected


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize(
    ("kernel", "error"),
    [
        ("pass_on, no barrier", "nobody has written|a race: shared memory is written, and read by"),
        ("pass_on_in_warp, no barrier", "nobody has written|a race: shared memory is written, and read by"),
        ("reuse, no barrier", "a race: shared memory is (written, and read by|read, and written by)"),
        (
            "add_up, no barrier before",
            "nobody has written|a race: shared memory is (added to|written), and (written|added to) by",
        ),
        ("add_up, no barrier after", "a race: shared memory is (read, and added to by others|added to, and read by)"),
        ("unwritten", "shared memory is read that nobody has written"),
        ("beyond", r"thread \(63, 0, 0\): elements \[64, 65\) of 64"),
        ("beyond_shared", "shared element -1 of 64"),
        ("misaligned", "an access of 8 bytes is not aligned"),
        ("half_at_a_barrier", "32 of 64 threads wait at __syncthreads.*32 have ended"),
        ("half_a_warp", "16 for their warp|for their warp, and"),
        ("different_collectives", "one lane is at __"),
    ],
)
def test_what_a_gpu_leaves_undefined_is_an_error(kernel: str, error: str) -> None:
    with pytest.raises(RuntimeError, match=error):
        _kernels_test.run_cuda(kernel)
    assert _kernels_test.run_cuda("reuse")[0] == THREADS - 1  # an error leaves nothing behind


def test_the_second_order_finds_what_depends_on_it() -> None:
    results = []
    for order in (1, 2):
        _kernels_test.schedule_cuda_like(order)
        results.append(_kernels_test.run_cuda("last_one_wins")[0])
    _kernels_test.schedule_cuda_like(1)
    assert results == [THREADS - 1, 0]


@pytest.mark.parametrize(("kind", "depth"), [("bf16", 16), ("u8 k32", 32), ("u8 k16", 16)])
def test_matrix_instructions(kind: str, depth: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 200, (16, depth)), rng.integers(-128, 128, (depth, 8))
    c = _kernels_test.mma(kind, a.ravel().tolist(), b.ravel().tolist())
    assert np.array_equal(np.reshape(c, (16, 8)), a @ b)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("machine_is", "error"),
    [
        ({"driver": 0}, "there is no NVIDIA driver here: install one, or take --device cpu"),
        ({"driver": 12040}, "the NVIDIA driver knows CUDA 12.4, the engine was built with CUDA 13.0: update"),
        ({"devices": 0}, "no GPU is visible here: look at nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ({"major": 7, "minor": 5}, r"CUDA on CPU has compute capability 7.5, .* need 8.0"),
    ],
)
def test_a_machine_that_cannot_run_cuda_says_why(machine_is: dict[str, int], error: str) -> None:
    _kernels_test.set_cuda_machine(**machine_is)
    with pytest.raises(RuntimeError, match=error):
        _kernels_test.make_device("cuda")
    assert _kernels_test.make_device("auto").startswith("cpu (")


@pytest.mark.usefixtures("machine")
def test_too_little_memory_says_how_much() -> None:
    _kernels_test.set_cuda_machine(bytes=1 << 20)
    device = _kernels_test.Device("cuda", 1)
    assert device.memory_available() == 1 << 20
    x = np.zeros((600, 1000), np.float32)
    with pytest.raises(RuntimeError, match=r"a buffer takes 3 MiB, but at most 1 MiB .* raise --memory"):
        device.scale(x, 1.0)
    arena = _kernels_test.CudaArena()
    with pytest.raises(RuntimeError, match="2 MiB cannot be reserved: lower --memory or --gpu-memory-utilization"):
        arena.reserve(2 << 20)


def test_memory_that_is_given_back_is_used_again() -> None:
    arena = _kernels_test.CudaArena()
    arena.reserve(8 * PIECE)
    pieces = [arena.take(PIECE - i) for i in range(8)]
    assert arena.available() == 0
    assert [piece - pieces[0] for piece in pieces] == [PIECE * i for i in range(8)]
    for i in (1, 5, 3, 4):  # gaps grow together on either side
        arena.give_back(pieces[i])
    assert arena.available() == 3 * PIECE
    with pytest.raises(RuntimeError, match="out of GPU memory"):
        arena.take(3 * PIECE + 1)
    assert arena.take(2 * PIECE) == pieces[3]
    assert arena.take(PIECE) == pieces[1]
    with pytest.raises(RuntimeError, match=r"given back .* once"):
        arena.give_back(pieces[4])


def test_random_pieces_never_overlap() -> None:
    rng = np.random.default_rng(0)
    arena, held = _kernels_test.CudaArena(), dict[int, int]()
    arena.reserve(64 * PIECE)
    for _ in range(1000):
        size = int(rng.integers(1, 8 * PIECE))
        if len(held) < 8 and size <= arena.available():
            piece = arena.take(size)
            assert ctypes.string_at(piece, size) == b"\xff" * size
            ctypes.memset(piece, 0, size)
            assert all(piece + size <= other or other + bytes_ <= piece for other, bytes_ in held.items())
            held[piece] = size
        elif held:
            piece = list(held)[int(rng.integers(len(held)))]
            del held[piece]
            arena.give_back(piece)
    for piece in held:
        arena.give_back(piece)
    assert arena.available() == 64 * PIECE


def test_a_graph_runs_with_its_arguments_as_they_were_and_memory_as_it_is() -> None:
    graphs = _kernels_test.CudaGraphs()
    graphs.add([1], 10, 1)
    assert graphs.state == (11, 1, 0, 1)  # directly
    graphs.add([1], 20, 2)
    assert graphs.state == (33, 2, 1, 1)  # recorded, and then run once
    graphs.add([1], 30, 3)
    assert graphs.state == (33 + 20 + 3, 2, 2, 1)
    graphs.add([1, 2], 40, 4)
    assert graphs.state == (56 + 44, 3, 2, 2)


def test_graphs_are_forgotten_when_memory_moves_or_others_come() -> None:
    graphs = _kernels_test.CudaGraphs()
    for _ in range(3):
        graphs.add([0], 0, 0)
    graphs.move_memory()
    graphs.add([0], 1, 0)
    assert graphs.state == (1, 3, 2, 1)
    for i in range(_kernels_test.most_cuda_graphs):
        graphs.add([1, i], 0, 0)
    assert graphs.state[3] == _kernels_test.most_cuda_graphs
    launches = graphs.state[1]
    graphs.add([1, 0], 0, 0)  # still known: the second time, it is recorded
    graphs.add([1, 0], 0, 0)
    assert graphs.state[1:3] == (launches + 1, 4)
    graphs.add([0], 1, 0)
    graphs.add([1, 1], 0, 0)  # gone, as the one that was used least recently
    assert graphs.state[2] == 4


@pytest.mark.parametrize(
    ("besides", "error"),
    [
        ("malloc", "cudaMalloc: operation not permitted when stream is capturing"),
        ("synchronize", "cudaStreamSynchronize: operation not permitted when stream is capturing"),
        ("another stream", "cudaMemset: operation would make the legacy stream depend on a capturing"),
        ("unchecked", "cudaStreamEndCapture: operation failed due to a previous error during capture"),
    ],
)
def test_what_a_capture_does_not_bear_is_an_error(besides: str, error: str) -> None:
    graphs = _kernels_test.CudaGraphs()
    graphs.add([0], 1, 0)
    with pytest.raises(RuntimeError, match=error):
        graphs.add([0], 1, 0, besides)
    graphs.add([0], 1, 0)  # an error leaves nothing behind
    assert graphs.state[0] == 2


@pytest.mark.usefixtures("machine")
def test_a_lost_device_is_an_error() -> None:
    device = _kernels_test.Device("cuda", 1)
    _kernels_test.set_cuda_machine(lost=True)
    with pytest.raises(RuntimeError, match="CUDA: cudaMemset: an illegal memory access"):
        device.scale(np.zeros((1, 8), np.float32), 1.0)


def test_auto_is_the_gpu_where_there_is_one() -> None:
    assert _kernels_test.make_device("auto") == _kernels_test.make_device("cuda") == "cuda (CUDA on CPU, 1024 MiB)"
