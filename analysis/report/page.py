"""report.html: one self-contained page with the findings, the figures and every live latent of an analysis.

`write_report` reads what `analyze` wrote into a folder, writes the figures (`analysis.report.figures`) and the page
beside it. This module assembles the page: the sections of `analysis.report.sections`, the style and script of
assets/, and the numbers that the script needs as packed data blocks (`pack_arrays`), which report.js unpacks by
itself.

No network: a content security policy in the page forbids every request, and every script but its own, by hash. What a
section returns is HTML already; whatever comes from the files is escaped there.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np

from analysis.report.charts import VIRIDIS
from analysis.report.data import OPTIONAL_SCALARS, Results, load_results
from analysis.report.figures import write_figures
from analysis.report.prompt import prompt_data
from analysis.report.sections import SECTIONS, page_header
from analysis.report.structure import KINDS
from analysis.report.template import fill, page_file


def write_report(out_dir: Path) -> Path:
    """Write the figures and report.html into `out_dir`, from the three files of `analyze` there.

    Returns the page's path. Without matplotlib there are no figure files; the page draws its own and is complete.
    Raises ResidscopeError for a missing file, IncompatibleError for files of another schema_version.
    """
    results = load_results(out_dir)
    write_figures(results, out_dir)
    path = out_dir / "report.html"
    path.write_text(render_report(results), encoding="utf-8")
    return path


def render_report(results: Results) -> str:
    """The whole page as text; the same text for the same results."""
    sections = [section(results) for section in SECTIONS]
    script = page_file("report.js") + page_file("latent.js") + page_file("prompt.js")
    blocks = [pack_arrays(name, arrays, **extra) for name, arrays, extra in prompt_data(results)]
    model = results.get("provenance", "store", "model") or "unnamed model"
    return fill(
        "report.html",
        title=escape(f"{model}: how its latents spread over layers"),
        css=page_file("report.css") + page_file("prompt.css"),
        header=page_header(results),
        nav="".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in sections),
        sections="\n".join(
            f'<section id="{anchor}"><h2>{escape(title)}</h2>{body}</section>' for anchor, title, body in sections
        ),
        version=escape(str(results.get("provenance", "analysis", "versions", "residscope") or "")),
        data="".join([latent_data(results), results.examples, *blocks]),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def latent_data(results: Results) -> str:
    """The numbers of the latent table as a data block; empty where no latent fired.

    Whole numbers are exact, others have 32 bits, shares by layer 16: within 0.05 % of their value.
    """
    if len(results.counts) == 0:
        return ""
    columns = ("mean", "layer_mean", "layer_std", "within_token", "between_tokens", "entropy")
    arrays = {name: _unsigned(results.latents[name]) for name in ("latent", "count", "n_tokens", "n_layers_active")}
    columns += tuple(name for name in OPTIONAL_SCALARS if name in results.latents)
    arrays |= {name: results.latents[name].astype("<f4") for name in columns}
    mass = results.latents["total"]
    arrays["mass_share"] = (mass / mass.sum()).astype("<f4")
    if len(results.kinds):
        arrays["kind"] = np.array([KINDS.index(kind) for kind in results.kinds], "<u2")
    arrays |= {"probs": results.probs.astype("<f2"), "counts": _unsigned(results.counts)}
    palette = json.dumps(VIRIDIS)
    return pack_arrays(
        "latent-data", arrays, layers=json.dumps(results.layer_numbers), kinds=json.dumps(KINDS), colours=palette
    )


def _unsigned(values: np.ndarray) -> np.ndarray:
    """Whole numbers in the narrowest type that report.js reads and that holds them."""
    top = int(values.max(initial=0))
    return values.astype("<u2" if top < 2**16 else "<u4" if top < 2**32 else "<f8")


def pack_arrays(block_id: str, arrays: Mapping[str, np.ndarray], **attributes: str) -> str:
    """Arrays as one <script> block of data that report.js' `unpack` reads: base64 of zlib of the bytes, C order.

    dtypes: <u2, <u4, <f4, <f8 and, for values from 0 to 1, <f2. The index holds (name, type, first byte, end).
    """
    index, chunks, start = [], [], 0
    for name, values in arrays.items():
        data = np.ascontiguousarray(values).tobytes()
        index.append((name, f"{values.dtype.kind}{values.dtype.itemsize}", start, start + len(data)))
        chunks.append(data)
        start += len(data)
    packed = base64.b64encode(zlib.compress(b"".join(chunks), 9)).decode()
    named = {"index": json.dumps(index, separators=(",", ":")), **attributes}
    extra = "".join(f' data-{name}="{escape(value)}"' for name, value in named.items())
    return f'<script type="text/plain" id="{escape(block_id)}"{extra}>{packed}</script>'
