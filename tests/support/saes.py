"""Small random autoencoders for tests, and what it means that two are the same."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.model import MLSAE, SAEConfig

D, M, K = 16, 48, 5
STORE = {
    "content_hash": "abc123",
    "path": "acts.zarr",
    "d_model": D,
    "layers": [0, 1, 2],
    "model": "EleutherAI/pythia-70m-deduped",
    "lens": None,
    "validation": {"fraction": 0.05, "seed": 3, "n_documents": 40},
}


def make_sae(standardize: Any = "vector", d: int = D, m: int = M, k: int = K, seed: int = 0) -> MLSAE:
    """An autoencoder whose every weight is random, so that no mistake hides behind a zero or a tie."""
    sae = MLSAE(SAEConfig(d_model=d, n_latents=m, k=k, standardize=standardize))
    sae.initialize(seed, b_pre=0.3 * torch.randn(d, generator=torch.Generator().manual_seed(seed + 1)))
    with torch.no_grad():
        sae.W_enc.add_(0.3 * torch.randn(m, d, generator=torch.Generator().manual_seed(seed + 2)))
    return sae


def make_variant(activation: Any, **changes: Any) -> MLSAE:
    """An autoencoder of this kind, by default with an encoder bias, whose every tensor is random; about a tenth of its
    latents are active on vectors like itself."""
    prefixes = (6, 20, M) if activation == "matryoshka" else ()
    config = {"d_model": D, "n_latents": M, "k": K, "encoder_bias": True, "prefixes": prefixes, **changes}
    sae = MLSAE(SAEConfig(activation=activation, **config))
    generator = torch.Generator().manual_seed(5)
    sae.initialize(0, b_pre=0.3 * torch.randn(D, generator=generator))
    with torch.no_grad():
        b_enc = 0.3 * torch.randn(M, generator=generator)
        if config["encoder_bias"]:
            sae.b_enc.copy_(b_enc)
        for name, value in (("threshold", 1.2), ("log_threshold", 0.2 * torch.randn(M, generator=generator))):
            if hasattr(sae, name):
                getattr(sae, name).copy_(torch.as_tensor(value))
        if changes.get("layers"):
            sae.layer_mean.copy_(torch.randn(sae.layer_mean.shape, generator=generator))
            sae.layer_scale.copy_(1 + torch.rand(sae.layer_scale.shape, generator=generator))
    return sae


def vectors(n: int = 64, d: int = D) -> Tensor:
    """Raw vectors with a mean of their own, of standard deviations from 10 to 1000."""
    generator = torch.Generator().manual_seed(9)
    scale = torch.logspace(1, 3, n).unsqueeze(1)
    return scale * (torch.randn(n, d, generator=generator) + 0.5)


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Every vector the same to `tolerance` of its norm."""
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max().item() < tolerance


def assert_equal(a: MLSAE, b: MLSAE) -> None:
    """The same configuration, and the same weights bit for bit."""
    assert a.config == b.config
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def break_config(name: str, **changes: Any) -> Any:
    """A function that changes keys of the JSON file `name` of a folder."""

    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply
