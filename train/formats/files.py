"""Reading and writing autoencoders in our own and other projects' formats, from a local folder or the hub.

    sae, origin = read_sae("tim-lawson/mlsae-pythia-70m-deduped-x64-k32")      # or a folder, or ckpt.pt
    write_sae(sae, Path("out"), "saelens", store=origin.store)

A format is recognised by its file names: `ckpt.pt` or `ckpt.safetensors` (ours), `model.safetensors` (mlsae),
`sae_weights.safetensors` (SAELens), `sae.safetensors` (sparsify). Where a folder has one sub-folder per autoencoder, as
sparsify and SAELens write them, `subfolder` says which. Conversion preserves reconstructions, or the error
names what the format cannot express (`train.formats.layouts`). Training state stays in `ckpt.pt`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from residscope.destinations import together
from residscope.errors import IncompatibleError, UsageError, said
from residscope.reading import read_json, reading
from residscope.urls import as_path, local_copy
from store.files import atomic_write
from train.checkpoint import Checkpoint, check_records, check_weights, load_checkpoint, save_checkpoint
from train.formats import layouts
from train.formats.hub import HUB_ID, fetch
from train.formats.layouts import Layout, Reader, listed, mapping
from train.formats.saelens import lay_out_saelens, parse_saelens
from train.model import MLSAE, SAEConfig

ForeignFormat = Literal["mlsae", "saelens", "sparsify"]
Format = Literal["residscope"] | ForeignFormat

LAYOUTS: dict[ForeignFormat, Layout] = {
    "mlsae": Layout("model.safetensors", "config.json", layouts.parse_mlsae, layouts.lay_out_mlsae),
    "saelens": Layout("sae_weights.safetensors", "cfg.json", parse_saelens, lay_out_saelens),
    "sparsify": Layout("sae.safetensors", "cfg.json", layouts.parse_sparsify, layouts.lay_out_sparsify),
}

CHECKPOINT = "ckpt.pt"
EXPORT = "ckpt.safetensors"
CARD = "README.md"
OVERWRITE = ", or overwrite it (--overwrite)"
EXPORT_FORMAT = "residscope 1"
_HASH = "xxh3_128"
"""The key of the check sum in the export's header."""


