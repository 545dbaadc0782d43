"""A store as `harvest` makes it, of a tiny random model on made-up text, with the model and lens that it came from, and
an autoencoder for it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from analysis.model.transformer import lens_of_store, load_of_store, spec_of_store
from harvest.lens.translators import TunedLens
from harvest.model.load import LoadedModel
from harvest.options_file import options_file
from harvest.run import harvest
from store.activations import ActivationStore
from tests.support.harvesting import harvest_config
from tests.support.models import D_MODEL, N_LAYERS, tiny_model
from tests.support.saes import make_sae
from tests.support.small import save_small
from train.model import MLSAE

CONTEXT, N_TOKENS = 24, 106
LENGTHS = (31, 17, 40, 26)
"""Characters of the documents, each a token."""


class Harvested(NamedTuple):
    """A store, and the model and lens that it came from."""

    store: ActivationStore
    model: LoadedModel
    lens: TunedLens | None
    model_folder: Path
    lens_folder: Path | None


def make_harvested(
    root: Path,
    architecture: str,
    *,
    with_lens: bool = False,
    lengths: tuple[int, ...] = LENGTHS,
    n_tokens: int = N_TOKENS,
    **options: Any,
) -> Harvested:
    """Harvest into `root`; `options` are of `HarvestConfig`. No file beside the store says where its model is."""
    texts = root / "texts"
    texts.mkdir(exist_ok=True)
    for i, length in enumerate(lengths):
        (texts / f"{i:03}.txt").write_text("".join(chr(97 + (i * 7 + j * j) % 26) for j in range(length)))
    folder = tiny_model(architecture, root / architecture)
    lens_folder = write_lens(root / f"{architecture}-lens", N_LAYERS[architecture]) if with_lens else None
    out = root / f"{architecture}-{with_lens}.zarr"
    given: dict[str, Any] = {
        "model": str(folder),
        "dataset": str(texts),
        "out": out,
        "max_tokens": n_tokens,
        "context_length": CONTEXT,
        "store_dtype": "float32",
        "lens": str(lens_folder) if lens_folder else None,
        "device": "cpu",
    }
    harvest(harvest_config(**{**given, **options}))
    options_file(out).unlink()
    store = ActivationStore.open(out)
    lens = lens_of_store(store, str(lens_folder)) if lens_folder else lens_of_store(store)
    model = load_of_store(store, spec_of_store(store, str(folder)), device="cpu")
    return Harvested(store, model, lens, folder, lens_folder)


def make_checkpoint(path: Path, store: ActivationStore, *, k: int = 8) -> MLSAE:
    """A random autoencoder that says it was trained on `store`, saved at `path`."""
    sae = make_sae(d=D_MODEL, m=96, k=k)
    save_small(path, sae, store, {})
    return sae


def write_lens(folder: Path, n_layers: int) -> Path:
    """A random lens, far from the identity, in the published format."""
    generator = torch.Generator().manual_seed(4)
    parameters = {}
    for i in range(n_layers):
        parameters[f"{i}.weight"] = torch.randn(D_MODEL, D_MODEL, generator=generator) / D_MODEL
        parameters[f"{i}.bias"] = torch.randn(D_MODEL, generator=generator)
    folder.mkdir(exist_ok=True)
    torch.save(parameters, folder / "params.pt")
    config = {"d_model": D_MODEL, "num_hidden_layers": n_layers, "bias": True, "base_model_name_or_path": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
