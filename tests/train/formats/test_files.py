"""Other projects' formats: what is written reads back, and means what those projects' own formulas say it means."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from residscope.errors import IncompatibleError, UsageError
from tests.support.saes import STORE, D, K, M, assert_equal, assert_same, break_config, make_sae, make_variant, vectors
from train.checkpoint import Checkpoint, save_checkpoint
from train.formats.cli import FORMATS
from train.formats.files import (
    LAYOUTS,
    ForeignFormat,
    read_checkpoint,
    read_sae,
    read_safetensors,
    write_sae,
    write_safetensors,
)
from train.formats.layouts import refusal
from train.model import MLSAE, SAEConfig
from train.model_config import Activation, Standardize


def top_k(z: Tensor, k: int) -> Tensor:
    values, indices = z.topk(k)
    return torch.zeros_like(z).scatter(1, indices, values.relu())


def mlsae_formula(x: Tensor, tensors: dict[str, Tensor], k: int) -> Tensor:
    mean, centred = x.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
    std = centred.std(-1, keepdim=True)
    h = top_k((centred / (std + 1e-5) - tensors["pre_encoder_bias"]) @ tensors["encoder.weight"].T, k)
    return (h @ tensors["decoder.weight"].T + tensors["pre_encoder_bias"]) * std + mean


def saelens_formula(x: Tensor, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    mean, std, norm = 0.0, 1.0, 1.0
    if config["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    if config.get("rescale_acts_by_decoder_norm"):
        norm = tensors["W_dec"].norm(dim=1)
    x = x - tensors["b_dec"] * config["apply_b_dec_to_input"]
    h = top_k((x @ tensors["W_enc"] + tensors["b_enc"]) * norm, config["k"])
    return ((h / norm) @ tensors["W_dec"] + tensors["b_dec"]) * std + mean


def sparsify_formula(x: Tensor, tensors: dict[str, Tensor], k: int) -> Tensor:
    h = top_k((x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"], k)
    return h @ tensors["W_dec"] + tensors["b_dec"]


@settings(max_examples=15, deadline=None)
@given(
    to=st.sampled_from(["residscope", "mlsae", "saelens", "sparsify"]),
    standardize=st.sampled_from(["vector", "none"]),
    d=st.integers(1, 9),
    m=st.integers(1, 20),
    data=st.data(),
)
def test_writing_and_reading_back_gives_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, to: Any, standardize: Any, d: int, m: int, data: st.DataObject
) -> None:
    sae = make_sae(standardize, d, m, data.draw(st.integers(1, m)))
    folder = tmp_path_factory.mktemp("out")
    write_sae(sae, folder, to, store=STORE)
    found, origin = read_sae(folder)
    assert_equal(sae, found)
    assert (origin.format, origin.store) == (to, STORE)


def test_mlsae_files_mean_the_same_by_its_own_formula(tmp_path: Path) -> None:
    sae = make_sae()
    write_sae(sae, tmp_path, "mlsae")
    tensors = load_file(tmp_path / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"encoder.weight": (M, D), "decoder.weight": (D, M), "pre_encoder_bias": (D,)}
    config = json.loads((tmp_path / "config.json").read_text())
    keys = {"auxk", "dead_steps_threshold", "dead_threshold", "k", "n_inputs", "n_latents", "standardize"}
    assert keys <= set(config)
    assert (config["n_inputs"], config["n_latents"], config["k"], config["standardize"]) == (D, M, K, True)
    assert_same(mlsae_formula(vectors(), tensors, K), sae(vectors()).x_hat)


@pytest.mark.parametrize("prefix", ["", "autoencoder."])
def test_a_published_mlsae_is_read(tmp_path: Path, prefix: str) -> None:
    tensors = {
        "encoder.weight": torch.randn(M, D),
        "decoder.weight": torch.randn(D, M),
        "pre_encoder_bias": torch.randn(D),
    }
    config: dict[str, Any] = {"auxk": 256, "dead_steps_threshold": 76, "dead_threshold": 0.001, "k": K}
    config |= {"n_inputs": D, "n_latents": M, "standardize": True}
    files = {**tensors, "last_nonzero": torch.zeros(M, dtype=torch.int64)}
    if prefix:
        files = {prefix + name: tensor for name, tensor in files.items()}
        files["transformer.model.embed.weight"] = torch.zeros(3, 3)
        config = {"model_name": "EleutherAI/pythia-70m-deduped", "layers": [0, 1, 2], "k": K, "standardize": True}
    save_file({name: tensor.contiguous() for name, tensor in files.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    sae, origin = read_sae(tmp_path)
    assert sae.config == SAEConfig(d_model=D, n_latents=M, k=K, standardize="vector")
    assert torch.equal(sae.W_dec, tensors["decoder.weight"].T)
    assert_same(sae(vectors()).x_hat, mlsae_formula(vectors(), tensors, K))
    if prefix:
        assert origin.store == {"d_model": D, "model": "EleutherAI/pythia-70m-deduped", "layers": [0, 1, 2]}


def test_an_mlsae_with_a_lens_is_told_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mlsae-pythia-70m-deduped-x64-k32-lens"
    write_sae(make_sae(), folder, "mlsae")
    assert "tuned lens" in read_sae(folder)[1].notes[0]
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "encoder_lens.0.weight": torch.eye(D)}, folder / "model.safetensors")
    with pytest.raises(IncompatibleError, match=r"encoder_lens.0.weight"):
        read_sae(folder)


@pytest.mark.parametrize("standardize", ["vector", "none"])
def test_saelens_files_mean_the_same_by_its_own_formula(tmp_path: Path, standardize: Any) -> None:
    sae = make_sae(standardize)
    written = write_sae(sae, tmp_path, "saelens", store=STORE)
    assert written.notes == ()
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["k"], config["d_in"], config["d_sae"]) == ("topk", K, D, M)
    assert_same(saelens_formula(vectors(), tensors, config), sae(vectors()).x_hat)


@pytest.mark.parametrize("normalize", ["layer_norm", "none"])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_saelens_autoencoder_is_read(tmp_path: Path, normalize: str, rescale: bool) -> None:
    tensors = {"W_enc": torch.randn(D, M), "W_dec": 0.1 * torch.randn(M, D), "b_enc": torch.zeros(M)}
    tensors["b_dec"] = torch.randn(D)
    config = {"architecture": "topk", "d_in": D, "d_sae": M, "k": K, "apply_b_dec_to_input": True}
    config |= {"normalize_activations": normalize, "rescale_acts_by_decoder_norm": rescale}
    config["metadata"] = {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.7.hook_resid_post"}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    sae, origin = read_sae(tmp_path)
    assert (origin.store["model"], origin.store["layers"]) == ("gpt2", [7])
    assert_same(sae(vectors()).x_hat, saelens_formula(vectors(), tensors, config))
    if rescale:
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(M), atol=1e-6)


def test_a_saelens_folder_from_before_version_6_is_read(tmp_path: Path) -> None:
    write_sae(make_sae("none"), tmp_path, "saelens")
    old = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "d_in": D}
    (tmp_path / "cfg.json").write_text(json.dumps({**old, "normalize_activations": False, "model_name": "gpt2"}))
    sae, origin = read_sae(tmp_path)
    assert_equal(sae, make_sae("none"))
    assert origin.store["model"] == "gpt2"


def test_sparsify_files_mean_the_same_on_standardised_vectors(tmp_path: Path) -> None:
    sae = make_sae()
    written = write_sae(sae, tmp_path, "sparsify")
    assert len(written.notes) == 1
    assert "does not standardise" in written.notes[0]
    x_std, mean, std = sae.standardize(vectors())
    x_hat_std = sparsify_formula(x_std, load_file(tmp_path / "sae.safetensors"), K)
    assert_same(x_hat_std * std + mean, sae(vectors()).x_hat)
    assert write_sae(make_sae("none"), tmp_path / "raw", "sparsify").notes == ()


def test_a_sparsify_folder_of_hookpoints(tmp_path: Path) -> None:
    saes = {f"layers.{layer}": make_sae("none", seed=layer) for layer in (2, 10, 9)}
    for name, sae in saes.items():
        write_sae(sae, tmp_path, "sparsify", hookpoints=[name])
        config = json.loads((tmp_path / name / "cfg.json").read_text())
        del config["residscope"]  # as sparsify itself writes it
        (tmp_path / name / "cfg.json").write_text(json.dumps(config))
    sae, origin = read_sae(tmp_path, subfolder="layers.9")
    assert_equal(sae, saes["layers.9"])
    assert origin.store["layers"] == [9]
    with pytest.raises(UsageError, match=r"holds 3 autoencoders: choose a sub-folder: layers.2, layers.9, layers.10"):
        read_sae(tmp_path)
    with pytest.raises(IncompatibleError, match=r"layers.4: no autoencoder found.*layers.2, layers.9"):
        read_sae(tmp_path, subfolder="layers.4")


def test_hookpoints_get_a_whole_copy_each(tmp_path: Path) -> None:
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    written = write_sae(make_sae(), tmp_path, "saelens", hookpoints=hooks)
    assert len(written.files) == 4
    for layer, hook in enumerate(hooks):
        sae, origin = read_sae(tmp_path, subfolder=hook)
        assert_equal(sae, make_sae())
        assert origin.store["layers"] == [layer]
        assert json.loads((tmp_path / hook / "cfg.json").read_text())["metadata"]["hook_name"] == hook
    with pytest.raises(UsageError, match="not for mlsae"):
        write_sae(make_sae(), tmp_path, "mlsae", hookpoints=hooks)


@pytest.mark.parametrize("names", [["a/../../b"], ["/tmp/b"], [""], ["a", "a"]])
def test_hookpoints_are_sub_folders_each_once(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(UsageError, match=r"hookpoints: .* (is given twice|a sub-folder of)"):
        write_sae(make_sae(), tmp_path / "out", "sparsify", hookpoints=names)
    assert not list(tmp_path.iterdir())


def test_weights_of_other_types_become_float32(tmp_path: Path) -> None:
    write_sae(make_sae("none"), tmp_path, "sparsify")
    tensors = load_file(tmp_path / "sae.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "sae.safetensors")
    with pytest.raises(IncompatibleError, match=r"check sum is wrong.*delete 'xxh3_128' there"):
        read_sae(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    del config["residscope"]["xxh3_128"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    sae, origin = read_sae(tmp_path)
    assert "without a check sum (an earlier version wrote none)" in origin.notes[0]
    assert sae.W_enc.dtype == torch.float32
    assert torch.equal(sae.W_enc, tensors["encoder.weight"].bfloat16().float())


def break_tensors(name: str, **changes: Tensor | None) -> Any:
    def apply(folder: Path) -> None:
        tensors = {**load_file(folder / name), **{key.replace("__", "."): value for key, value in changes.items()}}
        save_file({key: value for key, value in tensors.items() if value is not None}, folder / name)

    return apply


@pytest.mark.parametrize(
    ("to", "damage", "message"),
    [
        ("saelens", break_config("cfg.json", architecture="gated"), "architecture is 'gated'"),
        ("saelens", break_config("cfg.json", architecture="jumprelu"), "threshold is missing"),
        ("saelens", break_config("cfg.json", architecture="standard", activation_fn="tanh-relu"), "'tanh-relu'"),
        ("saelens", break_config("cfg.json", reshape_activations="hook_z"), "hook_z"),
        ("saelens", break_config("cfg.json", normalize_activations="expected_average_only_in"), "fold the scale"),
        ("saelens", break_config("cfg.json", normalize_activations=True), "expected_average_only_in"),
        ("saelens", break_config("cfg.json", k=M + 1), "k should be a whole number from 1 to n_latents 48"),
        ("saelens", break_config("cfg.json", k="5"), "'5'"),
        ("saelens", break_tensors("sae_weights.safetensors", threshold=torch.ones(M)), "contains threshold"),
        ("saelens", break_tensors("sae_weights.safetensors", W_dec=torch.ones(D, M)), r"\[48, 16\], it has \[16, 48\]"),
        ("sparsify", break_config("cfg.json", activation="groupmax"), "activation is 'groupmax'"),
        ("sparsify", break_config("cfg.json", transcode=True), "transcoder"),
        ("sparsify", break_config("cfg.json", signed=True), "signed is True"),
        ("sparsify", break_tensors("sae.safetensors", W_skip=torch.ones(D, D)), "W_skip"),
        ("sparsify", break_tensors("sae.safetensors", b_dec=None), "b_dec is missing"),
        ("mlsae", break_tensors("model.safetensors", decoder__weight=None), "decoder.weight is missing"),
        ("mlsae", break_config("config.json", k=None), "None"),
        ("mlsae", break_config("config.json", n_latents=40), "says n_latents 40, the weights have 48"),
        ("saelens", break_config("cfg.json", d_in=17), "says d_in 17, the weights have 16"),
        ("saelens", break_config("cfg.json", metadata={"model_name": 5}), "model and lens should be names, found 5"),
        ("sparsify", break_config("cfg.json", num_latents=99), "says num_latents 99, the weights have 48"),
        ("mlsae", break_config("config.json", layers=["last"]), "config.json is invalid"),
        ("mlsae", lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
        ("mlsae", lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        ("mlsae", lambda folder: (folder / "config.json").write_text("[]"), "should be a JSON object"),
        ("mlsae", lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "not a complete safetensors file"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(tmp_path: Path, to: Any, damage: Any, message: str) -> None:
    write_sae(make_sae(), tmp_path, to)
    damage(tmp_path)
    with pytest.raises(IncompatibleError, match=message):
        read_sae(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    for to in ("residscope", "mlsae"):
        write_sae(make_sae(), tmp_path / to, to)
        (path,) = (tmp_path / to).glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(IncompatibleError, match="not a complete safetensors file"):
            read_sae(path)


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [
        ("sparsify", {"activation": "jumprelu"}, "sparsify cannot express activation 'jumprelu'"),
        ("mlsae", {"activation": "batchtopk"}, "mlsae cannot express activation 'batchtopk'"),
        ("mlsae", {"encoder_bias": True}, "mlsae cannot express an encoder bias"),
        ("sparsify", {"apply_b_dec_to_input": False}, "input keeps b_pre"),
        ("saelens", {"standardize": "layer", "layers": (0, 1)}, "standardisation 'layer'"),
    ],
)
def test_what_a_format_cannot_say_is_not_written(tmp_path: Path, to: Any, changes: Any, message: str) -> None:
    sae = MLSAE(SAEConfig(**{"d_model": D, "n_latents": M, "k": K, **changes}))
    with pytest.raises(IncompatibleError, match=message):
        write_sae(sae, tmp_path, to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("standardize", get_args(Standardize))
@pytest.mark.parametrize("encoder_bias", [True, False])
@pytest.mark.parametrize("subtracted", [True, False])
def test_what_a_format_writes_comes_back_as_it_was(
    tmp_path: Path, to: Any, activation: Any, standardize: Any, encoder_bias: bool, subtracted: bool
) -> None:
    """Everything that a layout does not refuse."""
    layers = (3, 5) if standardize == "layer" else ()
    how = {"standardize": standardize, "layers": layers, "apply_b_dec_to_input": subtracted}
    sae = make_variant(activation, encoder_bias=encoder_bias, **how)
    if refusal(to, sae.config):
        assert (to, activation, standardize, subtracted) != ("saelens", activation, "vector", True)
        with pytest.raises(IncompatibleError, match="cannot express"):
            write_sae(sae, tmp_path, to)
    else:
        write_sae(sae, tmp_path, to)
        found = read_sae(tmp_path)[0]
        assert found.config == sae.config
        assert_same(found(vectors()).x_hat, sae(vectors()).x_hat)


def test_the_command_knows_every_format() -> None:
    assert get_args(ForeignFormat) == tuple(LAYOUTS)
    assert ("residscope", *LAYOUTS) == FORMATS


def saelens_by_architecture(x: Tensor, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """SAELens's forward pass, of vectors that it does not normalise."""
    inputs = x - tensors["b_dec"] if config["apply_b_dec_to_input"] else x
    pre = inputs @ tensors["W_enc"] + tensors["b_enc"]
    if config["architecture"] == "topk":
        values, indices = pre.topk(config["k"])
        h = torch.zeros_like(pre).scatter(1, indices, values).relu()
    else:
        h = pre.relu() * (pre > tensors.get("threshold", torch.zeros(())))
    return h @ tensors["W_dec"] + tensors["b_dec"]


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("subtracted", [True, False])
def test_variants_as_saelens_files(tmp_path: Path, activation: Any, subtracted: bool) -> None:
    """They mean the same by its formulas, and come back as what they were."""
    sae = make_variant(activation, standardize="none", apply_b_dec_to_input=subtracted)
    write_sae(sae, tmp_path, "saelens", store=STORE)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == {"topk": "topk", "relu": "standard"}.get(activation, "jumprelu")
    x = 0.1 * vectors()
    expected = sae(x)
    assert 0 < expected.codes.values.count_nonzero() < len(x) * M
    assert_same(saelens_by_architecture(x, tensors, config), expected.x_hat)
    found = read_sae(tmp_path)[0]
    assert found.config == sae.config
    assert_same(found(x).x_hat, expected.x_hat)


