"""Codes kept in the store: later analyses give the same numbers without encoding, and nothing wrong is ever taken."""

from typing import Any

import numpy as np
import pytest
import torch
import zarr

from analysis import encoder as latents
from analysis.encoder import PLACES_UNKNOWN, Encoder, kept_places
from analysis.run import analyze
from residscope.errors import UsageError
from store.activations import ActivationStore
from store.care.verify import verify
from store.codes import KeptCodes
from tests.support.small import LAYERS, analyze_config, make_small
from train.model import MLSAE
from train.model_config import SAEConfig


def run(small, out, **options):
    config = {"report": False, "dtype": "float64", **options}
    summary = analyze(analyze_config(store=small.store, sae=small.sae, out=out, **config))
    return {name: summary[name] for name in ("variance", "persistence", "nulls", "layers", "validation", "baseline")}


@pytest.fixture
def no_encoding(monkeypatch):
    def refuse(*_):
        raise AssertionError("encoded")

    return lambda: monkeypatch.setattr(latents.Encoder, "encode", refuse)


def chunks(small):
    return sorted(path for path in (small.store / "latents").rglob("c.*"))


def chunk(small, array, shard):
    return next(path for path in chunks(small) if path.parent.name == array and path.name.split(".")[1] == str(shard))


def swap(a, b):
    of_a, of_b = a.read_bytes(), b.read_bytes()
    a.write_bytes(of_b)
    b.write_bytes(of_a)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_later_analyses_of_any_split_give_the_same_numbers_and_encode_nothing(tmp_path, dtype, no_encoding):
    small = make_small(tmp_path)
    plain = run(small, tmp_path / "a", dtype=dtype)
    content_hash = ActivationStore.open(small.store).content_hash
    saved = run(small, tmp_path / "b", dtype=dtype, save_latents=True)
    assert saved == plain
    validation = run(small, tmp_path / "c", dtype=dtype, split="validation")
    no_encoding()
    assert run(small, tmp_path / "d", dtype=dtype) == plain
    assert run(small, tmp_path / "e", dtype=dtype, split="validation") == validation
    assert ActivationStore.open(small.store).content_hash == content_hash
    assert verify(small.store) == []


def test_zarr_reads_them_and_they_are_the_codes(tmp_path):
    small = make_small(tmp_path)
    run(small, tmp_path / "a", save_latents=True)
    latents: Any = zarr.open_group(small.store, mode="r")["latents"]
    group = next(latents.groups())[1]
    encoder = Encoder(small.weights, "float64")
    x = torch.from_numpy(small.x[small.keep]).view(-1, small.x.shape[-1])
    expected = encoder.encode(encoder.standardize(x))
    shape = (-1, len(LAYERS), 3)
    np.testing.assert_allclose(group["values"][:][small.keep], expected.values.view(shape), rtol=1e-12)
    np.testing.assert_array_equal(group["indices"][:][small.keep], expected.indices.view(shape))
    assert not group["values"][:][~small.keep].any()
    assert group.attrs["layers"] == list(LAYERS)
    assert group.attrs["content_hash"] == ActivationStore.open(small.store).content_hash


def test_what_is_missing_or_damaged_is_encoded_anew(tmp_path):
    small = make_small(tmp_path)
    plain = run(small, tmp_path / "a", save_latents=True)
    before = {path: path.read_bytes() for path in chunks(small)}
    for i, array in enumerate(("values", "indices")):  # each fault at a shard of its own
        lost, flipped, cut = (chunk(small, array, 3 * i + n) for n in range(3))
        lost.unlink()
        flipped.write_bytes(before[flipped][:-10] + b"x" + before[flipped][-9:])
        cut.write_bytes(before[cut][:50])
    chunk(small, "digest", 6).unlink()
    assert run(small, tmp_path / "b") == plain
    assert run(small, tmp_path / "c", save_latents=True) == plain
    assert {path: path.read_bytes() for path in chunks(small)} == before


def test_sound_files_of_another_key_or_shard_are_not_taken(tmp_path):
    small = make_small(tmp_path)
    plain = run(small, tmp_path / "a", save_latents=True)
    before = {path: path.read_bytes() for path in chunks(small)}
    for array in ("values", "indices", "digest"):  # shards 0 and 1 swapped as wholes
        swap(chunk(small, array, 0), chunk(small, array, 1))
    swap(chunk(small, "values", 2), chunk(small, "values", 3))  # of one array alone
    assert run(small, tmp_path / "b") == plain
    assert run(small, tmp_path / "c", save_latents=True) == plain
    assert {path: path.read_bytes() for path in chunks(small)} == before
    store, origin = ActivationStore.open(small.store), {"layers": list(LAYERS), "dtype": "float64"}
    one = KeptCodes.create(store, {**origin, "sae_hash": "a"}, 3)
    two = KeptCodes.create(store, {**origin, "sae_hash": "b"}, 3)
    for kept, value in ((one, 1.0), (two, 2.0)):
        kept.write(0, np.full((48, 4, 3), value), np.zeros((48, 4, 3), np.int64))
    for array in ("values/c.0.0.0", "indices/c.0.0.0", "digest/c.0.0"):
        swap(one.folder / array, two.folder / array)
    assert one.read(0) is two.read(0) is None


