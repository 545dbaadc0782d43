"""How near effects by the gradient (`Analysis.attribute`) come to taking each activation out, and what they cost.

    python benchmarks/bench_attribution.py ckpt.analysis

For three texts: the 40 largest effects on a prediction beside what ablating each of these activations alone (one
latent, layer and token) does to it, by Pearson's correlation and share of equal signs (1 is best); the mean size of the
true effect of those 40 and of 40 others, nats; seconds for all effects, and what as many ablations would take.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch

import residscope
from analysis.live.opened import Analysis
from analysis.model.continuation import last_output
from analysis.prompt.intervene import Intervention, changing

ASKED = (
    ("The capital of France is", " Paris", None),
    ("When Mary and John went to the store, John gave a drink to", " Mary", " John"),
    ("for i in range(10):\n    print(", None, None),
)


def compare(analysis: Analysis, text: str, token: str | None, against: str | None) -> None:
    """Print the row of one text."""
    live, model = analysis.live, analysis.live.prompted.model
    ids = torch.from_numpy(live.tokens(text).ids)[None]
    analysis.prompt(text, 1)  # read before the time is taken, the words of latents too
    began = time.perf_counter()
    table: Any = analysis.attribute(text, token, against=against)
    seconds = time.perf_counter() - began
    target, other = (live._token_id(one) for one in (table.attrs["token"], against or table.attrs["token"]))

    def measure(row: int | None) -> float:
        """Of the model with one activation taken out."""
        here, changes = torch.zeros(ids.shape, dtype=torch.bool), []
        if row is not None:
            latent, layer, position = (int(table[name][row]) for name in ("latent", "layer", "position"))
            here[0, position] = True
            changes = [Intervention(kind="ablate", latent=latent, layers=(layer,))]
        with changing(live.prompted, model.blocks, changes, here):
            logits = model.logits(last_output(model, ids)[0, -1]).double()
        return float(logits.log_softmax(dim=-1)[target] if against is None else logits[target] - logits[other])

    true, began = measure(None), time.perf_counter()
    first = np.array([true - measure(row) for row in range(40)])
    each = (time.perf_counter() - began) / 40
    rest = [true - measure(row) for row in np.linspace(40, len(table) - 1, 40).astype(int).tolist()]
    effect = table["effect"].to_numpy()[:40]
    print(
        f"| {text!r}: {table.attrs['token']!r}{f' against {against!r}' if against else ''} | "
        f"{np.corrcoef(effect, first)[0, 1]:.2f} | {np.mean(np.sign(effect) == np.sign(first)):.2f} | "
        f"{np.abs(first).mean():.3f} | {np.abs(rest).mean():.4f} | {seconds:.1f} | {len(table) * each:.0f} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Effects by the gradient beside ablations.")
    parser.add_argument("analysis", help="folder of `analyze`; the model of its store is needed")
    opened = residscope.open(parser.parse_args().analysis)
    print("| text, token | correlation | equal signs | of the 40, nats | of others, nats | s | s by ablating each |")
    print("|---|---|---|---|---|---|---|")
    for asked in ASKED:
        compare(opened, *asked)
