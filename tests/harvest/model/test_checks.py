"""A model is known again as the store's own, also where vectors depend on the length of the sequence."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harvest.model.checks import check_length, check_model, refuse_other_weights
from harvest.model.load import load_model
from harvest.model.names import resolve_model
from harvest.residual import ResidualRecorder
from harvest.run import harvest
from residscope.errors import IncompatibleError
from store.activations import ActivationStore
from tests.support.harvesting import MakeConfig, ModelFolder
from tests.support.models import tiny_tokenizer

LONG_FACTORS = [4.0, 16.0, 32.0, 64.0]
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 40,
        "short_factor": [1.0] * 4,
        "long_factor": LONG_FACTORS,
    },
    "dynamic": {"factor": 8.0},
}


def save(folder: Path, kind: str) -> Path:
    """A tiny model whose rotary frequencies change for sequences longer than 16 tokens (dynamic) or 40."""
    sizes: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]},
    }
    if kind == "dynamic":
        config = transformers.LlamaConfig(max_position_embeddings=16, **sizes)
    else:
        longest = {"max_position_embeddings": 64, "original_max_position_embeddings": 40}
        config = transformers.Phi3Config(pad_token_id=0, **longest, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny_tokenizer(bos=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("context", [40, 60])
def test_a_model_of_longrope_is_the_stores_own(context: int, config: MakeConfig, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "longrope")
    made = config(model=str(folder), context_length=context)
    harvest(made)
    model = load_model(resolve_model(str(folder)))
    store = ActivationStore.open(made.out)
    check_model(store, model, None)
    ids = torch.from_numpy(store.tokens.token_id[None, :56].astype("int64"))
    one, two = ResidualRecorder(model).record(ids)[1], ResidualRecorder(model).record(ids[:, :40])[1]
    assert not torch.allclose(one[0, :40], two[0], rtol=0.1), "its vectors should depend on the length"
    with torch.no_grad():
        model.blocks.get_parameter("0.mlp.down_proj.weight").mul_(-9)
    with pytest.raises(IncompatibleError, match="does not reproduce"):
        check_model(store, model, None)
    with pytest.raises(
        IncompatibleError, match=r"layers and d_model should be \(\d, \d+\), as .*; give the model that"
    ):
        check_model(store, replace(model, d_model=1), None)


def test_vectors_depend_on_their_own_sequence_alone(tmp_path: Path) -> None:
    recorder = ResidualRecorder(load_model(resolve_model(str(save(tmp_path / "model", "dynamic")))))
    ids = torch.arange(48)[None] * 5 % 250
    sizes = (12, 24, 48)
    alone = {size: recorder.record(ids[:, :size])[1] for size in sizes}
    for size in (*sizes, *reversed(sizes)):
        assert torch.equal(recorder.record(ids[:, :size])[1], alone[size])
    assert not torch.allclose(alone[48][:, :24], alone[24], rtol=0.1)


def test_a_store_from_before_more_files_counted_knows_its_model(config: MakeConfig) -> None:
    made = config()
    harvest(made)
    store = ActivationStore.open(made.out)
    spec = resolve_model(str(made.weights.model))
    first = str(spec.fingerprint).partition("+")[0]
    assert first != spec.fingerprint
    store.meta.provenance["model_fingerprint"] = first
    refuse_other_weights(spec, store)
    store.meta.provenance["model_fingerprint"] = first[:-1] + "?"
    with pytest.raises(IncompatibleError, match="its content hash should be"):
        refuse_other_weights(spec, store)


def test_a_sequence_longer_than_the_model_takes_is_one_line(model_folder: ModelFolder) -> None:
    """As of configurations that do not say how long it may be."""
    model = load_model(resolve_model(str(model_folder("gpt2"))))
    check_length(model, torch.arange(64))
    line = r"\(GPT2LMHeadModel\): it fails on a sequence of 65 tokens \(IndexError: .*\); try --context-length"
    with pytest.raises(IncompatibleError, match=line):
        check_length(model, torch.arange(65))