def test_those_of_another_autoencoder_type_or_store_are_not_taken(tmp_path, no_encoding):
    small = make_small(tmp_path / "a")
    run(small, tmp_path / "out", save_latents=True, device="cpu")
    store = ActivationStore.open(small.store)
    encoder = Encoder(small.weights, "float64")
    origin = {**encoder.origin, "layers": list(LAYERS)}
    assert KeptCodes.open(store, origin, 3) is not None
    other = MLSAE(small.weights.config)
    other.initialize(2)
    assert KeptCodes.open(store, {**origin, **Encoder(other, "float64").origin}, 3) is None
    assert KeptCodes.open(store, {**origin, "layers": [2, 3]}, 3) is None
    assert KeptCodes.open(store, {**Encoder(small.weights, "float32").origin, "layers": list(LAYERS)}, 3) is None
    # A folder that was copied from another store: its name fits nothing here, and if it did, its attributes do not.
    elsewhere = make_small(tmp_path / "b", n_tokens=310)
    kept = KeptCodes.create(ActivationStore.open(elsewhere.store), origin, 3).folder
    (kept / "zarr.json").write_bytes((next((small.store / "latents").glob("*/zarr.json"))).read_bytes())
    assert KeptCodes.open(ActivationStore.open(elsewhere.store), origin, 3) is None
    run(elsewhere, tmp_path / "out", save_latents=True)
    no_encoding()
    run(elsewhere, tmp_path / "out")


def test_places_follow_the_number_of_active_latents_that_a_vector_may_have():
    def places(k, **options):
        return kept_places(SAEConfig(d_model=8, n_latents=1000, k=k, **options))

    assert places(32) == 32
    assert places(32, activation="batchtopk") == 128
    assert places(400, activation="jumprelu") == 1000
    assert places(0, activation="relu") == PLACES_UNKNOWN > 0


def test_codes_of_any_width_come_back_and_too_many_are_not_kept(tmp_path):
    store = ActivationStore.open(make_small(tmp_path).store)
    kept = KeptCodes.create(store, {"layers": list(LAYERS), "dtype": "float32"}, 3)
    rng = np.random.default_rng(0)
    values = rng.gamma(1.0, size=(48, 4, 6)).astype(np.float32) * (np.arange(6) % 2)  # three of six are padding
    indices = rng.permuted(np.broadcast_to(np.arange(24), (48, 4, 24)), axis=-1)[..., :6]
    assert kept.write(0, values, indices)
    assert kept.write(1, values[..., 1:2], indices[..., 1:2])
    found = kept.read(0)
    assert found is not None
    np.testing.assert_array_equal(found[0], values[..., 1::2])
    np.testing.assert_array_equal(found[1], indices[..., 1::2])
    narrow = kept.read(1)
    assert narrow is not None
    np.testing.assert_array_equal(narrow[0], np.pad(values[..., 1:2], ((0, 0), (0, 0), (0, 2))))
    values[7, 2, 0] = 1.0
    assert not kept.write(2, values, indices)
    assert kept.read(2) is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"attributes": []}'])
def test_codes_whose_metadata_are_damaged_are_made_anew(tmp_path, content):
    small = make_small(tmp_path)
    plain = run(small, tmp_path / "a", save_latents=True)
    before = {path: path.read_bytes() for path in chunks(small)}
    (chunks(small)[0].parents[1] / "zarr.json").write_text(content)
    assert run(small, tmp_path / "b", save_latents=True) == plain
    assert {path: path.read_bytes() for path in chunks(small)} == before


def test_where_vectors_are_encoded_is_recorded_and_must_exist(tmp_path):
    small = make_small(tmp_path)
    config = {"report": False, "device": "cpu"}
    summary = analyze(analyze_config(store=small.store, sae=small.sae, out=tmp_path / "a", **config))
    assert summary["provenance"]["analysis"]["device"] == "cpu"
    with pytest.raises(UsageError, match="--device cuda:99: this machine has"):
        run(small, tmp_path / "b", device="cuda:99")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or hidden: see tests/conftest.py")
def test_a_card_gives_the_codes_of_the_cpu(tmp_path):
    small = make_small(tmp_path)
    x = torch.from_numpy(ActivationStore.open(small.store).read(slice(0, 40))).flatten(0, 1)
    here, there = (Encoder(small.weights, "float64", device) for device in ("cpu", "cuda"))
    vectors = here.standardize(x)
    for ours, its in zip(
        (*vectors, here.decode(here.encode(vectors), vectors)),
        (*there.standardize(x), there.decode(there.encode(vectors), vectors)),
        strict=True,
    ):
        torch.testing.assert_close(its, ours)
