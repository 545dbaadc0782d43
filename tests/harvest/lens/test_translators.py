"""Tuned lens: which translator a block's output takes, the inverse, and the published format."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harvest.lens import translators
from harvest.lens.translators import TunedLens, load_lens
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from tests.support.lenses import write_lens

N_LAYERS, D_MODEL = 4, 8


def load(folder: Path, **changes: Any) -> TunedLens:
    return load_lens(str(folder), **{"model_id": "owner/tiny", "n_layers": N_LAYERS, "d_model": D_MODEL, **changes})


def test_the_next_translator_is_applied_and_the_last_block_takes_none(tmp_path: Path) -> None:
    folder = write_lens(tmp_path / "lens")
    lens = load(folder)
    parameters = torch.load(folder / "params.pt", weights_only=True)
    x = torch.randn(3, 5, D_MODEL)
    for layer in range(N_LAYERS - 1):
        weight, bias = parameters[f"{layer + 1}.weight"], parameters[f"{layer + 1}.bias"]
        torch.testing.assert_close(lens.apply(x, layer), x + torch.einsum("de,nte->ntd", weight, x) + bias)
    assert torch.equal(lens.apply(x, N_LAYERS - 1), x)
    assert [lens.translator(i) for i in range(N_LAYERS)] == [1, 2, 3, None]


def test_compatible_indexing_is_the_references(tmp_path: Path) -> None:
    lens = load(write_lens(tmp_path / "lens"), indexing="mlsae-compat")
    assert [lens.translator(i) for i in range(N_LAYERS)] == [0, 1, 2, 3]
    assert lens.describe()["indexing"] == "mlsae-compat"


@pytest.mark.parametrize("indexing", ["tuned-lens", "mlsae-compat"])
def test_the_inverse_gives_the_vectors_back(tmp_path: Path, indexing: str) -> None:
    lens = load(write_lens(tmp_path / "lens"), indexing=indexing)
    x = torch.randn(3, 5, D_MODEL)
    for layer in range(N_LAYERS):
        torch.testing.assert_close(lens.invert(lens.apply(x, layer), layer), x, rtol=1e-5, atol=1e-6)


def test_a_translator_without_an_inverse_is_named(tmp_path: Path) -> None:
    lens = load(write_lens(tmp_path / "lens"))
    lens.weights[2] = -torch.eye(D_MODEL)
    with pytest.raises(ResidscopeError, match=r"translator 2 cannot be inverted .* Fit one"):
        lens.invert(torch.zeros(1, D_MODEL), 1)


def test_the_hash_follows_the_contents(tmp_path: Path) -> None:
    first, same = load(write_lens(tmp_path / "a")), load(write_lens(tmp_path / "b"))
    assert first.fingerprint == same.fingerprint
    assert first.fingerprint != load(write_lens(tmp_path / "c", seed=1)).fingerprint


def test_a_lens_without_biases(tmp_path: Path) -> None:
    folder = write_lens(tmp_path / "lens", bias=False)
    assert torch.equal(load(folder).biases, torch.zeros(N_LAYERS, D_MODEL))


def test_lenses_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_lens(tmp_path / "lens")
    with pytest.raises(IncompatibleError, match="is for 4 layers and d_model 8, the model has 5 and 8"):
        load(folder, n_layers=5)
    with pytest.raises(IncompatibleError, match="d_model 8, the model has 4 and 9"):
        load(folder, d_model=9)
    with pytest.raises(UsageError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(IncompatibleError, match=r"no config\.json"):
        load(tmp_path / "empty")


class Exploit:
    """Runs code when it is unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_parameters_that_are_code_or_missing_are_refused(tmp_path: Path) -> None:
    folder = write_lens(tmp_path / "lens")
    torch.save({"0.weight": Exploit(tmp_path / "ran")}, folder / "params.pt")
    with pytest.raises(IncompatibleError, match=r"params\.pt: refused: .*could run code"):
        load(folder)
    assert not (tmp_path / "ran").exists()
    torch.save({"0.weight": torch.zeros(2, 2)}, folder / "params.pt")
    with pytest.raises(IncompatibleError, match=r"hold '0\.weight' of shape \(8, 8\), found \(2, 2\)"):
        load(folder)
    for content in ("{}", "[]", '{"num_hidden_layers": Infinity, "d_model": 8}', "[" * 10**5):
        (folder / "config.json").write_text(content)
        with pytest.raises(IncompatibleError, match="should name num_hidden_layers"):
            load(folder)


