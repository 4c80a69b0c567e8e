"""What a device is beside its kernels: memory, names, and the fused ops' default composition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from langchain_vllm_server import _kernels_test
from tests.kernels.weights import DEVICES

ISAS = _kernels_test.isas()


@pytest.mark.parametrize("isa", DEVICES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (50, 576)])
def test_add_norm_is_add_then_norm(isa: str, kind: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, delta, weight = (rng.standard_normal(s).astype(np.float32) for s in (shape, shape, shape[1:]))
    device = _kernels_test.Device(isa, 2)
    results = []
    for composed in (True, False):
        residual, out = x.copy(), np.empty_like(x)
        device.add_norm(kind, 1e-6, weight, weight, residual, delta, out, composed)
        assert np.array_equal(residual, x + delta)
        results.append(out)
    assert np.array_equal(results[0], results[1])


@pytest.mark.parametrize("numbers", [1, 15, 1000])
def test_upload_is_aligned(numbers: int) -> None:
    address = _kernels_test.Device(ISAS[0], 1).upload_address(np.arange(numbers, dtype=np.float32))
    assert address % 64 == 0


def test_name_tells_isa_and_threads() -> None:
    assert [_kernels_test.Device(isa, 1).name for isa in ISAS] == [f"cpu ({isa}, 1 thread)" for isa in ISAS]
    assert _kernels_test.Device("scalar", 3).name == "cpu (scalar, 3 threads)"


def test_memory_available_is_what_the_system_says() -> None:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = _kernels_test.Device("scalar", 1).memory_available()
    assert 0 < available <= int(lines["MemTotal"].split()[0]) * 1024


def test_devices_are_made_by_name() -> None:
    assert _kernels_test.make_device("cpu").startswith("cpu (")
    with pytest.raises(RuntimeError, match='there is no device "abacus"'):
        _kernels_test.make_device("abacus")


@pytest.mark.parametrize("threads", [-1, 1025])
def test_absurd_numbers_of_threads_are_refused(threads: int) -> None:
    with pytest.raises(RuntimeError, match=f"num_threads must be 0 .* to 1024, not {threads}"):
        _kernels_test.Device("scalar", threads)


@pytest.mark.parametrize(("kv_format", "size"), [("F32", 4), ("F16", 2), ("BF16", 2)])
@pytest.mark.parametrize(("head_dim", "padded"), [(64, 64), (80, 80), (20, 32)])
def test_cache_size(kv_format: str, size: int, head_dim: int, padded: int) -> None:
    config = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim}
    attention = _kernels_test.Attention("scalar", 1, config, kv_format, 7)
    assert attention.kv_bytes_per_block == 3 * 2 * 16 * (head_dim + padded) * size
    assert attention.cache_bytes == 7 * attention.kv_bytes_per_block


@pytest.mark.parametrize(("head_dim", "padded"), [(64, 64), (80, 80), (20, 32)])
def test_cache_of_bytes_has_a_scale_for_each_key_and_value(head_dim: int, padded: int) -> None:
    config = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim}
    attention = _kernels_test.Attention("scalar", 1, config, "INT8", 7)
    assert attention.kv_bytes_per_block == 3 * 2 * 16 * (head_dim + padded + 2 * 4)


def test_a_cache_takes_memory_only_where_it_is_written() -> None:
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    attention = _kernels_test.Attention("scalar", 1, config, "F32", 4096)
    assert attention.cache_bytes == 64 * 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    attention.fill_block(4095, 1)
    assert int(Path("/proc/self/statm").read_text().split()[1]) - pages < 2 * 32 * 2**19 // 4096
