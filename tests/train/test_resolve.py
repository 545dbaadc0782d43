"""Defaults resolved against a store, and splits by document."""

from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import pytest

from residscope.errors import IncompatibleError
from store.activations import ActivationStore
from tests.support.stores import make_store, random_activations
from train.config import TrainConfig
from train.resolve import RunPlan, compare_plans, default_aux_k, make_plan, memory_estimate, split_tokens


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """160 tokens in ten documents of 16, of which position 0 is dropped; layers 3, 5 and 8 of a model."""
    return make_store(tmp_path / "s.zarr", random_activations(n_tokens=160), layers=(3, 5, 8))


def plan_of(store: ActivationStore, **flags: object) -> RunPlan:
    config = TrainConfig(store=store.path, **{"k": 2, "validation_fraction": 0.2, **flags})  # type: ignore[arg-type]
    return make_plan(config, store, split_tokens(store, config.validation_fraction, config.seed))


def test_defaults_by_hand(store: ActivationStore) -> None:
    plan = plan_of(store, batch_size=100)
    assert plan.n_latents == 16 * 12
    assert plan.lr == pytest.approx(2e-4 / (192 / 2**14) ** 0.5)
    assert plan.vectors == plan.vectors_per_epoch == 8 * 15 * 3
    assert (plan.steps, plan.epochs) == (4, 1)
    assert plan.layers == (3, 5, 8)
    assert plan.dead_vectors == (8 * 15) // 10 * 3  # a tenth of the run's 120 tokens, at three layers
    assert plan.aux_k == 8


def test_steps_and_epochs(store: ActivationStore) -> None:
    by_steps = plan_of(store, batch_size=100, steps=10, layers=(8, 3))
    assert by_steps.layers == (3, 8)
    assert (by_steps.vectors, by_steps.vectors_per_epoch, by_steps.epochs) == (1000, 240, 5)
    assert plan_of(store, batch_size=100, epochs=3).steps == 11
    assert plan_of(store, batch_size=10**6).steps == 1


@pytest.mark.parametrize(("d_model", "aux_k"), [(576, 256), (768, 512), (2048, 1024), (2, 1), (1, 1)])
def test_aux_k_is_the_power_of_two_nearest_half_the_width(d_model: int, aux_k: int) -> None:
    assert default_aux_k(d_model) == aux_k


def test_no_document_is_on_both_sides(store: ActivationStore) -> None:
    split = split_tokens(store, 0.3, seed=1)
    document = store.tokens.document
    assert split.n_documents == 10
    assert len(set(document[split.validation])) == 3
    assert not set(document[split.train]) & set(document[split.validation])
    assert np.array_equal(split.train | split.validation, store.tokens.keep)
    assert not np.array_equal(split.train, split_tokens(store, 0.3, seed=2).train)


def test_every_difference_between_plans_is_named(store: ActivationStore) -> None:
    plan = plan_of(store)
    for field in fields(RunPlan):
        other = replace(plan, **{field.name: "other"})
        if field.name in ("device", "kernels", "tile_mb"):
            assert field.name in compare_plans("ckpt.pt", other.to_dict() | {"layers": list(plan.layers)}, plan)[0]
        elif field.name not in ("layers", "stream_layers"):
            with pytest.raises(IncompatibleError, match=f"{field.name} was other"):
                compare_plans("ckpt.pt", other.to_dict(), plan)
    assert compare_plans("ckpt.pt", plan.to_dict(), plan) == []
    with pytest.raises(IncompatibleError, match=r"product_dtype was .* give --dtype other to resume"):
        compare_plans("ckpt.pt", plan.to_dict() | {"product_dtype": "other"}, plan)
    for gone in ("float16", "int16"):
        with pytest.raises(IncompatibleError, match=f"product_dtype was {gone} .* no more: give --overwrite"):
            compare_plans("ckpt.pt", plan.to_dict() | {"product_dtype": gone}, plan)


def test_a_plan_from_before_an_option_was_there_is_that_of_its_default(store: ActivationStore) -> None:
    plan = plan_of(store)
    optional = {field.name for field in fields(RunPlan) if field.default is not MISSING}
    old = {name: value for name, value in plan.to_dict().items() if name not in optional}
    assert compare_plans("ckpt.pt", old, plan) == []


def test_memory_counts_what_a_variant_needs_beside(store: ActivationStore) -> None:
    def device(**flags: object) -> int:
        plan = plan_of(store, n_latents=100, dtype="float32", batch_size=50, kernels="torch", **flags)
        return memory_estimate([plan], store).device

    plain = device(k=8)
    own_gradients = 4 * 2 * 100 * 12
    assert device(k=8, activation="matryoshka", prefixes=(10, 100)) - plain == 2 * 50 * 12 * 4 + own_gradients
    assert device(k=2, multi_topk=True) - plain == 2 * 50 * 12 * 4 + own_gradients  # its codes are as wide
    assert device(k=2, k_start=8) == plain


def test_memory_grows_with_what_it_should(store: ActivationStore) -> None:
    small, large = (plan_of(store, n_latents=n, dtype="float32") for n in (100, 1100))
    growth = memory_estimate([large], store).device - memory_estimate([small], store).device
    assert growth == 4 * 2 * 1000 * 12 * 4  # weights, gradients and two moments of W_enc and W_dec in float32
    # The whole store, one chunk a layer, twice.
    assert memory_estimate([small], store).shuffle == 2 * 256 * 3 * 12 * 2
