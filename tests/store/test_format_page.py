"""docs/store-format.md says all that a reader needs: one that is written from the page alone reads every byte.

`PlainStore` uses numpy, json, a CRC of ten lines, and the packages of the two formats that the page names (XXH3, zstd):
nothing of ours, and no zarr.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard

from store.activations import ActivationStore
from store.codes import KeptCodes
from tests.support.stores import make_store, random_activations

ABSENT = 2**64 - 1


def crc32c(data: bytes) -> bytes:
    """The Castagnoli CRC, bit by bit through a table."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "little")


def without_crc(data: bytes) -> bytes:
    assert crc32c(data[:-4]) == data[-4:]
    return data[:-4]


class PlainStore:
    """A store as the page describes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attributes: dict[str, Any] = json.loads((path / "zarr.json").read_text())["attributes"]
        self.n_tokens, self.d_model = self.attributes["n_tokens"], self.attributes["d_model"]
        self.n_layers = len(self.attributes["layers"])
        self.chunk, self.shard = self.attributes["chunk_tokens"], self.attributes["shard_tokens"]
        self.stored_dtype = self.attributes["stored_dtype"]
        self.dtype = np.dtype({"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}[self.stored_dtype])
        header, *lines = (path / "manifest/0.jsonl").read_bytes().splitlines()
        self.header = self.checked(header)
        self.lines: dict[int, dict[str, Any]] = {found["shard"]: found for found in map(self.checked, lines)}

    @staticmethod
    def checked(line: bytes) -> dict[str, Any]:
        before, _ = line.split(b',"check":')
        found = json.loads(line)
        assert found["check"] == xxhash.xxh3_64_hexdigest(before)
        return found

    def column(self, name: str, dtype: str) -> np.ndarray:
        parts = [
            np.frombuffer(without_crc((self.path / name / f"c.{i}").read_bytes()), dtype)
            for i in range(-(-self.n_tokens // 4_194_304))
        ]
        return np.concatenate(parts)[: self.n_tokens]

    def numbers(self, name: str, *shape: int) -> np.ndarray:
        return np.frombuffer(without_crc((self.path / name).read_bytes()), "<f8").reshape(shape)

    def raw(self, shard: int) -> np.ndarray:
        data = (self.path / f"resid_post/c.{shard}.0.0").read_bytes()
        line = self.lines[shard]
        assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (line["bytes"], line["xxh3_128"])
        chunks = self.shard // self.chunk
        index_bytes = chunks * self.n_layers * 16
        index = np.frombuffer(without_crc(data[-index_bytes - 4 :]), "<u8").reshape(chunks, self.n_layers, 2)
        values = np.zeros((self.shard, self.n_layers, self.d_model), self.dtype)
        for chunk, layer in np.ndindex(chunks, self.n_layers):
            offset, length = index[chunk, layer].tolist()
            if (offset, length) != (ABSENT, ABSENT):
                part = without_crc(data[offset : offset + length])
                if self.attributes["codec"] == "zstd":
                    part = zstandard.ZstdDecompressor().decompress(part)
                rows = np.frombuffer(part, self.dtype).reshape(self.chunk, self.d_model)
                values[chunk * self.chunk : (chunk + 1) * self.chunk, layer] = rows
        return values[: line["tokens"]]

    def float32(self, raw: np.ndarray) -> np.ndarray:
        if self.stored_dtype == "bfloat16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)

    def merged(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n, mean, m2, norm = 0, np.zeros(0), np.zeros(0), np.zeros(self.n_layers)
        for shard, line in sorted(self.lines.items()):
            more, (mean_b, m2_b) = (
                line["kept"],
                self.numbers(f"shard_moments/c.{shard}.0.0.0", 2, self.n_layers, self.d_model),
            )
            norm = norm + np.array(line["norm_sums"])
            if more and n:
                delta, total = mean_b - mean, n + more
                mean, m2, n = mean + delta * (more / total), m2 + m2_b + delta**2 * (n * more / total), total
            elif more:
                mean, m2, n = mean_b, m2_b, more
        return mean, m2 / n, norm / n

    def content_hash(self) -> str:
        shards = "".join(f"{shard}:{line['xxh3_128']};" for shard, line in sorted(self.lines.items()))
        return xxhash.xxh3_128_hexdigest((self.attributes["config_hash"] + shards).encode("ascii"))


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("stored_dtype", ["bfloat16", "float16", "float32"])
def test_a_reader_from_the_page_alone_gives_the_same_numbers(tmp_path: Path, stored_dtype: str, codec: str) -> None:
    """Three of nine layers, four shards, of which the second keeps no token and the last is part full."""
    keep = np.arange(210) % 5 != 0
    keep[64:128] = False
    store = make_store(
        tmp_path / "a.zarr",
        random_activations(210, 3, 7),
        keep=keep,
        chunk_tokens=16,
        shard_tokens=64,
        layers=(1, 4, 5),
        n_model_layers=9,
        stored_dtype=stored_dtype,
        codec=codec,
    )
    plain = PlainStore(store.path)
    raw = np.concatenate([plain.raw(shard) for shard in range(4)])
    assert raw.tobytes() == store.read(raw=True).tobytes()
    assert np.array_equal(plain.float32(raw), store.read())
    for name, dtype in (("token_id", "<i4"), ("document", "<i4"), ("position", "<i4"), ("keep", "?")):
        assert np.array_equal(plain.column(name, dtype), getattr(store.tokens, name)), name
    vectors = plain.float32(raw).astype(np.float64)
    for shard in range(4):
        rows = slice(64 * shard, 64 * shard + plain.lines[shard]["tokens"])
        x = vectors[rows][keep[rows]]
        assert plain.lines[shard]["kept"] == len(x) == (0 if shard == 1 else keep[rows].sum())
        mean, m2 = plain.numbers(f"shard_moments/c.{shard}.0.0.0", 2, 3, 7)
        if len(x):
            np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(m2, ((x - x.mean(0)) ** 2).sum(0), rtol=1e-10)
            np.testing.assert_allclose(plain.lines[shard]["norm_sums"], np.linalg.norm(x, axis=2).sum(0), rtol=1e-12)
        else:
            assert not mean.any()
            assert not m2.any()
    mean, var, norm = plain.merged()
    assert np.array_equal(plain.numbers("layer_mean/c.0.0", 3, 7), mean)
    assert np.array_equal(plain.numbers("layer_var/c.0.0", 3, 7), var)
    assert np.array_equal(plain.numbers("layer_norm/c.0", 3), norm)
    assert plain.content_hash() == store.content_hash


def test_the_header_hashes_all_files_but_those_that_the_page_leaves_out(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.zarr", random_activations(40, 2, 5), chunk_tokens=16, shard_tokens=32)
    checksums = PlainStore(store.path).header["checksums"]
    for name, digest in checksums.items():
        assert xxhash.xxh3_128_hexdigest((store.path / name).read_bytes()) == digest, name
    files = {path.relative_to(store.path).as_posix() for path in store.path.rglob("*") if path.is_file()}
    shards = {f"{array}/c.{i}.0.0{end}" for array, end in (("resid_post", ""), ("shard_moments", ".0")) for i in (0, 1)}
    statistics = {"layer_mean/c.0.0", "layer_var/c.0.0", "layer_norm/c.0"}
    assert files - set(checksums) == shards | statistics | {"manifest/0.jsonl", "manifest/.lock"}


def test_kept_codes_are_as_the_page_says(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.zarr", random_activations(40, 2, 5), chunk_tokens=16, shard_tokens=32)
    origin = {"sae_hash": "é", "dtype": "float32", "product": "float32", "layers": [0, 1]}
    kept = KeptCodes.create(ActivationStore.open(store.path), origin, 3)
    values = np.random.default_rng(0).random((8, 2, 3)).astype(np.float32)
    assert kept.write(1, values, np.arange(48).reshape(8, 2, 3))
    attributes = json.loads((kept.folder / "zarr.json").read_text())["attributes"]
    members = ", ".join(f"{json.dumps(name)}: {json.dumps(attributes[name])}" for name in sorted(attributes))
    key = xxhash.xxh3_64_hexdigest(f"{{{members}}}".encode("ascii"))
    assert kept.folder == store.path / "latents" / key
    assert attributes["content_hash"] == PlainStore(store.path).content_hash()
    written, indices = (without_crc((kept.folder / name / "c.1.0.0").read_bytes()) for name in ("values", "indices"))
    read = np.frombuffer(written, "<f4").reshape(32, 2, 3)
    assert np.array_equal(read[:8], values)
    assert not read[8:].any()
    assert np.array_equal(np.frombuffer(indices, "<i4").reshape(32, 2, 3)[:8].ravel(), np.arange(48))
    digest = (kept.folder / "digest/c.1.0").read_bytes()
    assert digest == xxhash.xxh3_128_digest(f"{key}:1:".encode("ascii") + written + indices)
