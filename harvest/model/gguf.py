"""Turns GGUF files into ordinary model folders: finds them, joins their parts, unpacks them once, caches the result.

How: transformers unpacks a GGUF file (slow: it parses and dequantises everything), and the result is saved as
config, tokenizer and safetensors under `$XDG_CACHE_HOME/residscope/gguf` (default `~/.cache`), by the file's SHA-256
and transformers' version. The folder is built under a temporary name and renamed; the files' hashes are checked at
each use, and a damaged folder is rebuilt. Weights are kept in float32, which is exact, up to a billion parameters, and
in bfloat16 above. What transformers silently leaves out is handled here: the scaling of a rotary embedding is added or
refused, tensors that it has no place for are refused. The cache is never cleared; it may be deleted at any time.
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

import numpy as np
import xxhash

from harvest.model.aliases import PACKAGED
from harvest.model.blocks import n_layers_of
from harvest.model.hashes import hash_of
from harvest.model.sanity import refuse_missing
from residscope.console import human_bytes
from residscope.errors import IncompatibleError, ResidscopeError, said
from residscope.reading import CONFIG_BYTES, read_whole

_BLOCK = 1 << 22
_EXACT_PARAMETERS = 1_000_000_000
_SEAL, _FORM = "residscope.json", 2  # Folders of an earlier form are not used.
_ADDED = "rope"  # An empty file in the folder of a model whose rotary embedding was changed after transformers made it.
_READERS = ("gguf", "accelerate")  # What transformers needs to read GGUF.


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, possibly in several parts."""

    name: str
    parts: tuple[Path, ...]
    """Files whose contents, one after another, are the GGUF file; usually one."""


def packaged_gguf(alias: str) -> GgufFile | None:
    """The GGUF file that installed PyPI packages (which are not imported) have for a short name; None if not found."""
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


def fingerprint(digest: str, folder: Path) -> str:
    """Identifies the model in `folder`, and tells it from one that an earlier version unpacked from the same file."""
    return digest + "-rope" * (folder / _ADDED).exists()


def unpacked_folder(file: GgufFile, digest: str) -> Path:
    """A folder with the model of `file` (SHA-256 `digest`) as config, tokenizer and safetensors, unpacked once.

    `IncompatibleError` for a file that transformers cannot read, `ResidscopeError` if the cache cannot be written.
    """
    import transformers

    size = sum(part.stat().st_size for part in file.parts)
    key = f"{file.name.removesuffix('.gguf')}-{size}-{digest[:16]}-transformers-{transformers.__version__}-{_FORM}"
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
        what = f"{error.strerror} while unpacking {file.name}. Set XDG_CACHE_HOME to a folder with room"
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
        # The library shows its own progress bar, whatever its settings.
        with contextlib.redirect_stderr(io.StringIO()):
            config = transformers.AutoConfig.from_pretrained(source.parent, **arguments)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, config=config, **arguments)
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
            arguments |= {"config": config, "dtype": torch.float32, "output_loading_info": True}
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(source.parent, **arguments)
            model, info = loaded
            refuse_missing(file.name, sorted(info["missing_keys"]), "")
            if _add_left_out(source, file.name, model):
                (folder / _ADDED).touch()
            if sum(p.numel() for p in model.parameters()) > _EXACT_PARAMETERS:
                model = model.bfloat16()
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:
        if isinstance(error, IncompatibleError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise IncompatibleError(
            f"{file.name}: transformers cannot read this GGUF file ({type(error).__name__}: {said(error)}). "
            "It may be damaged, or have an architecture that transformers cannot read from GGUF"
        ) from error


def _add_left_out(source: Path, name: str, model: Any) -> bool:
    """Scale the model's rotary embedding as the file says, and return whether that changed it; `IncompatibleError` if
    transformers cannot express it, or if the model lacks tensors of the file."""
    from gguf import GGUFReader
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    reader, config, way_out = GGUFReader(source), model.config, "give the model's folder, or its id on the hub"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    values = {key.partition(".rope.")[2]: _value(field) for key, field in reader.fields.items() if ".rope." in key}
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    before = dict(rope)
    if "freq_base" in values and "rope_theta" in rope:
        rope["rope_theta"] = float(values["freq_base"])
    kind, factor = values.get("scaling.type", "none"), values.get("scaling.factor")
    length = values.get("scaling.original_context_length")
    if (llama3 := tensors.pop("rope_freqs.weight", None)) is not None:  # made from four numbers that the file lacks
        kind, factor, length = "llama3", llama3.data.max(), 8192
    if kind != "none" and rope.get("rope_type", "default") == "default":  # Otherwise transformers has read it.
        known = rope is getattr(config, "rope_parameters", None) or kind == "linear"
        if not rope or factor is None or not known or kind not in ("linear", "yarn", "llama3"):
            raise IncompatibleError(f"{name}: transformers leaves out its rope scaling, {kind}: {way_out}")
        rope |= {"rope_type": kind, "factor": float(factor)}
        rope |= {"original_max_position_embeddings": int(length)} if length else {}
        if llama3 is not None:
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            made, n = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy(), len(llama3.data)
            if not np.allclose(made * llama3.data, rope["rope_theta"] ** -(np.arange(n) / n), rtol=1e-4, atol=0):
                raise IncompatibleError(f"{name}: its rope_freqs.weight is not that of Llama 3: {way_out}")
    if config.tie_word_embeddings:
        tensors.pop("output.weight", None)
    if any(key.endswith(".nextn_predict_layers") for key in reader.fields):  # extra blocks after the residual stream
        extra = f"blk.{n_layers_of(config)}."
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(extra)}
    there = sum(int(tensor.n_elements) for tensor in tensors.values())
    taken = sum(t.numel() for t in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
    if there > taken:
        what = f"transformers leaves out {there - taken:,} of its {there:,} numbers"
        raise IncompatibleError(f"{name}: {what}: {way_out}")
    return rope != before


def _value(field: Any) -> Any:
    """A number or string in a GGUF file's metadata; of a list the first."""
    part = field.parts[field.data[0]]
    return bytes(part).decode() if part.dtype == np.uint8 else part[0]


def _check_readable(file: GgufFile) -> None:
    if missing := [name for name in _READERS if importlib.util.find_spec(name) is None]:
        raise ResidscopeError(f"{file.name}: reading a GGUF file needs `pip install {' '.join(missing)}`")
    with file.parts[0].open("rb") as stream:
        found = stream.read(4)
    if found != b"GGUF":
        what = f"not a GGUF file (should begin with b'GGUF', found {found!r})"
        raise IncompatibleError(f"{file.name}: {what}; download it again")


def _is_whole(folder: Path) -> bool:
    """Whether the folder is as `_unpack` wrote it: every file has its hash in the seal."""
    try:
        seal = json.loads(read_whole(folder / _SEAL, CONFIG_BYTES))
        return bool(seal) and all(hash_of(xxhash.xxh3_128(), folder / name) == found for name, found in seal.items())
    except (OSError, ValueError, AttributeError):
        return False