class Written(NamedTuple):
    """What `write_sae` wrote."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]
    """What the format cannot express, as messages for the user."""


_FILE_KINDS = (".pt", ".safetensors")
"""Endings of files: `demo/ckpt.pt` looks like OWNER/NAME but is a file."""


def read_sae(
    source: str | Path, *, subfolder: str | None = None, revision: str | None = None
) -> tuple[MLSAE, Checkpoint]:
    """The autoencoder in `source`, and what is known of it: see `read_checkpoint`."""
    found = read_checkpoint(source, subfolder=subfolder, revision=revision)
    return found.sae, found


def read_checkpoint(source: str | Path, *, subfolder: str | None = None, revision: str | None = None) -> Checkpoint:
    """Read `source`: a checkpoint file, a folder in any known format, or a hub id (`owner/name`).

    subfolder: which of several, such as sparsify's "layers.3"; may be left out if there is only one. revision: branch,
    tag or commit on the hub. Raises `UsageError` if nothing is found, or several and none was chosen, `ResidscopeError`
    if the hub does not answer, `IncompatibleError` for what cannot be represented or is damaged.
    """
    path = local_copy(as_path(source))
    on_hub = not path.exists()
    if on_hub:
        if path.suffix in _FILE_KINDS or not HUB_ID.fullmatch(str(source)):
            way_out = "give a checkpoint, a folder, or the owner/name of a hub repository"
            raise UsageError(f"{source}: no such file or folder; {way_out}")
        path = _fetch(str(source), subfolder, revision)
    if path.is_file():
        return _read_file(path)
    name = f"{source}/{subfolder}" if subfolder else str(source)
    folder = path / subfolder if subfolder else path
    found = _formats_in(folder)
    if not found and not subfolder and (inner := _subfolders(folder)):
        if len(inner) > 1:
            raise UsageError(f"{source}: holds {len(inner)} autoencoders: choose a sub-folder: {listed(inner)}")
        folder = folder / inner[0]
        found = _formats_in(folder)
    if not found:
        raise IncompatibleError(
            f"{name}: no autoencoder found; looked for {', '.join(known_files())}"
            + (f"; these sub-folders hold one: {listed(_subfolders(path))}" if subfolder and not on_hub else "")
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UsageError(f"{name} contains several autoencoders ({names}): give the path of one file")
    return _read_file(found[0], shown=name)


def write_sae(
    sae: MLSAE,
    folder: Path,
    to: Format,
    *,
    store: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    hookpoints: Sequence[str] = (),
    overwrite: bool = False,
    card: Callable[[tuple[str, ...]], str] | None = None,
) -> Written:
    """Write `sae` to `folder` (made if necessary) in format `to`; all files appear together.

    store, trainer: as in `Checkpoint`; kept if the format has room. hookpoints: for SAELens and sparsify, write one
    whole copy to a sub-folder of each of these names; SAELens also records the name as its hook. card: makes the
    README.md from the notes. Raises `UsageError` if files exist already and `overwrite` is not set,
    `IncompatibleError` for what the format cannot express.
    """
    weights, others = outputs(folder, to, hookpoints)
    names = [*weights, *others, *([CARD] if card else [])]
    with together(folder, names, weights, replace=overwrite, flag="DST", way_out=OVERWRITE) as partial:
        notes: tuple[str, ...] = ()
        if to == "residscope":
            save_checkpoint(partial / CHECKPOINT, sae, store=dict(store or {}), trainer=dict(trainer or {}))
            write_safetensors(sae, partial / EXPORT, store=store, trainer=trainer)
        elif refused := layouts.refusal(to, sae.config):
            raise IncompatibleError(f"{folder}: the format {to} cannot express {refused}; write it as residscope")
        else:
            for weights_file, config_file, name in zip(weights, others, hookpoints or (None,), strict=True):
                ours: dict[str, Any] = {**asdict(sae.config), "store": _plain(store or {})}
                laid_out = LAYOUTS[to].lay_out(sae, ours, name)
                tensors = layouts.contiguous(laid_out.tensors)
                ours[_HASH] = _folder_hash(laid_out.config, tensors)
                (partial / weights_file).parent.mkdir(parents=True, exist_ok=True)
                (partial / weights_file).write_bytes(to_safetensors(tensors, {"format": "pt"}))
                (partial / config_file).write_text(json.dumps(laid_out.config, indent=2), encoding="utf-8")
                notes = laid_out.notes
            if lens := (store or {}).get("lens"):
                notes += (f"it was trained on vectors that went through a tuned lens ({lens}): give it such vectors",)
        if card:
            (partial / CARD).write_text(card(notes), encoding="utf-8")
    return Written(tuple(folder / name for name in names), notes)


def outputs(folder: Path, to: Format, hookpoints: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Names of the weights and the other files that `write_sae` would write; `UsageError` for clashing hookpoints."""
    if folder.suffix in _FILE_KINDS or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder}: give a folder to write into; the files' names are the format's own")
    if hookpoints and to not in ("saelens", "sparsify"):
        raise UsageError(f"--hookpoints: a sub-folder for each hookpoint is for saelens and sparsify, not for {to}")
    for i, name in enumerate(hookpoints):
        if Path(name) in map(Path, hookpoints[:i]):
            raise UsageError(f"--hookpoints: {name} is given twice")
        parts = Path(name).parts
        if not name.strip() or not parts or Path(name).is_absolute() or {"..", ".partial", CARD} & {*parts}:
            wanted = f"a name should be a sub-folder of {folder}, such as layers.3"
            raise UsageError(f"--hookpoints: {wanted}, found {name!r}")
    if to == "residscope":
        return [CHECKPOINT], [EXPORT]
    layout = LAYOUTS[to]
    parts = [f"{PurePath(name)}/" for name in hookpoints] or [""]
    return [part + layout.weights_file for part in parts], [part + layout.config_file for part in parts]


