"""The residual stream, against hooks written by hand and against `output_hidden_states`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from harvest.model.load import LoadedModel, load_model
from harvest.model.names import resolve_model
from harvest.residual import ResidualRecorder
from residscope.errors import ResidscopeError, UsageError
from tests.support.harvesting import ModelFolder
from tests.support.models import ARCHITECTURES

IDS = torch.arange(40).view(2, 20) * 11 % 250


def by_hand(model: LoadedModel, ids: Tensor) -> list[Tensor]:
    """Block outputs of an ordinary run of the whole model."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        kept.append((out[0] if isinstance(out, tuple) else out).detach().clone())

    handles = [block.register_forward_hook(keep) for block in model.blocks]
    model.causal_lm(ids)
    for handle in handles:
        handle.remove()
    return kept


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, model_folder: ModelFolder) -> LoadedModel:
    return load_model(resolve_model(str(model_folder(request.param))))


def test_every_layer_equals_hooks_by_hand(model: LoadedModel) -> None:
    for found, expected in zip(ResidualRecorder(model).record(IDS), by_hand(model, IDS), strict=True):
        assert torch.equal(found, expected)


def test_hidden_states_agree_but_for_the_last_layer(model: LoadedModel) -> None:
    found = ResidualRecorder(model).record(IDS)
    states = model.base(IDS, output_hidden_states=True).hidden_states
    for i in range(model.n_layers - 1):
        torch.testing.assert_close(found[i], states[i + 1])
    last = states[model.n_layers]
    assert (found[-1] - last).abs().max() > 0.1
    torch.testing.assert_close(model.final_norm(found[-1]), last)


def test_chosen_layers_are_those_and_the_rest_is_not_run(model: LoadedModel) -> None:
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.blocks)]
    found = ResidualRecorder(model, [0, 1]).record(IDS)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    for i, expected in enumerate(by_hand(model, IDS)[:2]):
        assert torch.equal(found[i], expected)


def test_the_model_is_left_as_it_was(model: LoadedModel) -> None:
    before = model.causal_lm(IDS).logits
    recorder = ResidualRecorder(model)
    recorder.record(IDS)
    with pytest.raises(ZeroDivisionError):
        recorder.stream(IDS, lambda i, residual: 1 // 0)
    assert all(not block._forward_hooks for block in model.blocks)
    assert torch.equal(model.causal_lm(IDS).logits, before)


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [-1], [99]])
def test_layers_that_are_not_there(layers: list[int], model_folder: ModelFolder) -> None:
    model = load_model(resolve_model(str(model_folder("gpt2"))))
    with pytest.raises(UsageError, match="layers should ascend"):
        ResidualRecorder(model, layers)


def test_a_block_that_does_not_run_is_noticed(model_folder: ModelFolder) -> None:
    model = load_model(resolve_model(str(model_folder("gpt2"))))
    recorder = ResidualRecorder(model)
    model.base.h = model.base.h[:2]  # The model forgets its last block; `model.blocks` still has three.
    with pytest.raises(ResidscopeError, match=r"should run once each, in order; they ran as \[0, 1\]"):
        recorder.record(IDS)


def test_an_output_of_another_shape_is_refused(model_folder: ModelFolder) -> None:
    model = load_model(resolve_model(str(model_folder("gpt2"))))
    model.blocks[1].register_forward_hook(lambda module, args, out: "text")
    with pytest.raises(ResidscopeError, match=r"layer 1: the block's output should be \(2, 20, 32\), found str"):
        ResidualRecorder(model).record(IDS)
