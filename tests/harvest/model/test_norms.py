"""--mask-norm against its definition, on what is stored; such a store is continued and repaired to its bytes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from harvest import run
from harvest.model import norms
from harvest.refill import prepare
from harvest.run import harvest
from residscope.errors import IncompatibleError, UsageError
from store.activations import ActivationStore
from store.care import outliers
from store.care.repair import repair
from store.shards import shard_name
from tests.support.harvesting import MakeConfig, crash_after, harvest_config, tree
from tests.support.models import tiny_model


@pytest.fixture
def with_sinks(tmp_path: Path) -> str:
    """A GPT-2 whose embedding of one letter, of which the text has a few, is 400 times as long."""
    folder = tiny_model("gpt2", tmp_path / "sinks")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    letter = transformers.AutoTokenizer.from_pretrained(folder)("q")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[letter] *= 400
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("median_tokens", [100, 10**6])
def test_kept_tokens_above_the_medians_are_masked(
    config: MakeConfig, with_sinks: str, tmp_path: Path, median_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "MEDIAN_TOKENS", median_tokens)
    plain = ActivationStore.open(harvest(config(model=with_sinks, out=tmp_path / "plain.zarr")).out)
    store = ActivationStore.open(harvest(config(model=with_sinks, mask_norm=4)).out)
    norm = np.linalg.norm(plain.read().astype(np.float64), axis=2)  # [T, L]
    keep = plain.tokens.keep
    if median_tokens == 100:  # Batches of 3 sequences of 20 tokens, of which 19 and fewer are kept.
        n = int(np.argmax(np.cumsum(keep) >= 100)) // 60 * 60 + 60
        medians = np.median(norm[:n][keep[:n]], axis=0)
    else:
        medians = np.median(norm[keep], axis=0)
    expected = keep & ~(norm > 4 * medians).any(axis=1)
    assert 0 < (keep & ~expected).sum() < 0.3 * keep.sum()
    np.testing.assert_array_equal(store.tokens.keep, expected)
    np.testing.assert_array_equal(store.read(raw=True), plain.read(raw=True))
    provenance = store.meta.provenance
    assert provenance["mask_norm"]["medians"] == pytest.approx(medians.tolist())
    assert provenance["mask_norm"]["masked"] == (keep & ~expected).sum()
    assert store.statistics().count == expected.sum()
    np.testing.assert_allclose(store.statistics().mean, store.read()[expected].mean(0, dtype=np.float64), rtol=1e-6)


def test_sinks_are_named_at_the_end_of_a_harvest(
    config: MakeConfig, with_sinks: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outliers, "ONE_IN", 5)
    harvest(config(model=with_sinks))
    assert re.search(
        r"warning: .* in \d+ tokens of \d+ examined, probably attention sinks: 'q' \d+ x\.", capsys.readouterr().err
    )


@pytest.mark.usefixtures("small_shards")
def test_such_a_store_is_continued_and_repaired_to_the_same_bytes(
    config: MakeConfig, with_sinks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tree(Path(harvest(config(model=with_sinks, mask_norm=4, out=tmp_path / "whole.zarr")).out))
    options = config(model=with_sinks, mask_norm=4)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 2)
        with pytest.raises(RuntimeError, match="crash"):
            harvest(options)
    with pytest.raises(IncompatibleError, match="--mask-norm is 4"):
        harvest(config(model=with_sinks, mask_norm=5))
    with pytest.raises(IncompatibleError, match="--mask-norm is 4"):
        harvest(config(model=with_sinks))

    def never(*args: object) -> object:
        raise AssertionError

    monkeypatch.setattr(run, "mask_by_norm", never)  # The mask is in the store.
    harvest(options)
    assert tree(options.out) == whole
    (options.out / shard_name(3)).write_bytes(b"")
    repair(options.out, prepare)
    assert tree(options.out) == whole


@pytest.mark.parametrize("factor", [1.0, 0.0, -3.0, float("nan"), float("inf")])
def test_a_factor_that_makes_no_sense_is_refused(factor: float) -> None:
    with pytest.raises(UsageError, match="--mask-norm should be above 1"):
        harvest_config(mask_norm=factor)
