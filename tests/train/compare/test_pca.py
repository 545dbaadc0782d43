"""The linear baseline against an exact decomposition, and as an autoencoder."""

import numpy as np
import pytest
import torch

from train.compare.pca import PCASums


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) + 1


@pytest.fixture
def sums(x: torch.Tensor) -> PCASums:
    parts = [PCASums.zeros(12), PCASums.zeros(12)]
    parts[0].add(x[:50])
    parts[0].add(x[50:90])
    parts[1].add(x[90:], torch.float32)
    return PCASums.merged(parts)


def test_directions_are_those_of_the_singular_values(x: torch.Tensor, sums: PCASums) -> None:
    mean, directions = sums.fit(3)
    _, _, expected = np.linalg.svd((x - x.mean(0)).double().numpy(), full_matrices=False)
    assert sums.n == 200
    torch.testing.assert_close(mean, x.double().mean(0))
    np.testing.assert_allclose(np.abs((directions.numpy() * expected[:3]).sum(1)), 1, rtol=1e-5)


def test_as_an_autoencoder_it_has_k_active_latents(x: torch.Tensor, sums: PCASums) -> None:
    for k in (1, 5, 12, 40):
        sae = sums.fit(k).autoencoder()
        codes = sae.encode_standardized(x)
        assert (codes.values > 0).sum(dim=1).tolist() == [min(k, 12)] * 200
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(len(sae.W_dec)))
    whole = sums.fit(12).autoencoder()
    zero, one = torch.zeros(200, 1), torch.ones(200, 1)
    torch.testing.assert_close(whole.decode(whole.encode_standardized(x), zero, one), x, rtol=1e-5, atol=1e-5)