def test_a_lens_from_the_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    from harvest.lens import translators as module
    from harvest.model.hub import HubRepo

    folder = write_lens(tmp_path / "lens")
    asked: list[str] = []

    def download(space: str, file: str, **options: Any) -> str:
        asked.append(file)
        assert (space, options["repo_type"], options["revision"]) == (module.SPACE, "space", "c0ffee")
        if not file.startswith("lens/gpt2/"):
            raise EntryNotFoundError(file)
        return str(folder / Path(file).name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(module, "pin", lambda *args, **options: HubRepo("c0ffee", False))
    sizes: dict[str, Any] = {"n_layers": N_LAYERS, "d_model": D_MODEL}
    assert load_lens("auto", model_id="openai-community/gpt2", **sizes).name == "openai-community/gpt2"
    assert asked[0] == "lens/openai-community/gpt2/config.json"
    assert load_lens("gpt2", model_id="x/y", **sizes).fingerprint
    with pytest.raises(UsageError, match=r"no folder here, and no published lens for 'EleutherAI/pythia-1b'.*Fit one"):
        load_lens("pythia-1b", model_id="x/y", **sizes)


def test_damage_that_leaves_the_shapes_right_is_found(tmp_path: Path) -> None:
    folder = write_lens(tmp_path / "lens")
    file = folder / "params.pt"
    data = bytearray(file.read_bytes())
    parameters = torch.load(file, weights_only=True)
    at = data.index(parameters["1.weight"].numpy().tobytes()) + 9
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(IncompatibleError, match=r"params.pt: cannot be read .*Bad CRC-32"):
        load(folder)
    sparse = parameters["0.weight"].to_sparse()
    for weight, said in ((sparse, "rebuild_sparse"), (torch.ones(8, 8).long(), "should hold floats, found int64")):
        torch.save({**parameters, "0.weight": weight}, file)
        with pytest.raises(IncompatibleError, match=said):
            load(folder)


@pytest.mark.parametrize("file", ["params.pt", "config.json"])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, file: str) -> None:
    folder = write_lens(tmp_path / "lens")
    data = (folder / file).read_bytes()
    for n in range(0, len(data), len(data) // 30):
        (folder / file).write_bytes(data[:n])
        with pytest.raises(IncompatibleError, match=f"lens lens: {file}"):
            load(folder)


def test_what_is_no_lens_folder_is_said(tmp_path: Path) -> None:
    folder = write_lens(tmp_path / "lens", base_model_name_or_path=5)
    with pytest.raises(IncompatibleError, match="the base model should be a name, found 5"):
        load(folder)
    with pytest.raises(IncompatibleError, match=r"params\.pt is a file: give the folder"):
        load(folder / "params.pt")


def test_a_lens_that_is_exchanged_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = write_lens(tmp_path / "lens"), write_lens(tmp_path / "other", seed=1)
    read = translators.load_tensors

    def exchanged(*arguments: Any) -> Any:
        folder.rename(tmp_path / "away")
        other.rename(folder)
        return read(*arguments)

    monkeypatch.setattr(translators, "load_tensors", exchanged)
    with pytest.raises(IncompatibleError, match="its files were changed while they were read"):
        load_lens(str(folder), model_id="owner/tiny", n_layers=4, d_model=8)
