"""Every kind of file that is loaded and computed with, as small as can be, and what is computed from it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harvest.lens.translators import load_lens
from tests.support.lenses import write_lens
from tests.support.saes import STORE, make_sae, vectors
from train.formats.files import LAYOUTS, read_sae, write_sae

_X = vectors(8, 3)


class Loaded(NamedTuple):
    """What a file gave."""

    numbers: list[Any]
    """All that is computed from it: tensors, numbers, records that decide."""
    said: tuple[str, ...] = ()
    """Notes for the user."""


class Place(NamedTuple):
    """One file, and how it is used."""

    name: str
    file: Path
    load: Callable[[], Loaded]


def places(folder: Path) -> Iterator[Place]:
    """ckpt.pt, ckpt.safetensors, the folders of other formats as we write them and as others do, and a lens."""
    for to in ("residscope", *LAYOUTS):
        write_sae(make_sae("vector", 3, 5, 2), folder / to, to, store=STORE)  # type: ignore[arg-type]
        for file in sorted((folder / to).iterdir()):
            yield Place(f"{to}/{file.name}", file, lambda s=file if to == "residscope" else folder / to: autoencoder(s))
    for to, layout in LAYOUTS.items():
        theirs = folder / "theirs" / to
        write_sae(make_sae("vector", 3, 5, 2), theirs, to)
        file = theirs / layout.config_file
        config = json.loads(file.read_text())
        (config if "residscope" in config else config["metadata"]).pop("residscope")
        file.write_text(json.dumps(config))
        yield Place(f"{to} without our record/{file.name}", file, lambda theirs=theirs: autoencoder(theirs))
    lens = write_lens(folder / "lens", n_layers=2, d_model=3)
    for file in sorted(lens.iterdir()):
        yield Place(f"lens/{file.name}", file, lambda: lens_numbers(lens))


def autoencoder(source: Path) -> Loaded:
    sae, origin = read_sae(source)
    with torch.no_grad():
        out = sae(_X)
    return Loaded([out.codes.values, out.codes.indices, out.x_hat, sae.config], origin.notes)


def lens_numbers(folder: Path) -> Loaded:
    lens = load_lens(str(folder), model_id="owner/tiny", n_layers=2, d_model=3)
    return Loaded([lens.apply(_X, 0), lens.apply(_X, 1), lens.invert(_X, 0)])


def same(a: Loaded, b: Loaded) -> bool:
    pairs = zip(a.numbers, b.numbers, strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def harmless(value: int) -> bool:
    """Whether a changed byte is a digit: of a number that another could stand for, where there is no check sum."""
    return chr(value).isdigit()
