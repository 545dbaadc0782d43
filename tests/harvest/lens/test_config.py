"""Options of fit-lens: what they share with `harvest`, and what fit.json keeps of them."""

from pathlib import Path
from typing import Any

import pytest

from harvest.lens.config import FitLensConfig
from residscope.errors import UsageError
from residscope.options import from_flat


def config(**values: Any) -> FitLensConfig:
    return from_flat(FitLensConfig, {"model": "gpt2", "out": Path("lens"), **values})


def test_text_and_model_are_those_of_harvest() -> None:
    harvested = config(dataset=("pydoc:2", "stdlib"), context_length=99, dtype="bfloat16").for_harvest()
    assert [choice.weight for choice in harvested.text.choices] == [2, 1]
    assert (harvested.sequences.context_length, harvested.weights.dtype) == (99, "bfloat16")
    assert harvested.max_tokens == 100_000


def test_the_options_of_one_text_are_kept_as_plain_words() -> None:
    kept = config(dataset="pydoc", store=None).for_record()
    assert (kept["dataset"], kept["dataset_config"], kept["split"], kept["store"]) == ("pydoc", None, "train", None)
    assert not {"out", "json"} & kept.keys()
    assert config(dataset=("pydoc", "stdlib")).for_record()["dataset"] == ("pydoc", "stdlib")
    assert config(store=Path("a/b.zarr")).for_record()["store"] == "b.zarr"


@pytest.mark.parametrize(
    "change", [{"dataset": "pydoc"}, {"keep_first_position": True}, {"max_tokens": 5}, {"split": "test"}]
)
def test_a_store_has_settled_what_its_tokens_are(change: dict[str, Any]) -> None:
    name = next(iter(change)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{name} says how to turn text into tokens"):
        config(store=Path("a.zarr"), **change)
