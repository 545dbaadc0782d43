"""Tokens drawn at random: those of a naive draw, whatever the grouping, all alike, each at its strongest layer."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from analysis.baselines.nulls import mixed
from analysis.latents.sampled import PER_LATENT, SampledTokens
from analysis.results.folder import EXAMPLES, RANDOM_EXAMPLES
from analysis.tiles import CodeTile
from tests.support.small import make_small, run_small

T, L, M, K = 200, 3, 5, 2


def planted(seed: int) -> NDArray[np.float32]:
    """[T, L, M], K positive in each row but for some that are 0; latent 4 is active at three tokens, latent 3 never."""
    rng = np.random.default_rng(seed)
    dense = rng.uniform(0.5, 2, (T, L, M)).astype(np.float32) * (rng.random((T, L, M)) < 0.5)
    dense[:, :, 3:] = 0
    dense[:, :, 0] *= dense[:, :, 1] * dense[:, :, 2] == 0
    dense[[7, 50, 120], 1] = [0, 0, 0, 0, 1]
    return dense.astype(np.float32)


def draw(dense: NDArray[np.float32], sizes: list[int]) -> SampledTokens:
    sample, start = SampledTokens.zeros(M), 0
    for size in sizes:
        token = np.arange(start, start + size)
        indices = np.argsort(-dense[token], axis=-1, kind="stable")[:, :, :K]
        sample.add(CodeTile(token, np.take_along_axis(dense[token], indices, axis=-1), indices))
        start += size
    return sample


@pytest.mark.parametrize("sizes", [[T], [1] * T, [64, 100, 36]])
def test_they_are_those_of_a_naive_draw(sizes: list[int]) -> None:
    dense, document = planted(0), np.arange(T) // 10
    found = draw(dense, sizes).found(document)
    keys, expected = mixed(np.arange(T, dtype=np.uint64)), []
    for latent in range(M):
        tokens = np.flatnonzero(dense[:, :, latent].any(axis=1))
        drawn = tokens[np.argsort(mixed(keys[tokens] ^ np.uint64(latent)))][:PER_LATENT]
        rows = sorted(((dense[t, :, latent].max(), -t) for t in drawn), reverse=True)
        expected += [(latent, dense[-t, :, latent].argmax(), rank, a, -t, -t // 10) for rank, (a, t) in enumerate(rows)]
    assert [tuple(row) for row in zip(*found, strict=True)] == expected
    assert np.bincount(found.latent, minlength=M).tolist() == [PER_LATENT] * 3 + [0, 3]


def test_every_token_is_drawn_with_equal_probability_and_for_each_latent_by_itself() -> None:
    # 200 latents, active at every token: which are drawn says nothing of the activation, of the place, or of another's.
    n, latents = 1000, 200
    rising = np.repeat(np.linspace(1, 2, n, dtype=np.float32)[:, None, None], latents, axis=2)
    sample = SampledTokens.zeros(latents)
    sample.add(CodeTile(np.arange(n), rising, np.tile(np.arange(latents), (n, 1, 1))))
    times = np.histogram(sample.token, np.arange(0, n + 1, n // 10))[0]
    expected = latents * PER_LATENT / 10
    assert ((times - expected) ** 2 / expected).sum() < 27.9  # chi-square of 9 degrees of freedom, 1 in 1000
    assert np.bincount(sample.token.ravel()).max() < 10  # of 1.6 on average


def test_the_file_has_windows_and_most_are_not_among_the_strongest(tmp_path: Path) -> None:
    small, out = make_small(tmp_path), tmp_path / "out"
    assert run_small(small, out)["examples"]["random"] == PER_LATENT
    drawn: Any = pd.read_parquet(out / RANDOM_EXAMPLES)
    strongest: Any = pd.read_parquet(out / EXAMPLES)
    n_tokens = pd.read_parquet(out / "latents.parquet")["n_tokens"].to_numpy()
    counts = drawn.groupby("latent").size().reindex(range(len(n_tokens)), fill_value=0)
    np.testing.assert_array_equal(counts, np.minimum(n_tokens, PER_LATENT))
    for _, row in drawn.iterrows():
        assert row["activations"][row["marked"]] == row["activation"]
    tops = strongest.groupby("latent")["activation"].max()
    assert (drawn["activation"] <= tops.loc[drawn["latent"]].to_numpy()).all()
    frequent = drawn[n_tokens[drawn["latent"]] > 100]
    known = set(zip(strongest["latent"], strongest["token"], strict=True))
    among = [pair in known for pair in zip(frequent["latent"], frequent["token"], strict=True)]
    assert len(among) > 100
    assert np.mean(among) < 0.3
