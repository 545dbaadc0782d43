"""Steering a plain model: the same as hooks written out, at each new token too, and nothing is left behind."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from analysis.live.model import LiveModel, steer
from residscope.errors import ResidscopeError, UsageError
from tests.support.harvested import make_checkpoint, make_harvested
from tests.support.live import make_live


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_plain_model_is_steered(tmp_path: Path, architecture: str) -> None:
    made = make_harvested(tmp_path, architecture)
    sae, model = make_checkpoint(tmp_path / "a.pt", made.store), made.model.causal_lm
    ids = torch.tensor([[5, 9, 30, 44, 12]])
    changes = [{"kind": "steer", "latent": 3, "layers": [1], "coefficient": 60.0}]

    def hook(module, arguments, output):  # type: ignore[no-untyped-def]
        x = output[0] if isinstance(output, tuple) else output
        x[0, 1:] += (60.0 * sae(x[0]).std * sae.W_dec[3])[1:]

    with torch.no_grad():
        true = model(ids).logits
        handle = made.model.blocks[1].register_forward_hook(hook)
        pushed = model(ids).logits
        grown = ids
        for _ in range(5):
            grown = torch.cat([grown, model(grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        handle.remove()
        with steer(model, sae, changes):
            torch.testing.assert_close(model(ids).logits, pushed, rtol=1e-4, atol=1e-5)
            found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert found.tolist()[0] == grown[0, : found.shape[1]].tolist()
        torch.testing.assert_close(model(ids).logits, true, rtol=0, atol=0)
        with pytest.raises(ZeroDivisionError), steer(model, sae, changes):
            _ = 1 / 0
    assert not any(block._forward_hooks for block in made.model.blocks)
    with pytest.raises(UsageError, match="trained on layers 0 1 2"), steer(model, sae, [{**changes[0], "layers": [9]}]):
        pass


def test_a_plain_model_is_steered_at_positions_of_its_text_alone(tmp_path: Path) -> None:
    made = make_harvested(tmp_path, "llama")
    sae, model = make_checkpoint(tmp_path / "a.pt", made.store), made.model.causal_lm
    ids = torch.tensor([[5, 9, 30, 44, 12]])
    change = {"kind": "steer", "latent": 3, "layers": [1], "coefficient": 60.0, "positions": [2]}

    def hook(module, arguments, output):  # type: ignore[no-untyped-def]
        x = output[0] if isinstance(output, tuple) else output
        if x.shape[1] > 1:
            x[0, 2] += (60.0 * sae(x[0]).std * sae.W_dec[3])[2]

    def grown() -> list[int]:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[0].tolist()

    handle = made.model.blocks[1].register_forward_hook(hook)
    with torch.no_grad():
        pushed, made_so = model(ids).logits, grown()
    handle.remove()
    with torch.no_grad(), steer(model, sae, [change]):
        torch.testing.assert_close(model(ids).logits, pushed, rtol=1e-4, atol=1e-5)
        assert grown() == made_so
    for position in (0, -1, 2**31):
        with (
            pytest.raises(UsageError, match="a change should be"),
            steer(model, sae, [{**change, "positions": [position]}]),
        ):
            pass


def test_a_token_is_named_as_it_reads_after_another() -> None:
    texts = {5: "", 6: " the", 7: "the", 8: " a", 9: "b", 300: "c", 10: "\ufffd"}
    model: Any = LiveModel.__new__(LiveModel)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=256))
    model.prompted = SimpleNamespace(model=SimpleNamespace(causal_lm=SimpleNamespace(config=config)))
    encoded = {" the": [5, 6], "the": [6], " ab": [8, 9], "c": [300], "\ufffd": [10], "": []}  # a space is put in front
    model.tokenizer = SimpleNamespace(
        encode=lambda one: [encoded[one[0]]],
        text=lambda ids: [texts[i] for i in ids],
        texts=lambda ids: [texts[i] for i in ids],
        ids=set(texts),
    )
    assert (model._token_id(" the"), model._token_id("the")) == (6, 7)
    for text, found in ((" ab", "' a', 'b'"), ("c", "'c'"), ("\ufffd", "'\ufffd'"), ("", "none")):
        with pytest.raises(UsageError, match=f"should be one token of the model, such as ' the', found {found}"):
            model._token_id(text)


def test_a_text_is_read_and_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = make_live(tmp_path).open()
    model, runs, read = analysis.live, list[int](), list[str]()
    model.prompted.model.base.register_forward_hook(lambda *_: runs.append(1))  # not where a pass ends early
    model.prompted.model.blocks[0].register_forward_hook(lambda *_: runs.append(0))
    tokens = model.tokens
    monkeypatch.setattr(model, "tokens", lambda text: read.append(text) or tokens(text))
    first = analysis.prompt("mary and john").data
    analysis.search(on="mary and john")
    analysis.prompt("mary and john")
    assert (runs, read) == ([0], ["mary and john"])
    assert first == analysis.prompt("mary and john").data


@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_answer_is_given_up_at_the_next_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """In the model's pass, and where vectors are encoded."""
    analysis = make_live(tmp_path).open()
    model, check, looks = analysis.live, analysis.live._check, list[int]()

    def stopping(*_: object) -> None:
        looks.append(1)
        if len(looks) > after:
            analysis.stop.set()
        check()

    monkeypatch.setattr(model, "prompted", model.prompted._replace(check=stopping))
    for block in model.prompted.model.blocks:
        block.register_forward_pre_hook(stopping)
    with pytest.raises(ResidscopeError, match="stopped"):
        analysis.prompt("mary and john")
    assert len(looks) == after + 1
    analysis.stop.clear()
    after = 99
    assert analysis.prompt("mary and john").data["n_active_latents"] > 0
