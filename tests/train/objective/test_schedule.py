"""Warm-ups by hand."""

import pytest

from residscope.errors import UsageError
from store.activations import ActivationStore
from tests.support.stores import make_store, random_activations
from tests.support.training import plan_of
from train.objective.variants import StepOptions
from train.resolve import RunPlan


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return make_store(tmp_path_factory.mktemp("data") / "acts.zarr", random_activations(n_tokens=60))


def make(store: ActivationStore, **changes: object) -> RunPlan:
    return plan_of(store, **{"n_latents": 40, "k": 4, "steps": 20, "validation_fraction": 0.2, **changes})


def at(plan: RunPlan, *steps: int) -> list[StepOptions]:
    return [plan.options_at(step) for step in steps]


def test_k_goes_linearly_to_its_value(store: ActivationStore) -> None:
    falling = make(store, k_start=24, k_warmup_fraction=0.2)  # over 4 of 20 steps
    assert [options.k for options in at(falling, 0, 1, 2, 3, 4, 19)] == [24, 19, 14, 9, 4, 4]
    rising = make(store, k_start=1, k_warmup_fraction=0.15)
    assert [options.k for options in at(rising, 0, 1, 2, 3)] == [1, 2, 3, 4]
    assert at(make(store), 0)[0].k == 4


def test_the_sparsity_term_rises(store: ActivationStore) -> None:
    rising = at(make(store, activation="relu", sparsity_coef=0.5), 0, 1, 2, 19)
    assert [options.sparsity_coef for options in rising] == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.5])


def test_options_of_a_step(store: ActivationStore) -> None:
    warming = make(store, activation="jumprelu", k_start=24, sparsity_coef=0.5, tile_mb=1e-4)
    first, options, last = at(warming, 0, 10, 19)
    assert (first.k, first.sparsity_coef) == (24, pytest.approx(0.5 / 3))
    assert (last.k, last.sparsity_coef) == (4, 0.5)
    assert (options.k, options.sparsity_coef, options.tile_bytes) == (4, 0.5, 100)


def test_the_defaults_of_a_variant(store: ActivationStore) -> None:
    relu = make(store, activation="relu")
    assert (relu.model.encoder_bias, relu.sparsity_coef) == (True, 0.5)
    target = make(store, activation="jumprelu", encoder_bias=False)
    assert (target.model.encoder_bias, target.sparsity_coef) == (False, 1.0)
    assert make(store, activation="jumprelu", sparsity_loss="penalty").sparsity_coef == 0.5
    nested = make(store, activation="matryoshka")
    assert nested.model.prefixes == (1, 4, 9, 19, 40)
    by_layer = make(store, standardize="layer", layers=(2, 0))
    assert by_layer.model.layers == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multi_topk": True, "activation": "relu"}, "--multi-topk is for --activation topk, not for relu"),
        (
            {"k_start": 8, "activation": "relu"},
            "--k-start is for --activation topk, batchtopk, matryoshka, jumprelu, not for relu",
        ),
        ({"bandwidth": 0.5}, "--bandwidth is for --activation jumprelu, not for topk"),
        ({"sparsity_coef": 0.5}, "--sparsity-coef is for --activation jumprelu, relu, not for topk"),
        (
            {"sparsity_loss": "penalty", "activation": "relu"},
            "--sparsity-loss is for --activation jumprelu, not for relu",
        ),
        ({"prefixes": (3, 40)}, "--prefixes is for --activation matryoshka, not for topk"),
        ({"decoder_norm": "free", "activation": "relu"}, "--decoder-norm free is for .* found relu"),
        ({"ema_decay": 1.0}, r"--ema-decay should be in \[0, 1\), found 1.0"),
        ({"clip_norm": -1.0}, "--clip-norm should be 0 or more"),
        ({"k_start": 41}, "k is 41, but there are only 40 latents"),
        ({"activation": "matryoshka", "prefixes": (3, 2, 40)}, "prefixes should increase .* found 3 2 40"),
        ({"activation": "matryoshka", "prefixes": (3,)}, "from at least 1 to n_latents 40, found 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(store: ActivationStore, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(store, **changes)
