"""Warm-ups by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from residscope.errors import UsageError
from tests.support.stores import make_store, random_activations
from train.config import TrainConfig
from train.objective.schedule import k_at, options_at, sparsity_share, step_options
from train.resolve import RunPlan, make_plan, split_tokens


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    return make(tmp_path_factory.mktemp("plan"))


def make(folder: Path, **changes: object) -> RunPlan:
    store = make_store(folder / "acts.zarr", random_activations(n_tokens=60))
    config = TrainConfig(store=folder, **{"n_latents": 40, "k": 4, "steps": 20, **changes})  # type: ignore[arg-type]
    return make_plan(config, store, split_tokens(store, 0.2, 0))


def test_k_goes_linearly_to_its_value(plan: RunPlan) -> None:
    falling = replace(plan, k_start=24, k_warmup_fraction=0.2)  # over 4 of 20 steps
    assert [k_at(step, falling) for step in (0, 1, 2, 3, 4, 19)] == [24, 19, 14, 9, 4, 4]
    rising = replace(plan, k_start=1, k_warmup_fraction=0.15)
    assert [k_at(step, rising) for step in (0, 1, 2, 3)] == [1, 2, 3, 4]
    assert k_at(0, plan) == 4


def test_the_sparsity_term_rises(plan: RunPlan) -> None:
    assert [sparsity_share(step, plan) for step in (0, 1, 2, 19)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_options_of_a_step(plan: RunPlan) -> None:
    warming = replace(plan, k_start=24, sparsity_coef=0.5, tile_mb=1e-4)
    options = step_options(warming)
    first = options_at(options, warming, 0)
    assert (first.k, first.sparsity_coef) == (24, pytest.approx(0.5 / 3))
    assert options_at(options, warming, 10) is options
    assert (options.k, options.sparsity_coef, options.tile_bytes) == (4, 0.5, 100)


def test_the_defaults_of_a_variant(tmp_path: Path) -> None:
    relu = make(tmp_path / "a", activation="relu")
    assert (relu.encoder_bias, relu.sparsity_coef) == (True, 0.5)
    target = make(tmp_path / "b", activation="jumprelu", encoder_bias=False)
    assert (target.encoder_bias, target.sparsity_coef) == (False, 1.0)
    assert make(tmp_path / "c", activation="jumprelu", sparsity_loss="penalty").sparsity_coef == 0.5
    nested = make(tmp_path / "d", activation="matryoshka")
    assert nested.prefixes == nested.sae_config.prefixes == (1, 4, 9, 19, 40)
    by_layer = make(tmp_path / "e", standardize="layer", layers=(2, 0))
    assert by_layer.sae_config.layers == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multi_topk": True, "activation": "relu"}, "--multi-topk is for --activation topk, not for relu"),
        ({"prefixes": (3, 40)}, "--prefixes is for --activation matryoshka, not for topk"),
        ({"decoder_norm": "free", "activation": "relu"}, "--decoder-norm free is for .* found relu"),
        ({"ema_decay": 1.0}, r"--ema-decay should be in \[0, 1\), found 1.0"),
        ({"clip_norm": 0.0}, "--clip-norm should be above 0"),
        ({"k_start": 41}, "k is 41, but there are only 40 latents"),
        ({"activation": "matryoshka", "prefixes": (3, 2, 40)}, "prefixes should increase .* found 3 2 40"),
        ({"activation": "matryoshka", "prefixes": (3,)}, "from at least 1 to n_latents 40, found 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(tmp_path, **changes)
