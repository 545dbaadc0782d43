"""`residscope info`: in words and as JSON, of whole stores and of those that lack shards."""

import json
from pathlib import Path

import numpy as np
import pytest

from residscope.cli import main
from store.activations import ActivationStore
from tests.support.stores import make_meta, make_store, random_activations, token_table


def test_info(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(path)]) == 0
    words = capsys.readouterr().out
    for part in ("some/model", "60 (56 kept) of 4 documents", "2 of 6, d_model 4", "2 of 2 shards", "complete"):
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
