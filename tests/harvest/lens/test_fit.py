"""`residscope fit-lens` from end to end on tiny models: what is fitted to what, the files, both sources, and errors."""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harvest.lens import fit as module
from harvest.lens.cli import main
from harvest.lens.config import FitLensConfig
from harvest.lens.data import Role, roles
from harvest.lens.fit import fit_lens
from harvest.lens.result import FitResult, warnings
from harvest.lens.translators import TunedLens, load_lens
from harvest.model.load import load_model
from harvest.model.names import resolve_model
from harvest.run import harvest
from residscope.destinations import held_alone
from residscope.errors import ResidscopeError, UsageError
from residscope.options import from_flat
from store.activations import ActivationStore
from tests.support.harvesting import MakeConfig, ModelFolder
from tests.support.models import ARCHITECTURES, D_MODEL, N_LAYERS

DOCUMENTS = 9


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Nine .txt documents of 60 to 68 bytes; 1 byte is 1 token."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for i in range(DOCUMENTS):
        text = "".join(chr(97 + (i * 7 + j * j + j * i // 3) % 26) for j in range(60 + i))
        (folder / f"{i}.txt").write_text(text)
    return folder


Options = Callable[..., dict[str, Any]]


@pytest.fixture
def options(tmp_path: Path, model_folder: ModelFolder, documents: Path) -> Options:
    """Options of a small fit."""

    def make(architecture: str = "gpt2", **changes: Any) -> dict[str, Any]:
        return {
            "model": str(model_folder(architecture)),
            "out": tmp_path / "lens",
            "dataset": str(documents),
            "context_length": 20,
            "kl_steps": 4,
            "kl_batch": 32,
            "eval_tokens": 60,
        } | changes

    return make


def load(result: FitResult, architecture: str) -> TunedLens:
    return load_lens(result.out, model_id="x/y", n_layers=N_LAYERS[architecture], d_model=D_MODEL)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_lens_beats_none_and_reads_back(architecture: str, options: Options) -> None:
    result = fit_lens(from_flat(FitLensConfig, options(architecture)))
    n = N_LAYERS[architecture]
    assert [layer.layer for layer in result.layers] == [None, *range(n)]
    assert [layer.translator for layer in result.layers] == [*range(n), None]
    for layer in result.layers[:-1]:
        assert layer.kl_ridge is not None
        assert layer.kl_trained is not None
        assert max(layer.kl_ridge, layer.kl_trained) < layer.kl_logit_lens
    last = result.layers[-1]
    assert (last.kl_logit_lens, last.kl_ridge, last.kl_trained, last.round_trip) == (0.0, None, None, 0.0)
    assert not warnings(result)
    lens = load(result, architecture)
    x = torch.randn(50, D_MODEL) * 3
    for layer in range(n):
        back = lens.invert(lens.apply(x, layer), layer)
        assert ((back - x).norm(dim=-1) / x.norm(dim=-1)).max() < 1e-4
    saved = json.loads((Path(result.out) / "fit.json").read_text())
    assert saved["layers"] == json.loads(json.dumps(asdict(result)))["layers"]
    assert saved["options"]["kl_steps"] == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_translator_i_maps_the_input_of_block_i_to_the_last_blocks_output(
    architecture: str, options: Options, model_folder: ModelFolder, config: MakeConfig, tmp_path: Path
) -> None:
    settings = options(architecture, method="ridge", max_condition=0)
    lens = load(fit_lens(from_flat(FitLensConfig, settings)), architecture)
    store_config = config(architecture, dataset=settings["dataset"], out=tmp_path / "acts.zarr")
    harvest(store_config)
    with ActivationStore.open(tmp_path / "acts.zarr") as store:
        tokens = store.tokens
    model = load_model(resolve_model(str(model_folder(architecture))))
    role = roles(tokens, 0.05, 0)
    states: list[list[torch.Tensor]] = [[] for _ in range(model.n_layers + 1)]
    outputs: list[torch.Tensor] = []
    handle = model.blocks[-1].register_forward_hook(
        lambda m, a, out: outputs.append((out[0] if isinstance(out, tuple) else out)[0])
    )
    starts = [*np.flatnonzero(tokens.position == 0), len(role)]
    for start, stop in itertools.pairwise(starts):
        ids = torch.from_numpy(tokens.token_id[start:stop].astype(np.int64))[None]
        for i, state in enumerate(model.base(ids, output_hidden_states=True).hidden_states):
            states[i].append(state[0])
    handle.remove()
    used = torch.from_numpy((role == Role.FIT) | (role == Role.CHOOSE))
    y = torch.cat(outputs)[used].double()
    penalties = json.loads((tmp_path / "lens" / "fit.json").read_text())["layers"]
    for i in range(model.n_layers):
        x = torch.cat(states[i])[used].double()
        a, r = x - x.mean(0), y - x - (y - x).mean(0)
        scatter = a.T @ a
        ridge = torch.eye(D_MODEL).double() * penalties[i]["penalty"] * scatter.trace() / D_MODEL
        weight = torch.linalg.solve(scatter + ridge, a.T @ r).T
        torch.testing.assert_close(lens.weights[i], weight.float(), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(
            x.float() @ lens.weights[i].T + lens.biases[i],
            (x @ weight.T + (y - x).mean(0) - weight @ x.mean(0)).float(), rtol=1e-2, atol=1e-2,
        )  # fmt: skip


def test_a_store_gives_the_same_lens_as_the_model(options: Options, config: MakeConfig, tmp_path: Path) -> None:
    from_model = fit_lens(from_flat(FitLensConfig, options()))
    store = tmp_path / "acts.zarr"
    harvest(config(dataset=options()["dataset"], out=store, store_dtype="float32"))
    wanted = options(out=tmp_path / "other", store=store)
    del wanted["dataset"], wanted["context_length"]
    from_store = fit_lens(from_flat(FitLensConfig, wanted))
    assert from_store.fit_tokens == from_model.fit_tokens
    torch.testing.assert_close(load(from_store, "gpt2").weights, load(from_model, "gpt2").weights, rtol=1e-3, atol=1e-4)
    for a, b in zip(from_store.layers, from_model.layers, strict=True):
        assert a.kl_trained == (None if b.kl_trained is None else pytest.approx(b.kl_trained, rel=1e-2))


def test_harvest_stores_what_the_lens_makes_of_the_vectors(
    options: Options, config: MakeConfig, tmp_path: Path
) -> None:
    lens = load(fit_lens(from_flat(FitLensConfig, options())), "gpt2")
    plain, mapped = tmp_path / "plain.zarr", tmp_path / "mapped.zarr"
    harvest(config(out=plain, store_dtype="float32"))
    harvest(config(out=mapped, store_dtype="float32", lens=str(tmp_path / "lens")))
    with ActivationStore.open(plain) as a, ActivationStore.open(mapped) as b:
        assert b.meta.lens is not None
        x, y = torch.from_numpy(a.read()), torch.from_numpy(b.read())
    for layer in range(3):
        torch.testing.assert_close(y[:, layer], lens.apply(x[:, layer], layer), rtol=1e-4, atol=1e-4)


def test_training_from_zero_and_ridge_alone(options: Options, tmp_path: Path) -> None:
    ridge = fit_lens(from_flat(FitLensConfig, options(method="ridge")))
    assert (ridge.saved, ridge.kl_tokens, ridge.init) == ("ridge", 0, None)
    zero = fit_lens(from_flat(FitLensConfig, options(init="zero", out=tmp_path / "zero", lr=1e-9)))
    for a, b in zip(zero.layers[:-1], ridge.layers[:-1], strict=True):
        assert a.kl_ridge == b.kl_ridge
        assert a.kl_trained == pytest.approx(a.kl_logit_lens, rel=1e-3)
        assert b.kl_trained is None


def test_a_layer_without_an_inverse_and_one_that_is_no_better_are_named(options: Options) -> None:
    result = fit_lens(from_flat(FitLensConfig, options(method="ridge")))
    bad = [
        layer.__class__(**{**layer.__dict__, "round_trip": 0.5, "kl_ridge": 99.0}) if layer.layer == 1 else layer
        for layer in result.layers
    ]
    found = warnings(FitResult(**{**result.__dict__, "layers": tuple(bad)}))
    assert len(found) == 2
    assert "layer 1 is ill-conditioned" in found[0]
    assert "at layer 1 the lens (99 nats per token) is no better than using no lens" in found[1]


def test_nothing_half_made_stays(options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lens" / ".partial").mkdir(parents=True)
    (tmp_path / "lens" / ".partial" / "params.pt").write_text("left by a kill")

    def fail(*args: Any, **named: Any) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_lens", fail)
        with pytest.raises(RuntimeError, match="crash"):
            fit_lens(from_flat(FitLensConfig, options(method="ridge")))
    assert not list(tmp_path.glob("lens/*"))
    fit_lens(from_flat(FitLensConfig, options(method="ridge")))
    assert sorted(path.name for path in (tmp_path / "lens").iterdir()) == ["config.json", "fit.json", "params.pt"]
    with pytest.raises(UsageError, match=r"config.json exists already"):
        fit_lens(from_flat(FitLensConfig, options(method="ridge")))


def command(capsys: pytest.CaptureFixture[str], values: dict[str, Any]) -> tuple[int, str, str]:
    """Exit code, stdout, and the last line of stderr."""
    words = [word for name, value in values.items() for word in ("--" + name.replace("_", "-"), str(value))]
    code = main([word for word in words if word != "True"])
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return code, found.out, (found.err.strip().splitlines() or [""])[-1]


def test_the_table_and_the_json(options: Options, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = command(capsys, options())
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:7]] == ["layer", "embedding", "0", "1", "2"]
    code, out, _ = command(capsys, options(out=tmp_path / "again", json=True))
    assert code == 0
    found = json.loads(out)
    assert found["layers"][-1]["kl_logit_lens"] == 0
    assert [layer["layer"] for layer in found["layers"]] == [None, 0, 1, 2]


def test_mistakes_are_one_line(
    options: Options, config: MakeConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: ModelFolder
) -> None:
    def store(name: str, **changes: Any) -> dict[str, Any]:
        harvest(config(dataset=options()["dataset"], out=tmp_path / name, **changes))
        wanted = options(store=tmp_path / name)
        del wanted["dataset"], wanted["context_length"]
        return wanted

    def refused(values: dict[str, Any], code: int, words: str) -> None:
        found, out, error = command(capsys, values)
        assert (found, out) == (code, "")
        assert error.startswith("residscope fit-lens: error: ")
        assert words in error
        assert not (tmp_path / "lens").exists()

    texts = tmp_path / "documents"
    refused(options(out=texts), 2, "documents exists and will not be overwritten")
    refused(options(max_tokens=100), 3, "at least 3 documents")
    refused(options(dataset=texts / "[012].txt"), 3, "kept tokens to fit on, d_model 32 needs at least 64")
    refused(options(kl_batch=5000), 3, "lower --kl-batch")
    refused(options(lr=1e30), 1, "diverged; try a lower --lr")
    refused(store("some.zarr", layers=("0-1",)), 3, "holds 2 of the model's 3 layers")
    refused(store("plain.zarr") | {"model": str(model_folder("gpt_neox"))}, 3, "content hash should be")
    fit_lens(from_flat(FitLensConfig, options(out=tmp_path / "made", method="ridge")))
    refused(store("mapped.zarr", lens=str(tmp_path / "made")), 3, "was made with lens 'made'")


def test_vectors_that_are_not_finite_are_one_line(
    options: Options, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def overflowed(model: Any, token_id: Any) -> Any:
        read = real(model, token_id)
        return lambda span: [vectors.index_fill(0, torch.tensor([1]), torch.inf) for vectors in read(span)]

    real = module.data.model_reader
    monkeypatch.setattr(module.data, "model_reader", overflowed)
    code, out, error = command(capsys, options())
    assert (code, out) == (1, "")
    assert "its vectors are not all finite; try --dtype float32" in error
    assert not (tmp_path / "lens").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl_steps": 0}, "--kl-steps should be at least 1"),
        ({"lr": 0.0}, "--lr should be a finite number above 0"),
        ({"lr": float("inf")}, "--lr should be a finite number above 0"),
        ({"weight_decay": float("inf")}, "--weight-decay should be a finite number"),
        ({"seed": -1}, "--seed should be at least 0"),
        ({"max_condition": 0.5}, "--max-condition should be above 1"),
        ({"validation_fraction": 0.0}, "--validation-fraction"),
        ({"store": Path("a.zarr")}, "--dataset says how to turn text into tokens"),
    ],
)
def test_options_that_cannot_work(options: Options, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        from_flat(FitLensConfig, options(**changes))


def test_two_fits_of_one_lens_do_not_mix(options: Options, tmp_path: Path) -> None:
    making = tmp_path / "lens" / ".partial"
    making.mkdir(parents=True)
    (making / "mine").touch()
    with held_alone(making, tmp_path / "lens"), pytest.raises(ResidscopeError, match="another process is writing"):
        fit_lens(from_flat(FitLensConfig, options()))
    assert (making / "mine").exists()
    fit_lens(from_flat(FitLensConfig, options()))
    assert sorted(path.name for path in (tmp_path / "lens").iterdir()) == ["config.json", "fit.json", "params.pt"]
