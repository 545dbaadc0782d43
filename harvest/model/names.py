"""Resolves a model's name (a short name, a hub id, a local folder or a GGUF file), and pins it by commit or by hash.

A folder is pinned by every file in it that may affect what is loaded: all except those of `_UNREAD`: documents, logs,
pictures, and the weights of other libraries. So a file of an unknown kind counts, and a changed log does not.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import xxhash

from harvest.model import gguf
from harvest.model.adapters import ADAPTER, read_adapter
from harvest.model.aliases import hub_id, suggestions
from harvest.model.hashes import add_file
from harvest.model.hub import pin, quiet
from residscope.errors import IncompatibleError, ResidscopeError, UsageError, said
from residscope.names import beside
from residscope.reading import read_json

_UNREAD = (
    "readme* license* *.md *.log *.out *.jsonl *.csv *.parquet *.zst *.gz events.out.* *.png *.jpg *.jpeg *.gif *.svg"
    " *.webp *.pdf trainer_state.json training_args.bin *.pt *.pth *.h5 *.msgpack *.onnx *.ot *.gguf *.tflite *.tmp"
    " *.lock *~ .* *.harvest.toml *.config.toml *.html summary.json compare.json prompt.json"
)
"""Names (in lower case) of files in a model's folder that transformers does not read; the last are Residscope's."""
_FIRST = (
    "config.json tokenizer.json tokenizer.model vocab.json merges.txt tokenizer_config.json special_tokens_map.json"
)
"""Hashed separately, with the weights: the hash in stores from before other files were hashed."""
_TOKENIZER = "*token* *vocab* merges.txt *.model *.model.v* *.spm *.tiktoken *bpe* tekken.json"
_WEIGHTS = "*.safetensors *.bin"
_TAKEN_FIRST = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
"""If one of these exists, no .bin is read."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Exactly which model; nothing is loaded yet."""

    name: str
    """What to call it: the hub id or short name, or the name of the folder or file without its path."""
    source: Literal["hub", "folder", "gguf"]
    location: str
    """What transformers loads: the hub id, or the path of a folder."""
    revision: str | None = None
    """Commit on the hub."""
    fingerprint: str | None = None
    """Hash of the content: of a GGUF file (SHA-256), or of a folder's files that may be read (xxh3-128 of the
    weights and best-known files, then `+` and that of the others); for an adapter alone, combined with its base's."""
    cached_only: bool = False
    """Without a network: load from the hub's local cache."""
    random_init: bool = False
    """Random weights instead of the model's own."""
    seed: int = 0
    """Seed of the random weights."""
    adapter: str | None = None
    """The kind of its adapter, and the version of peft that applies it."""
    base: "ModelSpec | None" = None
    """The model whose weights and configuration are loaded, if this is an adapter alone."""
    own_tokenizer: bool = True
    """Whether it has its own tokenizer, rather than that of `base`."""

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Keywords of every `from_pretrained` call."""
        # trust_remote_code is set explicitly, because otherwise transformers may ask at the terminal.
        return {**self.place, "trust_remote_code": False}

    @property
    def place(self) -> dict[str, Any]:
        """Keywords of any download of its files."""
        if self.source != "hub":
            return {"local_files_only": True}
        return {"revision": self.revision, "local_files_only": self.cached_only}


def resolve_model(
    name: str, *, revision: str | None = None, random_init: bool = False, seed: int = 0, as_base: bool = False
) -> ModelSpec:
    """The model that `name` stands for: a local folder, a GGUF file, a short name, or a hub id, in this order.

    Hashes local files, or asks the hub for the commit. as_base: it is an adapter's base, and must have no adapter.
    Raises `UsageError` if there is no such model, `IncompatibleError` for a folder or file that is not a model,
    `ResidscopeError` if the hub cannot be reached or peft is needed but not installed.
    """
    quiet()
    if not str(name).strip():
        raise UsageError("--model: the name is empty")
    path, files = Path(name).expanduser(), ()
    if path.exists():
        if revision is not None:
            raise UsageError(f"--revision {revision}: {name} is a local path, which has no revisions")
        if path.is_dir():
            spec, files = _folder_spec(path, needs_weights=not random_init)
        elif path.is_file() and path.suffix.lower() == ".gguf":
            spec = _gguf_spec(gguf.GgufFile(path.name, (path,)), path.name)
        else:
            way_out = "for other formats, give the folder that contains config.json"
            raise IncompatibleError(f"model {path}: not a .gguf file; {way_out}")
    elif revision is None and (packaged := gguf.packaged_gguf(name)):
        spec = _gguf_spec(packaged, name.lower())
    else:
        spec, files = _hub_spec(name, revision)
    if ADAPTER in files and not random_init:
        if as_base:
            way_out = "merge it into its weights"
            raise IncompatibleError(f"{name} has an adapter too, but only one can be applied; {way_out}")
        spec = _with_adapter(spec, files)
    return replace(spec, random_init=random_init, seed=seed)


def _hub_spec(name: str, revision: str | None) -> tuple[ModelSpec, Collection[str]]:
    if name.startswith((".", "/", "~")) or name.lower().endswith(".gguf"):
        raise UsageError(f"model {name}: there is no such file or folder")
    repo_id = hub_id(name) or name
    if "/" not in repo_id:
        close = suggestions(name)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        known = "neither a short name, a hub id (owner/name), a folder nor a GGUF file"
        raise UsageError(f"unknown model {name!r}: {known}{hint}")
    repo = pin(repo_id, "model", revision, probes=("config.json", ADAPTER))
    spec = ModelSpec(name=repo_id, source="hub", location=repo_id, revision=repo.commit, cached_only=repo.cached_only)
    return spec, repo.files


def _with_adapter(spec: ModelSpec, files: Collection[str]) -> ModelSpec:
    """`spec`, whose `files` include an adapter's configuration, with the adapter's kind and base."""
    if spec.source == "hub":
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(spec.location, ADAPTER, **spec.place))
        except Exception as error:  # Several libraries raise many kinds.
            raise ResidscopeError(f"{spec.name}: {ADAPTER} cannot be downloaded ({said(error)})") from error
    else:
        file = Path(spec.location, ADAPTER)
    adapter, base_name = read_adapter(spec.name, file)
    if any(map(_is_weight, files)):
        return replace(spec, adapter=adapter)
    try:
        if not base_name:
            raise UsageError(f"{ADAPTER} has no base_model_name_or_path")
        base = resolve_model(base_name, as_base=True)
    except ResidscopeError as error:
        raise type(error)(
            f"{spec.name} is only an adapter, and the model that it belongs to was not found ({error}); put the"
            " adapter's files into that model's folder, and give that folder"
        ) from None
    hashed = xxhash.xxh3_128(f"{spec.fingerprint} on {base.fingerprint or base.revision}".encode()).hexdigest()
    own = any(_is(_TOKENIZER, name) for name in files)
    return replace(spec, adapter=adapter, base=base, own_tokenizer=own, fingerprint=hashed)


def _is_weight(name: str) -> bool:
    return _is(_WEIGHTS, name) and not name.startswith("adapter_")


def _is(patterns: str, name: str) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in patterns.split())


def model_files(folder: Path) -> list[Path]:
    """Files of a model's folder that may affect what is loaded, by name; if weights are in two formats, safetensors."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not _is(_UNREAD, path.name))
    names = [name for name in names if not _is_ours(folder / name)]
    safe = {name.startswith("adapter_") for name in names if name in _TAKEN_FIRST}
    return [folder / name for name in names if not (name.endswith(".bin") and name.startswith("adapter_") in safe)]


