"""Selection over ranks, against one process that has everything; most values are equal to others."""

from typing import Any

import pytest
import torch

from tests.support.ranks import batch
from train.kernels.encode import ReadyEncoder
from train.kernels.plain import TORCH
from train.parallel.ranks import ALONE
from train.parallel.selection import batch_codes


@pytest.mark.parametrize("count", [1, 50, 299, 600])
def test_the_largest_of_a_batch_whose_rows_are_divided(two: tuple[Any, list[dict[str, Any]]], count: int) -> None:
    inputs, W_enc = batch()
    codes, smallest = batch_codes(ReadyEncoder(TORCH, W_enc), inputs, count, ALONE)
    assert smallest is not None
    parts = [each["selected"][count] for each in two[1]]
    z = (inputs @ W_enc.t()).clamp(min=0)
    expected = z.flatten().sort(descending=True).values[:count]
    found = torch.cat([values.flatten() for values, _ in parts]).sort(descending=True).values
    assert found[:count].tolist() == expected[: len(found)].tolist()
    assert not found[count:].any()
    assert {float(each) for _, each in parts} == {float(smallest)}
    assert codes.values.sum() == found.sum()
    whole = codes.values[:3].sum()  # of equal ones at the border, the first ranks', as of one process the first rows'
    assert parts[0][0].sum() == whole
    assert all(each["selected"]["nothing"] is None for each in two[1])


def test_the_largest_of_rows_whose_latents_are_divided(two: tuple[Any, list[dict[str, Any]]]) -> None:
    inputs, W_enc = batch()
    z = inputs @ W_enc.t()
    kept = torch.cat([each["shared"][0] for each in two[1]], dim=1)
    largest = z.clamp(min=0).sort(dim=1, descending=True).values
    assert torch.equal(kept.sort(dim=1, descending=True).values[:, :4], largest[:, :4])
    assert (kept > 0).sum(dim=1).max() <= 4
    active = torch.cat([each["shared"][1] for each in two[1]], dim=1)  # AuxK's: one latent here, 29 there
    assert torch.equal(active[active > 0], z[active > 0])
    assert torch.equal(active.sort(dim=1, descending=True).values[:, :7], largest[:, :7])
    assert (active > 0).sum(dim=1).max() <= 7
