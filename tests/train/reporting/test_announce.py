"""What a training says, by hand."""

from pathlib import Path

import pytest
import torch

from residscope.console import counted
from residscope.errors import ResidscopeError
from tests.support.stores import make_store, random_activations
from tests.support.training import plan_of, train_config
from train.data import TrainingData
from train.reporting import announce as words
from train.resolve import MemoryEstimate


def test_a_spread_is_one_value_or_the_least_and_the_largest() -> None:
    assert words.spread([], ".2f") == "-"
    assert words.spread([0.214, 0.212], ".2f") == "0.21"
    assert words.spread([0.35, 0.21, 0.3], ".2f") == "0.21 to 0.35"
    assert words.spread([64, 32]) == "32 to 64"


def test_the_bar_says_what_was_measured(tmp_path: Path) -> None:
    """2,000 vectors of 12 bfloat16 in 0.5 s, half a tenth of it waited: 4,000 vectors, 96 kB a second."""
    store = make_store(tmp_path / "a.zarr", random_activations(n_tokens=64, n_layers=4))
    data = TrainingData.open(train_config(store=store.path), store)
    lines = [
        {"fvu": 0.5, "l0": 4.0, "dead_fraction": 0.0},
        {"fvu": 0.25, "l0": 4.0, "dead_fraction": 0.125},
        {"fvu": None, "l0": None, "dead_fraction": 0.0},  # of one layer, none of whose vectors came
    ]
    said = words.bar_words(lines, data, vectors=2000, seconds=0.5, waited=0.05)
    assert said == (
        "FVU 0.250 to 0.500, L0 4.0, dead 0.0% to 12.5%, 4000 vectors/s, 1000 tokens/s, 9.6e-05 GB/s, data wait 10%"
    )


def test_runs_are_announced_together_and_memory_only_where_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "a.zarr", random_activations(n_tokens=400))
    flags = {"dtype": "float32", "k": 4, "batch_size": 64, "steps": 5, "validation_fraction": 0.0, "kernels": "torch"}
    plans = [plan_of(store, n_latents=n, lr=lr, **flags) for n, lr in ((20, 1e-3), (40, 2e-3))]
    words.tell_plans(plans, 3, None)
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "train: 2 of 3 runs to do in one pass: 20 to 40 latents, k 4, 3 layers of d_model 12; 5 steps of 64 vectors "
        f"(epochs: {320 / (3 * int(store.tokens.keep.sum())):.3g}), learning rate 0.001 to 0.002, "
        "of the encoder 0.00033 to 0.00067 (recipe best)"
    )
    assert second == f"train: cpu, float32 product, torch kernels, {counted(torch.get_num_threads(), 'thread')}"
    words.tell_plans(plans[:1], 1, MemoryEstimate(device=5_000_000, shuffle=2_000))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("train: 20 latents, k 4, 3 layers")
    assert second.endswith("; memory about 5 MB and 2 kB for the shuffle")
    relu = plan_of(store, n_latents=20, activation="relu", **flags)  # of which k is no property
    for some, said in (([relu], "20 latents, 3 layers"), ([relu, plans[0]], "20 latents, k 4, 3 layers")):
        words.tell_plans(some, 1, None)
        assert capsys.readouterr().err.startswith(f"train: {said}")


def test_what_does_not_fit_is_refused_with_a_way_out() -> None:
    words.refuse_too_large(MemoryEstimate(device=1000, shuffle=1000), torch.device("cpu"), 1)
    free = words.free_memory()
    assert free is not None
    with pytest.raises(ResidscopeError, match="out of memory"):  # two processes share what is free
        words.refuse_too_large(MemoryEstimate(device=free * 2 // 3, shuffle=0, local=2), torch.device("cpu"), 1)
    huge = MemoryEstimate(device=2**60, shuffle=1)
    with pytest.raises(ResidscopeError, match=r"lower --n-latents or .*, --batch-size, --tile-mb or --window-gb$"):
        words.refuse_too_large(huge, torch.device("cpu"), 1)
    with pytest.raises(ResidscopeError, match=r"or do fewer runs at once$"):
        words.refuse_too_large(huge, torch.device("cpu"), 2)
