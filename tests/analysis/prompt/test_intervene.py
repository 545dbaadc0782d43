"""Interventions against forward passes made by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.prompt.intervene import N_AT_TOKEN, Effect, Intervention, PromptRun, parse_ablate, parse_steer
from analysis.prompt.view import Usual, check_positions, latents_of, run_prompt
from residscope.errors import UsageError
from tests.support.models import ARCHITECTURES, N_LAYERS
from tests.support.prompted import TEXT, Make, Setting, read


def by_hand(setting: Setting, tokens: Any, layer: int, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Log probabilities [N, V] of the true run and of one in which `change` makes block `layer`'s output [n, D] at the
    kept positions, through the whole model with its head."""
    model, kept = setting.made.model, torch.from_numpy(tokens.kept)
    ids = torch.from_numpy(tokens.ids)[None]

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        residual = output[0] if isinstance(output, tuple) else output
        changed = residual.clone()
        changed[0, kept] = change(residual[0, kept])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with torch.no_grad():
        true = model.causal_lm(ids).logits[0]
        handle = model.blocks[layer].register_forward_hook(hook)
        other = model.causal_lm(ids).logits[0]
        handle.remove()
    return true, other


def expect(effect: Effect, true: Tensor, other: Tensor, tokens: Any) -> None:
    """The numbers of `effect`, from logits [N, V]."""
    log_p, log_q = true.log_softmax(-1), other.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert effect.kl_last == pytest.approx(kl[-1].item(), rel=1e-3, abs=2e-5)
    assert effect.kl_mean == pytest.approx(kl[torch.from_numpy(tokens.kept)].mean().item(), rel=1e-3, abs=2e-5)
    rise = log_q[-1].exp() - log_p[-1].exp()
    change = other[-1] - true[-1]
    change -= change.mean()
    for found, sign in ((effect.increased, 1), (effect.decreased, -1)):
        best = (sign * rise).sort(descending=True)
        assert [sign * (one.p_changed - one.p_true) for one in found] == pytest.approx(
            best.values[: len(found)].tolist(), abs=1e-5
        )
        for one in found:
            assert one.logit_change == pytest.approx(change[one.token_id].item(), abs=1e-3)
            assert one.p_true == pytest.approx(log_p[-1, one.token_id].exp().item(), abs=1e-5)


