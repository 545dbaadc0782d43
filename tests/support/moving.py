"""A model of five layers with a feature that is known: at the letter u, and there alone, it stands after one block,
that of the number position modulo five, so that from one u to the next it moves up by a layer.

How: GPT-2 without attention. An embedding is two ones, one for the token and one for the position modulo five, so that
the mean and scale of LayerNorm depend on nothing but whether the feature is there. In block l one neuron is on where
the two ones are those of u and l, and adds `DIRECTION`; another is on where they are those of u and l - 1, and takes
the feature away again: a thousandth more than was there, so that rounding leaves none of it.
"""

from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from analysis.cli import main as analyze
from harvest.cli import main as harvest
from store.activations import ActivationStore
from tests.support.models import tiny_tokenizer
from tests.support.small import save_small
from train.model import MLSAE, SAEConfig

N_LAYERS, D_MODEL = 5, 32
TOKENS, U, LAYERS, MOVING = 23, 23, 24, 30
"""The first so many dimensions are those of other tokens than u, then that of u, from `LAYERS` on those of positions;
the last two are the feature's. `MOVING` is its latent too."""

DIRECTION = torch.zeros(D_MODEL)
DIRECTION[MOVING], DIRECTION[MOVING + 1] = sqrt(0.5), -sqrt(0.5)

WORDS = ("up under us all", "a run uuuuu to the bus", "no one goes", "ten of them sang", "four by four we go", "uuu")


class Moving(NamedTuple):
    """Where it all is."""

    store: Path
    sae: Path
    model: Path
    folder: Path
    """Of the analysis."""


def moving_model(folder: Path) -> Path:
    """Save the model and its tokenizer."""
    tokenizer = tiny_tokenizer(bos=False)
    size: dict[str, Any] = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 1, "n_positions": 64, "n_inner": 2}
    ids: dict[str, Any] = {"bos_token_id": 257, "eos_token_id": 256, "pad_token_id": 256, "vocab_size": 260}
    config = transformers.GPT2Config(**size, **ids, activation_function="relu", tie_word_embeddings=False)
    model: Any = transformers.GPT2LMHeadModel(config)
    mean = 2 / D_MODEL
    scale, with_feature = (sqrt((2 + more) / D_MODEL - mean**2 + config.layer_norm_epsilon) for more in (0, 1))
    threshold = (1.5 - 2 * mean) / scale  # between what LayerNorm makes of one of the two ones and of both
    with torch.no_grad():
        for parameter in (*model.transformer.wte.parameters(), *model.transformer.wpe.parameters()):
            parameter.zero_()
        for token in range(260):
            model.transformer.wte.weight[token, token % TOKENS] = 1
        u = tokenizer.convert_tokens_to_ids("u")
        model.transformer.wte.weight[u] = torch.eye(D_MODEL)[U]
        for position in range(64):
            model.transformer.wpe.weight[position, LAYERS + position % N_LAYERS] = 1
        for layer, block in enumerate(model.transformer.h):
            for parameter in (*block.attn.parameters(), *block.mlp.parameters()):
                parameter.zero_()
            for neuron, of, there, amount in ((0, layer, scale, 1.0), (1, layer - 1, with_feature, -1.001)):
                if of >= 0:
                    block.mlp.c_fc.weight[[U, LAYERS + of], neuron] = 1
                    block.mlp.c_fc.bias[neuron] = -threshold
                    block.mlp.c_proj.weight[neuron] = amount * DIRECTION / (2 * (1 - mean) / there - threshold)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_moving(root: Path) -> Moving:
    """Harvest by the command, make the autoencoder, and analyze by the command, in `root`."""
    made = Moving(root / "acts.zarr", root / "ckpt.pt", moving_model(root / "model"), root / "ckpt.analysis")
    (root / "texts").mkdir()
    for i in range(30):
        (root / "texts" / f"{i:02}.txt").write_text(WORDS[i % len(WORDS)], encoding="utf-8")
    text = ("--dataset", str(root / "texts"), "--max-tokens", "300", "--context-length", "32")
    where = ("--model", str(made.model), "--out", str(made.store), "--store-dtype", "float32", "--device", "cpu")
    assert harvest([*where, *text]) == 0
    sae = MLSAE(SAEConfig(d_model=D_MODEL, n_latents=MOVING + 1, k=3))
    weights = torch.eye(D_MODEL)[: MOVING + 1]
    weights[MOVING] = DIRECTION
    sae.load_state_dict({"W_enc": weights, "W_dec": weights, "b_pre": torch.zeros(D_MODEL)})
    save_small(made.sae, sae, ActivationStore.open(made.store), {"validation": None})
    options = ("--downstream-tokens", "0", "--no-nulls", "--no-intervals", "--no-report", "--device", "cpu")
    assert analyze(["--store", str(made.store), "--sae", str(made.sae), *options]) == 0
    return made
