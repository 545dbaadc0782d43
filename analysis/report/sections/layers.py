"""Section: where latents are active, a heat map of P(layer | latent) with latents sorted by mean layer.

Shapes: L layers, J live latents, B bins of neighbouring latents.
"""

import math
import struct
import zlib
from typing import NamedTuple

import numpy as np

from analysis.report.charts import AFTER_BLOCK, VIRIDIS, Plot, layer_ticks, round_step
from analysis.report.data import Results
from analysis.report.markup import Section, figure, show

TITLE = "Where latents are active"
SHARE_TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)


class HeatMap(NamedTuple):
    """P(layer | latent) with the live latents sorted by mean layer, averaged over bins of neighbours."""

    share: np.ndarray
    """float64 [L, B]."""
    n_latents: int
    """Live latents shown, J."""
    per_bin: float
    """Latents per bin, J / B (bins differ by at most one)."""
    top: float
    """End of the colour scale: 1 cell in 200 is above it, so that a few sharp bins do not darken all others."""


def section(results: Results) -> Section:
    heat, title = heat_map(results), layer_profile_title(results)
    if heat.n_latents == 0:
        return Section(TITLE, f"<p>{title}.</p>")
    column = f"the mean of {show(heat.per_bin, 2)} latents next to each other in this order"
    caption = (
        f"Each column is {column if heat.per_bin > 1 else 'a live latent'}. A bright band along the diagonal: latents "
        "keep to a few layers. A column that is even from bottom to top: latents stay on throughout the model. A "
        f"latent that is equally active at all layers has a spread of {show(np.std(results.layer_numbers), 2)} layers."
    )
    return Section(TITLE, figure(title, _chart(results, heat), caption))


def layer_profile_title(results: Results) -> str:
    """What the heat map finds: how widely a typical live latent spreads."""
    if len(results.counts) == 0:
        return "No latent fired on these tokens"
    median = show(np.median(results.latents["layer_std"]), 2)
    return f"Half of the {len(results.counts):,} live latents spread over {median} layers (s.d.) or more"


def heat_map(results: Results, max_bins: int = 480) -> HeatMap:
    """Sort the live latents by mean layer and average neighbours, so that at most `max_bins` columns remain.

    Averages, rather than every n-th latent, let each latent count and show no pattern that the data do not have.
    """
    order = np.argsort(results.latents["layer_mean"], kind="stable")
    n_latents = len(order)
    if (n_bins := min(max_bins, n_latents)) == 0:
        return HeatMap(np.zeros((len(results.layer_numbers), 0)), 0, 0.0, 1.0)
    starts = np.arange(n_bins) * n_latents // n_bins
    sizes = np.diff(np.append(starts, n_latents))
    share = np.add.reduceat(results.probs[order], starts, axis=0) / sizes[:, None]
    return HeatMap(share.T, n_latents, n_latents / n_bins, float(np.quantile(share, 0.995)))


def _chart(results: Results, heat: HeatMap) -> str:
    n_layers = len(results.layer_numbers)
    plot = Plot("Heat map: share of each latent's activation mass by layer; latents sorted by mean layer.", 20)
    plot.image(heat_png(heat))
    plot.y_ticks([((i + 0.5) / n_layers, name) for i, name in layer_ticks(results.layer_numbers)], grid=False)
    ranks = range(0, heat.n_latents + 1, max(1, round(round_step(heat.n_latents, 5))))
    plot.x_ticks([(rank / heat.n_latents, f"{rank:,}") for rank in ranks], "live latents, sorted by mean layer")
    stops = ", ".join(f"#{colour}" for colour in VIRIDIS)
    places = {tick: 100 * math.sqrt(tick / heat.top) for tick in SHARE_TICKS if tick <= heat.top}
    ticks = "".join(f'<span style="left:{place:.2f}%">{tick:g}</span>' for tick, place in places.items())
    return (
        f'<p class="yname">{AFTER_BLOCK}</p>{plot.render()}<div class="bar"><div class="scale" '
        f'style="background:linear-gradient(to right, {stops})">{ticks}</div>'
        "P(layer | latent): share of the latent's activation mass, no unit; colour by its square root; "
        f"values above {show(heat.top, 2)} all have the last colour</div>"
    )


def heat_png(heat: HeatMap) -> bytes:
    """The cells as a PNG with a palette, last layer on top. Cells are repeated so that smoothing does not blur them."""
    level = np.sqrt(np.clip(heat.share / heat.top, 0, 1)) if heat.top > 0 else np.zeros_like(heat.share)
    cells = np.repeat(np.round(level * 255).astype(np.uint8)[::-1], -(-240 // len(level)), axis=0)
    cells = np.repeat(cells, -(-480 // cells.shape[1]), axis=1)
    height, width = cells.shape
    anchors = np.array([list(bytes.fromhex(colour)) for colour in VIRIDIS], dtype=np.float64)
    at = np.linspace(0, len(anchors) - 1, 256)
    palette = np.stack([np.interp(at, np.arange(len(anchors)), channel) for channel in anchors.T], axis=1)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), cells], axis=1)  # each row begins with its filter: none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
        + chunk(b"PLTE", np.round(palette).astype(np.uint8).tobytes())
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
