"""Our files in the real SAELens and sparsify, and theirs in ours: the same activations and reconstructions.

`make test-interop` installs both packages in an environment of their own and runs this folder; elsewhere it is skipped.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from residscope.errors import IncompatibleError
from train.formats.files import read_sae, write_sae
from train.model import MLSAE, SAEConfig

REASON = "not installed here: `make test-interop` makes an environment that has it"
sae_lens: Any = pytest.importorskip("sae_lens", reason=REASON)
sparsify: Any = pytest.importorskip("sparsify", reason=REASON)

D, M, K = 64, 512, 8
STORE = {"model": "EleutherAI/pythia-70m-deduped", "layers": [0, 1, 2], "content_hash": "abc", "lens": None}


def make_sae(standardize: Any) -> MLSAE:
    sae = MLSAE(SAEConfig(d_model=D, n_latents=M, k=K, standardize=standardize))
    sae.initialize(0, b_pre=0.3 * torch.randn(D, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn(M, D, generator=torch.Generator().manual_seed(2)))
    return sae


def vectors(scale: float = 10.0, n: int = 256) -> Tensor:
    """Raw vectors whose standard deviation is about `scale`, with a mean of their own."""
    return scale * (torch.randn(n, D, generator=torch.Generator().manual_seed(3)) + 0.5)


def randomize(module: nn.Module, *, b_enc: bool = False) -> None:
    """Random weights everywhere, but an encoder bias only when asked."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in module.named_parameters():
        if b_enc or name not in ("b_enc", "encoder.bias"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def dense(sae: MLSAE, x: Tensor) -> Tensor:
    values, indices = sae.encode(x)
    return torch.zeros(len(x), sae.config.n_latents).scatter_add(1, indices, values)  # a padding 0 may name any latent


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Every row the same to 1e-5 of its norm."""
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max().item() < 1e-5


@pytest.mark.parametrize("standardize", ["vector", "none"])
def test_ours_in_saelens(tmp_path: Path, standardize: str) -> None:
    sae, x = make_sae(standardize), vectors()
    write_sae(sae, tmp_path, "saelens", store=STORE)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        assert_same(theirs(x), sae(x).x_hat)
        assert_same(theirs.encode(x), dense(sae, x))
    assert theirs.cfg.metadata.model_name == STORE["model"]


def test_ours_in_saelens_by_hookpoint(tmp_path: Path) -> None:
    hook = "blocks.1.hook_resid_post"
    write_sae(make_sae("vector"), tmp_path, "saelens", store=STORE, hookpoints=[hook])
    theirs = sae_lens.SAE.load_from_disk(tmp_path / hook)
    assert theirs.cfg.metadata.hook_name == hook
    with torch.no_grad():
        assert_same(theirs(vectors()), make_sae("vector")(vectors()).x_hat)


def test_ours_in_sparsify_on_raw_vectors(tmp_path: Path) -> None:
    sae, x = make_sae("none"), vectors()
    write_sae(sae, tmp_path, "sparsify", store=STORE)
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path)
    with torch.no_grad():
        assert_same(theirs(x).sae_out, sae(x).x_hat)


def test_ours_in_sparsify_on_standardised_vectors(tmp_path: Path) -> None:
    sae, x = make_sae("vector"), vectors()
    write_sae(sae, tmp_path, "sparsify", store=STORE, hookpoints=["layers.0", "layers.1"])
    theirs = sparsify.SparseCoder.load_many(str(tmp_path), local=True)
    assert list(theirs) == ["layers.0", "layers.1"]
    x_std, mean, std = sae.standardize(x)
    with torch.no_grad():
        assert_same(theirs["layers.1"](x_std).sae_out * std + mean, sae(x).x_hat)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_saelens_in_ours(tmp_path: Path, normalize: str) -> None:
    config = sae_lens.TopKSAEConfig(d_in=D, d_sae=M, k=K, normalize_activations=normalize)
    theirs, x = sae_lens.TopKSAE(config), vectors()
    randomize(theirs)
    theirs.save_model(tmp_path)
    sae, _ = read_sae(tmp_path)
    with torch.no_grad():
        assert_same(sae(x).x_hat, theirs(x))
        assert_same(dense(sae, x), theirs.encode(x))


@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
def test_a_trained_saelens_in_ours(tmp_path: Path, save: str) -> None:
    theirs, x = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=M, k=K)), vectors()
    assert theirs.cfg.rescale_acts_by_decoder_norm
    randomize(theirs)
    getattr(theirs, save)(tmp_path)
    sae, _ = read_sae(tmp_path)
    with torch.no_grad():
        assert_same(sae(x).x_hat, theirs(x))


def test_sparsify_in_ours(tmp_path: Path) -> None:
    x = vectors()
    for layer in (0, 3):
        theirs = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=M, k=K))
        randomize(theirs)
        theirs.b_dec.data += layer
        theirs.save_to_disk(tmp_path / f"layers.{layer}")
        sae, origin = read_sae(tmp_path, subfolder=f"layers.{layer}")
        assert origin.store["layers"] == [layer]
        with torch.no_grad():
            assert_same(sae(x).x_hat, theirs(x).sae_out)


def test_their_encoder_biases_are_kept(tmp_path: Path) -> None:
    coder, x = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=M, k=K)), vectors(scale=1.0)
    randomize(coder, b_enc=True)
    coder.save_to_disk(tmp_path / "sparsify")
    top_k = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=D, d_sae=M, k=K))
    randomize(top_k, b_enc=True)
    top_k.save_model(tmp_path / "saelens")
    with torch.no_grad():
        assert_same(read_sae(tmp_path / "sparsify")[0](x).x_hat, coder(x).sae_out)
        assert_same(read_sae(tmp_path / "saelens")[0](x).x_hat, top_k(x))


@pytest.mark.parametrize("kind", ["StandardSAE", "JumpReLUSAE"])
@pytest.mark.parametrize("subtracted", [True, False])
def test_saelens_with_thresholds_in_ours(tmp_path: Path, kind: str, subtracted: bool) -> None:
    config = getattr(sae_lens, kind + "Config")(d_in=D, d_sae=M, apply_b_dec_to_input=subtracted)
    theirs, x = getattr(sae_lens, kind)(config), vectors(scale=1.0)
    randomize(theirs, b_enc=True)  # thresholds below 0 included
    theirs.save_model(tmp_path)
    sae, _ = read_sae(tmp_path)
    with torch.no_grad():
        assert_same(sae(x).x_hat, theirs(x))
        assert_same(dense(sae, x), theirs.encode(x))


def test_a_trained_batchtopk_of_saelens_in_ours(tmp_path: Path) -> None:
    """It saves itself for inference as a JumpReLU whose thresholds are all the same."""
    theirs = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=M, k=K))
    randomize(theirs, b_enc=True)
    theirs.topk_threshold.fill_(0.5)
    theirs.save_inference_model(tmp_path)
    loaded, x = sae_lens.SAE.load_from_disk(tmp_path), vectors(scale=1.0)
    with torch.no_grad():
        assert_same(read_sae(tmp_path)[0](x).x_hat, loaded(x))


@pytest.mark.parametrize("activation", ["batchtopk", "matryoshka", "jumprelu", "relu"])
def test_our_variants_in_saelens(tmp_path: Path, activation: Any) -> None:
    prefixes = (M // 4, M) if activation == "matryoshka" else ()
    sae = MLSAE(SAEConfig(d_model=D, n_latents=M, k=K, activation=activation, encoder_bias=True, prefixes=prefixes))
    generator = torch.Generator().manual_seed(1)
    sae.initialize(0, b_pre=0.3 * torch.randn(D, generator=generator))
    with torch.no_grad():
        sae.b_enc.copy_(0.3 * torch.randn(M, generator=generator))
        for name, value in (("threshold", torch.tensor(1.5)), ("log_threshold", 0.3 * torch.randn(M))):
            if hasattr(sae, name):
                getattr(sae, name).copy_(value)
    write_sae(sae, tmp_path, "saelens", store=STORE)
    theirs, x = sae_lens.SAE.load_from_disk(tmp_path), vectors()
    with torch.no_grad():
        assert_same(theirs(x), sae(x).x_hat)
        assert_same(theirs.encode(x), dense(sae, x))


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=D, d_sae=M)).save_model(tmp_path / "gated")
    with pytest.raises(IncompatibleError, match="architecture"):
        read_sae(tmp_path / "gated")
    config = sparsify.SparseCoderConfig(num_latents=M, k=K, transcode=True)
    sparsify.SparseCoder(D, config).save_to_disk(tmp_path / "transcoder")
    with pytest.raises(IncompatibleError, match="transcoder"):
        read_sae(tmp_path / "transcoder")
