"""A damaged store is filled again by its own model, to the same bytes; without its options, the error says what to
do."""

import shutil
from pathlib import Path

import pytest

from harvest.refill import prepare
from harvest.run import harvest
from residscope.errors import IncompatibleError, ResidscopeError
from store.care.repair import repair
from store.care.verify import verify
from tests.support.harvesting import MakeConfig, tree


@pytest.mark.usefixtures("small_shards")
def test_bad_and_missing_shards_come_back_byte_for_byte(config: MakeConfig) -> None:
    path = config().out
    harvest(config())
    whole = tree(path)
    shard = path / "resid_post/c.1.0.0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    (path / "resid_post/c.3.0.0").unlink()
    assert [bad.index for bad in verify(path)] == [1, 3]

    done = repair(path, prepare)

    assert done.refilled == done.proven == [1, 3]
    assert tree(path) == whole


@pytest.mark.usefixtures("small_shards")
def test_without_the_options_the_error_says_what_to_do(config: MakeConfig) -> None:
    path = config().out
    harvest(config())
    whole = tree(path)
    (path / "resid_post/c.2.0.0").unlink()
    path.with_suffix(".harvest.toml").unlink()
    before = tree(path)
    with pytest.raises(
        ResidscopeError, match=r"acts\.harvest\.toml.*Nothing was changed\. Run the store's `harvest` command"
    ):
        repair(path, prepare)
    assert tree(path) == before
    with pytest.raises(IncompatibleError, match="gone or cut off, the first of shard 2"):
        harvest(config())  # the way out that the error names: it writes the options again
    assert repair(path, prepare).proven == [2]
    assert tree(path) == whole


@pytest.mark.usefixtures("small_shards")
def test_a_model_that_has_moved_is_missed_before_anything_is_changed(config: MakeConfig, tmp_path: Path) -> None:
    model = tmp_path / "moved"
    shutil.copytree(config().weights.model, model)
    options = config(model=str(model))
    harvest(options)
    (options.out / "resid_post/c.2.0.0").unlink()
    before = tree(options.out)
    (model / "model.safetensors").unlink()
    with pytest.raises(ResidscopeError, match="no weights"):
        repair(options.out, prepare)
    assert tree(options.out) == before


@pytest.mark.usefixtures("small_shards")
def test_options_that_a_crash_lost_are_written_when_the_store_is_continued(config: MakeConfig) -> None:
    harvest(config())
    options = config().out.with_suffix(".harvest.toml")
    before = options.read_bytes()
    options.unlink()
    harvest(config())
    assert options.read_bytes() == before
