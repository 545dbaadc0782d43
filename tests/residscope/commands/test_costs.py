"""Costs by arithmetic, against numbers worked out by hand."""

import pytest

from residscope.commands.costs import (
    GATHERING,
    PACKING,
    START,
    Gpu,
    Model,
    Training,
    cost,
    gpu_memory,
    share_latents,
    step_parts,
    step_seconds,
    token_parts,
)
from residscope.errors import UsageError

GPU = Gpu(flops=1e12, bandwidth=1e11, memory=1e10, link=1e10, bus=1e9)
MODEL = Model(n_layers=4, d_model=100, block_parameters=1_000_000, context=50)
RUN = Training(n_latents=10_000, k=10, batch=1000, steps=7, d_model=100)


def test_a_token_of_harvest_by_hand() -> None:
    """2 x 1e6 for the weights, 2 x 4 x 50 x 100 for attention; 4 x 100 x 2 bytes."""
    assert MODEL.token_flops == 2_040_000
    assert MODEL.token_bytes == 800
    parts = token_parts(MODEL, GPU, 2, disk=1e6, threads=4)
    assert parts == pytest.approx(
        {
            "the model's forward pass": 2_040_000 / 0.4e12,
            "copies from the GPU": 8e-7,
            "packing of shards": 800 / (4 * PACKING),
            "writing to the disk": 1.6e-3,
        }
    )
    assert "writing to the disk" not in token_parts(MODEL, GPU, 2, disk=None, threads=4)


def test_a_step_on_one_gpu_by_hand() -> None:
    """N M = 1e7, M D = 1e6: one tile of 20 MB, the weights once in two bytes."""
    parts = step_parts(RUN, GPU, 1, 1, disk=1e6)
    assert parts == pytest.approx(
        {
            "the encoder's product": 2e9 / 0.6e12,
            "weights and pre-activations in the GPU's memory": (2e6 + 4e7) / 0.8e11,
            "the optimiser's passes over memory": 40e6 / 0.8e11,
            "decoder and sparse gradients": 1.6e7 / 0.8e11,
            "gathering of rows in the machine's memory": 2e5 / GATHERING,
            "copies to the GPU": 2e-4,
            "sums between GPUs": 0,
            "reading from the disk": 0.2,
        }
    )
    assert step_seconds(parts) == 0.2  # the rest is done meanwhile
    rest = {name: s for name, s in parts.items() if name != "reading from the disk"}
    own = 2e9 / 0.6e12 + (2e6 + 4e7 + 40e6 + 1.6e7) / 0.8e11 + 2e-4
    assert step_seconds(rest) == pytest.approx(own)
    assert step_seconds({**rest, "gathering of rows in the machine's memory": 1.0}) == 1.0


@pytest.mark.parametrize(
    ("latents", "bytes_sent"),
    [(1, 16e6 * 3 / 4), (2, 16e6 / 2 * 1 / 2 + (40 * 2 + 800) * 500 / 2), (4, (40 * 4 + 800) * 1000 * 3 / 4)],
)
def test_what_four_gpus_send_each_other(latents: int, bytes_sent: float) -> None:
    """Gradients and weights over those that share rows, candidates and reconstructions over the others."""
    assert step_parts(RUN, GPU, 4, latents, disk=None)["sums between GPUs"] == pytest.approx(bytes_sent / 1e10)


def test_latents_are_shared_by_as_few_gpus_as_hold_them() -> None:
    assert gpu_memory(RUN, 1, 1) == 24e6 + 1000 * (2400 + 480) + 4 * 512e6
    large = RUN._replace(n_latents=5_000_000)  # 24 x 5e8 = 12 GB on one GPU of 10
    with pytest.raises(UsageError, match="--n-latents 5,000,000"):
        share_latents(large, GPU, 1)
    assert share_latents(large, GPU, 2) == 2
    assert share_latents(RUN, GPU, 2) == 1


def test_gpus_are_divided_so_that_both_end_as_early_as_can_be() -> None:
    """Six GPUs: 60 s of one GPU's harvest and 40 steps of 6 s: 60 / a against 240 / (6 - a), best with a = 1."""
    how = {"disk": 1.0, "host_memory": 2.0, "token": lambda n: {"forward": 0.6}}
    run = RUN._replace(steps=40)

    def step(n: int) -> tuple[dict[str, float], int, float]:
        return {"product": 6.0 / n}, 1, 5.0

    both = cost(100, run, 6, step=step, at_once=True, **how)
    assert (both.cards, both.together, both.bound) == ((1, 5), START + 60, "harvest: forward")
    one_after_the_other = cost(100, run, 6, step=step, at_once=False, **how)
    assert one_after_the_other.cards == (6, 6)
    assert one_after_the_other.together == pytest.approx(2 * START + 10 + 40)
    alone = cost(100, run, 1, step=step, at_once=True, **how)
    assert alone.together == pytest.approx(2 * START + 60 + 240)
    assert alone.bound == "train: product"
    two = cost(100, run, 2, step=step, at_once=True, **how)
    assert (two.cards, two.together) == ((1, 1), START + 240)
