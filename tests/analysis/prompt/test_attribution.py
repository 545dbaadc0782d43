"""Effects by the gradient: against steering a little at one position of one layer, and what they should leave out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis.model.continuation import last_output
from analysis.prompt import attribution
from analysis.prompt.attribution import attribute
from analysis.prompt.intervene import Intervention, PromptedModel, changing
from analysis.prompt.view import Activations, read_prompt, run_prompt
from tests.support.harvested import make_checkpoint, make_harvested

TEXT, POSITION, TOKEN, OTHER = "mary and john", 9, 110, 101


def test_an_opening_alone_has_no_effects_and_tiles_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_harvested(tmp_path, "llama")
    prompted = PromptedModel(made.model, make_checkpoint(tmp_path / "ckpt.pt", made.store), None, "float32")
    tokens = read_prompt(made.store, made.model.tokenizer, made.model.causal_lm.config, TEXT)
    layers = list(made.store.meta.layers)
    found = run_prompt(prompted, tokens, layers)[1]
    none = Activations(*[column[:0] for column in found])  # type: ignore[arg-type]
    nothing, all_missed = attribute(prompted, tokens, layers, none, POSITION, TOKEN, None)
    assert nothing.shape == (0,)
    whole, missed = attribute(prompted, tokens, layers, found, POSITION, TOKEN, None)
    for layer in layers:  # where nothing is active all but b_pre and the mean is missed
        assert all_missed[layer] == pytest.approx(missed[layer] + whole[found.layer == layer].sum(), rel=1e-5, abs=1e-7)
    monkeypatch.setattr(attribution, "ROWS", 7)
    with torch.inference_mode():  # of the caller
        again = attribute(prompted, tokens, layers, found, POSITION, TOKEN, None)
    np.testing.assert_allclose(again[0], whole, rtol=1e-5, atol=1e-7)
    assert again[1] == pytest.approx(missed, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("architecture", "with_lens"), [("llama", False), ("gpt2", True), ("gemma", False)])
def test_it_is_the_slope_of_steering(tmp_path: Path, architecture: str, with_lens: bool) -> None:
    made = make_harvested(tmp_path, architecture, with_lens=with_lens)
    sae, model = make_checkpoint(tmp_path / "ckpt.pt", made.store), made.model
    prompted = PromptedModel(model, sae, made.lens, made.store.meta.stored_dtype)
    tokens = read_prompt(made.store, model.tokenizer, model.causal_lm.config, TEXT)
    ids = torch.from_numpy(tokens.ids)[None]
    layers = list(made.store.meta.layers)
    found = run_prompt(prompted, tokens, layers)[1]
    both = {against: attribute(prompted, tokens, layers, found, POSITION, TOKEN, against) for against in (None, OTHER)}
    effect = {against: of_latents for against, (of_latents, _) in both.items()}

    def measures(i: int, coefficient: float) -> tuple[float, float]:
        here = torch.zeros(ids.shape, dtype=torch.bool)
        here[0, found.position[i]] = True
        change = Intervention(
            kind="steer", latent=int(found.latent[i]), layers=(int(found.layer[i]),), coefficient=coefficient
        )
        with changing(prompted, model.blocks, [change], here):
            logits = model.logits(last_output(model, ids)[0, POSITION]).double()
        return float(logits.log_softmax(dim=-1)[TOKEN]), float(logits[TOKEN] - logits[OTHER])

    assert not effect[None][found.position > POSITION].any()  # what comes later cannot matter
    before = np.flatnonzero(found.position <= POSITION)
    chosen = before[np.argsort(-np.abs(effect[None][before]))[:: max(len(before) // 12, 1)]]
    step = 0.01
    for which, against in enumerate((None, OTHER)):
        slopes = [(measures(i, step)[which] - measures(i, -step)[which]) / (2 * step) for i in chosen.tolist()]
        expected = np.array(slopes) * found.activation[chosen]
        largest = np.abs(effect[against]).max()
        assert largest > 0
        np.testing.assert_allclose(effect[against][chosen], expected, atol=2e-3 * largest, rtol=2e-2)

    def without(layer: int, share: float) -> tuple[float, float]:
        """The measures with so much of the reconstruction's error added after a block, at the kept positions."""

        def hook(module: Any, arguments: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            own = x[0, tokens.kept]
            y = own.float() if made.lens is None else made.lens.apply(own.float(), layer)
            error = share * (y - sae(y).x_hat)
            x[0, tokens.kept] += error if made.lens is None else made.lens.invert(y + error, layer) - own

        handle = model.blocks[layer].register_forward_hook(hook)
        with torch.no_grad():
            logits = model.logits(last_output(model, ids)[0, POSITION]).double()
        handle.remove()
        return float(logits.log_softmax(dim=-1)[TOKEN]), float(logits[TOKEN] - logits[OTHER])

    for which, against in enumerate((None, OTHER)):
        missed = both[against][1]
        assert list(missed) == layers
        slopes = [(without(layer, step)[which] - without(layer, -step)[which]) / (2 * step) for layer in missed]
        np.testing.assert_allclose([*missed.values()], slopes, atol=2e-3 * max(map(abs, slopes)), rtol=2e-2)