@pytest.mark.parametrize("with_lens", [False, True], ids=["bare", "lens"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_interventions_are_what_one_computes_by_hand(make: Make, architecture: str, with_lens: bool) -> None:
    setting = make(architecture, with_lens=with_lens)
    sae, lens, layer = setting.sae, setting.made.lens, 1
    tokens = read(setting)
    latents = latents_of(run_prompt(setting.subject, tokens, [layer])[1], Usual(np.zeros(96), 1), 1)
    latent = int(latents.latent[0])
    run = PromptRun(setting.subject, torch.from_numpy(tokens.ids)[None], torch.from_numpy(tokens.kept)[None])

    def without(x: Tensor) -> Tensor:
        y = x if lens is None else lens.apply(x, layer)
        found = sae(y)
        codes = found.codes
        emptied = codes._replace(values=torch.where(codes.indices == latent, 0.0, codes.values))
        y_changed = y + sae.decode(emptied, found.mean, found.std) - found.x_hat
        return y_changed if lens is None else lens.invert(y_changed, layer)

    def pushed(x: Tensor) -> Tensor:
        y = x if lens is None else lens.apply(x, layer)
        y_changed = y + 4.5 * (y.std(dim=1, keepdim=True) + 1e-5) * sae.W_dec[latent]
        return y_changed if lens is None else lens.invert(y_changed, layer)

    with torch.no_grad():
        ablated = run.effect([Intervention(kind="ablate", latent=latent, layers=(layer,))])
        expect(ablated, *by_hand(setting, tokens, layer, without), tokens)
        steered = run.effect([Intervention(kind="steer", latent=latent, layers=(layer,), coefficient=4.5)])
        expect(steered, *by_hand(setting, tokens, layer, pushed), tokens)
    p = by_hand(setting, tokens, layer, without)[0].softmax(dim=-1)
    assert len(run.next_at) == len(p)
    for after, row in zip(run.next_at, p, strict=True):
        assert [chance for _, chance in after] == pytest.approx(row.topk(N_AT_TOKEN).values.tolist(), abs=1e-5)
        assert all(row[token].item() == pytest.approx(chance, abs=1e-5) for token, chance in after)
    assert ablated.kl_last > 0
    assert steered.kl_mean > 0


@pytest.mark.parametrize("with_lens", [False, True], ids=["bare", "lens"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_intervention_of_nothing_changes_nothing(make: Make, architecture: str, with_lens: bool) -> None:
    setting = make(architecture, with_lens=with_lens)
    tokens = read(setting)
    run = PromptRun(setting.subject, torch.from_numpy(tokens.ids)[None], torch.from_numpy(tokens.kept)[None])
    active = set(run_prompt(setting.subject, tokens, setting.layers)[1].latent.tolist())
    silent = next(latent for latent in range(96) if latent not in active) if len(active) < 96 else None
    every = tuple(range(N_LAYERS[architecture]))
    for layers in (*((layer,) for layer in every), every):
        for one in (
            Intervention(kind="steer", latent=3, layers=layers, coefficient=0.0),
            *([Intervention(kind="ablate", latent=silent, layers=layers)] if silent is not None else []),
        ):
            effect = run.effect([one])
            assert effect.kl_last == effect.kl_mean == 0
            assert effect.increased == effect.decreased == []


def test_changes_of_several_layers_are_those_of_hooks_written_out(make: Make) -> None:
    setting = make("llama")
    model, sae, tokens = setting.made.model, setting.sae, read(setting)
    ids, kept = torch.from_numpy(tokens.ids)[None], torch.from_numpy(tokens.kept)[None]
    found = latents_of(run_prompt(setting.subject, tokens, setting.layers)[1], Usual(np.zeros(96), 1), 1)
    first, second = found.latent[:2].tolist()

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        found = sae(x[0].float())
        gone = torch.where(found.codes.indices == first, found.codes.values, 0.0).sum(1, keepdim=True)
        x[0, 1:] += (found.std * (3.0 * sae.W_dec[second] - gone * sae.W_dec[first]))[1:]

    with torch.no_grad():
        true = model.causal_lm(ids).logits[0]
        handles = [block.register_forward_hook(hook) for block in model.blocks]
        other = model.causal_lm(ids).logits[0]
        for handle in handles:
            handle.remove()
    both = [
        Intervention(kind="ablate", latent=first, layers="all").at(setting.layers),
        Intervention(kind="steer", latent=second, layers=tuple(setting.layers), coefficient=3.0),
    ]
    run = PromptRun(setting.subject, ids, kept)
    expect(run.effect(both), true, other, tokens)
    assert run.effect(both[::-1]) == run.effect(both)
    assert not any(block._forward_hooks for block in model.blocks)


def test_what_the_model_goes_on_with_is_changed_at_new_tokens_too(make: Make) -> None:
    setting = make("llama")
    model, sae, tokens = setting.made.model, setting.sae, read(setting)
    ids, kept = torch.from_numpy(tokens.ids)[None], torch.from_numpy(tokens.kept)[None]

    def hook(module: Any, arguments: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        x[0, 1:] += (60.0 * sae(x[0].float()).std * sae.W_dec[3])[1:]

    def greedy(n: int) -> list[int]:
        grown = ids
        with torch.no_grad():
            for _ in range(n):
                grown = torch.cat([grown, model.causal_lm(grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        return grown[0, ids.shape[1] :].tolist()

    run = PromptRun(setting.subject, ids, kept)
    true = greedy(6)
    assert run.continued(6) == true[: len(run.continued(6))]
    handle = model.blocks[1].register_forward_hook(hook)
    pushed = greedy(6)
    handle.remove()
    found = run.continued(6, [Intervention(kind="steer", latent=3, layers=(1,), coefficient=60.0)])
    assert found == pushed[: len(found)] != true[: len(found)]


def test_a_change_at_some_positions_is_that_of_a_hook_there(make: Make) -> None:
    setting = make("llama")
    model, sae, tokens = setting.made.model, setting.sae, read(setting)
    ids, kept = torch.from_numpy(tokens.ids)[None], torch.from_numpy(tokens.kept)[None]
    latent = int(latents_of(run_prompt(setting.subject, tokens, [1])[1], Usual(np.zeros(96), 1), 1).latent[0])

    def hook(module: Any, arguments: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        found = sae(x[0].float())
        gone = torch.where(found.codes.indices == latent, found.codes.values, 0.0).sum(1, keepdim=True)
        shift = found.std * (60.0 * sae.W_dec[3] - (gone * sae.W_dec[latent]))
        x[0, [2, 5]] += shift[[2, 5]]

    run = PromptRun(setting.subject, ids, kept)
    with torch.no_grad():
        true = model.causal_lm(ids).logits[0]
        handle = model.blocks[1].register_forward_hook(hook)
        other = model.causal_lm(ids).logits[0]
        first = int(other[-1].argmax())
        handle.remove()
    steered = Intervention(kind="steer", latent=3, layers=(1,), coefficient=60.0, positions=(5, 2))
    both = [steered, Intervention(kind="ablate", latent=latent, layers=(1,), positions=(2, 5))]
    effect = run.effect(both, [7, 9])
    expect(effect, true, other, tokens)
    assert effect.kl_last > 0
    p, q, logits = true[-1].softmax(-1), other[-1].softmax(-1), other[-1] - true[-1]
    for i, (token, before, after, change) in zip((7, 9), effect.watched, strict=True):
        assert (token, before, after) == (i, pytest.approx(p[i].item(), abs=1e-5), pytest.approx(q[i].item(), abs=1e-5))
        assert change == pytest.approx((logits[i] - logits.mean()).item(), abs=1e-4)
    assert run.continued(1, both) == [first]
    # New tokens are left as they are, though each is the first position of its pass.
    at_first = Intervention(kind="steer", latent=3, layers=(1,), coefficient=60.0, positions=(0,))
    assert run.continued(6, [at_first]) == run.continued(6)
    for position in (0, -1, len(tokens.ids)):
        wrong = Intervention(kind="ablate", latent=latent, layers=(1,), positions=(3, position))
        with pytest.raises(UsageError, match=f"prompt .*: positions should be 1 to {len(TEXT)}, .* found {position}"):
            check_positions([*both, wrong], TEXT, tokens)


def test_predictions_that_are_no_numbers_are_refused(make: Make) -> None:
    setting = make("llama", with_lens=False)
    tokens = read(setting)
    run = PromptRun(setting.subject, torch.from_numpy(tokens.ids)[None], torch.from_numpy(tokens.kept)[None])
    with pytest.raises(UsageError, match=r"steer latent 3: .* smaller coefficient"):
        run.effect([Intervention(kind="steer", latent=3, layers=(1,), coefficient=float("nan"))])


@pytest.mark.parametrize(
    "text", ["17:3", "17", "a:1:2", "17:1:x", "1:2:3:4", "", "1:1:nan", "1:1:-inf", "1:1:1e300", "1:1:1@"]
)
def test_a_steering_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="LATENT:LAYER:COEFFICIENT"):
        parse_steer(text)


def test_interventions_are_read() -> None:
    assert parse_steer("17:3:-2.5") == Intervention(kind="steer", latent=17, layers=(3,), coefficient=-2.5)
    assert parse_ablate("17") == Intervention(kind="ablate", latent=17, layers=None)
    assert parse_ablate("17:3") == Intervention(kind="ablate", latent=17, layers=(3,))
    assert parse_ablate("17:5,3,5") == Intervention(kind="ablate", latent=17, layers=(3, 5))
    assert parse_steer("17:all:1") == Intervention(kind="steer", latent=17, layers="all", coefficient=1.0)
    assert parse_ablate("17@5") == Intervention(kind="ablate", latent=17, layers=None, positions=(5,))
    assert parse_ablate("17:3@6,5") == Intervention(kind="ablate", latent=17, layers=(3,), positions=(5, 6))
    steered = Intervention(kind="steer", latent=17, layers="all", coefficient=1.0, positions=(5,))
    assert parse_steer("17:all:1@5") == steered
    for text in ("17:3:1", "17:3@", "17:3@a", "17@1@2"):
        with pytest.raises(UsageError, match="LATENT or LATENT:LAYER"):
            parse_ablate(text)