def _is_ours(file: Path) -> bool:
    """Whether it is an autoencoder of `train`, which writes its options next to it."""
    may_be_ours = file.suffix == ".safetensors" and file.name not in _TAKEN_FIRST
    return may_be_ours and beside(file, ".config.toml").exists()


def _uncounted(files: dict[str, Path]) -> Iterator[str]:
    """Weights that the configuration or an index of shards would load, but that are not among `files`."""
    for name, file in files.items():
        found: Any = None
        if name == "config.json" or name.endswith(".index.json"):
            with suppress(OSError, IncompatibleError):  # The library's own error says more.
                found = read_json(file)
        found = found if isinstance(found, dict) else {}
        shards, whole = found.get("weight_map"), found.get("transformers_weights")
        named = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()
        yield from sorted(w for w in named if "/" in w or _is(_UNREAD, w) or _is_ours(file.with_name(w)))
        if whole is not None and str(whole) not in files:
            yield str(whole)


def _folder_spec(path: Path, *, needs_weights: bool) -> tuple[ModelSpec, Collection[str]]:
    folder = path.resolve()
    files = {file.name: file for file in model_files(folder)}
    if not needs_weights:
        files = {name: file for name, file in files.items() if not (_is(_WEIGHTS, name) or name == ADAPTER)}
    if ADAPTER not in files:  # Otherwise missing files may come from the adapter's base.
        if "config.json" not in files:
            way_out = "give a folder that transformers' save_pretrained wrote"
            raise IncompatibleError(f"model {path}: the folder has no config.json; {way_out}")
        if not any(_is(_TOKENIZER, name) for name in files):
            raise IncompatibleError(f"model {path}: the folder has no tokenizer; save the model's tokenizer there too")
        if needs_weights and not any(map(_is_weight, files)):
            raise IncompatibleError(f"model {path}: the folder has no weights ({' or '.join(_WEIGHTS.split())})")
        if needs_weights and (other := next(_uncounted(files), None)):
            raise IncompatibleError(
                f"model {path}: its files say that weights are in {other}, which is not read: put them next to"
                " config.json under a common name, or save the model again"
            )
    first = [name for name in _FIRST.split() if name in files] + [name for name in files if _is(_WEIGHTS, name)]
    rest = [name for name in files if name not in first]
    found = "+".join(_digest(map(files.__getitem__, names)) for names in (first, rest) if names)
    return ModelSpec(name=folder.name, source="folder", location=str(folder), fingerprint=found), files.keys()


def _digest(files: Iterable[Path]) -> str:
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        add_file(digest, file)
    return digest.hexdigest()


def _gguf_spec(file: gguf.GgufFile, name: str) -> ModelSpec:
    folder = gguf.unpacked_folder(file, digest := gguf.sha256(file))
    return ModelSpec(name=name, source="gguf", location=str(folder), fingerprint=gguf.fingerprint(digest, folder))
