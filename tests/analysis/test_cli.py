"""`analyze` from the command line: light help, and one clear line with the right exit code for what can go wrong."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from analysis.cli import main
from analysis.config import AnalyzeConfig
from store.activations import ActivationStore
from tests.support.small import Small, make_small
from train.checkpoint import CHECKPOINT_FORMAT
from train.formats.files import write_sae


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    return make_small(tmp_path_factory.mktemp("small"))


def options(small: Small, out, **changes):
    given = {"store": small.store, "sae": small.sae, "out": out} | changes
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def fails(capsys, argv, code, *words):
    """The command ends with `code` and says one line with all of `words`."""
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line]
    assert line.startswith("analyze: error: ")
    for word in words:
        assert word in line, line


def test_help_is_light():
    code = (
        "import sys\nfrom analysis.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'dask', 'zarr', 'numpy', 'numba', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    for flag in ("--store", "--sae", "--out", "--split", "--scheduler", "--n-workers", "--max-tokens", "--json"):
        assert flag in out


def test_sigterm_ends_as_ctrl_c_does(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("analysis.run.analyze", lambda config: signal.raise_signal(signal.SIGTERM))
    fails(capsys, options(small, tmp_path / "out"), 130, "interrupted; run the same command again")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_writes_its_files_and_exits_0(small, tmp_path, capsys):
    assert main([*options(small, tmp_path / "out"), "--json", "--no-report", "--no-pca"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["schema_version"] == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "summary.json",
        "latents.parquet",
        "layers.parquet",
        "redundancy.parquet",
        "examples.parquet",
        "random_examples.parquet",
        "histograms.parquet",
        "analyze.config.toml",
    }


def test_a_missing_store_and_a_folder_that_is_none(small, tmp_path, capsys):
    for store, code, words in (
        (tmp_path / "absent.zarr", 2, "there is no such file"),
        (tmp_path, 3, "not an activation store"),
    ):
        fails(capsys, options(small, tmp_path / "out", store=store), code, str(store), words, "harvest")


def test_a_store_that_lacks_shards(tmp_path, capsys):
    small = make_small(tmp_path)
    manifest = small.store / "manifest" / "0.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:-2]))
    fails(capsys, options(small, tmp_path / "out"), 3, "2 of 7 shards are missing", "harvest")


def test_a_store_with_a_flipped_byte_is_refused_and_not_tried_again(tmp_path, capsys):
    small = make_small(tmp_path)
    (shard, *_) = sorted((small.store / "resid_post").glob("c*"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    fails(capsys, options(small, tmp_path / "out"), 3, str(small.store), "checksum of token chunk 0")
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_missing_checkpoint(small, tmp_path, capsys):
    fails(capsys, options(small, tmp_path / "out", sae=tmp_path / "no.pt"), 2, "no.pt: no such file", "checkpoint")


def test_a_pickle_with_code_is_refused(small, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"format": CHECKPOINT_FORMAT, "config": Evil(), "state_dict": {}}, tmp_path / "evil.pt")
    fails(capsys, options(small, tmp_path / "out", sae=tmp_path / "evil.pt"), 3, "evil.pt: refused")
    assert not (tmp_path / "ran").exists()


def test_a_store_of_another_width(small, tmp_path, capsys):
    other = make_small(tmp_path, d_model=8)
    fails(capsys, options(small, tmp_path / "out", store=other.store), 3, "d_model should be 12", "found 8")


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        ({"model": "EleutherAI/pythia-70m"}, ["model should be EleutherAI/pythia-70m", "found test"]),
        ({"lens": {"id": "some/lens", "hash": "ab"}}, ["lens should be", "some/lens", "found none"]),
        ({"layers": [2, 4, 9]}, ["layers [2, 4, 9]", "does not have layers [4, 9]"]),
    ],
)
def test_a_checkpoint_of_another_model_lens_or_layers(tmp_path, capsys, recorded, words):
    small = make_small(tmp_path, trained_on=recorded)
    fails(capsys, options(small, tmp_path / "out"), 3, "ckpt.pt does not fit", *words)


@pytest.mark.parametrize(("recorded", "found"), [(False, "drawn at random"), (True, "those of the trained model")])
def test_a_checkpoint_of_a_trained_model_on_a_random_one_and_the_reverse(small, tmp_path, capsys, recorded, found):
    provenance = {"model": "test", "random_init": not recorded}
    other = make_small(tmp_path, n_tokens=200, trained_on={"random_init": recorded}, provenance=provenance)
    fails(capsys, options(other, tmp_path / "out"), 3, "does not fit", "the weights should be", f"found {found}")


def test_a_checkpoint_that_does_not_say_is_warned_of_on_a_random_model(small, tmp_path, capsys):
    other = make_small(tmp_path, n_tokens=200, provenance={"model": "test", "random_init": True})
    assert main([*options(other, tmp_path / "out", sae=small.sae), "--no-report"]) == 0
    assert "does not record" in capsys.readouterr().out
    assert "random weights" in " ".join(json.loads((tmp_path / "out" / "summary.json").read_text())["warnings"])
    assert main([*options(other, tmp_path / "own"), "--no-report"]) == 0  # its own store: no doubt
    assert "random weights" not in " ".join(json.loads((tmp_path / "own" / "summary.json").read_text())["warnings"])


@pytest.mark.parametrize("format_", ["mlsae", "saelens", "sparsify"])
def test_autoencoders_in_other_formats_give_the_same_numbers(small, tmp_path, capsys, format_):
    write_sae(small.weights, tmp_path / "sae", format_)
    found = []
    for name, sae in (("own", small.sae), ("other", tmp_path / "sae")):
        assert main([*options(small, tmp_path / name, sae=sae), "--no-report"]) == 0
        found.append(json.loads((tmp_path / name / "summary.json").read_text()))
    assert found[1]["variance"]["mass"]["total"] == pytest.approx(found[0]["variance"]["mass"]["total"], rel=1e-6)
    assert found[1]["split"]["trained_on"] == "unknown"
    capsys.readouterr()


def test_an_empty_split(tmp_path, capsys):
    small = make_small(tmp_path, trained_on={"validation": None})
    fails(capsys, options(small, tmp_path / "out", split="validation"), 3, "validation split", "--validation-fraction")


def test_a_scheduler_that_does_not_answer(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("residscope.cluster.CONNECT_SECONDS", 1)
    fails(capsys, options(small, tmp_path / "out", scheduler="tcp://127.0.0.1:9"), 1, "no Dask scheduler answers")
    fails(capsys, options(small, tmp_path / "out", scheduler="cluster"), 2, "--scheduler should be")


def test_an_out_that_cannot_be_a_folder(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fails(capsys, options(small, tmp_path / "file"), 2, "should be a folder")
    fails(capsys, options(small, tmp_path / "file" / "deeper"), 2, "is a file")


@pytest.mark.parametrize("flag", ["max-tokens", "n-workers"])
def test_numbers_below_one(small, tmp_path, capsys, flag):
    fails(capsys, [*options(small, tmp_path / "out"), f"--{flag}", "0"], 2, f"--{flag} should be at least 1")


def test_a_store_that_was_made_anew_while_a_worker_looks_is_refused(small):
    from analysis.config import StatisticsOptions, TokenOptions
    from analysis.inputs import TaskSpec, open_data
    from residscope.errors import IncompatibleError

    store = ActivationStore.open(small.store)
    spec = TaskSpec(
        store=str(small.store),
        content_hash="of another store",
        sae=str(small.sae),
        sae_hash="",
        layers=tuple(range(store.meta.n_layers)),
        tokens=TokenOptions(),
        statistics=StatisticsOptions(),
        validation=(),
        pca=False,
    )
    with pytest.raises(IncompatibleError, match="content hash should be of another store"):
        open_data(spec)


def test_a_full_disk_is_said_with_the_folder_whatever_library_met_it(small, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: no room")  # as pyarrow says it: no file name

    monkeypatch.setattr("analysis.results.write.write_latents", full)
    flags = ["--no-report", "--downstream-tokens", "0", "--no-latent-logits"]
    argv = [*options(small, tmp_path / "out"), *flags]
    fails(capsys, argv, 1, f"No space left on device: {tmp_path / 'out'}. Free some space, then run the same command")


def test_no_command_writes_into_a_store(small, tmp_path, capsys):
    import harvest.cli
    import harvest.lens.cli
    import train.cli
    import train.formats.cli

    before = {path: path.read_bytes() for path in small.store.rglob("*") if path.is_file()}
    store, sae, inside = str(small.store), str(small.sae), str(small.store / "x")
    (tmp_path / "text.txt").write_text("text")
    text = ["--model", "gpt2", "--dataset", str(tmp_path / "text.txt")]
    commands = [
        *((main, ["--store", store, "--sae", sae, "--out", out]) for out in (store, inside)),
        (main, ["--store", store, "--sae", sae, "--performance-report", inside]),
        (main, ["--compare", str(tmp_path), str(tmp_path), "--out", inside]),
        *((train.cli.main, ["--store", store, "--out", out, "--resume"]) for out in (store, inside)),
        (train.cli.main, ["--store", store, "--out", store, "--sweep", "k=1,2"]),
        (train.cli.main, ["compare", "--store", store, "--sae", sae, "--out", store]),
        (train.formats.cli.main, [sae, inside, "--to", "mlsae"]),
        (harvest.cli.main, [*text, "--out", inside]),
        (harvest.lens.cli.main, [*text, "--out", inside]),
    ]
    for command, argv in commands:
        assert command(argv) == 2, argv
        error = capsys.readouterr().err
        assert "activation store" in error, error
        assert "choose a path outside it" in error
    assert {path: path.read_bytes() for path in small.store.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("sae", "folder"), [(".", "{}.analysis"), ("..", "{}.analysis"), ("a", "a.analysis")])
def test_the_default_folder_of_a_folder_however_it_is_called(
    sae: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    found = AnalyzeConfig(store=Path("acts.zarr"), sae=Path(sae)).out_dir
    assert found.name == folder.format(Path(sae).resolve().name)
    assert found.absolute().parent == Path(sae).resolve().parent
