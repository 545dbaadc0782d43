"""An intact file in another shard's place: found by a small part of its bytes, once, and never where all is well."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store.activations import ActivationStore
from store.care.places import require_in_place
from store.checksums import DamagedError
from store.loader import WindowLoader
from store.shards import shard_name
from tests.support.stores import make_store, random_activations
from tests.support.training import train_config
from train.compare.cli import main as compare
from train.run import train

WAYS = [
    *({"stored_dtype": dtype, "codec": "none"} for dtype in ("bfloat16", "float16", "float32")),
    {"stored_dtype": "bfloat16", "codec": "zstd"},
]


def make(path: Path, n_layers: int, seed: int = 0, **changes: Any) -> ActivationStore:
    """5 shards of 64 tokens, the last of them short; of the second none is kept."""
    keep = np.arange(300) % 16 != 0
    keep[64:128] = False
    values = random_activations(300, n_layers, 12, seed=seed)
    return make_store(path, values, keep=keep, chunk_tokens=32, shard_tokens=64, **changes)


def swap(store: ActivationStore, one: int, other: int) -> None:
    first, second = (store.path / shard_name(shard) for shard in (one, other))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def check(path: Path, layer: int = 0) -> None:
    store = ActivationStore.open(path)
    require_in_place(store, np.arange(store.meta.n_chunks), np.full(store.meta.n_chunks, layer))


@pytest.mark.parametrize("changes", WAYS)
@pytest.mark.parametrize("n_layers", [1, 4, 5, 7])
def test_what_is_in_its_place_is_never_refused(tmp_path: Path, n_layers: int, changes: dict[str, Any]) -> None:
    store = make(tmp_path / "a.zarr", n_layers, **changes)
    for layer in range(n_layers):
        check(store.path, layer)


@pytest.mark.parametrize("n_layers", [1, 4, 5, 7])
def test_swapped_shards_are_found_at_every_layer(tmp_path: Path, n_layers: int) -> None:
    store = make(tmp_path / "a.zarr", n_layers)
    swap(store, 2, 3)
    for layer in range(n_layers):
        with pytest.raises(DamagedError, match=r"c\.[23]\.0\.0: .* a valid file of another shard or store"):
            check(store.path, layer)
    swap(store, 2, 3)
    check(store.path)


@pytest.mark.parametrize("n_layers", [3, 6])
def test_a_shard_of_another_store_is_found(tmp_path: Path, n_layers: int) -> None:
    store, other = make(tmp_path / "a.zarr", n_layers), make(tmp_path / "b.zarr", n_layers, seed=1)
    (store.path / shard_name(3)).write_bytes((other.path / shard_name(3)).read_bytes())
    with pytest.raises(DamagedError, match=r"c\.3\.0\.0: .*a valid file of another"):
        check(store.path)


def test_a_shard_is_looked_at_once_and_by_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path / "a.zarr", 6)
    read = ActivationStore.read
    seen: list[tuple[int, int]] = []

    def counting(self: ActivationStore, tokens: slice, layers: list[int], *, raw: bool = False) -> np.ndarray:
        seen.extend((tokens.start // 64, layer) for layer in layers)
        return read(self, tokens, layers, raw=raw)

    monkeypatch.setattr(ActivationStore, "read", counting)
    loader = WindowLoader(store, store.tokens.keep, 50, 0, 4096, epochs=2)
    rows = sum(len(batch.rows) for batch in loader)
    assert rows == 2 * 6 * int(store.tokens.keep.sum())
    assert sorted(set(seen)) == sorted({shard: (shard, layer) for shard, layer in seen}.values())
    assert {shard for shard, _ in seen} == {0, 2, 3, 4}, "of shard 1 nothing is kept, and nothing is read"
    assert len(seen) == 2 + 2 + 2 + 2, "its two chunks of 32 tokens, once"


@pytest.mark.parametrize("n_layers", [3, 6])
def test_train_and_compare_find_swapped_shards(
    tmp_path: Path, n_layers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make(tmp_path / "a.zarr", n_layers)
    config = train_config(store=store.path, out=tmp_path / "ckpt.pt", n_latents=40, k=4, batch_size=64, kernels="torch")
    train(config)
    swap(store, 2, 3)
    with pytest.raises(DamagedError, match="a valid file of another shard or store"):
        train(train_config(store=store.path, out=tmp_path / "b.pt", n_latents=40, k=4, batch_size=64, kernels="torch"))
    assert not (tmp_path / "b.pt").exists()
    words = ["--store", str(store.path), "--sae", str(config.out), "--out", str(tmp_path / "compared")]
    assert compare(words) == 3
    assert "a valid file of another shard or store" in capsys.readouterr().err
