"""The comparison against a naive one by hand, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from residscope.options import with_values
from store.activations import ActivationStore
from store.shuffle import validation_documents
from tests.support.stores import make_store, random_activations
from tests.support.training import train_config
from train.checkpoint import load_checkpoint
from train.cli import main
from train.compare.config import TrainCompareConfig
from train.compare.measure import compare
from train.compare.report import as_json, words
from train.run import train, train_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with layers 1, 4 and 6 of a model, one autoencoder for all layers, and one for each."""
    root = tmp_path_factory.mktemp("compare")
    make_store(root / "acts.zarr", random_activations(n_tokens=400), chunk_tokens=32, layers=(1, 4, 6))
    config = train_config(
        store=root / "acts.zarr",
        out=root / "all.pt",
        n_latents=30,
        k=3,
        batch_size=64,
        window_gb=1e-5,
        validation_fraction=0.2,
        threads=1,
        kernels="torch",
        lr=3e-3,
    )
    train(config)
    train_all(with_values(config, per_layer="total", out=root / "layers"))
    train(with_values(config, validation_seed=1, out=root / "other-split.pt"))
    return root


def held_out(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """float32 [t, L, D] of held-out tokens, and of the others that are kept."""
    store = ActivationStore.open(root / "acts.zarr")
    out = validation_documents(25, 0.2, 0)[store.tokens.document]
    x = store.read(slice(0, 400))
    return x[out & store.tokens.keep], x[~out & store.tokens.keep]


def naive_fvu(x: np.ndarray, x_hat: np.ndarray) -> float:
    return ((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()


def naive_pca(fit: np.ndarray, x: np.ndarray, k: int) -> np.ndarray:
    """Vectors [N, D] standardised one by one, projected on k components of `fit`, and mapped back."""

    def scale(v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean, std = v.mean(axis=1, keepdims=True), v.std(axis=1, ddof=1, keepdims=True) + 1e-5
        return (v - mean) / std, mean, std

    inputs = scale(fit)[0]
    _, _, directions = np.linalg.svd(inputs - inputs.mean(axis=0), full_matrices=False)
    y, mean, std = scale(x)
    centred = y - inputs.mean(axis=0)
    return (centred @ directions[:k].T @ directions[:k] + inputs.mean(axis=0)) * std + mean


def test_every_number_is_that_of_a_naive_computation(folder: Path) -> None:
    sources = (str(folder / "all.pt"), str(folder / "layers"))
    result = compare(TrainCompareConfig(store=folder / "acts.zarr", sae=sources))
    x, fit = held_out(folder)
    assert result.tokens == len(x) == 75
    assert result.layers == (1, 4, 6)
    named = {entrant.name: entrant for entrant in result.entrants}
    assert list(named) == ["all", "layers/ckpt", "PCA 3", "PCA 3 per layer"]
    assert [entrant.kind for entrant in result.entrants] == ["multi-layer", "per-layer", "pca", "pca"]
    assert [entrant.n_latents() for entrant in result.entrants] == [30, 30, 3, 9]
    assert [entrant.vectors for entrant in result.entrants] == [900, 900, None, None]
    for position, layer in enumerate(result.layers):
        vectors = torch.from_numpy(x[:, position])
        single = load_checkpoint(folder / "layers" / f"ckpt.layer={layer}.pt").sae(vectors).x_hat.numpy()
        expected = {
            "all": load_checkpoint(folder / "all.pt").sae(vectors).x_hat.numpy(),
            "layers/ckpt": single,
            "PCA 3": naive_pca(fit.reshape(-1, 12), x[:, position], 3),
            "PCA 3 per layer": naive_pca(fit[:, position], x[:, position], 3),
        }
        for name, x_hat in expected.items():
            found = named[name].by_layer(result.layers, "fvu_per_layer")[position]
            assert found == pytest.approx(naive_fvu(x[:, position], x_hat), rel=1e-4), (name, layer)


def test_a_folder_may_hold_a_sweep(folder: Path, tmp_path: Path) -> None:
    sizes = {"n_latents": 30, "batch_size": 64, "steps": 2, "threads": 1}
    train_all(train_config(store=folder / "acts.zarr", out=tmp_path / "grid", sweep=("k=2,3",), **sizes))
    config = TrainCompareConfig(store=folder / "acts.zarr", sae=(str(tmp_path / "grid"),), pca=False)
    assert [(one.name, one.k()) for one in compare(config).entrants] == [("grid/ckpt.k=2", 2), ("grid/ckpt.k=3", 3)]


def test_latents_are_matched_over_autoencoders(folder: Path, tmp_path: Path) -> None:
    sources = (str(folder / "all.pt"), str(tmp_path / "other.pt"))
    sizes = {"n_latents": 40, "k": 3, "batch_size": 64, "threads": 1, "seed": 1, "validation_fraction": 0.2}
    train(train_config(store=folder / "acts.zarr", out=tmp_path / "other.pt", **sizes))
    result = compare(TrainCompareConfig(store=folder / "acts.zarr", sae=sources, pca=False))
    x, units = torch.from_numpy(held_out(folder)[0]).flatten(0, 1), []
    for source in sources:
        sae = load_checkpoint(Path(source)).sae
        codes = sae(x).codes
        fired = sorted({*codes.indices[codes.values > 1e-3].tolist()})
        units.append((sae.W_dec[fired] / sae.W_dec[fired].norm(dim=1, keepdim=True)).detach())
    cosines = units[0] @ units[1].T
    for match, best in zip(result.matches, (cosines.amax(1), cosines.amax(0)), strict=True):
        assert (match.mmcs, match.found) == (pytest.approx(best.mean().item()), (best > 0.7).double().mean().item())
    assert [(match.run, match.other) for match in result.matches] == [("all", "other"), ("other", "all")]
    there, back = (f"{match.mmcs:.3f} ({match.found:.0%})" for match in result.matches)
    assert [line.split() for line in words(result).splitlines()[-3:]] == [
        ["all", "other"],
        ["all", *there.split()],
        ["other", *back.split()],
    ]


def test_relu_has_no_k_and_every_run_its_l0(folder: Path, tmp_path: Path) -> None:
    sizes = {"n_latents": 30, "batch_size": 64, "k": 3, "steps": 2, "threads": 1, "activation": "relu"}
    train(train_config(store=folder / "acts.zarr", out=tmp_path / "relu.pt", validation_fraction=0.2, **sizes))
    sources = (str(folder / "all.pt"), str(tmp_path / "relu.pt"))
    result = compare(TrainCompareConfig(store=folder / "acts.zarr", sae=sources, pca=False))
    assert [run["k"] for run in as_json(result)["runs"]] == [3, None]
    table = {line.split()[0]: line.split()[1:] for line in words(result).splitlines() if line}
    assert table["k"] == ["3", "-"]
    assert table["L0"] == [f"{np.mean(run['l0_per_layer']):.1f}" for run in as_json(result)["runs"]]


def test_the_command_writes_a_row_for_each_autoencoder_and_layer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--store", str(folder / "acts.zarr"), "--sae", str(folder / "all.pt")]
    assert main([*command, str(folder / "layers"), "--cross", "--out", str(tmp_path / "c"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "c" / "compare.json").read_text())
    rows = pd.read_parquet(tmp_path / "c" / "compare.parquet")
    assert len(rows) == 3 * (1 + 3 + 1 + 3)  # each autoencoder on every layer
    for run in found["runs"]:
        own = pd.DataFrame(rows[(rows["run"] == run["run"]) & rows["own"]]).sort_values("layer")
        assert list(own["fvu"]) == run["fvu_per_layer"]
        assert run["fvu"] == pytest.approx(np.mean(own["fvu"]))
    assert (tmp_path / "c" / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert main([*command, str(folder / "layers"), "--out", str(tmp_path / "c"), "--no-pca"]) == 0
    rows = pd.read_parquet(tmp_path / "c" / "compare.parquet")
    assert len(rows) == 3 + 3  # each on its own layers
    assert list(rows["own"]) == [True] * 6
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["layer", "all", "layers/ckpt"]
    assert table[5].split() == ["mean", *(f"{run['fvu']:.3f}" for run in found["runs"][:2])]


def test_one_that_was_trained_on_some_of_the_layers_has_a_mean_of_its_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_config(
        store=folder / "acts.zarr", out=tmp_path / "two.pt", n_latents=30, k=3, batch_size=64, validation_fraction=0.2
    )
    train(with_values(config, layers=(1, 6), threads=1, kernels="torch"))
    command = ["compare", "--store", str(folder / "acts.zarr"), "--sae", str(folder / "all.pt"), str(config.out)]
    assert main([*command, "--out", str(tmp_path / "c"), "--no-pca"]) == 0
    found = json.loads((tmp_path / "c" / "compare.json").read_text())
    every, two = found["runs"]
    assert (every["trained_layers"], two["trained_layers"]) == ([1, 4, 6], [1, 6])
    assert every["fvu_trained_layers"] == every["fvu"] == pytest.approx(np.mean(every["fvu_per_layer"]))
    first, middle, last = two["fvu_per_layer"]
    assert two["fvu"] == pytest.approx((first + middle + last) / 3)
    assert two["fvu_trained_layers"] == pytest.approx((first + last) / 2)
    rows = pd.read_parquet(tmp_path / "c" / "compare.parquet")
    assert list(rows[rows["run"] == "two"]["own"]) == [True, False, True]
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[3] == ["4", f"{every['fvu_per_layer'][1]:.3f}", f"({middle:.3f})"]
    assert table[5] == ["mean,", "all", f"{every['fvu']:.3f}", f"{two['fvu']:.3f}"]
    assert table[6] == ["mean,", "own", f"{every['fvu']:.3f}", f"{(first + last) / 2:.3f}"]
    shared = [(run["fvu_per_layer"][0] + run["fvu_per_layer"][2]) / 2 for run in (every, two)]
    assert table[7][3:] == [f"{value / min(shared):.3f}" for value in shared]
    assert "on layers 1 6, which all were trained on" in " ".join(table[0])


def test_sets_that_share_no_layer_have_no_ratio_and_those_that_the_store_lacks_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (tmp_path / f"{name}.pt" for name in "ab")
    for path, layer in ((one, 1), (other, 4)):
        path.write_bytes((folder / "layers" / f"ckpt.layer={layer}.pt").read_bytes())
    command = ["compare", "--store", str(folder / "acts.zarr"), "--out", str(tmp_path / "c"), "--no-pca", "--sae"]
    assert main([*command, str(one), str(other)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[5] == ["mean,", "all", "-", "-"]
    assert table[6][2:] == [table[2][1], table[3][2]]
    assert table[7] == ["over", "the", "best", "-", "-"]
    make_store(tmp_path / "acts.zarr", random_activations(n_tokens=64), layers=(0, 2, 3))
    command[2] = str(tmp_path / "acts.zarr")
    for path, layers in ((one, "1"), (folder / "all.pt", "1 4 6")):
        assert main([*command, str(path)]) == 3
        assert f"was trained on layers {layers}, {tmp_path}/acts.zarr has 0 2 3: harvest" in capsys.readouterr().err


def test_sets_that_standardise_by_layer_are_measured_where_they_can_be(folder: Path, tmp_path: Path) -> None:
    config = train_config(
        store=folder / "acts.zarr", out=tmp_path / "ckpt.pt", n_latents=30, k=3, batch_size=64, validation_fraction=0.2
    )
    config = with_values(config, standardize="layer", dtype="float32", kernels="torch", threads=1)
    single = train_all(with_values(config, per_layer="each"))
    shared = train(config)
    sources = (str(config.out), *(str(result.checkpoint) for result in single))
    result = compare(TrainCompareConfig(store=config.store, sae=sources, pca=False))
    assert [entrant.name for entrant in result.entrants] == ["ckpt", "ckpt (per layer)"]
    assert shared.validation is not None
    assert result.entrants[0].by_layer(result.layers, "fvu_per_layer") == pytest.approx(shared.validation.fvu_per_layer)
    expected = [run.validation.fvu for run in single if run.validation]
    assert result.entrants[1].by_layer(result.layers, "fvu_per_layer") == pytest.approx(expected)
    train(with_values(config, layers=(1, 6), out=tmp_path / "two.pt"))
    with pytest.raises(UsageError, match="standardises by layer and was trained on layers 1 6, the store has 1 4 6"):
        compare(TrainCompareConfig(store=config.store, sae=(str(tmp_path / "two.pt"),), pca=False))


def test_documents_must_be_held_out_from_all(folder: Path) -> None:
    """Two seeds of the split hold out other documents: only those that both leave out are measured on."""
    pair = (str(folder / "all.pt"), str(folder / "other-split.pt"))
    both = validation_documents(25, 0.2, 0) & validation_documents(25, 0.2, 1)
    config = TrainCompareConfig(store=folder / "acts.zarr", sae=pair, pca=False)
    if both.any():
        assert compare(config).tokens == 15 * both.sum()
    else:
        with pytest.raises(UsageError, match="no document with at least two tokens was held out from all"):
            compare(config)


def test_what_cannot_be_compared_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(folder / "acts.zarr")
    with pytest.raises(UsageError, match="two autoencoders are called all"):
        compare(TrainCompareConfig(store=Path(store), sae=(str(folder / "all.pt"),) * 2))
    make_store(tmp_path / "wide.zarr", random_activations(n_tokens=64, d_model=16))
    with pytest.raises(IncompatibleError, match=r"all has d_model 12, .* has 16: give a store of"):
        compare(TrainCompareConfig(store=tmp_path / "wide.zarr", sae=(str(folder / "all.pt"),)))
    (tmp_path / "file").write_text("")
    (tmp_path / "compare.json").write_text('{"schema_version": 1}')
    cases = [
        (["--sae", str(folder / "all.pt"), "--out", str(tmp_path)], 2, "a comparison by `analyze --compare`"),
        (["--sae", str(folder / "all.pt"), "--out", str(tmp_path / "file")], 2, "should be a folder"),
        (["--sae", str(tmp_path / "none.pt")], 2, "no such file or folder"),
        (["--sae", str(folder / "all.pt"), "--tokens", "0"], 2, "--tokens should be at least 2"),
    ]
    for flags, code, message in cases:
        assert main(["compare", "--store", store, *flags]) == code
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1


def test_values_that_are_not_finite_are_named_by_layer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ActivationStore.read

    def damaged(self: ActivationStore, *args: object, **options: object) -> np.ndarray:
        x = read(self, *args, **options).copy()  # type: ignore[arg-type]
        x[:, 1, 2] = 0x7FC0 if x.dtype == np.uint16 else np.nan  # a NaN in bfloat16
        return x

    monkeypatch.setattr(ActivationStore, "read", damaged)
    with pytest.raises(ResidscopeError, match="layer 4: the store contains NaN or infinite values"):
        compare(TrainCompareConfig(store=folder / "acts.zarr", sae=(str(folder / "all.pt"),)))
