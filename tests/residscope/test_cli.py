import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import residscope
from residscope.cli import COMMANDS, main
from store.activations import ActivationStore
from tests.support.stores import make_meta, make_store, random_activations, token_table


@pytest.fixture
def path(tmp_path: Path) -> Path:
    store = make_store(
        tmp_path / "a.zarr",
        random_activations(60, 2, 4),
        chunk_tokens=16,
        shard_tokens=32,
        layers=(3, 5),
        provenance={"model": "some/model"},
    )
    return store.path


def test_info(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(path)]) == 0
    words = capsys.readouterr().out
    for part in ("some/model", "60 (56 kept) of 4 documents", "2 of 6, d_model 4", "2 of 2 shards", "whole"):
        assert part in words
    assert main(["info", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    store = ActivationStore.open(path)
    assert found["content_hash"] == store.content_hash
    assert found["layers"] == [3, 5]
    assert (found["n_tokens"], found["n_kept"], found["missing_shards"]) == (60, 56, [])
    np.testing.assert_array_equal(found["layer_norm"], store.statistics().norm)


def test_info_of_a_store_that_lacks_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = make_meta(60, 2, 4, chunk_tokens=16, shard_tokens=32)
    ActivationStore.create(tmp_path / "a.zarr", meta, token_table(60)).close()
    assert main(["info", str(tmp_path / "a.zarr")]) == 0
    assert "2 shards are missing; run the same `harvest`" in capsys.readouterr().out


def test_info_says_which_texts_and_whether_the_weights_are_random(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [{"dataset": "pydoc", "tokens": 1368}, {"dataset": "own.jsonl", "tokens": 132}]
    for name, provenance, words in (
        (
            "a.zarr",
            {"model": "m", "dataset": "pydoc", "sources": sources[:1]},
            ("model      m\n", "text       pydoc\n"),
        ),
        (
            "b.zarr",
            {"model": "m", "random_init": True, "dataset": "pydoc:2 own.jsonl:1", "sources": sources},
            ("m, random weights\n", "text       pydoc (1,368 tokens), own.jsonl (132 tokens)\n"),
        ),
    ):
        make_store(tmp_path / name, random_activations(60, 2, 4), provenance=provenance)
        assert main(["info", str(tmp_path / name)]) == 0
        found = capsys.readouterr().out
        for part in words:
            assert part in found


def test_info_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 3
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err == f"residscope info: error: {tmp_path}: no activation store is there; make one with `harvest`\n"
    for command in (["info"], ["verify"], ["verify", "--repair"]):
        assert main([*command, str(tmp_path / "none")]) == 2
        assert f"{tmp_path}/none: there is no such file or folder" in capsys.readouterr().err


def test_verify(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: whole\n"
    shard = path / "resid_post/c.1.0.0"
    data = bytearray(shard.read_bytes())
    data[300] ^= 4
    shard.write_bytes(data)
    (path / "resid_post/c.0.0.0").unlink()
    assert main(["verify", str(path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "shard 0: resid_post/c.0.0.0: the file is missing",
        "shard 1: resid_post/c.1.0.0: the checksum of token chunk 1 at stored layer 0 does not match",
        f"{path}: 2 faults",
    ]
    assert main(["verify", str(path), "--json"]) == 1
    assert [bad["shard"] for bad in json.loads(capsys.readouterr().out)["bad"]] == [0, 1]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("token_id/c.0", "token_id/c.0: the file is not what was written"),
        ("resid_post/zarr.json", "resid_post/zarr.json: the file is not what was written"),
        ("shard_moments/c.1.0.0.0", "shard 1: shard_moments/c.1.0.0.0: the hash of the file does not match"),
        ("layer_norm/c.0", "layer_norm/c.0: it is not what the shards amount to"),
        ("manifest/0.jsonl", "manifest/0.jsonl line 1: the header is damaged"),
    ],
)
def test_verify_names_the_file(path: Path, file: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((path / file).read_bytes())
    data[3] ^= 1
    (path / file).write_bytes(data)
    assert main(["verify", str(path)]) == 1
    assert message in capsys.readouterr().out.splitlines()


def test_other_commands_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name, (module, _) in COMMANDS.items():
        fake = types.SimpleNamespace(main=lambda argv, name=name: called.append((name, argv)) or 7)
        monkeypatch.setitem(sys.modules, module, fake)
        assert main([name, "--help", "x"]) == 7
    assert called == [(name, ["--help", "x"]) for name in COMMANDS]


@pytest.mark.parametrize("words", [[], ["info"], ["verify"], *([name] for name in COMMANDS)])
def test_every_command_tells_the_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--version"])
    assert ended.value.code == 0
    assert f"(residscope {residscope.__version__})" in capsys.readouterr().out


def test_help_is_light_and_names_every_command() -> None:
    code = (
        "import sys\nfrom residscope.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'numpy', 'zarr', 'torch', 'dask', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert all(name in done.stdout for name in ("info", "verify", *COMMANDS))


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["frobnicate"])
    assert error.value.code == 2
