"""Models by name: blocks by rule, names that resolve and names that do not, random weights, the LM head."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harvest.model import hub
from harvest.model import load as models
from harvest.model.load import find_blocks, load_model, resolve_model
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from tests.harvest.conftest import ModelFolder
from tests.support.models import ARCHITECTURES, D_MODEL, N_LAYERS


def stack(n: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Identity() for _ in range(n)])


def test_the_blocks_are_the_unique_shallowest_list_of_that_length() -> None:
    model = nn.Module()
    model.decoder = nn.Module()
    model.decoder.layers = stack(3)
    model.decoder.layers[0].experts = stack(3)
    model.vision = stack(4)
    assert find_blocks(model, 3) is model.decoder.layers
    assert find_blocks(model, 4) is model.vision


def test_blocks_that_are_missing_or_ambiguous_are_refused() -> None:
    model = nn.Module()
    model.a, model.b = stack(2), stack(2)
    with pytest.raises(ResidscopeError, match="ambiguous: a, b all have 2"):
        find_blocks(model, 2)
    with pytest.raises(ResidscopeError, match=r"no list of 5 .*lists found: a \(2\), b \(2\)"):
        find_blocks(model, 5)


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


def test_the_fingerprint_follows_the_weights_and_not_the_place(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = model_folder("gpt2")
    copy = tmp_path / "other"
    shutil.copytree(folder, copy)
    assert resolve_model(str(copy)).fingerprint == resolve_model(str(folder)).fingerprint
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = resolve_model(str(copy))
    assert changed.fingerprint != resolve_model(str(folder)).fingerprint
    random = resolve_model(str(copy), random_init=True)
    assert random.fingerprint == resolve_model(str(folder), random_init=True).fingerprint


def test_names_that_are_no_models(tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"")
    folder = tmp_path / "weightless"
    shutil.copytree(model_folder("gpt2"), folder)
    (folder / "model.safetensors").unlink()
    wordless = tmp_path / "wordless"
    shutil.copytree(model_folder("gpt2"), wordless, ignore=shutil.ignore_patterns("tokenizer*"))
    cases = {
        "phytia-1b": "did you mean pythia-1b",
        "./nowhere": "no such file or folder",
        "nothing.gguf": "no such file or folder",
        "empty": "no config.json",
        "model.bin": r"should be a \.gguf file",
        "weightless": "no weights",
        "wordless": "no tokenizer",
        "a/b/c": "neither a path that exists nor a hub id",
    }
    for name, message in cases.items():
        kind = IncompatibleError if Path(name).exists() else UsageError
        with pytest.raises(kind, match=message):
            resolve_model(name)
    with pytest.raises(UsageError, match="has no revisions"):
        resolve_model("weightless", revision="main")


def test_weights_that_cannot_be_read_are_one_line(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model_folder("gpt2"), folder)
    (folder / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ResidscopeError, match="broken: its model cannot be loaded") as raised:
        load_model(resolve_model(str(folder)))
    assert "\n" not in str(raised.value)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "no_such_type"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ResidscopeError, match=r"configuration cannot be loaded .*; save or download the model again"):
        load_model(resolve_model(str(folder)))


class FakeApi:
    """Stands for the hub: raises what a test puts in, or answers with a commit."""

    error: Exception | None = None
    asked: tuple[Any, ...] = ()

    def repo_info(self, repo_id: str, *, repo_type: str, revision: str | None, timeout: float) -> Any:
        FakeApi.asked = repo_id, repo_type, revision
        assert timeout <= 10
        if FakeApi.error:
            raise FakeApi.error
        return type("Info", (), {"sha": "c0ffee"})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    import huggingface_hub

    FakeApi.error, FakeApi.asked = None, ()
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    return FakeApi


def test_a_hub_id_is_pinned_to_its_commit(api: type[FakeApi]) -> None:
    spec = resolve_model("pythia-1b", revision="step1000")
    assert api.asked == ("EleutherAI/pythia-1b", "model", "step1000")
    assert (spec.source, spec.location, spec.revision) == ("hub", "EleutherAI/pythia-1b", "c0ffee")
    assert spec.load_arguments == {"revision": "c0ffee", "local_files_only": False, "trust_remote_code": False}


def test_what_the_hub_answers_becomes_one_line(api: type[FakeApi]) -> None:
    from huggingface_hub import errors

    def answer(kind: type[Exception]) -> Exception:
        return kind.__new__(kind)  # Their constructors want a response.

    cases: list[tuple[Exception, type[ResidscopeError], str]] = [
        (answer(errors.RepositoryNotFoundError), UsageError, "the hub has none of this name"),
        (answer(errors.GatedRepoError), ResidscopeError, "is gated: accept its terms"),
        (answer(errors.RevisionNotFoundError), UsageError, "has no revision 'v9'"),
        (
            ConnectionError("no route\nto host"),
            ResidscopeError,
            r"cannot be reached \(no route\) .* local folder or a GGUF",
        ),
    ]
    for error, kind, message in cases:
        api.error = error
        with pytest.raises(kind, match=message) as raised:
            resolve_model("someone/some-model", revision="v9")
        assert "\n" not in str(raised.value)


def test_without_a_network_the_cache_is_used(api: type[FakeApi], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    cached = "/cache/models--a--b/snapshots/abc123/config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **options: cached)
    api.error = ConnectionError("gone")
    spec = resolve_model("a/b")
    assert spec.load_arguments == {"revision": "abc123", "local_files_only": True, "trust_remote_code": False}
    deep = cached.replace("config.json", "lens/a/b/config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **options: deep)
    assert hub.pin("a/b", "space", probes=("lens/a/b/config.json",)).commit == "abc123"


def test_a_text_configuration_inside_another_is_found() -> None:
    import transformers

    config: Any = transformers.Gemma3Config()
    assert models.n_layers_of(config) == config.text_config.num_hidden_layers
    assert models.d_model_of(config) == config.text_config.hidden_size


@pytest.fixture
def gpt2(model_folder: ModelFolder, tmp_path: Path) -> Path:
    """A copy of the tiny GPT-2, to be damaged."""
    return Path(shutil.copytree(model_folder("gpt2"), tmp_path / "copy"))


def test_weights_that_the_files_lack_are_not_made_up(gpt2: Path) -> None:
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps(config | {"n_layer": 5}))
    with pytest.raises(ResidscopeError, match=r"24 weights that its configuration asks for .*transformer\.h\.3\."):
        load_model(resolve_model(str(gpt2)))


def test_a_model_without_its_head_gives_vectors_and_no_logits(gpt2: Path, model_folder: ModelFolder) -> None:
    whole = load_model(resolve_model(str(model_folder("gpt2"))))
    whole.base.save_pretrained(gpt2)
    found = load_model(resolve_model(str(gpt2)))
    ids = torch.arange(9)[None]
    assert torch.equal(found.base(ids).last_hidden_state, whole.base(ids).last_hidden_state)
    with pytest.raises(ResidscopeError, match="has no LM head"):
        found.logits(torch.zeros(1, D_MODEL))
