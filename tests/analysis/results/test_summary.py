"""What summary.json says of an autoencoder's training, and what codes may take of the disk."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from analysis.results.summary import trained_tokens
from analysis.tiles import codes_folder
from residscope.options import with_values
from tests.support.small import analyze_config
from tests.support.stores import make_store, random_activations
from tests.support.training import train_config
from train.checkpoint import load_checkpoint
from train.run import train_all


def test_trained_tokens_count_a_token_once_however_many_layers_the_stream_has(tmp_path: Path) -> None:
    """Of each of a --per-layer set as of the one of all layers: the kept training tokens, twice in two epochs."""
    store = make_store(tmp_path / "acts.zarr", random_activations(n_tokens=400))  # 3 layers
    config = train_config(store=store.path, out=tmp_path / "ckpt.pt", n_latents=40, k=4, batch_size=64, epochs=2)
    config = with_values(config, validation_fraction=0.0, threads=1, kernels="torch")
    results = [*train_all(config), *train_all(with_values(config, per_layer="each"))]
    assert len(results) == 4
    kept = int(np.count_nonzero(store.tokens.keep))
    for result in results:
        checkpoint = load_checkpoint(result.checkpoint)
        assert trained_tokens(checkpoint) == 2 * kept
        del checkpoint.trainer["vectors"]  # as in checkpoints from before it was there
        assert trained_tokens(checkpoint) == 2 * kept


@pytest.mark.parametrize(("dtype", "bytes_per_code"), [("float32", 8), ("float64", 12)])
def test_codes_take_a_quarter_of_the_free_disk_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, bytes_per_code: int
) -> None:
    config = analyze_config(store=tmp_path, sae=tmp_path, dtype=dtype)  # type: ignore[arg-type]
    needed = 4 * 10 * 3 * 5 * bytes_per_code
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        folder = codes_folder(tmp_path, config, 10, 3, 5)
        assert (folder is not None) == fits
        if folder:
            shutil.rmtree(folder)
