"""Maximally activating examples of planted codes: the right tokens, the right layers, whole text, inside documents."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from analysis.latents.examples import (
    COLUMNS,
    MAX_EXAMPLES,
    REACH,
    TopExamples,
    contexts_of,
    examples_per_layer,
    window_bounds,
    windows_of,
    write_found,
)
from analysis.latents.views import EDGES
from analysis.run import analyze
from analysis.tiles import CodeTile
from harvest.model.tokenizer import Tokenizer
from store.arrays import TokenTable
from tests.support.models import tiny_tokenizer
from tests.support.small import LAYERS, analyze_config, make_small

L, M, K = 3, 6, 2


def write_examples(
    path: Path,
    tokens: TokenTable,
    tokenizer: Any,
    codes: "Planted",
    analysed: NDArray[np.bool_],
    *,
    layer_numbers: Sequence[int],
    n: int,
) -> int:
    """Find and write, as an analysis does."""
    top = TopExamples.zeros(M, L, n)
    for tile in codes(analysed):
        top.add(tile, tokens.document[tile.token])
    found = top.found()
    windows = windows_of(found, tokens, codes, analysed)
    texts = contexts_of(tokens, tokenizer and Tokenizer(tokenizer), np.unique(found.token))
    return write_found(path, found, windows, texts, "tokens" if tokenizer else "ids", layer_numbers)


class Planted:
    """Dense activations as sparse codes, a few tokens at a time; counts how often and for what it was asked."""

    def __init__(self, dense: NDArray[np.float32], size: int = 7) -> None:
        """dense: [T, L, M], at most K positive in a row."""
        self.dense, self.size = dense, size
        self.asked: list[NDArray[np.bool_]] = []

    def tile(self, token: NDArray[np.int64]) -> CodeTile:
        indices = np.argsort(-self.dense[token], axis=-1, kind="stable")[:, :, :K]
        values = np.take_along_axis(self.dense[token], indices, axis=-1)
        return CodeTile(token, values, np.where(values > 0, indices, 0))  # as where their number varies

    def __call__(self, needed: NDArray[np.bool_]) -> Iterator[CodeTile]:
        self.asked.append(needed)
        token = np.flatnonzero(needed)
        for start in range(0, len(token), self.size):
            yield self.tile(token[start : start + self.size])


def table(text: str, tokenizer: Any, *, document: Sequence[int] | None = None, context: int = 1000) -> TokenTable:
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    position = (np.arange(len(ids)) % context).astype(np.int32)
    owner = np.zeros(len(ids), np.int32) if document is None else np.asarray(document, np.int32)
    return TokenTable(ids, owner, position, np.ones(len(ids), bool))


def naive(dense: NDArray[np.float32], document: NDArray[np.integer], n: int) -> dict[tuple[int, int], list[int]]:
    """(latent, layer) -> tokens of its examples: first the best of each document, then the others."""
    found = {}
    for latent in range(dense.shape[2]):
        for layer in range(dense.shape[1]):
            a = dense[:, layer, latent]
            order = sorted(np.flatnonzero(a > 0), key=lambda t: (-a[t], t))
            best = {document[t]: t for t in reversed(order)}
            first = [t for t in order if best[document[t]] == t]
            chosen = [*first, *(t for t in order if best[document[t]] != t)][:n]
            if chosen:
                found[latent, layer] = sorted((int(t) for t in chosen), key=lambda t: (-a[t], t))
    return found


def as_dict(top: TopExamples) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for latent, layer, rank, _, token, _ in zip(*top.found(), strict=True):
        rows = found.setdefault((int(latent), int(layer)), [])
        assert rank == len(rows)
        rows.append(int(token))
    return found


def random_dense(n_tokens: int, seed: int, levels: int = 5) -> NDArray[np.float32]:
    """[T, L, M] of few different values, so that ties are frequent."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, levels, (n_tokens, L, M)).astype(np.float32)
    hidden = np.argsort(rng.random(dense.shape), axis=-1)[:, :, : M - K]
    np.put_along_axis(dense, hidden, 0.0, axis=-1)
    return dense


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(st.integers(0, 40), max_size=4),
    st.integers(0, 99),
)
def test_examples_are_the_best_of_different_documents_in_any_grouping(
    n_tokens: int, n: int, n_documents: int, cuts: list[int], seed: int
) -> None:
    dense = random_dense(n_tokens, seed)
    document = np.random.default_rng(seed).integers(0, n_documents, n_tokens)
    codes = Planted(dense)
    parts = np.split(np.arange(n_tokens), sorted(min(cut, n_tokens) for cut in cuts))
    expected = naive(dense, document, n)
    for order in (parts, parts[::-1]):
        top = TopExamples.zeros(M, L, n)
        for part in order:
            top.add(codes.tile(part), document[part])
        assert as_dict(top) == expected
    found = top.found()
    np.testing.assert_array_equal(found.activation, dense[found.token, found.layer, found.latent])
    np.testing.assert_array_equal(found.document, document[found.token])


