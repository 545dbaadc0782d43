"""Every snippet of docs/reading-stores.md runs, and gives the store's numbers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.stores import make_store, random_activations

PAGE = Path(__file__).parents[2] / "docs/reading-stores.md"


def snippets() -> Iterator[tuple[str, str]]:
    """The heading above each snippet, with its number there, and its code."""
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading = section.splitlines()[0]
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL), start=1):
            yield f"{heading} {number}", code


CODE = dict(snippets())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_store(tmp_path / "acts.zarr", random_activations(150, 3, 7), chunk_tokens=16, shard_tokens=64)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CODE)
def test_snippets_run(folder: Path, name: str) -> None:
    if name.startswith(("xarray", "tensorstore")):
        pytest.importorskip(name.split()[0])
    found: dict[str, Any] = {}
    exec(CODE[name], found)

    from store import ActivationStore

    store = ActivationStore.open(folder / "acts.zarr")
    keep = store.tokens.keep
    x = store.read()[keep]
    norm = np.linalg.norm(x, axis=2)
    expected: dict[str, dict[str, np.ndarray]] = {
        "With this package 1": {"x": store.read()[:100, [0, 2]], "mean": store.statistics().mean},
        "dask 1": {"spread": x.std(axis=0)},
        "dask 2": {"cosine": (x[:, 1:] * x[:, :-1]).sum(axis=2) / (norm[:, 1:] * norm[:, :-1])},
        "dask 3": {"early": x[store.tokens.position[keep] < 8].mean(axis=0)},
        "Zarr 1": {"x": store.read()[:100][keep[:100]]},
        "xarray 1": {"per_document": np.unique(store.tokens.document[keep], return_counts=True)[1]},
        "xarray 2": {"mean_by_layer": x.mean(axis=(0, 2))},
        "tensorstore 1": {"x": store.read()[:100, 1]},
    }
    for variable, values in expected[name].items():
        np.testing.assert_allclose(np.asarray(found[variable]), values, rtol=1e-4, atol=1e-5)


def test_every_snippet_is_looked_at() -> None:
    assert len(CODE) == 8
