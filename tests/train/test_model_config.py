"""An impossible configuration is refused wherever it comes from: a checkpoint's comes from a file."""

from typing import Any

import pytest

from residscope.errors import UsageError
from train.model_config import SAEConfig


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "gelu"},
        {"activation": ["topk"]},
        {"standardize": "rms"},
        {"standardize": None},
        {"d_model": 12.0},
        {"d_model": True},
        {"d_model": -12},
        {"d_model": 10**30},
        {"d_model": 2**40, "n_latents": 2**40},
        {"k": None},
        {"k": float("nan")},
        {"encoder_bias": "yes"},
        {"apply_b_dec_to_input": None},
        {"prefixes": 3},
        {"activation": "matryoshka", "prefixes": [10.0, 40]},
        {"standardize": "layer", "layers": [0, 0, 1]},
        {"standardize": "layer", "layers": [0, -1]},
        {"standardize": "layer", "layers": "012"},
        {"standardize": "layer", "layers": [0, 10**400]},
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_short_line(changes: dict[str, Any]) -> None:
    good = {"d_model": 12, "n_latents": 40, "k": 4}
    SAEConfig.from_plain(good)
    with pytest.raises(UsageError) as caught:
        SAEConfig.from_plain({**good, **changes})
    assert len(str(caught.value)) < 200
