"""Tuned lens: one affine map (translator) per layer from its residual stream to the last layer's basis (Belrose et
al. 2023, arXiv 2303.08112).

How: applies h -> h + W h + b, and its inverse. Translator i was trained on the *input* of block i, so block l's output
takes translator l + 1, and the last block's output none ("tuned-lens" indexing). "mlsae-compat" uses translator l for
block l, like the reference implementation of the multi-layer SAE. Lenses are read and written in the published format:
`config.json`, and `params.pt` with "{i}.weight" [D, D] and "{i}.bias" [D]. They can also be read from the hub Space
AlignmentResearch/tuned-lens.

Shapes: L = n_layers, D = d_model; ... any leading dimensions.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from harvest.model.aliases import hub_id
from harvest.model.hashes import hash_of
from harvest.model.hub import pin
from harvest.model.load import LoadedModel
from residscope.errors import IncompatibleError, ResidscopeError, UsageError, said
from residscope.reading import CONFIG_BYTES, read_whole, reading
from residscope.tensors import load_tensors
from store.files import atomic_write

SPACE = "AlignmentResearch/tuned-lens"
Indexing = Literal["tuned-lens", "mlsae-compat"]
_FILES = ("config.json", "params.pt")
_FIT_ONE = "Fit one for this model (`residscope fit-lens`) and give its folder"


@dataclass(frozen=True, eq=False)
class TunedLens:
    """A lens in memory. `apply` and `invert` take the index of the block that output the vectors."""

    weights: Tensor
    """float32 [L, D, D]."""
    biases: Tensor
    """float32 [L, D]."""
    _: KW_ONLY
    indexing: Indexing = "tuned-lens"
    name: str = ""
    fingerprint: str = ""
    """Hash of config and parameters."""
    base_model: str | None = None
    """The model that it was fitted for, according to its config."""
    _factors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @property
    def n_layers(self) -> int:
        return len(self.weights)

    @property
    def d_model(self) -> int:
        """Size of a residual stream vector."""
        return self.weights.shape[-1]

    def describe(self) -> dict[str, Any]:
        """What a store records about the lens."""
        return {"id": self.name, "indexing": self.indexing, "hash": self.fingerprint}

    def translator(self, layer: int) -> int | None:
        """Index of the translator for block `layer`'s output; None if there is none."""
        if not 0 <= layer < self.n_layers:
            raise IndexError(f"layer {layer} is outside 0..{self.n_layers - 1}")
        if self.indexing == "mlsae-compat":
            return layer
        return layer + 1 if layer + 1 < self.n_layers else None

    def apply(self, residual: Tensor, layer: int) -> Tensor:
        """Block `layer`'s outputs [..., D] in the last layer's basis, in float32, on the residual's device."""
        residual = residual.float()
        if (i := self.translator(layer)) is None:
            return residual
        weight, bias = self.weights[i].to(residual.device), self.biases[i].to(residual.device)
        return residual + residual @ weight.T + bias

    def invert(self, transformed: Tensor, layer: int) -> Tensor:
        """The vectors [..., D] that `apply` turns into `transformed`: (I + W) h = y - b in float64; float32 out."""
        if (i := self.translator(layer)) is None:
            return transformed.float()
        factor, pivots = self._lu(i)
        shifted = transformed.to("cpu", torch.float64) - self.biases[i].cpu().double()
        columns = shifted.reshape(-1, self.d_model).T  # [D, rows]
        solved = torch.linalg.lu_solve(factor, pivots, columns).T
        return solved.reshape(transformed.shape).to(transformed.device, torch.float32)

    def to(self, device: torch.device | str) -> "TunedLens":
        """The same lens with its parameters on a device."""
        return replace(self, weights=self.weights.to(device), biases=self.biases.to(device))

    def _lu(self, i: int) -> tuple[Tensor, Tensor]:
        if i not in self._factors:
            matrix = torch.eye(self.d_model, dtype=torch.float64) + self.weights[i].cpu().double()
            factor, pivots, info = torch.linalg.lu_factor_ex(matrix)
            if info.item() != 0:
                found = f"translator {i} cannot be inverted (I + W is singular)"
                raise IncompatibleError(f"lens {self.name}: {found}. {_FIT_ONE}")
            self._factors[i] = factor, pivots
        return self._factors[i]


