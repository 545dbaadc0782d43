"""Few tokens that carry much of the variance, against the definition."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residscope.errors import ResidscopeError
from store.activations import ActivationStore
from store.care import outliers
from store.care.outliers import few_tokens
from tests.support.stores import make_store, random_activations


def planted(path: Path, factor: float, at: list[int], n_tokens: int = 2000, **changes: Any) -> ActivationStore:
    """Layers 3 and 5; the tokens `at` have `factor` times the vector at layer 5, and the ids 7 and, of the last, 8."""
    x = random_activations(n_tokens, 2, 8)
    x[at, 1] *= factor
    token_id = np.full(n_tokens, 1, np.int32)
    token_id[at] = 7
    token_id[at[-1:]] = 8
    return make_store(path, x, layers=(3, 5), chunk_tokens=64, shard_tokens=256, token_id=token_id, **changes)


def no_tokenizer(ids: list[int]) -> list[str]:
    raise ResidscopeError("it is not here")


def found(store: ActivationStore, texts: Callable[[list[int]], list[str]] = no_tokenizer) -> str | None:
    few = few_tokens(store, store.tokens.keep, texts)
    return few.words if few else None


def test_they_are_named_with_their_share(tmp_path: Path) -> None:
    store = planted(tmp_path / "a.zarr", 60, [500, 999, 1501, 0])  # Token 0 is not kept.
    x = store.read()[store.tokens.keep, 1].astype(float)
    d = np.square(x - x.mean(0)).sum(1)
    far = np.argsort(-d)[:3]
    norm = np.linalg.norm(x, axis=1)
    share, ratio = 100 * d[far].sum() / d.sum(), norm[far].min() / np.median(norm)
    assert found(store, lambda ids: [{7: " because"}[i] for i in ids]) == (
        f"{share:.0f} % of the variance of layer 5 is in 3 tokens of {len(x):,} examined, probably attention sinks: "
        f"' because' 3 x. FVU depends strongly on them (norms of at least {ratio:.3g} times the median); "
        "`harvest --mask-norm 10` leaves out tokens of more than 10 times the median norm"
    )
    assert ": id 7 3 x." in str(found(store))
    chosen = store.tokens.keep & (np.arange(2000) > 600)
    few = few_tokens(store, chosen)
    assert few is not None
    assert f"2 tokens of {chosen.sum():,} examined" in few.words
    assert ": id 7 2 x." in few.words
    assert few.tokens == (999, 1501)
    assert few_tokens(store, chosen, layers=[0]) is None
    only = few_tokens(store, chosen, layers=[1])
    assert only is not None
    assert (only.tokens, "of layer 5 is" in only.words) == (few.tokens, True)


@pytest.mark.parametrize(
    ("factor", "n_tokens", "at"),
    [(3, 2000, [500]), (60, 2000, []), (60, 100, [50]), *((factor, 120, [50]) for factor in (2, 3, 4))],
)
def test_nothing_is_said_of_ordinary_vectors_nor_of_too_few(
    tmp_path: Path, factor: float, n_tokens: int, at: list[int]
) -> None:
    assert found(planted(tmp_path / "a.zarr", factor, at, n_tokens)) is None


def test_without_a_kept_token_there_is_nothing(tmp_path: Path) -> None:
    assert found(planted(tmp_path / "a.zarr", 60, [5], keep=np.zeros(2000, bool))) is None


def test_of_a_large_store_chunks_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = planted(tmp_path / "a.zarr", 60, list(range(1, 2000, 200)))
    monkeypatch.setattr(outliers, "_MOST_BYTES", 16 * 64 * store.meta.bytes_per_token)
    # The last chunk has 16 tokens; one in 16 is not kept. Five of the ten lie in chunks that are looked at.
    assert "5 tokens of 915 examined" in str(found(store))


def test_of_a_large_store_few_shards_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = planted(tmp_path / "a.zarr", 60, [5, 1999])
    opened: list[int] = []
    monkeypatch.setattr(store, "_reader", lambda shard, read=store._reader: (opened.append(shard), read(shard))[1])
    monkeypatch.setattr(outliers, "_MOST_BYTES", 4 * 64 * store.meta.bytes_per_token)  # a shard's
    monkeypatch.setattr(outliers, "_OPENED", 2)
    assert "2 tokens of " in str(found(store))
    assert {*opened} == {0, 7}


def test_huge_vectors_are_no_trouble(tmp_path: Path) -> None:
    assert "100 % of the variance" in str(found(planted(tmp_path / "a.zarr", 1e33, [500])))
