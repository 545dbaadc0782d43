"""Models by name: blocks by rule, names that resolve and names that do not, random weights, the LM head."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harvest.model import load as models
from harvest.model.load import load_config, load_model
from harvest.model.names import resolve_model
from harvest.residual import ResidualRecorder
from residscope.errors import IncompatibleError, ResidscopeError
from tests.support.harvesting import ModelFolder
from tests.support.models import ARCHITECTURES, D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_loads(architecture: str, model_folder: ModelFolder) -> None:
    folder = model_folder(architecture)
    spec = resolve_model(str(folder))
    assert (spec.source, spec.name) == ("folder", architecture)
    model = load_model(spec)
    assert (model.n_layers, model.d_model) == (N_LAYERS[architecture], D_MODEL)
    assert not model.causal_lm.training
    assert model.architecture == type(model.causal_lm).__name__
    assert model.base is not model.causal_lm


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_the_last_block_are_the_models(architecture: str, model_folder: ModelFolder) -> None:
    model = load_model(resolve_model(str(model_folder(architecture))))
    ids = torch.arange(20)[None] * 7 % 250
    kept: list[torch.Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)

    handle = model.blocks[-1].register_forward_hook(keep)
    expected = model.causal_lm(ids).logits
    handle.remove()
    torch.testing.assert_close(model.logits(kept[0]), expected)
    assert model.unembedding.weight.shape == (expected.shape[-1], D_MODEL)


def test_soft_capped_scores_are_computed_eagerly(model_folder: ModelFolder) -> None:
    model = load_model(resolve_model(str(model_folder("gemma"))))
    assert model.causal_lm.config._attn_implementation == "eager"


def up_projection(model: models.LoadedModel) -> torch.Tensor:
    return model.causal_lm.model.layers[1].mlp.up_proj.weight


def test_random_weights_follow_the_seed_and_not_the_dtype(model_folder: ModelFolder) -> None:
    folder = str(model_folder("llama"))

    def weights(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        spec = resolve_model(folder, random_init=True, seed=seed)
        return up_projection(load_model(spec, dtype=dtype))

    before = torch.random.get_rng_state()
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(weights(0).bfloat16(), weights(0, torch.bfloat16))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(weights(0), up_projection(load_model(resolve_model(folder))))


def test_weights_that_cannot_be_read_are_one_line(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model_folder("gpt2"), folder)
    (folder / "model.safetensors").write_bytes(b"rubbish")
    match = r"broken: its model cannot be loaded .*; model\.safetensors is damaged.*: save or download it again$"
    with pytest.raises(ResidscopeError, match=match) as raised:
        load_model(resolve_model(str(folder)))
    assert "\n" not in str(raised.value)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "no_such_type"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ResidscopeError, match=r"configuration cannot be loaded .*; a newer transformers may know it"):
        load_model(resolve_model(str(folder)))


@pytest.fixture
def gpt2(model_folder: ModelFolder, tmp_path: Path) -> Path:
    """A copy of the tiny GPT-2, to be damaged."""
    return Path(shutil.copytree(model_folder("gpt2"), tmp_path / "copy"))


def test_weights_that_the_files_lack_are_not_made_up(gpt2: Path) -> None:
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps(config | {"n_layer": 5}))
    with pytest.raises(ResidscopeError, match=r"24 weights are missing from its files.*transformer\.h\.3\."):
        load_model(resolve_model(str(gpt2)))


def test_a_model_without_its_head_gives_vectors_and_no_logits(gpt2: Path, model_folder: ModelFolder) -> None:
    whole = load_model(resolve_model(str(model_folder("gpt2"))))
    whole.base.save_pretrained(gpt2)
    found = load_model(resolve_model(str(gpt2)))
    ids = torch.arange(9)[None]
    assert torch.equal(found.base(ids).last_hidden_state, whole.base(ids).last_hidden_state)
    with pytest.raises(ResidscopeError, match="its weights have no LM head"):
        found.logits(torch.zeros(1, D_MODEL))


def test_the_way_out_fits_what_failed(gpt2: Path) -> None:
    spec = resolve_model(str(gpt2))
    json_error = OSError("not valid JSON")
    json_error.__cause__ = json.JSONDecodeError("no", "{", 0)
    (gpt2 / "generation_config.json").write_text("{")
    cases: dict[Exception, str] = {
        ImportError("it requires protobuf"): "; install what it asks for$",
        ValueError("requires trust_remote_code=True"): "is not run here: give a model that transformers has built in$",
        ValueError("unknown model type"): "; a newer transformers may know it, this is",
        json_error: r"; generation_config\.json is damaged",
        OSError("no file named model.safetensors"): r"\); save or download the model again$",
        RuntimeError("sizes differ"): r"\(RuntimeError: sizes differ\)$",
    }
    for error, message in cases.items():

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(ResidscopeError, match=message):
            models._loading(spec, "model", fail)

    def refused() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):  # The files are good.
        models._loading(spec, "model", refused)


def test_more_blocks_than_any_model_has_are_refused_before_they_are_made(gpt2: Path) -> None:
    config = json.loads((gpt2 / "config.json").read_text())
    for changes in ({"n_layer": 2**31}, {"text_config": {"num_hidden_layers": 20_000}}):
        (gpt2 / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(IncompatibleError, match=r"config\.json is damaged \(.*layer.* should be at most 10,000"):
            models.load_config(resolve_model(str(gpt2)))
    (gpt2 / "config.json").write_text(json.dumps(config | {"vocab_size_per_layer_input": 262_144}))  # no count
    models.load_config(resolve_model(str(gpt2)))


def test_code_that_comes_with_a_model_is_not_run_and_that_is_said(
    gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((gpt2 / "config.json").read_text())
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}
    (gpt2 / "config.json").write_text(json.dumps(config | own))
    load_model(resolve_model(str(gpt2)))
    assert "its own code (modeling_own.OwnModel) is not run" in capsys.readouterr().err
    own["auto_map"]["AutoConfig"] = "configuration_own.OwnConfig"
    (gpt2 / "config.json").write_text(json.dumps(config | own | {"model_type": "own"}))
    with pytest.raises(ResidscopeError, match="code that comes with a model is not run here"):
        load_model(resolve_model(str(gpt2)))


def image_text(folder: Path, config: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tiny_tokenizer(bos=False).save_pretrained(folder)
    return folder


TEXT = {
    "vocab_size": 260,
    "hidden_size": D_MODEL,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 28}


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_a_model_of_images_and_text_is_taken_for_its_text_model(kind: str, tmp_path: Path) -> None:
    """Also where its images have as many blocks, as deep in it."""
    if kind == "llava":
        vision = {**IMAGE, "patch_size": 14, "model_type": "clip_vision_model"}
        config = transformers.LlavaConfig(text_config={**TEXT, "model_type": "llama"}, vision_config=vision)
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        vision = {"depth": 3, "embed_dim": 16, "hidden_size": D_MODEL, "num_heads": 2, "patch_size": 14}
        config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    folder = image_text(tmp_path / kind, config)
    model = load_model(resolve_model(str(folder)))
    whole = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    ids = torch.arange(20)[None] * 7 % 250
    with torch.no_grad():
        expected = whole(input_ids=ids, output_hidden_states=True, use_cache=False)
    found = ResidualRecorder(model).record(ids)
    for i in range(2):
        assert torch.equal(found[i], expected.hidden_states[i + 1])
    torch.testing.assert_close(model.logits(found[2]), expected.logits)


def test_a_model_that_is_no_language_model_is_named(gpt2: Path) -> None:
    transformers.T5Config(vocab_size=260).save_pretrained(gpt2)
    with pytest.raises(IncompatibleError, match="copy: T5Config is for an encoder-decoder model"):
        load_model(resolve_model(str(gpt2)))


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("Whisper", "copy: WhisperConfig is for an encoder-decoder model"),
        ("ViT", "copy: transformers has no causal language model for ViTConfig"),
        ("Blt", "copy: BltConfig should have num_hidden_layers, hidden_size and vocab_size of one"),
        ("BigBird", "copy: its block_sparse attention sees later tokens"),
    ],
)
def test_a_configuration_of_something_else_is_named(gpt2: Path, kind: str, line: str) -> None:
    getattr(transformers, f"{kind}Config")().save_pretrained(gpt2)
    with pytest.raises(IncompatibleError, match=line):
        load_config(resolve_model(str(gpt2)))


def test_weights_of_another_shape_are_named(gpt2: Path) -> None:
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps(config | {"n_inner": 24}))
    line = r"copy: .*h\.0\.mlp\.c_fc\.\w+ has the wrong shape, \[.*128\] in its files, \[.*24\] by its config"
    with pytest.raises(IncompatibleError, match=line):
        load_model(resolve_model(str(gpt2)))


@pytest.mark.parametrize("scale", [None, "inv_sqrt_d_model", 0.5])
def test_logits_are_scaled_by_a_number_alone(model_folder: ModelFolder, scale: Any) -> None:
    model = load_model(resolve_model(str(model_folder("llama"))))
    x = torch.ones(1, model.d_model)
    plain = model.logits(x)
    model.causal_lm.config.logit_scale = scale
    torch.testing.assert_close(model.logits(x), plain * (0.5 if scale == 0.5 else 1))


def exchange(folder: Path, other: Path) -> None:
    folder.rename(folder.with_name("away"))
    other.rename(folder)


@pytest.mark.parametrize("step", ["load_config", "_weights", "load_tokenizer"])
def test_a_folder_that_is_exchanged_while_it_is_loaded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder, other = tiny_model("gpt2", tmp_path / "model"), tiny_model("gpt2", tmp_path / "other", seed=1)
    spec, original = resolve_model(str(folder)), getattr(models, step)

    def exchanged(*arguments: Any) -> Any:
        exchange(folder, other)
        return original(*arguments)

    monkeypatch.setattr(models, step, exchanged)
    with pytest.raises(IncompatibleError, match="changed or replaced .* hash was " + re.escape(str(spec.fingerprint))):
        load_model(spec)


def test_a_model_does_not_look_into_its_files_once_it_is_loaded(tmp_path: Path) -> None:
    model = load_model(resolve_model(str(tiny_model("llama", tmp_path / "model"))))
    before = {name: tensor.clone() for name, tensor in model.causal_lm.state_dict().items()}
    with (tmp_path / "model/model.safetensors").open("r+b") as file:
        file.write(bytes((tmp_path / "model/model.safetensors").stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.causal_lm.state_dict().items())


def test_weights_that_look_into_no_file_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[list[int]] = []
    original = models._own_memory

    def watched(model: torch.nn.Module) -> torch.nn.Module:
        before.append([weight.data_ptr() for weight in model.parameters()])
        return original(model)

    monkeypatch.setattr(models, "_own_memory", watched)
    spec = resolve_model(str(tiny_model("llama", tmp_path / "model")))
    model = load_model(spec, dtype=torch.bfloat16)  # which makes its own memory out of the file's float32
    assert before == [[weight.data_ptr() for weight in model.causal_lm.parameters()]]
