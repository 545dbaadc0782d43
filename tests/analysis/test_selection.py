"""Which tokens are chosen, and how documents fall into groups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import selection
from analysis.config import TokenOptions
from analysis.selection import held_out_documents, select
from residscope.errors import IncompatibleError, ResidscopeError
from store.arrays import TokenTable


def table(document, keep=None):
    document = np.asarray(document, np.int32)
    keep = np.ones(len(document), bool) if keep is None else np.asarray(keep, bool)
    return TokenTable(np.zeros_like(document), document, np.arange(len(document), dtype=np.int32), keep)


TOKENS = table([0, 0, 1, 1, 2, 2, 2, 3], keep=[0, 1, 1, 1, 1, 0, 1, 1])
HELD_OUT = np.array([False, True, False, True])


def test_masks_of_each_split_leave_out_what_is_not_kept():
    expected = {"all": [1, 2, 3, 4, 6, 7], "train": [1, 4, 6], "validation": [2, 3, 7]}
    for split, tokens in expected.items():
        chosen = select(TOKENS, HELD_OUT, TokenOptions(split=split), 8)  # type: ignore[arg-type]
        np.testing.assert_array_equal(np.flatnonzero(chosen.analysed), tokens)
        np.testing.assert_array_equal(np.flatnonzero(chosen.validation), [2, 3, 7])
        np.testing.assert_array_equal(np.flatnonzero(chosen.fit), [1, 4, 6])
        assert (chosen.group >= 0).tolist() == chosen.analysed.tolist()


def test_max_tokens_limits_every_mask():
    chosen = select(TOKENS, HELD_OUT, TokenOptions(max_tokens=2), 8)
    for mask, tokens in ((chosen.analysed, [1, 2]), (chosen.validation, [2, 3]), (chosen.fit, [1, 4])):
        np.testing.assert_array_equal(np.flatnonzero(mask), tokens)


def test_nothing_held_out_means_no_validation_and_no_fit():
    chosen = select(TOKENS, np.zeros(4, bool), TokenOptions(), 8)
    assert not chosen.validation.any()
    assert not chosen.fit.any()


@pytest.mark.parametrize(
    ("split", "held_out", "keep", "way_out"),
    [
        ("validation", [0, 0], [1, 1, 1], "--validation-fraction"),
        ("train", [1, 1], [1, 1, 1], "--split validation or all"),
        ("all", [0, 1], [0, 0, 0], "harvest more"),
    ],
)
def test_an_empty_split_is_refused_with_a_way_out(split, held_out, keep, way_out):
    with pytest.raises(ResidscopeError, match=f"no tokens to analyse: .*{way_out}"):
        select(table([0, 0, 1], keep), np.array(held_out, bool), TokenOptions(split=split), 8)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=300),
    limit=st.integers(16, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_groups_are_runs_of_whole_documents_and_number_no_more_than_the_limit(sizes, limit, seed):
    document = np.repeat(np.arange(len(sizes)), sizes)
    keep = np.random.default_rng(seed).random(len(document)) < 0.9
    keep[0] = True
    n_latents = selection.GROUP_BYTES // (64 * limit)
    chosen = select(table(document, keep), np.zeros(len(sizes), bool), TokenOptions(), n_latents)
    group = chosen.group[keep]
    assert np.all(np.diff(group) >= 0)
    assert np.unique(group).tolist() == list(range(chosen.n_groups))
    assert chosen.n_groups <= min(limit, chosen.n_documents)
    for one in np.unique(document[keep]):
        assert len(np.unique(group[document[keep] == one])) == 1


def test_groups_of_even_documents_are_even():
    document = np.repeat(np.arange(500), 7)
    chosen = select(table(document), np.zeros(500, bool), TokenOptions(), 64)
    assert chosen.n_groups == selection.MAX_GROUPS
    assert np.bincount(chosen.group).tolist() == [35] * 100


def test_held_out_documents_follow_the_checkpoints_own_split():
    tokens = table(np.arange(50))
    split = {"fraction": 0.2, "seed": 4, "n_documents": 50}
    held_out = held_out_documents(tokens, split, same_store=True)
    assert held_out.sum() == 10
    assert (held_out != held_out_documents(tokens, {**split, "seed": 5}, same_store=True)).any()
    assert not held_out_documents(tokens, None, same_store=True).any()
    with pytest.raises(IncompatibleError, match="has 60 documents, found 50"):
        held_out_documents(tokens, {**split, "n_documents": 60}, same_store=True)
    # A store made again of the same text has the same documents; one with another number of them is of other text.
    assert held_out_documents(tokens, split, same_store=False).tolist() == held_out.tolist()
    assert held_out_documents(tokens, {**split, "n_documents": 60}, same_store=False).tolist() == [False] * 50
