"""Which model a name stands for: a short name, a hub id, a local folder or a GGUF file, pinned by commit or by hash."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import xxhash

from harvest.model import gguf
from harvest.model.aliases import hub_id, suggestions
from harvest.model.hashes import add_file
from harvest.model.hub import pin, quiet
from residscope.errors import IncompatibleError, UsageError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model, exactly; nothing is loaded yet."""

    name: str
    """What to call it; a hub id and a short name can be given to `resolve_model` again, a folder's or file's name
    only where it lies."""
    source: Literal["hub", "folder", "gguf"]
    location: str
    """What transformers loads: the hub id, or the path of a folder."""
    revision: str | None = None
    """Commit on the hub."""
    fingerprint: str | None = None
    """Hash of the content: of a GGUF file (SHA-256), or of a folder's configuration, tokenizer and weights
    (xxh3-128)."""
    cached_only: bool = False
    """There is no network: load from the hub's local cache."""
    random_init: bool = False
    """Random weights instead of the model's own."""
    seed: int = 0
    """Of the random weights."""

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Keywords of every `from_pretrained` call."""
        # Said outright, since transformers asks at the terminal where it is left open.
        common = {"trust_remote_code": False}
        if self.source != "hub":
            return {"local_files_only": True, **common}
        return {"revision": self.revision, "local_files_only": self.cached_only, **common}


def resolve_model(name: str, *, revision: str | None = None, random_init: bool = False, seed: int = 0) -> ModelSpec:
    """The model that `name` stands for: a local folder, a GGUF file, a short name, or a hub id, in this order.

    Hashes local files, or asks the hub for the commit. Raises `UsageError` where there is no such model,
    `IncompatibleError` for a folder or file that is not a model, `ResidscopeError` where the hub cannot be reached.
    """
    quiet()
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        if revision is not None:
            raise UsageError(f"--revision {revision}: {name} is a local path, which has no revisions")
        if path.is_dir():
            spec = _folder_spec(path, needs_weights=not random_init)
        elif path.suffix.lower() == ".gguf":
            spec = _gguf_spec(gguf.GgufFile(path.name, (path,)), path.name)
        else:
            raise IncompatibleError(
                f"model {path}: not a .gguf file; for other formats give the folder that contains config.json"
            )
    elif revision is None and (packaged := gguf.packaged_gguf(name)):
        spec = _gguf_spec(packaged, name.lower())
    else:
        spec = _hub_spec(name, revision)
    return replace(spec, random_init=random_init, seed=seed)


def _hub_spec(name: str, revision: str | None) -> ModelSpec:
    if name.startswith((".", "/", "~")) or name.lower().endswith(".gguf"):
        raise UsageError(f"model {name}: there is no such file or folder")
    repo_id = hub_id(name) or name
    if "/" not in repo_id:
        close = suggestions(name)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UsageError(
            f"unknown model {name!r}: neither a short name, a hub id (owner/name), a folder nor a GGUF file{hint}"
        )
    repo = pin(repo_id, "model", revision)
    return ModelSpec(name=repo_id, source="hub", location=repo_id, revision=repo.commit, cached_only=repo.cached_only)


def small_files(folder: Path) -> list[Path]:
    """Files of a model's folder with its configuration and tokenizer."""
    return [folder / name for name in ("config.json", *_TOKENIZER_FILES) if (folder / name).is_file()]


def weight_files(folder: Path) -> list[Path]:
    """Files of a model's folder with its weights: safetensors, or else .bin; in order."""
    return next((found for pattern in _WEIGHT_PATTERNS if (found := sorted(folder.glob(pattern)))), [])


def _folder_spec(path: Path, *, needs_weights: bool) -> ModelSpec:
    folder = path.resolve()
    files = small_files(folder)
    if not (folder / "config.json").is_file():
        raise IncompatibleError(
            f"model {path}: the folder has no config.json; give a folder that transformers' save_pretrained wrote"
        )
    if len(files) == 1:
        raise IncompatibleError(
            f"model {path}: the folder has no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}); save the model's tokenizer"
            " there too"
        )
    if needs_weights:
        weights = weight_files(folder)
        if not weights:
            raise IncompatibleError(f"model {path}: the folder has no weights ({' or '.join(_WEIGHT_PATTERNS)})")
        files += weights
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        add_file(digest, file)
    return ModelSpec(name=folder.name, source="folder", location=str(folder), fingerprint=digest.hexdigest())


def _gguf_spec(file: gguf.GgufFile, name: str) -> ModelSpec:
    digest = gguf.sha256(file)
    return ModelSpec(name=name, source="gguf", location=str(gguf.unpacked_folder(file, digest)), fingerprint=digest)