def test_a_saelens_jumprelu_of_theirs_is_read(tmp_path: Path) -> None:
    """Without our record: a threshold of each latent's own, negative ones included, and k is not known."""
    tensors = {"W_enc": torch.randn(D, M), "W_dec": torch.randn(M, D), "b_enc": torch.randn(M), "b_dec": torch.randn(D)}
    tensors["threshold"] = torch.randn(M)
    config = {"architecture": "jumprelu", "d_in": D, "d_sae": M, "apply_b_dec_to_input": False}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "normalize_activations": "none", "metadata": {}}))
    sae, _ = read_sae(tmp_path)
    assert (sae.config.activation, sae.config.k, sae.config.encoder_bias) == ("jumprelu", 0, True)
    x = torch.randn(50, D)
    assert_same(sae(x).x_hat, saelens_by_architecture(x, tensors, config))


def test_encoder_biases_go_to_sparsify_and_back(tmp_path: Path) -> None:
    sae = make_variant("topk", standardize="none")
    write_sae(sae, tmp_path, "sparsify")
    assert torch.equal(load_file(tmp_path / "sae.safetensors")["encoder.bias"], sae.b_enc)
    assert_equal(read_sae(tmp_path)[0], sae)
    assert_same(sae(vectors()).x_hat, sparsify_formula(vectors(), load_file(tmp_path / "sae.safetensors"), K))


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("standardize", ["vector", "layer"])
def test_variants_come_back_from_our_own_files(tmp_path: Path, activation: Any, standardize: Any) -> None:
    sae = make_variant(activation, standardize=standardize, layers=(3, 5) if standardize == "layer" else ())
    write_sae(sae, tmp_path, "residscope", store=STORE)
    for path in ("ckpt.pt", "ckpt.safetensors"):
        assert_equal(read_sae(tmp_path / path)[0], sae)