def test_tokens_beyond_int32_are_kept() -> None:
    """A store of 3e9 tokens."""
    top, token = TopExamples.zeros(M, L, 1), np.array([2**31, 2**33 + 1])
    codes = CodeTile(token, np.ones((2, L, 1), np.float32), np.repeat([[[0]], [[1]]], L, axis=1))
    top.add(codes, np.zeros(2, np.int32))
    assert set(top.found().token.tolist()) == set(token.tolist())


def test_windows_end_at_documents_and_at_sequences() -> None:
    document = np.repeat([0, 1, 2], [30, 20, 50]).astype(np.int32)
    position = (np.arange(100) % 40).astype(np.int32)
    tokens = TokenTable(np.zeros(100, np.int32), document, position, np.ones(100, bool))
    at = np.array([0, 5, 15, 29, 30, 39, 40, 49, 50, 65, 79, 80, 99])
    start, stop = window_bounds(tokens, at)
    assert start.tolist() == [0, 0, 3, 17, 30, 30, 40, 40, 50, 53, 67, 80, 87]
    assert stop.tolist() == [13, 18, 28, 30, 40, 40, 50, 50, 63, 78, 80, 93, 100]
    for t, low, high in zip(at, start, stop, strict=True):
        assert low <= t < high
        assert high - low <= 2 * REACH + 1
        assert len(set(document[low:high])) == 1
        assert 0 not in position[low + 1 : high]


def test_rows_hold_the_right_layers_tokens_and_texts(tmp_path: Path) -> None:
    text = "The naïve 🙂 said: 日本 is far.It is not."
    tokenizer = tiny_tokenizer(bos=False)
    second = len("The naïve 🙂 said: 日本 is far.".encode())
    n_tokens = len(text.encode())
    tokens = table(text, tokenizer, document=np.arange(n_tokens) >= second)  # type: ignore[arg-type]
    dense = np.zeros((n_tokens, L, M), np.float32)
    smile, day = (len(text[: text.index(sign)].encode()) for sign in "🙂日")
    dense[smile, 1, 4] = 2.0  # the first of four bytes
    dense[smile + 3, 1, 4] = 3.0  # the last of them
    dense[day + 1, 2, 4] = 5.0
    dense[second, 1, 4] = 1.0
    dense[second - 1, 0, 0] = 7.0
    codes = Planted(dense)
    analysed = np.ones(n_tokens, bool)
    analysed[smile - 1] = False
    path = tmp_path / "examples.parquet"
    n_rows = write_examples(path, tokens, tokenizer, codes, analysed, layer_numbers=(3, 5, 8), n=3)
    rows = pq.read_table(path).to_pylist()
    assert pq.read_schema(path).equals(COLUMNS)
    assert n_rows == len(rows) == 5
    found = [
        (row["latent"], row["layer"], row["rank"], row["activation"], row["document"], row["token"]) for row in rows
    ]
    assert found == [
        (0, 3, 0, 7.0, 0, second - 1),
        (4, 5, 0, 3.0, 0, smile + 3),
        (4, 5, 1, 2.0, 0, smile),
        (4, 5, 2, 1.0, 1, second),
        (4, 8, 0, 5.0, 0, day + 1),
    ]
    end, inside, begin, border, kanji = rows
    assert (end["text_token"], end["text_after"]) == (".", "")  # not a word of the next document
    assert end["text_before"].endswith("is far")
    assert (border["text_before"], border["text_token"], border["text_after"]) == ("", "I", "t is not.")
    assert [row["text_token"] for row in (inside, begin, kanji)] == ["🙂", "🙂", "日"]
    assert (begin["text_before"], begin["text_after"]) == ("The naïve ", " said: 日")
    assert inside["text_before"] == "e naïve "
    assert inside["text_after"].startswith(" said: ")
    for row in rows:
        assert "\ufffd" not in row["text_before"] + row["text_token"] + row["text_after"] + "".join(row["texts"])
        assert "".join(row["texts"]) in text
        assert len(row["texts"]) == len(row["activations"])
        assert row["activations"][row["marked"]] == row["activation"]
    start = begin["token"] - begin["marked"]
    assert begin["activations"] == [
        None if not analysed[t] else float(dense[t, 1, 4]) for t in range(start, start + len(begin["texts"]))
    ]
    assert begin["activations"][begin["marked"] + 3] == 3.0
    assert (~codes.asked[1] | analysed).all()