def load_lens(name: str, *, model_id: str, n_layers: int, d_model: int, indexing: Indexing = "tuned-lens") -> TunedLens:
    """The lens `name` for a model: a local folder, an id in the published collection, or "auto" for the one published
    for the model.

    Raises `UsageError` if there is no such lens, `IncompatibleError` if it is for a model with other sizes or damaged,
    `ResidscopeError` if it cannot be downloaded.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        folder, shown = path, path.resolve().name
    elif path.exists():
        raise IncompatibleError(f"--lens {name} is a file: give the folder that holds {' and '.join(_FILES)}")
    elif name.startswith((".", "/", "~")):
        raise UsageError(f"--lens {name}: there is no such folder. {_FIT_ONE}")
    else:
        shown = model_id if name == "auto" else hub_id(name) or name
        try:
            folder = _download(shown)
        except ResidscopeError as error:
            if name == "auto":
                raise
            raise type(error)(f"--lens {name}: no folder here, and {error}") from error
    for file in _FILES:
        if not (folder / file).is_file():
            raise IncompatibleError(f"--lens {name}: the folder has no {file}; a lens has {' and '.join(_FILES)}")
    lens = _read(folder, shown, n_layers, d_model, indexing)
    if lens.fingerprint != hash_of(xxhash.xxh3_128(), *(folder / file for file in _FILES)):
        raise IncompatibleError(f"--lens {name}: its files were changed while they were read; run the command again")
    return lens


def _read(folder: Path, name: str, n_layers: int, d_model: int, indexing: Indexing) -> TunedLens:
    digest = xxhash.xxh3_128()
    with reading(f"lens {name}: config.json should name num_hidden_layers and d_model"):
        content = read_whole(folder / "config.json", CONFIG_BYTES)
        digest.update(content)
        config = json.loads(content)
        found = (config["num_hidden_layers"], config["d_model"])
        if not all(type(number) is int for number in found):
            raise TypeError(f"they should be whole numbers, found {found}")
    if found != (n_layers, d_model):
        what = f"the model has {n_layers} and {d_model}; give the lens of this model"
        raise IncompatibleError(f"lens {name} is for {found[0]} layers and d_model {found[1]}, {what}")
    base_model = config.get("base_model_name_or_path")
    if not isinstance(base_model, str | None):
        raise IncompatibleError(f"lens {name}: config.json: the base model should be a name, found {base_model!r}")
    with (folder / "params.pt").open("rb") as file:
        hashlib.file_digest(file, lambda: digest)
        parameters = load_tensors(file, f"lens {name}: params.pt")
    weights = torch.stack([_parameter(parameters, name, f"{i}.weight", (d_model, d_model)) for i in range(n_layers)])
    if config.get("bias", True):
        biases = torch.stack([_parameter(parameters, name, f"{i}.bias", (d_model,)) for i in range(n_layers)])
    else:
        biases = torch.zeros(n_layers, d_model)
    made = {"fingerprint": digest.hexdigest(), "base_model": base_model}
    return TunedLens(weights, biases, indexing=indexing, name=name, **made)


def _parameter(parameters: Any, lens: str, key: str, shape: tuple[int, ...]) -> Tensor:
    found = parameters.get(key) if isinstance(parameters, dict) else None
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        seen = tuple(found.shape) if isinstance(found, Tensor) else "nothing"
        raise IncompatibleError(f"lens {lens}: params.pt should hold {key!r} of shape {shape}, found {seen}")
    if not found.dtype.is_floating_point:
        raise IncompatibleError(f"lens {lens}: {key!r} should hold floats, found {str(found.dtype)[6:]}")
    if not found.isfinite().all():
        raise IncompatibleError(f"lens {lens}: {key!r} holds values that are not finite")
    return found.float()


def _download(model_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    # The collection uses the old ids of the GPT-2 models, without an owner.
    candidates = list(dict.fromkeys([model_id, model_id.rpartition("/")[2]]))
    repo = pin(SPACE, "space", probes=[f"lens/{candidate}/config.json" for candidate in candidates])
    where: dict[str, Any] = {"repo_type": "space", "revision": repo.commit, "local_files_only": repo.cached_only}
    for candidate in candidates:
        try:
            paths = [hf_hub_download(SPACE, f"lens/{candidate}/{file}", **where) for file in _FILES]
        except Exception as error:
            if type(error).__name__ in ("EntryNotFoundError", "RemoteEntryNotFoundError", "LocalEntryNotFoundError"):
                continue
            found = f"{type(error).__name__}: {said(error)}"
            raise ResidscopeError(f"lens {candidate}: cannot be downloaded ({found})") from error
        return Path(paths[0]).parent
    raise UsageError(f"no published lens for {model_id!r} in the Space {SPACE}. {_FIT_ONE}")


def write_lens(folder: Path, model: LoadedModel, lens: TunedLens, *, extra: Mapping[str, Any]) -> None:
    """Write a lens for `model` into an existing folder, with the JSON files `extra`, by name."""
    parameters: dict[str, Tensor] = {}
    for i, (weight, bias) in enumerate(zip(lens.weights, lens.biases, strict=True)):
        parameters[f"{i}.weight"] = weight.cpu().clone()
        parameters[f"{i}.bias"] = bias.cpu().clone()
    packed = io.BytesIO()
    torch.save(parameters, packed)
    config = {
        "base_model_name_or_path": model.spec.name,
        "d_model": model.d_model,
        "num_hidden_layers": model.n_layers,
        "bias": True,
        "base_model_revision": model.spec.revision,
        "unembed_hash": _unembed_hash(model.unembedding.weight),  # type: ignore[arg-type]
        "lens_type": "linear_tuned_lens",
    }
    atomic_write(folder / "params.pt", [packed.getvalue()])
    for name, content in ({"config.json": config} | dict(extra)).items():
        atomic_write(folder / name, [(json.dumps(content, indent=1) + "\n").encode()])


def _unembed_hash(weight: Tensor) -> str:
    """The hash by which the package `tuned-lens` checks that a lens belongs to a model: SHA-256 of the matrix [V, D] as
    numpy prints it, abbreviated and with one decimal."""
    shown = np.array_str(weight.detach().float().cpu().numpy(), precision=1)
    return hashlib.sha256(shown.encode()).hexdigest()
