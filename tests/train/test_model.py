"""The autoencoder's forward pass, and its checkpoint file."""

import errno
import os
import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from residscope.errors import IncompatibleError, UsageError
from train.checkpoint import load_checkpoint, save_checkpoint
from train.kernels.encode import encode_tiled
from train.model import MLSAE, SAEConfig, standardize


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


@pytest.mark.parametrize("tile_bytes", [1, 12 * 4 * 3, 10**9])
def test_tiles_change_nothing(sae: MLSAE, tile_bytes: int) -> None:
    x = torch.randn(10, 5)
    whole = encode_tiled(x, sae.W_enc, 3)
    tiled = encode_tiled(x, sae.W_enc, 3, tile_bytes=tile_bytes)
    torch.testing.assert_close(tiled.values, whole.values)
    assert torch.equal(tiled.indices, whole.indices)


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
    close = sae.encode(x, product_dtype=torch.bfloat16)
    assert close.values.dtype == torch.float32
    torch.testing.assert_close(close.values.sum(), sae.encode(x).values.sum(), rtol=1e-2, atol=0)


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


def test_a_checkpoint_gives_back_what_went_in(sae: MLSAE, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, sae, store={"content_hash": "abc"}, trainer={"step": 3, "silent": torch.arange(12)})
    found = load_checkpoint(path)
    assert found.config == sae.config
    assert found.store == {"content_hash": "abc"}
    assert found.trainer["step"] == 3
    assert torch.equal(found.trainer["silent"], torch.arange(12))
    x = torch.randn(4, 5)
    assert torch.equal(found.sae(x).x_hat, sae(x).x_hat)
    assert os.listdir(tmp_path) == ["ckpt.pt"]  # noqa: PTH208 (no temporary file stays)


def test_a_checkpoint_has_the_documented_layout(sae: MLSAE, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, sae, store={}, trainer={})
    content = torch.load(path, weights_only=True)
    assert set(content) == {"format", "config", "state_dict", "store", "trainer"}
    assert content["format"] == 1
    assert {k: tuple(v.shape) for k, v in content["state_dict"].items()} == {
        "W_enc": (12, 5),
        "W_dec": (12, 5),
        "b_pre": (5,),
    }


def test_a_failed_write_leaves_the_old_checkpoint(sae: MLSAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, sae, store={"turn": 1}, trainer={})

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, sae, store={"turn": 2}, trainer={})
    assert load_checkpoint(path).store == {"turn": 1}
    assert list(tmp_path.iterdir()) == [path]  # what was half written does not stay on a full disk


def test_a_full_disk_is_told_as_such_and_nothing_of_the_attempt_is_left(sae: MLSAE, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, sae, store={"turn": 1}, trainer={})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # torch hides what the system says of such a write
    try:
        with pytest.raises(OSError, match=r"File too large.*ckpt\.pt") as caught:
            save_checkpoint(path, sae, store={"turn": 2}, trainer={"large": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]
    assert path.read_bytes() == before


class Bomb:
    """Runs a command when a careless loader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(writer: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "ran"
    content = {"format": 1, "config": Bomb(mark), "state_dict": {}}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(IncompatibleError, match="refused") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_no_checkpoint() -> None:
    with pytest.raises(UsageError, match="no such checkpoint"):
        load_checkpoint(Path("nowhere.pt"))


def test_files_that_are_no_whole_checkpoint_are_refused_in_one_line(sae: MLSAE, tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    save_checkpoint(whole, sae, store={}, trainer={})
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole.read_bytes()[:1000])
    empty = tmp_path / "empty.pt"
    empty.touch()
    text = tmp_path / "text.pt"
    text.write_text("hello")
    archive = tmp_path / "archive.pt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "b")
    foreign = tmp_path / "foreign.pt"
    torch.save({"weight": torch.zeros(3)}, foreign)
    for path in (cut, empty, text, archive, foreign):
        with pytest.raises(IncompatibleError) as caught:
            load_checkpoint(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_the_config_are_named(sae: MLSAE, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, sae, store={}, trainer={})
    content = torch.load(path, weights_only=True)
    content["state_dict"]["W_dec"] = torch.zeros(2, 5)
    torch.save(content, path)
    with pytest.raises(IncompatibleError, match=r"W_dec should be \[12, 5\].*found \[2, 5\]"):
        load_checkpoint(path)
    torch.save({**content, "format": 9}, path)
    with pytest.raises(IncompatibleError, match="checkpoint format 9"):
        load_checkpoint(path)
    torch.save({**content, "config": {"width": 5}}, path)
    with pytest.raises(IncompatibleError, match="config should have"):
        load_checkpoint(path)
