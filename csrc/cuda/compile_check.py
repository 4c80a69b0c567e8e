"""What nvcc proves of the kernels without a GPU: they compile for every architecture without a warning, none takes more
registers or spills more than resources.txt says, and the inner loops have the instructions that they were written for.

Run from the root of the repository: python csrc/cuda/compile_check.py [--write]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).parents[1]
TABLE = CSRC / "cuda" / "resources.txt"
ARCHITECTURES = [80, 86, 89, 90, 100]
OPTIONS = [
    "-std=c++20",
    "-fmad=false",
    "-Werror=all-warnings",
    "-Xcompiler=-Wall,-Wextra",
    "-Icsrc",
    "-Icsrc/cuda/nvidia",
]
# 16 bytes at once of weights and activations or keys and values, and the matrix instructions on them.
LOAD = r"ld\.global(\.nc)?\.v4\.(u32|b32)"
MULTIPLY = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32"
INSTRUCTIONS = {
    "linear": [LOAD, MULTIPLY, r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.u8\.s8\.s32"],
    "attention": [LOAD, MULTIPLY, r"ld\.shared\.v4\.(u32|b32)"],
}
Resources = dict[str, tuple[int, int]]  # kernel → the most registers and bytes spilled of its instances


def nvcc(*arguments: str) -> str:
    """What nvcc says; ends the program where it fails."""
    command = ["nvcc", *OPTIONS, *arguments]
    done = subprocess.run(command, cwd=CSRC.parent, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def kernel_name(mangled: str) -> str:
    """The last name of a mangled one that ends in _kernel; digits before it are its length."""
    found = re.findall(r"\d([a-z_]+_kernel)", mangled)
    return found[-1] if found else mangled


def resources(source: Path, folder: Path) -> Resources:
    """Compiles a file for every architecture; what its kernels take."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    targets.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    log = nvcc(*targets, "-Xptxas=-v", "--threads=0", "-c", str(source), "-o", str(folder / f"{source.name}.o"))
    most: Resources = {}
    kernel, spilled = "", 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = kernel_name(match[1])
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = max(int(match[1]), int(match[2]))
        elif match := re.search(r"Used (\d+) registers", line):
            registers, bytes_before = most.get(kernel, (0, 0))
            most[kernel] = max(registers, int(match[1])), max(bytes_before, spilled)
    return most


def missing(source: str, folder: Path) -> list[str]:
    """Which of a file's instructions nvcc does not generate."""
    ptx = folder / f"{source}.ptx"
    nvcc(f"-arch=compute_{ARCHITECTURES[0]}", "-ptx", str(CSRC / "cuda" / f"{source}.cu"), "-o", str(ptx))
    text = ptx.read_text()
    return [f"{source}.cu has no {pattern}" for pattern in INSTRUCTIONS[source] if not re.search(pattern, text)]


def table() -> Resources:
    """What the kernels may take."""
    rows = [line.split() for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]
    return {name: (int(registers), int(spilled)) for name, registers, spilled in rows}


def main() -> None:
    """Ends the program with what is wrong, or prints a line."""
    found: Resources = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            found |= resources(source, Path(folder))
        problems = [problem for source in INSTRUCTIONS for problem in missing(source, Path(folder))]
    if "--write" in sys.argv:
        lines = [f"{name} {registers} {spilled}" for name, (registers, spilled) in sorted(found.items())]
        header = "# kernel, most registers of a thread, most bytes spilled; over all its instances and architectures"
        TABLE.write_text("\n".join([header, *lines, ""]))
    for name, took in found.items():
        may = table().get(name, (0, 0))
        if took[0] > may[0] or took[1] > may[1]:
            problems.append(f"{name} takes {took[0]} registers and spills {took[1]} bytes; resources.txt has {may}")
    if problems:
        sys.exit("\n".join(problems))
    names = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
    sys.stdout.write(
        f"{len(found)} kernels compile for {names}; {sum(s > 0 for _, s in found.values())} of them spill\n"
    )


if __name__ == "__main__":
    main()