def write_safetensors(
    sae: MLSAE, path: Path, *, store: Mapping[str, Any] | None = None, trainer: Mapping[str, Any] | None = None
) -> None:
    """Our own export beside `ckpt.pt`: the same weights, with config, store and plain values of trainer in the header.

    Anyone can read it without this project and without running code; a resume needs `ckpt.pt`.
    """
    header = {
        "format": EXPORT_FORMAT,
        "config": json.dumps(asdict(sae.config)),
        "store": json.dumps(_plain(store or {})),
        "trainer": json.dumps(_plain(trainer or {})),
    }
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in sorted(sae.state_dict().items())}
    header[_HASH] = _content_hash(header, tensors)
    entries: dict[str, Any] = {"__metadata__": dict(sorted(header.items()))}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    # Not by the library: it orders the header's keys differently each time, and copies all tensors.
    text = json.dumps(dict(sorted(entries.items())), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    atomic_write(path, [len(text).to_bytes(8, "little"), text, *map(_as_bytes, tensors.values())])


def _content_hash(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """XXH3-128 over the records and the tensors of an export: the format itself has no check sums."""
    digest = xxhash.xxh3_128("\0".join(header[name] for name in ("config", "store", "trainer")).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(_as_bytes(tensor))
    return digest.hexdigest()


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _folder_hash(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """`_content_hash` of a foreign layout's two files."""
    return _content_hash({"config": json.dumps(config, sort_keys=True), "store": "", "trainer": ""}, tensors)


def read_safetensors(path: Path) -> Checkpoint:
    """Read a file of `write_safetensors`; `IncompatibleError` if it is something else or damaged."""
    with _open(path) as file:
        header = file.metadata() or {}
        if header.get("format") != EXPORT_FORMAT:
            reason = f"its header's format should be {EXPORT_FORMAT!r}, found {header.get('format')!r}"
            raise IncompatibleError(f"{path}: not exported by residscope: {reason}")
        try:
            config = SAEConfig.from_plain(json.loads(header["config"]))
            with torch.device("meta"):  # only shapes: a config may ask for more memory than there is
                MLSAE(config).load_state_dict(
                    {name: torch.empty(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                )
            sae = MLSAE(config)
            sae.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
            # Hash what was loaded: the file may change meanwhile. Older exports have no hash.
            if _HASH in header and _content_hash(header, sae.state_dict()) != header[_HASH]:
                raise ValueError("its check sum is wrong: the file was changed after it was written")
            store, trainer = (json.loads(header[name]) for name in ("store", "trainer"))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, UsageError) as error:
            raise IncompatibleError(f"{path}: damaged, or by another version: {said(error)}") from None
    check_weights(sae.state_dict(), str(path))
    check_records(store, trainer, str(path))
    return Checkpoint(sae=sae, store=store, trainer=trainer, path=str(path))


def _read_file(path: Path, shown: str | None = None) -> Checkpoint:
    """One weights file, whose name tells its format; `shown` is its name for the user."""
    for name, layout in LAYOUTS.items():
        if path.name == layout.weights_file:
            return _read_foreign(path, name, shown or str(path))
    found = read_safetensors(path) if path.suffix == ".safetensors" else load_checkpoint(path)
    return replace(found, path=shown) if shown else found


def _read_foreign(path: Path, format: ForeignFormat, name: str) -> Checkpoint:
    """A foreign folder's autoencoder, whose weights are `path`; `name` is its name for the user."""
    layout = LAYOUTS[format]
    config = _read_json(path.with_name(layout.config_file))
    try:
        tensors = _tensors(path)
        if repr(_read_json(path.with_name(layout.config_file))) != repr(config):  # NaN does not equal itself
            raise IncompatibleError(f"{name}: {layout.config_file} was changed while the weights were read; try again")
        parsed = layout.parse(Reader(tensors, name), config)
        ours, notes = mapping(parsed.ours), parsed.notes
        expected = ours.pop(_HASH, None)
        if ours and expected is None:
            notes += (f"{name}: without a check sum (an earlier version wrote none): damage would go unnoticed",)
        elif ours and expected != _folder_hash(config, tensors):
            raise IncompatibleError(
                f"{name}: its check sum is wrong: the weights or {layout.config_file} were changed after residscope"
                f" wrote them; convert it again, or, if the change was meant, delete {_HASH!r} there"
            )
    except (UsageError, TypeError, ValueError, AttributeError) as error:  # a value of the wrong type
        raise IncompatibleError(f"{name}: {layout.config_file} is invalid: {said(error)}") from None
    check_weights(parsed.sae.state_dict(), name)
    if format == "mlsae" and re.match(r"(ml)?sae-.+-lens", Path(name).name) and not config.get("tuned_lens"):
        notes += (f"{name}: by its name, its vectors went through a tuned lens: use a store with that --lens",)
    known = {"d_model": parsed.sae.config.d_model, "model": parsed.model, "layers": parsed.layers}
    store = mapping(ours.get("store")) or {key: value for key, value in known.items() if value is not None}
    trainer = {"finished": True, "converted_from": {"format": format, "path": name}}
    check_records(store, trainer, name)
    return Checkpoint(sae=parsed.sae, store=store, trainer=trainer, notes=notes, format=format, path=name)


def known_files() -> tuple[str, ...]:
    """Names of files that hold an autoencoder, in all formats."""
    return (EXPORT, CHECKPOINT, *(layout.weights_file for layout in LAYOUTS.values()))


def _formats_in(folder: Path) -> list[Path]:
    """The weights files directly in `folder`; only the checkpoint, if both of ours are there."""
    found = [folder / name for name in known_files() if (folder / name).is_file()]
    return [path for path in found if path.name != EXPORT] or found


def _subfolders(folder: Path) -> list[str]:
    """Sub-folders, at any depth, with an autoencoder or (from a hub repository) so far only its configuration."""
    wanted = {*known_files(), "cfg.json"}
    found = {path.parent for path in folder.rglob("*") if path.name in wanted and path.parent != folder}
    return sorted((path.relative_to(folder).as_posix() for path in found), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.10 after layers.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.replace("_", ".").split(".")]


def _fetch(repo_id: str, subfolder: str | None, revision: str | None) -> Path:
    """The files of one autoencoder on the hub; without `subfolder`, if there is none at the top, all configurations."""
    files = [*known_files(), *{layout.config_file for layout in LAYOUTS.values()}]
    if subfolder:
        return fetch(repo_id, revision=revision, patterns=[f"{subfolder.strip('/')}/{name}" for name in files])
    folder = fetch(repo_id, revision=revision, patterns=files)
    if not _formats_in(folder):
        folder = fetch(repo_id, revision=revision, patterns=["*/cfg.json"])
        names = _subfolders(folder)
        if len(names) == 1:
            folder = fetch(repo_id, revision=revision, patterns=[f"{names[0]}/{name}" for name in files])
    return folder


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or those below `autoencoder.`, copied, so that what is checked is what is used."""
    with _open(path) as file:
        names = list(file.keys())
        inner = [name for name in names if name.startswith("autoencoder.")]
        return {name.removeprefix("autoencoder."): file.get_tensor(name).clone() for name in inner or names}


def _open(path: Path) -> Any:
    with reading(f"{path}: not a complete safetensors file"):
        return safe_open(path, framework="pt", device="cpu")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise IncompatibleError(f"{path}: missing; the weights beside it cannot be read without it") from None
    if not isinstance(found, dict):
        raise IncompatibleError(f"{path}: should be a JSON object, it is a {type(found).__name__}")
    return found


def _plain(value: Any) -> Any:
    """`value` without what JSON cannot represent (tensors, arrays)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if _is_plain(item)}
    return [_plain(item) for item in value if _is_plain(item)] if isinstance(value, list | tuple) else value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, Mapping, list, tuple))