def test_our_checkpoint_and_its_export_are_read(tmp_path: Path) -> None:
    trainer = {"step": 7, "finished": False, "config": {"lr": 1e-3}, "moments": torch.ones(3), "sizes": [1, 2]}
    save_checkpoint(tmp_path / "ckpt.pt", make_sae(), store=STORE, trainer=trainer)
    write_safetensors(make_sae(), tmp_path / "ckpt.safetensors", store=STORE, trainer=trainer)
    sae, origin = read_sae(tmp_path)  # both are there: the checkpoint
    assert origin.trainer["moments"].tolist() == [1, 1, 1]
    assert_equal(sae, make_sae())
    export = read_safetensors(tmp_path / "ckpt.safetensors")
    assert_equal(export.sae, make_sae())
    assert export.store == STORE
    assert export.trainer == {"step": 7, "finished": False, "config": {"lr": 1e-3}, "sizes": [1, 2]}
    assert set(load_file(tmp_path / "ckpt.safetensors")) == {"W_enc", "W_dec", "b_pre"}


def test_an_export_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "ckpt.safetensors")
    with pytest.raises(IncompatibleError, match="not exported by residscope"):
        read_sae(tmp_path)
    header = {"format": "residscope 1", "config": '{"d_model": 2, "n_latents": 3, "k": 1}'}
    save_file({"W_enc": torch.ones(3, 2)}, tmp_path / "ckpt.safetensors", header)
    with pytest.raises(IncompatibleError, match=r"damaged.*W_dec"):
        read_sae(tmp_path)
    for config in ('{"d_model": 2, "n_latents": 3, "k": 4}', "[2, 3]", "{"):
        save_file({"W_enc": torch.ones(3, 2)}, tmp_path / "ckpt.safetensors", {**header, "config": config})
        with pytest.raises(IncompatibleError, match="damaged, or by another version"):
            read_sae(tmp_path)


