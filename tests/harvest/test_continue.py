"""Continuing a run: the same bytes whatever stopped it, nothing done twice, and no mixing of configurations."""

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from harvest import run
from harvest.model.hub import HubRepo
from harvest.model.load import load_model
from harvest.model.names import resolve_model
from harvest.options_file import options_file
from harvest.record import make_record
from harvest.refill import prepare
from harvest.run import harvest
from residscope.commands.info import facts, in_words
from residscope.errors import IncompatibleError, Interrupted, ResidscopeError
from residscope.options import to_flat
from store.activations import ActivationStore
from store.care.repair import repair
from store.care.verify import verify
from store.shards import shard_name
from tests.support.harvesting import MakeConfig, ModelFolder, crash_after, tree
from tests.support.lenses import write_lens
from tests.support.models import D_MODEL, tiny_model


@pytest.mark.usefixtures("small_shards")
def test_a_run_that_crashed_continues_to_the_same_bytes(config: MakeConfig, tmp_path: Path) -> None:
    whole = harvest(config(out=tmp_path / "whole.zarr"))
    for n in range(whole.shards):
        options = config(out=tmp_path / f"crashed{n}.zarr")
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, n)
            with pytest.raises(RuntimeError, match="crash"):
                harvest(options)
        assert len(ActivationStore.open(options.out, partial=True).missing_shards()) == whole.shards - n
        again = harvest(options)
        assert again.shards_written == whole.shards - n
        assert again.content_hash == whole.content_hash
        assert tree(options.out) == tree(Path(whole.out))


@pytest.mark.usefixtures("small_shards")
def test_continuing_reads_no_text_and_a_whole_store_loads_no_model(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config()
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 2)
        with pytest.raises(RuntimeError, match="crash"):
            harvest(options)

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(run, "make_table", never)
    harvest(options)
    before = tree(options.out)
    monkeypatch.setattr(run, "load_weights", never)
    result = harvest(options)
    assert result.shards_written == 0
    assert result.tokens_per_second is None
    assert tree(options.out) == before


@pytest.mark.usefixtures("small_shards")
def test_a_hub_data_set_is_not_asked_for_again(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: iter([{"text": "abc" * 100}] * 2))
    monkeypatch.setattr("harvest.text.sources.pin", lambda *args, **options: HubRepo("c0ffee", False))
    for name in ("owner/name", "wikitext"):
        options = config(dataset=name, out=config().out.with_name(name.replace("/", "-")))
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, 1)
            with pytest.raises(RuntimeError, match="crash"):
                harvest(options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("harvest.text.sources.pin", None)
            assert harvest(options).tokens == 602
        assert ActivationStore.open(options.out).meta.provenance["dataset_revision"] == "c0ffee"


@pytest.mark.usefixtures("small_shards")
def test_a_shard_whose_file_is_gone_is_no_whole_store(config: MakeConfig) -> None:
    made = config()
    harvest(made)
    file = made.out / shard_name(1)
    whole = file.read_bytes()
    for damage in (file.unlink, lambda: file.write_bytes(whole[:-1])):
        damage()
        with pytest.raises(IncompatibleError, match="the files of 1 shard are gone or cut off, the first of shard 1: "):
            harvest(made)
        assert "files of 1 shard are gone" in in_words(facts(made.out))["state"]
    file.write_bytes(whole)
    harvest(made)


@pytest.mark.usefixtures("small_shards")
def test_only_batches_of_missing_shards_are_computed(config: MakeConfig) -> None:
    options = config()
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 5)
        with pytest.raises(RuntimeError, match="crash"):
            harvest(options)
    seen: list[int] = []
    original = run.BatchRunner.run

    def counting(self: Any, ids: Any, *args: Any) -> bool:
        seen.append(ids.numel())
        return original(self, ids, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.BatchRunner, "run", counting)
        result = harvest(options)
    # Shards 5 and 6 are tokens 480 to 591; batches of 60 tokens.
    assert result.shards_written == 2
    assert sum(seen) == 591 - 480


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_tokens": 100}, "--max-tokens is 1000000 there and 100 here"),
        ({"batch_size": 2}, "--batch-size is 3 there and 2 here"),
        ({"layers": ("0",)}, r"--layers is \[0, 1, 2\] there and \[0\] here"),
        ({"store_dtype": "float32"}, "--store-dtype is 'bfloat16' there and 'float32' here"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' there"),
        ({"context_length": 10}, "--context-length is 20 there"),
        ({"random_init": True}, "--random-init is False there and True here"),
        ({"document_separator": ""}, "--document-separator is '<|endoftext|>' there and '' here"),
        ({"keep_first_position": True}, "--keep-first-position"),
        ({"pack": False}, "--document-separator is|--pack is True there and False here"),
        ({"shuffle_documents": 3}, "--shuffle-documents is not given there and 3 here"),
        (
            {"dataset": ("pydoc:2", "stdlib")},
            r"--dataset is 'texts' there and \['pydoc', 'stdlib'\]",
        ),
        ({"codec": "zstd", "seed": 3}, "--seed is 0 there and 3 here; --codec is 'none' there and 'zstd' here"),
    ],
)
def test_another_configuration_is_refused_by_name(config: MakeConfig, change: dict[str, Any], field: str) -> None:
    harvest(config())
    before = tree(config().out)
    with pytest.raises(IncompatibleError, match=f"{field}.*--overwrite"):
        harvest(config(**change))
    assert tree(config().out) == before


