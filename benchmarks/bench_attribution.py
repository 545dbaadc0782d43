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

import residscope
from analysis.live.opened import Analysis

ASKED = (
    ("The capital of France is", " Paris", None),
    ("When Mary and John went to the store, John gave a drink to", " Mary", " John"),
    ("for i in range(10):\n    print(", None, None),
)


def compare(analysis: Analysis, text: str, token: str | None, against: str | None) -> None:
    """Print the row of one text."""
    analysis.prompt(text, 1)  # read before the time is taken, the words of latents too
    began = time.perf_counter()
    table: Any = analysis.attribute(text, token, against=against)
    seconds = time.perf_counter() - began
    names = [table.attrs["token"], *([against] if against else [])]

    def lost(row: int) -> float:
        """By the measure, if one activation is taken out."""
        latent, layer, position = (int(table[name][row]) for name in ("latent", "layer", "position"))
        change = {"kind": "ablate", "latent": latent, "layers": [layer], "positions": [position]}
        target, *other = analysis.intervene(text, [change], tokens=names)["watched"]
        if other:
            return other[0]["logit_change"] - target["logit_change"]
        return float(np.log(target["p_true"] / target["p_changed"]))

    began = time.perf_counter()
    first = np.array([lost(row) for row in range(40)])
    each = (time.perf_counter() - began) / 40
    rest = [lost(row) for row in np.linspace(40, len(table) - 1, 40).astype(int).tolist()]
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
