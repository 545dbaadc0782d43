"""GGUF files as ordinary model folders: found, put together, unpacked once, and kept in a cache.

How: transformers unpacks a GGUF file (slow: it parses and dequantises everything), and what comes out is saved as
config, tokenizer and safetensors under `$XDG_CACHE_HOME/residscope/gguf` (default `~/.cache`), by the file's SHA-256
and transformers' version. The folder is built under a temporary name and renamed; the files' hashes are checked at
each use, and a damaged folder is built again. Weights are kept in float32, which is exact, up to a billion
parameters and in bfloat16 above. The cache is never cleared; it may be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from harvest.model.aliases import PACKAGED
from harvest.model.hashes import hash_of
from harvest.model.sanity import refuse_missing
from residscope.console import human_bytes
from residscope.errors import IncompatibleError, ResidscopeError, said
from residscope.reading import CONFIG_BYTES, read_whole

_BLOCK = 1 << 22
_EXACT_PARAMETERS = 1_000_000_000
_SEAL = "residscope.json"
_READERS = ("gguf", "accelerate")  # What transformers needs for it.


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, perhaps in parts."""

    name: str
    parts: tuple[Path, ...]
    """Files whose contents, one after another, are the GGUF file; usually one."""


def packaged_gguf(alias: str) -> GgufFile | None:
    """The GGUF file that an installed PyPI package, which is not imported, has for a short name; None without it."""
    parts: list[Path] = []
    for module in PACKAGED.get(alias.lower(), ()):
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0])
        found = sorted([*folder.rglob("*.gguf"), *folder.rglob("*.gguf.part*")])
        if len(found) != 1:
            return None
        parts += found
    return GgufFile(parts[0].name.partition(".gguf")[0] + ".gguf", tuple(parts)) if parts else None


def sha256(file: GgufFile) -> str:
    """SHA-256 (hex) of the whole file."""
    return hash_of(hashlib.sha256(), *file.parts)


def unpacked_folder(file: GgufFile, digest: str) -> Path:
    """A folder with the model of `file` (SHA-256 `digest`) as config, tokenizer and safetensors, unpacked once.

    `IncompatibleError` for a file that transformers cannot read, `ResidscopeError` where the cache cannot be written.
    """
    import transformers

    size = sum(part.stat().st_size for part in file.parts)
    key = f"{file.name.removesuffix('.gguf')}-{size}-{digest[:16]}-transformers-{transformers.__version__}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "residscope" / "gguf" / key
    if _is_whole(folder):
        return folder
    _check_readable(file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{key}.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # so that two processes do not unpack the same file at once
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                _unpack(file, folder, size, digest)
    except OSError as error:
        what = f"{error.strerror}, while {file.name} was unpacked. Set XDG_CACHE_HOME to a folder with room"
        raise ResidscopeError(f"{error.filename or folder}: {what}") from error
    return folder


def _unpack(file: GgufFile, folder: Path, size: int, digest: str) -> None:
    print(f"unpacking {file.name} ({human_bytes(size)}) into {folder.parent}, once", file=sys.stderr)
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        source = file.parts[0]
        if len(file.parts) > 1:
            source = building / file.name
            with source.open("wb") as out:
                for part in file.parts:
                    out.write(part.read_bytes())
        _convert(source, building, file)
        if sha256(file) != digest:
            raise IncompatibleError(f"{file.name} was changed while it was unpacked; run the same command again")
        if source.parent == building:
            source.unlink()
        seal = {path.name: hash_of(xxhash.xxh3_128(), path) for path in sorted(building.iterdir())}
        (building / _SEAL).write_text(json.dumps(seal), encoding="utf-8")
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _convert(source: Path, folder: Path, file: GgufFile) -> None:
    import torch
    import transformers

    arguments: dict[str, Any] = {"gguf_file": source.name}
    try:
        # The library shows a bar of its own, whatever its settings.
        with contextlib.redirect_stderr(io.StringIO()):
            config = transformers.AutoConfig.from_pretrained(source.parent, **arguments)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, config=config, **arguments)
            if hasattr(transformers, "GgufConfig"):
                arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
            arguments |= {"config": config, "dtype": torch.float32, "output_loading_info": True}
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(source.parent, **arguments)
            model, info = loaded
            refuse_missing(file.name, sorted(info["missing_keys"]), "")
            if sum(p.numel() for p in model.parameters()) > _EXACT_PARAMETERS:
                model = model.bfloat16()
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:
        if isinstance(error, IncompatibleError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise IncompatibleError(
            f"{file.name}: transformers cannot read this GGUF file ({type(error).__name__}: {said(error)}). "
            "It may be damaged, or of an architecture that transformers does not take from GGUF"
        ) from error


def _check_readable(file: GgufFile) -> None:
    missing = [name for name in _READERS if importlib.util.find_spec(name) is None]
    if missing:
        raise ResidscopeError(f"{file.name}: reading a GGUF file needs `pip install {' '.join(missing)}`")
    with file.parts[0].open("rb") as stream:
        found = stream.read(4)
    if found != b"GGUF":
        what = f"not a GGUF file (it should begin with b'GGUF', found {found!r})"
        raise IncompatibleError(f"{file.name}: {what}; download it again")


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds what `_unpack` wrote: every file has the hash that the seal gives it."""
    try:
        seal = json.loads(read_whole(folder / _SEAL, CONFIG_BYTES))
        return bool(seal) and all(hash_of(xxhash.xxh3_128(), folder / name) == found for name, found in seal.items())
    except (OSError, ValueError, AttributeError):
        return False