def test_a_foreign_autoencoder_as_a_checkpoint(tmp_path: Path) -> None:
    write_sae(make_sae(), tmp_path / "foreign", "mlsae", store={"model": "gpt2"})
    checkpoint = read_checkpoint(tmp_path / "foreign")
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.store == {"model": "gpt2"}
    assert checkpoint.trainer["converted_from"]["format"] == "mlsae"
    write_sae(checkpoint.sae, tmp_path / "ours", "residscope", store=checkpoint.store, trainer=checkpoint.trainer)
    assert_equal(read_checkpoint(tmp_path / "ours" / "ckpt.pt").sae, make_sae())


def test_another_models_weights_are_said_to_be_no_autoencoder(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(IncompatibleError, match=r"contains lm_head.weight: these are not an autoencoder's weights"):
        read_sae(tmp_path)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    write_sae(make_sae(), tmp_path, "mlsae")
    with pytest.raises(UsageError, match="exists already"):
        write_sae(make_sae(), tmp_path, "mlsae")
    write_sae(make_sae(seed=4), tmp_path, "mlsae", overwrite=True)
    assert_equal(read_sae(tmp_path)[0], make_sae(seed=4))
    with pytest.raises(UsageError, match="give a folder"):
        write_sae(make_sae(), tmp_path / "config.json", "saelens")
    with pytest.raises(UsageError, match="give a folder"):
        write_sae(make_sae(), tmp_path / "new.pt", "residscope")
