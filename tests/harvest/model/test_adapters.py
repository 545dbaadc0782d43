"""Adapters: applied and recorded where peft is installed, refused by name where it is not. A stand-in of a few lines
for peft adds the adapter's tensors to the weights of their names."""

import importlib.machinery
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import import_utils

from harvest.model import names
from harvest.model.hub import HubRepo
from harvest.model.load import load_model
from harvest.model.names import resolve_model
from harvest.run import harvest
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from store.activations import ActivationStore
from tests.support.harvesting import MakeConfig, ModelFolder

CHANGED = "transformer.h.1.mlp.c_fc.weight"


class Wrapped:
    """Stands for PeftModel."""

    def __init__(self, model: Any, config: Any) -> None:
        self._model = model
        self.base_model = SimpleNamespace() if config.peft_type == "PROMPT_TUNING" else self

    def load_adapter(self, location: str, name: str, torch_device: str, **options: Any) -> Any:
        assert (name, torch_device) == ("default", "cpu")
        found, weights = load_file(Path(location) / "adapter_model.safetensors"), dict(self._model.named_parameters())
        for key in found.keys() & weights.keys():
            weights[key].data += found[key]
        return SimpleNamespace(
            missing_keys=[] if CHANGED in found else [CHANGED], unexpected_keys=found.keys() - weights
        )

    def merge_and_unload(self) -> Any:
        return self._model


@pytest.fixture
def peft(monkeypatch: pytest.MonkeyPatch) -> None:
    import_utils.is_peft_available()  # It keeps its answer, which the stand-in must not change.
    module: Any = ModuleType("peft")
    module.__spec__ = importlib.machinery.ModuleSpec("peft", None)
    module.PeftModel = Wrapped
    module.PeftConfig = SimpleNamespace(
        from_pretrained=lambda location, **_: SimpleNamespace(
            **json.loads((Path(location) / "adapter_config.json").read_text())
        )
    )
    monkeypatch.setitem(sys.modules, "peft", module)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9" if name == "peft" else version(name))


@pytest.fixture
def both(model_folder: ModelFolder, tmp_path: Path) -> Path:
    """The tiny GPT-2 with an adapter that adds one to a weight."""
    return with_adapter(Path(shutil.copytree(model_folder("gpt2"), tmp_path / "both")))


def with_adapter(folder: Path, base: str = "nowhere/at-all", kind: str = "LORA", name: str = CHANGED) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": kind, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: torch.ones(32, 128)}, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def weight(folder: Path, **options: Any) -> torch.Tensor:
    model = load_model(resolve_model(str(folder), **options))
    return model.causal_lm.get_parameter(CHANGED)


@pytest.mark.usefixtures("peft")
def test_an_adapter_beside_the_weights_is_applied_and_recorded(
    both: Path,
    model_folder: ModelFolder,
    config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert torch.equal(weight(both), weight(model_folder("gpt2")) + 1)
    assert torch.equal(weight(both, random_init=True), weight(model_folder("gpt2"), random_init=True))
    made = config(model=str(both))
    harvest(made)
    provenance = ActivationStore.open(made.out).meta.provenance
    assert provenance["adapter"] == provenance["config"]["adapter"] == "LORA, peft 0.9"
    monkeypatch.setattr("harvest.model.adapters.importlib.metadata.version", lambda _: "0.10")
    harvest(made)  # an upgrade of peft is told, and no reason to refuse
    assert "begun with the adapter LORA, peft 0.9, now LORA, peft 0.10: the new shards" in capsys.readouterr().err
    before = resolve_model(str(both)).fingerprint
    save_file({CHANGED: torch.zeros(32, 128)}, both / "adapter_model.safetensors", {"format": "pt"})
    assert resolve_model(str(both)).fingerprint != before
    with pytest.raises(IncompatibleError, match="made with other options: the content of --model"):
        harvest(made)


@pytest.mark.usefixtures("peft")
def test_an_adapter_alone_is_loaded_through_its_base(both: Path, model_folder: ModelFolder, tmp_path: Path) -> None:
    alone = with_adapter(tmp_path / "alone", str(model_folder("gpt2")))
    assert torch.equal(weight(alone), weight(both))
    before = resolve_model(str(alone)).fingerprint
    other = Path(shutil.copytree(model_folder("gpt2"), tmp_path / "other"))
    (other / "generation_config.json").write_text("{}")
    assert resolve_model(str(with_adapter(alone, str(other)))).fingerprint != before  # that of its base counts
    for base, kind, message in (
        (
            str(tmp_path / "gone"),
            UsageError,
            "alone is only an adapter, .*gone: there is no such file or folder.* put",
        ),
        ("", UsageError, r"\(adapter_config.json has no base_model_name_or_path\); put .* give that folder"),
        (str(alone), IncompatibleError, "has an adapter too, but only one can be applied"),
        (str(both), IncompatibleError, "has an adapter too, but only one can be applied"),
    ):
        with pytest.raises(kind, match=message):
            resolve_model(str(with_adapter(alone, base)))


@pytest.mark.usefixtures("peft")
def test_an_adapter_of_the_hub_is_loaded_through_its_base(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    alone = with_adapter(tmp_path / "alone", str(model_folder("gpt2")))
    files = ("README.md", "adapter_config.json", "adapter_model.safetensors")
    monkeypatch.setattr(names, "pin", lambda *_, **__: HubRepo("c0ffee", False, files))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **_: str(alone / name))
    spec = resolve_model("someone/lora")
    assert spec.base is not None
    assert (spec.revision, spec.adapter, spec.base.location) == ("c0ffee", "LORA, peft 0.9", str(model_folder("gpt2")))
    assert not spec.own_tokenizer


@pytest.mark.usefixtures("peft")
def test_an_adapter_that_does_not_fit_is_refused(both: Path) -> None:
    with_adapter(both, name="transformer.h.9.weight")
    with pytest.raises(
        IncompatibleError, match=r"both: 1 weights are missing from its adapter's files, such as .*c_fc"
    ):
        load_model(resolve_model(str(both)))
    with_adapter(both)
    tensors = load_file(both / "adapter_model.safetensors")
    save_file({**tensors, "more": torch.zeros(1)}, both / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(IncompatibleError, match="both: 1 weights are not used of its adapter's files, such as more"):
        load_model(resolve_model(str(both)))
    with pytest.raises(IncompatibleError, match="merged into the weights, such as LORA, found PROMPT_TUNING"):
        load_model(resolve_model(str(with_adapter(both, kind="PROMPT_TUNING"))))
    for bad in ("{", "[]", "{}", "[" * 200_000):
        (both / "adapter_config.json").write_text(bad)
        with pytest.raises(IncompatibleError, match=r"adapter_config\.json is not an adapter's configuration"):
            resolve_model(str(both))


def test_without_peft_an_adapter_is_refused_by_name(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        ResidscopeError, match=r"both: it has an adapter \(adapter_config.json, LORA\).*`pip install peft`"
    ):
        resolve_model(str(both))
    assert resolve_model(str(both), random_init=True).adapter is None
