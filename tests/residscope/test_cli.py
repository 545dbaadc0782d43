import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import residscope
from residscope.cli import COMMANDS, main


def test_info_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 3
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err == f"residscope info: error: {tmp_path} is not an activation store; make one with `harvest`\n"
    for command in (["info"], ["verify"], ["verify", "--repair"]):
        assert main([*command, str(tmp_path / "none")]) == 2
        assert f"{tmp_path}/none: there is no such file or folder" in capsys.readouterr().err


def test_verify(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: complete\n"
    shard = path / "resid_post/c.1.0.0"
    data = bytearray(shard.read_bytes())
    data[300] ^= 4
    shard.write_bytes(data)
    (path / "resid_post/c.0.0.0").unlink()
    assert main(["verify", str(path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "shard 0: resid_post/c.0.0.0: the shard is missing",
        "shard 1: resid_post/c.1.0.0: the checksum of token chunk 1 at stored layer 0 does not match",
        f"{path}: 2 faults",
    ]
    assert main(["verify", str(path), "--json"]) == 1
    assert [bad["shard"] for bad in json.loads(capsys.readouterr().out)["bad"]] == [0, 1]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("token_id/c.0", "token_id/c.0: the file was changed after it was written"),
        ("resid_post/zarr.json", "resid_post/zarr.json: the file was changed after it was written"),
        ("shard_moments/c.1.0.0.0", "shard 1: shard_moments/c.1.0.0.0: its checksum does not match"),
        ("layer_norm/c.0", "layer_norm/c.0: its numbers do not match the shards"),
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
