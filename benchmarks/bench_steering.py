"""`residscope.steer` inside other libraries: the same next-token distribution as on the plain transformers model.

    python -m pip install nnsight transformer_lens
    python benchmarks/bench_steering.py

SmolLM2-135M and a random autoencoder (steering adds a latent's direction, whichever it is). Compared are
log-probabilities of the next token, steered at one and at all layers, in nats: plain model, nnsight's trace, and
TransformerLens' bridge. Exit code 1 where a difference is above 1e-3, where steering changes nothing, or where the
hooks outlast the `with`.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

import residscope
from harvest.model.load import load_model
from harvest.model.names import resolve_model
from train.model import MLSAE
from train.model_config import SAEConfig

TEXT = "The capital of France is"
TOLERANCE = 1e-3


def main() -> None:
    import nnsight  # type: ignore[import-not-found]
    from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

    loaded = load_model(resolve_model("smollm2-135m"))
    model, tokenizer = loaded.causal_lm, loaded.tokenizer.backend
    torch.manual_seed(0)
    sae = MLSAE(SAEConfig(d_model=loaded.d_model, n_latents=1024, k=8))
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn(1024, loaded.d_model), dim=1)
    sae.W_enc.data = sae.W_dec.data.clone()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    traced: Any = nnsight.TransformersModel(model, tokenizer=tokenizer)
    bridge: Any = TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct", hf_model=model, tokenizer=tokenizer
    )

    def plain() -> Tensor:
        return model(ids).logits[0, -1]

    def by_nnsight() -> Tensor:
        with traced.trace(ids):
            found = traced.lm_head.output[0, -1].save()
        return found  # noqa: RET504 (nnsight reads this function's source)

    def by_bridge() -> Tensor:
        return bridge(ids)[0, -1]

    failed = False
    print("| steered at | way | largest difference from plain, nats | changed by steering, nats |\n|---|---|---|---|")
    with torch.no_grad():
        ways = {"nnsight, trace": (by_nnsight, traced._module), "bridge": (by_bridge, bridge.original_model)}
        unsteered = {name: way().log_softmax(0) for name, (way, _) in ways.items()} | {"plain": plain().log_softmax(0)}
        for layers in ([12], "all"):
            changes = [{"kind": "steer", "latent": 5, "layers": layers, "coefficient": 20.0}]
            with residscope.steer(model, sae, changes):
                expected = plain().log_softmax(0)
            for name, (way, inside) in ways.items():
                with residscope.steer(inside, sae, changes):
                    found = way().log_softmax(0)
                off, moved = (float((found - other).abs().max()) for other in (expected, unsteered[name]))
                failed |= off > TOLERANCE or moved < 0.1 or not torch.equal(way().log_softmax(0), unsteered[name])
                print(f"| {layers} | {name} | {off:.2g} | {moved:.3g} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
