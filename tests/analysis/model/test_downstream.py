"""Downstream quality: what is replaced, what is compared with what, in which direction, and what stays untouched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from analysis.model import downstream
from analysis.model.continuation import can_skip
from analysis.model.downstream import TrueRun, compare, measure_downstream, sae_reconstruction
from analysis.model.downstream_numbers import BOUNDED, PER_LAYER, Downstream
from analysis.model.sequences import batches_to_measure, sequence_bounds
from analysis.model.transformer import lens_of_store, spec_of_store
from harvest.lens.translators import TunedLens
from harvest.model.checks import check_logits
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from store.arrays import TokenTable
from tests.support.harvested import Harvested, make_harvested, write_lens
from tests.support.models import ARCHITECTURES, D_MODEL, N_LAYERS, tiny_model
from tests.support.saes import make_sae

Make = Callable[..., Harvested]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A harvested store of a tiny model, with or without a lens; each is made once."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("downstream")
    made: dict[Any, Harvested] = {}

    def make_one(architecture: str, *, with_lens: bool = False) -> Harvested:
        if (architecture, with_lens) not in made:
            made[architecture, with_lens] = make_harvested(root, architecture, with_lens=with_lens)
        return made[architecture, with_lens]

    return make_one


def identity(x: Tensor, layer: int) -> Tensor:
    return x


def through(lens: TunedLens | None) -> downstream.Replace:
    """Into the lens's basis and back, with the identity in place of the autoencoder."""
    if lens is None:
        return identity
    return lambda x, layer: lens.invert(lens.apply(x, layer), layer)


def by_hand(
    made: Harvested, change: Callable[..., Tensor] | None = None, *layers: int, by_layer: bool = False
) -> tuple[Tensor, Tensor]:
    """Log probabilities [n, V] at, and next tokens [n] of, the counted tokens: each sequence alone, through the whole
    model with its head; `change` (residual [N, D], kept [N], and the layer if `by_layer`) makes the output of each of
    the blocks `layers`."""
    tokens = made.store.tokens
    log_probs, targets = [], []
    for start, stop in zip(*sequence_bounds(tokens.position), strict=True):
        keep = torch.tensor(tokens.keep[start:stop])
        ids = torch.from_numpy(tokens.token_id[start:stop].astype(np.int64))

        def hook(module: Any, arguments: Any, output: Any, keep: Tensor = keep) -> Any:
            assert change is not None
            residual = output[0] if isinstance(output, tuple) else output
            which = [list(made.model.blocks).index(module)] if by_layer else []
            changed = change(residual[0], keep, *which)[None]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles = [made.model.blocks[layer].register_forward_hook(hook) for layer in layers]
        with torch.no_grad():
            logits = made.model.causal_lm(ids[None]).logits[0]
        for handle in handles:
            handle.remove()
        log_probs.append(logits[:-1][keep[:-1]].log_softmax(-1))
        targets.append(ids[1:][keep[:-1]])
    return torch.cat(log_probs), torch.cat(targets)


