"""What each token of a text is for when a lens is fitted, and how tokens are mixed for KL training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from harvest.lens.data import Role, measured_tokens, roles, shuffled
from harvest.sequences import sequence_batches
from tests.support.stores import make_store, token_table


def test_held_out_documents_are_those_of_training(tmp_path: Path) -> None:
    from train.data import split_tokens

    store = make_store(tmp_path / "s.zarr", np.ones((320, 2, 4), np.float32))
    for seed in (0, 3):
        expected = split_tokens(store, 0.2, seed).validation
        assert np.array_equal(roles(store.tokens, 0.2, seed) == Role.HELD_OUT, expected)


def test_every_document_has_one_role_and_masked_tokens_none() -> None:
    tokens = token_table(320)
    role = roles(tokens, 0.1, 0)
    assert np.array_equal(role == Role.MASKED, ~tokens.keep)
    for document in range(20):
        assert len(np.unique(role[(tokens.document == document) & tokens.keep])) == 1
    assert {int(kind): len(np.unique(tokens.document[role == kind])) for kind in Role if kind} == {1: 16, 2: 2, 3: 2}


def test_measured_tokens_are_spread_over_sequences() -> None:
    position = np.tile(np.arange(10), 40)
    held_out = np.arange(400) % 3 == 0
    mask = measured_tokens(position, held_out, 32, 0)
    assert mask.sum() == 32
    assert not (mask & ~held_out).any()
    per_sequence = np.bincount(np.flatnonzero(mask) // 10)
    assert set(per_sequence.tolist()) == {0, 2}
    assert np.array_equal(measured_tokens(position, held_out, 999, 0), held_out)


def test_kl_batches_are_mixed_and_repeat_no_token_within_an_epoch() -> None:
    position = np.tile(np.arange(5), 8)
    chosen = position != 0  # 32 tokens

    def read(span: Any) -> list[torch.Tensor]:
        return [torch.arange(span.start, span.stop)[:, None], -torch.arange(span.start, span.stop)[:, None]]

    got = list(shuffled(read, sequence_batches(position, 10), chosen, per_step=4, steps=16, seed=0, window=8))
    assert [len(batch[0]) for batch in got] == [4] * 16
    assert all(torch.equal(a, -b) for a, b in got)
    first = torch.cat([batch[0] for batch in got[:8]]).flatten().tolist()
    assert sorted(first) == np.flatnonzero(chosen).tolist()
    assert any(np.ptp(batch[0].numpy()) > 5 for batch in got)
    again = list(shuffled(read, sequence_batches(position, 10), chosen, per_step=4, steps=16, seed=0, window=8))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got, again, strict=True))
