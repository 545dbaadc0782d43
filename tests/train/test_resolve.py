"""Defaults resolved against a store, and splits by document."""

from pathlib import Path

import pytest
import torch

from residscope.errors import UsageError
from residscope.options import to_flat
from store.activations import ActivationStore
from tests.support.stores import make_store, random_activations
from tests.support.training import plan_of as resolved
from train.config import TrainConfig
from train.kernels.choose import choose_kernels
from train.parallel.ranks import ALONE, Ranks
from train.resolve import ADDED_LATER, RECORDED, RunPlan, default_aux_k, memory_estimate


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """160 tokens in ten documents of 16, of which position 0 is dropped; layers 3, 5 and 8 of a model."""
    return make_store(tmp_path / "s.zarr", random_activations(n_tokens=160), layers=(3, 5, 8))


def plan_of(store: ActivationStore, **flags: object) -> RunPlan:
    return resolved(store, **{"k": 2, "validation_fraction": 0.2, **flags})


def test_defaults_by_hand(store: ActivationStore) -> None:
    plan = plan_of(store, batch_size=100)
    assert plan.model.n_latents == 16 * 12
    assert plan.vectors == plan.vectors_per_epoch == 8 * 15 * 3
    assert (plan.steps, plan.epochs) == (4, 1)
    assert plan.layers == (3, 5, 8)
    assert plan.dead_vectors == (8 * 15) // 10 * 3  # a tenth of the run's 120 tokens, at three layers
    assert plan.aux_k == 8


def test_every_flag_is_recorded_or_known_to_leave_the_weights_as_they_are() -> None:
    """So that no resume takes another value of a flag for the same run: a new flag that the weights depend on goes into
    `RECORDED`, with what older checkpoints were made with in `ADDED_LATER`; any other goes into the list here."""
    resolved_as = {
        "dead_tokens": "dead_vectors",
        "dtype": "product_dtype",
        "window_gb": "window_bytes",
        "expansion_factor": "n_latents",
        "per_layer": "stream_layers",
    }
    assert set(resolved_as.values()) <= set(RECORDED)
    no_part = {
        *("store", "out", "resume", "overwrite", "dry_run", "json", "follow", "sweep"),
        *("threads", "n_procs", "shard_latents", "deterministic", "cache_gb"),
        *("checkpoint_every", "log_every", "validate_every", "validation_tokens", "tensorboard", "wandb"),
        *("push_to_hub", "hub_private", "hub_license"),
    }
    flags = set(to_flat(TrainConfig(store=Path("acts.zarr"))))
    assert flags - set(RECORDED) == set(resolved_as) | no_part
    assert len(set(RECORDED) - set(ADDED_LATER)) == 23, "a new name has a value for older checkpoints in ADDED_LATER"


def test_steps_and_epochs(store: ActivationStore) -> None:
    by_steps = plan_of(store, batch_size=100, steps=10, layers=(8, 3))
    assert by_steps.layers == (3, 8)
    assert (by_steps.vectors, by_steps.vectors_per_epoch, by_steps.epochs) == (1000, 240, 5)
    assert plan_of(store, batch_size=100, epochs=3).steps == 11
    assert plan_of(store, batch_size=10**6).steps == 1


@pytest.mark.parametrize(("d_model", "aux_k"), [(576, 256), (768, 512), (2048, 1024), (2, 1), (1, 1)])
def test_aux_k_is_the_power_of_two_nearest_half_the_width(d_model: int, aux_k: int) -> None:
    assert default_aux_k(d_model) == aux_k


def test_memory_counts_what_a_variant_needs_beside(store: ActivationStore) -> None:
    def device(**flags: object) -> int:
        plan = plan_of(store, n_latents=100, dtype="float32", batch_size=50, kernels="torch", **flags)
        return memory_estimate([plan], store).device

    plain = device(k=8)
    own_gradients = 4 * 2 * 100 * 12
    assert device(k=8, activation="matryoshka", prefixes=(10, 100)) - plain == 2 * 50 * 12 * 4 + own_gradients
    assert device(k=2, multi_topk=True) - plain == 2 * 50 * 12 * 4 + own_gradients  # its codes are as wide
    assert device(k=2, k_start=8) == plain


def test_of_several_processes_each_needs_less(store: ActivationStore) -> None:
    plan = plan_of(store, n_latents=100_000, dtype="float32", batch_size=64, kernels="torch", aux_coef=0)
    weights, half = 2 * 100_000 * 12 * 4, 64 // 2 * (6 * 4 * 12 + (48 + int(12 * plan_bytes(plan))) * plan.model.k)
    alone = memory_estimate([plan], store)
    sharing, sharding = Ranks(0, 2, local=2), Ranks(0, 2, local=2)
    sharding.rows, sharding.latents = ALONE, sharding
    found = [memory_estimate([plan], store, ranks) for ranks in (sharing, sharding)]
    assert (
        alone.device - found[0].device == weights // 2 - weights // 4 + half
    )  # half of the moments, less a tensor's half
    more = 64 * 3 * 4 * 12  # float32 [N, D] of a reconstruction that is a sum over ranks
    assert alone.device - found[1].device == 3 * weights // 2 - more
    assert [one.local for one in (alone, *found)] == [1, 2, 2]


def plan_bytes(plan: RunPlan) -> float:
    return choose_kernels(torch.empty(0), plan.kernels).pair_bytes


def test_memory_grows_with_what_it_should(store: ActivationStore) -> None:
    small, large = (plan_of(store, n_latents=n, dtype="float32") for n in (100, 1100))
    growth = memory_estimate([large], store).device - memory_estimate([small], store).device
    # Weights, gradients and a moment of W_enc and W_dec in float32, and AuxK's copies and gradients of half of each.
    assert growth == 4 * 2 * 1000 * 12 * 4
    # The whole store, one chunk a layer, twice.
    assert memory_estimate([small], store).shuffle == 2 * 256 * 3 * 12 * 2


def test_one_dimension_is_not_standardised_by_its_own_deviation(tmp_path: Path) -> None:
    store = make_store(tmp_path / "d1.zarr", random_activations(n_tokens=160, d_model=1), layers=(3, 5, 8))
    with pytest.raises(UsageError, match=r"d_model is 1, .* use --standardize layer"):
        plan_of(store, n_latents=8)
    assert plan_of(store, n_latents=8, standardize="layer").model.d_model == 1
