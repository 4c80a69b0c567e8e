"""Which instruction set runs: what CPU and system can do, unless the environment asks for another."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from langchain_vllm_server import _kernels_test
from tests.kernels.weights import ISAS

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = {
    "scalar": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}
FLAGS["avx512vnni"] = FLAGS["avx512"] + " -mavx512vnni"
FLAGS["avx512bf16"] = FLAGS["avx512vnni"] + " -mavx512bf16"
FLAGS["amx"] = FLAGS["avx512vnni"] + " -mamx-tile -mamx-int8"
TABLES = {
    "scalar": "kScalarKernels",
    "avx2": "kAvx2Kernels",
    "avx512": "kAvx512Kernels",
    "avx512vnni": "kAvx512VnniKernels",
    "avx512bf16": "kAvx512Bf16Kernels",
    "amx": "kAmxKernels",
}


def cpu(field: str) -> set[str]:
    """The words that /proc/cpuinfo has for the first processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(field):
            return set(line.split(":")[1].split())
    return set()


def test_best_first_scalar_always() -> None:
    order = ["amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "scalar"]
    if "AuthenticAMD" not in cpu("vendor_id"):  # other CPUs multiply faster in f32
        order[1:3] = reversed(order[1:3])
    assert [isa for isa in order if isa in ISAS] == ISAS
    assert "scalar" in ISAS


def test_detection_agrees_with_the_kernel() -> None:
    flags = cpu("flags")
    assert ("avx2" in ISAS) == ({"avx2", "fma", "f16c"} <= flags)
    avx512 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
    assert ("avx512" in ISAS) == (avx512 <= flags)
    assert ("avx512vnni" in ISAS) == (avx512 | {"avx512_vnni"} <= flags)
    assert ("avx512bf16" in ISAS) == (avx512 | {"avx512_vnni", "avx512_bf16"} <= flags)
    # The kernel may refuse the tiles' state, but on a machine without them nobody may claim to have it.
    assert "amx" not in ISAS or avx512 | {"avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"} <= flags


SMALL_SIGNAL_STACK = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)
stack = Stack(ctypes.addressof(memory), 0, 8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
from langchain_vllm_server import _kernels_test
print(*_kernels_test.isas())
"""


@pytest.mark.skipif("amx" not in ISAS, reason="needs a CPU with AMX")
def test_without_permission_for_tiles_the_next_best_runs() -> None:
    # Linux refuses them to a process whose signal stacks have no room for them.
    command = [sys.executable, "-c", SMALL_SIGNAL_STACK]
    isas = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    assert isas == [isa for isa in ISAS if isa != "amx"]


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_forces_an_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGCHAIN_VLLM_ISA", isa)
    assert _kernels_test.selected_isa() == isa


@pytest.mark.parametrize("value", [None, ""])
def test_the_best_is_the_default(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LANGCHAIN_VLLM_ISA", raising=False)
    if value is not None:
        monkeypatch.setenv("LANGCHAIN_VLLM_ISA", value)
    assert _kernels_test.selected_isa() == ISAS[0]


@pytest.mark.parametrize("value", ["sse9", "AVX2", "avx2 "])
def test_an_isa_that_cannot_run_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGCHAIN_VLLM_ISA", value)
    expected = f'LANGCHAIN_VLLM_ISA is "{value}", but what can run here is {", ".join(ISAS)}'
    with pytest.raises(RuntimeError, match=expected):
        _kernels_test.selected_isa()


def object_file(isa: str, folder: Path) -> Path:
    """The file that the build made, or one made like it when there is none of these sources."""
    changed = max(path.stat().st_mtime for path in CSRC.rglob("*") if path.suffix in {".h", ".inl", ".cpp"})
    for built in CSRC.parent.glob(f"build/native/**/isa_{isa}.cpp.o"):
        if built.stat().st_mtime > changed:
            return built
    made = folder / "isa.o"
    options = ["-std=c++20", "-O1", "-w", *FLAGS[isa].split(), "-I", str(CSRC)]
    subprocess.run(["g++", *options, "-c", str(CSRC / "cpu" / f"isa_{isa}.cpp"), "-o", str(made)], check=True)
    return made


@pytest.mark.parametrize("isa", FLAGS)
def test_an_isa_file_exports_its_table_alone(isa: str, tmp_path: Path) -> None:
    # An inline function or a template of the standard library compiled here could be the copy that the linker keeps
    # for all: the program would then die on a CPU without these instructions.
    if isa != "scalar" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("an x86 instruction set")
    nm = ["nm", "-C", str(object_file(isa, tmp_path))]
    listing = subprocess.run(nm, check=True, capture_output=True, text=True).stdout
    symbols = [line[17:].split(maxsplit=1) for line in listing.splitlines()]
    exported = {name for kind, name in symbols if kind != "U" and (kind.isupper() or kind in "uvw")}
    assert exported == {f"engine::{TABLES[isa]}"}
    assert not [name for kind, name in symbols if kind == "U" and "std::" in name]