@pytest.mark.parametrize("with_lens", [False, True], ids=["bare", "lens"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_perfect_reconstruction_costs_nothing_at_any_layer(make: Make, architecture: str, with_lens: bool) -> None:
    made = make(architecture, with_lens=with_lens)
    found = measure_downstream(made.store, made.model, through(made.lens), lens=made.lens).result()
    assert len(found.delta_ce) == N_LAYERS[architecture]
    np.testing.assert_allclose(found.delta_ce, 0, atol=1e-6)
    np.testing.assert_allclose(found.kl, 0, atol=1e-6)
    some = np.where(found.mean_ablation_delta_ce > 0, 1, np.nan)  # else there is nothing to recover
    np.testing.assert_allclose(found.loss_recovered_mean, some, atol=1e-4)
    if not with_lens:
        assert not found.delta_ce.any()  # the very same numbers go on: exactly nothing changes
        assert not found.kl.any()


@pytest.mark.parametrize("with_lens", [False, True], ids=["bare", "lens"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zero_and_mean_ablation_are_what_one_computes_by_hand(make: Make, architecture: str, with_lens: bool) -> None:
    made = make(architecture, with_lens=with_lens)
    found = measure_downstream(made.store, made.model, lambda x, layer: torch.zeros_like(x), lens=made.lens).result()
    np.testing.assert_array_equal(found.delta_ce, found.zero_ablation_delta_ce)
    np.testing.assert_array_equal(found.kl, found.zero_ablation_kl)
    true, target = by_hand(made)
    true_ce = cross_entropy(true, target).item()
    assert found.n_tokens == len(target)
    assert found.true_ce == pytest.approx(true_ce, abs=1e-5)
    raw = make(architecture, with_lens=False).store  # the vectors as the model has them
    mean = torch.from_numpy(raw.read(None, None)[raw.tokens.keep].mean(axis=0))  # [L, D]
    for layer in range(N_LAYERS[architecture]):
        zeroed, _ = by_hand(made, lambda x, keep: torch.where(keep[:, None], 0.0, x), layer)
        averaged, _ = by_hand(made, lambda x, keep, m=mean[layer]: torch.where(keep[:, None], m, x), layer)
        zero_ce, mean_ce = (cross_entropy(other, target).item() for other in (zeroed, averaged))
        assert found.zero_ablation_delta_ce[layer] == pytest.approx(zero_ce - true_ce, abs=2e-5)
        assert found.mean_ablation_delta_ce[layer] == pytest.approx(mean_ce - true_ce, abs=2e-5)
        for kl, other in ((found.zero_ablation_kl, zeroed), (found.mean_ablation_kl, averaged)):
            expected = kl_div(other, true, log_target=True, reduction="batchmean").item()
            assert kl[layer] == pytest.approx(expected, abs=2e-5)
        recovered = (mean_ce - zero_ce) / (mean_ce - true_ce) if mean_ce > true_ce else np.nan
        assert found.loss_recovered_mean[layer] == pytest.approx(recovered, rel=1e-2, abs=1e-3, nan_ok=True)
        assert found.loss_recovered_zero[layer] == pytest.approx(0 if zero_ce > true_ce else np.nan, nan_ok=True)


@pytest.mark.parametrize("with_lens", [False, True], ids=["bare", "lens"])
def test_the_autoencoder_speaks_the_lens_and_the_model_does_not(make: Make, with_lens: bool) -> None:
    made = make("llama", with_lens=with_lens)
    sae = make_sae(d=D_MODEL, m=96, k=8)
    found = measure_downstream(made.store, made.model, sae_reconstruction(sae, made.lens), lens=made.lens).result()
    true, target = by_hand(made)
    for layer in range(N_LAYERS["llama"]):

        def reconstruct(x: Tensor, keep: Tensor, layer: int = layer) -> Tensor:
            y = x if made.lens is None else made.lens.apply(x, layer)
            y_hat = sae(y).x_hat
            x_hat = y_hat if made.lens is None else made.lens.invert(y_hat, layer)
            return torch.where(keep[:, None], x_hat, x)

        other, _ = by_hand(made, reconstruct, layer)
        expected = (cross_entropy(other, target) - cross_entropy(true, target)).item()
        assert found.delta_ce[layer] == pytest.approx(expected, abs=1e-4)
        assert found.kl[layer] == pytest.approx(
            kl_div(other, true, log_target=True, reduction="batchmean").item(), 1e-3
        )


def test_divergence_goes_from_the_true_to_the_replaced_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downstream, "TILE_BYTES", 4 * 11 * 3)  # three rows at once, so that tiles have to join
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(11, 5, generator=generator)
    true, *replaced = torch.randn(4, 8, 5, generator=generator)
    target = torch.randint(0, 11, (8,), generator=generator)
    known = TrueRun(lambda x: x @ head.T, true)
    true_ce, ce, kl = compare(known, replaced, target)
    assert all(torch.equal(a, b) for a, b in zip(compare(known, replaced, target), (true_ce, ce, kl), strict=True))
    monkeypatch.setattr(downstream, "KEPT_BYTES", 0)
    again = compare(TrueRun(lambda x: x @ head.T, true), replaced, target)
    assert all(torch.equal(a, b) for a, b in zip(again, (true_ce, ce, kl), strict=True))
    log_p = (true @ head.T).log_softmax(-1)
    torch.testing.assert_close(true_ce.float(), cross_entropy(true @ head.T, target, reduction="none"))
    for i, other in enumerate(replaced):
        log_q = (other @ head.T).log_softmax(-1)
        expected = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # sum p (log p - log q)
        reverse = kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(kl[i].float(), expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(kl[i].float(), reverse, rtol=0.01)
        torch.testing.assert_close(ce[i].float(), cross_entropy(other @ head.T, target, reduction="none"))


def test_numbers_are_means_over_tokens_of_all_documents() -> None:
    found = Downstream(
        layers=np.array([3]),
        documents=np.array([0, 7]),
        n_tokens=np.array([1, 3]),
        true_ce=np.array([2.0, 3.0]),
        ce=np.array([[[3.0, 6.0], [5.0, 12.0], [9.0, 16.0]]]),
        kl=np.array([[[0.5, 1.5], [2.0, 2.0], [4.0, 4.0]]]),
    ).result()
    assert found.true_ce == 5 / 4
    assert [found.delta_ce[0], found.mean_ablation_delta_ce[0], found.zero_ablation_delta_ce[0]] == [1, 3, 5]
    assert [found.kl[0], found.mean_ablation_kl[0], found.zero_ablation_kl[0]] == [0.5, 1, 2]
    assert [found.loss_recovered_mean[0], found.loss_recovered_zero[0]] == pytest.approx([2 / 3, 4 / 5])


def test_an_ablation_that_costs_next_to_nothing_leaves_nothing_to_recover() -> None:
    """Mean ablation costs 0.009 nats a token, zero ablation 0.011, the reconstruction 0.022."""
    ce = np.array([[[3.022], [3.009], [3.011]]])
    one = np.ones(1, np.int64)
    found = Downstream(
        layers=one, documents=one, n_tokens=one, true_ce=np.array([3.0]), ce=ce, kl=np.zeros((1, 3, 1))
    ).result()
    assert np.isnan(found.loss_recovered_mean[0])
    assert found.loss_recovered_zero[0] == pytest.approx(-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_true_run_is_the_same_before_and_after(make: Make, architecture: str) -> None:
    made = make(architecture)
    before, _ = by_hand(made)
    measure_downstream(made.store, made.model, lambda x, layer: x.mul_(0) + 1, lens=None)
    after, _ = by_hand(made)
    assert torch.equal(before, after)

    def fail(x: Tensor, layer: int) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        measure_downstream(made.store, made.model, fail, lens=None)
    assert all("forward" not in vars(block) and not block._forward_hooks for block in made.model.blocks)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_skipped_blocks_change_nothing(make: Make, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(architecture)
    assert can_skip(made.model, torch.arange(20)[None])
    sae = make_sae(d=D_MODEL, m=96, k=8)
    skipping = measure_downstream(made.store, made.model, sae_reconstruction(sae, None), lens=None)
    monkeypatch.setattr(downstream, "can_skip", lambda model, input_ids: False)
    running = measure_downstream(made.store, made.model, sae_reconstruction(sae, None), lens=None)
    np.testing.assert_array_equal(skipping.ce, running.ce)
    np.testing.assert_array_equal(skipping.kl, running.kl)


def test_a_block_that_takes_more_than_the_residual_stream_is_not_starved(make: Make) -> None:
    made = make("llama")
    blocks = made.model.blocks
    kept: list[Tensor] = []

    def leave(module: Any, arguments: Any, output: Tensor) -> None:
        kept[:] = [output]

    def take(module: Any, arguments: Any, output: Any) -> Any:
        return output + kept.pop()

    handles = [
        made.model.base.register_forward_pre_hook(lambda module, arguments: kept.clear()),
        blocks[0]
        .get_submodule("self_attn.v_proj")
        .register_forward_hook(lambda module, arguments, output: leave(module, arguments, output.repeat(1, 1, 2))),
        blocks[3].register_forward_hook(take),
    ]
    try:
        assert not can_skip(made.model, torch.arange(20)[None])
    finally:
        for handle in handles:
            handle.remove()
    assert can_skip(made.model, torch.arange(20)[None])
    assert all("forward" not in vars(block) and not block._forward_hooks for block in blocks)


def test_a_replacement_sees_the_kept_tokens_of_its_layer_and_no_other(make: Make) -> None:
    made = make("llama")
    seen: dict[int, list[Tensor]] = {}

    def watch(x: Tensor, layer: int) -> Tensor:
        seen.setdefault(layer, []).append(x.clone())
        return x + 1

    measure_downstream(made.store, made.model, watch, lens=None, layers=[1, 3])
    stored = made.store.read(None, None)[made.store.tokens.keep]
    assert sorted(seen) == [1, 3]
    for layer, parts in seen.items():
        np.testing.assert_allclose(torch.cat(parts).numpy(), stored[:, layer], rtol=1e-4, atol=1e-4)


def test_only_chosen_documents_count(make: Make) -> None:
    made = make("gpt2")
    tokens = made.store.tokens
    chosen = np.isin(tokens.document, [1, 3])
    found = measure_downstream(made.store, made.model, identity, lens=None, counted=chosen)
    assert found.documents.tolist() == [1, 3]
    _, stops = sequence_bounds(tokens.position)
    last = np.zeros(len(chosen), bool)
    last[stops - 1] = True
    expected = chosen & tokens.keep & ~last
    assert found.n_tokens.tolist() == [expected[tokens.document == i].sum() for i in (1, 3)]
    true, _ = by_hand(made)
    all_true = measure_downstream(made.store, made.model, identity, lens=None)
    everyone = dict(zip(all_true.documents.tolist(), all_true.true_ce, strict=True))
    assert len(true) == all_true.n_tokens.sum()
    np.testing.assert_allclose(found.true_ce, [everyone[1], everyone[3]], rtol=1e-6)
    with pytest.raises(ResidscopeError, match="nothing to predict"):
        measure_downstream(made.store, made.model, identity, lens=None, counted=np.zeros_like(chosen))


def test_batches_do_not_change_the_numbers(make: Make) -> None:
    made = make("gemma")
    sae = make_sae(d=D_MODEL, m=96, k=8)
    one, many = (
        measure_downstream(made.store, made.model, sae_reconstruction(sae, None), lens=None, batch_tokens=n).result()
        for n in (1, 4096)
    )
    for name in PER_LAYER:
        np.testing.assert_allclose(getattr(one, name), getattr(many, name), rtol=1e-3, atol=1e-4)


def test_sequences_are_whole_and_spread_evenly() -> None:
    position = np.tile(np.arange(10, dtype=np.int32), 20)[:195]
    tokens = TokenTable(np.arange(195, dtype=np.int32), position // 3, position, position != 0)
    batches = batches_to_measure(tokens, np.ones(195, bool), max_tokens=10_000, batch_tokens=40)
    assert [batch.input_ids.shape for batch in batches] == [(4, 10)] * 4 + [(3, 10), (1, 5)]
    assert torch.cat([batch.input_ids.flatten() for batch in batches]).tolist() == list(range(195))
    assert sum(int(batch.counted.sum()) for batch in batches) == 19 * 8 + 3  # neither first nor last of any
    for batch in batches:
        assert not batch.counted[:, [0, -1]].any()
        assert torch.equal(batch.kept, batch.input_ids % 10 != 0)
        assert batch.document.tolist() == (batch.input_ids[batch.counted] % 10 // 3).tolist()
    few = batches_to_measure(tokens, np.ones(195, bool), max_tokens=30, batch_tokens=1)
    assert sum(int(batch.counted.sum()) for batch in few) == 30
    assert [int(batch.input_ids[0, 0]) for batch in few] == [20, 70, 120, 170]


def test_intervals_are_over_documents(make: Make) -> None:
    rng = np.random.default_rng(0)
    n = np.full(40, 25)
    noise = rng.normal(1, 0.5, 40)
    ce = np.stack([3 + noise, 5 + noise, 9 + noise])[None] * n
    found = Downstream(layers=np.array([0]), documents=np.arange(40), n_tokens=n, true_ce=3.0 * n, ce=ce, kl=np.abs(ce))
    intervals = found.intervals()
    assert set(intervals) == set(PER_LAYER)
    low, high = intervals["delta_ce"][0] or (0, 0)
    assert low < noise.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * noise.std() / np.sqrt(40), rel=0.15)
    assert intervals == found.intervals()
    assert len(intervals["kl"]) == 2  # the layer, and the mean over layers
    assert intervals["kl"][0] == intervals["kl"][1]
    with_two = Downstream(
        layers=np.arange(2),
        documents=np.arange(40),
        n_tokens=n,
        true_ce=3.0 * n,
        ce=np.concatenate([ce, 6 * n - ce]),
        kl=np.concatenate([np.abs(ce)] * 2),
    )
    mean = with_two.intervals()["delta_ce"][-1]
    assert mean == pytest.approx((0, 0), abs=1e-12)  # the layers' noise cancels in every replicate
    made = make("gpt2")
    assert measure_downstream(made.store, made.model, identity, lens=None).intervals() == {}


def not_published(*args: Any, **options: Any) -> Any:
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("offline")


def test_another_model_or_lens_is_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, with_lens = make("llama"), make("llama", with_lens=True)
    other = tiny_model("llama", tmp_path / "llama", seed=1)
    with pytest.raises(IncompatibleError, match="content hash"):
        spec_of_store(made.store, str(other))
    with pytest.raises(UsageError, match="give its path with"):
        spec_of_store(made.store)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.hf_hub_download", not_published)
        with pytest.raises(UsageError, match="give its path with"):
            lens_of_store(with_lens.store)
    lens_folder = write_lens(tmp_path / "lens", N_LAYERS["llama"])
    config = json.loads((lens_folder / "config.json").read_text())
    (lens_folder / "config.json").write_text(json.dumps(config | {"revision": "another"}))
    with pytest.raises(IncompatibleError, match="its hash should be"):
        lens_of_store(with_lens.store, str(lens_folder))
    with pytest.raises(IncompatibleError, match="does not reproduce"):
        measure_downstream(with_lens.store, with_lens.model, identity, lens=None)
    with pytest.raises(IncompatibleError, match=r"should be \(4, 32\), as .* found \(3, 32\)"):
        measure_downstream(made.store, make("gpt_neox").model, identity, lens=None, layers=[0])


def test_logits_that_are_not_norm_and_unembedding_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2").model
    ids = torch.arange(5)[None]
    check_logits(model, ids)
    monkeypatch.setattr(model.causal_lm.config, "logit_scale", 2.0, raising=False)
    with pytest.raises(ResidscopeError, match="do not give the model's logits"):
        check_logits(model, ids)


def test_numbers_with_columns_for_intervals_are_among_those_by_layer() -> None:
    assert set(BOUNDED) <= set(PER_LAYER)


@pytest.mark.parametrize("with_lens", [False, True], ids=["bare", "lens"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_layers_are_replaced_one_on_top_of_the_other(make: Make, architecture: str, with_lens: bool) -> None:
    made, sae = make(architecture, with_lens=with_lens), make_sae(d=D_MODEL, m=96, k=8)
    replace, n_layers = sae_reconstruction(sae, made.lens), N_LAYERS[architecture]
    groups = [(1, n_layers - 1), tuple(range(n_layers)), (1,), (0, 1)]
    found = measure_downstream(made.store, made.model, replace, lens=made.lens, groups=groups).result()
    alone = measure_downstream(made.store, made.model, replace, lens=made.lens).result()
    assert found.delta_ce[2] == pytest.approx(alone.delta_ce[1], abs=1e-6)
    assert found.kl[2] == pytest.approx(alone.kl[1], abs=1e-6)
    true, target = by_hand(made)

    def reconstructed(x: Tensor, keep: Tensor, layer: int) -> Tensor:
        return torch.where(keep[:, None], replace(x, layer), x)

    for i, group in enumerate(groups):
        other, _ = by_hand(made, reconstructed, *group, by_layer=True)
        expected = cross_entropy(other, target).item() - cross_entropy(true, target).item()
        assert found.delta_ce[i] == pytest.approx(expected, rel=1e-3, abs=1e-4), group
        kl = kl_div(other, true, log_target=True, reduction="batchmean").item()
        assert found.kl[i] == pytest.approx(kl, rel=1e-3, abs=1e-4), group
    zeroed, _ = by_hand(made, lambda x, keep: torch.where(keep[:, None], 0.0, x), *groups[1])
    expected = cross_entropy(zeroed, target).item() - cross_entropy(true, target).item()
    assert found.zero_ablation_delta_ce[1] == pytest.approx(expected, abs=2e-4)
    asked: dict[str, Any] = {"groups": groups, "n_lean": 2, "pca": replace}  # which says of PCA what is true of it
    lean = measure_downstream(made.store, made.model, replace, lens=made.lens, **asked).result()
    np.testing.assert_allclose(lean.delta_ce, found.delta_ce, atol=1e-9)
    np.testing.assert_allclose(lean.zero_ablation_kl[:2], found.kl[:2], atol=1e-9)
    assert np.isnan([lean.zero_ablation_kl[2:], lean.mean_ablation_delta_ce[2:], lean.loss_recovered_mean[2:]]).all()
    assert not any(block._forward_hooks for block in made.model.blocks)
