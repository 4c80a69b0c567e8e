"""The code stays readable: budgets of length, preprocessor conditionals in few files, includes that point one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = sorted([*ROOT.glob("langchain_vllm/**/*.py"), *ROOT.glob("server/**/*.py")])
CPP = sorted(p for p in ROOT.glob("csrc/**/*") if p.suffix in {".h", ".cpp", ".inl", ".cu", ".cuh"})

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60

# Folder → the folders that its files may include.
INCLUDES = {
    "base": {"base"},
    "device": {"base", "device", "model"},  # of model only config.h, a plain struct
    "cpu": {"base", "device", "cpu", "model"},
    "cuda": {"base", "device", "cuda", "model", ""},  # "": intrinsics.cuh, of which there are two
    "cuda_on_cpu": {"base", "cuda_on_cpu", ""},
    "model": {"base", "device", "model"},
    "engine": {"base", "device", "model", "engine"},
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PYTHON, *CPP], ids=name)
def test_files_can_be_surveyed(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_python_functions_fit_on_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            documented = ast.get_docstring(node) or ""
            lines = node.end_lineno - node.lineno + 1 - len(documented.splitlines())
            assert lines <= MAX_FUNCTION_LINES, f"{node.name}, line {node.lineno}"


@pytest.mark.parametrize("path", CPP, ids=name)
def test_conditionals_have_their_places(path: Path) -> None:
    lines = path.read_text().splitlines()
    conditionals = [i for i, line in enumerate(lines) if re.match(r"\s*#\s*(if|ifdef|ifndef)\b", line)]
    if path.name in {"check.h", "kernels.cpp"}:
        return
    allowed = 1 if path.name.startswith("isa_") else 0
    assert len(conditionals) <= allowed


@pytest.mark.parametrize("path", [p for p in CPP if p.parent.name in INCLUDES], ids=name)
def test_includes_point_one_way(path: Path) -> None:
    for target in re.findall(r'#include "([^"]+)"', path.read_text()):
        folder, _, file = target.rpartition("/")
        if path.name == "device.cpp" and folder in {"cpu", "cuda"}:
            continue  # make_device() is the one place that knows every device
        assert folder in INCLUDES[path.parent.name], f"{path.name} includes {target}"
        if path.parent.name in {"device", "cpu", "cuda"} and folder == "model":
            assert file == "config.h"
