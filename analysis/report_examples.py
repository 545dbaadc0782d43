"""The report's examples: what each latent is most active at, layer by layer, packed so that a page opens at once.

Blocks of `PER_BLOCK` live latents, each base64 of deflated JSON, which report.js unpacks when a latent of it is opened.
The strongest example of each latent and layer is there; where that takes more than `BUDGET`, those of the layers at
which the latent is most active, and the page says so. Not here: finding them (`analysis.examples`).
"""

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

PER_BLOCK = 64
"""Live latents in a block."""

BUDGET = 11_000_000
"""Characters that all blocks together may take."""

BEFORE, AFTER = 60, 40
"""Characters shown around an example's token."""

LAYERS_KEPT = (10**6, 12, 6, 3, 1)
"""Layers of a latent that are tried in turn, until the blocks fit."""


def example_blocks(folder: Path, latents: np.ndarray) -> str:
    """The blocks as HTML, in order of `latents` [J] (ascending); empty where there are neither examples nor tokens."""
    examples, logits = folder / "examples.parquet", folder / "latent_logits.parquet"
    if not len(latents) or not (examples.is_file() or logits.is_file()):
        return ""
    contents: list[dict[str, Any]] = [{"examples": []} for _ in latents]
    row_of = {int(latent): row for row, latent in enumerate(latents)}
    if examples.is_file():
        names = ["latent", "layer", "activation", "text_before", "text_token", "text_after"]
        table = pq.read_table(examples, columns=names, filters=[("rank", "==", 0)])
        for latent, layer, activation, before, token, after in zip(
            *(table[name].to_pylist() for name in names), strict=True
        ):
            shown = [layer, float(f"{activation:.3g}"), before[-BEFORE:], token, after[:AFTER]]
            contents[row_of[latent]]["examples"].append(shown)
    if logits.is_file():
        names = ["latent", "promoted", "suppressed"]
        table = pq.read_table(logits, columns=names)
        for latent, promoted, suppressed in zip(*(table[name].to_pylist() for name in names), strict=True):
            contents[row_of[latent]] |= {"promoted": promoted, "suppressed": suppressed}
    blocks: list[str] = []
    for most in LAYERS_KEPT:
        blocks = [_block(i, contents[i : i + PER_BLOCK], most) for i in range(0, len(contents), PER_BLOCK)]
        if sum(map(len, blocks)) <= BUDGET:
            break
    return "\n".join(blocks)


def _block(first: int, contents: list[dict[str, Any]], most: int) -> str:
    cut = any(len(content["examples"]) > most for content in contents)
    kept = []
    for content in contents:
        strongest = sorted(content["examples"], key=lambda example: -example[1])[:most]
        kept.append({**content, "examples": sorted(strongest, key=lambda example: example[0])})
    data = zlib.compress(json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode(), 6)
    packed = base64.b64encode(data).decode()
    note = f' data-most="{most}"' if cut else ""
    return f'<script type="text/plain" id="latent-block-{first // PER_BLOCK}"{note}>{packed}</script>'
