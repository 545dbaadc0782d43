import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residscope.errors import IncompatibleError, UsageError
from store.meta import StoreMeta, chunk_and_shard_tokens, config_hash
from tests.support.stores import make_meta


@pytest.mark.parametrize(
    ("n_layers", "d_model", "expected"),
    [
        (30, 576, (256, 1792)),  # SmolLM2-135M: 256 * 576 * 2 = 295 kB; 7 * 256 tokens * 34,560 B = 61.9 MB
        (6, 512, (512, 10752)),  # pythia-70m: 512 * 512 * 2 = 512 KiB exactly
        (16, 2048, (128, 1024)),  # pythia-1b: 1,024 tokens * 65,536 B = 64 MiB exactly
        (32, 4096, (64, 512)),  # 64 MiB would be 256 tokens
        (80, 8192, (64, 512)),  # 671 MB, with 10 MB of moments
        (126, 16384, (32, 256)),  # 64 tokens would be 264 MB a chunk, and 512 tokens 2.1 GB a shard
    ],
)
def test_chunks_and_shards_of_known_models(n_layers: int, d_model: int, expected: tuple[int, int]) -> None:
    assert chunk_and_shard_tokens(10**6, n_layers, d_model, 2) == expected


@pytest.mark.parametrize(
    ("n_tokens", "expected"),
    [
        (8192 * 1024, 1024),  # 8,192 shards of 64 MiB: 550 GB
        (10**8, 12288),  # 96 chunks of 128 tokens: 8,139 shards
        (10**9, 16384),  # 1 GiB: 61,036 shards of 65.5 TB
    ],
)
def test_large_stores_have_larger_shards(n_tokens: int, expected: int) -> None:
    assert chunk_and_shard_tokens(n_tokens, 16, 2048, 2) == (128, expected)


@given(st.integers(1, 10**10), st.integers(1, 100), st.integers(1, 20000), st.sampled_from([2, 4]))
def test_chunks_and_shards_keep_the_rules(n_tokens: int, n_layers: int, d_model: int, itemsize: int) -> None:
    chunk, shard = chunk_and_shard_tokens(n_tokens, n_layers, d_model, itemsize)
    assert chunk & (chunk - 1) == 0
    assert chunk <= 512
    assert shard % chunk == 0
    assert shard <= -(-n_tokens // chunk) * chunk
    assert chunk * n_layers * d_model * itemsize <= 128 * 2**20 or chunk == 1
    assert shard * n_layers * d_model * itemsize <= 2**30


def test_attributes_round_trip_through_json() -> None:
    meta = make_meta(100, 3, 8, layers=(1, 4, 9), lens={"id": "x"}, provenance={"model": "m", "n": [1, 2.5, None]})
    assert StoreMeta.from_attributes(json.loads(json.dumps(meta.to_attributes()))) == meta


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"format_version": 2},
        {"n_tokens": 0},
        {"n_tokens": "100"},
        {"layers": 3},
        {"layers": [2, 1]},
        {"stored_dtype": "int8"},
        {"codec": "gzip"},
        {"chunk_tokens": 48},
        {"unknown": 1},
    ],
)
def test_other_attributes_are_refused(change: dict) -> None:
    attributes = make_meta(100, 3, 8, chunk_tokens=32).to_attributes()
    with pytest.raises(IncompatibleError):
        StoreMeta.from_attributes(attributes | change)
    del attributes["codec"]
    with pytest.raises(IncompatibleError, match="codec"):
        StoreMeta.from_attributes(attributes)


def test_layers_outside_the_model_are_refused() -> None:
    with pytest.raises(UsageError, match=r"0\.\.2"):
        make_meta(10, 2, 4, layers=(1, 3), n_model_layers=3)


def test_shard_bounds_end_at_the_last_token() -> None:
    meta = make_meta(100, 2, 4, chunk_tokens=16, shard_tokens=48)
    assert [meta.shard_bounds(i) for i in range(meta.n_shards)] == [(0, 48), (48, 96), (96, 100)]
    assert (meta.n_chunks, meta.chunks_per_shard, meta.bytes_per_token) == (7, 3, 16)
    with pytest.raises(IndexError):
        meta.shard_bounds(3)


def test_config_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert config_hash({"a": 1, "b": [2, {"c": None}]}) == config_hash({"b": [2, {"c": None}], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
