"""What open flags stand for: recipes, a checkpoint's record before them, and flags before both."""

from pathlib import Path

import pytest

from store.activations import ActivationStore
from tests.support.stores import make_store, random_activations
from tests.support.training import plan_of, train_config
from train.objective.recipes import Recipe, batch_size, best_batch, best_lr, complete, fill, recorded_flags


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return make_store(tmp_path / "s.zarr", random_activations(n_tokens=160))


def recipe_of(**flags: object) -> Recipe:
    return complete(train_config(store=Path("s.zarr"), **flags), n_latents=2**12, batch_size=64, vectors=10**6)


def test_gao_is_the_scaling_law_with_warm_up_and_decay() -> None:
    assert recipe_of(recipe="gao") == Recipe(recipe="gao", batch_size=64, lr=4e-4)  # 2e-4 / sqrt(2^12 / 2^14)
    gao = Recipe(recipe="gao", batch_size=64, lr=4e-4)
    assert (gao.warmup_fraction, gao.decay_fraction, gao.beta1, gao.beta2) == (0.02, 0.2, 0.9, 0.999)
    assert (gao.clip_norm, gao.encoder_scale, gao.loss_space) == (None, 1.0, "standardized")
    assert (gao.encoder_lr, gao.second_moment) == (1.0, "weight")


def test_paper_is_a_constant_rate_and_a_loss_in_raw_space() -> None:
    expected = Recipe(recipe="paper", batch_size=64, lr=1e-4, warmup_fraction=0.0, decay_fraction=0.0, loss_space="raw")
    assert recipe_of(recipe="paper") == expected


def test_a_flag_that_is_given_counts_in_every_recipe(store: ActivationStore) -> None:
    for name in ("best", "gao", "paper"):
        plan = plan_of(store, k=2, recipe=name, lr=0.5, batch_size=7, beta2=0.5, clip_norm=0.25, decay_fraction=0.0)
        chosen = plan.chosen
        assert (chosen.recipe, chosen.lr, chosen.batch_size, chosen.beta2) == (name, 0.5, 7, 0.5)
        assert (chosen.clip_norm, chosen.decay_fraction) == (0.25, 0.0)


def test_clipping_at_zero_is_none(store: ActivationStore) -> None:
    plan = plan_of(store, k=2, clip_norm=0.0)
    assert plan.chosen.clip_norm is None
    assert plan.flags()["clip_norm"] == 0.0  # written, so that no later recipe clips


def test_best_is_the_default_and_its_rate_falls_with_size_and_length() -> None:
    assert (recipe_of().recipe, recipe_of().decay_fraction) == ("best", 0.5)
    names = ("topk", "batchtopk", "jumprelu", "matryoshka", "relu")
    assert [recipe_of(activation=name).encoder_scale for name in names] == [0.1, 0.1, 0.1, 0.4, 0.4]
    steps = (1, 50, 80, 160, 200, 1000)
    flags = {"n_latents": 2**12, "batch_size": 100}
    scales = [complete(train_config(store=Path("s")), vectors=100 * n, **flags).encoder_scale for n in steps]
    assert scales == [0.4, 0.4, 0.25, 0.125, 0.1, 0.1]
    assert best_lr(4608, 1024, 500_000) == 5e-3
    assert best_lr(16 * 4608, 1024, 500_000) == pytest.approx(2.5e-3)
    assert best_lr(4608, 1024, 500_000 / 16) == best_lr(4608, 1024, 50_000) == pytest.approx(5e-3 * 10**0.25)
    assert best_lr(4608, 1024, 10**6) == best_lr(4608, 1024, 10**7) == pytest.approx(5e-3 / 2**0.25)
    assert best_lr(4608, 1024, 16 * 2 * 10**7) == pytest.approx(2.5e-3 / 2**0.25)  # a rate as of 1e6 / 16 times
    larger = complete(train_config(store=Path("s")), n_latents=16 * 4608, batch_size=100, vectors=10**6)
    assert (larger.encoder_lr, larger.second_moment) == (pytest.approx(2 / 3), "latent")
    assert recipe_of().encoder_lr == 1 / 3  # of 4,096 latents
    long = complete(train_config(store=Path("s")), n_latents=4608, batch_size=1024, vectors=16 * 10**6)
    assert long.encoder_lr == pytest.approx(1 / 6)  # so that its own rate falls with the fourth root of the length
    assert best_lr(4608, 10**6, 500_000) == best_lr(4608, 500_000, 500_000)  # no batch is larger than the run


def test_batches_grow_with_the_run() -> None:
    sizes = [best_batch(vectors) for vectors in (1, 10**5, 5 * 10**5, 10**6, 2 * 10**6, 5 * 10**6, 10**12)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 128
    steps = [vectors / best_batch(vectors) for vectors in range(10**5, 10**6, 10**4)]
    assert min(steps) >= 500
    assert max(steps) <= 1000
    # From there on steps grow with the square root of the run too: four times the vectors, twice the batch.
    assert [best_batch(10**6 * 4**i) for i in range(8)] == [1024 * 2 ** min(i, 6) for i in range(8)]


def test_batches_of_other_recipes_and_of_runs_of_given_steps_are_the_usual() -> None:
    for flags, expected in (({"recipe": "gao"}, 2048), ({"steps": 3}, 2048), ({"batch_size": 5}, 5), ({}, 256)):
        assert batch_size(train_config(store=Path("s.zarr"), **flags), 200_000) == expected
    assert batch_size(train_config(store=Path("s.zarr"), epochs=4), 50_000) == 256


def test_the_flags_of_a_plan_make_the_same_plan(store: ActivationStore) -> None:
    plan = plan_of(store, k=2)
    again = plan_of(store, **{name: value for name, value in plan.flags().items() if name != "store"})
    assert again.chosen == plan.chosen
    assert again.to_dict() == plan.to_dict()


def test_a_record_from_before_recipes_is_gaos() -> None:
    old = {"lr": 0.25, "batch_size": 2048, "warmup_fraction": 0.02, "decay_fraction": 0.2, "loss_space": "standardized"}
    config = fill(train_config(store=Path("s.zarr")), recorded_flags({**old, "clip_norm": None}))
    assert complete(config, n_latents=9, batch_size=2048, vectors=9) == Recipe(recipe="gao", batch_size=2048, lr=0.25)