def test_every_flag_is_recorded_or_known_to_leave_the_bytes_as_they_are(config: MakeConfig) -> None:
    """So that no run continues a store that was begun with another value: a new flag that the bytes depend on goes into
    `make_record`, with what older stores were made with in `_VALUES_BEFORE`; any other goes into the list here."""
    no_part = {
        *("out", "overwrite", "dry_run", "json"),
        *("device", "device_map", "n_workers", "scheduler"),
        *("revision", "rolling"),  # that of the model has another name there, a rolling store's size is there if given
    }
    given = config(mask_norm=5)
    record = ActivationStore.open(harvest(given).out).meta.provenance["config"]
    assert set(to_flat(given)) - set(record) == no_part


def test_changed_text_or_another_model_is_refused(
    config: MakeConfig, text_folder: Path, model_folder: ModelFolder
) -> None:
    harvest(config())
    with pytest.raises(IncompatibleError, match="--model is 'gpt2' there and 'llama' here; the content of --model"):
        harvest(config("llama"))
    (text_folder / "0.txt").write_text("changed")
    with pytest.raises(IncompatibleError, match="the revision or hash of --dataset is"):
        harvest(config())


@pytest.mark.usefixtures("small_shards")
def test_a_model_and_a_lens_that_were_renamed_go_on(
    config: MakeConfig, model_folder: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their hashes say what they are; the store keeps the names that it had, so that its bytes are the same."""
    lens = write_lens(tmp_path / "lens", n_layers=3, d_model=D_MODEL)
    model = Path(shutil.copytree(model_folder("gpt2"), tmp_path / "model"))
    whole = harvest(config(model=str(model), lens=str(lens), out=tmp_path / "whole.zarr"))
    options = config(model=str(model), lens=str(lens))
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 2)
        with pytest.raises(RuntimeError, match="crash"):
            harvest(options)
    moved = tmp_path / "elsewhere" / "my-gpt2"
    moved.parent.mkdir()
    model.rename(moved)
    lens = lens.rename(tmp_path / "fitted")
    capsys.readouterr()
    again = harvest(config(model=str(moved), lens=str(lens)))
    said = capsys.readouterr().err
    for kind, now, before in (("model", "my-gpt2", "model"), ("lens", "fitted", "lens")):
        assert f"the {kind} '{now}' is called '{before}' in {options.out}, which keeps that name" in said
    assert (again.model, again.content_hash) == ("model", whole.content_hash)
    assert tree(options.out) == tree(Path(whole.out))
    assert str(moved) in options_file(options.out).read_text(), "where a repair will look"
    with pytest.raises(IncompatibleError, match="--max-tokens is 1000000 there and 100 here") as caught:
        harvest(config(model=str(moved), lens=str(lens), max_tokens=100))
    assert "model is" not in str(caught.value), "what does not stand in the way is not named"


def test_a_byte_of_the_weights_that_changed_in_between_is_found(
    config: MakeConfig, model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder("gpt2"), tmp_path / "model"))
    harvest(config(model=str(folder)))
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(IncompatibleError, match="weights: one of these files was changed"):
        harvest(config(model=str(folder)))


def test_a_link_to_a_store_stays_a_link_and_one_to_nothing_gets_its_store(config: MakeConfig, tmp_path: Path) -> None:
    link = tmp_path / "link.zarr"
    link.symlink_to("target.zarr")
    harvest(config(out=link))
    whole = tree(tmp_path / "target.zarr")
    harvest(config(out=link, max_tokens=100, overwrite=True))
    assert ActivationStore.open(tmp_path / "target.zarr").meta.n_tokens == 100
    harvest(config(out=link, overwrite=True))
    assert link.is_symlink()
    assert tree(tmp_path / "target.zarr") == whole
    assert not list(tmp_path.glob("*.planning"))


def test_overwrite_starts_anew_but_only_over_a_store(config: MakeConfig, tmp_path: Path) -> None:
    harvest(config())
    result = harvest(config(max_tokens=100, overwrite=True))
    assert result.tokens == 100
    assert [path.name for path in tmp_path.iterdir() if "planning" in path.name] == []
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("words")
    with pytest.raises(IncompatibleError, match="not an activation store and will not be overwritten"):
        harvest(config(out=other, overwrite=True))
    assert (other / "thesis.txt").exists()


@pytest.mark.usefixtures("small_shards")
def test_a_signal_gives_up_the_batch_in_flight(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = harvest(config(out=tmp_path / "whole.zarr"))
    original = run.BatchRunner.run
    for signum in (signal.SIGINT, signal.SIGTERM):
        options = config(out=tmp_path / f"{signum.name}.zarr")
        calls: list[int] = []

        def interrupted(self: Any, *args: Any, calls: list[int] = calls, signum: int = signum) -> bool:
            calls.append(1)
            if len(calls) == 4:
                os.kill(os.getpid(), signum)
            return original(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.BatchRunner, "run", interrupted)
            with pytest.raises(Interrupted, match=r"1 of 7 shards complete; run the same command to continue"):
                harvest(options)
        assert len(calls) == 4
        harvest(options)
        assert tree(options.out) == tree(Path(whole.out))


def test_a_second_writer_is_refused(config: MakeConfig) -> None:
    options = config()
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 0)
        with pytest.raises(RuntimeError):
            harvest(options)
    with ActivationStore.open(options.out, writable=True), pytest.raises(ResidscopeError, match="another process"):
        harvest(options)


def test_a_store_that_is_continued_keeps_its_batch_size(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(batch_size=None)
    harvest(options)
    before = ActivationStore.open(options.out).meta.provenance["config"]["batch_size"]
    monkeypatch.setattr("harvest.settings.default_batch_size", lambda *sizes: 77)
    assert before == 1024 // 20
    assert harvest(options).shards_written == 0


def test_shuffled_documents_are_the_same_ones(config: MakeConfig, tmp_path: Path) -> None:
    def documents(**changes: Any) -> list[tuple[int, ...]]:
        tokens = ActivationStore.open(harvest(config(out=tmp_path / f"{len(changes)}.zarr", **changes)).out).tokens
        return [tuple(tokens.token_id[tokens.document == d].tolist()) for d in range(int(tokens.document.max()) + 1)]

    plain, mixed = documents(), documents(shuffle_documents=1)
    assert sorted(plain) == sorted(mixed)
    assert plain != mixed


@pytest.mark.usefixtures("small_shards")
def test_a_store_from_before_an_option_existed_is_continued_and_repaired(config: MakeConfig) -> None:
    def as_before(*given: Any) -> dict[str, Any]:
        later = ("dataset_weights", "shuffle_documents", "pack")
        return {name: value for name, value in make_record(*given).items() if name not in later}

    options = config()
    toml = options.out.with_suffix(".harvest.toml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_record", as_before)
        crash_after(patch, 3)
        with pytest.raises(RuntimeError, match="crash"):
            harvest(options)
    # One text's options were plain words then.
    toml.write_text(
        re.sub(r"^(dataset|split|text_column) = \[(.*)\]$", r"\1 = \2", toml.read_text(), flags=re.MULTILINE)
    )
    assert re.search(r'^split = "train"$', toml.read_text(), re.MULTILINE)
    prepare(options.out)()
    assert verify(options.out) == []
    (options.out / "resid_post/c.2.0.0").unlink()
    assert repair(options.out, prepare).proven == [2]
    for change in ({"shuffle_documents": 3}, {"pack": False}):
        with pytest.raises(IncompatibleError, match=r"--shuffle-documents is not given there|--pack is True there"):
            harvest(config(**change))


@pytest.mark.usefixtures("small_shards")
def test_a_store_that_is_exchanged_while_it_is_opened_is_refused(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, other = config(), config(out=tmp_path / "other.zarr", max_tokens=100)
    harvest(options)
    harvest(other)
    before = tree(other.out)

    def exchanged(*_: Any) -> list[str]:
        options.out.rename(tmp_path / "away.zarr")
        other.out.rename(options.out)
        return []

    monkeypatch.setattr(run, "refuse_differences", exchanged)
    with pytest.raises(IncompatibleError, match=r"acts\.zarr was replaced by another store while it was opened"):
        harvest(options)
    assert tree(options.out) == before


@pytest.mark.usefixtures("small_shards")
def test_a_model_that_is_exchanged_between_the_plan_and_the_filling_is_refused(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first run and in one that continues: the store names the first model, and gets no vector of the other."""
    folder, away, other = tmp_path / "model", tmp_path / "away", tiny_model("gpt2", tmp_path / "other", seed=1)
    options = config(model=str(tiny_model("gpt2", folder)))
    load = run.load_weights

    def exchanged(*arguments: Any) -> Any:
        folder.rename(away)
        other.rename(folder)
        return load(*arguments)

    for begun in (False, True):
        if begun:
            with pytest.MonkeyPatch.context() as patch:
                crash_after(patch, 2)
                with pytest.raises(RuntimeError, match="crash"):
                    harvest(options)
        before = tree(options.out)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "load_weights", exchanged)
            with pytest.raises(IncompatibleError, match=r"model model: the files in .* were changed or replaced"):
                harvest(options)
        assert tree(options.out) == before
        folder.rename(other)
        away.rename(folder)
    assert harvest(options).shards_written == 5


def test_a_model_that_was_loaded_before_its_files_changed_is_refused(config: MakeConfig, tmp_path: Path) -> None:
    folder = tiny_model("gpt2", tmp_path / "model")
    model = load_model(resolve_model(str(folder)))
    shutil.rmtree(folder)
    tiny_model("gpt2", folder, seed=1)
    options = config(model=str(folder))
    with pytest.raises(IncompatibleError, match="its files were changed since it was loaded"):
        harvest(options, model)
    assert not options.out.exists()
