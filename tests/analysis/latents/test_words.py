"""The words of latents, against the same formula token by token; a latent that fires on everything has none."""

from collections import defaultdict

import numpy as np

from analysis.latents import words
from analysis.latents.examples import TopExamples, windows_of
from analysis.tiles import CodeTile
from harvest.model.tokenizer import Tokenizer
from store.arrays import TokenTable
from tests.support.models import tiny_tokenizer

N_LATENTS, LAYERS = 6, [2, 5, 9]


def planted(rng: np.random.Generator, n_tokens: int = 600) -> tuple[TokenTable, np.ndarray, np.ndarray]:
    """Tokens, their dense activations [T, L, M], and which are analysed."""
    ids = rng.integers(1, 40, n_tokens).astype(np.int32)
    position = np.arange(n_tokens, dtype=np.int32) % 50
    table = TokenTable(ids, (np.arange(n_tokens) // 100).astype(np.int32), position, np.ones(n_tokens, bool))
    dense = rng.random((n_tokens, len(LAYERS), N_LATENTS)).astype(np.float32)
    dense[rng.random(dense.shape) < 0.9] = 0
    dense[:, :, 1] = np.where((ids == 7)[:, None], dense[:, :, 1] + [1, 1, 0], 0)  # a latent of one word, at two layers
    dense[:, :, 2] = 1 + rng.random((n_tokens, len(LAYERS)))  # one that is always on
    dense[:, :, 3] = 0  # and one that never is
    return table, dense, rng.random(n_tokens) < 0.9


def test_words_are_those_of_the_formula(monkeypatch) -> None:
    monkeypatch.setattr(words, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(words, "_TOKENS_AT_ONCE", 90)
    table, dense, analysed = planted(np.random.default_rng(0))
    token = np.flatnonzero(analysed)
    indices = np.broadcast_to(np.arange(N_LATENTS), (len(token), len(LAYERS), N_LATENTS))
    tile = CodeTile(token, dense[token], np.ascontiguousarray(indices))
    top = TopExamples.zeros(N_LATENTS, len(LAYERS), 3)
    top.add(tile, table.document[token])
    found = top.found()
    windows = windows_of(found, table, lambda needed: [tile], analysed)
    tokenizer = Tokenizer(tiny_tokenizer(bos=False))
    for reader in (None, tokenizer):
        texts = [str(i) if reader is None else reader.text([i])[0].strip() or reader.text([i])[0] for i in range(50)]
        result = words.find_words(found, windows, table, analysed, reader, LAYERS, N_LATENTS)
        expected = naive(found, windows, table, dense, analysed, texts)
        assert list(zip(result.words, result.layers, strict=True)) == expected
    assert result.words[1] == [texts[7]]
    assert result.layers[1] == [LAYERS[:2] if not dense[table.token_id == 7, 2, 1].any() else LAYERS]
    assert result.words[2] == result.words[3] == []


def naive(found, windows, table, dense, analysed, texts):
    corpus: dict[str, int] = defaultdict(int)
    for i in table.token_id[analysed]:
        corpus[texts[i]] += 1
    total, result = sum(corpus.values()), []
    for j in range(N_LATENTS):
        best: dict[int, float] = {}
        layers: dict[str, set[int]] = defaultdict(set)
        for r in np.flatnonzero(found.latent == j):
            for t in range(windows.start[r], windows.stop[r]):
                value = float(dense[t, found.layer[r], j])
                if analysed[t] and value > 0:
                    best[t] = max(best.get(t, 0.0), value)
                    layers[texts[table.token_id[t]]].add(LAYERS[found.layer[r]])
        y: dict[str, float] = defaultdict(float)
        places: dict[str, int] = defaultdict(int)
        for t, value in best.items():
            y[texts[table.token_id[t]]] += value / max(best.values())
            places[texts[table.token_id[t]]] += 1
        n, scores = sum(y.values()), {}
        for w, of in y.items():
            a = words.PRIOR * corpus[w] / total
            ours = np.log((of + a) / (n + words.PRIOR - of - a))
            theirs = np.log((corpus[w] + a) / (total + words.PRIOR - corpus[w] - a))
            scores[w] = (ours - theirs) / np.sqrt(1 / (of + a) + 1 / (corpus[w] + a))
        several = any(count > 1 for count in places.values())
        chosen = [w for w in y if scores[w] > words.LEAST_Z and y[w] >= words.LEAST_SHARE * n]
        chosen = sorted((w for w in chosen if places[w] > 1 or not several), key=lambda w: -scores[w])
        chosen = chosen[: words.MOST_WORDS]
        result.append((chosen, [sorted(layers[w]) for w in chosen]))
    return result


def test_nothing_found_no_words() -> None:
    table, _, analysed = planted(np.random.default_rng(1))
    found = TopExamples.zeros(N_LATENTS, len(LAYERS), 2).found()
    windows = windows_of(found, table, lambda needed: [], analysed)
    result = words.find_words(found, windows, table, analysed, None, LAYERS, N_LATENTS)
    assert result.words == result.layers == [[]] * N_LATENTS
