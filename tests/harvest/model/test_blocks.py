"""The blocks are found by their number, in whatever the model is wrapped."""

from typing import Any

import pytest
from torch import nn

from harvest.model.blocks import d_model_of, find_blocks, n_layers_of
from residscope.errors import ResidscopeError


def stack(n: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(1, 1) for _ in range(n)])


def test_the_blocks_are_the_unique_shallowest_list_of_that_length() -> None:
    model = nn.Module()
    model.decoder = nn.Module()
    model.decoder.layers = stack(3)
    model.decoder.rotary = nn.ModuleList([nn.Identity()] * 3)
    model.decoder.layers[0].experts = stack(3)
    model.vision = stack(4)
    assert find_blocks(model, 3) is model.decoder.layers
    assert find_blocks(model, 4) is model.vision


def test_blocks_that_are_missing_or_ambiguous_are_refused() -> None:
    model = nn.Module()
    model.a, model.b = stack(2), stack(2)
    with pytest.raises(ResidscopeError, match="cannot be identified: a, b all have 2"):
        find_blocks(model, 2)
    with pytest.raises(ResidscopeError, match=r"no list of 5 .*found a \(2\), b \(2\); this architecture"):
        find_blocks(model, 5)


def test_a_text_configuration_inside_another_is_found() -> None:
    import transformers

    config: Any = transformers.Gemma3Config()
    assert n_layers_of(config) == config.text_config.num_hidden_layers
    assert d_model_of(config) == config.text_config.hidden_size
