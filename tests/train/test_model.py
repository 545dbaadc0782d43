"""The autoencoder's forward pass."""

import pytest
import torch

from residscope.errors import IncompatibleError, UsageError
from train.model import MLSAE, SAEConfig, standardize
from train.parallel.ranks import Ranks


@pytest.fixture
def sae() -> MLSAE:
    sae = MLSAE(SAEConfig(d_model=5, n_latents=12, k=3))
    sae.initialize(0, b_pre=torch.arange(5.0) / 10)
    return sae


def test_standardise_by_hand() -> None:
    """(1, 2, 6): mean 3, unbiased variance (4 + 1 + 9) / 2 = 7."""
    x, mean, std = standardize(torch.tensor([[1.0, 2.0, 6.0]]))
    assert mean.item() == 3
    assert std.item() == pytest.approx(7**0.5 + 1e-5)
    assert x[0].tolist() == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_is_the_unbiased_standard_deviation(dtype: torch.dtype) -> None:
    x = 1e4 + 3 * torch.randn(50, 100, dtype=dtype)
    torch.testing.assert_close(standardize(x).std, x.std(dim=1, keepdim=True) + 1e-5)
    torch.testing.assert_close(standardize(x).mean, x.mean(dim=1, keepdim=True))


@pytest.mark.parametrize(("m", "d"), [(8192, 5), (12_292, 3), (20_000, 7)])
def test_parts_of_a_dictionary_are_made_as_the_whole_is(m: int, d: int) -> None:
    """Rows are drawn some thousand at a time: as one call of torch draws them, wherever a part begins."""
    config = SAEConfig(d_model=d, n_latents=m, k=3)
    rows = torch.randn(m, d, generator=torch.Generator().manual_seed(7))
    rows /= rows.norm(dim=1, keepdim=True)
    parts = [MLSAE.share(config, Ranks(rank, 4)) for rank in range(4)]
    for part in parts:
        part.initialize(7, encoder_scale=0.5)
    assert torch.equal(torch.cat([part.W_dec for part in parts]), rows)
    assert torch.equal(torch.cat([part.W_enc for part in parts]), rows * 0.5)


def test_says_what_it_is() -> None:
    found = repr(MLSAE(SAEConfig(n_latents=8, d_model=4, k=2)))
    assert found == "MLSAE(n_latents=8, d_model=4, k=2, activation='topk')"


def test_forward_equals_the_formulas(sae: MLSAE) -> None:
    x = 3 + 2 * torch.randn(20, 5)
    x_std, mean, std = standardize(x)
    z = (x_std - sae.b_pre) @ sae.W_enc.T
    h = torch.zeros_like(z).scatter(1, *reversed(torch.topk(z, 3))).relu()
    out = sae(x)
    torch.testing.assert_close(out.x_hat, (h @ sae.W_dec + sae.b_pre) * std + mean)
    assert (out.codes.values >= 0).all()
    torch.testing.assert_close(torch.zeros_like(z).scatter(1, out.codes.indices, out.codes.values), h)


def test_a_scaled_and_shifted_vector_has_the_same_code(sae: MLSAE) -> None:
    """Standardisation: what lets one dictionary serve layers of very different norms."""
    x = torch.randn(6, 5)
    torch.testing.assert_close(sae.encode(x).values, sae.encode(1000 * x + 7).values, rtol=1e-3, atol=1e-3)


def test_without_standardisation_vectors_stay_as_they_are() -> None:
    sae = MLSAE(SAEConfig(d_model=3, n_latents=4, k=4, standardize="none"))
    x, mean, std = sae.standardize(torch.tensor([[1.0, 2.0, 6.0]]))
    assert (x.tolist(), mean.tolist(), std.tolist()) == ([[1.0, 2.0, 6.0]], [[0.0]], [[1.0]])


def test_initial_weights_are_tied_unit_rows_and_seeded(sae: MLSAE) -> None:
    assert torch.equal(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(12))
    other = MLSAE(sae.config)
    other.initialize(0)
    assert torch.equal(other.W_dec, sae.W_dec)
    other.initialize(1)
    assert not torch.equal(other.W_dec, sae.W_dec)


def test_a_half_precision_product_gives_nearly_the_same_codes(sae: MLSAE) -> None:
    x = torch.randn(50, 5)
    close, codes = sae(x, product_dtype=torch.bfloat16).codes, sae.encode(x)
    assert close.values.dtype == torch.float32
    assert not torch.equal(close.values, codes.values)
    torch.testing.assert_close(close.values.sum(), codes.values.sum(), rtol=1e-2, atol=0)


def test_a_vector_of_another_width_is_refused(sae: MLSAE) -> None:
    with pytest.raises(IncompatibleError, match="d_model 5, the vectors have 4"):
        sae.encode(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 13}, "k is 13, but there are only 12 latents"),
        ({"k": 0}, "k should be at least 1"),
        ({"d_model": 0}, "d_model should be at least 1"),
    ],
)
def test_impossible_configurations_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SAEConfig(**{"d_model": 5, "n_latents": 12, "k": 3, **values})  # type: ignore[arg-type]