@pytest.mark.parametrize("size", [1, 5, 200])
def test_activations_of_windows_do_not_depend_on_tiles(tmp_path: Path, size: int) -> None:
    rng = np.random.default_rng(0)
    tokenizer = tiny_tokenizer(bos=False)
    text = "".join(chr(97 + i) for i in rng.integers(0, 26, 120))
    tokens = table(text, tokenizer, document=np.arange(120) // 33, context=50)  # type: ignore[arg-type]
    dense = random_dense(120, 7, levels=50)
    analysed = rng.random(120) > 0.2
    path = tmp_path / "examples.parquet"
    codes = Planted(dense, size)
    write_examples(path, tokens, tokenizer, codes, analysed, layer_numbers=range(L), n=2)
    rows = pq.read_table(path).to_pylist()
    assert {(row["latent"], row["layer"]) for row in rows} == {(j, i) for j in range(M) for i in range(L)}
    for row in rows:
        start = row["token"] - row["marked"]
        stop = start + len(row["activations"])
        assert row["text_before"] + row["text_token"] + row["text_after"] == text[start:stop]
        assert len(set(tokens.document[start:stop])) == 1
        expected = [float(dense[t, row["layer"], row["latent"]]) if analysed[t] else None for t in range(start, stop)]
        assert row["activations"] == expected


def test_nothing_found_is_an_empty_table(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(bos=False)
    tokens = table("abc", tokenizer)
    codes = Planted(np.zeros((3, L, M), np.float32))
    path = tmp_path / "examples.parquet"
    assert write_examples(path, tokens, tokenizer, codes, np.ones(3, bool), layer_numbers=range(L), n=3) == 0
    assert pq.read_table(path).schema.equals(COLUMNS)


def test_without_a_tokenizer_ids_stand_for_text(tmp_path: Path) -> None:
    ids = np.array([7, 3, 3, 12], np.int32)
    tokens = TokenTable(ids, np.zeros(4, np.int32), np.arange(4, dtype=np.int32), np.ones(4, bool))
    dense = np.zeros((4, L, M), np.float32)
    dense[1, 0, 2] = 1.0
    path = tmp_path / "examples.parquet"
    write_examples(path, tokens, None, Planted(dense), np.ones(4, bool), layer_numbers=range(L), n=2)
    (row,) = pq.read_table(path).to_pylist()
    assert (row["text_before"], row["text_token"], row["text_after"]) == (" 7", " 3", " 3 12")
    assert row["texts"] == [" 7", " 3", " 3", " 12"]
    assert pq.read_schema(path).metadata[b"texts"] == b"ids"


def test_examples_of_a_store_are_its_encoded_maxima(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = make_small(tmp_path)
    summary = analyze(analyze_config(store=small.store, sae=small.sae, out=tmp_path / "out", report=False))
    capsys.readouterr()
    codes = small.weights.encode(torch.from_numpy(small.x).view(-1, 12))
    dense = torch.zeros(len(small.x) * 4, 24).scatter_(1, codes.indices, codes.values).view(-1, 4, 24)
    masked = dense.numpy() * small.keep[:, None, None]
    table_ = pq.read_table(tmp_path / "out" / "examples.parquet").to_pydict()
    found: dict[tuple[int, int], list[int]] = {}
    for latent, layer, token in zip(table_["latent"], table_["layer"], table_["token"], strict=True):
        found.setdefault((latent, LAYERS.index(layer)), []).append(token)
    assert found == naive(masked, small.document, 3)
    assert summary["examples"]["rows"] == len(table_["latent"])
    assert summary["examples"]["per_layer"] == 3
    assert summary["examples"]["no_text"]  # the small store is of a model that there is not

    histograms = pq.read_table(tmp_path / "out" / "histograms.parquet").to_pylist()
    assert len(histograms) == (masked > 0).any(axis=0).sum()
    for row in histograms:
        values = masked[:, LAYERS.index(row["layer"]), row["latent"]]
        expected, _ = np.histogram(values[values > 0], [0, *EDGES[1:-1], np.inf])
        assert row["counts"] == expected.tolist()

    fired = (masked > 0).any(axis=1).sum(axis=0)
    latents = pq.read_table(tmp_path / "out" / "latents.parquet").to_pydict()
    for latent, (overlap, chance) in enumerate(zip(latents["context_overlap"], latents["context_chance"], strict=True)):
        best = [set(np.argsort(-a, kind="stable")[:5]) for a in masked[:, :, latent].T if (a > 0).sum() >= 5]
        pairs = [len(a & b) / 5 for a, b in combinations(best, 2)]
        assert overlap == (pytest.approx(np.mean(pairs)) if pairs else None)
        assert chance == (pytest.approx(5 / fired[latent]) if pairs else None)
    assert summary["examples"]["agreement"]["latents"] == sum(x is not None for x in latents["context_overlap"])


def test_many_latents_get_fewer_examples() -> None:
    assert examples_per_layer(9216, 30) == 3
    assert examples_per_layer(36_864, 30) == 1
    assert examples_per_layer(10**6, 40) == 1
    assert 9216 * 30 * examples_per_layer(9216, 30) <= MAX_EXAMPLES
