"""The hub, the model card and `residscope convert`; the hub is played by a folder, nothing here needs a network."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from tests.support.faults import files_of, run_and_die
from tests.support.saes import STORE, assert_equal, break_config, make_sae
from train.checkpoint import Checkpoint, save_checkpoint
from train.formats import hub
from train.formats.cli import main
from train.formats.files import read_checkpoint, read_sae, write_sae

ROOT = Path(__file__).parents[3]


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (tmp_path / "none", "nowhere/ckpt.pt"):  # the second is nothing that a hub could have
        with pytest.raises(UsageError, match="no such file or folder"):
            read_sae(name)
    with pytest.raises(IncompatibleError, match="no autoencoder found"):
        read_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    for name in ("sae.safetensors", "sae_weights.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(UsageError, match="contains several"):
        read_sae(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ResidscopeError, match=r"someone/some-model.*the hub cannot be reached") as error:
        read_sae("someone/some-model")
    assert "\n" not in str(error.value)


def fake_hub(monkeypatch: pytest.MonkeyPatch, root: Path, cache: Path) -> list[str]:
    """A hub whose one repository is the folder `root`; what is fetched is copied to `cache` and listed."""
    fetched: list[str] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        from fnmatch import fnmatch

        for path in root.rglob("*"):
            name = path.relative_to(root).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                fetched.append(name)
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                (cache / name).write_bytes(path.read_bytes())
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return fetched


def test_only_the_needed_files_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sae(make_sae(), tmp_path / "repo", "mlsae")
    (tmp_path / "repo" / "big.bin").write_bytes(b"0" * 100)
    fetched = fake_hub(monkeypatch, tmp_path / "repo", tmp_path / "cache")
    sae, origin = read_sae("tim-lawson/mlsae-x")
    assert_equal(sae, make_sae())
    assert sorted(fetched) == ["config.json", "model.safetensors"]
    assert origin.path == "tim-lawson/mlsae-x"


def test_one_hookpoint_of_a_hub_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sae(make_sae(), tmp_path / "repo", "sparsify", hookpoints=["layers.0", "layers.1"])
    fetched = fake_hub(monkeypatch, tmp_path / "repo", tmp_path / "cache")
    with pytest.raises(UsageError, match=r"someone/saes: holds 2 autoencoders.*layers.0, layers.1"):
        read_sae("someone/saes")
    assert sorted(fetched) == ["layers.0/cfg.json", "layers.1/cfg.json"]
    sae, origin = read_sae("someone/saes", subfolder="layers.1")
    assert_equal(sae, make_sae())
    assert (origin.path, origin.store["layers"]) == ("someone/saes/layers.1", [1])
    assert sorted(fetched[2:]) == ["layers.1/cfg.json", "layers.1/sae.safetensors"]
    with pytest.raises(IncompatibleError, match=r"someone/saes/layers.7: no autoencoder found"):
        read_sae("someone/saes", subfolder="layers.7")


def test_a_model_card_states_data_store_and_metrics() -> None:
    sae = make_sae()
    checkpoint = Checkpoint(sae=sae, store=STORE, trainer={"step": 12})
    validation = {"fvu": 0.34567, "fvu_per_layer": [0.1, None, 0.5]}
    card = hub.model_card(checkpoint, {"fvu": 0.3, "l0": 31.5, "vectors": 1000, "validation": validation})
    assert card.startswith("---\nlibrary_name: ")
    for text in (
        'base_model: "EleutherAI/pythia-70m-deduped"',
        "| store content hash | abc123 |",
        "| layers | 0, 1, 2 |",
        "| tuned lens | none |",
        "| validation documents | 0.05 of 40 documents held out, seed 3 |",
        "| vectors trained on | 1000 |",
        "| steps | 12 |",
        "| data set | not recorded |",
        "| expansion factor | 3 |",
        "(lower is better), validation | 0.3457 |",
        "| FVU by layer, validation | 0.100, -, 0.500 |",
    ):
        assert text in card
    assert "Not recorded." in hub.model_card(replace(checkpoint, store={}), {})


def test_a_model_card_takes_no_markup_from_records_or_notes() -> None:
    sae, evil = make_sae(), "a\n---\n# x | <img src=x onerror=alert(1)> [y](http://z.org) `c`\x1b[0m"
    names = ("model", "lens", "dataset", "path", "content_hash")
    store = dict.fromkeys(names, evil) | {"validation": {"fraction": 0.1, "n_documents": evil, "seed": evil}}
    checkpoint = Checkpoint(sae=sae, store=store | {"layers": [evil]}, trainer={"step": evil})
    card = hub.model_card(checkpoint, {"vectors": evil}, notes=[evil], license='a"\nb: c')
    plain = hub.model_card(replace(checkpoint, store={}, trainer={}), {}, notes=["a"], license="a")
    for mark in ("<img", "[y]", "http:", "\n---\n# x", "`c`", "\x1b", "\nb: c", "x |"):
        assert mark not in card.replace(plain, "")
    assert len(card.splitlines()) == len(plain.splitlines())


def test_last_metrics_are_the_last_of_each_split(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.metrics.jsonl"
    assert hub.last_metrics(path) == {}
    lines = [{"step": 1, "fvu": 0.9}, {"step": 1, "fvu": 0.95, "split": "validation"}, {"step": 2, "fvu": 0.5}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "fv')
    assert hub.last_metrics(path) == {"step": 2, "fvu": 0.5, "validation": lines[1]}


class FakeApi:
    """Stands for `huggingface_hub.HfApi`."""

    calls: tuple[dict[str, Any], ...] = ()
    error: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if FakeApi.error:
            raise FakeApi.error
        FakeApi.calls += ({"create": repo_id, **options},)

    def upload_folder(self, **options: Any) -> None:
        FakeApi.calls += (options,)


def test_pushing_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", ())
    with pytest.raises(ResidscopeError, match=r"no .safetensors file to upload"):
        hub.push_to_hub(tmp_path, "me/sae")
    write_sae(make_sae(), tmp_path, "residscope")
    assert hub.push_to_hub(tmp_path, "me/sae", private=True) == "https://huggingface.co/me/sae"
    create, upload = FakeApi.calls
    assert create == {"create": "me/sae", "private": True, "exist_ok": True}
    assert upload["folder_path"] == str(tmp_path)
    assert not any(Path("ckpt.pt").match(pattern) for pattern in upload["allow_patterns"])
    for error in (OSError, Exception):  # a client's connection errors need not be OSError
        monkeypatch.setattr(FakeApi, "error", error("401 Client Error\nmore"))
        with pytest.raises(ResidscopeError, match=r"me/sae: the upload failed: 401 Client Error more$"):
            hub.push_to_hub(tmp_path, "me/sae")


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "ckpt.pt", make_sae(), store=STORE, trainer={"step": 3})
    (tmp_path / "ckpt.metrics.jsonl").write_text(json.dumps({"step": 3, "fvu": 0.25}) + "\n")
    assert main([str(tmp_path / "ckpt.pt"), str(tmp_path / "sp"), "--to", "sparsify"]) == 0
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'sp' / 'sae.safetensors'}" in out
    assert "note: sparsify does not standardise" in err
    card = (tmp_path / "sp" / "README.md").read_text()
    assert "sparsify does not standardise" in card
    assert "| 0.25 |" in card
    assert main([str(tmp_path / "sp"), str(tmp_path / "back"), "--to", "residscope", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["from"], report["to"], report["hub"]) == ("sparsify", "residscope", None)
    back = read_checkpoint(tmp_path / "back" / "ckpt.pt")
    assert_equal(back.sae, make_sae())
    assert back.store == STORE


def test_convert_command_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.pt"), str(tmp_path / "out"), "--to", "mlsae"]) == 2
    write_sae(make_sae(), tmp_path / "a", "mlsae")
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "saelens"]) == 0
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "saelens"]) == 2
    break_config("cfg.json", architecture="gated")(tmp_path / "b")
    assert main([str(tmp_path / "b"), str(tmp_path / "c"), "--to", "mlsae"]) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 3
    with pytest.raises(SystemExit) as error:
        main(["a", "b", "--to", "gguf"])
    assert error.value.code == 2


def test_a_conversion_that_was_killed_is_finished_by_the_same_command(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ckpt.pt", make_sae(), store=STORE, trainer={})
    command = [str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), "--to", "sparsify", "--hookpoints", "a", "b"]
    assert main(command) == 0
    whole, calls, died = files_of(tmp_path / "out"), 0, True
    while died:
        calls += 3
        shutil.rmtree(tmp_path / "out")
        died = run_and_die(lambda: main(command), calls)
        done = (tmp_path / "out").exists() and files_of(tmp_path / "out") == whole
        assert main(command) == (2 if done else 0)
        assert files_of(tmp_path / "out") == whole
    assert calls > 20


@pytest.mark.parametrize("names", [["a", "./a"], ["."], ["README.md"], [".partial"]])
def test_hookpoints_are_folders_side_by_side(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--hookpoints: "):
        write_sae(make_sae(), tmp_path / "out", "saelens", hookpoints=names)
    assert not (tmp_path / "out").exists()


def test_help_is_light() -> None:
    code = (
        "import sys, train.formats.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'safetensors', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.rstrip().endswith("[]")


def test_a_folder_gets_no_second_autoencoder_in_another_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sae(make_sae(), tmp_path / "a", "residscope")
    source, there = str(tmp_path / "a" / "ckpt.pt"), tmp_path / "b"
    assert main([source, str(there), "--to", "saelens"]) == 0
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    assert main([source, str(there), "--to", "sparsify", "--overwrite"]) == 2
    assert "sae_weights.safetensors is there, in another format: choose another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before
    assert main([source, str(there), "--to", "saelens", "--overwrite"]) == 0
    assert main([source, str(tmp_path / "a"), "--to", "saelens"]) == 0  # in place: the source stays
    assert (tmp_path / "a" / "ckpt.pt").exists()
